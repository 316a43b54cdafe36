package dhcp

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

func TestNAKOnce(t *testing.T) {
	for name, nakFrom := range map[string]func(packet) []byte{
		"with server":    func(p packet) []byte { return refuse(p, server1.Addr()) },
		"without server": func(p packet) []byte { return answer{to: p, options: []option{opt(53, nak)}}.bytes() },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				server := newDHCPD(server1)
				l.serve = func(m sent) {
					b := server.answer(m.packet)
					if m.kind() == request && len(l.log(request)) == 1 {
						b = nakFrom(m.packet)
						server.table = map[netip.Addr]lease.MAC{}
					}
					l.reply(m, time.Millisecond, server1, b)
				}
				if _, err := l.client(server1).Acquire(within(t, usual), want(home, mac1)); err != nil {
					t.Fatal(err)
				}
				// No RELEASE: there is nothing to release.
				checkKinds(t, l, discover, request, discover, request)
				sent := l.log()
				if sent[2].xid == sent[0].xid {
					t.Error("the new exchange has the old xid (RFC 2131 section 4.1)")
				}
				if pause := sent[2].at - sent[1].at; pause < 50*time.Millisecond || pause > time.Second {
					t.Errorf("started over after %s", pause)
				}
			})
		})
	}
}

// A server that refuses for ever is not asked in a tight loop (RFC 2131
// section 4.4.1), and its reason is told.
func TestNAKForEver(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.serve = func(m sent) {
			b := server.answer(m.packet)
			if m.kind() == request {
				b = refuse(m.packet, server1.Addr())
			}
			l.reply(m, time.Millisecond, server1, b)
		}
		_, err := l.client(server1).Acquire(within(t, usual), want(home, mac1))
		if !errors.Is(err, lease.ErrNAK) {
			t.Errorf("error %v is not ErrNAK", err)
		}
		checkError(t, err, "10.10.0.1", "wrong network")
		if took := time.Since(l.began); took != usual {
			t.Errorf("took %s", took)
		}
		if n := len(l.log()); n < 10 || n > 100 {
			t.Errorf("%d messages in 30 s", n)
		}
	})
}

// The deadline may pass while the DISCOVER after a NAK is out. That a server
// refused is then still the news.
func TestNAKThenSilence(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.serve = func(m sent) {
			switch b := server.answer(m.packet); {
			case m.kind() == request:
				l.reply(m, time.Millisecond, server1, refuse(m.packet, server1.Addr()))
			case len(l.log(request)) == 0:
				l.reply(m, time.Millisecond, server1, b)
			}
		}
		_, err := l.client(server1).Acquire(within(t, usual), want(home, mac1))
		checkError(t, err, "no DHCP server answered", "refused", "wrong network")
	})
}

var errUnfit = errors.New("address is unfit")

func only(addr netip.Addr) func(netip.Addr) error {
	return func(a netip.Addr) error {
		if a != addr {
			return fmt.Errorf("%w: %s", errUnfit, a)
		}
		return nil
	}
}

func TestUnacceptableOffer(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.attach(server)
		req := want(home, mac1)
		req.Accept = only(ip("10.10.0.7"))
		_, err := l.client(server1).Acquire(within(t, usual), req)
		if !errors.Is(err, errUnfit) {
			t.Errorf("error %v", err)
		}
		if took := time.Since(l.began); took > 10*time.Millisecond {
			t.Errorf("took %s with the only server's word known", took)
		}
		checkKinds(t, l, discover)
	})
}

// An ACK of another address than the offered one: taken when it is acceptable
// (Kea does so without option 50), else given back.
func TestACKOfAnotherAddress(t *testing.T) {
	other := ip("10.10.0.200")
	for name, accept := range map[string]func(netip.Addr) error{"acceptable": anyAddr, "not acceptable": only(leasedAddr)} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				server := newDHCPD(server1)
				l.serve = func(m sent) {
					b := server.answer(m.packet)
					if m.kind() == request {
						b = grant(m.packet, ack, server1.Addr(), other)
						server.table = map[netip.Addr]lease.MAC{other: mac1}
					}
					l.reply(m, time.Millisecond, server1, b)
				}
				req := want(home, mac1)
				req.Accept = accept
				got, err := l.client(server1).Acquire(within(t, usual), req)
				if name == "acceptable" {
					if err != nil || got.Addr() != other {
						t.Errorf("leased %s, %v", got.Addr(), err)
					}
					checkKinds(t, l, discover, request)
					return
				}
				if !errors.Is(err, errUnfit) {
					t.Errorf("error %v", err)
				}
				checkKinds(t, l, discover, request, release)
				if server.leased() != 0 {
					t.Error("the address stays leased")
				}
			})
		})
	}
}
