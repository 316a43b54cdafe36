package lease

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// offer is one of a server, with option 1 and option 3 or "".
func offer(server, addr, subnet, router string) Offer {
	o := Offer{Server: netip.MustParseAddr(server), Address: netip.MustParseAddr(addr)}
	if subnet != "" {
		o.Subnet = netip.MustParsePrefix(subnet)
	}
	if router != "" {
		o.Router = netip.MustParseAddr(router)
	}
	return o
}

func TestSettle(t *testing.T) {
	const a, b = "198.51.100.1", "198.51.100.2"
	const first = "first address of the subnet"
	usual := offer(a, "192.0.2.99", "192.0.2.0/24", "192.0.2.254")
	both := []string{
		"server " + a + " offers 192.0.2.99, subnet 192.0.2.0/24, router 192.0.2.254",
		"server " + b + " offers 192.0.2.98, subnet 192.0.2.0/24, router 192.0.2.253",
	}
	for name, c := range map[string]struct {
		subnet  string // --subnet
		offers  []Offer
		want    string // the subnet that it becomes
		gateway string
		from    string
		// warnings are parts of the warnings, one after the other.
		warnings []string
	}{
		"given":           {"192.0.2.0/24", []Offer{usual}, "192.0.2.0/24", "192.0.2.254", "option 3 of server " + a, nil},
		"learned":         {"", []Offer{usual}, "192.0.2.0/24", "192.0.2.254", "option 3 of server " + a, nil},
		"learned, narrow": {"", []Offer{offer(a, "192.0.2.129", "192.0.2.128/30", "192.0.2.130")}, "192.0.2.128/30", "192.0.2.130", "option 3 of server " + a, nil},
		"learned, wide":   {"", []Offer{offer(a, "10.0.1.0", "10.0.0.0/8", "10.0.0.1")}, "10.0.0.0/8", "10.0.0.1", "option 3 of server " + a, nil},

		"given, no router":            {"192.0.2.0/24", []Offer{offer(a, "192.0.2.99", "192.0.2.0/24", "")}, "192.0.2.0/24", "192.0.2.1", first, []string{"names no router"}},
		"learned, no router":          {"", []Offer{offer(a, "192.0.2.199", "192.0.2.128/25", "")}, "192.0.2.128/25", "192.0.2.129", first, []string{"names no router"}},
		"given, router outside":       {"192.0.2.0/24", []Offer{offer(a, "192.0.2.99", "192.0.2.0/24", "198.51.100.254")}, "192.0.2.0/24", "192.0.2.1", first, []string{"not used server=" + a + " router=198.51.100.254", "names no router"}},
		"learned, router outside":     {"", []Offer{offer(a, "192.0.2.99", "192.0.2.0/24", "198.51.100.254")}, "192.0.2.0/24", "192.0.2.1", first, []string{"not used", "names no router"}},
		"router that is the network":  {"", []Offer{offer(a, "192.0.2.99", "192.0.2.0/24", "192.0.2.0")}, "192.0.2.0/24", "192.0.2.1", first, []string{"not used", "names no router"}},
		"router that is no host":      {"", []Offer{offer(a, "192.0.2.99", "192.0.2.0/24", "192.0.2.255")}, "192.0.2.0/24", "192.0.2.1", first, []string{"not used", "names no router"}},
		"router 0.0.0.0":              {"192.0.2.0/24", []Offer{offer(a, "192.0.2.99", "192.0.2.0/24", "0.0.0.0")}, "192.0.2.0/24", "192.0.2.1", first, []string{"not used", "names no router"}},
		"given, another mask":         {"192.0.2.0/24", []Offer{offer(a, "192.0.2.99", "192.0.2.0/25", "192.0.2.1")}, "192.0.2.0/24", "192.0.2.1", "option 3 of server " + a, []string{"another one: containers get the network's prefix length server=" + a + " offered=192.0.2.0/25"}},
		"given, no mask":              {"192.0.2.0/24", []Offer{offer(a, "192.0.2.99", "", "192.0.2.1")}, "192.0.2.0/24", "192.0.2.1", "option 3 of server " + a, nil},
		"given, absurd mask":          {"192.0.2.0/24", []Offer{offer(a, "192.0.2.99", "192.0.2.99/32", "192.0.2.1")}, "192.0.2.0/24", "192.0.2.1", "option 3 of server " + a, []string{"offered=192.0.2.99/32"}},
		"given, outside of its range": {"192.0.2.0/25", []Offer{offer(a, "192.0.2.99", "192.0.2.0/24", "192.0.2.254")}, "192.0.2.0/25", "192.0.2.1", first, []string{"another one", "not used", "names no router"}},

		"two that agree":                    {"", []Offer{usual, offer(b, "192.0.2.98", "192.0.2.0/24", "192.0.2.254")}, "192.0.2.0/24", "192.0.2.254", "option 3 of server " + a, nil},
		"two routers":                       {"", []Offer{usual, offer(b, "192.0.2.98", "192.0.2.0/24", "192.0.2.253")}, "192.0.2.0/24", "192.0.2.254", "option 3 of server " + a, []string{"answer differently: a container may get its address from any of them offers=" + strings.Join(both, "; ")}},
		"two routers, the other first":      {"192.0.2.0/24", []Offer{offer(b, "192.0.2.98", "192.0.2.0/24", "192.0.2.253"), usual}, "192.0.2.0/24", "192.0.2.253", "option 3 of server " + b, []string{"offers=" + both[1] + "; " + both[0]}},
		"two subnets":                       {"", []Offer{usual, offer(b, "203.0.113.9", "203.0.113.0/24", "203.0.113.1")}, "192.0.2.0/24", "192.0.2.254", "option 3 of server " + a, []string{"answer differently"}},
		"two subnets, the second is wanted": {"203.0.113.0/24", []Offer{usual, offer(b, "203.0.113.9", "203.0.113.0/24", "203.0.113.1")}, "203.0.113.0/24", "203.0.113.1", "option 3 of server " + b, []string{"answer differently"}},
		"the second has a router":           {"", []Offer{offer(a, "192.0.2.99", "192.0.2.0/24", ""), offer(b, "192.0.2.98", "192.0.2.0/24", "192.0.2.253")}, "192.0.2.0/24", "192.0.2.253", "option 3 of server " + b, []string{"answer differently: a container may get its address from any of them offers=server " + a + " offers 192.0.2.99, subnet 192.0.2.0/24, router none; " + both[1]}},
		"the second has a mask":             {"", []Offer{offer(a, "192.0.2.99", "", ""), offer(b, "192.0.2.98", "192.0.2.0/24", "192.0.2.253")}, "192.0.2.0/24", "192.0.2.253", "option 3 of server " + b, []string{"server " + a + " offers 192.0.2.99, subnet none, router none"}},
		"three, the last is different":      {"", []Offer{usual, offer(b, "192.0.2.98", "192.0.2.0/24", "192.0.2.254"), offer("198.51.100.3", "192.0.2.97", "192.0.2.0/25", "192.0.2.254")}, "192.0.2.0/24", "192.0.2.254", "option 3 of server " + a, []string{"198.51.100.3"}},
		"a stranger's router is no host":    {"192.0.2.0/24", []Offer{offer(b, "203.0.113.9", "203.0.113.0/24", "192.0.2.77"), usual}, "192.0.2.0/24", "192.0.2.254", "option 3 of server " + a, []string{"answer differently"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := Pool{Options: Options{NetworkName: "kept"}}
			if c.subnet != "" {
				p.Subnet = netip.MustParsePrefix(c.subnet)
			}
			got, err := p.settle(c.offers, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got.pool.Subnet.String() != c.want || got.pool.Gateway.String() != c.gateway || got.from != c.from || got.pool.FirstWait != 0 || got.pool.Options.NetworkName != "kept" {
				t.Errorf("settled as %+v, gateway from %s; want %s and %s from %s", got.pool, got.from, c.want, c.gateway, c.from)
			}
			if len(got.warnings) != len(c.warnings) {
				t.Errorf("warnings %v, want %q", got.warnings, c.warnings)
			}
			for i, w := range got.warnings {
				text := w.text
				for pair := range slices.Chunk(w.args, 2) {
					text += fmt.Sprintf(" %v=%v", pair...)
				}
				if i < len(c.warnings) && !strings.Contains(text, c.warnings[i]) {
					t.Errorf("warning %q, want %q", text, c.warnings[i])
				}
			}
		})
	}
}

func TestSettleRefusals(t *testing.T) {
	const a, b = "198.51.100.1", "198.51.100.2"
	silence := fmt.Errorf("%w within 8s (asked %s from 192.0.2.2)", ErrNoAnswer, a)
	down := errors.New("interface eth0 is down: bring it up")
	for name, c := range map[string]struct {
		subnet string
		offers []Offer
		err    error
		says   []string
	}{
		"no mask":                     {"", []Offer{offer(a, "192.0.2.99", "", "")}, nil, []string{a, "192.0.2.99", "option 1", "--subnet 192.0.2.0/24 --gateway 192.0.2.1"}},
		"no mask, but a router":       {"", []Offer{offer(a, "10.1.2.99", "", "10.1.2.254")}, nil, []string{"--subnet 10.1.2.0/24 --gateway 10.1.2.254"}},
		"no mask, a router far away":  {"", []Offer{offer(a, "10.1.2.99", "", "10.1.3.254")}, nil, []string{"--subnet 10.1.0.0/16 --gateway 10.1.3.254"}},
		"no mask, one further away":   {"", []Offer{offer(a, "10.1.2.99", "", "10.3.3.254")}, nil, []string{"--subnet 10.0.0.0/8 --gateway 10.3.3.254"}},
		"no mask, one of elsewhere":   {"", []Offer{offer(a, "10.1.2.99", "", "192.0.2.1")}, nil, []string{"--subnet 10.1.2.0/24 --gateway 10.1.2.1"}},
		"/0":                          {"", []Offer{offer(a, "192.0.2.99", "0.0.0.0/0", "192.0.2.7")}, nil, []string{a, "192.0.2.99", "0.0.0.0/0", "/1 to /30", "--subnet 192.0.2.0/24 --gateway 192.0.2.7"}},
		"half of all addresses":       {"", []Offer{offer(a, "10.0.0.5", "0.0.0.0/1", "10.0.0.1")}, nil, []string{a, "10.0.0.5", "0.0.0.0/1 is nobody's LAN", "--subnet 10.0.0.0/24 --gateway 10.0.0.1"}},
		"/7":                          {"", []Offer{offer(a, "10.0.0.5", "10.0.0.0/7", "10.0.0.1")}, nil, []string{"10.0.0.0/7 is nobody's LAN"}},
		"loopback":                    {"", []Offer{offer(a, "127.0.0.5", "127.0.0.0/8", "127.0.0.1")}, nil, []string{"127.0.0.0/8 is nobody's LAN"}},
		"/31":                         {"", []Offer{offer(a, "192.0.2.99", "192.0.2.98/31", "192.0.2.98")}, nil, []string{a, "192.0.2.99", "192.0.2.98/31", "/1 to /30", "--subnet 192.0.2.0/24 --gateway 192.0.2.98"}},
		"/32":                         {"", []Offer{offer(a, "192.0.2.99", "192.0.2.99/32", "192.0.2.1")}, nil, []string{a, "192.0.2.99/32", "/1 to /30", "--subnet 192.0.2.0/24 --gateway 192.0.2.1"}},
		"the network's address":       {"", []Offer{offer(a, "10.1.2.0", "10.1.2.0/24", "10.1.2.1")}, nil, []string{a, "10.1.2.0", "network or broadcast address", "10.1.2.0/24", "--subnet 10.1.0.0/16 --gateway 10.1.2.1"}},
		"the broadcast address":       {"", []Offer{offer(a, "192.0.2.127", "192.0.2.0/25", "192.0.2.1")}, nil, []string{"192.0.2.127", "network or broadcast address", "192.0.2.0/25", "--subnet 192.0.2.0/24 --gateway 192.0.2.1"}},
		"two, each wrong":             {"", []Offer{offer(a, "192.0.2.99", "", ""), offer(b, "10.0.0.9", "10.0.0.9/32", "")}, nil, []string{a, "192.0.2.99", b, "10.0.0.9/32", "--subnet 192.0.2.0/24"}},
		"another subnet":              {"203.0.113.0/24", []Offer{offer(a, "192.0.2.99", "192.0.2.0/24", "")}, nil, []string{"server " + a + " offers 192.0.2.99 (subnet 192.0.2.0/24), not a host of the subnet 203.0.113.0/24", "--subnet", "probe=off"}},
		"another subnet, no mask":     {"203.0.113.0/24", []Offer{offer(a, "192.0.2.99", "", "")}, nil, []string{"192.0.2.99 (subnet none)", "203.0.113.0/24"}},
		"two of other subnets":        {"203.0.113.0/24", []Offer{offer(a, "192.0.2.99", "", ""), offer(b, "10.0.0.9", "10.0.0.0/8", "")}, nil, []string{a, "192.0.2.99", b, "10.0.0.9", "10.0.0.0/8", "203.0.113.0/24"}},
		"the given network's address": {"192.0.2.0/24", []Offer{offer(a, "192.0.2.0", "192.0.0.0/16", "")}, nil, []string{"192.0.2.0 (subnet 192.0.0.0/16)", "192.0.2.0/24"}},

		"silence":               {"", nil, silence, []string{"learn the network's subnet", "--subnet 192.0.2.0/24 --gateway 192.0.2.1", "asked " + a + " from 192.0.2.2"}},
		"a VLAN that isn't yet": {"", nil, fmt.Errorf("%w: eth0.10", ErrNoVLAN), []string{"eth0.10: spanning tree may block a new VLAN port for up to 50 seconds", "--subnet", "--gateway"}},
		"an interface":          {"", nil, down, []string{down.Error()}},
		"an interface, given":   {"192.0.2.0/24", nil, down, []string{down.Error()}},
	} {
		t.Run(name, func(t *testing.T) {
			var p Pool
			if c.subnet != "" {
				p.Subnet = netip.MustParsePrefix(c.subnet)
			}
			got, err := p.settle(c.offers, c.err)
			if err == nil {
				t.Fatalf("settled as %+v", got)
			}
			for _, part := range c.says {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("no %q in: %v", part, err)
				}
			}
			if c.err != nil && !errors.Is(err, c.err) || strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "invalid") {
				t.Errorf("error: %v", err)
			}
			if errors.Is(c.err, down) && err != c.err {
				t.Errorf("error %v, want it as it is", err)
			}
		})
	}
}

// With a subnet, there is nothing that silence must prevent.
func TestSettleWithoutOffers(t *testing.T) {
	for err, want := range map[error]struct {
		wait    time.Duration
		warning string
	}{
		ErrNoAnswer: {0, "no DHCP server answered"},
		fmt.Errorf("%w: eth0.10 on eth0", ErrNoVLAN): {time.Minute, "not probed"},
	} {
		got, failed := Pool{Subnet: netip.MustParsePrefix("192.0.2.128/25")}.settle(nil, err)
		if failed != nil {
			t.Errorf("%v: %v", err, failed)
			continue
		}
		if got.pool.Gateway.String() != "192.0.2.129" || got.from != "first address of the subnet" || got.pool.FirstWait != want.wait {
			t.Errorf("%v: settled as %+v, gateway from %s", err, got.pool, got.from)
		}
		if len(got.warnings) != 1 || !strings.Contains(got.warnings[0].text, want.warning) || !slices.Contains(got.warnings[0].args, any(err)) {
			t.Errorf("%v: warnings %v", err, got.warnings)
		}
	}
}

// Whatever servers offer: what a network is made of is good for containers.
func TestSettleAnything(t *testing.T) {
	r := random(t)
	some := func(p netip.Prefix) netip.Addr {
		if p.IsValid() && r.IntN(4) > 0 {
			first := p.Addr().As4()
			first[3] += byte(r.IntN(4))
			return netip.AddrFrom4(first)
		}
		return randomAddr(r)
	}
	settled, refused := 0, 0
	for range 20000 {
		var p Pool
		near := netip.PrefixFrom(randomAddr(r), r.IntN(33)).Masked()
		if checkSubnet(near) == nil && r.IntN(2) == 0 {
			p.Subnet = near
		}
		offers := make([]Offer, 1+r.IntN(3))
		for i := range offers {
			o := &offers[i]
			o.Server, o.Address = randomAddr(r), some(near)
			if r.IntN(4) > 0 {
				o.Subnet = netip.PrefixFrom(o.Address, r.IntN(33)).Masked()
			}
			if r.IntN(4) > 0 {
				o.Router = some(near)
			}
		}
		got, err := p.settle(offers, nil)
		if err != nil {
			refused++
			continue
		}
		settled++
		if p.Subnet.IsValid() && got.pool.Subnet != p.Subnet {
			t.Fatalf("%s became %s", p.Subnet, got.pool.Subnet)
		}
		if err := checkSubnet(got.pool.Subnet); err != nil || got.pool.Subnet != got.pool.Subnet.Masked() {
			t.Fatalf("%+v: %v", offers, err)
		}
		if err := got.pool.inSubnet(got.pool.Gateway); err != nil || got.from == "" {
			t.Fatalf("%+v: gateway from %q: %v", offers, got.from, err)
		}
		if !slices.ContainsFunc(offers, func(o Offer) bool { return got.pool.inSubnet(o.Address) == nil }) {
			t.Fatalf("%+v: nobody serves %s", offers, got.pool.Subnet)
		}
	}
	if settled < 1000 || refused < 1000 {
		t.Errorf("%d settled, %d refused", settled, refused)
	}
}
