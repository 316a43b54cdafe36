package lease

import (
	"cmp"
	"container/list"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Binding is what remains of a lease that its endpoint left: which address an
// identity had. The next endpoint of the same identity in the same subnet asks
// for that address again.
type Binding struct {
	// Lease is the lease as it was left; its Pool may be gone.
	Lease Lease `json:"lease"`
	// Options are those of its pool: the way to its server.
	Options Options `json:"options"`
	// Left is when the endpoint left, by the wall clock.
	Left time.Time `json:"left"`
	// Released: the server was told (DHCPRELEASE), or has ended the lease
	// itself. Until then the address is leased, and the release pending.
	Released bool `json:"released"`
}

// BindingKey tells a binding among all of this host's: its subnet and the
// identity, which is the client identifier (option 61).
type BindingKey struct {
	Subnet   string
	ClientID string // the bytes
}

// bindingKey is the key of a lease's binding.
func (l Lease) bindingKey() BindingKey {
	return BindingKey{l.Prefix.Masked().String(), string(l.ClientID)}
}

// Key is the binding's.
func (b Binding) Key() BindingKey { return b.Lease.bindingKey() }

// pool is what a Client needs to know of the binding's pool.
func (b Binding) pool() Pool {
	return Pool{ID: b.Lease.Pool, Subnet: b.Lease.Prefix.Masked(), Options: b.Options}
}

const (
	// maxBindings bounds the bindings of a subnet, bindingLife their age: most
	// are of random MACs, which never come again.
	maxBindings = 10_000
	bindingLife = 30 * 24 * time.Hour
)

// bindings are all that are remembered. Everything in it is guarded by
// Manager.mu.
type bindings struct {
	byKey map[BindingKey]*list.Element // of *remembered
	// bySubnet are they from the first that was left to the last.
	bySubnet map[string]*list.List
	// pending are they whose release waits, also by what somebody else may want.
	pending       map[BindingKey]*remembered
	pendingByAddr map[netip.Addr][]*remembered
	pendingByMAC  map[MAC][]*remembered
}

// remembered is a binding with the timer of its release.
type remembered struct {
	Binding
	timer *time.Timer // nil when no release is pending
}

// get returns a binding; zero when there is none.
func (b *bindings) get(key BindingKey) (Binding, bool) {
	if e := b.byKey[key]; e != nil {
		return e.Value.(*remembered).Binding, true
	}
	return Binding{}, false
}

// put remembers a binding, in place of another of its key.
func (b *bindings) put(what Binding) *remembered {
	key := what.Key()
	b.drop(key)
	if b.byKey == nil {
		b.byKey, b.bySubnet, b.pending = map[BindingKey]*list.Element{}, map[string]*list.List{}, map[BindingKey]*remembered{}
		b.pendingByAddr, b.pendingByMAC = map[netip.Addr][]*remembered{}, map[MAC][]*remembered{}
	}
	if b.bySubnet[key.Subnet] == nil {
		b.bySubnet[key.Subnet] = list.New()
	}
	r := &remembered{Binding: what}
	all := b.bySubnet[key.Subnet]
	before := all.Back()
	for before != nil && before.Value.(*remembered).Left.After(what.Left) {
		before = before.Prev()
	}
	if before == nil {
		b.byKey[key] = all.PushFront(r)
	} else {
		b.byKey[key] = all.InsertAfter(r, before)
	}
	if l := what.Lease; !what.Released {
		b.pending[key] = r
		b.pendingByAddr[l.Addr()] = append(b.pendingByAddr[l.Addr()], r)
		b.pendingByMAC[l.MAC] = append(b.pendingByMAC[l.MAC], r)
	}
	return r
}

// settle notes that a pending release was sent, at its place in the order.
func (b *bindings) settle(what Binding) {
	if e := b.byKey[what.Key()]; e != nil {
		b.unpend(e.Value.(*remembered))
		e.Value = &remembered{Binding: what}
	}
}

// unpend takes one out of those whose release waits.
func (b *bindings) unpend(r *remembered) {
	if r.timer != nil {
		r.timer.Stop()
	}
	key, l := r.Key(), r.Lease
	if b.pending[key] != r {
		return
	}
	delete(b.pending, key)
	without(b.pendingByAddr, l.Addr(), r)
	without(b.pendingByMAC, l.MAC, r)
}

// without takes one value from a key's.
func without[K comparable](m map[K][]*remembered, key K, r *remembered) {
	left := slices.DeleteFunc(m[key], func(other *remembered) bool { return other == r })
	if m[key] = left; len(left) == 0 {
		delete(m, key)
	}
}

// drop forgets a binding, or none.
func (b *bindings) drop(key BindingKey) {
	e := b.byKey[key]
	if e == nil {
		return
	}
	b.unpend(e.Value.(*remembered))
	delete(b.byKey, key)
	b.bySubnet[key.Subnet].Remove(e)
	if b.bySubnet[key.Subnet].Len() == 0 {
		delete(b.bySubnet, key.Subnet)
	}
}

// outdated lists the bindings of a subnet that are too many, one more being put,
// or too old. A pending release is never among them.
func (b *bindings) outdated(subnet string, now time.Time) (keys []BindingKey) {
	all := b.bySubnet[subnet]
	if all == nil {
		return nil
	}
	left := all.Len() + 1
	for e := all.Front(); e != nil; e = e.Next() {
		r := e.Value.(*remembered)
		if left <= maxBindings && now.Sub(r.Left) <= bindingLife {
			break
		}
		if r.Released {
			keys = append(keys, r.Key())
			left--
		}
	}
	return keys
}

// leftSince reports whether an endpoint left its place after a moment.
func (b *bindings) leftSince(at place, after time.Time) bool {
	all := b.bySubnet[at.subnet.String()]
	if all == nil {
		return false
	}
	for e := all.Back(); e != nil && e.Value.(*remembered).Left.After(after); e = e.Prev() {
		if l := e.Value.(*remembered).Lease; l.Addr() == at.addr && (l.MAC == at.mac || at.mac == MAC{}) {
			return true
		}
	}
	return false
}

func (b *bindings) stopLocked() {
	for _, r := range b.pending {
		// One that was left while the Manager closes has none.
		if r.timer != nil {
			r.timer.Stop()
		}
	}
}

// prune takes out of a store what nobody needs any more, bindings that are too
// old and adopted pools without leases, and sorts the other bindings by age.
func prune(store Store, saved *Saved) error {
	var change Change
	now := time.Now()
	saved.Bindings = slices.DeleteFunc(saved.Bindings, func(b Binding) bool {
		tooOld := b.Released && now.Sub(b.Left) > bindingLife
		if tooOld {
			change.DropBindings = append(change.DropBindings, b.Key())
		}
		return tooOld
	})
	slices.SortFunc(saved.Bindings, func(a, b Binding) int {
		return cmp.Or(a.Left.Compare(b.Left), cmp.Compare(a.Lease.MAC.String(), b.Lease.MAC.String()))
	})
	saved.Pools = slices.DeleteFunc(saved.Pools, func(p Pool) bool {
		empty := p.Adopted && !slices.ContainsFunc(saved.Leases, func(l Lease) bool { return l.Pool == p.ID })
		if empty {
			change.DropPools = append(change.DropPools, p.ID)
		}
		return empty
	})
	if len(change.DropBindings)+len(change.DropPools) == 0 {
		return nil
	}
	return store.Commit(change)
}

// resumeBindingLocked takes up one of the store. A pending release waits its
// whole time anew: while this daemon was away nobody could come back.
func (m *Manager) resumeBindingLocked(b Binding) {
	var sure bool
	if b.Lease, sure = m.clock.resume(b.Lease); !sure {
		b.Lease = b.Lease.lost(m.clock.now())
	}
	m.rememberLocked(b)
}

// rememberLocked remembers a binding and sets the timer of its release.
func (m *Manager) rememberLocked(b Binding) {
	r := m.bindings.put(b)
	if !b.Released && m.ctx.Err() == nil {
		r.timer = time.AfterFunc(*m.options(b.pool()).ReleaseDelay, func() { m.releaseLate(b.Key()) })
	}
}

// leave is the binding that a lease becomes when its endpoint leaves now, and
// the change that makes it so.
func (m *Manager) leave(ctx context.Context, p Pool, l Lease, atOnce bool) (Binding, Change) {
	delay := *m.options(p).ReleaseDelay
	b := Binding{
		Lease: l, Options: p.Options, Left: time.Now().Round(0),
		Released: atOnce || delay == 0 || !l.byName() || l.State(m.clock.now()) == Lost,
	}
	if b.Released {
		// Nobody will have this lease again, only its address.
		b.Lease.Options = nil
	}
	foreign := m.foreign(ctx, p, l)
	m.mu.Lock()
	defer m.mu.Unlock()
	change := Change{DropLeases: []Key{l.Key()}}
	switch {
	case foreign:
		// Its address is another host's now: nothing to give back or to come
		// back to.
		change.PutEvents = []Event{l.event(EventLeft, "the lease was taken by another host: nothing is sent")}
		return Binding{}, change
	case !b.Released:
		change.PutEvents = []Event{l.event(EventLeft, fmt.Sprintf("released in %s unless it comes back", delay))}
	}
	change.PutBindings, change.DropBindings = []Binding{b}, m.bindings.outdated(b.Key().Subnet, b.Left)
	return b, change
}

// left remembers what leave made, once it is on disk, and sends the release
// unless that waits.
func (m *Manager) left(ctx context.Context, p Pool, b Binding, c Change) {
	if len(c.PutBindings) == 0 {
		return
	}
	m.mu.Lock()
	for _, key := range c.DropBindings {
		m.bindings.drop(key)
	}
	m.rememberLocked(b)
	m.mu.Unlock()
	if b.Released {
		m.sendRelease(ctx, p, b.Lease)
		return
	}
	m.log.Info("container left: its lease is released unless it comes back", "address", b.Lease.Addr(), "mac", b.Lease.MAC, "name", b.Lease.Name, "in", *m.options(p).ReleaseDelay)
}

const (
	// releaseRetry is the wait after a store that failed.
	releaseRetry = time.Minute
	// maxLate bounds the pending releases that are sent at the same time. A
	// crowd waits for its turn here, where a container that comes back, or the
	// daemon's end, still finds the release pending.
	maxLate = 64
)

// releaseLate sends a pending release whose time has come.
func (m *Manager) releaseLate(key BindingKey) {
	if !m.begins() {
		return
	}
	defer m.wg.Done()
	select {
	case m.sending <- struct{}{}:
		defer func() { <-m.sending }()
	case <-m.ctx.Done():
		return
	}
	if err := m.releasePending(m.ctx, key); err != nil && m.ctx.Err() == nil {
		m.log.Error("pending release not sent: it is tried again", "in", releaseRetry, "error", err)
		m.mu.Lock()
		defer m.mu.Unlock()
		if r := m.bindings.pending[key]; r != nil {
			r.timer = time.AfterFunc(releaseRetry, func() { m.releaseLate(key) })
		}
	}
}

// releasePending sends a pending release, if it still is one, unless its
// identity is coming back right now: then that decides.
func (m *Manager) releasePending(ctx context.Context, key BindingKey) error {
	done, err := m.claimIdentity(ctx, key)
	if err != nil {
		return err
	}
	defer done()
	m.mu.Lock()
	b, known := m.bindings.get(key)
	m.mu.Unlock()
	if !known || b.Released {
		return nil
	}
	// A lease that has ended may be somebody else's: after a restored database,
	// even that of the same identity.
	silent := m.foreign(ctx, b.pool(), b.Lease) || b.Lease.State(m.clock.now()) == Lost
	b.Released, b.Lease.Options = true, nil
	if err := m.commit(Change{PutBindings: []Binding{b}}); err != nil {
		return fmt.Errorf("store the release of %s: %w", b.Lease.Addr(), err)
	}
	m.mu.Lock()
	m.bindings.settle(b)
	m.mu.Unlock()
	if !silent {
		m.sendRelease(ctx, b.pool(), b.Lease)
	}
	return nil
}

// clearWay sends the pending releases that a request must not find: those of the
// address or MAC that the endpoint wants, and its own identity's where that is
// an address that it must not have or came by another way. Its server would
// give it that one again.
func (m *Manager) clearWay(ctx context.Context, w *wish) error {
	m.mu.Lock()
	var inWay []Binding
	own := BindingKey{w.pool.Subnet.String(), string(w.clientID)}
	if r := m.bindings.pending[own]; r != nil && (w.accept(r.Lease.Addr()) != nil || !m.sameWay(r.pool(), w.pool)) {
		inWay = append(inWay, r.Binding)
	}
	for _, r := range slices.Concat(m.bindings.pendingByAddr[w.ep.Address], m.bindings.pendingByMAC[w.ep.MAC]) {
		known := slices.ContainsFunc(inWay, func(b Binding) bool { return b.Key() == r.Key() })
		if r.Key() != own && !known && r.Lease.Prefix.Overlaps(w.pool.Subnet) {
			inWay = append(inWay, r.Binding)
		}
	}
	m.mu.Unlock()
	for _, b := range inWay {
		l := b.Lease
		m.log.Info("pending release sent early: its address or MAC is wanted", "address", l.Addr(), "mac", l.MAC, "name", l.Name)
		if err := m.releasePending(ctx, b.Key()); err != nil {
			return err
		}
		w.cleared = true
	}
	return nil
}

// sameWay reports whether two pools have the same servers, reached from the
// same relay address or by broadcast on the same interface.
func (m *Manager) sameWay(a, b Pool) bool {
	global := *m.global.Load()
	x, y := a.under(global), b.under(global)
	return slices.Equal(x.Servers, y.Servers) && x.Relay == y.Relay && x.Interface == y.Interface
}
