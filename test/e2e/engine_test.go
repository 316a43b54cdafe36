package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// However the engine ends, the containers that it starts again hold leases,
// and what they held before is free.
func TestEngineEnds(t *testing.T) {
	s := newSite(t, lab.Kea, lab.DHCPConfig{}, byMAC...)
	s.network("a", "eth0", "10.10.0.0/24")
	s.network("b", "eth1", "10.20.0.0/24")
	s.run("c1", "a", "--restart", "always")
	s.run("c2", "b", "--restart", "always")
	before := s.containersLeased("c1", "c2")
	for _, end := range []struct {
		how string
		act func() error
	}{
		{"stopped", s.engine.Stop},
		{"killed", s.engine.Kill},
		{"host rebooted", func() error {
			// The daemon dies with its host, and comes first at boot.
			return errors.Join(s.engine.PowerOff(), s.daemon.Kill(), s.daemon.Start())
		}},
	} {
		check(t, end.act())
		if end.how == "stopped" {
			s.notLeased()
		}
		check(t, s.engine.Start())
		after := s.containersLeased("c1", "c2")
		for name, mac := range after {
			if mac == before[name] {
				t.Errorf("%s kept its MAC %s after its engine was %s: it never ended", name, mac, end.how)
			}
		}
		before = after
	}
	s.docker("rm", "-f", "c1", "c2")
	s.notLeased()
}

// containersLeased waits until the server's table holds the leases of these
// containers, as `ip` inside them has them, and no others; and until the
// daemon's list says the same. It returns their MACs.
func (s *site) containersLeased(names ...string) (macs map[string]string) {
	s.Helper()
	eventually(s.T, 20*time.Second, func() error {
		for _, name := range names {
			running, err := s.engine.Docker("inspect", "--format", "{{.State.Running}}", name)
			if err == nil && running != "true" {
				err = errors.New("it doesn't run")
			}
			if err != nil {
				return fmt.Errorf("container %s: %w", name, err)
			}
		}
		return nil
	})
	macs = map[string]string{}
	want := map[netip.Addr]string{}
	for _, name := range names {
		macs[name] = s.mac(name, "eth0")
		want[s.addr(name, "eth0")] = macs[name]
	}
	eventually(s.T, 5*time.Second, func() error {
		table, err := s.dhcp.Leases()
		if err != nil {
			return err
		}
		leased := map[netip.Addr]string{}
		for _, lease := range table {
			leased[lease.Addr] = lease.MAC
		}
		known := map[netip.Addr]string{}
		for _, lease := range s.leases() {
			known[lease.Address] = lease.MAC
		}
		if got := fmt.Sprint(leased); got != fmt.Sprint(want) {
			return fmt.Errorf("the server's table has %s, the containers %v", got, want)
		}
		if got := fmt.Sprint(known); got != fmt.Sprint(want) {
			return fmt.Errorf("the daemon has %s, the containers %v", got, want)
		}
		return nil
	})
	return macs
}
