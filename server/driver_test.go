package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// addPool makes a pool of 192.0.2.0/24 by a call, and returns its ID.
func (d *daemon) addPool() string {
	d.t.Helper()
	got := d.post("/IpamDriver.RequestPool", `{"AddressSpace":"talkingdata","Pool":"192.0.2.0/24","SubPool":"","Options":{},"V6":false}`)
	var answer struct{ PoolID string }
	if err := json.Unmarshal([]byte(got.body), &answer); err != nil || answer.PoolID == "" {
		d.t.Fatalf("RequestPool answers %d %s", got.status, got.body)
	}
	return answer.PoolID
}

// endpoint is the request of a container's address.
func endpoint(pool, addr, mac, name string) string {
	options := map[string]string{macKey: mac}
	if name != "" {
		options[nameKey] = name
	}
	b, err := json.Marshal(map[string]any{"PoolID": pool, "Address": addr, "Options": options})
	if err != nil {
		panic(err)
	}
	return string(b)
}

func TestConstantAnswers(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	for range 2 { // any number of times, at any time
		d.call("/Plugin.Activate", "", `{"Implements":["IpamDriver"]}`)
		d.call("/IpamDriver.GetCapabilities", "", `{"RequiresMACAddress":true,"RequiresRequestReplay":false}`)
		d.call("/IpamDriver.GetDefaultAddressSpaces", "", `{"LocalDefaultAddressSpace":"talkingdata","GlobalDefaultAddressSpace":"talkingdata"}`)
	}
	// The engine may send a body where none is needed.
	d.call("/Plugin.Activate", "{}", `{"Implements":["IpamDriver"]}`)
	d.call("/IpamDriver.GetCapabilities", "null", `{"RequiresMACAddress":true,"RequiresRequestReplay":false}`)
}

func TestPoolAnswer(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	for _, c := range []struct{ body, pool, gateway string }{
		{`{"AddressSpace":"talkingdata","Pool":"192.0.2.0/24","SubPool":"","Options":{},"V6":false}`, "192.0.2.0/24", "192.0.2.1/24"},
		{`{"Pool":"192.0.2.7/24"}`, "192.0.2.0/24", "192.0.2.1/24"}, // host bits, as engine 20.10 passes them on
		{`{"Pool":"192.0.2.0/24","SubPool":"192.0.2.128/25","Options":{"dhcp_server":"198.51.100.1"}}`, "192.0.2.0/24", "192.0.2.1/24"},
		{`{"Pool":"192.0.2.0/24","Options":null}`, "192.0.2.0/24", "192.0.2.1/24"},
		{`{"Pool":"198.51.100.0/24","Options":{"probe":"off"}}`, "198.51.100.0/24", "198.51.100.1/24"},
		// Learned from the server.
		{`{"AddressSpace":"talkingdata","Pool":"","SubPool":"","Options":{"dhcp_interface":"eth0"},"V6":false}`, "192.0.2.0/24", "192.0.2.1/24"},
		{`{"Pool":""}`, "192.0.2.0/24", "192.0.2.1/24"},
		{`{}`, "192.0.2.0/24", "192.0.2.1/24"},
	} {
		got := d.post("/IpamDriver.RequestPool", c.body)
		var id struct{ PoolID string }
		if err := json.Unmarshal([]byte(got.body), &id); err != nil {
			t.Fatalf("%s: %v", got.body, err)
		}
		want := fmt.Sprintf(`{"PoolID":%s,"Pool":"%s","Data":{"com.docker.network.gateway":"%s"}}`, quote(id.PoolID), c.pool, c.gateway)
		if got.status != http.StatusOK || got.body != want {
			t.Errorf("%s\nanswers %d %s\nwant    200 %s", c.body, got.status, got.body, want)
		}
		d.call("/IpamDriver.ReleasePool", `{"PoolID":`+quote(id.PoolID)+`}`, `{}`)
	}
	if a, b := d.addPool(), d.addPool(); a == b {
		t.Errorf("two pools have the ID %s", a)
	}
}

// quote writes a JSON string without HTML's escapes, as the answers are.
func quote(s string) string {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	_ = e.Encode(s)
	return strings.TrimSpace(b.String())
}

func TestAddressAnswers(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	pool := quote(d.addPool())
	d.call("/IpamDriver.RequestAddress", `{"PoolID":`+pool+`,"Address":"","Options":{"RequestAddressType":"com.docker.network.gateway"}}`, `{"Address":"192.0.2.1/24","Data":null}`)
	d.call("/IpamDriver.RequestAddress", `{"PoolID":`+pool+`,"Address":"192.0.2.254","Options":{"RequestAddressType":"com.docker.network.gateway"}}`, `{"Address":"192.0.2.254/24","Data":null}`)
	d.call("/IpamDriver.RequestAddress", `{"PoolID":`+pool+`,"Address":"192.0.2.10","Options":null}`, `{"Address":"192.0.2.10/24","Data":null}`)
	if len(d.client.asked()) != 0 {
		t.Errorf("asked the DHCP server for a gateway or auxiliary address: %+v", d.client.asked())
	}
	d.call("/IpamDriver.RequestAddress", `{"PoolID":`+pool+`,"Address":"","Options":{"com.docker.network.endpoint.macaddress":"02:42:ab:75:9f:69"}}`, `{"Address":"192.0.2.100/24","Data":null}`)
	d.call("/IpamDriver.RequestAddress", `{"PoolID":`+pool+`,"Address":"192.0.2.77","Options":{"com.docker.network.endpoint.macaddress":"02:42:C0:A8:3B:4D","com.docker.network.endpoint.name":"web"}}`, `{"Address":"192.0.2.77/24","Data":null}`)
	asked := d.client.asked()
	if len(asked) != 2 {
		t.Fatalf("%d requests", len(asked))
	}
	if r := asked[0]; r.MAC.String() != "02:42:ab:75:9f:69" || r.Name != "" || r.Address.IsValid() {
		t.Errorf("asked %+v", r)
	}
	if r := asked[1]; r.MAC.String() != "02:42:c0:a8:3b:4d" || r.Name != "web" || r.Address.String() != "192.0.2.77" {
		t.Errorf("asked %+v", r)
	}
	// The engine repeats itself, and releases what it never requested.
	for _, addr := range []string{"192.0.2.100", "192.0.2.100", "192.0.2.254", "192.0.2.1", "192.0.2.33", ""} {
		d.call("/IpamDriver.ReleaseAddress", `{"PoolID":`+pool+`,"Address":"`+addr+`"}`, `{}`)
	}
	if got := d.client.leased(); len(got) != 1 {
		t.Errorf("leased %v, want 192.0.2.77 only", got)
	}
	for range 2 {
		d.call("/IpamDriver.ReleasePool", `{"PoolID":`+pool+`}`, `{}`)
	}
	if got := d.client.leased(); len(got) != 0 {
		t.Errorf("leased %v after ReleasePool", got)
	}
	d.call("/IpamDriver.ReleaseAddress", `{"PoolID":`+pool+`,"Address":"192.0.2.77"}`, `{}`)
}

// A refusal is status 200 with Error, which the engine shows to its user.
func TestRefusals(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	pool := d.addPool()
	address := func(options string) string {
		return `{"PoolID":` + quote(pool) + `,"Address":"","Options":` + options + `}`
	}
	for _, c := range []struct{ name, path, body, text string }{
		{"range without subnet", "RequestPool", `{"Pool":"","SubPool":"192.0.2.128/25"}`, "--subnet"},
		{"no subnet, no probe", "RequestPool", `{"Pool":"","Options":{"probe":"off"}}`, "--subnet"},
		{"relay agent's options", "RequestPool", `{"Pool":"","Options":{"dhcp_interface":"eth0","option82":"host"}}`, "option82=host"},
		{"two ways to the servers", "RequestPool", `{"Pool":"","Options":{"dhcp_interface":"eth0","dhcp_server":"192.0.2.3"}}`, "exclude each other"},
		{"IPv6", "RequestPool", `{"Pool":"fd00::/64","V6":true}`, "IPv6"},
		{"IPv6 without subnet", "RequestPool", `{"Pool":"","V6":true}`, "IPv6"},
		{"/31", "RequestPool", `{"Pool":"192.0.2.0/31"}`, "192.0.2.0/31"},
		{"/32", "RequestPool", `{"Pool":"192.0.2.0/32"}`, "192.0.2.0/32"},
		{"/0", "RequestPool", `{"Pool":"0.0.0.0/0"}`, "0.0.0.0/0"},
		{"no prefix", "RequestPool", `{"Pool":"192.0.2.0"}`, "192.0.2.0"},
		{"range outside", "RequestPool", `{"Pool":"192.0.2.0/24","SubPool":"198.51.100.0/25"}`, "--ip-range"},
		{"range too wide", "RequestPool", `{"Pool":"192.0.2.0/24","SubPool":"192.0.0.0/16"}`, "--ip-range"},
		{"unknown option", "RequestPool", `{"Pool":"192.0.2.0/24","Options":{"dhcp_sever":"192.0.2.3"}}`, `"dhcp_sever": known are client_id, conflict_check, conflict_interface, dhcp_interface, dhcp_server, ether_source, fqdn, host_name, link_selection, listen_addr, listen_port, network_name, on_lease_lost, option82, probe, release_delay, user_class, vendor_class`},
		{"wrong server", "RequestPool", `{"Pool":"192.0.2.0/24","Options":{"dhcp_server":"10.0.0.300"}}`, "10.0.0.300"},
		{"wrong relay", "RequestPool", `{"Pool":"192.0.2.0/24","Options":{"listen_addr":"eth0"}}`, "eth0"},
		{"unknown pool", "RequestAddress", endpoint("pool-false-192.168.59.0/24", "", "02:42:ab:75:9f:69", ""), `unknown pool "pool-false-192.168.59.0/24"`},
		{"empty pool", "RequestAddress", endpoint("", "", "02:42:ab:75:9f:69", ""), "unknown pool"},
		{"empty object", "RequestAddress", `{}`, "unknown pool"},
		{"null", "RequestAddress", `null`, "unknown pool"},
		{"gateway of unknown pool", "RequestAddress", `{"PoolID":"x","Options":{"RequestAddressType":"com.docker.network.gateway"}}`, "unknown pool"},
		{"wrong MAC", "RequestAddress", address(`{"com.docker.network.endpoint.macaddress":"02:42"}`), "02:42"},
		{"EUI-64", "RequestAddress", address(`{"com.docker.network.endpoint.macaddress":"02:42:ab:75:9f:69:01:02"}`), "02:42:ab:75:9f:69:01:02"},
		{"wrong address", "RequestAddress", endpoint(pool, "192.0.2.300", "02:42:ab:75:9f:69", ""), "192.0.2.300"},
		{"address with prefix", "RequestAddress", endpoint(pool, "192.0.2.7/24", "02:42:ab:75:9f:69", ""), "192.0.2.7/24"},
		{"IPv6 address", "RequestAddress", endpoint(pool, "fd00::1", "02:42:ab:75:9f:69", ""), "fd00::1"},
		{"address of another subnet", "RequestAddress", endpoint(pool, "198.51.100.1", "02:42:ab:75:9f:69", ""), "192.0.2.0/24"},
		{"no MAC, no address", "RequestAddress", address(`null`), "restart the engine"},
		{"empty MAC", "RequestAddress", address(`{"com.docker.network.endpoint.macaddress":""}`), "restart the engine"},
		{"wrong address released", "ReleaseAddress", `{"PoolID":` + quote(pool) + `,"Address":"nonsense"}`, "nonsense"},
	} {
		t.Run(c.path+" "+c.name, func(t *testing.T) {
			got := d.post("/IpamDriver."+c.path, c.body)
			var answer map[string]string
			if err := json.Unmarshal([]byte(got.body), &answer); err != nil {
				t.Fatalf("%s: %v", got.body, err)
			}
			if got.status != http.StatusOK || len(answer) != 1 || !strings.Contains(answer["Error"], c.text) || strings.Contains(answer["Error"], "\n") {
				t.Errorf("answers %d %s, want Error with %q", got.status, got.body, c.text)
			}
		})
	}
	if len(d.client.asked()) != 0 {
		t.Errorf("a DHCP server was asked: %+v", d.client.asked())
	}
}

// No capability for MACs, later: neither a lease nor an address.
func TestEndpointWithoutMAC(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	pool := d.addPool()
	d.call("/IpamDriver.RequestAddress", endpoint(pool, "", "02:42:ab:75:9f:69", ""), `{"Address":"192.0.2.100/24","Data":null}`)
	got := d.post("/IpamDriver.RequestAddress", `{"PoolID":`+quote(pool)+`,"Address":"192.0.2.50","Options":null}`)
	if got.status != http.StatusOK || !strings.Contains(got.body, `"Error":"the engine registered this driver without MAC addresses: restart the engine`) {
		t.Errorf("answers %d %s", got.status, got.body)
	}
}

// Text that HTML would escape is shown to the user as it is.
func TestErrorTextIsPlain(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	got := d.post("/IpamDriver.RequestAddress", endpoint("<a&b>", "", "02:42:ab:75:9f:69", ""))
	if !strings.Contains(got.body, `<a&b>`) {
		t.Errorf("answers %s", got.body)
	}
}

// The engine prefixes some names with a slash.
func TestContainerName(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	d.post("/IpamDriver.RequestAddress", endpoint(d.addPool(), "", "02:42:ab:75:9f:69", "/web"))
	if asked := d.client.asked(); len(asked) != 1 || asked[0].Name != "web" {
		t.Errorf("asked %+v", asked)
	}
}

func TestPanic(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	pool := d.addPool()
	d.client.acquire = func(context.Context, lease.Request) (lease.Lease, error) { panic("a bug") }
	body := endpoint(pool, "", "02:42:ab:75:9f:69", "")
	for range 2 {
		got := d.post("/IpamDriver.RequestAddress", body)
		var answer map[string]string
		if err := json.Unmarshal([]byte(got.body), &answer); err != nil || got.status != http.StatusInternalServerError || answer["Err"] == "" {
			t.Errorf("answers %d %s, want an Err", got.status, got.body)
		}
		if strings.Contains(got.body, "a bug") {
			t.Errorf("the panic's text is for the log: %s", got.body)
		}
	}
	// Nothing stays locked.
	d.client.acquire = nil
	d.call("/IpamDriver.RequestAddress", body, `{"Address":"192.0.2.100/24","Data":null}`)
}

// A caller that goes ends its request, and what is won for it then goes back.
func TestCallerGoes(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	pool := d.addPool()
	began, ended := make(chan bool), make(chan error)
	d.client.acquire = func(ctx context.Context, req lease.Request) (lease.Lease, error) {
		began <- true
		<-ctx.Done()
		defer func() { ended <- ctx.Err() }()
		// The ACK was on its way.
		return d.client.grant(req)
	}
	conn := d.begin("/IpamDriver.RequestAddress", endpoint(pool, "", "02:42:ab:75:9f:69", ""))
	<-began
	conn.Close()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("ended by %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the request goes on")
	}
	if err := d.stop(); err != nil { // waits for what is in hand
		t.Error(err)
	}
	if got := d.client.leased(); len(got) != 0 || len(d.manager.Leases()) != 0 {
		t.Errorf("leased %v", got)
	}
}

// A subnet is known by its address and length, whatever the answer needs it for.
func TestAnsweredPrefixLength(t *testing.T) {
	d := startDaemon(t, fakeStore{pools: []lease.Pool{{
		ID: "p", Subnet: netip.MustParsePrefix("10.0.0.0/8"), Gateway: netip.MustParseAddr("10.0.0.1"),
	}}}, usual)
	d.call("/IpamDriver.RequestAddress", endpoint("p", "", "02:42:ab:75:9f:69", ""), `{"Address":"10.0.0.100/8","Data":null}`)
}
