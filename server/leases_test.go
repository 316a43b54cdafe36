package server

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// inSomeStates are leases sorted by address, as a Manager lists them.
func inSomeStates() []lease.Held {
	var held []lease.Held
	for _, l := range twoNetworks().leases {
		held = append(held, lease.Held{Lease: l, State: "bound"})
	}
	held[0], held[1] = held[1], held[0]
	for i, l := range []struct {
		name, state string
		end         time.Duration
	}{
		{"db", "lost", -time.Hour},
		{"web-1", "rebinding", 3 * time.Hour},
		{"web-2", "renewing", 2 * time.Hour},
	} {
		n := byte(98 + i)
		stored := storedLease("a", fmt.Sprintf("192.0.2.%d/24", n), lease.MAC{2, 0, 0, 0, 0, n})
		stored.Name, stored.Expires = l.name, time.Now().Add(l.end)
		held = append(held, lease.Held{Lease: stored, State: l.state})
	}
	for i := range held {
		held[i].Subnet = held[i].Prefix.Masked()
	}
	return held
}

// Leases are chosen and put in order as was asked, and the words for it are
// those of the question.
func TestSelection(t *testing.T) {
	for _, c := range []struct {
		query string
		want  string // addresses' last numbers
		words string
	}{
		{"", "9 50 50 98 99 100", ""},
		{"address=192.0.2.50", "50 50", "address 192.0.2.50"},
		{"address=192.0.2.51", "", "address 192.0.2.51"},
		{"mac=02-00-00-00-00-63", "99", "mac 02-00-00-00-00-63"},
		{"name=db", "98", "name db"},
		{"name=web", "50 50", "name web"},
		{"name=web-*", "99 100", "name web-*"},
		{"name=web-?", "99 100", "name web-?"},
		{"name=?e*[0-1]", "99", "name ?e*[0-1]"},
		{"name=", "9", "name "},
		{"name=WEB", "", "name WEB"},
		{"pool=b", "50", "pool b"},
		{"pool=192.0.2.0/24", "9 50 50 98 99 100", "pool 192.0.2.0/24"},
		{"pool=192.0.2.7/24", "9 50 50 98 99 100", "pool 192.0.2.7/24"},
		{"pool=192.0.2.0/25", "", "pool 192.0.2.0/25"},
		{"state=lost", "98", "state lost"},
		{"state=lost&state=renewing", "98 100", "state lost or renewing"},
		{"state=releasing&state=waiting", "", "state releasing or waiting"},
		{"state=bound&name=web&pool=a", "50", "name web and pool a and state bound"},
		{"sort=address", "9 50 50 98 99 100", ""},
		{"sort=state", "98 99 100 9 50 50", ""},
		{"sort=name", "98 50 50 99 100 9", ""},
		{"sort=mac", "98 99 100 50 50 9", ""},
		{"sort=expires&pool=a", "98 50 100 99 9", "pool a"},
	} {
		values, err := url.ParseQuery(c.query)
		if err != nil {
			t.Fatal(err)
		}
		wanted, err := ParseSelection(values)
		if err != nil {
			t.Errorf("%s: %v", c.query, err)
			continue
		}
		var got []string
		held := slices.DeleteFunc(inSomeStates(), func(l lease.Held) bool { return !wanted.fits(l) })
		wanted.sort(held)
		for _, l := range held {
			got = append(got, strings.TrimPrefix(l.Addr().String(), "192.0.2."))
		}
		if strings.Join(got, " ") != c.want || wanted.String() != c.words || wanted.All() != (c.words == "") {
			t.Errorf("%s: %s, %q; want %s, %q", c.query, got, wanted, c.want, c.words)
		}
	}
}

// The daemon chooses.
func TestSelectedLeases(t *testing.T) {
	d := startDaemon(t, twoNetworks(), usual)
	wanted, err := ParseSelection(url.Values{"pool": {"b"}, "address": {"192.0.2.50", "192.0.2.9"}})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Leases(t.Context(), d.socket, wanted); err != nil || len(got) != 1 || got[0].PoolID != "b" {
		t.Errorf("%+v, %v", got, err)
	}
	got := d.exchange("GET /v1/leases?sort=name&address=192.0.2.50&address=192.0.2.9&pool=a HTTP/1.1\r\nHost: \r\n\r\n")
	if web, nameless := strings.Index(got.body, "192.0.2.50"), strings.Index(got.body, "192.0.2.9"); got.status != http.StatusOK || web < 0 || nameless < web {
		t.Errorf("answers %d %s", got.status, got.body)
	}
}

// What a selection can't have is refused, with what it could, on either side of
// the socket.
func TestSelectionErrors(t *testing.T) {
	d := startDaemon(t, twoNetworks(), usual)
	for query, parts := range map[string][]string{
		"state=expired":          {`"expired"`, "lost, rebinding, renewing, waiting, releasing, bound"},
		"state=lost&state=Lost":  {`"Lost"`},
		"sort=age":               {`"age"`, "address, expires, mac, name, state"},
		"sort=":                  {`""`, "address"},
		"mac=02:00":              {`"02:00"`, "six bytes"},
		"mac=":                   {`""`, "six bytes"},
		"address=192.0.2.300":    {`"192.0.2.300"`, "IPv4"},
		"address=fd00::1":        {`"fd00::1"`, "IPv4"},
		"address=web":            {`"web"`, "name"},
		"name=web[*":             {`"web[*"`, "pattern"},
		"limit=5":                {`"limit"`, "address, mac, name, pool, state and sort"},
		"State=lost":             {`"State"`},
		"state=lost;state=bound": nil,
		"state=%zz":              nil,
	} {
		got := d.exchange("GET /v1/leases?" + query + " HTTP/1.1\r\nHost: \r\n\r\n")
		if got.status != http.StatusBadRequest {
			t.Errorf("%s: answers %d %s", query, got.status, got.body)
		}
		values, err := url.ParseQuery(query)
		if err == nil {
			_, err = ParseSelection(values)
		}
		for _, part := range parts {
			if err == nil || !strings.Contains(err.Error(), part) || !strings.Contains(got.body, strings.ReplaceAll(part, `"`, `\"`)) {
				t.Errorf("%s: error %v, answer %s: no %s", query, err, got.body, part)
			}
		}
	}
}

// A pool's subnet will do to release a lease, where it tells one pool.
func TestReleaseInSubnet(t *testing.T) {
	s := twoNetworks()
	s.pools[1].Subnet = netip.MustParsePrefix("198.51.100.0/24")
	s.leases[2].Prefix = netip.MustParsePrefix("198.51.100.50/24")
	d := startDaemon(t, s, usual)
	if _, err := Release(t.Context(), d.socket, mac1.String(), ""); err == nil || !strings.Contains(err.Error(), "several leases") {
		t.Errorf("in any pool: %v", err)
	}
	if _, err := Release(t.Context(), d.socket, mac1.String(), "192.0.2.0/25"); err == nil || !strings.Contains(err.Error(), "no such lease") {
		t.Errorf("in no pool: %v", err)
	}
	if got, err := Release(t.Context(), d.socket, mac1.String(), "198.51.100.0/24"); err != nil || got.PoolID != "b" {
		t.Errorf("%+v, %v", got, err)
	}

	d = startDaemon(t, twoNetworks(), usual)
	_, err := Release(t.Context(), d.socket, mac1.String(), "192.0.2.0/24")
	for _, part := range []string{"several pools", "192.0.2.0/24", "a; b"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("in two pools: %v, no %q", err, part)
		}
	}
	if n := len(d.manager.Leases()); n != 3 {
		t.Errorf("%d leases remain of 3", n)
	}
}

// manyLeases are n bound leases of one pool.
func manyLeases(n int) fakeStore {
	const id = "10.0.0.0/8?dhcp_server=10.0.0.1&gateway=10.0.0.1&id=4TZ7NQ6KJ2WX3MRSDFHB5GVYCP"
	s := fakeStore{pools: []lease.Pool{{ID: id, Subnet: netip.MustParsePrefix("10.0.0.0/8"), Gateway: netip.MustParseAddr("10.0.0.1")}}}
	for i := range n {
		hi, lo := byte(i>>8), byte(i)
		l := storedLease(id, fmt.Sprintf("10.1.%d.%d/8", hi, lo), lease.MAC{2, 0, 0, 0, hi, lo})
		l.Name = fmt.Sprintf("web-%d", i)
		s.leases = append(s.leases, l)
	}
	return s
}

// Asking for 10,000 leases, or for one of them, through a socket; and what the
// daemon has of that work.
func BenchmarkLeases(b *testing.B) {
	d := startDaemon(b, manyLeases(10_000), usual)
	for name, values := range map[string]url.Values{
		"all": nil, "one": {"address": {"10.1.3.7"}}, "sorted": {"sort": {"name"}}, "pattern": {"name": {"web-9*7"}},
	} {
		wanted, err := ParseSelection(values)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if leases, err := Leases(b.Context(), d.socket, wanted); err != nil || len(leases) == 0 {
					b.Fatalf("%d leases, %v", len(leases), err)
				}
			}
		})
		b.Run(name+"/daemon", func(b *testing.B) {
			b.ReportAllocs()
			h := New(Backend{Manager: d.manager}, drivers[0], slog.New(slog.DiscardHandler))
			var size int
			for b.Loop() {
				w := httptest.NewRecorder()
				h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, leasesPath+"?"+values.Encode(), nil))
				size = w.Body.Len()
			}
			b.ReportMetric(float64(size), "answer-B")
		})
	}
}
