package e2e

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// TestRenewals has leases whose T1 comes at once and whose T2 and end don't
// come within the test:
//
//	T1 = 1 s  <  the time that it waits  <  T2 = 60 s  <  the lease = 120 s
//
// Tables tell times in whole seconds, and no two renewals are less than a T1
// apart, so each moves the end that the table shows.
func TestRenewals(t *testing.T) {
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		config := soonRenewed(kind)
		s := newSite(t, kind, config, byMAC...)
		s.network("a", "eth0", "10.10.0.0/24")
		// In the other, renewals are refused or ignored without link selection.
		s.network("b", "eth1", "10.20.0.0/24")
		inA, inB := s.run("c1", "a"), s.run("c2", "b")
		_, macA := s.holds("c1", "eth0")
		_, macB := s.holds("c2", "eth0")
		began := s.docker("inspect", "--format", "{{.State.StartedAt}} {{.State.Pid}}", "c1", "c2")
		obtained := s.known(inA).ObtainedAt
		// A lease that was refused and won anew would look much the same.
		discovers := s.count(s.net.Server, discover)

		for renewals := range 3 {
			a, b := s.leased(inA, macA).Expires, s.leased(inB, macB).Expires
			eventually(t, 15*time.Second, func() error {
				nextA, nextB := s.leased(inA, macA).Expires, s.leased(inB, macB).Expires
				if !nextA.After(a) || !nextB.After(b) {
					return fmt.Errorf("after %d renewals: %s ends at %v and then at %v, %s at %v and then at %v", renewals, inA, a, nextA, inB, b, nextB)
				}
				return nil
			})
		}
		s.only(inA, inB)
		if n := discovers(); n > 0 {
			t.Errorf("%d DISCOVERs in place of renewals", n)
		}
		for container, addr := range map[string]netip.Addr{"c1": inA, "c2": inB} {
			if has := s.addr(container, "eth0"); has != addr {
				t.Errorf("container %s has %s, had %s", container, has, addr)
			}
		}
		if now := s.docker("inspect", "--format", "{{.State.StartedAt}} {{.State.Pid}}", "c1", "c2"); now != began {
			t.Errorf("containers were %s, are %s", began, now)
		}
		s.pings(s.net.Client, inA)
		s.pings(s.net.Client, inB)
		if now := s.known(inA).ObtainedAt; !now.After(obtained) {
			t.Errorf("the daemon says that the lease is from %s", now)
		}

		// A server takes the renewal of a lease that it doesn't have for a wish
		// to have it. So none may follow a release.
		s.docker("rm", "-f", "c1", "c2")
		s.notLeased()
		t1 := time.Duration(config.RenewSeconds) * time.Second
		for end := time.Now().Add(t1 + time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			if leases := must(s.dhcp.Leases())(t); len(leases) > 0 {
				t.Fatalf("leased again: %v", leases)
			}
		}
	})
}

// soonRenewed are times of leases that are renewed as soon as a server lets
// them. A dnsmasq takes neither a T1 under 3 s nor a lease under 120 s.
func soonRenewed(kind lab.DHCPKind) lab.DHCPConfig {
	config := lab.DHCPConfig{LeaseSeconds: 120, RenewSeconds: 1, RebindSeconds: 60}
	if kind.Name == lab.Dnsmasq.Name {
		config.RenewSeconds = 3
	}
	return config
}
