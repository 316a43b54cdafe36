package engine

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

var (
	atWeb = lease.Attachment{Container: web, Name: "web", MAC: lease.MAC{0x02, 0x42, 0x0a, 0x0a, 0x00, 0x07}, Prefix: netip.MustParsePrefix("10.10.0.128/24")}
	atDB  = lease.Attachment{Container: db, Name: "db", MAC: lease.MAC{0x02, 0x42, 0x0a, 0x0a, 0x00, 0x81}, Prefix: netip.MustParsePrefix("10.10.0.129/24")}
	atSix = lease.Attachment{Container: six, Name: "six", MAC: lease.MAC{0x02, 0x42, 0x0a, 0x28, 0x00, 0x02}, Prefix: netip.MustParsePrefix("10.40.0.2/24")}

	lanNetwork = lease.Network{
		ID: lan, Name: "lan", Driver: "macvlan", Subnet: "10.10.0.2/24", Range: "10.10.0.128/25", Gateway: "10.10.0.1",
		Reserved: map[string]string{"a": "10.10.0.5", "b": "10.10.0.6"}, Options: map[string]string{"x": "y"},
		Attachments: []lease.Attachment{atWeb, atDB},
	}
)

// talkingdata are both drivers of a daemon of that name.
var talkingdata = lease.Drivers("talkingdata")

func TestNetworks(t *testing.T) {
	got, err := newFake(t).engine().Networks(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	const (
		dual  = "ae39282b32e8ecae50c445daa97ee161f4e05b2d600bd579cf5ee36716740911"
		plain = "3ac0ce44d61b38009bc8dc172780a4e2ae61c27810161d80d0a040774a636422"
		two   = "0b9e9273bee5ba3cfd8a6f000df6a5586075e3358c31e1663f0ca882435fbc92"
	)
	none, empty := map[string]string{}, []lease.Attachment{}
	want := lease.Inventory{Networks: []lease.Network{
		{ID: dual, Name: "dual", Driver: "macvlan", Subnet: "10.40.0.0/24", Options: none, Attachments: []lease.Attachment{atSix}},
		lanNetwork,
		{ID: plain, Name: "plain", Driver: "bridge", Subnet: "172.17.0.0/16", Gateway: "172.17.0.1", Options: none, Attachments: empty},
		{ID: two, Name: "two", Driver: "macvlan", Subnet: "10.30.0.0/24", Options: none, Attachments: empty},
		{ID: two, Name: "two", Driver: "macvlan", Subnet: "10.31.0.0/24", Options: none, Attachments: empty},
	}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// Only the driver's own networks are asked for.
func TestNetworksOfDriver(t *testing.T) {
	f := newFake(t)
	for _, path := range []string{"/networks", "/networks/" + lan} {
		f.edit(path, `"IPAM":{"Driver":"default","Options":{"x":"y"}`, `"IPAM":{"Driver":"talkingdata","Options":{"x":"y"}`)
	}
	f.status["/networks/ae39282b32e8ecae50c445daa97ee161f4e05b2d600bd579cf5ee36716740911"] = http.StatusInternalServerError
	got, err := f.engine(talkingdata...).Networks(t.Context())
	if want := (lease.Inventory{Networks: []lease.Network{lanNetwork}}); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	if got, err := f.engine(lease.Driver{Name: "another"}).Networks(t.Context()); err != nil || len(got.Networks) != 0 {
		t.Errorf("got %+v, %v", got, err)
	}
}

// What the endpoints of ipvlan's driver have for a MAC is nobody's business.
func TestNetworksOfIPvlan(t *testing.T) {
	want := lanNetwork
	want.Driver, want.Options, want.SharedMAC = "ipvlan", map[string]string{"probe": "off"}, true
	want.Attachments = []lease.Attachment{
		{Container: web, Name: "web", Prefix: atWeb.Prefix}, {Container: db, Name: "db", Prefix: atDB.Prefix},
	}
	f := newFake(t)
	f.ipvlan()
	for _, mac := range []string{"", "02:42:0a:0a:00:80"} { // the latter on a bridge
		f.edit("/networks/"+lan, `"MacAddress":""`, `"MacAddress":"`+mac+`"`)
		got, err := f.engine(talkingdata...).Networks(t.Context())
		if err != nil || !reflect.DeepEqual(got, lease.Inventory{Networks: []lease.Network{want}}) {
			t.Errorf("MAC %q: got %+v, %v", mac, got, err)
		}
		text, err := json.Marshal(got)
		var read lease.Inventory
		if err := errors.Join(err, json.Unmarshal(text, &read)); err != nil || !reflect.DeepEqual(read, got) {
			t.Errorf("%s is read as %+v, %v", text, read, err)
		}
	}
	// To another daemon they are none.
	if got, err := f.engine(talkingdata[0]).Networks(t.Context()); err != nil || len(got.Networks) != 0 {
		t.Errorf("got %+v, %v", got, err)
	}
}

// A manager's list has no IPAM of a swarm network that is configured from
// another, as recorded from engines 20.10 and 29. Inspecting it tells, where
// the node has a task of it.
func TestNetworksOfSwarm(t *testing.T) {
	const listed = `"IPAM":{"Driver":"","Options":null,"Config":[]},"Internal":false,"Attachable":false,"Ingress":false,"ConfigFrom":{"Network":"conf"}`
	const path = "/networks/" + lan
	for _, test := range []struct {
		name, driver string // of the network, where it is inspected
		want         lease.Inventory
	}{
		{"a task here", "talkingdata", lease.Inventory{Networks: []lease.Network{lanNetwork}}},
		{"no task here", "", lease.Inventory{}},
		{"another driver's", "default", lease.Inventory{}},
	} {
		f := newFake(t)
		for _, entry := range f.list("/networks") {
			if strings.Contains(string(entry), lan) {
				head, tail, _ := strings.Cut(string(entry), `"IPAM":`)
				_, tail, _ = strings.Cut(tail, `"ConfigFrom":{"Network":""}`)
				f.edit("/networks", string(entry), head+listed+tail)
			}
		}
		f.edit(path, `"IPAM":{"Driver":"default"`, `"IPAM":{"Driver":"`+test.driver+`"`)
		got, err := f.engine(talkingdata...).Networks(t.Context())
		if err != nil || !reflect.DeepEqual(got, test.want) {
			t.Errorf("%s: got %+v, %v", test.name, got, err)
		}
	}
}

// What the CLI sends is what the daemon reads.
func TestInventoryJSON(t *testing.T) {
	want := lease.Inventory{NamesEndpoints: true, Networks: []lease.Network{lanNetwork}}
	text, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got lease.Inventory
	if err := json.Unmarshal(text, &got); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%s is read as %+v, %v", text, got, err)
	}
}

func TestNamesEndpoints(t *testing.T) {
	for api, want := range map[string]bool{
		"1.40": false, // engine 19.03
		"1.41": false, // 20.10
		"1.51": false, // 28.5
		"1.52": true,  // 29.0
		"1.56": true,
		"1.60": true, // newer than the client
	} {
		f := newFake(t)
		f.api = api
		f.edit("/version", `"ApiVersion":"1.41"`, `"ApiVersion":"`+api+`"`)
		if got, err := f.engine().Networks(t.Context()); err != nil || got.NamesEndpoints != want || len(got.Networks) != 5 {
			t.Errorf("API %s: got %+v, %v", api, got, err)
		}
	}
}

// What is gone or concerns nobody is left out, without an error.
func TestLeftOut(t *testing.T) {
	const path = "/networks/" + lan
	for _, test := range []struct {
		name string
		edit func(*fake)
		want int // attachments of "lan", -1 for no network
	}{
		{"nothing", func(*fake) {}, 2},
		{"a network that is removed meanwhile", func(f *fake) { delete(f.bodies, path) }, -1},
		{"a stale endpoint", func(f *fake) {
			f.edit(path, `"`+web+`":`, `"ep-ec39d94cba784403fdde59a72b320b17542fb40429b62da4a9dde3031332ecf2":`)
		}, 1},
		{"an endpoint without IPv4", func(f *fake) { f.edit(path, `"10.10.0.128/24"`, `""`) }, 1},
	} {
		f := newFake(t)
		test.edit(f)
		inventory, err := f.engine().Networks(t.Context())
		got := -1
		for _, n := range inventory.Networks {
			if n.Name == "lan" {
				got = len(n.Attachments)
			}
		}
		if err != nil || got != test.want {
			t.Errorf("%s: got %d, %v", test.name, got, err)
		}
	}
}

// An incomplete picture is an error: leases are released by it.
func TestIncomplete(t *testing.T) {
	const path = "/networks/" + lan
	for _, test := range []struct {
		name string
		edit func(*fake)
		says string
	}{
		{"no version", func(f *fake) { f.status["/version"] = http.StatusInternalServerError }, "version"},
		{"no list", func(f *fake) { f.status["/networks"] = http.StatusInternalServerError }, "list"},
		{"a list that breaks off", func(f *fake) { f.bodies["/networks"] = f.bodies["/networks"][:1000] }, "list"},
		{"a network that isn't told", func(f *fake) { f.status[path] = http.StatusInternalServerError }, lan},
		{"a network that breaks off", func(f *fake) { f.bodies[path] = strings.TrimSuffix(f.bodies[path], "}\n") }, lan},
		{"an address that isn't one", func(f *fake) { f.edit(path, `"10.10.0.128/24"`, `"10.10.0.128"`) }, lan},
		{"an address of no subnet", func(f *fake) { f.edit(path, `"10.10.0.128/24"`, `"10.11.0.128/24"`) }, "10.11.0.128/24"},
		{"no MAC", func(f *fake) { f.edit(path, `"02:42:0a:0a:00:07"`, `""`) }, "web"},
		{"a longer MAC", func(f *fake) { f.edit(path, `"02:42:0a:0a:00:07"`, `"02:42:0a:0a:00:07:00:01"`) }, "web"},
	} {
		f := newFake(t)
		test.edit(f)
		got, err := f.engine().Networks(t.Context())
		if err == nil || got.Networks != nil {
			t.Errorf("%s: got %+v, %v", test.name, got, err)
			continue
		}
		mentions(t, err, test.says)
	}
}
