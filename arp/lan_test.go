package arp

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

func TestMain(m *testing.M) { os.Exit(lab.RunTests(m)) }

// lan is a real LAN of two machines.
type lan struct {
	*testing.T
	us, them *lab.Node
}

func newLAN(t *testing.T) *lan {
	t.Helper()
	l := lab.ForTest(t)
	return &lan{t, must(l.Node("us", "10.10.0.2/24"))(t), must(l.Node("them", "10.10.0.9/24", "10.10.0.101/24"))(t)}
}

// conflict probes for an address on our eth0.
func (l *lan) conflict(addr string, check lease.ConflictCheck) (by lease.MAC, found bool) {
	l.Helper()
	ctx, cancel := context.WithTimeout(l.Context(), 20*time.Second)
	defer cancel()
	must(0, l.us.Do(func() (err error) {
		by, found, err = NewProber().Conflict(ctx, "eth0", ip(addr), check)
		return err
	}))(l.T)
	return by, found
}

// mac is of a node's eth0.
func (l *lan) mac(n *lab.Node) lease.MAC {
	l.Helper()
	var mac lease.MAC
	must(0, n.Do(func() error {
		i, err := net.InterfaceByName("eth0")
		if err == nil {
			mac = lease.MAC(i.HardwareAddr)
		}
		return err
	}))(l.T)
	return mac
}

// send puts a frame on the LAN from a node's eth0, over and over until the
// test ends.
func (l *lan) send(n *lab.Node, frame []byte) {
	l.Helper()
	var conn *packet.Conn
	must(0, n.Do(func() error {
		i, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		conn, err = packet.Listen(i, packet.Raw, unix.ETH_P_ARP, nil)
		return err
	}))(l.T)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for every := time.NewTicker(5 * time.Millisecond); ; {
			if _, err := conn.WriteTo(frame, &packet.Addr{HardwareAddr: broadcast[:]}); err != nil {
				l.Errorf("send from %s: %v", n.Name, err)
				return
			}
			select {
			case <-every.C:
			case <-stop:
				return
			}
		}
	}()
	l.Cleanup(func() { close(stop); <-done; conn.Close() })
}

// A neighbour's kernel answers for its address, and only for that.
func TestNeighbour(t *testing.T) {
	l := newLAN(t)
	began := time.Now()
	by, found := l.conflict("10.10.0.101", lease.ConflictOn)
	if !found || by != l.mac(l.them) {
		t.Errorf("found %t, by %s, want %s", found, by, l.mac(l.them))
	}
	if took := time.Since(began); took > 190*time.Millisecond {
		t.Errorf("found after %s", took)
	}
	began = time.Now()
	if by, found := l.conflict("10.10.0.102", lease.ConflictOn); found {
		t.Errorf("found %s", by)
	}
	if took := time.Since(began); took < 200*time.Millisecond {
		t.Errorf("waited %s only", took)
	}
	// A request from an address would have left it there.
	if cache := must(l.them.Run("ip", "neigh", "show"))(t); cache != "" {
		t.Errorf("the neighbour has learned %s", cache)
	}
}

// RFC 5227's own times.
func TestRFC(t *testing.T) {
	for _, test := range []struct {
		addr        string
		found       bool
		least, most time.Duration
	}{
		{"10.10.0.101", true, 0, 2 * time.Second},
		{"10.10.0.102", false, 4 * time.Second, 8 * time.Second},
	} {
		t.Run(test.addr, func(t *testing.T) {
			t.Parallel()
			l := newLAN(t)
			began := time.Now()
			_, found := l.conflict(test.addr, lease.ConflictRFC)
			if took := time.Since(began); found != test.found || took < test.least || took > test.most {
				t.Errorf("found %t after %s", found, took)
			}
		})
	}
}

// Who probes at the same time is a conflict, unless it is this host: two of our
// networks may ask for the same address, and their servers tell them apart.
func TestProbeAtTheSameTime(t *testing.T) {
	l := newLAN(t)
	l.send(l.us, must(probe(l.mac(l.us), ip("10.10.0.102")))(t))
	l.send(l.them, must(probe(l.mac(l.us), ip("10.10.0.102")))(t)) // and back to us, as by a loop
	if by, found := l.conflict("10.10.0.102", lease.ConflictOn); found {
		t.Errorf("in conflict with ourselves, %s", by)
	}
	l.send(l.them, must(probe(theirMAC, ip("10.10.0.102")))(t))
	if by, found := l.conflict("10.10.0.102", lease.ConflictOn); !found || by != theirMAC {
		t.Errorf("found %t, by %s", found, by)
	}
	if by, found := l.conflict("10.10.0.103", lease.ConflictOn); found {
		t.Errorf("found %s at an address that nobody wants", by)
	}
}

// Who has the address in a VLAN is not on this LAN. The kernel takes such tags
// away before a socket sees the frame.
func TestVLAN(t *testing.T) {
	l := newLAN(t)
	untagged := frame(reply, theirMAC, ip("10.10.0.102"), ip("10.10.0.102"))
	l.send(l.them, slices.Concat(untagged[:12], []byte{0x81, 0x00, 0, 5}, untagged[12:]))
	if by, found := l.conflict("10.10.0.102", lease.ConflictOn); found {
		t.Errorf("found %s of a VLAN", by)
	}
	l.send(l.them, untagged)
	if _, found := l.conflict("10.10.0.102", lease.ConflictOn); !found {
		t.Error("without the tag it isn't found either")
	}
}

// An interface that is of no use is an error with a way out, never silence.
func TestBadInterfaces(t *testing.T) {
	l := newLAN(t)
	must(l.us.Run("ip", "link", "add", "off0", "type", "veth", "peer", "name", "off1"))(t)
	must(l.us.Run("ip", "link", "add", "dark0", "type", "veth", "peer", "name", "dark1"))(t)
	must(l.us.Run("ip", "link", "set", "dark0", "up"))(t)
	must(0, l.us.Do(func() error {
		for _, test := range []struct{ iface, says string }{
			{"", "conflict_check needs the interface"},
			{"nosuch0", "no such network interface"},
			{"lo", "not Ethernet"},
			{"off0", "is down"},
			{"dark0", "no carrier"},
		} {
			_, found, err := NewProber().Conflict(t.Context(), test.iface, probed, lease.ConflictOn)
			if found || err == nil {
				t.Errorf("%q: found %t, %v", test.iface, found, err)
				continue
			}
			for _, word := range []string{test.iface, test.says, "conflict_interface", "conflict_check=off", probed.String()} {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("%q doesn't mention %q", err, word)
				}
			}
		}
		return nil
	}))(t)
}

// Without CAP_NET_RAW the error says so. Only this thread goes without.
func TestNoPermission(t *testing.T) {
	l := newLAN(t)
	must(0, l.us.Do(func() error {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var before [2]unix.CapUserData
		if err := unix.Capget(&header, &before[0]); err != nil {
			return err
		}
		without := before
		without[0].Effective &^= 1 << unix.CAP_NET_RAW
		if err := unix.Capset(&header, &without[0]); err != nil {
			return err
		}
		_, found, err := NewProber().Conflict(t.Context(), "eth0", probed, lease.ConflictOn)
		if found || err == nil || !errors.Is(err, unix.EPERM) {
			t.Errorf("found %t, %v", found, err)
		} else {
			for _, word := range []string{"eth0", "CAP_NET_RAW", "conflict_check=off"} {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("%q doesn't mention %q", err, word)
				}
			}
		}
		return unix.Capset(&header, &before[0])
	}))(t)
}

// An interface that goes down meanwhile must not look like a free address, not
// even after the last probe, when there is nothing more to send.
func TestInterfaceGoesDown(t *testing.T) {
	l := newLAN(t)
	down := make(chan error, 1)
	time.AfterFunc(1200*time.Millisecond, func() {
		_, err := l.us.Run("ip", "link", "set", "eth0", "down")
		down <- err
	})
	must(0, l.us.Do(func() error {
		_, found, err := NewProber().Conflict(t.Context(), "eth0", ip("10.10.0.102"), "1500ms")
		if found || err == nil || !strings.Contains(err.Error(), "eth0") {
			t.Errorf("found %t, %v", found, err)
		}
		return nil
	}))(t)
	must(0, <-down)(t)
}

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

// must takes what a function returned and then the test: must(f())(t).
func must[T any](value T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}
