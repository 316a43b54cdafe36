package machine

import (
	"os"
	"testing"
)

// What keeps the daemon from its work, and what it says of it.
func TestRefusals(t *testing.T) {
	s := newInstalled(t)
	s.run("systemctl", "enable", "--now", name)
	restarts := func(want ...string) {
		t.Helper()
		s.fails("systemctl", "restart", name)
		s.logged(want...)
		s.mentions(s.run("systemctl", "show", "--property=ActiveState", name+".socket"), "=active")
		s.run("systemctl", "stop", name)
	}

	// Once more, by hand.
	s.mentions(s.fails(name, "server"), "lock")

	// Another driver's name than the socket's.
	good := s.run("cat", conf) + "\n"
	s.configure("DRIVER_NAME=other\n")
	restarts("/run/docker/plugins/talkingdata.sock", "ListenStream=/run/docker/plugins/other.sock", "systemctl edit oam-docker-ipam.socket")
	// … and what it asks for.
	s.run("systemctl", "stop", name+".socket")
	edit := "/etc/systemd/system/oam-docker-ipam.socket.d/override.conf"
	s.write(edit, "[Socket]\nListenStream=\nListenStream=/run/docker/plugins/other.sock\nListenStream=/run/docker/plugins/other-ipvlan.sock\n")
	s.run("systemctl", "daemon-reload")
	s.run("systemctl", "start", name+".socket")
	if left := s.run("find", "/run/docker/plugins", "-name", "talkingdata*"); left != "" {
		t.Errorf("sockets that nobody serves are left for Docker to try: %s", left)
	}
	s.docker("network", "create", "-d", "macvlan", "--ipam-driver=other", "--subnet=10.10.0.0/24", "-o", "parent=eth0", "other")
	s.docker("network", "rm", "other")
	s.run("systemctl", "stop", name+".socket")
	s.run("rm", edit)
	s.run("systemctl", "daemon-reload")
	s.run("systemctl", "start", name+".socket")

	// A configuration that the daemon's user can't read.
	s.write(conf, good)
	check(t, os.Chmod(s.machine.Path(conf), 0o600))
	restarts(conf, "permission denied")
	check(t, os.Chmod(s.machine.Path(conf), 0o644))

	// Keys that mean nothing are no reason to stop.
	s.configure("DHCP_SERVERS=10.10.0.1\n")
	s.run("systemctl", "restart", name)
	s.logged("unknown key", "DHCP_SERVERS", conf)

	// The state folder is the daemon's whatever somebody made of it.
	s.run("systemctl", "stop", name)
	s.sh("chown -R root:root " + stateDir + "; chmod 755 " + stateDir)
	s.run("systemctl", "start", name)
	s.network()
	s.only(s.runContainer("c1"))
	s.docker("rm", "-f", "c1")

	// A file where the socket is to be.
	s.run("systemctl", "stop", name+".socket")
	s.write(pluginAt, "not a socket")
	s.run("systemctl", "start", name)
	check(t, s.capabilities())
}
