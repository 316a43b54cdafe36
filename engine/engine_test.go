package engine

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// leaseOf is the lease of an attachment, with or without the container's ID.
func leaseOf(a lease.Attachment, id string) lease.Lease {
	return lease.Lease{Container: id, Name: a.Name, MAC: a.MAC, Prefix: a.Prefix}
}

func TestStopAndRestart(t *testing.T) {
	moved := leaseOf(atWeb, web)
	moved.MAC = atDB.MAC
	renamed := leaseOf(atWeb, "")
	renamed.Name = "db" // a name says nothing
	stopped := leaseOf(lease.Attachment{MAC: atWeb.MAC, Prefix: netip.MustParsePrefix("10.10.0.130/24")}, "")
	for _, test := range []struct {
		name  string
		lease lease.Lease
		want  string // container; "" for an error that says says
		says  string
	}{
		{"by ID", leaseOf(atWeb, web), web, ""},
		{"by address and MAC", leaseOf(atDB, ""), db, ""},
		{"another name", renamed, web, ""},
		{"dual stack", leaseOf(atSix, ""), six, ""},
		{"ID of another container", leaseOf(atWeb, db), "", "container " + db},
		{"container with another MAC now", moved, "", atDB.MAC.String()},
		{"container is gone", leaseOf(atWeb, strings.Repeat("0", 64)), "", "doesn't run"},
		{"address of nobody", stopped, "", "no running container has address 10.10.0.130"},
	} {
		for _, act := range []struct {
			verb string
			call func(*Engine, context.Context, lease.Lease) error
		}{{"stop", (*Engine).Stop}, {"restart", (*Engine).Restart}} {
			f := newFake(t)
			err := act.call(f.engine(), t.Context(), test.lease)
			if test.want == "" {
				mentions(t, err, act.verb, test.says, test.lease.Addr().String())
				if len(f.posts) != 0 {
					t.Errorf("%s: %s: posted %s", test.name, act.verb, f.posts)
				}
				continue
			}
			// Without a time of ours: the container's own counts.
			if want := []string{"/containers/" + test.want + "/" + act.verb}; err != nil || !slices.Equal(f.posts, want) {
				t.Errorf("%s: %s: posted %s, %v", test.name, act.verb, f.posts, err)
			}
		}
	}
}

// A lease without a MAC is of the endpoint that has its address in its network.
func TestStopWithoutMAC(t *testing.T) {
	const pool = "10.10.0.0/24?id=X&probe=off&range=10.10.0.128/25&shared_mac=yes"
	of := func(pool, id string) lease.Lease { return lease.Lease{Pool: pool, Container: id, Prefix: atWeb.Prefix} }
	for _, test := range []struct {
		name  string
		lease lease.Lease
		edit  func(*fake)
		says  string // "" where web is stopped
	}{
		{"by address", of(pool, ""), nil, ""},
		{"by ID", of(pool, web), nil, ""},
		{"ID of another container", of(pool, db), nil, "container " + db},
		{"address of nobody", lease.Lease{Pool: pool, Prefix: netip.MustParsePrefix("10.10.0.130/24")}, nil, "no running container has address 10.10.0.130"},
		{"lease of another network", of(strings.Replace(pool, "probe=off", "probe=on", 1), ""), nil, "no running container has address 10.10.0.128"},
		{"network of another driver", of(pool, ""), func(f *fake) {
			f.edit("/networks/"+lan, `"talkingdata-ipvlan"`, `"default"`)
		}, "no running container has address 10.10.0.128"},
		{"network whose endpoints have MACs", of(pool, ""), func(f *fake) {
			f.edit("/networks/"+lan, `"talkingdata-ipvlan"`, `"talkingdata"`)
			f.edit("/networks/"+lan, `"MacAddress":""`, `"MacAddress":"02:42:0a:0a:00:07"`)
		}, "no running container has address 10.10.0.128"},
		{"network that isn't told", of(pool, ""), func(f *fake) { f.status["/networks/"+lan] = http.StatusInternalServerError }, "inspect"},
		{"network that was removed", of(pool, ""), func(f *fake) { delete(f.bodies, "/networks/"+lan) }, "no running container"},
		{"two containers", of(pool, ""), func(f *fake) { f.edit("/containers/json", `"10.10.0.129"`, `"10.10.0.128"`) }, "2 running containers have address 10.10.0.128"},
	} {
		f := newFake(t)
		f.ipvlan()
		if test.edit != nil {
			test.edit(f)
		}
		err := f.engine(talkingdata...).Stop(t.Context(), test.lease)
		if test.says != "" {
			mentions(t, err, test.says)
			if len(f.posts) != 0 {
				t.Errorf("%s: posted %s", test.name, f.posts)
			}
			continue
		}
		if want := []string{"/containers/" + web + "/stop"}; err != nil || !slices.Equal(f.posts, want) {
			t.Errorf("%s: posted %s, %v", test.name, f.posts, err)
		}
	}
}

func TestStopAmbiguous(t *testing.T) {
	f := newFake(t)
	f.edit("/containers/json", `"10.10.0.129"`, `"10.10.0.128"`)
	f.edit("/containers/json", `"02:42:0a:0a:00:81"`, `"02:42:0a:0a:00:07"`)
	mentions(t, f.engine().Stop(t.Context(), leaseOf(atWeb, "")), "2 running containers have address 10.10.0.128")
	if len(f.posts) != 0 {
		t.Errorf("posted %s", f.posts)
	}
}

func TestStopFails(t *testing.T) {
	f := newFake(t)
	f.status["/containers/"+web+"/stop"] = http.StatusInternalServerError
	f.status["/containers/"+web+"/restart"] = http.StatusInternalServerError
	f.bodies["/containers/"+web+"/stop"] = `{"message":"cannot stop container: tried"}`
	f.bodies["/containers/"+web+"/restart"] = `{"message":"Cannot restart container: no lease"}`
	e := f.engine()
	mentions(t, e.Stop(t.Context(), leaseOf(atWeb, "")), "stop the container of 10.10.0.128", "tried")
	mentions(t, e.Restart(t.Context(), leaseOf(atWeb, "")), "restart the container of 10.10.0.128", "no lease")
	f.status["/containers/json"] = http.StatusInternalServerError
	mentions(t, e.Stop(t.Context(), leaseOf(atWeb, "")), "list running containers")
}

func TestNew(t *testing.T) {
	for _, host := range []string{
		"", "unix://", "unix:", "/var/run/docker.sock", "unix://var/run/docker.sock", "tcp://127.0.0.1:2375", "http://engine",
		"ssh://host", "npipe:////./pipe/docker_engine", "fd://", "unix:///" + strings.Repeat("x", 200),
	} {
		_, err := New(host)
		if err == nil {
			t.Errorf("%q is taken", host)
			continue
		}
		mentions(t, err, host, "--docker", "DOCKER", "unix:///var/run/docker.sock")
	}
	at(t, "unix:///var/run/docker.sock")
}

// calls are all ways to the engine.
func calls(ctx context.Context, e *Engine) []error {
	_, err := e.Networks(ctx)
	return []error{err, e.Stop(ctx, leaseOf(atWeb, web)), e.Restart(ctx, leaseOf(atWeb, ""))}
}

func TestUnreachable(t *testing.T) {
	t.Run("no socket", func(t *testing.T) {
		socket := filepath.Join(t.TempDir(), "docker.sock")
		for _, err := range calls(t.Context(), at(t, "unix://"+socket)) {
			mentions(t, err, socket, "--docker", "DOCKER", "root", "no such file")
		}
	})
	t.Run("nobody serves", func(t *testing.T) {
		socket := filepath.Join(t.TempDir(), "docker.sock")
		listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		listener.SetUnlinkOnClose(false)
		listener.Close()
		for _, err := range calls(t.Context(), at(t, "unix://"+socket)) {
			mentions(t, err, socket, "--docker", "DOCKER", "start the engine")
		}
	})
	t.Run("not permitted", func(t *testing.T) {
		host := serve(t, newFake(t))
		dir := filepath.Dir(strings.TrimPrefix(host, "unix://"))
		if err := os.Chmod(dir, 0); err != nil {
			t.Fatal(err)
		}
		defer os.Chmod(dir, 0o700)
		e := at(t, host)
		asNobody(t, func() {
			for _, err := range calls(t.Context(), e) {
				mentions(t, err, host, "permission denied", "root", "--docker", "DOCKER")
			}
		})
	})
	t.Run("too old", func(t *testing.T) {
		f := newFake(t)
		f.api = "1.39"
		host := serve(t, f)
		for _, err := range calls(t.Context(), at(t, host)) {
			mentions(t, err, host, "too old", "1.39", "1.40", "upgrade", "--docker", "DOCKER")
		}
	})
	t.Run("something else", func(t *testing.T) {
		host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("hello")) }))
		for _, err := range calls(t.Context(), at(t, host)) {
			mentions(t, err, host, "no Docker engine", "--docker", "DOCKER")
		}
	})
	t.Run("refuses", func(t *testing.T) {
		host := serve(t, http.NotFoundHandler())
		for _, err := range calls(t.Context(), at(t, host)) {
			mentions(t, err, host)
		}
	})
	t.Run("silent", func(t *testing.T) {
		host := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		for _, err := range calls(ctx, at(t, host)) {
			mentions(t, err, host)
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v", err)
			}
		}
	})
}

// asNobody calls a function without root's rights.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		f()
		return
	}
	// Of all threads: the client connects on any.
	if err := syscall.Setresuid(-1, 65534, -1); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := syscall.Setresuid(-1, 0, -1); err != nil {
			t.Fatal(err)
		}
	}()
	f()
}
