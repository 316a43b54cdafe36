package e2e

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// A container in several networks has a lease of each, which lives as long as
// it is connected there and runs.
func TestNetworkConnect(t *testing.T) {
	t.Parallel()
	s := newSite(t, lab.Kea, lab.DHCPConfig{})
	s.step("two subnets", connectTwoSubnets)
	if s.tellsNames() {
		s.step("by name", connectByName)
	}
}

func connectTwoSubnets(s *site) {
	a, b := lab.SubnetA(), lab.SubnetB()
	s.network("a", "eth0", a.Prefix.String(), "--ipam-opt", "release_delay=0s")
	s.network("b", "eth1", b.Prefix.String(), "--ipam-opt", "release_delay=0s")
	s.docker("create", "--name", "c1", "--network", "a", image)
	s.docker("network", "connect", "b", "c1")
	s.notLeased()
	s.docker("start", "c1")
	inA, inB := s.heldIn("c1", a), s.heldIn("c1", b)
	s.only(inA, inB)
	for _, addr := range []netip.Addr{inA, inB} {
		s.pings(s.net.Client, addr)
	}
	if via := s.router("c1"); via != a.Router.String() && via != b.Router.String() {
		s.Errorf("default route by %s, which is neither network's router", via)
	}

	// What is left is left alone, and leads out.
	s.docker("network", "disconnect", "a", "c1")
	s.only(inB)
	if addr := s.heldIn("c1", b); addr != inB {
		s.Errorf("had %s, and has %s after it was disconnected from the other network", inB, addr)
	}
	if via := s.router("c1"); via != b.Router.String() {
		s.Errorf("default route by %s, the router of the only network is %s", via, b.Router)
	}
	s.pings(s.net.Client, inB)
	s.docker("network", "connect", "a", "c1")
	inA = s.heldIn("c1", a)
	s.only(inA, inB)
	s.pings(s.net.Client, inA)

	s.docker("restart", "c1")
	s.only(s.heldIn("c1", a), s.heldIn("c1", b))
	s.docker("stop", "c1")
	s.notLeased()
	// Nothing of a network that it leaves while it is stopped.
	s.docker("network", "disconnect", "b", "c1")
	s.docker("start", "c1")
	inA = s.heldIn("c1", a)
	s.only(inA)

	// Engines don't put a container into one subnet twice, and find that out
	// when it has the address. It is given back.
	s.docker("network", "rm", "b")
	s.network("again", "eth1", a.Prefix.String(), "--ipam-opt", "release_delay=0s")
	mentions(s.T, s.dockerFails("network", "connect", "again", "c1"), "conflicts with existing route")
	s.only(inA)
	s.pings(s.net.Client, inA)
}

// A name is one identity in each subnet.
//
//	docker's own time  <  RELEASE_DELAY = 30 s  <  T1 = 300 s
func connectByName(s *site) {
	a, b := lab.SubnetA(), lab.SubnetB()
	s.network("a", "eth0", a.Prefix.String())
	s.network("b", "eth1", b.Prefix.String())
	inA := s.run("web", "a")
	s.docker("network", "connect", "b", "web")
	inB := s.heldIn("web", b)
	same := func(after string) {
		s.Helper()
		if nowA, nowB := s.heldIn("web", a), s.heldIn("web", b); nowA != inA || nowB != inB {
			s.Errorf("had %s and %s, and has %s and %s after %s", inA, inB, nowA, nowB, after)
		}
	}
	s.docker("network", "disconnect", "b", "web")
	if state := s.known(inB).State; state != "releasing" {
		s.Errorf("%s is %s after its container was disconnected", inB, state)
	}
	s.docker("network", "connect", "b", "web")
	same("disconnect and connect")
	s.docker("restart", "web")
	same("restart")
	s.docker("rm", "-f", "web")
	s.released()
}

// heldIn is the address that a container has in a subnet, leased from the
// server.
func (s *site) heldIn(container string, subnet lab.Subnet) netip.Addr {
	s.Helper()
	for line := range strings.Lines(s.docker("exec", container, "ip", "-4", "-o", "addr")) {
		fields := strings.Fields(line)
		if len(fields) < 4 {
			continue
		}
		if prefix, err := netip.ParsePrefix(fields[3]); err == nil && subnet.Prefix.Contains(prefix.Addr()) {
			addr, _ := s.holds(container, fields[1])
			return addr
		}
	}
	s.Fatalf("container %s has no address of %s", container, subnet.Prefix)
	return netip.Addr{}
}
