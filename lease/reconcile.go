package lease

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Finding is one difference between the engine and the leases, and what was
// done, or would be, about it.
type Finding struct {
	Action    Action     `json:"action"`
	Address   netip.Addr `json:"address"`
	MAC       MAC        `json:"mac"`
	Name      string     `json:"name"`
	Container string     `json:"container"`
	Network   string     `json:"network"` // the engine's name of it, where it has one
	Detail    string     `json:"detail"`
}

// Action is what a reconcile does.
type Action string

// The actions.
const (
	// Missed: no container has the lease. It is released when a later
	// reconcile, orphanAge from now, still finds none: it may be starting.
	Missed Action = "missed"
	// Released: the lease went back to its server.
	Released Action = "released"
	// Adopted: the endpoint had no lease here. It is kept from now on.
	Adopted Action = "adopted"
	// Resumed: the lease of a former host's identity is a container's here,
	// and renewed again.
	Resumed Action = "resumed"
	// Forgotten: the lease of a former host's identity is nobody's here. It may
	// be the former host's, so the server isn't told.
	Forgotten Action = "forgotten"
	// Named: the container's name and ID were stored; no difference of leases.
	Named Action = "named"
	// Refused: the endpoint can't be adopted.
	Refused Action = "refused"
)

const (
	// orphanAge is how long a lease must be without an endpoint.
	orphanAge = 5 * time.Minute
	// adoptTime is how long all servers may take to confirm one identity of an
	// endpoint, adoptions how many endpoints are asked for at once.
	adoptTime = 2 * time.Second
	adoptions = 16
)

// Reconcile compares the leases with what the engine has, both ways, and mends
// what differs; a dry run only tells. An inventory without networks is refused
// while there are leases: it is most likely another engine's.
func (m *Manager) Reconcile(ctx context.Context, seen Inventory, dryRun bool) ([]Finding, error) {
	m.reconciling.Lock()
	defer m.reconciling.Unlock()
	r := &reconciliation{Manager: m, seen: seen, dryRun: dryRun, taken: map[place]bool{}, unanswered: map[string]int{}}
	places, pool := m.snapshot()
	if len(places) > 0 {
		// Whether leases wait is known only once the host is.
		if _, err := m.self(ctx, pool); err != nil {
			m.log.Warn("host identity not known yet", "error", err)
		}
	}
	if len(seen.Networks) == 0 && len(places) > 0 {
		return nil, fmt.Errorf("the engine has no network of this driver, but %d leases are held: is it the right engine (--docker)? If it is, give them back with: oam-docker-ipam release ADDRESS", len(places))
	}

	var strangers []endpoint
	for _, n := range seen.Networks {
		pool, wrong := n.pool()
		if wrong != nil && n.SharedMAC {
			// Nothing but its options tells its leases from another network's.
			return nil, fmt.Errorf("network %s: %w", n.Name, wrong)
		}
		for _, a := range n.Attachments {
			ep := endpoint{a, n.Name, pool}
			at, err := ep.place(), wrong
			if err == nil {
				at.subnet, err = pool.Subnet, pool.inSubnet(a.Prefix.Addr())
			}
			r.taken[at] = true
			l, known := places[at]
			switch {
			case known:
				// Even where the network itself would be refused today.
				if err := r.meet(ctx, l, ep); err != nil {
					return r.findings, err
				}
			case err != nil:
				r.found(Refused, ep.lease(), n.Name, err.Error())
			default:
				strangers = append(strangers, ep)
			}
		}
	}
	if len(places) > 0 || !dryRun {
		// Otherwise a dry run would be the first to store who this host is.
		r.makeMACs(ctx, strangers, places)
	}
	// Endpoints first: what they replace isn't missed.
	replaced := r.adoptAll(ctx, strangers)
	for at, l := range places {
		if !r.taken[at] && !replaced[l.Key()] {
			if err := r.miss(ctx, l); err != nil {
				return r.findings, err
			}
		}
	}
	slices.SortFunc(r.findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Action, b.Action), a.Address.Compare(b.Address), cmp.Compare(a.MAC.String(), b.MAC.String()))
	})
	return r.findings, ctx.Err()
}

// snapshot lists the leases, and one of their pools.
func (m *Manager) snapshot() (leases map[place]Lease, pool Pool) {
	leases = map[place]Lease{}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.pools {
		for _, e := range p.byMAC {
			leases[p.place(e.lease)], pool = e.lease, p.Pool
		}
	}
	return leases, pool
}

// reconciliation is one run of Reconcile.
type reconciliation struct {
	*Manager
	seen   Inventory
	dryRun bool
	taken  map[place]bool // where the engine has an endpoint

	// results guards what follows.
	results     sync.Mutex
	findings    []Finding
	unanswered  map[string]int // endpoints in a row, by adopted pool
	unconfirmed int            // adopted so far
}

func (r *reconciliation) found(a Action, l Lease, network, detail string) {
	r.results.Lock()
	defer r.results.Unlock()
	r.findings = append(r.findings, Finding{Action: a, Address: l.Addr(), MAC: l.MAC, Name: l.Name, Container: l.Container, Network: network, Detail: detail})
}

// reconciled is the event of what was done about a lease.
func (l Lease) reconciled(a Action, detail string) Event {
	return l.event(EventReconciled, string(a)+": "+detail)
}

// endpoint is an attachment with its network.
type endpoint struct {
	at      Attachment
	network string
	pool    Pool // without ID
}

// lease is the endpoint as a lease of which nothing else is known.
func (e endpoint) lease() Lease {
	return Lease{MAC: e.at.MAC, Name: e.at.Name, Container: e.at.Container, Prefix: e.at.Prefix}
}

func (e endpoint) place() place { return e.pool.place(e.lease()) }

// place is where an endpoint and its lease meet. The same address may be in two
// networks, on links that don't: the MAC tells them apart, and where that is
// shared, what the networks' users gave.
type place struct {
	subnet  netip.Prefix
	addr    netip.Addr
	mac     MAC
	network string
}

func (p Pool) place(l Lease) place {
	at := place{subnet: l.Prefix.Masked(), addr: l.Addr()}
	if p.SharedMAC {
		at.network = p.adoptedID()
	} else {
		at.mac = l.MAC
	}
	return at
}

// makeMACs gives each endpoint that has no MAC of its own one that no other has.
func (r *reconciliation) makeMACs(ctx context.Context, strangers []endpoint, leases map[place]Lease) {
	inUse := map[MAC]bool{}
	for at, l := range leases {
		inUse[l.MAC] = inUse[l.MAC] || r.taken[at]
	}
	for i, ep := range strangers {
		mac := ep.at.MAC
		if ep.pool.SharedMAC {
			if mac = r.madeMAC(ctx, ep.pool, ep.at.Name); inUse[mac] {
				mac = randomMAC()
			}
		}
		strangers[i].at.MAC, inUse[mac] = mac, true
	}
}

// change edits a lease as it is now, if it is still the one that was listed.
func (r *reconciliation) change(ctx context.Context, l Lease, edit func(p *pool, e *entry, now Lease) error) error {
	r.mu.Lock()
	p := r.pools[l.Pool]
	r.mu.Unlock()
	if p == nil {
		return nil
	}
	done, err := r.claim(ctx, p, l.MAC, nil)
	if err != nil {
		return err
	}
	defer done()
	r.mu.Lock()
	e := p.byMAC[l.MAC]
	var now Lease
	if e != nil {
		now = e.lease
	}
	r.mu.Unlock()
	if e == nil || now.Addr() != l.Addr() {
		return nil
	}
	return edit(p, e, now)
}

// meet updates a lease from the endpoint that has it.
func (r *reconciliation) meet(ctx context.Context, l Lease, ep endpoint) error {
	// Where the engine tells names, the lease has the one that made its identity.
	called := func(l Lease) Lease {
		l.Container = ep.at.Container
		if !r.seen.NamesEndpoints || l.Name == "" {
			l.Name = ep.at.Name
		}
		return l
	}
	waits, after := r.waits(l), called(l)
	named := after.Container != l.Container || after.Name != l.Name
	if r.dryRun {
		switch {
		case waits:
			r.found(Resumed, after, ep.network, "would be renewed again")
		case named:
			r.found(Named, after, ep.network, "name and ID would be stored")
		}
		return nil
	}
	if !waits && !named {
		// Without the MAC's claim, which would interrupt a renewal.
		r.mu.Lock()
		defer r.mu.Unlock()
		if p := r.pools[l.Pool]; p != nil && p.byMAC[l.MAC] != nil {
			p.byMAC[l.MAC].missed = time.Time{}
		}
		return nil
	}
	return r.change(ctx, l, func(p *pool, e *entry, now Lease) error {
		if waits {
			r.mu.Lock()
			now.Host = r.identity.ID
			r.mu.Unlock()
		}
		now = called(now)
		change := Change{PutLeases: []Lease{now}}
		if waits {
			change.PutEvents = []Event{now.reconciled(Resumed, "renewed again")}
		}
		if err := r.commit(change); err != nil {
			return fmt.Errorf("store the lease %s: %w", now.Addr(), err)
		}
		r.mu.Lock()
		e.missed, e.lease = time.Time{}, now
		if waits {
			r.scheduleLocked(p, e, r.clock.now())
		}
		r.mu.Unlock()
		if waits {
			r.found(Resumed, now, ep.network, "renewed again")
		} else {
			r.found(Named, now, ep.network, "name and ID stored")
		}
		return nil
	})
}

// miss deals with a lease that no endpoint has.
func (r *reconciliation) miss(ctx context.Context, l Lease) error {
	return r.change(ctx, l, func(p *pool, e *entry, now Lease) error {
		r.mu.Lock()
		missed := e.missed
		if missed.IsZero() && !r.dryRun {
			e.missed = r.clock.now()
		}
		waits := r.waitsLocked(now)
		r.mu.Unlock()
		if missed.IsZero() || r.clock.now().Sub(missed) < orphanAge {
			r.found(Missed, now, "", fmt.Sprintf("no container has it: released by a reconcile that still finds none in %s", orphanAge))
			return nil
		}
		action, detail := Released, "no container has had it for "+r.clock.now().Sub(missed).Round(time.Second).String()
		if waits {
			action = Forgotten
		}
		if r.dryRun {
			r.found(action, now, "", detail+" (dry run)")
			return nil
		}
		if err := r.release(ctx, p, now, true); err != nil {
			return err
		}
		r.record(now.reconciled(action, detail))
		r.found(action, now, "", detail)
		return nil
	})
}

// adoptAll adopts endpoints that no lease matched. It returns the stale leases
// whose places they take.
func (r *reconciliation) adoptAll(ctx context.Context, strangers []endpoint) (replaced map[Key]bool) {
	replaced = map[Key]bool{}
	var wg sync.WaitGroup
	slots := make(chan struct{}, adoptions)
	for _, ep := range strangers {
		stale, moved, recent, err := r.inPlaceOf(ep)
		if err != nil {
			r.found(Refused, ep.lease(), ep.network, err.Error())
		}
		if err != nil || recent {
			continue
		}
		for _, l := range []Lease{stale, moved} {
			if l.ClientID != nil {
				replaced[l.Key()] = true
			}
		}
		if r.dryRun {
			r.found(Adopted, ep.lease(), ep.network, "would be confirmed with the servers and kept")
			continue
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			l, detail, err := r.adopt(ctx, ep, stale, moved)
			if err != nil {
				r.found(Refused, ep.lease(), ep.network, err.Error())
				return
			}
			r.found(Adopted, l, ep.network, detail)
		})
	}
	wg.Wait()
	return replaced
}

// inPlaceOf finds a lease of the endpoint's address under another MAC, and one of
// its MAC that it moved from: a restored database has such. Recent reports that what is known here is newer than what
// the engine said may be: it was read while a container came or went. Leases that
// another endpoint has are that one's, on a link that doesn't meet this one's.
func (r *reconciliation) inPlaceOf(ep endpoint) (stale, moved Lease, recent bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.clock.now()
	for _, p := range r.pools {
		if p.Subnet != ep.pool.Subnet {
			continue
		}
		for _, e := range []*entry{p.byAddr[ep.at.Prefix.Addr()], p.byMAC[ep.at.MAC]} {
			switch {
			case e == nil, e.lease.MAC != ep.at.MAC && r.taken[p.place(e.lease)]:
			case now.Sub(e.since) < orphanAge:
				return Lease{}, Lease{}, true, nil
			case e.lease.MAC != ep.at.MAC:
				stale = e.lease
			case r.taken[p.place(e.lease)]:
				return Lease{}, Lease{}, false, fmt.Errorf("another container has its MAC address: %w", inUse(e.lease))
			default:
				moved = e.lease
			}
		}
	}
	return stale, moved, r.bindings.leftSince(ep.place(), time.Now().Add(-orphanAge)), nil
}

// adopt makes a lease of an endpoint: it asks the servers to prolong the address
// for the identity that the endpoint most likely had. Where none agrees, the
// lease counts as lost, and the same address is asked for as for any other.
func (r *reconciliation) adopt(ctx context.Context, ep endpoint, stale, moved Lease) (Lease, string, error) {
	p, err := r.adoptedPool(ep.pool)
	if err != nil {
		return Lease{}, "", err
	}
	base := ep.lease()
	base.Pool, base.Prefix = p.ID, netip.PrefixFrom(ep.at.Prefix.Addr(), p.Subnet.Bits())
	if err := r.leaveBehind(ctx, moved); err != nil {
		return Lease{}, "", err
	}
	stale, done, err := r.claimStale(ctx, stale)
	if err != nil {
		return Lease{}, "", err
	}
	defer done()
	done, err = r.claim(ctx, p, ep.at.MAC, nil)
	if err != nil {
		return Lease{}, "", err
	}
	defer done()
	base.Host, err = r.self(ctx, p.Pool)
	if err != nil {
		r.log.Warn("host identity not known yet", "error", err)
	}
	candidates := r.candidates(p.Pool, base, stale)
	done, err = r.claimIdentities(ctx, p.Pool, candidates)
	if err != nil {
		return Lease{}, "", err
	}
	defer done()

	var detail string
	answered := false
	for _, base.ClientID = range candidates {
		if r.silent(p.ID) {
			break
		}
		fresh, err := r.prolong(ctx, p.Pool, base)
		if err == nil {
			r.hear(p.ID, true)
			fresh.Pool, fresh.Prefix, fresh.Name, fresh.Container, fresh.Host = base.Pool, base.Prefix, base.Name, base.Container, base.Host
			detail = "confirmed by server " + fresh.Server.String()
			return fresh, detail, r.enter(p, fresh, stale, detail)
		}
		answered = answered || !errors.Is(err, ErrNoAnswer)
		detail = cmp.Or(detail, err.Error())
	}
	r.hear(p.ID, answered)
	if ctx.Err() != nil {
		return Lease{}, "", context.Cause(ctx)
	}
	base.ClientID, base.Obtained = candidates[0], r.clock.now()
	l := base.lost(base.Obtained)
	detail = "not confirmed yet, its address is asked for again: " + cmp.Or(detail, ErrNoAnswer.Error())
	r.log.Error("endpoint adopted without a lease", "address", l.Addr(), "mac", l.MAC, "name", l.Name, "why", detail)
	return l, detail, r.enter(p, l, stale, detail)
}

// candidates are the identities that the endpoint of an address may have, the
// most likely first: the name whose it was, its own, its MAC.
func (r *reconciliation) candidates(p Pool, l, stale Lease) (all [][]byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if stale.byName() {
		all = append(all, stale.ClientID)
	}
	for _, b := range r.bindings.pending {
		if b.Lease.Prefix == l.Prefix {
			all = append(all, b.Lease.ClientID)
		}
	}
	if l.Host != "" && r.seen.NamesEndpoints && r.options(p).ClientID != ClientIDMAC && l.Name != "" {
		named := nameClientID(l.Host, p.Subnet, l.Name)
		live := r.byIdentity[BindingKey{p.Subnet.String(), string(named)}] != nil // elsewhere, or it is the stale one
		if !live && !slices.ContainsFunc(all, func(id []byte) bool { return bytes.Equal(id, named) }) {
			all = append(all, named)
		}
	}
	return append(all, MACClientID(l.MAC))
}

// claimStale claims a stale lease, before its successor: it is zero where it
// has changed meanwhile.
func (r *reconciliation) claimStale(ctx context.Context, stale Lease) (Lease, func(), error) {
	r.mu.Lock()
	p := r.pools[stale.Pool]
	r.mu.Unlock()
	if p == nil {
		return Lease{}, func() {}, nil
	}
	done, err := r.claim(ctx, p, stale.MAC, nil)
	if err != nil {
		return Lease{}, nil, err
	}
	if l, holds := r.held(p, stale.MAC); holds && l.Addr() == stale.Addr() {
		return l, done, nil
	}
	return Lease{}, done, nil
}

// leaveBehind gives back the lease that an endpoint had before it moved, or none.
// Servers don't mind when it is another client's by now.
func (r *reconciliation) leaveBehind(ctx context.Context, moved Lease) error {
	l, done, err := r.claimStale(ctx, moved)
	if err != nil {
		return err
	}
	defer done()
	r.mu.Lock()
	p := r.pools[l.Pool]
	r.mu.Unlock()
	if p == nil {
		return nil
	}
	return r.release(ctx, p, l, true)
}

// claimIdentities claims several, always in the same order.
func (r *reconciliation) claimIdentities(ctx context.Context, p Pool, ids [][]byte) (done func(), err error) {
	var claims []func()
	done = func() {
		for _, end := range claims {
			end()
		}
	}
	for _, id := range slices.CompactFunc(slices.SortedFunc(slices.Values(ids), bytes.Compare), bytes.Equal) {
		end, err := r.claimIdentity(ctx, BindingKey{p.Subnet.String(), string(id)})
		if err != nil {
			done()
			return nil, err
		}
		claims = append(claims, end)
	}
	return done, nil
}

// silent reports whether the servers of an adopted pool don't answer: then
// thousands of endpoints needn't wait for them one by one. That about one there
// is no answer says little: servers don't answer clients that they don't know.
func (r *reconciliation) silent(pool string) bool {
	r.results.Lock()
	defer r.results.Unlock()
	return r.unanswered[pool] >= adoptions
}

func (r *reconciliation) hear(pool string, answered bool) {
	r.results.Lock()
	defer r.results.Unlock()
	r.unanswered[pool]++
	if answered {
		r.unanswered[pool] = 0
	}
}

// prolong asks all servers once to extend the lease of an address.
func (r *reconciliation) prolong(ctx context.Context, p Pool, l Lease) (Lease, error) {
	ctx, cancel := context.WithTimeout(ctx, adoptTime)
	defer cancel()
	fresh, err := r.ask(func() (Lease, error) { return r.client.Rebind(ctx, p, l) })
	if err == nil && fresh.Addr() != l.Addr() {
		r.sendRelease(ctx, p, fresh)
		return Lease{}, fmt.Errorf("server %s gave %s instead, which was given back", fresh.Server, fresh.Addr())
	}
	return fresh, err
}

// enter makes an adopted lease known, as admit does, in place of a stale one and
// of its identity's binding, unless the engine has asked for one meanwhile.
func (r *reconciliation) enter(p *pool, l, stale Lease, detail string) error {
	key := l.bindingKey()
	change := Change{PutLeases: []Lease{l}, PutEvents: []Event{l.reconciled(Adopted, detail)}}
	r.mu.Lock()
	for _, other := range r.pools {
		if other.Subnet != p.Subnet {
			continue
		}
		if e := other.byMAC[l.MAC]; e != nil {
			defer r.mu.Unlock()
			return fmt.Errorf("it came while its lease was adopted: %w", inUse(e.lease))
		}
	}
	var former *entry
	old := r.pools[stale.Pool]
	if old != nil {
		former = old.byMAC[stale.MAC]
		change.DropLeases = []Key{stale.Key()}
		r.dropLocked(old, former)
	}
	e := p.byAddr[l.Addr()]
	if e == nil {
		e = r.byIdentity[key]
	}
	if e != nil {
		if former != nil {
			r.restoreLocked(old, former)
		}
		defer r.mu.Unlock()
		return fmt.Errorf("it can't be adopted: %w", inUse(e.lease))
	}
	e = r.addLocked(p, l)
	for held, pending := range r.bindings.pending {
		// Its release would take the address from under the container.
		if held != key && pending.Lease.Prefix == l.Prefix {
			change.DropBindings = append(change.DropBindings, held)
		}
	}
	if _, bound := r.bindings.get(key); bound {
		change.DropBindings = append(change.DropBindings, key)
	}
	r.mu.Unlock()

	err := r.commit(change)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.dropLocked(p, e)
		if former != nil {
			r.restoreLocked(old, former)
		}
		return fmt.Errorf("store the lease: %w", err)
	}
	for _, held := range change.DropBindings {
		r.bindings.drop(held)
	}
	now := r.clock.now()
	at := l.Retry(now)
	if e.told = l.State(now) == Lost; e.told {
		r.results.Lock()
		at = now.Add(startOver + time.Duration(r.unconfirmed)*overdueSpacing)
		r.unconfirmed++
		r.results.Unlock()
	} else {
		r.renewed = time.Now()
	}
	r.scheduleLocked(p, e, at)
	return nil
}

// restoreLocked takes up an entry again that was dropped.
func (r *reconciliation) restoreLocked(p *pool, former *entry) {
	e := r.addLocked(p, former.lease)
	e.told, e.since, e.missed = former.told, former.since, former.missed
	r.scheduleLocked(p, e, r.attemptLocked(e))
}

// adoptedPool is the pool of adopted leases of all networks like one.
func (m *Manager) adoptedPool(like Pool) (*pool, error) {
	like.ID, like.Adopted = like.adoptedID(), true
	p, _, err := m.takeUp(like)
	return p, err
}

// takeAdopted moves an endpoint's lease from the adopted pool, where it stood
// because its PoolID wasn't known, to the pool that now asks about it.
func (m *Manager) takeAdopted(ctx context.Context, p *pool, mac MAC) error {
	m.mu.Lock()
	var from *pool
	for _, other := range m.pools {
		if other != p && other.byMAC[mac] != nil && other.standsFor(p.ID) {
			from = other
		}
	}
	m.mu.Unlock()
	if from == nil {
		return nil
	}
	done, err := m.claim(ctx, from, mac, nil)
	if err != nil {
		return err
	}
	defer done()
	l, holds := m.held(from, mac)
	if !holds {
		return nil
	}
	moved := l
	moved.Pool = p.ID
	if err := m.commit(Change{DropLeases: []Key{l.Key()}, PutLeases: []Lease{moved}}); err != nil {
		return fmt.Errorf("store the lease: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	was := from.byMAC[mac]
	m.dropLocked(from, was)
	e := m.addLocked(p, moved)
	e.told, e.since = was.told, was.since
	m.scheduleLocked(p, e, m.attemptLocked(e))
	return nil
}
