package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// squatter is a machine of the LAN that takes addresses without asking.
type squatter struct {
	*site
	node *lab.Node
	mac  string
}

func (s *site) squatter() squatter {
	s.Helper()
	node := must(s.lab.Node("squatter", "10.10.0.5/24"))(s.T)
	q := squatter{site: s, node: node}
	check(s.T, node.Do(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err == nil {
			q.mac = eth0.HardwareAddr.String()
		}
		return err
	}))
	return q
}

func (q squatter) take(addr netip.Addr) {
	q.Helper()
	must(q.node.Run("ip", "address", "add", addr.String()+"/24", "dev", "eth0"))(q.T)
}

// answers tries that an address is reached, and at this MAC.
func (s *site) answers(addr netip.Addr, mac string) {
	s.Helper()
	s.pings(s.net.Client, addr)
	if said := must(s.net.Client.Run("ip", "neighbour", "show", addr.String(), "dev", "eth0"))(s.T); !strings.Contains(said, mac) {
		s.Errorf("%s is answered by %q, want %s", addr, said, mac)
	}
}

// declined waits until the server has put an address aside.
func (s *site) declined(addr netip.Addr, mac string) {
	s.Helper()
	words := map[string][]string{
		"isc": {"DHCPDECLINE of " + addr.String() + " from " + mac, "abandoned"},
		"kea": {"DHCP4_DECLINE_LEASE", addr.String() + " "}, "dnsmasq": {"DHCPDECLINE(eth0) " + addr.String() + " " + mac},
	}[s.dhcp.Kind.Name]
	eventually(s.T, 5*time.Second, func() error {
		for line := range strings.Lines(s.dhcp.Log()) {
			if !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(line, word) }) {
				return nil
			}
		}
		return fmt.Errorf("the server's log has no line with %q", words)
	})
	s.notLeased(addr)
}

const saidConflict = `level=WARN msg="address conflict: declined"`

// An address that a neighbour has is declined, and 10 s later (RFC 2131
// section 3.1 (5)) another one is taken; without the check it is handed out.
// That the server offers it is brought about by having had it before: the next
// DISCOVER of the same client asks for it.
//
//	200 ms (the probes) + 10 s + 200 ms < the request < DHCP_TIMEOUT = 30 s
func TestConflict(t *testing.T) {
	t.Parallel()
	for _, kind := range lab.DHCPKinds {
		t.Run(kind.Name, func(t *testing.T) {
			t.Parallel()
			s := newHost(t, kind, lab.DHCPConfig{})
			check(t, s.daemon.Start())
			q := s.squatter()
			checked := must(s.requestPool("10.10.0.0/24", map[string]string{"conflict_check": "on", "conflict_interface": "eth0"}))(t)
			unchecked := must(s.requestPool("10.10.0.0/24", map[string]string{"conflict_check": "off", "conflict_interface": "eth0"}))(t)
			had := map[string]netip.Addr{}
			for n, pool := range []string{checked, unchecked} {
				had[pool] = s.acquire(pool, lab.ScatteredMAC(n))
				check(t, s.releaseAddress(pool, had[pool]))
				s.notLeased(had[pool])
				q.take(had[pool])
			}

			if addr := s.acquire(unchecked, lab.ScatteredMAC(1)); addr != had[unchecked] {
				t.Errorf("unchecked: got %s, had %s: the squatter proves nothing", addr, had[unchecked])
			}
			began := time.Now()
			addr := s.acquire(checked, lab.ScatteredMAC(0))
			if took := time.Since(began); took < 10*time.Second || took > 15*time.Second {
				t.Errorf("another address took %v", took)
			}
			if addr == had[checked] || addr == had[unchecked] {
				t.Errorf("checked: got the squatter's %s", addr)
			}
			s.declined(had[checked], lab.ScatteredMAC(0))
			if lines := s.said(saidConflict); len(lines) != 1 {
				t.Errorf("the conflict is told %d times: %q", len(lines), lines)
			} else {
				mentions(t, lines[0], "address="+had[checked].String(), "mac="+lab.ScatteredMAC(0), "used by\"="+q.mac, "interface=eth0", "server="+firstServer)
			}
			s.all(time.Second, "bound", addr, had[unchecked])
			s.only(addr, had[unchecked])
		})
	}
}

// The same with an engine, and what its users read when they have it wrong.
func TestConflictOfContainers(t *testing.T) {
	t.Parallel()
	// Engines from 29 on tell names, for which a release would wait.
	s := newSite(t, lab.Kea, lab.DHCPConfig{}, "--release-delay", "0s")
	check(t, s.net.Host.Attach("eth2"))
	q := s.squatter()
	s.network("checked", "eth0", "10.10.0.0/24", "--ipam-opt", "conflict_check=on", "--ipam-opt", "conflict_interface=eth0")
	s.network("unchecked", "eth1", "10.10.0.0/24")
	s.network("typo", "eth2", "10.10.0.0/24", "--ipam-opt", "conflict_check=on", "--ipam-opt", "conflict_interface=eht2")
	const mac, uncheckedMAC = "02:42:0a:0a:00:88", "02:42:0a:0a:00:89"
	had := s.run("c1", "checked", "--mac-address", mac)
	hadUnchecked := s.run("c2", "unchecked", "--mac-address", uncheckedMAC)
	s.docker("rm", "-f", "c1", "c2")
	s.notLeased()
	q.take(had)
	q.take(hadUnchecked)

	ended := make(chan error, 1)
	go func() {
		_, err := s.engine.Docker("run", "-d", "--name", "c1", "--network", "checked", "--mac-address", mac, image)
		ended <- err
	}()
	// Meanwhile, on other networks.
	if addr := s.run("c2", "unchecked", "--mac-address", uncheckedMAC); addr != hadUnchecked {
		t.Errorf("unchecked: got %s, had %s", addr, hadUnchecked)
	}
	mentions(t, s.refused("typo"), "interface eht2", "no such network interface", "correct conflict_interface", "conflict_check=off")
	mentions(t, s.networkRefused("--subnet", "10.10.0.0/24", "--ipam-opt", "conflict_check=on"),
		"conflict_check needs the network's parent interface", "--ipam-opt conflict_interface=eth0", "CONFLICT_INTERFACE", "--ipam-opt conflict_check=off")
	mentions(t, s.networkRefused("--subnet", "10.10.0.0/24", "--ipam-opt", "conflict_check=sometimes"), "conflict_check", "sometimes", "off, on, rfc")
	check(t, <-ended)
	addr, now := s.holds("c1", "eth0")
	if addr == had {
		t.Errorf("checked: got the squatter's %s", addr)
	}
	s.declined(had, mac)
	s.answers(addr, now)
	s.answers(had, q.mac)

	// One that the user wants and nobody else may have.
	wanted := netip.MustParseAddr("10.10.0.150")
	q.take(wanted)
	began := time.Now()
	mentions(t, s.refused("checked", "--ip", wanted.String()), wanted.String(), "in use by "+q.mac, "eth0")
	if took := time.Since(began); took > 8*time.Second {
		t.Errorf("an address that can't be had took %v", took)
	}
	s.declined(wanted, "")
	s.only(addr, hadUnchecked)
}

// What a check costs: its own time, and on a quiet network nothing more.
//
//	"on" is 200 ms; "rfc" is 2 to 5 s of probes and 2 s of waiting
//	(RFC 5227 section 1.1), both < DHCP_TIMEOUT = 30 s
func TestConflictCheckTime(t *testing.T) {
	t.Parallel()
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	check(t, s.daemon.Start())
	pool := func(check string) string {
		t.Helper()
		return must(s.requestPool("10.10.0.0/24", map[string]string{"conflict_check": check, "conflict_interface": "eth0"}))(t)
	}
	mac := 0
	took := func(pool string, times int) (least time.Duration) {
		t.Helper()
		for range times {
			mac++
			began := time.Now()
			addr := must(s.requestAddress(pool, lab.ScatteredMAC(mac)))(t)
			took := time.Since(began)
			check(t, s.releaseAddress(pool, addr))
			if least == 0 || took < least {
				least = took
			}
		}
		return least
	}
	off, on, second, rfc := took(pool("off"), 5), took(pool("on"), 5), took(pool("1s"), 1), took(pool("rfc"), 1)
	t.Logf("a request takes %v without a check, %v with on, %v with 1s, %v with rfc", off, on, second, rfc)
	for _, c := range []struct {
		name              string
		took, least, most time.Duration
	}{
		{"off", off, 0, 150 * time.Millisecond},
		{"on", on, 200 * time.Millisecond, 500 * time.Millisecond},
		{"1s", second, time.Second, 2 * time.Second},
		{"rfc", rfc, 4 * time.Second, 9 * time.Second},
	} {
		if c.took < c.least || c.took > c.most {
			t.Errorf("conflict_check=%s: a request took %v, want %v to %v", c.name, c.took, c.least, c.most)
		}
	}
}

// An interface that goes, or a daemon that is told of none, is named when a
// container starts.
func TestConflictInterfaceGone(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{}, "--conflict-check", "on", "--conflict-interface", "eth1")
	check(t, s.daemon.Start())
	pool := s.pool()
	addr := s.acquire(pool, lab.ScatteredMAC(1))
	must(s.net.Host.Run("ip", "link", "set", "eth1", "down"))(t)
	refused := func(words ...string) {
		t.Helper()
		_, err := s.requestAddress(pool, lab.ScatteredMAC(2))
		if !errors.Is(err, lab.ErrRefused) {
			t.Fatalf("an address that can't be probed: %v", err)
		}
		mentions(t, err.Error(), words...)
	}
	refused("interface eth1 is down", "bring it up", "conflict_check=off")
	must(s.net.Host.Run("ip", "link", "delete", "eth1"))(t)
	refused("interface eth1", "no such network interface", "conflict_check=off")
	// Neither of them keeps a lease.
	s.only(addr)
}
