package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/talkingdata/oam-docker-ipam/dhcp"
	"github.com/talkingdata/oam-docker-ipam/lease"
)

// discoverOptions are the daemon's own, but that servers or an interface that
// were typed beat whichever of the two is configured.
func discoverOptions(cmd *cli.Command) (lease.Options, error) {
	texts := optionTexts(cmd)
	servers, iface := typed(cmd, keyServers), typed(cmd, keyInterface)
	switch {
	case servers && !iface:
		delete(texts, optionName(keyInterface))
	case iface && !servers:
		delete(texts, optionName(keyServers))
	}
	return globalOptions(cmd, texts)
}

// discover asks the DHCP servers for offers and prints these. It takes no lease,
// and the daemon may run or not.
func discover(ctx context.Context, cmd *cli.Command, stdout, stderr io.Writer) (err error) {
	global, err := discoverOptions(cmd)
	if err != nil {
		return err
	}
	pool, err := lease.NewPool(cmd.String("subnet"), "", nil)
	if err != nil {
		return err
	}
	mac, err := parseProbed(cmd.String("mac"))
	if err != nil {
		return fmt.Errorf("--mac: %w", err)
	}

	client := dhcp.NewProber(global, newLogger(stderr, logText, level(cmd.Bool("debug"), slog.LevelWarn)))
	defer func() { err = errors.Join(err, client.Close()) }()
	probe, cancel := context.WithTimeout(ctx, lease.ProbeTime)
	defer cancel()
	offers, err := client.Probe(probe, pool, mac)
	var silence *dhcp.Silence
	switch {
	case ctx.Err() != nil && len(offers) == 0:
		return fmt.Errorf("stopped before any answer: %w", context.Cause(ctx))
	case errors.As(err, &silence):
		err = errors.New(advise(silence))
	case err != nil:
		return err
	}
	var printed error
	if cmd.Bool("json") {
		printed = printJSON(stdout, describe(offers))
	} else if len(offers) > 0 {
		printed = printOffers(stdout, offers)
	}
	for _, remark := range remarks(offers, pool.Subnet) {
		fmt.Fprintln(stderr, "oam-docker-ipam:", remark)
	}
	return errors.Join(err, printed)
}

// parseProbed reads the MAC of a discovery, with the zero one for an empty text.
func parseProbed(text string) (lease.MAC, error) {
	if text == "" {
		return lease.MAC{}, nil
	}
	mac, err := lease.ParseMAC(text)
	if err == nil && !mac.Unicast() {
		err = fmt.Errorf("%s is no network card's: it is zero or a group's", mac)
	}
	return mac, err
}

// offer is a lease.Offer in JSON. What is null the server didn't say; times are
// null for an infinite lease.
type offer struct {
	Server  netip.Addr    `json:"server"`
	From    netip.Addr    `json:"from"`
	Address netip.Addr    `json:"address"`
	Subnet  *netip.Prefix `json:"subnet"`
	Router  *netip.Addr   `json:"router"`
	DNS     []netip.Addr  `json:"dns"`
	Lease   *float64      `json:"lease_seconds"`
	T1      *float64      `json:"t1_seconds"`
	T2      *float64      `json:"t2_seconds"`
	After   float64       `json:"after_ms"`
}

func describe(offers []lease.Offer) []offer {
	described := []offer{}
	for _, o := range offers {
		d := offer{
			Server: o.Server, From: o.From, Address: o.Address, DNS: append([]netip.Addr{}, o.DNS...),
			After: float64(o.After.Round(printedTime)) / float64(time.Millisecond),
		}
		if o.Subnet.IsValid() {
			d.Subnet = &o.Subnet
		}
		if o.Router.IsValid() {
			d.Router = &o.Router
		}
		if o.Length != lease.LeaseForEver {
			d.Lease, d.T1, d.T2 = new(o.Length.Seconds()), new(o.T1.Seconds()), new(o.T2.Seconds())
		}
		described = append(described, d)
	}
	return described
}

// printedTime is what times to offers are rounded to.
const printedTime = 100 * time.Microsecond

func printOffers(w io.Writer, offers []lease.Offer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "SERVER\tOFFERED\tSUBNET\tROUTER\tDNS\tLEASE\tT1\tT2\tAFTER")
	for _, o := range offers {
		length, t1, t2 := o.Length.String(), o.T1.String(), o.T2.String()
		if o.Length == lease.LeaseForEver {
			length, t1, t2 = "for ever", "-", "-"
		}
		dns := make([]string, len(o.DNS))
		for i, addr := range o.DNS {
			dns[i] = addr.String()
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", o.Server, o.Address, said(o.Subnet), said(o.Router),
			cmp.Or(strings.Join(dns, ","), "-"), length, t1, t2, o.After.Round(printedTime))
	}
	return t.Flush()
}

// said is what a server said, or a dash.
func said[T interface {
	IsValid() bool
	String() string
}](v T) string {
	if !v.IsValid() {
		return "-"
	}
	return v.String()
}

// remarks are what is odd about offers: that they are of another subnet than
// the wanted one, if any was, or contradict each other.
func remarks(offers []lease.Offer, wanted netip.Prefix) []string {
	var remarks []string
	for _, o := range offers {
		offered := o.Address.String()
		if o.Subnet.IsValid() {
			offered = netip.PrefixFrom(o.Address, o.Subnet.Bits()).String()
		}
		if wanted.IsValid() && (!wanted.Contains(o.Address) || o.Subnet.IsValid() && o.Subnet != wanted) {
			remarks = append(remarks, fmt.Sprintf("DHCP server %s offers %s, which is not of the subnet %s that was asked for", o.Server, offered, wanted))
		}
	}
	if texts := lease.Differing(offers); texts != nil {
		remarks = append(remarks, "several DHCP servers answer differently: "+strings.Join(texts, "; "))
	}
	return remarks
}

// advise is a silence with what to look at, the likeliest reason first.
func advise(s *dhcp.Silence) string {
	var reasons []string
	if name := s.Asked[0].Interface; name != "" {
		reasons = adviseBroadcast(name)
	} else {
		reasons = adviseRelay(s)
	}
	text := s.Summary() + "\nLook at, the likeliest first:"
	for i, reason := range reasons {
		text += fmt.Sprintf("\n%3d. %s", i+1, reason)
	}
	return text
}

func adviseRelay(s *dhcp.Silence) []string {
	var servers, sockets, relays []string
	near := false
	for _, a := range s.Asked {
		servers, sockets = append(servers, a.Server.Addr().String()), append(sockets, a.Server.String())
		if relay := a.Relay.Addr().String(); !slices.Contains(relays, relay) {
			relays = append(relays, relay)
		}
		near = near || s.Subnet.Contains(a.Relay.Addr())
	}
	server, relay, port := strings.Join(servers, ", "), strings.Join(relays, ", "), s.Asked[0].Relay.Port()

	var reasons []string
	if port != lease.ServerPort {
		reasons = append(reasons, fmt.Sprintf("LISTEN_PORT=%d: only servers that know RFC 8357, such as Kea, answer to another port than %d", port, lease.ServerPort))
	}
	reasons = append(reasons,
		fmt.Sprintf("the server's route back to %s: its log tells whether the request came", relay),
		fmt.Sprintf("firewalls: UDP port %d, both ways between %s and %s", port, relay, server),
	)
	switch {
	case !s.Subnet.IsValid():
		reasons = append(reasons, fmt.Sprintf("the server's subnets: it chooses the one that %s is in, and needs free addresses there; --subnet asks for another", relay))
	case near:
		reasons = append(reasons, fmt.Sprintf("the server's subnets: does it serve %s, with free addresses?", s.Subnet))
	default:
		reasons = append(reasons, fmt.Sprintf("the server's subnets: does it serve %s, with free addresses, to the relay address %s, which is outside (link selection, RFC 3527)?", s.Subnet, relay))
	}
	return append(reasons,
		fmt.Sprintf("UDP port %d of %s on this host: who has it (ss -ulpn)? This command reads beside it; the daemon does so with CAP_NET_RAW only", port, relay),
		fmt.Sprintf("the server itself: does it run, and listen at UDP %s?", strings.Join(sockets, ", ")),
		"known clients only: --mac asks for one that the server knows",
	)
}

func adviseBroadcast(name string) []string {
	return []string{
		fmt.Sprintf("the interface: is %s in the LAN, and the VLAN, of the containers?", name),
		fmt.Sprintf("the link of %s: is there one, and for long enough? Spanning tree may block a new port for 50 seconds", name),
		fmt.Sprintf("the switch behind %s: DHCP snooping and port security drop what they don't expect", name),
		"firewalls: UDP ports 67 and 68 at the server",
		fmt.Sprintf("the LAN of %s: is there a DHCP server or a relay agent at all, with free addresses for it? --dhcp-server asks one elsewhere", name),
		"known clients only: --mac asks for one that the server knows",
	}
}
