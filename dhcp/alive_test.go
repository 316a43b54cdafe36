package dhcp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gopacket/gopacket/layers"
	afpacket "github.com/mdlayher/packet"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// stuckConn reads nothing any more once it is stuck, not even its deadline.
type stuckConn struct {
	*memConn
	stuck atomic.Bool
	free  chan struct{}
}

func (c *stuckConn) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := c.memConn.ReadFrom(b)
	if c.stuck.Load() {
		<-c.free
		select {
		case <-c.closed:
			err = net.ErrClosed
		default:
		}
	}
	return n, from, err
}

// A reader that doesn't read is named, with the time, and Alive returns with its
// ctx. Links without a socket have no reader that could be stuck.
func TestAlive(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client()
		conn := &stuckConn{free: make(chan struct{})}
		c.openRelay = func(at place) (socket, error) {
			s, err := l.open(at)
			if at == place1 {
				conn.memConn = s.PacketConn.(*memConn)
				s.PacketConn = conn
			}
			return s, err
		}
		alive := func() error { return c.Alive(within(t, 20*time.Second)) }
		if err := alive(); err != nil {
			t.Errorf("without a link: %v", err)
		}
		for _, at := range []place{place1, at67(otherRelay), lanPlace} {
			if _, err := c.link(at); err != nil {
				t.Fatal(err)
			}
		}
		for range 3 {
			if err := alive(); err != nil {
				t.Error(err)
			}
		}
		if took := time.Since(l.began); took != 0 {
			t.Errorf("three looks took %v", took)
		}

		conn.stuck.Store(true)
		for n := range 2 {
			began := time.Now()
			checkError(t, alive(), fmt.Sprintf("read what comes to relay address 10.10.0.2: stuck for %ds", 20*(n+1)))
			if took := time.Since(began); took != 20*time.Second {
				t.Errorf("took %v", took)
			}
		}
		conn.stuck.Store(false)
		close(conn.free)
		if err := alive(); err != nil {
			t.Errorf("it reads again: %v", err)
		}

		// A socket that is exchanged meanwhile.
		l.conn(lanPlace).stale.Store(true)
		first := l.conn(lanPlace)
		if _, err := c.link(lanPlace); err != nil || l.conn(lanPlace) == first {
			t.Fatal(err)
		}
		if err := alive(); err != nil {
			t.Errorf("after an exchange: %v", err)
		}
	})
}

// A socket whose opening doesn't end is named; its exchanges wait with it.
func TestAliveWhileOpening(t *testing.T) {
	began := time.Now()
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
	// In real time: a bubble's stands still while a mutex is waited for.
	alive := func() error { return c.Alive(within(t, 50*time.Millisecond)) }
	for range 2 {
		if err := alive(); err == nil || !strings.HasPrefix(err.Error(), "open relay address 10.10.0.2: stuck for ") {
			t.Errorf("error %v after %v", err, time.Since(began))
		}
	}
	close(hangs)
	if err := <-opened; err != nil {
		t.Error(err)
	}
	if err := c.Alive(within(t, 10*time.Second)); err != nil {
		t.Error(err)
	}
}

// fullConn has no room for what is sent until full ends, as a socket on an
// interface that sends nothing.
type fullConn struct {
	*memConn
	full chan struct{}
	by   atomic.Pointer[time.Time] // the write deadline
}

func (c *fullConn) SetWriteDeadline(by time.Time) error {
	c.by.Store(&by)
	return nil
}

func (c *fullConn) WriteTo(b []byte, to net.Addr) (int, error) {
	var by <-chan time.Time
	if at := c.by.Load(); at != nil {
		by = time.After(time.Until(*at))
	}
	select {
	case <-c.full:
		return c.memConn.WriteTo(b, to)
	case <-by:
		return 0, os.ErrDeadlineExceeded
	}
}

// What can't be sent is the failure of its exchange, which ends in its time, and
// goes out when it can: nothing hangs.
func TestSendingStandsStill(t *testing.T) {
	for _, client := range []func(*lan) *Client{
		func(l *lan) *Client { return l.client(server1) }, (*lan).broadcaster,
	} {
		bubble(t, func(t *testing.T, l *lan) {
			l.attach(newDHCPD(server1))
			c := client(l)
			full := make(chan struct{})
			c.openRelay = func(at place) (socket, error) {
				s, err := l.open(at)
				s.PacketConn = &fullConn{memConn: s.PacketConn.(*memConn), full: full}
				return s, err
			}
			c.openBroadcast = c.openRelay
			began := time.Now()
			_, err := c.Acquire(within(t, 3*time.Second), want(home, mac1))
			if took := time.Since(began); took > 4*time.Second || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("acquire: %v after %v", err, took)
			}
			began = time.Now()
			_, err = c.Renew(within(t, usual), home, held(server1))
			if took := time.Since(began); took > 4*time.Second || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("renew: %v after %v", err, took)
			}
			if err := c.Alive(within(t, time.Second)); err != nil {
				t.Error(err)
			}
			time.AfterFunc(3*time.Second, func() { close(full) })
			if _, err := c.Acquire(within(t, usual), want(home, mac1)); err != nil {
				t.Error(err)
			}
		})
	}
}

// A socket that is closed while it is looked at is nobody's fault.
func TestAliveWhileClosing(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		s, err := l.open(place1)
		if err != nil {
			t.Fatal(err)
		}
		conn := &stuckConn{memConn: s.PacketConn.(*memConn), free: make(chan struct{})}
		s.PacketConn = conn
		link := newLink(place1, func(place) (socket, error) { return s, nil }, &Drops{}, &recorder{}, slog.New(slog.DiscardHandler))
		if _, err := link.ready(); err != nil {
			t.Fatal(err)
		}
		conn.stuck.Store(true)
		looked := make(chan error)
		go func() { looked <- link.alive(within(t, 20*time.Second)) }()
		synctest.Wait()
		closed := make(chan error)
		go func() { closed <- link.Close() }()
		synctest.Wait()
		close(conn.free)
		if err := <-closed; err != nil {
			t.Error(err)
		}
		if err := <-looked; err != nil || time.Since(l.began) != 0 {
			t.Errorf("%v after %v", err, time.Since(l.began))
		}
	})
}

// Each kind of socket is poked as fast as can be while replies come in: all of
// them are read, and Alive never fails.
func TestAliveLosesNoPacket(t *testing.T) {
	if !inNetns(t) {
		return
	}
	runIP(t, "link set lo mtu 1500")
	cable(t, "eth0", "far0")
	far := farEnd(t, "far0")
	listenAt(t, "udp4", "0.0.0.0", 1067, 0) // so that our socket there is a raw one
	server := listenAt(t, "udp4", serverAddr.String(), 1068, 0)
	for _, c := range []struct {
		name string
		at   place
		send func(reply []byte) error
	}{
		{"UDP", at67(ourAddr), func(b []byte) error {
			_, err := server.WriteTo(b, net.UDPAddrFromAddrPort(at67(ourAddr).relay))
			return err
		}},
		{"raw", place{relay: netip.AddrPortFrom(ourAddr, 1067)}, func(b []byte) error {
			_, err := server.WriteTo(b, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ourAddr, 1067)))
			return err
		}},
		{"packet", lanPlace, func(b []byte) error {
			_, err := far.WriteTo(frameOf(b), &afpacket.Addr{HardwareAddr: net.HardwareAddr(layers.EthernetBroadcast)})
			return err
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			client := NewClient(lease.Options{}, slog.New(slog.DiscardHandler))
			defer client.Close()
			link, err := client.link(c.at)
			if err != nil {
				t.Fatal(err)
			}
			if raw := link.socket.holder != ""; raw != (c.name == "raw") {
				t.Fatalf("the port is held by %q", link.socket.holder)
			}
			const replies = 2000
			got := make(chan reply, replies)
			b := goodOffer()
			if !c.at.broadcast() {
				copy(b[24:], ourAddr.AsSlice())
			}
			key := exchangeKey{binary.BigEndian.Uint32(b[4:]), lease.MAC(b[28:34])}
			link.await(key, party{clientID: lease.MACClientID(mac1)}, got)
			defer link.forget(key)

			looks := make(chan int)
			stop := make(chan struct{})
			go func() {
				n := 0
				for {
					select {
					case <-stop:
						looks <- n
						return
					default:
					}
					if err := client.Alive(within(t, 5*time.Second)); err != nil {
						t.Error(err)
					}
					n++
				}
			}()
			for range replies {
				if err := c.send(b); err != nil {
					t.Fatal(err)
				}
				time.Sleep(20 * time.Microsecond)
			}
			for n := range replies {
				select {
				case <-got:
				case <-time.After(5 * time.Second):
					t.Fatalf("%d of %d replies; dropped: %v", n, replies, client.Drops().Counts())
				}
			}
			close(stop)
			if n := <-looks; n < 100 {
				t.Errorf("%d looks meanwhile", n)
			}
		})
	}
}
