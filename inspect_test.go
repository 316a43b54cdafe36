package main

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/store"
)

// put changes the database of a daemon that doesn't run.
func put(t *testing.T, s settings, change lease.Change) {
	t.Helper()
	db, err := store.Open(s.dataDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{db.Commit(change), db.Close()} {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// otherLease is a second one of home's container, with options and an ID.
func otherLease() lease.Change {
	id := "198.51.100.0/24?conflict_interface=eth1&gateway=198.51.100.1&id=A"
	return lease.Change{
		PutPools: []lease.Pool{{
			ID: id, Subnet: netip.MustParsePrefix("198.51.100.0/24"), Gateway: netip.MustParseAddr("198.51.100.1"), Options: lease.Options{ConflictInterface: "eth1"},
		}},
		PutLeases: []lease.Lease{{
			Pool: id, MAC: lease.MAC{2, 0, 0, 0, 0, 10}, Name: "web", Container: strings.Repeat("c0ffee00", 8), ClientID: []byte{1, 2}, Prefix: netip.MustParsePrefix("198.51.100.10/24"),
			Server: netip.MustParseAddr("192.0.2.3"), Via: netip.MustParseAddrPort("192.0.2.3:67"), Obtained: time.Date(2026, 1, 2, 3, 4, 5, 5e8, time.UTC), // far from the next second: clocks are read
			Options: []byte{53, 1, 5, 54, 4, 192, 0, 2, 3, 51, 4, 255, 255, 255, 255, 1, 4, 255, 255, 255, 0, 3, 4, 198, 51, 100, 1, 6, 8, 198, 51, 100, 1, 198, 51, 100, 2},
		}},
		PutEvents: someEvents(id),
	}
}

// The whole way from the database: what users of the old wrapper read, and ours
// beside it.
func TestInspectOutput(t *testing.T) {
	cleanEnv(t)
	s := home(t)
	put(t, s, otherLease())
	stop := startServe(t, s)
	inspect := func(args ...string) outcome { return program(append([]string{"--socket", s.socket}, args...)...) }

	got := inspect("inspect", "c0ff")
	matchGolden(t, "inspect.json", got.stdout)
	for _, args := range [][]string{{"inspect", "198.51.100.10"}, {"inspect", "02-00-00-00-00-0a"}, {"inspect", "web", "--pool", "198.51.100.0/24"}, {"inspect", "--pool=198.51.100.0/24", "web"}} {
		if same := inspect(args...); same != got || same.status != 0 {
			t.Errorf("%q: %+v, want %+v", args, same, got)
		}
	}
	got = inspect("inspect-all")
	got.expect(t, 0)
	matchGolden(t, "inspect-all.json", got.stdout)

	inspect("inspect", "web").expect(t, 1, `"web"`, "several leases", "192.0.2.9 (02:00:00:00:00:09) of 192.0.2.0/24 in pool p", "198.51.100.10 (02:00:00:00:00:0a) of 198.51.100.0/24", "--pool", "address")
	inspect("inspect", "db").expect(t, 1, `"db"`, "no such lease", "oam-docker-ipam leases")
	inspect("inspect", "web", "--pool", "203.0.113.0/24").expect(t, 1, "203.0.113.0/24", "no such lease")
	inspect("inspect").expect(t, 1, "want one container")
	inspect("inspect", "").expect(t, 1, "want a container")
	inspect("inspect", "a", "b").expect(t, 1, "want one container")
	inspect("inspect-all", "web").expect(t, 1, "unexpected argument")
	if err := stop(); err != nil {
		t.Error(err)
	}
	inspect("inspect", "web").expect(t, 1, "not running", s.socket, "systemctl start")
	inspect("inspect-all").expect(t, 1, "not running")
	for _, name := range []string{"inspect", "inspect-all", "events"} {
		program("--config", "/nonexistent.conf", name, "web").expect(t, 1)
	}
}

// Without leases the list is empty, which is no error.
func TestInspectAllOfNone(t *testing.T) {
	cleanEnv(t)
	s := home(t)
	put(t, s, lease.Change{DropPools: []string{"p"}})
	stop := startServe(t, s)
	if got := program("--socket", s.socket, "inspect-all"); got != (outcome{0, "[]\n", ""}) {
		t.Errorf("%+v", got)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}
