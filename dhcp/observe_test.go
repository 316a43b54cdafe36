package dhcp

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// tally is an Observer that writes down what it is told.
type tally struct {
	mu   sync.Mutex
	said []string
}

func (t *tally) Exchanged(message string, server netip.Addr, outcome string, took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.said = append(t.said, fmt.Sprintf("%s %s %s %s", message, server, outcome, took))
}

// check compares what was told since the last check, in any order within it.
// Without times, these aren't looked at.
func (t *tally) check(tt *testing.T, want ...string) {
	tt.Helper()
	t.mu.Lock()
	defer t.mu.Unlock()
	got := slices.Clone(t.said)
	t.said = nil
	slices.Sort(got)
	slices.Sort(want)
	same := func(got, want string) bool { return got == want || strings.HasPrefix(got, want+" ") }
	if !slices.EqualFunc(got, want, same) {
		tt.Errorf("told %q, want %q", got, want)
	}
}

// observed has a tally told.
func observed(c *Client) *tally {
	t := new(tally)
	c.Observe(t)
	return t
}

// statuses are a pool's servers in short: what they answered, and what not.
func statuses(c *Client, pool lease.Pool) (texts []string) {
	for _, s := range c.Servers(pool) {
		text := fmt.Sprintf("%s offers=%d acks=%d naks=%d unanswered=%d", s.Server, s.Offers, s.ACKs, s.NAKs, s.Unanswered)
		if (s.Unanswered > 0) == s.Silent.IsZero() {
			text += " silent since " + s.Silent.String()
		}
		texts = append(texts, text)
	}
	return texts
}

func checkStatuses(t *testing.T, c *Client, pool lease.Pool, want ...string) {
	t.Helper()
	if got := statuses(c, pool); !slices.Equal(got, want) {
		t.Errorf("servers %q, want %q", got, want)
	}
}

// checkForgotten asserts that nothing stays of exchanges that are over.
func checkForgotten(t *testing.T, c *Client) {
	t.Helper()
	time.Sleep(lateTime)
	synctest.Wait()
	if n := len(c.servers.inquiries); n != 0 {
		t.Errorf("%d inquiries stay", n)
	}
}

// byKind answers a message by its type, and nothing where there is none.
func byKind(l *lan, after time.Duration, answers map[byte]func(packet) []byte) {
	l.serve = func(m sent) {
		if f := answers[m.kind()]; f != nil {
			l.replyBy(m, after, station{mac: stationOf(server1), addr: server1}, f(m.packet))
		}
	}
}

func offers(p packet) []byte  { return grant(p, offer, server1.Addr(), leasedAddr) }
func grants(p packet) []byte  { return grant(p, ack, server1.Addr(), leasedAddr) }
func refuses(p packet) []byte { return refuse(p, server1.Addr()) }

// Each exchange is told once, with its outcome and its time, as a relay agent and
// on a LAN alike; only that nobody on a LAN answers has no server's address.
func TestExchanged(t *testing.T) {
	unreachable := errors.New("network is unreachable")
	acquire := func(patience time.Duration, accept func(netip.Addr) error) func(*testing.T, *Client, lease.Lease) {
		return func(t *testing.T, c *Client, _ lease.Lease) {
			_, _ = c.Acquire(within(t, patience), lease.Request{Pool: home, MAC: mac1, Accept: accept})
		}
	}
	extend := func(f func(*Client, context.Context, lease.Pool, lease.Lease) (lease.Lease, error), patience time.Duration) func(*testing.T, *Client, lease.Lease) {
		return func(t *testing.T, c *Client, l lease.Lease) { _, _ = f(c, within(t, patience), home, l) }
	}
	farewell := func(f farewellCall) func(*testing.T, *Client, lease.Lease) {
		return func(t *testing.T, c *Client, l lease.Lease) { _ = f(c, t.Context(), home, l) }
	}
	probe := func(t *testing.T, c *Client, _ lease.Lease) { _, _ = c.Probe(within(t, 8*time.Second), home, mac1) }
	for name, c := range map[string]struct {
		answers map[byte]func(packet) []byte
		fails   bool // nothing can be sent
		do      func(*testing.T, *Client, lease.Lease)
		want    []string
		onLAN   []string // nil: the same
	}{
		"acquired": {
			map[byte]func(packet) []byte{discover: offers, request: grants},
			false, acquire(usual, anyAddr),
			[]string{"discover 10.10.0.1 offer 1ms", "request 10.10.0.1 ack 1ms"},
			nil,
		},
		"no offer": {nil, false, acquire(usual, anyAddr), []string{"discover 10.10.0.1 silent 30s"}, []string{"discover invalid IP silent 30s"}},
		"nothing sent": {
			nil, true, acquire(usual, anyAddr),
			[]string{"discover 10.10.0.1 failed 30s"},
			[]string{"discover invalid IP failed 30s"},
		},
		"offer refused": {
			map[byte]func(packet) []byte{discover: offers},
			false, acquire(usual, only(ip("10.10.0.7"))),
			[]string{"discover 10.10.0.1 refused 1ms"},
			nil,
		},
		"no ACK": {
			map[byte]func(packet) []byte{discover: offers},
			false, acquire(3*time.Second, anyAddr),
			[]string{"discover 10.10.0.1 offer 1ms", "request 10.10.0.1 silent 2.999s", "release 10.10.0.1 sent 0s"},
			nil,
		},
		"refused by NAK": {
			map[byte]func(packet) []byte{discover: offers, request: refuses},
			false, acquire(51*time.Millisecond, anyAddr),
			[]string{"discover 10.10.0.1 offer 1ms", "request 10.10.0.1 nak 1ms"},
			nil,
		},
		"probed":        {map[byte]func(packet) []byte{discover: offers}, false, probe, []string{"discover 10.10.0.1 offer 1ms"}, nil},
		"no probe":      {nil, false, probe, []string{"discover 10.10.0.1 silent 8s"}, []string{"discover invalid IP silent 8s"}},
		"renewed":       {map[byte]func(packet) []byte{request: grants}, false, extend((*Client).Renew, time.Minute), []string{"request 10.10.0.1 ack 1ms"}, nil},
		"not renewed":   {map[byte]func(packet) []byte{request: refuses}, false, extend((*Client).Renew, time.Minute), []string{"request 10.10.0.1 nak 1ms"}, nil},
		"silent":        {nil, false, extend((*Client).Renew, time.Minute), []string{"request 10.10.0.1 silent 1m0s"}, nil},
		"renewal fails": {nil, true, extend((*Client).Renew, time.Minute), []string{"request 10.10.0.1 failed 0s"}, []string{"request 10.10.0.1 failed 2s"}},
		"rebound":       {map[byte]func(packet) []byte{request: grants}, false, extend((*Client).Rebind, time.Minute), []string{"request 10.10.0.1 ack 1ms"}, nil},
		"not rebound": {
			map[byte]func(packet) []byte{request: refuses},
			false, extend((*Client).Rebind, time.Minute),
			[]string{"request 10.10.0.1 nak 1ms"},
			nil,
		},
		"nobody rebinds": {
			nil, false, extend((*Client).Rebind, time.Minute),
			[]string{"request 10.10.0.1 silent 1m0s"},
			[]string{"request invalid IP silent 1m0s"},
		},
		"confirmed":     {map[byte]func(packet) []byte{request: grants}, false, extend((*Client).Confirm, time.Second), []string{"request 10.10.0.1 ack 1ms"}, nil},
		"not confirmed": {nil, false, extend((*Client).Confirm, time.Second), []string{"request 10.10.0.1 silent 1s"}, nil},
		"no time":       {nil, false, extend((*Client).Confirm, 100*time.Millisecond), nil, nil},
		"released":      {nil, false, farewell((*Client).Release), []string{"release 10.10.0.1 sent 0s"}, nil},
		"declined":      {nil, false, farewell((*Client).Decline), []string{"decline 10.10.0.1 sent 0s"}, nil},
		"release fails": {nil, true, farewell((*Client).Release), []string{"release 10.10.0.1 failed 0s"}, nil},
	} {
		for _, broadcast := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, broadcast %t", name, broadcast), func(t *testing.T) {
				bubble(t, func(t *testing.T, l *lan) {
					byKind(l, time.Millisecond, c.answers)
					if c.fails {
						l.write = func(netip.AddrPort) error { return unreachable }
					}
					client, has, want := l.client(server1), held(server1), c.want
					if broadcast {
						client, has = l.broadcaster(), onLAN(server1)
						if c.onLAN != nil {
							want = c.onLAN
						}
					}
					told := observed(client)
					c.do(t, client, has)
					told.check(t, want...)
				})
			})
		}
	}
}

// The word of a server that never had the lease counts only where no better one
// came.
func TestExchangedForeignNAK(t *testing.T) {
	for _, c := range []struct {
		name string
		ack  bool
		want []string
	}{
		{"and an ACK", true, []string{"request 10.10.0.1 ack 10ms"}},
		{"alone", false, []string{"request 10.11.0.1 nak 2.001s"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				l.serve = func(m sent) {
					if m.to == server2 {
						l.reply(m, time.Millisecond, server2, refuse(m.packet, server2.Addr()))
					} else if c.ack {
						l.reply(m, 10*time.Millisecond, server1, grants(m.packet))
					}
				}
				client := l.client(server1, server2)
				told := observed(client)
				_, _ = client.Rebind(within(t, time.Minute), home, held(server1))
				told.check(t, c.want...)
			})
		})
	}
}

// A caller that goes away makes its servers silent only after they had the time
// in which servers offer.
func TestExchangedCallerGone(t *testing.T) {
	for after, want := range map[time.Duration][]string{
		2 * time.Second: nil,
		5 * time.Second: {"discover 10.10.0.1 silent 5s", "discover 10.11.0.1 silent 5s"},
	} {
		bubble(t, func(t *testing.T, l *lan) {
			c := l.client(server1, server2)
			told := observed(c)
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(after, cancel)
			if _, err := c.Acquire(ctx, lease.Request{Pool: home, MAC: mac1, Accept: anyAddr}); err == nil {
				t.Error("no error")
			}
			told.check(t, want...)
		})
	}
}

// Where no way to a server is found, it is that of no server that fails; of a
// lease's own server it is known which.
func TestExchangedWithoutAWay(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client(server1)
		told := observed(c)
		c.source = func(netip.AddrPort) (netip.Addr, error) { return netip.Addr{}, errNoRoute }
		_, _ = c.Acquire(within(t, usual), want(home, mac1))
		_, _ = c.Probe(within(t, usual), home, mac1)
		_, _ = c.Rebind(within(t, usual), home, held(server1))
		told.check(t, "discover invalid IP failed 0s", "discover invalid IP failed 0s", "request invalid IP failed 0s")
		_, _ = c.Renew(within(t, usual), home, held(server1))
		_ = c.Decline(within(t, usual), home, held(server1))
		told.check(t, "request 10.10.0.1 failed 0s", "decline 10.10.0.1 failed 0s")
		// That nobody knows an adopted lease's server is nobody's fault.
		_, _ = c.Renew(within(t, usual), home, lease.Lease{MAC: mac1, Prefix: held(server1).Prefix})
		told.check(t)
	})
}

// Of several servers, each is told for itself: refused offers with the one that
// was taken, those who couldn't be reached beside those who were silent.
func TestExchangedSeveralServers(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		first, second := newDHCPD(server1), newDHCPD(server2)
		second.delay, second.prefix = time.Second, [2]byte{10, 11}
		l.attach(first, second)
		c := l.client(server1, server2)
		told := observed(c)
		req := want(home, mac1)
		req.Accept = only(second.addrOf(mac1))
		if _, err := c.Acquire(within(t, usual), req); err != nil {
			t.Fatal(err)
		}
		told.check(t, "discover 10.10.0.1 refused 1ms", "discover 10.11.0.1 offer 1.001s", "request 10.11.0.1 ack 1ms")
		if _, err := c.Probe(within(t, usual), home, mac1); err != nil {
			t.Fatal(err)
		}
		told.check(t, "discover 10.10.0.1 offer 1ms", "discover 10.11.0.1 offer 1.001s")

		l.serve = nil
		l.write = func(to netip.AddrPort) error {
			if to == server1 {
				return errNoRoute
			}
			return nil
		}
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); err == nil {
			t.Fatal("no error")
		}
		told.check(t, "discover 10.10.0.1 failed 30s", "discover 10.11.0.1 silent 30s")
		// What wasn't sent is nobody's silence.
		if got := c.Servers(home); got[0].Unanswered != 0 || !got[0].Silent.IsZero() || got[1].Unanswered < 5 {
			t.Errorf("servers %+v", got)
		}
	})
}

// A server that falls silent and comes back, in numbers.
func TestServers(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client(server1)
		checkStatuses(t, c, home, "10.10.0.1 offers=0 acks=0 naks=0 unanswered=0")
		l.attach(newDHCPD(server1))
		answering := l.serve
		got, err := c.Acquire(within(t, usual), want(home, mac1))
		if err != nil {
			t.Fatal(err)
		}
		since := time.Now()
		want := lease.ServerStatus{Server: server1.Addr(), Answered: since, Took: time.Millisecond, Offers: 1, ACKs: 1}
		if got := c.Servers(home); len(got) != 1 || got[0] != want {
			t.Errorf("servers %+v, want %+v", got, want)
		}

		time.Sleep(time.Hour)
		l.serve = nil
		want.Silent = time.Now()
		for range 3 {
			if _, err := c.Renew(within(t, time.Minute), home, got); err == nil {
				t.Fatal("renewed by nobody")
			}
		}
		want.Unanswered = 3
		if got := c.Servers(home); len(got) != 1 || got[0] != want {
			t.Errorf("servers %+v, want %+v", got, want)
		}

		l.serve = answering
		if _, err := c.Renew(within(t, time.Minute), home, got); err != nil {
			t.Fatal(err)
		}
		byKind(l, 20*time.Millisecond, map[byte]func(packet) []byte{request: refuses})
		if _, err := c.Renew(within(t, time.Minute), home, got); !errors.Is(err, lease.ErrNAK) {
			t.Fatal(err)
		}
		want = lease.ServerStatus{Server: server1.Addr(), Answered: time.Now(), Took: 20 * time.Millisecond, Offers: 1, ACKs: 2, NAKs: 1}
		if got := c.Servers(home); len(got) != 1 || got[0] != want {
			t.Errorf("servers %+v, want %+v", got, want)
		}
		// What has no answer leaves nobody silent.
		if err := c.Release(t.Context(), home, got); err != nil {
			t.Fatal(err)
		}
		if got := c.Servers(home); len(got) != 1 || got[0] != want {
			t.Errorf("servers %+v, want %+v", got, want)
		}
		checkForgotten(t, c)
	})
}

// A reply may be there before the message's sending has returned.
func TestServersAnswerAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.serve = func(m sent) {
			l.conn(m.place).receive(datagram{data: server.answer(m.packet), from: server1})
			synctest.Wait()
		}
		c := l.client(server1)
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); err != nil {
			t.Fatal(err)
		}
		checkStatuses(t, c, home, "10.10.0.1 offers=1 acks=1 naks=0 unanswered=0")
	})
}

// A server that lost the race of the offers isn't silent, however late its own
// comes; what comes after that, or without its client identifier, counts for
// nobody.
func TestServersLateOffer(t *testing.T) {
	for _, onLAN := range []bool{false, true} {
		for delay, heard := range map[time.Duration]bool{
			time.Millisecond: true, 500 * time.Millisecond: true, lateTime - time.Second: true, lateTime + time.Second: false,
		} {
			t.Run(fmt.Sprintf("%v, on LAN %t", delay, onLAN), func(t *testing.T) {
				bubble(t, func(t *testing.T, l *lan) {
					quick, slow := newDHCPD(server1), newDHCPD(server2)
					slow.delay = delay
					l.attach(quick, slow)
					c := l.client(server1, server2)
					if onLAN {
						c = l.broadcaster()
					}
					told := observed(c)
					for range 5 {
						if _, err := c.Acquire(within(t, usual), want(home, mac1)); err != nil {
							t.Fatal(err)
						}
						time.Sleep(20 * time.Second)
					}
					want := []string{"10.10.0.1 offers=5 acks=5 naks=0 unanswered=0"}
					switch {
					case heard:
						want = append(want, "10.11.0.1 offers=0 acks=0 naks=0 unanswered=0")
					case !onLAN:
						want = append(want, "10.11.0.1 offers=0 acks=0 naks=0 unanswered=5")
					}
					checkStatuses(t, c, home, want...)
					if got := c.Servers(home); heard && got[1].Took != delay+time.Millisecond {
						t.Errorf("took %s", got[1].Took)
					}
					told.check(t, slices.Concat(slices.Repeat([]string{"discover 10.10.0.1 offer"}, 5), slices.Repeat([]string{"request 10.10.0.1 ack"}, 5))...)
					checkForgotten(t, c)
				})
			})
		}
	}
	bubble(t, func(t *testing.T, l *lan) {
		quick := newDHCPD(server1)
		l.serve = func(m sent) {
			if m.to == server1 {
				l.reply(m, time.Millisecond, server1, quick.answer(m.packet))
			} else if m.kind() == discover {
				l.reply(m, time.Second, server2, grant(m.packet, offer, server2.Addr(), leasedAddr, opt(61, 1, 2, 3)))
			}
		}
		c := l.client(server1, server2)
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		checkStatuses(t, c, home, "10.10.0.1 offers=1 acks=1 naks=0 unanswered=0", "10.11.0.1 offers=0 acks=0 naks=0 unanswered=1")
	})
}

// A reply to an exchange that hasn't asked yet, or on a link where it doesn't
// ask, is no answer.
func TestServersUnasked(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client(server1, server2)
		paths, err := c.paths(t.Context(), c.inForce(home.Options))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.link(at67(otherRelay)); err != nil {
			t.Fatal(err)
		}
		x := c.begin(party{pool: home, mac: mac1, clientID: lease.MACClientID(mac1)}, paths)
		defer x.end()
		comes := func(at place, giaddr netip.Addr) {
			to := packet{xid: x.key.xid, giaddr: giaddr, chaddr: asked.chaddr}
			l.conn(at).receive(datagram{data: offers(to), from: server1})
			synctest.Wait()
		}
		comes(place1, relay1)
		x.send(message{kind: discover}, paths...)
		comes(at67(otherRelay), otherRelay)
		checkStatuses(t, c, home, "10.10.0.1 offers=0 acks=0 naks=0 unanswered=1", "10.11.0.1 offers=0 acks=0 naks=0 unanswered=1")
		comes(place1, relay1)
		checkStatuses(t, c, home, "10.10.0.1 offers=0 acks=0 naks=0 unanswered=0", "10.11.0.1 offers=0 acks=0 naks=0 unanswered=1")
	})
}

// Servers are known by the addresses at which they are asked, wherever they
// answer from and whatever they call themselves; one whose answers can be of any
// of them leaves none silent.
func TestServersElsewhere(t *testing.T) {
	elsewhere := netip.MustParseAddrPort("10.12.0.1:67")
	for _, c := range []struct {
		name     string
		id       netip.Addr
		from     netip.AddrPort
		together []string
	}{
		{"another source", server2.Addr(), elsewhere, []string{"10.10.0.1 offers=0 acks=0 naks=0 unanswered=1", "10.11.0.1 offers=1 acks=1 naks=0 unanswered=0"}},
		{"another identifier", elsewhere.Addr(), server2, []string{"10.10.0.1 offers=0 acks=0 naks=0 unanswered=1", "10.11.0.1 offers=1 acks=1 naks=0 unanswered=0"}},
		{"both others", elsewhere.Addr(), elsewhere, []string{"10.10.0.1 offers=0 acks=0 naks=0 unanswered=0", "10.11.0.1 offers=0 acks=0 naks=0 unanswered=0"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				server := newDHCPD(server2)
				server.id, server.from = c.id, c.from
				l.serve = func(m sent) {
					if m.to != server1 {
						if b := server.answer(m.packet); b != nil {
							l.reply(m, time.Millisecond, c.from, b)
						}
					}
				}
				alone, both := l.client(server2), l.client(server1, server2)
				if _, err := alone.Acquire(within(t, usual), want(home, mac1)); err != nil {
					t.Fatal(err)
				}
				checkStatuses(t, alone, home, "10.11.0.1 offers=1 acks=1 naks=0 unanswered=0")
				if err := alone.Close(); err != nil {
					t.Fatal(err)
				}
				if _, err := both.Acquire(within(t, usual), want(home, mac1)); err != nil {
					t.Fatal(err)
				}
				checkStatuses(t, both, home, c.together...)
			})
		})
	}
}

// A pool's own servers and interface, and names by the addresses that they had
// last.
func TestServersOfPools(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		slow := newDHCPD(server2)
		slow.delay = time.Second
		l.attach(newDHCPD(server1), slow)
		c := l.client(server1)
		c.resolve = func(context.Context, string) ([]netip.Addr, error) { return []netip.Addr{server2.Addr()}, nil }
		byName, onLAN := home, home
		byName.Options.Servers = []lease.Server{{Host: "10.11.0.1", Port: 67}, {Host: "dhcp.example.org", Port: 67}}
		onLAN.Options.Interface = lanPlace.iface
		checkStatuses(t, c, byName, "10.11.0.1 offers=0 acks=0 naks=0 unanswered=0")
		twice := byName
		byName.Options.Servers = byName.Options.Servers[1:]
		checkStatuses(t, c, byName)
		checkStatuses(t, c, onLAN)
		for _, pool := range []lease.Pool{byName, home, home, onLAN, onLAN, onLAN} {
			if _, err := c.Acquire(within(t, usual), want(pool, mac1)); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(2 * time.Second)
		checkStatuses(t, c, byName, "10.11.0.1 offers=1 acks=1 naks=0 unanswered=0")
		checkStatuses(t, c, twice, "10.11.0.1 offers=1 acks=1 naks=0 unanswered=0")
		checkStatuses(t, c, home, "10.10.0.1 offers=2 acks=2 naks=0 unanswered=0")
		checkStatuses(t, c, onLAN, "10.10.0.1 offers=3 acks=3 naks=0 unanswered=0", "10.11.0.1 offers=0 acks=0 naks=0 unanswered=0")
		c.resolve = func(context.Context, string) ([]netip.Addr, error) { return nil, errNoRoute }
		if _, err := c.Acquire(within(t, usual), want(byName, mac1)); err == nil {
			t.Error("no error")
		}
		checkStatuses(t, c, byName, "10.11.0.1 offers=1 acks=1 naks=0 unanswered=0")
		for i := range 2 * maxNames {
			c.servers.name(fmt.Sprint("host", i), slices.Repeat([]netip.Addr{server1.Addr()}, 1000))
		}
		if n := len(c.servers.names); n != maxNames || len(c.servers.names[fmt.Sprint("host", 2*maxNames-1)]) != maxServers {
			t.Errorf("%d names are remembered", n)
		}
	})
}

// On a LAN, what goes to all and nobody answers is nobody's in particular; what
// goes to one server is that one's.
func TestServersOnLAN(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.broadcaster()
		if _, err := c.Probe(within(t, 500*time.Millisecond), home, mac1); err == nil {
			t.Fatal("no error")
		}
		checkStatuses(t, c, home, "invalid IP offers=0 acks=0 naks=0 unanswered=1")
		// A refusal that doesn't say whose it is, is nobody's answer.
		byKind(l, time.Millisecond, map[byte]func(packet) []byte{
			discover: func(p packet) []byte { return answer{to: p, options: []option{opt(53, nak)}}.bytes() },
		})
		if _, err := c.Probe(within(t, 400*time.Millisecond), home, mac1); err == nil {
			t.Fatal("no error")
		}
		checkStatuses(t, c, home, "invalid IP offers=0 acks=0 naks=0 unanswered=2")
		l.attach(newDHCPD(server1))
		got, err := c.Acquire(within(t, usual), want(home, mac1))
		if err != nil {
			t.Fatal(err)
		}
		checkStatuses(t, c, home, "10.10.0.1 offers=1 acks=1 naks=0 unanswered=0")
		l.serve = nil
		if _, err := c.Renew(within(t, time.Minute), home, got); err == nil {
			t.Fatal("no error")
		}
		checkStatuses(t, c, home, "10.10.0.1 offers=1 acks=1 naks=0 unanswered=2")
		if _, err := c.Rebind(within(t, time.Minute), home, got); err == nil {
			t.Fatal("no error")
		}
		checkStatuses(t, c, home, "invalid IP offers=0 acks=0 naks=0 unanswered=2", "10.10.0.1 offers=1 acks=1 naks=0 unanswered=2")
		// One of all that is there again, whatever it answers.
		l.attach(newDHCPD(server1))
		if _, err := c.Renew(within(t, time.Minute), home, got); err != nil {
			t.Fatal(err)
		}
		checkStatuses(t, c, home, "10.10.0.1 offers=1 acks=2 naks=0 unanswered=0")
	})
}

// Somebody on the LAN who calls himself thousands of servers grows nothing, and
// who was heard last has a place.
func TestServersAreBounded(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.broadcaster()
		server := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 99, byte(n >> 8), byte(n)}) }
		n := 0
		l.serve = func(m sent) {
			if m.kind() == discover {
				n++
				l.replyBy(m, time.Millisecond, station{addr: netip.AddrPortFrom(server(n), 67)}, grant(m.packet, offer, server(n), leasedAddr))
			}
		}
		for range 3000 {
			if _, err := c.Probe(within(t, 10*time.Millisecond), home, mac1); err != nil {
				t.Fatal(err)
			}
		}
		all := c.Servers(home)
		if last := all[len(all)-1]; len(all) > maxServers || n < 3000 || last.Server != server(n) || last.Offers != 1 {
			t.Errorf("%d servers, the last is %+v", len(all), last)
		}
		checkForgotten(t, c)
	})
}

// Answers that carry made-up addresses take no place of a server that is asked as
// a relay agent, and nobody's silence ends by them later; of ever new addresses,
// those that are asked now have the places.
func TestServersAreThoseAsked(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client(server1, server2)
		told := observed(c)
		server := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 99, 0, byte(n)}) }
		l.serve = func(m sent) {
			if m.to == server1 {
				from := server(len(l.log()))
				l.reply(m, time.Millisecond, netip.AddrPortFrom(from, 67), grant(m.packet, offer, from, leasedAddr))
			}
		}
		refuse := want(home, mac1)
		refuse.Accept = only(ip("10.10.0.7"))
		for range 2 * maxServers {
			if _, err := c.Acquire(within(t, 600*time.Millisecond), refuse); err == nil {
				t.Fatal("no error")
			}
		}
		told.check(t, slices.Repeat([]string{"discover invalid IP refused"}, len(told.said))...)
		l.serve = nil
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); err == nil {
			t.Fatal("no error")
		}
		time.Sleep(readyAfter)
		checkReady(t, c, "asked 10.10.0.1 from relay address 10.10.0.2, 10.11.0.1 from")
		if err := c.Configure(asking(netip.IPv4Unspecified())); err != nil {
			t.Fatal(err)
		}
		checkReady(t, c, "asked 10.10.0.1 from relay address 10.10.0.2, 10.11.0.1 from")
		checkForgotten(t, c)

		pool := home
		for n := range 2 * maxServers {
			pool.Options.Servers = []lease.Server{{Host: server(n).String(), Port: 67}}
			if _, err := c.Probe(within(t, 10*time.Millisecond), pool, mac1); err == nil {
				t.Fatal("no error")
			}
		}
		var latest []string
		pool.Options.Servers = nil
		for n := maxServers; n < 2*maxServers; n++ {
			latest = append(latest, server(n).String()+" offers=0 acks=0 naks=0 unanswered=1")
			pool.Options.Servers = append(pool.Options.Servers, lease.Server{Host: server(n).String(), Port: 67})
		}
		checkStatuses(t, c, pool, latest...)
		if n := len(c.servers.by[""]); n != maxServers {
			t.Errorf("%d servers are remembered", n)
		}
	})
}

// readyAfter is the silence that the tests allow.
const readyAfter = 25 * time.Second

func checkReady(t *testing.T, c *Client, parts ...string) {
	t.Helper()
	err := c.Ready(readyAfter)
	if len(parts) > 0 {
		checkError(t, err, parts...)
	} else if err != nil {
		t.Errorf("not ready: %v", err)
	}
}

// The links of the global settings must be open, and why they aren't is told;
// without any, networks have their own.
func TestReadyLinks(t *testing.T) {
	for name, c := range map[string]struct {
		global lease.Options
		at     place
	}{
		"relay address":     {asking(relay1, server1), place1},
		"no server":         {asking(relay1), place1},
		"left to the route": {asking(netip.IPv4Unspecified(), server1), place1},
		"interface":         {lease.Options{Interface: "eth0"}, lanPlace},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				client := l.client()
				checkReady(t, client)
				wrong := errors.New("no such address: correct it")
				open := func(at place) (socket, error) {
					if wrong != nil {
						return socket{}, wrong
					}
					return l.open(at)
				}
				client.openRelay, client.openBroadcast = open, open
				client.global.Store(new(c.global.Or(lease.Defaults())))
				checkReady(t, client, c.at.String()+" is not open yet")
				if err := client.Open(); err != nil {
					t.Fatal(err)
				}
				checkReady(t, client, c.at.String()+" is not open, which the next request tries again", wrong.Error())
				wrong = nil
				checkReady(t, client, "is not open")
				if _, err := client.link(c.at); err != nil {
					t.Fatal(err)
				}
				checkReady(t, client)
				l.conn(c.at).stale.Store(true)
				checkReady(t, client, c.at.String(), "opens it anew")
				if len(l.log()) != 0 {
					t.Error("something was sent")
				}
			})
		})
	}
	// One of two is enough for a lease.
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client(server1, server2)
		c.source = func(to netip.AddrPort) (netip.Addr, error) {
			if to == server1 {
				return netip.Addr{}, errNoRoute
			}
			return relay1, nil
		}
		checkReady(t, c, "10.10.0.1", "no route")
		if err := c.Open(); err != nil {
			t.Fatal(err)
		}
		checkReady(t, c)
	})
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client(server1, server2)
		c.source = func(to netip.AddrPort) (netip.Addr, error) {
			return map[netip.AddrPort]netip.Addr{server1: relay1, server2: otherRelay}[to], nil
		}
		if _, err := c.link(place1); err != nil {
			t.Fatal(err)
		}
		checkReady(t, c)
	})
}

// A link whose opening hangs holds up nobody who asks.
func TestReadyWhileOpening(t *testing.T) {
	l := newLAN(t)
	c := l.client(server1)
	opening, hangs := make(chan struct{}), make(chan struct{})
	c.openRelay = func(at place) (socket, error) {
		close(opening)
		<-hangs
		return l.open(at)
	}
	opened := make(chan error)
	go func() { opened <- c.Open() }()
	<-opening
	checkReady(t, c, "relay address 10.10.0.2 is not open yet")
	close(hangs)
	if err := <-opened; err != nil {
		t.Error(err)
	}
	checkReady(t, c)
}

// An interface without a link can't be asked on.
func TestReadyUnusable(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.broadcaster()
		var down error
		c.openBroadcast = func(at place) (socket, error) {
			s, err := l.open(at)
			s.hardware = func() (lease.MAC, error) { return mac1, down }
			return s, err
		}
		if err := c.Open(); err != nil {
			t.Fatal(err)
		}
		checkReady(t, c)
		down = errors.New("it has no link: plug it in")
		checkReady(t, c, "interface eth0", "plug it in")
	})
}

// Three messages in a row without an answer, the first of them long ago, are
// silence, unless another server answers; until it is asked nobody is silent.
func TestReadySilence(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1), newDHCPD(server2))
		answering := l.serve
		c := l.client(server1)
		if err := c.Open(); err != nil {
			t.Fatal(err)
		}
		checkReady(t, c)
		fails := func(pool lease.Pool) {
			t.Helper()
			l.serve = nil
			if _, err := c.Acquire(within(t, usual), want(pool, mac1)); !errors.Is(err, lease.ErrNoAnswer) {
				t.Fatalf("error %v", err)
			}
			l.serve = answering
		}
		takes := func(pool lease.Pool) lease.Lease {
			t.Helper()
			got, err := c.Acquire(within(t, usual), want(pool, mac1))
			if err != nil {
				t.Fatal(err)
			}
			return got
		}
		has := takes(home)
		l.serve = nil
		for range 2 {
			if _, err := c.Renew(within(t, time.Minute), home, has); err == nil {
				t.Fatal("renewed")
			}
		}
		checkReady(t, c) // two may be lost
		_, _ = c.Renew(within(t, time.Second), home, has)
		if err := c.Ready(2*time.Minute + time.Second); err != nil {
			t.Errorf("not ready before its time: %v", err)
		}
		checkReady(t, c, "no DHCP server answered within 2m1s (asked 10.10.0.1 from relay address 10.10.0.2; 3 messages from 2000-01-01 00:00:00 to 2000-01-01 00:02:00)", "subnet 10.10.0.0/24", "firewall")
		l.serve = answering
		takes(home)
		checkReady(t, c)

		fails(home)
		checkReady(t, c, "asked 10.10.0.1 from relay address 10.10.0.2")
		// A network's own server is no help to the others.
		own := home
		own.Options.Servers = asking(relay1, server2).Servers
		takes(own)
		checkReady(t, c, "asked 10.10.0.1")
		// Others in the settings weren't asked yet, and answer.
		if err := c.Configure(asking(relay1, server1, netip.MustParseAddrPort("10.12.0.1:67"))); err != nil {
			t.Fatal(err)
		}
		fails(home)
		checkReady(t, c, "within 30s (asked 10.10.0.1 from relay address 10.10.0.2, 10.12.0.1 from relay address 10.10.0.2;")
		if err := c.Configure(asking(relay1, netip.MustParseAddrPort("10.13.0.1:67"))); err != nil {
			t.Fatal(err)
		}
		checkReady(t, c)
		if err := c.Configure(asking(relay1, server1, server2)); err != nil {
			t.Fatal(err)
		}
		checkReady(t, c)
		// With none in the settings, all networks' count.
		if err := c.Configure(asking(relay1)); err != nil {
			t.Fatal(err)
		}
		fails(own)
		checkReady(t, c, "10.10.0.1", "10.11.0.1", "10.12.0.1")
		takes(own)
		checkReady(t, c)
		if len(l.log(decline)) != 0 {
			t.Error("something was sent")
		}
	})
}

// On a LAN, a server is silent with all others where nobody answers what goes to
// all; renewals show that it is there.
func TestReadyOnLAN(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.attach(server)
		answering := l.serve
		c := l.broadcaster()
		if err := c.Open(); err != nil {
			t.Fatal(err)
		}
		checkReady(t, c)
		got, err := c.Acquire(within(t, usual), want(home, mac1))
		if err != nil {
			t.Fatal(err)
		}
		checkReady(t, c)
		time.Sleep(time.Hour)
		checkReady(t, c)
		l.serve = nil
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); err == nil {
			t.Fatal("no error")
		}
		checkReady(t, c, "no DHCP server answered within 30s (asked by broadcast on interface eth0;", " messages from 2000-01-01 01:00:00 to 2000-01-01 01:00:2", "LAN")
		own := home
		own.Options.Servers = asking(relay1, server1).Servers
		l.serve = answering
		if _, err := c.Acquire(within(t, usual), want(own, mac1)); err != nil {
			t.Fatal(err)
		}
		checkReady(t, c, "asked by broadcast on interface eth0")
		l.serve = answering
		if _, err := c.Renew(within(t, usual), home, got); err != nil {
			t.Fatal(err)
		}
		checkReady(t, c)
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); err != nil {
			t.Fatal(err)
		}
		l.serve = nil
		for range 2 {
			_, _ = c.Renew(within(t, time.Minute), home, got)
		}
		checkReady(t, c, "asked 10.10.0.1 on interface eth0", "Ethernet address")
		// One question to all is enough for that one, and for all.
		if _, err := c.Probe(within(t, usual), home, mac1); err == nil {
			t.Fatal("no error")
		}
		checkReady(t, c, "asked by broadcast on interface eth0, 10.10.0.1 on interface eth0")
		l.serve = answering
		before := len(l.log())
		c.AskSilent(within(t, 4*time.Second))
		checkReady(t, c)
		if sent := l.log()[before:]; len(sent) != 1 || sent[0].station != toAll {
			t.Errorf("sent %v", sent)
		}
	})
}

// What can't be sent is told at once, with what to do about it, until something
// leaves.
func TestReadyCannotSend(t *testing.T) {
	for name, c := range map[string]struct {
		client func(*lan) *Client
		err    error
		want   []string
	}{
		"firewall":  {func(l *lan) *Client { return l.client(server1) }, syscall.EPERM, []string{"firewall on this host", "let UDP from 10.10.0.2:67 to 10.10.0.1:67 pass"}},
		"broadcast": {(*lan).broadcaster, syscall.ENETDOWN, []string{"send on interface eth0", "network is down"}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				client := c.client(l)
				if err := client.Open(); err != nil {
					t.Fatal(err)
				}
				fails := func() {
					t.Helper()
					l.write = func(netip.AddrPort) error { return c.err }
					if _, err := client.Probe(within(t, 100*time.Millisecond), home, mac1); !errors.Is(err, c.err) {
						t.Fatalf("error %v", err)
					}
					l.write = nil
					checkReady(t, client, c.want...)
				}
				fails()
				if got := client.Servers(home); got[0].Unanswered != 0 {
					t.Errorf("servers %+v", got)
				}
				_, _ = client.Probe(within(t, 100*time.Millisecond), home, mac1)
				checkReady(t, client)
				fails()
				l.attach(newDHCPD(server1))
				client.AskSilent(within(t, 4*time.Second))
				checkReady(t, client)
			})
		})
	}
	// Another server is enough, and of one that can't be asked beside one that is
	// silent both is told.
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client(server1, server2)
		l.attach(newDHCPD(server2))
		l.write = func(to netip.AddrPort) error {
			if to == server1 {
				return syscall.EPERM
			}
			return nil
		}
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); err != nil {
			t.Fatal(err)
		}
		checkReady(t, c)
		l.serve = nil
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); err == nil {
			t.Fatal("no error")
		}
		checkReady(t, c, "asked 10.11.0.1 from relay address 10.10.0.2;", "some messages failed", "firewall on this host")
		// A corrected relay address is not to be blamed for the former one.
		if err := c.Configure(asking(relay1, server1, server2)); err != nil {
			t.Fatal(err)
		}
		checkReady(t, c)
	})
}

// On an idle host, a server that is back is found by asking anew; until then it
// is told when it was asked, however long ago that was.
func TestAskSilent(t *testing.T) {
	for name, open := range map[string]func(*lan) *Client{
		"relay":     func(l *lan) *Client { return l.client(server1, server2) },
		"broadcast": (*lan).broadcaster,
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				client := open(l)
				if err := client.Open(); err != nil {
					t.Fatal(err)
				}
				client.AskSilent(within(t, 4*time.Second))
				checkKinds(t, l)
				if _, err := client.Acquire(within(t, usual), want(away, mac1)); !errors.Is(err, lease.ErrNoAnswer) {
					t.Fatalf("error %v", err)
				}
				time.Sleep(12 * time.Hour)
				checkReady(t, client, "no DHCP server answered within 30s (asked", " messages from 2000-01-01 00:00:00 to 2000-01-01 00:00:2")

				before, began := client.Servers(away)[0].Unanswered, time.Now()
				client.AskSilent(within(t, 4*time.Second))
				if took := time.Since(began); took != 4*time.Second {
					t.Errorf("waited %s", took)
				}
				if got := client.Servers(away)[0].Unanswered; got <= before {
					t.Errorf("%d unanswered after %d", got, before)
				}
				checkReady(t, client, "within 12h0m34s", "to 2000-01-01 12:00:3")

				l.attach(newDHCPD(server1))
				n, began := len(l.log()), time.Now()
				client.AskSilent(within(t, 4*time.Second))
				checkReady(t, client)
				m := l.log()[n]
				if m.kind() != discover || m.mac() != client.probeMAC || m.station != toAll {
					t.Errorf("asked by type %d as %s", m.kind(), m.mac())
				}
				if name == "relay" && (!m.has(82) || time.Since(began) != 4*time.Second) {
					t.Errorf("asked for no subnet, or not all: %s", time.Since(began))
				}
				if got := client.Servers(away); !slices.ContainsFunc(got, func(s lease.ServerStatus) bool {
					return s.Server == server1.Addr() && s.Offers == 1 && s.Unanswered == 0
				}) {
					t.Errorf("servers %+v", got)
				}
				n = len(l.log())
				client.AskSilent(within(t, 4*time.Second))
				if len(l.log()) != n || len(l.log(request)) != 0 {
					t.Errorf("sent %v", l.kinds())
				}
				checkForgotten(t, client)
			})
		})
	}
}

// All of it at once, for the race detector.
func TestServersAtWork(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		slow := newDHCPD(server2)
		slow.delay = 50 * time.Millisecond
		l.attach(newDHCPD(server1), slow)
		c := l.client(server1, server2)
		told := observed(c)
		var work sync.WaitGroup
		for n := range 50 {
			work.Go(func() {
				if _, err := c.Acquire(within(t, usual), want(home, lease.MAC{2, 0, 0, 0, 0, byte(n)})); err != nil {
					t.Error(err)
				}
			})
		}
		for range 50 {
			c.Servers(home)
			_ = c.Ready(readyAfter)
			time.Sleep(time.Millisecond)
		}
		work.Wait()
		time.Sleep(time.Second)
		checkStatuses(t, c, home, "10.10.0.1 offers=50 acks=50 naks=0 unanswered=0", "10.11.0.1 offers=0 acks=0 naks=0 unanswered=0")
		if len(told.said) != 100 {
			t.Errorf("%d were told", len(told.said))
		}
	})
}
