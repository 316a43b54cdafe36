package lease_test

import (
	"context"
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

// ep is a container's interface.
func ep(n int, name string) lease.Endpoint { return lease.Endpoint{MAC: mac(n), Name: name} }

// wants is ep with --ip.
func wants(n int, name, a string) lease.Endpoint {
	return lease.Endpoint{MAC: mac(n), Name: name, Address: addr(a)}
}

// leftOne is a network of options that container web, which had .10, left at 1m.
// Nothing that the server saw until then is left to see.
func (w *world) leftOne(options ...string) (pool string, left lease.Lease) {
	w.Helper()
	pool = w.networkOf(options...)
	left = w.acquire(pool, ep(1, "web"))
	time.Sleep(time.Minute)
	w.server.forget()
	w.release(pool, left)
	return pool, left
}

// Down 20s < release delay 30s < 1h.
func TestRestartIsOneRoundTrip(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool, left := w.leftOne()
		w.holds("192.0.2.10 releasing")
		if h := w.manager.Leases()[0]; h.Name != "web" || h.MAC != mac(1) || h.Pool != pool || h.Subnet != netip.MustParsePrefix("192.0.2.0/24") {
			t.Errorf("listed as %+v", h)
		}
		time.Sleep(20 * time.Second)
		l := w.acquire(pool, ep(2, "web")) // engines give each start its own MAC
		if l.Addr() != left.Addr() || l.MAC != mac(2) || string(l.ClientID) != string(left.ClientID) {
			t.Errorf("got %+v", l)
		}
		w.server.saw(t, "1m20s confirm 192.0.2.10")
		w.holds("192.0.2.10 bound")
		if len(w.store.bindings) != 0 {
			t.Errorf("still stored: %v", w.store.bindings)
		}
		w.agree()
		// From then on it is a lease like any other.
		time.Sleep(time.Hour)
		w.server.saw(t, "31m20s renew 192.0.2.10", "1h1m20s renew 192.0.2.10")
	})
}

// What the leasing server may say to a container that comes back: down 20s <
// release delay 30s < lease 1h.
func TestConfirmationThatFails(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(s *dhcpServer)
		want   []string
		got    string
	}{
		{
			"somebody has the address", func(s *dhcpServer) { s.takes(addr("192.0.2.10")) },
			[]string{"1m20s confirm 192.0.2.10", "1m20s acquire 02:00:00:00:00:02"},
			"192.0.2.11",
		},
		{
			"NAK without a reason", func(s *dhcpServer) {
				s.onConfirm.set(func(context.Context, lease.Lease) (lease.Lease, error) { return lease.Lease{}, lease.ErrNAK })
			},
			[]string{"1m20s confirm 192.0.2.10", "1m20s acquire 02:00:00:00:00:02"},
			"192.0.2.10",
		},
		{
			"its table was lost", func(s *dhcpServer) { s.ends(addr("192.0.2.10")) },
			[]string{"1m20s confirm 192.0.2.10", "1m21s acquire 02:00:00:00:00:02 192.0.2.10"},
			"192.0.2.10",
		},
		{
			"it is gone, and the others have another address", func(s *dhcpServer) {
				s.onConfirm.set(silent)
				s.onAcquire.set(s.from("192.0.2.99"))
			},
			[]string{"1m20s confirm 192.0.2.10", "1m21s acquire 02:00:00:00:00:02 192.0.2.10", "1m21s release 192.0.2.10"},
			"192.0.2.99",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			inWorldOf(t, auto, func(w *world) {
				pool, _ := w.leftOne()
				c.change(w.server)
				time.Sleep(20 * time.Second)
				l := w.acquire(pool, ep(2, "web"))
				w.server.saw(t, c.want...)
				if l.Addr() != addr(c.got) {
					t.Errorf("got %v, want %v", l.Addr(), c.got)
				}
				w.has(l, w.named("web"))
				w.server.up()
				w.holds(c.got + " bound")
				time.Sleep(10 * time.Minute)
				w.server.saw(t) // in particular no release
				if len(w.store.bindings) != 0 {
					t.Errorf("still stored: %v", w.store.bindings)
				}
			})
		})
	}
}

// Release delay 30s < 31s < lease 1h.
func TestReleaseAfterTheDelay(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool, left := w.leftOne()
		time.Sleep(30*time.Second - 1)
		w.server.saw(t)
		w.holds("192.0.2.10 releasing")
		time.Sleep(time.Second + 1)
		w.server.saw(t, "1m30s release 192.0.2.10")
		w.server.leased(t)
		w.holds()
		time.Sleep(24 * time.Hour)
		w.server.saw(t)
		// Its address is remembered for 30 days.
		l := w.acquire(pool, ep(2, "web"))
		w.server.saw(t, "24h1m31s acquire 02:00:00:00:00:02 192.0.2.10")
		if l.Addr() != left.Addr() {
			t.Errorf("got %v", l.Addr())
		}
		// Where somebody has it, another one will do.
		w.release(pool, l)
		time.Sleep(time.Minute)
		w.server.takes(l.Addr())
		if l := w.acquire(pool, ep(3, "web")); l.Addr() != addr("192.0.2.11") {
			t.Errorf("got %v", l.Addr())
		}
	})
}

// Left at 1m, down from 1m10s to 1m40s: 30s > 10s before it, and 20s < 30s after.
func TestPendingReleaseSurvivesTheDaemon(t *testing.T) {
	for what, boot := range map[string]string{"restart": "first boot", "reboot": "second boot"} {
		t.Run(what, func(t *testing.T) {
			inWorldOf(t, auto, func(w *world) {
				w.leftOne()
				time.Sleep(10 * time.Second)
				w.manager.Close()
				w.host.bootID.set(boot)
				time.Sleep(30 * time.Second)
				w.start()
				w.holds("192.0.2.10 releasing")
				time.Sleep(30 * time.Second) // it counts anew
				w.server.saw(t, "2m10s release 192.0.2.10")
				w.restart(time.Hour)
				time.Sleep(time.Hour)
				w.server.saw(t) // only once
				w.holds()
			})
			inWorldOf(t, auto, func(w *world) {
				pool, left := w.leftOne()
				w.manager.Close()
				w.host.bootID.set(boot)
				time.Sleep(10 * time.Minute)
				w.start()
				time.Sleep(20 * time.Second)
				l := w.acquire(pool, ep(2, "web"))
				w.has(l, string(left.ClientID))
				time.Sleep(5 * time.Minute)
				w.server.saw(t, "11m20s confirm 192.0.2.10")
				w.holds("192.0.2.10 bound")
			})
		})
	}
}

// A container that started on its stored lease while its server was down: from
// T2 on all servers are asked, as for any lease. Left at 1m, outage 1h < lease.
func TestStoredLeaseIsReboundAtT2(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool, _ := w.leftOne()
		w.server.down()
		w.acquire(pool, ep(2, "web"))
		time.Sleep(51*time.Minute + 20*time.Second) // T2 is at 52m30s
		w.server.mu.Lock()
		for _, what := range w.server.seen {
			if strings.Contains(what, "rebind") || strings.Contains(what, "renew") {
				t.Errorf("the server saw %s", what)
			}
		}
		w.server.mu.Unlock()
		w.holds("192.0.2.10 renewing")
		w.server.forget()
		time.Sleep(2 * time.Minute)
		w.holds("192.0.2.10 rebinding")
		w.server.mu.Lock()
		if len(w.server.seen) == 0 {
			t.Error("nobody is asked")
		}
		for _, what := range w.server.seen {
			at, err := time.ParseDuration(strings.Fields(what)[0])
			if err != nil || at >= 52*time.Minute+30*time.Second != strings.Contains(what, "rebind") {
				t.Errorf("the server saw %s", what)
			}
		}
		w.server.mu.Unlock()
		w.server.up()
		time.Sleep(2 * time.Minute)
		w.holds("192.0.2.10 bound")
	})
}

// A binding whose lease ended while the daemon was down is no lease: lease 1h <
// down 2h. Nobody has the address, so nobody is given it without asking.
func TestPendingReleaseOfALeaseThatEnded(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool, left := w.leftOne()
		w.restart(2 * time.Hour)
		w.server.down()
		w.refused(pool, ep(2, "web"), lease.ErrNoAnswer.Error())
		w.server.up()
		w.server.forget()
		if l := w.acquire(pool, ep(2, "web")); l.Addr() != left.Addr() {
			t.Errorf("got %v", l.Addr())
		}
	})
}

// rm and run, or compose down and up: within the delay 1m > 10s + 5s + 40s, by
// the setting of the network that is gone, names find their addresses again.
func TestNetworkOfTheSameSubnet(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf("release_delay=1m")
		w.acquire(pool, ep(1, "left"))
		w.acquire(pool, ep(2, "web"))
		w.acquire(pool, ep(3, ""))
		w.server.forget()
		time.Sleep(10 * time.Second)
		w.works(w.manager.RemovePool(w.Context(), pool))
		w.server.saw(t, "10s release 192.0.2.12")
		w.holds("192.0.2.10 releasing", "192.0.2.11 releasing")
		if len(w.store.pools) != 0 || len(w.store.leases) != 0 {
			t.Errorf("stored are %v, %v", w.store.pools, w.store.leases)
		}
		w.restart(5 * time.Second)
		// Made anew within the delay, as compose does; 5s + 40s < 1m.
		time.Sleep(40 * time.Second)
		again := w.networkOf()
		if l := w.acquire(again, ep(4, "web")); l.Addr() != addr("192.0.2.11") || l.Pool != again {
			t.Errorf("got %+v", l)
		}
		if l := w.acquire(again, ep(3, "")); l.Addr() != addr("192.0.2.12") {
			t.Errorf("got %+v", l)
		}
		time.Sleep(5 * time.Minute)
		w.server.saw(t, "55s confirm 192.0.2.11", "55s acquire 02:00:00:00:00:03 192.0.2.12", "1m15s release 192.0.2.10")
	})
}

// --mac-address: on engines that tell no names an address follows the MAC. The
// release isn't delayed.
func TestMACIsTheIdentity(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		l := w.acquire(pool, ep(1, ""))
		w.has(l, byMACAddress(mac(1)))
		w.acquire(pool, ep(2, ""))
		w.server.forget()
		w.release(pool, l)
		w.server.saw(t, "0s release 192.0.2.10")
		w.holds("192.0.2.11 bound")
		w.acquire(pool, ep(3, "")) // has .10 now, as servers prefer not to
		w.release(pool, w.acquire(pool, wants(1, "", "192.0.2.77")))
		w.server.forget()
		if l := w.acquire(pool, ep(1, "")); l.Addr() != addr("192.0.2.77") {
			t.Errorf("got %v, want the last one of its own", l.Addr())
		}
		w.server.saw(t, "0s acquire 02:00:00:00:00:01 192.0.2.77")
	})
}

func TestNoReleaseDelay(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool, _ := w.leftOne("release_delay=0s")
		w.server.saw(t, "1m0s release 192.0.2.10")
		w.holds()
		w.acquire(pool, ep(2, "web"))
		w.server.saw(t, "1m0s acquire 02:00:00:00:00:02 192.0.2.10")
	})
}

// The global delay 90s > 30s counts where the network has none, the one of now.
func TestGlobalReleaseDelay(t *testing.T) {
	inWorldOf(t, lease.Options{ReleaseDelay: new(90 * time.Second)}, func(w *world) {
		pool, _ := w.leftOne()
		w.release(pool, w.acquire(pool, ep(2, "db")))
		w.server.forget()
		time.Sleep(89 * time.Second)
		w.server.saw(t)
		w.global.ReleaseDelay = new(10 * time.Second)
		w.restart(0)
		time.Sleep(time.Minute)
		w.server.sawInAnyOrder(t, "2m39s release 192.0.2.10", "2m39s release 192.0.2.11")
	})
}

// docker rm old; docker run --ip X --name new, at once: 0s < the delay 30s.
func TestPendingReleaseInTheWay(t *testing.T) {
	for _, c := range []struct {
		name string
		ep   lease.Endpoint
		want []string
	}{
		{"address", wants(2, "new", "192.0.2.10"), []string{"1m0s release 192.0.2.10", "1m0s acquire 02:00:00:00:00:02 192.0.2.10"}},
		{"address, no name", wants(2, "", "192.0.2.10"), []string{"1m0s release 192.0.2.10", "1m0s acquire 02:00:00:00:00:02 192.0.2.10"}},
		{"MAC", ep(1, "new"), []string{"1m0s release 192.0.2.10", "1m0s acquire 02:00:00:00:00:01"}},
		{"MAC, no name", ep(1, ""), []string{"1m0s release 192.0.2.10", "1m0s acquire 02:00:00:00:00:01"}},
		{"neither", ep(2, "new"), []string{"1m0s acquire 02:00:00:00:00:02", "1m30s release 192.0.2.10"}},
		{"its own", wants(2, "web", "192.0.2.10"), []string{"1m0s confirm 192.0.2.10"}},
		{"its own MAC", ep(1, "web"), []string{"1m0s confirm 192.0.2.10"}},
		// Its server would offer the old address again and again.
		{"another one than its own", wants(2, "web", "192.0.2.50"), []string{"1m0s release 192.0.2.10", "1m0s acquire 02:00:00:00:00:02 192.0.2.50"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			inWorldOf(t, auto, func(w *world) {
				pool, _ := w.leftOne()
				l := w.acquire(pool, c.ep)
				if c.ep.Address.IsValid() && l.Addr() != c.ep.Address {
					t.Errorf("got %v", l.Addr())
				}
				time.Sleep(time.Minute)
				w.server.saw(t, c.want...)
				w.server.leased(t, l.Addr())
			})
		})
	}
}

// The same of another network of the subnet, and not of another subnet.
func TestPendingReleaseInTheWayOfAnotherNetwork(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		w.leftOne()
		w.server.onAcquire.set(w.server.from("198.18.0.10"))
		w.acquire(w.network("198.18.0.0/24", "198.51.100.1"), ep(1, "other"))
		w.server.up()
		w.server.saw(t, "1m0s acquire 02:00:00:00:00:01")
		w.acquire(w.networkOf("release_delay=1h"), wants(2, "new", "192.0.2.10"))
		w.server.saw(t, "1m0s release 192.0.2.10", "1m0s acquire 02:00:00:00:00:02 192.0.2.10")
	})
}

// The network is made anew, and the container's address isn't allowed in it, or
// it has other servers: then the old lease goes first.
func TestNetworkThatChanges(t *testing.T) {
	for _, c := range []struct {
		options string
		want    []string
	}{
		{"release_delay=1m", []string{"1m0s confirm 192.0.2.10"}},
		{"dhcp_server=198.51.100.2", []string{"1m0s release 192.0.2.10", "1m0s acquire 02:00:00:00:00:02 192.0.2.10"}},
		{"listen_addr=198.51.100.9", []string{"1m0s release 192.0.2.10", "1m0s acquire 02:00:00:00:00:02 192.0.2.10"}},
		{"dhcp_interface=eth1", []string{"1m0s release 192.0.2.10", "1m0s acquire 02:00:00:00:00:02 192.0.2.10"}},
	} {
		t.Run(c.options, func(t *testing.T) {
			inWorldOf(t, auto, func(w *world) {
				pool, _ := w.leftOne()
				w.works(w.manager.RemovePool(w.Context(), pool))
				w.acquire(w.networkOf(c.options), ep(2, "web"))
				w.server.saw(t, c.want...)
				w.server.leased(t, addr("192.0.2.10"))
			})
		})
	}
	t.Run("--ip-range", func(t *testing.T) {
		inWorldOf(t, auto, func(w *world) {
			w.leftOne()
			pool := w.pool("192.0.2.128/25")
			w.server.onAcquire.set(w.server.from("192.0.2.130"))
			w.acquire(pool, ep(2, "web"))
			w.server.saw(t, "1m0s release 192.0.2.10", "1m0s acquire 02:00:00:00:00:02")
		})
	})
}

// Two requests that want each other's addresses don't wait for each other.
func TestContainersThatSwapAddresses(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		a, b := w.acquire(pool, ep(1, "a")), w.acquire(pool, ep(2, "b"))
		w.release(pool, a)
		w.release(pool, b)
		w.store.before.set(func(string) error { time.Sleep(time.Millisecond); return nil })
		var wg sync.WaitGroup
		took := func(e lease.Endpoint) {
			l, err := w.manager.Acquire(w.Context(), pool, e)
			if err != nil || l.Addr() != e.Address {
				t.Errorf("%s got %v, %v", e.Name, l.Prefix, err)
			}
		}
		began := time.Now()
		wg.Go(func() { took(wants(3, "a", b.Addr().String())) })
		wg.Go(func() { took(wants(4, "b", a.Addr().String())) })
		wg.Wait()
		if took := time.Since(began); took > 100*time.Millisecond {
			t.Errorf("it took %v", took)
		}
		w.holds("192.0.2.10 bound", "192.0.2.11 bound")
	})
}

func TestReleaseByHandIsNotDelayed(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		w.acquire(pool, ep(1, "web"))
		w.acquire(pool, ep(2, "db"))
		w.release(pool, w.acquire(pool, ep(3, "left")))
		w.server.forget()
		w.holds("192.0.2.10 bound", "192.0.2.11 bound", "192.0.2.12 releasing")
		for _, key := range []string{"192.0.2.10", mac(3).String()} {
			_, err := w.manager.ReleaseByHand(w.Context(), key, pool)
			w.works(err)
		}
		w.server.saw(t, "0s release 192.0.2.10", "0s release 192.0.2.12")
		w.holds("192.0.2.11 bound")
		_, err := w.manager.ReleaseByHand(w.Context(), "192.0.2.12", "")
		w.fails(err, lease.ErrNoLease.Error())
		time.Sleep(time.Minute)
		w.server.saw(t)
		// They were released: what comes back asks anew.
		w.acquire(pool, ep(4, "left"))
		w.server.saw(t, "1m0s acquire 02:00:00:00:00:04 192.0.2.12")
	})
}

// The operator, the timer and a request that wants the address, all at once, at
// the delay 30s, while a commit takes 1s: the server hears of it once.
func TestPendingReleaseIsSentOnce(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool, _ := w.leftOne()
		w.store.before.set(func(string) error { time.Sleep(time.Second); return nil })
		time.Sleep(30 * time.Second)
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := w.manager.ReleaseByHand(w.Context(), "192.0.2.10", "")
			w.works(err)
		})
		wg.Go(func() { w.acquire(pool, wants(2, "new", "192.0.2.10")) })
		wg.Wait()
		w.server.saw(t, "1m31s release 192.0.2.10", "1m31s acquire 02:00:00:00:00:02 192.0.2.10")
	})
}

// The identity comes back at the very moment at which its release is due, and
// either of them takes its time: 400ms, 40 times within 8s around the delay 30s.
func TestComingBackAsTheReleaseIsDue(t *testing.T) {
	for _, slow := range []string{"store", "server"} {
		t.Run(slow, func(t *testing.T) {
			for step := range 40 {
				inWorldOf(t, auto, func(w *world) {
					pool, left := w.leftOne()
					if slow == "store" {
						w.store.before.set(func(string) error { time.Sleep(400 * time.Millisecond); return nil })
					} else {
						w.server.onConfirm.set(func(_ context.Context, l lease.Lease) (lease.Lease, error) {
							time.Sleep(400 * time.Millisecond)
							if w.server.holder(l.Addr()) != string(l.ClientID) {
								return lease.Lease{}, lease.ErrNAK
							}
							return w.server.extended(l), nil
						})
					}
					time.Sleep(30*time.Second + time.Duration(step-20)*200*time.Millisecond)
					l := w.acquire(pool, ep(2, "web"))
					time.Sleep(10 * time.Minute)
					if l.Addr() != left.Addr() || w.server.holder(l.Addr()) != string(l.ClientID) {
						t.Errorf("step %d: it has %v, the server's table is %q", step, l.Addr(), w.server.table)
					}
					w.server.leased(t, l.Addr())
					w.holds("192.0.2.10 bound")
					if len(w.store.bindings) != 0 {
						t.Errorf("step %d: still stored: %v", step, w.store.bindings)
					}
				})
			}
		})
	}
}

// holder is who has an address by the server's table.
func (s *dhcpServer) holder(a netip.Addr) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.table[a]
}

// A full disk: the release delay 30s, then once a minute.
func TestBindingThatCannotBeStored(t *testing.T) {
	t.Run("left", func(t *testing.T) {
		inWorldOf(t, auto, func(w *world) {
			pool := w.networkOf()
			l := w.acquire(pool, ep(1, "web"))
			w.server.forget()
			w.store.before.set(failing("DeleteLease"))
			w.fails(w.manager.Release(w.Context(), pool, l.Addr()), "192.0.2.10", errDiskFull.Error())
			time.Sleep(10 * time.Minute)
			w.server.saw(t)
			w.holds("192.0.2.10 bound")
		})
	})
	t.Run("released", func(t *testing.T) {
		inWorldOf(t, auto, func(w *world) {
			pool, _ := w.leftOne()
			w.store.before.set(failing("PutBinding"))
			time.Sleep(2 * time.Minute) // 30s + 1m < 2m < 30s + 2m
			w.server.saw(t)
			w.holds("192.0.2.10 releasing")
			w.logged(2, "pending release not sent", errDiskFull.Error())
			_, err := w.manager.ReleaseByHand(w.Context(), "192.0.2.10", "")
			w.fails(err, "192.0.2.10", errDiskFull.Error())
			w.refused(pool, wants(2, "new", "192.0.2.10"), "192.0.2.10", errDiskFull.Error())
			w.server.saw(t)
			w.store.before.set(nil)
			time.Sleep(time.Minute)
			w.server.saw(t, "3m30s release 192.0.2.10")
			w.holds()
		})
	})
	t.Run("back in time", func(t *testing.T) {
		inWorldOf(t, auto, func(w *world) {
			pool, _ := w.leftOne()
			w.store.before.set(failing("PutBinding"))
			time.Sleep(40 * time.Second)
			w.store.before.set(nil)
			w.acquire(pool, ep(2, "web"))
			time.Sleep(5 * time.Minute)
			w.server.saw(t, "1m40s confirm 192.0.2.10")
			w.holds("192.0.2.10 bound")
		})
	})
	t.Run("taken up again", func(t *testing.T) {
		inWorldOf(t, auto, func(w *world) {
			pool, _ := w.leftOne()
			time.Sleep(10 * time.Second)
			w.store.before.set(failing("PutLease"))
			w.refused(pool, ep(2, "web"), errDiskFull.Error())
			// As if it hadn't been asked for: pending, released in time.
			w.server.saw(t, "1m10s confirm 192.0.2.10")
			w.holds("192.0.2.10 releasing")
			w.store.before.set(nil)
			time.Sleep(time.Minute)
			w.server.saw(t, "1m30s release 192.0.2.10")
			w.server.leased(t)
			w.holds()
		})
	})
	t.Run("another address taken up", func(t *testing.T) {
		inWorldOf(t, auto, func(w *world) {
			pool, _ := w.leftOne()
			w.server.takes(addr("192.0.2.10"))
			w.store.before.set(failing("PutLease"))
			w.refused(pool, ep(2, "web"), errDiskFull.Error())
			w.server.saw(t, "1m0s confirm 192.0.2.10", "1m0s acquire 02:00:00:00:00:02", "1m0s release 192.0.2.11")
			w.store.before.set(nil)
			time.Sleep(time.Minute)
			w.server.leased(t, addr("192.0.2.10"))
			w.holds()
		})
	})
	t.Run("network removed", func(t *testing.T) {
		inWorldOf(t, auto, func(w *world) {
			pool := w.networkOf()
			w.acquire(pool, ep(1, "web"))
			w.server.forget()
			w.store.before.set(failing("DeletePool"))
			w.fails(w.manager.RemovePool(w.Context(), pool), errDiskFull.Error())
			time.Sleep(time.Minute)
			w.server.saw(t)
			w.holds("192.0.2.10 bound")
		})
	})
}

// The engine goes away while the lease that a container comes back to is stored:
// 1s, then the delay 30s anew.
func TestCallerGoneWhileItsContainerComesBack(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool, _ := w.leftOne()
		time.Sleep(20 * time.Second)
		ctx, cancel := context.WithCancel(w.Context())
		w.store.before.set(func(call string) error {
			if call == "PutLease" {
				cancel()
				time.Sleep(time.Second)
			}
			return nil
		})
		_, err := w.manager.Acquire(ctx, pool, ep(2, "web"))
		w.fails(err, context.Canceled.Error())
		w.holds("192.0.2.10 releasing")
		time.Sleep(time.Minute)
		w.server.saw(t, "1m20s confirm 192.0.2.10", "1m51s release 192.0.2.10")
		w.holds()
	})
}

// A lost lease has no release to wait with: lease 1h < outage 2h.
func TestLostLeaseLeaves(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		l := w.acquire(pool, ep(1, "web"))
		w.server.down()
		w.server.ends(l.Addr())
		time.Sleep(2 * time.Hour)
		w.holds("192.0.2.10 lost")
		w.server.forget()
		w.release(pool, l)
		w.holds()
		time.Sleep(time.Minute)
		w.server.up()
		w.server.saw(t, "2h0m0s release 192.0.2.10")
		w.acquire(pool, ep(2, "web"))
		w.server.saw(t, "2h1m0s acquire 02:00:00:00:00:02 192.0.2.10")
	})
}

// fill stores n bindings for each subnet, as if so many containers had left
// their address .200, one second apart, the last one a minute ago, and starts
// the daemon anew. The n-th has MAC filled(n).
func (w *world) fill(n int, subnets ...string) {
	w.Helper()
	pool := w.networkOf()
	w.release(pool, w.acquire(pool, ep(1, "")))
	w.manager.Close()
	var like lease.Binding
	for _, b := range w.store.bindings {
		like = b
	}
	clear(w.store.bindings)
	now := time.Now()
	for _, subnet := range subnets {
		of := netip.MustParsePrefix(subnet)
		a := of.Addr().As4()
		a[3] = 200
		for i := range n {
			b := like
			b.Lease.MAC = filled(i)
			b.Lease.ClientID = lease.MACClientID(b.Lease.MAC)
			b.Lease.Prefix = netip.PrefixFrom(netip.AddrFrom4(a), of.Bits())
			b.Left = now.Add(-time.Minute - time.Duration(n-i)*time.Second)
			w.store.bindings[b.Key()] = b
		}
	}
	w.start()
	w.server.forget()
}

func filled(n int) lease.MAC { return lease.MAC{2, 1, 0, 0, byte(n >> 8), byte(n)} }

// ages are those of the stored bindings of a subnet, rising, in seconds.
func (w *world) ages(subnet string) (ages []int) {
	synctest.Wait()
	w.store.mu.Lock()
	defer w.store.mu.Unlock()
	for key, b := range w.store.bindings {
		if key.Subnet == subnet {
			ages = append(ages, int(time.Since(b.Left).Seconds()))
		}
	}
	slices.Sort(ages)
	return ages
}

// 10,000 a subnet: the oldest go, never one whose release is pending (for an
// hour, 1h > 1s).
func TestManyBindings(t *testing.T) {
	const most = 10_000
	inWorldOf(t, auto, func(w *world) {
		w.fill(most, "192.0.2.0/24", "198.18.0.0/24")
		pool := w.networkOf("release_delay=1h")
		if got := w.ages("192.0.2.0/24"); len(got) != most || got[most-1] != most+60 {
			t.Fatalf("%d bindings, the oldest of %vs", len(got), got[most-1])
		}
		w.release(pool, w.acquire(pool, ep(1, "pending")))
		time.Sleep(time.Second)
		for n := range 3 {
			w.release(pool, w.acquire(pool, ep(n+2, "")))
		}
		if got := w.ages("192.0.2.0/24"); len(got) != most || got[most-1] != most+60+1-4 || !slices.Equal(got[:4], []int{0, 0, 0, 1}) {
			t.Errorf("%d bindings, of %v to %vs", len(got), got[:4], got[most-1])
		}
		if got := w.ages("198.18.0.0/24"); len(got) != most {
			t.Errorf("%d bindings of the other subnet", len(got))
		}
		w.holds("192.0.2.10 releasing")
		// Memory has the same ones.
		w.server.forget()
		w.acquire(pool, lease.Endpoint{MAC: filled(3)})
		w.acquire(pool, lease.Endpoint{MAC: filled(4)})
		w.server.saw(t, "1s acquire 02:01:00:00:00:03", "1s acquire 02:01:00:00:00:04 192.0.2.200")
	})
}

// A pending release, of an hour, is the oldest of 10,000, and stays.
func TestPendingReleaseIsTheOldest(t *testing.T) {
	const most = 10_000
	inWorldOf(t, auto, func(w *world) {
		w.fill(most, "192.0.2.0/24")
		w.manager.Close()
		var oldest lease.BindingKey
		for key, b := range w.store.bindings {
			if b.Lease.MAC == filled(0) {
				b.Released, b.Options.ReleaseDelay = false, new(time.Hour)
				w.store.bindings[key], oldest = b, key
			}
		}
		w.start()
		pool := w.networkOf()
		for n := range 3 {
			w.release(pool, w.acquire(pool, ep(n+2, "")))
		}
		if got := w.ages("192.0.2.0/24"); len(got) != most || got[most-1] != most+60 || got[most-2] != most+60-4 {
			t.Errorf("%d bindings, the oldest of %vs and %vs", len(got), got[most-1], got[most-2])
		}
		if _, there := w.store.bindings[oldest]; !there {
			t.Error("a pending release was forgotten")
		}
		w.holds("192.0.2.200 releasing")
	})
}

// 30 days: what is older goes at the start, what becomes older as soon as
// another container leaves.
func TestOldBindings(t *testing.T) {
	const day = 24 * time.Hour
	inWorldOf(t, auto, func(w *world) {
		w.fill(4, "192.0.2.0/24")
		w.manager.Close()
		var keys []lease.BindingKey
		for key := range w.store.bindings {
			keys = append(keys, key)
		}
		slices.SortFunc(keys, func(a, b lease.BindingKey) int { return strings.Compare(a.ClientID, b.ClientID) })
		now := time.Now()
		for i, left := range []time.Duration{30*day + time.Minute, 30*day - time.Minute, 40 * day, day} {
			b := w.store.bindings[keys[i]]
			b.Left, b.Released = now.Add(-left), i != 2
			w.store.bindings[keys[i]] = b
		}
		w.start()
		if got := w.ages("192.0.2.0/24"); len(got) != 3 {
			t.Fatalf("%v seconds old", got)
		}
		w.holds("192.0.2.200 releasing")
		time.Sleep(2 * time.Minute) // > the delay 30s
		w.server.saw(t, "30s release 192.0.2.200")
		pool := w.networkOf()
		w.release(pool, w.acquire(pool, ep(9, "")))
		if got := w.ages("192.0.2.0/24"); len(got) != 2 || got[1] != int((day+2*time.Minute).Seconds()) {
			t.Errorf("%v seconds old", got)
		}
	})
}

// A full disk is no reason not to renew leases.
func TestBindingsThatCannotBePruned(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		w.fill(1, "192.0.2.0/24")
		w.acquire(w.networkOf(), ep(1, "web"))
		w.manager.Close()
		for key, b := range w.store.bindings {
			b.Left = time.Now().Add(-31 * 24 * time.Hour)
			w.store.bindings[key] = b
		}
		w.store.before.set(failing("DropBinding"))
		w.start()
		w.logged(1, "level=WARN", "too old", errDiskFull.Error())
		w.holds("192.0.2.10 bound")
		if len(w.store.bindings) != 1 {
			t.Errorf("stored are %v", w.store.bindings)
		}
		w.store.before.set(nil)
		w.restart(time.Second)
		if len(w.store.bindings) != 0 {
			t.Errorf("still stored are %v", w.store.bindings)
		}
	})
}

// docker restart of many at once: each has its own address back, in one round
// trip, and none is released. Down 1s < 30s.
func TestAllRestartAtOnce(t *testing.T) {
	const all = 100
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		before := map[string]netip.Addr{}
		for n := range all {
			name := fmt.Sprint("c", n)
			before[name] = w.acquire(pool, ep(n+1, name)).Addr()
		}
		var wg sync.WaitGroup
		for _, a := range before {
			wg.Go(func() { w.works(w.manager.Release(w.Context(), pool, a)) })
		}
		wg.Wait()
		time.Sleep(time.Second)
		w.server.forget()
		n := all
		for name, a := range before {
			n++
			m := n
			wg.Go(func() {
				l, err := w.manager.Acquire(w.Context(), pool, ep(m, name))
				if err != nil || l.Addr() != a {
					t.Errorf("%s has %v, had %v: %v", name, l.Prefix, a, err)
				}
			})
		}
		wg.Wait()
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := len(w.server.seen); n != all {
			t.Errorf("the server saw %d messages", n)
		}
		for _, seen := range w.server.seen {
			if !strings.Contains(seen, " confirm ") {
				t.Errorf("the server saw %s", seen)
			}
		}
		w.server.forget()
	})
}

// crowdLeft is a network whose n containers all left at once, and a store that
// takes a second to note that a release was sent: half a second after they are
// due, the first 64 are being sent, the others wait.
func (w *world) crowdLeft(n int) (pool string) {
	w.Helper()
	pool = w.networkOf()
	var all []lease.Lease
	for i := range n {
		all = append(all, w.acquire(pool, ep(i+1, fmt.Sprint("c", i))))
	}
	for _, l := range all {
		w.release(pool, l)
	}
	w.server.forget()
	w.store.before.set(func(string) error { time.Sleep(time.Second); return nil })
	time.Sleep(30*time.Second + 500*time.Millisecond)
	return pool
}

// sent counts the server's messages of a kind, and that none came twice.
func (w *world) sent(kind string) (n int) {
	w.Helper()
	w.server.mu.Lock()
	defer w.server.mu.Unlock()
	known := map[string]bool{}
	for _, seen := range w.server.seen {
		if _, who, is := strings.Cut(seen, " "+kind+" "); is {
			if n++; known[who] {
				w.Errorf("%s of %s came twice", kind, who)
			}
			known[who] = true
		}
	}
	return n
}

// Releases that wait for others lose nobody a lease: who comes back still has it.
func TestComingBackInACrowd(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		const all = 200
		pool := w.crowdLeft(all)
		var wg sync.WaitGroup
		for n := range all {
			wg.Go(func() { w.acquire(pool, ep(1000+n, fmt.Sprint("c", n))) })
		}
		wg.Wait()
		if kept, released := w.sent("confirm"), w.sent("release"); kept != all-64 || released != 64 {
			t.Errorf("%d were confirmed, %d released", kept, released)
		}
		w.server.forget()
	})
}

// The daemon's end waits for those that are being sent; the others are still
// pending afterwards.
func TestEndInACrowd(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		const all = 200
		w.crowdLeft(all)
		w.manager.Close()
		if n := w.sent("release"); n != 64 {
			t.Errorf("%d releases were sent", n)
		}
		w.start()
		if n := len(w.manager.Leases()); n != all-64 {
			t.Errorf("%d are pending", n)
		}
		time.Sleep(time.Minute)
		if n := w.sent("release"); n != all {
			t.Errorf("%d releases were sent", n)
		}
		w.holds()
		w.server.forget()
	})
}
