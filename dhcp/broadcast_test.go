package dhcp

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/krolaw/dhcp4"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

var toAll lease.MAC

// onLAN is held as it is after an ACK by broadcast.
func onLAN(server netip.AddrPort) lease.Lease {
	l := held(server)
	l.Station = stationOf(server)
	return l
}

// The whole life of a lease: who gets which message, and what stands in it.
func TestBroadcastLife(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.attach(server)
		c := l.broadcaster()
		got, err := c.Acquire(within(t, usual), want(home, mac1))
		if err != nil {
			t.Fatal(err)
		}
		if got.Server != server1.Addr() || got.Via != server1 || got.Station != server.mac {
			t.Errorf("lease of %s via %s, station %s", got.Server, got.Via, got.Station)
		}
		for _, extend := range []func(*Client, context.Context, lease.Pool, lease.Lease) (lease.Lease, error){
			(*Client).Renew, (*Client).Rebind, (*Client).Confirm,
		} {
			if got, err = extend(c, within(t, usual), home, got); err != nil || got.Station != server.mac {
				t.Fatalf("station %s, %v", got.Station, err)
			}
		}
		if err := c.Decline(t.Context(), home, got); err != nil {
			t.Fatal(err)
		}
		if err := c.Release(t.Context(), home, got); err != nil {
			t.Fatal(err)
		}
		if server.leased() != 0 {
			t.Error("still leased")
		}
		zero := netip.IPv4Unspecified()
		for i, want := range []struct {
			kind    byte
			station lease.MAC
			ciaddr  netip.Addr
			options []byte // of 50 and 54 those that are there
		}{
			{discover, toAll, zero, nil},
			{request, toAll, zero, []byte{50, 54}},
			{request, server.mac, leasedAddr, nil},   // RENEWING
			{request, toAll, leasedAddr, nil},        // REBINDING
			{request, server.mac, zero, []byte{50}},  // INIT-REBOOT
			{decline, toAll, zero, []byte{50, 54}},   //
			{release, toAll, leasedAddr, []byte{54}}, //
		} {
			m := l.log()[i]
			options := slices.DeleteFunc([]byte{50, 54}, func(code byte) bool { return !m.has(code) })
			if m.kind() != want.kind || m.station != want.station || m.ciaddr != want.ciaddr || !slices.Equal(options, want.options) {
				t.Errorf("message %d: type %d to %s, ciaddr %s, options %v", i, m.kind(), m.station, m.ciaddr, options)
			}
			if m.giaddr != zero || m.hops != 0 || m.flags != 0x8000 || m.has(82) {
				t.Errorf("message %d: giaddr %s, %d hops, flags %#x, option 82 % x", i, m.giaddr, m.hops, m.flags, m.get(82))
			}
		}
		if len(l.log()) != 7 {
			t.Errorf("sent %v", l.kinds())
		}
	})
}

// An authoritative server refuses whatever names another one, at once. What it
// says counts for nothing.
func TestBroadcastForeignNAK(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		right, other := newDHCPD(server1), newDHCPD(server2)
		other.delay = time.Second
		l.attach(right, other)
		serve := l.serve
		l.serve = func(m sent) {
			if m.kind() == request && other.hears(m) {
				l.replyBy(m, time.Microsecond, station{mac: other.mac, addr: other.from}, refuse(m.packet, server2.Addr()))
			}
			serve(m)
		}
		got, err := l.broadcaster().Acquire(within(t, usual), want(home, mac1))
		if err != nil || got.Server != server1.Addr() {
			t.Fatalf("lease of %s, %v", got.Server, err)
		}
		checkKinds(t, l, discover, request)
		if other.leased() != 0 {
			t.Error("leased by both")
		}
	})
}

// A renewal is for the leasing server alone: it ends neither by the word of
// another behind the same relay agent, nor by its own silence.
func TestBroadcastRenewForeignNAK(t *testing.T) {
	for name, nak := range map[string]func(packet) []byte{
		"another server's": func(p packet) []byte { return refuse(p, server2.Addr()) },
		"nobody's":         func(p packet) []byte { return answer{to: p, options: []option{opt(53, nak)}}.bytes() },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				l.serve = func(m sent) {
					l.replyBy(m, time.Millisecond, station{mac: stationOf(server1), addr: server1}, nak(m.packet))
				}
				c := l.broadcaster()
				if _, err := c.Renew(within(t, time.Minute), home, onLAN(server1)); !errors.Is(err, lease.ErrNoAnswer) || errors.Is(err, lease.ErrNAK) {
					t.Errorf("renewed: %v", err)
				}
				if _, err := c.Confirm(within(t, time.Second), home, onLAN(server1)); !errors.Is(err, lease.ErrNoAnswer) {
					t.Errorf("confirmed: %v", err)
				}
			})
		})
	}
}

// The leasing server's own refusal ends it at once.
func TestBroadcastExtendRefused(t *testing.T) {
	for _, e := range extensions {
		t.Run(e.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				l.serve = func(m sent) {
					l.replyBy(m, time.Millisecond, station{mac: stationOf(server1), addr: server1}, refuse(m.packet, server1.Addr()))
				}
				_, err := e.call(l.broadcaster(), within(t, time.Minute), home, onLAN(server1))
				if took := time.Since(l.began); !errors.Is(err, lease.ErrNAK) || took != time.Millisecond {
					t.Errorf("after %s: %v", took, err)
				}
			})
		})
	}
}

// Rebinding, all hear the request: another server's refusal counts when the
// lease's own has had its time to acknowledge either form.
func TestBroadcastRebindForeignNAK(t *testing.T) {
	for _, c := range []struct {
		name    string
		ack     byte // the form that the right server answers to: 0, or option 50
		refused bool
		took    time.Duration
	}{
		{"ACK of the first form", 0, false, 10 * time.Millisecond},
		{"ACK of the second form", 50, false, rebootWait + 10*time.Millisecond},
		{"no ACK", 255, true, rebootWait + time.Millisecond + nakWait},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				right := newDHCPD(server1)
				l.serve = func(m sent) {
					l.replyBy(m, time.Millisecond, station{mac: stationOf(server2), addr: server2}, refuse(m.packet, server2.Addr()))
					if c.ack == 0 && !m.has(50) || m.has(c.ack) {
						l.replyBy(m, 10*time.Millisecond, station{mac: right.mac, addr: right.from}, right.answer(m.packet))
					}
				}
				_, err := l.broadcaster().Rebind(within(t, time.Minute), home, onLAN(server1))
				if c.refused != errors.Is(err, lease.ErrNAK) || !c.refused && err != nil {
					t.Errorf("error %v", err)
				}
				if took := time.Since(l.began); took != c.took {
					t.Errorf("took %s, want %s", took, c.took)
				}
			})
		})
	}
}

// Where the answer to a renewal can't be seen, it is asked for again in the
// form of INIT-REBOOT, within the same attempt, however short that is. The
// lease counts from the first of them.
func TestBroadcastExtendUnseen(t *testing.T) {
	for _, e := range extensions {
		for attempt, again := range map[time.Duration]time.Duration{time.Minute: rebootWait, time.Second: time.Second / 2} {
			t.Run(fmt.Sprintf("%s within %s", e.name, attempt), func(t *testing.T) {
				bubble(t, func(t *testing.T, l *lan) {
					server := newDHCPD(server1)
					l.serve = func(m sent) {
						if b := server.answer(m.packet); m.has(50) {
							l.replyBy(m, time.Millisecond, station{mac: server.mac, addr: server.from}, b)
						}
					}
					c, old := l.broadcaster(), onLAN(server1)
					time.Sleep(40 * time.Minute)
					began := time.Now()
					got, err := e.call(c, within(t, attempt), home, old)
					if err != nil {
						t.Fatal(err)
					}
					if !got.Obtained.Equal(began) || !got.Expires.Equal(began.Add(time.Hour)) || got.Station != server.mac || got.Addr() != old.Addr() {
						t.Errorf("extended to %+v", got)
					}
					m := l.log()
					if len(m) != 2 {
						t.Fatalf("sent %v", l.kinds())
					}
					if m[1].at-m[0].at != again || m[0].station != m[1].station || m[0].secs != 600 || m[1].secs != 600 {
						t.Errorf("at %s to %s with %d s, then at %s to %s with %d s", m[0].at, m[0].station, m[0].secs, m[1].at, m[1].station, m[1].secs)
					}
					if m[1].ciaddr != netip.IPv4Unspecified() || m[1].addr(50) != old.Addr() || m[1].has(54) {
						t.Errorf("ciaddr %s, options 50 %s, 54 %s", m[1].ciaddr, m[1].addr(50), m[1].addr(54))
					}
				})
			})
		}
	}
}

// Two messages for each attempt, which lasts as long as its context.
func TestBroadcastExtendUnanswered(t *testing.T) {
	for _, e := range extensions {
		t.Run(e.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				_, err := e.call(l.broadcaster(), within(t, time.Minute), home, onLAN(server1))
				if took := time.Since(l.began); !errors.Is(err, lease.ErrNoAnswer) || took != time.Minute {
					t.Errorf("after %s: %v", took, err)
				}
				checkError(t, err, map[string]string{"renew": "asked 10.10.0.1 on interface eth0", "rebind": "asked by broadcast on interface eth0"}[e.name])
				checkKinds(t, l, request, request)
			})
		})
	}
}

// A relay agent on the LAN leaves its own giaddr in, and is who is spoken to.
func TestBroadcastByRelayAgent(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		far := newDHCPD(netip.MustParseAddrPort("10.40.0.1:67"))
		agent := station{mac: lease.MAC{2, 2, 2, 2, 2, 2}, addr: server1}
		l.serve = func(m sent) {
			if m.station != toAll && m.station != agent.mac {
				t.Errorf("type %d was sent to %s", m.kind(), m.station)
			}
			m.giaddr = server1.Addr()
			if b := far.answer(m.packet); b != nil {
				l.replyBy(m, time.Millisecond, agent, b)
			}
		}
		c := l.broadcaster()
		got, err := c.Acquire(within(t, usual), want(home, mac1))
		if err != nil || got.Server != far.id || got.Station != agent.mac {
			t.Fatalf("lease of %s, station %s, %v", got.Server, got.Station, err)
		}
		if got, err = c.Renew(within(t, usual), home, got); err != nil || got.Station != agent.mac {
			t.Fatalf("station %s, %v", got.Station, err)
		}
		if m := l.log()[2]; m.station != agent.mac || m.giaddr != netip.IPv4Unspecified() {
			t.Errorf("renewal to %s, giaddr %s", m.station, m.giaddr)
		}
		if n := c.Drops().Counts()[errRelay.Error()]; n != 0 {
			t.Errorf("%d dropped", n)
		}
	})
}

// What other hosts of the LAN are answered is none of ours, and nothing is wrong
// with it: an ACK to DHCPINFORM has no lease time.
func TestBroadcastOfOthers(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1))
		c := l.broadcaster()
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); err != nil {
			t.Fatal(err)
		}
		mine := l.log()[1].packet
		others, neighbours := mine, mine
		others.xid++
		neighbours.chaddr[5]++
		for _, to := range []packet{mine, others, neighbours} {
			b := answer{to: to, options: []option{opt(53, ack), addrOpt(54, "10.10.0.1")}}.bytes()
			l.conn(lanPlace).receive(datagram{data: b, from: server1, mac: stationOf(server1)})
		}
		l.conn(lanPlace).receive(datagram{data: []byte{2, 1, 6}, from: server1, mac: stationOf(server1)})
		synctest.Wait()
		if got, want := c.Drops().Counts(), map[string]uint64{errAddress.Error(): 1, errForeign.Error(): 3}; !maps.Equal(got, want) {
			t.Errorf("dropped %v, want %v", got, want)
		}
	})
}

// After a fail-over, or with a new network card, the lease's server is spoken to
// at another station.
func TestBroadcastNewStation(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		partner := newDHCPD(server2)
		l.attach(partner)
		c := l.broadcaster()
		if _, err := c.Renew(within(t, time.Minute), home, onLAN(server1)); !errors.Is(err, lease.ErrNoAnswer) {
			t.Errorf("renewed by one that wasn't asked: %v", err)
		}
		got, err := c.Rebind(within(t, time.Minute), home, onLAN(server1))
		if err != nil || got.Server != partner.id || got.Station != partner.mac {
			t.Fatalf("lease of %s, station %s, %v", got.Server, got.Station, err)
		}
		if _, err := c.Renew(within(t, time.Minute), home, got); err != nil {
			t.Error(err)
		}
		// A lease from before its network asked by broadcast has no station.
		got.Station = toAll
		if got, err = c.Renew(within(t, time.Minute), home, got); err != nil || got.Station != partner.mac {
			t.Errorf("station %s, %v", got.Station, err)
		}
	})
}

// Nobody knows how many servers a LAN has: refused offers don't end the search
// before its time, and a probe takes all.
func TestBroadcastOffers(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		first, second := newDHCPD(server1), newDHCPD(server2)
		second.delay, second.prefix = 3*time.Second, [2]byte{10, 11}
		l.attach(first, second)
		c := l.broadcaster()
		offers, err := c.Probe(within(t, usual), home, mac1)
		if err != nil || len(offers) != 2 || offers[0].Server != first.id || offers[1].Server != second.id {
			t.Fatalf("offers %v, %v", offers, err)
		}
		if took := time.Since(l.began); took != offerWait+time.Millisecond {
			t.Errorf("the probe took %s", took)
		}
		req := want(home, mac1)
		req.Accept = func(addr netip.Addr) error {
			if addr == first.addrOf(mac1) {
				return errors.New("not that one")
			}
			return nil
		}
		if got, err := c.Acquire(within(t, usual), req); err != nil || got.Server != second.id {
			t.Errorf("lease of %s, %v", got.Server, err)
		}
	})
}

// An interface that went and came back is another one: the next exchange takes
// that.
func TestBroadcastInterfaceComesBack(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1))
		c, held := l.broadcaster(), onLAN(server1)
		away := l.mayBeAway(c)
		away.Store(false)
		if _, err := c.Renew(within(t, usual), home, held); err != nil {
			t.Fatal(err)
		}
		away.Store(true)
		old := l.conn(lanPlace)
		old.stale.Store(true)
		for range 2 {
			if _, err := c.Renew(within(t, usual), home, held); !errors.Is(err, errAway) {
				t.Errorf("error %v", err)
			}
		}
		select {
		case <-old.closed:
		default:
			t.Error("the old socket is left open")
		}
		away.Store(false)
		if _, err := c.Renew(within(t, usual), home, held); err != nil || l.conn(lanPlace) == old {
			t.Errorf("not opened anew: %v", err)
		}
		checkKinds(t, l, request, request)
	})
}

var errAway = errors.New("no such network interface")

// mayBeAway lets the interface be away or there.
func (l *lan) mayBeAway(c *Client) (away *atomic.Bool) {
	away = new(atomic.Bool)
	c.openBroadcast = func(at place) (socket, error) {
		if away.Load() {
			return socket{}, errAway
		}
		return l.open(at)
	}
	return away
}

// Exchanges outlive their socket: whoever waits while the interface goes and
// comes back as another one has his lease from that.
func TestBroadcastInterfaceComesBackUnderAnExchange(t *testing.T) {
	for name, run := range map[string]func(t *testing.T, c *Client) error{
		"acquire": func(t *testing.T, c *Client) error {
			_, err := c.Acquire(within(t, 8*time.Second), want(home, mac1))
			return err
		},
		"confirm": func(t *testing.T, c *Client) error {
			_, err := c.Confirm(within(t, 8*time.Second), home, onLAN(server1))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				c := l.broadcaster()
				away := l.mayBeAway(c)
				if err := c.Open(); err != nil {
					t.Fatal(err)
				}
				time.AfterFunc(100*time.Millisecond, func() {
					away.Store(true)
					l.conn(lanPlace).stale.Store(true)
				})
				time.AfterFunc(2*time.Second+100*time.Millisecond, func() {
					l.attach(newDHCPD(server1))
					away.Store(false)
				})
				if err := run(t, c); err != nil {
					t.Fatal(err)
				}
				// The next one to be sent is there at the latest 4 s on.
				if took := time.Since(l.began); took < 2*time.Second || took > 6200*time.Millisecond {
					t.Errorf("took %s", took)
				}
			})
		})
	}
}

// A renewal of which nothing could be sent, by broadcast in neither form, says
// so: no answer will come.
func TestRenewalThatIsNotSent(t *testing.T) {
	for name, want := range map[string]time.Duration{"relay": 0, "broadcast": rebootWait} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				c, held := l.client(server1), held(server1)
				if name == "broadcast" {
					c, held = l.broadcaster(), onLAN(server1)
				}
				down := errors.New("it is down")
				l.write = func(netip.AddrPort) error { return down }
				if _, err := c.Renew(within(t, time.Hour), home, held); !errors.Is(err, down) {
					t.Errorf("error %v", err)
				}
				if took := time.Since(l.began); took != want {
					t.Errorf("took %s, want %s", took, want)
				}
			})
		})
	}
}

// What is closed stays closed.
func TestSendAfterClose(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client(server1)
		link, err := c.link(place1)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		if err := link.send(message{kind: dhcp4.Release, party: party{mac: mac1}}, path{link: link, to: server1}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("error %v", err)
		}
	})
}

// A NAK that names no server may be anybody's on a LAN.
func TestBroadcastNamelessNAK(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.attach(server)
		serve := l.serve
		l.serve = func(m sent) {
			if m.kind() == request {
				nameless := answer{to: m.packet, options: []option{opt(53, 6)}}
				l.reply(m, time.Microsecond, server2, nameless.bytes())
			}
			serve(m)
		}
		if _, err := l.broadcaster().Acquire(within(t, usual), want(home, mac1)); err != nil {
			t.Error(err)
		}
		checkKinds(t, l, discover, request)
	})
}

// Each network its own way. Ways that differ in where they ask are links of
// their own; networks of one way share its link.
func TestBothKindsOfLinks(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1))
		c := l.client(server1)
		for i, o := range []lease.Options{
			{}, {Interface: "eth0"}, {Interface: "eth0", EtherSource: lease.SourceContainer}, {Interface: "eth1"}, {Interface: "eth0"},
		} {
			pool := home
			pool.Options = o
			if _, err := c.Acquire(within(t, usual), want(pool, lease.MAC{2, 0, 0, 0, 0, byte(i)})); err != nil {
				t.Errorf("%+v: %v", o, err)
			}
		}
		for _, at := range []place{place1, lanPlace, {iface: "eth1"}} {
			if l.conn(at) == nil {
				t.Errorf("no link at %s", at)
			}
		}
		if n := len(l.conns); n != 3 {
			t.Errorf("%d links", n)
		}
	})
}

// A start doesn't end because an interface isn't there yet.
func TestOpenBeforeTheInterface(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1))
		c := l.broadcaster()
		wrong := errors.New("no such network interface")
		c.openBroadcast = func(at place) (socket, error) {
			if wrong != nil {
				return socket{}, wrong
			}
			return l.open(at)
		}
		if err := c.Open(); err != nil {
			t.Error(err)
		}
		wrong = nil
		if err := c.Open(); err != nil || l.conn(lanPlace) == nil {
			t.Errorf("not opened: %v", err)
		}
		if len(l.log()) != 0 {
			t.Error("messages at the start")
		}
	})
}
