package e2e

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// No kernel of these tests has ipvlan: with that network driver itself nothing
// here is tried. What is: the calls that engines send for its containers, as
// read in moby's source, and a real engine's bridge driver in its place. That
// one takes an IPAM driver that wants no MACs too, and makes up its own.

// ipvlan is the site by the socket of the driver for ipvlan.
func (s *site) ipvlan() *site {
	daemon := *s.daemon
	daemon.Socket = filepath.Join(filepath.Dir(daemon.Socket), "talkingdata-ipvlan.sock")
	other := *s
	other.daemon = &daemon
	return &other
}

// options29 are those of an engine that tells names, options20 those of one that
// doesn't.
func options29(name string) map[string]string {
	return map[string]string{"com.docker.network.endpoint.name": name}
}

var options20 map[string]string

// attach starts a container and finds it in the server's table. Its MAC is the
// table's.
func (s *site) attach(pool, ip string, options map[string]string) container {
	s.Helper()
	var out struct{ Address netip.Prefix }
	began := time.Now()
	check(s.T, s.call(s.Context(), "RequestAddress", map[string]any{"PoolID": pool, "Address": ip, "Options": options}, &out))
	return s.made(container{name: options["com.docker.network.endpoint.name"], addr: out.Address.Addr(), took: time.Since(began)})
}

// made finds a container's lease in the server's table, under a MAC that was made
// for it, which is also its identity where it has no name.
func (s *site) made(c container) container {
	s.Helper()
	c.mac = s.known(c.addr).MAC
	row := s.leased(c.addr, c.mac)
	if mac := must(net.ParseMAC(c.mac))(s.T); mac[0]&0x03 != 0x02 {
		s.Errorf("%s of %s is no locally administered unicast address", mac, c.addr)
	}
	want := "01" + strings.ReplaceAll(c.mac, ":", "")
	if c.name != "" {
		want = hex.EncodeToString([]byte("/" + c.name))
	}
	if !strings.HasSuffix(row.ClientID, want) || c.name == "" && row.ClientID != want {
		s.Errorf("%q is %s to the server, want %s", c.name, row.ClientID, want)
	}
	return c
}

// The engine's calls for containers of ipvlan.
func TestIPvlanCalls(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		s := newHost(t, kind, lab.DHCPConfig{})
		check(t, s.daemon.Start())
		flat := s.ipvlan()
		var capabilities struct{ RequiresMACAddress *bool }
		check(t, flat.call(t.Context(), "GetCapabilities", struct{}{}, &capabilities))
		if wants := capabilities.RequiresMACAddress; wants == nil || *wants {
			t.Error("ipvlan would refuse its endpoints")
		}
		_, err := flat.requestPool("10.10.0.0/24", map[string]string{"dhcp_interface": "eth0"})
		if !errors.Is(err, lab.ErrRefused) {
			t.Errorf("a network by broadcast: %v", err)
		} else {
			mentions(t, err.Error(), "dhcp_interface=eth0", "ipvlan", "dhcp_server")
		}
		a, b := flat.pool(), must(flat.requestPool("10.20.0.0/24", nil))(t)

		// First, before others happen to get these.
		second := flat.attach(a, "10.10.0.170", options20)
		fixed := flat.attach(b, "10.20.0.150", options29("fixed"))
		if second.addr.String() != "10.10.0.170" || fixed.addr.String() != "10.20.0.150" {
			t.Errorf("asked for 10.10.0.170 and 10.20.0.150, got %s and %s", second.addr, fixed.addr)
		}

		// Engine 29: the name is the identity, and makes the MAC.
		did := s.watch()
		web := flat.attach(a, "", options29("web"))
		if did := did(); !did.is(traffic{discovers: 1, requests: 1}, web.took) {
			t.Errorf("for its first address the server got %+v", did)
		}
		s.end(a, web)
		if state := s.known(web.addr).State; state != "releasing" {
			t.Errorf("the lease of a container that left is %s", state)
		}
		did()
		again := flat.attach(a, "", options29("web"))
		s.sameAs("stop and start", again, web, did(), oneRoundTrip)
		if again.mac != web.mac {
			t.Errorf("web was %s and is %s", web.mac, again.mac)
		}
		elsewhere := flat.attach(b, "", options29("web"))
		if elsewhere.mac == web.mac {
			t.Errorf("web is %s in both subnets", web.mac)
		}

		// Engine 20.10: a client of its own for each request, which the store knows.
		first := flat.attach(a, "", options20)
		if first.mac == second.mac {
			t.Errorf("two containers are %s", first.mac)
		}
		check(t, s.daemon.Kill())
		check(t, s.daemon.Start())
		for _, c := range []container{web, elsewhere, fixed, first, second} {
			if now := flat.made(c); now.mac != c.mac {
				t.Errorf("%s was leased to %s, is to %s after a crash", c.addr, c.mac, now.mac)
			}
		}
		s.end(a, first)
		s.end(b, fixed)
		s.gone(first.addr)
		s.gone(fixed.addr)
		s.end(a, second)
		s.end(b, elsewhere)
		s.released()
		s.only(web.addr)

		// The engine goes on with the PoolIDs that it has.
		s.loseDatabase()
		if found := flat.attach(a, "", options29("web")); found.addr != web.addr || found.mac != web.mac {
			t.Errorf("web had %s as %s, has %s as %s", web.addr, web.mac, found.addr, found.mac)
		}
		flat.releasePool(a)
		flat.releasePool(b)
		s.leftBehind()
	})
}

// bridged creates a network on a bridge of the host with eth1 as its port, in
// ipvlan's place. The host has no address there, and keeps its own.
func (s *site) bridged(name, subnet string, args ...string) {
	s.Helper()
	for _, command := range []string{
		"link add standin type bridge stp_state 0 forward_delay 0", "link set eth1 master standin", "link set standin up",
	} {
		must(s.net.Host.Run(append([]string{"ip"}, strings.Fields(command)...)...))(s.T)
	}
	s.docker(append(append([]string{
		"network", "create", "-d", "bridge", "--ipam-driver=talkingdata-ipvlan", "--subnet", subnet,
		"-o", "com.docker.network.bridge.name=standin", "-o", "com.docker.network.bridge.inhibit_ipv4=true",
		"-o", "com.docker.network.bridge.enable_ip_masquerade=false",
	}, args...), name)...)
}

// attached finds a running container's lease in the server's table. Its
// own MAC is another: the engine made that up later, and told nobody.
func (s *site) attached(name string) container {
	s.Helper()
	c := container{addr: s.addr(name, "eth0")}
	if s.tellsNames() {
		c.name = name
	}
	c = s.made(c)
	if own := s.mac(name, "eth0"); own == c.mac {
		s.Errorf("%s has %s, which is the lease's", name, own)
	}
	return c
}

// A real engine that asks without MACs, and its containers.
//
// Renewals come at once, and what follows them doesn't within the test:
//
//	T1 = 1 s < the test < T2 = 300 s < the lease = 600 s
func TestIPvlanStandIn(t *testing.T) {
	t.Parallel()
	s := newSite(t, lab.Kea, lab.DHCPConfig{RenewSeconds: 1, RebindSeconds: 300})
	s.network("a", "eth0", "10.10.0.0/24")
	s.bridged("flat", "10.10.0.0/24")
	s.run("neighbour", "a")
	neighbour := s.resident("neighbour")
	s.run("c1", "flat")
	s.run("c2", "flat", "--ip", "10.10.0.150")
	c1, c2 := s.attached("c1"), s.attached("c2")
	if c2.addr.String() != "10.10.0.150" {
		t.Errorf("asked for 10.10.0.150, got %s", c2.addr)
	}
	if router := s.router("c1"); router != "10.10.0.1" {
		t.Errorf("default route by %s, the server's router is 10.10.0.1", router)
	}
	s.pings(s.net.Client, c1.addr)
	s.reaches("c2", c1.addr)
	s.only(neighbour.addr, c1.addr, c2.addr)

	// The engine shows the endpoints with MACs that are none of the leases'.
	s.reconciles(0, []string{"named c1", "named c2", "named neighbour"})
	s.reconciles(0, nil)
	check(t, s.daemon.Kill())
	check(t, s.daemon.Start())
	for name, was := range map[string]container{"c1": c1, "c2": c2} {
		if now := s.attached(name); now.mac != was.mac || now.addr != was.addr {
			t.Errorf("%s was %s with %s, is %s with %s after a crash", name, was.mac, was.addr, now.mac, now.addr)
		}
		s.renewed(was.addr, s.leased(was.addr, was.mac).Expires)
	}
	s.reconciles(0, nil)

	s.docker("stop", "-t", "0", "c2")
	s.gone(c2.addr)
	s.docker("restart", "-t", "0", "c1")
	again := s.attached("c1")
	if same := again.mac == c1.mac && again.addr == c1.addr; same != s.tellsNames() {
		t.Errorf("c1 was %s with %s, comes again as %s with %s", c1.mac, c1.addr, again.mac, again.addr)
	}
	s.only(neighbour.addr, again.addr)
	// Whoever comes by the name of a container that was renamed is a client of its
	// own: the engine tells of no rename.
	s.docker("rename", "c1", "renamed")
	s.run("c1", "flat")
	heir := s.made(container{addr: s.addr("c1", "eth0")})
	s.only(neighbour.addr, again.addr, heir.addr)
	s.docker("rm", "-f", "c1")
	s.gone(heir.addr)
	s.docker("rename", "renamed", "c1")

	if s.tellsNames() { // else nobody knows as whom the server has them
		s.loseDatabase()
		s.reconciles(2, []string{"adopted c1", "adopted neighbour"})
		if now := s.attached("c1"); now.mac != again.mac || now.addr != again.addr {
			t.Errorf("c1 was %s with %s, is adopted as %s with %s", again.mac, again.addr, now.mac, now.addr)
		}
		s.reconciles(0, nil)
	}
	s.undisturbed(neighbour)
	s.docker("rm", "-f", "c1", "c2", "neighbour")
	s.docker("network", "rm", "a", "flat")
	s.leftBehind()
}

// The container of a lost lease is found by its address and network, beside one
// of the same address on another LAN.
//
//	T1 = 3 s < the test < T2 = 60 s < lease = 120 s: a NAK ends it, not time
func TestIPvlanLeaseLost(t *testing.T) {
	t.Parallel()
	config := lab.DHCPConfig{
		Subnets:      []lab.Subnet{lab.NewSubnet("10.10.0.0/16", "10.10.8.0", "10.10.8.255", "10.10.0.1")},
		RenewSeconds: 3, RebindSeconds: 60, LeaseSeconds: 120,
	}
	s := newSite(t, lab.Dnsmasq, config)
	s.daemon.Flags = append(s.daemon.Flags, "--docker", "unix://"+s.engine.Socket())
	check(t, s.daemon.Restart())
	s.bridged("flat", "10.10.0.0/16", "--ipam-opt", "on_lease_lost=stop")
	s.run("lost", "flat")
	lost := s.attached("lost")
	other := must(s.lab.NewLAN("other"))(t)
	check(t, s.net.Host.AttachTo(other, "eth2"))
	s.docker("network", "create", "-d", "macvlan", "-o", "parent=eth2", "--subnet", "10.10.0.0/16", "elsewhere")
	s.run("innocent", "elsewhere", "--ip", lost.addr.String())

	check(t, s.dhcp.Kill())
	s.dhcp.Config.Subnets = []lab.Subnet{lab.SubnetA()}
	check(t, s.dhcp.Start())
	mentions(t, s.lostOnce(20*time.Second, lost.addr), "policy=stop", lost.mac, "the server refused its renewal")
	running := func(name string) string {
		t.Helper()
		return s.docker("inspect", "--format", "{{.State.Running}}", name)
	}
	eventually(t, 20*time.Second, func() error {
		if running("lost") != "false" {
			return fmt.Errorf("the container to be stopped runs: %s", s.said("container of the lost lease"))
		}
		return nil
	})
	if running("innocent") != "true" {
		t.Error("a container of the same address was stopped")
	}
	if l, err := s.find(lost.addr); err == nil {
		t.Errorf("the daemon still has %+v", l)
	}
}

// Both sockets come and go together.
func TestIPvlanSocket(t *testing.T) {
	t.Parallel()
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	check(t, s.daemon.Start())
	second := s.ipvlan().daemon.Socket
	for _, socket := range []string{s.daemon.Socket, second} {
		if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", socket, info, err)
		}
	}
	check(t, s.daemon.Kill()) // which leaves both
	check(t, s.daemon.Start())
	check(t, s.ipvlan().call(t.Context(), "GetCapabilities", struct{}{}, &struct{}{}))
	check(t, s.daemon.Stop())
	if _, err := os.Stat(second); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", second, err)
	}
}
