package systemd_test

import (
	"cmp"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/unit"

	"github.com/talkingdata/oam-docker-ipam/conf"
	"github.com/talkingdata/oam-docker-ipam/lease"
)

const (
	program = "/usr/bin/oam-docker-ipam"
	service = "oam-docker-ipam.service"
	socket  = "oam-docker-ipam.socket"
	timer   = "oam-docker-ipam-reconcile.timer"
)

// units are all that the packages install.
var units = []string{service, socket, "oam-docker-ipam-reconcile.service", timer}

// docker is the start of Docker's own units, as far as it orders them.
var docker = map[string]string{
	"docker.service": `[Unit]
After=network-online.target docker.socket firewalld.service containerd.service
Wants=network-online.target
Requires=docker.socket
[Service]
ExecStart=/usr/bin/dockerd
[Install]
WantedBy=multi-user.target`,
	"docker.socket": `[Socket]
ListenStream=/run/docker.sock
[Install]
WantedBy=sockets.target`,
}

// tool skips the test where a program is missing, but not in CI.
func tool(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err == nil {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s is missing (test/install installs it)", name)
	}
	t.Skipf("%s is missing", name)
}

// run returns what a command wrote.
func run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// put writes a file into a root folder.
func put(t *testing.T, root, path, text string, mode os.FileMode) {
	t.Helper()
	name := filepath.Join(root, path)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

const unitDir = "/usr/lib/systemd/system"

// install makes a root folder with the units, stubs of the programs they start,
// Docker's units, and this machine's targets.
func install(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for _, path := range []string{program, "/bin/sh", "/usr/bin/dockerd"} {
		put(t, root, path, "#!/bin/sh\n", 0o755)
	}
	targets, err := filepath.Glob(unitDir + "/*.target")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range slices.Concat(targets, units) {
		put(t, root, filepath.Join(unitDir, filepath.Base(file)), read(t, file), 0o644)
	}
	for name, text := range docker {
		put(t, root, filepath.Join(unitDir, name), text, 0o644)
	}
	return root
}

// dropIn puts a drop-in where its own text tells its reader to.
func dropIn(t *testing.T, root, file string) {
	t.Helper()
	text := read(t, file)
	path := regexp.MustCompile(`/etc/systemd/system/\S+\.service\.d/` + file).FindString(text)
	if path == "" {
		t.Fatalf("%s doesn't say where to install it", file)
	}
	put(t, root, path, text, 0o644)
}

// systemd itself finds nothing to remark on: no unknown key, no program that
// isn't there, and no cycle in the order with Docker and the network, whether
// the service is enabled, or as little as its socket.
func TestVerify(t *testing.T) {
	tool(t, "systemd-analyze")
	for _, c := range []struct {
		name    string
		enabled []string
		wanted  []string // by which targets
	}{
		{"service enabled", []string{service}, []string{"multi-user.target.wants/" + service, "sockets.target.wants/" + socket}},
		{"socket enabled", []string{socket}, []string{"sockets.target.wants/" + socket}},
		{"all enabled, with the drop-in", []string{service, timer}, []string{
			"multi-user.target.wants/" + service, "sockets.target.wants/" + socket, "timers.target.wants/" + timer,
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := install(t)
			if len(c.enabled) > 1 {
				dropIn(t, root, "broadcast.conf")
			}
			run(t, slices.Concat([]string{"systemctl", "--root=" + root, "enable", "docker.service", "docker.socket"}, c.enabled)...)
			var wanted []string
			links, err := filepath.Glob(root + "/etc/systemd/system/*.wants/oam-*")
			if err != nil {
				t.Fatal(err)
			}
			for _, link := range links {
				wanted = append(wanted, strings.TrimPrefix(link, root+"/etc/systemd/system/"))
			}
			if !slices.Equal(wanted, c.wanted) {
				t.Errorf("enabled as %q, want %q", wanted, c.wanted)
			}
			// The man page comes with the packages only.
			verify := slices.Concat([]string{"systemd-analyze", "verify", "--man=no", "--root=" + root, "multi-user.target"}, units)
			if out := run(t, verify...); out != "" {
				t.Errorf("systemd remarks:\n%s", out)
			}
		})
	}
}

var exposure = regexp.MustCompile(`Overall exposure level for (\S+): (\S+)`)

// The sandbox is as tight as promised. Of the score, 10 is worst.
func TestSecurity(t *testing.T) {
	tool(t, "systemd-analyze")
	for _, c := range []struct {
		name, unit, dropIn string
		limit              string // tenths
	}{
		{"relay mode", service, "", "15"},
		{"with broadcast.conf", service, "broadcast.conf", "17"},
		{"reconcile", "oam-docker-ipam-reconcile.service", "", "15"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := install(t)
			if c.dropIn != "" {
				dropIn(t, root, c.dropIn)
			}
			out := run(t, "systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold="+c.limit, "--root="+root, c.unit)
			score := exposure.FindStringSubmatch(out)
			if score == nil {
				t.Fatalf("no score:\n%s", out)
			}
			t.Logf("systemd-analyze security %s, %s: %s", score[1], c.name, score[2])
		})
	}
}

// options reads a unit's lines.
func options(t *testing.T, name string) []*unit.UnitOption {
	t.Helper()
	options, err := unit.DeserializeOptions(strings.NewReader(read(t, name)))
	if err != nil {
		t.Fatal(err)
	}
	return options
}

// values are all that a unit gives a key.
func values(t *testing.T, name, key string) (values []string) {
	t.Helper()
	for _, o := range options(t, name) {
		if o.Name == key {
			values = append(values, o.Value)
		}
	}
	return values
}

// What the units and the daemon must agree on: the sockets are those of its
// drivers, and its longest request and that one's commit fit in what it has to
// stop.
func TestUnitsFitTheDaemon(t *testing.T) {
	var sockets []string
	for _, d := range lease.Drivers("talkingdata") {
		sockets = append(sockets, "/run/docker/plugins/"+d.Name+".sock")
	}
	if got := values(t, socket, "ListenStream"); !slices.Equal(got, sockets) {
		t.Errorf("the sockets are %q, the drivers' %q", got, sockets)
	}
	stop, err := time.ParseDuration(strings.Join(values(t, service, "TimeoutStopSec"), ""))
	if err != nil {
		t.Fatal(err)
	}
	if longest := lease.FirstWait + 10*time.Second; stop <= longest {
		t.Errorf("it has %v to stop, and a request may take %v", stop, longest)
	}
}

// Docker starts after the sockets and the service, and so stops before them. The
// network is there before the service, and so outlives it.
func TestOrder(t *testing.T) {
	for _, c := range []struct{ unit, key, other string }{
		{socket, "Before", "docker.service"},
		{service, "Before", "docker.service"},
		{service, "After", socket},
		{service, "After", "network.target"},
		{service, "After", "network-online.target"},
	} {
		if got := strings.Fields(strings.Join(values(t, c.unit, c.key), " ")); !slices.Contains(got, c.other) {
			t.Errorf("%s: %s=%s lacks %s", c.unit, c.key, strings.Join(got, " "), c.other)
		}
	}
}

// The service's user is the one that sysusers makes, for good: its home is the
// state folder.
func TestUser(t *testing.T) {
	tool(t, "systemd-sysusers")
	root := t.TempDir()
	put(t, root, "/etc/hosts", "", 0o644) // for the folder
	put(t, root, "/usr/lib/sysusers.d/oam-docker-ipam.conf", read(t, "oam-docker-ipam.sysusers"), 0o644)
	run(t, "systemd-sysusers", "--root="+root)
	user, group := strings.Join(values(t, service, "User"), ""), strings.Join(values(t, service, "Group"), "")
	state := "/var/lib/" + strings.Join(values(t, service, "StateDirectory"), "")
	passwd := strings.Split(strings.TrimSpace(read(t, root+"/etc/passwd")), ":")
	if len(passwd) != 7 || passwd[0] != user || passwd[5] != state {
		t.Errorf("made %q, want user %s of %s", passwd, user, state)
	}
	if made := read(t, root+"/etc/group"); !strings.HasPrefix(made, group+":") {
		t.Errorf("made group %q, want %s", made, group)
	}
	if !strings.Contains(conf.Shipped, "#DATA_DIR="+state+"\n") {
		t.Errorf("the daemon's folder by default isn't %s", state)
	}
}

// Nothing sets the daemon's environment: it would outrank the configuration
// file when that is read again. And no limit closes the sockets.
func TestNoEnvironmentNoLimits(t *testing.T) {
	for _, name := range units {
		for _, o := range options(t, name) {
			if strings.HasPrefix(o.Name, "Environment") || o.Name == "PassEnvironment" {
				t.Errorf("%s has %s", name, o.Name)
			}
		}
	}
	for _, c := range []struct{ unit, key string }{
		{socket, "StartLimitIntervalSec"}, {socket, "TriggerLimitIntervalSec"}, {service, "StartLimitIntervalSec"},
	} {
		if got := strings.Join(values(t, c.unit, c.key), ""); got != "0" {
			t.Errorf("%s has %s=%s", c.unit, c.key, cmp.Or(got, "(its default)"))
		}
	}
}
