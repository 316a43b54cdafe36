package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

const (
	reservedMAC = "02:42:0a:0a:00:07"
	reservedIP  = "10.10.0.7"
)

func TestContainers(t *testing.T) {
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		a := lab.SubnetA()
		a.Reservations = []lab.Reservation{{MAC: reservedMAC, Addr: netip.MustParseAddr(reservedIP)}}
		s := newSite(t, kind, lab.DHCPConfig{Subnets: []lab.Subnet{a, lab.SubnetB()}}, byMAC...)
		s.step("run, stop, start, restart, rm", containerLife)
		s.step("ip", containerIP)
		s.step("ip-range", containerRange)
		s.step("mac-address with a reservation", containerReserved)
		s.step("mac-address twice", containerMACTwice)
		s.step("connect and disconnect", containerConnect)
		s.step("neighbours", containerNeighbours)
		s.step("many at once", containersAtOnce)
	})
}

func containerLife(s *site) {
	s.network("a", "eth0", "10.10.0.0/24")
	addr := s.run("c1", "a")
	mac := s.mac("c1", "eth0")
	row := s.leased(addr, mac)
	if want := "01" + strings.ReplaceAll(mac, ":", ""); row.ClientID != want {
		s.Errorf("client identifier %q in the server's table, want %q", row.ClientID, want)
	}
	s.only(addr)

	s.docker("stop", "c1")
	s.notLeased()
	s.docker("start", "c1")
	again, _ := s.holds("c1", "eth0")
	s.only(again)
	s.docker("restart", "c1")
	again, _ = s.holds("c1", "eth0")
	s.only(again)
	s.docker("kill", "c1")
	s.notLeased()
	s.docker("start", "c1")
	s.holds("c1", "eth0")
	s.docker("rm", "-f", "c1")
	s.notLeased()
}

func containerIP(s *site) {
	ip := netip.MustParseAddr
	s.network("a", "eth0", "10.10.0.0/24", "--gateway", "10.10.0.1", "--aux-address", "printer=10.10.0.170", "--ip-range", "10.10.0.128/25")
	free := ip("10.10.0.150")
	if addr := s.run("c1", "a", "--ip", free.String()); addr != free {
		s.Errorf("asked for %s, got %s", free, addr)
	}
	_, mac := s.holds("c1", "eth0")
	// It is the user's word against the user's.
	beyond := ip("10.10.0.120")
	if addr := s.run("c2", "a", "--ip", beyond.String()); addr != beyond {
		s.Errorf("asked for %s outside of --ip-range, got %s", beyond, addr)
	}
	s.holds("c2", "eth0")

	// The second network's server sees another client of its own.
	s.network("other", "eth1", "10.10.0.0/24")
	for _, test := range []struct {
		network, ip string
		says        []string
	}{
		{"a", "10.10.0.150", []string{"10.10.0.150 is leased to", mac, "oam-docker-ipam release 10.10.0.150"}},
		{"other", "10.10.0.150", []string{"asked for 10.10.0.150", "offers 10.10.0.1"}},
		{"a", "10.10.0.50", []string{"asked for 10.10.0.50", "offers 10.10.0.1", "range"}},
		{"a", "10.10.0.1", []string{"10.10.0.1 is the gateway", "10.10.0.0/24"}},
		{"a", "10.10.0.170", []string{"10.10.0.170 is an auxiliary address", "10.10.0.0/24"}},
		{"a", "10.10.0.255", []string{"10.10.0.255", "broadcast", "10.10.0.0/24"}},
		{"a", "10.99.0.7", []string{"10.99.0.7"}}, // the engine's own words
	} {
		mentions(s.T, s.refused(test.network, "--ip", test.ip), test.says...)
	}
	s.only(free, beyond)

	s.docker("restart", "c1")
	if addr, _ := s.holds("c1", "eth0"); addr != free {
		s.Errorf("asked for %s, got %s after a restart", free, addr)
	}
	s.only(free, beyond)
}

func containerRange(s *site) {
	s.network("low", "eth0", "10.10.0.0/24", "--ip-range", "10.10.0.0/26")
	said := s.refused("low")
	mentions(s.T, said, "address 10.10.0.1", "outside the network's --ip-range 10.10.0.0/26", "DHCP server's range")
	s.notLeased()
	// Engines may pass on a range that is the whole subnet.
	s.network("all", "eth1", "10.10.0.0/24", "--ip-range", "10.10.0.0/24")
	s.run("c1", "all")
	s.holds("c1", "eth0")
}

func containerReserved(s *site) {
	s.network("a", "eth0", "10.10.0.0/24")
	s.docker("run", "-d", "--name", "c1", "--network", "a", "--mac-address", reservedMAC, image)
	for range 2 {
		if addr := s.addr("c1", "eth0"); addr.String() != reservedIP {
			s.Errorf("got %s, reserved is %s", addr, reservedIP)
		}
		s.reservedFor(reservedMAC, true)
		s.docker("restart", "c1")
	}
	s.docker("stop", "c1")
	s.reservedFor(reservedMAC, false)
	s.docker("start", "c1")
	if addr := s.addr("c1", "eth0"); addr.String() != reservedIP {
		s.Errorf("got %s, reserved is %s", addr, reservedIP)
	}
	s.docker("rm", "-f", "c1")
	s.reservedFor(reservedMAC, false)
}

// reservedFor waits until the server leases the reserved address to its MAC,
// or doesn't any more. ISC dhcpd has no row of reserved addresses: its last
// word about it stands in its log.
func (s *site) reservedFor(mac string, leased bool) {
	s.Helper()
	eventually(s.T, 5*time.Second, func() error {
		row, found, err := s.dhcp.Lease(netip.MustParseAddr(reservedIP))
		if s.dhcp.Kind.Name == lab.ISC.Name {
			log := s.dhcp.Log()
			found = strings.LastIndex(log, "DHCPACK on "+reservedIP) > strings.LastIndex(log, "DHCPRELEASE of "+reservedIP)
			row.MAC = mac
		}
		if err == nil && (found != leased || found && row.MAC != mac) {
			err = fmt.Errorf("the server leases the reserved address: %v (%s)", found, row.MAC)
		}
		return err
	})
}

func containerMACTwice(s *site) {
	const mac = "02:42:0a:0a:00:66"
	s.network("a", "eth0", "10.10.0.0/24")
	s.network("other", "eth1", "10.10.0.0/24")
	addr := s.run("c1", "a", "--mac-address", mac)
	s.leased(addr, mac)
	mentions(s.T, s.refused("other", "--mac-address", mac),
		mac, "lives in another network of the subnet 10.10.0.0/24", addr.String(), "oam-docker-ipam release "+addr.String())
	s.only(addr)
	if s.tellsNames() {
		mentions(s.T, s.refused("a", "--mac-address", mac),
			mac, "in use by container c1", addr.String(), "oam-docker-ipam release "+addr.String())
		s.only(addr)
	}
	s.docker("rm", "-f", "c1")
	s.run("c2", "other", "--mac-address", mac)
	s.holds("c2", "eth0")
}

func containerConnect(s *site) {
	s.network("a", "eth0", "10.10.0.0/24")
	s.network("b", "eth1", "10.20.0.0/24")
	inA := s.run("c1", "a")
	s.docker("network", "connect", "b", "c1")
	s.holds("c1", "eth0")
	inB, _ := s.holds("c1", "eth1")
	if !lab.SubnetB().Prefix.Contains(inB) {
		s.Errorf("%s is not of the second network", inB)
	}
	s.only(inA, inB)
	s.pings(s.net.Client, inA)

	s.docker("network", "disconnect", "b", "c1")
	s.only(inA)
	if addr, _ := s.holds("c1", "eth0"); addr != inA {
		s.Errorf("disconnecting one network changed the address in the other from %s to %s", inA, addr)
	}
	s.docker("network", "connect", "--ip", "10.20.0.150", "b", "c1")
	inB = netip.MustParseAddr("10.20.0.150")
	// Older engines count interfaces on.
	ifname := s.interfaceOf("c1", inB)
	s.holds("c1", ifname)
	s.docker("network", "disconnect", "a", "c1")
	s.only(inB)
	s.docker("rm", "-f", "c1")
	s.notLeased()
}

// interfaceOf finds the interface of a container that has an address.
func (s *site) interfaceOf(container string, addr netip.Addr) string {
	s.Helper()
	for line := range strings.Lines(s.docker("exec", container, "ip", "-4", "-o", "addr")) {
		fields := strings.Fields(line)
		if len(fields) > 3 && strings.HasPrefix(fields[3], addr.String()+"/") {
			return fields[1]
		}
	}
	s.Fatalf("container %s doesn't have %s", container, addr)
	return ""
}

func containerNeighbours(s *site) {
	s.network("a", "eth0", "10.10.0.0/24")
	s.network("other", "eth1", "10.10.0.0/24")
	first := s.run("c1", "a")
	second := s.run("c2", "a")
	third := s.run("c3", "other")
	s.reaches("c1", second)
	s.reaches("c2", first)
	// Over the LAN, from one parent to the other.
	s.reaches("c1", third)
	s.reaches("c3", first)
	for _, addr := range []netip.Addr{first, second, third} {
		s.pings(s.net.Client, addr)
	}
}

func containersAtOnce(s *site) {
	s.network("a", "eth0", "10.10.0.0/24")
	s.network("b", "eth1", "10.20.0.0/24")
	const many = 16
	var wg sync.WaitGroup
	var errs [many]error
	for i := range many {
		wg.Go(func() {
			name, network := fmt.Sprintf("c%d", i), "a"
			if i%2 == 1 {
				network = "b"
			}
			_, errs[i] = s.engine.Docker("run", "-d", "--name", name, "--network", network, image)
		})
	}
	wg.Wait()
	holder := map[netip.Addr]string{}
	var addrs []netip.Addr
	for i := range many {
		check(s.T, errs[i])
		name := fmt.Sprintf("c%d", i)
		addr, _ := s.holds(name, "eth0")
		if other, taken := holder[addr]; taken {
			s.Errorf("%s and %s both have %s", other, name, addr)
		}
		holder[addr] = name
		addrs = append(addrs, addr)
	}
	s.only(addrs...)
}
