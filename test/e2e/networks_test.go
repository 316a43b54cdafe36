package e2e

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// TestNetworks has a router of subnet A that isn't its first address, and a
// subnet C without one: what the server says can be told from what we assume.
func TestNetworks(t *testing.T) {
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		a := lab.NewSubnet("10.10.0.0/24", "10.10.0.100", "10.10.0.199", "10.10.0.4")
		c := lab.NewSubnet("10.30.0.0/24", "10.30.0.100", "10.30.0.199", "")
		s := newSite(t, kind, lab.DHCPConfig{Subnets: []lab.Subnet{a, lab.SubnetB(), c}}, byMAC...)
		silent := s.poolOfUnknownSubnet()
		s.step("as the old daemon's users write it", networkOfOldUsers)
		s.step("gateway of the server", networkGateway)
		s.step("server without a router", networkWithoutRouter)
		s.step("another subnet than the relay's", networkElsewhere)
		s.step("two of one subnet", networksOfOneSubnet)
		s.step("wrong subnet", networkWrong)
		s.step("removed with containers left", networkRemoved)
		s.step("names", networkNames)
		s.step("lost database", networkLost)
		s.step("subnet that the server doesn't know", silent)
	})
}

func networkOfOldUsers(s *site) {
	s.network("a", "eth0", "10.10.0.0/24", "--gateway", "10.10.0.1", "--aux-address", "DefaultGatewayIPv4=10.10.0.1")
	s.run("c1", "a")
	addr, _ := s.holds("c1", "eth0")
	if prefix := s.prefix("c1", "eth0"); prefix.Bits() != 24 {
		s.Errorf("the container has %s", prefix)
	}
	// The server says another; the user's word counts.
	if router := s.router("c1"); router != "10.10.0.1" {
		s.Errorf("default route by %s, --gateway is 10.10.0.1", router)
	}
	s.pings(s.net.Client, addr)
	// What all of this is about.
	if open := must(s.net.Host.UDPOpen(68))(s.T); open {
		s.Error("somebody holds UDP port 68 of the host")
	}
	s.docker("rm", "-f", "c1")
	s.notLeased()
	s.docker("network", "rm", "a")
}

func networkGateway(s *site) {
	s.network("a", "eth0", "10.10.0.0/24")
	s.network("b", "eth1", "10.20.0.0/24")
	s.run("c1", "a")
	s.run("c2", "b")
	for container, want := range map[string]string{"c1": "10.10.0.4", "c2": "10.20.0.1"} {
		s.holds(container, "eth0")
		if router := s.router(container); router != want {
			s.Errorf("%s has a default route by %s, the server's router is %s", container, router, want)
		}
	}
	// Both routers are the client node.
	check(s.T, s.net.Client.Sysctl("net/ipv4/ip_forward", "1"))
	s.reaches("c1", s.addr("c2", "eth0"))
	mentions(s.T, s.refused("a", "--ip", "10.10.0.4"), "10.10.0.4 is the gateway")
}

func networkWithoutRouter(s *site) {
	s.network("c", "eth0", "10.30.0.0/24")
	addr := s.run("c1", "c")
	s.holds("c1", "eth0")
	if router := s.router("c1"); router != "10.30.0.1" {
		s.Errorf("default route by %s, the subnet's first address is 10.30.0.1", router)
	}
	s.only(addr)
}

// A server chooses the subnet by giaddr, unless link selection names another:
// in every message, or it doesn't find the lease that is to be released.
func networkElsewhere(s *site) {
	s.network("b", "eth0", "10.20.0.0/24")
	// First, before the other happens to get this one.
	second := s.run("c2", "b", "--ip", "10.20.0.150")
	first := s.run("c1", "b")
	s.holds("c1", "eth0")
	if addr, _ := s.holds("c2", "eth0"); addr != netip.MustParseAddr("10.20.0.150") {
		s.Errorf("asked for 10.20.0.150, got %s", addr)
	}
	s.only(first, second)
	s.pings(s.net.Client, first)
	s.reaches("c2", first)
	s.docker("stop", "c1")
	s.only(second)
	s.docker("start", "c1")
	s.holds("c1", "eth0")
	s.docker("rm", "-f", "c2")
	s.only(s.addr("c1", "eth0"))
}

// The engine tells networks apart by what we call their pools.
func networksOfOneSubnet(s *site) {
	s.network("a", "eth0", "10.10.0.0/24")
	s.network("other", "eth1", "10.10.0.0/24")
	first := s.run("c1", "a")
	second := s.run("c2", "other")
	s.only(first, second)
	s.docker("rm", "-f", "c2")
	s.docker("network", "rm", "other")
	s.only(first)
	s.docker("restart", "c1")
	first, _ = s.holds("c1", "eth0")
	s.only(first)
}

// The relay address is within this subnet, so the server chooses its own.
func networkWrong(s *site) {
	mentions(s.T, s.networkRefused("--subnet", "10.10.0.0/26"),
		"DHCP server 10.10.0.1 offers 10.10.0.1", "not a host of the subnet 10.10.0.0/26")
	s.notLeased()
}

func networkRemoved(s *site) {
	s.network("a", "eth0", "10.10.0.0/24")
	s.network("b", "eth1", "10.20.0.0/24")
	kept := s.run("c1", "a")
	first := s.run("c2", "b")
	second := s.run("c3", "b")
	s.only(kept, first, second)
	// The engine itself doesn't let go of such a network.
	s.releasePool(s.known(first).PoolID)
	s.only(kept)
	// It says again what is done already.
	s.docker("rm", "-f", "c2", "c3")
	s.docker("network", "rm", "b")
	s.only(kept)
}

func networkNames(s *site) {
	const mac = "02:42:0a:14:00:12"
	pool := must(s.requestPool("10.20.0.0/24", nil))(s.T)
	var granted struct{ Address netip.Prefix }
	check(s.T, s.call(s.Context(), "RequestAddress", map[string]any{"PoolID": pool, "Options": map[string]string{
		"com.docker.network.endpoint.macaddress": mac,
		"com.docker.network.endpoint.name":       "My_shop.web-1",
	}}, &granted))
	addr := granted.Address.Addr()
	row := s.leased(addr, mac)
	if !strings.EqualFold(row.Hostname, "My-shop-web-1") {
		s.Errorf("host name %q in the server's table", row.Hostname)
	}
	if name := s.known(addr).Name; name != "My_shop.web-1" {
		s.Errorf("the daemon calls it %q", name)
	}
	check(s.T, s.releaseAddress(pool, addr))
	s.notLeased()
	s.releasePool(pool)

	if s.tellsNames() {
		s.network("a", "eth0", "10.10.0.0/24")
		s.run("shop_web.2", "a")
		row := s.leased(s.addr("shop_web.2", "eth0"), s.mac("shop_web.2", "eth0"))
		if row.Hostname != "shop-web-2" {
			s.Errorf("host name %q in the server's table", row.Hostname)
		}
	}
}

// The engine goes on with the pool IDs that it has.
func networkLost(s *site) {
	const mac = "02:42:0a:0a:00:55"
	s.network("a", "eth0", "10.10.0.0/24")
	s.network("low", "eth1", "10.10.0.0/24", "--ip-range", "10.10.0.0/26")
	old := s.run("c1", "a", "--mac-address", mac)
	check(s.T, s.daemon.Stop())
	check(s.T, os.RemoveAll(s.daemon.DataDir))
	check(s.T, s.daemon.Start())

	s.run("c2", "a")
	addr, _ := s.holds("c2", "eth0")
	if router := s.router("c2"); router != "10.10.0.4" {
		s.Errorf("default route by %s", router)
	}
	mentions(s.T, s.refused("a", "--ip", "10.10.0.4"), "10.10.0.4 is the gateway")
	mentions(s.T, s.refused("low"), "outside the network's --ip-range 10.10.0.0/26")
	// To the server the old container is a client that asks again.
	s.docker("restart", "c1")
	if again, _ := s.holds("c1", "eth0"); again != old {
		s.Errorf("had %s, has %s after a restart", old, again)
	}
	s.only(old, addr)

	// What was taken up is there to stay.
	check(s.T, s.daemon.Restart())
	if known := s.known(addr); known.Subnet != lab.SubnetA().Prefix {
		s.Errorf("lease of subnet %s", known.Subnet)
	}
	s.docker("rm", "-f", "c1", "c2")
	s.notLeased()
	s.docker("network", "rm", "a", "low")
}

// poolOfUnknownSubnet asks for a pool that its server is silent about, and
// returns the step that looks at the answer: the probe takes eight seconds.
func (s *site) poolOfUnknownSubnet() func(*site) {
	var pool struct {
		PoolID string
		Data   map[string]string
	}
	answered := make(chan error, 1)
	go func() {
		answered <- s.call(s.Context(), "RequestPool", map[string]any{"Pool": "10.99.0.0/24"}, &pool)
	}()
	return func(s *site) {
		check(s.T, <-answered)
		if gateway := pool.Data["com.docker.network.gateway"]; gateway != "10.99.0.1/24" {
			s.Errorf("gateway %q, the subnet's first address is 10.99.0.1", gateway)
		}
		mentions(s.T, s.daemon.Log(), "no DHCP server answered the probe", "gateway=10.99.0.1")
		s.releasePool(pool.PoolID)
	}
}

// releasePool is `docker network rm`.
func (s *site) releasePool(id string) {
	s.Helper()
	check(s.T, s.call(s.Context(), "ReleasePool", map[string]any{"PoolID": id}, &struct{}{}))
}

// What no server is asked about.
func TestNetworksRefused(t *testing.T) {
	s := newSite(t, lab.Kea, lab.DHCPConfig{}, byMAC...)
	a := []string{"--subnet", "10.10.0.0/24"}
	for _, test := range []struct {
		args []string
		says []string
	}{
		{append(a, "--ipam-opt", "lease_time=5"), []string{`unknown option "lease_time"`, "dhcp_server, ether_source"}},
		{append(a, "--ipam-opt", "dhcp_server=10.10.0.300"), []string{`"10.10.0.300"`, "neither an IPv4 address nor a host name"}},
		{append(a, "--ipam-opt", "dhcp_server=10.10.0.2"), []string{"10.10.0.2 is the relay address itself", "listen_addr"}},
		{append(a, "--ipam-opt", "listen_addr=here"), []string{`listen_addr="here"`, "IPv4 address of this host"}},
		{append(a, "--ipam-opt", "listen_addr=10.10.0.77"), []string{"10.10.0.77 is not an address of this host", "it has 10.10.0.2"}},
		// Engines from 29 on say it themselves.
		{append(a, "--ip-range", "10.10.0.0/16"), []string{"10.10.0.0/16", "10.10.0.0/24"}},
		{append(a, "--ipv6", "--subnet", "fd00:10::/64"), []string{"IPv6 subnet fd00:10::/64", "IPv4 only"}},
		{[]string{"--subnet", "10.10.0.0/31"}, []string{"10.10.0.0/31", "/1 to /30"}},
		{[]string{"--subnet", "10.10.0.9/32"}, []string{"10.10.0.9/32", "/1 to /30"}},
		{[]string{"--subnet", "0.0.0.0/0"}, []string{"0.0.0.0/0", "/1 to /30"}},
	} {
		mentions(t, s.networkRefused(test.args...), test.says...)
	}
	s.notLeased()
	// Nothing of them is in the way.
	s.network("a", "eth0", "10.10.0.0/24")
	s.run("c1", "a")
	s.holds("c1", "eth0")
}
