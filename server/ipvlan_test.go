package server

import (
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// The second driver asks for no MACs, since Docker's ipvlan refuses endpoints
// that have one.
func TestIPvlanDriver(t *testing.T) {
	d := startDaemonAs(t, drivers[1], fakeStore{}, usual)
	d.call("/Plugin.Activate", "", `{"Implements":["IpamDriver"]}`)
	d.call("/IpamDriver.GetCapabilities", "", `{"RequiresMACAddress":false,"RequiresRequestReplay":false}`)
	d.call("/IpamDriver.GetDefaultAddressSpaces", "", `{"LocalDefaultAddressSpace":"talkingdata-ipvlan","GlobalDefaultAddressSpace":"talkingdata-ipvlan"}`)
}

// Whatever is not the gateway's is an endpoint's: engines before 29 ask for a
// container's --ip as for an auxiliary address.
func TestIPvlanAddresses(t *testing.T) {
	d := startDaemonAs(t, drivers[1], fakeStore{}, usual)
	id := d.addPool()
	if !strings.Contains(id, "shared_mac=yes") {
		t.Errorf("nobody could take %s up as what it is", id)
	}
	pool := quote(id)
	d.call("/IpamDriver.RequestAddress", `{"PoolID":`+pool+`,"Address":"192.0.2.254","Options":{"RequestAddressType":"com.docker.network.gateway"}}`, `{"Address":"192.0.2.254/24","Data":null}`)
	if len(d.client.asked()) != 0 {
		t.Errorf("asked the DHCP server for a gateway: %+v", d.client.asked())
	}
	for _, c := range []struct{ engine, address, options, want, name string }{
		{"20.10", "", `null`, "192.0.2.100", ""},
		{"20.10 --ip", "192.0.2.77", `null`, "192.0.2.77", ""},
		{"28", "", `{}`, "192.0.2.101", ""},
		{"29", "", `{"com.docker.network.endpoint.name":"web"}`, "192.0.2.102", "web"},
		{"29 --ip", "192.0.2.78", `{"com.docker.network.endpoint.name":"/db"}`, "192.0.2.78", "db"},
		// No engine says so; a MAC that no frame carries would be of no use.
		{"a MAC all the same", "", `{"com.docker.network.endpoint.name":"odd","com.docker.network.endpoint.macaddress":"02:42:ab:75:9f:69"}`, "192.0.2.103", "odd"},
	} {
		d.call("/IpamDriver.RequestAddress", `{"PoolID":`+pool+`,"Address":"`+c.address+`","Options":`+c.options+`}`, `{"Address":"`+c.want+`/24","Data":null}`)
		asked := d.client.asked()
		r := asked[len(asked)-1]
		if r.Name != c.name || r.MAC[0]&0x03 != 0x02 || r.MAC.String() == "02:42:ab:75:9f:69" {
			t.Errorf("%s: asked %+v", c.engine, r)
		}
		if r.Address.IsValid() != (c.address != "") {
			t.Errorf("%s: asked for %s", c.engine, r.Address)
		}
	}
	macs := map[lease.MAC]bool{}
	for _, mac := range d.client.leased() {
		macs[mac] = true
	}
	if len(macs) != 6 {
		t.Errorf("six containers have the MAC addresses %v", macs)
	}
	// Operators see them as all others, on this socket too.
	if leases, err := Leases(t.Context(), d.socket, Selection{}); err != nil || len(leases) != 6 {
		t.Errorf("leases %+v, %v", leases, err)
	}

	// A call that the engine repeats without its body gets no lease.
	d.call("/IpamDriver.RequestAddress", ``, `{"Error":"request without a body: the engine repeats a call that was cut off; try again"}`)
	for _, addr := range []string{"192.0.2.77", "192.0.2.77", "192.0.2.254", "192.0.2.33"} {
		d.call("/IpamDriver.ReleaseAddress", `{"PoolID":`+pool+`,"Address":"`+addr+`"}`, `{}`)
	}
	if got := d.client.leased(); len(got) != 5 {
		t.Errorf("leased %v, want all but 192.0.2.77", got)
	}
	d.call("/IpamDriver.ReleasePool", `{"PoolID":`+pool+`}`, `{}`)
	if got := d.client.leased(); len(got) != 0 {
		t.Errorf("leased %v after ReleasePool", got)
	}
}

func TestIPvlanByBroadcast(t *testing.T) {
	d := startDaemonAs(t, drivers[1], fakeStore{}, usual)
	got := d.post("/IpamDriver.RequestPool", `{"Pool":"192.0.2.0/24","Options":{"dhcp_interface":"eth0"}}`)
	for _, word := range []string{`{"Error":"dhcp_interface=eth0`, "ipvlan", "dhcp_server"} {
		if got.status != 200 || !strings.Contains(got.body, word) {
			t.Errorf("answers %d %s, want %q", got.status, got.body, word)
		}
	}
}
