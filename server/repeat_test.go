package server

import (
	"encoding/json"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// poolStore knows which pools there are.
type poolStore struct {
	fakeStore
	mu    sync.Mutex
	pools map[string]bool
}

func (s *poolStore) Commit(c lease.Change) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range c.DropPools {
		delete(s.pools, id)
	}
	for _, p := range c.PutPools {
		s.pools[p.ID] = true
	}
	return nil
}

func (s *poolStore) ids() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.pools))
}

const noSubnet = `{"AddressSpace":"talkingdata","Pool":"","SubPool":"","Options":{"dhcp_interface":"eth0"},"V6":false}`

// What engine 20.10 does at `docker network create` when the host has a route to
// the subnet that it gets: it asks again until that fails, then releases all
// that it got (libnetwork, network.requestPoolHelper).
func TestEngineThatTakesNoLearnedSubnet(t *testing.T) {
	store := &poolStore{pools: map[string]bool{}}
	d := startDaemon(t, store, usual)
	for range 2 { // the next creation is a new one
		var held []string
		var failed string
		for failed == "" && len(held) < 5 {
			var answer struct{ PoolID, Error string }
			got := d.post("/IpamDriver.RequestPool", noSubnet)
			if err := json.Unmarshal([]byte(got.body), &answer); err != nil || got.status != http.StatusOK {
				t.Fatalf("answers %d %s", got.status, got.body)
			}
			if failed = answer.Error; failed == "" {
				held = append(held, answer.PoolID)
			}
		}
		if len(held) != 1 || len(d.client.probed()) != 1 {
			t.Errorf("%d pools were made: %q", len(held), held)
		}
		for _, part := range []string{"--subnet 192.0.2.0/24 --gateway 192.0.2.1 ", "route", "from 27 on"} {
			if !strings.Contains(failed, part) {
				t.Errorf("no %q in: %s", part, failed)
			}
		}
		if ids := store.ids(); !slices.Equal(ids, held) {
			t.Errorf("stored are %q, the engine holds %q", ids, held)
		}
		for _, id := range held {
			d.call("/IpamDriver.ReleasePool", `{"PoolID":`+quote(id)+`}`, `{}`)
		}
		if ids := store.ids(); len(ids) != 0 {
			t.Errorf("left are %q", ids)
		}
	}
	// Released or not, what follows the error is asked anew.
	d.post("/IpamDriver.RequestPool", noSubnet)
	d.post("/IpamDriver.RequestPool", noSubnet)
	d.client.probed()
	if got := d.post("/IpamDriver.RequestPool", noSubnet); !strings.Contains(got.body, `"Pool":"192.0.2.0/24"`) || len(d.client.probed()) != 1 {
		t.Errorf("after the error: %s", got.body)
	}
	// The way out that the error tells.
	if got := d.post("/IpamDriver.RequestPool", `{"Pool":"192.0.2.0/24","Options":{"dhcp_interface":"eth0"}}`); !strings.Contains(got.body, `"Pool":"192.0.2.0/24"`) {
		t.Errorf("with --subnet: %s", got.body)
	}
}

func TestRepeats(t *testing.T) {
	const path = "/IpamDriver.RequestPool"
	type step struct {
		wait       time.Duration
		path, body string
	}
	again := step{0, path, noSubnet}
	for name, c := range map[string]struct {
		first   string
		between []step
		second  string
		refused bool
	}{
		"at once":               {noSubnet, nil, noSubnet, true},
		"after 2 s":             {noSubnet, []step{{wait: 2 * time.Second}}, noSubnet, true},
		"later":                 {noSubnet, []step{{wait: 2*time.Second + 1}}, noSubnet, false},
		"no options, null":      {`{}`, nil, `{"Pool":"","Options":null}`, true},
		"no options, none":      {`{}`, nil, `{"Pool":"","Options":{}}`, true},
		"an option more":        {noSubnet, nil, `{"Options":{"dhcp_interface":"eth0","probe":"on"}}`, false},
		"an option less":        {noSubnet, nil, `{}`, false},
		"another interface":     {noSubnet, nil, `{"Options":{"dhcp_interface":"eth1"}}`, false},
		"with subnet":           {`{"Pool":"192.0.2.0/24"}`, nil, `{"Pool":"192.0.2.0/24"}`, false},
		"with subnet, without":  {`{"Pool":"192.0.2.0/24"}`, nil, `{}`, false},
		"without subnet, with":  {`{}`, nil, `{"Pool":"192.0.2.0/24"}`, false},
		"one that failed":       {`{"Options":{"probe":"off"}}`, nil, `{"Options":{"probe":"off","on_lease_lost":"keep"}}`, false},
		"the third":             {noSubnet, []step{again}, noSubnet, false},
		"the fourth":            {noSubnet, []step{again, again}, noSubnet, true},
		"activation":            {noSubnet, []step{{0, "/Plugin.Activate", ""}}, noSubnet, true},
		"capabilities":          {noSubnet, []step{{0, "/IpamDriver.GetCapabilities", ""}}, noSubnet, true},
		"another network":       {noSubnet, []step{{0, "/IpamDriver.GetDefaultAddressSpaces", ""}}, noSubnet, false},
		"pool released":         {noSubnet, []step{{0, "/IpamDriver.ReleasePool", `{"PoolID":"x"}`}}, noSubnet, false},
		"address requested":     {noSubnet, []step{{0, "/IpamDriver.RequestAddress", `{"PoolID":"x"}`}}, noSubnet, false},
		"address released":      {noSubnet, []step{{0, "/IpamDriver.ReleaseAddress", `{"PoolID":"x"}`}}, noSubnet, false},
		"another pool":          {noSubnet, []step{{0, path, `{"Pool":"192.0.2.0/24"}`}}, noSubnet, false},
		"another, of no subnet": {noSubnet, []step{{0, path, `{}`}}, noSubnet, false},
		"IPv6":                  {noSubnet, nil, `{"Options":{"dhcp_interface":"eth0"},"V6":true}`, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				manager, client := newManager(t, fakeStore{})
				h := New(Backend{Manager: manager, Settings: noSettings}, drivers[0], slog.New(slog.DiscardHandler))
				post := func(path, body string) string {
					w := httptest.NewRecorder()
					h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, path, strings.NewReader(body)))
					return w.Body.String()
				}
				post(path, c.first)
				for _, s := range c.between {
					time.Sleep(s.wait)
					if s.path != "" {
						post(s.path, s.body)
					}
				}
				client.probed()
				got := post(path, c.second)
				if refused := strings.Contains(got, "from 27 on"); refused != c.refused || refused && len(client.probed()) != 0 {
					t.Errorf("answers %s", got)
				}
			})
		})
	}
}

// Each socket has an engine's driver of its own behind it.
func TestRepeatsOfAnotherDriver(t *testing.T) {
	manager, _ := newManager(t, fakeStore{})
	for _, as := range drivers {
		h := New(Backend{Manager: manager, Settings: noSettings}, as, slog.New(slog.DiscardHandler))
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/IpamDriver.RequestPool", strings.NewReader(`{"Options":{"dhcp_server":"192.0.2.3"}}`)))
		if !strings.Contains(w.Body.String(), `"Pool":"192.0.2.0/24"`) {
			t.Errorf("%s: %s", as.Name, w.Body)
		}
	}
}
