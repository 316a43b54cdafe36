package lease_test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// sharing adds a network of 192.0.2.0/24 whose endpoints have no MAC of their
// own, as ipvlan's. Options are written as name=value.
func (w *world) sharing(options ...string) string {
	w.Helper()
	p := wanted(w.T, "192.0.2.0/24", options...)
	p.SharedMAC = true
	p, err := w.manager.AddPool(w.Context(), p)
	if err != nil {
		w.Fatal(err)
	}
	w.server.forget()
	return p.ID
}

func called(name string) lease.Endpoint { return lease.Endpoint{Name: name} }

// made checks that a lease's MAC is one that no vendor and no group has.
func (w *world) made(l lease.Lease) {
	w.Helper()
	if l.MAC[0]&0x03 != 0x02 {
		w.Errorf("%s of %s is no locally administered unicast address", l.MAC, l.Name)
	}
	if r := w.server.lastRequest(); r.MAC != l.MAC {
		w.Errorf("the server was asked for %s, the lease is of %s", r.MAC, l.MAC)
	}
}

// A name has one MAC on its host, with which it comes again: after a stop, a
// restart of the daemon, and as another network of the subnet.
func TestMACOfAName(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.sharing("release_delay=1s")
		web := w.acquire(pool, called("web"))
		w.made(web)
		w.has(web, w.named("web"))
		db := w.acquire(pool, called("db"))
		w.made(db)
		if web.MAC == db.MAC {
			t.Errorf("web and db have one MAC address %s", web.MAC)
		}
		w.release(pool, web)
		time.Sleep(2 * time.Second)
		w.restart(time.Minute)
		if again := w.acquire(pool, called("web")); again.MAC != web.MAC || again.Addr() != web.Addr() {
			t.Errorf("web was %s with %s, comes again as %s with %s", web.MAC, web.Addr(), again.MAC, again.Addr())
		}
		w.works(w.manager.RemovePool(w.Context(), pool))
		if anew := w.acquire(w.sharing(), called("web")); anew.MAC != web.MAC || anew.Addr() != web.Addr() {
			t.Errorf("web was %s with %s, is %s with %s in a new network", web.MAC, web.Addr(), anew.MAC, anew.Addr())
		}

		// On another host, the same name is another client.
		w.restore(newStore())
		w.host.machineID.set("0123456789abcdef0123456789abcdee")
		w.restore(newStore())
		if other := w.acquire(w.sharing(), called("web")); other.MAC == web.MAC {
			t.Errorf("two hosts' web is %s", other.MAC)
		}
	})
}

// With client_id=mac the made MAC is the identity, and follows the name too.
func TestMACOfANameAsIdentity(t *testing.T) {
	inWorldOf(t, byMAC, func(w *world) {
		pool := w.sharing()
		web := w.acquire(pool, called("web"))
		w.made(web)
		w.has(web, byMACAddress(web.MAC))
		w.release(pool, web)
		w.server.forget()
		again := w.acquire(pool, called("web"))
		w.has(again, byMACAddress(web.MAC))
		w.server.saw(t, fmt.Sprintf("0s acquire %s 192.0.2.10", web.MAC))
	})
}

// Engines before 29 tell no names: every request is another client, of which the
// store knows more than anybody.
func TestMACWithoutAName(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.sharing()
		first, second := w.acquire(pool, called("")), w.acquire(pool, called(""))
		w.made(second)
		for _, l := range []lease.Lease{first, second} {
			w.has(l, byMACAddress(l.MAC))
		}
		if first.MAC == second.MAC {
			t.Errorf("two containers have one MAC address %s", first.MAC)
		}
		// --ip is an endpoint's.
		if l := w.acquire(pool, lease.Endpoint{Address: addr("192.0.2.50")}); l.Addr() != addr("192.0.2.50") {
			t.Errorf("asked for 192.0.2.50, got %s", l.Addr())
		}
		w.refused(pool, lease.Endpoint{Address: addr("192.0.2.50")}, "192.0.2.50 is leased to")
		w.refused(pool, lease.Endpoint{Address: addr("192.0.2.1")}, "192.0.2.1 is the gateway")

		w.restart(time.Minute)
		if held := w.manager.Leases()[0]; held.MAC != first.MAC {
			t.Errorf("%s was of %s, is of %s after a restart", first.Addr(), first.MAC, held.MAC)
		}
		w.server.forget()
		time.Sleep(30 * time.Minute)
		w.server.sawInAnyOrder(t, "30m0s renew 192.0.2.10", "30m0s renew 192.0.2.11", "30m0s renew 192.0.2.50")
		w.release(pool, first)
		w.holds("192.0.2.11 bound", "192.0.2.50 bound")
		w.server.leased(t, second.Addr(), addr("192.0.2.50"))
	})
}

// A name that is live is left to its holder, who may be another container: engines
// rename endpoints without telling. Whoever is second is a client of its own.
func TestMACOfALiveName(t *testing.T) {
	for name, second := range map[string]func(w *world, first string) string{
		"renamed container":     func(_ *world, first string) string { return first },
		"network of its subnet": func(w *world, _ string) string { return w.sharing("on_lease_lost=keep") },
	} {
		for form, global := range map[string]lease.Options{"by name": auto, "by MAC": byMAC} {
			t.Run(name+", "+form, func(t *testing.T) {
				inWorldOf(t, global, func(w *world) {
					one := w.sharing()
					two := second(w, one)
					first := w.acquire(one, called("web"))
					other := w.acquire(two, called("web"))
					w.made(other)
					w.has(other, byMACAddress(other.MAC))
					if other.MAC == first.MAC {
						t.Errorf("two containers have one MAC address %s", first.MAC)
					}
					w.holds("192.0.2.10 bound", "192.0.2.11 bound")
					w.server.leased(t, first.Addr(), other.Addr())
					// Each release is one container's.
					w.release(two, other)
					w.holds("192.0.2.10 bound")
					w.server.leased(t, first.Addr())
				})
			})
		}
	}
}

// Five of one name at once, in two networks: one has the name's MAC, and none
// fails.
func TestMACOfANameAtOnce(t *testing.T) {
	for form, global := range map[string]lease.Options{"by name": auto, "by MAC": byMAC} {
		t.Run(form, func(t *testing.T) {
			inWorldOf(t, global, func(w *world) {
				pools := []string{w.sharing(), w.sharing("on_lease_lost=keep")}
				w.server.onAcquire.set(w.server.slowly(3 * time.Second))
				var wg sync.WaitGroup
				for n := range 5 {
					wg.Go(func() {
						_, err := w.manager.Acquire(w.Context(), pools[n%2], called("web"))
						w.works(err)
					})
				}
				wg.Wait()
				macs := map[lease.MAC]bool{}
				for _, h := range w.manager.Leases() {
					macs[h.MAC] = true
				}
				if len(macs) != 5 {
					t.Errorf("five containers have the MAC addresses %v", macs)
				}
				w.holds("192.0.2.10 bound", "192.0.2.11 bound", "192.0.2.12 bound", "192.0.2.13 bound", "192.0.2.14 bound")
			})
		})
	}
}

// The machine's identity is unknown: the name gives no MAC then, as it gives no
// identity.
func TestMACOnAnUnknownHost(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		w.host.machineID.set("")
		pool := w.sharing()
		l := w.acquire(pool, called("web"))
		w.made(l)
		w.has(l, byMACAddress(l.MAC))
		w.logged(1, "level=WARN", "made of the MAC address", "web", l.MAC.String())
		w.refused(w.sharing("client_id=name"), called("db"), "machine-id")
	})
}

// No answer to a broadcast would reach a MAC that nobody has. A network that was
// created as a relay agent's says so when the global settings have changed.
func TestSharedMACByBroadcast(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		refused := func(options ...string) {
			t.Helper()
			p := wanted(t, "192.0.2.0/24", options...)
			p.SharedMAC = true
			_, err := w.manager.AddPool(w.Context(), p)
			w.fails(err, "dhcp_interface=eth0", "ipvlan", "dhcp_server")
		}
		refused("dhcp_interface=eth0")
		pool := w.sharing()
		l := w.acquire(pool, called("web"))
		w.server.forget()
		w.global.Interface = "eth0"
		w.restart(time.Second)
		refused()
		w.server.saw(t) // asked for nothing
		w.refused(pool, called("db"), "dhcp_interface=eth0", "ipvlan", "dhcp_server")
		w.release(pool, l)
		w.acquire(w.sharing("dhcp_server=198.51.100.1"), called("db"))
		// Others are as ever.
		w.acquire(w.networkOf(), ep(1, ""))
	})
}

// The engine goes on with the PoolIDs that it has.
func TestSharedMACWithoutItsDatabase(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.sharing()
		web := w.acquire(pool, called("web"))
		w.restore(newStore())
		if again := w.acquire(pool, called("web")); again.MAC != web.MAC || again.Addr() != web.Addr() {
			t.Errorf("web was %s with %s, is %s with %s", web.MAC, web.Addr(), again.MAC, again.Addr())
		}
		w.acquire(pool, called(""))
		w.holds("192.0.2.10 bound", "192.0.2.11 bound")
	})
}

// shared is what an engine says of a network of ipvlan's: its endpoints have no
// MAC.
func shared(endpoints ...lease.Attachment) lease.Network {
	for i := range endpoints {
		endpoints[i].MAC = lease.MAC{}
	}
	n := network(endpoints...)
	n.Name, n.Driver, n.SharedMAC = "flat", "ipvlan", true
	return n
}

// Leases and endpoints meet by subnet and address.
func TestReconcileSharedMAC(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.sharing()
		w.acquire(pool, called("web"))
		w.acquire(pool, called("")) // as of an engine before 29
		gone := w.acquire(pool, called("gone"))
		seen := engine29(shared(at(1, "web", "192.0.2.10"), at(2, "old", "192.0.2.11")))
		w.wouldFind(seen, "missed 192.0.2.12 gone", "named 192.0.2.10 web flat", "named 192.0.2.11 old flat")
		w.finds(seen, "missed 192.0.2.12 gone", "named 192.0.2.10 web flat", "named 192.0.2.11 old flat")
		time.Sleep(5 * time.Minute)
		findings := w.finds(seen, "released 192.0.2.12 gone")
		if findings[0].MAC != gone.MAC {
			t.Errorf("found %+v", findings)
		}
		w.finds(seen)
		w.holds("192.0.2.10 bound", "192.0.2.11 bound")
		w.agree()
	})
}

// What no lease is known of is kept with the MAC that its name makes.
func TestAdoptedSharedMAC(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.sharing()
		web, db := w.acquire(pool, called("web")), w.acquire(pool, called("db"))
		seen := engine29(shared(at(1, "web", "192.0.2.10"), at(2, "db", "192.0.2.11")))
		w.restore(newStore())
		w.wouldFind(seen, "adopted 192.0.2.10 web flat", "adopted 192.0.2.11 db flat")
		w.holds()
		findings := w.finds(seen, "adopted 192.0.2.10 web flat", "adopted 192.0.2.11 db flat")
		w.server.sawInAnyOrder(t, "0s rebind 192.0.2.10", "0s rebind 192.0.2.11")
		w.holds("192.0.2.10 bound", "192.0.2.11 bound")
		for i, was := range []lease.Lease{web, db} {
			l := w.manager.Leases()[i]
			w.has(l.Lease, string(was.ClientID))
			if l.MAC != was.MAC || findings[i].MAC != was.MAC {
				t.Errorf("adopted with %s, found with %s, was leased to %s", l.MAC, findings[i].MAC, was.MAC)
			}
		}
		w.finds(seen)
		w.restart(time.Second)
		w.finds(seen)

		// Their releases come with the PoolID that was forgotten.
		w.release(pool, web)
		w.holds("192.0.2.10 releasing", "192.0.2.11 bound")
		// One that just left was still there when the engine was asked.
		w.finds(seen)
		if again := w.acquire(pool, called("web")); again.MAC != web.MAC || again.Addr() != web.Addr() {
			t.Errorf("web is %s with %s", again.MAC, again.Addr())
		}
		w.holds("192.0.2.10 bound", "192.0.2.11 bound")
	})
}

// A container of two networks of one subnet, of which one or none is known: each
// endpoint is a client of its own.
func TestAdoptedSharedMACTwice(t *testing.T) {
	for name, known := range map[string]bool{"one is known": true, "both are unknown": false} {
		t.Run(name, func(t *testing.T) {
			inWorldOf(t, byMAC, func(w *world) {
				one, two := shared(at(1, "web", "192.0.2.10")), shared(at(1, "web", "192.0.2.11"))
				two.Name, two.Options = "second", map[string]string{"on_lease_lost": "keep"}
				want := []string{"adopted 192.0.2.10 web flat", "adopted 192.0.2.11 web second"}
				if known {
					w.acquire(w.sharing(), called("web"))
					want = []string{"adopted 192.0.2.11 web second", "named 192.0.2.10 web flat"}
				}
				w.finds(engine29(two, one), want...)
				w.finds(engine29(two, one))
				leases := w.manager.Leases()
				if len(leases) != 2 || leases[0].MAC == leases[1].MAC {
					t.Errorf("adopted %+v", leases)
				}
			})
		})
	}
}

// Two networks of one subnet on LANs that don't meet: an address may be in both.
// Nothing but their options tells them apart, so a network whose options can't be
// read ends the reconcile, and releases nothing.
func TestReconcileSharedMACOnTwoLANs(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		one, two := shared(at(1, "web", "192.0.2.10")), shared(at(2, "db", "192.0.2.10"))
		two.Name, two.Options = "second", map[string]string{"dhcp_server": "203.0.113.1"}
		w.acquire(w.sharing(), called("web"))
		w.server.onAcquire.set(w.server.from("192.0.2.10"))
		w.server.id.set(addr("203.0.113.1"))
		w.acquire(w.sharing("dhcp_server=203.0.113.1"), called("db"))
		w.server.onAcquire.set(nil)
		w.finds(engine29(one, two), "named 192.0.2.10 web flat", "named 192.0.2.10 db second")
		for _, h := range w.manager.Leases() {
			if want := map[string]string{"web": "id1", "db": "id2"}[h.Name]; h.Container != want {
				t.Errorf("%s is container %q, want %q", h.Name, h.Container, want)
			}
		}
		two.Attachments = nil
		w.finds(engine29(one, two), "missed 192.0.2.10 db")

		two.Options = map[string]string{"color": "red"}
		time.Sleep(10 * time.Minute)
		for _, dryRun := range []bool{true, false} {
			findings, err := w.manager.Reconcile(w.Context(), engine29(one, two), dryRun)
			w.fails(err, "network second", `"color"`)
			if findings != nil {
				t.Errorf("found %+v", findings)
			}
		}
		w.holds("192.0.2.10 bound", "192.0.2.10 bound")
	})
}

func TestNetworkMayHave(t *testing.T) {
	n := lease.Network{Subnet: "192.0.2.7/24", Range: "192.0.2.128/25", Options: map[string]string{"dhcp_server": "198.51.100.1"}, SharedMAC: true}
	const id = "192.0.2.0/24?dhcp_server=198.51.100.1&gateway=192.0.2.1&id=X&range=192.0.2.128/25&shared_mac=yes"
	for pool, want := range map[string]bool{
		id: true,
		"192.0.2.0/24?adopted=yes&dhcp_server=198.51.100.1&range=192.0.2.128/25&shared_mac=yes": true,
		strings.Replace(id, "192.0.2.0/24", "192.0.2.0/23", 1):                                  false,
		strings.Replace(id, "&range=192.0.2.128/25", "", 1):                                     false,
		strings.Replace(id, "198.51.100.1", "198.51.100.2", 1):                                  false,
		strings.Replace(id, "&shared_mac=yes", "", 1):                                           false,
		"": false, "192.0.2.0/24?id=X": false,
	} {
		if got := n.MayHave(lease.Lease{Pool: pool}); got != want {
			t.Errorf("%s: %t, want %t", pool, got, want)
		}
	}
	n.Options = map[string]string{"color": "red"}
	if n.MayHave(lease.Lease{Pool: id}) {
		t.Error("a network of unknown options has a lease")
	}
}

// The engine can't be asked by a MAC that it doesn't know.
func TestLossOfSharedMAC(t *testing.T) {
	inWorldOf(t, lease.Options{OnLost: lease.StopLost}, func(w *world) {
		for pool, who := range map[string]lease.Endpoint{w.sharing(): called("web"), w.networkOf(): ep(2, "db")} {
			w.acquire(pool, who)
			w.server.onConfirm.set(refusing)
			w.server.onExtend.set(refusing)
			time.Sleep(31 * time.Minute) // T1 is 30m
			synctest.Wait()
			if want := []lease.MAC{who.MAC}; !slices.Equal(w.engine.macs, want) {
				t.Errorf("the engine was asked to stop containers of %v, want %v", w.engine.macs, want)
			}
			w.engine.macs = nil
			w.works(w.manager.RemovePool(w.Context(), pool))
		}
	})
}

// Both drivers of a daemon are told apart by the second one's name.
func TestDrivers(t *testing.T) {
	if got, want := fmt.Sprint(lease.Drivers("mine")), "[{mine false} {mine-ipvlan true}]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// A pool of the first driver on the second one's socket: no lease is taken in
// the name of no MAC, nor for a group.
func TestNoMAC(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.refused(pool, lease.Endpoint{Name: "web"}, "00:00:00:00:00:00 is no endpoint's")
		w.refused(pool, lease.Endpoint{MAC: lease.MAC{1, 0, 0x5e, 0, 0, 1}}, "01:00:5e:00:00:01 is no endpoint's")
		w.server.saw(t)
	})
}
