package lease

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// lose ends a lease and does what its network's policy says. An engine can't be
// told that an address changed.
func (m *Manager) lose(p Pool, e *entry, l Lease, why string, err error) (Lease, Event) {
	m.mu.Lock()
	e.told = true
	m.mu.Unlock()
	policy := m.options(p).OnLost
	m.log.Error("lease lost: the same address is asked for again", "address", l.Addr(), "mac", l.MAC, "name", l.Name, "container", l.Container, "server", l.Server, "why", why, "policy", policy, "error", err)
	if policy != KeepLost {
		// The engine releases the address before it answers, which must not
		// wait for whoever called this.
		m.wg.Go(func() { m.act(policy, p, l) })
	}
	if err != nil {
		why = fmt.Sprintf("%s: %v", why, err)
	}
	return l.lost(m.clock.now()), l.event(EventLost, why)
}

// engineTime is how long an engine may take to stop a container and start it
// again: its own grace is 10 s unless the container says more.
const engineTime = 2 * time.Minute

// act has the engine stop or restart the container of a lost lease.
func (m *Manager) act(policy LossPolicy, p Pool, l Lease) {
	ctx, cancel := context.WithTimeout(m.ctx, engineTime)
	defer cancel()
	do := m.engine.Stop
	if policy == RestartLost {
		do = m.engine.Restart
	}
	log := m.log.With("address", l.Addr(), "mac", l.MAC, "name", l.Name, "policy", policy)
	if p.SharedMAC {
		l.MAC = MAC{}
	}
	if err := do(ctx, l); err != nil {
		log.Error("container of the lost lease still runs", "error", err)
		return
	}
	log.Warn("container of the lost lease was dealt with")
}

// lost ends a lease now, unless it is over.
func (l Lease) lost(now time.Time) Lease {
	if l.State(now) == Lost {
		return l
	}
	l.Renew, l.Rebind, l.Expires = now, now, now
	return l
}

var errOtherOffer = errors.New("the server offers another address than the lost one")

// regain asks for the address of a lost lease, and for no other: the container
// still uses it and can't be told of a new one.
func (m *Manager) regain(ctx context.Context, p Pool, l Lease) (Lease, error) {
	ctx, cancel := context.WithTimeout(ctx, m.timeout)
	defer cancel()
	if l.Via.IsValid() { // an adopted lease has no server yet
		fresh, err := m.confirm(ctx, p, l)
		if err == nil || ctx.Err() != nil {
			return fresh, err
		}
	}
	return m.ask(func() (Lease, error) {
		return m.client.Acquire(ctx, Request{
			Pool: p, MAC: l.MAC, Name: l.Name, ClientID: l.ClientID, Address: l.Addr(), InUse: true,
			Accept: func(addr netip.Addr) error {
				if addr != l.Addr() {
					return fmt.Errorf("%w: %s", errOtherOffer, addr)
				}
				return nil
			},
		})
	})
}

// silencePace is the time between two lines about servers that don't answer.
const silencePace = time.Minute

// silence sums up what would else be a line for each renewal that fails.
// Guarded by Manager.mu.
type silence struct {
	servers map[netip.AddrPort]unheard // by the way to them, until they are heard
	logged  time.Time                  // the last line
}

// unheard are the attempts on leases of one server since it was heard.
type unheard struct {
	attempts int
	// silence is the last one's error that is the server's fault, not the
	// host's, which has no relay address, say; nil for none.
	silence error
	// logged: the server was in a line. told: there was an event. It may be
	// silent to some only, for good.
	logged, told bool
}

// unanswered counts an attempt that no server answered.
func (m *Manager) unanswered(l Lease, err error) {
	now := time.Now()
	m.mu.Lock()
	s := &m.silence
	if s.servers == nil {
		s.servers = map[netip.AddrPort]unheard{}
	}
	u := s.servers[l.Via]
	u.attempts++
	if errors.Is(err, ErrNoAnswer) {
		u.silence = err
	}
	s.servers[l.Via] = u
	tell := now.Sub(s.logged) >= silencePace
	total := 0
	var servers []netip.Addr
	var silent []Event
	if tell {
		s.logged = now
		inUse := m.waysLocked()
		for via, u := range s.servers {
			if !inUse[via] {
				// Other servers have its leases by now, or containers left.
				continue
			}
			total += u.attempts
			if via.IsValid() { // an adopted lease has no server yet
				servers = append(servers, via.Addr())
			}
			u.logged = true
			if via.IsValid() && u.silence != nil && !u.told {
				u.told = true
				silent = append(silent, happening(Event{Kind: EventServerSilent, Server: via.Addr(), Detail: fmt.Sprintf("attempts without an answer: %d: %v", u.attempts, u.silence)}))
			}
			s.servers[via] = u
		}
	}
	m.mu.Unlock()
	m.record(silent...)
	if tell {
		m.log.Warn("DHCP servers don't answer: leases are renewed as soon as they do", "servers", servers, "attempts", total, "error", err)
	}
}

// waysLocked are the ways to the servers of all leases.
func (m *Manager) waysLocked() map[netip.AddrPort]bool {
	ways := map[netip.AddrPort]bool{}
	for _, p := range m.pools {
		for _, e := range p.byMAC {
			ways[e.lease.Via] = true
		}
	}
	return ways
}

// heard notes that a lease's server answered. After a silence, what is overdue
// there is asked for at once.
func (m *Manager) heard(l Lease) {
	m.mu.Lock()
	u, failed := m.silence.servers[l.Via]
	delete(m.silence.servers, l.Via)
	overdue := 0
	if failed {
		now := m.clock.now()
		overdue = m.armLocked(func(e *entry) bool { return e.lease.Via == l.Via && e.lease.State(now) != Bound })
	}
	m.mu.Unlock()
	if u.told {
		m.record(happening(Event{Kind: EventServerBack, Server: l.Via.Addr(), Detail: fmt.Sprintf("attempts without an answer: %d, leases overdue: %d", u.attempts, overdue)}))
	}
	if u.logged {
		m.log.Info("DHCP server answers again", "server", l.Via.Addr(), "unanswered", u.attempts, "overdue", overdue)
	}
}
