package dhcp

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

var otherRelay = ip("10.10.0.3")

// asking are global settings of servers that are asked from a relay address.
func asking(relay netip.Addr, servers ...netip.AddrPort) lease.Options {
	o := lease.Options{Relay: relay}
	for _, s := range servers {
		o.Servers = append(o.Servers, lease.Server{Host: s.Addr().String(), Port: s.Port()})
	}
	return o
}

// isOpen reports whether a place's socket is open and locked.
func (l *lan) isOpen(at place) bool {
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.conns[at]; c != nil {
		select {
		case <-c.closed:
		default:
			return l.locked[at]
		}
	}
	return false
}

// asked are the messages of some kinds: from where they went to which server.
func (l *lan) asked(kinds ...byte) (ways []string) {
	for _, m := range l.log(kinds...) {
		ways = append(ways, fmt.Sprintf("%s>%s", m.relay, m.to.Addr()))
	}
	return ways
}

// A new request goes to the new servers from the new relay address; one in hand
// ends as it began. An old lease is renewed by the server that granted it and
// rebound by the new ones, both from the new address.
func TestConfigure(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		first, second := newDHCPD(server1), newDHCPD(server2)
		first.delay = 2 * time.Second
		l.attach(first, second)
		c := l.client()
		if err := c.Configure(asking(relay1, server1)); err != nil {
			t.Fatal(err)
		}
		var before lease.Lease
		var inHand sync.WaitGroup
		inHand.Go(func() {
			var err error
			if before, err = c.Acquire(within(t, usual), want(home, mac1)); err != nil {
				t.Error(err)
			}
		})
		time.Sleep(time.Second)
		if err := c.Configure(asking(otherRelay, server2)); err != nil {
			t.Fatal(err)
		}
		if !l.isOpen(at67(otherRelay)) {
			t.Error("the new relay address is not opened ahead")
		}
		if !l.isOpen(place1) {
			t.Error("the old one was closed")
		}
		inHand.Wait()
		if got, want := l.asked(request), []string{"10.10.0.2>10.10.0.1"}; !slices.Equal(got, want) {
			t.Errorf("in hand: requests %v, want %v", got, want)
		}

		if _, err := c.Acquire(within(t, usual), want(home, lease.MAC{2, 0, 0, 0, 0, 9})); err != nil {
			t.Fatal(err)
		}
		if got, want := l.asked(request)[1:], []string{"10.10.0.3>10.11.0.1"}; !slices.Equal(got, want) {
			t.Errorf("new: requests %v, want %v", got, want)
		}
		renewed, err := c.Renew(within(t, usual), home, before)
		if err != nil || renewed.Server != server1.Addr() {
			t.Errorf("renewed by %v, %v", renewed.Server, err)
		}
		rebound, err := c.Rebind(within(t, usual), home, before)
		if err != nil || rebound.Via != server2 {
			t.Errorf("rebound by %v, %v", rebound.Via, err)
		}
		if got, want := l.asked(request)[2:], []string{"10.10.0.3>10.10.0.1", "10.10.0.3>10.11.0.1"}; !slices.Equal(got, want) {
			t.Errorf("old: requests %v, want %v", got, want)
		}
	})
}

// From relay agent to broadcast and back, between requests and under one that
// nobody answers: links stay open, and each is opened once.
func TestConfigureTheWay(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1))
		c := l.client()
		own := lease.Pool{Subnet: home.Subnet, Options: asking(otherRelay, server1)}
		takes := func(pool lease.Pool, n byte) {
			t.Helper()
			if _, err := c.Acquire(within(t, usual), want(pool, lease.MAC{2, 0, 0, 0, 0, n})); err != nil {
				t.Error(err)
			}
		}
		open := func(at ...place) {
			t.Helper()
			for _, p := range []place{place1, at67(otherRelay), lanPlace} {
				if got := l.isOpen(p); got != slices.Contains(at, p) {
					t.Errorf("%s open: %t", p, got)
				}
			}
		}
		configure := func(o lease.Options) {
			t.Helper()
			if err := c.Configure(o); err != nil {
				t.Error(err)
			}
		}
		configure(asking(netip.IPv4Unspecified(), server1))
		open(place1)
		takes(home, 1)
		takes(own, 2)
		open(place1, at67(otherRelay))
		first := l.conn(place1)
		var unheard sync.WaitGroup
		unheard.Go(func() {
			nobody := lease.Pool{Subnet: home.Subnet, Options: asking(netip.IPv4Unspecified(), server2)}
			if _, err := c.Acquire(within(t, usual), want(nobody, lease.MAC{2, 0, 0, 0, 0, 9})); !errors.Is(err, lease.ErrNoAnswer) {
				t.Errorf("error %v", err)
			}
		})
		synctest.Wait()
		configure(lease.Options{Interface: lanPlace.iface})
		open(place1, at67(otherRelay), lanPlace)
		takes(home, 3)
		takes(own, 4)
		configure(asking(netip.IPv4Unspecified(), server1))
		unheard.Wait()
		takes(home, 5)
		open(place1, at67(otherRelay), lanPlace)
		if l.conn(place1) != first {
			t.Error("a link that is in force was opened anew")
		}
	})
}

// Where another copy serves one of the new relay addresses, all stays as it was,
// and what was opened by then serves when that one has gone. What else is wrong
// may be mended later.
func TestConfigureRefused(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1))
		c := l.client()
		var wrong error
		c.openRelay = func(at place) (socket, error) {
			if at == at67(otherRelay) && wrong != nil {
				return socket{}, wrong
			}
			return l.open(at)
		}
		if err := c.Configure(asking(relay1, server1)); err != nil {
			t.Fatal(err)
		}
		third := ip("10.10.0.4")
		c.source = func(to netip.AddrPort) (netip.Addr, error) {
			if to == server2 {
				return otherRelay, nil
			}
			return third, nil
		}
		wrong = fmt.Errorf("%w there", ErrSecondCopy)
		for _, settings := range []lease.Options{asking(otherRelay, server2), asking(netip.IPv4Unspecified(), server1, server2)} {
			if err := c.Configure(settings); !errors.Is(err, ErrSecondCopy) {
				t.Errorf("error %v", err)
			}
			if _, err := c.Acquire(within(t, usual), want(home, mac1)); err != nil {
				t.Errorf("with the former settings: %v", err)
			}
		}
		if got := l.asked(request); !slices.Equal(got, []string{"10.10.0.2>10.10.0.1", "10.10.0.2>10.10.0.1"}) {
			t.Errorf("with the former settings: requests %v", got)
		}
		if err := c.Alive(within(t, time.Second)); err != nil {
			t.Error(err)
		}
		wrong = nil
		if err := c.Configure(asking(netip.IPv4Unspecified(), server1, server2)); err != nil {
			t.Error(err)
		}
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); err != nil {
			t.Error(err)
		}
		if got := l.asked(request)[2:]; !slices.Equal(got, []string{"10.10.0.4>10.10.0.1"}) {
			t.Errorf("requests %v", got)
		}
		if err := c.Configure(asking(relay1, server1)); err != nil {
			t.Fatal(err)
		}
		l.conn(at67(otherRelay)).stale.Store(true)
		wrong = errors.New("no such address")
		if err := c.Configure(asking(otherRelay, server1)); err != nil {
			t.Error(err)
		}
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); !errors.Is(err, wrong) {
			t.Errorf("error %v", err)
		}
		wrong = nil
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); err != nil {
			t.Error(err)
		}
	})
}

// Exchanged over and over while requests and renewals run, which all succeed, and
// while the watchdog looks: for the race detector.
func TestConfigureAtWork(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1), newDHCPD(server2))
		c := l.client(server1)
		var work sync.WaitGroup
		for n := range 20 {
			work.Go(func() {
				for i := range 20 {
					got, err := c.Acquire(within(t, usual), want(home, lease.MAC{2, 0, 0, 0, byte(n), byte(i)}))
					if err == nil {
						_, err = c.Renew(within(t, usual), home, got)
					}
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		for n := range 100 {
			settings := asking([]netip.Addr{relay1, otherRelay}[n%2], []netip.AddrPort{server1, server2}[n/2%2])
			if err := c.Configure(settings); err != nil {
				t.Error(err)
			}
			if err := c.Alive(within(t, time.Second)); err != nil {
				t.Error(err)
			}
			time.Sleep(time.Millisecond)
		}
		work.Wait()
	})
}
