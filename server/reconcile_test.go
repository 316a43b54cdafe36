package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// What a reconcile sends that is no inventory is refused with an error that
// says so, and changes nothing.
func TestReconcileRefusesBodies(t *testing.T) {
	d := startDaemon(t, twoNetworks(), usual)
	request := func(body string) string {
		return fmt.Sprintf("POST /v1/reconcile HTTP/1.1\r\nHost: \r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
	attached := func(mac, prefix string) string {
		return request(`{"inventory":{"networks":[{"subnet":"192.0.2.0/24","attachments":[{"mac":"` + mac + `","prefix":"` + prefix + `"}]}]}}`)
	}
	const mac = "02:42:00:00:00:07"
	for _, c := range []struct {
		name, raw string
		status    int
		says      string
	}{
		{"empty", request(""), 400, "read the inventory"},
		{"broken JSON", request(`{"inventory":`), 400, "read the inventory"},
		{"two objects", request(`{}{}`), 400, "read the inventory"},
		{"array", request(`[]`), 400, "read the inventory"},
		{"text", request(`"inventory"`), 400, "read the inventory"},
		{"binary", request("\x00\xff\x01"), 400, "read the inventory"},
		{"deep", request(`{"inventory":` + strings.Repeat(`[`, 100_000)), 400, "read the inventory"},
		{"networks of another type", request(`{"inventory":{"networks":{"lan":5}}}`), 400, "read the inventory"},
		{"dry run of another type", request(`{"dry_run":"yes"}`), 400, "read the inventory"},
		{"MAC of another type", request(`{"inventory":{"networks":[{"attachments":[{"mac":5}]}]}}`), 400, "read the inventory"},
		{"no MAC", attached("", "192.0.2.7/24"), 400, "MAC"},
		{"MAC of words", attached("web", "192.0.2.7/24"), 400, `"web"`},
		{"MAC of eight bytes", attached("02:00:00:00:00:00:00:01", "192.0.2.7/24"), 400, "six bytes"},
		{"address without a prefix length", attached(mac, "192.0.2.7"), 400, "192.0.2.7"},
		{"address of words", attached(mac, "web"), 400, "web"},
		{"prefix too long", attached(mac, "192.0.2.7/33"), 400, "192.0.2.7/33"},
		{"negative prefix", attached(mac, "192.0.2.7/-1"), 400, "192.0.2.7/-1"},
		{"address with a zone", attached(mac, "fe80::1%eth0/64"), 400, "fe80"},
		{"huge", "POST /v1/reconcile HTTP/1.1\r\nHost: \r\nContent-Length: 100000000000\r\n\r\n" + strings.Repeat(" ", reconcileLimit+1), 400, "too large"},
		{"nothing", request(`{}`), 409, "no network of this driver"},
		{"null", request(`null`), 409, "no network of this driver"},
		{"no networks", request(`{"inventory":{"networks":[]}}`), 409, "no network of this driver"},
		{"other networks", request(`{"inventory":{"Netzwerke":[{"subnet":"192.0.2.0/24"}]}}`), 409, "no network of this driver"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := d.exchange(c.raw)
			var failed failure
			if err := json.Unmarshal([]byte(got.body), &failed); err != nil || got.status != c.status || !strings.Contains(failed.Err, c.says) {
				t.Errorf("answers %d %s, %v; want %d and %q", got.status, got.body, err, c.status, c.says)
			}
			if len(failed.Err) > 1000 {
				t.Errorf("an error of %d bytes", len(failed.Err))
			}
		})
	}
	for _, method := range []string{"GET", "PUT", "DELETE"} {
		if got := d.exchange(method + " /v1/reconcile HTTP/1.1\r\nHost: \r\n\r\n"); got.status != http.StatusMethodNotAllowed {
			t.Errorf("%s answers %d", method, got.status)
		}
	}
	if n := len(d.manager.Leases()); n != 3 {
		t.Errorf("%d leases of 3", n)
	}
}

// What is no endpoint of ours is a finding, and the rest of the inventory is
// dealt with. Engines say no such things.
func TestReconcileRefusesEndpoints(t *testing.T) {
	const subnet, inSubnet = "192.0.2.0/24", "192.0.2.60/24"
	for _, c := range []struct {
		name           string
		subnet, within string
		options        map[string]string
		address        string
		says           string
	}{
		{"IPv6 network", "2001:db8::/64", "", nil, "2001:db8::7/64", "IPv4"},
		{"IPv6 address", subnet, "", nil, "2001:db8::7/64", "outside the network's subnet"},
		{"IPv4 in IPv6", subnet, "", nil, "::ffff:192.0.2.60/120", "outside the network's subnet"},
		{"no subnet", "", "", nil, inSubnet, "no subnet"},
		{"subnet of words", "lan", "", nil, inSubnet, `"lan"`},
		{"everything", "0.0.0.0/0", "", nil, inSubnet, "/1 to /30"},
		{"no room", "192.0.2.60/32", "", nil, "192.0.2.60/32", "/1 to /30"},
		{"prefix too long", "192.0.2.0/33", "", nil, inSubnet, "192.0.2.0/33"},
		{"multicast", "224.0.0.0/24", "", nil, "224.0.0.7/24", "not a unicast range"},
		{"range elsewhere", subnet, "198.51.100.0/24", nil, inSubnet, "not within"},
		{"range of words", subnet, "all", nil, inSubnet, `"all"`},
		{"unknown option", subnet, "", map[string]string{"color": "red"}, inSubnet, `"color"`},
		{"wrong option", subnet, "", map[string]string{"dhcp_server": "10.0.0.300"}, inSubnet, "10.0.0.300"},
		{"address outside", subnet, "", nil, "198.51.100.7/24", "outside the network's subnet"},
		{"network address", subnet, "", nil, "192.0.2.0/24", "network or broadcast"},
		{"broadcast address", subnet, "", nil, "192.0.2.255/24", "network or broadcast"},
		{"no address", subnet, "", nil, "", "outside the network's subnet"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, dryRun := range []bool{true, false} {
				d := startDaemon(t, twoNetworks(), usual)
				odd := lease.Attachment{Container: "x", Name: "odd", MAC: lease.MAC{2, 0, 0, 0, 0, 7}}
				if c.address != "" {
					odd.Prefix = netip.MustParsePrefix(c.address)
				}
				good := lease.Attachment{Container: "g", Name: "web", MAC: mac1, Prefix: netip.MustParsePrefix("192.0.2.50/24")}
				got, err := Reconcile(t.Context(), d.socket, lease.Inventory{Networks: []lease.Network{
					{Name: "odd", Subnet: c.subnet, Range: c.within, Options: c.options, Attachments: []lease.Attachment{odd, odd}},
					{Name: "lan", Subnet: subnet, Attachments: []lease.Attachment{good}},
				}}, dryRun)
				if err != nil {
					t.Fatal(err)
				}
				var refused []lease.Finding
				for _, f := range got {
					if f.Action == lease.Refused {
						refused = append(refused, f)
					}
					if f.Action == lease.Adopted {
						t.Errorf("adopted %+v", f)
					}
				}
				if len(refused) != 2 {
					t.Fatalf("dry run %t: refused are %+v of %+v", dryRun, refused, got)
				}
				f := refused[0]
				if f.Name != "odd" || f.Network != "odd" || f.Container != "x" || f.MAC != odd.MAC || f.Address != odd.Prefix.Addr() || !strings.Contains(f.Detail, c.says) {
					t.Errorf("dry run %t: refused is %+v, want %q", dryRun, f, c.says)
				}
				for _, l := range d.manager.Leases() {
					if l.MAC == odd.MAC {
						t.Errorf("it is leased: %+v", l)
					}
				}
			}
		})
	}
}

// One address is one endpoint's, whatever the inventory says, and the same
// holds for a MAC.
func TestReconcileDoubles(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	at := func(n byte, addr string) lease.Attachment {
		return lease.Attachment{Container: fmt.Sprint(n), Name: fmt.Sprint(n), MAC: lease.MAC{2, 0, 0, 0, 0, n}, Prefix: netip.MustParsePrefix(addr)}
	}
	inventory := lease.Inventory{Networks: []lease.Network{{Name: "lan", Subnet: "192.0.2.0/24", Attachments: []lease.Attachment{
		at(1, "192.0.2.61/24"), at(2, "192.0.2.61/24"), at(3, "192.0.2.63/24"), at(3, "192.0.2.64/24"), at(5, "192.0.2.65/24"),
	}}}}
	for run := range 3 {
		if _, err := Reconcile(t.Context(), d.socket, inventory, false); err != nil {
			t.Fatal(err)
		}
		addrs, macs := map[netip.Addr]bool{}, map[lease.MAC]bool{}
		for _, l := range d.manager.Leases() {
			if addrs[l.Addr()] || macs[l.MAC] {
				t.Errorf("run %d: %s of %s is not the only one", run, l.Addr(), l.MAC)
			}
			addrs[l.Addr()], macs[l.MAC] = true, true
		}
		if len(addrs) != 3 {
			t.Errorf("run %d: leases of %v", run, addrs)
		}
	}
}

// An operator who gives up in the middle leaves nothing half done.
func TestReconcileCancelled(t *testing.T) {
	d := startDaemon(t, twoNetworks(), usual)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Reconcile(ctx, d.socket, lease.Inventory{}, false); err == nil {
		t.Error("no error")
	}
	if n := len(d.manager.Leases()); n != 3 {
		t.Errorf("%d leases of 3", n)
	}
}

// An inventory of the largest site is read in time.
func TestReconcileManyEndpoints(t *testing.T) {
	const many = 20_000
	d := startDaemon(t, fakeStore{}, usual)
	network := lease.Network{Name: "lan", Subnet: "10.0.0.0/8"}
	for n := range many {
		network.Attachments = append(network.Attachments, lease.Attachment{
			Container: strings.Repeat("c", 64), Name: fmt.Sprintf("container-%d", n), MAC: lease.MAC{2, 0, 0, byte(n >> 16), byte(n >> 8), byte(n)},
			Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)}), 8),
		})
	}
	network.Attachments = network.Attachments[1:] // not to be mistaken for a network address
	began := time.Now()
	for _, want := range []int{many - 1, 0} {
		got, err := Reconcile(t.Context(), d.socket, lease.Inventory{Networks: []lease.Network{network}}, false)
		if err != nil || len(got) != want {
			t.Fatalf("%d findings, want %d, %v", len(got), want, err)
		}
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("%d endpoints took %v", many, took)
	} else {
		t.Logf("%d endpoints took %v", many, took)
	}
	if n := len(d.manager.Leases()); n != many-1 {
		t.Errorf("%d leases", n)
	}
}
