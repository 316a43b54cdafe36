package e2e

import (
	"net/netip"
	"sync"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// Releases have no answer, so they must not come faster than the server reads
// them: an engine that stops, or a network that goes, gives hundreds back.
func TestAllReleasesArrive(t *testing.T) {
	const leases = 600
	for _, kind := range lab.DHCPKinds {
		t.Run(kind.Name, func(t *testing.T) {
			t.Parallel()
			subnet := lab.NewSubnet("10.10.0.0/16", "10.10.8.0", "10.10.99.255", "10.10.0.1")
			s := newHost(t, kind, lab.DHCPConfig{Subnets: []lab.Subnet{subnet}, LeaseSeconds: 3600})
			check(t, s.daemon.Start())
			pool := must(s.requestPool("10.10.0.0/16", nil))(t)
			addresses := make([]netip.Addr, leases)
			inParallel(t, 16, leases, func(n int) (err error) {
				addresses[n], err = s.requestAddress(pool, lab.ScatteredMAC(n))
				return err
			})
			// Half of them one by one, as containers that stop, the rest with
			// their network.
			inParallel(t, leases, leases/2, func(n int) error { return s.releaseAddress(pool, addresses[n]) })
			check(t, s.call(t.Context(), "ReleasePool", map[string]any{"PoolID": pool}, &struct{}{}))
			s.notLeased()
		})
	}
}

// inParallel runs an action for the numbers below n, so many at once.
func inParallel(t *testing.T, workers, n int, action func(int) error) {
	t.Helper()
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < n; i += workers {
				if err := action(i); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
}
