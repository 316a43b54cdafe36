package e2e

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// offered is an object of `discover --json`, by its documented names.
type offered struct {
	Server  netip.Addr    `json:"server"`
	From    netip.Addr    `json:"from"`
	Address netip.Addr    `json:"address"`
	Subnet  *netip.Prefix `json:"subnet"`
	Router  *netip.Addr   `json:"router"`
	DNS     []netip.Addr  `json:"dns"`
	Lease   *float64      `json:"lease_seconds"`
	T1      *float64      `json:"t1_seconds"`
	T2      *float64      `json:"t2_seconds"`
	After   float64       `json:"after_ms"`
}

// command is a command line of our program on the host, beside the daemon if
// that runs. The configuration is the given text, and standard error goes to a
// file.
func (s *site) command(config string, args ...string) (c lab.Command, stderr string) {
	s.Helper()
	dir := s.TempDir()
	file := filepath.Join(dir, "config")
	stderr = filepath.Join(dir, "stderr")
	check(s.T, os.WriteFile(file, []byte(config), 0o644))
	return lab.Command{Args: append([]string{"sh", "-c", `exec "$@" 2>"$0"`, stderr, must(lab.Build())(s.T), "--config", file}, args...)}, stderr
}

// discoverOn runs `discover` with a configuration and returns its outputs and
// exit status.
func (s *site) discoverOn(config string, args ...string) (out, said string, status int) {
	s.Helper()
	c, stderr := s.command(config, append([]string{"discover"}, args...)...)
	out, err := s.net.Host.RunCommand(c)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		status = exit.ExitCode()
	} else {
		check(s.T, err)
	}
	return out, string(must(os.ReadFile(stderr))(s.T)), status
}

// discover runs `discover --json`, which must find somebody, and returns the
// offers in the order of their servers and what was said beside them.
func (s *site) discover(args ...string) (offers []offered, said string) {
	s.Helper()
	out, said, status := s.discoverOn("", append(args, "--json")...)
	if status != 0 {
		s.Fatalf("discover %q: status %d: %s", args, status, said)
	}
	strict := json.NewDecoder(strings.NewReader(out))
	strict.DisallowUnknownFields()
	check(s.T, strict.Decode(&offers))
	slices.SortFunc(offers, func(a, b offered) int { return a.Server.Compare(b.Server) })
	return offers, said
}

// offers tries that a discovery finds one offer and nothing odd, of a server
// and of a subnet as the lab's servers have them.
func (s *site) offers(server string, subnet lab.Subnet, args ...string) offered {
	s.Helper()
	offers, said := s.discover(args...)
	if len(offers) != 1 || said != "" {
		s.Fatalf("discover %q finds %+v and says %q", args, offers, said)
	}
	o := offers[0]
	if o.Server.String() != server || o.From.String() != server || o.Address.Less(subnet.First) || subnet.Last.Less(o.Address) ||
		o.Subnet == nil || *o.Subnet != subnet.Prefix || o.Router == nil || *o.Router != subnet.Router || o.After <= 0 {
		s.Errorf("discover %q finds %+v", args, o)
	}
	if o.Lease == nil || o.T1 == nil || o.T2 == nil || *o.Lease != 120 || *o.T1 <= 0 || *o.T2 <= *o.T1 || *o.Lease <= *o.T2 {
		s.Errorf("discover %q finds %+v", args, o)
	}
	return o
}

// TestDiscover asks each server for offers by hand, without and beside a daemon
// that keeps a lease, as a relay agent and by broadcast. Nothing may be leased
// by it, and the daemon not be disturbed.
func TestDiscover(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		const reservedMAC = "02:42:0a:0a:00:07"
		reserved := netip.MustParseAddr("10.10.0.7")
		a := lab.SubnetA()
		config := soonRenewed(kind)
		config.Subnets = []lab.Subnet{a, lab.SubnetB()}
		config.Subnets[0].Reservations = []lab.Reservation{{MAC: reservedMAC, Addr: reserved}}
		s := newHost(t, kind, config)
		requests := s.count(s.net.Server, request)

		relayed, broadcast := []string{"--dhcp-server", firstServer}, []string{"--interface", "eth0"}
		s.offers(firstServer, a, relayed...)
		s.offers(firstServer, lab.SubnetB(), append(relayed, "--subnet", "10.20.0.0/24")...)
		for _, where := range [][]string{relayed, broadcast} {
			args := append(where, "--mac", reservedMAC)
			if offers, said := s.discover(args...); len(offers) != 1 || offers[0].Address != reserved || said != "" {
				t.Errorf("discover %q finds %+v and says %q", args, offers, said)
			}
		}
		s.notLeased()
		if n := requests(); n > 0 {
			t.Errorf("%d REQUESTs of a discovery", n)
		}
		s.portsFree("after a discovery")

		// As an operator has it: the configuration of the daemon, and a table.
		out, said, status := s.discoverOn("DHCP_SERVER=" + firstServer + "\n")
		lines := strings.Split(strings.TrimSpace(out), "\n")
		if status != 0 || said != "" || len(lines) != 2 {
			t.Fatalf("status %d, %q on standard error, output\n%s", status, said, out)
		}
		head := []string{"SERVER", "OFFERED", "SUBNET", "ROUTER", "DNS", "LEASE", "T1", "T2", "AFTER"}
		fields := strings.Fields(lines[1])
		if !slices.Equal(strings.Fields(lines[0]), head) || len(fields) != len(head) {
			t.Fatalf("table\n%s", out)
		}
		if fields[0] != firstServer || fields[2] != "10.10.0.0/24" || fields[3] != "10.10.0.1" || fields[5] != "2m0s" {
			t.Errorf("table\n%s", out)
		}

		if kind.Name == lab.Kea.Name { // it knows RFC 8357
			out, said, status := s.discoverOn("DHCP_SERVER="+firstServer+"\nLISTEN_PORT=6767\n", "--json")
			if status != 0 || !strings.Contains(out, firstServer) {
				t.Errorf("from another port: status %d, output %s, and it says %s", status, out, said)
			}
		}

		check(t, s.daemon.Start())
		pool := s.pool()
		kept := s.acquire(pool, lab.ScatteredMAC(0))
		until := s.leased(kept, lab.ScatteredMAC(0)).Expires
		s.offers(firstServer, a, relayed...)
		s.offers(firstServer, a, broadcast...)
		s.renewed(kept, until)
		s.only(kept)
		if holders := s.portHolders(67); len(holders) != 1 || holders[0] != s.daemon.Pid() {
			t.Errorf("UDP port 67 is held by processes %v, want the daemon's %d", holders, s.daemon.Pid())
		}
		for line := range strings.Lines(s.daemon.Log()) {
			if strings.Contains(line, "level=WARN") || strings.Contains(line, "level=ERROR") {
				t.Errorf("the daemon says %s", line)
			}
		}
		// It hears the answers of its own.
		other := s.acquire(pool, lab.ScatteredMAC(1))
		check(t, errors.Join(s.releaseAddress(pool, kept), s.releaseAddress(pool, other)))
		s.notLeased()
	})
}

// Two servers that contradict each other are both listed, and that is said.
func TestDiscoverSeveralServers(t *testing.T) {
	t.Parallel()
	for i, kind := range lab.DHCPKinds {
		other := lab.DHCPKinds[(i+1)%len(lab.DHCPKinds)]
		t.Run(kind.Name+" and "+other.Name, func(t *testing.T) {
			t.Parallel()
			s := newHost(t, kind, lab.DHCPConfig{Subnets: []lab.Subnet{lab.SubnetA()}})
			second := s.on(must(s.net.Second.StartDHCP(other, lab.DHCPConfig{Subnets: []lab.Subnet{
				lab.NewSubnet("10.10.0.0/24", "10.10.0.200", "10.10.0.219", "10.10.0.3"),
			}}))(t))
			for _, args := range [][]string{{"--dhcp-server", firstServer + "," + secondServer}, {"--interface", "eth1"}} {
				offers, said := s.discover(args...)
				if len(offers) != 2 || offers[0].Server.String() != firstServer || offers[1].Server.String() != secondServer ||
					offers[1].Address.As4()[3] < 200 || offers[0].Router.String() != firstServer || offers[1].Router.String() != secondServer {
					t.Errorf("discover %q finds %+v", args, offers)
				}
				mentions(t, said, "answer differently", "server 10.10.0.1 offers 10.10.0.1", "router 10.10.0.1", "server 10.10.0.3 offers 10.10.0.2", "router 10.10.0.3")
			}
			offers, said := s.discover("--interface", "eth0", "--subnet", "10.20.0.0/24")
			if len(offers) != 2 {
				t.Errorf("%d offers for another subnet", len(offers))
			}
			mentions(t, said, "10.10.0.1 offers 10.10.0.1", "10.10.0.3 offers 10.10.0.2", "not of the subnet 10.20.0.0/24")
			s.notLeased()
			second.notLeased()
		})
	}
}

// Silence ends with status 1 and what to look at, errors at once.
func TestDiscoverNobody(t *testing.T) {
	t.Parallel()
	site := newHost(t, lab.Kea, lab.DHCPConfig{})
	check(t, site.dhcp.Stop())
	const config = "DHCP_SERVER=" + nobody + "\nLISTEN_ADDR=10.10.0.2\n"

	reasons := []string{
		"asked 10.10.0.99 from relay address 10.10.0.2", "route back to 10.10.0.2", "firewalls", "between 10.10.0.2 and 10.10.0.99",
		"subnets", "UDP port 67 of 10.10.0.2 on this host", "listen at UDP 10.10.0.99:67", "known clients",
	}
	for _, c := range []struct {
		name string
		args []string
		out  string
		says []string // in this order
	}{
		{"as a relay agent", nil, "", reasons},
		{"in JSON", []string{"--json"}, "[]\n", reasons},
		{"another subnet", []string{"--subnet", "10.20.0.0/24"}, "", []string{"serve 10.20.0.0/24", "relay address 10.10.0.2", "outside"}},
		{"a host without a server", []string{"--dhcp-server", firstServer}, "", []string{"asked 10.10.0.1 from relay address 10.10.0.2", "10.10.0.1:67"}},
		{"by broadcast", []string{"--interface", "eth1"}, "", []string{
			"asked by broadcast on interface eth1", "is eth1 in the LAN", "link of eth1", "snooping", "firewalls", "relay agent", "known clients",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel() // it waits
			s := site.on(site.dhcp)
			s.T = t
			began := time.Now()
			out, said, status := s.discoverOn(config, c.args...)
			if status != 1 || out != c.out {
				t.Errorf("status %d, output %q, and it says %q", status, out, said)
			}
			if took := time.Since(began); took < 7*time.Second || took > 12*time.Second {
				t.Errorf("it took %s", took)
			}
			rest := said
			for _, part := range append([]string{"oam-docker-ipam: no DHCP server answered within 8s"}, c.says...) {
				_, after, found := strings.Cut(rest, part)
				if !found {
					t.Fatalf("it says\n%s\nwithout %q, or that too early", said, part)
				}
				rest = after
			}
		})
	}

	t.Run("interrupted", func(t *testing.T) {
		t.Parallel()
		s := site.on(site.dhcp)
		s.T = t
		c, stderr := s.command(config, "--debug", "discover")
		process := must(s.net.Host.Start("discover", c))(t)
		eventually(t, 5*time.Second, func() error {
			said, err := os.ReadFile(stderr)
			if err == nil && !strings.Contains(string(said), "link opened") {
				err = errors.New("it hasn't begun")
			}
			return err
		})
		check(t, process.Signal(syscall.SIGINT))
		var exit *exec.ExitError
		if err := process.Wait(2 * time.Second); !errors.As(err, &exit) || exit.ExitCode() != 1 {
			t.Errorf("it ends so: %v", err)
		}
		mentions(t, string(must(os.ReadFile(stderr))(t)), "stopped before any answer: interrupt")
	})

	for _, c := range []struct {
		args []string
		says []string
	}{
		{[]string{"--interface", "eth7"}, []string{"interface eth7", "there are eth0, eth1"}},
		{[]string{"--interface", "lo"}, []string{"interface lo is not Ethernet"}},
		{[]string{"--listen-addr", "10.10.0.77"}, []string{"10.10.0.77 is not an address of this host", "10.10.0.2"}},
		{[]string{"--dhcp-server", "10.10.0.2"}, []string{"10.10.0.2 is the relay address itself"}},
		{[]string{"--dhcp-server", firstServer, "--interface", "eth0"}, []string{"DHCP_SERVER=10.10.0.1", "DHCP_INTERFACE=eth0", "exclude each other"}},
	} {
		out, said, status := site.discoverOn(config, c.args...)
		if status != 1 || out != "" {
			t.Errorf("discover %q: status %d, output %q", c.args, status, out)
		}
		mentions(t, said, c.says...)
		if strings.Contains(said, "likeliest") {
			t.Errorf("discover %q gives reasons for a silence: %s", c.args, said)
		}
	}
}

// Without the right to it, the error says which.
func TestDiscoverWithoutRights(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	for _, args := range [][]string{{"--dhcp-server", firstServer}, {"--interface", "eth0"}} {
		c, stderr := s.command("", append([]string{"discover"}, args...)...)
		c.Args = append([]string{"setpriv", "--bounding-set=-net_raw"}, c.Args...)
		out, err := s.net.Host.RunCommand(c)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || out != "" {
			t.Errorf("discover %q: %v, output %q", args, err, out)
		}
		mentions(t, string(must(os.ReadFile(stderr))(t)), "root", "CAP_NET_RAW")
	}
}
