package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// subnetC is served on a LAN of its own, of which the host has no address. Its
// router isn't its first address.
func subnetC() lab.Subnet {
	return lab.NewSubnet("10.30.0.0/24", "10.30.0.100", "10.30.0.199", "10.30.0.254")
}

// secondLAN puts an interface of the host, without an address, on another LAN,
// and a server of a subnet there, at which the returned site looks.
func (s *site) secondLAN(ifname string, subnet lab.Subnet) (lan *lab.Node, remote *site) {
	s.Helper()
	lan = must(s.lab.NewLAN("lan2"))(s.T)
	own := netip.PrefixFrom(subnet.Prefix.Addr().Next(), subnet.Prefix.Bits())
	server := must(s.lab.NodeOn(lan, "remote", own.String()))(s.T)
	check(s.T, s.net.Host.AttachTo(lan, ifname))
	return lan, s.on(must(server.StartDHCP(s.dhcp.Kind, lab.DHCPConfig{Subnets: []lab.Subnet{subnet}}))(s.T))
}

// created creates a network with these arguments only, and returns its subnet
// and gateway as the engine tells them: of a subnet that was typed, older ones
// tell no gateway that wasn't.
func (s *site) created(name string, args ...string) (subnet netip.Prefix, gateway string) {
	s.Helper()
	s.docker(append(append([]string{"network", "create", "-d", "macvlan", "--ipam-driver=talkingdata"}, args...), name)...)
	var config []struct {
		Subnet  netip.Prefix
		Gateway string
	}
	check(s.T, json.Unmarshal([]byte(s.docker("network", "inspect", "--format", "{{json .IPAM.Config}}", name)), &config))
	if len(config) != 1 {
		s.Fatalf("network %s has %v", name, config)
	}
	// Engine 20.10 shows a gateway of ours with its prefix length.
	gateway, _, _ = strings.Cut(config[0].Gateway, "/")
	return config[0].Subnet, gateway
}

// suggested are the flags that an error tells to use.
var suggested = regexp.MustCompile(`--subnet [0-9./]+ --gateway [0-9.]+`)

// TestDiscovery creates networks without typing subnet or gateway, and checks
// those that were typed.
func TestDiscovery(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		a := lab.NewSubnet("10.10.0.0/24", "10.10.0.100", "10.10.0.199", "10.10.0.4")
		s := newBroadcaster(t, kind, lab.DHCPConfig{Subnets: []lab.Subnet{a}}, byMAC...)
		s.startEngine("talkingdata")
		_, remote := s.secondLAN("eth2", subnetC())

		remote.step("learned", func(s *site) {
			subnet, gateway := s.created("lan", "--ipam-opt", "dhcp_interface=eth2", "-o", "parent=eth2")
			if subnet != subnetC().Prefix || gateway != "10.30.0.254" {
				s.Errorf("learned subnet %s and gateway %s", subnet, gateway)
			}
			addr := s.run("c1", "lan")
			s.holds("c1", "eth0")
			if has := s.prefix("c1", "eth0"); has.Masked() != subnetC().Prefix {
				s.Errorf("the container has %s", has)
			}
			if router := s.router("c1"); router != "10.30.0.254" {
				s.Errorf("default route by %s", router)
			}
			s.only(addr)
		})
		remote.step("gateway of the user", func(s *site) {
			s.created("lan", "--ipam-opt", "dhcp_interface=eth2", "-o", "parent=eth2", "--subnet", "10.30.0.0/24", "--gateway", "10.30.0.1")
			s.run("c1", "lan")
			if router := s.router("c1"); router != "10.30.0.1" {
				s.Errorf("default route by %s", router)
			}
		})
		remote.step("another subnet", func(s *site) {
			mentions(s.T, s.networkRefused("--subnet", "10.31.0.0/24", "--ipam-opt", "dhcp_interface=eth2"),
				"10.30.0.1 offers 10.30.0.", "10.30.0.0/24", "10.31.0.0/24", "correct --subnet")
		})
		for name, option := range map[string]string{"by broadcast": "dhcp_interface=eth0", "as a relay agent": "dhcp_server=" + firstServer} {
			s.step("the host's own subnet "+name, func(s *site) { discoverOwnSubnet(s, option) })
		}
	})
}

// Engines before 27 want no pool to which the host has a route, unless it was
// typed, and would ask for another one without end.
func discoverOwnSubnet(s *site, option string) {
	args := []string{"--ipam-opt", option, "-o", "parent=eth0"}
	if s.version() < 27 {
		said := s.networkRefused(args...)
		flags := suggested.FindString(said)
		if flags != "--subnet 10.10.0.0/24 --gateway 10.10.0.4" {
			s.Fatalf("no flags of use in %q", said)
		}
		args = append(args, strings.Fields(flags)...)
	}
	subnet, gateway := s.created("lan", args...)
	if subnet.String() != "10.10.0.0/24" || gateway != "10.10.0.4" {
		s.Errorf("subnet %s and gateway %s", subnet, gateway)
	}
	addr := s.run("c1", "lan")
	s.holds("c1", "eth0")
	if router := s.router("c1"); router != "10.10.0.4" {
		s.Errorf("default route by %s", router)
	}
	s.pings(s.net.Client, addr)
}

// What is wrong is told in docker's own output.
func TestDiscoveryRefused(t *testing.T) {
	t.Parallel()
	s := newBroadcaster(t, lab.Kea, lab.DHCPConfig{}, byMAC...)
	s.startEngine("talkingdata")
	host := s.net.Host
	for _, name := range []string{"eth2", "eth3", "eth4"} {
		check(t, host.Attach(name))
	}
	quiet := must(s.lab.NewLAN("quiet"))(t)
	check(t, host.AttachTo(quiet, "eth5"))
	for _, command := range []string{
		"link set eth2 down",
		"link add br7 type bridge",
		"link set eth4 master br7",
	} {
		must(host.Run(append([]string{"ip"}, strings.Fields(command)...)...))(t)
	}
	must(s.lab.LAN.Run("ip", "link", "set", host.Port("eth3"), "down"))(t)

	// Probes that nobody answers take their time.
	var silent sync.WaitGroup
	var silence, learned error
	silent.Go(func() { _, silence = s.requestPool("10.40.0.0/24", onInterface("eth5")) })
	silent.Go(func() { _, learned = s.requestPool("", onInterface("eth5")) })

	on := func(name string) string { return "dhcp_interface=" + name }
	for _, test := range []struct {
		options []string
		says    []string
	}{
		{[]string{on("eth9")}, []string{"interface eth9", "no such network interface", "correct dhcp_interface", "eth0"}},
		{[]string{on("eth2")}, []string{"interface eth2", "is down: bring it up"}},
		{[]string{on("eth3")}, []string{"interface eth3", "has no link"}},
		{[]string{on("lo")}, []string{"interface lo is not Ethernet", "correct dhcp_interface"}},
		{[]string{on("eth4")}, []string{"interface eth4 is a port of bridge br7", "dhcp_interface=br7"}},
		{[]string{on("eth0/1")}, []string{`dhcp_interface="eth0/1"`, "the name of a network interface"}},
		{[]string{on("eth0"), "dhcp_server=" + firstServer}, []string{"dhcp_server=10.10.0.1 and dhcp_interface=eth0 exclude each other"}},
		{[]string{on("eth0"), "option82=host"}, []string{"option82=host", "dhcp_interface", "RFC 3046"}},
		{[]string{"dhcp_server=" + firstServer, "ether_source=container"}, []string{"ether_source=container", "dhcp_interface"}},
		{nil, []string{"no DHCP server is configured", "--ipam-opt dhcp_server=", "--ipam-opt dhcp_interface="}},
		{[]string{on("eth0"), "probe=off"}, []string{"probe=off", "--subnet", "--gateway"}},
		{[]string{on("eth0.10")}, []string{"eth0.10", "spanning tree", "50 seconds", "--subnet", "--gateway"}},
	} {
		var args []string
		for _, option := range test.options {
			args = append(args, "--ipam-opt", option)
		}
		mentions(t, s.networkRefused(args...), test.says...)
	}
	mentions(t, s.networkRefused("--ipam-opt", on("eth0"), "--ip-range", "10.10.0.0/26"), "--ip-range")
	s.notLeased()

	silent.Wait()
	check(t, silence)
	mentions(t, s.daemon.Log(), "no DHCP server answered the probe", "asked by broadcast on interface eth5")
	if !errors.Is(learned, lab.ErrRefused) {
		t.Errorf("a subnet was learned from nobody: %v", learned)
	} else {
		mentions(t, learned.Error(), "no DHCP server answered", "interface eth5", "--subnet", "--gateway")
	}
	// Typed, a subnet isn't asked for.
	began := time.Now()
	s.network("trusted", "eth5", "10.40.0.0/24", "--ipam-opt", on("eth5"), "--ipam-opt", "probe=off")
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("a network with probe=off took %v", took)
	}
}

// Servers that don't agree are told apart in the daemon's log, and nobody is
// refused.
func TestDiscoveryOfSeveralServers(t *testing.T) {
	t.Parallel()
	s := newBroadcaster(t, lab.Kea, lab.DHCPConfig{})
	must(s.net.Second.StartDHCP(lab.ISC, lab.DHCPConfig{Subnets: []lab.Subnet{
		lab.NewSubnet("10.10.0.0/24", "10.10.0.200", "10.10.0.219", "10.10.0.3"),
	}}))(t)
	check(t, s.daemon.Start())
	for name, options := range map[string]map[string]string{
		"by broadcast":     onInterface("eth0"),
		"as a relay agent": {"dhcp_server": firstServer + "," + secondServer},
	} {
		var pool struct{ Pool netip.Prefix }
		before := len(s.said("several DHCP servers answer differently"))
		check(t, s.call(t.Context(), "RequestPool", map[string]any{"Options": options}, &pool))
		if pool.Pool.String() != "10.10.0.0/24" {
			t.Errorf("%s: learned %s", name, pool.Pool)
		}
		lines := s.said("several DHCP servers answer differently")
		if len(lines) != before+1 {
			t.Errorf("%s: the daemon said %q", name, lines)
			continue
		}
		mentions(t, lines[before], firstServer, secondServer, "router 10.10.0.1", "router 10.10.0.3")
	}
	s.notLeased()
}

// Offers whose mask or router is of no use, each on a LAN of its own.
func TestDiscoveryOfOddOffers(t *testing.T) {
	t.Parallel()
	s := newBroadcaster(t, lab.Kea, lab.DHCPConfig{})
	check(t, s.daemon.Start())
	const flags = "--subnet 10.40.0.0/24 --gateway 10.40.0.1"
	cases := []struct {
		name, option string
		says         []string // in the error, if it is one
	}{
		{"no mask", "1", []string{"without a subnet mask (option 1)", flags}},
		{"mask with a hole", "1,255.0.255.0", []string{"without a subnet mask (option 1)", flags}},
		{"mask of nothing", "1,0.0.0.0", []string{"without a subnet mask (option 1)", flags}},
		{"mask of one host", "1,255.255.255.255", []string{"wrong subnet mask (option 1)", "/32", flags}},
		{"router elsewhere", "3,10.99.0.1", nil},
	}
	var errs [5]error
	var answers [5]struct {
		Pool netip.Prefix
		Data map[string]string
	}
	var probes sync.WaitGroup
	for i, test := range cases {
		name := fmt.Sprintf("odd%d", i)
		lan := must(s.lab.NewLAN(name + "lan"))(t)
		server := must(s.lab.NodeOn(lan, name, "10.40.0.1/24"))(t)
		must(server.Start("dnsmasq", lab.Command{Args: []string{
			"dnsmasq", "--conf-file=/dev/null", "--no-daemon", "--port=0", "--user=root", "--no-ping",
			"--dhcp-leasefile=" + filepath.Join(s.lab.Scratch, name+".leases"),
			"--dhcp-range=10.40.0.100,10.40.0.199,255.255.255.0", "--dhcp-option-force=" + test.option,
		}}))(t)
		ifname := fmt.Sprintf("eth%d", 2+i)
		check(t, s.net.Host.AttachTo(lan, ifname))
		probes.Go(func() {
			errs[i] = s.call(t.Context(), "RequestPool", map[string]any{"Options": onInterface(ifname)}, &answers[i])
		})
	}
	probes.Wait()
	for i, test := range cases {
		switch {
		case test.says == nil:
			check(t, errs[i])
			if gateway := answers[i].Data["com.docker.network.gateway"]; gateway != "10.40.0.1/24" || answers[i].Pool.String() != "10.40.0.0/24" {
				t.Errorf("%s: subnet %s and gateway %s", test.name, answers[i].Pool, gateway)
			}
			mentions(t, s.daemon.Log(), "router is no host of the subnet", "10.99.0.1")
		case !errors.Is(errs[i], lab.ErrRefused):
			t.Errorf("%s: learned %v: %v", test.name, answers[i], errs[i])
		default:
			mentions(t, errs[i].Error(), test.says...)
		}
	}
}

// A VLAN's interface that Docker is yet to make can't be probed. Here it comes
// as a veth of such a name, since this kernel may know no VLANs, and its port
// forwards nothing at first, as one that spanning tree blocks.
//
//	DHCP_TIMEOUT = 2 s  <  blocked = 4 s  <  60 s
func TestDiscoveryOfNewVLAN(t *testing.T) {
	t.Parallel()
	const vlan = "eth0.10"
	s := newBroadcaster(t, lab.Kea, lab.DHCPConfig{}, append(byMAC, "--dhcp-timeout", "2s")...)
	s.startEngine("talkingdata")
	lan, remote := s.secondLAN("eth2", subnetC())
	began := time.Now()
	s.created("lan", "--ipam-opt", "dhcp_interface="+vlan, "-o", "parent=eth2", "--subnet", "10.30.0.0/24")
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("a network without a probe took %v", took)
	}
	mentions(t, s.daemon.Log(), "not probed", vlan, "1m0s")

	check(t, s.net.Host.AttachTo(lan, vlan))
	port := s.net.Host.Port(vlan)
	must(lan.Run("ip", "link", "set", port, "nomaster"))(t)
	started := make(chan error, 1)
	go func() {
		_, err := s.engine.Docker("run", "-d", "--name", "c1", "--network", "lan", image)
		started <- err
	}()
	select {
	case err := <-started:
		t.Fatalf("the container didn't wait for the port: %v", err)
	case <-time.After(4 * time.Second):
	}
	must(lan.Run("ip", "link", "set", port, "master", "br0"))(t)
	check(t, <-started)
	remote.holds("c1", "eth0")
	if router := s.router("c1"); router != "10.30.0.1" {
		t.Errorf("default route by %s, which nobody has named", router)
	}
	// From here on it is a network like any other.
	must(lan.Run("ip", "link", "set", port, "nomaster"))(t)
	mentions(t, s.refused("lan"), "no DHCP server answered within 2s")
}
