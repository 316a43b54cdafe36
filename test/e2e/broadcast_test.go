package e2e

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// newBroadcaster is newHost whose daemon knows no server: it asks by broadcast,
// on the interface that its flags or a network name.
func newBroadcaster(t *testing.T, kind lab.DHCPKind, config lab.DHCPConfig, flags ...string) *site {
	t.Helper()
	s := newHost(t, kind, config)
	s.daemon.Flags = append([]string{"--debug"}, flags...)
	return s
}

// onInterface are the options of a network in broadcast mode.
func onInterface(name string) map[string]string { return map[string]string{"dhcp_interface": name} }

// moveIn puts a container's stand-in on an interface of the host. Servers that
// renew answer to the container's address, for which they ask by ARP first.
func (s *site) moveIn(name, parent, mac string, addr netip.Addr) *lab.Node {
	s.Helper()
	return must(s.net.Host.Macvlan(name, parent, mac, addr.String()+"/24"))(s.T)
}

// hardware is the MAC of a node's interface.
func (s *site) hardware(node *lab.Node, ifname string) (mac string) {
	s.Helper()
	check(s.T, node.Do(func() error {
		i, err := net.InterfaceByName(ifname)
		if err == nil {
			mac = i.HardwareAddr.String()
		}
		return err
	}))
	return mac
}

// message is a DHCP message on the wire.
type message struct {
	ethernet *layers.Ethernet
	ip       *layers.IPv4
	udp      *layers.UDP
	*layers.DHCPv4
}

// String is for those that shouldn't be there.
func (m message) String() string {
	return fmt.Sprintf("%s of %s with ciaddr %s, giaddr %s, flags %#x from %s %s:%d to %s %s:%d", m.kind(), m.ClientHWAddr, m.ClientIP,
		m.RelayAgentIP, m.Flags, m.ethernet.SrcMAC, m.ip.SrcIP, m.udp.SrcPort, m.ethernet.DstMAC, m.ip.DstIP, m.udp.DstPort)
}

func (m message) has(kind layers.DHCPOpt) bool {
	return slices.ContainsFunc(m.Options, func(o layers.DHCPOption) bool { return o.Type == kind })
}

func (m message) kind() layers.DHCPMsgType {
	for _, option := range m.Options {
		if option.Type == layers.DHCPOptMessageType && option.Length == 1 {
			return layers.DHCPMsgType(option.Data[0])
		}
	}
	return layers.DHCPMsgTypeUnspecified
}

// wire records what leaves the host by an interface, to the end of the test.
func (s *site) wire(ifname string) *lab.Wire {
	s.Helper()
	w := must(s.net.Host.Wire(s.lab.LAN, ifname))(s.T)
	s.Cleanup(func() { w.Close() })
	return w
}

// sort tells the DHCP messages among frames from the others.
func sort(frames []gopacket.Packet) (messages []message, others []gopacket.Packet) {
	for _, frame := range frames {
		m := message{}
		m.ethernet, _ = frame.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
		m.ip, _ = frame.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
		m.udp, _ = frame.Layer(layers.LayerTypeUDP).(*layers.UDP)
		m.DHCPv4, _ = frame.Layer(layers.LayerTypeDHCPv4).(*layers.DHCPv4)
		if m.DHCPv4 == nil {
			others = append(others, frame)
		} else {
			messages = append(messages, m)
		}
	}
	return messages, others
}

// wired waits until a wire has seen a message of a kind about a MAC, and
// returns all about it.
func (s *site) wired(w *lab.Wire, kind layers.DHCPMsgType, mac string) (about []message) {
	s.Helper()
	eventually(s.T, 5*time.Second, func() error {
		messages, _ := sort(w.Frames())
		about = slices.DeleteFunc(messages, func(m message) bool { return m.ClientHWAddr.String() != mac })
		if !slices.ContainsFunc(about, func(m message) bool { return m.kind() == kind }) {
			return fmt.Errorf("no %s of %s among %v", kind, mac, about)
		}
		return nil
	})
	return about
}

// portsFree fails if anybody on the host holds one of DHCP's ports.
func (s *site) portsFree(when string) {
	s.Helper()
	for _, port := range []int{67, 68} {
		if must(s.net.Host.UDPOpen(port))(s.T) {
			s.Errorf("UDP port %d of the host is held by processes %v %s", port, s.portHolders(port), when)
		}
	}
}

// A host that knows no server's address: the containers' leases are taken,
// renewed and given back by broadcast, with the interface of the global
// settings or a network's own.
func TestBroadcast(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		s := newBroadcaster(t, kind, soonRenewed(kind), append(byMAC, "--dhcp-interface", "eth0")...)
		s.startEngine("talkingdata")
		wires := map[string]*lab.Wire{"c1": s.wire("eth0"), "c2": s.wire("eth1")}
		s.network("global", "eth0", "10.10.0.0/24")
		s.network("own", "eth1", "10.10.0.0/24", "--ipam-opt", "dhcp_interface=eth1", "--ipam-opt", "ether_source=container", "--ipam-opt", "probe=off")
		addrs := map[string]netip.Addr{"c1": s.run("c1", "global"), "c2": s.run("c2", "own")}
		macs, sources := map[string]string{}, map[string]string{}
		for name, addr := range addrs {
			_, macs[name] = s.holds(name, "eth0")
			if known := s.known(addr); known.MAC != macs[name] || known.Server.String() != firstServer {
				t.Errorf("the daemon has %+v for %s", known, name)
			}
			s.pings(s.net.Client, addr)
		}
		if router := s.router("c1"); router != firstServer {
			t.Errorf("default route by %s", router)
		}
		s.portsFree("with two leases")
		discovers := s.count(s.net.Server, discover)
		for range 3 {
			ends := map[string]time.Time{}
			for name, addr := range addrs {
				ends[name] = s.leased(addr, macs[name]).Expires
			}
			for name, addr := range addrs {
				s.renewed(addr, ends[name])
			}
		}
		if n := discovers(); n > 0 {
			t.Errorf("%d DISCOVERs in place of renewals", n)
		}
		s.only(slices.Collect(maps.Values(addrs))...)
		for name, addr := range addrs {
			if now := s.addr(name, "eth0"); now != addr {
				t.Errorf("%s had %s and has %s", name, addr, now)
			}
		}
		s.docker("stop", "c1", "c2")
		s.notLeased()
		s.portsFree("after two releases")

		sources["c1"], sources["c2"] = s.hardware(s.net.Host, "eth0"), macs["c2"]
		for name, wire := range wires {
			renewals, reboots := 0, 0
			for _, m := range s.wired(wire, layers.DHCPMsgTypeRelease, macs[name]) {
				if m.ethernet.SrcMAC.String() != sources[name] || !m.RelayAgentIP.IsUnspecified() {
					t.Errorf("%s: its Ethernet source should be %s", m, sources[name])
				}
				switch {
				case m.kind() != layers.DHCPMsgTypeRequest || m.has(layers.DHCPOptServerID):
				case m.ClientIP.IsUnspecified():
					reboots++
				default:
					renewals++
				}
			}
			// What a server answers to the container is seen on its way there,
			// unless the server is slow.
			if reboots >= renewals {
				t.Errorf("%d renewals of %s, of which %d were asked for again in a form whose answer is broadcast", renewals, name, reboots)
			}
		}
		s.docker("start", "c1", "c2")
		for name := range addrs {
			s.holds(name, "eth0")
		}
		s.docker("rm", "-f", "c1", "c2")
		s.notLeased()
		s.docker("network", "rm", "global", "own")
	})
}

// A server beyond a router, behind ISC's relay agent: it answers to a relay
// that isn't us, with its own address in its own subnet.
func TestBroadcastBehindRelay(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		l := lab.ForTest(t, lab.DHCPServers, lab.Relays)
		far := must(l.NewLAN("far"))(t)
		server := must(l.NodeOn(far, "server", "10.40.0.1/24"))(t)
		relay := must(l.Node("relay", "10.10.0.1/24"))(t)
		host := must(l.Node("host"))(t)
		check(t, relay.AttachTo(far, "eth1", "10.40.0.2/24"))
		check(t, relay.Sysctl("net/ipv4/ip_forward", "1"))
		check(t, server.Route("default via 10.40.0.2"))
		config := soonRenewed(kind)
		config.Subnets = []lab.Subnet{{Prefix: netip.MustParsePrefix("10.40.0.0/24")}, lab.SubnetA()}
		s := &site{T: t, lab: l, net: &lab.Topology{Server: server, Host: host, Client: relay}}
		s.dhcp = must(server.StartDHCP(kind, config))(t)
		must(relay.StartRelay("eth0", "eth1", "10.40.0.1"))(t)
		s.daemon = must(host.StartDaemon(l.Scratch+"/talkingdata.sock", "--debug", "--dhcp-interface", "eth0"))(t)
		wire := s.wire("eth0")
		pool, mac := s.pool(), lab.ScatteredMAC(1)
		addr := s.acquire(pool, mac)
		if known := s.known(addr); known.Server.String() != "10.40.0.1" {
			t.Errorf("the daemon has %s from %s", addr, known.Server)
		}
		s.moveIn("c1", "eth0", mac, addr)
		s.pings(relay, addr)
		discovers := s.count(server, discover)
		for range 3 {
			s.renewed(addr, s.leased(addr, mac).Expires)
		}
		if n := discovers(); n > 0 {
			t.Errorf("%d DISCOVERs in place of renewals", n)
		}
		check(t, s.releaseAddress(pool, addr))
		s.notLeased()
		for _, m := range s.wired(wire, layers.DHCPMsgTypeRelease, mac) {
			if !m.RelayAgentIP.IsUnspecified() {
				t.Errorf("%s: the relay agent is another", m)
			}
		}
	})
}

// The host's interfaces go and come back under the leases of their networks.
// Whatever happened, what was due meanwhile is renewed soon afterwards, and
// new containers get addresses. An interface that gets another name is the
// same to those that are there.
//
//	T1 = 1 s (dnsmasq: 3 s)  <  an interface is away  <  T2 = 10 s
func TestBroadcastInterfacesChange(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		if kind.Name != lab.ISC.Name && !soak {
			t.Skip("which server it is makes no difference to the daemon: OAM_SOAK=1 has the time for all")
		}
		config := soonRenewed(kind)
		config.RebindSeconds = 10
		s := newBroadcaster(t, kind, config, "--dhcp-timeout", "1s")
		check(t, s.daemon.Start())
		host, bridge := s.net.Host, s.lab.LAN
		ip := func(node *lab.Node, args ...string) {
			t.Helper()
			must(node.Run(append([]string{"ip", "link"}, args...)...))(t)
		}
		for n, change := range []struct {
			name, ifname string
			away, back   func()
			says         []string // to containers that start while it is away
		}{
			{
				"down", "eth0",
				func() { ip(host, "set", "eth0", "down") },
				func() { ip(host, "set", "eth0", "up") },
				[]string{"interface eth0", "is down"},
			},
			{
				"without a link", "eth0",
				func() { ip(bridge, "set", host.Port("eth0"), "down") },
				func() { ip(bridge, "set", host.Port("eth0"), "up") },
				[]string{"interface eth0", "has no link"},
			},
			{
				"renamed", "eth0",
				func() { ip(host, "set", "eth0", "name", "lan0") },
				func() { ip(host, "set", "lan0", "name", "eth0") },
				nil,
			},
			{
				"deleted", "eth1",
				func() { ip(host, "delete", "eth1") },
				func() { check(t, host.Attach("eth1")) },
				[]string{"interface eth1: no such network interface"},
			},
			{
				"deleted while the daemon restarts", "eth1",
				func() { ip(host, "delete", "eth1"); check(t, s.daemon.Restart()) },
				func() { check(t, host.Attach("eth1")) },
				[]string{"interface eth1: no such network interface"},
			},
		} {
			t.Run(change.name, func(t *testing.T) {
				s := s.on(s.dhcp)
				s.T = t
				pool := must(s.requestPool("10.10.0.0/24", map[string]string{"dhcp_interface": change.ifname, "probe": "off"}))(t)
				mac := lab.ScatteredMAC(3 * n)
				addr := s.acquire(pool, mac)
				s.moveIn(fmt.Sprintf("c%d", n), change.ifname, mac, addr)
				s.renewed(addr, s.leased(addr, mac).Expires)
				change.away()
				addrs := []netip.Addr{addr}
				if change.says == nil {
					s.renewed(addr, s.leased(addr, mac).Expires)
					addrs = append(addrs, s.acquire(pool, lab.ScatteredMAC(3*n+1)))
				} else {
					s.becomes(addr.String(), "renewing")
					_, err := s.requestAddress(pool, lab.ScatteredMAC(3*n+1))
					if !errors.Is(err, lab.ErrRefused) {
						t.Errorf("a container on an interface that is %s: %v", change.name, err)
					} else {
						mentions(t, err.Error(), change.says...)
					}
				}
				until := s.leased(addr, mac).Expires
				change.back()
				s.renewed(addr, until)
				addrs = append(addrs, s.acquire(pool, lab.ScatteredMAC(3*n+2)))
				s.only(addrs...)
				s.releasePool(pool)
				s.notLeased()
			})
		}
	})
}

// Many containers at once are served side by side, each with an address of its
// own.
func TestBroadcastAtOnce(t *testing.T) {
	t.Parallel()
	const many = 64
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		s := newBroadcaster(t, kind, lab.DHCPConfig{}, "--dhcp-interface", "eth0")
		check(t, s.daemon.Start())
		pool := s.pool()
		var addrs [many]netip.Addr
		began := time.Now()
		inParallel(t, many, many, func(n int) (err error) {
			addrs[n], err = s.requestAddress(pool, lab.ScatteredMAC(n))
			return err
		})
		t.Logf("%d leases from %s took %v", many, kind.Name, time.Since(began))
		s.only(slices.Clone(addrs[:])...)
		for n, addr := range addrs {
			s.leased(addr, lab.ScatteredMAC(n))
		}
		inParallel(t, many, many, func(n int) error { return s.releaseAddress(pool, addrs[n]) })
		s.notLeased()
	})
}

// A container that its name identifies has its address again, whether it was
// given back meanwhile or not, and by another run of the daemon.
func TestBroadcastNameKeepsAddress(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		s := newBroadcaster(t, kind, lab.DHCPConfig{}, "--dhcp-interface", "eth0", "--release-delay", "30s")
		check(t, s.daemon.Start())
		pool := must(s.requestPool("10.10.0.0/24", map[string]string{"probe": "off"}))(t)
		web, job := s.begin(pool, "web"), s.begin(pool, "job")
		since := s.watch()
		s.end(pool, web)
		check(t, s.daemon.Restart())
		again := s.begin(pool, "web")
		s.sameAs("after a restart of the daemon", again, web, since(), oneRoundTrip)
		s.only(web.addr, job.addr)

		s.end(pool, again)
		must(s.daemon.Run("release", web.addr.String()))(t)
		s.notLeased(web.addr)
		if third := s.begin(pool, "web"); third.addr != web.addr {
			t.Errorf("web had %s and has %s after its release", web.addr, third.addr)
		}
	})
}

// What the daemon says on the wire, in either mode, from a network's creation
// to its removal. The host's kernel resolves the server's address for a relay
// agent.
func TestOnlyDHCPOnTheWire(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		s := newHost(t, kind, soonRenewed(kind))
		check(t, s.net.Host.Sysctl("net/ipv6/conf/all/disable_ipv6", "1"))
		check(t, s.daemon.Start())
		containers := map[string]bool{} // by MAC
		for n, mode := range []struct {
			name    string
			options map[string]string
			dhcp    func(m message) error
			arp     func(asks *layers.ARP) error
		}{
			{"broadcast", onInterface("eth0"), s.isClients, noARP},
			{"broadcast, conflict check", map[string]string{
				"dhcp_interface": "eth0", "conflict_check": "on", "conflict_interface": "eth0",
			}, s.isClients, isProbe},
			{"relay", nil, s.isRelays, func(*layers.ARP) error { return nil }},
		} {
			wire := s.wire("eth0")
			pool := must(s.requestPool("10.10.0.0/24", mode.options))(t)
			mac := lab.ScatteredMAC(n)
			containers[mac] = true
			addr := s.acquire(pool, mac)
			s.moveIn(fmt.Sprintf("c%d", n), "eth0", mac, addr)
			s.renewed(addr, s.leased(addr, mac).Expires)
			check(t, s.releaseAddress(pool, addr))
			s.notLeased()
			s.releasePool(pool)
			s.wired(wire, layers.DHCPMsgTypeRelease, mac)
			check(t, wire.Close())

			messages, others := sort(wire.Frames())
			seen := map[layers.DHCPMsgType]bool{}
			for _, m := range messages {
				seen[m.kind()] = true
				if err := mode.dhcp(m); err != nil {
					t.Errorf("%s: %v: %s", mode.name, err, m)
				}
			}
			if !seen[layers.DHCPMsgTypeDiscover] || !seen[layers.DHCPMsgTypeRequest] {
				t.Errorf("%s: the wire saw only %v", mode.name, seen)
			}
			probes := 0
			for _, frame := range others {
				arp, _ := frame.Layer(layers.LayerTypeARP).(*layers.ARP)
				switch {
				case containers[frame.LinkLayer().(*layers.Ethernet).SrcMAC.String()]:
					// Their own: to the server's answer by ARP and ICMP, and IPv6.
				case arp == nil:
					t.Errorf("%s: neither DHCP nor ARP: %v", mode.name, frame)
				default:
					probes++
					if err := mode.arp(arp); err != nil {
						t.Errorf("%s: %v: %v", mode.name, err, frame)
					}
				}
			}
			if probes == 0 && mode.options["conflict_check"] == "on" {
				t.Errorf("%s: no ARP probe", mode.name)
			}
		}
	})
}

func noARP(*layers.ARP) error { return errors.New("an ARP packet of the host's own") }

// isProbe refuses what is no ARP Probe (RFC 5227 section 2.1.1).
func isProbe(arp *layers.ARP) error {
	if arp.Operation != layers.ARPRequest || netip.AddrFrom4([4]byte(arp.SourceProtAddress)) != netip.IPv4Unspecified() {
		return errors.New("no ARP Probe")
	}
	return nil
}

// isClients refuses what isn't a client's: to IP it is broadcast, on Ethernet
// it may be for the one server that it is about.
func (s *site) isClients(m message) error {
	toAll := m.ethernet.DstMAC.String() == layers.EthernetBroadcast.String()
	switch {
	case m.ethernet.SrcMAC.String() != s.hardware(s.net.Host, "eth0"):
		return errors.New("not from the interface")
	case !m.ip.SrcIP.Equal(m.ClientIP) || m.udp.SrcPort != 68 || !m.ip.DstIP.Equal(net.IPv4bcast) || m.udp.DstPort != 67:
		return errors.New("not a client's broadcast")
	case !m.RelayAgentIP.Equal(net.IPv4zero) || m.Flags != 0x8000:
		return errors.New("asks for its answer at a relay agent, or by unicast")
	case !toAll && (m.kind() == layers.DHCPMsgTypeDiscover || m.ethernet.DstMAC.String() != s.hardware(s.net.Server, "eth0")):
		return errors.New("not to all servers, nor to the one")
	}
	return nil
}

// isRelays refuses what isn't unicast from the relay address to the server.
func (s *site) isRelays(m message) error {
	switch {
	case m.ethernet.DstMAC.String() != s.hardware(s.net.Server, "eth0") || m.ip.DstIP.String() != firstServer || m.udp.DstPort != 67:
		return errors.New("not to the server")
	case m.ip.SrcIP.String() != "10.10.0.2" || m.udp.SrcPort != 67 || m.RelayAgentIP.String() != "10.10.0.2":
		return errors.New("not from the relay address")
	}
	return nil
}

// One daemon, each network its own way: what a network says beats the global
// settings, whichever of the two ways these are.
func TestBothModes(t *testing.T) {
	t.Parallel()
	s := newBroadcaster(t, lab.Kea, lab.DHCPConfig{})
	wire := s.wire("eth0")
	for n, global := range []struct {
		flags   []string
		network map[string]string
		relays  [2]string // giaddr of a network that says nothing, and of that one
	}{
		{[]string{"--dhcp-server", firstServer}, onInterface("eth0"), [2]string{"10.10.0.2", "0.0.0.0"}},
		{[]string{"--dhcp-interface", "eth0"}, map[string]string{"dhcp_server": firstServer}, [2]string{"0.0.0.0", "10.10.0.2"}},
	} {
		s.daemon.Flags = append([]string{"--debug"}, global.flags...)
		check(t, s.daemon.Restart())
		for i, options := range []map[string]string{{}, global.network} {
			options["probe"] = "off"
			pool := must(s.requestPool("10.10.0.0/24", options))(t)
			mac := lab.ScatteredMAC(2*n + i)
			addr := s.acquire(pool, mac)
			check(t, s.releaseAddress(pool, addr))
			s.notLeased()
			for _, m := range s.wired(wire, layers.DHCPMsgTypeRelease, mac) {
				if m.RelayAgentIP.String() != global.relays[i] {
					t.Errorf("%v beside %v: %s, want giaddr %s", options, global.flags, m, global.relays[i])
				}
			}
		}
	}
	check(t, s.daemon.Stop())
	for _, both := range []struct{ flags, env []string }{
		{[]string{"--dhcp-server", firstServer, "--dhcp-interface", "eth0"}, nil},
		{nil, []string{"DHCP_SERVER=" + firstServer, "DHCP_INTERFACE=eth0"}},
	} {
		s.daemon.Flags, s.daemon.Env = both.flags, both.env
		mentions(t, doesNotStart(t, s.daemon), "DHCP_SERVER="+firstServer, "DHCP_INTERFACE=eth0", "exclude each other")
	}
}
