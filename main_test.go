package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/talkingdata/oam-docker-ipam/conf"
	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/server"
	"github.com/talkingdata/oam-docker-ipam/store"
)

// row is one of the configuration table: a flag is its key in lower
// case with dashes.
type row struct {
	key, flag, byDefault string
	// Values for the file, the environment and the flag, and what the
	// settings then say.
	values [3]string
	show   func(settings) string
}

// option shows one of the settings that networks can have too.
func option(name string) func(settings) string {
	return func(s settings) string { return s.global.Texts()[name] }
}

// examples are the values that ship without being the default: there is none.
var examples = map[string]string{"METRICS_ADDR": "127.0.0.1:9767", "DHCP_SERVER": "192.0.2.1", "DHCP_INTERFACE": "eth0", "CONFLICT_INTERFACE": "eth0"}

var table = []row{
	{"IPAM_DEBUG", "debug", "false", [3]string{"true", "false", "true"}, func(s settings) string { return fmt.Sprint(s.debug) }},
	{"DHCP_SERVER", "dhcp-server", "", [3]string{"192.0.2.1", "dhcp.example.org,192.0.2.2:1067", "192.0.2.3"}, option("dhcp_server")},
	{"DHCP_INTERFACE", "dhcp-interface", "", [3]string{"eth1", "eth2.10", "br-lan"}, option("dhcp_interface")},
	{"LISTEN_ADDR", "listen-addr", "0.0.0.0", [3]string{"192.0.2.11", "192.0.2.12", "192.0.2.13"}, option("listen_addr")},
	{"LISTEN_PORT", "listen-port", "67", [3]string{"1067", "6767", "65535"}, option("listen_port")},
	{"DRIVER_NAME", "driver-name", "talkingdata", [3]string{"a", "b", "c"}, func(s settings) string { return s.driver }},
	{"PLUGIN_SOCKET", "socket", "/run/docker/plugins/talkingdata.sock", [3]string{"/tmp/a", "/tmp/b", "/tmp/c"}, func(s settings) string { return s.socket }},
	{"DATA_DIR", "data-dir", "/var/lib/oam-docker-ipam", [3]string{"/tmp/a", "/tmp/b", "/tmp/c"}, func(s settings) string { return s.dataDir }},
	{"CLIENT_ID", "client-id", "auto", [3]string{"mac", "name", "auto"}, option("client_id")},
	{"RELEASE_DELAY", "release-delay", "30s", [3]string{"0s", "1m0s", "2s"}, option("release_delay")},
	{"ON_LEASE_LOST", "on-lease-lost", "keep", [3]string{"stop", "restart", "keep"}, option("on_lease_lost")},
	{"CONFLICT_CHECK", "conflict-check", "off", [3]string{"on", "rfc", "1s"}, option("conflict_check")},
	{"CONFLICT_INTERFACE", "conflict-interface", "", [3]string{"eth1", "eth2", "eth3"}, option("conflict_interface")},
	{"DOCKER", "docker", "unix:///var/run/docker.sock", [3]string{"unix:///a", "unix:///b", "unix:///c"}, func(s settings) string { return s.docker }},
	{"LOG_FORMAT", "log-format", "auto", [3]string{"text", "json", "auto"}, func(s settings) string { return string(s.logFormat) }},
	{"METRICS_ADDR", "metrics-addr", "", [3]string{"127.0.0.1:9767", "[::1]:9767", "/run/oam-docker-ipam/metrics.sock"}, func(s settings) string { return s.metrics.Address }},
	{"DHCP_TIMEOUT", "dhcp-timeout", "30s", [3]string{"10s", "1m0s", "1.5s"}, func(s settings) string { return s.timeout.String() }},
}

// cleanEnv takes the settings out of the environment for a test.
func cleanEnv(t *testing.T) {
	t.Helper()
	for _, row := range table {
		t.Setenv(row.key, "") // so that it is put back
		if err := os.Unsetenv(row.key); err != nil {
			t.Fatal(err)
		}
	}
}

// configFile makes a configuration file.
func configFile(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "test.conf")
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

// settingsOf reads the settings of `oam-docker-ipam FLAGS server` without
// serving.
func settingsOf(t *testing.T, file string, flags ...string) (settings, error) {
	t.Helper()
	if file == "" {
		file = configFile(t, "")
	}
	var got settings
	root := command(io.Discard, io.Discard, func(_ context.Context, s settings) error { got = s; return nil })
	err := root.Run(t.Context(), slices.Concat([]string{"oam-docker-ipam", "--config", file}, flags, []string{"server"}))
	return got, err
}

// commandLine is one whose server doesn't serve.
func commandLine() *cli.Command {
	return command(io.Discard, io.Discard, func(context.Context, settings) error { return nil })
}

func TestDefaults(t *testing.T) {
	cleanEnv(t)
	s, err := settingsOf(t, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range table {
		if got := row.show(s); got != row.byDefault {
			t.Errorf("%s is %q by default, want %q", row.key, got, row.byDefault)
		}
	}
}

// Flag, environment, file, default: each beats what comes after it.
func TestPrecedence(t *testing.T) {
	for _, row := range table {
		t.Run(row.key, func(t *testing.T) {
			cleanEnv(t)
			file := configFile(t, row.key+"="+row.values[0]+"  # as of old\n")
			check := func(want string, flags ...string) {
				t.Helper()
				s, err := settingsOf(t, file, flags...)
				if err != nil {
					t.Fatal(err)
				}
				if got := row.show(s); got != want {
					t.Errorf("%s is %q, want %q", row.key, got, want)
				}
			}
			flag := "--" + row.flag + "=" + row.values[2]
			check(row.values[0])
			check(row.values[2], flag)
			t.Setenv(row.key, row.values[1])
			check(row.values[1])
			check(row.values[2], flag)
			// An empty variable, as EnvironmentFile gives for an empty value,
			// is none; like an empty value in the file.
			t.Setenv(row.key, "")
			check(row.values[0])
			file = configFile(t, row.key+"=\n")
			check(row.byDefault)
		})
	}
}

// Every key has a row, and a flag of the same name but for those that users
// know by another one.
func TestTableIsComplete(t *testing.T) {
	root := commandLine()
	known := knownKeys(root)
	var want []string
	for _, row := range table {
		want = append(want, row.key)
		i := slices.IndexFunc(root.Flags, func(f cli.Flag) bool { return slices.Contains(f.Names(), row.flag) })
		if i < 0 {
			t.Errorf("no flag --%s", row.flag)
			continue
		}
		if keys := root.Flags[i].(cli.DocGenerationFlag).GetEnvVars(); !slices.Equal(keys, []string{row.key}) {
			t.Errorf("flag --%s reads %q, want %s", row.flag, keys, row.key)
		}
		if name := strings.ReplaceAll(strings.ToLower(row.key), "_", "-"); name != row.flag && name != "ipam-debug" && name != "plugin-socket" {
			t.Errorf("key %s and flag --%s", row.key, row.flag)
		}
	}
	slices.Sort(want)
	slices.Sort(known)
	if !slices.Equal(known, want) {
		t.Errorf("known keys are %q, want %q", known, want)
	}
	for _, key := range optionKeys {
		if !slices.Contains(lease.OptionNames(), optionName(key)) {
			t.Errorf("key %s is no --ipam-opt", key)
		}
	}
}

// The README's tables name every flag, key and option once, and no others.
func TestReadmeTables(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := func(pattern string) (found []string) {
		for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(string(text), -1) {
			found = append(found, m[1])
		}
		slices.Sort(found)
		return found
	}
	var flags []string
	for _, row := range table {
		flags = append(flags, row.flag+"` | `"+row.key)
	}
	slices.Sort(flags)
	if got := rows("(?m)^\\| `--([a-z-]+` \\| `[A-Z_]+)` \\| "); !slices.Equal(got, flags) {
		t.Errorf("flags and keys are\n%q, want\n%q", got, flags)
	}
	if got := rows("(?m)^\\| `([a-z_0-9]+)=[^`]*` \\| "); !slices.Equal(got, lease.OptionNames()) {
		t.Errorf("options are\n%q, want\n%q", got, lease.OptionNames())
	}
	var commands []string
	for _, c := range commandLine().Commands {
		commands = append(commands, c.Name)
	}
	slices.Sort(commands)
	if got := rows("(?m)^\\| `oam-docker-ipam ([a-z-]+)[^`]*` \\| "); !slices.Equal(got, commands) {
		t.Errorf("commands are %q, want %q", got, commands)
	}
}

// The file that ships names every key, and the defaults are the real ones.
func TestShippedFile(t *testing.T) {
	cleanEnv(t)
	assigned := regexp.MustCompile(`(?m)^(#?)([A-Z_]+)=(.*)$`)
	var keys []string
	for _, m := range assigned.FindAllStringSubmatch(conf.Shipped, -1) {
		key, value := m[2], m[3]
		keys = append(keys, key)
		i := slices.IndexFunc(table, func(row row) bool { return row.key == key })
		if i < 0 {
			t.Errorf("%s is no key", key)
			continue
		}
		if want := cmp.Or(examples[key], table[i].byDefault); value != want {
			t.Errorf("%s=%s ships, the default is %s", key, value, want)
		}
		if examples[key] != "" && m[1] != "#" {
			t.Errorf("%s is set in what ships", key)
		}
	}
	for _, row := range table {
		if n := len(slices.DeleteFunc(slices.Clone(keys), func(k string) bool { return k != row.key })); n != 1 {
			t.Errorf("%s stands there %d times", row.key, n)
		}
	}
	all := assigned.ReplaceAllString(conf.Shipped, "$2=$3")
	without := func(key string) string { return strings.Replace(all, "\n"+key+"=", "\n#"+key+"=", 1) }
	for name, text := range map[string]string{"as it is": conf.Shipped, "as a relay agent": without("DHCP_INTERFACE"), "by broadcast": without("DHCP_SERVER")} {
		s, err := settingsOf(t, configFile(t, text))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, row := range table {
			if got := row.show(s); got != row.byDefault && (name == "as it is" || got != examples[row.key]) {
				t.Errorf("%s: %s is %q", name, row.key, got)
			}
		}
	}
}

// The old unit's way of writing it, and others.
func TestDebugFlag(t *testing.T) {
	cleanEnv(t)
	for _, c := range []struct {
		flags []string
		want  bool
	}{
		{nil, false},
		{[]string{"--debug=true"}, true},
		{[]string{"--debug"}, true},
		{[]string{"-debug=true"}, true},
		{[]string{"--debug=false"}, false},
	} {
		s, err := settingsOf(t, "", c.flags...)
		if err != nil || s.debug != c.want {
			t.Errorf("%q: debug %t, %v", c.flags, s.debug, err)
		}
	}
}

// A socket follows the driver's name unless it is given.
func TestSocketOfDriver(t *testing.T) {
	cleanEnv(t)
	s, err := settingsOf(t, "", "--driver-name=mine")
	if err != nil || s.socket != "/run/docker/plugins/mine.sock" {
		t.Errorf("socket %s, %v", s.socket, err)
	}
}

// outcome is what a run of the program left.
type outcome struct {
	status         int
	stdout, stderr string
}

func program(args ...string) outcome {
	var stdout, stderr bytes.Buffer
	status := run(append([]string{"oam-docker-ipam"}, args...), &stdout, &stderr)
	return outcome{status, stdout.String(), stderr.String()}
}

// Whatever is wrong with the command line or the settings: one clear line,
// and status 1. None of these may come as far as serving.
func TestBadValues(t *testing.T) {
	cleanEnv(t)
	good := configFile(t, "")
	for _, c := range []struct {
		name string
		args []string
		file string // text of a configuration file
		env  string // KEY=value
		want []string
	}{
		{name: "unknown command", args: []string{"serve"}, want: []string{`"serve"`, "--help"}},
		{name: "unknown flag", args: []string{"--nonsense", "server"}, want: []string{"nonsense"}},
		{name: "unknown flag of server", args: []string{"server", "--nonsense"}, want: []string{"nonsense"}},
		{name: "unknown flag of leases", args: []string{"leases", "--nonsense"}, want: []string{"nonsense"}},
		{name: "argument of server", args: []string{"--config", good, "server", "start"}, want: []string{"start"}},
		{name: "argument of leases", args: []string{"leases", "192.0.2.300"}, want: []string{"192.0.2.300"}},
		{name: "arguments of leases", args: []string{"leases", "192.0.2.1", "192.0.2.2"}, want: []string{"192.0.2.2"}},
		{name: "argument of version", args: []string{"version", "1"}, want: []string{`"1"`}},
		{name: "flag without its value", args: []string{"server", "--data-dir"}, want: []string{"data-dir"}},
		{name: "file missing", args: []string{"--config", "/nonexistent.conf", "server"}, want: []string{"/nonexistent.conf", "no such file"}},
		{name: "file missing, leases", args: []string{"--config", "/nonexistent.conf", "leases"}, want: []string{"/nonexistent.conf"}},
		{name: "file is a folder", args: []string{"--config", t.TempDir(), "server"}, want: []string{"is a directory"}},
		{name: "file malformed", file: "DHCP_SERVER 192.0.2.1\n", want: []string{"line 1", "DHCP_SERVER 192.0.2.1", "KEY=VALUE"}},
		{name: "config behind the command", args: []string{"server", "--config", good}, want: []string{"config"}},
		{name: "server", args: []string{"--config", good, "--dhcp-server", "10.0.0.300", "server"}, want: []string{"dhcp_server", "10.0.0.300"}},
		{name: "server broadcast", file: "DHCP_SERVER=255.255.255.255", want: []string{"dhcp_server", "255.255.255.255"}},
		{name: "server's port", env: "DHCP_SERVER=192.0.2.1:dhcp", want: []string{"dhcp_server", "192.0.2.1:dhcp"}},
		{name: "empty server in a list", file: "DHCP_SERVER=192.0.2.1,,192.0.2.2", want: []string{"dhcp_server"}},
		{name: "relay", file: "LISTEN_ADDR=eth0", want: []string{"listen_addr", "eth0"}},
		{name: "relay IPv6", env: "LISTEN_ADDR=::1", want: []string{"listen_addr", "::1"}},
		{name: "interface", file: "DHCP_INTERFACE=eth0/1", want: []string{"dhcp_interface", "eth0/1", "interface such as eth0"}},
		{name: "servers and interface", file: "DHCP_SERVER=192.0.2.1\nDHCP_INTERFACE=eth0", want: []string{"DHCP_SERVER=192.0.2.1", "DHCP_INTERFACE=eth0", ".conf:1)", ".conf:2)", "exclude each other", "take one out"}},
		{name: "servers and typed interface", args: []string{"--config", good, "--dhcp-interface=eth0", "server"}, env: "DHCP_SERVER=192.0.2.1", want: []string{"DHCP_SERVER=192.0.2.1", "environment variable DHCP_SERVER", "DHCP_INTERFACE=eth0", "flag --dhcp-interface"}},
		{name: "relay port", file: "LISTEN_PORT=dhcp", want: []string{"listen_port", "dhcp", "1 to 65535"}},
		{name: "relay port zero", env: "LISTEN_PORT=0", want: []string{"listen_port", `"0"`}},
		{name: "relay port too high", args: []string{"--config", good, "--listen-port=65536", "server"}, want: []string{"listen_port", "65536"}},
		{name: "discover, servers and interface", args: []string{"--config", good, "--dhcp-server=192.0.2.1", "discover", "--interface=eth0"}, want: []string{"DHCP_SERVER=192.0.2.1", "DHCP_INTERFACE=eth0"}},
		{name: "discover, wrong server", args: []string{"--config", good, "discover", "--dhcp-server=10.0.0.300"}, want: []string{"dhcp_server", "10.0.0.300"}},
		{name: "discover, nobody to ask", args: []string{"--config", good, "discover"}, want: []string{"DHCP_SERVER", "--dhcp-server", "DHCP_INTERFACE", "--dhcp-interface"}},
		{name: "discover, wrong file", args: []string{"--config", "/nonexistent.conf", "discover"}, want: []string{"/nonexistent.conf"}},
		{name: "discover, MAC", args: []string{"--config", good, "discover", "--mac=02:00"}, want: []string{"--mac", `"02:00"`, "six bytes"}},
		{name: "discover, MAC of a group", args: []string{"--config", good, "discover", "--mac=01:00:5e:00:00:01"}, want: []string{"--mac", "01:00:5e:00:00:01", "group"}},
		{name: "discover, MAC zero", args: []string{"--config", good, "discover", "--mac=00:00:00:00:00:00"}, want: []string{"--mac", "zero"}},
		{name: "discover, subnet", args: []string{"--config", good, "discover", "--subnet=192.0.2.0"}, want: []string{"192.0.2.0", "192.0.2.0/24"}},
		{name: "discover, IPv6 subnet", args: []string{"--config", good, "discover", "--subnet=fd00::/64"}, want: []string{"fd00::/64", "IPv4 only"}},
		{name: "discover, argument", args: []string{"--config", good, "discover", "eth0"}, want: []string{"discover", `"eth0"`}},
		{name: "driver", file: "DRIVER_NAME=a/b", want: []string{"DRIVER_NAME", "a/b"}},
		{name: "driver with dots", file: "DRIVER_NAME=../x", want: []string{"DRIVER_NAME", "../x"}},
		{name: "empty driver", args: []string{"--config", good, "--driver-name=", "server"}, want: []string{"DRIVER_NAME"}},
		{name: "empty data folder", args: []string{"--config", good, "--data-dir=", "server"}, want: []string{"DATA_DIR"}},
		{name: "engine", file: "\nDOCKER=tcp://192.0.2.1:2375", want: []string{".conf:2", "tcp://192.0.2.1:2375", "unix:///var/run/docker.sock"}},
		{name: "relative socket", file: "PLUGIN_SOCKET=a.sock", want: []string{".conf:1: PLUGIN_SOCKET=\"a.sock\"", "absolute"}},
		{name: "log format", file: "LOG_FORMAT=xml", want: []string{".conf:1: LOG_FORMAT=\"xml\"", "auto, text or json"}},
		{name: "where in the file", file: "# x\nLISTEN_PORT=1\nRELEASE_DELAY=soon\n", want: []string{".conf:3: option release_delay=\"soon\""}},
		{name: "where in the environment", env: "CLIENT_ID=x", want: []string{"environment variable CLIENT_ID: option client_id"}},
		{name: "where on the command line", args: []string{"--config", good, "--client-id=x", "server"}, want: []string{"flag --client-id: option client_id"}},
		{name: "time without unit, where", file: "\nDHCP_TIMEOUT=30", want: []string{".conf:2"}},
		{name: "config, wrong file", args: []string{"--config", "/nonexistent.conf", "config"}, want: []string{"/nonexistent.conf"}},
		{name: "time without unit, config", args: []string{"--config", good, "--dhcp-timeout=30", "config"}, want: []string{"dhcp-timeout"}},
		{name: "config --check", args: []string{"--config", good, "--listen-addr=x", "config", "--check"}, want: []string{"flag --listen-addr: option listen_addr=\"x\""}},
		{name: "time without unit", file: "DHCP_TIMEOUT=30", want: []string{"DHCP_TIMEOUT", `"30"`}},
		{name: "time zero", file: "DHCP_TIMEOUT=0s", want: []string{"DHCP_TIMEOUT", "0s"}},
		{name: "time negative", env: "DHCP_TIMEOUT=-1s", want: []string{"DHCP_TIMEOUT", "-1s"}},
		{name: "debug in the environment", env: "IPAM_DEBUG=perhaps", want: []string{"IPAM_DEBUG", "perhaps"}},
		{name: "debug in the file", file: "IPAM_DEBUG=perhaps", want: []string{"IPAM_DEBUG", "perhaps"}},
		{name: "data folder impossible", args: []string{"--config", good, "server"}, want: []string{"make data folder", "/dev/null"}},
		{name: "release without key", args: []string{"release"}, want: []string{"address or MAC"}},
		{name: "release of two", args: []string{"release", "192.0.2.1", "192.0.2.2"}, want: []string{"address or MAC"}},
		{name: "leases, not running", args: []string{"--socket=/nonexistent.sock", "leases"}, want: []string{"not running", "/nonexistent.sock"}},
		{name: "release, not running", args: []string{"--socket=/nonexistent.sock", "release", "192.0.2.1"}, want: []string{"not running"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			// What is taken in spite of all ends here, before it serves.
			t.Setenv("DATA_DIR", "/dev/null/none")
			args := c.args
			if args == nil {
				args = []string{"--config", configFile(t, c.file), "server"}
			}
			if key, value, ok := strings.Cut(c.env, "="); ok {
				t.Setenv(key, value)
			}
			got := program(args...)
			if got.status != 1 || got.stdout != "" {
				t.Errorf("status %d, stdout %q", got.status, got.stdout)
			}
			if !strings.HasPrefix(got.stderr, "oam-docker-ipam: ") || strings.Count(got.stderr, "\n") != 1 || !strings.HasSuffix(got.stderr, "\n") {
				t.Errorf("stderr is no single line: %q", got.stderr)
			}
			for _, part := range c.want {
				if !strings.Contains(got.stderr, part) {
					t.Errorf("stderr %q lacks %q", got.stderr, part)
				}
			}
		})
	}
}

// version works whatever else is wrong.
func TestVersion(t *testing.T) {
	cleanEnv(t)
	for _, args := range [][]string{{"version"}, {"--config", "/nonexistent.conf", "version"}} {
		got := program(args...)
		if want := "oam-docker-ipam " + version + " (commit " + commit() + ")\n"; got.status != 0 || got.stdout != want || got.stderr != "" {
			t.Errorf("%q: %+v, want %q", args, got, want)
		}
	}
	got := program("version", "--json")
	var v map[string]string
	if err := json.Unmarshal([]byte(got.stdout), &v); err != nil || v["version"] != version || v["commit"] == "" || len(v) != 2 {
		t.Errorf("%+v: %v", got, err)
	}
}

func TestHelp(t *testing.T) {
	cleanEnv(t)
	for _, args := range [][]string{{}, {"--help"}, {"help"}} {
		got := program(args...)
		if got.status != 0 || got.stderr != "" {
			t.Errorf("%q: status %d, stderr %q", args, got.status, got.stderr)
		}
		for _, row := range table {
			if !strings.Contains(got.stdout, "--"+row.flag) || !strings.Contains(got.stdout, "$"+row.key) {
				t.Errorf("%q doesn't tell of --%s and %s", args, row.flag, row.key)
			}
		}
		for _, name := range []string{"server", "leases", "pools", "inspect", "inspect-all", "events", "release", "reconcile", "discover", "config", "version", "--config"} {
			if !strings.Contains(got.stdout, name) {
				t.Errorf("%q doesn't tell of %s", args, name)
			}
		}
	}
}

// home is a daemon's data folder and socket, with a stored lease that never
// ends: nothing is sent about it, so no port is opened.
func home(t *testing.T) settings {
	t.Helper()
	folder, err := os.MkdirTemp("", "ipam")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	s := settings{driver: "talkingdata", socket: filepath.Join(folder, "plugin.sock"), dataDir: filepath.Join(folder, "data"), docker: "unix:///run/no-engine.sock", timeout: time.Second}
	db, err := store.Open(s.dataDir)
	if err != nil {
		t.Fatal(err)
	}
	pool := lease.Pool{ID: "p", Subnet: netip.MustParsePrefix("192.0.2.0/24"), Gateway: netip.MustParseAddr("192.0.2.1")}
	l := lease.Lease{
		Pool: "p", MAC: lease.MAC{2, 0, 0, 0, 0, 9}, Name: "web", ClientID: []byte{1, 2}, Prefix: netip.MustParsePrefix("192.0.2.9/24"),
		Server: netip.MustParseAddr("192.0.2.3"), Via: netip.MustParseAddrPort("192.0.2.3:67"), Obtained: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
	}
	for _, err := range []error{db.Commit(lease.Change{PutPools: []lease.Pool{pool}, PutLeases: []lease.Lease{l}}), db.Close()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// startServe runs the daemon until stop, and returns once its socket serves.
func startServe(t *testing.T, s settings) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	up := &waiter{text: "msg=serving", seen: make(chan bool)}
	go func() { ended <- newDaemon(s, up).run(ctx, s) }()
	select {
	case <-up.seen:
	case err := <-ended:
		t.Fatalf("serve: %v", err)
	}
	return func() error { cancel(); return <-ended }
}

// waiter closes seen when a text is written to it.
type waiter struct {
	text string
	seen chan bool
}

func (w *waiter) Write(b []byte) (int, error) {
	if w.text != "" && strings.Contains(string(b), w.text) {
		w.text = ""
		close(w.seen)
	}
	return len(b), nil
}

func TestServe(t *testing.T) {
	cleanEnv(t)
	s := home(t)
	stop := startServe(t, s)
	socket := "--socket=" + s.socket

	got := program(socket, "leases")
	want := "ADDRESS    MAC                NAME  SUBNET        STATE  SERVER     LEFT\n" +
		"192.0.2.9  02:00:00:00:00:09  web   192.0.2.0/24  bound  192.0.2.3  for ever\n"
	if got.status != 0 || got.stdout != want || got.stderr != "" {
		t.Errorf("leases: %+v, want %q", got, want)
	}
	got = program(socket, "leases", "--json")
	var leases []server.Lease
	if err := json.Unmarshal([]byte(got.stdout), &leases); err != nil || len(leases) != 1 || leases[0].Name != "web" {
		t.Errorf("leases --json: %+v: %v", got, err)
	}
	// Flags of the program may stand behind the command too.
	if behind := program("leases", socket); behind.stdout != want {
		t.Errorf("leases %s: %+v", socket, behind)
	}

	second := s
	second.socket += "2"
	if err := newDaemon(second, io.Discard).run(t.Context(), second); err == nil || !strings.Contains(err.Error(), s.dataDir) {
		t.Errorf("a second daemon on the same data: %v", err)
	}
	second = home(t)
	second.socket = s.socket
	if err := newDaemon(second, io.Discard).run(t.Context(), second); err == nil || !strings.Contains(err.Error(), s.socket) {
		t.Errorf("a second daemon on the same socket: %v", err)
	}

	if err := stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
	if got := program(socket, "leases"); got.status != 1 || !strings.Contains(got.stderr, "not running") {
		t.Errorf("leases after the end: %+v", got)
	}
	// Nothing was released, and the next start has it.
	stop = startServe(t, s)
	if got := program(socket, "leases"); got.stdout != want {
		t.Errorf("leases after a restart: %+v", got)
	}
	got = program(socket, "release", "192.0.2.9")
	if got.status != 0 || got.stdout != "released 192.0.2.9 of 02:00:00:00:00:09 to 192.0.2.3\n" {
		t.Errorf("release: %+v", got)
	}
	if got = program(socket, "release", "192.0.2.9"); got.status != 1 || !strings.Contains(got.stderr, "no such lease") {
		t.Errorf("release once more: %+v", got)
	}
	if got = program(socket, "leases"); got.status != 0 || got.stdout != "no leases\n" {
		t.Errorf("leases: %+v", got)
	}
	if got = program(socket, "leases", "--json"); got.stdout != "[]\n" {
		t.Errorf("leases --json: %+v", got)
	}
	if err := stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
}

// The real thing: settings from a file, started and ended as systemd does.
func TestProgramServes(t *testing.T) {
	cleanEnv(t)
	s := home(t)
	file := configFile(t, fmt.Sprintf("[daemon]\nDATA_DIR='%s' # kept\nPLUGIN_SOCKET=\"%s\"\nDHCP_SEVER=192.0.2.1\n", s.dataDir, s.socket))
	ctx, cancel := context.WithCancel(t.Context())
	stderr := &waiter{text: "msg=serving", seen: make(chan bool)}
	unknown := &waiter{text: "DHCP_SEVER", seen: make(chan bool)}
	ended := make(chan error, 1)
	go func() {
		root := command(io.Discard, io.Discard, func(ctx context.Context, s settings) error { return newDaemon(s, both{stderr, unknown}).run(ctx, s) })
		ended <- root.Run(ctx, []string{"oam-docker-ipam", "--debug=true", "--config", file, "server"})
	}()
	select {
	case <-stderr.seen:
	case err := <-ended:
		t.Fatalf("ended: %v", err)
	}
	if got := program("--config", file, "leases"); got.status != 0 || !strings.Contains(got.stdout, "192.0.2.9") {
		t.Errorf("leases: %+v", got)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	select {
	case <-unknown.seen:
	default:
		t.Error("an unknown key in the file is not warned of")
	}
}

// both writes to two writers.
type both [2]*waiter

func (b both) Write(p []byte) (int, error) {
	for _, w := range b {
		_, _ = w.Write(p)
	}
	return len(p), nil
}
