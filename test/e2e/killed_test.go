package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

const (
	// killLease is the lease of what is killed under: long enough that a
	// daemon of few milliseconds at a time loses none, short enough to wait
	// for the end of those that nobody knows.
	killLease = 16 * time.Second
	// killDelay is its networks' release_delay.
	killDelay = 2 * time.Second
)

// killSubnet is one in which addresses never run out.
func killSubnet() lab.Subnet {
	return lab.NewSubnet("10.10.0.0/16", "10.10.8.0", "10.10.199.255", "10.10.0.1")
}

// moments are those of a test that draws them, the same again with OAM_SEED.
func moments(t *testing.T) uint64 {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("OAM_SEED"); text != "" {
		seed = must(strconv.ParseUint(text, 10, 64))(t)
	}
	t.Logf("OAM_SEED=%d repeats the moments", seed)
	return seed
}

// The daemon is killed again and again, while it starts and while an engine
// starts and ends containers of all kinds of identity, removes networks and
// makes new ones. Whatever the engine was told stays true, no address is given
// twice, and what the server leases is known or ends by itself.
//
//	the daemon's absence (0.2 s)  <  release_delay = 2 s  <  T1 = 8 s  <  the lease = 16 s
func TestKilledAtAnyMoment(t *testing.T) {
	t.Parallel() // its end waits for a lease's
	kills, verified := 40, 2
	if soak {
		kills, verified = 1000, 10
	}
	seed := moments(t)
	random := rand.New(rand.NewPCG(seed, 0))

	s := newHost(t, lab.Kea, lab.DHCPConfig{Subnets: []lab.Subnet{killSubnet()}, LeaseSeconds: int(killLease.Seconds()), Threads: 4})
	check(t, s.daemon.Start())
	w := newWitness(s, 4)
	for kill := range kills {
		// Its start takes some 50 ms, so some of the kills come in it.
		moment := time.Duration(random.IntN(200)) * time.Millisecond
		ctx, cancel := context.WithCancel(t.Context())
		var engines sync.WaitGroup
		for n, h := range w.hosts {
			engines.Go(func() { h.work(ctx, rand.New(rand.NewPCG(seed, uint64(kill*len(w.hosts)+n+1)))) })
		}
		time.Sleep(moment)
		check(t, s.daemon.Kill())
		cancel()
		engines.Wait()
		if kill%verified == verified-1 {
			check(t, s.daemon.Start())
			w.verify()
		} else {
			must(s.daemon.Launch())(t)
		}
		if t.Failed() {
			t.Fatalf("after kill %d", kill+1)
		}
	}
	t.Logf("%+v", w.counts)
	if c := w.counts; c.given < 3*kills || c.cutOff < kills/4 || c.cameBack < kills/2 || c.tookOver <= 10*c.tooLate || c.networks <= len(w.hosts) {
		t.Errorf("that is too little to mean anything: %+v", c)
	}
	check(t, s.daemon.Kill())
	check(t, s.daemon.Start())
	w.verify()
	w.endAll()
}

// witness knows what engines were told.
type witness struct {
	*site
	hosts []*fakeEngine
	// orphans are leased by the server and unknown to the daemon.
	orphans map[netip.Addr]lab.DHCPLease

	// mu guards what follows.
	mu sync.Mutex
	// holders has every address from its answer to the call that gives it
	// back.
	holders map[netip.Addr]*fakeContainer
	// doubtful are the MACs of calls that were cut off: their leases may be
	// there or not, at either end.
	doubtful map[string]bool
	// used are the MACs of all calls since the last verify.
	used   map[string]bool
	counts struct{ given, givenBack, cameBack, tookOver, tooLate, networks, cutOff int }
}

// fakeEngine acts for an engine, one call at a time, on a network of its own.
// All networks are of one subnet.
type fakeEngine struct {
	*witness
	pool       string // "" when its network is to be created
	containers []*fakeContainer
}

// fakeContainer is a container with what was said about it.
type fakeContainer struct {
	name string // "" as with engines before 29
	mac  string // given by --mac-address, or "" for a new one at each start

	running bool
	addr    netip.Addr // while it runs
	usedMAC string
	// doubtful: since the last verify a call was cut off, so that its name may
	// have a lease that nobody was told of. It then starts by MAC.
	doubtful bool
	byName   bool
	home     netip.Addr // that waits for it since it left
	left     time.Time
}

func newWitness(s *site, hosts int) *witness {
	w := &witness{
		site: s, holders: map[netip.Addr]*fakeContainer{}, doubtful: map[string]bool{}, used: map[string]bool{}, orphans: map[netip.Addr]lab.DHCPLease{},
	}
	for n := range hosts {
		h := &fakeEngine{witness: w}
		for i := range 4 {
			h.containers = append(h.containers,
				&fakeContainer{name: fmt.Sprintf("c%d-%d", n, i)},
				&fakeContainer{name: fmt.Sprintf("m%d-%d", n, i), mac: lab.ScatteredMAC(100*n + 2*i)},
				&fakeContainer{mac: lab.ScatteredMAC(100*n + 2*i + 1)},
				&fakeContainer{},
			)
		}
		w.hosts = append(w.hosts, h)
	}
	return w
}

// unreached tells calls that came to nobody from those that were cut off.
func unreached(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT)
}

// work starts and ends containers until ctx ends.
func (h *fakeEngine) work(ctx context.Context, random *rand.Rand) {
	for ctx.Err() == nil {
		c := h.containers[random.IntN(len(h.containers))]
		switch {
		case random.IntN(60) == 0:
			h.replaceNetwork()
		case h.pool == "":
			h.createNetwork()
		case c.running:
			if h.end(c) && random.IntN(2) == 0 {
				h.begin(c, nil) // a restart
			}
		case random.IntN(4) == 0:
			h.begin(c, h.somebodysHome(c))
		default:
			h.begin(c, nil)
		}
	}
}

// failed sorts a call's error. Only one that was answered is none of the
// daemon's end.
func (h *fakeEngine) failed(what string, err error, mac string) {
	switch {
	case errors.Is(err, lab.ErrRefused):
		h.Errorf("%s: %v", what, err)
	case unreached(err):
		time.Sleep(time.Millisecond) // the daemon needs the processor to start
	default:
		h.doubtful[mac] = true
		h.counts.cutOff++
	}
}

// somebodysHome is a container whose address c can ask for before its release.
func (h *fakeEngine) somebodysHome(c *fakeContainer) *fakeContainer {
	for _, victim := range h.containers {
		// Of a container in doubt the daemon may have a lease, which keeps it
		// from another address.
		if victim != c && !c.doubtful && !victim.running && victim.home.IsValid() && time.Since(victim.left) < killDelay/2 {
			return victim
		}
	}
	return nil
}

// begin starts a container; with a victim at the address that this has left
// (run --ip).
func (h *fakeEngine) begin(c, victim *fakeContainer) {
	mac, ip := c.mac, ""
	if mac == "" {
		mac = randomMAC()
	}
	if victim != nil {
		ip = victim.home.String()
	}
	addr, err := h.ask(h.pool, c.name, mac, ip)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.used[mac] = true
	what := fmt.Sprintf("start of %s (%s) %s", c.name, mac, ip)
	if victim != nil && !unreached(err) {
		victim.home = netip.Addr{}
	}
	if victim != nil && err != nil && (strings.Contains(err.Error(), "asked for "+ip+", the DHCP server offers") || strings.Contains(err.Error(), "address "+ip+" is leased to")) {
		// Between the victim's release and this request the server gave the
		// address to another engine's container.
		h.counts.tooLate++
		return
	}
	if err != nil {
		h.failed(what, err, mac)
		if !unreached(err) {
			c.home, c.doubtful = netip.Addr{}, true
		}
		return
	}
	if other := h.holders[addr]; other != nil {
		h.Errorf("%s: %s was given to %s (%s) already", what, addr, other.name, other.usedMAC)
	}
	switch {
	case victim != nil:
		h.counts.tookOver++
		if addr.String() != ip {
			h.Errorf("%s: got %s", what, addr)
		}
	case c.home.IsValid() && time.Since(c.left) < killDelay:
		h.counts.cameBack++
		if addr != c.home {
			h.Errorf("%s: it had %s and has %s", what, c.home, addr)
		}
	}
	h.counts.given++
	h.holders[addr] = c
	c.running, c.addr, c.usedMAC, c.home = true, addr, mac, netip.Addr{}
	c.byName = c.name != "" && !c.doubtful
}

// end ends a container and reports whether the daemon said so.
func (h *fakeEngine) end(c *fakeContainer) bool {
	// From here on the address may be another's.
	h.mu.Lock()
	h.used[c.usedMAC] = true
	delete(h.holders, c.addr)
	h.mu.Unlock()
	c.left = time.Now()
	err := h.releaseAddress(h.pool, c.addr)
	h.mu.Lock()
	defer h.mu.Unlock()
	if unreached(err) {
		h.holders[c.addr] = c
	}
	if err != nil {
		h.failed("end of "+c.name+" "+c.addr.String(), err, c.usedMAC)
		if !unreached(err) {
			c.running, c.doubtful = false, true
		}
		return false
	}
	c.running = false
	if c.byName {
		c.home = c.addr
	}
	h.counts.givenBack++
	return true
}

// replaceNetwork ends the containers and their network, and makes another one.
func (h *fakeEngine) replaceNetwork() {
	for _, c := range h.containers {
		if c.running && !h.end(c) {
			return
		}
	}
	if h.pool != "" {
		err := h.call(h.Context(), "ReleasePool", map[string]any{"PoolID": h.pool}, &struct{}{})
		h.mu.Lock()
		if err != nil {
			h.failed("removal of a network", err, "")
		}
		h.mu.Unlock()
		if err != nil {
			return // the engine has it still, and so may we
		}
		h.pool = ""
	}
	h.createNetwork()
}

func (h *fakeEngine) createNetwork() {
	pool, err := h.requestPool("10.10.0.0/16", map[string]string{"release_delay": killDelay.String()})
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil {
		h.failed("creation of a network", err, "")
		return
	}
	h.pool = pool
	h.counts.networks++
}

// verify compares what the engines were told with the daemon's list and the
// server's table. No call may be under way.
func (w *witness) verify() {
	w.Helper()
	// Each before what it must be part of: renewals and releases go on.
	rows := must(w.dhcp.Leases())(w.T)
	known := map[netip.Addr]daemonLease{}
	for _, lease := range w.site.leases() {
		known[lease.Address] = lease
	}
	listed := time.Now()
	rowOf := map[netip.Addr]lab.DHCPLease{}
	for _, row := range rows {
		rowOf[row.Addr] = row
	}
	for addr, c := range w.holders {
		if lease := known[addr]; lease.MAC != c.usedMAC || lease.State == "releasing" || lease.State == "waiting" {
			w.Errorf("%s was given to %s (%s), and is known as %+v", addr, c.name, c.usedMAC, lease)
		}
		if row := rowOf[addr]; row.MAC != c.usedMAC {
			w.Errorf("%s was given to %s (%s), for whom the server has %+v", addr, c.name, c.usedMAC, row)
		}
	}
	for _, h := range w.hosts {
		for _, c := range h.containers {
			if lease := known[c.home]; c.home.IsValid() && listed.Sub(c.left) < killDelay && (lease.State != "releasing" || lease.Name != c.name) {
				w.Errorf("%s left %s, which is known as %+v", c.name, c.home, lease)
			}
		}
	}
	for addr, row := range rowOf {
		if _, knows := known[addr]; knows {
			delete(w.orphans, addr)
			continue
		}
		if before, was := w.orphans[addr]; was && before.MAC == row.MAC && !w.used[row.MAC] && row.Expires.After(before.Expires) {
			w.Errorf("nobody knows the lease of %s to %s, and it was renewed", addr, row.MAC)
		}
		w.orphans[addr] = row
	}
	for addr, lease := range known {
		if w.holders[addr] != nil || lease.State == "releasing" {
			continue
		}
		if !w.doubtful[lease.MAC] {
			w.Errorf("the daemon has a lease that nobody was told of, or that was given back: %+v", lease)
		}
		// As a reconcile does.
		check(w.T, w.releaseAddress(lease.PoolID, addr))
	}
	clear(w.doubtful)
	clear(w.used)
	for _, h := range w.hosts {
		for _, c := range h.containers {
			c.doubtful = false
		}
	}
}

// endAll ends as removed networks do: with nothing left, once every release
// was sent and every lease that nobody knows has ended.
func (w *witness) endAll() {
	w.Helper()
	for _, h := range w.hosts {
		for _, c := range h.containers {
			if c.running && !h.end(c) {
				w.Errorf("%s wasn't ended", c.name)
			}
		}
		if h.pool != "" {
			w.releasePool(h.pool)
		}
	}
	w.freed()
}

// The same with a real engine, for what it makes of calls that are cut off.
//
//	the daemon's absence, and an engine's patience after it (3 s)  <  T1 = 8 s  <  the lease = 16 s
func TestKilledUnderContainers(t *testing.T) {
	t.Parallel() // its end waits for a lease's
	kills := 6
	if soak {
		kills = 60
	}
	seed := moments(t)
	random := rand.New(rand.NewPCG(seed, 0))
	s := newSite(t, lab.Kea, lab.DHCPConfig{Subnets: []lab.Subnet{killSubnet()}, LeaseSeconds: int(killLease.Seconds())})
	// A network has one call at a time.
	networks := []string{"a", "b"}
	for i, name := range networks {
		s.network(name, fmt.Sprintf("eth%d", i), "10.10.0.0/16", "--ipam-opt", "release_delay="+killDelay.String())
	}
	orphans := map[netip.Addr]lab.DHCPLease{}
	ran, failed, lost := 0, 0, 0
	for kill := range kills {
		ctx, cancel := context.WithCancel(t.Context())
		var users sync.WaitGroup
		var mu sync.Mutex
		for n, network := range networks {
			random := rand.New(rand.NewPCG(seed, uint64(kill*len(networks)+n+1)))
			users.Go(func() {
				for ctx.Err() == nil {
					name := fmt.Sprintf("%s%d", network, random.IntN(3))
					_, _ = s.engine.Docker("rm", "-f", name)
					_, err := s.engine.Docker("run", "-d", "--name", name, "--network", network, image)
					if err == nil && random.IntN(2) == 0 {
						_, err = s.engine.Docker("restart", name)
					}
					mu.Lock()
					ran++
					if err != nil {
						failed++
					}
					mu.Unlock()
				}
			})
		}
		time.Sleep(time.Duration(random.IntN(1500)) * time.Millisecond)
		check(t, s.daemon.Kill())
		check(t, s.daemon.Start())
		cancel()
		users.Wait()

		holders := map[netip.Addr]string{}
		for _, name := range strings.Fields(s.docker("ps", "--format", "{{.Names}}")) {
			addr, mac := s.holds(name, "eth0")
			if holders[addr] != "" {
				t.Errorf("%s and %s both have %s", holders[addr], name, addr)
			}
			holders[addr] = name
			if lease, err := s.find(addr); err != nil || lease.MAC != mac || lease.State == "releasing" {
				t.Errorf("%s has %s, which is known as %+v: %v", name, addr, lease, err)
			}
		}
		rows := must(s.dhcp.Leases())(t)
		known := map[netip.Addr]bool{}
		here := 0
		for _, lease := range s.leases() {
			known[lease.Address] = true
			if holders[lease.Address] == "" && lease.State != "releasing" {
				// Its release was cut off, or its start. As a reconcile does:
				here++
				check(t, s.releaseAddress(lease.PoolID, lease.Address))
			}
		}
		lost += here
		if here > len(networks) {
			t.Errorf("%d leases without a container, of %d calls that a kill can cut off", here, len(networks))
		}
		for _, row := range rows {
			if before, was := orphans[row.Addr]; was && !known[row.Addr] && before.MAC == row.MAC && row.Expires.After(before.Expires) {
				t.Errorf("nobody knows the lease of %s to %s, and it was renewed", row.Addr, row.MAC)
			}
			if delete(orphans, row.Addr); !known[row.Addr] {
				orphans[row.Addr] = row
			}
		}
		if t.Failed() {
			t.Fatalf("after kill %d", kill+1)
		}
	}
	t.Logf("%d containers, %d of which failed; %d leases of cut off calls", ran, failed, lost)
	if ran < kills {
		t.Errorf("%d containers are too few to mean anything", ran)
	}
	if left := strings.Fields(s.docker("ps", "-aq")); len(left) > 0 {
		s.remove(left...)
	}
	s.docker(append([]string{"network", "rm"}, networks...)...)
	s.freed()
}

// freed waits until the server leases nothing, and the daemon has nothing.
func (s *site) freed() {
	s.Helper()
	eventually(s.T, killLease+5*time.Second, func() error {
		rows, err := s.dhcp.Leases()
		if err == nil && len(rows) > 0 {
			err = fmt.Errorf("the server still leases %+v", rows)
		}
		return err
	})
	if left := s.leases(); len(left) != 0 {
		s.Errorf("the daemon still has %+v", left)
	}
}
