package dhcp

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

var mac2 = lease.MAC{0x02, 0x42, 0x0a, 0x0a, 0x07, 0x07}

// returning is a lease of server1 whose container comes back with another MAC.
func returning() lease.Lease {
	l := held(server1)
	l.MAC, l.ClientID = mac2, []byte("\x00host/10.10.0.0/24/web")
	return l
}

// acks answers every message with an ACK of an address.
func (l *lan) acks(addr netip.Addr) {
	l.serve = func(m sent) { l.reply(m, time.Millisecond, server1, grant(m.packet, ack, server1.Addr(), addr)) }
}

func TestConfirm(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.acks(leasedAddr)
		old := returning()
		old.Server, old.Options = ip("10.10.0.9"), []byte{1}
		time.Sleep(50 * time.Minute)
		sent := time.Now()
		got, err := l.client(server1, server2).Confirm(within(t, time.Second), home, old)
		if err != nil {
			t.Fatal(err)
		}
		if got.Prefix != old.Prefix || got.Name != old.Name || got.MAC != mac2 || got.Pool != old.Pool || !bytes.Equal(got.ClientID, old.ClientID) {
			t.Errorf("confirmed %+v as %+v", old, got)
		}
		if got.Server != server1.Addr() || got.Via != server1 || len(got.Options) < 2 {
			t.Errorf("server %s via %s, options % x", got.Server, got.Via, got.Options)
		}
		if !got.Obtained.Equal(sent) || !got.Renew.Equal(sent.Add(30*time.Minute)) || !got.Expires.Equal(sent.Add(time.Hour)) {
			t.Errorf("obtained %s, renew %s, expires %s; sent at %s", got.Obtained, got.Renew, got.Expires, sent)
		}
		// The leasing server's word counts: an authoritative dnsmasq refuses
		// what it didn't lease.
		checkKinds(t, l, request)
		m := l.log()[0]
		if m.to != server1 {
			t.Errorf("sent to %s", m.to)
		}
		if m.addr(50) != leasedAddr || m.has(54) || m.ciaddr != netip.IPv4Unspecified() {
			t.Errorf("option 50 %s, 54 % x, ciaddr %s (RFC 2131 section 4.3.2)", m.addr(50), m.get(54), m.ciaddr)
		}
		if !bytes.Equal(m.get(61), old.ClientID) || string(m.get(12)) != "web" || m.mac() != mac2 || m.giaddr != relay1 || m.secs != 0 {
			t.Errorf("client id %q, name %q, chaddr %s, giaddr %s, secs %d", m.get(61), m.get(12), m.mac(), m.giaddr, m.secs)
		}
	})
}

// Two copies can get lost without costing the second that a container's start
// has for this.
func TestConfirmRepeats(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.serve = func(m sent) {
			if len(l.log()) == 3 {
				l.reply(m, time.Millisecond, server1, grant(m.packet, ack, server1.Addr(), leasedAddr))
			}
		}
		got, err := l.client(server1).Confirm(within(t, time.Second), home, returning())
		if err != nil {
			t.Fatal(err)
		}
		// Which copy was acknowledged isn't known (RFC 2131 section 4.4.1).
		if !got.Obtained.Equal(l.began) {
			t.Errorf("obtained %s after the first copy was sent", got.Obtained.Sub(l.began))
		}
		checkConfirmGaps(t, l.log())
	})
}

// checkConfirmGaps asserts the times between sendings: 0.3, 0.6, 1.2, 2.4, 4,
// 4, … s, each shortened by up to half at random.
func checkConfirmGaps(t *testing.T, messages []sent) {
	t.Helper()
	for i := 1; i < len(messages); i++ {
		m, wait := messages[i], min(300*time.Millisecond<<(i-1), 4*time.Second)
		if gap := m.at - messages[i-1].at; gap < wait/2 || gap > wait {
			t.Errorf("sending %d comes %s after the one before, want %s to %s", i, gap, wait/2, wait)
		}
		if m.xid != messages[0].xid || m.secs != uint16(m.at/time.Second) {
			t.Errorf("sending %d has xid %#x and secs %d at %s", i, m.xid, m.secs, m.at)
		}
	}
}

func TestConfirmUnanswered(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		_, err := l.client(server1, server2).Confirm(within(t, 20*time.Second), home, returning())
		if !errors.Is(err, lease.ErrNoAnswer) {
			t.Errorf("error %v is not ErrNoAnswer", err)
		}
		checkError(t, err, "within 20s", "asked 10.10.0.1 from relay address 10.10.0.2)")
		if took := time.Since(l.began); took != 20*time.Second {
			t.Errorf("took %s", took)
		}
		messages := l.log()
		if len(messages) < 7 || len(messages) != len(l.log(request)) {
			t.Errorf("sent %v", l.kinds())
		}
		checkConfirmGaps(t, messages)
	})
}

func TestConfirmCancelled(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(100*time.Millisecond, cancel)
		if _, err := l.client(server1).Confirm(ctx, home, returning()); err == nil {
			t.Error("no error")
		}
		if took := time.Since(l.began); took != 100*time.Millisecond {
			t.Errorf("took %s", took)
		}
		// The lease stays as it is.
		time.Sleep(time.Minute)
		checkKinds(t, l, request)
	})
}

func TestConfirmRefused(t *testing.T) {
	for name, nakFrom := range map[string]func(packet) []byte{
		"with server":     func(p packet) []byte { return refuse(p, server1.Addr()) },
		"of a new server": func(p packet) []byte { return refuse(p, server2.Addr()) },
		"without server":  func(p packet) []byte { return answer{to: p, options: []option{opt(53, nak)}}.bytes() },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				l.serve = func(m sent) { l.reply(m, time.Millisecond, server1, nakFrom(m.packet)) }
				_, err := l.client(server1, server2).Confirm(within(t, time.Second), home, returning())
				if !errors.Is(err, lease.ErrNAK) {
					t.Errorf("error %v is not ErrNAK", err)
				}
				if took := time.Since(l.began); took != time.Millisecond {
					t.Errorf("took %s: the server has spoken", took)
				}
				// There is nothing to release.
				checkKinds(t, l, request)
			})
		})
	}
}

// An OFFER is no answer to a REQUEST, and the server may have a new identifier
// since (fail-over).
func TestConfirmOddAnswers(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.serve = func(m sent) {
			l.reply(m, time.Millisecond, server1, grant(m.packet, offer, server1.Addr(), ip("10.10.0.200")))
			l.reply(m, 2*time.Millisecond, server1, grant(m.packet, ack, server2.Addr(), leasedAddr))
		}
		got, err := l.client(server1, server2).Confirm(within(t, time.Second), home, returning())
		if err != nil || got.Addr() != leasedAddr || got.Server != server2.Addr() || got.Via != server1 {
			t.Errorf("got %s from %s via %s, %v", got.Prefix, got.Server, got.Via, err)
		}
	})
}

// Another address than the one asked for is of no use: it is given back.
func TestConfirmAnotherAddress(t *testing.T) {
	for _, pool := range []lease.Pool{home, away} {
		t.Run(pool.ID, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				other := ip("10.10.0.200")
				l.acks(other)
				got, err := l.client(server2).Confirm(within(t, time.Second), pool, returning())
				checkError(t, err, "server 10.10.0.1 acknowledged", other.String(), leasedAddr.String())
				if errors.Is(err, lease.ErrNAK) || errors.Is(err, lease.ErrNoAnswer) || got.Prefix.IsValid() {
					t.Errorf("got %s, %v", got.Prefix, err)
				}
				checkKinds(t, l, request, release)
				if t.Failed() {
					return
				}
				asked, back := l.log()[0], l.log()[1]
				if back.to != server1 || back.ciaddr != other || back.addr(54) != server1.Addr() || back.mac() != mac2 ||
					!bytes.Equal(back.get(61), asked.get(61)) || !bytes.Equal(back.get(82), asked.get(82)) || back.has(82) != (pool.ID == away.ID) {
					t.Errorf("RELEASE of %s to %s, %s, with options %v", back.ciaddr, back.to, back.mac(), back.options)
				}
			})
		})
	}
}

func TestConfirmWriteErrors(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		unreachable := errors.New("network is unreachable")
		l.write = func(netip.AddrPort) error { return unreachable }
		c := l.client(server1)
		if _, err := c.Confirm(within(t, time.Second), home, returning()); !errors.Is(err, unreachable) || errors.Is(err, lease.ErrNoAnswer) {
			t.Errorf("error %v", err)
		}
		c.source = func(netip.AddrPort) (netip.Addr, error) { return netip.Addr{}, errNoRoute }
		if _, err := c.Confirm(within(t, time.Second), home, returning()); !errors.Is(err, errNoRoute) {
			t.Errorf("error %v", err)
		}
	})
}

// A lease whose record was lost knows neither its server nor its times.
func TestRebindWithoutRecord(t *testing.T) {
	anonymous := func(p packet) []byte { return answer{to: p, options: []option{opt(53, nak)}}.bytes() }
	foreign := func(p packet) []byte { return refuse(p, server1.Addr()) }
	for name, nakFrom := range map[string]func(packet) []byte{"foreign NAK": foreign, "NAK without server": anonymous} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				l.serve = func(m sent) {
					if m.to == server1 {
						l.reply(m, time.Millisecond, server1, nakFrom(m.packet))
						return
					}
					l.reply(m, time.Second, server2, grant(m.packet, ack, server2.Addr(), leasedAddr))
				}
				full := held(server1)
				sent := time.Now()
				got, err := l.client(server1, server2).Rebind(within(t, usual), home, lease.Lease{
					Pool: full.Pool, MAC: full.MAC, Name: full.Name, ClientID: full.ClientID, Prefix: full.Prefix,
				})
				if err != nil {
					t.Fatal(err)
				}
				if got.Prefix != full.Prefix || got.Server != server2.Addr() || got.Via != server2 || !got.Obtained.Equal(sent) || !got.Expires.Equal(sent.Add(time.Hour)) {
					t.Errorf("got %+v", got)
				}
				checkKinds(t, l, request, request)
				for _, m := range l.log() {
					if m.secs != 0 || m.ciaddr != leasedAddr || m.has(50) || m.has(54) {
						t.Errorf("secs %d, ciaddr %s, options %v", m.secs, m.ciaddr, m.options)
					}
				}
			})
		})
	}
}
