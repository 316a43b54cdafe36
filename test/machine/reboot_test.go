package machine

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

// Over a reboot, and over a loss of power, the same containers have the same
// addresses. This engine tells no names: what stays is the MAC.
func TestReboot(t *testing.T) {
	s := newRunning(t)
	containers := map[string]netip.Addr{}
	var all []netip.Addr
	for name, mac := range map[string]string{"web": "02:42:0a:0a:00:01", "db": "02:42:0a:0a:00:02"} {
		containers[name] = s.runContainer(name, "--restart=always", "--mac-address="+mac)
		all = append(all, containers[name])
	}
	same := func() {
		t.Helper()
		for name, was := range containers {
			if addr := s.holds(name); addr != was {
				t.Errorf("%s had %s and now has %s", name, was, addr)
			}
		}
		s.only(all...)
		s.beforeDocker()
	}

	// Docker's releases reach the server: the daemon and the network outlive it.
	check(t, s.machine.Shutdown())
	if leased := s.leased(); len(leased) != 0 {
		t.Errorf("after the shutdown the server leases %v", leased)
	}
	s.boot()
	same()

	check(t, s.machine.PowerOff())
	if leased := s.leased(); len(leased) != len(containers) {
		t.Errorf("after the loss of power the server leases %v", leased)
	}
	s.boot()
	same()

	// Old installations have only the service enabled.
	s.run("systemctl", "disable", name+".socket")
	s.run("systemctl", "enable", name+".service")
	s.run("rm", "/etc/systemd/system/sockets.target.wants/"+name+".socket")
	check(t, s.machine.Shutdown())
	s.boot()
	same()

	// The socket alone.
	s.run("systemctl", "disable", name+".service")
	s.run("systemctl", "enable", name+".socket")
	check(t, s.machine.Shutdown())
	s.boot()
	same()
}

// beforeDocker sees that in this boot the socket was there before the engine
// began to start, and so was the daemon if it starts at boot.
func (s *site) beforeDocker() {
	s.Helper()
	engine := s.number("docker.service", "ExecMainStartTimestampMonotonic")
	if socket := s.number(name+".socket", "ActiveEnterTimestampMonotonic"); socket == 0 || socket > engine {
		s.Errorf("the socket was there %d µs after the boot, the engine %d", socket, engine)
	}
	if s.property(name+".service", "UnitFileState") != "enabled" {
		return
	}
	if daemon := s.number(name+".service", "ActiveEnterTimestampMonotonic"); daemon == 0 || daemon > engine {
		s.Errorf("the daemon was ready %d µs after the boot, the engine began at %d", daemon, engine)
	}
}

// A machine whose network never comes up and whose DHCP server is dead boots
// all the same, the engine with it.
func TestBootWithoutNetwork(t *testing.T) {
	s := newRunning(t)
	s.configure("DHCP_TIMEOUT=3s\n")
	s.run("systemctl", "restart", name)
	s.runContainer("web", "--restart=always", "--mac-address=02:42:0a:0a:00:01")
	// As distributions' services that wait for an address, which give up.
	const wait = 3 * time.Second
	s.write("/etc/systemd/system/wait-online.service", `[Unit]
DefaultDependencies=no
After=local-fs.target
Before=network-online.target

[Service]
Type=oneshot
ExecStart=/bin/sleep infinity
TimeoutStartSec=`+wait.String()+`

[Install]
WantedBy=network-online.target
`)
	s.run("systemctl", "enable", "wait-online.service")
	check(t, s.machine.PowerOff())
	check(t, s.dhcp.Kill())
	s.boot()
	s.state("wait-online.service", "failed")
	s.state(name+".service", "active")
	s.state("docker.service", "active")
	took := time.Duration(s.number(name+".service", "ActiveEnterTimestampMonotonic")-s.number(name+".service", "InactiveExitTimestampMonotonic")) * time.Microsecond
	if took > 2*time.Second {
		t.Errorf("the daemon took %v to be ready", took)
	}

	// It gets its address as soon as there is a server again and somebody tries.
	check(t, s.dhcp.Start())
	s.docker("restart", "web")
	s.only(s.holds("web"))
	if strings.Contains(s.run("systemctl", "--failed", "--no-legend", "--plain"), name) {
		t.Error("something of ours has failed")
	}
}
