package dhcp

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/krolaw/dhcp4"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

var allParts = []lease.AgentPart{lease.AgentContainer, lease.AgentNetwork, lease.AgentHost}

func TestAgentParts(t *testing.T) {
	long := strings.Repeat("x", 64)
	for _, c := range []struct {
		name    string
		options lease.Options
		host    string
		who     party
		want    string
	}{
		{"nothing wanted", lease.Options{NetworkName: "n"}, "h", party{pool: away, name: "c"}, ""},
		{"all, in the order of their codes", lease.Options{Agent: allParts, NetworkName: "n"}, "h", party{pool: away, name: "c"}, "\x01\x01n\x02\x01h\x06\x01c"},
		{"the subnet stands for the name", lease.Options{Agent: allParts}, "h", party{pool: away, name: "c"}, "\x01\x0c10.20.0.0/24\x02\x01h\x06\x01c"},
		{"the network", lease.Options{Agent: allParts[1:2], NetworkName: "n"}, "h", party{pool: away, name: "c"}, "\x01\x01n"},
		{"the host", lease.Options{Agent: allParts[2:], NetworkName: "n"}, "h", party{pool: away, name: "c"}, "\x02\x01h"},
		{"the container", lease.Options{Agent: allParts[:1], NetworkName: "n"}, "h", party{pool: away, name: "c"}, "\x06\x01c"},
		{"no container", lease.Options{Agent: allParts, NetworkName: "n"}, "h", party{pool: away}, "\x01\x01n\x02\x01h"},
		{"no host name", lease.Options{Agent: allParts, NetworkName: "n"}, "", party{pool: away, name: "c"}, "\x01\x01n\x06\x01c"},
		{"neither network name nor subnet", lease.Options{Agent: allParts}, "h", party{name: "c"}, "\x02\x01h\x06\x01c"},
		{"nothing known", lease.Options{Agent: allParts}, "", party{}, ""},
		{"the longest", lease.Options{Agent: allParts, NetworkName: long}, long, party{pool: away, name: long}, "\x01\x40" + long + "\x02\x40" + long + "\x06\x40" + long},
		{
			"too long",
			lease.Options{Agent: allParts[2:]},
			long + "y",
			party{},
			"\x02\x40" + long[:47] + "#96a61e9b7c14acff",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := agentParts(c.options, c.host, c.who); string(got) != c.want {
				t.Errorf("% x, want % x", got, c.want)
			}
		})
	}
	// What begins alike stays different.
	if a, b := agentParts(lease.Options{Agent: allParts}, long+"a", party{}), agentParts(lease.Options{Agent: allParts}, long+"b", party{}); bytes.Equal(a, b) {
		t.Errorf("two hosts are the same: % x", a)
	}
}

// An option's value can't be longer than 255 bytes: the sub-options that are
// there at once never are, in no network.
func TestRelayOptionsAlwaysFit(t *testing.T) {
	text := func() string { return strings.Repeat("t", rand.IntN(300)) }
	for range 2000 {
		m := message{
			kind:  []dhcp4.MessageType{dhcp4.Discover, dhcp4.Request, dhcp4.Release, dhcp4.Decline}[rand.IntN(4)],
			party: party{pool: []lease.Pool{home, away, {}}[rand.IntN(3)], name: text()},
			options: lease.Options{
				Agent:         allParts[:rand.IntN(4)],
				NetworkName:   text(),
				LinkSelection: []lease.LinkSelection{"", lease.SelectAuto, lease.SelectOff, lease.Select118}[rand.IntN(4)],
			},
			place: []place{place1, {relay: netip.AddrPortFrom(relay1, 1067)}, {iface: "eth0"}}[rand.IntN(3)],
		}
		m.agent = slices.Grow(agentParts(m.options, text(), m.party), 20)
		p := mustRead(t, m.marshal())
		if behind := m.agent[len(m.agent):cap(m.agent)]; bytes.Trim(behind, "\x00") != nil {
			t.Fatalf("%+v: written behind what all messages share: % x", m, behind)
		}
		info := p.get(82)
		link := m.pool.ID == away.ID && m.options.LinkSelection != lease.SelectOff
		wanted := m.agent
		if link && m.options.LinkSelection != lease.Select118 {
			wanted = slices.Concat(wanted, []byte{5, 4, 10, 20, 0, 0})
		}
		if m.relay.Port() == 1067 {
			wanted = append(slices.Clone(wanted), 19, 0)
		}
		if m.broadcast() {
			wanted, link = nil, false
		}
		if !bytes.Equal(info, wanted) || len(info) > 255 {
			t.Fatalf("%+v: option 82 is %d bytes, % x, want % x", m, len(info), info, wanted)
		}
		if p.has(118) != (link && m.options.LinkSelection == lease.Select118) {
			t.Fatalf("%+v: option 118 present: %t", m, p.has(118))
		}
		if last := p.options[len(p.options)-1]; p.has(82) && last.code != 82 {
			t.Fatalf("%+v: option %d is the last", m, last.code)
		}
		subOptions(t, info)
	}
}

// The same bytes in all messages of a lease, whatever the network wants by then:
// servers key on them, and a dnsmasq ignores a RELEASE of another link (RFC 3046
// section 2.1).
func TestAgentThroughALease(t *testing.T) {
	const none = ""
	for _, c := range []struct {
		name          string
		began, became lease.Options
		want          string // option 82 of the lease, without link selection
	}{
		{"as wanted", told.Options, told.Options, string(toldParts)},
		{"no longer wanted", told.Options, lease.Options{}, string(toldParts)},
		{"named otherwise", told.Options, lease.Options{Agent: allParts, NetworkName: "other"}, string(toldParts)},
		{"wanted too late", lease.Options{}, told.Options, none},
		{"never wanted", lease.Options{}, lease.Options{}, none},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				l.attach(newDHCPD(server1))
				client := l.client(server1)
				req := want(withOptions("net", c.began), mac1)
				req.Name = "my_web.1"
				got, err := client.Acquire(within(t, usual), req)
				if err != nil {
					t.Fatal(err)
				}
				// Another daemon goes on, on a host that was renamed.
				client.host = "docker2"
				pool := withOptions("net", c.became)
				if got, err = client.Renew(within(t, usual), pool, got); err != nil {
					t.Fatal(err)
				}
				if got, err = client.Rebind(within(t, usual), pool, got); err != nil {
					t.Fatal(err)
				}
				if got, err = client.Confirm(within(t, usual), pool, got); err != nil {
					t.Fatal(err)
				}
				if err := client.Decline(within(t, usual), pool, got); err != nil {
					t.Fatal(err)
				}
				if err := client.Release(within(t, usual), pool, got); err != nil {
					t.Fatal(err)
				}
				checkKinds(t, l, discover, request, request, request, request, decline, release)
				for i, m := range l.log() {
					if want := c.want + string(selectsAway); string(m.get(82)) != want {
						t.Errorf("message %d: option 82 is % x, want % x", i, m.get(82), want)
					}
				}
				if string(got.Agent) != c.want {
					t.Errorf("the lease has % x", got.Agent)
				}
			})
		})
	}
}

// A lease that was adopted, of which no server has said anything yet, begins as
// its network wants it.
func TestAgentOfAnAdoptedLease(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1))
		adopted := held(server1)
		adopted.Name, adopted.Via, adopted.Server = "my_web.1", netip.AddrPort{}, netip.Addr{}
		got, err := l.client(server1).Rebind(within(t, usual), told, adopted)
		if err != nil {
			t.Fatal(err)
		}
		if info := l.log()[0].get(82); !bytes.Equal(info, toldInfo) || !bytes.Equal(got.Agent, toldParts) {
			t.Errorf("option 82 is % x, the lease has % x", info, got.Agent)
		}
	})
}

// What tells about the endpoint, in DISCOVER and REQUEST.
func TestDescribe(t *testing.T) {
	const name = "my_web.1"
	fqdn := "\x05\x00\x00\x08my-web-1\x07example\x03org\x00"
	for _, c := range []struct {
		name                                   string
		options                                lease.Options
		container                              string
		hostName, vendorClass, userClass, fqdn string
	}{
		{"by default", lease.Defaults(), name, "my-web-1", "oam-docker-ipam", "", ""},
		{"no name", lease.Defaults(), "", "", "oam-docker-ipam", "", ""},
		{"no usable name", lease.Options{FQDN: "example.org", HostName: lease.On}, "___", "", "", "", ""},
		{"no name for DNS", lease.Options{FQDN: "example.org"}, "", "", "", "", ""},
		{"classes", lease.Options{VendorClass: "box", UserClass: "gold"}, "", "", "box", "\x04gold", ""},
		{"vendor class off", lease.Options{VendorClass: "off"}, "", "", "", "", ""},
		{"host name off", lease.Options{HostName: lease.Off}, name, "", "", "", ""},
		{"DNS instead of host name", lease.Options{FQDN: "example.org"}, name, "", "", "", fqdn},
		{"DNS with a dot", lease.Options{FQDN: "example.org."}, name, "", "", "", fqdn},
		{"both", lease.Options{FQDN: "example.org", HostName: lease.On}, name, "my-web-1", "", "", fqdn},
		{"DNS, host name off", lease.Options{FQDN: "example.org", HostName: lease.Off}, name, "", "", "", fqdn},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, kind := range []dhcp4.MessageType{dhcp4.Discover, dhcp4.Request, dhcp4.Release, dhcp4.Decline} {
				m := message{kind: kind, options: c.options, party: party{name: c.container}, place: place1}
				p := mustRead(t, m.marshal())
				for code, want := range map[byte]string{12: c.hostName, 60: c.vendorClass, 77: c.userClass, 81: c.fqdn} {
					if !m.wants() {
						want = ""
					}
					if string(p.get(code)) != want || p.has(code) != (want != "") {
						t.Errorf("message type %d: option %d is %q, want %q", kind, code, p.get(code), want)
					}
				}
			}
		})
	}
}

// largest is a message with everything in it at its longest.
func largest(t *testing.T, clientID int) message {
	t.Helper()
	label := strings.Repeat("d", 61)
	domain := "d" + label + "." + label + "." + label // 186 characters
	texts := map[string]string{
		"option82": "host,network,container", "network_name": strings.Repeat("n", 64), "vendor_class": strings.Repeat("v", 64),
		"user_class": strings.Repeat("u", 64), "host_name": "on", "fqdn": domain, "listen_port": "1067",
	}
	options, err := lease.ParseOptions(texts)
	if err != nil {
		t.Fatal(err)
	}
	texts["fqdn"] = "d" + domain
	if _, err := lease.ParseOptions(texts); err == nil {
		t.Error("a longer domain is taken")
	}
	who := party{pool: away, mac: mac1, clientID: bytes.Repeat([]byte{'x'}, clientID), name: strings.Repeat("c", 100)}
	who.agent = agentParts(options, strings.Repeat("h", 64), who)
	return message{
		kind: dhcp4.Request, requested: ip("10.20.0.100"), server: server1.Addr(), party: who, options: options,
		place: place{relay: netip.AddrPortFrom(relay1, 1067)},
	}
}

// The longest message fits into an Ethernet frame, and each of its options into
// 255 bytes.
func TestLargestMessage(t *testing.T) {
	for _, size := range []int{2, 128, 254, 255} {
		m := largest(t, size)
		b := m.marshal()
		p := mustRead(t, b)
		for code, length := range map[byte]int{12: 63, 60: 64, 77: 65, 81: 255, 61: size, 82: 3*66 + 6 + 2} {
			if got := len(p.get(code)); got != length {
				t.Errorf("option %d has %d bytes, want %d", code, got, length)
			}
		}
		if !bytes.Equal(p.get(61), m.clientID) || !p.has(55) || p.addr(50) != m.requested {
			t.Errorf("client identifier of %d bytes: options %v", size, p.options)
		}
		if len(b) > maxMessage-28 {
			t.Errorf("client identifier of %d bytes: a message of %d", size, len(b))
		}
		t.Logf("client identifier of %d bytes: a message of %d", size, len(b))
	}
}
