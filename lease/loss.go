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
	failed map[netip.AddrPort]int // unanswered attempts, by the way to the server
	logged time.Time              // the last line
	// told are the ways in the last line, until they are heard of: a server may
	// be silent to some only, for good.
	told map[netip.AddrPort]bool
}

func (s *silence) forget(via netip.AddrPort) {
	delete(s.failed, via)
	delete(s.told, via)
}

// unheard counts an attempt that nobody answered.
func (m *Manager) unheard(l Lease, err error) {
	now := time.Now()
	m.mu.Lock()
	s := &m.silence
	if s.failed == nil {
		s.failed = map[netip.AddrPort]int{}
	}
	s.failed[l.Via]++
	total := 0
	var servers []netip.Addr
	for via, n := range s.failed {
		total += n
		servers = append(servers, via.Addr())
	}
	tell := now.Sub(s.logged) >= silencePace
	var silent []Event
	if tell {
		known := s.told
		s.logged, s.told = now, map[netip.AddrPort]bool{}
		for via, n := range s.failed {
			s.told[via] = true
			if !known[via] {
				silent = append(silent, happening(Event{Kind: EventServerSilent, Server: via.Addr(), Detail: fmt.Sprintf("attempts without an answer: %d: %v", n, err)}))
			}
		}
	}
	m.mu.Unlock()
	m.record(silent...)
	if tell {
		m.log.Warn("DHCP servers don't answer: leases are renewed as soon as they do", "servers", servers, "attempts", total, "error", err)
	}
}

// forgetSilence forgets that a lease's server doesn't answer.
func (m *Manager) forgetSilence(l Lease) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.silence.forget(l.Via)
}

// heard notes that a lease's server answered. After a silence, what is overdue
// there is asked for at once.
func (m *Manager) heard(l Lease) {
	m.mu.Lock()
	failed, told := m.silence.failed[l.Via], m.silence.told[l.Via]
	m.silence.forget(l.Via)
	overdue := 0
	if failed > 0 {
		now := m.clock.now()
		overdue = m.armLocked(func(e *entry) bool { return e.lease.Via == l.Via && e.lease.State(now) != Bound })
	}
	m.mu.Unlock()
	if told {
		m.record(happening(Event{Kind: EventServerBack, Server: l.Via.Addr(), Detail: fmt.Sprintf("attempts without an answer: %d, leases overdue: %d", failed, overdue)}))
		m.log.Info("DHCP server answers again", "server", l.Via.Addr(), "unanswered", failed, "overdue", overdue)
	}
}
