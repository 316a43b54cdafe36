package dhcp

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// bubble runs a test in virtual time on a network of its own.
func bubble(t *testing.T, f func(t *testing.T, l *lan)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newLAN(t)) })
}

func checkKinds(t *testing.T, l *lan, want ...byte) {
	t.Helper()
	if got := l.kinds(); !slices.Equal(got, want) {
		t.Errorf("sent message types %v, want %v", got, want)
	}
}

func checkError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want one with %q", parts)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q lacks %q", err, part)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("error of several lines: %q", err)
	}
}

func TestAcquire(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.attach(server)
		c := l.client(server1)
		time.Sleep(time.Hour) // the lease counts from the REQUEST, not from the start
		began := time.Now()
		req := want(home, mac1)
		req.Name, req.Address = "web", leasedAddr
		got, err := c.Acquire(within(t, usual), req)
		if err != nil {
			t.Fatal(err)
		}
		checkKinds(t, l, discover, request)
		d, r := l.log()[0], l.log()[1]
		if d.to != server1 || r.to != server1 {
			t.Errorf("sent to %s and %s", d.to, r.to)
		}
		if d.xid != r.xid {
			t.Errorf("xid %#x, then %#x in one exchange", d.xid, r.xid)
		}
		if d.addr(50) != leasedAddr || string(d.get(12)) != "web" || string(r.get(12)) != "web" {
			t.Errorf("DISCOVER asks for %s with name %q, REQUEST has name %q", d.addr(50), d.get(12), r.get(12))
		}
		acked, _ := parseReply(grant(r.packet, ack, server1.Addr(), leasedAddr))
		sent := began.Add(time.Millisecond)
		want := lease.Lease{
			MAC: mac1, Name: "web", ClientID: append([]byte{1}, mac1[:]...), Prefix: netip.MustParsePrefix("10.10.0.100/32"),
			Server: server1.Addr(), Via: server1, Options: acked.raw,
			Obtained: sent, Renew: sent.Add(30 * time.Minute), Rebind: sent.Add(52*time.Minute + 30*time.Second), Expires: sent.Add(time.Hour),
		}
		if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
			t.Errorf("lease\n%+v, want\n%+v", got, want)
		}
		if server.table[leasedAddr] != mac1 {
			t.Errorf("the server's table: %v", server.table)
		}
		if drops := c.Drops().Counts(); len(drops) != 0 {
			t.Errorf("dropped %v", drops)
		}
	})
}

// The client identifier of a lease that is asked for anew stays as it was.
func TestAcquireWithClientID(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1))
		req := want(home, mac1)
		req.ClientID = []byte{0, 'o', 'l', 'd'}
		got, err := l.client(server1).Acquire(within(t, usual), req)
		if err != nil || !bytes.Equal(got.ClientID, req.ClientID) {
			t.Fatalf("client id %q, %v", got.ClientID, err)
		}
		for _, m := range l.log() {
			if !bytes.Equal(m.get(61), req.ClientID) {
				t.Errorf("type %d has client id %q", m.kind(), m.get(61))
			}
		}
	})
}

// Option 54 of the leases's server counts, and messages go where it was
// reached, at whatever port.
func TestServerPort(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		odd := netip.MustParseAddrPort("10.10.0.1:10067")
		server := newDHCPD(odd)
		l.attach(server)
		c := l.client(odd)
		got, err := c.Acquire(within(t, usual), want(home, mac1))
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Release(within(t, usual), home, got); err != nil {
			t.Fatal(err)
		}
		for _, m := range l.log() {
			if m.to != odd {
				t.Errorf("type %d was sent to %s", m.kind(), m.to)
			}
		}
		if server.leased() != 0 {
			t.Error("not released")
		}
	})
}

// RFC 2131 section 4.1: a random xid for each exchange.
func TestTransactionIDs(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1))
		c := l.client(server1)
		const n = 64
		xids, high := map[uint32]bool{}, map[uint32]bool{}
		for range n {
			if _, err := c.Renew(within(t, usual), home, held(server1)); err != nil {
				t.Fatal(err)
			}
		}
		for _, m := range l.log() {
			xids[m.xid], high[m.xid>>24] = true, true
		}
		if len(xids) != n || len(high) < n/4 {
			t.Errorf("%d exchanges: %d xids with %d highest bytes", n, len(xids), len(high))
		}
	})
}

// checkGaps asserts the times between sendings: 1, 2, 4, 4, … s, each
// shortened by up to half at random.
func checkGaps(t *testing.T, messages []sent) (exact bool) {
	t.Helper()
	exact = true
	for i := 1; i < len(messages); i++ {
		wait := min(1<<(i-1), 4) * int(time.Second)
		gap := messages[i].at - messages[i-1].at
		if gap < time.Duration(wait)/2 || gap > time.Duration(wait) {
			t.Errorf("sending %d comes %s after the one before, want %s to %s", i, gap, time.Duration(wait)/2, time.Duration(wait))
		}
		exact = exact && gap%(time.Second/2) == 0
	}
	return exact
}

func TestRetransmission(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client(server1)
		_, err := c.Acquire(within(t, usual), want(home, mac1))
		if !errors.Is(err, lease.ErrNoAnswer) {
			t.Errorf("error %v is not ErrNoAnswer", err)
		}
		checkError(t, err, "within 30s", "10.10.0.1 from relay address 10.10.0.2", "subnet 10.10.0.0/24", "firewall")
		if took := time.Since(l.began); took != usual {
			t.Errorf("took %s of %s", took, usual)
		}
		sent := l.log()
		if len(sent) < 9 || len(sent) > 17 {
			t.Errorf("%d DISCOVERs in 30 s", len(sent))
		}
		if checkGaps(t, sent) {
			t.Error("no jitter")
		}
		for i, m := range sent {
			if m.kind() != discover || m.xid != sent[0].xid {
				t.Errorf("message %d: type %d, xid %#x", i, m.kind(), m.xid)
			}
			if m.secs != uint16(m.at/time.Second) {
				t.Errorf("secs %d after %s (RFC 2131 section 2; Kea fails over by it)", m.secs, m.at)
			}
		}
	})
}

// The answer to an earlier copy counts: a dnsmasq pings for 3 s before it
// offers.
func TestLateOffer(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		server.delay = 3 * time.Second
		l.attach(server)
		if _, err := l.client(server1).Acquire(within(t, usual), want(home, mac1)); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(l.began); took > 3100*time.Millisecond {
			t.Errorf("took %s with an offer after 3 s", took)
		}
		discovers, requests := l.log(discover), l.log(request)
		if len(discovers) < 2 || len(requests) != 1 {
			t.Fatalf("sent %v", l.kinds())
		}
		// RFC 2131 section 3.1: "the DHCPREQUEST message MUST use the same
		// value in the DHCP message header's 'secs' field".
		if last := discovers[len(discovers)-1]; requests[0].secs != last.secs || last.secs == 0 {
			t.Errorf("secs %d in the REQUEST, %d in the DISCOVER before it", requests[0].secs, last.secs)
		}
	})
}

// Late offers of the same server, which come while its ACK is awaited, are
// nothing.
func TestOffersDuringRequest(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.serve = func(m sent) {
			b := server.answer(m.packet)
			for range 5 {
				l.reply(m, time.Millisecond, server1, b)
			}
		}
		if _, err := l.client(server1).Acquire(within(t, usual), want(home, mac1)); err != nil {
			t.Fatal(err)
		}
		checkKinds(t, l, discover, request)
	})
}

// A REQUEST that got lost is sent again, unchanged.
func TestRequestRetransmission(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.serve = func(m sent) {
			if b := server.answer(m.packet); b != nil && (m.kind() == discover || len(l.log(request)) == 4) {
				l.reply(m, time.Millisecond, server1, b)
			}
		}
		got, err := l.client(server1).Acquire(within(t, usual), want(home, mac1))
		if err != nil {
			t.Fatal(err)
		}
		checkKinds(t, l, discover, request, request, request, request)
		requests := l.log(request)
		checkGaps(t, requests)
		for _, m := range requests {
			m.packet.padding = nil
			if m.secs != 0 || m.xid != requests[0].xid || m.addr(50) != leasedAddr {
				t.Errorf("REQUEST was sent again with secs %d, xid %#x, address %s", m.secs, m.xid, m.addr(50))
			}
		}
		// RFC 2131 section 4.4.1: from the REQUEST on. Which of the copies was
		// acknowledged is not known, so the first one counts.
		if want := l.began.Add(requests[0].at); !got.Obtained.Equal(want) {
			t.Errorf("obtained at %s, want %s", got.Obtained, want)
		}
	})
}

func TestNoServerConfigured(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		_, err := l.client().Acquire(within(t, usual), want(home, mac1))
		checkError(t, err, "no DHCP server is configured", "DHCP_SERVER", "--ipam-opt dhcp_server=")
	})
}
