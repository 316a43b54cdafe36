package engine

import (
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// fake answers as an engine 20.10.24 did, whose answers are in testdata. It had
// macvlan networks "lan" (with containers web and db, and idle that didn't
// run), "two" with two subnets, "dual" with IPv6 (container six), a bridge
// "plain", a config-only "conf", and its own "none" and "host".
type fake struct {
	*testing.T
	api    string            // its newest API version
	bodies map[string]string // by path after the version
	status map[string]int    // where it isn't 200

	mu    sync.Mutex
	posts []string // paths with queries
}

const (
	web = "c24bf5b5bd8f7641727536550b15d49513ede55ba7470ff4c483e249f41a80e8"
	db  = "d132676ee91521f09bab8c74bd4fdbfd2e131a2274b16762289e23c9ab42e45e"
	six = "6a5d1f46d05e79aa23260674c36f8c11bd88506be8129d67f0f140bc4971e90f"
	lan = "d3d902b14950476cf39e4bec29f892ed4a92578895d14a6f19b74150215b7d94"
)

func newFake(t *testing.T) *fake {
	t.Helper()
	f := &fake{T: t, api: "1.41", status: map[string]int{}, bodies: map[string]string{
		"/version": recorded(t, "version"), "/networks": recorded(t, "networks"), "/containers/json": recorded(t, "containers"),
	}}
	for _, name := range []string{"lan", "two", "dual", "plain"} {
		body := recorded(t, "network-"+name)
		f.bodies["/networks/"+idOf(t, body)] = body
	}
	for _, name := range []string{"none", "host", "conf"} {
		for _, entry := range f.list("/networks") {
			if strings.Contains(string(entry), `"Name":"`+name+`"`) {
				f.bodies["/networks/"+idOf(t, string(entry))] = string(entry)
			}
		}
	}
	for _, id := range []string{web, db, six} {
		f.status["/containers/"+id+"/stop"] = http.StatusNoContent
		f.status["/containers/"+id+"/restart"] = http.StatusNoContent
	}
	return f
}

func recorded(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata/20.10", name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func idOf(t *testing.T, body string) string {
	t.Helper()
	var object struct{ ID string }
	if err := json.Unmarshal([]byte(body), &object); err != nil || object.ID == "" {
		t.Fatalf("no ID in %s: %v", body, err)
	}
	return object.ID
}

// list is an array's items as they were recorded.
func (f *fake) list(path string) (items []json.RawMessage) {
	f.Helper()
	if err := json.Unmarshal([]byte(f.bodies[path]), &items); err != nil {
		f.Fatal(err)
	}
	return items
}

// edit replaces in an answer what must be there.
func (f *fake) edit(path, from, to string) {
	f.Helper()
	if !strings.Contains(f.bodies[path], from) {
		f.Fatalf("%s has no %s", path, from)
	}
	f.bodies[path] = strings.ReplaceAll(f.bodies[path], from, to)
}

// ipvlan makes "lan" a network of ipvlan's, whose endpoints have no MAC in the
// engine's answers (read in moby's source: here is no kernel that has ipvlan).
func (f *fake) ipvlan() {
	f.Helper()
	for _, path := range []string{"/networks", "/networks/" + lan} {
		f.edit(path, `"Driver":"macvlan","EnableIPv6":false,"IPAM":{"Driver":"default","Options":{"x":"y"}`,
			`"Driver":"ipvlan","EnableIPv6":false,"IPAM":{"Driver":"talkingdata-ipvlan","Options":{"probe":"off"}`)
	}
	for _, mac := range []string{"02:42:0a:0a:00:07", "02:42:0a:0a:00:81"} {
		f.edit("/networks/"+lan, `"`+mac+`"`, `""`)
		f.edit("/containers/json", `"`+mac+`"`, `""`)
	}
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Api-Version", f.api)
	w.Header().Set("Server", "Docker/20.10.24+dfsg1 (linux)")
	if r.URL.Path == "/_ping" {
		return
	}
	w.Header().Set("Content-Type", "application/json")
	// The client's newest is 1.56.
	path, ok := strings.CutPrefix(r.URL.Path, "/v"+min(f.api, "1.56"))
	if !ok {
		w.WriteHeader(http.StatusBadRequest)
		w.Write([]byte(`{"message":"client version is too new"}`))
		return
	}
	if r.Method == http.MethodPost {
		f.mu.Lock()
		f.posts = append(f.posts, strings.TrimSuffix(path+"?"+r.URL.RawQuery, "?"))
		f.mu.Unlock()
	}
	status, body := f.status[path], f.bodies[path]
	if status == 0 && body == "" {
		status, body = http.StatusNotFound, recorded(f.T, "missing")
	}
	if status != 0 {
		w.WriteHeader(status)
	}
	w.Write([]byte(body))
}

// serve puts a handler on a unix socket.
func serve(t *testing.T, handler http.Handler) (host string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "docker.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: handler}}
	server.Start()
	t.Cleanup(server.Close)
	return "unix://" + socket
}

// engine is a client of a fake, as whose IPAM drivers we count, by default the
// engine's own.
func (f *fake) engine(drivers ...lease.Driver) *Engine {
	f.Helper()
	return at(f.T, serve(f.T, f), drivers...)
}

func at(t *testing.T, host string, drivers ...lease.Driver) *Engine {
	t.Helper()
	if drivers == nil {
		drivers = []lease.Driver{{Name: "default"}}
	}
	e, err := New(host, drivers...)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func mentions(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Error("no error")
		return
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%q doesn't mention %q", err, word)
		}
	}
}
