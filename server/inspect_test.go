package server

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

var update = flag.Bool("update", false, "write the golden files anew")

// fakeOptions has each byte stand for an option.
func fakeOptions(raw []byte) (options []lease.ReceivedOption) {
	known := map[uint8]lease.ReceivedOption{
		1:  {Code: 1, Name: "subnet mask", Value: "255.255.255.0"},
		3:  {Code: 3, Name: "router", Value: "192.0.2.254,192.0.2.253"},
		6:  {Code: 6, Name: "domain name server", Value: "192.0.2.1,192.0.2.2"},
		7:  {Code: 6, Name: "domain name server", Value: "c0:00:02"}, // malformed
		15: {Code: 15, Name: "domain name", Value: "example.org\x1b[2J<b>&\u009b\u202e\"\n"},
	}
	for _, code := range raw {
		options = append(options, known[code])
	}
	return options
}

// eventStore is a fakeStore that remembers events and pending releases.
type eventStore struct {
	fakeStore
	bindings []lease.Binding

	mu     sync.Mutex
	events []lease.Event
	broken error
}

func (s *eventStore) Load() (lease.Saved, error) {
	saved, err := s.fakeStore.Load()
	saved.Bindings = s.bindings
	return saved, err
}

func (s *eventStore) Commit(c lease.Change) error {
	s.put(c.PutEvents...)
	return nil
}

func (s *eventStore) put(events ...lease.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range events {
		e.Seq = uint64(len(s.events)) + 1
		s.events = append(s.events, e)
	}
}

func (s *eventStore) Events(after uint64) ([]lease.Event, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.events[min(after, uint64(len(s.events))):]), s.broken
}

var at2026 = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// webLease is one of which everything is known.
func webLease() lease.Held {
	l := storedLease("192.0.2.0/24?gateway=192.0.2.1&id=A", "192.0.2.50/24", mac1)
	l.Container, l.Options = strings.Repeat("c0ffee00", 8), []byte{1, 3, 6, 15}
	l.Obtained, l.Renew, l.Rebind, l.Expires = at2026, at2026.Add(30*time.Minute), at2026.Add(52*time.Minute), at2026.Add(time.Hour)
	return lease.Held{Lease: l, Subnet: netip.MustParsePrefix("192.0.2.0/24"), State: "bound"}
}

// The form, which programs read: all values of NetworkSettings are texts, and
// nothing is null but the times of an infinite lease.
func TestInspectionForm(t *testing.T) {
	full := webLease()
	pool := lease.PoolStatus{
		Pool:    lease.Pool{ID: full.Pool, Subnet: full.Subnet, Gateway: netip.MustParseAddr("192.0.2.1")},
		InForce: lease.Options{Interface: "eth0", ConflictInterface: "eth1"},
	}
	bare := lease.Held{
		Lease:  lease.Lease{Pool: "gone", MAC: mac2, Prefix: netip.MustParsePrefix("198.51.100.7/28"), Server: serverAddr, Obtained: at2026},
		Subnet: netip.MustParsePrefix("198.51.100.0/28"), State: lease.Releasing,
	}
	told := []Inspection{describe(full, pool, fakeOptions(full.Options)), describe(bare, lease.PoolStatus{}, nil)}
	told[0].Lease.History = []lease.Event{
		{Seq: 7, Time: at2026, Kind: lease.EventGranted, Pool: full.Pool, Address: full.Addr(), MAC: mac1, Name: "web", Server: serverAddr, Detail: "until 05:04:05"},
		{Seq: 9, Time: at2026.Add(time.Minute), Kind: lease.EventConflict, Pool: full.Pool},
	}
	told[1].Lease.History = []lease.Event{}
	got, err := json.MarshalIndent(told, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join("testdata", "inspect.json")
	if *update {
		if err := os.WriteFile(file, append(got, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil || string(got)+"\n" != string(want) {
		t.Errorf("%s differs (write it anew with -update), %v:\n%s", file, err, got)
	}
}

// What the first part says where not everything is known.
func TestInspectionFallbacks(t *testing.T) {
	gateway := lease.PoolStatus{Pool: lease.Pool{Gateway: netip.MustParseAddr("192.0.2.1")}}
	conflict := lease.PoolStatus{InForce: lease.Options{ConflictInterface: "eth1"}}
	for name, c := range map[string]struct {
		change                          func(*lease.Held)
		pool                            lease.PoolStatus
		container, bridge, gateway, dns string
	}{
		"all":                 {func(*lease.Held) {}, gateway, "web", "", "192.0.2.1", "192.0.2.1, 192.0.2.2"},
		"no name":             {func(l *lease.Held) { l.Name = "" }, gateway, strings.Repeat("c0ffee00", 8), "", "192.0.2.1", "192.0.2.1, 192.0.2.2"},
		"no name, no ID":      {func(l *lease.Held) { l.Name, l.Container = "", "" }, gateway, mac1.String(), "", "192.0.2.1", "192.0.2.1, 192.0.2.2"},
		"no pool":             {func(*lease.Held) {}, lease.PoolStatus{}, "web", "", "192.0.2.254", "192.0.2.1, 192.0.2.2"},
		"conflict interface":  {func(*lease.Held) {}, conflict, "web", "eth1", "192.0.2.254", "192.0.2.1, 192.0.2.2"},
		"no options, no pool": {func(l *lease.Held) { l.Options = nil }, lease.PoolStatus{}, "web", "", "", ""},
		"malformed DNS":       {func(l *lease.Held) { l.Options = []byte{7} }, gateway, "web", "", "192.0.2.1", ""},
		"two options of DNS":  {func(l *lease.Held) { l.Options = []byte{6, 7, 6} }, gateway, "web", "", "192.0.2.1", "192.0.2.1, 192.0.2.2, 192.0.2.1, 192.0.2.2"},
	} {
		l := webLease()
		c.change(&l)
		got := describe(l, c.pool, fakeOptions(l.Options))
		want := NetworkSettings{HWAddr: mac1.String(), Bridge: c.bridge, IPAddress: "192.0.2.50", IPPrefixLen: "24", Gateway: c.gateway, DNS: c.dns}
		if got.Container != c.container || got.NetworkSettings != want {
			t.Errorf("%s: %q, %+v; want %q, %+v", name, got.Container, got.NetworkSettings, c.container, want)
		}
	}
}

// Which events are a lease's: those of its network and of its MAC, address or
// name, each once, the last ones, the oldest first.
func TestHistories(t *testing.T) {
	subnet := netip.MustParsePrefix("192.0.2.0/24")
	l := lease.Held{Lease: lease.Lease{Pool: "a", MAC: mac1, Name: "web", Prefix: netip.MustParsePrefix("192.0.2.50/24")}, Subnet: subnet}
	nameless := lease.Held{Lease: lease.Lease{Pool: "a", MAC: lease.MAC{2}, Prefix: netip.MustParsePrefix("192.0.2.60/24")}, Subnet: subnet}
	pools := map[string]lease.PoolStatus{"a": {}, "b": {}, "adopted": {Pool: lease.Pool{Adopted: true}}}
	addr := l.Addr()
	for name, c := range map[string]struct {
		event lease.Event
		want  bool
	}{
		"MAC":                                  {lease.Event{Pool: "a", MAC: mac1}, true},
		"MAC, other address":                   {lease.Event{Pool: "a", MAC: mac1, Address: addr.Next()}, true},
		"address of another MAC":               {lease.Event{Pool: "a", MAC: mac2, Address: addr}, true},
		"name":                                 {lease.Event{Pool: "a", Name: "web"}, true},
		"other":                                {lease.Event{Pool: "a", MAC: mac2, Name: "db", Address: addr.Next()}, false},
		"of nobody":                            {lease.Event{Pool: "a", Server: serverAddr}, false},
		"another network":                      {lease.Event{Pool: "b", MAC: mac1, Name: "web", Address: addr}, false},
		"adopted before":                       {lease.Event{Pool: "adopted", MAC: mac1, Address: addr}, true},
		"network that is gone":                 {lease.Event{Pool: "gone", MAC: mac1, Address: addr}, true},
		"network that is gone, another subnet": {lease.Event{Pool: "gone", MAC: mac1, Address: netip.MustParseAddr("198.51.100.1")}, false},
		"network that is gone, no address":     {lease.Event{Pool: "gone", MAC: mac1}, false},
	} {
		c.event.Seq = 1
		got := histories([]lease.Held{nameless, l}, pools, []lease.Event{c.event})
		if has := len(got[1]) == 1; has != c.want || len(got[0]) != 0 {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}

	var events []lease.Event
	for seq := range uint64(3 * maxHistory) {
		e := lease.Event{Seq: seq + 1, Pool: "a", MAC: mac1, Address: addr, Name: "web"}
		if seq%2 == 0 {
			e.MAC, e.Name, e.Address = nameless.MAC, "", nameless.Addr()
		}
		events = append(events, e)
	}
	for i, history := range histories([]lease.Held{nameless, l}, pools, events) {
		if len(history) != maxHistory {
			t.Fatalf("lease %d has %d events, want %d", i, len(history), maxHistory)
		}
		for n, e := range history {
			if want := uint64(2*(maxHistory/2+n) + 1 + i); e.Seq != want {
				t.Errorf("lease %d: event %d is %d, want %d", i, n, e.Seq, want)
			}
		}
	}
}

// someLeases are of three containers in two networks, one of them in both.
func someLeases() *eventStore {
	s := &eventStore{fakeStore: twoNetworks()}
	for i, l := range s.leases {
		l.Container = fmt.Sprintf("cafe%060d", i/2)
		s.leases[i] = l
	}
	s.leases[1].Name = "cafe" // 192.0.2.9
	third := storedLease("c", "198.51.100.4/24", lease.MAC{2, 0x42, 0, 0, 0, 3})
	third.Name, third.Container = "192.0.2.9", strings.Repeat("beef", 16)
	s.pools = append(s.pools, lease.Pool{ID: "c", Subnet: third.Prefix.Masked()})
	s.leases = append(s.leases, third)
	left := storedLease("gone", "203.0.113.9/24", lease.MAC{2, 0x42, 0, 0, 0, 4})
	left.Name = "left"
	s.bindings = []lease.Binding{{Lease: left, Left: time.Now()}}
	return s
}

// Whom an operator's word means, and what is said where that isn't one lease.
func TestInspect(t *testing.T) {
	s := someLeases()
	d := startDaemon(t, s, usual)
	for word, want := range map[string]string{
		"198.51.100.4":                           "198.51.100.4",
		"beefbeef":                               "198.51.100.4",
		"beef":                                   "198.51.100.4",
		strings.Repeat("beef", 16):               "198.51.100.4",
		"02-42-00-00-00-03":                      "198.51.100.4",
		"0242.0000.0003":                         "198.51.100.4",
		"cafe":                                   "192.0.2.9", // a name beats the start of an ID
		mac2.String():                            "192.0.2.9",
		"left":                                   "203.0.113.9",
		"203.0.113.9":                            "203.0.113.9",
		"192.0.2.50 a":                           "192.0.2.50",
		"web b":                                  "192.0.2.50",
		"192.0.2.9 198.51.100.0/24":              "198.51.100.4", // a container that is called so
		"192.0.2.9 192.0.2.0/24":                 "192.0.2.9",
		"192.0.2.9 192.0.2.77/24":                "192.0.2.9",
		"02:42:00:00:00:04 203.0.113.0/24":       "203.0.113.9",
		fmt.Sprintf("cafe%060d 192.0.2.0/24", 1): "192.0.2.50",
		fmt.Sprintf("cafe%059d", 0)[:63] + " nix": "",
	} {
		word, pool, _ := strings.Cut(word, " ")
		got, err := Inspect(t.Context(), d.socket, word, pool)
		if want == "" {
			if err == nil {
				t.Errorf("%s: %+v", word, got)
			}
			continue
		}
		if err != nil || got.NetworkSettings.IPAddress != want || got.Lease.Address.String() != want {
			t.Errorf("%s in %q: %+v, %v; want %s", word, pool, got, err, want)
		}
	}
	if got, err := Inspect(t.Context(), d.socket, "left", ""); err != nil || got.Lease.State != lease.Releasing || got.Lease.Subnet.String() != "203.0.113.0/24" {
		t.Errorf("a pending release: %+v, %v", got, err)
	}
	for _, c := range []struct {
		word, pool string
		says       []string
	}{
		{"web", "", []string{"several leases", "192.0.2.50 (02:42:00:00:00:01) of 192.0.2.0/24 in pool a", "in pool b", "--pool", "address"}},
		{"192.0.2.50", "192.0.2.0/24", []string{"several leases", "in pool a", "in pool b"}},
		{"192.0.2.9", "", []string{"several leases", "192.0.2.9 (", "198.51.100.4 ("}},
		{fmt.Sprintf("cafe%056d", 0), "", []string{"several leases", "192.0.2.9", "in pool a", "in pool b"}},
		{"db", "", []string{`"db"`, "no such lease", "oam-docker-ipam leases"}},
		{"bee", "", []string{"no such lease"}}, // too short for an ID
		{"BEEF", "", []string{"no such lease"}},
		{"web", "c", []string{`"web" in pool "c"`, "no such lease"}},
		{"web", "192.0.2.0/25", []string{"no such lease"}},
		{"", "", []string{"want a container's name"}},
		{"..", "", []string{"no such lease"}},
		{"a/../b?pool=a#%2e", "", []string{`"a/../b?pool=a#%2e"`, "no such lease"}},
		{"ä\x00\n", "", []string{`"ä\x00\n"`, "no such lease"}},
	} {
		got, err := Inspect(t.Context(), d.socket, c.word, c.pool)
		for _, part := range c.says {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%q in %q: %+v, error %v lacks %q", c.word, c.pool, got, err, part)
			}
		}
	}
	s.broken = errors.New("disk on fire")
	if _, err := Inspect(t.Context(), d.socket, "beef", ""); err == nil || !strings.Contains(err.Error(), "disk on fire") {
		t.Errorf("error %v", err)
	}
	if _, err := InspectAll(t.Context(), d.socket); err == nil || !strings.Contains(err.Error(), "disk on fire") {
		t.Errorf("error %v", err)
	}
}

// All of them, sorted, each as it is alone; hostile texts come through whole.
func TestInspectAll(t *testing.T) {
	s := someLeases()
	const hostile = "\"]}, {\x1b[2J\x00\n</script>\u202e'"
	s.leases[0].Options = []byte{15, 6}
	s.put(
		lease.Event{Time: at2026, Kind: lease.EventGranted, Pool: "a", Address: netip.MustParseAddr("192.0.2.9"), MAC: mac2, Detail: hostile},
		lease.Event{Time: at2026, Kind: lease.EventRenewed, Pool: "b", Address: netip.MustParseAddr("192.0.2.50"), MAC: mac1, Name: "web"},
	)
	d := startDaemon(t, s, usual)
	all, err := InspectAll(t.Context(), d.socket)
	if err != nil || len(all) != 5 {
		t.Fatalf("%+v, %v", all, err)
	}
	for i, want := range []string{"192.0.2.9", "192.0.2.50", "192.0.2.50", "198.51.100.4", "203.0.113.9"} {
		if all[i].NetworkSettings.IPAddress != want {
			t.Errorf("lease %d is %s, want %s", i, all[i].NetworkSettings.IPAddress, want)
		}
		alone, err := Inspect(t.Context(), d.socket, all[i].Lease.MAC.String(), all[i].Lease.PoolID)
		if a, b := fmt.Sprintf("%+v", alone.Lease.History), fmt.Sprintf("%+v", all[i].Lease.History); err != nil || a != b {
			t.Errorf("lease %d alone: %v, %s; among all %s", i, err, a, b)
		}
	}
	if got := all[0].Lease.History; len(got) != 1 || got[0].Detail != hostile {
		t.Errorf("history %+v", got)
	}
	if got := all[1].Lease; len(got.History) != 0 || len(got.Options) != 2 || got.Options[0] != fakeOptions([]byte{15})[0] {
		t.Errorf("%+v", got)
	}
	if got := all[2].Lease.History; len(got) != 1 || got[0].Kind != lease.EventRenewed {
		t.Errorf("history %+v", got)
	}
	raw := d.exchange("GET /v1/inspect HTTP/1.1\r\nHost: \r\n\r\n")
	if raw.status != http.StatusOK || raw.header.Get("Content-Type") != mediaType || strings.Contains(raw.body, "null,\"history") || strings.Contains(raw.body, "\"history\":null") || strings.Contains(raw.body, "\"options\":null") {
		t.Errorf("%d %v %s", raw.status, raw.header, raw.body)
	}
}

// Without leases the list is empty, not null.
func TestInspectAllOfNone(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	if got := d.exchange("GET /v1/inspect HTTP/1.1\r\nHost: \r\n\r\n"); got.status != 200 || got.body != "[]" {
		t.Errorf("answers %d %s", got.status, got.body)
	}
	if got, err := InspectAll(t.Context(), d.socket); err != nil || got == nil || len(got) != 0 {
		t.Errorf("%v, %v", got, err)
	}
}

// crowd has 10,000 leases of 20 networks, and full rings of events.
func crowd() *eventStore {
	s := new(eventStore)
	for n := range 10_000 {
		subnet := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(n / 500 * 2), 0}), 23)
		id := subnet.String() + "?dhcp_server=198.51.100.1&gateway=192.0.2.1&id=3KDPZ5XEQ7NJ32KA7OOKOPXECQ"
		if n%500 == 0 {
			s.pools = append(s.pools, lease.Pool{ID: id, Subnet: subnet, Gateway: subnet.Addr().Next()})
		}
		addr := netip.AddrFrom4([4]byte{10, 0, byte(n/500*2 + n%500/250), byte(2 + n%250)})
		l := storedLease(id, netip.PrefixFrom(addr, 23).String(), lease.MAC{2, 0x42, 0, 0, byte(n >> 8), byte(n)})
		l.Name, l.Container, l.Options = fmt.Sprintf("container-%05d", n), fmt.Sprintf("%064x", n), []byte{1, 3, 6, 15}
		s.leases = append(s.leases, l)
	}
	for n := range 2 * lease.MaxEvents {
		l := s.leases[n%len(s.leases)]
		kind := lease.EventRenewed
		if n%2 == 0 {
			kind = lease.EventGranted
		}
		s.put(lease.Event{Time: at2026, Kind: kind, Pool: l.Pool, Address: l.Addr(), MAC: l.MAC, Name: l.Name, Server: l.Server, Detail: "until 2026-03-01 13:00:00"})
	}
	return s
}

// All of 10,000 leases with full rings, through a socket, read as programs do.
func BenchmarkInspectAll(b *testing.B) {
	d := startDaemon(b, crowd(), usual)
	b.ReportAllocs()
	for b.Loop() {
		if all, err := InspectAll(b.Context(), d.socket); err != nil || len(all) != 10_000 {
			b.Fatal(len(all), err)
		}
	}
}

// One of as many.
func BenchmarkInspect(b *testing.B) {
	d := startDaemon(b, crowd(), usual)
	b.ReportAllocs()
	for b.Loop() {
		if got, err := Inspect(b.Context(), d.socket, "container-00500", ""); err != nil || len(got.Lease.History) != 2 {
			b.Fatal(got, err)
		}
	}
}
