package lease

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"
)

// Endpoint is a container's interface in want of an address.
type Endpoint struct {
	MAC     MAC        // made by Acquire where the pool's endpoints have none
	Name    string     // the container's name; engines before 29 don't tell it
	Address netip.Addr // --ip; zero for any
}

// Acquire leases an address for an endpoint. The lease is on disk when Acquire
// returns; after an error, and when ctx ends because the caller is gone,
// nothing stays leased. An endpoint that holds a lease keeps it, where its MAC
// tells, one whose identity had one before gets that address again where the
// server agrees.
func (m *Manager) Acquire(ctx context.Context, poolID string, ep Endpoint) (Lease, error) {
	began := time.Now()
	l, err := m.request(ctx, poolID, ep)
	if err != nil && errors.Is(ctx.Err(), context.Canceled) {
		// Whatever it ended with: a server's silence, for one.
		err = fmt.Errorf("the engine gave up: %w (%w)", context.Canceled, err)
	}
	m.observer.Requested(time.Since(began), err)
	if err != nil {
		m.refuse(poolID, ep, err)
	}
	return l, err
}

// refuse notes that a request failed. One that the engine gave up was not refused.
func (m *Manager) refuse(poolID string, ep Endpoint, err error) {
	e := happening(Event{Kind: EventFailed, Pool: poolID, Address: ep.Address, MAC: ep.MAC, Name: ep.Name, Detail: err.Error()})
	m.mu.Lock()
	if p := m.pools[poolID]; p != nil && !errors.Is(err, context.Canceled) {
		p.refused++
		p.refusal = &e
	}
	m.mu.Unlock()
	m.record(e)
}

// request is Acquire, unobserved.
func (m *Manager) request(ctx context.Context, poolID string, ep Endpoint) (Lease, error) {
	caller := ctx
	ctx, cancel := context.WithTimeout(ctx, m.patience(poolID))
	defer cancel()
	p, err := m.pool(ctx, poolID)
	if err != nil {
		return Lease{}, err
	}
	pool := m.current(p)
	if !pool.SharedMAC {
		if !ep.MAC.Unicast() {
			return Lease{}, fmt.Errorf("MAC address %s is no endpoint's: it is zero or a group's", ep.MAC)
		}
		return m.acquire(ctx, caller, p, ep)
	}
	if err := pool.checkMode(m.options(pool)); err != nil {
		return Lease{}, err
	}
	ep.MAC = m.madeMAC(ctx, pool, ep.Name)
	l, err := m.acquire(ctx, caller, p, ep)
	if errors.Is(err, errMACInUse) {
		// The name is live in another network of the subnet, or it was another
		// container's: engines rename endpoints without telling us. A lost release
		// looks the same, and an address that two containers have would be worse.
		ep.MAC = randomMAC()
		l, err = m.acquire(ctx, caller, p, ep)
	}
	return l, err
}

// errMACInUse: another endpoint has the MAC.
var errMACInUse = errors.New("MAC address in use")

// acquire is Acquire for an endpoint with a MAC, until ctx ends; caller says
// whether somebody still waits for the lease.
func (m *Manager) acquire(ctx, caller context.Context, p *pool, ep Endpoint) (Lease, error) {
	done, err := m.claim(ctx, p, ep.MAC, nil)
	if err != nil {
		return Lease{}, err
	}
	defer done()
	// From the first endpoint on there are no auxiliary addresses. This is
	// also where a network that is being removed is refused.
	if err := m.editPool(p, func(p *Pool) error { p.AuxUntil = time.Time{}; return nil }); err != nil {
		return Lease{}, err
	}
	if err := m.takeAdopted(ctx, p, ep.MAC); err != nil {
		return Lease{}, err
	}
	pool := m.current(p)
	held, holds := m.held(p, ep.MAC)
	if holds && m.foreign(ctx, pool, held) {
		// It is another host's: it is forgotten when this endpoint has its own.
		held, holds = Lease{}, false
	}
	other := holds && ep.Address.IsValid() && ep.Address != held.Addr()
	switch {
	case !holds:
	case pool.SharedMAC:
		return Lease{}, fmt.Errorf("%w: %w", errMACInUse, inUse(held))
	case held.Name != "" && ep.Name != "" && held.Name != ep.Name:
		return Lease{}, fmt.Errorf("MAC address %s is in use by container %s, which holds %s: give %s another --mac-address, or if %s is gone run: oam-docker-ipam release %s",
			ep.MAC, held.Name, held.Addr(), ep.Name, held.Name, held.Addr())
	case !other && held.State(m.clock.now()) != Lost:
		return m.keepHeld(p, held, ep.Name)
	case other && (ep.Name == "" || held.Name == ""):
		// It may be another container, and the held address in use.
		return Lease{}, inUse(held)
	}

	want := wish{pool: pool, ep: ep, clientID: held.ClientID}
	if !holds {
		if want.clientID, err = m.clientID(ctx, pool, ep); err != nil {
			return Lease{}, err
		}
	}
	if err := m.available(p, ep); err != nil {
		return Lease{}, err
	}
	// Before any identity is claimed: two requests that want each other's
	// addresses would wait for each other.
	if err := m.clearWay(ctx, &want); err != nil {
		return Lease{}, err
	}
	var unclaim func()
	if holds {
		// What a lease was born with stays with it.
		unclaim, err = m.claimIdentity(ctx, held.bindingKey())
	} else {
		want.clientID, unclaim, err = m.takeIdentity(ctx, pool, ep, want.clientID)
	}
	if err != nil {
		return Lease{}, err
	}
	defer unclaim()
	// Another one of this identity may have come first.
	if err := m.available(p, ep); err != nil {
		return Lease{}, err
	}
	m.mu.Lock()
	want.binding, want.known = m.bindings.get(BindingKey{pool.Subnet.String(), string(want.clientID)})
	m.mu.Unlock()
	switch {
	case other:
		// The release of the old address was lost.
		if err := m.release(caller, p, held, true); err != nil {
			return Lease{}, err
		}
	case holds:
		want.binding, want.known = Binding{Lease: held}, true
	}
	l, err := m.obtain(ctx, &want)
	if err != nil {
		return Lease{}, err
	}
	l.Pool, l.Prefix = pool.ID, netip.PrefixFrom(l.Addr(), pool.Subnet.Bits())
	// Not before it is settled whose this address is: its former holder may be
	// among the overdue.
	defer m.answered(l)
	if err := m.admit(caller, p, l); err != nil {
		return Lease{}, err
	}
	m.granted(p, l)
	if old := want.binding; want.known && !holds && !old.Released && old.Lease.Addr() != l.Addr() {
		// Its server was silent, another one wasn't.
		m.sendRelease(caller, old.pool(), old.Lease)
	}
	return l, nil
}

// answered notes that a request's lease came from its server, unless it is a
// stored one, for want of an answer.
func (m *Manager) answered(l Lease) {
	if l.State(m.clock.now()) == Bound {
		m.heard(l)
	}
}

// held is the lease that a MAC has in a pool.
func (m *Manager) held(p *pool, mac MAC) (Lease, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := p.byMAC[mac]; e != nil {
		return e.lease, true
	}
	return Lease{}, false
}

// wish is what an endpoint wants of the servers.
type wish struct {
	pool     Pool
	ep       Endpoint
	clientID []byte
	// binding is what its identity had before, where that is known and has not
	// come to its end meanwhile.
	binding Binding
	known   bool
	// cleared: a release that was in its way has just been sent.
	cleared bool
}

// accept refuses what the endpoint must not have.
func (w wish) accept(addr netip.Addr) error {
	if w.ep.Address.IsValid() && addr != w.ep.Address {
		return fmt.Errorf("asked for %s, the DHCP server offers %s: %s is taken, reserved, or not in its range", w.ep.Address, addr, w.ep.Address)
	}
	return w.pool.allows(addr, w.ep.Address.IsValid())
}

const (
	// confirmTime is how long the leasing server may take to confirm an
	// address. It needs no check whether the address is free, so it answers at
	// once or never.
	confirmTime = time.Second
	// outageTime is how long a request whose identity has a lease waits for
	// any answer at all.
	outageTime = 4 * time.Second
	// releaseTime is how long a server may take to free an address that was
	// released: one of several threads, as Kea's are, reads the DISCOVER that
	// follows a RELEASE before that is done (2 of 100 times with Kea 2.2).
	releaseTime  = 100 * time.Millisecond
	releaseTries = 3
	// hostRetry is the wait after an attempt that didn't get as far as that.
	hostRetry = 500 * time.Millisecond
)

// obtain gets a lease that no neighbour disputes.
func (m *Manager) obtain(ctx context.Context, w *wish) (Lease, error) {
	for {
		l, err := m.negotiate(ctx, w)
		if err != nil {
			return Lease{}, err
		}
		taken, err := m.disputed(ctx, w.pool, l)
		if err != nil {
			m.giveBack(ctx, w.pool, l)
			m.answered(l)
			return Lease{}, err
		}
		if taken == nil {
			return l, nil
		}
		m.decline(ctx, w.pool, l)
		m.answered(l)
		if w.ep.Address.IsValid() {
			return Lease{}, taken
		}
		w.known = false
		// RFC 2131 section 3.1 (5).
		if !sleep(ctx, declineWait) {
			return Lease{}, fmt.Errorf("no time left for another address: %w", taken)
		}
	}
}

// negotiate gets a lease: the address that the identity had, where the leasing
// server confirms it (RFC 2131 section 3.2), else a new one (section 3.1), for
// which the former address is asked. Where nobody answers, an identity whose
// lease is neither released nor at its end has its address without asking
// (section 3.2 (4)).
func (m *Manager) negotiate(ctx context.Context, w *wish) (Lease, error) {
	patience := time.Now().Add(outageTime)
	req := Request{
		Pool: w.pool, MAC: w.ep.MAC, Name: w.ep.Name, ClientID: w.clientID, Address: w.ep.Address,
	}
	former := w.binding.Lease
	if !w.known || w.accept(former.Addr()) != nil {
		return m.discover(ctx, w, req, new(atomic.Bool))
	}
	former.MAC, former.Name = w.ep.MAC, w.ep.Name
	req.Address = former.Addr()
	if w.binding.Released {
		return m.discover(ctx, w, req, new(atomic.Bool))
	}
	l, err := m.confirm(ctx, w.pool, former)
	switch {
	case err == nil:
		return l, nil
	case errors.Is(err, ErrNAK):
		former.Pool = w.pool.ID
		m.record(former.event(EventNAK, err.Error()))
		req.Address, w.known = w.ep.Address, false
	case former.State(m.clock.now()) != Lost:
		return m.discoverOr(ctx, w, req, former, patience)
	}
	return m.discover(ctx, w, req, new(atomic.Bool))
}

// discover takes a lease by DISCOVER and notes whether anybody answered: an
// offer is an answer, refused or not.
func (m *Manager) discover(ctx context.Context, w *wish, req Request, answered *atomic.Bool) (Lease, error) {
	refused := false
	req.Accept = func(addr netip.Addr) error {
		answered.Store(true)
		err := w.accept(addr)
		refused = err != nil
		return err
	}
	for tries := 0; ; tries++ {
		refused = false
		l, err := m.ask(func() (Lease, error) { return m.client.Acquire(ctx, req) })
		if err == nil {
			return l, nil
		}
		if !w.cleared || !refused || tries == releaseTries || !sleep(ctx, releaseTime) {
			return Lease{}, err
		}
	}
}

// discoverOr is discover until patience ends, after which an endpoint whom
// nobody has answered has its stored lease.
func (m *Manager) discoverOr(ctx context.Context, w *wish, req Request, stored Lease, patience time.Time) (Lease, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var answered atomic.Bool
	timer := time.AfterFunc(time.Until(patience), func() {
		if !answered.Load() && stored.State(m.clock.now()) != Lost {
			cancel()
		}
	})
	defer timer.Stop()
	for {
		l, err := m.discover(ctx, w, req, &answered)
		switch {
		case err == nil:
			return l, nil
		case answered.Load() || errors.Is(err, ErrNAK) || stored.State(m.clock.now()) == Lost:
			return Lease{}, err
		case sleep(ctx, hostRetry):
			// The host's own fault, such as a link that is down, is known at
			// once and may pass.
			continue
		}
		m.log.Warn("no DHCP server answers: the container starts on its stored lease", "address", stored.Addr(), "mac", stored.MAC, "name", stored.Name, "until", m.clock.wall(stored.Expires), "error", err)
		return stored.unconfirmed(m.clock.now()), nil
	}
}

// sleep waits and reports whether ctx lasted.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// confirm asks the leasing server for an address that the identity had.
func (m *Manager) confirm(ctx context.Context, p Pool, former Lease) (Lease, error) {
	ctx, cancel := context.WithTimeout(ctx, confirmTime)
	defer cancel()
	return m.ask(func() (Lease, error) { return m.client.Confirm(ctx, p, former) })
}

// ask makes a call of the client whose answer is a lease and puts its times,
// which don't know of suspends, on the Manager's clock. A suspend within the
// call counts as one before it, so that no lease seems longer than it is.
func (m *Manager) ask(call func() (Lease, error)) (Lease, error) {
	asleep := m.clock.asleep()
	l, err := call()
	if err != nil {
		return Lease{}, err
	}
	return l.from(l.Obtained.Add(asleep)), nil
}

// available refuses what no server needs to be asked about: a --ip that can't
// be had, and a MAC that another network of the subnet has. To the server that
// is the same client: it would give the address a second time, and free it for
// both when one gives it back.
func (m *Manager) available(p *pool, ep Endpoint) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, other := range m.pools {
		if e := other.byMAC[ep.MAC]; e != nil && other != p && other.Subnet.Overlaps(p.Subnet) {
			return fmt.Errorf("%w: %s lives in another network of the subnet %s: %w", errMACInUse, ep.MAC, other.Subnet, inUse(e.lease))
		}
	}
	if !ep.Address.IsValid() {
		return nil
	}
	if err := p.allows(ep.Address, true); err != nil {
		return err
	}
	if e := p.byAddr[ep.Address]; e != nil && e.lease.MAC != ep.MAC {
		return inUse(e.lease)
	}
	return nil
}

func inUse(l Lease) error {
	return fmt.Errorf("address %s is leased to %s: if that container is gone run: oam-docker-ipam release %s", l.Addr(), l.holder(), l.Addr())
}

// holder names who has the lease, as well as is known.
func (l Lease) holder() string {
	if l.Name == "" {
		return l.MAC.String()
	}
	return l.Name + " (" + l.MAC.String() + ")"
}

// keepHeld answers an endpoint with the lease that it already has: its release
// was lost, or its engine asked twice.
func (m *Manager) keepHeld(p *pool, l Lease, name string) (Lease, error) {
	const detail = "it has this lease already: its release was lost, or the engine asked twice"
	if name != "" && name != l.Name {
		l.Name = name
		if err := m.commit(Change{PutLeases: []Lease{l}, PutEvents: []Event{l.event(EventGranted, detail)}}); err != nil {
			return Lease{}, fmt.Errorf("store the lease: %w", err)
		}
	} else {
		m.record(l.event(EventGranted, detail))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	e := p.byMAC[l.MAC]
	e.lease, e.missed = l, time.Time{}
	m.log.Info("lease confirmed", "address", l.Addr(), "mac", l.MAC, "name", l.Name)
	return l, nil
}

// admit makes a fresh lease known: first in memory, so that its address is
// taken, then on disk, where it takes the place of its identity's binding, then
// to its keeper. Where that fails, or the caller has gone, the lease goes back.
func (m *Manager) admit(caller context.Context, p *pool, l Lease) error {
	key := l.bindingKey()
	m.mu.Lock()
	l.Host = ""
	if m.identitySure {
		l.Host = m.identity.ID
	}
	if other := m.conflictLocked(p, l); other != nil {
		taken := *other
		m.mu.Unlock()
		// Releasing it would free the address under its holder; to the server a
		// holder of the same identity, who asked at the same time, is who
		// declines.
		if taken.MAC != l.MAC && !bytes.Equal(taken.ClientID, l.ClientID) {
			m.decline(caller, m.current(p), l)
		}
		err := fmt.Errorf("the DHCP server %s gave out an address twice: %w", l.Server, inUse(taken))
		m.record(l.event(EventConflict, err.Error()))
		return err
	}
	former := p.byMAC[l.MAC]
	e := m.addLocked(p, l)
	e.since = m.clock.now()
	detail := m.until(l)
	if l.State(m.clock.now()) != Bound {
		e.unconfirmed = 1
		detail = "stored lease, no server answered: " + detail
	}
	change := Change{PutLeases: []Lease{l}, PutEvents: []Event{l.event(EventGranted, detail)}}
	if _, bound := m.bindings.get(key); bound {
		change.DropBindings = []BindingKey{key}
	}
	m.mu.Unlock()

	err := m.commit(change)
	if err != nil {
		m.mu.Lock()
		m.dropLocked(p, e)
		if former != nil {
			// Lost as it is, it is still on disk.
			again := m.addLocked(p, former.lease)
			again.told = former.told
			m.scheduleLocked(p, again, former.lease.Retry(m.clock.now()))
		}
		m.mu.Unlock()
		m.giveBack(caller, m.current(p), l)
		return fmt.Errorf("store the lease: %w", err)
	}
	m.mu.Lock()
	m.bindings.drop(key)
	switch {
	case p.removed:
		err = errRemoved
	case caller.Err() != nil:
		err = context.Cause(caller)
	default:
		m.scheduleLocked(p, e, m.attemptLocked(e))
		if e.unconfirmed == 0 {
			m.renewed = time.Now()
		}
		m.mu.Unlock()
		m.log.Info("lease granted", "address", l.Addr(), "mac", l.MAC, "name", l.Name, "server", l.Server, "until", m.clock.wall(l.Expires))
		return nil
	}
	m.mu.Unlock()

	if kept := m.release(caller, p, l, false); kept != nil {
		m.mu.Lock()
		m.scheduleLocked(p, e, m.attemptLocked(e))
		m.mu.Unlock()
		return errors.Join(err, kept)
	}
	return err
}

// giveBack releases what couldn't be handed out, unless it is what its identity
// had before: that one's release is pending already.
func (m *Manager) giveBack(ctx context.Context, p Pool, l Lease) {
	m.mu.Lock()
	r := m.bindings.pending[BindingKey{p.Subnet.String(), string(l.ClientID)}]
	pending := r != nil && r.Lease.Addr() == l.Addr()
	m.mu.Unlock()
	if !pending {
		m.sendRelease(ctx, p, l)
	}
}

// conflictLocked finds a lease of the same address under another MAC in the same
// network, or by the same server in another one. An adopted lease is of this
// network, even while its server isn't known. A lost one counts: until the
// engine releases it, a container has that address. Networks on different
// servers may have the same addresses, on links that don't meet; so may the
// LANs of two interfaces, on which even the servers may have one IP address, but
// not one Ethernet address: that is one server, on one LAN with two interfaces.
func (m *Manager) conflictLocked(p *pool, l Lease) *Lease {
	for _, other := range m.pools {
		switch e := other.byAddr[l.Addr()]; {
		case e == nil, other == p && e.lease.MAC == l.MAC:
		case other == p, other.standsFor(p.ID), e.lease.Server == l.Server && (e.lease.Station == l.Station || !m.apart(other.Pool, p.Pool)):
			return &e.lease
		}
	}
	return nil
}

// apart reports whether two pools' servers are asked by broadcast on different
// LANs.
func (m *Manager) apart(a, b Pool) bool {
	global := *m.global.Load()
	x, y := a.under(global), b.under(global)
	return x.ByBroadcast() && y.ByBroadcast() && x.Interface != y.Interface
}
