package dhcp

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/krolaw/dhcp4"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Client runs DHCP exchanges for endpoints on this host. It implements
// lease.Client and may be used concurrently; Close ends it.
type Client struct {
	global    atomic.Pointer[lease.Options]
	log       *slog.Logger
	host      string // this host's name, "" where it has none
	probeMAC  lease.MAC
	drops     Drops
	recorder  recorder
	farewells *farewells
	servers   *servers

	// What the host does; tests put their own in.
	openRelay     func(place) (socket, error)
	openBroadcast func(place) (socket, error)
	source        func(to netip.AddrPort) (netip.Addr, error)
	resolve       func(ctx context.Context, host string) ([]netip.Addr, error)
	hardware      func(relay netip.Addr) (lease.MAC, error)

	// mu guards links, and why those that aren't open could not be opened the
	// last time. It isn't held while one is opened.
	mu       sync.Mutex
	links    map[place]*Link
	unopened map[place]error
	pulse    lease.Pulse[[]*Link]
}

var _ lease.Client = (*Client)(nil)

// NewClient makes a client with the settings that apply where a pool has none.
// Links are opened when they are needed.
func NewClient(global lease.Options, log *slog.Logger) *Client {
	// Without a name option 82 has none.
	host, _ := os.Hostname()
	c := &Client{
		log: log, host: host, probeMAC: hostMAC(),
		farewells: newFarewells(), servers: newServers(),
		openRelay: openRelay, openBroadcast: openBroadcast,
		source: sourceTowards, resolve: resolveHost, hardware: hardwareOf,
		links: map[place]*Link{}, unopened: map[place]error{},
	}
	c.global.Store(new(global.Or(lease.Defaults())))
	return c
}

// NewProber makes a client for probes beside whatever has the ports, a
// running daemon included: it binds no port, takes no lock and needs
// CAP_NET_RAW. Only Probe, ProbeAs, CheckInterface and Close may be called.
func NewProber(global lease.Options, log *slog.Logger) *Client {
	c := NewClient(global, log)
	c.openRelay = openBeside
	return c
}

// Open opens the links of the global settings ahead of the first request. It
// returns an ErrSecondCopy; anything else that is wrong may be mended by then,
// so it is only logged. Names are left to the requests: resolving may take
// long.
func (c *Client) Open() error { return c.openAhead(*c.global.Load()) }

// Configure puts other global settings into force while everything runs: an
// exchange ends with those with which it began, and also old leases are renewed
// from the new relay address. It opens their links as Open does; after its error
// the former settings stay in force. Links stay open until Close, also those that
// no settings name any more.
func (c *Client) Configure(global lease.Options) error {
	global = global.Or(lease.Defaults())
	if err := c.openAhead(global); err != nil {
		return err
	}
	former := c.global.Swap(&global)
	if former.Relay != global.Relay || former.RelayPort != global.RelayPort {
		c.servers.moved()
	}
	return nil
}

// openAhead opens the links that global settings name, as Open says.
func (c *Client) openAhead(global lease.Options) error {
	places, errs := c.placesOf(global)
	for _, at := range places {
		_, err := c.link(at)
		errs = append(errs, err)
	}
	for _, err := range errs {
		switch {
		case errors.Is(err, ErrSecondCopy):
			return err
		case err != nil:
			c.log.Warn("link not opened yet", "error", err)
		}
	}
	return nil
}

// all are the links that there are, open or not.
func (c *Client) all() []*Link {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Values(c.links))
}

// Alive implements lease.Client: the reader of each open link is made to show
// that it reads.
func (c *Client) Alive(ctx context.Context) error {
	links, err := c.pulse.Ask(ctx, c.all)
	if err != nil {
		return fmt.Errorf("look at the DHCP links: %w", err)
	}
	for _, l := range links {
		if err := l.alive(ctx); err != nil {
			return err
		}
	}
	return nil
}

// inForce are the options in force for a pool now. An exchange ends with those
// with which it began.
func (c *Client) inForce(pool lease.Options) lease.Options { return pool.Or(*c.global.Load()) }

// Close closes all links. No exchange may be running.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for _, l := range c.links {
		errs = append(errs, l.Close())
	}
	clear(c.links)
	return errors.Join(errs...)
}

// Drops counts what was received and not used.
func (c *Client) Drops() *Drops { return &c.drops }

// hostMAC is a locally administered MAC that stays the same on this host.
func hostMAC() lease.MAC {
	id, err := os.ReadFile("/etc/machine-id")
	if err != nil {
		// Its name is the next best; only a clash of two probes depends on it.
		name, _ := os.Hostname()
		id = []byte(name)
	}
	sum := sha256.Sum256(append([]byte("oam-docker-ipam probe "), id...))
	mac := lease.MAC(sum[:6])
	mac[0] = mac[0]&^0x01 | 0x02
	return mac
}

// backoff is the wait after the n-th sending of a message, up to first after
// the first one.
func backoff(first time.Duration, n int) time.Duration {
	wait := min(first<<min(n, 4), 4*time.Second)
	return wait/2 + rand.N(wait/2)
}

const (
	// firstWait is for exchanges in which the server looks whether an address
	// is free. For the rest one round trip is enough.
	firstWait, firstConfirmWait = time.Second, 300 * time.Millisecond
	// requestTries is how often a REQUEST is sent before its server counts as
	// gone (RFC 2131 section 3.1 (5) has four).
	requestTries = 4
	// rebootWait is how long the answer to a renewal may take until it is asked
	// for in a form whose answer is broadcast, but no longer than half of the
	// attempt.
	rebootWait = 2 * time.Second
	// offerWait is how long other servers may still offer after an offer that
	// was refused. Before they offer, an ISC dhcpd pings for 1 s and a dnsmasq
	// for 3 s.
	offerWait = 4 * time.Second
	// nakWait is how long a NAK of another server than the lease's own is
	// held back for an ACK that may follow it.
	nakWait = 2 * time.Second
	// replyQueue holds the replies of one exchange that weren't looked at yet.
	replyQueue = 16
)

// party is whom an exchange is about. It is the same in all messages of a lease.
type party struct {
	pool     lease.Pool // with the options in force
	mac      lease.MAC
	clientID []byte // option 61
	agent    []byte // of option 82, see agentParts; nil where no server knows them
	name     string // the container's
}

// about is the party of a lease that exists. Its part of option 82 goes on as
// it began, also without any, whatever the network wants now; that of an adopted
// lease begins here.
func about(pool lease.Pool, l lease.Lease) party {
	who := party{pool: pool, mac: l.MAC, clientID: l.ClientID, agent: l.Agent, name: l.Name}
	if l.Via.IsValid() && who.agent == nil {
		who.agent = []byte{}
	}
	return who
}

// exchange is a run of messages with one xid.
type exchange struct {
	party
	key       exchangeKey
	began     time.Time
	paths     []path
	replies   chan reply
	sent      int        // messages that left
	failed    error      // of the last sending that failed
	farewells *farewells // the Client's
	servers   *servers   // the Client's
	asked     *inquiry   // what they know of it
}

// begin opens an exchange on all paths; the caller must end it.
func (c *Client) begin(who party, paths []path) *exchange {
	x := &exchange{
		party: who, key: exchangeKey{rand.Uint32(), who.mac}, began: time.Now(),
		paths: paths, replies: make(chan reply, replyQueue), farewells: c.farewells, servers: c.servers,
	}
	if x.agent == nil {
		x.agent = agentParts(who.pool.Options, c.host, who)
	}
	x.asked = &inquiry{key: x.key, clientID: who.clientID, subnet: who.pool.Subnet, paths: paths}
	c.servers.begin(x.asked)
	for _, p := range paths {
		p.link.await(x.key, who, x.replies)
	}
	return x
}

func (x *exchange) end() {
	x.servers.end(x.asked)
	for _, p := range x.paths {
		p.link.forget(x.key)
	}
}

// send sends a message over some of the exchange's paths.
func (x *exchange) send(m message, paths ...path) {
	m.xid, m.party, m.options = x.key.xid, x.party, x.pool.Options
	farewell := m.kind == dhcp4.Release || m.kind == dhcp4.Decline
	for _, p := range paths {
		if m.server.IsValid() {
			// It says itself for whom it is, and the others on a LAN may know.
			p.station = lease.MAC{}
		}
		began := time.Now()
		if !farewell {
			x.servers.ask(x.asked, m.kind, p)
		}
		err := p.link.send(m, p)
		if farewell {
			x.servers.farewell(m.kind, p, began, err)
		} else {
			x.servers.sent(x.asked, p, err)
		}
		if err != nil {
			x.failed = err
			continue
		}
		x.sent++
	}
	if farewell {
		x.farewells.note(x.clientID, time.Now())
	}
}

// broadcast reports whether servers are asked on their LAN.
func (x *exchange) broadcast() bool { return x.paths[0].link.broadcast() }

// alone reports whether no more than one server can answer. On a LAN never:
// even what is sent to one station may reach several, by a relay agent.
func (x *exchange) alone() bool { return len(x.paths) == 1 && !x.broadcast() }

// meant reports whether one server is asked where others may answer.
func (x *exchange) meant() bool { return x.broadcast() && x.paths[0].to.IsValid() }

// errPause ends a wait without a reply: it is time to send again.
var errPause = errors.New("time to send again")

// next waits for a reply.
func (x *exchange) next(ctx context.Context, pause <-chan time.Time) (reply, error) {
	select {
	case r := <-x.replies:
		return r, nil
	case <-pause:
		return reply{}, errPause
	case <-ctx.Done():
		return reply{}, x.silence()
	}
}

// silence is the error of an exchange that nobody answered.
func (x *exchange) silence() error {
	if x.sent == 0 && x.failed != nil {
		return x.failed
	}
	silence := &Silence{Within: time.Since(x.began), Subnet: x.pool.Subnet, Failed: x.failed}
	for _, p := range x.paths {
		silence.Asked = append(silence.Asked, Asked{Interface: p.link.iface, Server: p.to, Relay: p.link.relay})
	}
	return silence
}

// withFailures adds what was wrong with the sending.
func (x *exchange) withFailures(err error) error {
	if x.failed == nil {
		return err
	}
	return fmt.Errorf("%w (some messages failed: %w)", err, x.failed)
}

// Probe implements lease.Client.
func (c *Client) Probe(ctx context.Context, pool lease.Pool, mac lease.MAC) ([]lease.Offer, error) {
	pool.Options = c.inForce(pool.Options)
	if mac == (lease.MAC{}) {
		mac = c.probeMAC
	}
	offers, _, err := c.probe(ctx, stranger(pool, mac))
	return offers, err
}

// Acquire implements lease.Client.
func (c *Client) Acquire(ctx context.Context, req lease.Request) (lease.Lease, error) {
	began := time.Now()
	req.Pool.Options = c.inForce(req.Pool.Options)
	paths, err := c.paths(ctx, req.Pool.Options)
	if err != nil {
		c.servers.report(dhcp4.Discover, netip.Addr{}, OutcomeFailed, 0)
		return lease.Lease{}, err
	}
	var before error // what ended the exchange before this one
	for refusals := 0; ; {
		l, err := c.try(ctx, req, paths, began)
		switch {
		case err == nil:
			return l, nil
		case errors.Is(err, lease.ErrNAK):
			// RFC 2131 section 4.4.1: start over, but not in a tight loop. A
			// dnsmasq without ping checks that offers one address to several
			// clients refuses the losers so; they must not come back together.
			if !sleep(ctx, rand.N(250*time.Millisecond<<min(refusals, 4))+50*time.Millisecond) {
				return lease.Lease{}, err
			}
			refusals++
		case errors.Is(err, errNoACK) && ctx.Err() == nil:
		case before != nil:
			// That nobody answered in the end is not the whole story.
			return lease.Lease{}, fmt.Errorf("%w; before that: %w", err, before)
		default:
			return lease.Lease{}, err
		}
		before = err
	}
}

// sleep waits and reports whether ctx lasted.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// errNoACK: the server offered and then fell silent.
var errNoACK = errors.New("offered an address and then fell silent")

// try runs one exchange from INIT to BOUND.
func (c *Client) try(ctx context.Context, req lease.Request, paths []path, began time.Time) (lease.Lease, error) {
	clientID := req.ClientID
	if clientID == nil {
		clientID = lease.MACClientID(req.MAC)
	}
	if err := c.farewells.rest(ctx, clientID); err != nil {
		return lease.Lease{}, err
	}
	x := c.begin(party{pool: req.Pool, mac: req.MAC, clientID: clientID, name: req.Name}, paths)
	defer x.end()
	x.began = began
	m := message{kind: dhcp4.Discover, requested: req.Address}
	offer, err := x.discover(ctx, &m, func(o lease.Offer) error { return req.Accept(o.Address) })
	if err != nil {
		return lease.Lease{}, err
	}
	to := via(offer, paths)
	// SELECTING (RFC 2131 section 4.3.2): the address and the server, and the
	// DISCOVER's secs.
	m.kind, m.requested, m.server = dhcp4.Request, offer.addr, offer.server
	sent := time.Now()
	ack, err := x.request(ctx, m, to)
	if err != nil {
		if !errors.Is(err, lease.ErrNAK) && !req.InUse {
			// The ACK may be what was lost.
			x.giveBack(ctx, m.server, offer.addr, to)
		}
		return lease.Lease{}, err
	}
	if err := req.Accept(ack.addr); err != nil {
		x.giveBack(ctx, m.server, ack.addr, to)
		return lease.Lease{}, err
	}
	l := lease.Lease{
		MAC: req.MAC, Name: req.Name, ClientID: clientID, Agent: x.agent, Prefix: netip.PrefixFrom(ack.addr, ack.addr.BitLen()),
		Server: ack.server, Via: to.to, Station: ack.station, Options: ack.raw,
	}
	ack.times(&l, sent)
	return l, nil
}

// discover sends DISCOVERs to all servers until one makes an acceptable offer.
// Unacceptable ones end it once every server that is known has made one, or
// offerWait after the first. m is left as it was last sent.
func (x *exchange) discover(ctx context.Context, m *message, accept func(lease.Offer) error) (reply, error) {
	var refused error
	refusedBy := map[netip.Addr]bool{}
	for n := 0; ; n++ {
		m.secs = seconds(x.began)
		x.send(*m, x.paths...)
		pause := time.After(backoff(firstWait, n))
		for {
			r, err := x.next(ctx, pause)
			if err == errPause {
				break
			}
			if err != nil {
				if refused == nil {
					x.servers.unanswered(ctx, x.asked, dhcp4.Discover)
				}
				return reply{}, cmp.Or(refused, err)
			}
			if r.kind != dhcp4.Offer {
				continue
			}
			refused = accept(r.offer(x.began))
			switch {
			case refused == nil:
				x.servers.take(x.asked, dhcp4.Discover, r, OutcomeOffer)
				return r, nil
			case refusedBy[r.server]:
			case refused == errMore:
				x.servers.take(x.asked, dhcp4.Discover, r, OutcomeOffer)
			default:
				x.servers.take(x.asked, dhcp4.Discover, r, OutcomeRefused)
			}
			if len(refusedBy) == 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, offerWait)
				defer cancel()
			}
			refusedBy[r.server] = true
			if len(refusedBy) == len(x.paths) && !x.broadcast() {
				return reply{}, refused
			}
		}
	}
}

// request sends a REQUEST to the chosen server until it answers.
func (x *exchange) request(ctx context.Context, m message, to path) (reply, error) {
	noACK := func() error {
		x.servers.unanswered(ctx, x.asked, dhcp4.Request)
		return x.withFailures(fmt.Errorf("DHCP server %s %w", m.server, errNoACK))
	}
	for n := range requestTries {
		x.send(m, to)
		pause := time.After(backoff(firstWait, n))
		for {
			r, err := x.next(ctx, pause)
			if err == errPause {
				break
			}
			if err != nil {
				return reply{}, noACK()
			}
			// Late offers and other servers' words don't count.
			if r.server != m.server && (r.server.IsValid() || !x.alone()) {
				continue
			}
			switch r.kind {
			case dhcp4.ACK:
				x.servers.take(x.asked, dhcp4.Request, r, OutcomeACK)
				return r, nil
			case dhcp4.NAK:
				return reply{}, x.refused(r)
			}
		}
	}
	return reply{}, noACK()
}

// refused is the end of a REQUEST by a NAK.
func (x *exchange) refused(r reply) error {
	x.servers.take(x.asked, dhcp4.Request, r, OutcomeNAK)
	return refusal(r)
}

// refusal is a NAK as an error, with the server's own words (option 56).
func refusal(r reply) error {
	return fmt.Errorf("%w: server %s says %q", lease.ErrNAK, r.server, r.options[byte(dhcp4.OptionMessage)])
}

// via is the path over which an offer's server is spoken to from then on. The
// servers answer from whatever address their routing chooses, so neither the
// source nor the identifier must be one that we asked.
func via(r reply, paths []path) path {
	if link := paths[0].link; link.broadcast() {
		return path{link: link, to: netip.AddrPortFrom(r.server, lease.ServerPort), station: r.station}
	}
	for _, addr := range []netip.Addr{r.from, r.server} {
		for _, p := range paths {
			if p.to.Addr() == addr || len(paths) == 1 {
				return p
			}
		}
	}
	same := slices.IndexFunc(paths, func(p path) bool { return p.link.giaddr() == r.relay })
	return path{link: paths[same].link, to: netip.AddrPortFrom(r.server, lease.ServerPort)}
}

// resume opens an exchange about a lease with its server alone; the caller
// must end it. Its first message is of a kind.
func (c *Client) resume(kind dhcp4.MessageType, pool lease.Pool, l lease.Lease) (*exchange, error) {
	if !l.Via.IsValid() {
		// Adopted, and no server has confirmed it yet.
		return nil, fmt.Errorf("the DHCP server of %s is not known", l.Addr())
	}
	pool.Options = c.inForce(pool.Options)
	var p path
	var err error
	if pool.Options.ByBroadcast() {
		p.to, p.station = l.Via, l.Station
		p.link, err = c.link(place{iface: pool.Options.Interface})
	} else {
		p, err = c.path(pool.Options, l.Via)
	}
	if err != nil {
		c.servers.report(kind, l.Via.Addr(), OutcomeFailed, 0)
		return nil, err
	}
	return c.begin(about(pool, l), []path{p}), nil
}

// Confirm implements lease.Client: option 50, neither 54 nor ciaddr (RFC 2131
// section 4.3.2, INIT-REBOOT).
func (c *Client) Confirm(ctx context.Context, pool lease.Pool, l lease.Lease) (lease.Lease, error) {
	if err := c.farewells.rest(ctx, l.ClientID); err != nil {
		return lease.Lease{}, err
	}
	x, err := c.resume(dhcp4.Request, pool, l)
	if err != nil {
		return lease.Lease{}, err
	}
	defer x.end()
	for n := 0; ; n++ {
		x.send(message{kind: dhcp4.Request, secs: seconds(x.began), requested: l.Addr()}, x.paths...)
		got, err := x.answer(ctx, l, time.After(backoff(firstConfirmWait, n)))
		switch {
		case err == errPause:
		case err != nil:
			return lease.Lease{}, err
		case got.Addr() != l.Addr():
			x.giveBack(ctx, got.Server, got.Addr(), x.paths[0])
			return lease.Lease{}, fmt.Errorf("DHCP server %s acknowledged address %s instead of %s", got.Server, got.Addr(), l.Addr())
		default:
			return got, nil
		}
	}
}

// Renew implements lease.Client.
func (c *Client) Renew(ctx context.Context, pool lease.Pool, l lease.Lease) (lease.Lease, error) {
	x, err := c.resume(dhcp4.Request, pool, l)
	if err != nil {
		return lease.Lease{}, err
	}
	defer x.end()
	return x.extend(ctx, l)
}

// Rebind implements lease.Client.
func (c *Client) Rebind(ctx context.Context, pool lease.Pool, l lease.Lease) (lease.Lease, error) {
	pool.Options = c.inForce(pool.Options)
	paths, err := c.paths(ctx, pool.Options)
	if err != nil {
		c.servers.report(dhcp4.Request, netip.Addr{}, OutcomeFailed, 0)
		return lease.Lease{}, err
	}
	x := c.begin(about(pool, l), paths)
	defer x.end()
	return x.extend(ctx, l)
}

// extend sends one REQUEST of RENEWING or REBINDING: ciaddr and neither option
// 50 nor 54 (RFC 2131 section 4.3.2). giaddr brings the answer to the host.
// Where there is none, the answer goes to the container, and may pass the host
// unseen: after silence the same is asked in the form of INIT-REBOOT. Never at
// once in that form, see doc.go.
func (x *exchange) extend(ctx context.Context, l lease.Lease) (lease.Lease, error) {
	secs := seconds(l.Renew)
	x.send(message{kind: dhcp4.Request, secs: secs, ciaddr: l.Addr()}, x.paths...)
	if x.broadcast() {
		wait := rebootWait
		if end, ok := ctx.Deadline(); ok {
			wait = min(wait, time.Until(end)/2)
		}
		got, err := x.answer(ctx, l, time.After(wait))
		if err != errPause {
			return got, err
		}
		x.send(message{kind: dhcp4.Request, secs: secs, requested: l.Addr()}, x.paths...)
	}
	if x.sent == 0 {
		// Nobody will answer that.
		x.servers.unanswered(ctx, x.asked, dhcp4.Request)
		return lease.Lease{}, x.failed
	}
	return x.answer(ctx, l, nil)
}

// answer waits for the servers' word about a lease that exists, until a pause
// after which they are asked again. Its times count from the exchange's
// beginning: which of several copies of a REQUEST is acknowledged isn't known,
// so the first one counts (RFC 2131 section 4.4.1).
func (x *exchange) answer(ctx context.Context, l lease.Lease, pause <-chan time.Time) (lease.Lease, error) {
	var foreign *reply // a NAK
	for {
		r, err := x.next(ctx, pause)
		switch {
		case err != nil && foreign != nil:
			return lease.Lease{}, x.refused(*foreign)
		case err != nil:
			if err != errPause {
				x.servers.unanswered(ctx, x.asked, dhcp4.Request)
			}
			return lease.Lease{}, err
		case r.kind == dhcp4.NAK && (x.alone() || r.server.IsValid() && r.server == l.Server):
			return lease.Lease{}, x.refused(r)
		case r.kind == dhcp4.NAK && pause == nil && !x.meant():
			// A server that never had this lease may refuse it faster than
			// the right one acknowledges.
			foreign, pause = &r, time.After(nakWait)
		case r.kind == dhcp4.ACK:
			x.servers.take(x.asked, dhcp4.Request, r, OutcomeACK)
			l.Prefix = netip.PrefixFrom(r.addr, l.Prefix.Bits())
			to := via(r, x.paths)
			l.Server, l.Via, l.Station, l.Agent, l.Options = r.server, to.to, to.station, x.agent, r.raw
			r.times(&l, x.began)
			return l, nil
		}
	}
}

// RelayMAC implements lease.Client.
func (c *Client) RelayMAC(ctx context.Context, pool lease.Pool) (lease.MAC, error) {
	options := c.inForce(pool.Options)
	if options.ByBroadcast() {
		return interfaceMAC(options.Interface)
	}
	relay := options.Relay
	if !fixed(relay) {
		// Of the first server alone: which of the others can be reached now
		// must not change the answer.
		options.Servers = options.Servers[:min(len(options.Servers), 1)]
		paths, err := c.paths(ctx, options)
		if err != nil {
			return lease.MAC{}, err
		}
		relay = paths[0].link.giaddr()
	}
	return c.hardware(relay)
}
