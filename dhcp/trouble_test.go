package dhcp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// A server that offers and then falls silent: the ACK may be what was lost, so
// the address is released before anything else is tried.
func TestRequestUnanswered(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.serve = func(m sent) {
			b := server.answer(m.packet)
			if b != nil && (m.kind() == discover || len(l.log(request)) > requestTries) {
				l.reply(m, time.Millisecond, server1, b)
			}
		}
		got, err := l.client(server1).Acquire(within(t, usual), want(away, mac1))
		if err != nil {
			t.Fatal(err)
		}
		checkKinds(t, l, discover, request, request, request, request, release, discover, request)
		sent := l.log()
		r := sent[5]
		if r.ciaddr != leasedAddr || r.addr(54) != server1.Addr() || r.to != server1 || !bytes.Equal(r.get(82), sent[0].get(82)) || !bytes.Equal(r.get(61), sent[0].get(61)) {
			t.Errorf("RELEASE of %s, server %s, to %s, option 82 % x", r.ciaddr, r.addr(54), r.to, r.get(82))
		}
		if sent[6].xid == sent[0].xid {
			t.Error("the new exchange has the old xid")
		}
		// RFC 2131 section 2: secs counts from the acquisition's beginning.
		if sent[6].secs != uint16(sent[6].at/time.Second) || sent[6].secs < 5 {
			t.Errorf("secs %d at %s", sent[6].secs, sent[6].at)
		}
		if server.leased() != 1 || got.Addr() != leasedAddr {
			t.Errorf("%d leased", server.leased())
		}
	})
}

// The deadline passes while an ACK is awaited: nothing stays leased.
func TestTimeoutAfterRequest(t *testing.T) {
	for name, script := range map[string]func(*dhcpd, sent) []byte{
		"ACK lost": func(s *dhcpd, m sent) []byte {
			b := s.answer(m.packet)
			if m.kind() == request {
				return nil
			}
			return b
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				server := newDHCPD(server1)
				l.serve = func(m sent) {
					if b := script(server, m); b != nil {
						l.reply(m, time.Millisecond, server1, b)
					}
				}
				_, err := l.client(server1).Acquire(within(t, 3*time.Second), want(home, mac1))
				checkError(t, err, "DHCP server 10.10.0.1 offered an address and then fell silent")
				sent := l.log()
				if last := sent[len(sent)-1]; last.kind() != release || last.at != 3*time.Second {
					t.Errorf("last is type %d at %s, want a RELEASE at the end", last.kind(), last.at)
				}
				if server.leased() != 0 {
					t.Error("the address stays leased")
				}
			})
		})
	}
}

// An address that an endpoint uses is never released, whatever becomes of the
// attempt to regain it: the server could give it to another.
func TestAddressInUseIsNeverReleased(t *testing.T) {
	for name, c := range map[string]struct {
		cancel time.Duration // 0: none
		acks   bool          // from the second exchange on
		kinds  []byte        // sent when the address is not in use
	}{
		"ACK lost":            {0, true, []byte{discover, request, request, request, request, release, discover, request}},
		"first REQUEST":       {10 * time.Millisecond, false, []byte{discover, request, release}},
		"later REQUEST":       {600 * time.Millisecond, false, nil},
		"after some attempts": {20 * time.Second, false, nil},
	} {
		for _, inUse := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, in use %t", name, inUse), func(t *testing.T) {
				bubble(t, func(t *testing.T, l *lan) {
					server := newDHCPD(server1)
					l.serve = func(m sent) {
						b := server.answer(m.packet)
						if b != nil && (m.kind() == discover || c.acks && len(l.log(discover)) > 1) {
							l.reply(m, time.Millisecond, server1, b)
						}
					}
					ctx, cancel := context.WithCancel(within(t, usual))
					defer cancel()
					if c.cancel > 0 {
						time.AfterFunc(c.cancel, cancel)
					}
					req := want(home, mac1)
					req.Address, req.InUse, req.Accept = leasedAddr, inUse, only(leasedAddr)
					_, err := l.client(server1).Acquire(ctx, req)
					if c.acks && err != nil {
						t.Error(err)
					}
					if !c.acks {
						checkError(t, err, "fell silent")
					}
					if c.kinds != nil {
						kinds := slices.Clone(c.kinds)
						if inUse {
							kinds = slices.DeleteFunc(kinds, func(k byte) bool { return k == release })
						}
						checkKinds(t, l, kinds...)
					}
					if n := len(l.log(release)); (n == 0) != inUse {
						t.Errorf("%d times released: sent %v", n, l.kinds())
					}
					if left := server.leased(); (left == 1) != (inUse || c.acks) {
						t.Errorf("%d leased at the end", left)
					}
				})
			})
		}
	}
}

// A caller that goes is obeyed at once, at whatever stage, and leaves nothing
// leased.
func TestCancel(t *testing.T) {
	type stage struct {
		name     string
		at       time.Duration
		answer   func(s *dhcpd, m sent) []byte
		released bool
	}
	noAnswer := func(*dhcpd, sent) []byte { return nil }
	onlyOffers := func(s *dhcpd, m sent) []byte {
		b := s.answer(m.packet)
		if m.kind() != discover {
			return nil
		}
		return b
	}
	refuses := func(s *dhcpd, m sent) []byte {
		if m.kind() == request {
			return refuse(m.packet, s.id)
		}
		return s.answer(m.packet)
	}
	for _, c := range []stage{
		{"before the start", 0, noAnswer, false},
		{"first DISCOVER", 10 * time.Millisecond, noAnswer, false},
		{"later DISCOVER", 5 * time.Second, noAnswer, false},
		{"first REQUEST", 10 * time.Millisecond, onlyOffers, true},
		{"later REQUEST", 2500 * time.Millisecond, onlyOffers, true},
		{"pause after a NAK", 30 * time.Millisecond, refuses, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				server := newDHCPD(server1)
				l.serve = func(m sent) {
					if b := c.answer(server, m); b != nil {
						l.reply(m, time.Millisecond, server1, b)
					}
				}
				ctx, cancel := context.WithCancel(t.Context())
				if c.at == 0 {
					cancel()
				}
				time.AfterFunc(c.at, cancel)
				_, err := l.client(server1).Acquire(ctx, want(home, mac1))
				if err == nil {
					t.Fatal("no error")
				}
				if took := time.Since(l.began); took != c.at {
					t.Errorf("took %s, cancelled after %s", took, c.at)
				}
				if got := len(l.log(release)) == 1; got != c.released {
					t.Errorf("sent %v: RELEASE %t, want %t", l.kinds(), got, c.released)
				}
				if server.leased() != 0 {
					t.Error("something stays leased")
				}
				n := len(l.log())
				time.Sleep(time.Minute)
				if len(l.log()) != n {
					t.Error("messages after the end")
				}
			})
		})
	}
}

// Hostile packets by the thousand, made of the right replies, don't disturb an
// exchange.
func TestFloodDuringExchange(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		rng := rand.New(rand.NewPCG(1, 2))
		flood := func(m sent, right []byte) {
			c := l.conn(m.place)
			for range 5000 {
				junk := slices.Clone(right)
				if rng.IntN(2) == 0 {
					junk = make([]byte, rng.IntN(600))
				}
				for range 1 + rng.IntN(8) {
					if len(junk) > 0 {
						junk[rng.IntN(len(junk))] = byte(rng.Uint32())
					}
				}
				// Never the right transaction: who knows that can also answer.
				if len(junk) > 8 {
					junk[4] = ^right[4]
				}
				c.receive(datagram{data: junk, from: server2})
			}
			c.receive(datagram{data: right, from: server1})
		}
		l.serve = func(m sent) {
			if b := server.answer(m.packet); b != nil {
				time.AfterFunc(time.Millisecond, func() { flood(m, b) })
			}
		}
		c := l.client(server1)
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); err != nil {
			t.Fatal(err)
		}
		checkKinds(t, l, discover, request)
		var dropped uint64
		for _, n := range c.Drops().Counts() {
			dropped += n
		}
		if dropped != 10000 {
			t.Errorf("%d packets counted, want 10000: %v", dropped, c.Drops().Counts())
		}
	})
}

// The socket breaks under an exchange: it ends in time, with the reason.
func TestSocketCloses(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client(server1)
		time.AfterFunc(100*time.Millisecond, func() { l.conn(place1).Close() })
		_, err := c.Acquire(within(t, usual), want(home, mac1))
		checkError(t, err, net.ErrClosed.Error())
		if took := time.Since(l.began); took > usual {
			t.Errorf("took %s", took)
		}
	})
}

func TestReadErrorsDuringExchange(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.serve = func(m sent) {
			for range 3 {
				l.conn(m.place).receive(datagram{err: errors.New("interface down")})
			}
			l.reply(m, time.Millisecond, server1, server.answer(m.packet))
		}
		if _, err := l.client(server1).Acquire(within(t, usual), want(home, mac1)); err != nil {
			t.Fatal(err)
		}
		checkKinds(t, l, discover, request)
	})
}

func TestWriteErrors(t *testing.T) {
	unreachable := errors.New("network is unreachable")
	t.Run("all", func(t *testing.T) {
		bubble(t, func(t *testing.T, l *lan) {
			l.write = func(netip.AddrPort) error { return unreachable }
			_, err := l.client(server1).Acquire(within(t, usual), want(home, mac1))
			if !errors.Is(err, unreachable) || errors.Is(err, lease.ErrNoAnswer) {
				t.Errorf("error %v: want the sending's, and no talk of silence", err)
			}
			checkError(t, err, "10.10.0.1", "10.10.0.2")
		})
	})
	t.Run("some", func(t *testing.T) {
		bubble(t, func(t *testing.T, l *lan) {
			n := 0
			l.write = func(netip.AddrPort) error {
				if n++; n%2 == 1 {
					return unreachable
				}
				return nil
			}
			_, err := l.client(server1).Acquire(within(t, usual), want(home, mac1))
			if !errors.Is(err, unreachable) || !errors.Is(err, lease.ErrNoAnswer) {
				t.Errorf("error %v: want both the silence and the failures", err)
			}
		})
	})
	t.Run("some, and it succeeds", func(t *testing.T) {
		bubble(t, func(t *testing.T, l *lan) {
			l.attach(newDHCPD(server1))
			n := 0
			l.write = func(netip.AddrPort) error {
				if n++; n%2 == 1 {
					return unreachable
				}
				return nil
			}
			if _, err := l.client(server1).Acquire(within(t, usual), want(home, mac1)); err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("one server of two", func(t *testing.T) {
		bubble(t, func(t *testing.T, l *lan) {
			l.attach(newDHCPD(server2))
			l.write = func(to netip.AddrPort) error {
				if to == server1 {
					return unreachable
				}
				return nil
			}
			if _, err := l.client(server1, server2).Acquire(within(t, usual), want(home, mac1)); err != nil {
				t.Error(err)
			}
			if took := time.Since(l.began); took > 10*time.Millisecond {
				t.Errorf("took %s", took)
			}
		})
	})
	t.Run("release", func(t *testing.T) {
		bubble(t, func(t *testing.T, l *lan) {
			l.write = func(netip.AddrPort) error { return unreachable }
			c := l.client(server1)
			if err := c.Release(within(t, usual), home, held(server1)); !errors.Is(err, unreachable) {
				t.Errorf("error %v", err)
			}
			if err := c.Decline(within(t, usual), home, held(server1)); !errors.Is(err, unreachable) {
				t.Errorf("error %v", err)
			}
		})
	})
}
