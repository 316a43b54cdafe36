package engine

import (
	"encoding/json"
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

func TestNetworks(t *testing.T) {
	got, err := newFake(t).engine().Networks(t.Context(), "default")
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
	f.edit("/networks", `"IPAM":{"Driver":"default","Options":{"x":"y"}`, `"IPAM":{"Driver":"talkingdata","Options":{"x":"y"}`)
	f.status["/networks/ae39282b32e8ecae50c445daa97ee161f4e05b2d600bd579cf5ee36716740911"] = http.StatusInternalServerError
	e := f.engine()
	got, err := e.Networks(t.Context(), "talkingdata")
	if want := (lease.Inventory{Networks: []lease.Network{lanNetwork}}); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	if got, err := e.Networks(t.Context(), "another"); err != nil || len(got.Networks) != 0 {
		t.Errorf("got %+v, %v", got, err)
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
		if got, err := f.engine().Networks(t.Context(), "default"); err != nil || got.NamesEndpoints != want || len(got.Networks) != 5 {
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
		inventory, err := f.engine().Networks(t.Context(), "default")
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
		got, err := f.engine().Networks(t.Context(), "default")
		if err == nil || got.Networks != nil {
			t.Errorf("%s: got %+v, %v", test.name, got, err)
			continue
		}
		mentions(t, err, test.says)
	}
}
