package machine

import (
	"fmt"
	"testing"
)

// What needs more than the unit gives has a drop-in in the unit's comments and
// in the README: another folder of the database, and Docker's API.
func TestDropIns(t *testing.T) {
	s := newInstalled(t)
	check(t, s.dhcp.Stop())
	s.dhcp.Config.LeaseSeconds = 8
	check(t, s.dhcp.Start())
	s.configure("DATA_DIR=/srv/leases\nON_LEASE_LOST=stop\n")
	s.run("install", "--directory", "--owner", name, "--group", name, "--mode", "700", "/srv/leases")
	s.fails("systemctl", "start", name)
	s.logged("/srv/leases", "read-only file system")

	s.dropIn("data.conf", "[Service]\nReadWritePaths=-/srv/leases\n")
	s.dropIn("docker.conf", "[Service]\nSupplementaryGroups=docker\n")
	s.run("systemctl", "restart", name)
	s.run("test", "-s", "/srv/leases/"+name+".db")
	s.network()
	s.runContainer("c1")
	check(t, s.dhcp.Kill())
	s.eventually(patience, func() error {
		if state := s.docker("inspect", "--format", "{{.State.Status}}", "c1"); state != "exited" {
			return fmt.Errorf("the container that has lost its lease is %s", state)
		}
		return nil
	})
	s.logged("lease lost")
}
