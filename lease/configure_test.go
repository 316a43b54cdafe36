package lease_test

import (
	"maps"
	"sync"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Other global options count for what begins from then on, where a network says
// nothing itself. A release that was to be pending for 90s still is.
func TestConfigure(t *testing.T) {
	inWorldOf(t, lease.Options{ReleaseDelay: new(90 * time.Second)}, func(w *world) {
		pool, own := w.pool(), w.networkOf("release_delay=20s")
		w.release(pool, w.acquire(pool, ep(1, "before")))
		web, db := w.acquire(pool, ep(2, "web")), w.acquire(own, ep(3, "db"))
		w.has(web, w.named("web"))
		w.server.forget()
		w.manager.Configure(lease.Options{ReleaseDelay: new(10 * time.Second), ClientID: lease.ClientIDMAC})
		w.release(pool, web)
		w.release(own, db)
		time.Sleep(2 * time.Minute)
		w.server.saw(t, "10s release 192.0.2.11", "20s release 192.0.2.12", "1m30s release 192.0.2.10")
		w.has(w.acquire(pool, ep(4, "app")), string(lease.MACClientID(mac(4))))
		w.manager.Configure(lease.Options{})
		w.has(w.acquire(pool, ep(5, "app 2")), w.named("app 2"))
	})
}

// Overdue leases are asked for at once with new options, as after a start: they
// may name the server that answers. Not where nothing has changed, and not those
// that aren't due. T1 30m < outage 40m.
func TestConfigureAsksForTheOverdue(t *testing.T) {
	inWorldOf(t, byMAC, func(w *world) {
		pool := w.pool()
		w.acquire(pool, ep(1, ""))
		w.server.forget()
		w.server.down()
		time.Sleep(40 * time.Minute)
		w.server.saw(t, "30m0s renew 192.0.2.10")
		w.server.up()
		w.manager.Configure(byMAC)
		w.server.saw(t)
		w.manager.Configure(lease.Options{ClientID: lease.ClientIDMAC, Servers: []lease.Server{{Host: "198.51.100.1", Port: 67}}})
		w.server.saw(t, "40m0s renew 192.0.2.10")
		w.holds("192.0.2.10 bound")
		w.manager.Configure(byMAC)
		w.server.saw(t)
	})
}

// Exchanged while requests and renewals are at work, for the race detector. What
// is granted is kept, whatever the options were.
func TestConfigureAtWork(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.crowded()
		var work sync.WaitGroup
		work.Go(func() {
			for n := range 200 {
				w.manager.Configure([]lease.Options{auto, byMAC}[n%2])
				time.Sleep(time.Minute)
			}
		})
		for n := range 50 {
			work.Go(func() {
				for time.Sleep(time.Duration(n) * time.Second); w.server.began.Add(200 * time.Minute).After(time.Now()); time.Sleep(10 * time.Minute) {
					l, err := w.manager.Acquire(w.Context(), pool, ep(n+1, ""))
					w.works(err)
					if n%2 == 0 {
						w.works(w.manager.Release(w.Context(), pool, l.Addr()))
					}
				}
			})
		}
		work.Wait()
		if s := w.manager.Summary(); !maps.Equal(s.Leases, map[string]int{"bound": 25}) {
			w.Errorf("leases %v", s.Leases)
		}
	})
}
