package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/engine"
	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/server"
	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// finding is an object of `reconcile --json`, by its documented names.
type finding struct {
	Action    string     `json:"action"`
	Address   netip.Addr `json:"address"`
	MAC       string     `json:"mac"`
	Name      string     `json:"name"`
	Container string     `json:"container"`
	Network   string     `json:"network"`
	Detail    string     `json:"detail"`
}

// reconciled runs the command against an engine and returns its exit status,
// what it found, and its error.
func (s *site) reconciled(of *lab.Engine, args ...string) (status int, found []finding, err error) {
	out, err := s.daemon.Run(append([]string{"--docker", "unix://" + of.Socket(), "reconcile", "--json"}, args...)...)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		status = exit.ExitCode()
	}
	if status == 2 {
		err = nil
	}
	if err != nil {
		return status, nil, err
	}
	return status, found, errors.Join(json.Unmarshal([]byte(out), &found))
}

// reconciles runs the command, which must end with this status and find this,
// each "action NAME", in any order.
func (s *site) reconciles(status int, want []string, args ...string) []finding {
	s.Helper()
	got, found, err := s.reconciled(s.engine, args...)
	check(s.T, err)
	said := []string{}
	for _, f := range found {
		said = append(said, f.Action+" "+f.Name)
	}
	slices.Sort(said)
	slices.Sort(want)
	if got != status || !slices.Equal(said, want) {
		s.Fatalf("reconcile %q ends with status %d, want %d, and finds %q, want %q: %+v", args, got, status, said, want, found)
	}
	return found
}

// resident is a container as it was once found: it must not change.
type resident struct {
	name string
	addr netip.Addr
	mac  string
	id   string // its client identifier, as the server has it
	life string // when it was started, and its process
}

func (s *site) resident(name string) resident {
	s.Helper()
	r := resident{name: name, life: s.docker("inspect", "--format", "{{.State.StartedAt}} {{.State.Pid}}", name)}
	r.addr, r.mac = s.holds(name, "eth0")
	r.id = s.leased(r.addr, r.mac).ClientID
	return r
}

// lives: a renewal may be on its way.
func (l daemonLease) lives() bool { return l.State == "bound" || l.State == "renewing" }

// undisturbed tries that a container runs on with its address, which is
// leased at both ends.
func (s *site) undisturbed(all ...resident) {
	s.Helper()
	for _, r := range all {
		if now := s.resident(r.name); now != r {
			s.Errorf("%s was %+v, and is %+v", r.name, r, now)
		}
		if l := s.known(r.addr); l.MAC != r.mac || !l.lives() || strings.ReplaceAll(l.ClientID, ":", "") != r.id {
			s.Errorf("%s: the daemon has %+v", r.name, l)
		}
	}
}

// loseDatabase has the daemon killed and start with an empty data folder.
func (s *site) loseDatabase() {
	s.Helper()
	check(s.T, s.daemon.Kill())
	check(s.T, os.RemoveAll(s.daemon.DataDir))
	check(s.T, s.daemon.Start())
	if left := s.leases(); len(left) != 0 {
		s.Fatalf("an empty database has %+v", left)
	}
}

// The names that engines before 29 don't tell come by a reconcile, and with the
// next renewal to the server. Then the database is lost under the containers:
// one reconcile, and everything is renewed and released as before.
//
// Renewals come at once, and what follows them doesn't within the test:
//
//	T1 = 1 s (dnsmasq: 3 s)  <  the time that it waits  <  T2 = 300 s  <  the lease = 600 s
func TestReconcileAfterLostDatabase(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		config := lab.DHCPConfig{RenewSeconds: 1, RebindSeconds: 300, Subnets: []lab.Subnet{
			lab.SubnetA(), lab.NewSubnet("10.20.0.0/24", "10.20.0.130", "10.20.0.199", "10.20.0.1"),
		}}
		if kind.Name == lab.Dnsmasq.Name {
			config.RenewSeconds = 3
		}
		s := newSite(t, kind, config)
		s.network("a", "eth0", "10.10.0.0/24")
		s.network("b", "eth1", "10.20.0.0/24", "--ip-range", "10.20.0.128/25",
			"--ipam-opt", "dhcp_server=10.10.0.1", "--ipam-opt", "release_delay=0s")
		s.run("c1", "a")
		s.run("c2", "a", "--mac-address", "02:42:0a:0a:00:77")
		s.run("c3", "b")
		residents := []resident{s.resident("c1"), s.resident("c2"), s.resident("c3")}

		// Names are no difference: status 0.
		s.reconciles(0, []string{"named c1", "named c2", "named c3"})
		s.reconciles(0, nil)
		for _, r := range residents {
			if name := s.known(r.addr).Name; name != r.name {
				t.Errorf("the lease of %s has the name %q", r.name, name)
			}
			s.hostname(r.addr, r.name)
		}
		if !s.tellsNames() {
			s.docker("rename", "c1", "renamed")
			s.reconciles(0, []string{"named renamed"})
			s.hostname(residents[0].addr, "renamed")
			s.docker("rename", "renamed", "c1")
		}

		discovers, releases := s.count(s.net.Server, discover), s.count(s.net.Server, release)
		s.loseDatabase()
		all := []string{"adopted c1", "adopted c2", "adopted c3"}
		for _, f := range s.reconciles(2, slices.Clone(all), "--dry-run") {
			mentions(t, f.Detail, "would be confirmed")
		}
		if left := s.leases(); len(left) != 0 {
			t.Fatalf("a dry run left %+v", left)
		}
		for _, f := range s.reconciles(2, all) {
			mentions(t, f.Detail, "confirmed by server 10.10.0.1")
			if f.Network != map[string]string{"c1": "a", "c2": "a", "c3": "b"}[f.Name] || f.Container != s.docker("inspect", "--format", "{{.Id}}", f.Name) {
				t.Errorf("network or container are wrong: %+v", f)
			}
		}
		s.reconciles(0, nil)
		// What was adopted outlives the next restart.
		check(t, s.daemon.Restart())
		s.reconciles(0, nil)
		s.undisturbed(residents...)
		for _, r := range residents {
			s.renewed(r.addr, s.leased(r.addr, r.mac).Expires)
			if name := s.known(r.addr).Name; name != r.name {
				t.Errorf("the adopted lease of %s has the name %q", r.name, name)
			}
		}
		if d, r := discovers(), releases(); d+r != 0 {
			t.Errorf("%d DISCOVERs and %d RELEASEs, all that is needed are renewals", d, r)
		}
		s.undisturbed(residents...)

		// The daemon doesn't know the PoolIDs with which these come.
		s.docker("rm", "-f", "c1")
		s.gone(residents[0].addr)
		s.docker("restart", "-t", "0", "c2")
		again, _ := s.holds("c2", "eth0")
		s.run("c4", "b")
		fourth, _ := s.holds("c4", "eth0")
		s.only(again, fourth, residents[2].addr)
		s.undisturbed(residents[2])
		// Next to a PoolID that is known by now.
		s.docker("rm", "-f", "c3")
		s.gone(residents[2].addr)
		s.docker("rm", "-f", "c2", "c4")
		s.docker("network", "rm", "a", "b")
		s.leftBehind()
	})
}

// The database is lost while the server is down: the endpoints are adopted all
// the same, and their leases confirmed when it is back. One that goes before
// that is released for nothing.
//
//	The servers' 2 s to answer a reconcile < the outage < a DISCOVER's last
//	retransmission, after DHCP_TIMEOUT = 30 s.
func TestReconcileWhileServerIsDown(t *testing.T) {
	t.Parallel()
	s := newSite(t, lab.Kea, lab.DHCPConfig{})
	s.network("a", "eth0", "10.10.0.0/24")
	s.run("stays", "a")
	s.run("leaves", "a")
	stays, leaves := s.resident("stays"), s.resident("leaves")
	check(t, s.dhcp.Stop())
	s.loseDatabase()
	began := time.Now()
	for _, f := range s.reconciles(2, []string{"adopted stays", "adopted leaves"}) {
		mentions(t, f.Detail, "not confirmed yet", "no DHCP server answered")
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the reconcile took %v", took)
	}
	for _, r := range []resident{stays, leaves} {
		if l := s.known(r.addr); l.State != "lost" || l.MAC != r.mac {
			t.Errorf("adopted is %+v", l)
		}
	}
	s.docker("rm", "-f", "leaves")
	if l, err := s.find(leaves.addr); err == nil {
		t.Errorf("the daemon still has %+v", l)
	}
	// No way to a server is known from such a lease.
	if out := must(s.net.Host.Run("ss", "-Huln", "sport = :67"))(t); strings.Contains(out, "127.0.0.1") {
		t.Errorf("the daemon listens on %s", out)
	}
	check(t, s.dhcp.Start())
	s.becomes(stays.addr.String(), "bound")
	s.undisturbed(stays)
	s.reconciles(0, nil)
	s.docker("rm", "-f", "stays")
	s.gone(stays.addr)
}

// hostname waits until the server has a client's host name.
func (s *site) hostname(addr netip.Addr, want string) {
	s.Helper()
	eventually(s.T, 10*time.Second, func() error {
		row, found, err := s.dhcp.Lease(addr)
		if err == nil && (!found || row.Hostname != want) {
			err = fmt.Errorf("the server has %+v for %s, want the name %s", row, addr, want)
		}
		return err
	})
}

// gone waits until nobody has a lease of an address. A name's lease waits
// for its release.
func (s *site) gone(addr netip.Addr) {
	s.Helper()
	s.released()
	s.notLeased(addr)
	if l, err := s.find(addr); err == nil {
		s.Errorf("the daemon still has %+v", l)
	}
}

// released sends the releases that wait.
func (s *site) released() {
	s.Helper()
	for _, l := range s.leases() {
		if l.State == "releasing" {
			must(s.daemon.Run("release", "--pool", l.PoolID, l.Address.String()))(s.T)
		}
	}
}

// leftBehind tries that nothing is leased any more, at either end.
func (s *site) leftBehind() {
	s.Helper()
	s.released()
	s.notLeased()
	if left := s.leases(); len(left) != 0 {
		s.Errorf("the daemon still has %+v", left)
	}
}

// An old copy of the database comes back after containers have changed. What
// it lacks is adopted, also where its addresses or MACs are meanwhile others';
// what it has too much is kept for now.
//
// The copy's leases aren't due: the time of the test < T1 = 300 s.
func TestReconcileAfterRestoredDatabase(t *testing.T) {
	t.Parallel()
	s := newSite(t, lab.Kea, lab.DHCPConfig{})
	s.network("a", "eth0", "10.10.0.0/24")
	s.run("stays", "a")
	gone := s.run("gone", "a")
	replaced := s.run("replaced", "a")
	moved := s.run("moves", "a", "--mac-address", "02:42:0a:0a:00:77")

	check(t, s.daemon.Stop())
	backup := filepath.Join(s.lab.Scratch, "backup")
	check(t, os.CopyFS(backup, os.DirFS(s.daemon.DataDir)))
	check(t, s.daemon.Start())
	s.docker("rm", "-f", "gone", "replaced")
	s.docker("stop", "-t", "0", "moves")
	s.released()
	s.notLeased(gone, replaced, moved)
	s.run("heir", "a", "--ip", replaced.String())
	// Whose address another one has while it doesn't run.
	s.run("squatter", "a", "--ip", moved.String())
	s.docker("start", "moves")
	s.run("late", "a")
	s.docker("rm", "-f", "squatter")
	s.released()
	s.network("b", "eth1", "10.20.0.0/24")
	s.run("other", "b")
	var residents []resident
	var now []netip.Addr
	for _, name := range []string{"stays", "heir", "moves", "late", "other"} {
		r := s.resident(name)
		residents, now = append(residents, r), append(now, r.addr)
	}
	if residents[1].addr != replaced || residents[2].addr == moved {
		t.Fatalf("the addresses didn't go where this test needs them: %+v", residents)
	}

	check(t, s.daemon.Kill())
	check(t, os.RemoveAll(s.daemon.DataDir))
	check(t, os.CopyFS(s.daemon.DataDir, os.DirFS(backup)))
	check(t, s.daemon.Start())
	missed := "missed "
	if s.tellsNames() {
		missed += "gone"
	}
	differences := []string{"adopted heir", "adopted moves", "adopted late", "adopted other", missed, "named stays"}
	s.reconciles(2, slices.Clone(differences), "--dry-run")
	s.only(now...)
	releases := s.count(s.net.Server, release)
	s.reconciles(2, differences)
	s.undisturbed(residents...)
	s.known(gone) // five minutes
	s.reconciles(2, []string{missed})
	// Of the address that moves had.
	if n := releases(); n != 1 {
		t.Errorf("%d releases", n)
	}
	s.only(now...)

	s.docker("rm", "-f", "stays", "heir", "moves", "late", "other")
	s.docker("network", "rm", "a", "b")
	s.leftBehind()
}

// Containers go while the daemon is down, and their releases with them. A
// reconcile doesn't release those leases before it has missed them twice, five
// minutes apart; until then they are renewed. And what another engine has, or
// rather hasn't, is no reason to do anything.
//
// T1 = 1 s < the time that a renewal is waited for < the engine's patience = 15 s
// < the time of the test < the orphans' 5 min < T2.
func TestReconcileOrphans(t *testing.T) {
	t.Parallel() // the engine's patience is most of its time
	s := newSite(t, lab.Kea, lab.DHCPConfig{RenewSeconds: 1, RebindSeconds: 1000, LeaseSeconds: 3600})
	s.network("a", "eth0", "10.10.0.0/24")
	s.run("stays", "a")
	s.run("orphan", "a")
	stays, orphan := s.resident("stays"), s.resident("orphan")
	s.reconciles(0, []string{"named orphan", "named stays"})

	check(t, s.daemon.Kill())
	var both sync.WaitGroup
	both.Go(func() {
		if _, err := s.engine.Docker("rm", "-f", "orphan"); err != nil {
			t.Error(err)
		}
	})
	stranger := newEngine(t, s.net.Second)
	check(t, stranger.Start())
	both.Wait()
	check(t, s.daemon.Start())

	releases := s.count(s.net.Server, release)
	for range 2 {
		status, found, err := s.reconciled(stranger)
		if status != 1 || err == nil {
			t.Fatalf("an engine without networks: status %d, %+v", status, found)
		}
		mentions(t, err.Error(), "no network of this driver", "2 leases", "--docker")
	}
	began := time.Now()
	s.reconciles(2, []string{"missed orphan"}, "--dry-run")
	for range 2 {
		for _, f := range s.reconciles(2, []string{"missed orphan"}) {
			if f.Address != orphan.addr || f.MAC != orphan.mac || f.Network != "" {
				t.Errorf("missed is %+v, want %+v", f, orphan)
			}
			mentions(t, f.Detail, "no container has it", "5m0s")
		}
		s.renewed(orphan.addr, s.leased(orphan.addr, orphan.mac).Expires)
	}
	s.undisturbed(stays)
	if l := s.known(orphan.addr); !l.lives() {
		t.Errorf("the orphan is %+v", l)
	}
	if n := releases(); n != 0 {
		t.Errorf("%d releases after %s", n, time.Since(began))
	}
	if !soak {
		return
	}
	time.Sleep(time.Until(began.Add(5*time.Minute + 5*time.Second)))
	s.reconciles(2, []string{"released orphan"}, "--dry-run")
	s.leased(orphan.addr, orphan.mac)
	s.reconciles(2, []string{"released orphan"})
	s.gone(orphan.addr)
	s.reconciles(0, nil)
	s.undisturbed(stays)
	if n := releases(); n != 1 {
		t.Errorf("%d releases", n)
	}
}

// The machine of the database is another one: the interface of its relay
// address has another MAC. Its leases may be the first one's, so nothing is sent
// about them, not even a release, until a reconcile finds their containers here.
//
// T1 = 1 s < the time that nothing is sent = 3 s < T2.
func TestReconcileOnAnotherHost(t *testing.T) {
	t.Parallel()
	s := newSite(t, lab.Kea, lab.DHCPConfig{RenewSeconds: 1, RebindSeconds: 300})
	s.network("a", "eth0", "10.10.0.0/24")
	s.run("stays", "a")
	s.run("leaves", "a")
	stays, leaves := s.resident("stays"), s.resident("leaves")
	s.renewed(stays.addr, s.leased(stays.addr, stays.mac).Expires)

	check(t, s.daemon.Stop())
	s.otherMAC()
	requests, releases := s.count(s.net.Server, request), s.count(s.net.Server, release)
	check(t, s.daemon.Start())
	s.becomes(stays.addr.String(), "waiting")
	s.becomes(leaves.addr.String(), "waiting")
	s.reconciles(2, []string{"resumed stays", "resumed leaves"}, "--dry-run")
	s.docker("rm", "-f", "leaves")
	if l, err := s.find(leaves.addr); err == nil {
		t.Errorf("the daemon still has %+v", l)
	}
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if n, m := requests(), releases(); n+m > 0 {
			t.Fatalf("%d requests and %d releases for what may be another host's", n, m)
		}
	}
	s.leased(leaves.addr, leaves.mac)

	s.reconciles(2, []string{"resumed stays"})
	s.reconciles(0, nil)
	s.renewed(stays.addr, s.leased(stays.addr, stays.mac).Expires)
	s.undisturbed(stays)
	// It is this host's from now on.
	check(t, s.daemon.Restart())
	s.renewed(stays.addr, s.leased(stays.addr, stays.mac).Expires)
	s.reconciles(0, nil)
	s.docker("rm", "-f", "stays")
	s.gone(stays.addr)
}

// otherMAC gives the interface of the relay address another MAC.
func (s *site) otherMAC() {
	s.Helper()
	must(s.net.Host.Run("ip", "link", "set", "dev", "eth0", "address", "02:00:00:c1:0e:d0"))(s.T)
	for _, node := range []*lab.Node{s.net.Server, s.net.Second, s.net.Client} {
		must(node.Run("ip", "neigh", "flush", "all"))(s.T)
	}
}

// A cloned machine boots, and the first thing that its engine does is to give
// back what the original's containers have. Nothing is due there before:
//
//	the time of the test < T1 = 300 s.
func TestReleasesOfAClone(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	check(t, s.daemon.Start())
	pool := s.pool()
	mac := lab.ScatteredMAC(1)
	addr := s.acquire(pool, mac)
	check(t, s.daemon.Stop())
	s.otherMAC()
	releases := s.count(s.net.Server, release)
	check(t, s.daemon.Start())
	check(t, s.releaseAddress(pool, addr))
	if left := s.leases(); len(left) != 0 {
		t.Errorf("the daemon still has %+v", left)
	}
	// What is asked for from now on is the clone's own.
	own := s.acquire(pool, lab.ScatteredMAC(2))
	if own == addr {
		t.Errorf("%s was given twice", addr)
	}
	check(t, s.releaseAddress(pool, own))
	s.notLeased(own)
	if n := releases(); n != 1 {
		t.Errorf("%d releases came, want the clone's own", n)
	}
	s.leased(addr, mac)
}

// An engine that was restarted or killed under running containers
// (live-restore) tells of all of them as soon as it answers, and of a paused
// one too. Else two reconciles would release what they have.
func TestReconcileAfterEngineRestart(t *testing.T) {
	t.Parallel()
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	s.engine = must(s.net.Host.NewEngine(os.Getenv("OAM_DOCKERD"), "--live-restore"))(t)
	s.daemon.Socket = filepath.Join(s.engine.PluginDir(), "talkingdata.sock")
	check(t, s.daemon.Start())
	check(t, s.engine.Start())
	check(t, s.engine.ImportImage(image))
	s.network("a", "eth0", "10.10.0.0/24")
	s.network("b", "eth1", "10.20.0.0/24")
	s.run("runs", "a")
	s.docker("network", "connect", "b", "runs")
	s.run("paused", "b")
	runs := s.resident("runs")
	s.docker("pause", "paused")
	s.reconciles(0, []string{"named runs", "named runs", "named paused"})
	for _, act := range []func() error{s.engine.Restart, func() error { return errors.Join(s.engine.Kill(), s.engine.Start()) }} {
		check(t, act())
		s.reconciles(0, nil)
	}
	s.docker("unpause", "paused")
	s.undisturbed(runs)
	s.reconciles(0, nil)
	s.docker("rm", "-f", "runs", "paused")
	s.leftBehind()
}

// Containers come and go while one reconcile follows the other, and the
// database is lost in the middle of that. No container that runs ever loses
// its lease, no address is given twice, and in the end the tables are what the
// containers have.
//
// The time of the test < the orphans' 5 min < T1.
func TestReconcileWhileContainersComeAndGo(t *testing.T) {
	t.Parallel()
	rounds := 5
	if soak {
		rounds = 100
	}
	s := newSite(t, lab.Kea, lab.DHCPConfig{LeaseSeconds: 3600})
	s.network("a", "eth0", "10.10.0.0/24")
	s.network("b", "eth1", "10.20.0.0/24")
	s.run("steady", "a")
	s.run("fixed", "b", "--mac-address", "02:42:0a:14:00:77")
	steady := s.resident("steady")

	// What the engine said before containers went, came and moved is no reason
	// to take up what was given back, nor to give back what is used.
	s.run("passing", "a")
	s.run("moving", "a")
	said := must(must(engine.New("unix://"+s.engine.Socket(), lease.Drivers("talkingdata")...))(t).Networks(t.Context()))(t)
	s.docker("rm", "-f", "passing")
	s.docker("restart", "-t", "0", "moving")
	was := s.addr("fixed", "eth0")
	s.docker("stop", "-t", "0", "fixed")
	s.run("heir", "b", "--ip", was.String())
	s.docker("start", "fixed")
	s.released()
	before := s.leases()
	for range 2 {
		for _, f := range must(server.Reconcile(t.Context(), s.daemon.Socket, said, false))(t) {
			if f.Action != lease.Missed && f.Action != lease.Named {
				t.Errorf("what the engine said is no longer so: %+v", f)
			}
		}
	}
	for i, l := range s.leases() {
		if i >= len(before) || l.Address != before[i].Address || l.MAC != before[i].MAC || l.State != before[i].State {
			t.Errorf("the daemon had %+v, and has %+v", before, s.leases())
			break
		}
	}

	for _, lost := range []bool{false, true} {
		if lost {
			s.loseDatabase()
		}
		ctx, cancel := context.WithCancel(t.Context())
		var watch, work sync.WaitGroup
		adopted, runs := map[string]int{}, 0
		watch.Go(func() {
			for ; ctx.Err() == nil; runs++ {
				_, found, err := s.reconciled(s.engine)
				if err != nil {
					t.Error(err)
					return
				}
				for _, f := range found {
					switch f.Action {
					case "adopted":
						adopted[f.Address.String()+" "+f.MAC]++
						if !lost {
							t.Errorf("nothing was lost: %+v", f)
						}
					case "missed", "named": // just come, or just going
					default:
						t.Errorf("%+v", f)
					}
				}
			}
		})
		work.Go(func() {
			for n := range rounds {
				// Its release and its next request are some 100 ms apart.
				if _, err := s.engine.Docker("restart", "-t", "0", "fixed"); err != nil {
					t.Errorf("round %d: %v", n, err)
				}
			}
		})
		work.Go(func() {
			for n := range rounds {
				name := fmt.Sprintf("passing%t%d", lost, n)
				_, err := s.engine.Docker("run", "-d", "--name", name, "--network", []string{"a", "b"}[rand.N(2)], image)
				if err == nil && n%2 == 0 {
					_, err = s.engine.Docker("rm", "-f", name)
				}
				if err != nil {
					t.Errorf("round %d: %v", n, err)
				}
			}
		})
		work.Wait()
		cancel()
		watch.Wait()
		t.Logf("database lost %t: %d reconciles, adopted %v", lost, runs, adopted)
		if runs < rounds/2 {
			t.Errorf("%d reconciles are too few to mean anything", runs)
		}

		s.released()
		var now []netip.Addr
		has := map[netip.Addr]string{}
		for _, name := range strings.Fields(s.docker("ps", "--format", "{{.Names}}")) {
			addr, mac := s.holds(name, "eth0")
			if has[addr] != "" {
				t.Errorf("%s is in two containers", addr)
			}
			now, has[addr] = append(now, addr), mac
		}
		known := map[netip.Addr]string{}
		for _, l := range s.leases() {
			if known[l.Address] != "" || l.State != "bound" {
				t.Errorf("the daemon has %+v, and of that address %q", l, known[l.Address])
			}
			known[l.Address] = l.MAC
		}
		s.undisturbed(steady)
		if !lost {
			if fmt.Sprint(known) != fmt.Sprint(has) {
				t.Errorf("the daemon has %v, the containers have %v", known, has)
			}
			s.only(now...)
			continue
		}
		// A release that comes between the loss and the adoption finds nothing
		// to release: the server keeps that lease to its end, and the daemon
		// may have adopted it from an inventory that was older.
		phantoms := len(known) - len(has)
		for addr, mac := range has {
			if known[addr] != mac {
				t.Errorf("the daemon has %s for %q, and container %s has it", addr, known[addr], mac)
			}
		}
		t.Logf("%d leases without a container, the server has %d too many", phantoms, len(must(s.dhcp.Leases())(t))-len(has))
		if phantoms > 2 {
			t.Errorf("the daemon has %v, the containers have %v", known, has)
		}
	}
}
