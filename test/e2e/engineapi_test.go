package e2e

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/engine"
	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// Package engine sees what docker network create and run made, and acts on the
// right one of two containers. The addresses are the engine's own: what it
// tells of them doesn't depend on who gave them.
func TestEngineAPI(t *testing.T) {
	s := &site{T: t, lab: lab.ForTest(t, lab.Engines)}
	host := must(s.lab.Node("host", "10.10.0.2/24"))(t)
	check(t, host.Attach("eth1"))
	s.engine = newEngine(t, host)
	check(t, s.engine.Start())
	check(t, s.engine.ImportImage(image))
	api := must(engine.New("unix://"+s.engine.Socket(), lease.Driver{Name: "default"}))(t)

	s.docker("network", "create", "-d", "macvlan", "-o", "parent=eth0", "--subnet", "10.10.0.0/24", "--ip-range", "10.10.0.128/25",
		"--gateway", "10.10.0.1", "--aux-address", "router=10.10.0.129", "--ipam-opt", "dhcp_server=10.10.0.1", "lan")
	s.docker("network", "create", "-d", "macvlan", "-o", "parent=eth1", "--subnet", "10.20.0.0/24", "other")
	s.docker("network", "create", "--config-only", "--subnet", "10.30.0.0/24", "config")
	s.docker("network", "create", "-d", "bridge", "plain") // of whose subnet we say nothing
	s.run("one", "lan")
	// Two ignores its stop signal, and is killed after its own time.
	s.run("two", "lan", "--stop-signal", "USR1", "--stop-timeout", "2")
	s.docker("network", "connect", "other", "two")
	s.docker("create", "--name", "idle", "--network", "lan", image)

	attached := func(container, ifname string) lease.Attachment {
		t.Helper()
		return lease.Attachment{
			Container: s.docker("inspect", "--format", "{{.Id}}", container), Name: container,
			MAC: must(lease.ParseMAC(s.mac(container, ifname)))(t), Prefix: s.prefix(container, ifname),
		}
	}
	network := func(name string) lease.Network {
		t.Helper()
		for _, n := range must(api.Networks(t.Context()))(t).Networks {
			if n.Name == name {
				return n
			}
		}
		t.Fatalf("no network %s", name)
		return lease.Network{}
	}
	one, two := attached("one", "eth0"), attached("two", "eth0")
	want := lease.Network{
		ID: s.docker("network", "inspect", "--format", "{{.Id}}", "lan"), Name: "lan", Driver: "macvlan",
		Subnet: "10.10.0.0/24", Range: "10.10.0.128/25", Gateway: "10.10.0.1",
		Reserved: map[string]string{"router": "10.10.0.129"}, Options: map[string]string{"dhcp_server": "10.10.0.1"},
		Attachments: []lease.Attachment{one, two},
	}
	if got := network("lan"); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	other := network("other")
	if want := []lease.Attachment{attached("two", "eth1")}; other.Subnet != "10.20.0.0/24" || !reflect.DeepEqual(other.Attachments, want) {
		t.Errorf("got %+v, want %+v", other, want)
	}
	inventory := must(api.Networks(t.Context()))(t)
	var names []string
	for _, n := range inventory.Networks {
		names = append(names, n.Name)
	}
	if want := []string{"lan", "other", "plain"}; !reflect.DeepEqual(names, want) {
		t.Errorf("got networks %s, want %s", names, want)
	}
	if version := s.docker("version", "--format", "{{.Server.Version}}"); inventory.NamesEndpoints != (majorOf(t, version) >= 29) {
		t.Errorf("engine %s names endpoints: %t", version, inventory.NamesEndpoints)
	}

	started := func(container string) string {
		t.Helper()
		return s.docker("inspect", "--format", "{{.State.Running}} {{.State.StartedAt}}", container)
	}
	oneBefore, twoBefore := started("one"), started("two")

	// Another name, no ID: the address and MAC count.
	leased := lease.Lease{Name: "one", MAC: two.MAC, Prefix: two.Prefix}
	began := time.Now()
	check(t, api.Restart(t.Context(), leased))
	if took := time.Since(began); took < 2*time.Second || took > 8*time.Second {
		t.Errorf("restart took %s, the container's time is 2 s", took)
	}
	if after := started("two"); after == twoBefore || !strings.HasPrefix(after, "true ") {
		t.Errorf("two is not restarted: %s, then %s", twoBefore, after)
	}

	// Its address, but not its MAC; its MAC, but not its address.
	for _, stale := range []lease.Lease{{MAC: one.MAC, Prefix: two.Prefix}, {MAC: two.MAC, Prefix: netip.MustParsePrefix("10.10.0.250/24")}} {
		if err := api.Stop(t.Context(), stale); err == nil {
			t.Errorf("stopped a container by %s and %s", stale.MAC, stale.Addr())
		} else {
			mentions(t, err.Error(), "no running container", stale.MAC.String(), stale.Addr().String())
		}
	}
	now := attached("two", "eth0")
	leased = lease.Lease{Container: now.Container, MAC: now.MAC, Prefix: now.Prefix}
	check(t, api.Stop(t.Context(), leased))
	if after := started("two"); !strings.HasPrefix(after, "false ") {
		t.Errorf("two is not stopped: %s", after)
	}
	if after := started("one"); after != oneBefore {
		t.Errorf("one was touched: %s, then %s", oneBefore, after)
	}
	if got := network("lan").Attachments; !reflect.DeepEqual(got, []lease.Attachment{one}) {
		t.Errorf("got %+v, want %+v", got, one)
	}
	for _, act := range []error{api.Stop(t.Context(), leased), api.Restart(t.Context(), leased)} {
		if act == nil {
			t.Error("a stopped container is stopped or restarted")
		} else {
			mentions(t, act.Error(), now.Container)
		}
	}
	if after := started("two"); !strings.HasPrefix(after, "false ") {
		t.Errorf("two is running again: %s", after)
	}

	check(t, s.engine.Stop())
	if _, err := api.Networks(t.Context()); err == nil {
		t.Error("networks of an engine that is down")
	} else {
		mentions(t, err.Error(), s.engine.Socket(), "--docker")
	}
}

func majorOf(t *testing.T, version string) (major int) {
	t.Helper()
	if _, err := fmt.Sscanf(version, "%d.", &major); err != nil {
		t.Fatalf("engine version %q: %v", version, err)
	}
	return major
}
