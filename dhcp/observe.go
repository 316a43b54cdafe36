package dhcp

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/krolaw/dhcp4"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Observer is told how exchanges end, to be counted. Its method returns at once
// and may be called concurrently.
type Observer interface {
	// Exchanged: a message, with all its repetitions, and what came of it. Took is
	// from its first sending to the outcome.
	//
	// A DISCOVER counts once for the server whose offer was taken, or for each
	// that made a probe an offer, and once for each of those whose offers were
	// refused; a REQUEST once for who granted or refused it. Servers that merely
	// said nothing beside these aren't told of. Where nobody answered, it counts
	// once for each server that was asked, on a LAN once for all; not so where
	// less than half a second was left, or the caller went away within 4 s: that
	// is no server's fault.
	//
	// Server is the address by which it is asked as a relay agent, or on a LAN
	// its identifier, where anybody can make up ever more of them: whoever
	// remembers them must have a bound. It is zero for all on a LAN, where no way
	// to a server was found, and as a relay agent for who answers by none of the
	// addresses that are asked.
	Exchanged(message string, server netip.Addr, outcome string, took time.Duration)
}

// Messages, as Exchanged has them.
const (
	MessageDiscover = "discover"
	MessageRequest  = "request" // in any state: selecting, INIT-REBOOT, renewing, rebinding
	MessageRelease  = "release"
	MessageDecline  = "decline"
)

// Outcomes, as Exchanged has them.
const (
	OutcomeOffer   = "offer"   // to a DISCOVER
	OutcomeRefused = "refused" // an offer that the endpoint must not have
	OutcomeACK     = "ack"     // to a REQUEST
	OutcomeNAK     = "nak"     // to a REQUEST
	OutcomeSilent  = "silent"  // nobody answered
	OutcomeFailed  = "failed"  // it could not be sent
	OutcomeSent    = "sent"    // no answer is awaited, to RELEASE and DECLINE
)

// messageTypes are the values of option 53.
var messageTypes = map[dhcp4.MessageType]string{
	dhcp4.Discover: MessageDiscover, dhcp4.Offer: "offer", dhcp4.Request: MessageRequest, dhcp4.Decline: MessageDecline,
	dhcp4.ACK: "ack", dhcp4.NAK: "nak", dhcp4.Release: MessageRelease, dhcp4.Inform: "inform",
}

// Observe has an Observer told of every exchange. Call it before the first one.
func (c *Client) Observe(o Observer) { c.servers.observer = o }

// Servers implements lease.Client.
func (c *Client) Servers(pool lease.Pool) []lease.ServerStatus {
	return c.servers.statuses(c.inForce(pool.Options))
}

// Ready returns nil if an address request can be expected to succeed, else an
// error that says what is missing and what to do about it. It sends and opens
// nothing and waits for nobody.
//
// One of the links of the global settings must be open, where these name any:
// networks may have servers of their own. And a server must answer: it doesn't
// where the last message to it could not be sent, or once three messages in a
// row, the first of them longer ago than silence, have no answer. That counts for
// the servers of the global settings, where these name some, else for all that
// networks name, and is an error where at least one is such and none answers: a
// *Silence, or why nothing could be sent to any. Where nobody was asked yet, or
// not since the relay address was changed, all is well. That a server is back
// shows in the next answer: AskSilent asks for one.
func (c *Client) Ready(silence time.Duration) error {
	global := *c.global.Load()
	places, errs := c.placesOf(global)
	for _, at := range places {
		errs = append(errs, c.look(at))
	}
	if len(errs) > 0 && !slices.Contains(errs, nil) {
		return errs[0]
	}
	return c.servers.silence(global, silence)
}

// AskSilent asks the servers anew that Ready counts as not answering, each from
// where it was asked last, on a LAN all at once, and waits until they have
// answered or ctx ends: on an idle host nobody else may ask for long. It probes
// with DHCPDISCOVER, as Probe does, and takes no lease. Where none is silent, or
// another one answers, it does nothing. What comes of it shows in Servers and
// Ready.
func (c *Client) AskSilent(ctx context.Context) {
	var asking sync.WaitGroup
	asked := map[Asked]bool{}
	for _, one := range c.servers.mute(*c.global.Load(), 0) {
		to := one.asked
		if to.Interface != "" {
			to.Server = netip.AddrPort{}
		}
		if !asked[to] {
			asked[to] = true
			asking.Go(func() { c.askAgain(ctx, to, one.subnet) })
		}
	}
	asking.Wait()
}

// askAgain asks as before, until the first offer.
func (c *Client) askAgain(ctx context.Context, to Asked, subnet netip.Prefix) {
	link, err := c.link(place{relay: to.Relay, iface: to.Interface})
	if err != nil {
		c.servers.report(dhcp4.Discover, to.Server.Addr(), OutcomeFailed, 0)
		return
	}
	who := stranger(lease.Pool{Subnet: subnet, Options: c.inForce(lease.Options{})}, c.probeMAC)
	x := c.begin(who, []path{{link: link, to: to.Server}})
	defer x.end()
	// Its end is with the servers.
	_, _ = x.discover(ctx, &message{kind: dhcp4.Discover}, func(lease.Offer) error { return nil })
}
