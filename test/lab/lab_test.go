package lab_test

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

func TestMain(m *testing.M) {
	if os.Getenv("OAM_LAB_TO_BE_KILLED") != "" {
		os.Exit(openAndHang())
	}
	os.Exit(lab.RunTests(m))
}

func TestEachDHCPServerServesARealClient(t *testing.T) {
	for _, kind := range lab.DHCPKinds {
		t.Run(kind.Name, func(t *testing.T) {
			l := lab.ForTest(t, lab.DHCPServers, lab.Clients)
			server := must(l.Node("server", "10.10.0.1/24"))(t)
			client := must(l.Node("client"))(t)
			began := time.Now()
			dhcp := must(server.StartDHCP(kind, lab.DHCPConfig{Subnets: []lab.Subnet{lab.SubnetA(), lab.SubnetB()}}))(t)
			t.Logf("%s started in %v", kind.Name, time.Since(began))

			ask(t, client)
			leases := must(dhcp.Leases())(t)
			if len(leases) != 1 {
				t.Fatalf("%d leases, want 1: %v", len(leases), leases)
			}
			lease, mac := leases[0], macOf(t, client)
			if !lab.SubnetA().Prefix.Contains(lease.Addr) || lease.MAC != mac || lease.Hostname != "tester" {
				t.Errorf("lease %+v, want one in subnet A of %s, named tester", lease, mac)
			}
			if want := "01" + strings.ReplaceAll(mac, ":", ""); lease.ClientID != want {
				t.Errorf("client id %s, want %s", lease.ClientID, want)
			}
			if left := time.Until(lease.Expires); left < 9*time.Minute || left > 11*time.Minute {
				t.Errorf("%v left of a lease of ten minutes", left)
			}

			// The table outlives the server, however it ends.
			for _, end := range []func() error{dhcp.Stop, dhcp.Kill} {
				check(t, end())
				check(t, dhcp.Start())
				if _, found, err := dhcp.Lease(lease.Addr); !found || err != nil {
					t.Errorf("lease after restart: found %v, %v", found, err)
				}
				ask(t, client)
			}
		})
	}
}

func TestDHCPServersTakeBigRangesReservationsAndTimes(t *testing.T) {
	for _, kind := range lab.DHCPKinds {
		t.Run(kind.Name, func(t *testing.T) {
			l := lab.ForTest(t, lab.DHCPServers, lab.Clients)
			server := must(l.Node("server", "10.10.0.1/16"))(t)
			client := must(l.Node("client"))(t)
			subnet := lab.NewSubnet("10.10.0.0/16", "10.10.8.0", "10.10.99.255", "")
			want := netip.MustParseAddr("10.10.0.77")
			subnet.Reservations = []lab.Reservation{
				{MAC: macOf(t, client), Addr: want},
				{MAC: "02:00:00:00:00:01", Addr: netip.MustParseAddr("10.10.0.78")},
			}
			dhcp := must(server.StartDHCP(kind, lab.DHCPConfig{
				Subnets: []lab.Subnet{subnet}, LeaseSeconds: 3600, RenewSeconds: 5, RebindSeconds: 10,
			}))(t)
			ask(t, client)
			_, found, err := dhcp.Lease(want)
			if kind.Name == lab.ISC.Name { // has no rows for reservations
				found = strings.Contains(dhcp.Log(), "DHCPACK on "+want.String())
			}
			if !found || err != nil {
				t.Errorf("no lease of the reserved %v: %v\n%s", want, err, dhcp.Log())
			}
		})
	}
}

func TestRelayServesARealClient(t *testing.T) {
	l := lab.ForTest(t, lab.DHCPServers, lab.Relays, lab.Clients)
	far := must(l.NewLAN("far"))(t)
	server := must(l.NodeOn(far, "server", "10.40.0.1/24"))(t)
	relay := must(l.Node("relay", "10.10.0.1/24"))(t)
	client := must(l.Node("client"))(t)
	check(t, relay.AttachTo(far, "eth1", "10.40.0.2/24"))
	check(t, server.Route("default via 10.40.0.2"))
	own := lab.Subnet{Prefix: netip.MustParsePrefix("10.40.0.0/24")}
	dhcp := must(server.StartDHCP(lab.ISC, lab.DHCPConfig{Subnets: []lab.Subnet{own, lab.SubnetA()}}))(t)
	must(relay.StartRelay("eth0", "eth1", "10.40.0.1"))(t)
	ask(t, client)
	leases := must(dhcp.Leases())(t)
	if len(leases) != 1 || !lab.SubnetA().Prefix.Contains(leases[0].Addr) || leases[0].MAC != macOf(t, client) {
		t.Errorf("leases %v, want one in subnet A of %s", leases, macOf(t, client))
	}
}

func TestWire(t *testing.T) {
	l := lab.ForTest(t, lab.Clients)
	a := must(l.Node("a", "10.10.0.1/24"))(t)
	b := must(l.Node("b", "10.10.0.2/24"))(t)
	wire := must(a.Wire(l.LAN, "eth0"))(t)
	must(b.Run("busybox", "ping", "-c", "1", "-W", "5", "10.10.0.1"))(t)
	must(a.Run("busybox", "ping", "-c", "1", "-W", "5", "10.10.0.2"))(t)
	// Its own request, and its reply to the other's.
	want := map[layers.ICMPv4TypeCode]int{
		layers.CreateICMPv4TypeCode(layers.ICMPv4TypeEchoRequest, 0): 1,
		layers.CreateICMPv4TypeCode(layers.ICMPv4TypeEchoReply, 0):   1,
	}
	check(t, lab.Eventually(5*time.Second, func() error {
		got := map[layers.ICMPv4TypeCode]int{}
		for _, frame := range wire.Frames() {
			if icmp, ok := frame.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4); ok {
				got[icmp.TypeCode]++
			}
		}
		if !maps.Equal(got, want) {
			return fmt.Errorf("recorded %v, want %v", got, want)
		}
		return nil
	}))
	check(t, wire.Close())
	for _, frame := range wire.Frames() {
		if mac := frame.LinkLayer().(*layers.Ethernet).SrcMAC.String(); mac != macOf(t, a) {
			t.Errorf("recorded a frame from %s: %v", mac, frame)
		}
	}
}

func TestEngine(t *testing.T) {
	l := lab.ForTest(t, lab.Engines)
	net := must(l.Standard())(t)
	began := time.Now()
	engine := must(net.Host.StartEngine(""))(t)
	t.Logf("engine started in %v", time.Since(began))
	began = time.Now()
	check(t, engine.ImportImage("img:1"))
	t.Logf("image imported in %v", time.Since(began))

	running := func(name string) string {
		t.Helper()
		return must(engine.Docker("inspect", "--format", "{{.State.Running}}", name))(t)
	}
	docker := func(args ...string) string {
		t.Helper()
		return must(engine.Docker(args...))(t)
	}
	docker("run", "--detach", "--name", "c1", "--net", "none", "img:1")
	if out := docker("exec", "c1", "ip", "-o", "link"); !strings.Contains(out, "lo") {
		t.Errorf("ip in the container says %q", out)
	}
	began = time.Now()
	docker("stop", "c1")
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("docker stop took %v", took)
	}

	began = time.Now()
	check(t, engine.Restart())
	t.Logf("engine restarted in %v", time.Since(began))
	docker("start", "c1")

	check(t, engine.Kill())
	began = time.Now()
	check(t, engine.Start())
	t.Logf("engine started after SIGKILL in %v", time.Since(began))
	if running("c1") != "false" {
		t.Error("the engine took up a container without live-restore")
	}
	docker("start", "c1")
	check(t, engine.PowerOff())
	began = time.Now()
	check(t, engine.Start())
	t.Logf("engine booted after power off in %v", time.Since(began))

	// Containers on a macvlan are neighbours on the LAN.
	docker("network", "create", "--driver", "macvlan", "--subnet", "10.10.0.0/24", "--opt", "parent=eth0", "lan")
	docker("run", "--detach", "--name", "c2", "--net", "lan", "--ip", "10.10.0.50", "img:1")
	must(net.Client.Run("busybox", "ping", "-c", "1", "-W", "5", "10.10.0.50"))(t)
	docker("rm", "--force", "c1", "c2")
}

func TestDaemon(t *testing.T) {
	l := lab.ForTest(t)
	net := must(l.Standard())(t)
	daemon := must(net.Host.StartDaemon(filepath.Join(l.Scratch, "td.sock"), "--dhcp-server", "10.10.0.1"))(t)
	if out := must(daemon.Run("leases", "--json"))(t); strings.TrimSpace(out) != "[]" {
		t.Errorf("leases of a new daemon: %s", out)
	}
	check(t, daemon.Restart())
	check(t, daemon.Kill())
	check(t, daemon.Start())
	check(t, daemon.Stop())
}

func TestMachine(t *testing.T) {
	l := lab.ForTest(t, lab.Machines, lab.Clients)
	near := must(l.Node("near", "10.10.0.1/24"))(t)
	host := must(l.Node("host", "10.10.0.2/24"))(t)
	machine := must(host.NewMachine())(t)
	check(t, machine.WriteFile("/etc/motd", "written while it was off", 0o644))
	if _, err := machine.Run("true"); err == nil {
		t.Error("a machine that is off ran a command")
	}
	run := func(args ...string) string {
		t.Helper()
		return strings.TrimSpace(must(machine.Run(args...))(t))
	}
	began := time.Now()
	check(t, machine.Boot())
	t.Logf("machine booted in %v", time.Since(began))
	if state := run("systemctl", "is-system-running"); state != "running" {
		t.Errorf("the machine is %s: %s", state, run("systemctl", "--failed"))
	}
	if said := run("hostname") + " " + run("cat", "/etc/motd"); said != "host written while it was off" {
		t.Errorf("it says %q", said)
	}
	// It is on the LAN, and so are its containers.
	must(near.Run("busybox", "ping", "-c", "1", "-W", "5", "10.10.0.2"))(t)
	check(t, machine.ImportImage("img:1"))
	must(machine.Docker("network", "create", "--driver", "macvlan", "--subnet", "10.10.0.0/24", "--opt", "parent=eth0", "lan"))(t)
	must(machine.Docker("run", "--detach", "--restart", "always", "--net", "lan", "--ip", "10.10.0.50", "img:1"))(t)
	must(near.Run("busybox", "ping", "-c", "1", "-W", "5", "10.10.0.50"))(t)

	// Its disk outlives its boots, however they end.
	boot := run("cat", "/proc/sys/kernel/random/boot_id")
	for _, end := range []func() error{machine.Shutdown, machine.PowerOff} {
		run("sh", "-c", "echo more >>/root/kept")
		check(t, end())
		if machine.Running() {
			t.Fatal("the machine still runs")
		}
		check(t, machine.Boot())
		if now := run("cat", "/proc/sys/kernel/random/boot_id"); now == boot {
			t.Errorf("boot %s is still the one", boot)
		}
		must(near.Run("busybox", "ping", "-c", "1", "-W", "5", "10.10.0.50"))(t)
	}
	if kept := run("cat", "/root/kept"); kept != "more\nmore" {
		t.Errorf("of its disk is left %q", kept)
	}
	if boots := strings.Count(run("journalctl", "--list-boots", "--no-pager"), "\n"); boots < 2 {
		t.Errorf("its journal has %d boots before this one", boots)
	}

	// Another one begins as this did, on the same computer and apart from it.
	other := must(must(l.Node("other", "10.10.0.3/24"))(t).BootMachine())(t)
	if out, err := other.Run("cat", "/root/kept"); err == nil {
		t.Errorf("another machine has the file too: %q", out)
	}
	if out := must(other.Docker("ps", "--all", "--quiet"))(t); out != "" {
		t.Errorf("another machine has containers: %s", out)
	}
}

func TestLosePackets(t *testing.T) {
	l := lab.ForTest(t, lab.Network)
	a := must(l.Node("a", "10.10.0.1/24"))(t)
	b := must(l.Node("b", "10.10.0.2/24"))(t)
	far := udpSocket(t, a, "10.10.0.1:67")
	near := udpSocket(t, b, "10.10.0.2:67")

	const packets = 1000
	var lost int // in one direction, so far
	count := func() error { return nil }
	// flight sends packets, few at a time for the receive buffer's sake, and
	// sees to it that all come but those that were counted as lost.
	flight := func(from, to net.PacketConn) {
		t.Helper()
		came, buffer := 0, make([]byte, 8)
		lost = 0
		for sent := 100; sent <= packets; sent += 100 {
			for range 100 {
				if _, err := from.WriteTo([]byte("x"), to.LocalAddr()); err != nil {
					t.Fatal(err) // loss must be silent
				}
			}
			check(t, count())
			check(t, to.SetReadDeadline(time.Now().Add(5*time.Second)))
			for ; came < sent-lost; came++ {
				if _, _, err := to.ReadFrom(buffer); err != nil {
					t.Fatalf("%d of %d packets came, %d were lost: %v", came, sent, lost, err)
				}
			}
		}
	}
	flight(near, far)
	flight(far, near)

	stop := must(b.LosePackets(0.3))(t)
	for _, way := range []string{"in", "out"} {
		from, to := far, near
		if way == "out" {
			from, to = near, far
		}
		count = func() error {
			in, out, err := b.LostPackets()
			lost = map[string]int{"in": in, "out": out}[way]
			return err
		}
		flight(from, to)
		if lost < 200 || lost > 400 {
			t.Errorf("%d of %d packets were lost on the way %s, want about 300", lost, packets, way)
		}
	}

	check(t, stop())
	count = func() error { return nil }
	flight(near, far)
	flight(far, near)
}

func TestUDPOpen(t *testing.T) {
	l := lab.ForTest(t)
	n := must(l.Node("n", "10.10.0.1/24"))(t)
	if must(n.UDPOpen(68))(t) {
		t.Error("port 68 is open in a new node")
	}
	conn := udpSocket(t, n, "10.10.0.1:68")
	if !must(n.UDPOpen(68))(t) {
		t.Error("port 68 is open and not found")
	}
	check(t, conn.Close())
	if must(n.UDPOpen(68))(t) {
		t.Error("port 68 is still open")
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	l := lab.ForTest(t, lab.Engines, lab.DHCPServers, lab.Machines)
	net := must(l.Standard())(t)
	must(net.Second.BootMachine())(t)
	must(net.Server.StartDHCP(lab.Kea, lab.DHCPConfig{Subnets: []lab.Subnet{lab.SubnetA()}}))(t)
	must(net.Server.Start("sleep", lab.Command{Args: []string{"sleep", "1000"}}))(t)
	engine := must(net.Host.StartEngine(""))(t)
	check(t, engine.ImportImage("img:1"))
	must(engine.Docker("run", "--detach", "--net", "none", "img:1"))(t)
	must(engine.Docker("run", "--detach", "--net", "none", "img:1"))(t)
	check(t, engine.Kill()) // two containers without an engine are the worst case

	namespace := strings.TrimSuffix(l.LAN.Name, "lan")
	if left := leftovers(t, l.Scratch, namespace); left == nil {
		t.Fatal("nothing found of a lab that is open")
	}
	check(t, l.Close())
	if left := leftovers(t, l.Scratch, namespace); left != nil {
		t.Errorf("left after Close:\n%s", strings.Join(left, "\n"))
	}
	check(t, l.Close())
	if _, err := l.Node("late"); err == nil {
		t.Error("a closed lab took a node")
	}
	if _, err := net.Server.Start("late", lab.Command{Args: []string{"sleep", "1000"}}); err == nil {
		t.Error("a closed lab started a process")
	}
}

func TestSweepAfterKill(t *testing.T) {
	lab.ForTest(t, lab.Engines, lab.Machines) // or skip
	victim, scratch, namespace := otherProgram(t)
	check(t, victim.Process.Kill())
	_ = victim.Wait()

	// Processes end with their owner, without any sweep.
	check(t, lab.Eventually(10*time.Second, func() error {
		if left := processesIn(t, scratch); left != nil {
			return fmt.Errorf("processes left: %v", left)
		}
		return nil
	}))
	check(t, must(lab.New())(t).Close())
	if left := leftovers(t, scratch, namespace); left != nil {
		t.Errorf("left after the sweep:\n%s", strings.Join(left, "\n"))
	}
}

func TestCloseOnSignal(t *testing.T) {
	lab.ForTest(t, lab.Engines, lab.Machines) // or skip
	victim, scratch, namespace := otherProgram(t)
	check(t, victim.Process.Signal(syscall.SIGTERM))
	_ = victim.Wait()
	if status := victim.ProcessState.ExitCode(); status != 128+int(syscall.SIGTERM) {
		t.Errorf("exit status %d", status)
	}
	if left := leftovers(t, scratch, namespace); left != nil {
		t.Errorf("left after SIGTERM:\n%s", strings.Join(left, "\n"))
	}
}

// otherProgram starts a program that has a lab with a running container and a
// machine.
func otherProgram(t *testing.T) (program *exec.Cmd, scratch, namespace string) {
	t.Helper()
	program = exec.Command(os.Args[0])
	program.Env = append(os.Environ(), "OAM_LAB_TO_BE_KILLED=1")
	program.Stderr = os.Stderr
	pipe := must(program.StdoutPipe())(t)
	check(t, program.Start())
	if _, err := fmt.Fscan(pipe, &scratch, &namespace); err != nil {
		_ = program.Wait()
		t.Fatal("the other program made no lab: ", err)
	}
	return program, scratch, namespace
}

// openAndHang is what the other program does.
func openAndHang() int {
	l, err := lab.New()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	l.CloseOnSignal()
	host, err := l.Node("host", "10.10.0.2/24")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	engine, err := host.StartEngine("")
	if err == nil {
		err = engine.ImportImage("img:1")
	}
	if err == nil {
		_, err = engine.Docker("run", "--detach", "--net", "none", "img:1")
	}
	if err == nil {
		_, err = host.BootMachine()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(l.Scratch, strings.TrimSuffix(l.LAN.Name, "lan"))
	select {}
}

// leftovers looks for everything that a lab could leave behind.
func leftovers(t *testing.T, scratch, namespace string) []string {
	t.Helper()
	left := processesIn(t, scratch)
	for _, pattern := range []string{
		scratch,
		"/run/netns/" + namespace + "*",
		"/sys/fs/cgroup/" + filepath.Base(scratch),
		"/sys/fs/cgroup/*/" + filepath.Base(scratch),
	} {
		left = append(left, must(filepath.Glob(pattern))(t)...)
	}
	for line := range strings.Lines(string(must(os.ReadFile("/proc/self/mountinfo"))(t))) {
		if strings.Contains(line, scratch) || strings.Contains(line, namespace) {
			left = append(left, line)
		}
	}
	return left
}

// processesIn finds processes that have the lab's folder in their command
// line, or its control group: those in containers.
func processesIn(t *testing.T, scratch string) (found []string) {
	t.Helper()
	for _, dir := range must(filepath.Glob("/proc/[0-9]*"))(t) {
		for _, file := range []string{"cmdline", "cgroup"} {
			text, err := os.ReadFile(filepath.Join(dir, file))
			if err == nil && strings.Contains(string(text), filepath.Base(scratch)) {
				found = append(found, fmt.Sprintf("%s/%s: %q", dir, file, text))
			}
		}
	}
	return found
}

// ask has a DHCP client on the node get a lease. It stays in the foreground
// and configures nothing.
func ask(t *testing.T, n *lab.Node) {
	t.Helper()
	must(n.Run("busybox", "udhcpc", "-n", "-q", "-f", "-i", "eth0", "-s", "/bin/true", "-x", "hostname:tester"))(t)
}

func macOf(t *testing.T, n *lab.Node) (mac string) {
	t.Helper()
	check(t, n.Do(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err == nil {
			mac = eth0.HardwareAddr.String()
		}
		return err
	}))
	return mac
}

func udpSocket(t *testing.T, n *lab.Node, address string) (conn net.PacketConn) {
	t.Helper()
	check(t, n.Do(func() (err error) {
		conn, err = net.ListenPacket("udp4", address)
		return err
	}))
	t.Cleanup(func() { conn.Close() })
	return conn
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// must takes what a function returned and then the test: must(f())(t).
func must[T any](value T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		check(t, err)
		return value
	}
}
