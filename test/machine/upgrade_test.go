package machine

import (
	"fmt"
	"strings"
	"testing"
)

// Restarts and an upgrade under a constant load of requests fail none of them:
// those in hand are finished, the others wait at the socket that systemd holds.
func TestRestartsAndUpgradeUnderLoad(t *testing.T) {
	s := newRunning(t)
	l := s.newLoad(6)
	l.some(t, s)
	for range 10 {
		s.run("systemctl", "restart", name)
	}
	l.some(t, s)
	s.install(must(laterRPM())(t))
	s.mentions(s.run(name, "version"), "3.0.1")
	s.logged("serving", "version=3.0.1")
	l.some(t, s)
	for range 10 {
		s.run("systemctl", "restart", name)
	}
	if n := l.cut.Load(); n != 0 {
		t.Errorf("%d calls were cut off", n)
	}
	l.end(s)
}

// The old package had its configuration elsewhere, a daemon that made its
// socket itself, and scriptlets that did nothing about it. Its networks are
// still there.
func TestUpgradeFromOldPackage(t *testing.T) {
	s := newSite(t, rpm)
	before := s.fromSpec(oldSpec)
	s.install(before)
	s.run("systemctl", "enable", "--now", name)
	s.eventually(patience, s.capabilities)
	s.network("--gateway=10.10.0.1")
	old := s.pid()
	s.write("/root/conf", s.sh("cat /etc/oam-docker-ipam/oam-docker-ipam.conf; stat -c '%y %i' /etc/oam-docker-ipam/oam-docker-ipam.conf"))

	said := s.install(must(rpm())(t))
	s.mentions(said, "copied DHCP_SERVER IPAM_DEBUG from /etc/oam-docker-ipam/oam-docker-ipam.conf to "+conf)
	s.state(name+".service", "active")
	s.state(name+".socket", "active")
	if s.property(name+".socket", "UnitFileState")+s.property(name+".service", "UnitFileState") != "enabledenabled" {
		t.Error("they aren't both enabled")
	}
	s.mentions(s.run(name, "version"), "3.0.0")
	s.gone(fmt.Sprintf("/proc/%d", old))
	settings := s.run(name, "config")
	for line := range strings.Lines(settings) {
		fields := strings.Fields(line)
		want, known := map[string]string{"DHCP_SERVER": "10.10.0.1", "IPAM_DEBUG": "true", "LISTEN_ADDR": "0.0.0.0"}[fields[0]]
		if known && fields[1] != want {
			t.Errorf("%s is %s", fields[0], fields[1])
		}
	}
	s.write("/root/conf2", s.sh("cat /etc/oam-docker-ipam/oam-docker-ipam.conf; stat -c '%y %i' /etc/oam-docker-ipam/oam-docker-ipam.conf"))
	s.run("cmp", "/root/conf", "/root/conf2")

	s.only(s.runContainer("c1"))
	s.docker("restart", "c1")
	s.only(s.holds("c1"))

	// Once only.
	s.sh("sed -i s/^DHCP_SERVER=.*/DHCP_SERVER=10.10.0.1,10.10.0.3/ " + conf)
	s.install(must(laterRPM())(t))
	s.mentions(s.run(name, "config"), "10.10.0.1,10.10.0.3")

	// The way back, and here again: whoever is installed is who serves.
	now := s.pid()
	s.run("rpm", "--upgrade", "--oldpackage", s.copyIn(before))
	s.gone(fmt.Sprintf("/proc/%d", now))
	s.eventually(patience, s.capabilities)
	s.mentions(s.run("cat", fmt.Sprintf("/proc/%d/cmdline", s.pid())), "python3")
	s.state(name+".socket", "inactive")
	s.run("rpm", "--upgrade", s.copyIn(must(laterRPM())(t)))
	s.state(name+".service", "active")
	check(t, s.capabilities())
	s.run("systemctl", "restart", name)
	check(t, s.capabilities())
	s.only(s.holds("c1"))
	s.docker("rm", "-f", "c1")
	s.only()
	s.docker("network", "rm", network)
}
