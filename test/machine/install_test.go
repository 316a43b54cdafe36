package machine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
)

// The README's quick start, from dnf install to dnf remove.
func TestRPM(t *testing.T) {
	s := newSite(t, rpm)
	s.install(must(rpm())(t))
	for _, unit := range []string{name + ".socket", name + ".service", name + "-reconcile.timer"} {
		if state := s.property(unit, "UnitFileState") + " " + s.property(unit, "ActiveState"); state != "disabled inactive" {
			t.Errorf("%s is %s once installed", unit, state)
		}
	}
	s.configure("DHCP_SERVER=10.10.0.1\n")
	s.run("systemctl", "start", name)
	s.mainJob()
	s.leastPrivilege()
	s.journalled()

	// It stays over the removal, with its lease.
	s.runContainer("left")
	s.reconciles()
	s.tellsStatus("servers 10.10.0.1; leases 1 (bound 1), pools 1, last renewal 20")
	s.configure("IPAM_DEBUG=true\n")
	s.run("dnf", "remove", "--assumeyes", name) // nobody is there to answer a question
	if units := s.try("systemctl", "list-unit-files", "--no-legend", name+"*"); units != "" && !strings.HasPrefix(units, "run ") {
		t.Errorf("units left: %s", units)
	}
	if running := s.try("pgrep", "-f", "/usr/bin/"+name); strings.HasPrefix(running, "1") {
		t.Errorf("left running: %s", running)
	}
	s.gone("/usr/bin/"+name, pluginAt, conf)
	if text := must(os.ReadFile(s.machine.Path(conf + ".rpmsave")))(t); !strings.HasSuffix(string(text), "IPAM_DEBUG=true\n") {
		t.Errorf("the changed configuration is kept as %q", text)
	}
	s.run("test", "-s", stateDir+"/oam-docker-ipam.db")

	// What was kept counts when the package comes back.
	s.install(must(rpm())(t))
	s.configure("DHCP_SERVER=10.10.0.1\n")
	s.run("systemctl", "start", name)
	s.only(s.holds("left"))
	s.docker("rm", "-f", "left")
	s.only()

	s.run("dnf", "remove", "--assumeyes", name)
	purge := regexp.MustCompile("```sh\n(rm -rf [^`]*\nuserdel [^`]*)```").FindSubmatch(must(os.ReadFile("../../README.md"))(t))
	if purge == nil {
		t.Fatal("the README says no more how to remove all")
	}
	s.sh(string(purge[1]))
	if left := s.run("find", "/etc", "/run", "/usr", "/var/lib", "-name", "*"+name+"*"); left != "" {
		t.Errorf("left after the README's purge: %s", left)
	}
	s.fails("getent", "passwd", name)
	s.fails("getent", "group", name)
}

// Debian's package does the same, and starts by itself, as Debian's do.
func TestDebianPackage(t *testing.T) {
	s := newSite(t, deb)
	apt := func(args ...string) string {
		return s.run(append([]string{"env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--assume-yes"}, args...)...)
	}
	apt("install", s.copyIn(must(deb())(t)))
	s.configure("DHCP_SERVER=10.10.0.1\n")
	s.run("systemctl", "restart", name)
	s.mainJob()

	was, before := s.runContainer("left"), s.pid()
	apt("install", s.copyIn(must(laterDeb())(t)))
	s.state(name+".service", "active")
	if now := s.pid(); now == before {
		t.Errorf("process %d has survived the upgrade", before)
	}
	s.only(was)

	apt("remove", name)
	s.gone("/usr/bin/"+name, pluginAt)
	s.run("test", "-s", stateDir+"/oam-docker-ipam.db")
	s.run("grep", "-q", "^DHCP_SERVER=10.10.0.1$", conf)
	apt("install", s.copyIn(must(laterDeb())(t)))
	// Nobody has to call it for the leases to be renewed.
	s.state(name+".service", "active")
	s.only(s.holds("left"))
	s.docker("rm", "-f", "left")

	apt("purge", name)
	s.gone(stateDir, conf)
	if units := s.try("systemctl", "list-unit-files", "--no-legend", name+"*"); units != "" && !strings.HasPrefix(units, "run ") {
		t.Errorf("units left: %s", units)
	}
}

// Only the socket needs to be enabled: the first call of the engine starts the
// daemon.
func TestSocketActivation(t *testing.T) {
	s := newInstalled(t)
	s.run("systemctl", "enable", "--now", name+".socket")
	if state := s.property(name+".service", "ActiveState"); state != "inactive" {
		t.Fatalf("the service is %s before anybody called", state)
	}
	s.mainJob()
	s.state(name+".service", "active")

	// The driver for ipvlan, which asks for no MACs, is at the other socket.
	var out struct{ RequiresMACAddress bool }
	check(t, s.plugin("/run/docker/plugins/talkingdata-ipvlan.sock").Call(t.Context(), "GetCapabilities", struct{}{}, &out))
	if out.RequiresMACAddress {
		t.Error("the driver for ipvlan wants MAC addresses")
	}
}

// mainJob is what all of this is for: a network, a container and its release.
func (s *site) mainJob() {
	s.Helper()
	s.network()
	addr := s.runContainer("job")
	s.only(addr)
	s.docker("rm", "-f", "job")
	s.only()
}

// tellsStatus waits until `systemctl status` shows who is asked and what is
// leased.
func (s *site) tellsStatus(want string) {
	s.Helper()
	s.eventually(15*time.Second, func() error {
		status := s.run("systemctl", "status", "--no-pager", "--full", name)
		if !strings.Contains(status, "active (running)") || !strings.Contains(status, `Status: "`+want) {
			return fmt.Errorf("the status isn't %q: %s", want, status)
		}
		return nil
	})
}

// reconciles sees that the hourly service does its work, and does it hourly.
func (s *site) reconciles() {
	s.Helper()
	unit := name + "-reconcile"
	s.run("systemctl", "start", unit+".service")
	// What this engine doesn't tell the driver, it tells here.
	s.mentions(s.run("journalctl", "--no-pager", "--unit", unit), "named", "left", network)
	s.mentions(s.run(name, "leases"), "left")
	s.run("systemctl", "enable", "--now", unit+".timer")
	s.mentions(s.run("systemctl", "list-timers", unit+".timer"), unit+".service")
}

// leastPrivilege sees that the daemon is a user who may do no more than bind
// port 67, and that nobody else sees its state.
func (s *site) leastPrivilege() {
	s.Helper()
	status := s.run("cat", fmt.Sprintf("/proc/%d/status", s.pid()))
	const netBindService = "0000000000000400"
	for _, line := range []string{
		"CapPrm:\t" + netBindService, "CapEff:\t" + netBindService, "CapBnd:\t" + netBindService, "CapAmb:\t" + netBindService,
		"CapInh:\t" + netBindService, "NoNewPrivs:\t1", "Seccomp:\t2",
	} {
		s.mentions(status, line)
	}
	if user := s.run("stat", "--format=%U %G", fmt.Sprintf("/proc/%d", s.pid())); user != name+" "+name {
		s.Errorf("it runs as %s", user)
	}
	if state := s.run("stat", "--format=%U %G %a %F", stateDir); state != name+" "+name+" 700 directory" {
		s.Errorf("the state folder is %s", state)
	}
	if socket := s.run("stat", "--format=%U %a %F", pluginAt); socket != "root 600 socket" {
		s.Errorf("the socket is %s", socket)
	}
}

// journalled sees that an entry has a level and fields, and no time of its own.
func (s *site) journalled() {
	s.Helper()
	e := s.logged("lease", "address=10.10.0.")
	for field, want := range map[string]string{
		"PRIORITY": "6", "SYSLOG_IDENTIFIER": name, "_SYSTEMD_UNIT": name + ".service",
	} {
		if e[field] != want {
			s.Errorf("%s is %v in %v", field, e[field], e)
		}
	}
	if address, _ := e["ADDRESS"].(string); !strings.HasPrefix(address, "10.10.0.") {
		s.Errorf("ADDRESS is %v in %v", e["ADDRESS"], e)
	}
	for _, e := range s.journal("_COMM=" + name) {
		if text := e.String(); strings.Contains(text, "time=") || strings.Contains(text, "level=") {
			s.Errorf("an entry has a time or a level twice: %s", text)
		}
	}
}

// gone sees that there are no such files.
func (s *site) gone(files ...string) {
	s.Helper()
	for _, file := range files {
		if _, err := os.Lstat(s.machine.Path(file)); !errors.Is(err, fs.ErrNotExist) {
			s.Errorf("%s is still there, %v", file, err)
		}
	}
}
