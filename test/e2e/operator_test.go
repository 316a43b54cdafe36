package e2e

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

func TestOperatorCommands(t *testing.T) {
	s := newSite(t, lab.Kea, lab.DHCPConfig{}, byMAC...)
	s.network("a", "eth0", "10.10.0.0/24")
	s.network("b", "eth1", "10.20.0.0/24")
	inA, inB := s.run("c1", "a"), s.run("c2", "b")
	_, macA := s.holds("c1", "eth0")
	_, macB := s.holds("c2", "eth0")
	name := ""
	if s.tellsNames() {
		name = "c1"
	}

	t.Run("leases", func(t *testing.T) {
		lines := strings.Split(strings.TrimSpace(must(s.daemon.Run("leases"))(t)), "\n")
		if len(lines) != 3 {
			t.Fatalf("%d lines: %q", len(lines), lines)
		}
		if head := strings.Fields(lines[0]); !slices.Equal(head, []string{"ADDRESS", "MAC", "NAME", "SUBNET", "STATE", "SERVER", "LEFT"}) {
			t.Errorf("columns %q", head)
		}
		mentions(t, lines[1], inA.String(), macA, name, "10.10.0.0/24", "bound", "10.10.0.1")
		mentions(t, lines[2], inB.String(), macB, "10.20.0.0/24", "bound", "10.10.0.1")
		fields := strings.Fields(lines[1])
		left := must(time.ParseDuration(fields[len(fields)-1]))(t)
		if left < 9*time.Minute || left > 10*time.Minute {
			t.Errorf("%v left of ten minutes", left)
		}
	})

	t.Run("leases as json", func(t *testing.T) {
		out := must(s.daemon.Run("leases", "--json"))(t)
		var objects []map[string]any
		check(t, json.Unmarshal([]byte(out), &objects))
		for _, object := range objects {
			documented := []string{
				"address", "client_id", "expires_at", "mac", "name", "obtained_at", "pool_id",
				"prefix_length", "rebind_at", "renew_at", "server", "state", "subnet",
			}
			if keys := slices.Sorted(maps.Keys(object)); !slices.Equal(keys, documented) {
				t.Errorf("fields %q", keys)
			}
		}
		l := s.known(inA)
		row := s.leased(inA, macA)
		if l.Name != name || l.PrefixLength != 24 || l.MAC != macA || l.Subnet.String() != "10.10.0.0/24" || l.State != "bound" ||
			l.Server.String() != "10.10.0.1" || strings.ReplaceAll(l.ClientID, ":", "") != row.ClientID || !strings.HasPrefix(l.PoolID, "10.10.0.0/24?") {
			t.Errorf("lease %+v, the server has %+v", l, row)
		}
		// Both count from about the same moment, in whole seconds.
		if off := l.ExpiresAt.Sub(row.Expires).Abs(); off > 2*time.Second {
			t.Errorf("lease ends at %s, the server says %s", l.ExpiresAt, row.Expires)
		}
		if length := l.ExpiresAt.Sub(l.ObtainedAt); length != 10*time.Minute {
			t.Errorf("lease of %s", length)
		}
		if !l.ObtainedAt.Before(l.RenewAt) || !l.RenewAt.Before(l.RebindAt) || !l.RebindAt.Before(l.ExpiresAt) {
			t.Errorf("times out of order: %+v", l)
		}
	})

	t.Run("release", func(t *testing.T) {
		mentions(t, must(s.daemon.Run("release", inA.String()))(t), inA.String(), macA, "10.10.0.1")
		s.only(inB)
		_, err := s.daemon.Run("release", inA.String())
		if err == nil {
			t.Error("released twice")
		} else {
			mentions(t, err.Error(), inA.String(), "no such lease")
		}
		if _, err := s.daemon.Run("release", "c1"); err == nil {
			t.Error("released a name")
		} else {
			mentions(t, err.Error(), `"c1"`, "neither an IPv4 address nor a MAC address")
		}
		var released daemonLease
		check(t, json.Unmarshal([]byte(must(s.daemon.Run("release", "--json", macB))(t)), &released))
		if released.Address != inB || released.MAC != macB {
			t.Errorf("released %+v", released)
		}
		s.notLeased()
		if out := must(s.daemon.Run("leases", "--json"))(t); strings.TrimSpace(out) != "[]" {
			t.Errorf("leases: %s", out)
		}
	})

	t.Run("afterwards", func(t *testing.T) {
		// The engine knows nothing of it, and its release comes too late.
		s.docker("restart", "c1")
		s.holds("c1", "eth0")
		s.docker("rm", "-f", "c1", "c2")
		s.docker("network", "rm", "a", "b")
		s.notLeased()
	})
}
