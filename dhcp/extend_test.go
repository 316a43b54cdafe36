package dhcp

import (
	"context"
	"errors"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// extension is Renew or Rebind.
type extension struct {
	name string
	call func(*Client, context.Context, lease.Pool, lease.Lease) (lease.Lease, error)
	to   []netip.AddrPort // whom it asks, of server1 and server2
}

var extensions = []extension{
	{"renew", (*Client).Renew, []netip.AddrPort{server1}},
	{"rebind", (*Client).Rebind, []netip.AddrPort{server1, server2}},
}

// eachExtension runs a test for both, with a lease of server1.
func eachExtension(t *testing.T, f func(t *testing.T, l *lan, e extension, extend func(context.Context) (lease.Lease, error))) {
	for _, e := range extensions {
		t.Run(e.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				c, old := l.client(server1, server2), held(server1)
				f(t, l, e, func(ctx context.Context) (lease.Lease, error) { return e.call(c, ctx, home, old) })
			})
		})
	}
}

func TestExtend(t *testing.T) {
	eachExtension(t, func(t *testing.T, l *lan, e extension, extend func(context.Context) (lease.Lease, error)) {
		l.attach(newDHCPD(server1))
		old := held(server1)
		time.Sleep(40 * time.Minute)
		sent := time.Now()
		got, err := extend(within(t, usual))
		if err != nil {
			t.Fatal(err)
		}
		if got.Prefix != old.Prefix || got.Name != old.Name || got.MAC != old.MAC || got.Pool != old.Pool || got.Server != old.Server || got.Via != old.Via {
			t.Errorf("extended %+v to %+v", old, got)
		}
		if !got.Obtained.Equal(sent) || !got.Renew.Equal(sent.Add(30*time.Minute)) || !got.Expires.Equal(sent.Add(time.Hour)) {
			t.Errorf("obtained %s, renew %s, expires %s; sent at %s", got.Obtained, got.Renew, got.Expires, sent)
		}
		if len(got.Options) == 0 {
			t.Error("no options kept")
		}
		messages := l.log()
		if len(messages) != len(e.to) {
			t.Fatalf("sent %v", l.kinds())
		}
		for i, m := range messages {
			// RFC 2131 section 4.3.2, RENEWING and REBINDING.
			if m.kind() != request || m.to != e.to[i] || m.ciaddr != leasedAddr || m.has(50) || m.has(54) || m.giaddr != relay1 {
				t.Errorf("message %d: type %d to %s, ciaddr %s, giaddr %s, options %v", i, m.kind(), m.to, m.ciaddr, m.giaddr, m.options)
			}
			if m.secs != 600 {
				t.Errorf("secs %d, ten minutes after T1", m.secs)
			}
		}
	})
}

// One message for each attempt, which lasts as long as its context: the times
// of attempts are the keeper's.
func TestExtendIsPatient(t *testing.T) {
	eachExtension(t, func(t *testing.T, l *lan, e extension, extend func(context.Context) (lease.Lease, error)) {
		server := newDHCPD(server1)
		l.serve = func(m sent) {
			if m.to == server1 {
				l.reply(m, 10*time.Minute, server1, server.answer(m.packet))
			}
		}
		if _, err := extend(within(t, 11*time.Minute)); err != nil {
			t.Error(err)
		}
		if took := time.Since(l.began); took != 10*time.Minute {
			t.Errorf("took %s", took)
		}
		if len(l.log()) != len(e.to) {
			t.Errorf("sent %v", l.kinds())
		}
	})
}

func TestExtendUnanswered(t *testing.T) {
	eachExtension(t, func(t *testing.T, l *lan, e extension, extend func(context.Context) (lease.Lease, error)) {
		_, err := extend(within(t, time.Minute))
		if !errors.Is(err, lease.ErrNoAnswer) {
			t.Errorf("error %v is not ErrNoAnswer", err)
		}
		if took := time.Since(l.began); took != time.Minute {
			t.Errorf("took %s", took)
		}
		if len(l.log()) != len(e.to) {
			t.Errorf("sent %v", l.kinds())
		}
	})
}

func TestExtendCancelled(t *testing.T) {
	eachExtension(t, func(t *testing.T, l *lan, _ extension, extend func(context.Context) (lease.Lease, error)) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		if _, err := extend(ctx); err == nil {
			t.Error("no error")
		}
		if took := time.Since(l.began); took != time.Second {
			t.Errorf("took %s", took)
		}
		if n := len(l.log(release)); n != 0 {
			t.Error("the lease was released")
		}
	})
}

func TestExtendRefused(t *testing.T) {
	eachExtension(t, func(t *testing.T, l *lan, _ extension, extend func(context.Context) (lease.Lease, error)) {
		l.serve = func(m sent) {
			if m.to == server1 {
				l.reply(m, time.Millisecond, server1, refuse(m.packet, server1.Addr()))
			}
		}
		_, err := extend(within(t, time.Minute))
		if !errors.Is(err, lease.ErrNAK) {
			t.Errorf("error %v is not ErrNAK", err)
		}
		if took := time.Since(l.began); took != time.Millisecond {
			t.Errorf("took %s: the lease's own server has spoken", took)
		}
	})
}

// A NAK of a server that never had the lease comes before the right one's ACK.
func TestRebindForeignNAK(t *testing.T) {
	anonymous := func(p packet) []byte { return answer{to: p, options: []option{opt(53, nak)}}.bytes() }
	foreign := func(p packet) []byte { return refuse(p, server2.Addr()) }
	for _, c := range []struct {
		name    string
		nak     func(packet) []byte
		ack     time.Duration // negative: never
		refused bool
		took    time.Duration
	}{
		{"ACK follows", foreign, 10 * time.Millisecond, false, 10 * time.Millisecond},
		{"ACK follows late", foreign, 1900 * time.Millisecond, false, 1900 * time.Millisecond},
		{"ACK too late", foreign, 2500 * time.Millisecond, true, 2001 * time.Millisecond},
		{"only the NAK", foreign, -1, true, 2001 * time.Millisecond},
		{"NAK without server, ACK follows", anonymous, 10 * time.Millisecond, false, 10 * time.Millisecond},
		{"NAK without server", anonymous, -1, true, 2001 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				right := newDHCPD(server1)
				l.serve = func(m sent) {
					switch {
					case m.to == server2:
						l.reply(m, time.Millisecond, server2, c.nak(m.packet))
						// A repeated one doesn't prolong the wait.
						l.reply(m, 1500*time.Millisecond, server2, c.nak(m.packet))
					case c.ack >= 0:
						l.reply(m, c.ack, server1, right.answer(m.packet))
					}
				}
				_, err := l.client(server1, server2).Rebind(within(t, time.Minute), home, held(server1))
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

// The context may end within the wait for an ACK after a NAK.
func TestRebindNAKAtTheEnd(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.serve = func(m sent) { l.reply(m, time.Millisecond, server2, refuse(m.packet, server2.Addr())) }
		_, err := l.client(server1, server2).Rebind(within(t, time.Second), home, held(server1))
		if !errors.Is(err, lease.ErrNAK) {
			t.Errorf("error %v is not ErrNAK", err)
		}
	})
}

// After a fail-over the partner acknowledges, with its own identifier; from
// then on it is the lease's server.
func TestExtendByPartner(t *testing.T) {
	t.Run("renew", func(t *testing.T) {
		bubble(t, func(t *testing.T, l *lan) {
			l.serve = func(m sent) {
				l.reply(m, time.Millisecond, server1, grant(m.packet, ack, server2.Addr(), leasedAddr))
			}
			c := l.client(server1, server2)
			got, err := c.Renew(within(t, usual), home, held(server1))
			if err != nil {
				t.Fatal(err)
			}
			if got.Server != server2.Addr() || got.Via != server1 {
				t.Errorf("server %s via %s", got.Server, got.Via)
			}
			if err := c.Release(within(t, usual), home, got); err != nil {
				t.Fatal(err)
			}
			if r := l.log(release)[0]; r.addr(54) != server2.Addr() {
				t.Errorf("RELEASE names server %s", r.addr(54))
			}
		})
	})
	t.Run("rebind", func(t *testing.T) {
		bubble(t, func(t *testing.T, l *lan) {
			l.attach(newDHCPD(server2))
			got, err := l.client(server1, server2).Rebind(within(t, usual), home, held(server1))
			if err != nil {
				t.Fatal(err)
			}
			if got.Server != server2.Addr() || got.Via != server2 {
				t.Errorf("server %s via %s", got.Server, got.Via)
			}
		})
	})
}

// An OFFER is no answer to a REQUEST, and another address is the keeper's to
// judge: it is told as it came.
func TestExtendOddAnswers(t *testing.T) {
	eachExtension(t, func(t *testing.T, l *lan, _ extension, extend func(context.Context) (lease.Lease, error)) {
		other := ip("10.10.0.200")
		l.serve = func(m sent) {
			if m.to == server1 {
				l.reply(m, time.Millisecond, server1, grant(m.packet, offer, server1.Addr(), leasedAddr))
				l.reply(m, 2*time.Millisecond, server1, grant(m.packet, ack, server1.Addr(), other))
			}
		}
		got, err := extend(within(t, usual))
		if err != nil || got.Prefix != netip.PrefixFrom(other, 24) {
			t.Errorf("got %s, %v", got.Prefix, err)
		}
	})
}

func TestExtendInfinite(t *testing.T) {
	eachExtension(t, func(t *testing.T, l *lan, _ extension, extend func(context.Context) (lease.Lease, error)) {
		l.serve = func(m sent) {
			l.reply(m, time.Millisecond, server1, answer{m.packet, leasedAddr, []option{opt(53, ack), addrOpt(54, "10.10.0.1"), timeOpt(51, 1<<32-1)}}.bytes())
		}
		got, err := extend(within(t, usual))
		if err != nil || !got.Infinite() {
			t.Errorf("got %+v, %v", got, err)
		}
	})
}

func TestExtendWriteErrors(t *testing.T) {
	eachExtension(t, func(t *testing.T, l *lan, _ extension, extend func(context.Context) (lease.Lease, error)) {
		unreachable := errors.New("network is unreachable")
		l.write = func(netip.AddrPort) error { return unreachable }
		if _, err := extend(within(t, time.Minute)); !errors.Is(err, unreachable) {
			t.Errorf("error %v", err)
		}
	})
}

func TestProbe(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.attach(server)
		c := l.client(server1)
		got, err := c.Probe(within(t, usual), home, lease.MAC{})
		if err != nil {
			t.Fatal(err)
		}
		want := []lease.Offer{{
			Server: server1.Addr(), From: server1.Addr(), Address: server.addrOf(c.probeMAC), Router: ip("10.10.0.1"),
			Subnet: netip.PrefixFrom(server.addrOf(c.probeMAC), 24).Masked(),
			Length: time.Hour, T1: 30 * time.Minute, T2: 52*time.Minute + 30*time.Second, After: time.Millisecond,
		}}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("offer %+v, want %+v", got, want)
		}
		// Never followed by a REQUEST.
		time.Sleep(time.Minute)
		checkKinds(t, l, discover)
		mac := l.log()[0].mac()
		if mac[0]&0x03 != 0x02 {
			t.Errorf("probe MAC %s is not a locally administered unicast address", mac)
		}
		if again := NewClient(lease.Options{}, nil).probeMAC; mac != again {
			t.Errorf("probe MAC %s, then %s", mac, again)
		}
	})
}

// What the host needs to find its servers isn't theirs.
func TestProbeTimesTheServer(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1))
		c := l.client()
		alter(c, func(o *lease.Options) { o.Servers = []lease.Server{{Host: "dhcp.example.org", Port: 67}} })
		c.resolve = func(context.Context, string) ([]netip.Addr, error) {
			time.Sleep(1900 * time.Millisecond)
			return []netip.Addr{server1.Addr()}, nil
		}
		got, err := c.Probe(within(t, usual), home, lease.MAC{})
		if err != nil || len(got) != 1 || got[0].After != time.Millisecond {
			t.Errorf("offers %+v, %v", got, err)
		}
	})
}

func TestProbeUnanswered(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		got, err := l.client(server1).Probe(within(t, 8*time.Second), home, lease.MAC{})
		if !errors.Is(err, lease.ErrNoAnswer) || len(got) != 0 {
			t.Errorf("offer %+v, %v", got, err)
		}
		if took := time.Since(l.began); took != 8*time.Second {
			t.Errorf("took %s", took)
		}
	})
}
