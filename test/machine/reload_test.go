package machine

import (
	"testing"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// A reload brings servers and log level into force in the running daemon, says
// what needs a restart, and changes nothing if the configuration is wrong.
func TestReload(t *testing.T) {
	s := newInstalled(t)
	second := must(s.lab.Node("second", "10.10.0.3/24"))(t)
	other := must(second.NewDHCP(lab.Kea, lab.DHCPConfig{Subnets: []lab.Subnet{lab.SubnetA()}}))(t)
	s.run("systemctl", "start", name)
	s.network()
	was := s.pid()
	s.runContainer("c1")

	s.configure("DHCP_SERVER=10.10.0.3\nIPAM_DEBUG=true\nDATA_DIR=/srv/elsewhere\n")
	s.run("systemctl", "reload", name)
	s.logged("setting changed", "DHCP_SERVER", "10.10.0.3")
	s.logged("restart", "DATA_DIR", "/srv/elsewhere")
	s.tellsStatus("servers 10.10.0.3; ")

	// A wrong file changes nothing, not even what is right in it.
	good := s.run("cat", conf)
	s.configure("DHCP_SERVER=10.10.0.1\nRELEASE_DELAY=soon\n")
	s.fails("systemctl", "reload", name)
	s.logged(conf, "release_delay", "soon")
	s.write(conf, good)
	s.state(name+".service", "active")

	check(t, s.dhcp.Kill())
	check(t, other.Start())
	s.docker("run", "-d", "--name", "c2", "--network", network, image)
	if leased := must(other.Leases())(t); len(leased) != 1 {
		t.Errorf("the new server leases %v", leased)
	}
	if e := s.logged("call done", "RequestAddress"); e["PRIORITY"] != "7" {
		t.Errorf("an entry of the debug level has priority %v: %v", e["PRIORITY"], e)
	}
	if now := s.pid(); now != was {
		t.Errorf("process %d is now %d", was, now)
	}
	if state := s.property(name+".service", "ActiveState"); state != "active" {
		t.Errorf("the service is %s", state)
	}
}

// Broadcast mode needs more rights than the unit gives: the error says how to
// give them.
func TestBroadcastMode(t *testing.T) {
	s := newSite(t, rpm)
	s.install(must(rpm())(t))
	s.configure("DHCP_INTERFACE=eth0\n")
	s.run("systemctl", "enable", "--now", name)
	s.mentions(s.dockerFails("network", "create", "-d", "macvlan", "--ipam-driver=talkingdata",
		"--subnet=10.10.0.0/24", "-o", "parent=eth0", network), "broadcast.conf")
	s.sh(`
		install -D -m 644 /usr/share/doc/oam-docker-ipam/broadcast.conf \
			/etc/systemd/system/oam-docker-ipam.service.d/broadcast.conf
		systemctl daemon-reload
		systemctl restart oam-docker-ipam.service`)
	s.mainJob()
}
