package lease

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// AddPool stores a pool of NewPool and returns it with its ID, and with subnet
// and gateway, which a probe of the servers finds. Silence is no reason to refuse
// a pool whose subnet was given. An offer from another subnet is, since every
// container would be refused later.
func (m *Manager) AddPool(ctx context.Context, p Pool) (Pool, error) {
	o := m.options(p)
	if err := o.suits(p.Options); err != nil {
		return Pool{}, err
	}
	if err := p.checkMode(o); err != nil {
		return Pool{}, err
	}
	if err := o.checkConflict(); err != nil {
		return Pool{}, err
	}
	found, err := m.probe(ctx, p, o)
	if err != nil {
		return Pool{}, err
	}
	p = found.pool
	log := m.log.With("subnet", p.Subnet)
	found.log(log)

	p.ID = p.newID()
	p.AuxUntil = time.Now().Add(auxWindow)
	if err := m.commit(Change{PutPools: []Pool{p}}); err != nil {
		return Pool{}, fmt.Errorf("store the network: %w", err)
	}
	if ctx.Err() != nil {
		// Nobody will hear of this pool, so nobody would ever remove it.
		return Pool{}, errors.Join(context.Cause(ctx), m.commit(Change{DropPools: []string{p.ID}}))
	}
	m.mu.Lock()
	m.addPoolLocked(p)
	m.mu.Unlock()
	log.Info("pool added", "pool", p.ID, "gateway", p.Gateway, "from", found.from)
	return p, nil
}

// RemovePool gives back every lease of a pool and forgets it. Pending releases
// outlive it. An unknown pool
// is no error: the engine repeats itself.
func (m *Manager) RemovePool(ctx context.Context, id string) error {
	ctx = context.WithoutCancel(ctx)
	m.mu.Lock()
	p := m.pools[id]
	if p == nil || p.removed {
		m.mu.Unlock()
		return nil
	}
	p.removed = true
	macs := make([]MAC, 0, len(p.byMAC))
	for mac := range p.byMAC {
		macs = append(macs, mac)
	}
	m.mu.Unlock()

	// Keepers wait for these claims and then find their leases gone; requests
	// for new leases find the pool removed.
	for _, mac := range macs {
		done, err := m.claim(ctx, p, mac, nil)
		if err != nil {
			return err
		}
		defer done()
	}
	value := m.current(p)
	change := Change{DropPools: []string{id}}
	type leaving struct {
		binding Binding
		change  Change
	}
	var all []leaving
	for _, mac := range macs {
		l, holds := m.held(p, mac)
		if !holds {
			continue
		}
		b, c := m.leave(ctx, value, l, false)
		change.PutBindings = append(change.PutBindings, c.PutBindings...)
		change.DropBindings = append(change.DropBindings, c.DropBindings...)
		change.PutEvents = append(change.PutEvents, c.PutEvents...)
		all = append(all, leaving{b, c})
	}
	p.edit.Lock()
	err := m.commit(change)
	p.edit.Unlock()
	if err != nil {
		m.mu.Lock()
		p.removed = false
		m.mu.Unlock()
		return fmt.Errorf("remove the network from the database: %w", err)
	}

	m.mu.Lock()
	delete(m.pools, id)
	for _, e := range p.byMAC {
		m.dropLocked(p, e)
	}
	m.mu.Unlock()
	// All at once: each must be on its way before another network's request of
	// the same identity is.
	var wg sync.WaitGroup
	for _, l := range all {
		wg.Go(func() { m.left(ctx, value, l.binding, l.change) })
	}
	wg.Wait()
	m.log.Info("pool removed", "pool", id, "leases", len(all))
	return nil
}

// Gateway settles the gateway of a pool: the user's address, or with none the
// one that the pool has. It returns the address with the pool's prefix length.
func (m *Manager) Gateway(ctx context.Context, id string, addr netip.Addr) (netip.Prefix, error) {
	p, err := m.pool(ctx, id)
	if err != nil {
		return netip.Prefix{}, err
	}
	given := addr.IsValid()
	err = m.editPool(p, func(p *Pool) error {
		switch {
		case !addr.IsValid() && !p.Gateway.IsValid():
			p.Gateway = p.firstUsable()
		case addr.IsValid():
			if err := p.inSubnet(addr); err != nil {
				return fmt.Errorf("--gateway: %w", err)
			}
			p.Gateway = addr
		}
		addr = p.Gateway
		return nil
	})
	if err != nil {
		return netip.Prefix{}, err
	}
	if given {
		m.log.Info("gateway given", "pool", id, "gateway", addr, "from", "--gateway")
	}
	return netip.PrefixFrom(addr, m.current(p).Subnet.Bits()), nil
}

// Auxiliary reserves an address of a new pool (--aux-address). Later on, a
// request without a MAC means that the engine forgot this driver's
// capabilities, and an address given without DHCP could be somebody else's.
func (m *Manager) Auxiliary(ctx context.Context, id string, addr netip.Addr) (netip.Prefix, error) {
	noMAC := errors.New("the engine registered this driver without MAC addresses: restart the engine (the plugin must be running before it)")
	p, err := m.pool(ctx, id)
	if err != nil {
		return netip.Prefix{}, err
	}
	if !addr.IsValid() {
		return netip.Prefix{}, noMAC
	}
	err = m.editPool(p, func(p *Pool) error {
		// AuxUntil may have been set by another run, before a clock step:
		// then it bounds from both sides.
		if left := time.Until(p.AuxUntil); left <= 0 || left > auxWindow {
			return noMAC
		}
		if err := p.inSubnet(addr); err != nil {
			return fmt.Errorf("--aux-address: %w", err)
		}
		if !slices.Contains(p.Reserved, addr) {
			p.Reserved = append(slices.Clone(p.Reserved), addr)
		}
		return nil
	})
	if err != nil {
		return netip.Prefix{}, err
	}
	return netip.PrefixFrom(addr, m.current(p).Subnet.Bits()), nil
}

// pool finds a known pool, or takes up one of a lost database by its ID.
func (m *Manager) pool(ctx context.Context, id string) (*pool, error) {
	m.mu.Lock()
	p := m.pools[id]
	m.mu.Unlock()
	if p != nil {
		return p, nil
	}
	adopted, err := ParsePoolID(id)
	if err != nil {
		return nil, err
	}
	if adopted.Subnet.IsSingleIP() {
		if adopted, err = m.learnSubnet(ctx, adopted); err != nil {
			return nil, err
		}
	}
	p, taken, err := m.takeUp(adopted)
	if taken {
		m.log.Warn("unknown pool taken up by its ID: the database was lost or comes from the old daemon", "pool", id, "subnet", adopted.Subnet)
	}
	return p, err
}

// takeUp stores and adds a pool, unless one of its ID has come first.
func (m *Manager) takeUp(value Pool) (p *pool, taken bool, err error) {
	m.adopt.Lock()
	defer m.adopt.Unlock()
	m.mu.Lock()
	p = m.pools[value.ID]
	m.mu.Unlock()
	if p != nil {
		return p, false, nil
	}
	if err := m.commit(Change{PutPools: []Pool{value}}); err != nil {
		return nil, false, fmt.Errorf("store the network: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.addPoolLocked(value), true, nil
}

// patience is how long an Acquire may take.
func (m *Manager) patience(poolID string) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.pools[poolID]; p != nil {
		return max(m.timeout, p.FirstWait)
	}
	return m.timeout
}

// granted ends the longer patience with a network's first lease: from here on
// silence is what it is elsewhere.
func (m *Manager) granted(p *pool, l Lease) {
	if m.current(p).FirstWait == 0 || l.State(m.clock.now()) != Bound {
		return
	}
	if err := m.editPool(p, func(p *Pool) error { p.FirstWait = 0; return nil }); err != nil {
		m.log.Warn("the network's longer patience was not ended: its next lease does that", "error", err)
	}
}

var errRemoved = errors.New("the network was removed meanwhile")

// editPool changes a pool and stores it where it really changed.
func (m *Manager) editPool(p *pool, change func(*Pool) error) error {
	p.edit.Lock()
	defer p.edit.Unlock()
	m.mu.Lock()
	edited, removed := p.Pool, p.removed
	m.mu.Unlock()
	if removed {
		return errRemoved
	}
	before := edited
	if err := change(&edited); err != nil {
		return err
	}
	if edited.Gateway == before.Gateway && edited.FirstWait == before.FirstWait &&
		edited.AuxUntil.Equal(before.AuxUntil) && slices.Equal(edited.Reserved, before.Reserved) {
		return nil
	}
	if err := m.commit(Change{PutPools: []Pool{edited}}); err != nil {
		return fmt.Errorf("store the network: %w", err)
	}
	m.mu.Lock()
	p.Pool = edited
	m.mu.Unlock()
	return nil
}
