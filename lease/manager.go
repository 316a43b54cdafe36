package lease

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// Config is what a Manager needs beside its store and client.
type Config struct {
	// Timeout is the longest that one Acquire may take, but a new VLAN's first,
	// which has FirstWait.
	Timeout time.Duration
	// Global are the options where a network says nothing itself, until
	// Configure.
	Global Options
	// Machine is what this host's identity and clock are made of.
	Machine Host
	// Prober looks for conflicts where a network asks for it.
	Prober Prober
	// Engine is asked where a network's loss policy says so.
	Engine Engine
	// Observer is told what happens; nil for nobody.
	Observer Observer
	Log      *slog.Logger
}

// Manager is the one owner of this host's pools and leases and of what keeps
// them alive. Its methods may be called concurrently; errors are written for
// the person at the docker command.
type Manager struct {
	store   Store
	client  Client
	timeout time.Duration
	global  atomic.Pointer[Options]
	machine Host
	prober  Prober
	engine  Engine
	// observer may be told with locks held.
	observer Observer
	log      *slog.Logger
	clock    *clock
	pulse    Pulse[error]
	journal  journal

	// ctx is the life of the keepers, wg counts those at work.
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	// sending has a place for each pending release that is being sent.
	sending chan struct{}

	// adopt is held while a pool is taken up by its ID, so that a second
	// request doesn't store it anew over what the first has changed.
	adopt sync.Mutex
	// identifying has a place for the one who finds the host's identity, which
	// may take as long as his ctx lasts. It comes before mu.
	identifying chan struct{}
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
	// renewed is Summary's.
	renewed time.Time
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
	// refused counts the address requests that failed, refusal is the last one's
	// event, nil before it.
	refused uint64
	refusal *Event
}

// entry is one lease and its next attempt. Guarded by Manager.mu; changed and
// dropped only by the holder of its MAC's claim.
type entry struct {
	lease Lease
	timer *time.Timer // the last that was set, to be stopped; nil before
	// due is when the next attempt has to begin, by the clock of timers; zero
	// while none is set.
	due time.Time
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
		store: store, client: client, timeout: config.Timeout,
		machine: config.Machine, prober: config.Prober, engine: config.Engine, observer: config.Observer, log: config.Log,
		clock: newClock(config.Machine), identity: saved.Host,
		pools: map[string]*pool{}, byIdentity: map[BindingKey]*entry{}, identities: map[BindingKey]*claim{},
		identifying: make(chan struct{}, 1), sending: make(chan struct{}, maxLate),
		journal: journal{flushing: make(chan struct{}, 1), wake: make(chan struct{}, 1)},
	}
	if m.observer == nil {
		m.observer = Unobserved{}
	}
	m.global.Store(new(config.Global.Or(Defaults())))
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
	m.wg.Go(m.keepJournal)
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
	if err := m.flush(); err != nil {
		m.log.Error("the last events were not stored", "error", err)
	}
}

// Configure puts other global options into force while everything runs; call it
// after the Client's. What has begun ends as it began: a pending release waits
// no longer or shorter than it was to. From then on all is as after a start with
// these options: each lease is renewed where it was granted and rebound with the
// new servers, and those that are overdue are asked for at once.
func (m *Manager) Configure(global Options) {
	global = global.Or(Defaults())
	former := m.global.Swap(&global)
	if maps.Equal(former.Texts(), global.Texts()) {
		return
	}
	m.mu.Lock()
	overdue := m.armLocked(func(*entry) bool { return true })
	m.mu.Unlock()
	m.log.Info("global options changed", "overdue", overdue)
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
	return m.commitEvents(c)
}

// options are those in force for a pool.
func (m *Manager) options(p Pool) Options { return p.under(*m.global.Load()) }

// under are the options in force for a pool, under global ones. Conflicts are
// probed for where its servers are asked by broadcast, unless something else is
// said.
func (p Pool) under(global Options) Options {
	o := p.Options.Or(global)
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
	e.due = time.Time{}
	if e.timer != nil {
		e.timer.Stop()
	}
}
