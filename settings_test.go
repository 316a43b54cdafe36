package main

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/server"
)

// A value that can't be read stops what needs it, with its place, and nothing
// else; the command line outranks it.
func TestWrongValue(t *testing.T) {
	cleanEnv(t)
	for text, want := range map[string]string{
		"DHCP_TIMEOUT=abc": `DHCP_TIMEOUT="abc": want a time such as 30s`,
		"IPAM_DEBUG=maybe": `IPAM_DEBUG="maybe": want true or false`,
	} {
		file := configFile(t, "DHCP_SERVER=192.0.2.1\n"+text+"\n")
		want = "oam-docker-ipam: configuration: " + file + ":2: " + want + "\n"
		for _, command := range []string{"config", "server"} {
			if got := program("--config", file, command); got.status != 1 || got.stderr != want {
				t.Errorf("%s: %+v, want %q", command, got, want)
			}
		}
		if got := program("--config", file, "version"); got.status != 0 {
			t.Errorf("version: %+v", got)
		}
		for _, args := range [][]string{
			{"--config", file, "--dhcp-timeout", "3s", "--debug", "config", "--check"},
			{"--config", file, "config", "--dhcp-timeout", "3s", "--debug", "--check"},
		} {
			if got := program(args...); got.status != 0 || got.stderr != "" {
				t.Errorf("%q: %+v", args, got)
			}
		}
	}
}

// Every setting is listed, once, with its value and where that came from.
func TestConfig(t *testing.T) {
	cleanEnv(t)
	file := configFile(t, "# ours\nDHCP_SERVER=192.0.2.1,192.0.2.2 # both\nDRIVER_NAME=mine\nRELEASE_DELAY=\nDHCP_SEVER=x\n")
	t.Setenv("LISTEN_ADDR", "192.0.2.9")
	got := program("--config", file, "--debug", "config", "--json", "--listen-port", "1067")
	var settings []server.Setting
	if err := json.Unmarshal([]byte(got.stdout), &settings); err != nil || got.status != 0 {
		t.Fatalf("%+v: %v", got, err)
	}
	want := map[string]server.Setting{
		"IPAM_DEBUG":    {Value: "true", Source: "flag --debug"},
		"DHCP_SERVER":   {Value: "192.0.2.1,192.0.2.2", Source: file + ":2"},
		"DRIVER_NAME":   {Value: "mine", Source: file + ":3"},
		"PLUGIN_SOCKET": {Value: "/run/docker/plugins/mine.sock", Source: "default"},
		"LISTEN_ADDR":   {Value: "192.0.2.9", Source: "environment variable LISTEN_ADDR"},
		"LISTEN_PORT":   {Value: "1067", Source: "flag --listen-port"},
	}
	var keys []string
	for _, s := range settings {
		keys = append(keys, s.Key)
		w, special := want[s.Key]
		i := slices.IndexFunc(table, func(row row) bool { return row.key == s.Key })
		if i < 0 {
			t.Errorf("%s is no key", s.Key)
			continue
		}
		if !special {
			w = server.Setting{Value: table[i].byDefault, Source: "default"}
		}
		w.Key = s.Key
		if s != w {
			t.Errorf("%+v, want %+v", s, w)
		}
	}
	if slices.Sort(keys); len(slices.Compact(keys)) != len(table) {
		t.Errorf("keys %q", keys)
	}
	if want := "oam-docker-ipam: " + file + ":5: unknown key DHCP_SEVER\n"; got.stderr != want {
		t.Errorf("stderr %q, want %q", got.stderr, want)
	}

	got = program("--config", file, "config")
	if lines := strings.Split(got.stdout, "\n"); got.status != 0 || len(lines) != len(table)+2 ||
		!slices.Equal(strings.Fields(lines[0]), []string{"KEY", "VALUE", "FROM"}) || !slices.Equal(strings.Fields(lines[2]), []string{"DHCP_SERVER", "192.0.2.1,192.0.2.2", file + ":2"}) {
		t.Errorf("%+v", got)
	}
	if got = program("--config", file, "config", "--check"); got.status != 0 || got.stdout != "" {
		t.Errorf("check: %+v", got)
	}
}

// What the running daemon has may be another thing than what the file says.
func TestConfigOfRunningDaemon(t *testing.T) {
	cleanEnv(t)
	s := home(t)
	file := configFile(t, "DATA_DIR="+s.dataDir+"\nPLUGIN_SOCKET="+s.socket+"\n")
	s, err := settingsOf(t, file)
	if err != nil {
		t.Fatal(err)
	}
	if got := program("--config", file, "config", "--running"); got.status != 1 || !strings.Contains(got.stderr, "not running") {
		t.Errorf("without a daemon: %+v", got)
	}
	was := program("--config", file, "config")
	stop := startServe(t, s)
	if err := os.WriteFile(file, []byte("DATA_DIR=/elsewhere\nPLUGIN_SOCKET="+s.socket+"\nDHCP_SERVER=192.0.2.1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := program("--config", file, "config", "--running"); got != was {
		t.Errorf("in force is %+v, want %+v", got, was)
	}
	if got := program("--config", file, "config"); got.status != 0 || !strings.Contains(got.stdout, "192.0.2.1") {
		t.Errorf("the file says %+v", got)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// passedSockets are listeners as systemd passes them, by their paths.
func passedSockets(t *testing.T, paths ...string) map[string]net.Listener {
	t.Helper()
	passed := map[string]net.Listener{}
	for _, path := range paths {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		passed[path] = l
	}
	return passed
}

// Sockets that systemd holds are served as they are; those of another name are
// refused with what to write where, and stay for those who wait there.
func TestPassedSockets(t *testing.T) {
	cleanEnv(t)
	s := home(t)
	dir := filepath.Dir(s.socket)
	for _, c := range []struct {
		name   string
		passed []string
		served bool
	}{
		{"both", []string{s.socket, s.second()}, true},
		{"a drop-in without ipvlan's", []string{s.socket}, true},
		{"ipvlan's only", []string{s.second()}, false},
		{"another name", []string{filepath.Join(dir, "other.sock"), filepath.Join(dir, "other-ipvlan.sock")}, false},
		{"one too many", []string{s.socket, filepath.Join(dir, "other.sock")}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDaemon(s, t.Output())
			passed := passedSockets(t, c.passed...)
			d.passed.Store(&passed)
			drivers := lease.Drivers(s.driver)
			listeners, err := d.listen(s, drivers)
			if taken := d.passed.Load() == nil; (err == nil) != c.served || taken != c.served || c.served && len(listeners) != len(c.passed) {
				t.Fatalf("%d listeners, taken %t: %v", len(listeners), taken, err)
			}
			if c.served {
				if got := listeners[drivers[0]].Addr().String(); got != s.socket {
					t.Errorf("%s is served for %s", got, drivers[0].Name)
				}
				return
			}
			for _, part := range append(c.passed, "systemctl edit oam-docker-ipam.socket", "ListenStream="+s.socket, "ListenStream="+s.second(), "DRIVER_NAME", "PLUGIN_SOCKET") {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("error %q lacks %q", err, part)
				}
			}
		})
	}
}

// Systemd writes /run for /var/run.
func TestCanonical(t *testing.T) {
	for path, want := range map[string]string{
		"/run/docker/plugins/a.sock": "/run/docker/plugins/a.sock", "/var/run/docker//plugins/a.sock": "/run/docker/plugins/a.sock",
		"/var/running/a.sock": "/var/running/a.sock",
	} {
		if got := canonical(path); got != want {
			t.Errorf("%s is %s, want %s", path, got, want)
		}
	}
}
