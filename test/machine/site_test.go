// Package machine tries the packages as their users have them: on machines that
// boot, with systemd and a Docker engine that the distribution made, configured
// and started as the README says. What counts is the DHCP server's lease table,
// what `ip` says inside the container, and what systemctl and journalctl say.
package machine

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

func TestMain(m *testing.M) {
	// Most of the time is systemd's and the engine's, who wait for each other.
	if err := flag.Set("test.parallel", "4"); err != nil {
		panic(err)
	}
	os.Exit(lab.RunTests(m))
}

const (
	image    = "img:1"
	name     = "oam-docker-ipam" // of package, program, service, socket and user
	conf     = "/etc/oam-docker-ipam.conf"
	stateDir = "/var/lib/oam-docker-ipam"
	pluginAt = "/run/docker/plugins/talkingdata.sock"
	network  = "lan"
)

// site is a LAN with a DHCP server and a machine on it.
type site struct {
	*testing.T
	lab     *lab.Lab
	server  *lab.Node
	dhcp    *lab.DHCPServer
	machine *lab.Machine
}

// newSite boots a machine that knows nothing of us yet. The package that it is
// to get is built meanwhile.
func newSite(t *testing.T, build func() (string, error)) *site {
	t.Helper()
	t.Parallel()
	s := &site{T: t, lab: lab.ForTest(t, lab.Machines, lab.DHCPServers, packagers)}
	go func() { _, _ = build() }()
	s.server = must(s.lab.Node("server", "10.10.0.1/24"))(t)
	s.dhcp = must(s.server.StartDHCP(lab.Kea, lab.DHCPConfig{Subnets: []lab.Subnet{lab.SubnetA()}}))(t)
	s.machine = must(must(s.lab.Node("host", "10.10.0.2/24"))(t).NewMachine())(t)
	s.boot()
	check(t, s.machine.ImportImage(image))
	t.Cleanup(func() {
		if t.Failed() && s.machine.Running() {
			t.Logf("journal of the machine:\n%s", s.try("journalctl", "--no-pager", "--output=short-precise", "--lines=80", "--unit="+name+"*", "--unit=docker"))
		}
	})
	return s
}

// newInstalled is newSite with our package, installed by dnf, configured and
// not yet started.
func newInstalled(t *testing.T) *site {
	t.Helper()
	s := newSite(t, rpm)
	s.install(must(rpm())(t))
	s.configure("DHCP_SERVER=10.10.0.1\n")
	return s
}

// newRunning is newInstalled, the service enabled and started, with a network.
func newRunning(t *testing.T) *site {
	t.Helper()
	s := newInstalled(t)
	s.run("systemctl", "enable", "--now", name)
	s.network()
	return s
}

func (s *site) boot() {
	s.Helper()
	check(s.T, s.machine.Boot())
}

// run runs a command on the machine and returns its output without the last
// newline.
func (s *site) run(args ...string) string {
	s.Helper()
	return strings.TrimSpace(must(s.machine.Run(args...))(s.T))
}

// try is run of a command that may fail.
func (s *site) try(args ...string) string {
	out, err := s.machine.Run(args...)
	if err != nil {
		out += err.Error()
	}
	return out
}

// fails runs a command that must fail, and returns what it says.
func (s *site) fails(args ...string) string {
	s.Helper()
	out, err := s.machine.Run(args...)
	if err == nil {
		s.Fatalf("%s succeeded: %s", strings.Join(args, " "), out)
	}
	return out + err.Error()
}

// sh runs a script on the machine to its end or first error.
func (s *site) sh(script string) string {
	s.Helper()
	return s.run("sh", "-ec", script)
}

func (s *site) write(file, text string) {
	s.Helper()
	check(s.T, s.machine.WriteFile(file, text, 0o644))
}

// copyIn puts a file of ours into the machine's /root and returns its path
// there.
func (s *site) copyIn(file string) string {
	s.Helper()
	from := must(os.Open(file))(s.T)
	defer from.Close()
	path := "/root/" + file[strings.LastIndexByte(file, '/')+1:]
	to := must(os.Create(s.machine.Path(path)))(s.T)
	defer to.Close()
	must(io.Copy(to, from))(s.T)
	return path
}

// configure adds lines to the configuration file that the package has put
// there: the last of a repeated key counts.
func (s *site) configure(lines string) {
	s.Helper()
	text := must(os.ReadFile(s.machine.Path(conf)))(s.T)
	s.write(conf, string(text)+lines)
}

// dropIn changes the service's unit, as `systemctl edit` does.
func (s *site) dropIn(file, text string) {
	s.Helper()
	s.write("/etc/systemd/system/"+name+".service.d/"+file, text)
	s.run("systemctl", "daemon-reload")
}

// network creates the network that all containers are on.
func (s *site) network(args ...string) {
	s.Helper()
	s.docker(append(append([]string{
		"network", "create", "-d", "macvlan", "--ipam-driver=talkingdata", "--subnet=10.10.0.0/24", "-o", "parent=eth0",
	}, args...), network)...)
}

func (s *site) docker(args ...string) string {
	s.Helper()
	return must(s.machine.Docker(args...))(s.T)
}

// dockerFails runs the client, which must fail, and returns what it says.
func (s *site) dockerFails(args ...string) string {
	s.Helper()
	return s.fails(append([]string{"docker"}, args...)...)
}

// runContainer starts a container, sees that its address is leased to it, and
// returns it.
func (s *site) runContainer(container string, args ...string) netip.Addr {
	s.Helper()
	s.docker(append(append([]string{"run", "-d", "--name", container, "--network", network}, args...), image)...)
	return s.holds(container)
}

// holds tries that a container has an address and that the server leases it to
// that container's MAC.
func (s *site) holds(container string) netip.Addr {
	s.Helper()
	said := strings.Fields(s.docker("exec", container, "sh", "-c", "ip -4 -o addr show dev eth0; cat /sys/class/net/eth0/address"))
	if len(said) < 5 || said[2] != "inet" {
		s.Fatalf("container %s has no address: %q", container, said)
	}
	addr, mac := must(netip.ParsePrefix(said[3]))(s.T).Addr(), said[len(said)-1]
	s.eventually(10*time.Second, func() error {
		lease, _, err := s.dhcp.Lease(addr)
		if err == nil && lease.MAC != mac {
			err = fmt.Errorf("%s of container %s, %s, is leased to %q", addr, container, mac, lease.MAC)
		}
		return err
	})
	return addr
}

// only waits until the server leases these addresses and no others, and sees
// that the daemon knows the same.
func (s *site) only(addrs ...netip.Addr) {
	s.Helper()
	slices.SortFunc(addrs, netip.Addr.Compare)
	s.eventually(10*time.Second, func() error {
		if leased := s.leased(); !slices.Equal(leased, addrs) {
			return fmt.Errorf("the server leases %v, want %v", leased, addrs)
		}
		return nil
	})
	if known := s.known(); !slices.Equal(known, addrs) {
		s.Fatalf("the daemon has leases of %v, the server of %v", known, addrs)
	}
}

// leased are the addresses in the server's table, sorted.
func (s *site) leased() (addrs []netip.Addr) {
	s.Helper()
	for _, lease := range must(s.dhcp.Leases())(s.T) {
		addrs = append(addrs, lease.Addr)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return addrs
}

// known are the addresses that the daemon says it leases, sorted.
func (s *site) known() (addrs []netip.Addr) {
	s.Helper()
	var leases []struct{ Address netip.Addr }
	check(s.T, json.Unmarshal([]byte(s.run(name, "leases", "--json")), &leases))
	for _, lease := range leases {
		addrs = append(addrs, lease.Address)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return addrs
}

// property is one of a unit, as systemctl shows it.
func (s *site) property(unit, property string) string {
	s.Helper()
	return s.run("systemctl", "show", "--value", "--property", property, unit)
}

// number is a property that is one.
func (s *site) number(unit, property string) int {
	s.Helper()
	return must(strconv.Atoi(s.property(unit, property)))(s.T)
}

// pid is the daemon's, as the machine counts.
func (s *site) pid() int {
	s.Helper()
	return s.number(name+".service", "MainPID")
}

// state waits until a unit is in a state, such as active.
func (s *site) state(unit, want string) {
	s.Helper()
	s.eventually(30*time.Second, func() error {
		if state := s.property(unit, "ActiveState"); state != want {
			return fmt.Errorf("%s is %s, want %s", unit, state, want)
		}
		return nil
	})
}

// entry is one of the journal.
type entry map[string]any

// String is for those that are looked for and not there.
func (e entry) String() string { return fmt.Sprint(e["MESSAGE"]) }

// journal returns the service's entries of this boot.
func (s *site) journal(args ...string) (entries []entry) {
	s.Helper()
	s.run("journalctl", "--sync")
	text := s.run(append([]string{"journalctl", "--unit", name, "--boot", "--output", "json", "--no-pager"}, args...)...)
	for d := json.NewDecoder(strings.NewReader(text)); ; {
		var e entry
		if err := d.Decode(&e); errors.Is(err, io.EOF) {
			return entries
		} else if err != nil {
			s.Fatal(err)
		}
		entries = append(entries, e)
	}
}

// logged waits for an entry whose message has all of these parts, and returns
// the last.
func (s *site) logged(parts ...string) (found entry) {
	s.Helper()
	s.eventually(10*time.Second, func() error {
		entries := s.journal()
		for _, e := range slices.Backward(entries) {
			if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(e.String(), part) }) {
				found = e
				return nil
			}
		}
		return fmt.Errorf("the journal has no entry with %q, but %q", parts, entries)
	})
	return found
}

// mentions tries that a text has all of these parts.
func (s *site) mentions(text string, parts ...string) {
	s.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			s.Errorf("%q lacks %q", text, part)
		}
	}
}

func (s *site) eventually(timeout time.Duration, cond func() error) {
	s.Helper()
	check(s.T, lab.Eventually(timeout, cond))
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
