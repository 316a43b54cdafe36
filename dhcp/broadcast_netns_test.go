package dhcp

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	afpacket "github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// ipLink runs ip link in this namespace.
func ipLink(t *testing.T, commands ...string) {
	t.Helper()
	for _, command := range commands {
		runIP(t, "link "+command)
	}
}

// cable makes a pair of interfaces, of which the first is ours, and waits until
// it carries.
func cable(t *testing.T, ours, theirs string) {
	t.Helper()
	ipLink(t, fmt.Sprintf("add %s type veth peer name %s", ours, theirs), "set "+theirs+" up", "set "+ours+" up")
	carries(t, ours)
}

func carries(t *testing.T, name string) {
	t.Helper()
	if err := lab.Eventually(5*time.Second, func() error {
		i, err := net.InterfaceByName(name)
		if err == nil && i.Flags&net.FlagRunning == 0 {
			err = fmt.Errorf("%s has no carrier", name)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// farEnd is a packet socket at the other end of a cable.
func farEnd(t *testing.T, name string) *afpacket.Conn {
	t.Helper()
	i, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := afpacket.Listen(i, afpacket.Raw, unix.ETH_P_ALL, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// put sends a frame to our end.
func put(t *testing.T, conn *afpacket.Conn, frame []byte) {
	t.Helper()
	if _, err := conn.WriteTo(frame, &afpacket.Addr{HardwareAddr: frame[:6]}); err != nil {
		t.Error(err)
	}
}

// serveOn lets a server answer at the other end of a cable, until that is gone
// or the test is over.
func serveOn(t *testing.T, name string, server *dhcpd) {
	t.Helper()
	conn := farEnd(t, name)
	var over atomic.Bool
	t.Cleanup(func() { over.Store(true) })
	go func() {
		b := make([]byte, 2000)
		for {
			n, _, err := conn.ReadFrom(b)
			if over.Load() {
				return
			}
			if err != nil {
				time.Sleep(10 * time.Millisecond) // it is down
				continue
			}
			if n < 42 || b[36] != 0 || b[37] != 67 {
				continue
			}
			m, err := readPacket(slices.Clone(b[42:n]))
			if err != nil {
				t.Errorf("%v in % x", err, b[:n])
				continue
			}
			if answer := server.answer(m); answer != nil {
				frame := frameOf(answer)
				// What it says meanwhile may be too late for anybody.
				_, _ = conn.WriteTo(frame, &afpacket.Addr{HardwareAddr: frame[:6]})
			}
		}
	}()
}

// onEth0 is a client that asks by broadcast on eth0.
func onEth0(t *testing.T) *Client {
	t.Helper()
	c := NewClient(lease.Options{Interface: "eth0"}, slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// An interface that is of no use is an error with a way out, and a probe, for
// which somebody waits, doesn't wait for it.
func TestBroadcastBadInterfaces(t *testing.T) {
	if !inNetns(t) {
		return
	}
	cable(t, "eth0", "far0")
	ipLink(t,
		"add off0 type veth peer name off1",
		"add dark0 type veth peer name dark1", "set dark0 up",
		"add br0 type bridge", "add port0 type veth peer name port1", "set port0 up master br0",
		"add eth0.20 type veth peer name far20", "set far20 up", "set eth0.20 up",
	)
	carries(t, "eth0.20")
	for name, says := range map[string][]string{
		"eth9":      {"no such network interface", "correct dhcp_interface", "eth0"},
		"eth9.10":   {"no such network interface", "correct dhcp_interface"},
		"eth0.0":    {"no such network interface"},
		"eth0.4095": {"no such network interface"},
		"eth0.x":    {"no such network interface"},
		"eth0.10":   {lease.ErrNoVLAN.Error(), "on eth0,"},
		"off0":      {"is down: bring it up", "correct dhcp_interface"},
		"dark0":     {"has no link: plug it in", "correct dhcp_interface"},
		"lo":        {"is not Ethernet", "correct dhcp_interface"},
		"port0":     {"is a port of bridge br0", "use dhcp_interface=br0"},
	} {
		c := NewClient(lease.Options{Interface: name}, slog.New(slog.DiscardHandler))
		began := time.Now()
		_, err := c.Probe(within(t, usual), home, lease.MAC{})
		checkError(t, err, append(says, "interface "+name)...)
		if took := time.Since(began); took > usual/2 {
			t.Errorf("%s: took %s", name, took)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if errors.Is(err, lease.ErrNoVLAN) != (name == "eth0.10") {
			t.Errorf("%s: %v", name, err)
		}
		if name == "eth9" && containsAll(err.Error(), "port0") {
			t.Errorf("%q offers what is of no use", err)
		}
	}
	for _, name := range []string{"eth0", "eth0.20"} {
		s, err := openBroadcast(place{iface: name})
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
	}
}

func TestBroadcastInterfaceMAC(t *testing.T) {
	if !inNetns(t) {
		return
	}
	ipLink(t, "add eth0 address 02:00:00:00:00:07 type veth peer name far0")
	// Who this host is doesn't depend on a cable.
	got, err := onEth0(t).RelayMAC(t.Context(), home)
	if err != nil || got.String() != "02:00:00:00:00:07" {
		t.Errorf("%s, %v", got, err)
	}
	ipLink(t, "del eth0")
	_, err = onEth0(t).RelayMAC(t.Context(), home)
	checkError(t, err, "interface eth0: no such network interface")
}

// Without CAP_NET_RAW, or where systemd allows no packet sockets, the error says
// what to do.
func TestBroadcastNoPermission(t *testing.T) {
	if !inNetns(t) {
		return
	}
	cable(t, "eth0", "far0")
	for _, without := range []func(*testing.T, func()){withoutNetRaw, withoutPackets} {
		without(t, func() {
			_, err := openBroadcast(lanPlace)
			checkError(t, err, "interface eth0", "CAP_NET_RAW", "dhcp_server", "/usr/share/doc/oam-docker-ipam/broadcast.conf")
		})
	}
}

// What is read: what was sent to whomever, and nothing of a VLAN, whose tag 0 is
// none, or malformed.
func TestBroadcastReads(t *testing.T) {
	if !inNetns(t) {
		return
	}
	cable(t, "eth0", "far0")
	s, err := openBroadcast(lanPlace)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	far := farEnd(t, "far0")
	tagged := func(id byte) []byte {
		return slices.Insert(frameOf(goodOffer()), 12, 0x81, 0, 0, id)
	}
	other := frameOf(goodOffer())
	copy(other, []byte{2, 9, 9, 9, 9, 9})
	odd := frameOf(goodOffer())
	odd[38], odd[39] = 0, 3 // a UDP length that can't be
	for _, c := range []struct {
		frame []byte
		kept  bool
	}{{frameOf(goodOffer()), true}, {tagged(5), false}, {tagged(0), true}, {frameOf(goodOffer()), true}, {other, true}, {odd, false}} {
		put(t, far, c.frame)
		put(t, far, frameOf([]byte{2})) // a mark
		b := make([]byte, 2000)
		kept := false
		for {
			if err := s.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
				t.Fatal(err)
			}
			n, from, err := s.ReadFrom(b)
			if err != nil || from.(heard).mac != ourMAC {
				t.Fatalf("from %s: %v", from, err)
			}
			if n == 1 {
				break
			}
			kept = n == len(goodOffer())
		}
		if kept != c.kept {
			t.Errorf("kept %t: % x", kept, c.frame[:16])
		}
	}
	// A crowd's answers don't get lost.
	if err := s.PacketConn.(*broadcastConn).control(func(fd int) error {
		size, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
		if size < replyBuffer {
			t.Errorf("the buffer has %d bytes", size)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	// The port is the host's.
	conn, err := net.ListenPacket("udp4", ":68")
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

// The Ethernet source is the interface's address of that moment, or the
// container's.
func TestBroadcastWrites(t *testing.T) {
	if !inNetns(t) {
		return
	}
	cable(t, "eth0", "far0")
	far := farEnd(t, "far0")
	written := func(to lease.MAC, source lease.EtherSource) (frame []byte) {
		t.Helper()
		link := newLink(lanPlace, openBroadcast, &Drops{}, &recorder{}, slog.New(slog.DiscardHandler))
		if _, err := link.ready(); err != nil {
			t.Fatal(err)
		}
		defer link.Close()
		ipLink(t, "set eth0 address 02:00:00:00:00:07")
		if err := link.send(message{kind: 1, party: party{mac: mac1}, options: lease.Options{EtherSource: source}}, path{link: link, station: to}); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 2000)
		for {
			n, _, err := far.ReadFrom(b)
			if err != nil {
				t.Fatal(err)
			}
			if n > 300 {
				return b[:n]
			}
		}
	}
	for _, c := range []struct {
		to       lease.MAC
		source   lease.EtherSource
		src, dst string
	}{
		{lease.MAC{}, "", "02:00:00:00:00:07", "ff:ff:ff:ff:ff:ff"},
		{ourMAC, "", "02:00:00:00:00:07", ourMAC.String()},
		{lease.MAC{}, lease.SourceContainer, mac1.String(), "ff:ff:ff:ff:ff:ff"},
	} {
		frame := written(c.to, c.source)
		if dst, src := lease.MAC(frame[:6]).String(), lease.MAC(frame[6:12]).String(); src != c.src || dst != c.dst {
			t.Errorf("from %s to %s, want from %s to %s", src, dst, c.src, c.dst)
		}
	}
}

// Whatever happens to the interface, an exchange says what is wrong, and the
// next one after it is back succeeds.
func TestBroadcastFlaps(t *testing.T) {
	if !inNetns(t) {
		return
	}
	cable(t, "eth0", "far0")
	serveOn(t, "far0", newDHCPD(server1))
	c := onEth0(t)
	if err := c.Open(); err != nil {
		t.Fatal(err)
	}
	held, err := c.Acquire(within(t, usual), want(home, mac1))
	if err != nil {
		t.Fatal(err)
	}
	renew := func() error {
		_, err := c.Renew(within(t, 300*time.Millisecond), home, held)
		return err
	}
	works := func(when string) {
		t.Helper()
		if err := lab.Eventually(5*time.Second, renew); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	link := c.links[lanPlace]
	first := link.socket.PacketConn

	ipLink(t, "set eth0 down")
	checkError(t, renew(), "send on interface eth0: it is down: bring it up")
	ipLink(t, "set eth0 up")
	works("up again")
	ipLink(t, "set far0 down")
	checkError(t, renew(), "send on interface eth0: it has no link")
	ipLink(t, "set far0 up")
	works("plugged in again")
	ipLink(t, "set eth0 down", "set eth0 name lan0", "set lan0 up")
	works("renamed")
	if link.socket.PacketConn != first {
		t.Error("opened anew although the interface is the same")
	}

	// Another one with its name is another LAN.
	cable(t, "eth0", "far1")
	checkError(t, renew(), lease.ErrNoAnswer.Error())
	if link.socket.PacketConn == first {
		t.Error("not opened anew")
	}
	ipLink(t, "del eth0")
	for range 2 {
		checkError(t, renew(), "interface eth0: no such network interface")
	}
	ipLink(t, "set lan0 down", "set lan0 name eth0", "set eth0 up")
	works("named back")

	ipLink(t, "del eth0")
	checkError(t, renew(), "interface eth0: no such network interface")
	cable(t, "eth0", "far0")
	serveOn(t, "far0", newDHCPD(server1))
	works("made anew")

	// A start waits for the link, also a daemon's first.
	fresh := onEth0(t)
	ipLink(t, "set eth0 down")
	started := make(chan error, 1)
	go func() {
		_, err := fresh.Acquire(within(t, usual), want(home, mac1))
		started <- err
	}()
	select {
	case err := <-started:
		t.Fatalf("ended while the link was down: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	ipLink(t, "set eth0 up")
	if err := <-started; err != nil {
		t.Errorf("plugged in during a start: %v", err)
	}
}

// What can't be sent because the interface is gone is told so, and closing its
// link ends.
func TestBroadcastInterfaceGoes(t *testing.T) {
	if !inNetns(t) {
		return
	}
	cable(t, "eth0", "far0")
	c := onEth0(t)
	if err := c.Open(); err != nil {
		t.Fatal(err)
	}
	link := c.links[lanPlace]
	ipLink(t, "del eth0")
	err := link.send(message{kind: 1, party: party{mac: mac1}}, path{link: link})
	checkError(t, err, "interface eth0: no such network interface")
	// Closing ends the reader although no frame will ever come.
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
