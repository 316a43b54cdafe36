package dhcp

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

var update = flag.Bool("update", false, "write testdata/*.hex anew")

// goldenXID stands in the golden files for the random one.
const goldenXID = 0xdecade01

// conversation makes the client send one message of interest.
type conversation struct {
	name string // of the golden file
	nth  int    // which of the messages sent is kept
	kind byte
	run  func(t *testing.T, c *Client)
	// Of a network with options of its own:
	info    []byte // option 82
	selects bool   // option 118
}

// Networks with options of their own, all in the subnet of away.
var (
	// told has the servers told all that there is to tell.
	told = withOptions("told", lease.Options{
		Agent:       []lease.AgentPart{lease.AgentHost, lease.AgentNetwork, lease.AgentContainer},
		NetworkName: "vlan 20", VendorClass: "box", UserClass: "gold", HostName: lease.On, FQDN: "example.org.",
	})
	// by118 selects its subnet by option 118, byPort is asked from another port,
	// unselected leaves the subnet to the servers.
	by118      = withOptions("by118", lease.Options{LinkSelection: lease.Select118, VendorClass: "off"})
	byPort     = withOptions("byPort", lease.Options{RelayPort: 1067, FQDN: "example.org"})
	unselected = withOptions("unselected", lease.Options{LinkSelection: lease.SelectOff, Agent: []lease.AgentPart{lease.AgentNetwork}})

	// What option 82 says to them, written from the RFCs 3046, 3993, 3527 and
	// 8357.
	toldParts      = []byte("\x01\x07vlan 20\x02\x07docker1\x06\x08my_web.1")
	selectsAway    = []byte{5, 4, 10, 20, 0, 0}
	toldInfo       = slices.Concat(toldParts, selectsAway)
	probeInfo      = slices.Concat([]byte("\x01\x07vlan 20\x02\x07docker1"), selectsAway)
	portInfo       = append(slices.Clone(selectsAway), 19, 0)
	unselectedInfo = []byte("\x01\x0c10.20.0.0/24")
)

func withOptions(id string, o lease.Options) lease.Pool {
	return lease.Pool{ID: id, Subnet: away.Subnet, Options: o}
}

// conversations produce every kind of message, through the client as it is
// used: not even the test says which fields belong into which message.
func conversations() []conversation {
	acquire := func(pool lease.Pool, name, address string) func(*testing.T, *Client) {
		return func(t *testing.T, c *Client) {
			req := want(pool, mac1)
			req.Name = name
			if address != "" {
				req.Address = ip(address)
			}
			if _, err := c.Acquire(within(t, usual), req); err != nil {
				t.Fatal(err)
			}
		}
	}
	// later runs a message of a lease, 31 minutes after it was obtained.
	later := func(pool lease.Pool, f func(*testing.T, *Client, lease.Pool, lease.Lease) error) func(*testing.T, *Client) {
		return func(t *testing.T, c *Client) {
			l := held(server1)
			if pool.Subnet == away.Subnet {
				l.Prefix = netip.MustParsePrefix("10.20.0.100/24")
			}
			switch pool.ID {
			case told.ID:
				l.Name, l.Agent = "my_web.1", toldParts
			case unselected.ID:
				l.Agent = unselectedInfo
			}
			time.Sleep(31 * time.Minute)
			if err := f(t, c, pool, l); err != nil {
				t.Fatal(err)
			}
		}
	}
	renew := func(t *testing.T, c *Client, p lease.Pool, l lease.Lease) error {
		_, err := c.Renew(within(t, usual), p, l)
		return err
	}
	rebind := func(t *testing.T, c *Client, p lease.Pool, l lease.Lease) error {
		_, err := c.Rebind(within(t, usual), p, l)
		return err
	}
	reboot := func(t *testing.T, c *Client, p lease.Pool, l lease.Lease) error {
		_, err := c.Confirm(within(t, usual), p, l)
		return err
	}
	farewell := func(t *testing.T, c *Client, p lease.Pool, l lease.Lease) error {
		return c.Release(within(t, usual), p, l)
	}
	reject := func(t *testing.T, c *Client, p lease.Pool, l lease.Lease) error {
		return c.Decline(within(t, usual), p, l)
	}
	probe := func(pool lease.Pool) func(*testing.T, *Client) {
		return func(t *testing.T, c *Client) {
			c.probeMAC = lease.MAC{0x02, 1, 2, 3, 4, 5}
			if _, err := c.Probe(within(t, usual), pool, lease.MAC{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	return []conversation{
		{name: "discover", nth: 0, kind: discover, run: acquire(home, "", "")},
		{name: "discover-address-name-link", nth: 0, kind: discover, run: acquire(away, "my_web.1", "10.20.0.100"), info: selectsAway},
		{name: "request-selecting", nth: 1, kind: request, run: acquire(home, "", "")},
		{name: "request-selecting-name-link", nth: 1, kind: request, run: acquire(away, "my_web.1", "10.20.0.100"), info: selectsAway},
		{name: "request-renewing", nth: 0, kind: request, run: later(home, renew)},
		{name: "request-renewing-link", nth: 0, kind: request, run: later(away, renew), info: selectsAway},
		{name: "request-rebinding", nth: 0, kind: request, run: later(home, rebind)},
		{name: "request-reboot", nth: 0, kind: request, run: later(home, reboot)},
		{name: "request-reboot-link", nth: 0, kind: request, run: later(away, reboot), info: selectsAway},
		{name: "release", nth: 0, kind: release, run: later(home, farewell)},
		{name: "release-link", nth: 0, kind: release, run: later(away, farewell), info: selectsAway},
		{name: "decline", nth: 0, kind: decline, run: later(home, reject)},
		{name: "decline-link", nth: 0, kind: decline, run: later(away, reject), info: selectsAway},
		{name: "probe", nth: 0, kind: discover, run: probe(home)},

		{name: "discover-told-name", nth: 0, kind: discover, run: acquire(told, "my_web.1", ""), info: toldInfo},
		{name: "request-selecting-told-name", nth: 1, kind: request, run: acquire(told, "my_web.1", ""), info: toldInfo},
		{name: "request-renewing-told-name", nth: 0, kind: request, run: later(told, renew), info: toldInfo},
		{name: "request-rebinding-told-name", nth: 0, kind: request, run: later(told, rebind), info: toldInfo},
		{name: "request-reboot-told-name", nth: 0, kind: request, run: later(told, reboot), info: toldInfo},
		{name: "release-told", nth: 0, kind: release, run: later(told, farewell), info: toldInfo},
		{name: "decline-told", nth: 0, kind: decline, run: later(told, reject), info: toldInfo},
		{name: "probe-told", nth: 0, kind: discover, run: probe(told), info: probeInfo},
		{name: "discover-118", nth: 0, kind: discover, run: acquire(by118, "", ""), selects: true},
		{name: "request-renewing-118", nth: 0, kind: request, run: later(by118, renew), selects: true},
		{name: "release-118", nth: 0, kind: release, run: later(by118, farewell), selects: true},
		{name: "discover-port", nth: 0, kind: discover, run: acquire(byPort, "my_web.1", ""), info: portInfo},
		{name: "request-renewing-port", nth: 0, kind: request, run: later(byPort, renew), info: portInfo},
		{name: "release-port", nth: 0, kind: release, run: later(byPort, farewell), info: portInfo},
		{name: "discover-unselected", nth: 0, kind: discover, run: acquire(unselected, "", ""), info: unselectedInfo},
		{name: "release-unselected", nth: 0, kind: release, run: later(unselected, farewell), info: unselectedInfo},
	}
}

// message plays the conversation and returns its message, raw and read.
func (c conversation) message(t *testing.T) (raw []byte, m sent) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		l := newLAN(t)
		l.serve = func(m sent) {
			// Grants whatever is asked for.
			addr := ip("10.10.0.100")
			if m.has(82) || m.has(118) {
				addr = ip("10.20.0.100")
			}
			if kind := map[byte]byte{discover: offer, request: ack}[m.kind()]; kind != 0 {
				l.reply(m, time.Millisecond, server1, grant(m.packet, kind, server1.Addr(), addr))
			}
		}
		client := l.client(server1)
		client.openRelay = recordRaw(client.openRelay, c.nth, &raw)
		c.run(t, client)
		m = l.log()[c.nth]
	})
	if m.xid == 0 {
		t.Error("xid 0")
	}
	binary.BigEndian.PutUint32(raw[4:], goldenXID)
	return raw, m
}

func TestGoldenMessages(t *testing.T) {
	for _, c := range conversations() {
		t.Run(c.name, func(t *testing.T) {
			raw, m := c.message(t)
			if m.kind() != c.kind {
				t.Fatalf("message %d is of type %d, want %d", c.nth, m.kind(), c.kind)
			}
			matchGolden(t, c.name, annotate(t, raw))
		})
	}
}

// matchGolden compares a text with the file of its name.
func matchGolden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".hex")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	golden, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(golden) {
		t.Errorf("%s differs (write it anew with -update):\n%s", file, got)
	}
}

// annotate writes a packet as hexadecimal lines with their meaning.
func annotate(t *testing.T, b []byte) string {
	t.Helper()
	p := mustRead(t, b)
	var s strings.Builder
	line := func(bytes []byte, format string, args ...any) {
		fmt.Fprintf(&s, "%-47s # %s\n", fmt.Sprintf("% x", bytes), fmt.Sprintf(format, args...))
	}
	line(b[0:4], "op %d, htype %d, hlen %d, hops %d", p.op, p.htype, p.hlen, p.hops)
	line(b[4:8], "xid (random; fixed here)")
	line(b[8:12], "secs %d, flags %#04x", p.secs, p.flags)
	line(b[12:16], "ciaddr %s", p.ciaddr)
	line(b[16:20], "yiaddr %s", p.yiaddr)
	line(b[20:24], "siaddr %s", p.siaddr)
	line(b[24:28], "giaddr %s", p.giaddr)
	line(b[28:44], "chaddr %s", p.mac())
	for _, area := range []struct {
		name  string
		bytes []byte
	}{{"sname", p.sname}, {"file", p.file}} {
		if bytes.Trim(area.bytes, "\x00") != nil {
			t.Errorf("%s is used: % x", area.name, area.bytes)
		}
		line(nil, "%s: %d zeros", area.name, len(area.bytes))
	}
	line(b[236:240], "cookie")
	for _, o := range p.options {
		name := map[byte]string{
			12: "host name", 50: "requested address", 53: "message type", 54: "server identifier", 55: "parameter request list",
			57: "maximum message size", 60: "vendor class", 61: "client identifier", 77: "user class", 81: "client FQDN",
			82: "relay agent information:", 118: "subnet selection",
		}[o.code]
		if o.code == 82 {
			for _, part := range subOptions(t, o.value) {
				name += map[byte]string{1: " circuit id", 2: " remote id", 5: " link selection", 6: " subscriber id", 19: " source port"}[part.code]
			}
		}
		line(appendOptions(nil, o), "%d %s", o.code, name)
	}
	line([]byte{255}, "end")
	line(nil, "padding: %d zeros, %d bytes in all", len(p.padding), p.size)
	return s.String()
}

// subOptions reads the value of option 82 (RFC 3046 section 2.0).
func subOptions(t *testing.T, b []byte) (parts []option) {
	t.Helper()
	for len(b) > 0 {
		if len(b) < 2 || len(b) < 2+int(b[1]) {
			t.Fatalf("cut sub-option: % x", b)
		}
		end := 2 + int(b[1])
		parts, b = append(parts, option{b[0], b[2:end]}), b[end:]
	}
	return parts
}

// The rules that hold for every message.
func TestEveryMessage(t *testing.T) {
	var parameters [][]byte
	for _, c := range conversations() {
		t.Run(c.name, func(t *testing.T) {
			raw, m := c.message(t)
			if m.op != 1 || m.htype != 1 || m.hlen != 6 {
				t.Errorf("op %d, htype %d, hlen %d: want 1, 1, 6 (RFC 2131 section 2)", m.op, m.htype, m.hlen)
			}
			if m.hops != 1 {
				t.Errorf("hops %d, want 1: one relay, us (RFC 1542 section 4.1.1)", m.hops)
			}
			if m.flags != 0 {
				t.Errorf("flags %#x: no broadcast, and the rest must be zero (RFC 2131 section 2)", m.flags)
			}
			if m.giaddr != relay1 {
				t.Errorf("giaddr %s, want %s (RFC 1542 section 4.1.1)", m.giaddr, relay1)
			}
			if m.yiaddr != netip.IPv4Unspecified() || m.siaddr != netip.IPv4Unspecified() {
				t.Errorf("yiaddr %s, siaddr %s: want 0 (RFC 2131 table 5)", m.yiaddr, m.siaddr)
			}
			if !bytes.Equal(m.chaddr[6:], make([]byte, 10)) {
				t.Errorf("chaddr % x: not padded with zeros", m.chaddr)
			}
			if len(raw) < 300 {
				t.Errorf("%d bytes, want at least 300 (RFC 1542 section 2.1)", len(raw))
			}
			if bytes.Trim(m.padding, "\x00") != nil {
				t.Errorf("after the end: % x, want padding only", m.padding)
			}
			if m.options[0].code != 53 {
				t.Errorf("option %d comes first, want the message type", m.options[0].code)
			}
			seen := map[byte]bool{}
			for i, o := range m.options {
				if seen[o.code] {
					t.Errorf("option %d twice", o.code)
				}
				seen[o.code] = true
				if o.code == 82 && i != len(m.options)-1 {
					t.Error("option 82 is not the last one (RFC 3046 section 2.1)")
				}
			}
			if !bytes.Equal(m.get(82), c.info) {
				t.Errorf("option 82 is % x, want % x", m.get(82), c.info)
			}
			if want := []byte{10, 20, 0, 0}; seen[118] != c.selects || seen[118] && !bytes.Equal(m.get(118), want) {
				t.Errorf("option 118 is % x, present: %t; want % x, present: %t (RFC 3011)", m.get(118), seen[118], want, c.selects)
			}
			if want := append([]byte{1}, m.chaddr[:6]...); !bytes.Equal(m.get(61), want) {
				t.Errorf("option 61 is % x, want % x in every message (RFC 2131 section 4.2)", m.get(61), want)
			}
			if seen[51] {
				t.Error("option 51: the lease time is the server's to choose")
			}
			switch c.kind {
			case discover, request:
				parameters = append(parameters, m.get(55))
				if size := m.get(57); len(size) != 2 || binary.BigEndian.Uint16(size) < 576 {
					t.Errorf("option 57 is % x, want at least 576 (RFC 2132 section 9.10)", size)
				}
			case release, decline:
				for _, code := range []byte{12, 51, 55, 57, 60, 77, 81} {
					if seen[code] {
						t.Errorf("option %d in a RELEASE or DECLINE (RFC 2131 table 5)", code)
					}
				}
				if m.secs != 0 {
					t.Errorf("secs %d in a RELEASE or DECLINE, want 0 (RFC 2131 table 5)", m.secs)
				}
				if m.addr(54) != server1.Addr() {
					t.Errorf("option 54 is %s in a RELEASE or DECLINE, want the server (RFC 2131 table 5)", m.addr(54))
				}
			}
		})
	}
	for _, p := range parameters {
		if len(p) == 0 || !bytes.Equal(p, parameters[0]) {
			t.Errorf("option 55 is % x and % x: must be the same in DISCOVER and all REQUESTs (RFC 2131 section 3.5)", parameters[0], p)
		}
	}
}

// What tells the messages apart: RFC 2131 section 4.3.2, tables 4 and 5.
func TestMessageFields(t *testing.T) {
	none := netip.IPv4Unspecified()
	rules := map[string]struct {
		ciaddr    netip.Addr
		requested netip.Addr // option 50
		server    netip.Addr // option 54
		secs      uint16
		why       string
	}{
		"discover":                    {none, netip.Addr{}, netip.Addr{}, 0, "table 5"},
		"discover-address-name-link":  {none, ip("10.20.0.100"), netip.Addr{}, 0, "section 4.4.1: 50 is a wish"},
		"probe":                       {none, netip.Addr{}, netip.Addr{}, 0, "table 5"},
		"request-selecting":           {none, ip("10.10.0.100"), server1.Addr(), 0, "section 4.3.2: both 50 and 54, ciaddr 0"},
		"request-selecting-name-link": {none, ip("10.20.0.100"), server1.Addr(), 0, "section 4.3.2: both 50 and 54, ciaddr 0"},
		"request-renewing":            {ip("10.10.0.100"), netip.Addr{}, netip.Addr{}, 60, "section 4.3.2: ciaddr, neither 50 nor 54"},
		"request-renewing-link":       {ip("10.20.0.100"), netip.Addr{}, netip.Addr{}, 60, "section 4.3.2: ciaddr, neither 50 nor 54"},
		"request-rebinding":           {ip("10.10.0.100"), netip.Addr{}, netip.Addr{}, 60, "section 4.3.2: ciaddr, neither 50 nor 54"},
		"request-reboot":              {none, ip("10.10.0.100"), netip.Addr{}, 0, "section 4.3.2: 50, no 54, ciaddr 0"},
		"request-reboot-link":         {none, ip("10.20.0.100"), netip.Addr{}, 0, "section 4.3.2: 50, no 54, ciaddr 0"},
		"release":                     {ip("10.10.0.100"), netip.Addr{}, server1.Addr(), 0, "table 5: ciaddr, no 50"},
		"release-link":                {ip("10.20.0.100"), netip.Addr{}, server1.Addr(), 0, "table 5: ciaddr, no 50"},
		"decline":                     {none, ip("10.10.0.100"), server1.Addr(), 0, "table 5: ciaddr 0, 50"},
		"decline-link":                {none, ip("10.20.0.100"), server1.Addr(), 0, "table 5: ciaddr 0, 50"},
		"discover-told-name":          {none, netip.Addr{}, netip.Addr{}, 0, "table 5"},
		"request-selecting-told-name": {none, ip("10.20.0.100"), server1.Addr(), 0, "section 4.3.2: both 50 and 54, ciaddr 0"},
		"request-renewing-told-name":  {ip("10.20.0.100"), netip.Addr{}, netip.Addr{}, 60, "section 4.3.2: ciaddr, neither 50 nor 54"},
		"request-rebinding-told-name": {ip("10.20.0.100"), netip.Addr{}, netip.Addr{}, 60, "section 4.3.2: ciaddr, neither 50 nor 54"},
		"request-reboot-told-name":    {none, ip("10.20.0.100"), netip.Addr{}, 0, "section 4.3.2: 50, no 54, ciaddr 0"},
		"release-told":                {ip("10.20.0.100"), netip.Addr{}, server1.Addr(), 0, "table 5: ciaddr, no 50"},
		"decline-told":                {none, ip("10.20.0.100"), server1.Addr(), 0, "table 5: ciaddr 0, 50"},
		"probe-told":                  {none, netip.Addr{}, netip.Addr{}, 0, "table 5"},
		"discover-118":                {none, netip.Addr{}, netip.Addr{}, 0, "table 5"},
		"request-renewing-118":        {ip("10.20.0.100"), netip.Addr{}, netip.Addr{}, 60, "section 4.3.2: ciaddr, neither 50 nor 54"},
		"release-118":                 {ip("10.20.0.100"), netip.Addr{}, server1.Addr(), 0, "table 5: ciaddr, no 50"},
		"discover-port":               {none, netip.Addr{}, netip.Addr{}, 0, "table 5"},
		"request-renewing-port":       {ip("10.20.0.100"), netip.Addr{}, netip.Addr{}, 60, "section 4.3.2: ciaddr, neither 50 nor 54"},
		"release-port":                {ip("10.20.0.100"), netip.Addr{}, server1.Addr(), 0, "table 5: ciaddr, no 50"},
		"discover-unselected":         {none, netip.Addr{}, netip.Addr{}, 0, "table 5"},
		"release-unselected":          {ip("10.20.0.100"), netip.Addr{}, server1.Addr(), 0, "table 5: ciaddr, no 50"},
	}
	for _, c := range conversations() {
		t.Run(c.name, func(t *testing.T) {
			rule, ok := rules[c.name]
			if !ok {
				t.Fatal("no rule")
			}
			_, m := c.message(t)
			if m.ciaddr != rule.ciaddr || m.addr(50) != rule.requested || m.addr(54) != rule.server {
				t.Errorf("ciaddr %s, option 50 %s, option 54 %s; want %s, %s, %s (RFC 2131 %s)",
					m.ciaddr, m.addr(50), m.addr(54), rule.ciaddr, rule.requested, rule.server, rule.why)
			}
			if m.secs != rule.secs {
				t.Errorf("secs %d, want %d", m.secs, rule.secs)
			}
			if strings.Contains(c.name, "name") && string(m.get(12)) != "my-web-1" {
				t.Errorf("option 12 is %q, want the container's name as a host name", m.get(12))
			}
		})
	}
}

func TestHostName(t *testing.T) {
	for container, want := range map[string]string{
		"":             "",
		"web":          "web",
		"Web01":        "Web01",
		"my_app.web.1": "my-app-web-1",
		"-._web_.-":    "web",
		"___":          "",
		// One hyphen for each rune that is no letter of a host name.
		"größe":                         "gr--e",
		"a\x00b\n":                      "a-b",
		"\xff\xfe":                      "",
		strings.Repeat("a", 64):         strings.Repeat("a", 63),
		strings.Repeat("a", 62) + "__b": strings.Repeat("a", 62),
		strings.Repeat("_", 70) + "web": "web",
	} {
		if got := hostName(container); got != want {
			t.Errorf("hostName(%q) = %q, want %q", container, got, want)
		}
	}
}

func TestSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		for _, step := range []struct {
			at   time.Duration
			want uint16
		}{{-time.Hour, 0}, {0, 0}, {999 * time.Millisecond, 0}, {time.Second, 1}, {65535 * time.Second, 65535}, {100 * time.Hour, 65535}} {
			if got := seconds(began.Add(-step.at)); got != step.want {
				t.Errorf("after %s: secs %d, want %d", step.at, got, step.want)
			}
		}
		if got := seconds(time.Time{}); got != 0 {
			t.Errorf("secs %d since a time that isn't known", got)
		}
	})
}

// The same option 82 in all messages of one lease, from DISCOVER to RELEASE
// (RFC 3046 section 2.1; a dnsmasq ignores a RELEASE that lacks it).
func TestLinkSelectionThroughALease(t *testing.T) {
	for _, pool := range []lease.Pool{home, away} {
		t.Run(pool.ID, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLAN(t)
				l.attach(newDHCPD(server1))
				c := l.client(server1)
				got, err := c.Acquire(within(t, usual), want(pool, mac1))
				if err != nil {
					t.Fatal(err)
				}
				if got, err = c.Renew(within(t, usual), pool, got); err != nil {
					t.Fatal(err)
				}
				if got, err = c.Rebind(within(t, usual), pool, got); err != nil {
					t.Fatal(err)
				}
				if got, err = c.Confirm(within(t, usual), pool, got); err != nil {
					t.Fatal(err)
				}
				if err := c.Decline(within(t, usual), pool, got); err != nil {
					t.Fatal(err)
				}
				if err := c.Release(within(t, usual), pool, got); err != nil {
					t.Fatal(err)
				}
				if want := []byte{discover, request, request, request, request, decline, release}; !slices.Equal(l.kinds(), want) {
					t.Fatalf("sent types %v, want %v", l.kinds(), want)
				}
				var want []byte
				if pool.ID == away.ID {
					want = []byte{5, 4, 10, 20, 0, 0}
				}
				for i, m := range l.log() {
					if !bytes.Equal(m.get(82), want) {
						t.Errorf("message %d: option 82 is % x, want % x", i, m.get(82), want)
					}
				}
			})
		})
	}
}
