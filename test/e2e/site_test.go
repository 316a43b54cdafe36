// Package e2e tries the built daemon as its users have it: a real Docker
// engine asks it, real DHCP servers answer it. What counts is the server's
// lease table and what `ip` says inside the container.
package e2e

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

func TestMain(m *testing.M) {
	// Most of the time of most tests is waiting for a timetable.
	if err := flag.Set("test.parallel", "6"); err != nil {
		panic(err)
	}
	os.Exit(lab.RunTests(m))
}

const image = "img:1"

// byMAC are the flags of tests that are about leases as every engine's
// containers have them: identified by MAC and released at once.
var byMAC = []string{"--client-id", "mac"}

// site is a LAN with a DHCP server and a Docker host on which the engine and
// our daemon run.
type site struct {
	*testing.T
	lab    *lab.Lab
	net    *lab.Topology
	dhcp   *lab.DHCPServer
	daemon *lab.Daemon
	engine *lab.Engine
}

// newSite starts all of it. The server has subnets A and B unless told
// otherwise.
func newSite(t *testing.T, kind lab.DHCPKind, config lab.DHCPConfig, flags ...string) *site {
	t.Helper()
	s := newHost(t, kind, config, flags...)
	s.startEngine("talkingdata")
	return s
}

// startEngine starts the daemon under a driver's name, and an engine.
func (s *site) startEngine(driver string, flags ...string) {
	s.Helper()
	s.engine = newEngine(s.T, s.net.Host, flags...)
	s.daemon.Socket = filepath.Join(s.engine.PluginDir(), driver+".sock")
	// As on a real host: the daemon first.
	check(s.T, s.daemon.Start())
	check(s.T, s.engine.Start())
	check(s.T, s.engine.ImportImage(image))
}

// newEngine puts an engine on a node: the system's, unless OAM_DOCKERD has the
// path of another.
func newEngine(t *testing.T, n *lab.Node, flags ...string) *lab.Engine {
	t.Helper()
	return must(n.NewEngine(os.Getenv("OAM_DOCKERD"), flags...))(t)
}

// newHost is newSite without an engine, its daemon not yet started.
func newHost(t *testing.T, kind lab.DHCPKind, config lab.DHCPConfig, flags ...string) *site {
	t.Helper()
	s := &site{T: t, lab: lab.ForTest(t, lab.Engines, lab.DHCPServers, lab.Clients)}
	s.net = must(s.lab.Standard())(t)
	if config.Subnets == nil {
		config.Subnets = []lab.Subnet{lab.SubnetA(), lab.SubnetB()}
	}
	s.dhcp = must(s.net.Server.StartDHCP(kind, config))(t)
	flags = append([]string{"--debug", "--dhcp-server", "10.10.0.1"}, flags...)
	s.daemon = must(s.net.Host.NewDaemon(filepath.Join(s.lab.Scratch, "talkingdata.sock"), flags...))(t)
	return s
}

// docker runs the client and returns its output without the last newline.
func (s *site) docker(args ...string) string {
	s.Helper()
	return strings.TrimSpace(must(s.engine.Docker(args...))(s.T))
}

// dockerFails runs the client, which must fail, and returns what it says.
func (s *site) dockerFails(args ...string) string {
	s.Helper()
	out, err := s.engine.Docker(args...)
	if err == nil {
		s.Fatalf("docker %s succeeded: %s", strings.Join(args, " "), out)
	}
	return out + err.Error()
}

// network creates a macvlan network on an interface of the host.
func (s *site) network(name, parent, subnet string, args ...string) {
	s.Helper()
	s.docker(append(append([]string{
		"network", "create", "-d", "macvlan", "--ipam-driver=talkingdata", "--subnet", subnet, "-o", "parent=" + parent,
	}, args...), name)...)
}

// run starts a container and returns its address as the container has it.
func (s *site) run(name, network string, args ...string) netip.Addr {
	s.Helper()
	s.docker(append(append([]string{"run", "-d", "--name", name, "--network", network}, args...), image)...)
	return s.addr(name, "eth0")
}

// addr is an interface's IPv4 address inside a container.
func (s *site) addr(container, ifname string) netip.Addr {
	s.Helper()
	return s.prefix(container, ifname).Addr()
}

// prefix is addr with its prefix length.
func (s *site) prefix(container, ifname string) netip.Prefix {
	s.Helper()
	fields := strings.Fields(s.docker("exec", container, "ip", "-4", "-o", "addr", "show", "dev", ifname))
	for i, f := range fields {
		if f == "inet" {
			return must(netip.ParsePrefix(fields[i+1]))(s.T)
		}
	}
	s.Fatalf("container %s has no address on %s: %s", container, ifname, fields)
	return netip.Prefix{}
}

// mac is an interface's MAC inside a container.
func (s *site) mac(container, ifname string) string {
	s.Helper()
	return s.docker("exec", container, "cat", "/sys/class/net/"+ifname+"/address")
}

// router is the gateway of a container's default route.
func (s *site) router(container string) string {
	s.Helper()
	fields := strings.Fields(s.docker("exec", container, "ip", "-4", "route", "show", "default"))
	if len(fields) < 3 {
		s.Fatalf("container %s has no default route", container)
	}
	return fields[2]
}

// leased waits until the server's table has an address for a MAC.
func (s *site) leased(addr netip.Addr, mac string) lab.DHCPLease {
	s.Helper()
	var lease lab.DHCPLease
	check(s.T, lab.Eventually(5*time.Second, func() error {
		var found bool
		var err error
		lease, found, err = s.dhcp.Lease(addr)
		switch {
		case err != nil:
			return err
		case !found:
			return fmt.Errorf("the server has no lease of %s", addr)
		case !strings.EqualFold(lease.MAC, mac):
			return fmt.Errorf("the server leases %s to %s instead of %s", addr, lease.MAC, mac)
		}
		return nil
	}))
	return lease
}

// notLeased waits until the server's table has no active row of any of these
// addresses, or with none given no active row at all.
func (s *site) notLeased(addrs ...netip.Addr) {
	s.Helper()
	check(s.T, lab.Eventually(5*time.Second, func() error {
		leases, err := s.dhcp.Leases()
		if err != nil {
			return err
		}
		for _, lease := range leases {
			if len(addrs) == 0 {
				return fmt.Errorf("the server still leases %s to %s", lease.Addr, lease.MAC)
			}
			for _, addr := range addrs {
				if lease.Addr == addr {
					return fmt.Errorf("the server still leases %s to %s", lease.Addr, lease.MAC)
				}
			}
		}
		return nil
	}))
}

// daemonLease is an object of `leases --json`, by its documented names.
type daemonLease struct {
	Address      netip.Addr   `json:"address"`
	PrefixLength int          `json:"prefix_length"`
	MAC          string       `json:"mac"`
	Name         string       `json:"name"`
	PoolID       string       `json:"pool_id"`
	Subnet       netip.Prefix `json:"subnet"`
	State        string       `json:"state"`
	Server       netip.Addr   `json:"server"`
	ClientID     string       `json:"client_id"`
	ObtainedAt   time.Time    `json:"obtained_at"`
	RenewAt      time.Time    `json:"renew_at"`
	RebindAt     time.Time    `json:"rebind_at"`
	ExpiresAt    time.Time    `json:"expires_at"`
}

// leases are the running daemon's.
func (s *site) leases() []daemonLease {
	s.Helper()
	var leases []daemonLease
	check(s.T, json.Unmarshal([]byte(must(s.daemon.Run("leases", "--json"))(s.T)), &leases))
	return leases
}

// known returns the daemon's lease of an address.
func (s *site) known(addr netip.Addr) daemonLease {
	s.Helper()
	lease, err := s.find(addr)
	check(s.T, err)
	return lease
}

func (s *site) find(addr netip.Addr) (daemonLease, error) {
	s.Helper()
	for _, lease := range s.leases() {
		if lease.Address == addr {
			return lease, nil
		}
	}
	return daemonLease{}, errors.New("the daemon has no lease of " + addr.String())
}

// mentions fails unless a text has all of these words.
func mentions(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, word := range words {
		if !strings.Contains(text, word) {
			t.Errorf("%q doesn't mention %q", text, word)
		}
	}
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
