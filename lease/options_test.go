package lease

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestServerText(t *testing.T) {
	long := strings.Repeat("a", 63)
	good := map[string]Server{
		"192.0.2.1":               {"192.0.2.1", 67},
		"192.0.2.1:67":            {"192.0.2.1", 67},
		"192.0.2.1:1067":          {"192.0.2.1", 1067},
		"192.0.2.1:65535":         {"192.0.2.1", 65535},
		"dhcp":                    {"dhcp", 67},
		"dhcp.example.:6767":      {"dhcp.example.", 6767},
		"my_dhcp-1.example":       {"my_dhcp-1.example", 67},
		"10.0.0.example":          {"10.0.0.example", 67},
		"3com":                    {"3com", 67},
		long + "." + long + ".de": {long + "." + long + ".de", 67},
	}
	for text, want := range good {
		var got Server
		if err := got.UnmarshalText([]byte(text)); err != nil || got != want {
			t.Errorf("%q: got %+v, %v, want %+v", text, got, err, want)
			continue
		}
		if back, _ := got.MarshalText(); string(back) != strings.TrimSuffix(text, ":67") {
			t.Errorf("%q: written as %q", text, back)
		}
	}
	bad := []string{
		"", ":67", "192.0.2.1:", "192.0.2.1:0", "192.0.2.1:65536", "192.0.2.1:-1", "192.0.2.1:+67", "192.0.2.1:dhcp", "192.0.2.1:67:67",
		"10.0.0.300", "10.0.0", "1234", "10.0.0.1.", "0.0.0.0", "255.255.255.255", "224.0.0.1", "240.0.0.1", "::1", "[::1]:67", "fe80::1%eth0", "::ffff:192.0.2.1",
		"a..b", ".a", ".", "a b", "a/b", "a!b", "a\x00b", "dhcp,dhcp2", "münchen", "\u212a", long + "a", strings.Repeat(long+".", 4) + "de",
	}
	for _, text := range bad {
		var got Server
		if err := got.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q: got %+v, want an error", text, got)
		} else if !strings.Contains(err.Error(), fmt.Sprintf("%q", text)) {
			t.Errorf("%q isn't named by: %v", text, err)
		}
	}
}

func TestParseOptionsRefusals(t *testing.T) {
	long := strings.Repeat("a", 63)
	cases := []struct {
		texts map[string]string
		want  []string // parts of the message
	}{
		{map[string]string{"dhcp_sever": "192.0.2.1"}, []string{`unknown option "dhcp_sever"`, "known are", "dhcp_server", "listen_addr"}},
		{map[string]string{"DHCP_SERVER": "192.0.2.1"}, []string{`"DHCP_SERVER"`}},
		{map[string]string{"": "x"}, []string{`unknown option ""`}},
		{map[string]string{"unknown": ""}, []string{`"unknown"`}},
		{map[string]string{"dhcp_server": "192.0.2.1,"}, []string{"dhcp_server", `"192.0.2.1,"`}},
		{map[string]string{"dhcp_server": ","}, []string{"dhcp_server"}},
		{map[string]string{"dhcp_server": "192.0.2.1 192.0.2.2"}, []string{"dhcp_server"}},
		{map[string]string{"dhcp_server": "192.0.2.1,10.0.0.300"}, []string{"dhcp_server", "10.0.0.300"}},
		{map[string]string{"listen_addr": "::"}, []string{"listen_addr", `"::"`, "IPv4"}},
		{map[string]string{"listen_addr": "fe80::1"}, []string{"listen_addr", "IPv4"}},
		{map[string]string{"listen_addr": "::ffff:192.0.2.1"}, []string{"listen_addr", "IPv4"}},
		{map[string]string{"listen_addr": "192.0.2.1:67"}, []string{"listen_addr"}},
		{map[string]string{"listen_addr": "eth0"}, []string{"listen_addr", `"eth0"`}},
		{map[string]string{"listen_addr": "224.0.0.1"}, []string{"listen_addr"}},
		{map[string]string{"listen_addr": "255.255.255.255"}, []string{"listen_addr"}},
		{map[string]string{"listen_addr": " "}, []string{"listen_addr"}},
		{map[string]string{"listen_addr": "x", "dhcp_server": "192.0.2.1"}, []string{"listen_addr"}},
		{map[string]string{"client_id": "Name"}, []string{"client_id", `"Name"`, "auto, mac, name"}},
		{map[string]string{"client_id": " mac"}, []string{"client_id", `" mac"`}},
		{map[string]string{"client_id": "01:02:03"}, []string{"client_id", "auto, mac, name"}},
		{map[string]string{"on_lease_lost": "kill"}, []string{"on_lease_lost", `"kill"`, "keep, stop, restart"}},
		{map[string]string{"on_lease_lost": "Stop"}, []string{"on_lease_lost", "keep, stop, restart"}},
		{map[string]string{"release_delay": "30"}, []string{"release_delay", `"30"`, "0s", "24h0m0s", "30s"}},
		{map[string]string{"release_delay": "-1ns"}, []string{"release_delay", "0s"}},
		{map[string]string{"release_delay": "24h0m0.000000001s"}, []string{"release_delay", "24h0m0s"}},
		{map[string]string{"release_delay": "a day"}, []string{"release_delay", `"a day"`}},
		{map[string]string{"release_delay": "9999999h"}, []string{"release_delay"}},
		{map[string]string{"conflict_check": "yes"}, []string{"conflict_check", `"yes"`, "off, on, rfc", "10s"}},
		{map[string]string{"conflict_check": "0s"}, []string{"conflict_check", `"0s"`}},
		{map[string]string{"conflict_check": "-1s"}, []string{"conflict_check"}},
		{map[string]string{"conflict_check": "10.000000001s"}, []string{"conflict_check", "10s"}},
		{map[string]string{"conflict_check": "5"}, []string{"conflict_check", `"5"`}},
		{map[string]string{"conflict_check": "ON"}, []string{"conflict_check"}},
		{map[string]string{"conflict_interface": "sixteen-letters-"}, []string{"conflict_interface", `"sixteen-letters-"`, "network interface", "eth0"}},
		{map[string]string{"conflict_interface": "."}, []string{"conflict_interface"}},
		{map[string]string{"conflict_interface": ".."}, []string{"conflict_interface"}},
		{map[string]string{"conflict_interface": "../eth0"}, []string{"conflict_interface"}},
		{map[string]string{"conflict_interface": "eth0:1"}, []string{"conflict_interface"}},
		{map[string]string{"conflict_interface": "eth 0"}, []string{"conflict_interface"}},
		{map[string]string{"conflict_interface": "eth0\n"}, []string{"conflict_interface"}},
		{map[string]string{"dhcp_interface": "eth0/1"}, []string{"dhcp_interface", `"eth0/1"`, "network interface"}},
		{map[string]string{"dhcp_interface": "eth0", "dhcp_server": "192.0.2.1,192.0.2.2"}, []string{"dhcp_server=192.0.2.1,192.0.2.2", "dhcp_interface=eth0", "exclude each other"}},
		{map[string]string{"ether_source": "host"}, []string{"ether_source", `"host"`, "interface, container"}},
		{map[string]string{"listen_port": "0"}, []string{"listen_port", `"0"`, "1 to 65535"}},
		{map[string]string{"listen_port": "65536"}, []string{"listen_port"}},
		{map[string]string{"listen_port": "dhcp"}, []string{"listen_port"}},
		{map[string]string{"probe": "no"}, []string{"probe", `"no"`, "on, off"}},
		{map[string]string{"link_selection": "82"}, []string{"link_selection", `"82"`, "auto, off, 118"}},
		{map[string]string{"option82": "host,server"}, []string{"option82", `"host,server"`, "host, network and container"}},
		{map[string]string{"option82": "host,"}, []string{"option82"}},
		{map[string]string{"network_name": "l\nn"}, []string{"network_name", "64", "printable"}},
		{map[string]string{"vendor_class": "münchen"}, []string{"vendor_class", "ASCII"}},
		{map[string]string{"user_class": long + "ab"}, []string{"user_class", "64"}},
		{map[string]string{"host_name": "web"}, []string{"host_name", `"web"`, "on, off"}},
		{map[string]string{"fqdn": "example..org"}, []string{"fqdn", `"example..org"`, "example.org"}},
	}
	for _, c := range cases {
		o, err := ParseOptions(c.texts)
		if err == nil || !reflect.DeepEqual(o, Options{}) {
			t.Errorf("%q: got %+v, %v, want only an error", c.texts, o, err)
			continue
		}
		for _, part := range c.want {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%q: no %q in: %v", c.texts, part, err)
			}
		}
	}
}

func TestParseOptions(t *testing.T) {
	a, b := Server{"192.0.2.1", 67}, Server{"dhcp.example", 6767}
	cases := []struct {
		texts map[string]string
		want  Options
	}{
		{nil, Options{}},
		{map[string]string{"dhcp_server": "", "listen_addr": ""}, Options{}},
		{map[string]string{"dhcp_server": "192.0.2.1"}, Options{Servers: []Server{a}}},
		{map[string]string{"dhcp_server": " 192.0.2.1 , dhcp.example:6767"}, Options{Servers: []Server{a, b}}},
		{map[string]string{"listen_addr": "0.0.0.0"}, Options{Relay: netip.IPv4Unspecified()}},
		{map[string]string{"listen_addr": "198.51.100.1"}, Options{Relay: netip.MustParseAddr("198.51.100.1")}},
		{map[string]string{"client_id": "auto"}, Options{ClientID: ClientIDAuto}},
		{map[string]string{"client_id": "mac"}, Options{ClientID: ClientIDMAC}},
		{map[string]string{"client_id": "name"}, Options{ClientID: ClientIDName}},
		{map[string]string{"client_id": "", "release_delay": "", "on_lease_lost": "", "conflict_check": "", "conflict_interface": ""}, Options{}},
		{map[string]string{"on_lease_lost": "keep"}, Options{OnLost: KeepLost}},
		{map[string]string{"on_lease_lost": "stop"}, Options{OnLost: StopLost}},
		{map[string]string{"on_lease_lost": "restart"}, Options{OnLost: RestartLost}},
		{map[string]string{"release_delay": "0"}, Options{ReleaseDelay: new(time.Duration(0))}},
		{map[string]string{"release_delay": "0s"}, Options{ReleaseDelay: new(time.Duration(0))}},
		{map[string]string{"release_delay": "1m30s"}, Options{ReleaseDelay: new(90 * time.Second)}},
		{map[string]string{"release_delay": "24h"}, Options{ReleaseDelay: new(24 * time.Hour)}},
		{map[string]string{"conflict_check": "off"}, Options{Conflict: ConflictOff}},
		{map[string]string{"conflict_check": "on"}, Options{Conflict: ConflictOn}},
		{map[string]string{"conflict_check": "rfc"}, Options{Conflict: ConflictRFC}},
		{map[string]string{"conflict_check": "1.5s"}, Options{Conflict: "1.5s"}},
		{map[string]string{"conflict_check": "10s"}, Options{Conflict: "10s"}},
		{map[string]string{"conflict_interface": "fifteen-letters"}, Options{ConflictInterface: "fifteen-letters"}},
		{map[string]string{"conflict_interface": "eth0.100@x"}, Options{ConflictInterface: "eth0.100@x"}},
		{map[string]string{"dhcp_interface": "eth0.100"}, Options{Interface: "eth0.100"}},
		{map[string]string{"dhcp_interface": "eth0", "dhcp_server": ""}, Options{Interface: "eth0"}},
		{map[string]string{"dhcp_server": "192.0.2.1", "dhcp_interface": ""}, Options{Servers: []Server{a}}},
		{map[string]string{"ether_source": "container"}, Options{EtherSource: SourceContainer}},
		{map[string]string{"listen_port": "1067"}, Options{RelayPort: 1067}},
		{map[string]string{"probe": "off"}, Options{Probe: Off}},
		{map[string]string{"link_selection": "118"}, Options{LinkSelection: Select118}},
		{map[string]string{"option82": "container , host,container"}, Options{Agent: []AgentPart{AgentContainer, AgentHost}}},
		{map[string]string{"network_name": "my lan", "vendor_class": "off", "user_class": "x"}, Options{NetworkName: "my lan", VendorClass: "off", UserClass: "x"}},
		{map[string]string{"host_name": "on", "fqdn": "example.org"}, Options{HostName: On, FQDN: "example.org"}},
	}
	for _, c := range cases {
		if got, err := ParseOptions(c.texts); err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%q: got %+v, %v, want %+v", c.texts, got, err, c.want)
		}
	}
}

func TestTooManyServers(t *testing.T) {
	text := strings.TrimSuffix(strings.Repeat("192.0.2.1,", 16), ",")
	if o, err := ParseOptions(map[string]string{"dhcp_server": text}); err != nil || len(o.Servers) != 16 {
		t.Errorf("16 servers: %d, %v", len(o.Servers), err)
	}
	o, err := ParseOptions(map[string]string{"dhcp_server": text + ",192.0.2.1"})
	if err == nil || !reflect.DeepEqual(o, Options{}) {
		t.Fatalf("17 servers: got %+v, %v, want only an error", o, err)
	}
	for _, part := range []string{"dhcp_server", "17 servers", "at most 16"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("no %q in: %v", part, err)
		}
	}
}

func TestConflictCheckTime(t *testing.T) {
	for check, want := range map[ConflictCheck]time.Duration{
		"": 0, ConflictOff: 0, ConflictRFC: 0, ConflictOn: 200 * time.Millisecond, "1.5s": 1500 * time.Millisecond,
	} {
		if got := check.Time(); got != want {
			t.Errorf("%q lasts %v, want %v", check, got, want)
		}
	}
}

// What a network says beats the global settings, these beat the defaults, for
// each option alone.
func TestOptionsOr(t *testing.T) {
	relay := netip.MustParseAddr
	global := Options{
		Servers: []Server{{"192.0.2.1", 67}}, Relay: relay("198.51.100.1"), ClientID: ClientIDMAC, ReleaseDelay: new(time.Minute),
		OnLost: StopLost, Conflict: ConflictRFC, ConflictInterface: "eth1", RelayPort: 67, EtherSource: SourceInterface, Probe: On,
		LinkSelection: SelectAuto, Agent: []AgentPart{AgentHost}, NetworkName: "lan", VendorClass: "docker", UserClass: "lab", HostName: Off, FQDN: "example.org",
	}
	own := Options{
		Servers: []Server{{"192.0.2.2", 67}, {"192.0.2.3", 67}}, Relay: relay("0.0.0.0"), ClientID: ClientIDName, ReleaseDelay: new(time.Duration(0)),
		OnLost: RestartLost, Conflict: ConflictOff, ConflictInterface: "eth2", RelayPort: 1067, EtherSource: SourceContainer, Probe: Off,
		LinkSelection: SelectOff, Agent: []AgentPart{AgentContainer}, NetworkName: "dmz", VendorClass: "off", UserClass: "x", HostName: On, FQDN: "example.net",
	}
	if got := (Options{}).Or(global); !reflect.DeepEqual(got, global) {
		t.Errorf("nothing of its own: %+v, want %+v", got, global)
	}
	if got := own.Or(global); !reflect.DeepEqual(got, own) {
		t.Errorf("all of its own: %+v, want %+v", got, own)
	}
	// Field by field: all own but one, and none but one.
	fields := reflect.TypeFor[Options]()
	for i := range fields.NumField() {
		name := fields.Field(i).Name
		if name == "Interface" {
			continue // see TestWaysExcludeEachOther
		}
		if reflect.ValueOf(own).Field(i).IsZero() || reflect.ValueOf(global).Field(i).IsZero() {
			t.Fatalf("this test lacks %s", name)
		}
		pick := func(from, but Options) Options {
			reflect.ValueOf(&from).Elem().Field(i).Set(reflect.ValueOf(but).Field(i))
			return from
		}
		for _, c := range []struct{ own, want Options }{
			{pick(own, Options{}), pick(own, global)},
			{pick(Options{}, own), pick(global, own)},
		} {
			if got := c.own.Or(global); !reflect.DeepEqual(got, c.want) {
				t.Errorf("%s: %+v.Or: got %+v, want %+v", name, c.own, got, c.want)
			}
		}
	}
	want := Options{
		ClientID: ClientIDAuto, ReleaseDelay: new(30 * time.Second), OnLost: KeepLost, Conflict: ConflictOff,
		RelayPort: 67, EtherSource: SourceInterface, Probe: On, LinkSelection: SelectAuto, VendorClass: "oam-docker-ipam",
	}
	if got := Defaults(); !reflect.DeepEqual(got, want) {
		t.Errorf("the defaults are %+v, want %+v", got, want)
	}
}

// A network's own way to ask servers beats the other one of the configuration.
func TestWaysExcludeEachOther(t *testing.T) {
	relay, broadcast := Options{Servers: []Server{{"192.0.2.1", 67}}}, Options{Interface: "eth0"}
	for _, c := range []struct{ own, global, want Options }{
		{Options{}, relay, relay},
		{Options{}, broadcast, broadcast},
		{relay, broadcast, relay},
		{broadcast, relay, broadcast},
		{relay, Options{}, relay},
		{broadcast, Options{}, broadcast},
		{broadcast, Options{Interface: "eth1"}, broadcast},
		{relay, Options{Servers: []Server{{"192.0.2.2", 67}}}, relay},
	} {
		got := c.own.Or(c.global)
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("%+v.Or(%+v) is %+v", c.own, c.global, got)
		}
		if got.ByBroadcast() != (got.Interface != "") {
			t.Errorf("%+v: by broadcast %t", got, got.ByBroadcast())
		}
	}
}

func TestSuits(t *testing.T) {
	var (
		none      = Options{}
		relay     = Options{Servers: []Server{{"192.0.2.1", 67}}}
		broadcast = Options{Interface: "eth0"}
	)
	for _, c := range []struct {
		own    map[string]string
		global Options
		says   []string // parts of the refusal; nil where they suit
	}{
		{nil, none, nil},
		{nil, relay, nil},
		{nil, broadcast, nil},
		{map[string]string{"listen_addr": "0.0.0.0", "listen_port": "1067", "link_selection": "118", "option82": "host"}, relay, nil},
		{map[string]string{"ether_source": "container"}, broadcast, nil},
		{map[string]string{"ether_source": "container"}, none, nil},
		{map[string]string{"ether_source": "interface"}, relay, nil},
		{map[string]string{"ether_source": "container"}, relay, []string{"ether_source=container", "relay agent", "dhcp_interface"}},
		{map[string]string{"ether_source": "container", "dhcp_server": "192.0.2.1"}, broadcast, []string{"ether_source=container"}},
		{map[string]string{"ether_source": "container", "dhcp_interface": "eth1"}, relay, nil},
		{nil, Options{Servers: relay.Servers, EtherSource: SourceContainer}, nil},
		{map[string]string{"listen_addr": "0.0.0.0"}, broadcast, []string{"listen_addr=0.0.0.0", "by broadcast on eth0", "dhcp_server"}},
		{map[string]string{"listen_port": "67"}, broadcast, []string{"listen_port=67"}},
		{map[string]string{"link_selection": "auto"}, broadcast, []string{"link_selection=auto"}},
		{map[string]string{"option82": "network,host"}, broadcast, []string{"option82=network,host", "RFC 3046 section 2.1"}},
		{map[string]string{"option82": "host", "listen_port": "67"}, broadcast, []string{"listen_port=67 option82=host: "}},
		{map[string]string{"option82": "host", "dhcp_server": "192.0.2.1"}, broadcast, nil},
		// The daemon's own: its relay address is in no network's way.
		{nil, Options{Interface: "eth0", Relay: netip.IPv4Unspecified(), RelayPort: 67, LinkSelection: SelectOff}, nil},
		{map[string]string{"dhcp_interface": "eth1"}, Options{Servers: relay.Servers, Relay: netip.IPv4Unspecified(), RelayPort: 1067, LinkSelection: SelectAuto}, nil},
	} {
		own, err := ParseOptions(c.own)
		if err != nil {
			t.Fatal(err)
		}
		err = own.Or(c.global.Or(Defaults())).suits(own)
		if (err == nil) != (c.says == nil) {
			t.Errorf("%q with %+v: %v", c.own, c.global, err)
			continue
		}
		for _, part := range c.says {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%q: no %q in: %v", c.own, part, err)
			}
		}
	}
}

// Each option is known by name, and the text of each comes back out of the ID
// of a network that has it.
func TestOptionsInPoolIDs(t *testing.T) {
	texts := map[string]string{
		"dhcp_server": "192.0.2.1,dhcp.example:6767", "listen_addr": "0.0.0.0", "client_id": "name", "release_delay": "1m30s",
		"on_lease_lost": "restart", "conflict_check": "750ms", "conflict_interface": "eth0.100@a&b=c",
		"dhcp_interface": "eth0.10", "ether_source": "container", "listen_port": "1067", "probe": "off", "link_selection": "118",
		"option82": "host,network", "network_name": "my lan & more", "vendor_class": "a=b", "user_class": "c+d", "host_name": "on", "fqdn": "example.org",
	}
	if names := OptionNames(); !slices.Equal(names, slices.Sorted(maps.Keys(texts))) {
		t.Fatalf("known are %q: this test is about %q", names, slices.Sorted(maps.Keys(texts)))
	}
	without := func(names ...string) map[string]string {
		some := maps.Clone(texts)
		maps.DeleteFunc(some, func(name, _ string) bool { return slices.Contains(names, name) })
		return some
	}
	pools := map[string]Pool{}
	add := func(name string, texts map[string]string) {
		p, err := NewPool("192.0.2.0/24", "", texts)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Options.Texts(); !maps.Equal(got, texts) {
			t.Errorf("%s: %q, want %q", name, got, texts)
		}
		pools[name] = p
	}
	add("all of a relay agent", without("dhcp_interface", "ether_source"))
	add("all of broadcast", without("dhcp_server", "listen_addr", "listen_port", "link_selection", "option82"))
	for name, text := range texts {
		add(name, map[string]string{name: text})
	}
	for name, p := range pools {
		id := p.newID()
		if !strings.HasPrefix(name, "all") && !strings.Contains(id, name+"=") {
			t.Errorf("%s isn't in %s", name, id)
		}
		if back, err := ParsePoolID(id); err != nil || !reflect.DeepEqual(back.Options, p.Options) || !maps.Equal(back.Options.Texts(), p.Options.Texts()) {
			t.Errorf("%s: %s read as %+v, %v", name, id, back, err)
		}
		if back, err := ParsePoolID(p.adoptedID()); err == nil {
			t.Errorf("%s: an adopted pool's ID %s was taken for a network's: %+v", name, p.adoptedID(), back)
		}
	}
	for name, text := range map[string]string{
		"client_id": "dns", "release_delay": "-1s", "on_lease_lost": "no", "conflict_check": "x", "conflict_interface": "a/b",
		"probe": "x", "option82": "x", "listen_port": "x",
	} {
		if p, err := ParsePoolID("192.0.2.0/24?" + name + "=" + text + "&id=1"); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s=%s: got %+v, %v, want an error that names it", name, text, p, err)
		}
	}
}

func randomAddr(r *rand.Rand) netip.Addr {
	for {
		u := r.Uint32()
		if a := netip.AddrFrom4([4]byte{byte(u >> 24), byte(u >> 16), byte(u >> 8), byte(u)}); Unicast(a) {
			return a
		}
	}
}

func oneOf[T any](r *rand.Rand, these ...T) T { return these[r.IntN(len(these))] }

func randomOptions(r *rand.Rand) Options {
	var o Options
	if r.IntN(3) == 0 {
		o.Interface = oneOf(r, "eth0", "br-3f2a.100", "a&b=c+d%41?#;")
		o.EtherSource = oneOf(r, "", SourceInterface, SourceContainer)
	} else {
		randomRelay(r, &o)
	}
	if r.IntN(2) == 0 {
		o.ReleaseDelay = new(time.Duration(r.Int64N(int64(maxReleaseDelay) + 1)))
	}
	o.ClientID = oneOf(r, "", ClientIDAuto, ClientIDMAC, ClientIDName)
	o.OnLost = oneOf(r, "", KeepLost, StopLost, RestartLost)
	o.Conflict = oneOf(r, "", ConflictOff, ConflictOn, ConflictRFC, ConflictCheck(time.Duration(1+r.Int64N(int64(maxConflictTime))).String()))
	o.ConflictInterface = oneOf(r, "", "eth0", "br-3f2a.100", "a&b=c+d%41?#;", "münchen")
	o.Probe = oneOf(r, "", On, Off)
	o.HostName = oneOf(r, "", On, Off)
	for _, text := range []*string{&o.NetworkName, &o.VendorClass, &o.UserClass} {
		for range r.IntN(maxText + 1) {
			*text += string(rune(' ' + r.IntN('~'-' '+1)))
		}
	}
	o.FQDN = oneOf(r, "", "example.org", "a_b.example.")
	return o
}

// randomRelay sets what belongs to a relay agent.
func randomRelay(r *rand.Rand, o *Options) {
	for range r.IntN(4) {
		host := randomAddr(r).String()
		if r.IntN(2) == 0 {
			const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."
			host = "x"
			for range r.IntN(20) {
				host += string(letters[r.IntN(len(letters))])
			}
			host = strings.ReplaceAll(host, "..", "._") + "x"
		}
		port := uint16(ServerPort)
		if r.IntN(2) == 0 {
			port = uint16(1 + r.IntN(65535))
		}
		o.Servers = append(o.Servers, Server{host, port})
	}
	switch r.IntN(3) {
	case 0:
		o.Relay = randomAddr(r)
	case 1:
		o.Relay = netip.IPv4Unspecified()
	}
	o.RelayPort = oneOf(r, 0, 67, uint16(1+r.IntN(65535)))
	o.LinkSelection = oneOf(r, "", SelectAuto, SelectOff, Select118)
	o.Agent = oneOf(r, nil, []AgentPart{AgentHost}, []AgentPart{AgentContainer, AgentNetwork}, []AgentPart{AgentNetwork, AgentHost, AgentContainer})
}

func TestOptionsRoundTrip(t *testing.T) {
	r := random(t)
	for range 2000 {
		o := randomOptions(r)
		texts := o.Texts()
		got, err := ParseOptions(texts)
		if err != nil || !reflect.DeepEqual(got, o) {
			t.Fatalf("%+v: texts %q read as %+v, %v", o, texts, got, err)
		}
		if again := got.Texts(); !maps.Equal(again, texts) {
			t.Fatalf("texts %q became %q", texts, again)
		}
		data, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		var back Options
		if err := json.Unmarshal(data, &back); err != nil || !reflect.DeepEqual(back, o) {
			t.Fatalf("%s read as %+v, %v", data, back, err)
		}
	}
}
