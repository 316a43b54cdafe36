package lease

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

func TestNewPoolRefusals(t *testing.T) {
	cases := []struct {
		subnet, within string
		want           []string // parts of the message
	}{
		{"", "192.0.2.0/24", []string{"--ip-range 192.0.2.0/24", "--subnet"}},
		{"192.0.2.0", "", []string{`"192.0.2.0"`, "prefix length"}},
		{"192.0.2.0/33", "", []string{`"192.0.2.0/33"`}},
		{"192.0.2.0/-1", "", []string{`"192.0.2.0/-1"`}},
		{"192.0.2/24", "", []string{`"192.0.2/24"`}},
		{"garbage", "", []string{`"garbage"`}},
		{" 192.0.2.0/24", "", []string{"parse subnet"}},
		{"192.0.2.0/24\x00", "", []string{"parse subnet"}},
		{"2001:db8::/64", "", []string{"2001:db8::/64", "IPv4 only", "--ipv6"}},
		{"::/0", "", []string{"IPv4 only"}},
		{"::ffff:192.0.2.0/120", "", []string{"IPv4 only"}},
		{"fe80::%eth0/64", "", []string{"parse subnet"}},
		{"0.0.0.0/0", "", []string{"0.0.0.0/0", "/1 to /30"}},
		{"192.0.2.0/31", "", []string{"192.0.2.0/31", "/1 to /30"}},
		{"192.0.2.1/32", "", []string{"192.0.2.1/32", "/1 to /30"}},
		{"224.0.0.0/4", "", []string{"224.0.0.0/4", "unicast"}},
		{"255.255.255.0/24", "", []string{"unicast"}},
		{"192.0.2.0/24", "192.0.3.0/25", []string{"--ip-range", "192.0.3.0/25", "192.0.2.0/24"}},
		{"192.0.2.0/24", "192.0.2.0/23", []string{"--ip-range", "192.0.2.0/23"}},
		{"192.0.2.0/24", "192.0.2.0", []string{"--ip-range", `"192.0.2.0"`}},
		{"192.0.2.0/24", "x", []string{"--ip-range", `"x"`}},
		{"192.0.2.0/24", "2001:db8::/64", []string{"--ip-range", "2001:db8::/64"}},
		{"192.0.2.0/24", "::ffff:192.0.2.0/124", []string{"--ip-range"}},
	}
	for _, c := range cases {
		p, err := NewPool(c.subnet, c.within, nil)
		if err == nil {
			t.Errorf("%q in %q: got %+v, want an error", c.within, c.subnet, p)
			continue
		}
		for _, part := range c.want {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%q in %q: no %q in: %v", c.within, c.subnet, part, err)
			}
		}
	}
	if _, err := NewPool("192.0.2.0/24", "", map[string]string{"mtu": "9000"}); err == nil || !strings.Contains(err.Error(), `unknown option "mtu"`) {
		t.Errorf("unknown option: %v", err)
	}
	// What belongs to a relay agent, on a network that is asked for by broadcast.
	for name, text := range map[string]string{"listen_addr": "0.0.0.0", "listen_port": "1067", "link_selection": "off", "option82": "host", "dhcp_server": "192.0.2.1"} {
		for _, subnet := range []string{"192.0.2.0/24", ""} {
			p, err := NewPool(subnet, "", map[string]string{"dhcp_interface": "eth0", name: text})
			if err == nil || !strings.Contains(err.Error(), name+"="+text) || !strings.Contains(err.Error(), "eth0") || !reflect.DeepEqual(p, Pool{}) {
				t.Errorf("%s: got %+v, %v", name, p, err)
			}
		}
	}
}

func TestNewPool(t *testing.T) {
	cases := []struct{ subnet, within, wantSubnet, wantRange string }{
		{"192.0.2.0/24", "", "192.0.2.0/24", ""},
		{"192.0.2.77/24", "192.0.2.133/25", "192.0.2.0/24", "192.0.2.128/25"},
		{"192.0.2.0/30", "192.0.2.0/30", "192.0.2.0/30", "192.0.2.0/30"},
		{"192.0.2.0/24", "192.0.2.9/32", "192.0.2.0/24", "192.0.2.9/32"},
		{"10.0.0.0/8", "", "10.0.0.0/8", ""},
		{"1.2.3.4/1", "", "0.0.0.0/1", ""},
		{"", "", "", ""}, // to be learned
	}
	for _, c := range cases {
		p, err := NewPool(c.subnet, c.within, map[string]string{"dhcp_server": "198.51.100.1"})
		if err != nil {
			t.Errorf("%s, %s: %v", c.subnet, c.within, err)
			continue
		}
		want := Pool{Options: Options{Servers: []Server{{"198.51.100.1", 67}}}}
		if c.wantSubnet != "" {
			want.Subnet = netip.MustParsePrefix(c.wantSubnet)
		}
		if c.wantRange != "" {
			want.Range = netip.MustParsePrefix(c.wantRange)
		}
		if !reflect.DeepEqual(p, want) {
			t.Errorf("%s, %s: got %+v, want %+v", c.subnet, c.within, p, want)
		}
	}
}

func TestPoolIDIsReadable(t *testing.T) {
	p, err := NewPool("192.0.2.0/24", "192.0.2.128/25", map[string]string{"dhcp_server": "198.51.100.1,dhcp.example:6767", "listen_addr": "203.0.113.1"})
	if err != nil {
		t.Fatal(err)
	}
	p.Gateway = netip.MustParseAddr("192.0.2.1")
	id := p.newID()
	want := "192.0.2.0/24?dhcp_server=198.51.100.1,dhcp.example:6767&gateway=192.0.2.1&id="
	if !strings.HasPrefix(id, want) || !strings.HasSuffix(id, "&listen_addr=203.0.113.1&range=192.0.2.128/25") {
		t.Errorf("ID %q, want %q…", id, want)
	}
}

// within returns a random address of a subnet, not its first or last.
func within(r *rand.Rand, subnet netip.Prefix) netip.Addr {
	first := subnet.Masked().Addr().As4()
	size := uint64(1) << (32 - subnet.Bits())
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(first[:])+uint32(1+r.Uint64N(size-2)))
	return netip.AddrFrom4(b)
}

func randomPool(r *rand.Rand) Pool {
	p := Pool{Options: randomOptions(r)}
	for {
		p.Subnet = netip.PrefixFrom(randomAddr(r), 1+r.IntN(30)).Masked()
		if first := p.Subnet.Addr(); Unicast(first) || first.IsUnspecified() {
			break
		}
	}
	if r.IntN(2) == 0 {
		p.Range = netip.PrefixFrom(within(r, p.Subnet), p.Subnet.Bits()+r.IntN(33-p.Subnet.Bits())).Masked()
	}
	if r.IntN(4) > 0 {
		p.Gateway = within(r, p.Subnet)
	}
	p.SharedMAC = r.IntN(2) == 0
	return p
}

func TestPoolIDRoundTrip(t *testing.T) {
	r := random(t)
	seen := map[string]bool{}
	for range 2000 {
		p := randomPool(r)
		p.ID = p.newID()
		if seen[p.ID] {
			t.Fatalf("ID %q came twice", p.ID)
		}
		seen[p.ID] = true
		if got, err := ParsePoolID(p.ID); err != nil || !reflect.DeepEqual(got, p) {
			t.Fatalf("%q parsed as\n%+v, %v, want\n%+v", p.ID, got, err, p)
		}
	}
	// One pool asked for twice is two pools.
	p := randomPool(r)
	if a, b := p.newID(), p.newID(); a == b {
		t.Errorf("two requests got one ID, %q", a)
	}
}

func TestLegacyPoolID(t *testing.T) {
	got, err := ParsePoolID("192.0.2.0")
	want := Pool{ID: "192.0.2.0", Subnet: netip.MustParsePrefix("192.0.2.0/32")}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
}

var hostileIDs = []string{
	"", "?", "?id=x", "?id=x&dhcp_interface=eth0", "192.0.2.0/24", "192.0.2.0/24?", "192.0.2.0/24?id=", "192.0.2.0/24?gateway=192.0.2.1",
	"192.0.2.0/31?id=x", "0.0.0.0/0?id=x", "2001:db8::/64?id=x", "::1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "::ffff:192.0.2.0",
	"192.0.2.0/24?id=x&mtu=9000", "192.0.2.0/24?id=x&range=192.0.3.0/24", "192.0.2.0/24?id=x&dhcp_server=10.0.0.300",
	"192.0.2.0/24?id=x&gateway=y", "192.0.2.0/24?id=x&gateway=198.51.100.1", "192.0.2.0/24?id=x&gateway=::1", "192.0.2.0/24?id=x&gateway=fe80::1%25eth0",
	"192.0.2.0/24?id=x&gateway=192.0.2.0", "192.0.2.0/24?id=x&gateway=192.0.2.255", "192.0.2.0/24?id=x&gateway=::ffff:192.0.2.1",
	"192.0.2.0/24?id=x&dhcp_interface=eth0&dhcp_server=198.51.100.1", "192.0.2.0/24?id=x&dhcp_interface=eth0&option82=host",
	"192.0.2.0/24?id=x;y", "192.0.2.0/24?id=%zz", "192.0.2.0/24?%", "LocalDefault/192.0.2.0/24", "\x00", strings.Repeat("a", 100000),
}

func TestHostilePoolIDs(t *testing.T) {
	for _, id := range hostileIDs {
		p, err := ParsePoolID(id)
		if err == nil {
			t.Errorf("%.80q: got %+v, want an error", id, p)
		} else if !strings.Contains(err.Error(), "unknown pool") {
			t.Errorf("%.80q: the error doesn't say what is wrong: %.200v", id, err)
		}
	}
}

func FuzzParsePoolID(f *testing.F) {
	for _, id := range hostileIDs {
		f.Add(id)
	}
	f.Add("192.0.2.0")
	f.Add("192.0.2.7/24?dhcp_server=198.51.100.1,a.b:6767&gateway=192.0.2.1&id=3KDPZ5&listen_addr=0.0.0.0&range=192.0.2.128/25")
	f.Add("10.0.0.0/8?id=x&id=y&range=10.1.0.1/16&gateway=")
	f.Fuzz(func(t *testing.T, id string) {
		p, err := ParsePoolID(id)
		if err != nil {
			if !reflect.DeepEqual(p, Pool{}) {
				t.Fatalf("%q: %+v beside the error %v", id, p, err)
			}
			return
		}
		if p.ID != id || p.Subnet != p.Subnet.Masked() || !p.Subnet.Addr().Is4() {
			t.Fatalf("%q parsed as %+v", id, p)
		}
		if p.Subnet.IsSingleIP() {
			return // to be learned from a server
		}
		if p.Gateway.IsValid() && p.inSubnet(p.Gateway) != nil {
			t.Fatalf("%q: gateway %s is no host of %s", id, p.Gateway, p.Subnet)
		}
		if p.Range.IsValid() && (p.Range.Bits() < p.Subnet.Bits() || !p.Subnet.Contains(p.Range.Addr())) {
			t.Fatalf("%q: range %s isn't within %s", id, p.Range, p.Subnet)
		}
		again, err := ParsePoolID(p.newID())
		again.ID = id
		if err != nil || !reflect.DeepEqual(again, p) {
			t.Fatalf("%q is\n%+v, and by its own ID\n%+v, %v", id, p, again, err)
		}
	})
}

func TestAllowedAddresses(t *testing.T) {
	p := Pool{
		Subnet: netip.MustParsePrefix("192.0.2.0/24"), Range: netip.MustParsePrefix("192.0.2.128/25"),
		Gateway: netip.MustParseAddr("192.0.2.129"), Reserved: []netip.Addr{netip.MustParseAddr("192.0.2.130")},
	}
	cases := []struct {
		addr            string
		offered, byName []string // parts of the refusal; nil where allowed
	}{
		{"192.0.2.200", nil, nil},
		{"192.0.2.128", nil, nil}, // the range's edge is no network address
		{"192.0.2.254", nil, nil},
		{"192.0.2.5", []string{"192.0.2.5", "--ip-range 192.0.2.128/25"}, nil},
		{"192.0.2.129", []string{"192.0.2.129", "gateway", "192.0.2.0/24", "DHCP server's range"}, []string{"192.0.2.129", "gateway", "192.0.2.0/24"}},
		{"192.0.2.130", []string{"192.0.2.130", "auxiliary", "192.0.2.0/24", "DHCP server's range"}, []string{"192.0.2.130", "auxiliary", "192.0.2.0/24"}},
		{"198.51.100.1", []string{"198.51.100.1", "outside", "192.0.2.0/24"}, []string{"198.51.100.1", "outside", "192.0.2.0/24"}},
		{"192.0.2.0", []string{"network or broadcast", "192.0.2.0/24"}, []string{"network or broadcast"}},
		{"192.0.2.255", []string{"network or broadcast", "192.0.2.0/24"}, []string{"network or broadcast"}},
		{"::ffff:192.0.2.200", []string{"outside"}, []string{"outside"}},
		{"2001:db8::1", []string{"outside"}, []string{"outside"}},
	}
	if err := (Pool{}).allows(netip.MustParseAddr("192.0.2.200"), true); err == nil || !strings.Contains(err.Error(), "no subnet of the network") {
		t.Errorf("of no subnet: %v", err)
	}
	for _, c := range cases {
		for _, asked := range []bool{false, true} {
			want := c.offered
			if asked {
				want = c.byName
			}
			err := p.allows(netip.MustParseAddr(c.addr), asked)
			if (err == nil) != (want == nil) {
				t.Errorf("%s, asked %t: %v", c.addr, asked, err)
				continue
			}
			for _, part := range want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%s, asked %t: no %q in: %v", c.addr, asked, part, err)
				}
			}
			if asked && err != nil && strings.Contains(err.Error(), "DHCP server's range") {
				t.Errorf("%s: who asked for it can't mend it at the server: %v", c.addr, err)
			}
		}
	}
}

func TestSubnetEdges(t *testing.T) {
	for subnet, want := range map[string][2]string{
		"192.0.2.0/24": {"192.0.2.1", "192.0.2.255"},
		"192.0.2.4/30": {"192.0.2.5", "192.0.2.7"},
		"10.0.0.0/8":   {"10.0.0.1", "10.255.255.255"},
		"0.0.0.0/1":    {"0.0.0.1", "127.255.255.255"},
		"128.0.0.0/1":  {"128.0.0.1", "255.255.255.255"},
	} {
		p := Pool{Subnet: netip.MustParsePrefix(subnet)}
		if got := [2]string{p.firstUsable().String(), p.broadcast().String()}; got != want {
			t.Errorf("%s: first and last %v, want %v", subnet, got, want)
		}
	}
}
