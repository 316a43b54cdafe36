package doctor

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/server"
	"github.com/talkingdata/oam-docker-ipam/store"
)

const testVersion = "3.1.0"

var (
	testPool  = lease.Pool{ID: "192.0.2.0/24?id=X", Subnet: netip.MustParsePrefix("192.0.2.0/24")}
	testLease = lease.Lease{
		Pool: testPool.ID, MAC: lease.MAC{2, 0, 0, 0, 0, 9}, Name: "web", ClientID: []byte{1, 2}, Prefix: netip.MustParsePrefix("192.0.2.9/24"),
		Server: netip.MustParseAddr("192.0.2.3"), Via: netip.MustParseAddrPort("192.0.2.3:67"), Agent: []byte{1, 1, 'x'},
		Obtained: time.Now().Truncate(time.Second),
	}
)

func works(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// short is a folder whose path leaves room for a socket's.
func short(t testing.TB) string {
	t.Helper()
	folder, err := os.MkdirTemp("", "doc")
	works(t, err)
	t.Cleanup(func() { os.RemoveAll(folder) })
	return folder
}

// testSite is a host on which nothing runs yet, with folders of its own. There is
// no systemd unless a test plays it.
func testSite(t *testing.T) Site {
	t.Helper()
	folder := short(t)
	for _, name := range []string{"plugins", "specs", "data"} {
		works(t, os.Mkdir(filepath.Join(folder, name), 0o700))
	}
	formerly, specs := pluginFolder, specFolders
	pluginFolder, specFolders = filepath.Join(folder, "plugins"), []string{filepath.Join(folder, "specs"), filepath.Join(folder, "more")}
	t.Cleanup(func() { pluginFolder, specFolders = formerly, specs })
	playSystemd(t, "exit 1")
	return Site{
		Version: testVersion, Driver: "td", DataDir: filepath.Join(folder, "data"), Docker: "unix://" + folder + "/docker.sock",
		Socket: pluginFolder + "/td.sock", SocketOf: func(d lease.Driver) string { return pluginFolder + "/" + d.Name + ".sock" },
		Settings:   []server.Setting{{Key: "DHCP_SERVER", Value: "192.0.2.3", Source: "file:1"}, {Key: "DATA_DIR", Value: "/d", Source: "default"}},
		Global:     global(),
		Reloadable: func(key string) bool { return key == "DHCP_SERVER" },
		Options: func(settings []server.Setting) (lease.Options, error) {
			texts := map[string]string{}
			for _, s := range settings {
				if s.Key == "DHCP_SERVER" {
					texts["dhcp_server"] = s.Value
				}
			}
			return lease.ParseOptions(texts)
		},
	}
}

func global() lease.Options {
	return lease.Options{Servers: []lease.Server{{Host: "192.0.2.3", Port: 67}}}
}

// playSystemd puts a systemctl of this script first.
func playSystemd(t *testing.T, script string) {
	t.Helper()
	folder := t.TempDir()
	works(t, os.WriteFile(filepath.Join(folder, "systemctl"), []byte("#!/bin/sh\n"+script+"\n"), 0o755))
	t.Setenv("PATH", folder+":"+os.Getenv("PATH"))
}

// playUnits plays systemd with these units, each properties in lines.
func playUnits(t *testing.T, units ...string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "units")
	works(t, os.WriteFile(file, []byte(strings.Join(units, "\n\n")+"\n"), 0o644))
	playSystemd(t, "cat "+file)
}

// As systemd 252 says it.
const (
	unitActive   = "Id=oam-docker-ipam.service\nUser=\nNRestarts=0\nResult=success\nLoadState=loaded\nActiveState=active\nSubState=running\nUnitFileState=enabled"
	unitInactive = "Id=oam-docker-ipam.service\nUser=\nNRestarts=0\nResult=success\nLoadState=loaded\nActiveState=inactive\nSubState=dead\nUnitFileState=enabled"
	unitMissing  = "Id=oam-docker-ipam.service\nLoadState=not-found\nActiveState=inactive\nSubState=dead"
)

func socketUnitOf(state string, paths ...string) string {
	text := "Id=oam-docker-ipam.socket\nResult=success\nLoadState=loaded\nActiveState=" + state + "\nUnitFileState=enabled"
	for _, path := range paths {
		text += "\nListen=" + path + " (Stream)"
	}
	return text
}

// examine meets the daemon and makes one check, or several.
func (s Site) examine(t *testing.T, names ...string) (found []Finding) {
	t.Helper()
	p := &patient{Site: s, tell: func(f Finding) { found = append(found, f) }}
	p.run(t.Context(), check{"daemon", meet}, checkTime)
	for _, c := range checks {
		if slices.Contains(names, c.name) {
			p.make(t.Context(), c)
		}
	}
	for _, f := range found {
		if f.Check == "" || f.Found == "" || (f.Advice == "") != (f.Status == OK) {
			t.Errorf("%+v: wants a check, what was found, and advice unless all is well", f)
		}
	}
	return found
}

// has wants a finding of a status whose texts have all these words.
func has(t *testing.T, found []Finding, status Status, words ...string) {
	t.Helper()
	if !slices.ContainsFunc(found, func(f Finding) bool {
		return f.Status == status && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(f.Found+"\n"+f.Advice, w) })
	}) {
		t.Errorf("no %s with %q in %+v", status, words, found)
	}
}

// only wants a finding as has does, and no other.
func only(t *testing.T, found []Finding, status Status, words ...string) {
	t.Helper()
	has(t, found, status, words...)
	if len(found) != 1 {
		t.Errorf("%d findings, want one: %+v", len(found), found)
	}
}

// quietClient is never asked for a lease.
type quietClient struct{ lease.Client }

func (quietClient) RelayMAC(context.Context, lease.Pool) (lease.MAC, error) {
	return lease.MAC{}, errors.New("no interface")
}
func (quietClient) Servers(lease.Pool) []lease.ServerStatus { return nil }

type quietHost struct{}

func (quietHost) MachineID() (string, error)          { return "", errors.New("none") }
func (quietHost) HardwareAddrs() ([]lease.MAC, error) { return nil, nil }
func (quietHost) BootID() string                      { return "this" }
func (quietHost) BootTime() time.Duration             { return time.Hour }

// fill stores the pool and leases in a site's database.
func (s Site) fill(t *testing.T, leases ...lease.Lease) {
	t.Helper()
	db, err := store.Open(s.DataDir)
	works(t, err)
	works(t, db.Commit(lease.Change{PutPools: []lease.Pool{testPool}, PutLeases: leases}))
	works(t, db.Close())
}

// testDaemon is the real daemon's store, manager and sockets, of which a test may
// change what it says of itself.
type testDaemon struct {
	health   server.Health
	settings []server.Setting
	db       *store.DB
}

// start serves a site's daemon until the test ends. Leases are infinite, so that
// it has nothing to do.
func (s Site) start(t *testing.T, leases ...lease.Lease) *testDaemon {
	t.Helper()
	s.fill(t, leases...)
	db, err := store.Open(s.DataDir)
	works(t, err)
	log := slog.New(slog.DiscardHandler)
	manager, err := lease.NewManager(db, quietClient{}, lease.Config{Timeout: time.Second, Global: s.Global, Machine: quietHost{}, Log: log})
	works(t, err)
	d := &testDaemon{db: db, settings: s.Settings, health: server.Health{
		Version: testVersion, PID: os.Getpid(), Started: time.Now().Truncate(time.Second), Database: db.Path(),
	}}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error)
	backend := server.Backend{
		Manager: manager, Settings: func() []server.Setting { return d.settings },
		Health: func(context.Context) server.Health { return d.health },
	}
	drivers := lease.Drivers(s.Driver)
	for _, driver := range drivers {
		l, err := server.Listen(s.SocketOf(driver))
		works(t, err)
		go func() { served <- server.Serve(ctx, l, server.New(backend, driver, log), time.Second, log) }()
	}
	t.Cleanup(func() {
		stop()
		for range drivers {
			works(t, <-served)
		}
		manager.Close()
		works(t, db.Close())
	})
	return d
}

// asNobody calls a function without root's rights.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("wants root, to be another user")
	}
	// Of all threads.
	works(t, syscall.Setresuid(-1, 65534, -1))
	defer func() { works(t, syscall.Setresuid(-1, 0, -1)) }()
	f()
}

// A check that panics or hangs is a finding, changes nothing for the others, and
// they follow.
func TestChecksThatBreak(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var found []Finding
		p := &patient{tell: func(f Finding) { found = append(found, f) }}
		end := make(chan struct{})
		for _, c := range []check{
			{"panics", func(_ context.Context, p *patient) { p.leases = nil; p.leases[0].MAC[0] = 1 }},
			{"hangs", func(_ context.Context, p *patient) {
				p.warn("something first", "do it")
				p.leases = make([]lease.Held, 7)
				<-end
				p.fault("too late", "")
			}},
			{"heeds its context", func(ctx context.Context, p *patient) { <-ctx.Done(); p.skip("no time", "wait") }},
			{"follows", func(_ context.Context, p *patient) {
				p.pools = make([]lease.PoolStatus, 1)
				p.otherwise("%d leases", len(p.leases))
			}},
		} {
			p.run(t.Context(), c, time.Second)
		}
		close(end)
		synctest.Wait()
		has(t, found, Skipped, "broke off", "index out of range", "report it")
		has(t, found, Skipped, "this check hangs: no end after 3s")
		has(t, found, Skipped, "no time")
		has(t, found, OK, "0 leases")
		if len(found) != 5 || len(p.pools) != 1 {
			t.Errorf("found %+v, pools %v", found, p.pools)
		}
	})
}

// A check that tells nothing is a finding.
func TestChecksThatTellNothing(t *testing.T) {
	var found []Finding
	p := &patient{tell: func(f Finding) { found = append(found, f) }}
	p.make(t.Context(), check{"quiet", func(context.Context, *patient) {}})
	only(t, found, Skipped, "nothing was there to check", "above")
	found = nil
	p.make(t.Context(), check{"well", func(_ context.Context, p *patient) { p.ok("it is") }})
	only(t, found, OK, "it is")
}

// Root is told which of its rights it lacks.
func TestLacking(t *testing.T) {
	const all = 1<<41 - 1
	for _, test := range []struct {
		capabilities uint64
		apart        bool
		want         string
	}{
		{all, false, "sudo"},
		{all &^ (1 << unix.CAP_NET_RAW), false, "root without CAP_NET_RAW: "},
		{all &^ (1<<unix.CAP_NET_RAW | 1<<unix.CAP_SYS_PTRACE), true, "root without CAP_NET_RAW, CAP_SYS_PTRACE: "},
		{all, true, "PID namespace"},
	} {
		if got := lacking(test.capabilities, test.apart); !strings.Contains(got, test.want) {
			t.Errorf("%x, %v: %q, want %q", test.capabilities, test.apart, got, test.want)
		}
	}
}

// Nothing is told any more once the caller has gone.
func TestExamineStops(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	Examine(ctx, testSite(t), func(f Finding) { t.Errorf("found %+v", f) })
}

func TestConfiguration(t *testing.T) {
	site := testSite(t)
	only(t, site.examine(t, "configuration"), OK, "DHCP_SERVER=192.0.2.3 (file:1)")

	site.Unknown = []string{"file:9: unknown key DHCP_SERVRE"}
	only(t, site.examine(t, "configuration"), Warning, "file:9: unknown key DHCP_SERVRE", "no effect")
	site.Unknown = nil

	site.Global = lease.Options{}
	only(t, site.examine(t, "configuration"), Warning, "neither DHCP_SERVER nor DHCP_INTERFACE", "discover")
	site.fill(t)
	only(t, site.examine(t, "configuration"), Warning, "network 192.0.2.0/24 has no DHCP server")

	// Of networks nothing is said that isn't known.
	site.Wrong = errors.New("configuration: file:3: DHCP_TIMEOUT=\"-1s\": want a time above zero")
	site.GlobalErr = site.Wrong
	only(t, site.examine(t, "configuration"), Fault, "file:3: DHCP_TIMEOUT", "config --check")
}

// What a start would have is compared with what the running daemon has; what came
// from its own command line or environment is no difference.
func TestConfigurationOfRunning(t *testing.T) {
	site := testSite(t)
	d := site.start(t)
	only(t, site.examine(t, "configuration"), OK, "DHCP_SERVER=192.0.2.3 (file:1), as the running daemon has it")

	d.settings = []server.Setting{{Key: "DATA_DIR", Value: "/old", Source: "file:2"}, {Key: "DHCP_SERVER", Value: "192.0.2.1", Source: "file:1"}}
	found := site.examine(t, "configuration")
	has(t, found, Warning, `DHCP_SERVER is "192.0.2.3" (file:1), and the running daemon still has "192.0.2.1"`, "SIGHUP")
	has(t, found, Warning, `DATA_DIR is "/d"`, "start it again")
	if len(found) != 2 {
		t.Errorf("found %+v", found)
	}
	playUnits(t, unitActive)
	found = site.examine(t, "configuration")
	has(t, found, Warning, "DHCP_SERVER", "systemctl reload oam-docker-ipam")
	has(t, found, Warning, "DATA_DIR", "systemctl restart oam-docker-ipam")

	d.settings[0].Source, d.settings[1].Source = "flag --data-dir", "environment variable DHCP_SERVER"
	only(t, site.examine(t, "configuration"), OK, "DHCP_SERVER=192.0.2.1 (environment variable DHCP_SERVER)")

	site.Wrong, site.Global = errors.New("line 3"), lease.Options{}
	only(t, site.examine(t, "configuration"), Fault, "line 3", "the daemon runs on")
}

// The global options that are examined are those of the daemon's next start.
func TestGlobalOfRunning(t *testing.T) {
	site := testSite(t)
	d := site.start(t)
	asks := func(want string) {
		t.Helper()
		p := &patient{Site: site}
		meet(t.Context(), p)
		if got := p.Global.Texts()["dhcp_server"]; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	d.settings = []server.Setting{{Key: "DHCP_SERVER", Value: "192.0.2.1", Source: "file:1"}}
	asks("192.0.2.3")
	d.settings[0].Source = "flag --dhcp-server"
	asks("192.0.2.1")
	site.Settings[0].Source = "flag --dhcp-server"
	asks("192.0.2.3")
	d.settings[0].Source, site.Wrong = "file:1", errors.New("line 3")
	asks("192.0.2.1")
}

func TestDaemonRuns(t *testing.T) {
	site := testSite(t)
	playUnits(t, unitActive)
	d := site.start(t, testLease)
	only(t, site.examine(t, "daemon"), OK, "version 3.1.0 runs since", "1 network, 1 lease")

	former := d.health
	d.health.Version = "3.0.0"
	only(t, site.examine(t, "daemon"), Warning, "version 3.0.0 runs, and 3.1.0 is installed", "systemctl restart oam-docker-ipam")
	d.health = former
	d.health.Alive = "write to database /d: stuck for 12s"
	d.health.Ready = d.health.Alive
	only(t, site.examine(t, "daemon"), Fault, "stuck for 12s", "restart")
	d.health.Alive, d.health.Ready = "", "no DHCP server has answered for 2m"
	only(t, site.examine(t, "daemon"), Warning, "no DHCP server has answered for 2m", "below")
	d.health = former
	playUnits(t, strings.Replace(unitActive, "NRestarts=0", "NRestarts=4", 1))
	only(t, site.examine(t, "daemon"), Warning, "restarted it 4 times", "journalctl")
	d.health.Started = d.health.Started.Add(-2 * young)
	only(t, site.examine(t, "daemon"), OK, "version")
	playUnits(t, strings.Replace(unitActive, "=enabled", "=disabled", 1), strings.Replace(socketUnitOf("active"), "=enabled", "=disabled", 1))
	has(t, site.examine(t, "daemon"), Warning, "isn't started at boot", "systemctl enable oam-docker-ipam")
}

// The servers of a configuration that can't be read aren't known, and none is
// not what is said of them.
func TestServersUnknown(t *testing.T) {
	site := testSite(t)
	site.Wrong, site.Global, site.GlobalErr = errors.New("line 3"), lease.Options{}, errors.New("line 3")
	only(t, site.examine(t, "relay address"), Skipped, "isn't known", "correct it")
	site.GlobalErr = nil
	only(t, site.examine(t, "relay address"), Skipped, "no DHCP server and no interface")
}

// What the daemon holds comes whole: the checks of the network need all of it.
func TestMeetsRunning(t *testing.T) {
	site := testSite(t)
	site.start(t, testLease)
	p := &patient{Site: site}
	meet(t.Context(), p)
	if !p.known || len(p.leases) != 1 || p.leases[0].Via != testLease.Via || string(p.leases[0].Agent) != string(testLease.Agent) || p.leases[0].Subnet != testPool.Subnet {
		t.Errorf("met %+v", p.leases)
	}
	if len(p.pools) != 1 || p.pools[0].ID != testPool.ID || len(p.pools[0].InForce.Servers) != 1 {
		t.Errorf("met %+v", p.pools)
	}
}

// Of a daemon that is down the same is in its database.
func TestMeetsStopped(t *testing.T) {
	site := testSite(t)
	site.fill(t, testLease)
	p := &patient{Site: site}
	meet(t.Context(), p)
	if !p.known || p.health != nil || len(p.leases) != 1 || p.leases[0].State != "bound" || p.leases[0].Subnet != testPool.Subnet || len(p.pools) != 1 ||
		len(p.pools[0].InForce.Servers) != 1 || p.pools[0].InForce.ClientID != lease.ClientIDAuto || p.pools[0].Leases["bound"] != 1 {
		t.Errorf("met %+v, %+v", p.leases, p.pools)
	}
}

// Whether there are networks and leases is known from one of the two only.
func TestMeetsNobody(t *testing.T) {
	site := testSite(t)
	knows := func() bool {
		p := &patient{Site: site}
		meet(t.Context(), p)
		return p.known
	}
	if !knows() {
		t.Error("not known of a daemon that hasn't run yet")
	}
	db, err := store.Open(site.DataDir)
	works(t, err)
	if knows() {
		t.Error("known of a locked database")
	}
	works(t, db.Close())
	if !knows() {
		t.Error("not known of a database")
	}
	site.DataDir = ""
	if knows() {
		t.Error("known of nothing")
	}
}

// What a failed start has logged is told with it, and only that.
func TestDaemonsLastWords(t *testing.T) {
	site := testSite(t)
	failed := strings.NewReplacer("inactive", "failed", "success", "exit-code").Replace(unitInactive) + "\nInvocationID=c0ffee"
	playUnits(t, failed, socketUnitOf("inactive"))
	folder := t.TempDir()
	works(t, os.WriteFile(filepath.Join(folder, "journalctl"), []byte("#!/bin/sh\ncase \"$*\" in *=err*=c0ffee) echo 'configuration: line 3'; esac\n"), 0o755))
	t.Setenv("PATH", folder+":"+os.Getenv("PATH"))
	only(t, site.examine(t, "daemon"), Fault, `systemd: failed, exit-code), its last error "configuration: line 3"`, "journalctl")
	playUnits(t, strings.Replace(failed, "exit-code", "success", 1), socketUnitOf("inactive"))
	for _, f := range site.examine(t, "daemon") {
		if strings.Contains(f.Found, "line 3") {
			t.Errorf("found %+v of a daemon that was stopped", f)
		}
	}
}

func TestDaemonDown(t *testing.T) {
	site := testSite(t)
	only(t, site.examine(t, "daemon"), Fault, "it doesn't run", "oam-docker-ipam server")
	playUnits(t, strings.NewReplacer("inactive", "failed", "success", "exit-code").Replace(unitInactive), socketUnitOf("inactive"))
	only(t, site.examine(t, "daemon"), Fault, "systemd: failed, exit-code", "systemctl start oam-docker-ipam", "journalctl")
	playUnits(t, strings.Replace(unitInactive, "loaded", "masked", 1))
	only(t, site.examine(t, "daemon"), Fault, "masked", "unmask")
	playUnits(t, unitMissing)
	only(t, site.examine(t, "daemon"), Fault, "it doesn't run", "oam-docker-ipam server")
	site.fill(t, testLease)
	only(t, site.examine(t, "daemon"), Fault, "nobody renews its 1 lease")
}

// A daemon that is stopped at a socket of systemd's is not started by a question.
func TestStoppedIsNotAsked(t *testing.T) {
	site := testSite(t)
	l, err := server.Listen(site.Socket)
	works(t, err)
	var asked atomic.Int32
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			asked.Add(1)
			conn.Close()
		}
	}()
	defer l.Close()
	playUnits(t, unitInactive, socketUnitOf("active", site.Socket, pluginFolder+"/td-ipvlan.sock"))
	only(t, site.examine(t, "daemon"), Warning, "Docker's first question", "systemctl start")
	site.examine(t, "configuration", "disk", "database", "socket")
	site.fill(t, testLease)
	only(t, site.examine(t, "daemon"), Fault, "nobody renews its 1 lease", "systemctl start")
	if n := asked.Load(); n > 0 {
		t.Errorf("asked %d times", n)
	}
	// The listener does count.
	conn, err := net.Dial("unix", site.Socket)
	works(t, err)
	_, _ = conn.Read(make([]byte, 1))
	if asked.Load() != 1 {
		t.Error("a connection isn't seen")
	}
}

// A daemon that refuses to start tells why.
func TestDaemonRefuses(t *testing.T) {
	site := testSite(t)
	l, err := server.Listen(site.Socket)
	works(t, err)
	ctx, stop := context.WithCancel(t.Context())
	refused := make(chan struct{})
	go func() {
		server.Refuse(ctx, map[string]net.Listener{site.Socket: l}, errors.New("configuration: line 7 is wrong"), time.Minute)
		close(refused)
	}()
	only(t, site.examine(t, "daemon"), Fault, "doesn't start: configuration: line 7 is wrong")
	stop()
	<-refused
}

// Another program on the daemon's socket is told as such.
func TestDaemonIsAnother(t *testing.T) {
	site := testSite(t)
	other := &httptest.Server{Listener: listenAt(t, site.Socket), Config: &http.Server{Handler: http.NotFoundHandler()}}
	other.Start()
	defer other.Close()
	only(t, site.examine(t, "daemon"), Fault, "another program serves "+site.Socket, "end that program")
	other.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/Plugin.Activate" {
			http.NotFound(w, r)
			return
		}
		w.Write([]byte(`{"Implements":["IpamDriver"]}`))
	})
	// Such as the daemon's former version.
	only(t, site.examine(t, "daemon"), Fault, "the daemon answers 404", "start it again")
}

func TestDaemonHangs(t *testing.T) {
	site := testSite(t)
	l, err := server.Listen(site.Socket)
	works(t, err)
	defer l.Close()
	var found []Finding
	p := &patient{Site: site, tell: func(f Finding) { found = append(found, f) }}
	p.run(t.Context(), check{"daemon", meet}, 100*time.Millisecond)
	p.run(t.Context(), check{"daemon", checkDaemon}, checkTime)
	only(t, found, Fault, "it doesn't answer", site.Socket)
}

// A usual user learns what takes root, and nothing that isn't so.
func TestNotRoot(t *testing.T) {
	site := testSite(t)
	site.start(t, testLease)
	works(t, os.Chmod(filepath.Dir(site.DataDir), 0o755))
	asNobody(t, func() {
		found := site.examine(t, "daemon", "database", "socket")
		if len(found) != 3 || slices.ContainsFunc(found, func(f Finding) bool { return f.Status != Skipped || !strings.Contains(f.Advice, "sudo") }) {
			t.Errorf("found %+v", found)
		}
	})
}
