package lease_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/store"
)

func TestRestartResumesEachState(t *testing.T) {
	for _, c := range []struct {
		down time.Duration
		want string
	}{
		{10 * time.Minute, "30m0s renew 192.0.2.10"},
		{30 * time.Minute, "30m0s renew 192.0.2.10"},
		{40 * time.Minute, "40m0s renew 192.0.2.10"},
		{55 * time.Minute, "55m0s rebind 192.0.2.10"},
		{61 * time.Minute, "1h1m0s confirm 192.0.2.10"},
		{1000 * time.Hour, "1000h0m0s confirm 192.0.2.10"},
	} {
		t.Run(c.down.String(), func(t *testing.T) {
			inWorld(t, func(w *world) {
				l := w.acquire(w.pool(), lease.Endpoint{MAC: mac(1), Name: "web"})
				w.server.saw(t, "0s acquire 02:00:00:00:00:01")
				w.restart(c.down)
				// What is overdue may already be asked for.
				if held := w.manager.Leases(); c.down < 30*time.Minute && (len(held) != 1 || !same(held[0].Lease, l)) {
					t.Errorf("resumed as %+v", held)
				}
				time.Sleep(max(0, 30*time.Minute-c.down) + time.Second)
				w.server.saw(t, c.want)
				w.holds("192.0.2.10 bound")
			})
		})
	}
}

// T1 30m, T2 52m30s, lease 1h < stop.
func TestRestartSpreadsWhatIsOverdue(t *testing.T) {
	for _, down := range []time.Duration{31 * time.Minute, 53 * time.Minute, 1000 * time.Hour} {
		t.Run(down.String(), func(t *testing.T) { restartSpreads(t, down) })
	}
}

func restartSpreads(t *testing.T, down time.Duration) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		for n := range 100 {
			w.acquire(pool, lease.Endpoint{MAC: mac(n + 1)})
		}
		w.acquire(pool, lease.Endpoint{MAC: mac(999), Address: addr("192.0.2.250")})
		synctest.Wait()
		w.server.forget()
		w.restart(down)
		time.Sleep(time.Second)
		synctest.Wait()
		if len(w.server.seen) != 101 {
			t.Errorf("%d attempts, want 101", len(w.server.seen))
		}
		for n, seen := range w.server.seen {
			at, err := time.ParseDuration(strings.Fields(seen)[0])
			if want := down + time.Duration(n)*time.Millisecond; err != nil || at != want {
				t.Errorf("attempt %d: %s, want it at %v", n, seen, want)
			}
		}
	})
}

func TestRestartKeepsPoolsAndHolders(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool("192.0.2.0/26")
		w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		w.restart(time.Minute)
		w.server.forget()
		if l := w.acquire(pool, lease.Endpoint{MAC: mac(1)}); l.Addr() != addr("192.0.2.10") {
			t.Errorf("got %v", l.Addr())
		}
		w.refused(pool, lease.Endpoint{MAC: mac(1), Name: "db"}, "web")
		w.refused(pool, lease.Endpoint{MAC: mac(2), Address: addr("192.0.2.10")}, "web")
		w.refused(pool, lease.Endpoint{MAC: mac(2), Address: addr("192.0.2.1")}, "gateway")
		w.server.saw(t)
		w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.10")))
		w.server.leased(t)
	})
}

func TestStartRefusals(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		broken := newStore()
		broken.before.set(failing("Load"))
		if _, err := lease.NewManager(broken, w.server, w.config()); !errors.Is(err, errDiskFull) {
			t.Errorf("error %v", err)
		}
		// A lease without its pool: nothing is done about the others either.
		orphaned := newStore()
		p := w.store.pools[pool]
		orphaned.pools[pool] = p
		for n := range 20 {
			l := w.server.lease(lease.Request{MAC: mac(n + 1)}, netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + n)}))
			l.Pool = pool
			if n == 19 {
				l.Pool = "gone"
			}
			orphaned.leases[lease.Key{l.Pool, l.MAC}] = l
		}
		quiet := newServer()
		_, err := lease.NewManager(orphaned, quiet, w.config())
		w.fails(err, "192.0.2.29", `"gone"`)
		time.Sleep(2 * time.Hour)
		quiet.saw(t)
	})
}

// strayed makes a pool ID as another database knew it.
func strayed(w *world, within string) string {
	id := w.pool(within)
	w.works(w.manager.RemovePool(w.Context(), id))
	return id
}

func TestUnknownPoolIsTakenUpByItsID(t *testing.T) {
	inWorld(t, func(w *world) {
		id := strayed(w, "192.0.2.0/26")
		// Not by late releases.
		w.works(w.manager.Release(w.Context(), id, addr("192.0.2.1")))
		w.works(w.manager.RemovePool(w.Context(), id))
		_, err := w.manager.ReleaseByHand(w.Context(), "192.0.2.10", id)
		w.fails(err)
		if len(w.store.pools) != 0 {
			t.Fatalf("stored are %v", w.store.pools)
		}

		w.store.before.set(failing("PutPool"))
		w.refused(id, lease.Endpoint{MAC: mac(1)}, "store the network", errDiskFull.Error())
		w.store.before.set(nil)

		w.acquire(id, lease.Endpoint{MAC: mac(1)})
		if !strings.Contains(w.log.String(), "unknown pool taken up") {
			t.Error("not a word of it in the log")
		}
		// With all that it had, and for good. Auxiliary addresses are long past.
		for range 2 {
			w.refused(id, lease.Endpoint{MAC: mac(2), Address: addr("192.0.2.1")}, "gateway")
			w.server.gives(addr("192.0.2.200"))
			w.refused(id, lease.Endpoint{MAC: mac(2)}, "--ip-range 192.0.2.0/26")
			_, err := w.manager.Auxiliary(w.Context(), id, addr("192.0.2.9"))
			w.fails(err, restartEngine)
			w.restart(time.Minute)
		}
		w.holds("192.0.2.10 bound")
		w.works(w.manager.RemovePool(w.Context(), id))
		w.server.leased(t)
	})
}

func TestUnknownPoolsThatSayNothing(t *testing.T) {
	inWorld(t, func(w *world) {
		for _, id := range []string{"", "x", "192.0.2.0/24", "192.0.2.0/24?id=x&mtu=9000"} {
			w.refused(id, lease.Endpoint{MAC: mac(1)}, "unknown pool", fmt.Sprintf("%q", id))
			_, err := w.manager.Gateway(w.Context(), id, addr("192.0.2.1"))
			w.fails(err, "unknown pool")
			_, err = w.manager.Auxiliary(w.Context(), id, addr("192.0.2.1"))
			w.fails(err, "unknown pool")
			w.works(w.manager.Release(w.Context(), id, addr("192.0.2.1")))
			w.works(w.manager.RemovePool(w.Context(), id))
		}
		w.server.saw(t)
		if len(w.store.pools) != 0 {
			t.Errorf("stored are %v", w.store.pools)
		}
	})
}

// The old daemon's pool IDs are bare network addresses.
func TestOldPoolIsTakenUp(t *testing.T) {
	inWorld(t, func(w *world) {
		const id = "192.0.2.0"
		w.server.onProbe.set(silentProbe)
		began := time.Now()
		w.refused(id, lease.Endpoint{MAC: mac(1)}, "192.0.2.0", "prefix length", lease.ErrNoAnswer.Error())
		if took := time.Since(began); took != 8*time.Second {
			t.Errorf("took %v", took)
		}
		// Of other networks, without option 1, with absurd masks.
		for _, other := range []string{"198.51.100.0/24", "192.0.2.128/25", "", "192.0.2.0/31", "192.0.2.0/32"} {
			o := lease.Offer{Server: w.server.id.get(), Address: addr("192.0.2.129"), Subnet: prefix(other)}
			w.server.onProbe.set(offering(o))
			w.refused(id, lease.Endpoint{MAC: mac(1)}, "192.0.2.0", cmp.Or(other, "subnet none"), "198.51.100.1")
		}
		w.works(w.manager.Release(w.Context(), id, addr("192.0.2.10")))
		if len(w.store.pools) != 0 {
			t.Fatalf("stored are %v", w.store.pools)
		}

		// One that knows the network is enough.
		w.server.onProbe.set(offering(lease.Offer{Server: addr("198.51.100.2"), Address: addr("192.0.3.9"), Subnet: prefix("192.0.3.0/24")}, w.server.offer()))
		w.server.forget()
		if l := w.acquire(id, lease.Endpoint{MAC: mac(1)}); l.Prefix.String() != "192.0.2.10/24" {
			t.Errorf("granted %v", l.Prefix)
		}
		w.server.saw(t, "8s probe 192.0.2.0/32", "8s acquire 02:00:00:00:00:01")
		w.refused(id, lease.Endpoint{MAC: mac(2), Address: addr("192.0.2.1")}, "gateway")
		w.restart(0)
		w.acquire(id, lease.Endpoint{MAC: mac(2)})
		w.server.saw(t, "8s acquire 02:00:00:00:00:02")
		w.works(w.manager.RemovePool(w.Context(), id))
		w.server.leased(t)
	})
}

func TestOldPoolWithARouterOfElsewhere(t *testing.T) {
	inWorld(t, func(w *world) {
		o := w.server.offer()
		o.Router = addr("198.51.100.254")
		w.server.onProbe.set(offering(o))
		w.acquire("192.0.2.0", lease.Endpoint{MAC: mac(1)})
		if got, err := w.manager.Gateway(w.Context(), "192.0.2.0", netip.Addr{}); err != nil || got.String() != "192.0.2.1/24" {
			t.Errorf("gateway %v, %v", got, err)
		}
	})
}

// Many containers start at once on a network that isn't known any more; and
// what one of them changes, the taking up by another doesn't undo.
func TestUnknownPoolIsTakenUpOnce(t *testing.T) {
	inWorld(t, func(w *world) {
		const id = "192.0.2.0"
		probes := 0
		w.server.onProbe.set(func(context.Context, lease.Pool, lease.MAC) ([]lease.Offer, error) {
			probes++
			time.Sleep(time.Duration(probes) * time.Second)
			o := w.server.offer()
			o.Router = netip.Addr{}
			return []lease.Offer{o}, nil
		})
		var wg sync.WaitGroup
		for n := range 5 {
			wg.Go(func() {
				if _, err := w.manager.Acquire(w.Context(), id, lease.Endpoint{MAC: mac(n + 1)}); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		time.Sleep(1500 * time.Millisecond)
		_, err := w.manager.Gateway(w.Context(), id, addr("192.0.2.254"))
		w.works(err)
		wg.Wait()
		if got := w.store.pools[id].Gateway; got != addr("192.0.2.254") {
			t.Errorf("stored is gateway %v", got)
		}
		if n := len(w.manager.Leases()); n != 5 {
			t.Errorf("%d leases", n)
		}
	})
}

// The same with the real store.
func TestLifeWithTheRealStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		folder := t.TempDir()
		w := newWorld(t)
		w.global = byMAC
		server, config := w.server, w.config()
		var db *store.DB
		var m *lease.Manager
		start := func() {
			var err error
			if db, err = store.Open(folder); err != nil {
				t.Fatal(err)
			}
			if m, err = lease.NewManager(db, server, config); err != nil {
				t.Fatal(err)
			}
		}
		stop := func() {
			m.Close()
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
		}
		start()
		p, err := m.AddPool(t.Context(), subnet(t, "192.0.2.0/24"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Auxiliary(t.Context(), p.ID, addr("192.0.2.5")); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for n := range 50 {
			wg.Go(func() {
				if _, err := m.Acquire(t.Context(), p.ID, lease.Endpoint{MAC: mac(n + 1), Name: fmt.Sprint("web", n)}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		time.Sleep(20 * time.Minute)
		before := m.Leases()
		if len(before) != 50 {
			t.Fatalf("%d leases", len(before))
		}
		stop()
		time.Sleep(5 * time.Minute)
		start()
		after := m.Leases()
		for i, h := range before {
			if len(after) != len(before) || !same(h.Lease, after[i].Lease) || h.Subnet != after[i].Subnet {
				t.Fatalf("resumed as %+v, was %+v", after, before)
			}
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		for _, h := range m.Leases() {
			if h.Obtained.Sub(server.began) != 30*time.Minute {
				t.Errorf("%v: renewed after %v", h.Addr(), h.Obtained.Sub(server.began))
			}
		}
		if _, err := m.Acquire(t.Context(), p.ID, lease.Endpoint{MAC: mac(99), Address: addr("192.0.2.5")}); err == nil {
			t.Error("an auxiliary address was leased")
		}
		if err := m.Release(t.Context(), p.ID, before[0].Addr()); err != nil {
			t.Error(err)
		}
		stop()
		start()
		if n := len(m.Leases()); n != 49 {
			t.Errorf("%d leases after a release and a restart", n)
		}
		if err := m.RemovePool(t.Context(), p.ID); err != nil {
			t.Error(err)
		}
		server.leased(t)
		stop()
		start()
		if n := len(m.Leases()); n != 0 {
			t.Errorf("%d leases of a removed pool", n)
		}
		stop()
	})
}
