package dhcp

import (
	"errors"
	"net/netip"
	"testing"
	"time"
)

// Several servers: DISCOVER to all, REQUEST and RELEASE to the chosen one,
// wherever its answers come from.
func TestSeveralServers(t *testing.T) {
	elsewhere := netip.MustParseAddrPort("10.12.0.1:67")
	for _, c := range []struct {
		name     string
		id       netip.Addr     // of the answering server, server2
		from     netip.AddrPort // source of its answers
		expected netip.AddrPort // where it is spoken to
	}{
		{"answers from its address", server2.Addr(), server2, server2},
		{"answers from another address", server2.Addr(), elsewhere, server2},
		{"has another identifier", elsewhere.Addr(), server2, server2},
		{"both are others", elsewhere.Addr(), elsewhere, elsewhere},
		{"answers from another port", server2.Addr(), netip.MustParseAddrPort("10.11.0.1:1067"), server2},
		{"listens on another port and answers from another address", server2.Addr(), elsewhere, netip.MustParseAddrPort("10.11.0.1:1067")},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				silent, quick := newDHCPD(server1), newDHCPD(server2)
				silent.delay = 500 * time.Millisecond
				quick.id, quick.from = c.id, c.from
				asked := server2
				if c.expected.Addr() == server2.Addr() {
					asked = c.expected
				}
				l.serve = func(m sent) {
					server := map[netip.AddrPort]*dhcpd{server1: silent, asked: quick, elsewhere: quick}[m.to]
					if server == nil {
						t.Errorf("type %d was sent to %s", m.kind(), m.to)
						return
					}
					if b := server.answer(m.packet); b != nil {
						l.reply(m, time.Millisecond+server.delay, server.from, b)
					}
				}
				client := l.client(server1, asked)
				got, err := client.Acquire(within(t, usual), want(home, mac1))
				if err != nil {
					t.Fatal(err)
				}
				if got.Server != c.id || got.Via != c.expected {
					t.Errorf("server %s via %s, want %s via %s", got.Server, got.Via, c.id, c.expected)
				}
				if err := client.Release(within(t, usual), home, got); err != nil {
					t.Fatal(err)
				}
				checkKinds(t, l, discover, discover, request, release)
				for i, to := range []netip.AddrPort{server1, asked, c.expected, c.expected} {
					if m := l.log()[i]; m.to != to {
						t.Errorf("type %d was sent to %s, want %s", m.kind(), m.to, to)
					}
				}
				if quick.leased() != 0 || silent.leased() != 0 {
					t.Error("something stays leased")
				}
			})
		})
	}
}

// Servers on two links of the host: each is asked from the relay address of
// its link, and the chosen one is spoken to from that.
func TestServersOnTwoLinks(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		relay2 := ip("10.11.0.2")
		near, far := newDHCPD(server1), newDHCPD(server2)
		near.delay = time.Second
		// Neither source nor identifier is what was configured: only the link
		// tells.
		far.id = ip("172.16.0.1")
		far.from = netip.MustParseAddrPort("172.16.0.2:67")
		l.serve = func(m sent) {
			server := near
			if m.relay == relay2 {
				server = far
			}
			if b := server.answer(m.packet); b != nil {
				l.reply(m, time.Millisecond+server.delay, server.from, b)
			}
		}
		c := l.client(server1, server2)
		c.source = func(to netip.AddrPort) (netip.Addr, error) {
			if to == server2 || to.Addr() == far.id {
				return relay2, nil
			}
			return relay1, nil
		}
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); err != nil {
			t.Fatal(err)
		}
		for _, m := range l.log() {
			if m.giaddr != m.relay {
				t.Errorf("type %d left %s with giaddr %s", m.kind(), m.relay, m.giaddr)
			}
			// home contains one relay address only (RFC 3527).
			if m.has(82) != (m.relay == relay2) {
				t.Errorf("type %d from %s: option 82 present: %t", m.kind(), m.relay, m.has(82))
			}
		}
		r := l.log(request)[0]
		if r.relay != relay2 || r.to != netip.AddrPortFrom(far.id, 67) {
			t.Errorf("REQUEST went from %s to %s", r.relay, r.to)
		}
	})
}

// An authoritative dnsmasq refuses what another server offered, and its NAK
// comes before the ACK.
func TestForeignNAK(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.serve = func(m sent) {
			if m.kind() == discover {
				l.reply(m, 0, server2, refuse(m.packet, server2.Addr()))
			}
			if m.kind() == request {
				l.reply(m, 0, server2, refuse(m.packet, server2.Addr()))
				// Another server's ACK is none of ours either.
				l.reply(m, 0, server2, grant(m.packet, ack, server2.Addr(), ip("10.10.0.200")))
			}
			l.reply(m, time.Millisecond, server1, server.answer(m.packet))
		}
		got, err := l.client(server1, server2).Acquire(within(t, usual), want(home, mac1))
		if err != nil {
			t.Fatal(err)
		}
		if got.Addr() != leasedAddr || got.Server != server1.Addr() {
			t.Errorf("leased %s from %s", got.Addr(), got.Server)
		}
		checkKinds(t, l, discover, discover, request)
	})
}

// With two servers, the second may have what the first hasn't, and may need
// longer: a dnsmasq pings for 3 s, an ISC dhcpd for 1 s.
func TestAcceptableOfferComesSecond(t *testing.T) {
	for _, delay := range []time.Duration{0, 400 * time.Millisecond, time.Second, 3 * time.Second} {
		t.Run(delay.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				bad, good := newDHCPD(server1), newDHCPD(server2)
				bad.prefix = [2]byte{192, 168}
				good.delay = delay
				l.attach(bad, good)
				req := want(home, mac1)
				req.Accept = only(leasedAddr)
				got, err := l.client(server1, server2).Acquire(within(t, usual), req)
				if err != nil {
					t.Fatal(err)
				}
				if got.Server != server2.Addr() {
					t.Errorf("leased from %s", got.Server)
				}
				if bad.leased() != 0 {
					t.Error("the other server leased something")
				}
			})
		})
	}
}

func TestAllOffersUnacceptable(t *testing.T) {
	for name, c := range map[string]struct {
		second  time.Duration // delay of the second server; negative for silence
		longest time.Duration
	}{
		"both offer":           {0, 10 * time.Millisecond},
		"the second is slow":   {time.Second, 1100 * time.Millisecond},
		"the second is silent": {-1, 5 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				first, second := newDHCPD(server1), newDHCPD(server2)
				first.prefix = [2]byte{192, 168}
				second.delay = c.second
				servers := []*dhcpd{first, second}
				if c.second < 0 {
					servers = servers[:1]
				}
				l.attach(servers...)
				req := want(home, mac1)
				req.Accept = only(ip("10.10.0.7"))
				_, err := l.client(server1, server2).Acquire(within(t, usual), req)
				if !errors.Is(err, errUnfit) {
					t.Errorf("error %v", err)
				}
				if took := time.Since(l.began); took > c.longest {
					t.Errorf("took %s, want at most %s", took, c.longest)
				}
				if len(l.log(request)) != 0 {
					t.Errorf("sent %v", l.kinds())
				}
			})
		})
	}
}
