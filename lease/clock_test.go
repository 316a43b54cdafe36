package lease_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// A bubble's wall clock and monotonic clock are one: a wall clock that is set
// while the daemon runs can't be played here. One that was set before a start
// is a stored record with wrong times.

// sleeps suspends the machine: boot time goes on, the timers don't.
func (h *fakeHost) sleeps(d time.Duration) { h.slept.set(h.slept.get() + d) }

// Suspended for 2h > lease 1h: noticed within 5s, and asked for at once.
func TestSuspendBeyondTheLease(t *testing.T) {
	for name, c := range map[string]struct {
		server func(w *world)
		saw    []string
		holds  string
		errors int
	}{
		"the server still knows it": {func(*world) {}, []string{"10m5s confirm 192.0.2.10"}, "bound", 0},
		"the server has ended it": {
			func(w *world) { w.server.ends(addr("192.0.2.10")) },
			[]string{"10m5s confirm 192.0.2.10", "10m6s acquire 02:00:00:00:00:01 192.0.2.10"},
			"bound", 0,
		},
		"another has it": {
			func(w *world) { w.server.takes(addr("192.0.2.10")) },
			[]string{"10m5s confirm 192.0.2.10", "10m5s acquire 02:00:00:00:00:01 192.0.2.10"},
			"lost", 1,
		},
		"silence": {
			func(w *world) { w.server.down() },
			[]string{"10m5s confirm 192.0.2.10", "10m6s acquire 02:00:00:00:00:01 192.0.2.10"},
			"lost", 1,
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.acquire(w.pool(), lease.Endpoint{MAC: mac(1), Name: "web"})
				w.server.forget()
				time.Sleep(10*time.Minute + time.Second)
				w.holds("192.0.2.10 bound")
				w.host.sleeps(2 * time.Hour)
				c.server(w)
				w.holds("192.0.2.10 lost")
				time.Sleep(4*time.Second - 1)
				w.server.saw(t)
				time.Sleep(40 * time.Second)
				w.server.saw(t, c.saw...)
				w.holds("192.0.2.10 " + c.holds)
				w.agree()
				if lines := w.lines("level=ERROR", "lease lost", "name=web", "address=192.0.2.10"); len(lines) != c.errors {
					t.Errorf("said of its loss: %q", lines)
				}
				if lines := w.lines("machine was suspended", "slept=2h0m0s", "overdue=1"); len(lines) != 1 {
					t.Errorf("said of the suspend: %q", lines)
				}
			})
		})
	}
}

// A suspend within the lease only moves what is due: T1 30m < T2 52m30s < 1h.
func TestSuspendWithinTheLease(t *testing.T) {
	for slept, want := range map[time.Duration]string{
		50 * time.Millisecond: "30m0s renew 192.0.2.10", // too short to be one
		5 * time.Minute:       "25m0s renew 192.0.2.10",
		25 * time.Minute:      "10m5s renew 192.0.2.10",
		45 * time.Minute:      "10m5s rebind 192.0.2.10",
	} {
		t.Run(slept.String(), func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
				w.server.forget()
				time.Sleep(10*time.Minute + time.Second)
				w.host.sleeps(slept)
				time.Sleep(20 * time.Minute)
				w.server.saw(t, want)
				w.holds("192.0.2.10 bound")
				if n := len(w.lines("machine was suspended")); (n == 0) != (slept < time.Second) || n > 1 {
					t.Errorf("%d lines about it", n)
				}
			})
		})
	}
}

// Timers are set once per suspend, however many there are, and short ones add up.
func TestSuspendsAddUp(t *testing.T) {
	inWorld(t, func(w *world) {
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		w.server.forget()
		for range 100 { // 60 ms each, 6 s of 10 min
			time.Sleep(6 * time.Second)
			w.host.sleeps(60 * time.Millisecond)
		}
		w.host.sleeps(10 * time.Minute)
		time.Sleep(5 * time.Second)
		w.host.sleeps(4 * time.Minute)
		time.Sleep(16 * time.Minute)
		w.server.saw(t, "15m54s renew 192.0.2.10")
		time.Sleep(20 * time.Minute)
		w.server.saw(t, "45m54s renew 192.0.2.10")
	})
}

// Awake again, 100 leases are asked for 1 ms apart: 50m suspended < lease 1h.
func TestSuspendSpreadsWhatIsOverdue(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		for n := range 100 {
			w.acquire(pool, lease.Endpoint{MAC: mac(n + 1)})
		}
		w.server.forget()
		time.Sleep(time.Minute + time.Second)
		w.host.sleeps(50 * time.Minute)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if len(w.server.seen) != 100 {
			t.Errorf("%d attempts, want 100", len(w.server.seen))
		}
		for n, seen := range w.server.seen {
			if want := fmt.Sprintf("%v renew ", time.Minute+5*time.Second+time.Duration(n)*time.Millisecond); !strings.HasPrefix(seen, want) {
				t.Errorf("attempt %d: %s, want %s", n, seen, want)
			}
		}
		w.agree()
	})
}

// An attempt that waits for its answer, for 11m15s in this state, doesn't hold
// back what is due after a suspend: T1 30m < 31m + 1h suspended > lease 1h.
func TestSuspendDuringAnAttempt(t *testing.T) {
	inWorld(t, func(w *world) {
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		w.server.forget()
		w.server.onExtend.set(silent)
		time.Sleep(31 * time.Minute)
		w.server.saw(t, "30m0s renew 192.0.2.10")
		w.host.sleeps(time.Hour)
		time.Sleep(5 * time.Second)
		w.server.saw(t, "31m5s confirm 192.0.2.10")
		w.holds("192.0.2.10 bound")
		time.Sleep(30 * time.Minute)
		w.server.saw(t, "1h1m5s renew 192.0.2.10") // and nothing of the old attempt
	})
}

// What is suspended between a request and its answer is a part of the lease
// that is over: T1 30m - 10m suspended < lease 1h.
func TestSuspendWithinAnExchange(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		answered := func(l lease.Lease) lease.Lease {
			w.host.sleeps(10 * time.Minute)
			return l
		}
		w.server.onAcquire.set(func(_ context.Context, r lease.Request) (lease.Lease, error) {
			l, err := w.server.grant(r)
			return answered(l), err
		})
		began := time.Now()
		l := w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.server.onExtend.set(func(_ context.Context, l lease.Lease) (lease.Lease, error) {
			return answered(w.server.extended(l)), nil
		})
		time.Sleep(41 * time.Minute)
		w.server.saw(t, "0s acquire 02:00:00:00:00:01", "20m0s renew 192.0.2.10", "40m0s renew 192.0.2.10")
		w.holds("192.0.2.10 bound")
		w.agree()
		// The caller is told the times of this daemon's clock, 10m ahead.
		if !l.Obtained.Equal(began) || !l.Expires.Equal(began.Add(time.Hour)) {
			t.Errorf("obtained %v, until %v", l.Obtained, l.Expires)
		}
	})
}

func TestSuspendLeavesInfiniteLeasesAlone(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.server.length.set(0)
		w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.server.forget()
		w.host.sleeps(1000 * time.Hour)
		time.Sleep(time.Hour)
		w.holds("192.0.2.10 bound")
		w.server.saw(t)
	})
}

// rewrite changes what the store has of the only lease, as a wall clock that was
// wrong would have written it.
func (w *world) rewrite(change func(*lease.Lease)) {
	w.Helper()
	w.store.mu.Lock()
	defer w.store.mu.Unlock()
	if len(w.store.leases) != 1 {
		w.Fatalf("stored are %v", w.store.leases)
	}
	for key, l := range w.store.leases {
		change(&l)
		w.store.leases[key] = l
	}
}

// shifted moves all times of a lease on the wall clock.
func shifted(by time.Duration) func(*lease.Lease) {
	return func(l *lease.Lease) {
		l.Obtained = l.Obtained.Add(by)
		if !l.Infinite() {
			l.Renew, l.Rebind, l.Expires = l.Renew.Add(by), l.Rebind.Add(by), l.Expires.Add(by)
		}
	}
}

// reboots gives the machine another boot, ago in the past.
func (h *fakeHost) reboots(ago time.Duration) {
	h.bootID.set("another boot")
	h.began = time.Now().Add(-ago)
	h.slept.set(0)
}

// Within one boot the stored wall time counts for nothing. Down 10m < T1 30m <
// wrong by hours.
func TestClockSetWithinABoot(t *testing.T) {
	for _, by := range []time.Duration{-5 * time.Hour, -31 * time.Minute, 31 * time.Minute, 5 * time.Hour, 30 * 365 * 24 * time.Hour} {
		t.Run(by.String(), func(t *testing.T) {
			inWorld(t, func(w *world) {
				l := w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
				w.server.forget()
				time.Sleep(time.Minute)
				w.rewrite(shifted(by))
				w.restart(10 * time.Minute)
				w.holds("192.0.2.10 bound")
				if held := w.manager.Leases()[0].Lease; !same(held, l) {
					t.Errorf("resumed as %+v", held)
				}
				time.Sleep(30 * time.Minute)
				w.server.saw(t, "30m0s renew 192.0.2.10")
				if lines := w.lines("level=WARN"); len(lines) != 0 {
					t.Errorf("said %q", lines)
				}
			})
		})
	}
}

// Time suspended while the daemon was down counts as well: the boot time knows.
// T1 30m < 1m + 10m down, of which 25m more suspended < T2 52m30s.
func TestSuspendWhileTheDaemonIsDown(t *testing.T) {
	inWorld(t, func(w *world) {
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		w.server.forget()
		time.Sleep(time.Minute)
		w.manager.Close()
		time.Sleep(10 * time.Minute)
		w.host.sleeps(25 * time.Minute)
		w.start()
		w.server.saw(t, "11m0s renew 192.0.2.10")
		time.Sleep(31 * time.Minute)
		w.server.saw(t, "41m0s renew 192.0.2.10")
	})
}

// Over a reboot the wall clock is all there is, and the boot time of the other
// boot counts for nothing: down 10m < T1 30m, 40m < T2 52m30s, lease 1h < 2h.
func TestReboot(t *testing.T) {
	for down, want := range map[time.Duration]string{
		10 * time.Minute: "30m0s renew 192.0.2.10",
		39 * time.Minute: "40m0s renew 192.0.2.10",
		54 * time.Minute: "55m0s rebind 192.0.2.10",
		2 * time.Hour:    "2h1m0s confirm 192.0.2.10",
	} {
		t.Run(down.String(), func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
				w.server.forget()
				time.Sleep(time.Minute)
				w.manager.Close()
				time.Sleep(down)
				w.host.reboots(2 * time.Minute)
				w.start()
				time.Sleep(max(0, 29*time.Minute-down) + time.Second)
				w.server.saw(t, want)
				w.holds("192.0.2.10 bound")
			})
		})
	}
}

// The store is as new as its leases' last renewal: each is stored with the boot
// in which that was.
func TestRebootAfterARenewal(t *testing.T) {
	inWorld(t, func(w *world) {
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		w.manager.Close()
		w.host.reboots(0)
		w.start()
		time.Sleep(31 * time.Minute) // renewed at T1 30m
		w.rewrite(shifted(-7 * time.Hour))
		w.restart(time.Minute)
		w.holds("192.0.2.10 bound")
		time.Sleep(30 * time.Minute)
		w.server.saw(t, "0s acquire 02:00:00:00:00:01", "30m0s renew 192.0.2.10", "1h0m0s renew 192.0.2.10")
	})
}

// The clock went back over a reboot: nobody knows the lease's age. It is renewed
// at once, and until then ends as if it were T1 old: after 30m more < lease 1h.
func TestClockWentBackOverAReboot(t *testing.T) {
	for _, answers := range []bool{true, false} {
		t.Run(fmt.Sprint("answered: ", answers), func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.acquire(w.pool(), lease.Endpoint{MAC: mac(1), Name: "web"})
				w.server.forget()
				time.Sleep(time.Minute)
				w.manager.Close()
				w.rewrite(shifted(5 * time.Hour))
				w.host.reboots(time.Minute)
				if !answers {
					w.server.down()
				}
				w.start()
				synctest.Wait()
				if lines := w.lines("level=WARN", "the clock went back over a reboot", "address=192.0.2.10", "name=web"); len(lines) != 1 {
					t.Errorf("said %q", lines)
				}
				if answers {
					w.server.saw(t, "1m0s renew 192.0.2.10")
					w.holds("192.0.2.10 bound")
					w.agree()
					return
				}
				time.Sleep(30*time.Minute - 1)
				w.holds("192.0.2.10 rebinding")
				time.Sleep(time.Nanosecond)
				w.holds("192.0.2.10 lost")
				w.server.up()
				time.Sleep(2 * time.Minute)
				w.holds("192.0.2.10 bound")
			})
		})
	}
	t.Run("infinite", func(t *testing.T) {
		inWorld(t, func(w *world) {
			pool := w.pool()
			w.server.length.set(0)
			w.acquire(pool, lease.Endpoint{MAC: mac(1)})
			w.server.forget()
			w.manager.Close()
			w.rewrite(shifted(5 * time.Hour))
			w.host.reboots(0)
			w.start()
			time.Sleep(24 * time.Hour)
			w.holds("192.0.2.10 bound")
			w.server.saw(t)
			w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.10")))
		})
	})
}

// What an identity left before the clock went back counts as lost: there is no
// start on it while the server is silent. Silence 4s < DHCP_TIMEOUT 30s, release
// delay 30s < lease 1h.
func TestClockWentBackOverABinding(t *testing.T) {
	for back, granted := range map[time.Duration]bool{0: true, time.Hour: false} {
		t.Run(back.String(), func(t *testing.T) {
			inWorldOf(t, lease.Options{}, func(w *world) {
				pool := w.pool()
				web := lease.Endpoint{MAC: mac(1), Name: "web"}
				w.acquire(pool, web)
				w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.10")))
				w.server.forget()
				w.manager.Close()
				for key, b := range w.store.bindings {
					shifted(back)(&b.Lease)
					w.store.bindings[key] = b
				}
				w.host.reboots(0)
				time.Sleep(time.Minute)
				w.server.down()
				w.start()
				began := time.Now()
				_, err := w.manager.Acquire(w.Context(), pool, web)
				if took := time.Since(began); granted && (err != nil || took != 4*time.Second) || !granted && (err == nil || took != timeout) {
					t.Errorf("after %v: %v", took, err)
				}
				// Nothing is given back that may be another's.
				time.Sleep(time.Minute)
				saw := []string{"1m0s confirm 192.0.2.10", "1m1s acquire 02:00:00:00:00:01 192.0.2.10"}
				if granted {
					saw = append(saw, "1m8s confirm 192.0.2.10", "1m12s confirm 192.0.2.10", "1m20s confirm 192.0.2.10", "1m36s confirm 192.0.2.10")
				}
				w.server.saw(t, saw...)
			})
		})
	}
}

// A manager's times are the wall clock's for people: after a suspend too.
func TestTimesAfterASuspendAreTheWallClocks(t *testing.T) {
	inWorld(t, func(w *world) {
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1)})
		time.Sleep(time.Minute)
		w.host.sleeps(10 * time.Minute)
		// The fake host's wall clock stood still with the timers: to it the lease
		// began, and ends, 10m earlier.
		l := w.manager.Leases()[0]
		if got := []time.Time{l.Obtained, l.Renew, l.Rebind, l.Expires}; !slices.EqualFunc(got, []time.Duration{0, 30 * time.Minute, 52*time.Minute + 30*time.Second, time.Hour},
			func(at time.Time, want time.Duration) bool {
				return at.Equal(w.server.began.Add(want - 10*time.Minute))
			}) {
			t.Errorf("times %v", got)
		}
		time.Sleep(20 * time.Minute)
	})
}
