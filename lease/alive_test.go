package lease_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// alive asks the manager for as long as the daemon's watchdog does.
func (w *world) alive() error {
	ctx, cancel := context.WithTimeout(w.Context(), 20*time.Second)
	defer cancel()
	return w.manager.Alive(ctx)
}

// Store and client are asked, and what they say comes when the time is over.
func TestStuckStoreAndClient(t *testing.T) {
	inWorld(t, func(w *world) {
		began := time.Now()
		w.works(w.alive())
		if took := time.Since(began); took != 0 {
			w.Errorf("alive took %v", took)
		}
		for _, stuck := range []*knob[error]{&w.store.stuck, &w.server.stuck} {
			w.alarm.set("hangs")
			stuck.set(errors.New("it hangs"))
			began := time.Now()
			w.fails(w.alive(), "it hangs")
			if took := time.Since(began); took != 20*time.Second {
				w.Errorf("took %v", took)
			}
			stuck.set(nil)
			w.works(w.alive())
			time.Sleep(20 * time.Second) // the watchdog's answer may still be on its way
			w.alarm.set("")
		}
	})
}

// A client that never returns, whatever its ctx says, keeps a MAC's claim for
// ever. That is an alarm as soon as no request could last that long: 60s of the
// longest and 4m. The keeper interrupted by the request was due 1s after it.
func TestRequestThatNeverEnds(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, ep(1, ""))
		w.server.down()
		time.Sleep(2*time.Hour + 10*time.Second) // an attempt began 10s ago
		w.holds("192.0.2.10 lost")
		hangs := make(chan struct{})
		w.server.onAcquire.set(func(context.Context, lease.Request) (lease.Lease, error) {
			<-hangs
			return lease.Lease{}, lease.ErrNoAnswer
		})
		go func() { _, _ = w.manager.Acquire(w.Context(), pool, ep(1, "")) }()
		time.Sleep(5 * time.Minute)
		w.works(w.alive())
		time.Sleep(2 * time.Second)
		w.alarm.set("192.0.2.10")
		w.fails(w.alive(), "keep lease 192.0.2.10 of 02:00:00:00:00:01: a request about it has not ended for 5m")
		close(hangs)
		w.works(w.alive())
		w.server.up()
		time.Sleep(2 * time.Minute)
		w.alarm.set("")
		w.holds("192.0.2.10 bound")
	})
}

// A client that never returns from a keeper's attempt is an alarm 4m after the
// attempt's end. That is when the next one is due, half way from T1 at 30m to T2
// at 52m30s, or when something interrupts it.
func TestAttemptThatNeverEnds(t *testing.T) {
	for name, c := range map[string]struct {
		end     time.Duration // of the attempt, after the grant
		disturb func(w *world, pool string)
	}{
		"undisturbed": {30*time.Minute + (22*time.Minute+30*time.Second)/2, func(*world, string) {}},
		"interrupted by a request": {31 * time.Minute, func(w *world, pool string) {
			_, err := w.manager.Acquire(w.Context(), pool, ep(1, ""))
			w.fails(err, "wait for another request about 02:00:00:00:00:01")
		}},
		"interrupted by other options": {31 * time.Minute, func(w *world, _ string) {
			w.manager.Configure(lease.Options{ClientID: lease.ClientIDMAC, Servers: []lease.Server{{Host: "198.51.100.1", Port: 67}}})
			time.Sleep(time.Minute)
			w.manager.Configure(byMAC)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				granted := time.Now()
				pool := w.pool()
				w.acquire(pool, ep(1, ""))
				hangs := make(chan struct{})
				w.server.onExtend.set(func(context.Context, lease.Lease) (lease.Lease, error) {
					<-hangs
					return lease.Lease{}, lease.ErrNoAnswer
				})
				time.Sleep(31 * time.Minute)
				c.disturb(w, pool)
				time.Sleep(time.Until(granted.Add(c.end + 4*time.Minute)))
				w.works(w.alive())
				time.Sleep(2 * time.Second)
				w.alarm.set("192.0.2.10")
				w.fails(w.alive(), "keep lease 192.0.2.10 of 02:00:00:00:00:01: the attempt that was to end 4m")
				w.server.onExtend.set(nil)
				close(hangs)
				w.works(w.alive())
				time.Sleep(2 * time.Minute)
				w.alarm.set("")
				w.holds("192.0.2.10 bound")
			})
		})
	}
}

// A disk that takes just under a minute for each commit is no alarm here, where
// each waits for another's too.
func TestSlowDiskIsNoAlarm(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, ep(1, ""))
		w.store.before.set(func(string) error { time.Sleep(118 * time.Second); return nil })
		for n := range 10 {
			_, _ = w.manager.Acquire(w.Context(), pool, ep(2, ""))
			w.server.onExtend.set([]func(context.Context, lease.Lease) (lease.Lease, error){nil, silent}[n%2])
			time.Sleep(20 * time.Minute)
		}
	})
}

// A lock that is never free is an alarm too, and Alive doesn't hang on it. In
// real time: a bubble's stands still while a mutex is waited for.
func TestStuckLock(t *testing.T) {
	w := newWorld(t)
	w.start()
	defer w.manager.Close()
	alive := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		return w.manager.Alive(ctx)
	}
	w.works(alive())
	// The clock hangs under the lock.
	w.host.slept.mu.Lock()
	go w.manager.Configure(lease.Options{ClientID: lease.ClientIDMAC})
	eventually(t, func() bool { return alive() != nil })
	if err := alive(); err == nil || !strings.Contains(err.Error(), "look at the leases: stuck for ") {
		t.Errorf("error %v", err)
	}
	w.host.slept.mu.Unlock()
	eventually(t, func() bool { return alive() == nil })
}

// eventually waits until something is so.
func eventually(t *testing.T, so func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !so(); {
		if time.Now().After(end) {
			t.Fatal("not within 10s")
		}
		time.Sleep(time.Millisecond)
	}
}

// Nothing here is late, although no attempt begins for long: infinite leases,
// those that wait for a reconcile, attempts on their way for an hour, a machine
// that sleeps, a closed manager.
func TestNoFalseAlarm(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.pool()
		w.acquire(pool, ep(1, "another host's"))
		anotherHost["interface"](w)
		w.restart(time.Second)
		w.server.length.set(0)
		w.acquire(pool, ep(2, "for ever"))
		w.server.length.set(8 * time.Hour)
		w.acquire(pool, ep(3, "web"))
		w.server.down()
		time.Sleep(5 * time.Hour)
		w.holds("192.0.2.10 waiting", "192.0.2.11 bound", "192.0.2.12 renewing")
		w.host.sleeps(24 * time.Hour)
		w.works(w.alive())
		time.Sleep(time.Hour)
		w.works(w.alive())
		w.manager.Close()
		time.Sleep(time.Hour)
		w.works(w.alive())
	})
}
