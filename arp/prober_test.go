package arp

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mdlayher/packet"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// memConn is a packet socket in memory, for a synctest bubble.
type memConn struct {
	t     *testing.T
	began time.Time
	in    chan []byte
	fail  error // of WriteTo

	once   sync.Once
	closed chan struct{}

	// Touched by the prober's one goroutine, then by the test.
	deadline time.Time
	sent     []time.Duration // since began
}

func newMemConn(t *testing.T) *memConn {
	return &memConn{t: t, began: time.Now(), in: make(chan []byte, 100), closed: make(chan struct{})}
}

// prober probes on this socket.
func (c *memConn) prober() Prober {
	return Prober{open: func(iface string) (link, error) {
		if iface != "eth0" {
			return link{}, errors.New("open " + iface)
		}
		return link{conn: c, mac: ourMAC, ours: ours}, nil
	}}
}

// receive lets a frame come in after a time.
func (c *memConn) receive(after time.Duration, frame []byte) {
	time.AfterFunc(after, func() { c.in <- frame })
}

func (c *memConn) ReadFrom(b []byte) (int, net.Addr, error) {
	timer := time.NewTimer(time.Until(c.deadline))
	defer timer.Stop()
	select {
	case frame := <-c.in:
		return copy(b, frame), &packet.Addr{}, nil
	case <-timer.C:
		return 0, nil, os.ErrDeadlineExceeded
	case <-c.closed:
		return 0, nil, net.ErrClosed
	}
}

func (c *memConn) WriteTo(b []byte, to net.Addr) (int, error) {
	if c.fail != nil {
		return 0, c.fail
	}
	want, err := probe(ourMAC, probed)
	if err != nil || !slices.Equal(b, want) {
		c.t.Errorf("sent % x", b)
	}
	if got := to.(*packet.Addr).HardwareAddr; !slices.Equal(got, broadcast[:]) {
		c.t.Errorf("sent to %s", got)
	}
	c.sent = append(c.sent, time.Since(c.began))
	return len(b), nil
}

func (c *memConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

func (c *memConn) SetReadDeadline(t time.Time) error { c.deadline = t; return nil }
func (c *memConn) LocalAddr() net.Addr               { return &packet.Addr{HardwareAddr: ourMAC[:]} }
func (c *memConn) SetDeadline(time.Time) error       { return errors.ErrUnsupported }
func (c *memConn) SetWriteDeadline(time.Time) error  { return errors.ErrUnsupported }

// over checks that the socket was closed.
func (c *memConn) over() {
	c.t.Helper()
	select {
	case <-c.closed:
	default:
		c.t.Error("the socket is left open")
	}
}

func TestTimetable(t *testing.T) {
	for _, test := range []struct {
		name  string
		check lease.ConflictCheck
		after time.Duration // a reply comes; 0 for none
		sent  int
		// took is how long it took, at least and at most.
		least, most time.Duration
	}{
		{"on, free", lease.ConflictOn, 0, 3, 200 * ms, 200 * ms},
		{"on, taken", lease.ConflictOn, 10 * ms, 1, 10 * ms, 10 * ms},
		{"on, the last moment", lease.ConflictOn, 199 * ms, 3, 199 * ms, 199 * ms},
		{"on, too late", lease.ConflictOn, 201 * ms, 3, 200 * ms, 200 * ms},
		{"long, free", "6s", 0, 3, 6 * time.Second, 6 * time.Second},
		{"rfc, free", lease.ConflictRFC, 0, 3, 4 * time.Second, 7 * time.Second},
		{"rfc, taken", lease.ConflictRFC, 1500 * ms, 1, 1500 * ms, 1500 * ms},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newMemConn(t)
				// What is nobody's conflict changes nothing.
				for at := time.Duration(0); at < test.most; at += test.most / 10 {
					c.receive(at, frame(request, ourMAC, none, probed))
					c.receive(at, frame(request, theirMAC, other, probed))
					c.receive(at, []byte("noise"))
				}
				if test.after > 0 {
					c.receive(test.after, frame(reply, theirMAC, probed, none))
				}
				by, found, err := c.prober().Conflict(t.Context(), "eth0", probed, test.check)
				took := time.Since(c.began)
				if err != nil {
					t.Fatal(err)
				}
				conflict := test.after > 0 && test.after == took
				if found != conflict || found != (by == theirMAC) {
					t.Errorf("found %t, by %s", found, by)
				}
				if took < test.least || took > test.most {
					t.Errorf("took %s", took)
				}
				// "rfc" may have sent its second probe by 1.5 s.
				if len(c.sent) != test.sent && !(test.check == lease.ConflictRFC && found && len(c.sent) == 2) {
					t.Errorf("sent at %v", c.sent)
				}
				c.over()
			})
		})
	}
}

// A conflict before the first probe counts as well (RFC 5227 section 2.1.1:
// "from the beginning of the probing process").
func TestConflictBeforeProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newMemConn(t)
		c.in <- frame(request, theirMAC, none, probed)
		by, found, err := c.prober().Conflict(t.Context(), "eth0", probed, lease.ConflictRFC)
		if err != nil || !found || by != theirMAC || len(c.sent) != 0 || time.Since(c.began) != 0 {
			t.Errorf("got %s, %t, %v after %s, sent %v", by, found, err, time.Since(c.began), c.sent)
		}
		c.over()
	})
}

func TestContextEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newMemConn(t)
		ctx, cancel := context.WithTimeout(t.Context(), 50*ms)
		defer cancel()
		_, found, err := c.prober().Conflict(ctx, "eth0", probed, "9s")
		if found || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "eth0") {
			t.Errorf("got %t, %v", found, err)
		}
		if took := time.Since(c.began); took != 50*ms {
			t.Errorf("took %s", took)
		}
		c.over()
	})
}

func TestNoProbes(t *testing.T) {
	p := Prober{open: func(string) (link, error) { t.Error("opened"); return link{}, errors.New("opened") }}
	for _, check := range []lease.ConflictCheck{"", lease.ConflictOff} {
		if _, found, err := p.Conflict(t.Context(), "", probed, check); found || err != nil {
			t.Errorf("%q: got %t, %v", check, found, err)
		}
	}
	for _, addr := range []netip.Addr{{}, none, netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("::ffff:10.10.0.1"), netip.MustParseAddr("224.0.0.1")} {
		if _, found, err := p.Conflict(t.Context(), "eth0", addr, lease.ConflictOn); found || err == nil {
			t.Errorf("%s: got %t, %v", addr, found, err)
		}
	}
}

func TestErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newMemConn(t)
		c.fail = errors.New("network is down")
		_, found, err := c.prober().Conflict(t.Context(), "eth0", probed, lease.ConflictOn)
		if found || !errors.Is(err, c.fail) || !strings.Contains(err.Error(), "eth0") {
			t.Errorf("got %t, %v", found, err)
		}
		c.over()
		if _, _, err := c.prober().Conflict(t.Context(), "eth1", probed, lease.ConflictOn); err == nil || !strings.Contains(err.Error(), "open eth1") {
			t.Errorf("got %v", err)
		}
	})
}
