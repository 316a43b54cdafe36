package lease

import (
	"sync"
	"time"
)

// clock tells the time by which leases end. It is time.Now while the machine
// is awake: what counts there is the monotonic reading, so that a wall clock
// which is set moves no lease. That reading stands still during suspend, which
// the clock adds.
type clock struct {
	host  Host
	began time.Time
	boot  time.Duration // boot time at began
	id    string        // of this boot

	// mu guards slept.
	mu    sync.Mutex
	slept time.Duration
}

func newClock(host Host) *clock {
	return &clock{host: host, began: time.Now(), boot: host.BootTime(), id: host.BootID()}
}

// sleepNoise is how far apart the two clocks may be read without meaning that
// the machine slept.
const sleepNoise = 100 * time.Millisecond

// asleep is how long the machine was suspended since this process began.
func (c *clock) asleep() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	slept := c.host.BootTime() - c.boot - time.Since(c.began)
	if slept > c.slept+sleepNoise {
		c.slept = slept
	}
	return c.slept
}

// now is the moment to compare a lease's times with.
func (c *clock) now() time.Time { return time.Now().Add(c.asleep()) }

// until is how long a timer must run to end at a lease's time.
func (c *clock) until(at time.Time) time.Duration { return at.Sub(c.now()) }

// wall is what the wall clock will show, or has shown, at a lease's time, as
// far as it is right now.
func (c *clock) wall(at time.Time) time.Time {
	if at.IsZero() {
		return at
	}
	return time.Now().Round(0).Add(at.Sub(c.now()))
}

// onWall gives a lease the times that people and the store can read.
func (c *clock) onWall(l Lease) Lease {
	l.Obtained, l.Renew, l.Rebind, l.Expires = c.wall(l.Obtained), c.wall(l.Renew), c.wall(l.Rebind), c.wall(l.Expires)
	return l
}

// stamp makes a lease fit for the store: its times by the wall clock, and when
// it was obtained by the clock that nobody sets.
func (c *clock) stamp(l Lease) Lease {
	l.BootID, l.BootTime = c.id, c.host.BootTime()-c.now().Sub(l.Obtained)
	return c.onWall(l)
}

// resume puts a lease of the store on this clock. Within one boot the wall
// clock plays no part. Over a reboot it is all there is: a lease that it puts
// into the future was obtained before the clock went back, nobody knows how
// long ago. It counts as due for renewal, and sure is false.
func (c *clock) resume(l Lease) (resumed Lease, sure bool) {
	sure = true
	age := time.Now().Round(0).Sub(l.Obtained)
	switch {
	case l.BootID != "" && l.BootID == c.id:
		age = c.host.BootTime() - l.BootTime
	case age < 0:
		sure = false
		age = max(0, l.Renew.Sub(l.Obtained))
	}
	return l.from(c.now().Add(-age)), sure
}

// from is the lease as it would be, had it been obtained at another moment.
func (l Lease) from(obtained time.Time) Lease {
	if !l.Infinite() {
		l.Renew = obtained.Add(l.Renew.Sub(l.Obtained))
		l.Rebind = obtained.Add(l.Rebind.Sub(l.Obtained))
		l.Expires = obtained.Add(l.Expires.Sub(l.Obtained))
	}
	l.Obtained = obtained
	return l
}

// sleepPace is how often a running daemon looks whether the machine slept.
const sleepPace = 5 * time.Second

// watchSleep sets the timers anew after a suspend, in which they stood still.
func (m *Manager) watchSleep() {
	pace := time.NewTicker(sleepPace)
	defer pace.Stop()
	for known := time.Duration(0); ; {
		select {
		case <-m.ctx.Done():
			return
		case <-pace.C:
		}
		slept := m.clock.asleep()
		if slept == known {
			continue
		}
		m.mu.Lock()
		overdue := m.armLocked(func(e *entry) bool { return true })
		m.mu.Unlock()
		m.log.Info("the machine was suspended: leases set to their times", "slept", slept-known, "overdue", overdue)
		known = slept
	}
}
