package e2e

import (
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

const (
	firstServer  = "10.10.0.1"
	secondServer = "10.10.0.3"
	nobody       = "10.10.0.99"
)

// TestSeveralServers has each kind of server as the first, with one of another
// kind beside it that serves the same subnets from ranges of its own.
func TestSeveralServers(t *testing.T) {
	for i, kind := range lab.DHCPKinds {
		other := lab.DHCPKinds[(i+1)%len(lab.DHCPKinds)]
		t.Run(kind.Name+" and "+other.Name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, kind, lab.DHCPConfig{}, byMAC...)
			second := s.on(must(s.net.Second.StartDHCP(other, lab.DHCPConfig{Subnets: []lab.Subnet{
				lab.NewSubnet("10.10.0.0/24", "10.10.0.200", "10.10.0.219", "10.10.0.1"),
				lab.NewSubnet("10.20.0.0/24", "10.20.0.200", "10.20.0.219", "10.20.0.1"),
			}}))(t))
			step := func(name string, f func(first, second *site)) {
				s.step(name, func(s *site) {
					inner := s.on(second.dhcp)
					f(s, inner)
					s.remove("c1", "c2")
					inner.notLeased()
				})
			}
			step("a network's own", serverOfANetwork)
			step("both answer", serversBoth)
			step("one is down", serversOneDown)
			step("nobody is there", serversNobody)
		})
	}
}

// servers restarts the daemon with other servers, until the step ends.
func (s *site) servers(list ...string) {
	s.Helper()
	before := s.daemon.Flags
	s.Cleanup(func() {
		s.daemon.Flags = before
		check(s.T, s.daemon.Restart())
	})
	s.daemon.Flags = append([]string{"--debug", "--dhcp-server", strings.Join(list, ",")}, byMAC...)
	check(s.T, s.daemon.Restart())
}

func serverOfANetwork(first, second *site) {
	first.network("own", "eth0", "10.10.0.0/24", "--ipam-opt", "dhcp_server="+secondServer)
	first.network("global", "eth1", "10.20.0.0/24")
	own := first.run("c1", "own")
	global := first.run("c2", "global")
	second.holds("c1", "eth0")
	first.holds("c2", "eth0")
	first.only(global)
	second.only(own)
	for addr, want := range map[netip.Addr]string{own: secondServer, global: firstServer} {
		if server := first.known(addr).Server.String(); server != want {
			first.Errorf("the daemon has %s from %s", addr, server)
		}
	}
	first.docker("restart", "c1")
	own, _ = second.holds("c1", "eth0")
	first.only(global)
	second.only(own)
}

// Whoever is chosen, the other must not think that it was.
func serversBoth(first, second *site) {
	first.servers(firstServer, secondServer)
	first.network("a", "eth0", "10.10.0.0/24")
	first.network("b", "eth1", "10.20.0.0/24")
	sites := []*site{first, second}
	requests := []func() int{first.count(first.net.Server, request), first.count(first.net.Second, request)}
	var chosen [2][]netip.Addr
	for name, network := range map[string]string{"c1": "a", "c2": "b"} {
		before := []int{requests[0](), requests[1]()}
		addr := first.run(name, network)
		by := 0
		if addr.As4()[3] >= 200 {
			by = 1
		}
		sites[by].holds(name, "eth0")
		chosen[by] = append(chosen[by], addr)
		if server, want := first.known(addr).Server.String(), []string{firstServer, secondServer}[by]; server != want {
			first.Errorf("the daemon has %s from %s, want %s", addr, server, want)
		}
		if requests[1-by]() > before[1-by] {
			first.Errorf("a REQUEST went to the server that wasn't chosen")
		}
	}
	first.only(chosen[0]...)
	second.only(chosen[1]...)
}

func serversOneDown(first, second *site) {
	first.servers(firstServer, secondServer)
	first.network("a", "eth0", "10.10.0.0/24")
	check(first.T, second.dhcp.Stop())
	first.run("c1", "a")
	first.holds("c1", "eth0")
	check(first.T, second.dhcp.Start())
	first.docker("rm", "-f", "c1")
	first.notLeased()

	check(first.T, first.dhcp.Stop())
	addr := first.run("c2", "a")
	second.holds("c2", "eth0")
	check(first.T, first.dhcp.Start())
	first.only()
	second.only(addr)
}

// No machine has the first address: not even an error comes back.
func serversNobody(first, second *site) {
	first.servers(nobody, secondServer)
	first.network("b", "eth0", "10.20.0.0/24")
	first.run("c1", "b")
	second.holds("c1", "eth0")
}

// TestListenAddr looks at from where the host speaks to its servers, and where
// it hears of them.
func TestListenAddr(t *testing.T) {
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		s := newSite(t, kind, lab.DHCPConfig{}, byMAC...)
		const own, another = "10.10.0.2", "10.10.0.22"
		must(s.net.Host.Run("ip", "address", "add", another+"/24", "dev", "eth0"))(t)
		for _, addr := range []string{own, another} {
			// Rules that count.
			must(s.net.Host.Run("iptables", "--wait", "-A", "INPUT", "-d", addr, "-p", "udp", "--dport", "67", "-j", "ACCEPT"))(t)
			must(s.net.Host.Run("iptables", "--wait", "-A", "OUTPUT", "-s", addr, "-p", "udp", "--dport", "67", "-j", "ACCEPT"))(t)
		}
		s.step("of a network", func(s *site) {
			s.network("a", "eth0", "10.10.0.0/24", "--ipam-opt", "listen_addr="+another)
			s.run("c1", "a")
			s.holds("c1", "eth0")
			s.docker("rm", "-f", "c1")
			s.notLeased()
			if in, out := s.packets(own); in+out > 0 {
				s.Errorf("%d packets to %s and %d from it", in, own, out)
			}
			if in, out := s.packets(another); in == 0 || out == 0 {
				s.Errorf("%d packets to %s and %d from it", in, another, out)
			}
			s.network("b", "eth1", "10.20.0.0/24")
			s.run("c2", "b")
			s.holds("c2", "eth0")
			if in, out := s.packets(own); in == 0 || out == 0 {
				s.Errorf("%d packets to %s and %d from it, by which the others go", in, own, out)
			}
		})
		s.step("of all", func(s *site) {
			s.daemon.Flags = append(s.daemon.Flags, "--listen-addr", another)
			check(s.T, s.daemon.Restart())
			inBefore, outBefore := s.packets(own)
			s.network("b", "eth0", "10.20.0.0/24")
			s.run("c1", "b")
			s.holds("c1", "eth0")
			s.docker("rm", "-f", "c1")
			s.notLeased()
			if in, out := s.packets(own); in > inBefore || out > outBefore {
				s.Errorf("%d packets to %s and %d from it", in-inBefore, own, out-outBefore)
			}
		})
	})
}

// packets counts what came to port 67 of an address of the host, and what left
// from it.
func (s *site) packets(addr string) (in, out int) {
	s.Helper()
	for line := range strings.Lines(must(s.net.Host.Run("iptables", "--wait", "-n", "-v", "-x", "-L"))(s.T)) {
		fields := strings.Fields(line)
		switch {
		case len(fields) < 9:
		case fields[8] == addr:
			in = must(strconv.Atoi(fields[0]))(s.T)
		case fields[7] == addr:
			out = must(strconv.Atoi(fields[0]))(s.T)
		}
	}
	return in, out
}
