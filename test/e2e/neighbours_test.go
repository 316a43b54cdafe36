package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// The host's own DHCP client goes on as if we weren't there: it has UDP port
// 68 for itself, and the address that it holds may be our relay address.
func TestHostsOwnDHCPClient(t *testing.T) {
	t.Parallel()
	for _, kind := range lab.DHCPKinds {
		for _, mode := range []struct {
			name    string
			options map[string]string
		}{
			{"relay", map[string]string{"dhcp_server": firstServer}},
			{"broadcast", onInterface("eth0")},
		} {
			t.Run(kind.Name+" "+mode.name, func(t *testing.T) {
				t.Parallel() // it waits for renewals
				// T1 = 3 s, the least that dnsmasq takes.
				s := newBroadcaster(t, kind, lab.DHCPConfig{RenewSeconds: 3, RebindSeconds: 60})
				must(s.net.Host.Run("ip", "address", "flush", "dev", "eth0"))(t)
				client := s.dhclient()
				hostMAC := s.hardware(s.net.Host, "eth0")
				var addr netip.Addr
				eventually(t, 10*time.Second, func() error {
					out, err := s.net.Host.Run("ip", "-4", "-o", "address", "show", "dev", "eth0")
					if _, after, found := strings.Cut(out, " inet "); err == nil && found {
						prefix, err := netip.ParsePrefix(strings.Fields(after)[0])
						addr = prefix.Addr()
						return err
					}
					return errors.Join(err, errors.New("the host has no address"))
				})
				host := s.leased(addr, hostMAC)

				check(t, s.daemon.Start())
				pool := must(s.requestPool("10.10.0.0/24", mode.options))(t)
				until := host.Expires
				kept := s.acquire(pool, lab.ScatteredMAC(0))
				s.moveIn("c0", "eth0", lab.ScatteredMAC(0), kept)
				keptUntil := s.leased(kept, lab.ScatteredMAC(0)).Expires
				for round := range 2 {
					// Ours come and go while the host's lease is renewed.
					eventually(t, 10*time.Second, func() error {
						addr, err := s.requestAddress(pool, lab.ScatteredMAC(round+1))
						if err == nil {
							err = s.releaseAddress(pool, addr)
						}
						if err != nil {
							t.Fatal(err)
						}
						lease, _, err := s.dhcp.Lease(host.Addr)
						if err == nil && !lease.Expires.After(until) {
							err = fmt.Errorf("the host's lease is not renewed: %+v", lease)
						}
						if err == nil {
							until = lease.Expires
						}
						return err
					})
				}
				s.renewed(kept, keptUntil)
				s.leased(host.Addr, hostMAC)
				if holders := s.portHolders(68); len(holders) != 1 || holders[0] != client.Pid {
					t.Errorf("UDP port 68 is held by processes %v, want the DHCP client's %d", holders, client.Pid)
				}
				var relays []int
				if mode.name == "relay" {
					relays = []int{s.daemon.Pid()}
				}
				if holders := s.portHolders(67); !slices.Equal(holders, relays) {
					t.Errorf("UDP port 67 is held by processes %v, want the daemon's %v", holders, relays)
				}
				check(t, client.Kill())
				if must(s.net.Host.UDPOpen(68))(t) {
					t.Error("somebody holds UDP port 68 beside the DHCP client")
				}
				check(t, s.releaseAddress(pool, kept))
				s.notLeased(kept)
				s.leased(host.Addr, hostMAC)
			})
		}
	}
}

// dhclient runs the host's DHCP client on eth0, with files of its own.
func (s *site) dhclient() *lab.Process {
	s.Helper()
	dir := filepath.Join(s.lab.Scratch, "dhclient")
	check(s.T, os.Mkdir(dir, 0o755))
	// AppArmor confines the program where the system has it, not a copy.
	source := "/sbin/dhclient"
	if path, err := exec.LookPath("dhclient"); err == nil {
		source = path
	}
	program := filepath.Join(dir, "dhclient")
	check(s.T, os.WriteFile(program, must(os.ReadFile(source))(s.T), 0o755))
	// The least that a client's script has to do.
	script := filepath.Join(dir, "script")
	check(s.T, os.WriteFile(script, []byte(`#!/bin/sh
case $reason in BOUND|RENEW|REBIND|REBOOT) exec ip address replace "$new_ip_address/24" dev "$interface" ;; esac
`), 0o755))
	config := filepath.Join(dir, "config")
	check(s.T, os.WriteFile(config, []byte("timeout 30;\n"), 0o644))
	return must(s.net.Host.Start("dhclient", lab.Command{Args: []string{
		program, "-4", "-d", "-cf", config, "-sf", script,
		"-lf", filepath.Join(dir, "leases"), "-pf", filepath.Join(dir, "pid"), "eth0",
	}}))(s.T)
}

// portHolders are the processes that hold a UDP port of the host.
func (s *site) portHolders(port int) (pids []int) {
	s.Helper()
	sockets := map[string]bool{}
	check(s.T, s.net.Host.Do(func() error {
		table, err := os.ReadFile("/proc/thread-self/net/udp")
		for line := range strings.Lines(string(table)) {
			fields := strings.Fields(line)
			if len(fields) > 9 && strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", port)) {
				sockets["socket:["+fields[9]+"]"] = true
			}
		}
		return err
	}))
	files, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, file := range files {
		// Files come and go while we look.
		if target, err := os.Readlink(file); err == nil && sockets[target] {
			pids = append(pids, must(strconv.Atoi(strings.Split(file, "/")[2]))(s.T))
			delete(sockets, target)
		}
	}
	return pids
}

// Without one, UDP port 68 stays free.
func TestPort68StaysFree(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{RenewSeconds: 1, RebindSeconds: 60})
	free := func(when string) {
		t.Helper()
		if must(s.net.Host.UDPOpen(68))(t) {
			t.Errorf("somebody holds UDP port 68 %s", when)
		}
	}
	check(t, s.daemon.Start())
	free("after the start")
	pool := s.pool()
	mac := lab.ScatteredMAC(1)
	addr := s.acquire(pool, mac)
	free("with a lease")
	s.renewed(addr, s.leased(addr, mac).Expires)
	free("after a renewal")
	check(t, s.releaseAddress(pool, addr))
	free("after a release")
}

// A dnsmasq as libvirt runs it serves a bridge of the host's own. Whoever
// starts first, both serve.
func TestBesideLibvirtsDnsmasq(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	host, guest := s.net.Host, must(s.lab.Node("guest"))(t)
	for _, command := range []string{
		"link add virbr0 type bridge",
		"address add 192.168.122.1/24 dev virbr0",
		"link set virbr0 up",
		"link add vnet0 type veth peer name eth1 netns " + guest.Name,
		"link set vnet0 master virbr0 up",
	} {
		must(host.Run(append([]string{"ip"}, strings.Fields(command)...)...))(t)
	}
	must(guest.Run("ip", "link", "set", "eth1", "up"))(t)
	dnsmasq := func() *lab.Process {
		t.Helper()
		return s.hostDnsmasq("--bind-interfaces", "--interface=virbr0", "--except-interface=lo",
			"--dhcp-range=192.168.122.2,192.168.122.254", "--dhcp-no-override", "--dhcp-authoritative")
	}
	works := func() {
		t.Helper()
		pool := s.pool()
		addr := s.acquire(pool, lab.ScatteredMAC(1))
		must(guest.Run("busybox", "udhcpc", "-n", "-q", "-f", "-i", "eth1", "-s", "/bin/true"))(t)
		check(t, s.releaseAddress(pool, addr))
		s.notLeased()
	}
	for _, order := range []string{"dnsmasq first", "daemon first"} {
		t.Run(order, func(t *testing.T) {
			var neighbour *lab.Process
			if order == "dnsmasq first" {
				neighbour = dnsmasq()
				check(t, s.daemon.Start())
			} else {
				check(t, s.daemon.Start())
				s.pool() // opens our socket, if the start hasn't
				neighbour = dnsmasq()
			}
			works()
			check(t, s.daemon.Stop())
			check(t, neighbour.Stop())
		})
	}
}

// hostDnsmasq runs a dnsmasq on the host and returns when it serves DHCP.
func (s *site) hostDnsmasq(args ...string) *lab.Process {
	s.Helper()
	process := must(s.net.Host.Start("neighbour", lab.Command{Args: append([]string{
		"dnsmasq", "--conf-file=/dev/null", "--no-daemon", "--port=0", "--user=root", "--log-dhcp",
		"--dhcp-leasefile=" + filepath.Join(s.lab.Scratch, "neighbour.leases"),
	}, args...)}))(s.T)
	eventually(s.T, 5*time.Second, func() error {
		for _, pid := range s.portHolders(67) {
			if pid == process.Pid {
				return nil
			}
		}
		if !process.Running() {
			s.Fatalf("the host's dnsmasq ended: %s", process.Log())
		}
		return errors.New("the host's dnsmasq doesn't serve yet")
	})
	return process
}

// Beside a program that takes port 67 of all addresses, as dnsmasq does by
// itself, or of our very address, containers get their addresses and keep them.
// The log names it, once.
func TestBesideHolderOfPort67(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{RenewSeconds: 1, RebindSeconds: 60})
	says := func(holder string) {
		t.Helper()
		if n := strings.Count(s.daemon.Log(), fmt.Sprintf("taken by\"=%q", holder)); n != 1 {
			t.Errorf("the log names %s %d times", holder, n)
		}
	}
	neighbour := s.hostDnsmasq("--dhcp-range=192.168.122.2,192.168.122.254")
	check(t, s.daemon.Start())
	pool := s.pool()
	works := func() {
		t.Helper()
		mac := lab.ScatteredMAC(1)
		addr := s.acquire(pool, mac)
		s.renewed(addr, s.leased(addr, mac).Expires)
		check(t, s.releaseAddress(pool, addr))
		s.notLeased()
	}
	works()
	works()
	says(fmt.Sprintf("dnsmasq (pid %d)", neighbour.Pid))
	if holders := s.portHolders(67); len(holders) != 1 || holders[0] != neighbour.Pid {
		t.Errorf("UDP port 67 is held by processes %v, want the neighbour's %d", holders, neighbour.Pid)
	}
	if log := neighbour.Log(); strings.Contains(log, "DHCPOFFER") || strings.Contains(log, "DHCPNAK") {
		t.Errorf("the neighbour speaks for us: %s", log)
	}
	check(t, neighbour.Stop())
	works()

	check(t, s.daemon.Stop())
	var conn net.PacketConn
	check(t, s.net.Host.Do(func() (err error) {
		conn, err = net.ListenPacket("udp4", "10.10.0.2:67")
		return err
	}))
	defer conn.Close()
	check(t, s.daemon.Start())
	works()
	says(fmt.Sprintf("%s (pid %d)", strings.TrimSpace(string(must(os.ReadFile("/proc/self/comm"))(t))), os.Getpid()))
}

// Without CAP_NET_RAW such a program is named in the error, and once it is gone
// everything works without a restart of ours.
func TestPort67TakenWithoutNetRaw(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	s.daemon.Binary = filepath.Join(s.lab.Scratch, "unprivileged")
	check(t, os.WriteFile(s.daemon.Binary, fmt.Appendf(nil, `#!/bin/sh
exec setpriv --inh-caps=-net_raw --bounding-set=-net_raw %s "$@"
`, must(lab.Build())(t)), 0o755))
	neighbour := s.hostDnsmasq("--dhcp-range=192.168.122.2,192.168.122.254")
	check(t, s.daemon.Start())
	taken := []string{
		fmt.Sprintf("UDP port 67 of relay address 10.10.0.2 is taken by dnsmasq (pid %d)", neighbour.Pid),
		"CAP_NET_RAW", "bind-interfaces", "LISTEN_ADDR",
	}
	_, err := s.requestPool("10.10.0.0/24", nil)
	if !errors.Is(err, lab.ErrRefused) {
		t.Fatalf("a network without port 67: %v", err)
	}
	mentions(t, err.Error(), taken...)
	check(t, neighbour.Stop())
	pool := s.pool()
	s.acquire(pool, lab.ScatteredMAC(1))
	check(t, s.daemon.Stop())

	// The networks that are there already say the same of their containers,
	// and keep their leases.
	neighbour = s.hostDnsmasq("--dhcp-range=192.168.122.2,192.168.122.254")
	taken[0] = fmt.Sprintf("is taken by dnsmasq (pid %d)", neighbour.Pid)
	check(t, s.daemon.Start())
	_, err = s.requestAddress(pool, lab.ScatteredMAC(2))
	if !errors.Is(err, lab.ErrRefused) {
		t.Fatalf("a container without port 67: %v", err)
	}
	mentions(t, err.Error(), taken...)
	if known := s.leases(); len(known) != 1 {
		t.Errorf("known leases: %+v", known)
	}
	check(t, neighbour.Stop())
	s.acquire(pool, lab.ScatteredMAC(2))
}

// A DHCP server on the Docker host itself needs an address that isn't our
// relay address. We say so, and then it works.
func TestServerOnTheHostItself(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	s.daemon.Flags = []string{"--debug", "--dhcp-server", "10.10.0.2"}
	check(t, s.daemon.Start())
	_, err := s.requestPool("10.10.0.0/24", nil)
	if !errors.Is(err, lab.ErrRefused) {
		t.Fatalf("a network on a server that is the relay address: %v", err)
	}
	mentions(t, err.Error(), "DHCP server 10.10.0.2 is the relay address itself", "LISTEN_ADDR", "listen_addr")

	must(s.net.Host.Run("ip", "address", "add", "10.10.0.12/24", "dev", "eth0"))(t)
	// What comes from the host itself comes in on lo.
	s.hostDnsmasq("--bind-interfaces", "--interface=eth0", "--interface=lo", "--no-ping",
		"--dhcp-range=10.10.0.100,10.10.0.199,255.255.255.0")
	pool := must(s.requestPool("10.10.0.0/24", map[string]string{"listen_addr": "10.10.0.12"}))(t)
	addr := must(s.requestAddress(pool, lab.ScatteredMAC(1)))(t)
	table := func() string {
		t.Helper()
		return string(must(os.ReadFile(filepath.Join(s.lab.Scratch, "neighbour.leases")))(t))
	}
	if row := lab.ScatteredMAC(1) + " " + addr.String() + " "; !strings.Contains(table(), row) {
		t.Errorf("the host's server doesn't lease %s to %s: %s", addr, lab.ScatteredMAC(1), table())
	}
	check(t, s.releaseAddress(pool, addr))
	eventually(t, 5*time.Second, func() error {
		if left := table(); strings.Contains(left, addr.String()) {
			return fmt.Errorf("the host's server still has %s", left)
		}
		return nil
	})
}

// A relay address that the host doesn't have yet ends nothing.
func TestRelayAddressComesLater(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{}, "--listen-addr", "10.10.0.77")
	check(t, s.daemon.Start())
	_, err := s.requestPool("10.10.0.0/24", nil)
	if !errors.Is(err, lab.ErrRefused) {
		t.Fatalf("a network without a relay address: %v", err)
	}
	mentions(t, err.Error(), "relay address 10.10.0.77 is not an address of this host (it has 10.10.0.2)", "LISTEN_ADDR")
	must(s.net.Host.Run("ip", "address", "add", "10.10.0.77/24", "dev", "eth0"))(t)
	s.acquire(s.pool(), lab.ScatteredMAC(1))
	if holders := s.portHolders(67); len(holders) != 1 || holders[0] != s.daemon.Pid() {
		t.Errorf("UDP port 67 is held by processes %v", holders)
	}
}

// No route to the server is reported, and a route that comes is used, without
// a restart.
func TestRouteComesLater(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	route := []string{"10.10.0.0/24", "dev", "eth0", "src", "10.10.0.2"}
	ip := func(args ...string) {
		t.Helper()
		must(s.net.Host.Run(append([]string{"ip"}, args...)...))(t)
	}
	ip("route", "delete", "default")
	ip("route", "delete", "10.10.0.0/24")
	check(t, s.daemon.Start())
	_, err := s.requestPool("10.10.0.0/24", nil)
	if !errors.Is(err, lab.ErrRefused) {
		t.Fatalf("a network without a route to the server: %v", err)
	}
	mentions(t, err.Error(), "DHCP server 10.10.0.1", "this host has no route to it")
	ip(append([]string{"route", "add"}, route...)...)
	pool := s.pool()
	addr := s.acquire(pool, lab.ScatteredMAC(1))
	// It goes again: what is leased stays known, and a release can't be told.
	ip("route", "delete", "10.10.0.0/24")
	_, err = s.requestAddress(pool, lab.ScatteredMAC(2))
	if !errors.Is(err, lab.ErrRefused) {
		t.Fatalf("a container without a route to the server: %v", err)
	}
	mentions(t, err.Error(), "this host has no route to it")
	s.known(addr)
	ip(append([]string{"route", "add"}, route...)...)
	check(t, s.releaseAddress(pool, addr))
	s.notLeased()
}

// Two daemons on one relay address would take each other's answers.
func TestSecondCopy(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	check(t, s.daemon.Start())
	pool := s.pool()
	first := s.acquire(pool, lab.ScatteredMAC(1))
	must(s.net.Host.Run("ip", "address", "add", "10.10.0.12/24", "dev", "eth0"))(t)
	elsewhere := []string{"--dhcp-server", "10.10.0.1", "--listen-addr", "10.10.0.12"}
	other := func(name string) string { return filepath.Join(s.lab.Scratch, name) }
	for _, copy := range []struct {
		name, socket, data string
		flags              []string
		says               []string
	}{
		{
			"same relay address", other("second.sock"), other("second"), s.daemon.Flags,
			[]string{"another oam-docker-ipam already serves relay address 10.10.0.2", "LISTEN_ADDR"},
		},
		{
			"same data folder", other("second.sock"), s.daemon.DataDir, elsewhere,
			[]string{s.daemon.DataDir, "locked: another oam-docker-ipam is running on it"},
		},
		{
			"same socket", s.daemon.Socket, other("second"), elsewhere,
			[]string{s.daemon.Socket, "another process serves this socket", "PLUGIN_SOCKET"},
		},
	} {
		t.Run(copy.name, func(t *testing.T) {
			second := must(s.net.Host.NewDaemon(copy.socket, copy.flags...))(t)
			second.DataDir = copy.data
			mentions(t, doesNotStart(t, second), copy.says...)
		})
	}
	// The first has felt nothing.
	s.known(first)
	s.acquire(pool, lab.ScatteredMAC(2))

	// With an address of its own a second one is fine.
	second := must(s.net.Host.NewDaemon(other("second.sock"), elsewhere...))(t)
	second.DataDir = other("second")
	check(t, second.Start())
	beside := *s
	beside.daemon = second
	beside.acquire(beside.pool(), lab.ScatteredMAC(3))
	s.acquire(pool, lab.ScatteredMAC(4))
}

// doesNotStart starts a daemon that must end at once with exit status 1 and
// one line, which it returns.
func doesNotStart(t *testing.T, d *lab.Daemon) string {
	t.Helper()
	before := ""
	if old := d.Log(); !strings.HasPrefix(old, "open ") /* there is none yet */ {
		before = old
	}
	process := must(d.Launch())(t)
	var status *exec.ExitError
	if err := process.Wait(10 * time.Second); !errors.As(err, &status) || status.ExitCode() != 1 {
		_ = process.Kill()
		t.Fatalf("it didn't end with exit status 1: %v\n%s", err, d.Log()[len(before):])
	}
	var said []string
	for line := range strings.Lines(d.Log()[len(before):]) {
		// Another daemon of this host logs into the same file.
		if !strings.HasPrefix(line, "time=") {
			said = append(said, line)
		}
	}
	if len(said) != 1 || !strings.HasPrefix(said[0], "oam-docker-ipam: ") {
		t.Fatalf("it said %q, want one line", said)
	}
	return said[0]
}
