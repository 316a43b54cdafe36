package lease_test

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

func TestAcquireStoresBeforeItAnswers(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.store.before.set(func(call string) error {
			if call == "PutLease" {
				time.Sleep(3 * time.Second)
			}
			return nil
		})
		began := time.Now()
		l := w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		if took := time.Since(began); took != 3*time.Second {
			t.Errorf("answered after %v: before the lease was stored", took)
		}
		if l.Prefix != netip.MustParsePrefix("192.0.2.10/24") {
			t.Errorf("granted %v: the prefix length must be the pool's", l.Prefix)
		}
		if l.Pool != pool || l.Name != "web" || l.MAC != mac(1) || !slices.Equal(l.ClientID, []byte{1, 2, 0, 0, 0, 0, 1}) {
			t.Errorf("granted %+v", l)
		}
		if stored := w.store.leases[lease.Key{pool, mac(1)}]; !same(stored, l) {
			t.Errorf("stored %+v", stored)
		}
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
	})
}

func TestHolderKeepsItsLease(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		first := w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		for _, name := range []string{"", "web", "web", ""} {
			time.Sleep(time.Minute)
			l := w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: name})
			if l.Prefix != first.Prefix || !l.Expires.Equal(first.Expires) {
				t.Errorf("got %v until %v, held %v until %v", l.Prefix, l.Expires, first.Prefix, first.Expires)
			}
		}
		// --ip of the address that it has is no other wish.
		w.acquire(pool, lease.Endpoint{MAC: mac(1), Address: first.Addr()})
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
		if held := w.manager.Leases(); held[0].Name != "web" {
			t.Errorf("its name is %q, want the one that came later", held[0].Name)
		}
		// Still kept alive.
		time.Sleep(26 * time.Minute)
		w.server.saw(t, "30m0s renew 192.0.2.10")
	})
}

func TestDuplicateMACIsRefused(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		w.refused(pool, lease.Endpoint{MAC: mac(1), Name: "db"}, mac(1).String(), "web", "192.0.2.10", "oam-docker-ipam release 192.0.2.10", "--mac-address")
		w.refused(pool, lease.Endpoint{MAC: mac(1), Name: "db", Address: addr("192.0.2.50")}, "web")
		w.holds("192.0.2.10 bound")
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
		// In another pool it is another endpoint, and the server knows better.
		_, err := w.manager.ReleaseByHand(w.Context(), "192.0.2.10", "")
		w.works(err)
		w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "db"})
	})
}

func TestNameCannotBeStored(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.store.before.set(failing("PutLease"))
		w.refused(pool, lease.Endpoint{MAC: mac(1), Name: "web"}, errDiskFull.Error())
		w.holds("192.0.2.10 bound")
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
	})
}

func TestAskedAddress(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool("192.0.2.0/26") // --ip-range, in which the gateway .1 is
		_, err := w.manager.Auxiliary(w.Context(), pool, addr("192.0.2.5"))
		w.works(err)
		w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")

		ask := func(n int, a string) lease.Endpoint { return lease.Endpoint{MAC: mac(n), Address: addr(a)} }
		w.refused(pool, ask(2, "198.51.100.7"), "198.51.100.7", "outside", "192.0.2.0/24")
		w.refused(pool, ask(2, "192.0.2.0"), "192.0.2.0", "network or broadcast")
		w.refused(pool, ask(2, "192.0.2.255"), "192.0.2.255", "network or broadcast")
		w.refused(pool, ask(2, "2001:db8::7"), "2001:db8::7", "outside")
		w.refused(pool, ask(2, "192.0.2.1"), "192.0.2.1", "gateway", "192.0.2.0/24")
		w.refused(pool, ask(2, "192.0.2.5"), "192.0.2.5", "auxiliary", "192.0.2.0/24")
		w.refused(pool, ask(2, "192.0.2.10"), "192.0.2.10", "web", mac(1).String(), "oam-docker-ipam release 192.0.2.10")
		w.server.saw(t) // none of these is the server's matter

		// Outside --ip-range only by name.
		if l := w.acquire(pool, ask(2, "192.0.2.100")); l.Addr() != addr("192.0.2.100") {
			t.Errorf("asked for .100, got %v", l.Addr())
		}
		w.server.saw(t, "0s acquire 02:00:00:00:00:02 192.0.2.100")
		if got := w.server.lastRequest().Pool; got.ID != pool || got.Gateway != addr("192.0.2.1") {
			t.Errorf("the request names pool %+v", got)
		}

		// The server has given it away, without our knowing.
		w.server.takes(addr("192.0.2.77"))
		w.refused(pool, ask(3, "192.0.2.77"), "192.0.2.77", "offers 192.0.2.11")
		w.server.saw(t, "0s acquire 02:00:00:00:00:03 192.0.2.77")
		w.holds("192.0.2.10 bound", "192.0.2.100 bound")
		w.server.leased(t, addr("192.0.2.10"), addr("192.0.2.77"), addr("192.0.2.100"))
	})
}

func TestOfferedAddressMustFitThePool(t *testing.T) {
	for offered, parts := range map[string][]string{
		"192.0.2.200":  {"192.0.2.200", "--ip-range 192.0.2.0/26"},
		"192.0.2.1":    {"192.0.2.1", "gateway", "192.0.2.0/24"},
		"192.0.2.5":    {"192.0.2.5", "auxiliary", "192.0.2.0/24"},
		"198.51.100.7": {"198.51.100.7", "outside", "192.0.2.0/24"},
		"192.0.2.0":    {"192.0.2.0", "network or broadcast"},
	} {
		t.Run(offered, func(t *testing.T) {
			inWorld(t, func(w *world) {
				pool := w.pool("192.0.2.0/26")
				_, err := w.manager.Auxiliary(w.Context(), pool, addr("192.0.2.5"))
				w.works(err)
				w.server.onAcquire.set(func(_ context.Context, r lease.Request) (lease.Lease, error) {
					r.Address = addr(offered)
					return w.server.grant(r)
				})
				w.refused(pool, lease.Endpoint{MAC: mac(1)}, parts...)
				w.holds()
				w.server.leased(t)
			})
		})
	}
}

// The release of its old address was lost, and it comes back with --ip.
func TestAnotherAddressReplacesTheOldOne(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		web := func(a string) lease.Endpoint { return lease.Endpoint{MAC: mac(1), Name: "web", Address: addr(a)} }
		w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		w.acquire(pool, lease.Endpoint{MAC: mac(2)})
		l := w.acquire(pool, web("192.0.2.50"))
		if l.Addr() != addr("192.0.2.50") {
			t.Errorf("got %v", l.Addr())
		}
		w.holds("192.0.2.11 bound", "192.0.2.50 bound")
		w.server.saw(t, "0s acquire 02:00:00:00:00:01", "0s acquire 02:00:00:00:00:02", "0s release 192.0.2.10", "0s acquire 02:00:00:00:00:01 192.0.2.50")

		// A wish that can't be met doesn't cost the lease.
		w.refused(pool, web("198.51.100.7"), "outside")
		w.refused(pool, web("192.0.2.1"), "gateway")
		w.refused(pool, web("192.0.2.11"), mac(2).String())
		w.holds("192.0.2.11 bound", "192.0.2.50 bound")
		w.server.saw(t)

		w.store.before.set(failing("DeleteLease"))
		w.refused(pool, web("192.0.2.60"), errDiskFull.Error())
		w.holds("192.0.2.11 bound", "192.0.2.50 bound")
		w.server.saw(t)
	})
}

// Without both names it may be another container that asks, and the address
// in use.
func TestAnotherAddressWithoutNames(t *testing.T) {
	for name, c := range map[string]struct{ holds, asks string }{
		"neither":      {},
		"the holder's": {holds: "web"},
		"the asker's":  {asks: "web"},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				pool := w.pool()
				w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: c.holds})
				w.server.saw(t, "0s acquire 02:00:00:00:00:01")
				other := lease.Endpoint{MAC: mac(1), Name: c.asks, Address: addr("192.0.2.50")}
				named := []string{c.holds, mac(1).String(), "192.0.2.10", "oam-docker-ipam release 192.0.2.10"}
				w.refused(pool, other, named...)
				w.holds("192.0.2.10 bound")
				w.server.saw(t)

				w.expire()
				w.refused(pool, other, named...)
				w.holds("192.0.2.10 lost")
				w.server.saw(t)
			})
		})
	}
}

func TestServerRefusesOrIsSilent(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.server.onAcquire.set(silentAcquire)
		began := time.Now()
		_, err := w.manager.Acquire(w.Context(), pool, lease.Endpoint{MAC: mac(1)})
		if !errors.Is(err, lease.ErrNoAnswer) || time.Since(began) != timeout {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		w.server.onAcquire.set(func(context.Context, lease.Request) (lease.Lease, error) { return lease.Lease{}, lease.ErrNAK })
		if _, err = w.manager.Acquire(w.Context(), pool, lease.Endpoint{MAC: mac(1)}); !errors.Is(err, lease.ErrNAK) {
			t.Errorf("error %v, want the NAK", err)
		}
		w.holds()
		w.server.saw(t, "0s acquire 02:00:00:00:00:01", "30s acquire 02:00:00:00:00:01")
	})
}

func TestCallerGoneBeforeTheACK(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.server.onAcquire.set(silentAcquire)
		ctx, cancel := context.WithTimeout(w.Context(), 5*time.Second)
		defer cancel()
		began := time.Now()
		_, err := w.manager.Acquire(ctx, pool, lease.Endpoint{MAC: mac(1)})
		w.fails(err)
		if took := time.Since(began); took != 5*time.Second {
			t.Errorf("returned after %v", took)
		}
		w.holds()
	})
}

func TestCallerGoneAfterTheACK(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		// Whenever the caller goes from the ACK on: the lease goes back.
		wish := ""
		for _, gone := range []string{"ACK", "PutLease"} {
			ctx, cancel := context.WithCancelCause(w.Context())
			leave := errors.New("the engine hung up")
			w.server.onAcquire.set(func(_ context.Context, r lease.Request) (lease.Lease, error) {
				defer func() {
					if gone == "ACK" {
						cancel(leave)
					}
				}()
				return w.server.grant(r)
			})
			w.store.before.set(func(call string) error {
				if call == gone {
					cancel(leave)
				}
				return nil
			})
			if _, err := w.manager.Acquire(ctx, pool, lease.Endpoint{MAC: mac(1)}); !errors.Is(err, leave) {
				t.Errorf("gone at %s: error %v", gone, err)
			}
			w.holds()
			w.server.saw(t, "0s acquire 02:00:00:00:00:01"+wish, "0s release 192.0.2.10")
			w.server.leased(t)
			wish = " 192.0.2.10" // what it had before
		}
	})
}

func TestLeaseThatCannotBeStoredGoesBack(t *testing.T) {
	for name, before := range map[string]func(string) error{
		"full for a moment": failing("PutLease"),
		"full":              failing("PutLease", "DeleteLease"),
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				pool := w.pool()
				w.acquire(pool, lease.Endpoint{MAC: mac(1)})
				w.server.saw(t, "0s acquire 02:00:00:00:00:01")
				w.store.before.set(before)
				w.refused(pool, lease.Endpoint{MAC: mac(2)}, "store the lease", errDiskFull.Error())
				w.holds("192.0.2.10 bound")
				w.server.saw(t, "0s acquire 02:00:00:00:00:02", "0s release 192.0.2.11")
				w.server.leased(t, addr("192.0.2.10"))
				w.store.before.set(nil)
				w.acquire(pool, lease.Endpoint{MAC: mac(2)})
				w.holds("192.0.2.10 bound", "192.0.2.11 bound")
			})
		})
	}
}

func TestFirstEndpointCannotBeStored(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.store.before.set(failing("PutPool"))
		w.refused(pool, lease.Endpoint{MAC: mac(1)}, "store the network", errDiskFull.Error())
		w.server.saw(t)

		// Every other endpoint leaves the pool as it is.
		w.store.before.set(nil)
		w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		time.Sleep(time.Second)
		w.store.before.set(failing("PutPool"))
		w.acquire(pool, lease.Endpoint{MAC: mac(2)})
	})
}

// gives makes the server hand out one address, whoever has it.
func (s *dhcpServer) gives(a netip.Addr) {
	s.onAcquire.set(func(_ context.Context, r lease.Request) (lease.Lease, error) {
		if err := r.Accept(a); err != nil {
			return lease.Lease{}, err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.table[a] = string(r.ClientID)
		return s.lease(r, a), nil
	})
}

func TestAddressGivenTwiceIsDeclined(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		other := w.pool()
		l := w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
		w.server.gives(l.Addr())
		w.refused(pool, lease.Endpoint{MAC: mac(2)}, "198.51.100.1", "twice", "192.0.2.10", "web", "oam-docker-ipam release 192.0.2.10")
		w.server.saw(t, "0s acquire 02:00:00:00:00:02", "0s decline 192.0.2.10")
		// Two networks of one subnet and server are one LAN.
		w.refused(other, lease.Endpoint{MAC: mac(2)}, "twice", "web")
		w.server.saw(t, "0s acquire 02:00:00:00:00:02", "0s decline 192.0.2.10")
		w.holds("192.0.2.10 bound")
	})
}

// Servers that back each other up are one authority for one network, whichever
// of them signs.
func TestAddressGivenTwiceByTwoServers(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		l := w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
		w.server.gives(l.Addr())
		w.server.id.set(addr("198.51.100.2"))
		w.refused(pool, lease.Endpoint{MAC: mac(2)}, "twice", "web")
		w.server.saw(t, "0s acquire 02:00:00:00:00:02", "0s decline 192.0.2.10")
		w.holds("192.0.2.10 bound")
	})
}

// On links that don't meet, two servers may use the same addresses.
func TestSameAddressFromAnotherServerInAnotherPool(t *testing.T) {
	inWorld(t, func(w *world) {
		pool, other := w.pool(), w.pool()
		l := w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.server.gives(l.Addr())
		w.server.id.set(addr("198.51.100.2"))
		w.acquire(other, lease.Endpoint{MAC: mac(2)})
		w.holds("192.0.2.10 bound", "192.0.2.10 bound")

		_, err := w.manager.ReleaseByHand(w.Context(), "192.0.2.10", "")
		w.fails(err, "several", pool, other, mac(1).String(), mac(2).String(), "--pool")
		w.holds("192.0.2.10 bound", "192.0.2.10 bound")
		got, err := w.manager.ReleaseByHand(w.Context(), "192.0.2.10", other)
		w.works(err)
		if got.MAC != mac(2) {
			t.Errorf("released %v", got)
		}
		w.holds("192.0.2.10 bound")
	})
}

// Behind each of two interfaces is a LAN: two home routers may well be alike, in
// address and in what they lease.
func TestSameAddressOnAnotherInterface(t *testing.T) {
	inWorldOf(t, lease.Options{ClientID: lease.ClientIDMAC, Interface: "eth0"}, func(w *world) {
		pool, other := w.networkOf(), w.networkOf("dhcp_interface=eth1")
		same, relayed := w.networkOf("dhcp_interface=eth0"), w.networkOf("dhcp_server=198.51.100.1")
		l := w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
		w.server.gives(l.Addr())
		for _, pool := range []string{same, relayed} {
			w.refused(pool, lease.Endpoint{MAC: mac(2)}, "twice", "192.0.2.10", "web")
		}
		// Two interfaces on one LAN have one server.
		w.refused(other, lease.Endpoint{MAC: mac(2)}, "twice", "192.0.2.10", "web")
		w.server.station.set(mac(99))
		w.acquire(other, lease.Endpoint{MAC: mac(2)})
		w.holds("192.0.2.10 bound", "192.0.2.10 bound")
		w.refused(other, lease.Endpoint{MAC: mac(3)}, "twice", mac(2).String())
	})
}

// network adds a pool of any subnet and returns its ID.
func (w *world) network(subnet, servers string) string {
	w.Helper()
	p, err := lease.NewPool(subnet, "", map[string]string{"dhcp_server": servers})
	if err != nil {
		w.Fatal(err)
	}
	w.server.onProbe.set(failingProbe(lease.ErrNoAnswer))
	defer w.server.onProbe.set(nil)
	if p, err = w.manager.AddPool(w.Context(), p); err != nil {
		w.Fatal(err)
	}
	w.server.forget()
	return p.ID
}

// A server keys leases on the client identifier: the same MAC in two networks
// of one subnet would get one lease, which the one could give back under the
// other. Which subnet the server serves is not known before it answers, and
// neither is which servers are one.
func TestSameMACInOverlappingNetworks(t *testing.T) {
	for name, c := range map[string]struct{ first, second, servers string }{
		"one subnet":                 {"192.0.2.0/24", "192.0.2.0/24", ""},
		"a wider one":                {"192.0.2.0/24", "192.0.0.0/16", ""},
		"a narrower one":             {"192.0.0.0/16", "192.0.2.0/24", ""},
		"one subnet, another server": {"192.0.2.0/24", "192.0.2.0/24", "dhcp.example"},
		"a wider one, another":       {"192.0.2.0/24", "192.0.0.0/16", "203.0.113.1,203.0.113.2"},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				pool, other := w.network(c.first, ""), w.network(c.second, c.servers)
				w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
				w.server.saw(t, "0s acquire 02:00:00:00:00:01")
				refused := func() {
					t.Helper()
					for _, a := range []netip.Addr{{}, addr("192.0.2.10"), addr("192.0.2.50")} {
						w.refused(other, lease.Endpoint{MAC: mac(1), Name: "web", Address: a},
							c.first, "web", mac(1).String(), "192.0.2.10", "oam-docker-ipam release 192.0.2.10")
					}
					w.server.saw(t) // is not asked
				}
				refused()
				w.expire()
				refused()
				w.holds("192.0.2.10 lost")
				w.restart(0)
				w.server.forget()
				refused()

				_, err := w.manager.ReleaseByHand(w.Context(), "192.0.2.10", "")
				w.works(err)
				w.acquire(other, lease.Endpoint{MAC: mac(1), Name: "web"})
				w.holds("192.0.2.10 bound")
			})
		})
	}
	t.Run("apart", func(t *testing.T) {
		inWorld(t, func(w *world) {
			pool, other := w.network("192.0.2.0/25", ""), w.network("192.0.2.128/25", "")
			w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
			w.acquire(other, lease.Endpoint{MAC: mac(1), Name: "web", Address: addr("192.0.2.200")})
			w.holds("192.0.2.10 bound", "192.0.2.200 bound")
		})
	})
}

// expire lets the leases end at a silent server, which then has none of them.
func (w *world) expire() {
	w.Helper()
	w.server.down()
	time.Sleep(w.server.length.get() + time.Second)
	synctest.Wait()
	w.server.up()
	w.server.mu.Lock()
	w.server.seen = nil
	clear(w.server.table)
	w.server.mu.Unlock()
}

// An expired lease may still be its container's address: nobody else gets it
// before it is released.
func TestExpiredHolderIsNotReplaced(t *testing.T) {
	for name, subnet := range map[string]string{
		"in its network": "", "in another network": "192.0.2.0/24", "in a wider network": "192.0.0.0/16",
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				pool := w.network("192.0.2.0/24", "")
				other := pool
				if subnet != "" {
					other = w.network(subnet, "dhcp.example")
				}
				w.acquire(pool, lease.Endpoint{MAC: mac(1), Name: "web"})
				w.expire()
				w.refused(other, lease.Endpoint{MAC: mac(2), Name: "db"}, "198.51.100.1", "twice",
					"192.0.2.10", "web", mac(1).String(), "oam-docker-ipam release 192.0.2.10")
				// The server is heard again: the holder asks at once.
				w.server.sawInAnyOrder(t, "1h0m1s acquire 02:00:00:00:00:02", "1h0m1s confirm 192.0.2.10", "1h0m1s decline 192.0.2.10")
				w.server.leased(t)
				w.holds("192.0.2.10 lost")
				w.agree()

				// Neither does it by way of a restart, and it stays its
				// holder's to regain.
				w.restart(0)
				time.Sleep(time.Second)
				w.server.saw(t, "1h0m1s confirm 192.0.2.10", "1h0m2s acquire 02:00:00:00:00:01 192.0.2.10")
				w.holds("192.0.2.10 bound")
				w.expire()
				w.server.gives(addr("192.0.2.11"))
				w.acquire(other, lease.Endpoint{MAC: mac(2), Name: "db"})
				w.server.forget()
				w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.10")))
				w.server.leased(t, addr("192.0.2.11"))
				w.holds("192.0.2.11 bound")

				w.server.gives(addr("192.0.2.10"))
				w.acquire(other, lease.Endpoint{MAC: mac(3)})
				w.holds("192.0.2.10 bound", "192.0.2.11 bound")
				w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.200"))) // late, and another's
				w.server.leased(t, addr("192.0.2.10"), addr("192.0.2.11"))
			})
		})
	}
}

// What an expired holder gives back while a server has the address for another
// is its own lease, at its own server.
func TestExpiredHolderGivesBackItsOwn(t *testing.T) {
	for name, forget := range map[string]func(w *world, pool string) error{
		"released": func(w *world, pool string) error { return w.manager.Release(w.Context(), pool, addr("192.0.2.10")) },
		"removed":  func(w *world, pool string) error { return w.manager.RemovePool(w.Context(), pool) },
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				pool, other := w.pool(), w.pool()
				w.acquire(pool, lease.Endpoint{MAC: mac(1)})
				w.expire()
				// On a link that doesn't meet the first one's.
				w.server.id.set(addr("198.51.100.2"))
				l := w.acquire(other, lease.Endpoint{MAC: mac(2)})
				if l.Addr() != addr("192.0.2.10") {
					t.Fatalf("granted %v", l.Addr())
				}
				w.server.forget()
				w.works(forget(w, pool))
				w.server.saw(t, "1h0m1s release 192.0.2.10")
				w.server.leased(t, addr("192.0.2.10"))
				w.holds("192.0.2.10 bound")
			})
		})
	}
}

func TestExpiredHolderComesBack(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		first := w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.expire()
		// Its own address is asked for, under its own identity.
		w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.server.saw(t, "1h0m1s confirm 192.0.2.10", "1h0m2s acquire 02:00:00:00:00:01 192.0.2.10")
		if r := w.server.lastRequest(); !slices.Equal(r.ClientID, first.ClientID) {
			t.Errorf("client ID %x, was %x", r.ClientID, first.ClientID)
		}
		// Another one will do.
		w.expire()
		w.server.takes(addr("192.0.2.10"))
		if l := w.acquire(pool, lease.Endpoint{MAC: mac(1)}); l.Addr() != addr("192.0.2.11") {
			t.Errorf("granted %v", l.Addr())
		}
		w.holds("192.0.2.11 bound")
		w.agree()
		w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.10"))) // late
		w.holds("192.0.2.11 bound")
	})
}

// What a failed grant replaces in memory is still on disk, and would come back
// with the next start.
func TestExpiredLeaseSurvivesAFailedGrant(t *testing.T) {
	for name, before := range map[string]func(string) error{
		"disk full":     failing("PutLease", "DeleteLease"),
		"for the grant": failing("PutLease"),
	} {
		for _, given := range []string{"192.0.2.10", "192.0.2.11"} {
			t.Run(name+", given "+given, func(t *testing.T) {
				inWorld(t, func(w *world) {
					pool := w.pool()
					w.acquire(pool, lease.Endpoint{MAC: mac(1)})
					w.expire()
					w.server.gives(addr(given))
					w.store.before.set(before)
					w.refused(pool, lease.Endpoint{MAC: mac(1)}, "store the lease", errDiskFull.Error())
					// Its server was heard: it is asked for again.
					w.server.saw(t, "1h0m1s confirm 192.0.2.10", "1h0m2s acquire 02:00:00:00:00:01 192.0.2.10", "1h0m2s release "+given,
						"1h0m2s confirm 192.0.2.10")
					w.holds("192.0.2.10 lost")
					w.agree()
					w.store.before.set(nil)
					w.server.onAcquire.set(nil)
					time.Sleep(2 * time.Minute)
					w.holds("192.0.2.10 bound")
					w.server.leased(t, addr("192.0.2.10"))
				})
			})
		}
	}
}

// Also when the network is about to be removed, and then isn't.
func TestExpiredLeaseSurvivesAFailedRemoval(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.expire()
		w.server.onAcquire.set(func(_ context.Context, r lease.Request) (lease.Lease, error) {
			time.Sleep(time.Second)
			return w.server.grant(r)
		})
		w.store.before.set(failing("PutLease", "DeletePool"))
		removed := make(chan error)
		time.AfterFunc(500*time.Millisecond, func() { removed <- w.manager.RemovePool(w.Context(), pool) })
		w.refused(pool, lease.Endpoint{MAC: mac(1)}, "store the lease", errDiskFull.Error())
		w.fails(<-removed, errDiskFull.Error())
		w.holds("192.0.2.10 lost")
		w.agree()
		w.store.before.set(nil)
		time.Sleep(2 * time.Minute)
		w.holds("192.0.2.10 bound")
	})
}

func TestRelease(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		l := w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
		for range 3 {
			w.works(w.manager.Release(w.Context(), pool, l.Addr()))
		}
		w.server.saw(t, "0s release 192.0.2.10")
		w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.1"))) // the gateway, never requested
		w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.200")))
		w.works(w.manager.Release(w.Context(), pool, netip.Addr{}))
		w.works(w.manager.Release(w.Context(), "unknown", addr("192.0.2.10")))
		w.works(w.manager.Release(w.Context(), "192.0.2.0", addr("192.0.2.10")))
		w.holds()
		time.Sleep(24 * time.Hour)
		w.server.saw(t)
	})
}

func TestReleaseOutlivesItsCaller(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		l := w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		ctx, cancel := context.WithCancel(w.Context())
		cancel()
		w.works(w.manager.Release(ctx, pool, l.Addr()))
		w.holds()
		w.server.leased(t)
	})
}

func TestReleaseThatCannotBeSent(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		l := w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.server.onRelease.set(func() error { return errors.New("network is unreachable") })
		w.works(w.manager.Release(w.Context(), pool, l.Addr()))
		w.holds()
		if !strings.Contains(w.log.String(), "network is unreachable") {
			t.Error("not a word of it in the log")
		}
	})
}

func TestReleaseThatCannotBeStored(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		l := w.acquire(pool, lease.Endpoint{MAC: mac(1)})
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
		w.store.before.set(failing("DeleteLease"))
		w.fails(w.manager.Release(w.Context(), pool, l.Addr()), "192.0.2.10", errDiskFull.Error())
		w.holds("192.0.2.10 bound")
		w.server.saw(t) // still ours
		time.Sleep(31 * time.Minute)
		w.server.saw(t, "30m0s renew 192.0.2.10")
		w.store.before.set(nil)
		w.works(w.manager.Release(w.Context(), pool, l.Addr()))
		w.server.saw(t, "31m0s release 192.0.2.10")
	})
}

func TestReleaseByHand(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		for n := range 3 {
			w.acquire(pool, lease.Endpoint{MAC: mac(n + 1)})
		}
		l, err := w.manager.ReleaseByHand(w.Context(), "192.0.2.11", "")
		w.works(err)
		if l.MAC != mac(2) {
			t.Errorf("released %v", l)
		}
		_, err = w.manager.ReleaseByHand(w.Context(), "02-00-00-00-00-03", pool)
		w.works(err)
		w.holds("192.0.2.10 bound")
		for _, key := range []string{"192.0.2.11", mac(3).String(), "2001:db8::1"} {
			if _, err := w.manager.ReleaseByHand(w.Context(), key, ""); !errors.Is(err, lease.ErrNoLease) || !strings.Contains(err.Error(), key) {
				t.Errorf("%s: %v", key, err)
			}
		}
		if _, err := w.manager.ReleaseByHand(w.Context(), "192.0.2.10", "another pool"); !errors.Is(err, lease.ErrNoLease) {
			t.Error(err)
		}
		for _, key := range []string{"", "web", "192.0.2.0/24"} {
			_, err := w.manager.ReleaseByHand(w.Context(), key, "")
			w.fails(err, "neither")
		}
		w.holds("192.0.2.10 bound")
	})
}

func TestLeasesAreSorted(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		for n, a := range []string{"192.0.2.100", "192.0.2.9", "192.0.2.20"} {
			w.acquire(pool, lease.Endpoint{MAC: mac(n + 1), Address: addr(a)})
		}
		w.holds("192.0.2.9 bound", "192.0.2.20 bound", "192.0.2.100 bound")
		for _, h := range w.manager.Leases() {
			if h.Subnet != netip.MustParsePrefix("192.0.2.0/24") {
				t.Errorf("subnet %v", h.Subnet)
			}
		}
	})
}

// What happens to one MAC happens in turn.
func TestRequestsOfOneMACTakeTurns(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.server.onAcquire.set(func(_ context.Context, r lease.Request) (lease.Lease, error) {
			time.Sleep(2 * time.Second)
			return w.server.grant(r)
		})
		addrs := make(chan netip.Addr, 5)
		for range 5 {
			go func() {
				l, err := w.manager.Acquire(w.Context(), pool, lease.Endpoint{MAC: mac(1)})
				w.works(err)
				addrs <- l.Addr()
			}()
		}
		for range 5 {
			if a := <-addrs; a != addr("192.0.2.10") {
				t.Errorf("got %v", a)
			}
		}
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")

		// Another MAC doesn't wait for it; who waits in vain is told.
		w.server.onAcquire.set(silentAcquire)
		go func() { _, _ = w.manager.Acquire(w.Context(), pool, lease.Endpoint{MAC: mac(2)}) }()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(w.Context(), time.Second)
		defer cancel()
		_, err := w.manager.Acquire(ctx, pool, lease.Endpoint{MAC: mac(2)})
		w.fails(err, "wait for another request", mac(2).String())
		w.server.onAcquire.set(nil)
		w.acquire(pool, lease.Endpoint{MAC: mac(3)})
		time.Sleep(timeout)
	})
}

// Two networks that ask at once for one MAC find nothing held. To the server
// it is one client, whose lease the loser must not decline.
func TestSameMACInTwoNetworksAtOnce(t *testing.T) {
	inWorld(t, func(w *world) {
		pool, other := w.pool(), w.pool()
		w.server.onAcquire.set(func(_ context.Context, r lease.Request) (lease.Lease, error) {
			time.Sleep(time.Second)
			return w.server.grant(r)
		})
		errs := make(chan error)
		for _, id := range []string{pool, other} {
			go func() {
				_, err := w.manager.Acquire(w.Context(), id, lease.Endpoint{MAC: mac(1), Name: "web"})
				errs <- err
			}()
		}
		first, second := <-errs, <-errs
		if (first == nil) == (second == nil) {
			t.Errorf("%v and %v, want one to be granted", first, second)
		}
		w.fails(errors.Join(first, second), "192.0.2.10", "web", mac(1).String())
		// The second one waits for the identity, and then finds it taken.
		w.server.saw(t, "0s acquire 02:00:00:00:00:01")
		w.server.leased(t, addr("192.0.2.10"))
		w.holds("192.0.2.10 bound")
	})
}
