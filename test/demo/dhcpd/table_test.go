package dhcpd

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/krolaw/dhcp4"
)

var (
	serverAddr = netip.MustParseAddr("10.10.0.1")
	relayAddr  = netip.MustParseAddr("10.10.0.2")
	now        = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

	// Two addresses and no more.
	small = Config{
		Server: serverAddr, Prefix: netip.MustParsePrefix("10.10.0.0/24"), Router: serverAddr,
		First: netip.MustParseAddr("10.10.0.100"), Last: netip.MustParseAddr("10.10.0.101"),
		LeaseTime: time.Minute,
	}
)

// ask is a request of one of the tests' clients.
type ask struct {
	kind      dhcp4.MessageType
	client    int
	id        string // option 61
	requested string // option 50
	server    string // option 54
	ciaddr    string
	relay     string // "" is relayAddr, "none" is none
}

func (a ask) packet() dhcp4.Packet {
	var options []dhcp4.Option
	add := func(code dhcp4.OptionCode, value []byte) {
		options = append(options, dhcp4.Option{Code: code, Value: value})
	}
	if a.id != "" {
		add(dhcp4.OptionClientIdentifier, []byte(a.id))
	}
	if a.requested != "" {
		add(dhcp4.OptionRequestedIPAddress, netip.MustParseAddr(a.requested).AsSlice())
	}
	if a.server != "" {
		add(dhcp4.OptionServerIdentifier, netip.MustParseAddr(a.server).AsSlice())
	}
	add(dhcp4.OptionHostName, fmt.Appendf(nil, "c%d", a.client))
	p := dhcp4.RequestPacket(a.kind, net.HardwareAddr(mac(a.client)), nil, []byte{1, 2, 3, byte(a.client)}, false, options)
	if a.ciaddr != "" {
		p.SetCIAddr(netip.MustParseAddr(a.ciaddr).AsSlice())
	}
	switch a.relay {
	case "":
		p.SetGIAddr(relayAddr.AsSlice())
	case "none":
	default:
		p.SetGIAddr(netip.MustParseAddr(a.relay).AsSlice())
	}
	return p
}

func mac(client int) []byte { return []byte{2, 0, 0, 0, 0, byte(client)} }

// say is an answer in short: "OFFER 10.10.0.100", "NAK: why", "silence: why",
// or "" for the silence that is right.
func say(answer dhcp4.Packet, err error) string {
	if err != nil {
		return "silence: " + err.Error()
	}
	if answer == nil {
		return ""
	}
	options := answer.ParseOptions()
	kind := nameOf(dhcp4.MessageType(options[dhcp4.OptionDHCPMessageType][0]))
	if reason := options[dhcp4.OptionMessage]; reason != nil {
		return kind + ": " + string(reason)
	}
	return kind + " " + answer.YIAddr().String()
}

// line is one message to a table and what it must say.
type line struct {
	after time.Duration // since the line before
	ask
	want string
}

const (
	a100 = "10.10.0.100"
	a101 = "10.10.0.101"
	us   = "10.10.0.1"
)

func discover(client int) ask { return ask{kind: dhcp4.Discover, client: client} }

func request(client int, addr string) ask {
	return ask{kind: dhcp4.Request, client: client, requested: addr, server: us}
}

func renew(client int, addr string) ask {
	return ask{kind: dhcp4.Request, client: client, ciaddr: addr}
}

func reboot(client int, addr string) ask {
	return ask{kind: dhcp4.Request, client: client, requested: addr}
}

func release(client int, addr string) ask {
	return ask{kind: dhcp4.Release, client: client, ciaddr: addr, server: us}
}

func TestTable(t *testing.T) {
	for name, test := range map[string]struct {
		lines  []line
		leases string // at the end, as "address=client"
	}{
		"an offer, a lease": {
			lines: []line{
				{ask: discover(1), want: "OFFER " + a100},
				{ask: request(1, a100), want: "ACK " + a100},
			},
			leases: "10.10.0.100=1",
		},
		"an offer is no lease": {
			lines: []line{{ask: discover(1), want: "OFFER " + a100}},
		},
		"two clients get two addresses, a third one none": {
			lines: []line{
				{ask: discover(1), want: "OFFER " + a100},
				{ask: discover(2), want: "OFFER " + a101},
				{ask: discover(3), want: "silence: no address is free"},
				{ask: request(2, a101), want: "ACK " + a101},
				{ask: request(1, a100), want: "ACK " + a100},
				{ask: discover(3), want: "silence: no address is free"},
			},
			leases: "10.10.0.100=1 10.10.0.101=2",
		},
		"messages repeat": {
			lines: []line{
				{ask: discover(1), want: "OFFER " + a100},
				{ask: discover(1), want: "OFFER " + a100},
				{ask: request(1, a100), want: "ACK " + a100},
				{ask: request(1, a100), want: "ACK " + a100},
				{ask: discover(1), want: "OFFER " + a100},
			},
			leases: "10.10.0.100=1",
		},
		"an offer waits ten seconds": {
			lines: []line{
				{ask: discover(1), want: "OFFER " + a100},
				{ask: discover(2), want: "OFFER " + a101},
				{after: offerTime, ask: discover(3), want: "OFFER " + a100},
				{ask: request(1, a100), want: "NAK: 10.10.0.100 was not offered"},
			},
		},
		"a lease expires unless it is renewed": {
			lines: []line{
				{ask: discover(1), want: "OFFER " + a100},
				{ask: request(1, a100), want: "ACK " + a100},
				{after: 30 * time.Second, ask: renew(1, a100), want: "ACK " + a100},
				{after: 59 * time.Second, ask: discover(2), want: "OFFER " + a101},
				{after: time.Second, ask: discover(2), want: "OFFER " + a101},
				{ask: discover(3), want: "OFFER " + a100},
			},
		},
		"a release frees the address, once": {
			lines: []line{
				{ask: discover(1), want: "OFFER " + a100},
				{ask: request(1, a100), want: "ACK " + a100},
				{ask: release(1, a100), want: ""},
				{ask: release(1, a100), want: "silence: the address is not this client's"},
				{ask: discover(2), want: "OFFER " + a100},
			},
		},
		"a release counts from its holder, for this server": {
			lines: []line{
				{ask: discover(1), want: "OFFER " + a100},
				{ask: request(1, a100), want: "ACK " + a100},
				{ask: release(2, a100), want: "silence: the address is not this client's"},
				{ask: release(1, a101), want: "silence: the address is not this client's"},
				{ask: ask{kind: dhcp4.Release, client: 1, ciaddr: a100}, want: "silence: the release doesn't name this server"},
				{ask: ask{kind: dhcp4.Release, client: 1, ciaddr: a100, server: "10.10.0.9"}, want: "silence: the release doesn't name this server"},
			},
			leases: "10.10.0.100=1",
		},
		"a client gets the address that it asks for if that is free": {
			lines: []line{
				{ask: ask{kind: dhcp4.Discover, client: 1, requested: a101}, want: "OFFER " + a101},
				{ask: ask{kind: dhcp4.Discover, client: 2, requested: a101}, want: "OFFER " + a100},
				{ask: ask{kind: dhcp4.Discover, client: 2, requested: "10.10.0.9"}, want: "OFFER " + a100},
			},
		},
		"it may change its mind before it has one": {
			lines: []line{
				{ask: discover(1), want: "OFFER " + a100},
				{ask: ask{kind: dhcp4.Discover, client: 1, requested: a101}, want: "OFFER " + a101},
				{ask: discover(2), want: "OFFER " + a100},
				{ask: request(1, a101), want: "ACK " + a101},
				{ask: ask{kind: dhcp4.Discover, client: 1, requested: a100}, want: "OFFER " + a101},
			},
			leases: "10.10.0.101=1",
		},
		"what wasn't offered is refused": {
			lines: []line{
				{ask: request(1, a100), want: "NAK: 10.10.0.100 was not offered"},
				{ask: discover(1), want: "OFFER " + a100},
				{ask: request(1, a101), want: "NAK: 10.10.0.101 was not offered"},
				{ask: request(2, a100), want: "NAK: 10.10.0.100 was not offered"},
				{ask: ask{kind: dhcp4.Request, client: 1, server: us}, want: "NAK: no address requested"},
				{ask: request(1, a100), want: "ACK " + a100},
			},
			leases: "10.10.0.100=1",
		},
		"who chooses another server frees the offer, not a lease": {
			lines: []line{
				{ask: discover(1), want: "OFFER " + a100},
				{ask: ask{kind: dhcp4.Request, client: 1, requested: "10.10.0.7", server: "10.10.0.9"}, want: "silence: the client chose server 10.10.0.9"},
				{ask: discover(2), want: "OFFER " + a100},
				{ask: request(2, a100), want: "ACK " + a100},
				{ask: ask{kind: dhcp4.Request, client: 2, requested: "10.10.0.7", server: "10.10.0.9"}, want: "silence: the client chose server 10.10.0.9"},
			},
			leases: "10.10.0.100=2",
		},
		"a client that rebooted": {
			lines: []line{
				{ask: reboot(1, a100), want: "silence: no record of this client"},
				{ask: reboot(1, "10.20.0.100"), want: "NAK: 10.20.0.100 is not of this subnet"},
				{ask: discover(1), want: "OFFER " + a100},
				{ask: request(1, a100), want: "ACK " + a100},
				{ask: reboot(1, a100), want: "ACK " + a100},
				{ask: reboot(1, a101), want: "NAK: 10.10.0.101 is not this client's"},
				{ask: reboot(2, a100), want: "NAK: 10.10.0.100 is not this client's"},
			},
			leases: "10.10.0.100=1",
		},
		"renewals": {
			lines: []line{
				{ask: renew(1, a100), want: "ACK " + a100}, // the table was lost
				{ask: renew(2, a100), want: "NAK: 10.10.0.100 is not this client's"},
				{ask: renew(1, a101), want: "NAK: 10.10.0.101 is not this client's"},
				{ask: renew(2, "10.10.0.9"), want: "NAK: 10.10.0.9 is not this client's"},
				{ask: ask{kind: dhcp4.Request, client: 2}, want: "silence: the request names no address"},
			},
			leases: "10.10.0.100=1",
		},
		"a declined address rests": {
			lines: []line{
				{ask: discover(1), want: "OFFER " + a100},
				{ask: request(1, a100), want: "ACK " + a100},
				{ask: ask{kind: dhcp4.Decline, client: 2, requested: a100, server: us}, want: "silence: the address is not this client's"},
				{ask: ask{kind: dhcp4.Decline, client: 1, requested: a100}, want: "silence: the decline doesn't name this server"},
				{ask: ask{kind: dhcp4.Decline, client: 1, requested: a100, server: us}, want: ""},
				{ask: discover(1), want: "OFFER " + a101},
				{ask: discover(2), want: "silence: no address is free"},
				{after: time.Minute, ask: discover(2), want: "OFFER " + a100},
			},
		},
		"the client identifier is who it is, not the MAC": {
			lines: []line{
				{ask: ask{kind: dhcp4.Discover, client: 1, id: "x"}, want: "OFFER " + a100},
				{ask: ask{kind: dhcp4.Request, client: 2, id: "x", requested: a100, server: us}, want: "ACK " + a100},
				{ask: ask{kind: dhcp4.Discover, client: 2, id: "y"}, want: "OFFER " + a101},
				{ask: release(2, a100), want: "silence: the address is not this client's"},
			},
			leases: "10.10.0.100=2",
		},
		"what isn't served": {
			lines: []line{
				{ask: ask{kind: dhcp4.Discover, relay: "none"}, want: "silence: not relayed"},
				{ask: ask{kind: dhcp4.Discover, relay: "10.20.0.2"}, want: "silence: no subnet for relay 10.20.0.2"},
				{ask: ask{kind: 0}, want: "silence: no message type"},
				{ask: ask{kind: 9}, want: "silence: no message type"},
				{ask: ask{kind: dhcp4.Inform, ciaddr: a100}, want: "silence: INFORM is not served"},
				{ask: ask{kind: dhcp4.Offer}, want: "silence: OFFER is not served"},
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			table, at := NewTable(small), now
			for i, l := range test.lines {
				at = at.Add(l.after)
				if got := say(table.Answer(l.packet(), at)); got != l.want {
					t.Errorf("line %d: %+v: %q, want %q", i+1, l.ask, got, l.want)
				}
			}
			var leases []string
			for _, l := range table.Leases(at) {
				leases = append(leases, l.Addr.String()+"="+strings.TrimPrefix(l.Name, "c"))
			}
			if got := strings.Join(leases, " "); got != test.leases {
				t.Errorf("leases %q, want %q", got, test.leases)
			}
		})
	}
}

func TestAnswerHasWhatAClientNeeds(t *testing.T) {
	table := NewTable(small)
	ask := discover(1)
	ask.id = "\x01abc"
	p := ask.packet()
	answer, err := table.Answer(p, now)
	if err != nil {
		t.Fatal(err)
	}
	if answer.OpCode() != dhcp4.BootReply || !bytes.Equal(answer.XId(), p.XId()) ||
		!bytes.Equal(answer.CHAddr(), p.CHAddr()) || !answer.GIAddr().Equal(p.GIAddr()) {
		t.Errorf("answer % x is not that of % x", answer, p)
	}
	options := answer.ParseOptions()
	for code, want := range map[dhcp4.OptionCode][]byte{
		dhcp4.OptionSubnetMask:         {255, 255, 255, 0},
		dhcp4.OptionRouter:             {10, 10, 0, 1},
		dhcp4.OptionServerIdentifier:   {10, 10, 0, 1},
		dhcp4.OptionIPAddressLeaseTime: {0, 0, 0, 60},
		dhcp4.OptionClientIdentifier:   []byte("\x01abc"),
	} {
		if !bytes.Equal(options[code], want) {
			t.Errorf("%s is % x, want % x", code, options[code], want)
		}
	}

	ask.kind, ask.requested, ask.server = dhcp4.Request, a100, us
	if _, err = table.Answer(ask.packet(), now); err != nil {
		t.Fatal(err)
	}
	want := Lease{Addr: small.First, MAC: "02:00:00:00:00:01", Name: "c1", Expires: now.Add(time.Minute)}
	if leases := table.Leases(now); len(leases) != 1 || leases[0] != want {
		t.Errorf("leases %+v, want %+v", leases, want)
	}
	if leases := table.Leases(want.Expires); leases != nil {
		t.Errorf("leases %+v after their end", leases)
	}
}

func TestNAK(t *testing.T) {
	answer, err := NewTable(small).Answer(request(1, a100).packet(), now)
	if err != nil {
		t.Fatal(err)
	}
	options := answer.ParseOptions()
	_, leaseTime := options[dhcp4.OptionIPAddressLeaseTime]
	if !answer.YIAddr().IsUnspecified() || leaseTime || !answer.Broadcast() ||
		!bytes.Equal(options[dhcp4.OptionServerIdentifier], serverAddr.AsSlice()) {
		t.Errorf("NAK % x", answer)
	}
}

// Whatever comes in: no panic, and no more addresses than there are.
func FuzzAnswer(f *testing.F) {
	for _, a := range []ask{discover(1), request(1, a100), renew(1, a100), reboot(1, a100), release(1, a100), {}} {
		f.Add([]byte(a.packet()))
		f.Add([]byte(a.packet()[:250]))
		f.Add([]byte(a.packet()[:240]))
	}
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{255}, 300))
	f.Fuzz(func(t *testing.T, b []byte) {
		table := NewTable(small)
		for _, p := range []dhcp4.Packet{discover(1).packet(), b, discover(2).packet(), b} {
			answer, err := table.Answer(p, now)
			if answer != nil && err != nil {
				t.Errorf("an answer and an error: %v", err)
			}
			if valid(p) == nil {
				_ = describeRequest(p)
			}
		}
		for addr := range table.rows {
			if !table.config.Prefix.Contains(addr) || addr.Less(small.First) || small.Last.Less(addr) {
				t.Errorf("address %s is not in the range", addr)
			}
		}
	})
}
