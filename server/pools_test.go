package server

import (
	"encoding/json"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// The list's form, which programs read.
func TestPresentPool(t *testing.T) {
	at := time.Date(2026, 1, 2, 5, 4, 5, 999e6, time.FixedZone("", 2*3600))
	server := netip.MustParseAddr("192.0.2.3")
	full := lease.PoolStatus{
		Pool: lease.Pool{
			ID: "192.0.2.0/24?id=A&b", Subnet: netip.MustParsePrefix("192.0.2.0/24"), Range: netip.MustParsePrefix("192.0.2.128/25"),
			Gateway: netip.MustParseAddr("192.0.2.1"),
		},
		InForce: lease.Options{Servers: []lease.Server{{Host: "192.0.2.3", Port: 67}}, RelayPort: 67},
		Leases:  map[string]int{"bound": 12, "lost": 1},
		Servers: []lease.ServerStatus{
			{Server: server, Answered: at, Took: 1234567 * time.Nanosecond, Silent: at.Add(time.Minute), Unanswered: 2, Offers: 3, ACKs: 4, NAKs: 5},
			{Server: server.Next()},
		},
		Refused: 7, Refusal: lease.Event{Time: at, Detail: "address <x>"},
	}
	bare := lease.PoolStatus{
		Pool:    lease.Pool{ID: "p", Subnet: netip.MustParsePrefix("198.51.100.0/24")},
		InForce: lease.Options{Interface: "eth0"}, Servers: []lease.ServerStatus{{}},
	}
	none := `"lost":0,"rebinding":0,"releasing":0,"renewing":0,"waiting":0`
	for _, c := range []struct {
		pool lease.PoolStatus
		want string
	}{
		{full, `{"id":"192.0.2.0/24?id=A\u0026b","subnet":"192.0.2.0/24","range":"192.0.2.128/25","gateway":"192.0.2.1","mode":"relay",` +
			`"options":{"dhcp_server":"192.0.2.3","listen_port":"67"},"leases":{"bound":12,"lost":1,"rebinding":0,"releasing":0,"renewing":0,"waiting":0},"servers":[` +
			`{"server":"192.0.2.3","answered_at":"2026-01-02T03:04:05Z","took_ms":1.2,"silent_since":"2026-01-02T03:05:05Z","unanswered":2,"offers":3,"acks":4,"naks":5},` +
			`{"server":"192.0.2.4","answered_at":null,"took_ms":null,"silent_since":null,"unanswered":0,"offers":0,"acks":0,"naks":0}],` +
			`"refused":7,"last_refusal":{"at":"2026-01-02T03:04:05Z","detail":"address \u003cx\u003e"}}`},
		{bare, `{"id":"p","subnet":"198.51.100.0/24","range":null,"gateway":null,"mode":"broadcast","options":{"dhcp_interface":"eth0"},"leases":{"bound":0,` + none + `},"servers":[` +
			`{"server":null,"answered_at":null,"took_ms":null,"silent_since":null,"unanswered":0,"offers":0,"acks":0,"naks":0}],"refused":0,"last_refusal":null}`},
	} {
		if got, err := json.Marshal(presentPool(c.pool)); err != nil || string(got) != c.want {
			t.Errorf("%s, %v; want\n%s", got, err, c.want)
		}
	}
}

// The daemon lists its pools, or those that are named.
func TestPools(t *testing.T) {
	d := startDaemon(t, twoNetworks(), usual)
	for word, want := range map[string]int{"": 2, "a": 1, "192.0.2.0/24": 2, "192.0.2.9/24": 2, "192.0.2.0/25": 0, "c": 0} {
		got, err := Pools(t.Context(), d.socket, word)
		if err != nil || got == nil || len(got) != want {
			t.Errorf("%q: %+v, %v; want %d", word, got, err, want)
		}
		for _, p := range got {
			if p.Leases["bound"] == 0 || p.Gateway == nil || p.Gateway.String() != "192.0.2.1" {
				t.Errorf("%+v", p)
			}
		}
	}
	for query, status := range map[string]int{"?id=a": http.StatusBadRequest, "?pool=%zz": http.StatusBadRequest, "?pool=a": http.StatusOK} {
		if got := d.exchange("GET /v1/pools" + query + " HTTP/1.1\r\nHost: \r\n\r\n"); got.status != status {
			t.Errorf("%s: answers %d %s", query, got.status, got.body)
		}
	}
	if got := startDaemon(t, fakeStore{}, usual).exchange("GET /v1/pools HTTP/1.1\r\nHost: \r\n\r\n"); got.status != http.StatusOK || got.body != "[]" {
		t.Errorf("without pools: answers %d %s", got.status, got.body)
	}
}
