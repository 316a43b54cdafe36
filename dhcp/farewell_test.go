package dhcp

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"
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

// What is remembered of farewells is bounded by their pace.
func TestFarewellsAreForgotten(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client(server1)
		for n := range 1000 {
			gone := held(server1)
			gone.ClientID = binary.BigEndian.AppendUint32([]byte{0}, uint32(n))
			if err := c.Release(t.Context(), home, gone); err != nil {
				t.Fatal(err)
			}
			if most, known := farewellBurst+int(farewellRest/farewellSpacing)+1, len(c.farewells.last); known > most {
				t.Fatalf("after %d releases %d are remembered, want at most %d", n+1, known, most)
			}
		}
	})
}
