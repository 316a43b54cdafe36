package lease_test

import (
	"context"
	"encoding/json"
	"fmt"
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

// at is container n's endpoint.
func at(n int, name, a string) lease.Attachment {
	return lease.Attachment{Container: fmt.Sprint("id", n), Name: name, MAC: mac(n), Prefix: netip.PrefixFrom(addr(a), 24)}
}

// network is what an engine says of one of 192.0.2.0/24.
func network(endpoints ...lease.Attachment) lease.Network {
	return lease.Network{ID: "n1", Name: "lan", Driver: "macvlan", Subnet: "192.0.2.0/24", Attachments: endpoints}
}

// engine20 tells its drivers no names, engine29 does.
func engine20(networks ...lease.Network) lease.Inventory { return lease.Inventory{Networks: networks} }

func engine29(networks ...lease.Network) lease.Inventory {
	return lease.Inventory{NamesEndpoints: true, Networks: networks}
}

// finds reconciles and compares the findings: action, address, name, network.
func (w *world) finds(seen lease.Inventory, want ...string) []lease.Finding {
	w.Helper()
	return w.reports(seen, false, want...)
}

// wouldFind is a dry run, which changes nothing.
func (w *world) wouldFind(seen lease.Inventory, want ...string) {
	w.Helper()
	w.server.forget()
	before := w.store.text()
	w.reports(seen, true, want...)
	if after := w.store.text(); after != before {
		w.Errorf("a dry run changed the store from\n\t%s\nto\n\t%s", before, after)
	}
	w.server.saw(w.T)
}

func (w *world) reports(seen lease.Inventory, dryRun bool, want ...string) []lease.Finding {
	w.Helper()
	findings, err := w.manager.Reconcile(w.Context(), seen, dryRun)
	if err != nil {
		w.Fatal(err)
	}
	var got []string
	for _, f := range findings {
		got = append(got, strings.TrimSpace(fmt.Sprintf("%s %v %s %s", f.Action, f.Address, f.Name, f.Network)))
	}
	if !slices.Equal(got, want) {
		w.Errorf("found %q, want %q: %+v", got, want, findings)
		findings = make([]lease.Finding, len(want))
	}
	return findings
}

// text is everything that is stored.
func (s *memStore) text() string {
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	all := []any{s.host}
	for _, p := range s.pools {
		all = append(all, p)
	}
	for _, l := range s.leases {
		all = append(all, l)
	}
	for _, b := range s.bindings {
		all = append(all, b)
	}
	var lines []string
	for _, what := range all {
		text, err := json.Marshal(what)
		if err != nil {
			panic(err)
		}
		lines = append(lines, string(text))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n\t")
}

// copy is a backup.
func (s *memStore) copy() *memStore {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := newStore()
	c.pools, c.leases, c.bindings, c.host = maps.Clone(s.pools), maps.Clone(s.leases), maps.Clone(s.bindings), s.host
	return c
}

// restore starts the daemon with another database.
func (w *world) restore(s *memStore) {
	w.Helper()
	w.manager.Close()
	w.store = s
	w.start()
	w.server.forget()
}

// Seen twice, 5m apart: 4m59s < 5m.
func TestLeaseWithoutEndpoint(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		w.acquire(pool, ep(1, "web"))
		w.acquire(pool, ep(2, "gone"))
		w.acquire(pool, ep(3, ""))
		seen := engine29(network(at(1, "web", "192.0.2.10")))
		// Dry runs are no sights.
		w.wouldFind(seen, "missed 192.0.2.11 gone", "missed 192.0.2.12", "named 192.0.2.10 web lan")
		time.Sleep(10 * time.Minute)
		w.wouldFind(seen, "missed 192.0.2.11 gone", "missed 192.0.2.12", "named 192.0.2.10 web lan")
		w.finds(seen, "missed 192.0.2.11 gone", "missed 192.0.2.12", "named 192.0.2.10 web lan")
		time.Sleep(5*time.Minute - 1)
		w.wouldFind(seen, "missed 192.0.2.11 gone", "missed 192.0.2.12")
		w.finds(seen, "missed 192.0.2.11 gone", "missed 192.0.2.12")
		w.server.saw(t)
		// One was seen again in between: it has its five minutes anew.
		w.finds(engine29(network(at(1, "web", "192.0.2.10"), at(3, "three", "192.0.2.12"))), "missed 192.0.2.11 gone", "named 192.0.2.12 three lan")
		time.Sleep(time.Nanosecond)
		w.wouldFind(seen, "missed 192.0.2.12 three", "released 192.0.2.11 gone")
		findings := w.finds(seen, "missed 192.0.2.12 three", "released 192.0.2.11 gone")
		if f := findings[1]; f.MAC != mac(2) || !strings.Contains(f.Detail, "5m0s") {
			t.Errorf("found %+v", f)
		}
		w.server.saw(t, "15m0s release 192.0.2.11") // at once
		w.holds("192.0.2.10 bound", "192.0.2.12 bound")
		// A request in between counts like a sight.
		w.acquire(pool, ep(3, ""))
		time.Sleep(6 * time.Minute)
		w.finds(seen, "missed 192.0.2.12 three")
		time.Sleep(5 * time.Minute)
		w.finds(seen, "released 192.0.2.12 three")
		w.finds(seen)
	})
}

// A restart forgets what was missed: 4m + 4m > 5m > 4m.
func TestMissedLeaseOverARestart(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		w.acquire(w.networkOf(), ep(1, ""))
		w.finds(engine20(network()), "missed 192.0.2.10")
		w.restart(4 * time.Minute)
		w.finds(engine20(network()), "missed 192.0.2.10")
		time.Sleep(4 * time.Minute)
		w.finds(engine20(network()), "missed 192.0.2.10")
		time.Sleep(time.Minute)
		w.finds(engine20(network()), "released 192.0.2.10")
	})
}

func TestOtherEnginesInventory(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		w.finds(engine29()) // nothing here, nothing there
		w.acquire(w.networkOf(), ep(1, "web"))
		w.server.forget()
		for range 2 {
			for _, dryRun := range []bool{false, true} {
				findings, err := w.manager.Reconcile(w.Context(), engine29(), dryRun)
				w.fails(err, "no network of this driver", "1 leases", "--docker", "oam-docker-ipam release")
				if findings != nil {
					t.Errorf("found %v", findings)
				}
			}
			time.Sleep(10 * time.Minute)
		}
		w.server.saw(t)
		w.holds("192.0.2.10 bound")
	})
}

// With an empty data folder, running containers and one reconcile everything is
// renewed and released again. T1 30m < 31m.
func TestLostDatabase(t *testing.T) {
	for _, engine := range []string{"20.10", "29"} {
		t.Run(engine, func(t *testing.T) {
			inWorldOf(t, auto, func(w *world) {
				pool := w.networkOf("release_delay=1m")
				name := func(s string) string {
					if engine == "29" {
						return s
					}
					return ""
				}
				for n, s := range []string{"web", "db", "job", "old"} {
					w.acquire(pool, ep(n+1, name(s)))
				}
				seen := engine20(network(at(1, "web", "192.0.2.10"), at(2, "db", "192.0.2.11"), at(3, "job", "192.0.2.12"), at(4, "old", "192.0.2.13")))
				seen.NamesEndpoints = engine == "29"
				seen.Networks[0].Subnet = "192.0.2.7/24" // as 20.10 writes it
				seen.Networks[0].Options = map[string]string{"release_delay": "1m"}
				host := w.store.host.ID
				w.restore(newStore())
				w.wouldFind(seen, "adopted 192.0.2.10 web lan", "adopted 192.0.2.11 db lan", "adopted 192.0.2.12 job lan", "adopted 192.0.2.13 old lan")
				w.holds()
				findings := w.finds(seen, "adopted 192.0.2.10 web lan", "adopted 192.0.2.11 db lan", "adopted 192.0.2.12 job lan", "adopted 192.0.2.13 old lan")
				if f := findings[0]; f.Container != "id1" || f.MAC != mac(1) || !strings.Contains(f.Detail, "198.51.100.1") {
					t.Errorf("found %+v", f)
				}
				w.server.sawInAnyOrder(t, "0s rebind 192.0.2.10", "0s rebind 192.0.2.11", "0s rebind 192.0.2.12", "0s rebind 192.0.2.13")
				w.holds("192.0.2.10 bound", "192.0.2.11 bound", "192.0.2.12 bound", "192.0.2.13 bound")
				w.agree()
				if l := w.manager.Leases()[0]; l.Host != host || l.Container != "id1" || l.Name != "web" || l.Prefix != netip.MustParsePrefix("192.0.2.10/24") {
					t.Errorf("adopted %+v", l)
				}
				w.finds(seen) // all is well
				w.restart(time.Minute)
				w.finds(seen)
				time.Sleep(30 * time.Minute)
				w.server.sawInAnyOrder(t, "30m0s renew 192.0.2.10", "30m0s renew 192.0.2.11", "30m0s renew 192.0.2.12", "30m0s renew 192.0.2.13")

				// A release finds them, of the PoolID that was forgotten too.
				w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.10")))
				// So does a request.
				claimed := w.acquire(pool, ep(2, name("db")))
				if claimed.Addr() != addr("192.0.2.11") || claimed.Pool != pool {
					t.Errorf("claimed %+v", claimed)
				}
				// And a release of the old daemon's PoolID.
				w.works(w.manager.Release(w.Context(), "192.0.2.0", addr("192.0.2.12")))
				w.works(w.manager.Release(w.Context(), "192.0.3.0", addr("192.0.2.13")))
				w.works(w.manager.Release(w.Context(), "192.0.2.0", addr("192.0.2.99")))
				time.Sleep(2 * time.Minute)
				gone := []string{"31m0s release 192.0.2.10", "31m0s release 192.0.2.12"}
				if engine == "29" {
					gone = []string{"32m0s release 192.0.2.10", "32m0s release 192.0.2.12"}
				}
				w.server.sawInAnyOrder(t, gone...)
				w.holds("192.0.2.11 bound", "192.0.2.13 bound")
				w.agree()
				w.restart(time.Second)
				w.release(pool, claimed)
				time.Sleep(2 * time.Minute)
				w.server.leased(t, addr("192.0.2.13"))

				// An adopted pool goes with the start after its last lease.
				adopted := func() (n int) {
					for _, p := range w.store.pools {
						if p.Adopted {
							n++
						}
					}
					return n
				}
				w.restart(time.Second)
				if n := adopted(); n != 1 {
					t.Errorf("%d adopted pools", n)
				}
				_, err := w.manager.ReleaseByHand(w.Context(), "192.0.2.13", "")
				w.works(err)
				w.restart(time.Second)
				if n := adopted(); n != 0 {
					t.Errorf("%d adopted pools without leases", n)
				}
			})
		})
	}
}

// The server is silent for 10m, within the lease's hour: what is adopted counts
// as lost and is asked for until the server is there. A restart in between
// changes nothing.
func TestAdoptedWhileNoServerAnswers(t *testing.T) {
	for what, pause := range map[string]func(w *world){
		"running": func(*world) { time.Sleep(10 * time.Minute) },
		"restart": func(w *world) { time.Sleep(5 * time.Minute); w.restart(time.Minute); time.Sleep(4 * time.Minute) },
	} {
		t.Run(what, func(t *testing.T) {
			inWorldOf(t, auto, func(w *world) {
				pool := w.networkOf("on_lease_lost=stop")
				w.acquire(pool, ep(1, "web"))
				seen := engine29(network(at(1, "web", "192.0.2.10")))
				seen.Networks[0].Options = map[string]string{"on_lease_lost": "stop"}
				w.restore(newStore())
				w.server.down()
				findings := w.finds(seen, "adopted 192.0.2.10 web lan")
				if !strings.Contains(findings[0].Detail, lease.ErrNoAnswer.Error()) {
					t.Errorf("found %+v", findings)
				}
				w.server.saw(t, "0s rebind 192.0.2.10", "2s rebind 192.0.2.10") // by name, by MAC
				w.holds("192.0.2.10 lost")
				pause(w)
				w.holds("192.0.2.10 lost")
				w.finds(seen)
				w.server.up()
				// Which server that is to confirm, nobody knows.
				synctest.Wait()
				for _, what := range w.server.seen {
					if !strings.Contains(what, " acquire 02:00:00:00:00:01 192.0.2.10") {
						t.Errorf("the server saw %s", what)
					}
				}
				w.server.forget()
				time.Sleep(2 * time.Minute)
				w.holds("192.0.2.10 bound")
				w.has(w.manager.Leases()[0].Lease, w.named("web"))
				if r := w.server.lastRequest(); r.Address != addr("192.0.2.10") || !r.InUse {
					t.Errorf("asked for %+v", r)
				}
				// Its container runs: nobody stops it for a database's loss.
				if what == "running" && len(w.engine.asked) != 0 {
					t.Errorf("the engine was asked to %q", w.engine.asked)
				}
			})
		})
	}
}

// The identity that an endpoint most likely had comes first, then its MAC.
func TestAdoptedByItsMAC(t *testing.T) {
	for name, answer := range map[string]error{"NAK": lease.ErrNAK, "silence": nil} {
		t.Run(name, func(t *testing.T) {
			inWorldOf(t, byMAC, func(w *world) {
				pool := w.networkOf()
				for n := range 20 {
					w.acquire(pool, ep(n+1, fmt.Sprint("c", n)))
				}
				var all []lease.Attachment
				for n := range 20 {
					all = append(all, at(n+1, fmt.Sprint("c", n), fmt.Sprint("192.0.2.", 10+n)))
				}
				w.global = auto // since then
				w.restore(newStore())
				w.server.onExtend.set(func(ctx context.Context, l lease.Lease) (lease.Lease, error) {
					switch {
					case w.server.holder(l.Addr()) == string(l.ClientID):
						return w.server.extended(l), nil
					case answer == nil:
						return silent(ctx, l) // a server that has no such lease
					}
					return lease.Lease{}, answer
				})
				findings, err := w.manager.Reconcile(w.Context(), engine29(network(all...)), false)
				w.works(err)
				for _, f := range findings {
					if f.Action != lease.Adopted || !strings.Contains(f.Detail, "confirmed by server") {
						t.Errorf("found %+v", f)
					}
				}
				held := w.manager.Leases()
				for _, l := range held {
					w.has(l.Lease, byMACAddress(l.MAC))
				}
				if len(findings) != 20 || len(held) != 20 {
					t.Errorf("%d findings, %d leases", len(findings), len(held))
				}
			})
		})
	}
}

// What is adopted without a server's word is taken all the same: the lease, of
// an hour, ended at the server.
func TestAddressOfAnAdoptedEndpointIsTaken(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		w.acquire(pool, ep(1, "web"))
		w.restore(newStore())
		w.server.down()
		w.finds(engine29(network(at(1, "web", "192.0.2.10"))), "adopted 192.0.2.10 web lan")
		w.server.onAcquire.set(nil)
		w.server.ends(addr("192.0.2.10"))
		w.server.forget()
		w.refused(pool, ep(2, "db"), "192.0.2.10", "twice", "web")
		w.server.saw(t, "4s acquire 02:00:00:00:00:02", "4s decline 192.0.2.10")
		w.holds("192.0.2.10 lost")
	})
}

// A database of before docker rename: the address is the identity's of the name
// that it had, be that lease still held there or waiting to be released. The
// delay 1h > 6m.
func TestAdoptedUnderItsFormerName(t *testing.T) {
	for what, left := range map[string]bool{"held": false, "releasing": true} {
		t.Run(what, func(t *testing.T) {
			inWorldOf(t, auto, func(w *world) {
				pool := w.networkOf("release_delay=1h")
				l := w.acquire(pool, ep(1, "web"))
				backup := w.store.copy()
				w.release(pool, l)
				if left {
					backup = w.store.copy()
				}
				w.acquire(pool, ep(2, "web"))
				time.Sleep(6 * time.Minute)
				w.restore(backup)
				f := w.finds(engine29(network(at(2, "www", "192.0.2.10"))), "adopted 192.0.2.10 www lan")
				if !strings.Contains(f[0].Detail, "confirmed by") {
					t.Errorf("found %+v", f)
				}
				w.has(w.manager.Leases()[0].Lease, string(l.ClientID))
				w.holds("192.0.2.10 bound")
				w.agree()
				time.Sleep(2 * time.Hour)
				w.server.leased(t, addr("192.0.2.10"))
			})
		})
	}
}

// The release of a restored database is due, 30s after its start, while the
// container that has the address is adopted, from 29.5s to 30.5s.
func TestAdoptionAsItsReleaseIsDue(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool, _ := w.leftOne()
		backup := w.store.copy()
		w.acquire(pool, ep(2, "web"))
		time.Sleep(6 * time.Minute)
		w.restore(backup)
		w.server.onExtend.set(func(_ context.Context, l lease.Lease) (lease.Lease, error) {
			time.Sleep(time.Second)
			return w.server.extended(l), nil
		})
		time.Sleep(29500 * time.Millisecond)
		w.finds(engine29(network(at(2, "web", "192.0.2.10"))), "adopted 192.0.2.10 web lan")
		time.Sleep(10 * time.Minute)
		w.server.saw(t, "7m29.5s rebind 192.0.2.10")
		w.holds("192.0.2.10 bound")
		if len(w.store.bindings) != 0 {
			t.Errorf("still stored: %v", w.store.bindings)
		}
	})
}

// An endpoint that is elsewhere than a restored database says: 6m > 5m.
func TestEndpointThatMoved(t *testing.T) {
	inWorldOf(t, byMAC, func(w *world) {
		pool := w.networkOf()
		l := w.acquire(pool, ep(1, "web"))
		backup := w.store.copy()
		w.release(pool, l)
		w.acquire(pool, wants(1, "web", "192.0.2.50"))
		time.Sleep(6 * time.Minute)
		w.restore(backup)
		w.finds(engine20(network(at(1, "web", "192.0.2.50"))), "adopted 192.0.2.50 web lan")
		w.holds("192.0.2.50 bound")
		w.agree()
		time.Sleep(time.Hour)
		w.server.leased(t, addr("192.0.2.50"))
		w.holds("192.0.2.50 bound")
	})
}

// That a server is silent about some endpoints (10 < 16), of whose leases it
// doesn't know, or refuses many, says nothing about the others. It takes 500ms
// for each of those, so that they are asked for after the first ones' 2s.
func TestAdoptionWhileTheServerKnowsNotAll(t *testing.T) {
	for _, c := range []struct {
		answer  string
		unknown int
	}{{"silence", 10}, {"NAK", 50}} {
		t.Run(c.answer, func(t *testing.T) {
			inWorldOf(t, byMAC, func(w *world) {
				const known = 60
				var all []lease.Attachment
				for n := range c.unknown + known {
					all = append(all, at(n+1, fmt.Sprint("c", n), fmt.Sprint("192.0.2.", 10+n)))
					if n >= c.unknown {
						w.server.table[all[n].Prefix.Addr()] = byMACAddress(mac(n + 1))
					}
				}
				w.server.onExtend.set(func(ctx context.Context, l lease.Lease) (lease.Lease, error) {
					switch {
					case w.server.holder(l.Addr()) != "":
						time.Sleep(500 * time.Millisecond)
						return w.server.extended(l), nil
					case c.answer == "NAK":
						return lease.Lease{}, lease.ErrNAK
					}
					return silent(ctx, l)
				})
				findings, err := w.manager.Reconcile(w.Context(), engine20(network(all...)), false)
				w.works(err)
				confirmed := 0
				for _, f := range findings {
					if strings.Contains(f.Detail, "confirmed by server") {
						confirmed++
					}
				}
				if confirmed != known || len(findings) != len(all) {
					t.Errorf("%d of %d were confirmed, the server knew %d", confirmed, len(findings), known)
				}
				time.Sleep(5 * time.Minute)
				for _, l := range w.manager.Leases() {
					if l.State != lease.Bound.String() {
						t.Errorf("%v is %s", l.Addr(), l.State)
					}
				}
			})
		})
	}
}

// A container in two networks of one subnet, of which one is known: its name is
// that one's identity, so the other endpoint's can only be its MAC.
func TestAdoptedNameThatLivesElsewhere(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		one, two := w.networkOf(), w.networkOf("dhcp_server=198.51.100.2")
		w.acquire(one, ep(1, "web"))
		backup := w.store.copy()
		w.acquire(two, ep(2, "web"))
		w.restore(backup)
		other := network(at(2, "web", "192.0.2.11"))
		other.Name, other.Options = "other", map[string]string{"dhcp_server": "198.51.100.2"}
		w.finds(engine29(network(at(1, "web", "192.0.2.10")), other), "adopted 192.0.2.11 web other", "named 192.0.2.10 web lan")
		w.server.saw(t, "0s rebind 192.0.2.11")
		w.holds("192.0.2.10 bound", "192.0.2.11 bound")
		w.has(w.manager.Leases()[1].Lease, byMACAddress(mac(2)))
	})
}

// The container was renamed, and its MAC is asked for under the new name while
// its endpoint of before is adopted, which takes 1s: there is only the one that
// was asked for.
func TestRequestOfAnotherNameWhileAdopting(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		w.acquire(pool, ep(1, "web"))
		w.restore(newStore())
		w.server.onExtend.set(func(_ context.Context, l lease.Lease) (lease.Lease, error) {
			time.Sleep(time.Second)
			return w.server.extended(l), nil
		})
		var wg sync.WaitGroup
		wg.Go(func() {
			f := w.finds(engine29(network(at(1, "web", "192.0.2.10"))), "refused 192.0.2.10 web lan")
			if !strings.Contains(f[0].Detail, "192.0.2.11") {
				t.Errorf("found %+v", f)
			}
		})
		time.Sleep(500 * time.Millisecond)
		l := w.acquire(pool, ep(1, "www"))
		wg.Wait()
		w.has(l, w.named("www"))
		w.holds("192.0.2.11 bound")
		w.agree()
	})
}

// Hundreds of endpoints, and no server: 16 at once, 2 × 2s for each of the first
// ones < 5s. Then the servers count as silent, and all are asked for later.
func TestAdoptionOfManyWhileNoServerAnswers(t *testing.T) {
	const all = 240
	inWorldOf(t, auto, func(w *world) {
		var endpoints []lease.Attachment
		for n := range all {
			endpoints = append(endpoints, at(n+1, fmt.Sprint("c", n), fmt.Sprint("192.0.2.", 2+n)))
			w.server.table[endpoints[n].Prefix.Addr()] = byMACAddress(mac(n + 1))
		}
		w.server.down()
		began := time.Now()
		findings, err := w.manager.Reconcile(w.Context(), engine20(network(endpoints...)), false)
		w.works(err)
		if took := time.Since(began); took > 5*time.Second || len(findings) != all {
			t.Errorf("%d findings in %v", len(findings), took)
		}
		w.server.up()
		time.Sleep(5 * time.Minute)
		for _, l := range w.manager.Leases() {
			if l.State != lease.Bound.String() {
				t.Errorf("%v is %s", l.Addr(), l.State)
			}
		}
	})
}

// The operator gives up after 1s < 2s: nothing is adopted unasked.
func TestReconcileThatIsGivenUp(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		w.acquire(w.networkOf(), ep(1, "web"))
		w.restore(newStore())
		w.server.down()
		ctx, cancel := context.WithTimeout(w.Context(), time.Second)
		defer cancel()
		_, err := w.manager.Reconcile(ctx, engine29(network(at(1, "web", "192.0.2.10"))), false)
		w.fails(err, context.DeadlineExceeded.Error())
		w.holds()
		w.server.up()
		w.finds(engine29(network(at(1, "web", "192.0.2.10"))), "adopted 192.0.2.10 web lan")
		w.holds("192.0.2.10 bound")
	})
}

// Leases of another host's identity: what a container here has is renewed again,
// as what it was, the rest forgotten after 5m, of which no server hears. T1 30m.
func TestLeasesOfAnotherHostAreReconciled(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		web := w.acquire(pool, ep(1, "web"))
		w.acquire(pool, ep(2, "gone"))
		anotherHost["interface"](w)
		w.restart(time.Second)
		seen := engine29(network(at(1, "web", "192.0.2.10")))
		w.server.forget()
		// The first question of which host this is may be a reconcile's.
		_, err := w.manager.Reconcile(w.Context(), seen, true)
		w.works(err)
		w.wouldFind(seen, "missed 192.0.2.11 gone", "resumed 192.0.2.10 web lan")
		w.holds("192.0.2.10 waiting", "192.0.2.11 waiting")
		w.finds(seen, "missed 192.0.2.11 gone", "resumed 192.0.2.10 web lan")
		w.holds("192.0.2.10 bound", "192.0.2.11 waiting")
		w.server.saw(t)
		time.Sleep(5 * time.Minute)
		w.wouldFind(seen, "forgotten 192.0.2.11 gone")
		w.finds(seen, "forgotten 192.0.2.11 gone")
		w.holds("192.0.2.10 bound")
		w.server.saw(t)
		w.server.leased(t, addr("192.0.2.10"), addr("192.0.2.11"))
		w.restart(time.Second)
		time.Sleep(30 * time.Minute)
		w.server.saw(t, "30m0s renew 192.0.2.10")
		w.has(w.manager.Leases()[0].Lease, string(web.ClientID))
		w.finds(seen)
	})
}

// Engines before 29 tell drivers no names: the next renewal carries them. T1 30m
// < 31m.
func TestNamesOfOldEngines(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		w.acquire(pool, ep(1, ""))
		seen := engine20(network(at(1, "web", "192.0.2.10")))
		w.wouldFind(seen, "named 192.0.2.10 web lan")
		w.finds(seen, "named 192.0.2.10 web lan")
		w.finds(seen)
		w.restart(time.Second)
		if l := w.manager.Leases()[0]; l.Name != "web" || l.Container != "id1" {
			t.Errorf("it is %+v", l)
		}
		var sent string
		w.server.onExtend.set(func(_ context.Context, l lease.Lease) (lease.Lease, error) {
			sent = l.Name
			return w.server.extended(l), nil
		})
		time.Sleep(31 * time.Minute)
		synctest.Wait()
		if sent != "web" {
			t.Errorf("renewed as %q", sent)
		}
		if l := w.manager.Leases()[0]; l.Name != "web" || l.Container != "id1" {
			t.Errorf("after its renewal it is %+v", l)
		}
		// docker rename
		w.finds(engine20(network(at(1, "www", "192.0.2.10"))), "named 192.0.2.10 www lan")
		if l := w.manager.Leases()[0]; l.Name != "www" {
			t.Errorf("it is %q", l.Name)
		}
	})
	// Where the engine told the name, that is what the servers know.
	inWorldOf(t, auto, func(w *world) {
		w.acquire(w.networkOf(), ep(1, "web"))
		w.finds(engine29(network(at(1, "renamed", "192.0.2.10"))), "named 192.0.2.10 web lan")
		if l := w.manager.Leases()[0]; l.Name != "web" || l.Container != "id1" {
			t.Errorf("it is %+v", l)
		}
	})
}

func TestEndpointsThatCannotBeAdopted(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		for n := range 3 {
			w.acquire(pool, ep(n+1, fmt.Sprint("c", n)))
		}
		w.server.forget()
		wrong := network(at(8, "wrong", "192.0.2.80"), at(1, "c0", "192.0.2.10"))
		wrong.Options = map[string]string{"dhcp_sever": "198.51.100.1"}
		lan := network(at(9, "out", "198.18.0.9"), at(2, "c1", "192.0.2.11"), at(2, "twin", "192.0.2.82"), at(3, "c2", "192.0.2.12"))
		seen := engine29(lan, wrong)
		time.Sleep(10 * time.Minute)
		findings := w.finds(seen, "named 192.0.2.10 c0 lan", "named 192.0.2.11 c1 lan", "named 192.0.2.12 c2 lan",
			"refused 192.0.2.80 wrong lan", "refused 192.0.2.82 twin lan", "refused 198.18.0.9 out lan")
		for i, part := range []string{"dhcp_sever", mac(2).String(), "outside"} {
			if !strings.Contains(findings[3+i].Detail, part) {
				t.Errorf("no %q in %+v", part, findings[3+i])
			}
		}
		// A network that this daemon wouldn't make today has containers all the
		// same, whose leases aren't released.
		for range 3 {
			time.Sleep(6 * time.Minute)
			w.finds(seen, "refused 192.0.2.80 wrong lan", "refused 192.0.2.82 twin lan", "refused 198.18.0.9 out lan")
		}
		w.server.saw(t)
		w.holds("192.0.2.10 bound", "192.0.2.11 bound", "192.0.2.12 bound")
	})
}

// What the engine said is older than what is known: granted or released within
// 5m. Release delay 30s < 4m59s < 5m.
func TestEndpointThatCameOrWentMeanwhile(t *testing.T) {
	t.Run("came", func(t *testing.T) {
		inWorldOf(t, auto, func(w *world) {
			w.acquire(w.networkOf(), ep(2, "web")) // another MAC's now
			w.server.forget()
			time.Sleep(5*time.Minute - 1)
			w.finds(engine29(network(at(1, "web", "192.0.2.10"))), "missed 192.0.2.10 web")
			w.server.saw(t)
			w.holds("192.0.2.10 bound")
		})
	})
	t.Run("moved", func(t *testing.T) {
		inWorldOf(t, auto, func(w *world) {
			w.acquire(w.networkOf(), ep(1, "web"))
			w.server.forget()
			time.Sleep(5*time.Minute - 1)
			w.finds(engine29(network(at(1, "web", "192.0.2.50"))), "missed 192.0.2.10 web")
			w.server.saw(t)
			w.holds("192.0.2.10 bound")
		})
	})
	t.Run("went", func(t *testing.T) {
		inWorldOf(t, auto, func(w *world) {
			w.leftOne()
			seen := engine29(network(at(1, "web", "192.0.2.10")))
			time.Sleep(10 * time.Second)
			w.finds(seen)
			w.holds("192.0.2.10 releasing")
			time.Sleep(5*time.Minute - 10*time.Second - 1)
			w.finds(seen)
			w.server.saw(t, "1m30s release 192.0.2.10")
			w.holds()
			// It is there still: then the release was an error.
			time.Sleep(time.Nanosecond)
			w.finds(seen, "adopted 192.0.2.10 web lan")
		})
	})
	// Left at 0s with a delay of 4m, and at 3m: at 5m30s the latter is 2m30s ago.
	t.Run("went after another", func(t *testing.T) {
		inWorldOf(t, auto, func(w *world) {
			pool := w.networkOf("release_delay=4m")
			w.acquire(pool, ep(1, "slow"))
			w.acquire(pool, ep(2, ""))
			w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.10")))
			time.Sleep(3 * time.Minute)
			w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.11")))
			time.Sleep(150 * time.Second)
			w.finds(engine29(network(at(2, "fast", "192.0.2.11"))))
			w.holds()
		})
	})
}

// A database of last night: web has another MAC since, db another address, and
// one of two leases that waited to be released lives again. Nothing of this is
// released, in particular not what was pending: delay 30s < 2m.
func TestRestoredDatabase(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		w.acquire(pool, ep(1, "web"))
		w.acquire(pool, ep(2, ""))
		again := w.acquire(pool, ep(3, "again"))
		gone := w.acquire(pool, ep(4, "gone"))
		w.release(pool, again)
		w.release(pool, gone)
		backup := w.store.copy()
		w.acquire(pool, ep(13, "again"))
		w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.10")))
		w.acquire(pool, ep(11, "web"))
		w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.11")))
		w.acquire(pool, wants(12, "", "192.0.2.50"))
		time.Sleep(6 * time.Minute) // > delay 30s, > 5m

		w.restore(backup)
		w.holds("192.0.2.10 bound", "192.0.2.11 bound", "192.0.2.12 releasing", "192.0.2.13 releasing")
		seen := engine29(network(at(11, "web", "192.0.2.10"), at(13, "again", "192.0.2.12"), at(12, "db", "192.0.2.50")))
		w.wouldFind(seen, "adopted 192.0.2.10 web lan", "adopted 192.0.2.12 again lan", "adopted 192.0.2.50 db lan", "missed 192.0.2.11")
		w.finds(seen, "adopted 192.0.2.10 web lan", "adopted 192.0.2.12 again lan", "adopted 192.0.2.50 db lan", "missed 192.0.2.11")
		w.agree()
		time.Sleep(2 * time.Minute)
		w.holds("192.0.2.10 bound", "192.0.2.11 bound", "192.0.2.12 bound", "192.0.2.50 bound")
		w.server.mu.Lock()
		for _, what := range w.server.seen {
			if strings.Contains(what, "release") && !strings.Contains(what, "192.0.2.13") {
				t.Errorf("the server saw %s", what)
			}
		}
		w.server.mu.Unlock()
		held := w.manager.Leases()
		for i, want := range []string{w.named("web"), byMACAddress(mac(2)), w.named("again"), byMACAddress(mac(12))} {
			w.has(held[i].Lease, want)
		}
		w.restart(time.Second)
		w.holds("192.0.2.10 bound", "192.0.2.11 bound", "192.0.2.12 bound", "192.0.2.50 bound")
	})
}

// Two networks of one subnet, on links that don't meet, with servers of their
// own: the same address twice is no error, and each is its own.
func TestSameAddressOnTwoLinks(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		type link struct {
			pool   string
			seen   lease.Network
			server netip.Addr
		}
		var links []link
		for i, server := range []string{"198.51.100.1", "198.51.100.2"} {
			n := network(at(i+1, fmt.Sprint("c", i), "192.0.2.10"))
			n.Name, n.Options = fmt.Sprint("lan", i), map[string]string{"dhcp_server": server}
			links = append(links, link{w.networkOf("dhcp_server=" + server), n, addr(server)})
		}
		// Each server has a table of its own.
		w.server.onExtend.set(func(_ context.Context, l lease.Lease) (lease.Lease, error) {
			for i, of := range links {
				if l.MAC == mac(i+1) {
					l.Server, l.Via = of.server, netip.AddrPortFrom(of.server, 67)
				}
			}
			return w.server.extended(l), nil
		})
		w.server.id.set(addr("198.51.100.1"))
		w.server.onAcquire.set(w.server.from("192.0.2.10"))
		w.acquire(links[0].pool, ep(1, "c0"))
		seen := engine29(links[0].seen, links[1].seen)
		time.Sleep(10 * time.Minute) // both are old enough, > 5m
		w.server.forget()
		w.finds(seen, "adopted 192.0.2.10 c1 lan1", "named 192.0.2.10 c0 lan0")
		w.server.saw(t, "10m0s rebind 192.0.2.10")
		w.holds("192.0.2.10 bound", "192.0.2.10 bound")
		w.agree()

		w.restore(newStore())
		w.finds(seen, "adopted 192.0.2.10 c0 lan0", "adopted 192.0.2.10 c1 lan1")
		w.finds(seen)
		// The engine repeats a release of the first network: the second one's
		// address stays.
		for range 3 {
			w.works(w.manager.Release(w.Context(), links[0].pool, addr("192.0.2.10")))
		}
		time.Sleep(time.Minute)
		held := w.manager.Leases()
		if len(held) != 1 || held[0].MAC != mac(2) {
			t.Errorf("held are %+v", held)
		}
		if l := w.acquire(links[1].pool, ep(2, "c1")); l.Pool != links[1].pool || l.Server != addr("198.51.100.2") {
			t.Errorf("got %+v", l)
		}
	})
}

// A full disk: nothing is half adopted, nor half released.
func TestReconcileThatCannotBeStored(t *testing.T) {
	for _, step := range []string{"PutPool", "PutLease", "PutHost"} {
		t.Run(step, func(t *testing.T) {
			inWorldOf(t, auto, func(w *world) {
				w.acquire(w.networkOf(), ep(1, "web"))
				w.restore(newStore())
				w.store.before.set(failing(step))
				seen := engine29(network(at(1, "web", "192.0.2.10")))
				if step != "PutHost" {
					f := w.finds(seen, "refused 192.0.2.10 web lan")
					if !strings.Contains(f[0].Detail, errDiskFull.Error()) {
						t.Errorf("found %+v", f)
					}
					w.holds()
					w.store.before.set(nil)
				}
				w.finds(seen, "adopted 192.0.2.10 web lan")
				w.agree()
			})
		})
	}
	t.Run("stale", func(t *testing.T) {
		inWorldOf(t, auto, func(w *world) {
			w.acquire(w.networkOf(), ep(1, "web"))
			w.restart(6 * time.Minute)
			w.server.forget()
			w.store.before.set(failing("PutLease"))
			seen := engine29(network(at(2, "web", "192.0.2.10")))
			w.finds(seen, "refused 192.0.2.10 web lan")
			w.store.before.set(nil)
			w.holds("192.0.2.10 bound")
			w.agree()
			time.Sleep(30 * time.Minute)
			w.server.saw(t, "6m0s rebind 192.0.2.10", "30m0s renew 192.0.2.10") // kept alive as before
		})
	})
	t.Run("released", func(t *testing.T) {
		inWorldOf(t, auto, func(w *world) {
			w.acquire(w.networkOf(), ep(1, "web"))
			w.finds(engine29(network()), "missed 192.0.2.10 web")
			time.Sleep(5 * time.Minute)
			w.server.forget()
			w.store.before.set(failing("DeleteLease"))
			_, err := w.manager.Reconcile(w.Context(), engine29(network()), false)
			w.fails(err, "192.0.2.10", errDiskFull.Error())
			w.server.saw(t)
			w.holds("192.0.2.10 bound")
			w.store.before.set(nil)
			w.finds(engine29(network()), "released 192.0.2.10 web")
		})
	})
}

// The keeper of a stale lease is at work (2s) while the lease is replaced: what
// it comes back with is not stored. T1 30m.
func TestStaleLeaseThatIsBeingRenewed(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		w.acquire(w.networkOf(), ep(1, "web"))
		w.restart(time.Second)
		w.server.onExtend.set(func(ctx context.Context, l lease.Lease) (lease.Lease, error) {
			if l.MAC == mac(1) {
				select {
				case <-time.After(2 * time.Second):
				case <-ctx.Done():
					return lease.Lease{}, lease.ErrNoAnswer
				}
			}
			return w.server.extended(l), nil
		})
		time.Sleep(30*time.Minute - time.Second + time.Millisecond)
		w.finds(engine29(network(at(2, "web", "192.0.2.10"))), "adopted 192.0.2.10 web lan")
		time.Sleep(10 * time.Second)
		w.holds("192.0.2.10 bound")
		w.agree()
		if l := w.manager.Leases()[0]; l.MAC != mac(2) {
			t.Errorf("held is %+v", l)
		}
	})
}

// A container comes back while its endpoint of before is adopted (2s): there is
// one lease at the end, its, and no reconcile ever releases it.
func TestRequestWhileAdopting(t *testing.T) {
	for _, client := range []lease.ClientIDForm{lease.ClientIDAuto, lease.ClientIDMAC} {
		t.Run(string(client), func(t *testing.T) {
			inWorldOf(t, lease.Options{ClientID: client}, func(w *world) {
				pool := w.networkOf()
				w.acquire(pool, ep(1, "web"))
				w.restore(newStore())
				w.server.onExtend.set(func(ctx context.Context, l lease.Lease) (lease.Lease, error) {
					time.Sleep(time.Second)
					return w.server.extended(l), nil
				})
				seen := engine29(network(at(1, "web", "192.0.2.10")))
				var wg sync.WaitGroup
				wg.Go(func() {
					_, err := w.manager.Reconcile(w.Context(), seen, false)
					w.works(err)
				})
				time.Sleep(500 * time.Millisecond)
				l, err := w.manager.Acquire(w.Context(), pool, ep(1, "web"))
				wg.Wait()
				if err != nil {
					// Refused is all right, the address given twice is not.
					l = w.acquire(pool, ep(1, "web"))
				}
				w.server.onExtend.set(nil)
				for range 3 {
					time.Sleep(6 * time.Minute)
					_, err := w.manager.Reconcile(w.Context(), engine29(network(at(1, "web", l.Addr().String()))), false)
					w.works(err)
				}
				if w.server.holder(l.Addr()) != string(l.ClientID) {
					t.Errorf("%v is leased to %q", l.Addr(), w.server.holder(l.Addr()))
				}
				held := w.manager.Leases()
				if len(held) != 1 || held[0].Pool != pool {
					t.Errorf("held are %+v", held)
				}
			})
		})
	}
}

// Containers come and go while reconciles with inventories of a moment before
// run: 300 × 1s to 3s, release delay 2s.
func TestReconcileInTheMiddleOfLife(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf("release_delay=2s")
		var mu sync.Mutex
		running := map[string]lease.Lease{}
		inventory := func() lease.Inventory {
			mu.Lock()
			defer mu.Unlock()
			n := network()
			n.Options = map[string]string{"release_delay": "2s"}
			for name, l := range running {
				n.Attachments = append(n.Attachments, lease.Attachment{Container: "id of " + name, Name: name, MAC: l.MAC, Prefix: l.Prefix})
			}
			return engine29(n)
		}
		var wg sync.WaitGroup
		for n := range 10 {
			wg.Go(func() {
				name := fmt.Sprint("c", n)
				for life := range 30 {
					l, err := w.manager.Acquire(w.Context(), pool, ep(1000*n+life+1, name))
					if err != nil {
						t.Errorf("%s: %v", name, err)
						return
					}
					mu.Lock()
					running[name] = l
					mu.Unlock()
					time.Sleep(time.Duration(1000+137*((n*7+life*3)%15)) * time.Millisecond)
					if life == 29 {
						return
					}
					w.works(w.manager.Release(w.Context(), pool, l.Addr()))
					mu.Lock()
					delete(running, name)
					mu.Unlock()
					time.Sleep(time.Duration(500+271*((n*3+life*5)%15)) * time.Millisecond)
				}
			})
		}
		done := make(chan struct{})
		var reconciles sync.WaitGroup
		reconciles.Go(func() {
			for {
				seen := inventory()
				time.Sleep(1100 * time.Millisecond)
				_, err := w.manager.Reconcile(w.Context(), seen, false)
				w.works(err)
				select {
				case <-done:
					return
				default:
				}
			}
		})
		wg.Wait()
		close(done)
		reconciles.Wait()
		time.Sleep(time.Minute)
		for name, l := range running {
			if w.server.holder(l.Addr()) != w.named(name) {
				t.Errorf("%s has %v, which the server has leased to %q", name, l.Addr(), w.server.holder(l.Addr()))
			}
		}
		if held := w.manager.Leases(); len(held) != len(running) || len(w.server.table) != len(running) {
			t.Errorf("%d held, %d leased, %d running", len(held), len(w.server.table), len(running))
		}
		w.finds(inventory())
		w.agree()
	})
}
