package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/store"
)

// Docker calls a plugin by its socket's name.
func TestSocketsOfDrivers(t *testing.T) {
	for _, c := range []struct{ name, socket, want string }{
		{"talkingdata", "/run/docker/plugins/talkingdata.sock", "/run/docker/plugins/talkingdata-ipvlan.sock"},
		{"dhcp", "/x/foo.sock", "/x/foo-ipvlan.sock"},
		{"dhcp", "/x.y/foo", "/x.y/foo-ipvlan"},
		{"a.b", "/x/a.b.sock", "/x/a.b-ipvlan.sock"},
	} {
		s := settings{driver: c.name, socket: c.socket}
		drivers := lease.Drivers(c.name)
		if first, second := s.socketOf(drivers[0]), s.socketOf(drivers[1]); first != c.socket || second != c.want {
			t.Errorf("%s, %s: %s and %s, want %s", c.name, c.socket, first, second, c.want)
		}
	}
}

// second is the socket of home's other driver.
func (s settings) second() string { return s.socketOf(lease.Drivers(s.driver)[1]) }

// plugin posts a call without arguments.
func plugin(t *testing.T, socket, path string, answer any) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	response, err := client.Post("http://plugin/"+path, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if err := json.NewDecoder(response.Body).Decode(answer); err != nil {
		t.Fatal(err)
	}
}

func TestServeBothDrivers(t *testing.T) {
	cleanEnv(t)
	s := home(t)
	// A crash left it.
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.second(), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	stop := startServe(t, s)
	for socket, want := range map[string]bool{s.socket: true, s.second(): false} {
		var capabilities struct{ RequiresMACAddress bool }
		plugin(t, socket, "IpamDriver.GetCapabilities", &capabilities)
		if capabilities.RequiresMACAddress != want {
			t.Errorf("%s: %+v", socket, capabilities)
		}
		if info, err := os.Stat(socket); err != nil || info.Mode() != fs.ModeSocket|0o600 {
			t.Errorf("%s: %v, %v", socket, info, err)
		}
		program("--socket", socket, "leases").expect(t, 0, "192.0.2.9")
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	for _, socket := range []string{s.socket, s.second()} {
		if _, err := os.Stat(socket); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", socket, err)
		}
	}
}

// Both sockets or none: with one of them, the engine would find half a driver.
func TestServeNeedsBothSockets(t *testing.T) {
	cleanEnv(t)
	s := home(t)
	served, err := net.Listen("unix", s.second())
	if err != nil {
		t.Fatal(err)
	}
	err = newDaemon(s, io.Discard).run(t.Context(), s)
	if err == nil || !strings.Contains(err.Error(), s.second()) || !strings.Contains(err.Error(), "another process") {
		t.Errorf("beside another process: %v", err)
	}
	if _, err := os.Stat(s.socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the first socket is left: %v", err)
	}
	served.Close()
	stop := startServe(t, s)
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// A reconcile that saw one driver's networks only would release the other's
// leases.
func TestReconcileBothDrivers(t *testing.T) {
	cleanEnv(t)
	s := home(t)
	db, err := store.Open(s.dataDir)
	if err != nil {
		t.Fatal(err)
	}
	subnet := netip.MustParsePrefix("198.51.100.0/24")
	err = db.Commit(lease.Change{
		PutPools: []lease.Pool{{ID: "q", Subnet: subnet, Gateway: subnet.Addr().Next(), SharedMAC: true}},
		PutLeases: []lease.Lease{{
			Pool: "q", MAC: lease.MAC{2, 0, 0, 0, 0, 7}, ClientID: []byte{1, 7}, Prefix: netip.MustParsePrefix("198.51.100.7/24"),
			Server: netip.MustParseAddr("192.0.2.3"), Via: netip.MustParseAddrPort("192.0.2.3:67"),
		}},
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	stop := startServe(t, s)
	e := startEngine(t)
	e.has(web)
	reconcile := func(args ...string) outcome {
		return program(append([]string{"--socket", s.socket, "--docker", e.host, "reconcile"}, args...)...)
	}
	e.hasFlat(`"e4f5":{"Name":"cache","MacAddress":"","IPv4Address":"198.51.100.7/24"}`)
	reconcile().expect(t, 0, "named", "198.51.100.7", "cache", "flat", "192.0.2.9")
	reconcile().expect(t, 0, "leases and containers agree\n")
	e.hasFlat(`"e4f5":{"Name":"cache","MacAddress":"","IPv4Address":"198.51.100.8/24"}`)
	reconcile("--dry-run").expect(t, 2, "adopted", "198.51.100.8", "missed", "198.51.100.7", "02:00:00:00:00:07")
	if err := stop(); err != nil {
		t.Error(err)
	}
}
