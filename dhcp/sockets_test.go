package dhcp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

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
		for _, command := range []string{"link set lo up", "addr add 192.0.2.1/32 dev lo", "addr add 192.0.2.2/32 dev lo", "addr add 192.0.2.3/32 dev lo"} {
			if out, err := exec.Command("ip", strings.Fields(command)...).CombinedOutput(); err != nil {
				t.Fatalf("ip %s: %v: %s", command, err, out)
			}
		}
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
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		return errors.Join(raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, reuse) }), err)
	}}
	conn, err := config.ListenPacket(t.Context(), network, net.JoinHostPort(addr, "67"))
	if err != nil {
		t.Fatalf("another program can't bind %s: %v", addr, err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
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
	if out, err := exec.Command("ip", "addr", "add", "192.0.2.9/32", "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s, err := openRelay(at67(missing))
	if err != nil {
		t.Fatalf("once the address is there: %v", err)
	}
	s.Close()
	s.unlock()
}

func TestPortTaken(t *testing.T) {
	if !inNetns(t) {
		return
	}
	for _, c := range []struct{ network, addr string }{
		{"udp4", "192.0.2.2"}, {"udp4", "0.0.0.0"}, {"udp", "::"},
	} {
		t.Run(c.addr, func(t *testing.T) {
			taken := listen(t, c.network, c.addr, 0)
			_, err := openRelay(at67(ourAddr))
			checkError(t, err, "port 67 of relay address 192.0.2.2 is taken by", fmt.Sprintf("(pid %d)", os.Getpid()), "bind-interfaces", "LISTEN_ADDR")
			taken.Close()
			_, closeOurs := openOurs(t)
			closeOurs()
		})
	}
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
				if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
					t.Fatal(err)
				}
				b := make([]byte, 10)
				if n, _, err := conn.ReadFrom(b); err != nil || string(b[:n]) != "ours" {
					t.Errorf("received %q, %v", b[:n], err)
				}
			})
		}
	}
}

func TestSourceTowards(t *testing.T) {
	if !inNetns(t) {
		return
	}
	if out, err := exec.Command("ip", "route", "add", "198.51.100.0/24", "dev", "lo", "src", "192.0.2.3").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
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
	for _, command := range []string{"link add eth0 address 02:00:00:00:00:07 type veth peer name eth1", "addr add 198.51.100.2/24 dev eth0"} {
		if out, err := exec.Command("ip", strings.Fields(command)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", command, err, out)
		}
	}
	if got, err := hardwareOf(ip("198.51.100.2")); err != nil || got.String() != "02:00:00:00:00:07" {
		t.Errorf("%s, %v", got, err)
	}
	_, err := hardwareOf(ourAddr)
	checkError(t, err, "interface lo of relay address 192.0.2.2 has no MAC address")
	_, err = hardwareOf(ip("198.51.100.3"))
	checkError(t, err, "198.51.100.3 is not an address of this host", "198.51.100.2")
}

// The whole way over real sockets, the server on another address of this
// namespace. With LISTEN_ADDR 0.0.0.0 that would be the server's own address,
// which is refused.
func TestRealSockets(t *testing.T) {
	if !inNetns(t) {
		return
	}
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
