package dhcp

import (
	"encoding/binary"
	"errors"
	"log/slog"
	"maps"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// startMemLink is a link on a socket in memory, with one exchange that waits
// for the answers to asked. It closes with the test.
func startMemLink(t *testing.T) (*Link, *memConn, chan reply) {
	t.Helper()
	l := newLAN(t)
	s, err := l.open(place1)
	if err != nil {
		t.Fatal(err)
	}
	link := newLink(place1, func(place) (socket, error) { return s, nil }, &Drops{}, &recorder{}, slog.New(slog.DiscardHandler))
	if _, err := link.ready(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := link.Close(); err != nil {
			t.Error(err)
		}
	})
	replies := make(chan reply, replyQueue)
	link.await(exchangeKey{asked.xid, mac1}, party{clientID: lease.MACClientID(mac1)}, replies)
	return link, s.PacketConn.(*memConn), replies
}

// Every dropped packet is counted, under the reason for which it was dropped,
// and a good one still passes afterwards.
func TestDropsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		link, conn, replies := startMemLink(t)
		counted := map[string]uint64{}
		for _, c := range hostilePackets() {
			conn.receive(datagram{data: c.data, from: server1})
			counted[c.want.Error()]++
		}
		conn.receive(datagram{data: goodOffer(), from: server1})
		synctest.Wait()
		if got := link.drops.Counts(); !maps.Equal(got, counted) {
			t.Errorf("counted %v, want %v", got, counted)
		}
		if len(replies) != 1 {
			t.Errorf("%d replies, want the good one", len(replies))
		}
	})
}

// An exchange that doesn't read holds up nobody, and says so.
func TestFullExchange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		link, conn, replies := startMemLink(t)
		other := asked
		other.xid++
		others := make(chan reply, replyQueue)
		link.await(exchangeKey{other.xid, mac1}, party{clientID: lease.MACClientID(mac1)}, others)
		for range replyQueue + 5 {
			conn.receive(datagram{data: goodOffer(), from: server1})
		}
		conn.receive(datagram{data: grant(other, offer, server1.Addr(), leasedAddr), from: server1})
		synctest.Wait()
		if len(replies) != replyQueue || len(others) != 1 {
			t.Errorf("%d and %d replies", len(replies), len(others))
		}
		if got := link.drops.Counts()[errFull.Error()]; got != 5 {
			t.Errorf("%d counted as full, want 5", got)
		}
	})
}

// What comes after the end of an exchange is foreign.
func TestForgottenExchange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		link, conn, replies := startMemLink(t)
		link.forget(exchangeKey{asked.xid, mac1})
		link.forget(exchangeKey{asked.xid, mac1})
		conn.receive(datagram{data: goodOffer(), from: server1})
		synctest.Wait()
		if got := link.drops.Counts()[errForeign.Error()]; got != 1 || len(replies) != 0 {
			t.Errorf("%d counted, %d delivered", got, len(replies))
		}
	})
}

// A failing socket is read again, but not in a tight loop.
func TestReadErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, conn, replies := startMemLink(t)
		began := time.Now()
		for range 10 {
			conn.receive(datagram{err: errors.New("interface down")})
		}
		conn.receive(datagram{data: goodOffer(), from: server1})
		<-replies
		if took := time.Since(began); took < 10*readPause || took > 11*readPause {
			t.Errorf("ten read errors took %s", took)
		}
	})
}

// Counts is a copy: whoever reads it can't change the counters.
func TestCountsAreACopy(t *testing.T) {
	var d Drops
	if got := d.Counts(); got == nil || len(got) != 0 {
		t.Errorf("counts %v before the first drop", got)
	}
	d.count(errShort)
	d.Counts()[errShort.Error()] = 99
	if got := d.Counts()[errShort.Error()]; got != 1 {
		t.Errorf("counted %d", got)
	}
}

// FuzzDeliver: no packet blocks or ends the reader, and none that isn't about
// the exchange reaches it.
func FuzzDeliver(f *testing.F) {
	for _, b := range realReplies() {
		f.Add(b)
	}
	for _, c := range hostilePackets() {
		f.Add(c.data)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		link, replies := quietLink(&Drops{})
		from := net.UDPAddrFromAddrPort(server1)
		for range replyQueue + 1 {
			err := link.deliver(slices.Clone(b), from)
			known := []error{errShort, errOp, errHardware, errCookie, errCut, errType, errServer, errAddress, errTime, errRelay, errForeign, errClientID, errFull}
			if err != nil && !slices.Contains(known, err) {
				t.Fatalf("unknown reason %v", err)
			}
		}
		for len(replies) > 0 {
			r := <-replies
			checkReply(t, b, r)
			if r.relay != relay1 || r.mac != lease.MAC(mac1) || binary.BigEndian.Uint32(b[4:]) != asked.xid {
				t.Fatalf("foreign reply %+v was delivered", r)
			}
		}
		// The exchange's own reply still passes.
		if err := link.deliver(goodOffer(), from); err != nil {
			t.Fatal(err)
		}
	})
}
