package lease_test

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// 1,000 leases that nobody renews are one line a minute. T1 30m < outage 90m > lease 1h.
func TestOutageIsSummedUp(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.crowded()
		for n := range 1000 {
			w.acquire(pool, lease.Endpoint{MAC: mac(n + 1)})
			time.Sleep(500 * time.Millisecond)
		}
		w.server.down()
		time.Sleep(51 * time.Minute) // before the first is lost
		silence := w.lines("DHCP servers don't answer", "servers=[198.51.100.1]")
		if others := w.lines("level=WARN"); len(others) != len(silence)+1 { // the probe's
			t.Errorf("said %q", others)
		}
		if others := w.lines("level=ERROR"); len(others) != 0 {
			t.Errorf("said %q", others)
		}
		time.Sleep(39 * time.Minute)
		silence = w.lines("DHCP servers don't answer")
		last := time.Time{}
		for _, line := range silence {
			at, err := time.Parse("time="+time.RFC3339, strings.Fields(line)[0])
			if err != nil || at.Sub(last) < time.Minute {
				t.Errorf("%v after the one at %v (%v)", at, last, err)
			}
			last = at
		}
		// The first attempt that failed was at 30m, and ended 11m15s later.
		if n := len(silence); n < 50 || n > 58 {
			t.Errorf("%d lines from 41m15s to 98m20s", n)
		}
		if lost := w.lines("level=ERROR", "lease lost"); len(lost) != 1000 {
			t.Errorf("%d of 1000 losses were said", len(lost))
		}
	})
}

// Once a server is heard again, what is overdue there is asked for at once, 1 ms
// apart, though attempts on it are on their way; not what is another server's.
// T1 30m < outage 41m < T2 52m30s < lease 1h.
func TestOverdueLeasesWhenTheServerIsBack(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		for n := range 3 {
			w.acquire(pool, lease.Endpoint{MAC: mac(n + 1)})
			time.Sleep(time.Minute)
		}
		w.server.id.set(addr("198.51.100.2"))
		w.acquire(pool, lease.Endpoint{MAC: mac(4)})
		w.server.id.set(addr("198.51.100.1"))
		w.server.down()
		time.Sleep(38 * time.Minute)
		w.acquireAt(pool, mac(5)) // not overdue: by nobody's fault
		w.server.onExtend.set(func(ctx context.Context, l lease.Lease) (lease.Lease, error) {
			if l.Via.Addr() == addr("198.51.100.2") {
				return silent(ctx, l)
			}
			return w.server.extended(l), nil
		})
		w.server.forget()
		time.Sleep(15*time.Second - 1)
		w.server.saw(t)
		w.holds("192.0.2.10 renewing", "192.0.2.11 renewing", "192.0.2.12 renewing", "192.0.2.13 renewing", "192.0.2.14 bound")
		time.Sleep(time.Second)
		w.holds("192.0.2.10 bound", "192.0.2.11 bound", "192.0.2.12 bound", "192.0.2.13 renewing", "192.0.2.14 bound")
		w.server.mu.Lock()
		seen := slices.Clone(w.server.seen)
		w.server.mu.Unlock()
		w.server.forget()
		if len(seen) != 3 || seen[0] != "41m15s renew 192.0.2.10" || !strings.HasPrefix(seen[1], "41m15s renew ") || !strings.HasPrefix(seen[2], "41m15.001s renew ") {
			t.Errorf("the server saw %q", seen)
		}
		if lines := w.lines("DHCP server answers again", "server=198.51.100.1", "overdue=2"); len(lines) != 1 {
			t.Errorf("said of it %q", lines)
		}
		// Nothing of the old attempts is left, and the other server's lease goes
		// its way: T1 33m, T2 55m30s, the end 1h3m.
		time.Sleep(22 * time.Minute)
		w.server.saw(t, "44m15s renew 192.0.2.13", "49m52.5s renew 192.0.2.13", "52m41.25s renew 192.0.2.13", "54m5.625s renew 192.0.2.13", "55m5.625s renew 192.0.2.13",
			"55m30s rebind 192.0.2.13", "59m15s rebind 192.0.2.13", "1h1m7.5s rebind 192.0.2.13", "1h2m7.5s rebind 192.0.2.13",
			"1h3m0s confirm 192.0.2.13", "1h3m1s acquire 02:00:00:00:00:04 192.0.2.13")
	})
}

// acquireAt takes a lease while the server is down for all others.
func (w *world) acquireAt(pool string, m lease.MAC) {
	w.Helper()
	w.server.onAcquire.set(nil)
	w.acquire(pool, lease.Endpoint{MAC: m})
	w.server.onAcquire.set(silentAcquire)
}

// A thousand overdue leases when the server is back: none twice, all within a
// second. T1 30m < outage 43m < T2 52m30s.
func TestCrowdWhenTheServerIsBack(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.crowded()
		for n := range 1000 {
			w.acquire(pool, lease.Endpoint{MAC: mac(n + 1)})
		}
		w.server.onExtend.set(silent)
		time.Sleep(43 * time.Minute)
		w.server.onExtend.set(nil)
		w.server.forget()
		w.acquire(pool, lease.Endpoint{MAC: mac(5000)}) // is answered
		time.Sleep(time.Second - 1)
		synctest.Wait()
		w.server.mu.Lock()
		defer w.server.mu.Unlock()
		asked := map[string]bool{}
		for n, what := range w.server.seen[1:] {
			fields := strings.Fields(what)
			if at, err := time.ParseDuration(fields[0]); err != nil || at != 43*time.Minute+time.Duration(n)*time.Millisecond {
				t.Errorf("attempt %d: %s", n, what)
			}
			asked[fields[2]] = true
		}
		if len(asked) != 1000 {
			t.Errorf("%d leases asked for, want 1000, each once", len(asked))
		}
	})
}

// byName are global settings with which the identity is the container's name.
var byName = lease.Options{ClientID: lease.ClientIDName}

// left makes a container that left its address, released after 30s, at 1m.
func (w *world) left(ep lease.Endpoint) (pool string) { return w.leftAfter(ep, time.Minute) }

func (w *world) leftAfter(ep lease.Endpoint, stay time.Duration) (pool string) {
	w.Helper()
	pool = w.pool()
	w.acquire(pool, ep)
	time.Sleep(stay)
	w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.10")))
	w.server.saw(w.T, "0s acquire "+ep.MAC.String())
	return pool
}

var web = lease.Endpoint{MAC: mac(1), Name: "web"}

// A container that comes back while nobody answers has its stored lease after
// 4s: silence 4s < DHCP_TIMEOUT 30s, down 10s < release delay 30s < lease 1h. It is
// confirmed as soon as anybody is there, at 4, 8, 16, 32, 64s and each 64s.
func TestStartDuringAnOutage(t *testing.T) {
	inWorldOf(t, byName, func(w *world) {
		pool := w.left(web)
		w.server.down()
		time.Sleep(10 * time.Second)
		began := time.Now()
		again := lease.Endpoint{MAC: mac(2), Name: "web"} // recreated
		l := w.acquire(pool, again)
		if took := time.Since(began); took != 4*time.Second {
			t.Errorf("it took %v", took)
		}
		if l.Addr() != addr("192.0.2.10") || l.MAC != mac(2) || l.Prefix.Bits() != 24 || !l.Expires.Equal(w.server.began.Add(time.Hour)) {
			t.Errorf("granted %+v", l)
		}
		w.holds("192.0.2.10 renewing")
		w.agree()
		if lines := w.lines("level=WARN", "starts on its stored lease", "address=192.0.2.10", "name=web", "2000-01-01T01:00:00"); len(lines) != 1 {
			t.Errorf("said %q", lines)
		}
		w.server.saw(t, "1m10s confirm 192.0.2.10", "1m11s acquire 02:00:00:00:00:02 192.0.2.10")
		// Others fail within the timeout, and only they.
		_, err := w.manager.Acquire(w.Context(), pool, lease.Endpoint{MAC: mac(3), Name: "db"})
		if took := time.Since(began); !errors.Is(err, lease.ErrNoAnswer) || took != 4*time.Second+timeout {
			t.Errorf("after %v: %v", took, err)
		}
		w.server.saw(t, "1m14s acquire 02:00:00:00:00:03", "1m18s confirm 192.0.2.10", "1m22s confirm 192.0.2.10", "1m30s confirm 192.0.2.10")
		time.Sleep(4 * time.Minute)
		w.server.saw(t, "1m46s confirm 192.0.2.10", "2m18s confirm 192.0.2.10", "3m22s confirm 192.0.2.10", "4m26s confirm 192.0.2.10", "5m30s confirm 192.0.2.10")
		w.holds("192.0.2.10 renewing")

		w.server.up()
		time.Sleep(time.Minute)
		w.server.saw(t, "6m34s confirm 192.0.2.10")
		w.holds("192.0.2.10 bound")
		w.agree()
		time.Sleep(31 * time.Minute)
		w.server.saw(t, "36m34s renew 192.0.2.10") // as any other from now on
		w.server.leased(t, addr("192.0.2.10"))
	})
}

// Whoever hears the server again: it is confirmed at once. Heard at 20s, between
// the attempts at 16s and 32s < lease 1h.
func TestUnconfirmedLeaseWhenTheServerIsBack(t *testing.T) {
	inWorldOf(t, byName, func(w *world) {
		pool := w.left(web)
		w.server.down()
		w.acquire(pool, web)
		time.Sleep(20 * time.Second)
		w.server.forget()
		w.server.up()
		w.acquire(pool, lease.Endpoint{MAC: mac(3), Name: "db"})
		w.server.sawInAnyOrder(t, "1m24s acquire 02:00:00:00:00:03", "1m24s confirm 192.0.2.10")
		w.holds("192.0.2.10 bound", "192.0.2.11 bound")
		time.Sleep(30 * time.Minute)
		w.server.sawInAnyOrder(t, "31m24s renew 192.0.2.10", "31m24s renew 192.0.2.11")
	})
}

// The server that comes back doesn't agree: the lease is lost, with all that
// this means. Confirmed at 4s < lease 1h.
func TestUnconfirmedLeaseIsRefused(t *testing.T) {
	global := byName
	global.OnLost = lease.StopLost
	inWorldOf(t, global, func(w *world) {
		pool := w.left(web)
		w.server.down()
		w.acquire(pool, web)
		w.server.up()
		w.server.takes(addr("192.0.2.10"))
		w.server.forget()
		time.Sleep(4 * time.Second)
		w.holds("192.0.2.10 lost")
		w.engine.askedFor(t, "stop web 192.0.2.10")
		if lines := w.lines("level=ERROR", "lease lost", "name=web", "address=192.0.2.10", "the server refused"); len(lines) != 1 {
			t.Errorf("said %q", lines)
		}
		time.Sleep(90 * time.Second)
		w.server.saw(t, "1m8s confirm 192.0.2.10", "1m9s confirm 192.0.2.10", "1m9s acquire 02:00:00:00:00:01 192.0.2.10",
			"2m9s confirm 192.0.2.10", "2m9s acquire 02:00:00:00:00:01 192.0.2.10")
		w.agree()
	})
}

// It ends as any other when nobody comes back: lease 1h < outage.
func TestUnconfirmedLeaseExpires(t *testing.T) {
	inWorldOf(t, byName, func(w *world) {
		pool := w.left(web)
		w.server.down()
		w.acquire(pool, web)
		time.Sleep(59*time.Minute - 4*time.Second - 1)
		w.holds("192.0.2.10 rebinding")
		w.server.forget()
		time.Sleep(time.Nanosecond)
		w.holds("192.0.2.10 lost")
		time.Sleep(65 * time.Second)
		// From now on at the pace of lost ones.
		w.server.saw(t, "1h0m0s confirm 192.0.2.10", "1h0m1s acquire 02:00:00:00:00:01 192.0.2.10", "1h1m0s confirm 192.0.2.10", "1h1m1s acquire 02:00:00:00:00:01 192.0.2.10")
	})
}

// A daemon that starts anew finds it due for renewal.
func TestUnconfirmedLeaseOverARestart(t *testing.T) {
	inWorldOf(t, byName, func(w *world) {
		pool := w.left(web)
		w.server.down()
		w.acquire(pool, web)
		w.server.forget()
		w.server.up()
		w.restart(time.Second)
		w.server.saw(t, "1m5s renew 192.0.2.10")
		w.holds("192.0.2.10 bound")
	})
}

// There is no start on a lease whose end isn't certain to be later: not without
// a stored one that is neither given back nor over, and not against a server
// that is there.
func TestNoStartDuringAnOutage(t *testing.T) {
	none := func(*world, string) {}
	for name, c := range map[string]struct {
		length  time.Duration // of the lease
		up      time.Duration // of the container
		down    time.Duration
		outage  func(w *world, pool string)
		ep      lease.Endpoint
		saw     []string
		release string // later
	}{
		"released: down 31s > release delay 30s": {
			time.Hour, time.Minute, 31 * time.Second, none, web,
			[]string{"1m30s release 192.0.2.10", "1m31s acquire 02:00:00:00:00:01 192.0.2.10"},
			"",
		},
		"expired: up 20s < T1 21s < lease 42s < up 20s + down 25s": {
			42 * time.Second, 20 * time.Second, 25 * time.Second, none, web,
			[]string{"45s confirm 192.0.2.10", "46s acquire 02:00:00:00:00:01 192.0.2.10"},
			"",
		},
		"expires during the silence: up 20s + down 25s < lease 47s < 4s later": {
			47 * time.Second, 20 * time.Second, 25 * time.Second, none, web,
			[]string{"45s confirm 192.0.2.10", "46s acquire 02:00:00:00:00:01 192.0.2.10"},
			"",
		},
		"another name": {
			time.Hour, time.Minute, 10 * time.Second, none,
			lease.Endpoint{MAC: mac(2), Name: "db"},
			[]string{"1m10s acquire 02:00:00:00:00:02", "1m30s release 192.0.2.10"},
			"",
		},
		"an offer that is refused, and nothing after it": {
			time.Hour, time.Minute, 10 * time.Second, func(w *world, _ string) {
				w.server.onAcquire.set(func(ctx context.Context, r lease.Request) (lease.Lease, error) {
					time.Sleep(time.Second)
					if r.Accept(addr("198.51.100.77")) == nil {
						w.Error("it was accepted")
					}
					return silentAcquire(ctx, r)
				})
			}, web,
			[]string{"1m10s confirm 192.0.2.10", "1m11s acquire 02:00:00:00:00:01 192.0.2.10"},
			"1m40s release 192.0.2.10",
		},
		"an offer, and no acknowledgment": {
			time.Hour, time.Minute, 10 * time.Second, func(w *world, _ string) {
				w.server.onAcquire.set(func(ctx context.Context, r lease.Request) (lease.Lease, error) {
					time.Sleep(3*time.Second - 1)
					w.works(r.Accept(addr("192.0.2.10")))
					return silentAcquire(ctx, r)
				})
			}, web,
			[]string{"1m10s confirm 192.0.2.10", "1m11s acquire 02:00:00:00:00:01 192.0.2.10"},
			"1m40s release 192.0.2.10",
		},
		"a NAK from the leasing server, then silence": {
			time.Hour, time.Minute, 10 * time.Second, func(w *world, _ string) { w.server.onConfirm.set(refusing) }, web,
			[]string{"1m10s confirm 192.0.2.10", "1m10s acquire 02:00:00:00:00:01"},
			"1m40s release 192.0.2.10",
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorldOf(t, byName, func(w *world) {
				w.server.length.set(c.length)
				pool := w.leftAfter(web, c.up)
				w.server.down()
				time.Sleep(c.down)
				c.outage(w, pool)
				began := time.Now()
				_, err := w.manager.Acquire(w.Context(), pool, c.ep)
				if took := time.Since(began); err == nil || took != timeout {
					t.Errorf("after %v: %v, want an error after %v", took, err, timeout)
				}
				time.Sleep(time.Second)
				if c.release != "" {
					c.saw = append(c.saw, c.release)
				}
				w.server.saw(t, c.saw...)
				w.holds()
			})
		})
	}
}

// A request for another address than the stored one isn't met with it.
func TestNoStartOnAnotherAddressDuringAnOutage(t *testing.T) {
	inWorldOf(t, byName, func(w *world) {
		pool := w.left(web)
		w.server.down()
		began := time.Now()
		_, err := w.manager.Acquire(w.Context(), pool, lease.Endpoint{MAC: mac(1), Name: "web", Address: addr("192.0.2.50")})
		if took := time.Since(began); err == nil || took != timeout {
			t.Errorf("after %v: %v", took, err)
		}
	})
}

// DHCP_TIMEOUT below the 4s of silence: the lease is there when it ends, not
// instead of it a failure. 500ms < confirmation 1s < 3s < silence 4s < lease 1h.
func TestStartDuringAnOutageWithAShortTimeout(t *testing.T) {
	for _, short := range []time.Duration{500 * time.Millisecond, 3 * time.Second, 4 * time.Second} {
		t.Run(short.String(), func(t *testing.T) {
			inWorldOf(t, byName, func(w *world) {
				pool := w.left(web)
				w.server.down()
				w.manager.Close()
				config := w.config()
				config.Timeout = short
				var err error
				if w.manager, err = lease.NewManager(w.store, w.server, config); err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				l := w.acquire(pool, web)
				if took := time.Since(began); took != short || l.Addr() != addr("192.0.2.10") {
					t.Errorf("%v after %v", l.Addr(), took)
				}
				w.holds("192.0.2.10 renewing")
			})
		})
	}
}

// While a container starts on its stored lease, the release that was pending
// isn't sent: it came back. Silence 4s, release delay 30s.
func TestStartDuringAnOutageEndsThePendingRelease(t *testing.T) {
	inWorldOf(t, byName, func(w *world) {
		pool := w.left(web)
		w.server.down()
		time.Sleep(28 * time.Second) // due in the middle of it
		w.acquire(pool, web)
		time.Sleep(30 * time.Minute)
		synctest.Wait()
		w.server.mu.Lock()
		defer w.server.mu.Unlock()
		for _, what := range w.server.seen {
			if strings.Contains(what, "release") {
				t.Errorf("the server saw %s", what)
			}
		}
		if n := len(w.store.bindings); n != 0 {
			t.Errorf("%d bindings stored", n)
		}
	})
}

// A lossy server, of whose answers any can fail: attempts keep to their times
// or come earlier, and none is made twice at one moment. T1 5m < lease 10m.
func TestAttemptsAreNeverDoubled(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.crowded()
		w.server.length.set(10 * time.Minute)
		for n := range 20 {
			w.acquire(pool, lease.Endpoint{MAC: mac(n + 1)})
			time.Sleep(7 * time.Second)
		}
		flying := map[netip.Addr]int{}
		turn := 0
		w.server.onExtend.set(func(ctx context.Context, l lease.Lease) (lease.Lease, error) {
			w.server.mu.Lock()
			flying[l.Addr()]++
			if flying[l.Addr()] > 1 {
				t.Errorf("%v: %d attempts at once", l.Addr(), flying[l.Addr()])
			}
			turn++
			lossy := turn%3 != 0
			w.server.mu.Unlock()
			defer func() {
				w.server.mu.Lock()
				defer w.server.mu.Unlock()
				flying[l.Addr()]--
			}()
			if lossy {
				return silent(ctx, l)
			}
			return w.server.extended(l), nil
		})
		w.server.forget()
		time.Sleep(6 * time.Hour)
		synctest.Wait()
		w.server.mu.Lock()
		at := map[string]bool{}
		for _, what := range w.server.seen {
			if at[what] {
				t.Errorf("twice: %s", what)
			}
			at[what] = true
		}
		n := len(w.server.seen)
		w.server.mu.Unlock()
		// Each lease is renewed once in 5m to 10m; two of three attempts fail.
		renewals := 20 * 72
		if n < renewals || n > 4*renewals {
			t.Errorf("%d attempts", n)
		}
	})
}
