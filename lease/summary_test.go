package lease_test

import (
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// The counts are those of the list, in every state, and the time is that of a
// server's last grant, which a restart forgets and silence doesn't change.
func TestSummary(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		is := func(want string, renewed time.Time) {
			w.Helper()
			s := w.manager.Summary()
			if got := s.String(); !strings.HasPrefix(got, want+", last renewal ") || !s.Renewed.Equal(renewed) {
				w.Errorf("%s at %v, want %s at %v", got, s.Renewed, want, renewed)
			}
			counts := map[string]int{}
			for _, h := range w.manager.Leases() {
				counts[h.State]++
			}
			if !maps.Equal(s.Leases, counts) {
				w.Errorf("counted %v, listed %v", s.Leases, counts)
			}
		}
		is("leases 0, pools 0", time.Time{})
		pool := w.pool()
		is("leases 0, pools 1", time.Time{})
		time.Sleep(time.Minute)
		for n := range 2 {
			w.acquire(pool, ep(n+1, "")) // T1 30m, T2 52m30s, 1h
		}
		w.release(pool, w.acquire(pool, ep(3, "web")))
		is("leases 3 (bound 2, releasing 1), pools 1", time.Now())
		granted := time.Now()
		w.server.down()
		w.acquire(pool, ep(3, "web")) // on its stored lease
		is("leases 3 (bound 2, renewing 1), pools 1", granted)
		w.server.up()
		time.Sleep(10 * time.Second)
		is("leases 3 (bound 3), pools 1", granted.Add(8*time.Second))
		time.Sleep(35 * time.Minute)
		renewed := granted.Add(30*time.Minute + 8*time.Second)
		is("leases 3 (bound 3), pools 1", renewed)
		w.server.down()
		time.Sleep(30 * time.Minute)
		is("leases 3 (renewing 3), pools 1", renewed)
		time.Sleep(20 * time.Minute)
		is("leases 3 (rebinding 3), pools 1", renewed)
		time.Sleep(10 * time.Minute)
		is("leases 3 (lost 3), pools 1", renewed)
		w.restart(time.Second)
		is("leases 3 (lost 3), pools 1", time.Time{})
		w.server.up()
		time.Sleep(2 * time.Minute)
		is("leases 3 (bound 3), pools 1", w.manager.Summary().Renewed)
		if since := time.Since(w.manager.Summary().Renewed); since > 2*time.Minute {
			w.Errorf("regained leases count as renewed %v ago", since)
		}
	})
	s := lease.Summary{
		Leases: map[string]int{"bound": 7, "renewing": 6, "rebinding": 5, "lost": 4, "waiting": 3, "releasing": 2}, Pools: 2,
		Renewed: time.Date(2026, 5, 4, 3, 2, 1, 0, time.Local),
	}
	const want = "leases 27 (bound 7, renewing 6, rebinding 5, lost 4, waiting 3, releasing 2), pools 2, last renewal 2026-05-04 03:02:01"
	if got := s.String(); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	if got := (lease.Summary{}).String(); got != "leases 0, pools 0, last renewal none yet" {
		t.Error(got)
	}
}
