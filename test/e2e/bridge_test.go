package e2e

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// Docker's own bridge driver puts containers on the LAN where the host's
// interface is a port of a bridge. By itself it assigns the network's gateway
// to the bridge, and the host loses its address and its default route. Both
// ways to keep it from that leave the host as it was, whatever happens. Nor
// does a firewall that forwards only what the engine allows keep the LAN and
// its containers apart.
func TestBridgeNetworks(t *testing.T) {
	t.Parallel()
	theHost, beyond := netip.MustParseAddr("10.10.0.2"), netip.MustParseAddr("10.20.0.1")
	// The client node, and not the subnet's first address.
	const router = "10.10.0.4"
	a := lab.NewSubnet("10.10.0.0/24", "10.10.0.100", "10.10.0.199", router)
	s := newHost(t, lab.Kea, lab.DHCPConfig{Subnets: []lab.Subnet{a}}, byMAC...)
	check(t, s.net.Host.Bridge("br0", "eth0", "10.10.0.2/24"))
	check(t, s.net.Host.Route("default via "+router))
	s.startEngine("talkingdata", "--iptables=true", "--ip-forward=true")
	was := s.bridge()

	for _, way := range []struct {
		name string
		args []string
	}{
		{"inhibit_ipv4", []string{"-o", "com.docker.network.bridge.inhibit_ipv4=true"}},
		{"the bridge's own address", []string{"--gateway", "10.10.0.2", "--aux-address", "DefaultGatewayIPv4=" + router}},
	} {
		s.step(way.name, func(s *site) {
			same := func(after string) {
				s.Helper()
				if is := s.bridge(); is != was {
					s.Fatalf("after %s the host has\n%s\nand had\n%s", after, is, was)
				}
			}
			s.docker(append(append([]string{
				"network", "create", "-d", "bridge", "--ipam-driver=talkingdata", "--subnet", "10.10.0.0/24",
				"-o", "com.docker.network.bridge.name=br0", "-o", "com.docker.network.bridge.enable_ip_masquerade=false",
			}, way.args...), "lan")...)
			same("network create")
			first, second := s.run("c1", "lan", "--restart", "always"), s.run("c2", "lan")
			same("run")
			s.holds("c1", "eth0")
			s.holds("c2", "eth0")
			s.only(first, second)
			if via := s.router("c1"); via != router {
				s.Errorf("default route by %s, the router is %s", via, router)
			}
			s.pings(s.net.Client, first)
			s.reaches("c1", second)
			s.reaches("c1", beyond) // by the router, and back
			// Which no macvlan does.
			s.pings(s.net.Host, first)
			s.reaches("c1", theHost)

			s.docker("stop", "c2")
			s.only(first)
			same("stop")
			check(s.T, s.engine.Restart())
			s.containersLeased("c1")
			same("the engine's restart")
			s.pings(s.net.Client, s.addr("c1", "eth0"))
			s.docker("start", "c2")
			s.containersLeased("c1", "c2")
			s.docker("rm", "-f", "c1", "c2")
			s.notLeased()
			s.docker("network", "rm", "lan")
			same("network rm")
			s.pings(s.net.Client, theHost)
		})
	}
}

// bridge is what may not change of a host whose address is a bridge's: the
// bridge's MAC and address, the routes, and that its interface is a port.
func (s *site) bridge() string {
	s.Helper()
	var all strings.Builder
	for _, what := range []string{"-oneline link show br0", "-oneline link show eth0", "-4 -oneline address show", "-4 route show"} {
		all.WriteString(must(s.net.Host.Run(append([]string{"ip"}, strings.Fields(what)...)...))(s.T))
	}
	return all.String()
}
