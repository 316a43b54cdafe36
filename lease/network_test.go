package lease_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// wanted is a pool as RequestPool carries it, with options as name=value.
func wanted(t *testing.T, subnet string, options ...string) lease.Pool {
	t.Helper()
	texts := map[string]string{}
	for _, o := range options {
		name, value, _ := strings.Cut(o, "=")
		texts[name] = value
	}
	p, err := lease.NewPool(subnet, "", texts)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// subnet is a pool as RequestPool carries it.
func subnet(t *testing.T, text string) lease.Pool {
	t.Helper()
	return wanted(t, text)
}

// errVLAN is the client's error about an interface that is yet to be made.
var errVLAN = fmt.Errorf("%w: eth0.10 on eth0", lease.ErrNoVLAN)

// What a network becomes, and what its user finds in the log. What is decided of
// offers in detail is TestSettle's.
func TestAddPool(t *testing.T) {
	const second = time.Second
	for name, c := range map[string]struct {
		pool            lease.Pool
		offer           func(*lease.Offer) // a change of the usual one
		fails           error              // the probe, if not nil
		noInterface     error              // what there is instead of one
		takes           time.Duration
		subnet, gateway string
		from            string
		warning         string
		probes          int
	}{
		"subnet given":              {pool: subnet(t, "192.0.2.0/24"), subnet: "192.0.2.0/24", gateway: "192.0.2.1", from: "option 3 of server 198.51.100.1", probes: 1},
		"subnet learned":            {pool: subnet(t, ""), subnet: "192.0.2.0/24", gateway: "192.0.2.1", from: "option 3 of server 198.51.100.1", probes: 1},
		"no router":                 {pool: subnet(t, "192.0.2.0/24"), offer: func(o *lease.Offer) { o.Router = netip.Addr{} }, subnet: "192.0.2.0/24", gateway: "192.0.2.1", from: "first address of the subnet", warning: "names no router", probes: 1},
		"learned without a router":  {pool: subnet(t, ""), offer: func(o *lease.Offer) { o.Router = netip.Addr{} }, subnet: "192.0.2.0/24", gateway: "192.0.2.1", from: "first address of the subnet", warning: "names no router", probes: 1},
		"no server that says a bit": {pool: subnet(t, "192.0.2.0/24"), fails: lease.ErrNoAnswer, takes: 8 * second, subnet: "192.0.2.0/24", gateway: "192.0.2.1", from: "first address of the subnet", warning: "no DHCP server answered", probes: 1},
		"no probe wanted":           {pool: wanted(t, "192.0.2.0/24", "probe=off"), subnet: "192.0.2.0/24", gateway: "192.0.2.1", from: "first address of the subnet"},
		"VLAN to be made, no probe": {pool: wanted(t, "192.0.2.0/24", "probe=off", "dhcp_interface=eth0.10"), noInterface: errVLAN, subnet: "192.0.2.0/24", gateway: "192.0.2.1", from: "first address of the subnet", warning: "eth0.10 on eth0\" for=1m0s"},
		"VLAN to be made":           {pool: subnet(t, "192.0.2.0/24"), fails: errVLAN, subnet: "192.0.2.0/24", gateway: "192.0.2.1", from: "first address of the subnet", warning: "eth0.10 on eth0\" for=1m0s", probes: 1},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.server.onProbe.set(func(ctx context.Context, p lease.Pool, _ lease.MAC) ([]lease.Offer, error) {
					if errors.Is(c.fails, lease.ErrNoAnswer) {
						return silentProbe(ctx, p, lease.MAC{})
					}
					o := w.server.offer()
					if c.offer != nil {
						c.offer(&o)
					}
					return []lease.Offer{o}, c.fails
				})
				if c.noInterface != nil {
					w.server.relayMAC.set(func() (lease.MAC, error) { return lease.MAC{}, c.noInterface })
				}
				began := time.Now()
				p, err := w.manager.AddPool(w.Context(), c.pool)
				if err != nil {
					t.Fatal(err)
				}
				if took := time.Since(began); took != c.takes {
					t.Errorf("took %v, want %v", took, c.takes)
				}
				if p.Subnet.String() != c.subnet || p.Gateway != addr(c.gateway) || !strings.HasPrefix(p.ID, c.subnet+"?") || !strings.Contains(p.ID, "gateway="+c.gateway+"&id=") {
					t.Errorf("subnet %v, gateway %v, ID %q", p.Subnet, p.Gateway, p.ID)
				}
				if stored := w.store.pools[p.ID]; stored.Gateway != p.Gateway || stored.Subnet != p.Subnet || stored.FirstWait != p.FirstWait || len(w.store.pools) != 1 {
					t.Errorf("stored %+v", stored)
				}
				if lines := w.lines("pool added", "subnet="+c.subnet, "gateway="+c.gateway+" ", `from="`+c.from+`"`); len(lines) != 1 {
					t.Errorf("not in the log: %s from %s", c.gateway, c.from)
				}
				if log := w.log.String(); !strings.Contains(log, c.warning) || strings.Contains(log, "WARN") != (c.warning != "") {
					t.Errorf("want a warning %q in the log", c.warning)
				}
				w.server.mu.Lock()
				if n := len(w.server.seen); n != c.probes {
					t.Errorf("probed %d times, want %d", n, c.probes)
				}
				w.server.mu.Unlock()
				w.acquire(p.ID, lease.Endpoint{MAC: mac(1)})
			})
		})
	}
}

func TestAddPoolRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		global lease.Options
		pool   lease.Pool
		probe  func(context.Context, lease.Pool, lease.MAC) ([]lease.Offer, error)
		takes  time.Duration
		is     error
		// noInterface is what there is instead of one.
		noInterface error
		says        []string
		probes      int
	}{
		"another subnet":            {pool: subnet(t, "203.0.113.0/24"), says: []string{"198.51.100.1", "192.0.2.99", "192.0.2.0/24", "not a host of the subnet 203.0.113.0/24", "--subnet"}, probes: 1},
		"an error":                  {pool: subnet(t, "192.0.2.0/24"), probe: failingProbe(errDown), is: errDown, probes: 1},
		"an error, nothing given":   {pool: subnet(t, ""), probe: failingProbe(errDown), is: errDown, probes: 1},
		"silence":                   {pool: subnet(t, ""), probe: silentProbe, takes: 8 * time.Second, is: lease.ErrNoAnswer, says: []string{"--subnet 192.0.2.0/24 --gateway 192.0.2.1"}, probes: 1},
		"VLAN to be made":           {pool: subnet(t, ""), probe: failingProbe(errVLAN), is: lease.ErrNoVLAN, says: []string{"eth0.10 on eth0: spanning tree may block a new VLAN port for up to 50 seconds, so it can't be probed; create the network with --subnet and --gateway"}, probes: 1},
		"no probe, nothing given":   {pool: wanted(t, "", "probe=off"), says: []string{"probe=off", "--subnet 192.0.2.0/24 --gateway 192.0.2.1"}},
		"no such interface":         {pool: wanted(t, "192.0.2.0/24", "probe=off", "dhcp_interface=eth9"), noInterface: errDown, is: errDown},
		"no VLAN, no probe":         {pool: wanted(t, "", "probe=off", "dhcp_interface=eth0.10"), noInterface: errVLAN, is: lease.ErrNoVLAN, says: []string{"spanning tree", "--subnet and --gateway"}},
		"no probe in general":       {global: lease.Options{Probe: lease.Off}, pool: subnet(t, ""), says: []string{"probe=off"}},
		"option 82 by broadcast":    {global: lease.Options{Interface: "eth0"}, pool: wanted(t, "192.0.2.0/24", "option82=host"), says: []string{"option82=host", "by broadcast on eth0", "dhcp_server"}},
		"frames of a relay agent's": {global: lease.Options{Servers: []lease.Server{{Host: "192.0.2.3", Port: 67}}}, pool: wanted(t, "192.0.2.0/24", "ether_source=container"), says: []string{"ether_source=container", "dhcp_interface"}},
	} {
		t.Run(name, func(t *testing.T) {
			inWorldOf(t, c.global, func(w *world) {
				w.server.onProbe.set(c.probe)
				if c.noInterface != nil {
					w.server.relayMAC.set(func() (lease.MAC, error) { return lease.MAC{}, c.noInterface })
				}
				began := time.Now()
				_, err := w.manager.AddPool(w.Context(), c.pool)
				w.fails(err, c.says...)
				if c.is != nil && !errors.Is(err, c.is) {
					t.Errorf("error %v, want %v", err, c.is)
				}
				if took := time.Since(began); took != c.takes {
					t.Errorf("took %v, want %v", took, c.takes)
				}
				if n := len(w.server.seen); n != c.probes {
					t.Errorf("the server saw %v", w.server.seen)
				}
				w.server.forget()
				if len(w.store.pools) != 0 {
					t.Errorf("stored are %v", w.store.pools)
				}
			})
		})
	}
}

func TestAddPoolThatCannotBeStored(t *testing.T) {
	inWorld(t, func(w *world) {
		w.store.before.set(failing("PutPool"))
		_, err := w.manager.AddPool(w.Context(), subnet(t, "192.0.2.0/24"))
		w.fails(err, "store the network", errDiskFull.Error())
		if len(w.store.pools) != 0 {
			t.Errorf("stored are %v", w.store.pools)
		}
	})
}

// Its servers can't be probed before the engine has made the interface, and its
// port may be blocked for a while after.
func TestNetworkOnANewVLAN(t *testing.T) {
	after := func(w *world, d time.Duration) {
		w.server.onAcquire.set(func(ctx context.Context, r lease.Request) (lease.Lease, error) {
			select {
			case <-time.After(d):
				return w.server.grant(r)
			case <-ctx.Done():
				return lease.Lease{}, lease.ErrNoAnswer
			}
		})
	}
	create := func(w *world) string {
		w.server.onProbe.set(failingProbe(errVLAN))
		p, err := w.manager.AddPool(w.Context(), subnet(t, "192.0.2.0/24"))
		if err != nil {
			t.Fatal(err)
		}
		w.server.onProbe.set(nil)
		return p.ID
	}
	for name, restart := range map[string]bool{"": false, "after a restart": true} {
		t.Run("the first request takes longer "+name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				pool := create(w)
				after(w, 61*time.Second)
				began := time.Now()
				w.refused(pool, lease.Endpoint{MAC: mac(1)}, lease.ErrNoAnswer.Error())
				if took := time.Since(began); took != 60*time.Second {
					t.Errorf("refused after %v", took)
				}
				if restart {
					w.restart(0)
				}
				// That was no lease.
				after(w, 55*time.Second)
				w.acquire(pool, lease.Endpoint{MAC: mac(1)})
				if restart {
					w.restart(0)
				}
				began = time.Now()
				w.refused(pool, lease.Endpoint{MAC: mac(2)}, lease.ErrNoAnswer.Error())
				if took := time.Since(began); took != timeout {
					t.Errorf("the second one was refused after %v", took)
				}
				w.server.forget()
			})
		})
	}
	t.Run("a stored lease, of which no server was heard, is none", func(t *testing.T) {
		inWorldOf(t, auto, func(w *world) {
			before, left := w.leftOne()
			if err := w.manager.RemovePool(w.Context(), before); err != nil {
				t.Fatal(err)
			}
			pool := create(w)
			w.server.down()
			if l := w.acquire(pool, ep(2, "web")); l.Addr() != left.Addr() {
				t.Fatalf("got %s", l.Addr())
			}
			if got := w.store.pools[pool].FirstWait; got != lease.FirstWait {
				t.Errorf("the patience is %v", got)
			}
		})
	})
	t.Run("a longer time-out stays", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			config := w.config()
			config.Timeout = 2 * time.Minute
			var err error
			if w.manager, err = lease.NewManager(w.store, w.server, config); err != nil {
				t.Fatal(err)
			}
			defer w.manager.Close()
			pool := create(w)
			after(w, 119*time.Second)
			w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		})
	})
	t.Run("the end can't be stored", func(t *testing.T) {
		inWorld(t, func(w *world) {
			pool := create(w)
			// From the first request on; the second change is the end's.
			changes := 0
			w.store.before.set(func(call string) error {
				if call == "PutPool" {
					if changes++; changes == 2 {
						return errDiskFull
					}
				}
				return nil
			})
			w.acquire(pool, lease.Endpoint{MAC: mac(1)})
			if n := len(w.lines("WARN", "patience", errDiskFull.Error())); n != 1 {
				t.Errorf("%d warnings", n)
			}
			if w.store.pools[pool].FirstWait == 0 {
				t.Error("it ended all the same")
			}
			w.acquire(pool, lease.Endpoint{MAC: mac(2)})
			if w.store.pools[pool].FirstWait != 0 {
				t.Error("the second lease didn't end it")
			}
		})
	})
}

func TestAddPoolForACallerThatIsGone(t *testing.T) {
	for _, gone := range []string{"probe", "PutPool"} {
		t.Run(gone, func(t *testing.T) {
			inWorld(t, func(w *world) {
				ctx, cancel := context.WithCancelCause(w.Context())
				leave := errors.New("the engine hung up")
				w.server.onProbe.set(func(context.Context, lease.Pool, lease.MAC) ([]lease.Offer, error) {
					if gone == "probe" {
						cancel(leave)
						return nil, lease.ErrNoAnswer
					}
					return []lease.Offer{w.server.offer()}, nil
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
				if len(w.store.pools) != 0 || slices.Contains(w.store.calls, "PutPool") != (gone == "PutPool") {
					t.Errorf("stored are %v, by %v", w.store.pools, w.store.calls)
				}
			})
		})
	}
}

func TestGateway(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		for _, c := range []struct{ asked, want string }{
			{"", "192.0.2.1"}, {"192.0.2.254", "192.0.2.254"}, {"", "192.0.2.254"},
		} {
			var a netip.Addr
			if c.asked != "" {
				a = addr(c.asked)
			}
			got, err := w.manager.Gateway(w.Context(), pool, a)
			w.works(err)
			if got.String() != c.want+"/24" {
				t.Errorf("asked for %q: got %v, want %v", c.asked, got, c.want)
			}
			if stored := w.store.pools[pool].Gateway; stored != got.Addr() {
				t.Errorf("stored %v, answered %v", stored, got)
			}
		}
		// What the engine wants to know is no news.
		if given := w.lines("gateway given", "from=--gateway"); len(given) != 1 || !strings.Contains(given[0], "gateway=192.0.2.254") {
			t.Errorf("in the log: %q", given)
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
