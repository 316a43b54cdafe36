package main

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/talkingdata/oam-docker-ipam/dhcp"
	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Where a discovery asks: typed servers and a typed interface beat what is
// configured, wherever they stand, and exclude each other.
func TestDiscoverOptions(t *testing.T) {
	const servers, iface = "DHCP_SERVER=192.0.2.1", "DHCP_INTERFACE=eth0"
	for _, c := range []struct {
		name         string
		file, env    string
		flags, after []string // before and after the command
		servers      string
		iface        string
		refused      bool
	}{
		{name: "nothing"},
		{name: "configured servers", file: servers, servers: "192.0.2.1"},
		{name: "configured interface", file: iface, iface: "eth0"},
		{name: "both configured", file: servers + "\n" + iface, refused: true},
		{name: "one in the file, one in the environment", file: servers, env: iface, refused: true},
		{name: "other servers", file: servers, after: []string{"--dhcp-server", "192.0.2.2"}, servers: "192.0.2.2"},
		{name: "other servers, before", env: servers, flags: []string{"--dhcp-server", "192.0.2.2"}, servers: "192.0.2.2"},
		{name: "servers, not the interface", file: iface, after: []string{"--dhcp-server=192.0.2.2"}, servers: "192.0.2.2"},
		{name: "servers, not the interface, before", env: iface, flags: []string{"--dhcp-server=192.0.2.2"}, servers: "192.0.2.2"},
		{name: "the interface, not the servers", file: servers, after: []string{"--interface", "eth1"}, iface: "eth1"},
		{name: "the interface, not the servers, before", env: servers, flags: []string{"--interface", "eth1"}, iface: "eth1"},
		{name: "by its long name", env: servers, after: []string{"--dhcp-interface", "eth1"}, iface: "eth1"},
		{name: "one of both configured", file: servers + "\n" + iface, after: []string{"--interface", "eth0"}, iface: "eth0"},
		{name: "both typed", after: []string{"--dhcp-server", "192.0.2.2", "--interface", "eth1"}, refused: true},
		{name: "both typed, around the command", file: servers, flags: []string{"--interface", "eth1"}, after: []string{"--dhcp-server", "192.0.2.2"}, refused: true},
		{name: "both typed as they are configured", file: servers, flags: []string{"--interface", "eth1"}, after: []string{"--dhcp-server", "192.0.2.1"}, refused: true},
		{name: "the typed one is empty", file: servers + "\n" + iface, after: []string{"--dhcp-server="}},
	} {
		t.Run(c.name, func(t *testing.T) {
			cleanEnv(t)
			if key, value, ok := strings.Cut(c.env, "="); ok {
				t.Setenv(key, value)
			}
			var got lease.Options
			root := commandLine()
			root.Command("discover").Action = func(_ context.Context, cmd *cli.Command) (err error) {
				got, err = discoverOptions(cmd)
				return err
			}
			args := slices.Concat([]string{"oam-docker-ipam", "--config", configFile(t, c.file)}, c.flags, []string{"discover"}, c.after)
			err := root.Run(t.Context(), args)
			if c.refused {
				if err == nil || !strings.Contains(err.Error(), "DHCP_SERVER=192.0.2.") || !strings.Contains(err.Error(), "DHCP_INTERFACE=eth") {
					t.Errorf("error %v, options %+v", err, got)
				}
				return
			}
			texts := got.Texts()
			if err != nil || texts["dhcp_server"] != c.servers || texts["dhcp_interface"] != c.iface {
				t.Errorf("asks %q, error %v", texts, err)
			}
		})
	}
}

// One offer with everything and one with the least that a server says.
func someOffers() []lease.Offer {
	addr := netip.MustParseAddr
	return []lease.Offer{
		{
			Server: addr("192.0.2.1"), From: addr("192.0.2.254"), Address: addr("192.0.2.101"), Subnet: netip.MustParsePrefix("192.0.2.0/24"),
			Router: addr("192.0.2.1"), DNS: []netip.Addr{addr("192.0.2.53"), addr("198.51.100.53")},
			Length: 15 * time.Second, T1: 7500 * time.Millisecond, T2: 13 * time.Second, After: 1234567 * time.Nanosecond,
		},
		{
			Server: addr("192.0.2.3"), From: addr("192.0.2.3"), Address: addr("192.0.2.99"),
			Length: lease.LeaseForEver, T1: lease.LeaseForEver, T2: lease.LeaseForEver, After: 3001 * time.Millisecond,
		},
	}
}

func TestPrintOffers(t *testing.T) {
	var got bytes.Buffer
	if err := printOffers(&got, someOffers()); err != nil {
		t.Fatal(err)
	}
	want := `SERVER     OFFERED      SUBNET        ROUTER     DNS                       LEASE     T1    T2   AFTER
192.0.2.1  192.0.2.101  192.0.2.0/24  192.0.2.1  192.0.2.53,198.51.100.53  15s       7.5s  13s  1.2ms
192.0.2.3  192.0.2.99   -             -          -                         for ever  -     -    3.001s
`
	if got.String() != want {
		t.Errorf("table\n%swant\n%s", got.String(), want)
	}
	got.Reset()
	if err := printJSON(&got, describe(someOffers())); err != nil {
		t.Fatal(err)
	}
	want = `[
  {
    "server": "192.0.2.1",
    "from": "192.0.2.254",
    "address": "192.0.2.101",
    "subnet": "192.0.2.0/24",
    "router": "192.0.2.1",
    "dns": [
      "192.0.2.53",
      "198.51.100.53"
    ],
    "lease_seconds": 15,
    "t1_seconds": 7.5,
    "t2_seconds": 13,
    "after_ms": 1.2
  },
  {
    "server": "192.0.2.3",
    "from": "192.0.2.3",
    "address": "192.0.2.99",
    "subnet": null,
    "router": null,
    "dns": [],
    "lease_seconds": null,
    "t1_seconds": null,
    "t2_seconds": null,
    "after_ms": 3001
  }
]
`
	if got.String() != want {
		t.Errorf("JSON\n%swant\n%s", got.String(), want)
	}
	got.Reset()
	if err := printJSON(&got, describe(nil)); err != nil || got.String() != "[]\n" {
		t.Errorf("no offers: %q, %v", got.String(), err)
	}
}

func TestRemarks(t *testing.T) {
	offer := func(server, address, subnet, router string) lease.Offer {
		o := lease.Offer{Server: netip.MustParseAddr(server), Address: netip.MustParseAddr(address)}
		if subnet != "" {
			o.Subnet = netip.MustParsePrefix(subnet)
		}
		if router != "" {
			o.Router = netip.MustParseAddr(router)
		}
		return o
	}
	one := offer("192.0.2.1", "192.0.2.101", "192.0.2.0/24", "192.0.2.1")
	for _, c := range []struct {
		name   string
		wanted string
		offers []lease.Offer
		want   []string
	}{
		{"nothing", "192.0.2.0/24", nil, nil},
		{"one, none wanted", "", []lease.Offer{one}, nil},
		{"the wanted one", "192.0.2.0/24", []lease.Offer{one}, nil},
		{"another", "198.51.100.0/24", []lease.Offer{one}, []string{"DHCP server 192.0.2.1 offers 192.0.2.101/24, which is not of the subnet 198.51.100.0/24 that was asked for"}},
		{"another mask", "192.0.2.0/25", []lease.Offer{one}, []string{"DHCP server 192.0.2.1 offers 192.0.2.101/24, which is not of the subnet 192.0.2.0/25 that was asked for"}},
		{"no mask", "192.0.2.0/24", []lease.Offer{offer("192.0.2.1", "192.0.2.101", "", "")}, nil},
		{"no mask, another", "198.51.100.0/24", []lease.Offer{offer("192.0.2.1", "192.0.2.101", "", "")}, []string{"DHCP server 192.0.2.1 offers 192.0.2.101, which is not of the subnet 198.51.100.0/24 that was asked for"}},
		{"two agree", "", []lease.Offer{one, offer("192.0.2.3", "192.0.2.201", "192.0.2.0/24", "192.0.2.1")}, nil},
		{"other router", "", []lease.Offer{one, offer("192.0.2.3", "192.0.2.201", "192.0.2.0/24", "192.0.2.254")}, []string{
			"several DHCP servers answer differently: server 192.0.2.1 offers 192.0.2.101, subnet 192.0.2.0/24, router 192.0.2.1; server 192.0.2.3 offers 192.0.2.201, subnet 192.0.2.0/24, router 192.0.2.254",
		}},
		{"other subnet", "192.0.2.0/24", []lease.Offer{one, offer("192.0.2.3", "198.51.100.9", "198.51.100.0/24", "")}, []string{
			"DHCP server 192.0.2.3 offers 198.51.100.9/24, which is not of the subnet 192.0.2.0/24 that was asked for",
			"several DHCP servers answer differently: server 192.0.2.1 offers 192.0.2.101, subnet 192.0.2.0/24, router 192.0.2.1; server 192.0.2.3 offers 198.51.100.9, subnet 198.51.100.0/24, router none",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var wanted netip.Prefix
			if c.wanted != "" {
				wanted = netip.MustParsePrefix(c.wanted)
			}
			if got := remarks(c.offers, wanted); !slices.Equal(got, c.want) {
				t.Errorf("remarks\n%q, want\n%q", got, c.want)
			}
		})
	}
}

// What to look at comes in the order of its likelihood, by its real names.
func TestAdvise(t *testing.T) {
	port := netip.MustParseAddrPort
	relay := dhcp.Asked{Server: port("198.51.100.1:67"), Relay: port("192.0.2.9:67")}
	second := dhcp.Asked{Server: port("198.51.100.3:1067"), Relay: port("192.0.2.9:67")}
	otherPort := dhcp.Asked{Server: port("198.51.100.1:67"), Relay: port("192.0.2.9:6767")}
	for _, c := range []struct {
		name   string
		asked  []dhcp.Asked
		subnet string
		want   []string // in this order
	}{
		{"relay", []dhcp.Asked{relay}, "", []string{
			"asked 198.51.100.1 from relay address 192.0.2.9", "1. the server's route back to 192.0.2.9", "2. firewalls: UDP port 67, both ways between 192.0.2.9 and 198.51.100.1",
			"3. the server's subnets: it chooses the one that 192.0.2.9 is in", "--subnet", "4. UDP port 67 of 192.0.2.9 on this host: who has it", "5. the server itself: does it run, and listen at UDP 198.51.100.1:67?", "6. known clients only: --mac",
		}},
		{"several servers", []dhcp.Asked{relay, second}, "", []string{
			"asked 198.51.100.1 from relay address 192.0.2.9, 198.51.100.3 from", "route back to 192.0.2.9:", "between 192.0.2.9 and 198.51.100.1, 198.51.100.3\n", "listen at UDP 198.51.100.1:67, 198.51.100.3:1067?",
		}},
		{"subnet of the relay address", []dhcp.Asked{relay}, "192.0.2.0/24", []string{"3. the server's subnets: does it serve 192.0.2.0/24, with free addresses?\n"}},
		{"subnet elsewhere", []dhcp.Asked{relay}, "203.0.113.0/24", []string{"3. the server's subnets: does it serve 203.0.113.0/24", "relay address 192.0.2.9", "outside", "link selection"}},
		{"another port", []dhcp.Asked{otherPort}, "", []string{"relay address 192.0.2.9:6767", "1. LISTEN_PORT=6767", "RFC 8357", "2. the server's route back", "3. firewalls: UDP port 6767"}},
		{"broadcast", []dhcp.Asked{{Interface: "eth7"}}, "192.0.2.0/24", []string{
			"asked by broadcast on interface eth7", "1. the interface: is eth7 in the LAN, and the VLAN", "2. the link of eth7", "3. the switch behind eth7: DHCP snooping",
			"4. firewalls: UDP ports 67 and 68", "5. the LAN of eth7: is there a DHCP server or a relay agent", "6. known clients only: --mac",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			silence := &dhcp.Silence{Asked: c.asked, Within: 8 * time.Second}
			if c.subnet != "" {
				silence.Subnet = netip.MustParsePrefix(c.subnet)
			}
			got := advise(silence)
			rest := got
			for _, part := range slices.Insert(c.want, 0, "no DHCP server answered within 8s") {
				_, after, found := strings.Cut(rest, part)
				if !found {
					t.Fatalf("advice\n%s\nlacks %q, or has it too early", got, part)
				}
				rest = after
			}
		})
	}
	failed := &dhcp.Silence{Asked: []dhcp.Asked{relay}, Failed: errors.New("network is down")}
	if got := advise(failed); !strings.Contains(got, "network is down") {
		t.Errorf("advice without what failed:\n%s", got)
	}
}
