package server

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

var paths = []string{
	"/IpamDriver.RequestPool", "/IpamDriver.ReleasePool", "/IpamDriver.RequestAddress", "/IpamDriver.ReleaseAddress",
	"/Plugin.Activate", "/IpamDriver.GetCapabilities", "/IpamDriver.GetDefaultAddressSpaces",
}

// FuzzBodies: whatever the body, the answer is JSON, nothing panics, and only a
// proper endpoint request gets a lease.
func FuzzBodies(f *testing.F) {
	for path := range paths {
		for _, body := range []string{
			"", "null", "{}", "[]", `"x"`, "5", `{"PoolID":"known"}`, `{"PoolID":"known","Address":"192.0.2.50"}`,
			`{"AddressSpace":"talkingdata","Pool":"192.0.2.0/24","SubPool":"192.0.2.128/25","Options":{"dhcp_server":"192.0.2.3"},"V6":false}`,
			endpoint("known", "", "02:42:ab:75:9f:69", "web"), endpoint("known", "192.0.2.9", "02:42:ab:75:9f:69", ""),
			endpoint("192.0.2.0/24?id=A", "", "02:42:ab:75:9f:69", ""), endpoint("192.0.2.0", "", "02:42:ab:75:9f:69", ""),
			`{"PoolID":"known","Options":{"RequestAddressType":"com.docker.network.gateway"}}`,
			`{"poolid":"known","OPTIONS":{"com.docker.network.endpoint.macaddress":"02:42:ab:75:9f:69"}}`,
			`{"PoolID":"known","Options":{"com.docker.network.endpoint.macaddress":"02:42:ab:75:9f:69","RequestAddressType":"com.docker.network.gateway"}}`,
			"{\"PoolID\":\"\xff\"", strings.Repeat("[", 20000),
		} {
			f.Add(uint8(path), []byte(body))
		}
	}
	f.Fuzz(func(t *testing.T, path uint8, body []byte) {
		manager, client := newManager(t, fakeStore{pools: []lease.Pool{{ID: "known", Subnet: netip.MustParsePrefix("192.0.2.0/24"), Gateway: netip.MustParseAddr("192.0.2.1")}}})
		to := paths[int(path)%len(paths)]
		w := httptest.NewRecorder()
		New(Backend{Manager: manager, Settings: noSettings}, drivers[0], slog.New(slog.DiscardHandler)).ServeHTTP(w, httptest.NewRequest(http.MethodPost, to, strings.NewReader(string(body))))
		if w.Code != http.StatusOK && w.Code != http.StatusBadRequest {
			t.Fatalf("%s %q answers %d %s", to, body, w.Code, w.Body)
		}
		var answer map[string]any
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || answer == nil {
			t.Fatalf("%s %q answers %s: %v", to, body, w.Body, err)
		}
		if w.Code == http.StatusBadRequest && answer["Err"] == nil {
			t.Fatalf("%s %q answers %d %s", to, body, w.Code, w.Body)
		}
		if len(client.asked()) == 0 && len(client.leased()) == 0 && len(manager.Leases()) == 0 {
			return
		}
		var in struct {
			PoolID  string
			Options map[string]string
		}
		if err := json.Unmarshal(body, &in); err != nil || to != "/IpamDriver.RequestAddress" || in.PoolID == "" {
			t.Fatalf("%s %q got a lease", to, body)
		}
		if _, err := lease.ParseMAC(in.Options["com.docker.network.endpoint.macaddress"]); err != nil || in.Options["RequestAddressType"] == "com.docker.network.gateway" {
			t.Fatalf("%s %q got a lease", to, body)
		}
	})
}
