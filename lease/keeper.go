package lease

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"
)

// overdueSpacing spreads the attempts that became due while the daemon was
// down: a thousand a second, which every server stands.
const overdueSpacing = time.Millisecond

// scheduleLocked sets the keeper's next attempt on a lease, if it needs one.
func (m *Manager) scheduleLocked(p *pool, e *entry, at time.Time) {
	e.stopLocked()
	e.turn++
	if e.lease.Infinite() || m.ctx.Err() != nil {
		return
	}
	turn := e.turn
	wait := m.clock.until(at)
	e.due = time.Now().Add(max(wait, 0))
	if wait <= 0 {
		// Not a timer of no time: the race detector crashes when two of these
		// start at once in a bubble (go.dev/issue/78156, open with Go 1.26).
		go m.keep(p, e, turn)
		return
	}
	e.timer = time.AfterFunc(wait, func() { m.keep(p, e, turn) })
}

// armLocked sets the next attempts on some leases by their state: of those
// Bound at T1, of the others at once, spread: an attempt of theirs that is on
// its way, to which no answer may ever come, ends, unless it has just begun. It
// returns how many these were.
func (m *Manager) armLocked(which func(*entry) bool) (overdue int) {
	now := m.clock.now()
	for _, p := range m.pools {
		for _, e := range p.byMAC {
			if !which(e) {
				continue
			}
			at := e.lease.Renew
			if e.lease.State(now) != Bound {
				if c := p.claims[e.lease.MAC]; c != nil && c.interrupt != nil {
					if now.Sub(e.began) < startOver {
						continue
					}
					c.interruptLocked()
				}
				at = now.Add(time.Duration(overdue) * overdueSpacing)
				overdue++
			}
			m.scheduleLocked(p, e, at)
		}
	}
	return overdue
}

const (
	// startOver is the wait after a NAK or another address, which RFC 2131
	// section 4.4.1 wants not to lead into a tight loop, and after an
	// interruption.
	startOver = time.Second
	// firstConfirm and lastConfirm bound the waits between attempts to confirm
	// a stored lease (RFC 2131 section 4.1's retransmissions).
	firstConfirm = 4 * time.Second
	lastConfirm  = 64 * time.Second
)

// unconfirmed is a stored lease whose renewal is due at once.
func (l Lease) unconfirmed(now time.Time) Lease {
	if !l.Infinite() && now.Before(l.Renew) {
		l.Renew = now
	}
	return l
}

// attemptLocked is when the attempt after one that is made now is due.
func (m *Manager) attemptLocked(e *entry) time.Time {
	now := m.clock.now()
	next := e.lease.Retry(now)
	if e.unconfirmed > 0 {
		soon := now.Add(min(firstConfirm<<min(e.unconfirmed-1, 10), lastConfirm))
		if soon.Before(next) {
			return soon
		}
	}
	return next
}

// keep makes one attempt to keep a lease alive: the action of its state, until
// the state's next attempt is due at the latest (RFC 2131 section 4.4.5). So a
// server that answers nothing can't hold a lease in its state.
func (m *Manager) keep(p *pool, e *entry, turn int) {
	if !m.begins() {
		return
	}
	defer m.wg.Done()
	m.mu.Lock()
	mac := e.lease.MAC
	m.mu.Unlock()
	ctx, cancel := context.WithCancel(m.ctx)
	defer cancel()
	done, err := m.claim(ctx, p, mac, cancel)
	if err != nil {
		return
	}
	defer done()

	m.mu.Lock()
	gone := p.byMAC[mac] != e || e.turn != turn
	pool, l := p.Pool, e.lease
	now, next := m.clock.now(), m.attemptLocked(e)
	unconfirmed, told := e.unconfirmed > 0, e.told
	if !gone {
		e.began, e.due = now, time.Time{}
		p.claims[mac].until = time.Now().Add(next.Sub(now))
	}
	m.mu.Unlock()
	if gone {
		return
	}
	state := l.State(now)
	if state == Bound {
		// The timer was early, or a renewal came in between.
		m.replace(p, e, l, next)
		return
	}
	attempt, end := context.WithTimeout(ctx, next.Sub(now))
	defer end()
	fresh, err := m.attempt(attempt, pool, l, state, unconfirmed)
	if errors.Is(err, errWaits) {
		// No timer: a reconcile decides.
		return
	}
	if ctx.Err() != nil && err != nil {
		// Interrupted by a request about this MAC, by armLocked, which has set
		// the next attempt, or by Close.
		m.mu.Lock()
		defer m.mu.Unlock()
		if e.turn == turn {
			m.scheduleLocked(p, e, m.clock.now().Add(startOver))
		}
		return
	}

	var another error
	if err == nil && fresh.Addr() != l.Addr() {
		another = fmt.Errorf("server %s gave %s at renewal, which was given back", fresh.Server, fresh.Addr())
	}
	m.observer.Attempted(state, m.clock.now().Sub(l.Renew), cmp.Or(err, another))
	var events []Event
	lose := func(why string, err error) {
		var lost Event
		l, lost = m.lose(pool, e, l, why, err)
		events = append(events, lost)
	}
	switch {
	case err == nil && another == nil:
		// What the Manager knows of a lease, no server does.
		fresh.Pool, fresh.Name, fresh.Container, fresh.Host, fresh.Prefix = l.Pool, l.Name, l.Container, l.Host, l.Prefix
		if state == Lost {
			m.log.Info("lost lease regained", "address", l.Addr(), "mac", l.MAC, "name", l.Name, "server", fresh.Server)
		}
		l = fresh
		next = l.Retry(m.clock.now())
		events = []Event{m.renewal(l, state, unconfirmed)}
		m.log.Debug("lease renewed", "address", l.Addr(), "mac", l.MAC, "name", l.Name, "server", l.Server, "until", m.clock.wall(l.Expires))
		// Not before this lease is renewed: it is not overdue.
		defer m.heard(l)
	case err == nil:
		m.sendRelease(ctx, pool, fresh)
		lose(another.Error(), nil)
		next = m.clock.now().Add(startOver)
	case errors.Is(err, ErrNAK) && state != Lost:
		events = []Event{l.event(EventNAK, err.Error())}
		lose("the server refused its renewal", err)
		next = m.clock.now().Add(startOver)
		if state == Renewing {
			defer m.heard(l)
		}
	default:
		if !errors.Is(err, errOtherOffer) && !errors.Is(err, ErrNAK) {
			m.unanswered(l, err)
		}
		if !told && l.State(m.clock.now()) == Lost {
			lose("no server renewed it in time", err)
		}
	}
	m.replace(p, e, l, next, events...)
}

// renewal is the event of an attempt that a server granted.
func (m *Manager) renewal(l Lease, before State, unconfirmed bool) Event {
	switch {
	case before == Lost:
		return l.event(EventGranted, "lost lease regained: "+m.until(l))
	case before == Rebinding:
		return l.event(EventRebound, m.until(l))
	case unconfirmed:
		return l.event(EventRenewed, "stored lease confirmed: "+m.until(l))
	}
	return l.event(EventRenewed, m.until(l))
}

// errWaits: the lease is another host's.
var errWaits = errors.New("the lease was taken by another host")

// attempt is the action of a state.
func (m *Manager) attempt(ctx context.Context, p Pool, l Lease, state State, unconfirmed bool) (Lease, error) {
	if l.Host != "" {
		_, err := m.self(ctx, p)
		if m.waits(l) {
			return Lease{}, errWaits
		}
		if err != nil {
			// Neither would the attempt have found its relay address.
			return Lease{}, err
		}
	}
	call := m.client.Renew
	switch {
	case state == Lost:
		return m.regain(ctx, p, l)
	case state == Rebinding:
		call = m.client.Rebind
	case unconfirmed:
		call = m.client.Confirm
	}
	return m.ask(func() (Lease, error) { return call(ctx, p, l) })
}

func (m *Manager) waits(l Lease) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.waitsLocked(l)
}

// replace stores what an attempt changed, with what happened in it, and sets the
// next one.
func (m *Manager) replace(p *pool, e *entry, l Lease, next time.Time, events ...Event) {
	m.mu.Lock()
	changed := !l.Obtained.Equal(e.lease.Obtained) || !l.Expires.Equal(e.lease.Expires)
	confirmed := !l.Obtained.Equal(e.lease.Obtained)
	m.mu.Unlock()
	if changed {
		if err := m.commit(Change{PutLeases: []Lease{l}, PutEvents: events}); err != nil {
			// Memory is right and the next renewal stores it again; after a
			// restart the old times would only renew too early.
			m.log.Error("renewed lease not stored", "address", l.Addr(), "error", err)
			changed = false
		}
	}
	if !changed {
		m.record(events...)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	e.lease = l
	e.told = e.told && l.State(m.clock.now()) == Lost
	if confirmed {
		m.renewed = time.Now()
	}
	switch {
	case confirmed || l.State(m.clock.now()) == Lost:
		e.unconfirmed = 0
	case e.unconfirmed > 0:
		e.unconfirmed++
	}
	m.scheduleLocked(p, e, next)
}
