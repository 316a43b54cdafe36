package lease_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// losing are global settings with a loss policy.
func losing(policy lease.LossPolicy) lease.Options {
	return lease.Options{ClientID: lease.ClientIDMAC, OnLost: policy}
}

// askedFor compares what the engine was asked.
func (e *engine) askedFor(t *testing.T, want ...string) {
	t.Helper()
	synctest.Wait()
	e.mu.Lock()
	defer e.mu.Unlock()
	if !slices.Equal(e.asked, want) {
		t.Errorf("the engine was asked for %q, want %q", e.asked, want)
	}
	e.asked = nil
}

// refusing answers every request for an extension with a NAK.
func refusing(context.Context, lease.Lease) (lease.Lease, error) {
	return lease.Lease{}, lease.ErrNAK
}

// ways are those in which a lease is lost. T1 30m < lease 1h < outage.
var ways = map[string]struct {
	lose func(w *world)
	at   time.Duration
	why  string
	saw  []string // at that moment
}{
	"expiry": {
		func(w *world) { w.server.onExtend.set(silent) },
		time.Hour, "no server renewed it in time", nil,
	},
	"NAK at renewal": {
		func(w *world) { w.server.onExtend.set(refusing) },
		30 * time.Minute, "the server refused its renewal",
		[]string{"30m0s renew 192.0.2.10"},
	},
	"other address at renewal": {
		func(w *world) {
			w.server.onExtend.set(func(_ context.Context, l lease.Lease) (lease.Lease, error) {
				l.Prefix = netip.MustParsePrefix("192.0.2.77/32")
				return w.server.extended(l), nil
			})
		},
		30 * time.Minute, "server 198.51.100.1 gave 192.0.2.77 at renewal, which was given back",
		[]string{"30m0s renew 192.0.2.10", "30m0s release 192.0.2.77"},
	},
}

// One error says all about a loss, however long it lasts: who, where and why.
func TestLossIsSaidOnce(t *testing.T) {
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			inWorldOf(t, losing(lease.KeepLost), func(w *world) {
				w.acquire(w.pool(), lease.Endpoint{MAC: mac(1), Name: "web"})
				w.server.onConfirm.set(refusing)
				w.server.onAcquire.set(silentAcquire)
				way.lose(w)
				time.Sleep(way.at - 1)
				if lines := w.lines("lease lost"); len(lines) != 0 {
					t.Errorf("said early: %q", lines)
				}
				w.server.forget()
				time.Sleep(time.Nanosecond)
				synctest.Wait()
				w.server.mu.Lock()
				seen := w.server.seen
				w.server.mu.Unlock()
				if !slices.Equal(seen[:min(len(seen), len(way.saw))], way.saw) {
					t.Errorf("the server saw %q, want %q", seen, way.saw)
				}
				w.holds("192.0.2.10 lost")
				w.agree()
				time.Sleep(3 * time.Hour)
				w.holds("192.0.2.10 lost")
				if lines := w.lines("level=ERROR"); len(lines) != 1 || len(w.lines("level=ERROR", "lease lost", "name=web", "address=192.0.2.10", mac(1).String(), way.why, "policy=keep")) != 1 {
					t.Errorf("said of it: %q", lines)
				}
				w.engine.askedFor(t)
				// Regained and lost again is another loss.
				w.server.up()
				w.server.ends(addr("192.0.2.10"))
				time.Sleep(2 * time.Minute)
				w.holds("192.0.2.10 bound")
				if lines := w.lines("lost lease regained", "address=192.0.2.10", "name=web"); len(lines) != 1 {
					t.Errorf("said of its return: %q", lines)
				}
				w.server.down()
				time.Sleep(time.Hour)
				if lines := w.lines("level=ERROR", "lease lost"); len(lines) != 2 {
					t.Errorf("said of both: %q", lines)
				}
			})
		})
	}
}

// A lost address is asked of the leasing server for a second, then of all; the
// container has it, so no other will do. T1 30m: NAK at 30m < lease 1h.
func TestRegain(t *testing.T) {
	for name, c := range map[string]struct {
		server func(w *world)
		saw    []string
		holds  string
	}{
		"the leasing server confirms it": {
			func(*world) {}, []string{"30m1s confirm 192.0.2.10"}, "bound",
		},
		"the leasing server knows nothing of it": {
			func(w *world) { w.server.ends(addr("192.0.2.10")) },
			[]string{"30m1s confirm 192.0.2.10", "30m2s acquire 02:00:00:00:00:01 192.0.2.10"},
			"bound",
		},
		"the leasing server refuses, another offers it": {
			func(w *world) {
				w.server.onConfirm.set(refusing)
				w.server.id.set(addr("198.51.100.2"))
			},
			[]string{"30m1s confirm 192.0.2.10", "30m1s acquire 02:00:00:00:00:01 192.0.2.10"},
			"bound",
		},
		"it is another's": {
			func(w *world) { w.server.takes(addr("192.0.2.10")) },
			[]string{
				"30m1s confirm 192.0.2.10", "30m1s acquire 02:00:00:00:00:01 192.0.2.10",
				"31m1s confirm 192.0.2.10", "31m1s acquire 02:00:00:00:00:01 192.0.2.10",
			},
			"lost",
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.acquire(w.pool(), lease.Endpoint{MAC: mac(1), Name: "web"})
				w.server.forget()
				time.Sleep(29 * time.Minute)
				c.server(w)
				w.server.onExtend.set(refusing)
				time.Sleep(2*time.Minute + 30*time.Second)
				w.server.saw(t, append([]string{"30m0s renew 192.0.2.10"}, c.saw...)...)
				w.holds("192.0.2.10 " + c.holds)
				w.server.leased(t, addr("192.0.2.10"))
				w.agree()
				if c.holds == "lost" {
					// It stands in nobody's log as silence, and nobody is told twice.
					if lines := w.lines("don't answer"); len(lines) != 0 {
						t.Errorf("said %q", lines)
					}
					return
				}
				if len(w.server.requests) > 1 {
					if r := w.server.lastRequest(); !r.InUse || !slices.Equal(r.ClientID, lease.MACClientID(mac(1))) || r.Name != "web" {
						t.Errorf("asked for it as %+v", r)
					}
				}
			})
		})
	}
}

// The engine is asked once for each loss. To stop a container it releases the
// address before it answers; to restart one it takes it again.
func TestLossPolicies(t *testing.T) {
	for name, way := range ways {
		t.Run("stop, "+name, func(t *testing.T) {
			inWorldOf(t, losing(lease.StopLost), func(w *world) {
				pool := w.pool()
				w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
				w.server.onConfirm.set(silent)
				w.server.onAcquire.set(silentAcquire)
				way.lose(w)
				w.engine.does(func(context.Context) error {
					time.Sleep(10 * time.Second) // the engine's grace
					return w.manager.Release(w.Context(), pool, addr("192.0.2.10"))
				})
				time.Sleep(way.at + 9*time.Second)
				w.holds("192.0.2.10 lost")
				w.server.forget()
				time.Sleep(2 * time.Second)
				w.holds()
				w.agree()
				w.server.saw(t, (way.at+10*time.Second).String()+" release 192.0.2.10")
				time.Sleep(3 * time.Hour)
				w.engine.askedFor(t, "stop web 192.0.2.10")
				w.server.saw(t)
				if lines := w.lines("level=ERROR"); len(lines) != 1 || !strings.Contains(lines[0], "policy=stop") {
					t.Errorf("said %q", lines)
				}
			})
		})
		t.Run("restart, "+name, func(t *testing.T) {
			inWorldOf(t, losing(lease.RestartLost), func(w *world) {
				pool := w.pool()
				web := lease.Endpoint{MAC: mac(1), Name: "web"}
				w.acquire(pool, web)
				way.lose(w)
				w.server.onConfirm.set(silent)
				w.server.onAcquire.set(silentAcquire)
				w.engine.does(func(context.Context) error {
					time.Sleep(10 * time.Second)
					w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.10")))
					// The address is another's by now, so it is given up.
					w.server.takes(addr("192.0.2.10"))
					w.server.up()
					_, err := w.manager.Acquire(w.Context(), pool, web)
					return err
				})
				time.Sleep(way.at + 11*time.Second)
				w.holds("192.0.2.11 bound")
				w.agree()
				time.Sleep(3 * time.Hour)
				w.engine.askedFor(t, "restart web 192.0.2.10")
			})
		})
	}
}

// A network's own policy beats the daemon's.
func TestLossPolicyOfANetwork(t *testing.T) {
	inWorldOf(t, losing(lease.StopLost), func(w *world) {
		p, err := lease.NewPool("192.0.2.0/24", "", map[string]string{"on_lease_lost": "keep"})
		w.works(err)
		p, err = w.manager.AddPool(w.Context(), p)
		w.works(err)
		w.acquire(p.ID, lease.Endpoint{MAC: mac(1), Name: "kept"})
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(2), Name: "stopped"})
		w.server.down()
		time.Sleep(2 * time.Hour)
		w.engine.askedFor(t, "stop stopped 192.0.2.11")
		w.holds("192.0.2.10 lost", "192.0.2.11 lost")
	})
}

// The engine fails: that is said, and the address asked for as ever. NAK at T1
// 30m < lease 1h.
func TestEngineFails(t *testing.T) {
	for _, policy := range []lease.LossPolicy{lease.StopLost, lease.RestartLost} {
		t.Run(string(policy), func(t *testing.T) {
			inWorldOf(t, losing(policy), func(w *world) {
				w.engine.does(func(context.Context) error { return errors.New("no such container") })
				w.acquire(w.pool(), lease.Endpoint{MAC: mac(1), Name: "web"})
				w.server.forget()
				w.server.onExtend.set(refusing)
				w.server.onConfirm.set(refusing)
				w.server.onAcquire.set(silentAcquire)
				time.Sleep(30*time.Minute + 90*time.Second)
				w.server.saw(t, "30m0s renew 192.0.2.10",
					"30m1s confirm 192.0.2.10", "30m1s acquire 02:00:00:00:00:01 192.0.2.10",
					"31m1s confirm 192.0.2.10", "31m1s acquire 02:00:00:00:00:01 192.0.2.10")
				if lines := w.lines("level=ERROR", "still runs", "no such container", "name=web", "address=192.0.2.10"); len(lines) != 1 {
					t.Errorf("said %q", lines)
				}
				w.server.up()
				time.Sleep(time.Minute)
				w.holds("192.0.2.10 bound")
				w.engine.askedFor(t, string(policy)+" web 192.0.2.10")
				// The next loss is another one.
				w.server.onExtend.set(refusing)
				time.Sleep(30 * time.Minute)
				w.engine.askedFor(t, string(policy)+" web 192.0.2.10")
			})
		})
	}
}

// Nobody waits for the engine, neither the keeper nor Close, and it has 2m for
// its work. NAK at T1 30m < lease 1h.
func TestEngineIsSlow(t *testing.T) {
	inWorldOf(t, losing(lease.StopLost), func(w *world) {
		w.acquire(w.pool(), lease.Endpoint{MAC: mac(1), Name: "web"})
		var gave []time.Duration
		w.engine.does(func(ctx context.Context) error {
			<-ctx.Done()
			gave = append(gave, time.Since(w.server.began))
			return ctx.Err()
		})
		w.server.onExtend.set(refusing)
		time.Sleep(30*time.Minute + 2*time.Second)
		w.holds("192.0.2.10 bound") // confirmed a second later
		time.Sleep(30 * time.Minute)
		w.engine.askedFor(t, "stop web 192.0.2.10", "stop web 192.0.2.10")
		began := time.Now()
		w.manager.Close()
		if took := time.Since(began); took != 0 {
			t.Errorf("Close took %v", took)
		}
		if want := []time.Duration{32 * time.Minute, 60*time.Minute + 2*time.Second}; !slices.Equal(gave, want) {
			t.Errorf("the engine was given up at %v, want %v", gave, want)
		}
	})
}

// A lease that ended while the daemon was down is asked for first. Only when
// that fails is it lost. Lease 1h < down 2h.
func TestLossWhileTheDaemonIsDown(t *testing.T) {
	for name, c := range map[string]struct {
		server func(w *world)
		saw    []string
		holds  string
		after  time.Duration // the restart
	}{
		"confirmed": {func(*world) {}, []string{"2h0m0s confirm 192.0.2.10"}, "192.0.2.10 bound", 0},
		"granted anew": {
			func(w *world) { w.server.ends(addr("192.0.2.10")) },
			[]string{"2h0m0s confirm 192.0.2.10", "2h0m1s acquire 02:00:00:00:00:01 192.0.2.10"},
			"192.0.2.10 bound", 0,
		},
		"another's": {
			func(w *world) { w.server.takes(addr("192.0.2.10")) },
			[]string{"2h0m0s confirm 192.0.2.10", "2h0m0s acquire 02:00:00:00:00:01 192.0.2.10"},
			"192.0.2.10 lost", 0,
		},
		"silence": {
			func(w *world) { w.server.down() },
			[]string{"2h0m0s confirm 192.0.2.10", "2h0m1s acquire 02:00:00:00:00:01 192.0.2.10"},
			"192.0.2.10 lost", 30 * time.Second,
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorldOf(t, losing(lease.StopLost), func(w *world) {
				w.acquire(w.pool(), lease.Endpoint{MAC: mac(1), Name: "web"})
				w.server.forget()
				c.server(w)
				w.restart(2 * time.Hour)
				lost := strings.HasSuffix(c.holds, "lost")
				if c.after > 0 {
					time.Sleep(c.after - 1)
					w.engine.askedFor(t)
					time.Sleep(time.Nanosecond)
				}
				if lost {
					w.engine.askedFor(t, "stop web 192.0.2.10")
				}
				time.Sleep(40*time.Second - c.after)
				w.server.saw(t, c.saw...)
				w.holds(c.holds)
				time.Sleep(20 * time.Minute) // still asked for: not lost once more
				w.engine.askedFor(t)
				if lines := w.lines("level=ERROR", "lease lost"); (len(lines) == 1) != lost {
					t.Errorf("said %q", lines)
				}
			})
		})
	}
}

// What was said of a loss isn't said again when a request for the same endpoint
// fails: because its lease can't be stored, or no server answers the endpoint of
// an adopted lease.
func TestLossIsNotSaidAgainAfterARequest(t *testing.T) {
	t.Run("not stored", func(t *testing.T) {
		inWorldOf(t, losing(lease.StopLost), func(w *world) {
			pool := w.pool()
			w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
			w.expire()
			w.engine.askedFor(t, "stop web 192.0.2.10")
			w.store.before.set(failing("PutLease"))
			w.refused(pool, lease.Endpoint{MAC: mac(1), Name: "web"}, errDiskFull.Error())
			w.store.before.set(nil)
			w.server.down()
			time.Sleep(10 * time.Minute)
			w.holds("192.0.2.10 lost")
			w.engine.askedFor(t)
			if lines := w.lines("lease lost"); len(lines) != 1 {
				t.Errorf("said %q", lines)
			}
		})
	})
	t.Run("adopted", func(t *testing.T) {
		inWorldOf(t, losing(lease.StopLost), func(w *world) {
			pool := w.pool()
			w.server.down()
			_, err := w.manager.Reconcile(w.Context(), lease.Inventory{Networks: []lease.Network{{
				Name: "lan", Driver: "macvlan", Subnet: "192.0.2.0/24",
				Attachments: []lease.Attachment{{Container: "c1", Name: "web", MAC: mac(1), Prefix: netip.MustParsePrefix("192.0.2.10/24")}},
			}}}, false)
			w.works(err)
			w.holds("192.0.2.10 lost")
			w.refused(pool, lease.Endpoint{MAC: mac(1)}, lease.ErrNoAnswer.Error())
			if l := w.manager.Leases()[0]; l.Pool != pool {
				t.Errorf("it is in pool %v", l.Pool)
			}
			time.Sleep(10 * time.Minute)
			w.holds("192.0.2.10 lost")
			w.engine.askedFor(t)
			if lines := w.lines("lease lost"); len(lines) != 0 {
				t.Errorf("said %q", lines)
			}
		})
	})
}

// Many leases lost at once: each container is stopped, each once.
func TestManyLosses(t *testing.T) {
	inWorldOf(t, losing(lease.StopLost), func(w *world) {
		pool := w.pool()
		var want []string
		for n := range 50 {
			l := w.acquire(pool, lease.Endpoint{MAC: mac(n + 1), Name: fmt.Sprint("web", n)})
			want = append(want, fmt.Sprintf("stop web%d %v", n, l.Addr()))
		}
		w.server.down()
		time.Sleep(3 * time.Hour)
		synctest.Wait()
		slices.Sort(want)
		slices.Sort(w.engine.asked)
		w.engine.askedFor(t, want...)
	})
}
