package lease_test

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

func TestRenewalAtT1(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		_, err := w.manager.Reconcile(w.Context(), lease.Inventory{Networks: []lease.Network{{
			Subnet: "192.0.2.0/24", Attachments: []lease.Attachment{{Container: "c1", Name: "web", MAC: mac(1), Prefix: netip.MustParsePrefix("192.0.2.10/24")}},
		}}}, false)
		w.works(err)
		w.server.onExtend.set(func(_ context.Context, l lease.Lease) (lease.Lease, error) {
			return w.server.lease(lease.Request{MAC: l.MAC, ClientID: l.ClientID}, l.Addr()), nil
		})
		time.Sleep(100 * time.Minute)
		w.server.saw(t, "0s acquire 02:00:00:00:00:01", "30m0s renew 192.0.2.10", "1h0m0s renew 192.0.2.10", "1h30m0s renew 192.0.2.10")
		w.holds("192.0.2.10 bound")
		// Each renewal is on disk, with what no server knows: names, host and the
		// pool's prefix length.
		w.agree()
		if l := w.manager.Leases()[0]; l.Name != "web" || l.Host == "" || l.Container != "c1" || l.Pool != pool || l.Prefix.Bits() != 24 || !l.Expires.Equal(w.server.began.Add(150*time.Minute)) {
			t.Errorf("renewed to %+v", l)
		}
	})
}

// The whole life of RFC 2131 section 4.4.5 at a server that went away: renew
// from T1, rebind from T2, each after half of what is left but 60 s at the
// least, and never past the state's end; then the same address is asked for
// anew, of the leasing server for a second and then of all, until the server is
// back. T1 < T2 < lease < outage.
func TestServerGoesAwayAndComesBack(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
		w.server.down()

		time.Sleep(52 * time.Minute)
		w.holds("192.0.2.10 renewing")
		w.server.saw(t, "30m0s renew 192.0.2.10", "41m15s renew 192.0.2.10", "46m52.5s renew 192.0.2.10", "49m41.25s renew 192.0.2.10", "51m5.625s renew 192.0.2.10")
		time.Sleep(7 * time.Minute)
		w.holds("192.0.2.10 rebinding")
		w.server.saw(t, "52m5.625s renew 192.0.2.10", "52m30s rebind 192.0.2.10", "56m15s rebind 192.0.2.10", "58m7.5s rebind 192.0.2.10")
		time.Sleep(3*time.Minute + 30*time.Second)
		w.holds("192.0.2.10 lost")
		w.server.saw(t, "59m7.5s rebind 192.0.2.10",
			"1h0m0s confirm 192.0.2.10", "1h0m1s acquire 02:00:00:00:00:01 192.0.2.10",
			"1h1m0s confirm 192.0.2.10", "1h1m1s acquire 02:00:00:00:00:01 192.0.2.10",
			"1h2m0s confirm 192.0.2.10", "1h2m1s acquire 02:00:00:00:00:01 192.0.2.10")
		if !strings.Contains(w.log.String(), "lease lost") {
			t.Error("the loss isn't in the log")
		}

		// It has ended the lease, too.
		w.server.up()
		w.server.ends(addr("192.0.2.10"))
		time.Sleep(time.Minute)
		w.holds("192.0.2.10 bound")
		w.server.saw(t, "1h3m0s confirm 192.0.2.10", "1h3m1s acquire 02:00:00:00:00:01 192.0.2.10")
		w.agree()
		if l := w.manager.Leases()[0]; l.Prefix.Bits() != 24 || l.Pool != pool {
			t.Errorf("regained as %+v", l)
		}
		time.Sleep(30 * time.Minute)
		w.server.saw(t, "1h33m1s renew 192.0.2.10")
	})
}

func TestAnswerWhileRebinding(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.server.onExtend.set(silent)
		time.Sleep(52*time.Minute + 29*time.Second)
		w.server.onExtend.set(func(_ context.Context, l lease.Lease) (lease.Lease, error) {
			time.Sleep(10 * time.Second)
			l = w.server.extended(l)
			l.Server = addr("198.51.100.2") // its partner
			return l, nil
		})
		time.Sleep(12 * time.Second)
		w.holds("192.0.2.10 bound")
		if l := w.manager.Leases()[0]; l.Server != addr("198.51.100.2") {
			t.Errorf("the lease is by %v", l.Server)
		}
		w.agree()
	})
}

func TestInfiniteLeaseIsNeverRenewed(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.server.length.set(0)
		w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
		time.Sleep(3 * 7 * 24 * time.Hour)
		w.restart(200 * 365 * 24 * time.Hour)
		time.Sleep(7 * 24 * time.Hour)
		w.holds("192.0.2.10 bound")
		w.server.saw(t)
		w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.10")))
		w.server.leased(t)
	})
}

func TestLeaseThatBecomesInfinite(t *testing.T) {
	inWorld(t, func(w *world) {
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		w.server.length.set(0)
		time.Sleep(24 * time.Hour)
		w.server.saw(t, "0s acquire 02:00:00:00:00:01", "30m0s renew 192.0.2.10")
		w.holds("192.0.2.10 bound")
	})
}

func TestLeaseOfOneSecond(t *testing.T) {
	inWorld(t, func(w *world) {
		w.server.length.set(time.Second)
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
		time.Sleep(1600 * time.Millisecond)
		w.server.saw(t, "500ms renew 192.0.2.10", "1s renew 192.0.2.10", "1.5s renew 192.0.2.10")
		w.holds("192.0.2.10 bound")
	})
}

// T1 5s < T2 8.75s < lease 10s < outage. The RFC's 60 s would skip both states.
func TestLeaseOfTenSeconds(t *testing.T) {
	inWorld(t, func(w *world) {
		w.server.length.set(10 * time.Second)
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		time.Sleep(12 * time.Second)
		w.server.saw(t, "0s acquire 02:00:00:00:00:01", "5s renew 192.0.2.10", "10s renew 192.0.2.10")
		w.server.down()
		time.Sleep(20 * time.Second)
		w.holds("192.0.2.10 lost")
		w.server.saw(t, "15s renew 192.0.2.10", "16.875s renew 192.0.2.10", "17.875s renew 192.0.2.10",
			"18.75s rebind 192.0.2.10", "19.75s rebind 192.0.2.10",
			"20s confirm 192.0.2.10", "21s acquire 02:00:00:00:00:01 192.0.2.10")
		w.server.up()
		time.Sleep(50 * time.Second)
		w.holds("192.0.2.10 bound")
		w.server.saw(t, "1m20s confirm 192.0.2.10")
	})
}

// What the last ACK says counts: T1 is half of 1h, then of 10m, then of 24h.
func TestLeaseLengthChangesAtRenewal(t *testing.T) {
	inWorld(t, func(w *world) {
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		w.server.length.set(10 * time.Minute)
		time.Sleep(36 * time.Minute)
		w.server.saw(t, "0s acquire 02:00:00:00:00:01", "30m0s renew 192.0.2.10", "35m0s renew 192.0.2.10")
		w.holds("192.0.2.10 bound")
		w.agree()
		w.server.length.set(24 * time.Hour)
		time.Sleep(24 * time.Hour)
		w.server.saw(t, "40m0s renew 192.0.2.10", "12h40m0s renew 192.0.2.10")
		w.holds("192.0.2.10 bound")
		w.agree()
		// Its end is the shorter lease's, should the server fall silent.
		w.server.length.set(10 * time.Minute)
		time.Sleep(30 * time.Minute)
		w.server.saw(t, "24h40m0s renew 192.0.2.10", "24h45m0s renew 192.0.2.10", "24h50m0s renew 192.0.2.10", "24h55m0s renew 192.0.2.10", "25h0m0s renew 192.0.2.10", "25h5m0s renew 192.0.2.10")
		w.server.down()
		time.Sleep(9 * time.Minute)
		w.holds("192.0.2.10 lost")
	})
}

// Who acknowledged last is the leasing server, renewed at T1 30m < lease 1h.
func TestNewServerAtRenewal(t *testing.T) {
	inWorld(t, func(w *world) {
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		var asked []string
		w.server.onExtend.set(func(_ context.Context, l lease.Lease) (lease.Lease, error) {
			asked = append(asked, l.Server.String()+" "+l.Via.String())
			l = w.server.extended(l)
			l.Server = l.Server.Next()
			l.Via = netip.AddrPortFrom(l.Server, 67)
			return l, nil
		})
		time.Sleep(61 * time.Minute)
		w.restart(time.Minute)
		time.Sleep(30 * time.Minute)
		synctest.Wait()
		want := []string{"198.51.100.1 198.51.100.1:67", "198.51.100.2 198.51.100.2:67", "198.51.100.3 198.51.100.3:67"}
		if !slices.Equal(asked, want) {
			t.Errorf("asked were %q, want %q", asked, want)
		}
		if l := w.manager.Leases()[0]; l.Server != addr("198.51.100.4") {
			t.Errorf("the lease is by %v", l.Server)
		}
	})
}

// The rules of RFC 2131 section 4.4.5 as the server sees them, for leases of any
// length and T1 <= T2 <= lease < outage, with a restart somewhere.
func TestAttemptsOnRandomLeases(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	for range 100 {
		length := time.Duration(math.Exp(r.Float64()*math.Log(12*3600))) * time.Second
		t1, t2 := time.Duration(r.Int64N(int64(length)+1)), time.Duration(r.Int64N(int64(length)+1))
		t1, t2 = min(t1, t2), max(t1, t2)
		stop, down := time.Duration(r.Int64N(int64(2*length))), time.Duration(r.Int64N(int64(length)))
		inWorld(t, func(w *world) {
			pool := w.pool()
			w.server.onAcquire.set(func(_ context.Context, q lease.Request) (lease.Lease, error) {
				l, err := w.server.grant(q)
				l.Renew, l.Rebind, l.Expires = l.Obtained.Add(t1), l.Obtained.Add(t2), l.Obtained.Add(length)
				return l, err
			})
			w.acquire(pool, lease.Endpoint{MAC: mac(1)})
			w.server.forget()
			w.server.down()
			time.Sleep(stop)
			w.restart(down)
			time.Sleep(max(0, length-stop-down) + 3*time.Minute)
			synctest.Wait()
			w.server.mu.Lock()
			seen := w.server.seen
			w.server.mu.Unlock()

			state := func(at time.Duration) (kind string, begin, end time.Duration) {
				switch {
				case at < t1:
					return "nothing", 0, t1
				case at < t2:
					return "renew", t1, t2
				case at < length:
					return "rebind", t2, length
				}
				return "confirm", length, math.MaxInt64
			}
			running := func(at time.Duration) bool { return at < stop || at >= stop+down }
			first := map[string]time.Duration{}
			last := time.Duration(-1)
			for _, what := range seen {
				fields := strings.Fields(what)
				at, _ := time.ParseDuration(fields[0])
				kind, _, end := state(at)
				if fields[1] == "acquire" { // the second half of a regain
					if kind != "confirm" || at-last != time.Second {
						t.Errorf("%s, the last was at %v", what, last)
					}
					continue
				}
				if fields[1] != kind {
					t.Errorf("%s, where %s is due", what, kind)
				}
				if _, known := first[kind]; !known {
					first[kind] = at
				}
				// Half of what was left then, not under the floor, nor past the
				// state's end.
				if was, begin, over := state(last); last >= 0 && !(last < stop && at >= stop) {
					floor := time.Minute
					if over-begin < floor {
						floor = time.Second
					}
					want := min(last+max((over-last)/2, floor), over)
					if was == "confirm" {
						want = last + time.Minute
					}
					if at != want {
						t.Errorf("%s after one at %v, want it at %v, %s lasts until %v", what, last, want, was, end)
					}
				}
				last = at
			}
			// None is skipped, and none begins late.
			for kind, begin := range map[string]time.Duration{"renew": t1, "rebind": t2, "confirm": length} {
				_, _, end := state(begin)
				if is, _, _ := state(begin); is != kind {
					continue // it is empty
				}
				due := begin
				if !running(due) {
					due = stop + down
				}
				if at, known := first[kind]; due < end && (!known || at != due) {
					t.Errorf("%s first at %v (%t), want it at %v", kind, at, known, due)
				}
			}
			if t.Failed() {
				t.Fatalf("seed %d: lease %v, T1 %v, T2 %v, stopped at %v for %v; the server saw\n\t%s", seed, length, t1, t2, stop, down, strings.Join(seen, "\n\t"))
			}
		})
	}
}

func TestNAK(t *testing.T) {
	inWorld(t, func(w *world) {
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
		w.server.onExtend.set(func(context.Context, lease.Lease) (lease.Lease, error) {
			time.Sleep(5 * time.Second)
			return lease.Lease{}, lease.ErrNAK
		})
		w.server.onAcquire.set(silentAcquire)
		w.server.onConfirm.set(func(context.Context, lease.Lease) (lease.Lease, error) { return lease.Lease{}, lease.ErrNAK })
		time.Sleep(30*time.Minute + 5500*time.Millisecond)
		// Over at once, on disk too, and not in a tight loop.
		w.holds("192.0.2.10 lost")
		w.agree()
		w.server.saw(t, "30m0s renew 192.0.2.10")
		time.Sleep(time.Minute)
		w.server.saw(t, "30m6s confirm 192.0.2.10", "30m6s acquire 02:00:00:00:00:01 192.0.2.10")
		w.server.onAcquire.set(nil)
		time.Sleep(time.Minute)
		w.server.saw(t, "31m6s confirm 192.0.2.10", "31m6s acquire 02:00:00:00:00:01 192.0.2.10")
		w.holds("192.0.2.10 bound")
	})
}

func TestNAKWhileRegaining(t *testing.T) {
	inWorld(t, func(w *world) {
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		w.expire()
		w.server.onConfirm.set(func(context.Context, lease.Lease) (lease.Lease, error) { return lease.Lease{}, lease.ErrNAK })
		w.server.onAcquire.set(func(context.Context, lease.Request) (lease.Lease, error) { return lease.Lease{}, lease.ErrNAK })
		time.Sleep(2*time.Minute + 30*time.Second)
		w.server.saw(t, "1h1m0s confirm 192.0.2.10", "1h1m0s acquire 02:00:00:00:00:01 192.0.2.10",
			"1h2m0s confirm 192.0.2.10", "1h2m0s acquire 02:00:00:00:00:01 192.0.2.10")
	})
}

// A container can't be told of another address: it goes back, and its own is
// asked for at the pace of an expired lease.
func TestOtherAddressAtRenewal(t *testing.T) {
	inWorld(t, func(w *world) {
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
		w.server.onExtend.set(func(_ context.Context, l lease.Lease) (lease.Lease, error) {
			return w.server.lease(lease.Request{MAC: l.MAC}, addr("192.0.2.77")), nil
		})
		w.server.ends(addr("192.0.2.10"))
		w.server.onAcquire.set(silentAcquire)
		time.Sleep(31*time.Minute + 30*time.Second)
		w.holds("192.0.2.10 lost")
		w.agree()
		w.server.saw(t, "30m0s renew 192.0.2.10", "30m0s release 192.0.2.77",
			"30m1s confirm 192.0.2.10", "30m2s acquire 02:00:00:00:00:01 192.0.2.10",
			"31m1s confirm 192.0.2.10", "31m2s acquire 02:00:00:00:00:01 192.0.2.10")
	})
}

func TestRegainTakesNoOtherAddress(t *testing.T) {
	inWorld(t, func(w *world) {
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		w.expire()
		w.server.takes(addr("192.0.2.10"))
		time.Sleep(time.Minute)
		w.server.saw(t, "1h1m0s confirm 192.0.2.10", "1h1m0s acquire 02:00:00:00:00:01 192.0.2.10")
		w.server.leased(t, addr("192.0.2.10"))
		w.holds("192.0.2.10 lost")
		if r := w.server.lastRequest(); !slices.Equal(r.ClientID, []byte{1, 2, 0, 0, 0, 0, 1}) {
			t.Errorf("regained as %x", r.ClientID)
		}
	})
}

func TestRenewalThatCannotBeStored(t *testing.T) {
	inWorld(t, func(w *world) {
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		w.store.before.set(failing("PutLease"))
		time.Sleep(31 * time.Minute)
		w.holds("192.0.2.10 bound")
		if !strings.Contains(w.log.String(), "not stored") {
			t.Error("not a word of it in the log")
		}
		w.store.before.set(nil)
		time.Sleep(30 * time.Minute) // the next one stores it
		w.agree()
	})
}

// While a server is silent a renewal hangs for hours; nobody waits for it.
func TestReleaseDuringAHangingRenewal(t *testing.T) {
	for state, at := range map[string]time.Duration{"renewing": 31 * time.Minute, "rebinding": 53 * time.Minute, "lost": 60*time.Minute + 10*time.Second} {
		t.Run(state, func(t *testing.T) {
			inWorld(t, func(w *world) {
				pool := w.pool()
				l := w.acquire(pool, lease.Endpoint{MAC: mac(1)})
				w.server.down()
				time.Sleep(at)
				w.holds("192.0.2.10 " + state)
				w.server.forget()
				began := time.Now()
				w.works(w.manager.Release(w.Context(), pool, l.Addr()))
				if took := time.Since(began); took != 0 {
					t.Errorf("the release took %v", took)
				}
				w.holds()
				time.Sleep(24 * time.Hour)
				w.server.saw(t, at.String()+" release 192.0.2.10") // and nothing after it
			})
		})
	}
}

func TestAcquireDuringAHangingRenewal(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
		w.server.onExtend.set(silent)
		time.Sleep(31 * time.Minute)
		began := time.Now()
		w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		if took := time.Since(began); took != 0 {
			t.Errorf("it took %v", took)
		}
		// The renewal is taken up again soon.
		w.server.onExtend.set(nil)
		time.Sleep(2 * time.Second)
		w.server.saw(t, "30m0s renew 192.0.2.10", "31m1s renew 192.0.2.10")
		w.holds("192.0.2.10 bound")
	})
}

// A refused request must not cost the lease its keeper, whenever it comes.
func TestRefusalsLeaveTheKeeperAlone(t *testing.T) {
	for name, refuse := range map[string]func(w *world, pool string){
		"duplicate name": func(w *world, pool string) {
			w.refused(pool, lease.Endpoint{MAC: mac(1), Name: "db"}, "web")
		},
		"--ip outside": func(w *world, pool string) {
			w.refused(pool, lease.Endpoint{MAC: mac(1), Name: "web", Address: addr("198.51.100.1")}, "outside")
		},
		"release not stored": func(w *world, pool string) {
			w.store.before.set(failing("DeleteLease", "DeletePool"))
			defer func() { w.store.before.set(nil) }()
			w.fails(w.manager.Release(w.Context(), pool, addr("192.0.2.10")), errDiskFull.Error())
			w.fails(w.manager.RemovePool(w.Context(), pool), errDiskFull.Error())
		},
		"caller gone": func(w *world, pool string) {
			ctx, cancel := context.WithCancel(w.Context())
			cancel()
			_, _ = w.manager.Acquire(ctx, pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				pool := w.pool()
				w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
				// At T1 itself, where the timer and the request race, and
				// shortly after it, with the renewal on its way.
				w.server.onExtend.set(func(ctx context.Context, l lease.Lease) (lease.Lease, error) {
					select {
					case <-time.After(10 * time.Millisecond):
						return w.server.extended(l), nil
					case <-ctx.Done():
						return silent(ctx, l)
					}
				})
				time.Sleep(30 * time.Minute)
				refuse(w, pool)
				time.Sleep(5 * time.Millisecond)
				refuse(w, pool)
				time.Sleep(5 * time.Second)
				w.holds("192.0.2.10 bound")
				if l := w.manager.Leases()[0]; !l.Obtained.After(w.server.began) {
					t.Error("not renewed")
				}
				time.Sleep(time.Hour)
				w.holds("192.0.2.10 bound")
			})
		})
	}
}

// A renewal that succeeds in the moment of its interruption counts.
func TestRenewalThatEndsWithItsInterruption(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
		given := addr("192.0.2.10")
		w.server.onExtend.set(func(ctx context.Context, l lease.Lease) (lease.Lease, error) {
			<-ctx.Done() // the answer lies in the socket's buffer
			return w.server.lease(lease.Request{MAC: l.MAC, ClientID: l.ClientID}, given), nil
		})
		time.Sleep(31 * time.Minute)
		w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		if l := w.manager.Leases()[0]; !l.Obtained.After(w.server.began) {
			t.Error("the answer was dropped")
		}
		w.agree()
		w.server.saw(t, "30m0s renew 192.0.2.10")

		// Also when it must go back.
		given = addr("192.0.2.77")
		time.Sleep(31 * time.Minute)
		w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.10")))
		w.holds()
		w.server.saw(t, "1h1m0s renew 192.0.2.10", "1h2m0s release 192.0.2.77", "1h2m0s release 192.0.2.10")
	})
}

// While its holder's attempt to regain it is on its way, an expired address is
// given to nobody else.
func TestGrantDuringARegain(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		w.expire()
		w.server.onAcquire.set(func(_ context.Context, r lease.Request) (lease.Lease, error) {
			if r.MAC == mac(1) {
				time.Sleep(10 * time.Second)
			}
			return w.server.grant(r)
		})
		time.Sleep(65 * time.Second)
		w.server.saw(t, "1h1m0s confirm 192.0.2.10", "1h1m1s acquire 02:00:00:00:00:01 192.0.2.10")
		w.refused(pool, lease.Endpoint{MAC: mac(2), Name: "db"}, "twice", "192.0.2.10", "web", mac(1).String())
		w.server.saw(t, "1h1m6s acquire 02:00:00:00:00:02", "1h1m6s decline 192.0.2.10")
		time.Sleep(10 * time.Second)
		w.holds("192.0.2.10 bound")
		w.agree()
		if l := w.manager.Leases()[0]; l.MAC != mac(1) {
			t.Errorf("held by %v", l.MAC)
		}
		w.server.leased(t, addr("192.0.2.10"))
	})
}

// Only what a container already uses is asked for as being in use.
func TestRegainIsOfAnAddressInUse(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		check := func(inUse bool, want string) {
			t.Helper()
			if r := w.server.lastRequest(); r.InUse != inUse || r.Address.IsValid() != (want != "") || want != "" && r.Address != addr(want) {
				t.Errorf("asked for %v, in use: %t; want %q, %t", r.Address, r.InUse, want, inUse)
			}
		}
		w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		check(false, "")
		w.acquire(pool, lease.Endpoint{MAC: mac(2), Address: addr("192.0.2.60")})
		check(false, "192.0.2.60")
		w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web", Address: addr("192.0.2.50")})
		check(false, "192.0.2.50")
		w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.60")))

		w.expire()
		w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"}) // starts anew
		check(false, "192.0.2.50")
		w.expire()
		check(true, "192.0.2.50")
		time.Sleep(time.Minute)
		w.holds("192.0.2.50 bound")
		check(true, "192.0.2.50")

		// After a NAK and after a restart too.
		w.server.takes(addr("192.0.2.50"))
		time.Sleep(31 * time.Minute)
		w.holds("192.0.2.50 lost")
		check(true, "192.0.2.50")
		w.acquire(pool, lease.Endpoint{MAC: mac(3)})
		check(false, "")
		w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.10")))
		w.restart(time.Hour)
		time.Sleep(time.Second)
		check(true, "192.0.2.50")
	})
}

// Close ends what hangs, and what the keepers were told is kept.
func TestClose(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		for n := range 20 {
			w.acquire(pool, lease.Endpoint{MAC: mac(n + 1)})
		}
		w.server.onExtend.set(silent)
		time.Sleep(35 * time.Minute)
		began := time.Now()
		w.manager.Close()
		if took := time.Since(began); took != 0 {
			t.Errorf("Close took %v", took)
		}
		w.server.forget()
		time.Sleep(time.Hour)
		w.server.saw(t) // neither renewed nor released
		w.agree()
		w.manager.Close() // is idempotent

		// A request that is in hand at the end may finish, without a keeper.
		w.server.onExtend.set(nil)
		w.acquire(pool, lease.Endpoint{MAC: mac(99)})
		w.server.saw(t, "1h35m0s acquire 02:00:00:00:00:63")
		time.Sleep(24 * time.Hour)
		w.server.saw(t)
	})
}

// Close waits for the keeper that is storing what it won.
func TestCloseWaitsForTheStore(t *testing.T) {
	inWorld(t, func(w *world) {
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		w.store.before.set(func(string) error { time.Sleep(time.Second); return nil })
		time.Sleep(30*time.Minute + time.Millisecond)
		w.manager.Close()
		if calls := w.store.calls; calls[len(calls)-1] != "PutLease" {
			t.Errorf("calls %q", calls)
		}
		w.agree()
	})
}

func TestManyLeasesRenewAtTheirOwnTimes(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		for n := range 200 {
			w.acquire(pool, lease.Endpoint{MAC: mac(n + 1)})
			time.Sleep(time.Second)
		}
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		w.agree()
		for _, l := range w.manager.Leases() {
			if l.State != lease.Bound.String() || time.Until(l.Expires) < 29*time.Minute {
				t.Errorf("%v is %v until %v", l.Addr(), l.State, l.Expires)
			}
		}
	})
}

var errDown = errors.New("network is unreachable")

// An error at once, as from a missing route, is no reason to hurry.
func TestErrorsAtOnceKeepTheTimetable(t *testing.T) {
	inWorld(t, func(w *world) {
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
		w.server.onExtend.set(func(context.Context, lease.Lease) (lease.Lease, error) { return lease.Lease{}, errDown })
		time.Sleep(42 * time.Minute)
		w.server.saw(t, "30m0s renew 192.0.2.10", "41m15s renew 192.0.2.10")
	})
}

// A keeper that waits for its turn while a request has it isn't doubled by the
// server's return: there is one attempt after the request, and the next a minute
// later. Lost at 1h; its next attempt 1h1m, heard 1h1m10s < request's end 1h1m25s.
func TestKeepersDoNotQueueUp(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.expire()
		w.server.onAcquire.set(func(ctx context.Context, r lease.Request) (lease.Lease, error) {
			if r.MAC == mac(1) {
				return silentAcquire(ctx, r)
			}
			return w.server.grant(r)
		})
		time.Sleep(54 * time.Second)
		w.server.forget()
		go func() { _, _ = w.manager.Acquire(w.Context(), pool, lease.Endpoint{MAC: mac(1)}) }()
		time.Sleep(15 * time.Second)
		w.acquire(pool, lease.Endpoint{MAC: mac(2), Address: addr("192.0.2.50")})
		time.Sleep(2 * time.Minute)
		w.server.saw(t, "1h0m55s confirm 192.0.2.10", "1h0m56s acquire 02:00:00:00:00:01 192.0.2.10",
			"1h1m10s acquire 02:00:00:00:00:02 192.0.2.50",
			"1h1m25s confirm 192.0.2.10", "1h1m26s acquire 02:00:00:00:00:01 192.0.2.10",
			"1h2m25s confirm 192.0.2.10", "1h2m26s acquire 02:00:00:00:00:01 192.0.2.10")
	})
}
