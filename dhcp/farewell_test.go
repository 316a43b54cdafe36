package dhcp

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

type farewellCall func(*Client, context.Context, lease.Pool, lease.Lease) error

var farewellCalls = map[string]farewellCall{"release": (*Client).Release, "decline": (*Client).Decline}

// Farewells: one message each, to the lease's server, whatever is configured
// meanwhile, and no wait.
func TestFarewell(t *testing.T) {
	for name, call := range farewellCalls {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				c := l.client(server2)
				if err := call(c, t.Context(), home, held(server1)); err != nil {
					t.Fatal(err)
				}
				if m := l.log(); len(m) != 1 || m[0].to != server1 || m[0].addr(54) != server1.Addr() {
					t.Errorf("sent %v", l.kinds())
				}
				if took := time.Since(l.began); took != 0 {
					t.Errorf("took %s", took)
				}
			})
		})
	}
}

// A crowd of farewells leaves at a pace that servers can follow, and says so
// where its time doesn't allow that.
func TestFarewellsInACrowd(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client(server1)
		for range farewellBurst + 10 {
			if err := c.Release(t.Context(), home, held(server1)); err != nil {
				t.Fatal(err)
			}
		}
		if took, want := time.Since(l.began), 10*farewellSpacing; took != want {
			t.Errorf("%d releases took %s, want %s", farewellBurst+10, took, want)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := c.Release(ctx, home, held(server1)); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
		if m := l.log(); len(m) != farewellBurst+10 {
			t.Errorf("%d releases were sent", len(m))
		}
	})
}

// A client that comes back at once waits until its server has surely read its
// farewell; nobody else does.
func TestRestAfterAFarewell(t *testing.T) {
	acquire := func(c *Client, l lease.Lease) error {
		_, err := c.Acquire(context.Background(), lease.Request{Pool: home, MAC: l.MAC, ClientID: l.ClientID, Accept: anyAddr})
		return err
	}
	confirm := func(c *Client, l lease.Lease) error {
		_, err := c.Confirm(context.Background(), home, l)
		return err
	}
	for name, farewell := range farewellCalls {
		for after, speak := range map[string]func(*Client, lease.Lease) error{"acquire": acquire, "confirm": confirm} {
			for _, away := range []time.Duration{0, farewellRest / 4, farewellRest, time.Hour} {
				t.Run(name+", "+after+" after "+away.String(), func(t *testing.T) {
					bubble(t, func(t *testing.T, l *lan) {
						server := newDHCPD(server1)
						l.attach(server)
						c := l.client(server1)
						left, other := held(server1), returning()
						left.Prefix, other.Prefix = netip.PrefixFrom(server.addrOf(left.MAC), 24), netip.PrefixFrom(server.addrOf(other.MAC), 24)
						if err := farewell(c, t.Context(), home, left); err != nil {
							t.Fatal(err)
						}
						time.Sleep(away)
						for _, who := range []lease.Lease{other, left} {
							due, sent := time.Since(l.began), len(l.log())
							if who.MAC == left.MAC {
								due = max(due, farewellRest)
							}
							if err := speak(c, who); err != nil {
								t.Fatal(err)
							}
							if at := l.log()[sent].at; at != due {
								t.Errorf("%v spoke at %s, want %s", who.MAC, at, due)
							}
						}
					})
				})
			}
		}
	}
}

// Also what an exchange gives back by itself is a release: of an ACK that never
// came.
func TestRestAfterAnExchangeGaveBack(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.serve = func(m sent) {
			if m.kind() == request && len(l.log(release)) == 0 {
				return
			}
			if b := server.answer(m.packet); b != nil {
				l.reply(m, time.Millisecond, server1, b)
			}
		}
		if _, err := l.client(server1).Acquire(within(t, usual), want(home, mac1)); err != nil {
			t.Fatal(err)
		}
		checkKinds(t, l, discover, request, request, request, request, release, discover, request)
		m := l.log()
		if rest := m[6].at - m[5].at; rest != farewellRest {
			t.Errorf("spoke again after %s", rest)
		}
	})
}

// What is remembered of farewells doesn't grow.
func TestFarewellsAreForgotten(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client(server1)
		for n := range 1000 {
			gone := held(server1)
			gone.ClientID = binary.BigEndian.AppendUint32([]byte{0}, uint32(n))
			if err := c.Release(t.Context(), home, gone); err != nil {
				t.Fatal(err)
			}
			if most, known := farewellBurst+int(farewellRest/farewellSpacing)+1, c.farewells.known(); known > most {
				t.Fatalf("after %d releases %d are remembered, want at most %d", n+1, known, most)
			}
		}
		time.Sleep(farewellRest)
		synctest.Wait()
		if known := c.farewells.known(); known != 0 {
			t.Errorf("in the end %d are remembered", known)
		}
	})
}

func (f *farewells) known() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.last)
}

// A client that comes back while its farewell waits for its turn in a crowd
// speaks after it: before it, the server would free what it has just leased.
func TestRestWhileAFarewellWaits(t *testing.T) {
	for name, farewell := range farewellCalls {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				server := newDHCPD(server1)
				l.attach(server)
				c := l.client(server1)
				defer crowd(t, c, farewellBurst+20)()
				left := held(server1)
				var wg sync.WaitGroup
				wg.Go(func() {
					if err := farewell(c, t.Context(), home, left); err != nil {
						t.Error(err)
					}
				})
				synctest.Wait()
				if _, err := c.Acquire(t.Context(), lease.Request{Pool: home, MAC: left.MAC, ClientID: left.ClientID, Accept: anyAddr}); err != nil {
					t.Fatal(err)
				}
				wg.Wait()
				m := l.log()
				last := farewellBurst + 20
				if k := m[last].kind(); k != release && k != decline || m[last].at != 21*farewellSpacing {
					t.Errorf("%v at %s", k, m[last].at)
				}
				if rest := m[last+1].at - m[last].at; m[last+1].kind() != discover || rest != farewellRest {
					t.Errorf("%v after %s", m[last+1].kind(), rest)
				}
			})
		})
	}
}

// Two farewells of one client wait for their turns, as when it was on two
// networks of the subnet: it speaks after the second.
func TestRestAfterTheLastFarewell(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.attach(server)
		c := l.client(server1)
		left := held(server1)
		var wg sync.WaitGroup
		defer wg.Wait()
		say := func() {
			wg.Go(func() {
				if err := c.Release(t.Context(), home, left); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		defer crowd(t, c, farewellBurst)()
		say()
		defer crowd(t, c, 2*int(farewellRest/farewellSpacing))()
		say()
		time.Sleep(2 * farewellSpacing) // the first one has left
		if _, err := c.Acquire(t.Context(), lease.Request{Pool: home, MAC: left.MAC, ClientID: left.ClientID, Accept: anyAddr}); err != nil {
			t.Fatal(err)
		}
		last := farewellSpacing + 2*farewellRest + farewellSpacing
		if m := l.log(discover); len(m) != 1 || m[0].at != last+farewellRest {
			t.Errorf("spoke at %s, its last farewell left at %s", m[0].at, last)
		}
	})
}

// A farewell while its client rests after another one: the rest begins anew.
func TestFarewellDuringARest(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.attach(server)
		c := l.client(server1)
		left := held(server1)
		say := func() {
			if err := c.Release(t.Context(), home, left); err != nil {
				t.Error(err)
			}
		}
		say()
		time.AfterFunc(farewellRest/2, say)
		if _, err := c.Acquire(t.Context(), lease.Request{Pool: home, MAC: left.MAC, ClientID: left.ClientID, Accept: anyAddr}); err != nil {
			t.Fatal(err)
		}
		if m := l.log(discover); len(m) != 1 || m[0].at != farewellRest*3/2 {
			t.Errorf("spoke at %s", m[0].at)
		}
	})
}

// A farewell whose caller doesn't wait for its turn holds nobody up.
func TestFarewellThatDoesNotWait(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.attach(server)
		c := l.client(server1)
		defer crowd(t, c, farewellBurst+20)()
		ctx, cancel := context.WithTimeout(t.Context(), farewellSpacing)
		defer cancel()
		left := held(server1)
		if err := c.Release(ctx, home, left); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("error %v", err)
		}
		sent := len(l.log())
		if _, err := c.Acquire(t.Context(), lease.Request{Pool: home, MAC: left.MAC, ClientID: left.ClientID, Accept: anyAddr}); err != nil {
			t.Fatal(err)
		}
		if at := l.log()[sent].at; at != farewellSpacing {
			t.Errorf("spoke at %s", at)
		}
		// Nor does it use up its turn.
		if err := c.Release(t.Context(), home, returning()); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(l.began); took != 21*farewellSpacing {
			t.Errorf("the next one left at %s", took)
		}
	})
}

// What exchanges give back by themselves keeps the pace too, also when all of
// their callers went at once.
func TestGivenBackInACrowd(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.serve = func(m sent) {
			if m.kind() == discover {
				l.reply(m, time.Millisecond, server1, server.answer(m.packet))
			}
		}
		c := l.client(server1)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for n := range farewellBurst + 20 {
			wg.Go(func() {
				if _, err := c.Acquire(ctx, want(home, lease.MAC{2, 0, 0, 0, 0, byte(n)})); err == nil {
					t.Error("got a lease without an ACK")
				}
			})
		}
		time.Sleep(10 * time.Millisecond)
		cancel()
		began := time.Since(l.began)
		wg.Wait()
		m := l.log(release)
		if len(m) != farewellBurst+20 {
			t.Fatalf("%d releases", len(m))
		}
		if took := m[len(m)-1].at - began; took != 20*farewellSpacing {
			t.Errorf("they left within %s", took)
		}
	})
}

// crowd has n other clients say farewell at the same time. It returns a function
// that waits until they all have.
func crowd(t *testing.T, c *Client, n int) (wait func()) {
	t.Helper()
	var wg sync.WaitGroup
	for n := range n {
		wg.Go(func() {
			gone := held(server1)
			gone.ClientID = binary.BigEndian.AppendUint32([]byte{0}, uint32(n))
			if err := c.Release(t.Context(), home, gone); err != nil {
				t.Error(err)
			}
		})
	}
	synctest.Wait()
	return wg.Wait
}
