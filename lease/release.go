package lease

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Release takes an address from an endpoint that has gone. The server gets it
// back, where the identity is a name not before the network's release delay.
// Unknown pools and addresses are no error: the engine repeats itself and
// releases gateways that it never requested. It finishes even when the caller
// goes.
func (m *Manager) Release(ctx context.Context, poolID string, addr netip.Addr) error {
	return m.releaseAddr(ctx, poolID, addr, false)
}

func (m *Manager) releaseAddr(ctx context.Context, poolID string, addr netip.Addr, atOnce bool) error {
	p, mac, found := m.find(poolID, addr)
	if p == nil {
		return nil
	}
	if !found {
		err := m.editPool(p, func(p *Pool) error {
			p.Reserved = slices.DeleteFunc(slices.Clone(p.Reserved), func(a netip.Addr) bool { return a == addr })
			return nil
		})
		if errors.Is(err, errRemoved) {
			return nil
		}
		return err
	}
	ctx = context.WithoutCancel(ctx)
	done, err := m.claim(ctx, p, mac, nil)
	if err != nil {
		return err
	}
	defer done()
	l, holds := m.held(p, mac)
	if !holds || l.Addr() != addr {
		return nil
	}
	return m.release(ctx, p, l, atOnce)
}

// find looks for the lease of an address, in its pool or among the adopted
// ones, whose PoolIDs aren't known. The pool is nil when there is none.
func (m *Manager) find(poolID string, addr netip.Addr) (p *pool, mac MAC, found bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p = m.pools[poolID]
	if p != nil {
		if e := p.byAddr[addr]; e != nil {
			return p, e.lease.MAC, true
		}
	}
	for _, adopted := range m.pools {
		if e := adopted.byAddr[addr]; e != nil && adopted.standsFor(poolID) {
			return adopted, e.lease.MAC, true
		}
	}
	return p, MAC{}, false
}

// release forgets a lease and, at once or after the delay, tells its server.
// The caller holds the MAC's claim. When the store fails, the lease stays:
// forgotten in memory only, it would come back with the next start.
func (m *Manager) release(ctx context.Context, p *pool, l Lease, atOnce bool) error {
	pool := m.current(p)
	b, change := m.leave(ctx, pool, l, atOnce)
	if err := m.commit(change); err != nil {
		return fmt.Errorf("remove lease %s from the database: %w", l.Addr(), err)
	}
	m.mu.Lock()
	m.dropLocked(p, p.byMAC[l.MAC])
	m.mu.Unlock()
	m.left(ctx, pool, b, change)
	return nil
}

// sendRelease tells the server. Its failure is only logged: the lease then ends
// at the server by itself.
func (m *Manager) sendRelease(ctx context.Context, p Pool, l Lease) {
	l.Pool = p.ID
	if err := m.client.Release(context.WithoutCancel(ctx), p, l); err != nil {
		m.record(l.event(EventLeft, fmt.Sprintf("release not sent, the server keeps the lease %s: %v", m.until(l), err)))
		m.log.Warn("release not sent: the server keeps the lease until it ends", "address", l.Addr(), "mac", l.MAC, "server", l.Server, "until", m.clock.wall(l.Expires), "error", err)
		return
	}
	m.record(l.event(EventReleased, ""))
	m.log.Info("lease released", "address", l.Addr(), "mac", l.MAC, "name", l.Name, "server", l.Server)
}

func (m *Manager) decline(ctx context.Context, p Pool, l Lease) {
	if err := m.client.Decline(context.WithoutCancel(ctx), p, l); err != nil {
		m.log.Warn("decline not sent", "address", l.Addr(), "mac", l.MAC, "server", l.Server, "error", err)
		return
	}
	l.Pool = p.ID
	m.record(l.event(EventDeclined, ""))
}

// Held is a lease as operators see it: with times of the wall clock, its state
// now, and the subnet of its pool.
type Held struct {
	Lease
	Subnet netip.Prefix
	// State is one of State's, or Waiting or Releasing.
	State string
}

// States that are not in RFC 2131 figure 5.
const (
	// Waiting: taken by another host, whose database this is. Nothing is sent
	// until a reconcile tells whether a container here has the address.
	Waiting = "waiting"
	// Releasing: no container has it, and its release waits for the identity to
	// come back.
	Releasing = "releasing"
)

// Leases lists every lease, sorted by address, then pool.
func (m *Manager) Leases() []Held { return m.LeasesThat(func(Held) bool { return true }) }

// LeasesThat lists those that fit, as Leases does. What fits is told of a lease
// isn't by the wall clock, and locks are held meanwhile.
func (m *Manager) LeasesThat(fits func(Held) bool) []Held {
	now := m.clock.now()
	m.mu.Lock()
	var all []Held
	add := func(l Held) {
		if fits(l) {
			all = append(all, l)
		}
	}
	for _, p := range m.pools {
		for _, e := range p.byMAC {
			add(Held{Lease: e.lease, Subnet: p.Subnet, State: m.stateLocked(e.lease, now)})
		}
	}
	for _, r := range m.bindings.pending {
		add(Held{Lease: r.Lease, Subnet: r.Lease.Prefix.Masked(), State: Releasing})
	}
	m.mu.Unlock()
	for i, l := range all {
		all[i].Lease = m.clock.onWall(l.Lease)
	}
	slices.SortFunc(all, func(a, b Held) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Pool, b.Pool), bytes.Compare(a.MAC[:], b.MAC[:]))
	})
	return all
}

// stateLocked is a lease's Held.State.
func (m *Manager) stateLocked(l Lease, now time.Time) string {
	if m.waitsLocked(l) {
		return Waiting
	}
	return l.State(now).String()
}

// ErrNoLease: an operator named a lease that isn't there.
var ErrNoLease = errors.New("no such lease")

// ReleaseByHand gives back, at once, the one lease of an address or MAC, in the
// given pool or, with "", in any. It returns the lease as it was. ErrNoLease
// when there is none; when there are several the error lists their pools.
func (m *Manager) ReleaseByHand(ctx context.Context, key, poolID string) (Held, error) {
	addr, addrErr := netip.ParseAddr(key)
	mac, macErr := ParseMAC(key)
	if addrErr != nil && macErr != nil {
		return Held{}, fmt.Errorf("release %q: neither an IPv4 address nor a MAC address", key)
	}
	var found []Held
	for _, l := range m.Leases() {
		if (poolID == "" || l.Pool == poolID) && (addrErr == nil && l.Addr() == addr || macErr == nil && l.MAC == mac) {
			found = append(found, l)
		}
	}
	switch len(found) {
	case 0:
		return Held{}, fmt.Errorf("release %s: %w", key, ErrNoLease)
	case 1:
		l := found[0]
		if l.State == Releasing {
			return l, m.releasePending(context.WithoutCancel(ctx), l.bindingKey())
		}
		return l, m.releaseAddr(ctx, l.Pool, l.Addr(), true)
	}
	var in []string
	for _, l := range found {
		in = append(in, fmt.Sprintf("%s (%s) in pool %s", l.Addr(), l.MAC, l.Pool))
	}
	return Held{}, fmt.Errorf("release %s: several leases, name one with --pool: %s", key, strings.Join(in, "; "))
}
