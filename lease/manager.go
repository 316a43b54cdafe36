package lease

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"
)

// Config is what a Manager needs beside its store and client.
type Config struct {
	// Timeout is the longest that one Acquire may take, but a new VLAN's first,
	// which has FirstWait.
	Timeout time.Duration
	// Global are the options where a network says nothing itself.
	Global Options
	// Machine is what this host's identity and clock are made of.
	Machine Host
	// Prober looks for conflicts where a network asks for it.
	Prober Prober
	// Engine is asked where a network's loss policy says so.
	Engine Engine
	Log    *slog.Logger
}

// Manager is the one owner of this host's pools and leases and of what keeps
// them alive. Its methods may be called concurrently; errors are written for
// the person at the docker command.
type Manager struct {
	store    Store
	client   Client
	timeout  time.Duration
	defaults Options
	machine  Host
	prober   Prober
	engine   Engine
	log      *slog.Logger
	clock    *clock

	// ctx is the life of the keepers, wg counts those at work.
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	// late has a place for each pending release that is being sent.
	late chan struct{}

	// adopt is held while a pool is taken up by its ID, so that a second
	// request doesn't store it anew over what the first has changed.
	adopt sync.Mutex
	// identifying is held while the host's identity is found. It comes before
	// mu.
	identifying sync.Mutex
	// reconciling is held by the one Reconcile. It comes before everything.
	reconciling sync.Mutex

	// mu guards what follows, with all pools and what is in them. It is never
	// held during I/O.
	mu       sync.Mutex
	pools    map[string]*pool
	bindings bindings
	// byIdentity finds the lease of an identity, identities whoever acts on
	// one.
	byIdentity map[BindingKey]*entry
	identities map[BindingKey]*claim
	// identity is the stored one until identitySure, then this host's.
	identity     HostIdentity
	identitySure bool
	silence      silence
}

// pool is a Pool with its leases. All fields are guarded by Manager.mu.
type pool struct {
	Pool
	// edit is held from reading Pool's fields to having stored them changed,
	// so that no change is lost and no removed pool is stored again. It comes
	// after claims and before Manager.mu.
	edit   sync.Mutex
	byMAC  map[MAC]*entry
	byAddr map[netip.Addr]*entry
	// claims serialize what happens to one MAC.
	claims map[MAC]*claim
	// removed is set by RemovePool: what is being acquired goes back.
	removed bool
}

// entry is one lease and its next attempt. Guarded by Manager.mu; changed and
// dropped only by the holder of its MAC's claim.
type entry struct {
	lease Lease
	timer *time.Timer // the last that was set, to be stopped; nil before
	// turn counts the attempts that were set: one that was replaced after its
	// time had come does nothing.
	turn int
	// began is when the last attempt did, by the Manager's clock.
	began time.Time
	// unconfirmed counts the attempts, from one on, to confirm a stored lease
	// that was handed out while no server answered; 0 for all others.
	unconfirmed int
	// told: that the lease is lost was said, and its network's policy followed.
	told bool
	// since is when this daemon granted the lease, zero for older ones.
	since time.Time
	// missed is when a reconcile first saw that no container has the lease;
	// zero while one has.
	missed time.Time
}

// NewManager takes up every lease of the store in the state that its times
// say and keeps it alive from then on. Close ends it.
func NewManager(store Store, client Client, config Config) (*Manager, error) {
	saved, err := store.Load()
	if err != nil {
		return nil, err
	}
	if err := prune(store, &saved); err != nil {
		// No reason to let every lease end.
		config.Log.Warn("what is too old was not deleted: the next start tries again", "error", err)
	}
	m := &Manager{
		store: store, client: client, timeout: config.Timeout, defaults: config.Global.Or(Defaults()),
		machine: config.Machine, prober: config.Prober, engine: config.Engine, log: config.Log,
		clock: newClock(config.Machine), identity: saved.Host,
		pools: map[string]*pool{}, byIdentity: map[BindingKey]*entry{}, identities: map[BindingKey]*claim{},
		late: make(chan struct{}, maxLate),
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())

	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range saved.Pools {
		m.addPoolLocked(p)
	}
	for _, l := range saved.Leases {
		p := m.pools[l.Pool]
		if p == nil {
			return nil, fmt.Errorf("lease %s belongs to pool %q, which the database lacks", l.Addr(), l.Pool)
		}
		l, sure := m.clock.resume(l)
		if !sure {
			m.log.Warn("the clock went back over a reboot: the lease's age is unknown, it is renewed now", "address", l.Addr(), "mac", l.MAC, "name", l.Name)
		}
		m.addLocked(p, l)
	}
	for _, b := range saved.Bindings {
		m.resumeBindingLocked(b)
	}
	overdue := m.armLocked(func(*entry) bool { return true })
	m.wg.Go(m.watchSleep)
	m.log.Info("leases resumed", "pools", len(saved.Pools), "leases", len(saved.Leases), "overdue", overdue, "bindings", len(m.bindings.byKey))
	return m, nil
}

// Close stops the keepers and waits for them. It releases nothing: containers
// outlive the daemon.
func (m *Manager) Close() {
	m.cancel()
	m.mu.Lock()
	for _, p := range m.pools {
		for _, e := range p.byMAC {
			e.stopLocked()
		}
	}
	m.bindings.stopLocked()
	m.mu.Unlock()
	m.wg.Wait()
}

// begins counts a keeper as at work, until its wg.Done, unless the Manager has
// been closed.
func (m *Manager) begins() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ctx.Err() != nil {
		return false
	}
	m.wg.Add(1)
	return true
}

// commit makes a change on disk. Leases are put as the store has them.
func (m *Manager) commit(c Change) error {
	for i, l := range c.PutLeases {
		c.PutLeases[i] = m.clock.stamp(l)
	}
	for i, b := range c.PutBindings {
		c.PutBindings[i].Lease = m.clock.stamp(b.Lease)
	}
	return m.store.Commit(c)
}

// options are those in force for a pool. Conflicts are probed for where its
// servers are asked by broadcast, unless something else is said.
func (m *Manager) options(p Pool) Options {
	o := p.Options.Or(m.defaults)
	o.ConflictInterface = cmp.Or(p.Options.ConflictInterface, p.Options.Interface, o.ConflictInterface, o.Interface)
	return o
}

func (m *Manager) addPoolLocked(p Pool) *pool {
	added := &pool{Pool: p, byMAC: map[MAC]*entry{}, byAddr: map[netip.Addr]*entry{}, claims: map[MAC]*claim{}}
	m.pools[p.ID] = added
	return added
}

// current is a pool's value as it is now.
func (m *Manager) current(p *pool) Pool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return p.Pool
}

func (m *Manager) addLocked(p *pool, l Lease) *entry {
	m.dropLocked(p, p.byMAC[l.MAC])
	e := &entry{lease: l}
	p.byMAC[l.MAC], p.byAddr[l.Addr()], m.byIdentity[l.bindingKey()] = e, e, e
	return e
}

// dropLocked forgets an entry, or none.
func (m *Manager) dropLocked(p *pool, e *entry) {
	if e == nil {
		return
	}
	e.stopLocked()
	if p.byMAC[e.lease.MAC] == e {
		delete(p.byMAC, e.lease.MAC)
	}
	if p.byAddr[e.lease.Addr()] == e {
		delete(p.byAddr, e.lease.Addr())
	}
	if key := e.lease.bindingKey(); m.byIdentity[key] == e {
		delete(m.byIdentity, key)
	}
}

func (e *entry) stopLocked() {
	if e.timer != nil {
		e.timer.Stop()
	}
}
