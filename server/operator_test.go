package server

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

var (
	mac1 = lease.MAC{0x02, 0x42, 0, 0, 0, 1}
	mac2 = lease.MAC{0x02, 0x42, 0, 0, 0, 2}
)

// storedLease is a lease of an hour that was obtained 10 minutes ago.
func storedLease(pool, addr string, mac lease.MAC) lease.Lease {
	got := time.Now().Add(-10 * time.Minute)
	return lease.Lease{
		Pool: pool, MAC: mac, Name: "web", ClientID: append([]byte{1}, mac[:]...), Prefix: netip.MustParsePrefix(addr),
		Server: serverAddr, Via: netip.AddrPortFrom(serverAddr, 67),
		Obtained: got, Renew: got.Add(30 * time.Minute), Rebind: got.Add(50 * time.Minute), Expires: got.Add(time.Hour),
	}
}

// twoNetworks are two networks of one subnet, on links that don't meet, with
// a lease of the same address in each, and an infinite one.
func twoNetworks() fakeStore {
	subnet, gateway := netip.MustParsePrefix("192.0.2.0/24"), netip.MustParseAddr("192.0.2.1")
	endless := storedLease("a", "192.0.2.9/24", mac2)
	endless.Name, endless.Renew, endless.Rebind, endless.Expires = "", time.Time{}, time.Time{}, time.Time{}
	other := storedLease("b", "192.0.2.50/24", mac1)
	other.Server = netip.MustParseAddr("192.0.2.4")
	return fakeStore{
		pools:  []lease.Pool{{ID: "a", Subnet: subnet, Gateway: gateway}, {ID: "b", Subnet: subnet, Gateway: gateway}},
		leases: []lease.Lease{storedLease("a", "192.0.2.50/24", mac1), endless, other},
	}
}

// The list's form, which programs read.
func TestPresent(t *testing.T) {
	at := func(s string) time.Time {
		v, err := time.Parse(time.RFC3339Nano, s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	l := storedLease("192.0.2.0/24?id=A&b", "192.0.2.50/24", mac1)
	l.Obtained, l.Renew, l.Rebind, l.Expires = at("2026-01-02T05:04:05.999+02:00"), at("2026-01-02T03:34:05.5Z"), at("2026-01-02T03:56:35Z"), at("2026-01-02T04:04:05Z")
	held := lease.Held{Lease: l, Subnet: netip.MustParsePrefix("192.0.2.0/24")}
	common := `{"address":"192.0.2.50","prefix_length":24,"mac":"02:42:00:00:00:01","name":"web","pool_id":"192.0.2.0/24?id=A\u0026b","subnet":"192.0.2.0/24",`
	for _, held.State = range []string{"bound", "renewing", "rebinding", "lost", lease.Waiting, lease.Releasing} {
		want := common + `"state":"` + held.State + `","server":"192.0.2.3","client_id":"01:02:42:00:00:00:01","obtained_at":"2026-01-02T03:04:05Z","renew_at":"2026-01-02T03:34:05Z","rebind_at":"2026-01-02T03:56:35Z","expires_at":"2026-01-02T04:04:05Z"}`
		got, err := json.Marshal(present(held))
		if err != nil || string(got) != want {
			t.Errorf("%s, %v; want\n%s", got, err, want)
		}
	}
	held.Renew, held.Rebind, held.Expires, held.ClientID, held.State = time.Time{}, time.Time{}, time.Time{}, nil, "bound"
	got, err := json.Marshal(present(held))
	want := common + `"state":"bound","server":"192.0.2.3","client_id":"","obtained_at":"2026-01-02T03:04:05Z","renew_at":null,"rebind_at":null,"expires_at":null}`
	if err != nil || string(got) != want {
		t.Errorf("infinite\n%s, %v; want\n%s", got, err, want)
	}
}

func TestLeases(t *testing.T) {
	d := startDaemon(t, twoNetworks(), usual)
	got, err := Leases(t.Context(), d.socket, Selection{})
	if err != nil || len(got) != 3 {
		t.Fatalf("%+v, %v", got, err)
	}
	for i, want := range []struct{ addr, pool string }{{"192.0.2.9", "a"}, {"192.0.2.50", "a"}, {"192.0.2.50", "b"}} {
		if got[i].Address.String() != want.addr || got[i].PoolID != want.pool || got[i].Subnet.String() != "192.0.2.0/24" || got[i].State != "bound" {
			t.Errorf("lease %d is %+v, want %s of %s", i, got[i], want.addr, want.pool)
		}
	}
}

// Without leases the list is empty, not null: programs count on a list.
func TestNoLeases(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	if got := d.exchange("GET /v1/leases HTTP/1.1\r\nHost: \r\n\r\n"); got.status != 200 || got.body != "[]" {
		t.Errorf("answers %d %s", got.status, got.body)
	}
	if got, err := Leases(t.Context(), d.socket, Selection{}); err != nil || got == nil || len(got) != 0 {
		t.Errorf("%v, %v", got, err)
	}
}

func TestReleaseByHand(t *testing.T) {
	d := startDaemon(t, twoNetworks(), usual)
	d.client.table = map[netip.Addr]lease.MAC{netip.MustParseAddr("192.0.2.9"): mac2}
	check := func(err error, parts ...string) {
		t.Helper()
		for _, part := range parts {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("error %v lacks %q", err, part)
			}
		}
	}
	_, err := Release(t.Context(), d.socket, "192.0.2.50", "")
	check(err, "several leases", "--pool", "in pool a", "in pool b")
	_, err = Release(t.Context(), d.socket, mac1.String(), "")
	check(err, "several leases")
	_, err = Release(t.Context(), d.socket, "192.0.2.51", "")
	check(err, "192.0.2.51", "no such lease")
	_, err = Release(t.Context(), d.socket, "192.0.2.9", "b")
	check(err, "no such lease")
	for _, nonsense := range []string{"web", "192.0.2.9/24", "", "..", "a/../b", "%2e", "?pool=a", "#", "ä b"} {
		_, err = Release(t.Context(), d.socket, nonsense, "")
		check(err, "neither an IPv4 address nor a MAC address")
	}
	if n := len(d.manager.Leases()); n != 3 {
		t.Fatalf("%d leases remain of 3", n)
	}

	got, err := Release(t.Context(), d.socket, "192.0.2.9", "")
	if err != nil || got.Address.String() != "192.0.2.9" || got.MAC != mac2 || got.Subnet.String() != "192.0.2.0/24" || got.PoolID != "a" {
		t.Errorf("released %+v, %v", got, err)
	}
	if len(d.client.leased()) != 0 {
		t.Error("the server was not told")
	}
	// A pool ID has ? and & in it, and a MAC comes in any notation.
	if got, err = Release(t.Context(), d.socket, "02-42-00-00-00-01", "b"); err != nil || got.PoolID != "b" {
		t.Errorf("released %+v, %v", got, err)
	}
	if left := d.manager.Leases(); len(left) != 1 || left[0].Pool != "a" {
		t.Errorf("left are %+v", left)
	}
}

func TestReleaseInNamedPool(t *testing.T) {
	id := "192.0.2.0/24?dhcp_server=192.0.2.3&gateway=192.0.2.1&id=A+B%20C#d"
	d := startDaemon(t, fakeStore{
		pools:  []lease.Pool{{ID: id, Subnet: netip.MustParsePrefix("192.0.2.0/24")}},
		leases: []lease.Lease{storedLease(id, "192.0.2.50/24", mac1)},
	}, usual)
	if got, err := Release(t.Context(), d.socket, "192.0.2.50", id); err != nil || got.PoolID != id {
		t.Errorf("released %+v, %v", got, err)
	}
}

// Each look at the settings shows those in force by then.
func TestSettings(t *testing.T) {
	manager, _ := newManager(t, fakeStore{})
	socket := hold(t, "talkingdata.sock")
	var inForce []Setting
	stop := serve(socket.pass(), New(Backend{Manager: manager, Settings: func() []Setting { return inForce }}, drivers[0], slog.New(slog.DiscardHandler)))
	defer func() { _ = stop() }()
	ask := func() []Setting {
		t.Helper()
		got, err := Settings(t.Context(), socket.path)
		if err != nil || got == nil {
			t.Errorf("%v, %v", got, err)
		}
		return got
	}
	if got := ask(); len(got) != 0 {
		t.Errorf("%v", got)
	}
	for _, value := range []string{"192.0.2.3", "192.0.2.3,192.0.2.4"} {
		inForce = []Setting{{"DHCP_SERVERS", value, "/etc/oam-docker-ipam.conf:7"}, {"DEBUG", "false", "default"}}
		if got := ask(); !slices.Equal(got, inForce) {
			t.Errorf("%v, want %v", got, inForce)
		}
	}
	const want = `[{"key":"DHCP_SERVERS","value":"192.0.2.3,192.0.2.4","source":"/etc/oam-docker-ipam.conf:7"},{"key":"DEBUG","value":"false","source":"default"}]`
	d := &daemon{t: t, socket: socket.path}
	if got := d.exchange("GET /v1/settings HTTP/1.1\r\nHost: \r\n\r\n"); got.status != 200 || got.body != want {
		t.Errorf("answers %d %s", got.status, got.body)
	}
	if got := d.exchange("POST /v1/settings HTTP/1.1\r\nHost: \r\nContent-Length: 0\r\n\r\n"); got.status != 405 {
		t.Errorf("answers %d %s", got.status, got.body)
	}
}

// The operator commands' errors say what to do.
func TestAskErrors(t *testing.T) {
	check := func(name, socket string, parts ...string) {
		t.Helper()
		leases, err := Leases(t.Context(), socket, Selection{})
		if len(leases) != 0 {
			t.Errorf("%s: leases %v", name, leases)
		}
		for _, part := range parts {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%s: error %v lacks %q", name, err, part)
			}
		}
		if _, err := Release(t.Context(), socket, "192.0.2.9", ""); err == nil {
			t.Errorf("%s: Release succeeds", name)
		}
	}
	folder := scratch(t)
	none := filepath.Join(folder, "none.sock")
	check("no socket", none, "not running", none, "systemctl start oam-docker-ipam", "--socket")
	dead := filepath.Join(folder, "dead.sock")
	stale(t, dead)
	check("nobody serves it", dead, "not running", dead)
	file := filepath.Join(folder, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	check("a plain file", file, "not running", file)

	for name, c := range map[string]struct{ answer, text string }{
		"no HTTP":            {"nonsense\r\n\r\n", "ask the daemon"},
		"nothing":            {"", "ask the daemon"},
		"no JSON":            {"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "parse the daemon's answer"},
		"other JSON":         {"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n\"x\"", "parse the daemon's answer"},
		"cut answer":         {"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n[", "read the daemon's answer"},
		"status without Err": {"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\n{}", "502 Bad Gateway"},
		"status with Err":    {"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 16\r\n\r\n{\"Err\":\"broken\"}", "broken"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(scratch(t), "a.sock")
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					_, _ = conn.Read(make([]byte, 4096))
					_, _ = io.WriteString(conn, c.answer)
					conn.Close()
				}
			}()
			check(name, path, c.text)
		})
	}
}

// An operator who gives up is obeyed.
func TestAskCancelled(t *testing.T) {
	path := filepath.Join(scratch(t), "a.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := Leases(ctx, path, Selection{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
}

// Whoever isn't root hears so, as an operator and as a daemon. root itself may
// open everything, hence a process of another user.
func TestNotPermitted(t *testing.T) {
	const key = "SERVER_TEST_SOCKET"
	if socket := os.Getenv(key); socket != "" {
		_, asked := Leases(t.Context(), socket, Selection{})
		_, listened := Listen(filepath.Join(filepath.Dir(socket), "new.sock"))
		_, inNew := Listen(filepath.Join(filepath.Dir(socket), "new", "new.sock"))
		for _, err := range []error{asked, listened, inNew} {
			if err == nil || !strings.Contains(err.Error(), "run this as root") || !strings.Contains(err.Error(), filepath.Dir(socket)) {
				t.Errorf("error %v", err)
			}
		}
		return
	}
	d := startDaemon(t, fakeStore{}, usual)
	folder := filepath.Dir(d.socket)
	// The test's own binary lies where nobody else may look.
	binary, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(folder, "test")
	if err := os.WriteFile(copied, binary, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(folder, 0o555); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.Chmod(folder, 0o755) }()
	if os.Getuid() != 0 {
		if err := os.Chmod(d.socket, 0); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(copied, "-test.run=^"+t.Name()+"$")
	cmd.Dir, cmd.Env = "/", append(os.Environ(), key+"="+d.socket)
	if os.Getuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("as another user: %v\n%s", err, out)
	}
}
