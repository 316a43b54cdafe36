package lease_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// timeout is what the tests' managers grant one Acquire.
const timeout = 30 * time.Second

// knob is a setting of a fake that its test turns while it is in use.
type knob[T any] struct {
	mu    sync.Mutex
	value T
}

func (k *knob[T]) set(value T) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.value = value
}

func (k *knob[T]) get() T {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.value
}

// dhcpServer is the other end: a lease table behind a scripted lease.Client.
// What the manager did is what this server saw.
type dhcpServer struct {
	began  time.Time
	id     knob[netip.Addr]
	length knob[time.Duration] // of its leases; 0 for infinite ones
	// station is its Ethernet address, where it is asked by broadcast.
	station knob[lease.MAC]

	// What it does instead of answering by its table, where set.
	onProbe   knob[func(context.Context, lease.Pool, lease.MAC) ([]lease.Offer, error)]
	onAcquire knob[func(context.Context, lease.Request) (lease.Lease, error)]
	onConfirm knob[func(context.Context, lease.Lease) (lease.Lease, error)]
	onExtend  knob[func(context.Context, lease.Lease) (lease.Lease, error)] // renew and rebind
	relayMAC  knob[func() (lease.MAC, error)]
	onRelease knob[func() error]
	// stuck is what Alive answers, when its ctx ends.
	stuck knob[error]

	mu       sync.Mutex
	seen     []string
	requests []lease.Request
	table    map[netip.Addr]string // client identifiers
}

var _ lease.Client = (*dhcpServer)(nil)

func newServer() *dhcpServer {
	s := &dhcpServer{began: time.Now(), table: map[netip.Addr]string{}}
	s.id.set(addr("198.51.100.1"))
	s.length.set(time.Hour)
	return s
}

// note records what arrived, and when.
func (s *dhcpServer) note(kind string, what any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = append(s.seen, fmt.Sprintf("%v %s %v", time.Since(s.began), kind, what))
}

func (s *dhcpServer) Probe(ctx context.Context, p lease.Pool, m lease.MAC) ([]lease.Offer, error) {
	s.note("probe", p.Subnet)
	if answer := s.onProbe.get(); answer != nil {
		return answer(ctx, p, m)
	}
	return []lease.Offer{s.offer()}, nil
}

// offer is what the server offers to a probe.
func (s *dhcpServer) offer() lease.Offer {
	return lease.Offer{Server: s.id.get(), Address: addr("192.0.2.99"), Subnet: netip.MustParsePrefix("192.0.2.0/24"), Router: addr("192.0.2.1")}
}

// offering answers probes with offers.
func offering(offers ...lease.Offer) func(context.Context, lease.Pool, lease.MAC) ([]lease.Offer, error) {
	return func(context.Context, lease.Pool, lease.MAC) ([]lease.Offer, error) { return offers, nil }
}

// failingProbe answers probes with an error, at once.
func failingProbe(err error) func(context.Context, lease.Pool, lease.MAC) ([]lease.Offer, error) {
	return func(context.Context, lease.Pool, lease.MAC) ([]lease.Offer, error) { return nil, err }
}

// silentProbe answers probes with silence.
func silentProbe(ctx context.Context, _ lease.Pool, _ lease.MAC) ([]lease.Offer, error) {
	<-ctx.Done()
	return nil, lease.ErrNoAnswer
}

func (s *dhcpServer) Acquire(ctx context.Context, r lease.Request) (lease.Lease, error) {
	wish := ""
	if r.Address.IsValid() {
		wish = " " + r.Address.String()
	}
	s.note("acquire", r.MAC.String()+wish)
	s.mu.Lock()
	s.requests = append(s.requests, r)
	s.mu.Unlock()
	if answer := s.onAcquire.get(); answer != nil {
		return answer(ctx, r)
	}
	return s.grant(r)
}

// grant leases the address that is asked for, that the client has, or the
// first that is free from .10 on.
func (s *dhcpServer) grant(r lease.Request) (lease.Lease, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	choice := addr("192.0.2.10")
	client := string(r.ClientID)
	if holder, taken := s.table[r.Address]; r.Address.IsValid() && (!taken || holder == client) {
		choice = r.Address
	} else {
		for s.table[choice] != "" && s.table[choice] != client {
			choice = choice.Next()
		}
	}
	if err := r.Accept(choice); err != nil {
		return lease.Lease{}, err
	}
	s.table[choice] = client
	return s.lease(r, choice), nil
}

// lease is an ACK of now.
func (s *dhcpServer) lease(r lease.Request, a netip.Addr) lease.Lease {
	l := lease.Lease{
		MAC: r.MAC, Name: r.Name, ClientID: r.ClientID, Prefix: netip.PrefixFrom(a, 32),
		Server: s.id.get(), Via: netip.AddrPortFrom(s.id.get(), 67), Station: s.station.get(), Options: []byte{3, 4, 192, 0, 2, 1},
	}
	return s.extended(l)
}

// extended is the ACK to a renewal sent now.
func (s *dhcpServer) extended(l lease.Lease) lease.Lease {
	l.Obtained = time.Now()
	if !l.Server.IsValid() { // of an endpoint that was adopted
		l.Server, l.Via = s.id.get(), netip.AddrPortFrom(s.id.get(), 67)
	}
	l.Renew, l.Rebind, l.Expires = time.Time{}, time.Time{}, time.Time{}
	if n := s.length.get(); n > 0 {
		l.Renew, l.Rebind, l.Expires = l.Obtained.Add(n/2), l.Obtained.Add(n/8*7), l.Obtained.Add(n)
	}
	return l
}

// Confirm is the answer to INIT-REBOOT: silence about a client that has no
// lease, NAK where its address is another.
func (s *dhcpServer) Confirm(ctx context.Context, _ lease.Pool, l lease.Lease) (lease.Lease, error) {
	s.note("confirm", l.Addr())
	if answer := s.onConfirm.get(); answer != nil {
		return answer(ctx, l)
	}
	s.mu.Lock()
	holder, taken := s.table[l.Addr()]
	s.mu.Unlock()
	switch {
	case !taken:
		return silent(ctx, l)
	case holder != string(l.ClientID):
		return lease.Lease{}, lease.ErrNAK
	}
	return s.extended(l), nil
}

// RelayMAC is that of the only interface, unless the test says otherwise.
func (s *dhcpServer) RelayMAC(context.Context, lease.Pool) (lease.MAC, error) {
	if answer := s.relayMAC.get(); answer != nil {
		return answer()
	}
	return relayMAC, nil
}

func (s *dhcpServer) Renew(ctx context.Context, _ lease.Pool, l lease.Lease) (lease.Lease, error) {
	return s.extend(ctx, "renew", l)
}

func (s *dhcpServer) Rebind(ctx context.Context, _ lease.Pool, l lease.Lease) (lease.Lease, error) {
	return s.extend(ctx, "rebind", l)
}

func (s *dhcpServer) Alive(ctx context.Context) error { return alive(ctx, &s.stuck) }

// Servers is this one.
func (s *dhcpServer) Servers(p lease.Pool) []lease.ServerStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	return []lease.ServerStatus{{Server: s.id.get(), Offers: uint64(len(s.requests))}}
}

func (s *dhcpServer) extend(ctx context.Context, kind string, l lease.Lease) (lease.Lease, error) {
	s.note(kind, l.Addr())
	if answer := s.onExtend.get(); answer != nil {
		return answer(ctx, l)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.table[l.Addr()] != string(l.ClientID) {
		return lease.Lease{}, lease.ErrNAK
	}
	return s.extended(l), nil
}

func (s *dhcpServer) Release(_ context.Context, _ lease.Pool, l lease.Lease) error {
	s.note("release", l.Addr())
	if answer := s.onRelease.get(); answer != nil {
		return answer()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.table[l.Addr()] == string(l.ClientID) {
		delete(s.table, l.Addr())
	}
	return nil
}

// Decline ends the lease of who declines, and no other's.
func (s *dhcpServer) Decline(_ context.Context, _ lease.Pool, l lease.Lease) error {
	s.note("decline", l.Addr())
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.table[l.Addr()] == string(l.ClientID) {
		delete(s.table, l.Addr())
	}
	return nil
}

// silent answers nothing, as a server that is down.
func silent(ctx context.Context, _ lease.Lease) (lease.Lease, error) {
	<-ctx.Done()
	return lease.Lease{}, lease.ErrNoAnswer
}

func silentAcquire(ctx context.Context, _ lease.Request) (lease.Lease, error) {
	return silent(ctx, lease.Lease{})
}

// down makes the server silent, up ends that.
func (s *dhcpServer) down() {
	s.onAcquire.set(silentAcquire)
	s.onConfirm.set(silent)
	s.onExtend.set(silent)
}

func (s *dhcpServer) up() {
	s.onAcquire.set(nil)
	s.onConfirm.set(nil)
	s.onExtend.set(nil)
}

// ends makes the server forget leases: their time is over there, or its table
// was lost.
func (s *dhcpServer) ends(addrs ...netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range addrs {
		delete(s.table, a)
	}
}

// saw compares what arrived at the server since the last look.
func (s *dhcpServer) saw(t *testing.T, want ...string) {
	t.Helper()
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Equal(s.seen, want) {
		t.Errorf("the server saw\n\t%s\nwant\n\t%s", strings.Join(s.seen, "\n\t"), strings.Join(want, "\n\t"))
	}
	s.seen = nil
}

// forget is a look that expects nothing.
func (s *dhcpServer) forget() {
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = nil
}

// takes gives an address to somebody of whom the manager doesn't know.
func (s *dhcpServer) takes(a netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.table[a] = "somebody else"
}

// lastRequest is what the last Acquire asked for.
func (s *dhcpServer) lastRequest() lease.Request {
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests[len(s.requests)-1]
}

// sawInAnyOrder is saw for what happens at one moment.
func (s *dhcpServer) sawInAnyOrder(t *testing.T, want ...string) {
	t.Helper()
	synctest.Wait()
	s.mu.Lock()
	slices.Sort(s.seen)
	s.mu.Unlock()
	s.saw(t, slices.Sorted(slices.Values(want))...)
}

// leased compares the server's lease table.
func (s *dhcpServer) leased(t *testing.T, want ...netip.Addr) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if got := slices.SortedFunc(maps.Keys(s.table), netip.Addr.Compare); !slices.Equal(got, want) {
		t.Errorf("the server has leased %v, want %v", got, want)
	}
}

// relayMAC is the interface of the fake host.
var relayMAC = lease.MAC{0x52, 0x54, 0, 0, 0, 1}

// fakeHost is a machine whose clock is the bubble's, plus the time that it
// slept.
type fakeHost struct {
	began     time.Time
	machineID knob[string] // "" can't be read
	macs      knob[[]lease.MAC]
	bootID    knob[string]
	slept     knob[time.Duration]
}

var _ lease.Host = (*fakeHost)(nil)

func newHost() *fakeHost {
	h := &fakeHost{began: time.Now()}
	h.machineID.set("0123456789abcdef0123456789abcdef")
	h.macs.set([]lease.MAC{relayMAC})
	h.bootID.set("first boot")
	return h
}

func (h *fakeHost) MachineID() (string, error) {
	if id := h.machineID.get(); id != "" {
		return id, nil
	}
	return "", errors.New("/etc/machine-id can't be read")
}

func (h *fakeHost) HardwareAddrs() ([]lease.MAC, error) { return h.macs.get(), nil }
func (h *fakeHost) BootID() string                      { return h.bootID.get() }
func (h *fakeHost) BootTime() time.Duration             { return time.Since(h.began) + h.slept.get() }

// neighbours is a lease.Prober: who answers for an address.
type neighbours struct {
	mu     sync.Mutex
	have   map[netip.Addr]lease.MAC
	probed []string
	fails  error
}

func (n *neighbours) Conflict(_ context.Context, iface string, a netip.Addr, check lease.ConflictCheck) (lease.MAC, bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.probed = append(n.probed, fmt.Sprintf("%s %s %s", iface, a, check))
	by, found := n.have[a]
	return by, found, n.fails
}

// engine is a lease.Engine that notes what it is asked for.
type engine struct {
	mu    sync.Mutex
	asked []string
	macs  []lease.MAC // of these
	fails error
	// during is called while the engine works.
	during func()
	// act is what it does, unless nil.
	act func(context.Context) error
}

// does sets what the engine does when it is asked.
func (e *engine) does(what func(context.Context) error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.act = what
}

func (e *engine) Stop(ctx context.Context, l lease.Lease) error    { return e.ask(ctx, "stop", l) }
func (e *engine) Restart(ctx context.Context, l lease.Lease) error { return e.ask(ctx, "restart", l) }

func (e *engine) ask(ctx context.Context, what string, l lease.Lease) error {
	e.mu.Lock()
	e.asked, e.macs = append(e.asked, fmt.Sprintf("%s %s %s", what, l.Name, l.Addr())), append(e.macs, l.MAC)
	during, act, err := e.during, e.act, e.fails
	e.mu.Unlock()
	if during != nil {
		during()
	}
	if act != nil {
		return act(ctx)
	}
	return err
}

// memStore is a lease.Store in memory.
type memStore struct {
	// before is asked ahead of every call, outside the lock; its error is the
	// call's. It may take its time.
	before knob[func(call string) error]
	// stuck is what Alive answers, when its ctx ends.
	stuck knob[error]

	mu       sync.Mutex
	pools    map[string]lease.Pool
	leases   map[lease.Key]lease.Lease
	bindings map[lease.BindingKey]lease.Binding
	host     lease.HostIdentity
	events   []lease.Event
	calls    []string
}

var _ lease.Store = (*memStore)(nil)

var errNoPool = errors.New("no such pool")

func newStore() *memStore {
	return &memStore{pools: map[string]lease.Pool{}, leases: map[lease.Key]lease.Lease{}, bindings: map[lease.BindingKey]lease.Binding{}}
}

// call names a change by what is most of it.
func call(c lease.Change) string {
	switch {
	case c.PutHost != lease.HostIdentity{}:
		return "PutHost"
	case len(c.DropPools) > 0:
		return "DeletePool"
	case len(c.PutPools) > 0:
		return "PutPool"
	case len(c.PutLeases) > 0:
		return "PutLease"
	case len(c.DropLeases) > 0:
		return "DeleteLease"
	case len(c.PutBindings) > 0:
		return "PutBinding"
	case len(c.DropBindings) > 0:
		return "DropBinding"
	}
	return "PutEvent"
}

func (s *memStore) do(call string, change func() error) error {
	if before := s.before.get(); before != nil {
		if err := before(call); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, call)
	return change()
}

func (s *memStore) Load() (saved lease.Saved, err error) {
	err = s.do("Load", func() error {
		saved = lease.Saved{
			Pools: slices.Collect(maps.Values(s.pools)), Leases: slices.Collect(maps.Values(s.leases)),
			Bindings: slices.Collect(maps.Values(s.bindings)), Host: s.host,
		}
		slices.SortFunc(saved.Leases, func(a, b lease.Lease) int { return a.Addr().Compare(b.Addr()) })
		return nil
	})
	return saved, err
}

func (s *memStore) Commit(c lease.Change) error {
	return s.do(call(c), func() error {
		for _, l := range c.PutLeases {
			_, there := s.pools[l.Pool]
			if !there && !slices.ContainsFunc(c.PutPools, func(p lease.Pool) bool { return p.ID == l.Pool }) {
				return errNoPool
			}
		}
		for _, k := range c.DropBindings {
			delete(s.bindings, k)
		}
		for _, k := range c.DropLeases {
			delete(s.leases, k)
		}
		for _, id := range c.DropPools {
			delete(s.pools, id)
			maps.DeleteFunc(s.leases, func(k lease.Key, _ lease.Lease) bool { return k.Pool == id })
		}
		for _, p := range c.PutPools {
			s.pools[p.ID] = p
		}
		for _, l := range c.PutLeases {
			s.leases[l.Key()] = l
		}
		for _, b := range c.PutBindings {
			s.bindings[b.Key()] = b
		}
		if c.PutHost != (lease.HostIdentity{}) {
			s.host = c.PutHost
		}
		for _, e := range c.PutEvents {
			e.Seq = uint64(len(s.events)) + 1
			s.events = append(s.events, e)
		}
		return nil
	})
}

// Events are all: there is no limit.
func (s *memStore) Events(after uint64) ([]lease.Event, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.events[min(after, uint64(len(s.events))):]), nil
}

func (s *memStore) Alive(ctx context.Context) error { return alive(ctx, &s.stuck) }

// alive is nil unless something is stuck.
func alive(ctx context.Context, stuck *knob[error]) error {
	err := stuck.get()
	if err != nil {
		<-ctx.Done()
	}
	return err
}

// failing makes the named calls fail.
func failing(calls ...string) func(string) error {
	return func(call string) error {
		if slices.Contains(calls, call) {
			return errDiskFull
		}
		return nil
	}
}

var errDiskFull = errors.New("no space left on device")

// world is a manager with both of its sides, inside a synctest bubble.
type world struct {
	*testing.T
	server     *dhcpServer
	store      *memStore
	host       *fakeHost
	neighbours *neighbours
	engine     *engine
	observer   *observer     // nil for none
	global     lease.Options // of the next start
	manager    *lease.Manager
	log        lockedBuffer
	watched    context.Context // nil where no watchdog is wanted
	alarm      knob[string]    // that the test expects
	seen       uint64          // the last event
}

// lockedBuffer may be written and read concurrently.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// byMAC are global settings with which names are only names, and a release is
// sent at once.
var byMAC = lease.Options{ClientID: lease.ClientIDMAC}

// inWorld is inWorldOf leases by MAC.
func inWorld(t *testing.T, test func(w *world)) {
	t.Helper()
	inWorldOf(t, byMAC, test)
}

// inWorldOf runs a test in a bubble with a manager that starts from nothing. At
// no time may the watchdog find something stuck, unless the test says so. At the
// end memory and store must agree, and nothing may run on after Close: synctest
// reports goroutines that are left.
func inWorldOf(t *testing.T, global lease.Options, test func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.global = global
		var bark context.CancelFunc
		w.watched, bark = context.WithCancel(t.Context())
		w.start()
		test(w)
		bark()
		synctest.Wait()
		w.store.before.set(nil)
		w.agree()
		w.manager.Close()
		w.server.forget()
		time.Sleep(10 * 365 * 24 * time.Hour)
		w.server.saw(t)
		if t.Failed() {
			t.Log(w.log.String())
		}
	})
}

func newWorld(t *testing.T) *world {
	return &world{T: t, server: newServer(), store: newStore(), host: newHost(), neighbours: &neighbours{}, engine: &engine{}, observer: &observer{}}
}

// config is a manager's, with the world's fakes.
func (w *world) config() lease.Config {
	c := lease.Config{
		Timeout: timeout, Global: w.global, Machine: w.host, Prober: w.neighbours, Engine: w.engine,
		Log: slog.New(slog.NewTextHandler(&w.log, nil)),
	}
	if w.observer != nil {
		c.Observer = w.observer
	}
	return c
}

// start makes the manager from what the store has.
func (w *world) start() {
	w.Helper()
	m, err := lease.NewManager(w.store, w.server, w.config())
	if err != nil {
		w.Fatal(err)
	}
	w.manager = m
	if w.watched != nil {
		go w.watch(m)
	}
}

// watch is the daemon's watchdog, for its first day: some tests last for years.
func (w *world) watch(m *lease.Manager) {
	pause := time.NewTicker(20 * time.Second)
	for end := time.Now().Add(24 * time.Hour); time.Now().Before(end); {
		select {
		case <-pause.C:
		case <-w.watched.Done():
			return
		}
		ctx, cancel := context.WithTimeout(w.watched, 20*time.Second)
		err := m.Alive(ctx)
		cancel()
		if expected := w.alarm.get(); err != nil && w.watched.Err() == nil && (expected == "" || !strings.Contains(err.Error(), expected)) {
			w.Errorf("%v: false alarm: %v", time.Since(w.server.began), err)
		}
	}
}

// restart stops the daemon for a time.
func (w *world) restart(down time.Duration) {
	w.Helper()
	w.manager.Close()
	time.Sleep(down)
	w.start()
}

// agree compares the manager's leases with the stored ones, whose times within
// a boot are the boot time's: a bubble's wall clock doesn't show a suspend.
func (w *world) agree() {
	w.Helper()
	w.store.mu.Lock()
	defer w.store.mu.Unlock()
	held := slices.DeleteFunc(w.manager.Leases(), func(h lease.Held) bool { return h.State == lease.Releasing })
	for _, h := range held {
		stored, ok := w.store.leases[h.Key()]
		if stored.BootID != "" && stored.BootID == w.host.BootID() {
			age := w.host.BootTime() - stored.BootTime
			shifted(time.Since(stored.Obtained) - age)(&stored)
		}
		if !ok || !same(stored, h.Lease) {
			w.Errorf("in memory %+v\nstored %+v", h.Lease, stored)
		}
	}
	if len(held) != len(w.store.leases) {
		w.Errorf("%d leases in memory, %d stored: %v", len(held), len(w.store.leases), w.store.leases)
	}
}

func same(a, b lease.Lease) bool {
	return a.Pool == b.Pool && a.MAC == b.MAC && a.Name == b.Name && bytes.Equal(a.ClientID, b.ClientID) && a.Prefix == b.Prefix &&
		a.Server == b.Server && a.Via == b.Via && bytes.Equal(a.Options, b.Options) && a.Obtained.Equal(b.Obtained) &&
		a.Renew.Equal(b.Renew) && a.Rebind.Equal(b.Rebind) && a.Expires.Equal(b.Expires)
}

// pool adds a pool of 192.0.2.0/24 and returns its ID.
func (w *world) pool(texts ...string) string {
	w.Helper()
	within := ""
	if len(texts) > 0 {
		within = texts[0]
	}
	p, err := lease.NewPool("192.0.2.0/24", within, nil)
	if err == nil {
		p, err = w.manager.AddPool(w.Context(), p)
	}
	if err != nil {
		w.Fatal(err)
	}
	w.server.forget()
	return p.ID
}

// acquire takes a lease that must be granted.
func (w *world) acquire(pool string, ep lease.Endpoint) lease.Lease {
	w.Helper()
	l, err := w.manager.Acquire(w.Context(), pool, ep)
	if err != nil {
		w.Fatalf("acquire for %v: %v", ep.MAC, err)
	}
	return l
}

// refused takes a lease that must not be granted, for reasons that are named.
func (w *world) refused(pool string, ep lease.Endpoint, parts ...string) {
	w.Helper()
	_, err := w.manager.Acquire(w.Context(), pool, ep)
	w.fails(err, parts...)
}

// fails checks that there is an error and what it names.
func (w *world) fails(err error, parts ...string) {
	w.Helper()
	if err == nil {
		w.Errorf("no error, want one with %q", parts)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			w.Errorf("no %q in: %v", part, err)
		}
	}
}

func (w *world) works(err error) {
	w.Helper()
	if err != nil {
		w.Error(err)
	}
}

// lines are the log's that have all parts.
func (w *world) lines(parts ...string) (lines []string) {
	synctest.Wait()
	for line := range strings.Lines(w.log.String()) {
		if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
			lines = append(lines, line)
		}
	}
	return lines
}

// holds compares the manager's leases: address and state.
func (w *world) holds(want ...string) {
	w.Helper()
	synctest.Wait()
	var got []string
	for _, h := range w.manager.Leases() {
		got = append(got, fmt.Sprintf("%v %v", h.Addr(), h.State))
	}
	if !slices.Equal(got, want) {
		w.Errorf("held are %q, want %q", got, want)
	}
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// prefix is a subnet, or none.
func prefix(s string) netip.Prefix {
	if s == "" {
		return netip.Prefix{}
	}
	return netip.MustParsePrefix(s)
}

// mac is the n-th container's.
func mac(n int) lease.MAC { return lease.MAC{2, 0, 0, 0, byte(n >> 8), byte(n)} }
