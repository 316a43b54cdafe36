package dhcp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Addresses of the namespaces made here.
var (
	ourAddr    = ip("192.0.2.2")
	otherAddr  = ip("192.0.2.3")
	serverAddr = ip("192.0.2.1")
)

// inNetns runs the calling test once more, in a process and a network
// namespace of its own, which end together. It returns true in there; outside,
// the test is over when it returns.
func inNetns(t *testing.T) bool {
	t.Helper()
	const key = "DHCP_TEST_OUTSIDE"
	here, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if outside := os.Getenv(key); outside != "" {
		if outside == here {
			t.Fatal("not in a namespace of its own")
		}
		runIP(t, "link set lo up", "addr add 192.0.2.1/32 dev lo", "addr add 192.0.2.2/32 dev lo", "addr add 192.0.2.3/32 dev lo")
		return true
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), key+"="+here)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, os.ErrPermission) {
		if os.Getenv("CI") == "true" {
			t.Fatalf("make a network namespace: %v", err)
		}
		t.Skipf("needs root for a network namespace: %v", err)
	}
	if err != nil {
		t.Errorf("in its own network namespace: %v\n%s", err, out)
	}
	return false
}

// listen binds port 67, with or without SO_REUSEADDR, as another program on
// the host would.
func listen(t *testing.T, network, addr string, reuse int) net.PacketConn {
	t.Helper()
	return listenAt(t, network, addr, lease.ServerPort, reuse)
}

func listenAt(t *testing.T, network, addr string, port, reuse int) net.PacketConn {
	t.Helper()
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		return errors.Join(raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, reuse) }), err)
	}}
	conn, err := config.ListenPacket(t.Context(), network, net.JoinHostPort(addr, strconv.Itoa(port)))
	if err != nil {
		t.Fatalf("another program can't bind %s: %v", addr, err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// read waits a while for the next packet.
func read(t *testing.T, conn net.PacketConn, b []byte) (int, net.Addr) {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	n, from, err := conn.ReadFrom(b)
	if err != nil {
		t.Fatal(err)
	}
	return n, from
}

// runIP runs ip commands in this namespace.
func runIP(t *testing.T, commands ...string) {
	t.Helper()
	for _, command := range commands {
		if out, err := exec.Command("ip", strings.Fields(command)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", command, err, out)
		}
	}
}

// openOurs is openRelay of our address; it is closed by the returned function.
func openOurs(t *testing.T) (net.PacketConn, func()) {
	t.Helper()
	s, err := openRelay(at67(ourAddr))
	if err != nil {
		t.Fatal(err)
	}
	return s, func() { s.Close(); s.unlock() }
}

func TestOpenRelay(t *testing.T) {
	if !inNetns(t) {
		return
	}
	conn, closeOurs := openOurs(t)
	if got := conn.LocalAddr().String(); got != "192.0.2.2:67" {
		t.Errorf("bound %s, never the wildcard", got)
	}
	if _, err := openRelay(at67(ourAddr)); !errors.Is(err, ErrSecondCopy) {
		t.Errorf("second copy: %v", err)
	} else {
		checkError(t, err, "192.0.2.2", "LISTEN_ADDR")
	}
	other, err := openRelay(at67(otherAddr))
	if err != nil {
		t.Fatalf("a second relay address: %v", err)
	}
	other.Close()
	other.unlock()
	closeOurs()
	_, closeOurs = openOurs(t)
	closeOurs()
}

// A bind that fails frees the lock: the next request tries again.
func TestRelayAddressMissing(t *testing.T) {
	if !inNetns(t) {
		return
	}
	missing := ip("192.0.2.9")
	for range 2 {
		_, err := openRelay(at67(missing))
		if errors.Is(err, ErrSecondCopy) {
			t.Fatal("the failed attempt kept its lock")
		}
		checkError(t, err, "192.0.2.9 is not an address of this host", "192.0.2.1, 192.0.2.2, 192.0.2.3", "LISTEN_ADDR")
	}
	runIP(t, "addr add 192.0.2.9/32 dev lo")
	s, err := openRelay(at67(missing))
	if err != nil {
		t.Fatalf("once the address is there: %v", err)
	}
	s.Close()
	s.unlock()
}

// holders are programs that keep our socket from its port, and the network and
// address that they have bound.
var holders = []struct{ network, addr string }{
	{"udp4", "192.0.2.2"}, {"udp4", "0.0.0.0"}, {"udp", "::"},
}

// Where another program has the port, we read and write beside it.
func TestPortTaken(t *testing.T) {
	if !inNetns(t) {
		return
	}
	runIP(t, "link set lo mtu 1500")
	answer := goodOffer()
	atServer := netip.AddrPortFrom(serverAddr, 1068)
	server := listenAt(t, "udp4", "192.0.2.1", 1068, 0)
	for _, port := range []uint16{67, 1067} {
		at := place{relay: netip.AddrPortFrom(ourAddr, port)}
		for _, c := range holders {
			t.Run(fmt.Sprintf("%s, port %d", c.addr, port), func(t *testing.T) {
				taken := listenAt(t, c.network, c.addr, int(port), 0)
				s, err := openRelay(at)
				if err != nil {
					t.Fatal(err)
				}
				if want := fmt.Sprintf("(pid %d)", os.Getpid()); !strings.Contains(s.holder, want) {
					t.Errorf("the port is held by %q, want %s", s.holder, want)
				}
				if _, err := openRelay(at); !errors.Is(err, ErrSecondCopy) {
					t.Errorf("second copy: %v", err)
				}

				// A server sees the message as it would from the port, with a checksum;
				// its kernel drops wrong ones.
				wire, err := net.ListenPacket("ip4:udp", serverAddr.String())
				if err != nil {
					t.Fatal(err)
				}
				defer wire.Close()
				if n, err := s.WriteTo([]byte("odd"), net.UDPAddrFromAddrPort(atServer)); n != 3 || err != nil {
					t.Fatalf("%d bytes written, %v", n, err)
				}
				b := make([]byte, 1<<16)
				n, from := read(t, server, b)
				if string(b[:n]) != "odd" || from.String() != at.relay.String() {
					t.Errorf("the server has %q from %s", b[:n], from)
				}
				if n, _ = read(t, wire, b); n != 8+3 || b[6] == 0 && b[7] == 0 {
					t.Errorf("on the wire: % x, want a UDP header with a checksum and 3 bytes", b[:n])
				}

				// Of what comes to the address, the replies to the port are ours, from
				// whatever port.
				for _, other := range []struct {
					data []byte
					addr netip.Addr
					port uint16
				}{
					{with(answer, 0, 1), ourAddr, port}, {answer, otherAddr, port}, {answer, ourAddr, port + 1}, {nil, ourAddr, port}, {answer, ourAddr, port},
				} {
					to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(other.addr, other.port))
					if _, err := server.WriteTo(other.data, to); err != nil {
						t.Fatal(err)
					}
				}
				n, from = read(t, s, b)
				if !bytes.Equal(b[:n], answer) || from.String() != atServer.String() {
					t.Errorf("read %d bytes from %s", n, from)
				}
				// A reply of several fragments comes as one.
				long := append(slices.Clone(answer), make([]byte, 9000)...)
				if _, err := server.WriteTo(long, net.UDPAddrFromAddrPort(at.relay)); err != nil {
					t.Fatal(err)
				}
				if n, _ = read(t, s, b); !bytes.Equal(b[:n], long) {
					t.Errorf("read %d bytes of %d", n, len(long))
				}
				// The other program has them, too.
				if n, _ = read(t, taken, b); n != len(answer) {
					t.Errorf("the other program has read %d bytes", n)
				}

				taken.Close()
				s.Close()
				s.unlock()
				if s, err = openRelay(at); err != nil || s.holder != "" {
					t.Fatalf("once the port is free: held by %q, %v", s.holder, err)
				}
				if got := s.LocalAddr().String(); got != at.relay.String() {
					t.Errorf("bound %s", got)
				}
				s.Close()
				s.unlock()
			})
		}
	}
}

// withoutNetRaw runs a function on a thread that may open no raw sockets.
func withoutNetRaw(t *testing.T, f func()) {
	t.Helper()
	restricted(t, f, func() error {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		if err := unix.Capget(&header, &caps[0]); err != nil {
			return err
		}
		caps[0].Effective &^= 1 << unix.CAP_NET_RAW
		return unix.Capset(&header, &caps[0])
	})
}

// withoutPackets runs a function on a thread that may open no packet sockets, as
// systemd's RestrictAddressFamilies= has it.
func withoutPackets(t *testing.T, f func()) {
	t.Helper()
	filter, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 0, Size: 4}, // the system call
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.SYS_SOCKET, SkipTrue: 3},
		bpf.LoadAbsolute{Off: 16, Size: 4}, // its first argument
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.AF_PACKET, SkipTrue: 1},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(unix.EAFNOSUPPORT)},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW},
	})
	if err != nil {
		t.Fatal(err)
	}
	restricted(t, f, func() error {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return err
		}
		program := unix.SockFprog{Len: uint16(len(filter)), Filter: (*unix.SockFilter)(unsafe.Pointer(&filter[0]))}
		_, _, failed := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program)))
		if failed != 0 {
			return failed
		}
		return nil
	})
}

// restricted runs a function on a thread that has given up some of its rights.
func restricted(t *testing.T, f func(), giveUp func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		var err error
		defer func() { done <- err }() // also when f ends the goroutine
		if err = giveUp(); err == nil {
			f()
		}
	}()
	if err := <-done; err != nil {
		t.Fatalf("give up rights: %v", err)
	}
}

// Without CAP_NET_RAW a taken port is an error that names its holder. A free
// one needs nothing.
func TestPortTakenWithoutNetRaw(t *testing.T) {
	if !inNetns(t) {
		return
	}
	withoutNetRaw(t, func() {
		for _, c := range holders {
			taken := listen(t, c.network, c.addr, 0)
			for range 2 {
				_, err := openRelay(at67(ourAddr))
				if errors.Is(err, ErrSecondCopy) {
					t.Error("the failed attempt kept its lock")
				}
				checkError(t, err, "UDP port 67 of relay address 192.0.2.2 is taken by", fmt.Sprintf("(pid %d)", os.Getpid()), "bind-interfaces", "LISTEN_ADDR", "CAP_NET_RAW", "broadcast.conf")
			}
			taken.Close()
			_, closeOurs := openOurs(t)
			closeOurs()
		}
		_, err := openBeside(at67(ourAddr))
		checkError(t, err, "raw socket on relay address 192.0.2.2", "CAP_NET_RAW")
	})
}

// We live beside servers and relays on the same host, whoever starts first,
// and get what is meant for our address.
func TestBesideOthers(t *testing.T) {
	if !inNetns(t) {
		return
	}
	for _, other := range []struct {
		addr  string
		reuse int
	}{{"0.0.0.0", 1}, {"192.0.2.3", 1}, {"192.0.2.3", 0}} {
		for _, first := range []string{"we", "they"} {
			t.Run(fmt.Sprintf("%s reuse %d, %s first", other.addr, other.reuse, first), func(t *testing.T) {
				if first == "they" {
					listen(t, "udp4", other.addr, other.reuse)
				}
				conn, closeOurs := openOurs(t)
				defer closeOurs()
				if first == "we" {
					listen(t, "udp4", other.addr, other.reuse)
				}
				sender, err := net.Dial("udp4", "192.0.2.2:67")
				if err != nil {
					t.Fatal(err)
				}
				defer sender.Close()
				if _, err := sender.Write([]byte("ours")); err != nil {
					t.Fatal(err)
				}
				b := make([]byte, 10)
				if n, _ := read(t, conn, b); string(b[:n]) != "ours" {
					t.Errorf("received %q", b[:n])
				}
			})
		}
	}
}

func TestSourceTowards(t *testing.T) {
	if !inNetns(t) {
		return
	}
	runIP(t, "route add 198.51.100.0/24 dev lo src 192.0.2.3")
	for to, want := range map[string]string{"192.0.2.1": "192.0.2.1", "198.51.100.1": "192.0.2.3"} {
		if got, err := sourceTowards(netip.AddrPortFrom(ip(to), 67)); err != nil || got != ip(want) {
			t.Errorf("towards %s: %s, %v; want %s", to, got, err, want)
		}
	}
	_, err := sourceTowards(netip.MustParseAddrPort("203.0.113.1:67"))
	checkError(t, err, "no route")
}

func TestHardwareOf(t *testing.T) {
	if !inNetns(t) {
		return
	}
	runIP(t, "link add eth0 address 02:00:00:00:00:07 type veth peer name eth1", "addr add 198.51.100.2/24 dev eth0")
	if got, err := hardwareOf(ip("198.51.100.2")); err != nil || got.String() != "02:00:00:00:00:07" {
		t.Errorf("%s, %v", got, err)
	}
	_, err := hardwareOf(ourAddr)
	checkError(t, err, "interface lo of relay address 192.0.2.2 has no MAC address")
	_, err = hardwareOf(ip("198.51.100.3"))
	checkError(t, err, "198.51.100.3 is not an address of this host", "198.51.100.2")
}

// Who this host is doesn't change when containers come to its bridge and go.
func TestHardwareOfBridge(t *testing.T) {
	if !inNetns(t) {
		return
	}
	is := func(when, want string) {
		t.Helper()
		if got, err := hardwareOf(ip("198.51.100.2")); err != nil || got.String() != want {
			t.Errorf("%s: as relay %s, %v", when, got, err)
		}
		if got, err := interfaceMAC("br0"); err != nil || got.String() != want {
			t.Errorf("%s: by broadcast %s, %v", when, got, err)
		}
	}
	runIP(t, "link add br0 address 02:00:00:00:00:01 type bridge", "addr add 198.51.100.2/24 dev br0")
	is("without ports", "02:00:00:00:00:01")
	runIP(t, "link add eth0 address 02:00:00:00:00:07 type veth peer name eth1", "link set eth0 master br0")
	is("with a MAC of its own", "02:00:00:00:00:01")

	runIP(t, "link del br0", "link add br0 type bridge", "addr add 198.51.100.2/24 dev br0", "link set eth0 master br0")
	is("with its port's", "02:00:00:00:00:07")
	runIP(t, "link add container address 02:00:00:00:00:02 type veth peer name inside", "link set container master br0")
	if i, err := net.InterfaceByName("br0"); err != nil || i.HardwareAddr.String() != "02:00:00:00:00:02" {
		t.Fatalf("the bridge hasn't got the container's MAC: %v, %v", i, err)
	}
	is("with a container's", "02:00:00:00:00:07")
}

// serveReal runs a server on a real socket of this namespace.
func serveReal(t *testing.T) *dhcpd {
	t.Helper()
	server := newDHCPD(netip.AddrPortFrom(serverAddr, 67))
	server.prefix = [2]byte{192, 0}
	conn := listen(t, "udp4", "192.0.2.1", 1)
	go func() {
		b := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			m, err := readPacket(b[:n])
			if err != nil || from.String() != "192.0.2.2:67" || m.giaddr != ourAddr {
				t.Errorf("from %s came giaddr %s, %v", from, m.giaddr, err)
			}
			if answer := server.answer(m); answer != nil {
				if _, err := conn.WriteTo(answer, from); err != nil {
					t.Error(err)
				}
			}
		}
	}()
	return server
}

// The whole way over real sockets, the server on another address of this
// namespace. With LISTEN_ADDR 0.0.0.0 that would be the server's own address,
// which is refused.
func TestRealSockets(t *testing.T) {
	if !inNetns(t) {
		return
	}
	server := serveReal(t)
	global := lease.Options{Servers: []lease.Server{{Host: "192.0.2.1", Port: 67}}, Relay: netip.IPv4Unspecified()}
	c := NewClient(global, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	pool := lease.Pool{Subnet: netip.MustParsePrefix("192.0.2.0/24")}
	_, err := c.Acquire(ctx, want(pool, mac1))
	checkError(t, err, "DHCP server 192.0.2.1 is the relay address itself")

	pool.Options.Relay = ourAddr
	got, err := c.Acquire(ctx, want(pool, mac1))
	if err != nil {
		t.Fatal(err)
	}
	if _, err = c.Renew(ctx, pool, got); err != nil {
		t.Fatal(err)
	}
	if server.leased() != 1 {
		t.Error("nothing leased")
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := openRelay(at67(ourAddr)); err != nil {
		t.Errorf("after Close: %v", err)
	}
}

// A prober asks beside a daemon and where nobody has the port. It leaves
// lock and port to others.
func TestProber(t *testing.T) {
	if !inNetns(t) {
		return
	}
	serveReal(t)
	global := lease.Options{Servers: []lease.Server{{Host: "192.0.2.1", Port: 67}}, Relay: ourAddr}
	pool := lease.Pool{Subnet: netip.MustParsePrefix("192.0.2.0/24")}
	probe := func(t *testing.T) {
		t.Helper()
		c := NewProber(global, slog.New(slog.DiscardHandler))
		for range 2 {
			offers, err := c.Probe(within(t, 10*time.Second), pool, mac2)
			if err != nil || len(offers) != 1 || offers[0].Server != serverAddr {
				t.Errorf("offers %+v, %v", offers, err)
			}
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	probe(t)
	daemon := NewClient(global, slog.New(slog.DiscardHandler))
	got, err := daemon.Acquire(within(t, 10*time.Second), want(pool, mac1))
	if err != nil {
		t.Fatal(err)
	}
	probe(t)
	if _, err := daemon.Renew(within(t, 10*time.Second), pool, got); err != nil {
		t.Error("the daemon beside it:", err)
	}
	if err := daemon.Close(); err != nil {
		t.Error(err)
	}
	probe(t)

	global.Relay = ip("192.0.2.9")
	c := NewProber(global, slog.New(slog.DiscardHandler))
	_, err = c.Probe(within(t, 10*time.Second), pool, mac2)
	checkError(t, err, "192.0.2.9 is not an address of this host", "192.0.2.2")
}

func TestResolveHost(t *testing.T) {
	// /etc/hosts has it everywhere; no packet leaves the host.
	if got, err := resolveHost(t.Context(), "localhost"); err != nil || len(got) == 0 || !got[0].Is4() {
		t.Errorf("resolved %v, %v", got, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := resolveHost(ctx, "dhcp.invalid"); err == nil {
		t.Error("a cancelled context resolves")
	}
}
