package lease_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// auto are the default settings: where an endpoint has a name, that is its
// identity.
var auto = lease.Options{}

// networkOf adds a network of 192.0.2.0/24 with options, written as name=value.
func (w *world) networkOf(options ...string) string {
	w.Helper()
	texts := map[string]string{}
	for _, o := range options {
		if o == "" {
			continue
		}
		name, value, _ := strings.Cut(o, "=")
		texts[name] = value
	}
	p, err := lease.NewPool("192.0.2.0/24", "", texts)
	if err == nil {
		p, err = w.manager.AddPool(w.Context(), p)
	}
	if err != nil {
		w.Fatal(err)
	}
	w.server.forget()
	return p.ID
}

// named is the identity of a container on this host, in 192.0.2.0/24.
func (w *world) named(name string) string {
	w.store.mu.Lock()
	defer w.store.mu.Unlock()
	return "\x00" + w.store.host.ID + "/192.0.2.0/24/" + name
}

// has checks the identity of a lease.
func (w *world) has(l lease.Lease, id string) {
	w.Helper()
	if string(l.ClientID) != id {
		w.Errorf("%v of %v has identity %q, want %q", l.Addr(), l.MAC, l.ClientID, id)
	}
}

// release has the engine release an address.
func (w *world) release(pool string, l lease.Lease) {
	w.Helper()
	w.works(w.manager.Release(w.Context(), pool, l.Addr()))
}

// logged checks how many lines of the log have all parts.
func (w *world) logged(want int, parts ...string) {
	w.Helper()
	if got := w.lines(parts...); len(got) != want {
		w.Errorf("%d log lines with %q, want %d: %q", len(got), parts, want, got)
	}
}

func byMACAddress(m lease.MAC) string { return string(lease.MACClientID(m)) }

func TestNameIsTheIdentity(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		l := w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		host := w.store.host
		if !regexp.MustCompile(`^[0-9a-f]{12}$`).MatchString(host.ID) || !regexp.MustCompile(`^[0-9a-f]{12}$`).MatchString(host.Machine) || host.MAC != relayMAC {
			t.Errorf("stored identity %+v", host)
		}
		if id, _ := w.host.MachineID(); strings.Contains(fmt.Sprint(host), id[:12]) {
			t.Errorf("the machine id is no secret in %+v", host)
		}
		w.has(l, "\x00"+host.ID+"/192.0.2.0/24/web")
		if got := w.server.lastRequest(); string(got.ClientID) != string(l.ClientID) || got.Name != "web" {
			t.Errorf("asked as %q, name %q", got.ClientID, got.Name)
		}
		if l := w.manager.Leases()[0]; l.Host != host.ID {
			t.Errorf("its host is %q", l.Host)
		}
		// A network that is created anew changes nothing, nor does another MAC.
		w.works(w.manager.RemovePool(w.Context(), pool))
		again := w.acquire(w.networkOf("release_delay=1s"), lease.Endpoint{MAC: mac(2), Name: "web"})
		w.has(again, string(l.ClientID))
		if again.Addr() != l.Addr() || again.MAC != mac(2) {
			t.Errorf("got %v for %v", again.Addr(), again.MAC)
		}
	})
}

// Two hosts differ in their machine ids, clones at least in the MAC of the
// relay address. The same host is the same without its database.
func TestHostsDiffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		identity := func(machineID string, relay lease.MAC) string {
			w := newWorld(t)
			w.host.machineID.set(machineID)
			w.host.macs.set([]lease.MAC{mac(7), relay})
			w.server.relayMAC.set(func() (lease.MAC, error) { return relay, nil })
			w.start()
			defer w.manager.Close()
			return string(w.acquire(w.networkOf(), lease.Endpoint{MAC: mac(1), Name: "web"}).ClientID)
		}
		one := identity("0123456789abcdef0123456789abcdef", relayMAC)
		if other := identity("0123456789abcdef0123456789abcdee", relayMAC); other == one {
			t.Errorf("another machine id, the same identity %q", one)
		}
		if clone := identity("0123456789abcdef0123456789abcdef", mac(8)); clone == one {
			t.Errorf("a clone with another MAC, the same identity %q", one)
		}
		if same := identity("0123456789abcdef0123456789abcdef", relayMAC); same != one {
			t.Errorf("the same host without its database is %q, was %q", same, one)
		}
	})
}

// Kea 2.2 drops messages with a longer client identifier without a word.
const longestID = 128

func TestLongNames(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		ids := map[string]int{}
		n := 0
		take := func(name string) string {
			n++
			l := w.acquire(pool, lease.Endpoint{MAC: mac(n), Name: name})
			if len(l.ClientID) > longestID {
				t.Errorf("%d bytes for a name of %d", len(l.ClientID), len(name))
			}
			if other, known := ids[string(l.ClientID)]; known {
				t.Errorf("names %d and %d have one identity %q", other, n, l.ClientID)
			}
			ids[string(l.ClientID)] = n
			return string(l.ClientID)
		}
		take("first")
		prefix := w.named("")
		fits := longestID - len(prefix)
		for _, length := range []int{1, 63, fits - 1, fits} {
			if id := take(strings.Repeat("a", length)); id != prefix+strings.Repeat("a", length) {
				t.Errorf("a name of %d: %q isn't readable", length, id)
			}
		}
		for _, name := range []string{
			strings.Repeat("a", fits+1), strings.Repeat("a", fits+2), strings.Repeat("a", 200), strings.Repeat("a", 199) + "b",
			strings.Repeat("a", 255), strings.Repeat("a", 254) + "b", strings.Repeat("n", 64_000),
		} {
			id := take(name)
			if len(id) != longestID || !strings.HasPrefix(id, prefix+name[:50]) || !regexp.MustCompile(`#[0-9a-f]{16}$`).MatchString(id) {
				t.Errorf("a name of %d: %q", len(name), id)
			}
		}
	})
}

func TestIdentityForms(t *testing.T) {
	for _, c := range []struct {
		global lease.ClientIDForm
		own    string
		name   string
		named  bool
	}{
		{"", "", "web", true},
		{"", "", "", false},
		{"", "client_id=auto", "web", true},
		{"", "client_id=mac", "web", false},
		{"", "client_id=name", "web", true},
		{lease.ClientIDMAC, "", "web", false},
		{lease.ClientIDMAC, "client_id=auto", "web", true},
		{lease.ClientIDMAC, "client_id=auto", "", false},
		{lease.ClientIDName, "", "web", true},
		{lease.ClientIDName, "client_id=mac", "", false},
	} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			inWorldOf(t, lease.Options{ClientID: c.global}, func(w *world) {
				l := w.acquire(w.networkOf(c.own), lease.Endpoint{MAC: mac(1), Name: c.name})
				want := byMACAddress(mac(1))
				if c.named {
					want = w.named(c.name)
				}
				w.has(l, want)
				// Without a name, too, another host must not renew it.
				if l := w.manager.Leases()[0]; l.Host == "" || l.Host != w.store.host.ID {
					t.Errorf("its host is %q, want %q", l.Host, w.store.host.ID)
				}
			})
		})
	}
}

func TestNameThatEnginesDoNotTell(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		w.refused(w.networkOf("client_id=name"), lease.Endpoint{MAC: mac(1)}, "client_id=name", "29.0", "client_id=auto", "--mac-address")
		w.server.saw(t)
		w.holds()
	})
}

func TestMachineIDThatCannotBeRead(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		w.host.machineID.set("")
		w.refused(w.networkOf("client_id=name"), lease.Endpoint{MAC: mac(1), Name: "web"}, "web", "machine-id", "client_id=mac")
		w.server.saw(t)
		w.has(w.acquire(w.networkOf("client_id=mac"), lease.Endpoint{MAC: mac(2), Name: "db"}), byMACAddress(mac(2)))
		w.logged(0, "level=WARN", "db")

		pool := w.networkOf("dhcp_server=198.51.100.2")
		l := w.acquire(pool, lease.Endpoint{MAC: mac(3), Name: "web"})
		w.has(l, byMACAddress(mac(3)))
		w.logged(1, "level=WARN", "made of the MAC address", "web", mac(3).String(), "machine-id")
		// It is renewed all the same: T1 30m < 31m.
		w.server.forget()
		time.Sleep(31 * time.Minute)
		w.server.sawInAnyOrder(t, "30m0s renew 192.0.2.10", "30m0s renew 192.0.2.11")

		// Once it can be read, new containers have their names.
		w.host.machineID.set("0123456789abcdef0123456789abcdef")
		w.has(w.acquire(pool, lease.Endpoint{MAC: mac(4), Name: "new"}), w.named("new"))
	})
}

// The machine's identity is stored: a file that is gone ends no renewals. T1
// 30m < 31m.
func TestMachineIDThatIsGone(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		l := w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		w.host.machineID.set("")
		w.restart(time.Minute)
		w.server.forget()
		time.Sleep(30 * time.Minute)
		w.server.saw(t, "30m0s renew 192.0.2.10")
		w.logged(1, "level=WARN", "machine id not read", "same machine")
		w.has(w.acquire(pool, lease.Endpoint{MAC: mac(2), Name: "db"}), strings.Replace(string(l.ClientID), "web", "db", 1))
		w.holds("192.0.2.10 bound", "192.0.2.11 bound")
	})
}

// The interface of the relay address isn't there yet when the machine starts.
func TestRelayInterfaceThatIsUnknown(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		w.server.relayMAC.set(func() (lease.MAC, error) { return lease.MAC{}, errors.New("no interface has 198.51.100.9") })
		w.refused(w.networkOf("client_id=name"), lease.Endpoint{MAC: mac(1), Name: "web"}, "web", "no interface has 198.51.100.9", "client_id=mac")
		w.server.saw(t)
		w.has(w.acquire(w.networkOf(), lease.Endpoint{MAC: mac(1), Name: "web"}), byMACAddress(mac(1)))
		w.logged(1, "level=WARN", "made of the MAC address", "198.51.100.9")
		w.server.relayMAC.set(nil)
		w.has(w.acquire(w.networkOf(), lease.Endpoint{MAC: mac(2), Name: "web"}), w.named("web"))
	})
}

// A container of two networks of one subnet has two identities there, or it
// would get one address twice.
func TestNameInTwoNetworksOfASubnet(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		one, two := w.networkOf(), w.networkOf("dhcp_server=198.51.100.2")
		first := w.acquire(one, lease.Endpoint{MAC: mac(1), Name: "web"})
		w.logged(0, "level=WARN")
		second := w.acquire(two, lease.Endpoint{MAC: mac(2), Name: "web"})
		w.has(first, w.named("web"))
		w.has(second, byMACAddress(mac(2)))
		w.logged(1, "level=WARN", "name has a lease already", "web", mac(2).String(), "192.0.2.10")
		w.holds("192.0.2.10 bound", "192.0.2.11 bound")
		// In another subnet the name is another identity.
		other := w.network("198.18.0.0/24", "198.51.100.1")
		w.server.onAcquire.set(w.server.from("198.18.0.10"))
		l := w.acquire(other, lease.Endpoint{MAC: mac(3), Name: "web"})
		w.has(l, strings.Replace(w.named("web"), "192.0.2", "198.18.0", 1))
	})
}

// docker rename a b; docker run --name a: the first one keeps its identity and
// its address.
func TestNameOfARenamedContainer(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		renamed := w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		l := w.acquire(pool, lease.Endpoint{MAC: mac(2), Name: "web"})
		w.has(l, byMACAddress(mac(2)))
		w.logged(1, "level=WARN", "name has a lease already", "web", mac(2).String(), "192.0.2.10")
		w.holds("192.0.2.10 bound", "192.0.2.11 bound")
		w.server.leased(t, addr("192.0.2.10"), addr("192.0.2.11"))
		// The one by MAC goes at once, the one by name waits.
		w.server.forget()
		w.release(pool, l)
		w.release(pool, renamed)
		w.server.saw(t, "0s release 192.0.2.11")
		w.holds("192.0.2.10 releasing")
	})
}

// Two containers of one name at the same time: whoever is second uses its MAC.
func TestSameNameAtOnce(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		w.server.onAcquire.set(w.server.slowly(3 * time.Second))
		for n := range 5 {
			go func() {
				_, err := w.manager.Acquire(w.Context(), pool, lease.Endpoint{MAC: mac(n + 1), Name: "web"})
				w.works(err)
			}()
		}
		time.Sleep(time.Minute)
		names := 0
		for _, h := range w.manager.Leases() {
			if bytes.Equal(h.ClientID, []byte(w.named("web"))) {
				names++
			} else {
				w.has(h.Lease, byMACAddress(h.MAC))
			}
		}
		if names != 1 {
			t.Errorf("%d leases have the name", names)
		}
		w.holds("192.0.2.10 bound", "192.0.2.11 bound", "192.0.2.12 bound", "192.0.2.13 bound", "192.0.2.14 bound")
	})
}

// A holder of a name changes its address (3s) while another container comes with
// that name: the name stays the holder's.
func TestNameWhileItsHolderMoves(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		w.acquire(pool, ep(1, "web"))
		w.server.onAcquire.set(w.server.slowly(3 * time.Second))
		var wg sync.WaitGroup
		wg.Go(func() { w.has(w.acquire(pool, wants(1, "web", "192.0.2.50")), w.named("web")) })
		time.Sleep(time.Second)
		w.has(w.acquire(pool, ep(2, "web")), byMACAddress(mac(2)))
		wg.Wait()
		w.holds("192.0.2.10 bound", "192.0.2.50 bound")
	})
}

// What a lease was born with stays with it: T1 30m and lease 1h < outage 2h.
func TestIdentityStaysWithItsLease(t *testing.T) {
	for _, c := range []struct {
		born, later lease.Options
		named       bool
	}{
		{auto, byMAC, true},
		{byMAC, auto, false},
	} {
		t.Run(string(c.born.ClientID)+" then "+string(c.later.ClientID), func(t *testing.T) {
			inWorldOf(t, c.born, func(w *world) {
				pool := w.networkOf("release_delay=0s")
				l := w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
				want := byMACAddress(mac(1))
				if c.named {
					want = w.named("web")
				}
				w.has(l, want)
				w.global = c.later
				w.restart(time.Minute)
				time.Sleep(30 * time.Minute)
				w.server.saw(t, "0s acquire 02:00:00:00:00:01", "30m0s renew 192.0.2.10")
				w.has(w.manager.Leases()[0].Lease, want)
				w.has(w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"}), want)

				w.server.down()
				w.server.ends(l.Addr())
				time.Sleep(2 * time.Hour)
				w.holds("192.0.2.10 lost")
				w.server.up()
				w.server.forget()
				time.Sleep(time.Minute)
				w.holds("192.0.2.10 bound")
				w.has(w.manager.Leases()[0].Lease, want)
				if got := w.server.lastRequest(); string(got.ClientID) != want || got.Address != l.Addr() {
					t.Errorf("regained as %q with %v", got.ClientID, got.Address)
				}

				// Lost, and asked for again by the engine.
				w.server.down()
				w.server.ends(l.Addr())
				time.Sleep(2 * time.Hour)
				w.server.up()
				w.has(w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"}), want)
				w.release(pool, l)

				// The next life has the new form.
				next := w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
				if bytes.Equal(next.ClientID, l.ClientID) {
					t.Errorf("its next life has %q still", next.ClientID)
				}
			})
		})
	}
}

// anotherHost are the ways in which a database gets to another machine.
var anotherHost = map[string]func(w *world){
	"machine id": func(w *world) { w.host.machineID.set("fedcba9876543210fedcba9876543210") },
	"interface": func(w *world) {
		w.host.macs.set([]lease.MAC{mac(77)})
		w.server.relayMAC.set(func() (lease.MAC, error) { return mac(77), nil })
	},
	"both": func(w *world) {
		w.host.machineID.set("fedcba9876543210fedcba9876543210")
		w.host.macs.set([]lease.MAC{mac(77)})
		w.server.relayMAC.set(func() (lease.MAC, error) { return mac(77), nil })
	},
}

// The release delay 30s < T1 30m < lease 1h < 2h: whatever the leases of another
// host would have had sent is due.
func TestLeasesOfAnotherHostWait(t *testing.T) {
	for what, change := range anotherHost {
		t.Run(what, func(t *testing.T) {
			inWorldOf(t, auto, func(w *world) {
				pool := w.networkOf()
				web := w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
				w.acquire(pool, lease.Endpoint{MAC: mac(2)})
				left := w.acquire(pool, lease.Endpoint{MAC: mac(3), Name: "left"})
				w.acquire(pool, lease.Endpoint{MAC: mac(4), Name: "fixed"})
				w.release(pool, left)
				w.holds("192.0.2.10 bound", "192.0.2.11 bound", "192.0.2.12 releasing", "192.0.2.13 bound")
				former := w.store.host
				change(w)
				w.restart(time.Second)
				w.server.forget()
				time.Sleep(2 * time.Hour)
				w.server.saw(t)
				w.holds("192.0.2.10 waiting", "192.0.2.11 waiting", "192.0.2.13 waiting")
				w.logged(1, "another host", former.ID, w.store.host.ID, "reconcile")
				if w.store.host.ID == former.ID {
					t.Fatal("the identity is still the former host's")
				}

				// The first host lives, and its addresses with it.
				l := w.acquire(pool, lease.Endpoint{MAC: mac(5), Name: "web"})
				w.has(l, w.named("web"))
				if l.Addr() != addr("192.0.2.14") || string(l.ClientID) == string(web.ClientID) {
					t.Errorf("got %+v", l)
				}
				// A container of the same MAC has its own address, too.
				fixed := w.acquire(pool, lease.Endpoint{MAC: mac(4), Name: "fixed"})
				w.has(fixed, w.named("fixed"))
				if fixed.Addr() != addr("192.0.2.15") {
					t.Errorf("got %v, which may be in use on the former host", fixed.Addr())
				}
				w.server.forget()
				// Whoever gives them up, the servers aren't told.
				w.release(pool, web)
				_, err := w.manager.ReleaseByHand(w.Context(), "192.0.2.11", "")
				w.works(err)
				time.Sleep(time.Minute)
				w.server.saw(t)
				w.server.leased(t, addr("192.0.2.10"), addr("192.0.2.11"), addr("192.0.2.12"), addr("192.0.2.13"), addr("192.0.2.14"), addr("192.0.2.15"))
				w.holds("192.0.2.14 bound", "192.0.2.15 bound")
				w.restart(time.Second)
				w.holds("192.0.2.14 bound", "192.0.2.15 bound")
			})
		})
	}
}

// What comes first after a start must not be taken for this host's, either.
func TestFirstActOnAnotherHost(t *testing.T) {
	for act, do := range map[string]func(w *world, pool string, l lease.Lease){
		"release": func(w *world, pool string, l lease.Lease) { w.release(pool, l) },
		"by hand": func(w *world, _ string, l lease.Lease) {
			_, err := w.manager.ReleaseByHand(w.Context(), l.Addr().String(), "")
			w.works(err)
		},
		"remove": func(w *world, pool string, _ lease.Lease) { w.works(w.manager.RemovePool(w.Context(), pool)) },
		"pending": func(w *world, _ string, _ lease.Lease) {
			_, err := w.manager.ReleaseByHand(w.Context(), "192.0.2.11", "")
			w.works(err)
		},
		"address": func(w *world, pool string, _ lease.Lease) {
			w.refused(pool, lease.Endpoint{MAC: mac(9), Name: "new", Address: addr("192.0.2.11")}, "192.0.2.11")
		},
	} {
		for what, change := range anotherHost {
			t.Run(act+" "+what, func(t *testing.T) {
				inWorldOf(t, auto, func(w *world) {
					pool := w.networkOf("release_delay=1m")
					l := w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
					w.release(pool, w.acquire(pool, lease.Endpoint{MAC: mac(2), Name: "left"}))
					change(w)
					w.restart(time.Second)
					w.server.forget()
					do(w, pool, l)
					time.Sleep(2 * time.Minute) // > the release delay
					w.server.leased(t, addr("192.0.2.10"), addr("192.0.2.11"))
				})
			})
		}
	}
}

// A waiting lease whose successor can't be stored is still there.
func TestWaitingLeaseSurvivesAFailedGrant(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		anotherHost["machine id"](w)
		w.restart(time.Second)
		w.server.forget()
		w.store.before.set(failing("PutLease"))
		w.refused(pool, lease.Endpoint{MAC: mac(1), Name: "web"}, errDiskFull.Error())
		w.holds("192.0.2.10 waiting")
		w.server.saw(t, "1s acquire 02:00:00:00:00:01", "1s release 192.0.2.11")
	})
}

// When only the routing changes, the machine is the same, and so are its
// identities: the interface is still there. T1 30m < 31m.
func TestRoutingThatChanges(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		l := w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		w.release(pool, w.acquire(pool, lease.Endpoint{MAC: mac(2), Name: "left"}))
		host := w.store.host
		w.host.macs.set([]lease.MAC{mac(77), relayMAC})
		w.server.relayMAC.set(func() (lease.MAC, error) { return mac(77), nil })
		w.restart(time.Second)
		w.server.forget()
		time.Sleep(31 * time.Minute)
		w.server.saw(t, "31s release 192.0.2.11", "30m0s renew 192.0.2.10")
		w.has(w.acquire(pool, lease.Endpoint{MAC: mac(3), Name: "db"}), strings.Replace(string(l.ClientID), "web", "db", 1))
		if w.store.host != host {
			t.Errorf("the identity became %+v, was %+v", w.store.host, host)
		}
	})
}

// While the former interface isn't there and the relay address neither, nobody
// knows which host this is: nothing is sent, nothing decided. T1 30m, T2 52m30s.
func TestHostThatCannotBeTold(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		w.acquire(w.networkOf(), lease.Endpoint{MAC: mac(1), Name: "web"})
		w.host.macs.set(nil)
		w.server.relayMAC.set(func() (lease.MAC, error) { return lease.MAC{}, errors.New("no interface has 198.51.100.9") })
		w.restart(time.Second)
		w.server.forget()
		time.Sleep(40 * time.Minute)
		w.server.saw(t)
		w.holds("192.0.2.10 renewing")
		// It was only late: the next attempt, half of what is left, is it.
		w.host.macs.set([]lease.MAC{relayMAC})
		w.server.relayMAC.set(nil)
		time.Sleep(7 * time.Minute)
		w.server.saw(t, "41m15s renew 192.0.2.10")
		w.holds("192.0.2.10 bound")
	})
}

// An identity that can't be stored would be forgotten by the next start, and its
// leases would wait for nothing.
func TestHostIdentityThatCannotBeStored(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		w.store.before.set(failing("PutHost"))
		w.refused(w.networkOf("client_id=name"), lease.Endpoint{MAC: mac(1), Name: "web"}, "host's identity", errDiskFull.Error())
		w.has(w.acquire(w.networkOf(), lease.Endpoint{MAC: mac(1), Name: "web"}), byMACAddress(mac(1)))
		w.store.before.set(nil)
		w.has(w.acquire(w.networkOf(), lease.Endpoint{MAC: mac(2), Name: "web"}), w.named("web"))
	})
}

// from grants an address of any subnet.
func (s *dhcpServer) from(a string) func(context.Context, lease.Request) (lease.Lease, error) {
	return func(_ context.Context, r lease.Request) (lease.Lease, error) {
		if err := r.Accept(addr(a)); err != nil {
			return lease.Lease{}, err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.table[addr(a)] = string(r.ClientID)
		return s.lease(r, addr(a)), nil
	}
}

// slowly grants by the table after a time.
func (s *dhcpServer) slowly(after time.Duration) func(context.Context, lease.Request) (lease.Lease, error) {
	return func(ctx context.Context, r lease.Request) (lease.Lease, error) {
		select {
		case <-time.After(after):
			return s.grant(r)
		case <-ctx.Done():
			return lease.Lease{}, lease.ErrNoAnswer
		}
	}
}

// The host is found out by one request, which hangs: another has its own time,
// 30s, and no more.
func TestIdentityIsNotWaitedForLong(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		found := make(chan struct{})
		w.server.relayMAC.set(func() (lease.MAC, error) {
			<-found
			return relayMAC, nil
		})
		first := make(chan error)
		go func() {
			_, err := w.manager.Acquire(w.Context(), pool, ep(1, "web"))
			first <- err
		}()
		synctest.Wait()
		began := time.Now()
		_, err := w.manager.Acquire(w.Context(), pool, ep(2, "db"))
		if took := time.Since(began); took != timeout {
			w.Errorf("took %v, %v", took, err)
		}
		close(found)
		w.works(<-first)
	})
}
