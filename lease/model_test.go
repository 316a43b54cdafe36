package lease_test

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// The model's times: an address that nobody hears of is held for the delay, the
// server's leases end after the length: delay < length.
const (
	modelDelay  = 30 * time.Second
	modelLength = 10 * time.Minute
)

// container is one of the model's, and what its engine knows of it.
type container struct {
	name  string
	fixed bool        // --mac-address
	mac   lease.MAC   // of this life
	addr  netip.Addr  // while it runs
	last  *netip.Addr // it must have this address in its next life, where that begins within the delay
	left  time.Time   // the end of its last life
}

func (c *container) running() bool { return c.addr.IsValid() }

// mood is how the server and the way to it are.
type mood int32

const (
	calm  mood = iota
	lossy      // slow, silent at times, refusing at times, no releases arrive
	down       // silent
)

// model runs a manager among an engine, a server and a disk, of which it knows
// the truth.
type model struct {
	*world
	seed       uint64
	rand       *rand.Rand
	pool       string
	names      bool // the engine tells names, as 29 does
	containers []*container
	lives      int
	mood       atomic.Int32
	steps      []string

	// crashed: nothing that the manager does has an effect anymore.
	crashed atomic.Bool
	// fuse is after how many commits the machine crashes, negative for never;
	// kept whether the last one is on disk.
	fuse atomic.Int32
	kept atomic.Bool
	// trouble is when the server last may have had a lease of which the manager
	// couldn't know, wiped when it last forgot leases, by which time others may
	// have their addresses.
	trouble, wiped time.Time
	// unstored: the disk was full, and the next renewal was not yet.
	unstored bool

	ends map[netip.Addr]time.Time // guarded by dhcpServer.mu, as table
}

var errPower = errors.New("power failure")

// dice are the same for the same moment and cause, in whatever order keepers
// throw them.
func (m *model) dice(sides uint64, cause ...any) uint64 {
	h := fnv.New64a()
	_, _ = fmt.Fprint(h, m.seed, time.Since(m.server.began), cause)
	return h.Sum64() % sides
}

func (m *model) setMood(to mood) {
	m.mood.Store(int32(to))
	lost := func() error { return nil }
	if to == calm && !m.crashed.Load() {
		lost = nil
	}
	m.server.onRelease.set(lost)
}

// troubled notes that from now back the truths may differ.
func (m *model) troubled() { m.trouble = time.Now() }

// arrive is the way of a message and its answer.
func (m *model) arrive(ctx context.Context, cause ...any) error {
	wait := time.Duration(m.dice(300, "wait", cause)) * time.Millisecond
	switch {
	case m.crashed.Load():
		return errPower
	case mood(m.mood.Load()) == calm:
	case mood(m.mood.Load()) == down || m.dice(4, "silent", cause) == 0:
		wait = time.Hour
	case m.dice(6, "NAK", cause) == 0:
		return lease.ErrNAK
	}
	select {
	case <-time.After(wait):
		return nil
	case <-ctx.Done():
		return lease.ErrNoAnswer
	}
}

// expire ends leases at the server. It needs the server's mu.
func (m *model) expire() {
	for a, end := range m.ends {
		if !time.Now().Before(end) {
			delete(m.server.table, a)
			delete(m.ends, a)
		}
	}
}

// lend makes or extends a lease that was asked for at a time. It needs the
// server's mu.
func (m *model) lend(l lease.Lease, asked time.Time) lease.Lease {
	m.server.table[l.Addr()] = string(l.ClientID)
	m.ends[l.Addr()] = time.Now().Add(modelLength)
	l.Server, l.Via = m.server.id.get(), netip.AddrPortFrom(m.server.id.get(), 67)
	l.Obtained, l.Renew, l.Rebind, l.Expires = asked, asked.Add(modelLength/2), asked.Add(modelLength/8*7), asked.Add(modelLength)
	return l
}

// first and last are the server's range.
var first, last = addr("192.0.2.10"), addr("192.0.2.33")

// acquire is a server that gives a client the lease that it has, whatever it
// wishes, else its wish, else any.
func (m *model) acquire(ctx context.Context, r lease.Request) (lease.Lease, error) {
	asked := time.Now()
	if err := m.arrive(ctx, "acquire", r.MAC); err != nil {
		return lease.Lease{}, err
	}
	m.server.mu.Lock()
	defer m.server.mu.Unlock()
	m.expire()
	var free []netip.Addr
	var choice netip.Addr
	for a := first; a != last.Next(); a = a.Next() {
		switch holder, taken := m.server.table[a]; {
		case !taken:
			free = append(free, a)
		case holder == string(r.ClientID):
			choice = a
		}
	}
	_, wished := m.server.table[r.Address]
	switch {
	case choice.IsValid():
	case r.Address.IsValid() && !wished && r.Address.Compare(first) >= 0 && r.Address.Compare(last) <= 0:
		choice = r.Address
	case len(free) == 0:
		return lease.Lease{}, lease.ErrNoAnswer
	default:
		choice = free[m.dice(uint64(len(free)), "choice", r.MAC)]
	}
	if err := r.Accept(choice); err != nil {
		return lease.Lease{}, err
	}
	return m.lend(lease.Lease{MAC: r.MAC, Name: r.Name, ClientID: r.ClientID, Prefix: netip.PrefixFrom(choice, 32)}, asked), nil
}

// extend answers a confirmation or renewal.
func (m *model) extend(kind string) func(context.Context, lease.Lease) (lease.Lease, error) {
	return func(ctx context.Context, l lease.Lease) (lease.Lease, error) {
		asked := time.Now()
		if err := m.arrive(ctx, kind, l.MAC); err != nil {
			return lease.Lease{}, err
		}
		m.server.mu.Lock()
		m.expire()
		holder, taken := m.server.table[l.Addr()]
		if taken && holder == string(l.ClientID) {
			defer m.server.mu.Unlock()
			return m.lend(l, asked), nil
		}
		m.server.mu.Unlock()
		if taken {
			return lease.Lease{}, lease.ErrNAK
		}
		return silent(ctx, l)
	}
}

// disk fails, and ends the world.
func (m *model) disk(full *atomic.Bool) func(string) error {
	return func(call string) error {
		if m.crashed.Load() && call != "Load" {
			return errPower
		}
		if m.fuse.Load() >= 0 && m.fuse.Add(-1) < 0 {
			m.crash()
			if !m.kept.Load() {
				return errPower
			}
		}
		if full.Load() && call != "Load" {
			return errDiskFull
		}
		return nil
	}
}

func (m *model) crash() {
	m.crashed.Store(true)
	m.server.onRelease.set(func() error { return nil })
}

// inventory is what the engine says.
func (m *model) inventory() lease.Inventory {
	n := lease.Network{Name: "lan", Subnet: "192.0.2.0/24"}
	for _, c := range m.containers {
		if c.running() {
			n.Attachments = append(n.Attachments, lease.Attachment{Container: "id of " + c.name, Name: c.name, MAC: c.mac, Prefix: netip.PrefixFrom(c.addr, 24)})
		}
	}
	return lease.Inventory{NamesEndpoints: m.names, Networks: []lease.Network{n}}
}

// request starts a container.
func (m *model) request(c *container, want netip.Addr) {
	m.lives++
	if !c.fixed || c.mac == (lease.MAC{}) {
		c.mac = mac(m.lives)
	}
	e := lease.Endpoint{MAC: c.mac, Address: want}
	if m.names {
		e.Name = c.name
	}
	for _, other := range m.containers {
		if other != c && other.last != nil && *other.last == want {
			other.last = nil // released for this one
		}
	}
	l, err := m.manager.Acquire(m.Context(), m.pool, e)
	if err != nil || m.crashed.Load() {
		// Refused is always right, here.
		m.step("  %s: %v", c.name, err)
		return
	}
	m.step("  %s has %v", c.name, l.Addr())
	c.addr = l.Addr()
	if want.IsValid() && c.addr != want {
		m.Errorf("%s wanted %v, has %v", c.name, want, c.addr)
	}
	if c.last != nil && time.Since(c.left) < modelDelay-time.Second && m.trouble.Before(c.left.Add(-modelLength)) && !want.IsValid() && c.addr != *c.last {
		m.Errorf("%s has %v, had %v until %v ago", c.name, c.addr, *c.last, time.Since(c.left))
	}
}

// release stops a container. Whether its lease goes or not, it has no address.
func (m *model) release(c *container) {
	a := c.addr
	byName := slices.ContainsFunc(m.manager.Leases(), func(h lease.Held) bool { return h.MAC == c.mac && h.ClientID[0] == 0 })
	c.last = nil
	err := m.manager.Release(m.Context(), m.pool, a)
	if err != nil || m.crashed.Load() {
		m.step("  %s: %v", c.name, err)
		m.troubled()
	} else if byName {
		c.last = &a
	}
	c.addr, c.left = netip.Addr{}, time.Now()
}

func (m *model) step(format string, what ...any) {
	m.steps = append(m.steps, fmt.Sprintf("%v ", time.Since(m.server.began))+fmt.Sprintf(format, what...))
}

func (m *model) pick(which func(*container) bool) *container {
	var these []*container
	for _, c := range m.containers {
		if which(c) {
			these = append(these, c)
		}
	}
	if len(these) == 0 {
		return nil
	}
	return these[m.rand.IntN(len(these))]
}

// act does something at random.
func (m *model) act() {
	stopped := func(c *container) bool { return !c.running() }
	switch n := m.rand.IntN(100); {
	case n < 30:
		if c := m.pick(stopped); c != nil {
			var want netip.Addr
			if m.rand.IntN(6) == 0 {
				want = netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + m.rand.IntN(24))})
			}
			m.step("run %s %v", c.name, want)
			m.request(c, want)
		}
	case n < 45:
		if c := m.pick((*container).running); c != nil {
			m.step("rm %s %v", c.name, c.addr)
			m.release(c)
		}
	case n < 60:
		if c := m.pick((*container).running); c != nil {
			m.step("restart %s %v", c.name, c.addr)
			m.release(c)
			time.Sleep(m.some(time.Second, modelDelay, time.Minute))
			if !m.crashed.Load() {
				m.request(c, netip.Addr{})
			}
		}
	case n < 64:
		seen := m.inventory()
		m.step("reconcile")
		if _, err := m.manager.Reconcile(m.Context(), seen, m.rand.IntN(4) == 0); err != nil {
			m.step("  %v", err)
		}
	case n < 68:
		// Somebody else's client takes what is free at the server.
		m.server.mu.Lock()
		m.expire()
		a := netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + m.rand.IntN(24))})
		if _, taken := m.server.table[a]; !taken {
			m.step("somebody else takes %v", a)
			if slices.ContainsFunc(m.containers, func(c *container) bool { return c.addr == a }) {
				m.troubled() // the server forgot its lease, and no renewal told yet
			}
			m.server.table[a] = "somebody else"
			m.ends[a] = time.Now().Add(m.some(time.Minute, modelLength))
		}
		m.server.mu.Unlock()
	default:
		pause := m.some(time.Second, modelDelay, modelLength/2, modelLength, 2*modelLength)
		m.step("wait %v", pause)
		time.Sleep(pause)
	}
}

func (m *model) some(upTo ...time.Duration) time.Duration {
	return time.Duration(m.rand.Int64N(int64(upTo[m.rand.IntN(len(upTo))])))
}

// disturb changes what is around the manager.
func (m *model) disturb(full *atomic.Bool) {
	switch m.rand.IntN(12) {
	case 0, 1:
		m.step("server lossy")
		m.setMood(lossy)
	case 2:
		m.step("server down")
		m.setMood(down)
	case 3:
		m.step("server's table wiped")
		m.server.mu.Lock()
		maps.DeleteFunc(m.server.table, func(netip.Addr, string) bool { return true })
		clear(m.ends)
		m.server.mu.Unlock()
		m.wiped = time.Now()
	case 4:
		full.Store(!full.Load())
		m.step("disk full: %v", full.Load())
	case 5, 6:
		// During one of the next commits.
		m.kept.Store(m.rand.IntN(2) == 0)
		m.fuse.Store(int32(m.rand.IntN(3)))
		m.step("crash after %d commits, the last one on disk: %v", m.fuse.Load(), m.kept.Load())
		for range 4 {
			if !m.crashed.Load() {
				m.act()
			}
		}
		m.fuse.Store(-1)
		m.crash()
		m.comeBack()
	case 7:
		m.step("stop")
		m.manager.Close()
		m.comeBack()
	case 8:
		m.step("database lost")
		m.manager.Close()
		m.store = newStore()
		full.Store(false)
		m.store.before.set(m.disk(full))
		m.start()
		if _, err := m.manager.Reconcile(m.Context(), m.inventory(), false); err != nil {
			m.Errorf("reconcile: %v", err)
		}
		// The engine's PoolID means nothing to it, until it is used.
	default:
		m.step("calm")
		full.Store(false)
		m.setMood(calm)
	}
	m.troubled()
}

// comeBack starts the manager anew, some time later.
func (m *model) comeBack() {
	m.manager.Close()
	m.crashed.Store(false)
	m.setMood(mood(m.mood.Load()))
	time.Sleep(m.some(time.Second, modelDelay, modelLength, 2*modelLength))
	m.start()
}

// check compares the manager and the server with the truth.
func (m *model) check() {
	synctest.Wait()
	if m.Failed() {
		return
	}
	held := map[netip.Addr]lease.Held{}
	byMAC := map[lease.MAC]lease.Held{}
	known := map[netip.Addr]string{}
	pending := 0
	for _, h := range m.manager.Leases() {
		known[h.Addr()] = string(h.ClientID)
		if h.State == lease.Releasing {
			pending++
			continue
		}
		if other, twice := held[h.Addr()]; twice {
			m.Errorf("%v is held by %v and %v", h.Addr(), other.MAC, h.MAC)
		}
		held[h.Addr()], byMAC[h.MAC] = h, h
	}

	// No address live for two endpoints, and each endpoint has its own.
	has := map[netip.Addr]string{}
	for _, c := range m.containers {
		if !c.running() {
			continue
		}
		if other, twice := has[c.addr]; twice {
			m.Errorf("%v is live in %s and %s", c.addr, other, c.name)
		}
		has[c.addr] = c.name
		if h := byMAC[c.mac]; h.Addr() != c.addr {
			m.Errorf("%s has %v, held is %v", c.name, c.addr, h.Prefix)
		}
	}

	// The store is as the memory.
	if !m.unstored {
		m.agree()
	}
	m.store.mu.Lock()
	for _, h := range byMAC {
		// Its times may be those of a renewal that the disk didn't take.
		if l, ok := m.store.leases[h.Key()]; !ok || l.Addr() != h.Addr() || string(l.ClientID) != string(h.ClientID) {
			m.Errorf("in memory %v of %v, stored %v", h.Addr(), h.MAC, l.Prefix)
		}
	}
	// Nothing is stored without the event that made it a lease, whatever crashed.
	made := map[lease.MAC]netip.Addr{}
	for _, e := range m.store.events {
		if e.Kind == lease.EventGranted || e.Kind == lease.EventReconciled {
			made[e.MAC] = e.Address
		}
	}
	for key, l := range m.store.leases {
		if made[key.MAC] != l.Addr() {
			m.Errorf("%v of %v is stored, the last event made it %v", l.Addr(), key.MAC, made[key.MAC])
		}
	}
	if len(m.store.leases) != len(byMAC) {
		m.Errorf("%d leases in memory, %d stored", len(byMAC), len(m.store.leases))
	}
	waiting := 0
	for key, b := range m.store.bindings {
		if !b.Released {
			waiting++
		}
		for _, l := range m.store.leases {
			if string(l.ClientID) == key.ClientID {
				m.Errorf("%q has a lease %v and a binding of %v", key.ClientID, l.Addr(), b.Lease.Addr())
			}
		}
	}
	m.store.mu.Unlock()
	if waiting != pending {
		m.Errorf("%d releases pending, %d stored", pending, waiting)
	}

	// Whatever the server holds for this host is known, or was left there in
	// trouble and ends. What it gave to others is in no container whose lease is
	// alive, unless it forgot that.
	m.server.mu.Lock()
	defer m.server.mu.Unlock()
	m.expire()
	for a, client := range m.server.table {
		h, live := held[a]
		switch {
		case client != "somebody else" && known[a] != client && m.ends[a].After(m.trouble.Add(modelLength+time.Minute)):
			m.Errorf("%v is leased to %q until %v, of which nothing is known since %v", a, client, time.Until(m.ends[a]), time.Since(m.trouble))
		case live && has[a] != "" && h.State != lease.Lost.String() && client != string(h.ClientID) && time.Since(m.wiped) > modelLength:
			m.Errorf("%v is live in %s as %q (%s), and leased to %q", a, has[a], h.ClientID, h.State, client)
		}
	}
}

// settle waits until all is well again, and checks that it is.
func (m *model) settle(full *atomic.Bool) {
	m.step("settle")
	full.Store(false)
	m.fuse.Store(-1)
	m.setMood(calm)
	// Two sights more than 5m apart, then more than a lease's length.
	for range 2 {
		if _, err := m.manager.Reconcile(m.Context(), m.inventory(), false); err != nil {
			m.Errorf("reconcile: %v", err)
		}
		time.Sleep(6 * time.Minute)
	}
	if _, err := m.manager.Reconcile(m.Context(), m.inventory(), false); err != nil {
		m.Errorf("reconcile: %v", err)
	}
	time.Sleep(2 * modelLength)
	m.unstored = false
	m.check()
	want := map[netip.Addr]bool{}
	for _, c := range m.containers {
		if c.running() {
			want[c.addr] = true
		}
	}
	held := m.manager.Leases()
	renewing := func(h lease.Held) bool { return h.State == lease.Renewing.String() }
	for range 20 {
		if !slices.ContainsFunc(held, renewing) {
			break
		}
		time.Sleep(400 * time.Millisecond) // > the way of a message and its answer
		held = m.manager.Leases()
	}
	for _, h := range held {
		if h.State != lease.Bound.String() || !want[h.Addr()] {
			m.Errorf("at the end %v of %v %s is %s", h.Addr(), h.MAC, h.Name, h.State)
		}
	}
	if n := len(held); n != len(want) {
		m.Errorf("at the end %d leases, %d containers run", n, len(want))
	}
	m.server.mu.Lock()
	defer m.server.mu.Unlock()
	m.expire()
	for a, client := range m.server.table {
		if client != "somebody else" && !want[a] {
			m.Errorf("at the end %v is leased to %q", a, client)
		}
		delete(want, a)
	}
	for a := range want {
		m.Errorf("at the end the server knows nothing of %v", a)
	}
}

// Random lives of containers, servers, disks and daemons. OAM_SEED=n repeats
// one, OAM_SOAK=1 runs many.
func TestModel(t *testing.T) {
	runs := 150
	if os.Getenv("OAM_SOAK") != "" {
		runs = 3000
	}
	seeds := make([]uint64, runs)
	for i := range seeds {
		seeds[i] = rand.Uint64()
	}
	if text := os.Getenv("OAM_SEED"); text != "" {
		seed, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seeds = []uint64{seed}
	}
	for _, seed := range seeds {
		if !t.Run(fmt.Sprint(seed), func(t *testing.T) { live(t, seed) }) {
			t.Errorf("repeat it with OAM_SEED=%d", seed)
			break
		}
	}
}

func live(t *testing.T, seed uint64) {
	inWorldOf(t, lease.Options{ReleaseDelay: new(modelDelay)}, func(w *world) {
		var full atomic.Bool
		m := &model{world: w, seed: seed, rand: rand.New(rand.NewPCG(seed, 0)), ends: map[netip.Addr]time.Time{}}
		m.fuse.Store(-1)
		m.trouble, m.wiped = time.Now().Add(-24*time.Hour), time.Now().Add(-24*time.Hour)
		m.names = m.rand.IntN(3) > 0
		m.pool = w.networkOf()
		w.server.onAcquire.set(m.acquire)
		w.server.onConfirm.set(m.extend("confirm"))
		w.server.onExtend.set(m.extend("extend"))
		w.store.before.set(m.disk(&full))
		for n := range 8 {
			m.containers = append(m.containers, &container{name: fmt.Sprint("c", n), fixed: n%3 == 2})
		}
		for range 80 {
			if m.rand.IntN(10) == 0 {
				m.disturb(&full)
			} else {
				m.act()
			}
			if full.Load() || mood(m.mood.Load()) != calm {
				m.troubled()
			}
			m.unstored = full.Load() || m.unstored && time.Since(m.trouble) <= modelLength
			m.check()
			if t.Failed() {
				break
			}
		}
		if !t.Failed() {
			m.settle(&full)
		}
		if t.Failed() {
			t.Logf("seed %d:\n%s", seed, strings.Join(m.steps, "\n"))
		}
		w.store.before.set(nil)
	})
}
