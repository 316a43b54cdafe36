package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// step runs a part of a test on the same site. Whatever containers and
// networks it leaves are removed, and then nothing may be leased any more: so
// each step also tries that what it used is given back.
func (s *site) step(name string, f func(s *site)) {
	s.Helper()
	s.Run(name, func(t *testing.T) {
		inner := s.on(s.dhcp)
		inner.T = t
		t.Cleanup(inner.clear)
		f(inner)
	})
}

// on is the site with another DHCP server to look at.
func (s *site) on(dhcp *lab.DHCPServer) *site {
	other := *s
	other.dhcp = dhcp
	return &other
}

func (s *site) clear() {
	s.Helper()
	if names := strings.Fields(s.docker("ps", "-aq")); len(names) > 0 {
		s.remove(names...)
	}
	if names := strings.Fields(s.docker("network", "ls", "-q", "--filter", "driver=macvlan")); len(names) > 0 {
		s.docker(append([]string{"network", "rm"}, names...)...)
	}
	s.notLeased()
	if left := s.leases(); len(left) != 0 {
		s.Errorf("the daemon still holds %v", left)
	}
}

// remove removes containers. An engine that is itself about to remove one, as
// after a start that failed, refuses that for a moment.
func (s *site) remove(names ...string) {
	s.Helper()
	eventually(s.T, 10*time.Second, func() error {
		_, err := s.engine.Docker(append([]string{"rm", "-f"}, names...)...)
		return err
	})
}

// only waits until the server's table has these addresses and no others.
func (s *site) only(addrs ...netip.Addr) {
	s.Helper()
	slices.SortFunc(addrs, netip.Addr.Compare)
	eventually(s.T, 5*time.Second, func() error {
		leases, err := s.dhcp.Leases()
		if err != nil {
			return err
		}
		var leased []netip.Addr
		for _, lease := range leases {
			leased = append(leased, lease.Addr)
		}
		slices.SortFunc(leased, netip.Addr.Compare)
		if !slices.Equal(leased, addrs) {
			return fmt.Errorf("the server leases %v, want %v", leased, addrs)
		}
		return nil
	})
}

// holds tries that a container has its address from the server, and returns
// its address and MAC.
func (s *site) holds(container, ifname string) (netip.Addr, string) {
	s.Helper()
	// One exec instead of two: nothing here costs more.
	said := strings.Fields(s.docker("exec", container, "sh", "-c", "ip -4 -o addr show dev "+ifname+"; cat /sys/class/net/"+ifname+"/address"))
	if len(said) < 5 || said[2] != "inet" {
		s.Fatalf("container %s has no address on %s: %q", container, ifname, said)
	}
	addr, mac := must(netip.ParsePrefix(said[3]))(s.T).Addr(), said[len(said)-1]
	s.leased(addr, mac)
	return addr, mac
}

// refused runs a container that can't get an address, and returns what docker
// says.
func (s *site) refused(network string, args ...string) string {
	s.Helper()
	said := s.dockerFails(append(append([]string{"run", "-d", "--name", "refused", "--network", network}, args...), image)...)
	// Where it was refused early there is no such container.
	_, _ = s.engine.Docker("rm", "-f", "refused")
	return said
}

// networkRefused tries to create a network with a subnet, and returns what
// docker says.
func (s *site) networkRefused(args ...string) string {
	s.Helper()
	said := s.dockerFails(append(append([]string{
		"network", "create", "-d", "macvlan", "--ipam-driver=talkingdata", "-o", "parent=eth0",
	}, args...), "refused")...)
	if out := s.docker("network", "ls", "-q", "--filter", "name=refused"); out != "" {
		s.Errorf("network of %q was refused and is there: %s", args, out)
	}
	return said
}

// pings tries that a node of the LAN reaches a container. It forgets whose the
// address was: engines before 28 don't announce a new holder.
func (s *site) pings(node *lab.Node, addr netip.Addr) {
	s.Helper()
	must(node.Run("ip", "neighbour", "flush", "to", addr.String()))(s.T)
	if _, err := node.Run("busybox", "ping", "-c", "1", "-W", "5", addr.String()); err != nil {
		s.Fatalf("%v; its neighbours are:\n%s", err, must(node.Run("ip", "neighbour", "show"))(s.T))
	}
}

// reaches tries that a container reaches an address.
func (s *site) reaches(container string, addr netip.Addr) {
	s.Helper()
	s.docker("exec", container, "ping", "-c", "1", "-W", "5", addr.String())
}

// tellsNames says whether the engine tells drivers the names of containers.
func (s *site) tellsNames() bool {
	s.Helper()
	return s.version() >= 29
}

// version is the engine's, 20 for a 20.10.
func (s *site) version() int {
	s.Helper()
	major, _, _ := strings.Cut(s.docker("version", "--format", "{{.Server.Version}}"), ".")
	return must(strconv.Atoi(major))(s.T)
}

// eachServer runs a test against each of the DHCP servers, side by side: much
// of the time goes into waiting for engines.
func eachServer(t *testing.T, test func(t *testing.T, kind lab.DHCPKind)) {
	for _, kind := range lab.DHCPKinds {
		t.Run(kind.Name, func(t *testing.T) {
			t.Parallel()
			test(t, kind)
		})
	}
}
