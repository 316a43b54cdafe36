package server

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

var errNoStart = errors.New(`configuration: DHCP_SERVERS="x": want addresses`)

const noStart = `oam-docker-ipam doesn't start: configuration: DHCP_SERVERS=\"x\": want addresses`

// refusing has a daemon refuse for its reason at both sockets, for longer than
// the test takes; stop ends it.
func refusing(t *testing.T) (sockets []held, stop func()) {
	t.Helper()
	passed := map[string]net.Listener{}
	for _, d := range drivers {
		socket := hold(t, d.Name+".sock")
		sockets = append(sockets, socket)
		passed[socket.path] = socket.pass()
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan bool)
	go func() { Refuse(ctx, passed, errNoStart, time.Hour); close(ended) }()
	stop = func() { cancel(); <-ended }
	t.Cleanup(stop)
	return sockets, stop
}

// What an engine learns at registration is true, whatever is wrong with the
// daemon: it asks only once. All else tells what is wrong.
func TestRefuseEngine(t *testing.T) {
	sockets, _ := refusing(t)
	for i, as := range drivers {
		d := &daemon{t: t, socket: sockets[i].path}
		d.call("/Plugin.Activate", "", `{"Implements":["IpamDriver"]}`)
		mac := map[bool]string{false: "true", true: "false"}[as.SharedMAC]
		d.call("/IpamDriver.GetCapabilities", "", `{"RequiresMACAddress":`+mac+`,"RequiresRequestReplay":false}`)
		d.call("/IpamDriver.GetDefaultAddressSpaces", "", `{"LocalDefaultAddressSpace":"`+as.Name+`","GlobalDefaultAddressSpace":"`+as.Name+`"}`)
		for _, path := range []string{"/IpamDriver.RequestPool", "/IpamDriver.ReleasePool", "/IpamDriver.RequestAddress", "/IpamDriver.ReleaseAddress"} {
			d.call(path, `{"PoolID":"a"}`, `{"Error":"`+noStart+`"}`)
			d.call(path, "", `{"Error":"`+noStart+`"}`)
		}
		got := d.post("/IpamDriver.RequestPool", "{}")
		if !got.closes || got.header.Get("Content-Type") != accept {
			t.Errorf("answers %+v", got)
		}
		if got := d.post("/NetworkDriver.GetCapabilities", ""); got.status != 404 {
			t.Errorf("answers %+v", got)
		}
	}
}

// Operators hear what is wrong as well, however much they have to say before.
func TestRefuseOperators(t *testing.T) {
	sockets, _ := refusing(t)
	want := "the daemon" + strings.TrimPrefix(strings.ReplaceAll(noStart, `\`, ""), "oam-docker-ipam")
	for _, socket := range sockets {
		_, leases := Leases(t.Context(), socket.path, Selection{})
		_, settings := Settings(t.Context(), socket.path)
		_, release := Release(t.Context(), socket.path, "192.0.2.7", "")
		_, reconcile := Reconcile(t.Context(), socket.path, lease.Inventory{Networks: make([]lease.Network, 50_000)}, true)
		for _, err := range []error{leases, settings, release, reconcile} {
			if err == nil || err.Error() != want {
				t.Errorf("error %v", err)
			}
		}
	}
}

// Who waited before is refused, who comes after the end waits for the next
// daemon, and the sockets stay.
func TestRefuseLeavesSockets(t *testing.T) {
	socket := hold(t, "talkingdata.sock")
	request := "POST /IpamDriver.RequestPool HTTP/1.1\r\nHost: \r\nContent-Length: 23\r\n\r\n" + `{"Pool":"192.0.2.0/24"}`
	call := func() net.Conn {
		conn := socket.dial()
		if _, err := io.WriteString(conn, request); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	early := call()
	in := watch(socket.pass())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan bool)
	go func() {
		Refuse(ctx, map[string]net.Listener{socket.path: in}, errNoStart, time.Hour)
		close(ended)
	}()
	<-in.in
	cancel()
	<-ended
	if got, err := io.ReadAll(early); err != nil || !strings.Contains(string(got), noStart) {
		t.Errorf("who waited gets %q, %v", got, err)
	}
	late := call()
	manager, _ := newManager(t, fakeStore{})
	stop := serve(socket.pass(), New(Backend{Manager: manager, Settings: noSettings}, drivers[0], slog.New(slog.DiscardHandler)))
	if got, err := io.ReadAll(late); err != nil || !strings.Contains(string(got), `"PoolID":"192.0.2.0/24`) {
		t.Errorf("who came later gets %q, %v", got, err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// A daemon that refuses ends after its time of patience, with its context, or
// at once where systemd holds nothing.
func TestRefuseEnds(t *testing.T) {
	for name, c := range map[string]struct {
		sockets int
		stopped time.Duration // after which the context ends
		after   time.Duration
	}{
		"patience":  {2, time.Hour, 2 * time.Second},
		"stopped":   {2, time.Second, time.Second},
		"no socket": {0, time.Hour, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sockets := map[string]net.Listener{}
				for _, d := range drivers[:c.sockets] {
					sockets[d.Name+".sock"] = newPipes()
				}
				ctx, cancel := context.WithTimeout(t.Context(), c.stopped)
				defer cancel()
				began := time.Now()
				Refuse(ctx, sockets, errNoStart, 2*time.Second)
				if took := time.Since(began); took != c.after {
					t.Errorf("ended after %s, want %s", took, c.after)
				}
			})
		})
	}
}

// The name of a socket's file is all that tells which driver it is.
func TestDriverOf(t *testing.T) {
	for path, want := range map[string]lease.Driver{
		"/run/docker/plugins/talkingdata.sock":        drivers[0],
		"/run/docker/plugins/talkingdata-ipvlan.sock": drivers[1],
		"/run/docker/plugins/ipvlan.sock":             {Name: "ipvlan"},
		"/run/x-ipvlan/lan":                           {Name: "lan"},
		"/run/docker/plugins/lan-ipvlan":              {Name: "lan-ipvlan", SharedMAC: true},
	} {
		if got := driverOf(path); got != want {
			t.Errorf("%s: %+v, want %+v", path, got, want)
		}
	}
}
