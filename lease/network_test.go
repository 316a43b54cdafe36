package lease_test

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// subnet is a pool as RequestPool carries it.
func subnet(t *testing.T, text string) lease.Pool {
	t.Helper()
	p, err := lease.NewPool(text, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestAddPool(t *testing.T) {
	offer := lease.Offer{Server: addr("198.51.100.1"), Address: addr("192.0.2.99"), Subnet: netip.MustParsePrefix("192.0.2.0/24"), Router: addr("192.0.2.254")}
	with := func(change func(*lease.Offer)) lease.Offer {
		o := offer
		change(&o)
		return o
	}
	for name, c := range map[string]struct {
		offer   lease.Offer
		gateway string
		warning string
	}{
		"router":                    {offer, "192.0.2.254", ""},
		"no router":                 {with(func(o *lease.Offer) { o.Router = netip.Addr{} }), "192.0.2.1", "names no router"},
		"router of another subnet":  {with(func(o *lease.Offer) { o.Router = addr("198.51.100.254") }), "192.0.2.1", "names no router"},
		"router that is no host":    {with(func(o *lease.Offer) { o.Router = addr("192.0.2.255") }), "192.0.2.1", "names no router"},
		"another prefix length":     {with(func(o *lease.Offer) { o.Subnet = netip.MustParsePrefix("192.0.2.0/25") }), "192.0.2.254", ""},
		"no prefix length":          {with(func(o *lease.Offer) { o.Subnet = netip.Prefix{} }), "192.0.2.254", ""},
		"no server that says a bit": {lease.Offer{}, "192.0.2.1", "no DHCP server answered"},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.server.onProbe.set(func(ctx context.Context, _ lease.Pool, accept func(lease.Offer) error) (lease.Offer, error) {
					if !c.offer.Server.IsValid() {
						<-ctx.Done()
						return lease.Offer{}, lease.ErrNoAnswer
					}
					return c.offer, accept(c.offer)
				})
				w.store.before.set(func(string) error { time.Sleep(time.Millisecond); return nil })
				began := time.Now()
				p, err := w.manager.AddPool(w.Context(), subnet(t, "192.0.2.0/24"))
				if err != nil {
					t.Fatal(err)
				}
				if took := time.Since(began); took > 8*time.Second+time.Millisecond || took < time.Millisecond {
					t.Errorf("took %v", took)
				}
				if p.Gateway != addr(c.gateway) || !strings.Contains(p.ID, "gateway="+c.gateway) {
					t.Errorf("gateway %v, ID %q, want %v", p.Gateway, p.ID, c.gateway)
				}
				if stored := w.store.pools[p.ID]; stored.Gateway != p.Gateway || stored.Subnet != p.Subnet {
					t.Errorf("stored %+v", stored)
				}
				if log := w.log.String(); !strings.Contains(log, c.warning) || strings.Contains(log, "WARN") != (c.warning != "") {
					t.Errorf("want a warning %q in the log", c.warning)
				}
				w.store.before.set(nil)
				w.acquire(p.ID, lease.Endpoint{MAC: mac(1)})
			})
		})
	}
}

func TestAddPoolRefusals(t *testing.T) {
	inWorld(t, func(w *world) {
		// The server serves another subnet than the user thinks.
		_, err := w.manager.AddPool(w.Context(), subnet(t, "203.0.113.0/24"))
		w.fails(err, "198.51.100.1", "192.0.2.99", "203.0.113.0/24", "--subnet")

		w.server.onProbe.set(func(context.Context, lease.Pool, func(lease.Offer) error) (lease.Offer, error) {
			return lease.Offer{}, errDown
		})
		if _, err := w.manager.AddPool(w.Context(), subnet(t, "192.0.2.0/24")); !errors.Is(err, errDown) {
			t.Errorf("error %v, want the client's", err)
		}

		w.server.onProbe.set(nil)
		w.store.before.set(failing("PutPool"))
		_, err = w.manager.AddPool(w.Context(), subnet(t, "192.0.2.0/24"))
		w.fails(err, "store the network", errDiskFull.Error())
		if len(w.store.pools) != 0 {
			t.Errorf("stored are %v", w.store.pools)
		}
	})
}

func TestAddPoolForACallerThatIsGone(t *testing.T) {
	for _, gone := range []string{"probe", "PutPool"} {
		t.Run(gone, func(t *testing.T) {
			inWorld(t, func(w *world) {
				ctx, cancel := context.WithCancelCause(w.Context())
				leave := errors.New("the engine hung up")
				w.server.onProbe.set(func(_ context.Context, _ lease.Pool, accept func(lease.Offer) error) (lease.Offer, error) {
					if gone == "probe" {
						cancel(leave)
						return lease.Offer{}, lease.ErrNoAnswer
					}
					return lease.Offer{Server: addr("198.51.100.1"), Address: addr("192.0.2.9")}, nil
				})
				w.store.before.set(func(call string) error {
					if call == gone {
						cancel(leave)
					}
					return nil
				})
				if _, err := w.manager.AddPool(ctx, subnet(t, "192.0.2.0/24")); !errors.Is(err, leave) {
					t.Errorf("error %v", err)
				}
				if len(w.store.pools) != 0 {
					t.Errorf("stored are %v", w.store.pools)
				}
			})
		})
	}
}

func TestGateway(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		for asked, want := range map[string]string{"": "192.0.2.1/24", "192.0.2.254": "192.0.2.254/24"} {
			var a netip.Addr
			if asked != "" {
				a = addr(asked)
			}
			got, err := w.manager.Gateway(w.Context(), pool, a)
			w.works(err)
			if asked != "" && got.String() != want {
				t.Errorf("asked for %q: got %v, want %v", asked, got, want)
			}
			if stored := w.store.pools[pool].Gateway; stored != got.Addr() {
				t.Errorf("stored %v, answered %v", stored, got)
			}
		}
		w.refused(pool, lease.Endpoint{MAC: mac(1), Address: addr("192.0.2.254")}, "gateway")
		for _, a := range []string{"198.51.100.1", "192.0.2.0", "192.0.2.255", "2001:db8::1"} {
			_, err := w.manager.Gateway(w.Context(), pool, addr(a))
			w.fails(err, "--gateway", a, "192.0.2.0/24")
		}
		_, err := w.manager.Gateway(w.Context(), "unknown", addr("192.0.2.1"))
		w.fails(err, "unknown pool", `"unknown"`)
		w.store.before.set(failing("PutPool"))
		_, err = w.manager.Gateway(w.Context(), pool, addr("192.0.2.7"))
		w.fails(err, errDiskFull.Error())
		// What was not stored isn't so.
		w.store.before.set(nil)
		if got, _ := w.manager.Gateway(w.Context(), pool, netip.Addr{}); got.Addr() == addr("192.0.2.7") {
			t.Error("it became the gateway all the same")
		}
	})
}

// The race detector watches.
func TestPoolIsEditedFromAllSides(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		var wg sync.WaitGroup
		for n := range 4 {
			a := netip.AddrFrom4([4]byte{192, 0, 2, byte(200 + n)})
			wg.Go(func() {
				for range 50 {
					if got, err := w.manager.Gateway(w.Context(), pool, a); err != nil || got != netip.PrefixFrom(a, 24) {
						t.Errorf("gateway %v, %v", got, err)
					}
					if got, err := w.manager.Auxiliary(w.Context(), pool, a); err != nil || got != netip.PrefixFrom(a, 24) {
						t.Errorf("auxiliary %v, %v", got, err)
					}
					w.works(w.manager.Release(w.Context(), pool, a))
				}
			})
		}
		wg.Wait()
		if r := w.store.pools[pool].Reserved; len(r) != 0 {
			t.Errorf("still reserved: %v", r)
		}
	})
}

const restartEngine = "restart the engine"

func TestAuxiliaryAddresses(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		aux := func(a string) error { _, err := w.manager.Auxiliary(w.Context(), pool, addr(a)); return err }
		got, err := w.manager.Auxiliary(w.Context(), pool, addr("192.0.2.5"))
		if err != nil || got.String() != "192.0.2.5/24" {
			t.Errorf("got %v, %v", got, err)
		}
		w.works(aux("192.0.2.5")) // the engine repeats itself
		w.works(aux("192.0.2.6"))
		if r := w.store.pools[pool].Reserved; !slices.Equal(r, []netip.Addr{addr("192.0.2.5"), addr("192.0.2.6")}) {
			t.Errorf("stored are %v", r)
		}
		for _, a := range []string{"198.51.100.1", "192.0.2.0", "192.0.2.255"} {
			w.fails(aux(a), "--aux-address", a, "192.0.2.0/24")
		}
		_, err = w.manager.Auxiliary(w.Context(), pool, netip.Addr{})
		w.fails(err, restartEngine)
		w.server.saw(t) // no DHCP in any of this

		// Given back, it is free for containers.
		w.refused(pool, lease.Endpoint{MAC: mac(1), Address: addr("192.0.2.6")}, "auxiliary")
		w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.6")))
		w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.6")))
		w.acquire(pool, lease.Endpoint{MAC: mac(1), Address: addr("192.0.2.6")})
		w.restart(0)
		w.refused(pool, lease.Endpoint{MAC: mac(2), Address: addr("192.0.2.5")}, "auxiliary")

		w.store.before.set(failing("PutPool"))
		w.fails(w.manager.Release(w.Context(), pool, addr("192.0.2.5")), errDiskFull.Error())
	})
}

func TestAuxiliaryWindow(t *testing.T) {
	aux := func(w *world, pool string) error {
		_, err := w.manager.Auxiliary(w.Context(), pool, addr("192.0.2.5"))
		return err
	}
	for name, during := range map[string]func(w *world){
		"":              func(*world) {},
		"after restart": func(w *world) { w.restart(0) },
	} {
		t.Run("60 s "+name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				pool := w.pool()
				during(w)
				time.Sleep(59 * time.Second)
				w.works(aux(w, pool))
				time.Sleep(time.Second)
				w.fails(aux(w, pool), restartEngine)
				time.Sleep(time.Hour)
				w.fails(aux(w, pool), restartEngine)
			})
		})
		t.Run("first endpoint "+name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				pool := w.pool()
				l := w.acquire(pool, lease.Endpoint{MAC: mac(1)})
				w.fails(aux(w, pool), restartEngine)
				during(w)
				w.fails(aux(w, pool), restartEngine)
				w.works(w.manager.Release(w.Context(), pool, l.Addr()))
				w.fails(aux(w, pool), restartEngine)
			})
		})
	}
	t.Run("clock stepped back over a restart", func(t *testing.T) {
		inWorld(t, func(w *world) {
			pool := w.pool()
			p := w.store.pools[pool]
			p.AuxUntil = time.Now().Add(time.Hour)
			w.store.pools[pool] = p
			w.restart(0)
			w.fails(aux(w, pool), restartEngine)
		})
	})
}

func TestRemovePool(t *testing.T) {
	inWorld(t, func(w *world) {
		pool, other := w.pool(), w.pool()
		for n := range 3 {
			w.acquire(pool, lease.Endpoint{MAC: mac(n + 1)})
		}
		w.acquire(other, lease.Endpoint{MAC: mac(9)})
		ctx, cancel := context.WithCancel(w.Context())
		cancel() // it finishes without its caller
		for range 2 {
			w.works(w.manager.RemovePool(ctx, pool))
		}
		w.works(w.manager.RemovePool(ctx, "unknown"))
		w.works(w.manager.RemovePool(ctx, "192.0.2.0"))
		w.holds("192.0.2.13 bound")
		w.server.leased(t, addr("192.0.2.13"))
		if len(w.store.pools) != 1 {
			t.Errorf("stored are %v", w.store.pools)
		}
		// Late releases are no errors and take nothing up again.
		w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.10")))
		w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.1")))
		if len(w.store.pools) != 1 {
			t.Errorf("stored are %v", w.store.pools)
		}
	})
}

// Each release is on its way at once: one that waited for those before it could
// come after another network's request of the same identity.
func TestRemovePoolReleasesAllAtOnce(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		for n := range 3 {
			w.acquire(pool, lease.Endpoint{MAC: mac(n + 1)})
		}
		w.server.forget()
		w.server.onRelease.set(func() error { time.Sleep(time.Second); return nil })
		w.works(w.manager.RemovePool(w.Context(), pool))
		w.server.sawInAnyOrder(t, "0s release 192.0.2.10", "0s release 192.0.2.11", "0s release 192.0.2.12")
	})
}

func TestRemovePoolWithAHangingRenewal(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.acquire(pool, lease.Endpoint{MAC: mac(2)})
		w.server.onExtend.set(silent)
		time.Sleep(31 * time.Minute)
		w.server.sawInAnyOrder(t, "0s acquire 02:00:00:00:00:01", "0s acquire 02:00:00:00:00:02", "30m0s renew 192.0.2.10", "30m0s renew 192.0.2.11")
		began := time.Now()
		w.works(w.manager.RemovePool(w.Context(), pool))
		if took := time.Since(began); took != 0 {
			t.Errorf("took %v", took)
		}
		w.holds()
		time.Sleep(24 * time.Hour)
		w.server.leased(t)
		w.server.sawInAnyOrder(t, "31m0s release 192.0.2.10", "31m0s release 192.0.2.11")
	})
}

func TestRemovePoolDuringAnAcquire(t *testing.T) {
	// When the ACK comes: while the pool is being removed, and after it.
	for name, slow := range map[string]time.Duration{"while": 2 * time.Second, "after": 0} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				pool := w.pool()
				w.server.onAcquire.set(func(_ context.Context, r lease.Request) (lease.Lease, error) {
					time.Sleep(time.Second)
					return w.server.grant(r)
				})
				var err error
				var wg sync.WaitGroup
				wg.Go(func() { _, err = w.manager.Acquire(w.Context(), pool, lease.Endpoint{MAC: mac(1)}) })
				synctest.Wait()
				w.store.before.set(func(call string) error {
					if call == "DeletePool" {
						time.Sleep(slow)
					}
					return nil
				})
				w.works(w.manager.RemovePool(w.Context(), pool))
				wg.Wait()
				w.fails(err)
				w.holds()
				w.server.leased(t)
				if len(w.store.pools) != 0 {
					t.Errorf("stored are %v", w.store.pools)
				}
			})
		})
	}
}

func TestReleaseWhileThePoolIsRemoved(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		l := w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.expire()
		w.server.onAcquire.set(func(_ context.Context, r lease.Request) (lease.Lease, error) {
			time.Sleep(5 * time.Second)
			return w.server.grant(r)
		})
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := w.manager.Acquire(w.Context(), pool, lease.Endpoint{MAC: mac(1)})
			w.fails(err, "removed")
		})
		synctest.Wait()
		gone, cancel := context.WithCancel(w.Context())
		cancel()
		wg.Go(func() { w.works(w.manager.RemovePool(gone, pool)) }) // waits for it, whoever leaves
		synctest.Wait()
		w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.1")))
		w.refused(pool, lease.Endpoint{MAC: mac(2)}, "removed")
		w.works(w.manager.Release(w.Context(), pool, l.Addr()))
		wg.Wait()
		w.server.leased(t)
		w.holds()
	})
}

func TestPoolThatCannotBeRemoved(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.server.onExtend.set(silent)
		time.Sleep(31 * time.Minute)
		w.store.before.set(failing("DeletePool"))
		w.fails(w.manager.RemovePool(w.Context(), pool), "database", errDiskFull.Error())
		w.holds("192.0.2.10 renewing")
		w.store.before.set(nil)
		w.server.onExtend.set(nil)
		// Everything goes on.
		time.Sleep(2 * time.Second)
		w.server.saw(t, "0s acquire 02:00:00:00:00:01", "30m0s renew 192.0.2.10", "31m1s renew 192.0.2.10")
		w.acquire(pool, lease.Endpoint{MAC: mac(2)})
		w.works(w.manager.RemovePool(w.Context(), pool))
		w.holds()
		w.server.leased(t)
	})
}

// The lease is on disk and its caller is gone; it can't be removed. Then it is
// better known than forgotten until the next start.
func TestLeaseOfACallerThatIsGoneCannotBeRemoved(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		ctx, cancel := context.WithCancelCause(w.Context())
		leave := errors.New("the engine hung up")
		w.store.before.set(func(call string) error {
			if call == "PutLease" {
				cancel(leave)
			}
			return failing("DeleteLease")(call)
		})
		if _, err := w.manager.Acquire(ctx, pool, lease.Endpoint{MAC: mac(1)}); !errors.Is(err, leave) || !errors.Is(err, errDiskFull) {
			t.Errorf("error %v", err)
		}
		w.agree()
		w.store.before.set(nil)
		w.holds("192.0.2.10 bound")
		time.Sleep(31 * time.Minute)
		w.server.saw(t, "0s acquire 02:00:00:00:00:01", "30m0s renew 192.0.2.10")
	})
}
