package lease_test

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// theirs is the MAC of a neighbour of whom no server knows.
var theirs = lease.MAC{0xaa, 0xbb, 0xcc, 0, 0, 1}

// have sets who answers on the network.
func (n *neighbours) set(have map[netip.Addr]lease.MAC, fails error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.have, n.fails = have, fails
}

// probes compares what was probed since the last look.
func (w *world) probes(want ...string) {
	w.Helper()
	w.neighbours.mu.Lock()
	defer w.neighbours.mu.Unlock()
	if !slices.Equal(w.neighbours.probed, want) {
		w.Errorf("probed were %q, want %q", w.neighbours.probed, want)
	}
	w.neighbours.probed = nil
}

func TestConflictCheckIsAskedFor(t *testing.T) {
	for _, c := range []struct {
		global  lease.Options
		options []string
		want    string
	}{
		{lease.Options{}, nil, ""},
		{lease.Options{}, []string{"conflict_interface=eth0"}, ""},
		{lease.Options{}, []string{"conflict_check=on", "conflict_interface=eth0"}, "eth0 192.0.2.10 on"},
		{lease.Options{}, []string{"conflict_check=rfc", "conflict_interface=eth0"}, "eth0 192.0.2.10 rfc"},
		{lease.Options{}, []string{"conflict_check=1s", "conflict_interface=eth0"}, "eth0 192.0.2.10 1s"},
		{lease.Options{Conflict: "on", ConflictInterface: "eth1"}, nil, "eth1 192.0.2.10 on"},
		{lease.Options{Conflict: "on", ConflictInterface: "eth1"}, []string{"conflict_interface=eth2"}, "eth2 192.0.2.10 on"},
		{lease.Options{Conflict: "on", ConflictInterface: "eth1"}, []string{"conflict_check=off"}, ""},
		{lease.Options{Conflict: "on"}, []string{"conflict_check=off"}, ""},
		// Where servers are asked by broadcast, conflicts are looked for there.
		{lease.Options{}, []string{"conflict_check=on", "dhcp_interface=eth0"}, "eth0 192.0.2.10 on"},
		{lease.Options{Interface: "eth0"}, []string{"conflict_check=on"}, "eth0 192.0.2.10 on"},
		{lease.Options{Interface: "eth0", ConflictInterface: "eth1"}, []string{"conflict_check=on"}, "eth1 192.0.2.10 on"},
		{lease.Options{Conflict: "on", ConflictInterface: "eth1"}, []string{"dhcp_interface=eth2"}, "eth2 192.0.2.10 on"},
		{lease.Options{Conflict: "on", ConflictInterface: "eth1"}, []string{"dhcp_interface=eth2", "conflict_interface=eth3"}, "eth3 192.0.2.10 on"},
	} {
		t.Run(c.want, func(t *testing.T) {
			inWorldOf(t, c.global, func(w *world) {
				pool := w.networkOf(c.options...)
				l := w.acquire(pool, ep(1, "web"))
				var want []string
				if c.want != "" {
					want = []string{c.want}
				}
				w.probes(want...)
				w.server.saw(t, "0s acquire 02:00:00:00:00:01")
				// What comes back is probed too, what never left isn't.
				w.release(pool, l)
				w.acquire(pool, ep(2, "web"))
				w.probes(want...)
				w.acquire(pool, ep(2, "web"))
				w.probes()
			})
		})
	}
}

// RFC 2131 section 3.1 (5): ten seconds, then another address, 20s < the
// request's 30s.
func TestConflict(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf("conflict_check=on", "conflict_interface=eth0")
		w.neighbours.set(map[netip.Addr]lease.MAC{addr("192.0.2.10"): theirs, addr("192.0.2.11"): theirs}, nil)
		w.server.keepsDeclined()
		l := w.acquire(pool, ep(1, "web"))
		if l.Addr() != addr("192.0.2.12") {
			t.Errorf("got %v", l.Addr())
		}
		w.server.saw(t,
			"0s acquire 02:00:00:00:00:01", "0s decline 192.0.2.10",
			"10s acquire 02:00:00:00:00:01", "10s decline 192.0.2.11",
			"20s acquire 02:00:00:00:00:01")
		w.probes("eth0 192.0.2.10 on", "eth0 192.0.2.11 on", "eth0 192.0.2.12 on")
		w.logged(1, "level=WARN", "address conflict", "192.0.2.10", theirs.String(), "eth0")
		w.holds("192.0.2.12 bound")
	})
}

// Wherever a request of 25s looks, somebody is there: 2 × 10s < 25s < 3 × 10s.
func TestConflictsWithoutEnd(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf("conflict_check=on", "conflict_interface=eth0")
		all := map[netip.Addr]lease.MAC{}
		for a := addr("192.0.2.2"); a != addr("192.0.2.255"); a = a.Next() {
			all[a] = theirs
		}
		w.neighbours.set(all, nil)
		w.server.keepsDeclined()
		began := time.Now()
		ctx, cancel := context.WithTimeout(w.Context(), 25*time.Second)
		defer cancel()
		_, err := w.manager.Acquire(ctx, pool, ep(1, "web"))
		w.fails(err, "no time left", theirs.String(), "eth0", "192.0.2.12")
		if took := time.Since(began); took != 25*time.Second {
			t.Errorf("it took %v", took)
		}
		w.server.saw(t,
			"0s acquire 02:00:00:00:00:01", "0s decline 192.0.2.10",
			"10s acquire 02:00:00:00:00:01", "10s decline 192.0.2.11",
			"20s acquire 02:00:00:00:00:01", "20s decline 192.0.2.12")
		w.holds()
	})
}

// --ip of an address that somebody has: no other one will do.
func TestConflictOfAnAskedAddress(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf("conflict_check=500ms", "conflict_interface=eth0")
		w.neighbours.set(map[netip.Addr]lease.MAC{addr("192.0.2.50"): theirs}, nil)
		w.refused(pool, wants(1, "web", "192.0.2.50"), "192.0.2.50", theirs.String(), "eth0", "198.51.100.1")
		w.server.saw(t, "0s acquire 02:00:00:00:00:01 192.0.2.50", "0s decline 192.0.2.50")
		w.probes("eth0 192.0.2.50 500ms")
		w.holds()
		if len(w.store.leases)+len(w.store.bindings) != 0 {
			t.Errorf("stored are %v, %v", w.store.leases, w.store.bindings)
		}
	})
}

// Somebody took the address while its container restarted: it is declined, not
// also released. Down 20s < release delay 30s.
func TestConflictOfAContainerThatComesBack(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool, _ := w.leftOne("conflict_check=on", "conflict_interface=eth0")
		w.neighbours.set(map[netip.Addr]lease.MAC{addr("192.0.2.10"): theirs}, nil)
		w.server.keepsDeclined()
		time.Sleep(20 * time.Second)
		if l := w.acquire(pool, ep(2, "web")); l.Addr() != addr("192.0.2.11") {
			t.Errorf("got %v", l.Addr())
		}
		time.Sleep(time.Minute)
		w.server.saw(t, "1m20s confirm 192.0.2.10", "1m20s decline 192.0.2.10", "1m30s acquire 02:00:00:00:00:02")
		w.holds("192.0.2.11 bound")
		if len(w.store.bindings) != 0 {
			t.Errorf("still stored: %v", w.store.bindings)
		}
	})
}

func TestConflictCheckWithoutInterface(t *testing.T) {
	ways := []string{"conflict_interface=eth0", "CONFLICT_INTERFACE", "conflict_check=off"}
	inWorldOf(t, auto, func(w *world) {
		p, err := lease.NewPool("192.0.2.0/24", "", map[string]string{"conflict_check": "on"})
		w.works(err)
		_, err = w.manager.AddPool(w.Context(), p)
		w.fails(err, ways...)
		// Another network's way to its servers is none of this one's.
		w.global.Interface = "eth0"
		w.restart(time.Second)
		p, err = lease.NewPool("192.0.2.0/24", "", map[string]string{"conflict_check": "on", "dhcp_server": "192.0.2.3"})
		w.works(err)
		_, err = w.manager.AddPool(w.Context(), p)
		w.fails(err, ways...)
		w.server.saw(t) // not even probed for
		if len(w.store.pools) != 0 {
			t.Errorf("stored are %v", w.store.pools)
		}
		// An older network, after the check became the daemon's setting.
		pool := w.networkOf()
		w.global = lease.Options{Conflict: lease.ConflictRFC}
		w.restart(time.Second)
		w.refused(pool, ep(1, "web"), ways...)
		w.holds()
		w.server.leased(t)
		w.global.ConflictInterface = "eth3"
		w.restart(time.Second)
		w.acquire(pool, ep(1, "web"))
		w.probes("eth3 192.0.2.10 rfc")
	})
}

var errNoInterface = errors.New("no such interface: eth0")

// A probe that can't be made is no answer: the lease goes back.
func TestConflictCheckThatFails(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf("conflict_check=on", "conflict_interface=eth0")
		w.neighbours.set(nil, errNoInterface)
		w.refused(pool, ep(1, "web"), "192.0.2.10", "conflict", errNoInterface.Error())
		w.server.saw(t, "0s acquire 02:00:00:00:00:01", "0s release 192.0.2.10")
		w.server.leased(t)
		w.holds()
	})
	// One that came back waits for its release as before, and isn't released
	// twice: delay 30s.
	inWorldOf(t, auto, func(w *world) {
		pool, _ := w.leftOne("conflict_check=on", "conflict_interface=eth0")
		w.neighbours.set(nil, errNoInterface)
		time.Sleep(10 * time.Second)
		w.refused(pool, ep(2, "web"), errNoInterface.Error())
		w.holds("192.0.2.10 releasing")
		w.neighbours.set(nil, nil)
		time.Sleep(10 * time.Second)
		w.acquire(pool, ep(3, "web"))
		w.server.saw(t, "1m10s confirm 192.0.2.10", "1m20s confirm 192.0.2.10")
	})
}

// A server that answered is heard, also when what it granted can't be used: what
// is overdue there is asked for. T1 30m < outage 45m < T2 52m30s.
func TestServerIsHeardThoughItsLeaseIsOfNoUse(t *testing.T) {
	for what, answer := range map[string]func(w *world){
		"disputed":         func(w *world) { w.neighbours.set(map[netip.Addr]lease.MAC{addr("192.0.2.50"): theirs}, nil) },
		"not to be probed": func(w *world) { w.neighbours.set(nil, errNoInterface) },
	} {
		t.Run(what, func(t *testing.T) {
			inWorldOf(t, auto, func(w *world) {
				w.acquire(w.networkOf(), ep(1, "old"))
				pool := w.networkOf("conflict_check=on", "conflict_interface=eth0")
				w.server.down()
				time.Sleep(45 * time.Minute)
				w.server.up()
				w.server.forget()
				answer(w)
				w.refused(pool, wants(2, "web", "192.0.2.50"))
				time.Sleep(time.Second)
				if n := w.sent("renew"); n != 1 {
					t.Errorf("%d renewals", n)
				}
				w.holds("192.0.2.10 bound")
				w.server.forget()
			})
		})
	}
}

// A stored lease that is handed out for want of an answer, and then can't be
// used, is no word of its server. Left at 1m, back at 1m10s, delay 30s.
func TestNobodyIsHeardThoughALeaseIsOfNoUse(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		w.acquire(w.networkOf(), ep(9, "old"))
		pool := w.networkOf("conflict_check=on", "conflict_interface=eth0")
		web := w.acquire(pool, ep(1, "web"))
		w.server.down()
		time.Sleep(45 * time.Minute)
		w.release(pool, web)
		w.logged(1, "DHCP servers don't answer")
		w.neighbours.set(nil, errNoInterface)
		w.refused(pool, ep(2, "web"), errNoInterface.Error())
		w.logged(0, "DHCP server answers again")
		w.server.forget()
	})
}

// The engine gives up in the ten seconds after a DECLINE: 5s.
func TestCallerGoneAfterAConflict(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf("conflict_check=on", "conflict_interface=eth0")
		w.neighbours.set(map[netip.Addr]lease.MAC{addr("192.0.2.10"): theirs}, nil)
		ctx, cancel := context.WithTimeout(w.Context(), 5*time.Second)
		defer cancel()
		_, err := w.manager.Acquire(ctx, pool, ep(1, "web"))
		w.fails(err, "192.0.2.10", theirs.String())
		time.Sleep(time.Minute)
		w.server.saw(t, "0s acquire 02:00:00:00:00:01", "0s decline 192.0.2.10")
		w.holds()
		w.server.leased(t)
	})
}

// keepsDeclined makes the server give a declined address to nobody.
func (s *dhcpServer) keepsDeclined() {
	s.onAcquire.set(func(_ context.Context, r lease.Request) (lease.Lease, error) {
		s.mu.Lock()
		for _, seen := range s.seen {
			if _, declined, ok := strings.Cut(seen, " decline "); ok {
				s.table[addr(declined)] = "somebody else"
			}
		}
		s.mu.Unlock()
		return s.grant(r)
	})
}
