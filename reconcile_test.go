package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// fakeEngine answers what a reconcile asks, as an engine 20.10 does. It has one
// network of our driver, unless none, and another one.
type fakeEngine struct {
	host string // unix:///PATH

	mu         sync.Mutex
	none       bool
	containers string // of the network, JSON
	flat       string // a network of our driver for ipvlan, JSON; none unless set
	asked      int
}

// The stored lease of home is of the container web.
const (
	web     = `"c24bf5b5bd8f":{"Name":"web","MacAddress":"02:00:00:00:00:09","IPv4Address":"192.0.2.9/24"}`
	another = `"d132676ee915":{"Name":"db","MacAddress":"02:00:00:00:00:0a","IPv4Address":"192.0.2.77/24"}`
)

func startEngine(t *testing.T) *fakeEngine {
	t.Helper()
	// A socket's path must be short.
	folder, err := os.MkdirTemp("", "ipam")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	socket := filepath.Join(folder, "docker.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	e := &fakeEngine{host: "unix://" + socket}
	server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: e}}
	server.Start()
	t.Cleanup(server.Close)
	return e
}

func (e *fakeEngine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked++
	lan := `{"Name":"lan","Id":"1a","Scope":"local","Driver":"macvlan","IPAM":{"Driver":"talkingdata","Config":[{"Subnet":"192.0.2.0/24"}]},"Containers":{` + e.containers + `}}`
	plain := `{"Name":"plain","Id":"2b","Scope":"local","Driver":"bridge","IPAM":{"Driver":"default","Config":[{"Subnet":"198.51.100.0/24"}]},"Containers":{}}`
	w.Header().Set("Api-Version", "1.41")
	w.Header().Set("Content-Type", "application/json")
	switch strings.TrimPrefix(r.URL.Path, "/v1.41") {
	case "/_ping":
	case "/version":
		fmt.Fprint(w, `{"Version":"20.10.24","ApiVersion":"1.41"}`)
	case "/networks":
		if e.none {
			lan = plain
		}
		if e.flat != "" {
			plain += "," + e.flat
		}
		fmt.Fprintf(w, "[%s,%s]", lan, plain)
	case "/networks/1a":
		fmt.Fprint(w, lan)
	case "/networks/3c":
		fmt.Fprint(w, e.flat)
	default:
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"message":"not here"}`)
	}
}

// calls counts what was asked.
func (e *fakeEngine) calls() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.asked
}

// has sets the endpoints of the network.
func (e *fakeEngine) has(containers ...string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.containers = strings.Join(containers, ",")
}

// hasFlat sets the endpoints of the network of ipvlan's driver.
func (e *fakeEngine) hasFlat(containers ...string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.flat = `{"Name":"flat","Id":"3c","Scope":"local","Driver":"ipvlan","IPAM":{"Driver":"talkingdata-ipvlan","Config":[{"Subnet":"198.51.100.0/24"}]},"Containers":{` + strings.Join(containers, ",") + `}}`
}

// empty takes the network away.
func (e *fakeEngine) empty(none bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.none = none
}

// expect tries how a program ended and what it said.
func (got outcome) expect(t *testing.T, status int, parts ...string) {
	t.Helper()
	said := got.stdout
	if status == 1 {
		said = got.stderr
		if got.stdout != "" || !strings.HasPrefix(said, "oam-docker-ipam: ") || strings.Count(said, "\n") != 1 {
			t.Errorf("%+v is no single line of error", got)
		}
	} else if got.stderr != "" {
		t.Errorf("stderr %q", got.stderr)
	}
	if got.status != status {
		t.Errorf("status %d, want %d: %+v", got.status, status, got)
	}
	for _, part := range parts {
		if !strings.Contains(said, part) {
			t.Errorf("%q lacks %q", said, part)
		}
	}
}

// Status 0 says that nothing was found, 2 that something was. The names that
// are stored are no difference.
func TestReconcile(t *testing.T) {
	cleanEnv(t)
	s := home(t)
	stop := startServe(t, s)
	e := startEngine(t)
	reconcile := func(args ...string) outcome {
		return program(append([]string{"--socket", s.socket, "--docker", e.host, "reconcile"}, args...)...)
	}

	e.has(web)
	reconcile("--dry-run").expect(t, 0)
	reconcile().expect(t, 0, "ACTION", "named", "192.0.2.9", "web", "lan")
	reconcile().expect(t, 0, "leases and containers agree\n")
	if got := reconcile("--json"); got.status != 0 || got.stdout != "[]\n" {
		t.Errorf("nothing, as JSON: %+v", got)
	}

	// A dry run changes nothing: the second one finds the same.
	e.has(web, another)
	for range 2 {
		reconcile("--dry-run").expect(t, 2, "adopted", "192.0.2.77", "02:00:00:00:00:0a", "db", "lan", "would")
	}
	if got := program("--socket", s.socket, "leases"); strings.Contains(got.stdout, "192.0.2.77") {
		t.Errorf("a dry run adopted: %s", got.stdout)
	}

	e.has()
	reconcile("--dry-run").expect(t, 2, "missed", "192.0.2.9")
	reconcile().expect(t, 2, "ACTION  ADDRESS    MAC                NAME  NETWORK  DETAIL\nmissed  192.0.2.9  02:00:00:00:00:09  web            no container has it")
	got := reconcile("--json")
	got.expect(t, 2)
	var findings []map[string]any
	if err := json.Unmarshal([]byte(got.stdout), &findings); err != nil || len(findings) != 1 {
		t.Fatalf("%s: %v", got.stdout, err)
	}
	want := map[string]any{
		"action": "missed", "address": "192.0.2.9", "mac": "02:00:00:00:00:09", "name": "web", "container": "c24bf5b5bd8f", "network": "",
		"detail": "no container has it: released by a reconcile that still finds none in 5m0s",
	}
	if fmt.Sprint(findings[0]) != fmt.Sprint(want) {
		t.Errorf("got  %v\nwant %v", findings[0], want)
	}
	if got := program("--socket", s.socket, "leases"); !strings.Contains(got.stdout, "192.0.2.9") {
		t.Errorf("the missed lease is gone: %s", got.stdout)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// Whatever keeps a reconcile from its work: status 1, one clear line, and
// nothing released.
func TestReconcileErrors(t *testing.T) {
	cleanEnv(t)
	s := home(t)
	stop := startServe(t, s)
	e := startEngine(t)
	e.has(web)
	with := func(docker string, args ...string) outcome {
		return program(append([]string{"--socket", s.socket, "reconcile", "--docker", docker}, args...)...)
	}

	nowhere := filepath.Join(t.TempDir(), "docker.sock")
	with("unix://"+nowhere).expect(t, 1, nowhere, "no such file", "--docker")
	for _, docker := range []string{"tcp://127.0.0.1:2375", "/var/run/docker.sock", "unix://docker.sock", "unix://", "nonsense"} {
		with(docker).expect(t, 1, fmt.Sprintf("engine address %q", docker), "--docker", "DOCKER", "unix:///var/run/docker.sock")
	}
	with("unix://"+s.socket).expect(t, 1, s.socket) // our own
	with(e.host, "lan").expect(t, 1, `unexpected argument "lan"`)
	with(e.host, "--nonsense").expect(t, 1, "nonsense")
	program("--config", "/nonexistent.conf", "reconcile").expect(t, 1, "/nonexistent.conf")
	// Of this driver it has none.
	program("--socket", s.socket, "--docker", e.host, "--driver-name", "mine", "reconcile").expect(t, 1, "no network of this driver", "1 leases", "--docker")
	e.empty(true)
	with(e.host).expect(t, 1, "no network of this driver", "1 leases", "--docker", "oam-docker-ipam release")
	with(e.host, "--dry-run").expect(t, 1, "no network of this driver")
	e.empty(false)
	// An engine that doesn't tell all is as good as none.
	e.has(`"x":{"Name":"odd","MacAddress":"","IPv4Address":"192.0.2.9/24"}`)
	with(e.host).expect(t, 1, "network lan", "odd", "MAC")
	e.has(`"x":{"Name":"odd","MacAddress":"02:00:00:00:00:09","IPv4Address":"203.0.113.9/24"}`)
	with(e.host).expect(t, 1, "network lan", "odd", "203.0.113.9")
	e.has(`"x":{"Name":`)
	with(e.host).expect(t, 1, "network")
	e.has(web)

	t.Run("not permitted", func(t *testing.T) {
		asNobody(t, func() { with(e.host).expect(t, 1, e.host, "permission denied", "root") })
		// The engine's may be open to a group.
		socket := strings.TrimPrefix(e.host, "unix://")
		for path, mode := range map[string]os.FileMode{filepath.Dir(socket): 0o755, socket: 0o666} {
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
		}
		asNobody(t, func() { with(e.host).expect(t, 1, s.socket, "not permitted: run this as root") })
	})
	if got := program("--socket", s.socket, "leases"); !strings.Contains(got.stdout, "192.0.2.9") {
		t.Errorf("the lease is gone: %s", got.stdout)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	with(e.host).expect(t, 1, "the daemon is not running", s.socket, "--socket")
}

// asNobody calls a function without root's rights.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("not root: these sockets are this user's own")
	}
	// Of all threads: the clients connect on any.
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

// The engine is named by the flag, before or behind the command, by the
// environment and by the file.
func TestReconcileFindsEngine(t *testing.T) {
	cleanEnv(t)
	s := home(t)
	stop := startServe(t, s)
	e := startEngine(t)
	e.has(web)
	socket, flag := "--socket="+s.socket, "--docker="+e.host
	for _, args := range [][]string{
		{socket, flag, "reconcile"},
		{"reconcile", flag, socket},
		{socket, "reconcile", "--json", flag, "--dry-run"},
		{"--config", configFile(t, "DOCKER="+e.host+"\nPLUGIN_SOCKET="+s.socket+"\n"), "reconcile"},
	} {
		before := e.calls()
		program(args...).expect(t, 0)
		if e.calls() == before {
			t.Errorf("%q didn't ask the engine", args)
		}
	}
	t.Setenv("DOCKER", e.host)
	program(socket, "reconcile").expect(t, 0)
	// Docker's own variables are the user's, who may work on another engine.
	t.Setenv("DOCKER_HOST", "unix:///nonexistent.sock")
	t.Setenv("DOCKER_API_VERSION", "1.12")
	program(socket, "reconcile").expect(t, 0)
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestPrintFindings(t *testing.T) {
	var got strings.Builder
	if err := printFindings(&got, nil); err != nil || got.String() != "leases and containers agree\n" {
		t.Errorf("%q, %v", got.String(), err)
	}
	got.Reset()
	// A refused endpoint may have no address.
	err := printFindings(&got, []lease.Finding{{Action: lease.Refused, Name: "odd", Network: "lan", Detail: "why"}})
	if want := "ACTION   ADDRESS     MAC                NAME  NETWORK  DETAIL\nrefused  invalid IP  00:00:00:00:00:00  odd   lan      why\n"; err != nil || got.String() != want {
		t.Errorf("%s, %v, want\n%s", got.String(), err, want)
	}
}
