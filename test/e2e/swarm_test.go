package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// swarmImage is an image of a registry that refuses the connection: a swarm's
// node tries to pull at each task before it takes what it has.
const swarmImage = "localhost:1/" + image

// A swarm's tasks hold leases of the LAN wherever they run. Each node's daemon
// serves the tasks of its own node, from the first, at which the engine creates
// the network there, to the last.
func TestSwarm(t *testing.T) {
	t.Parallel()
	nodes := newSwarm(t, 3)
	manager, worker := nodes[0], nodes[1]
	for _, n := range nodes {
		// What of a network is the node's own: the interface, for one. No task
		// ever has the name of another, so nobody comes back for an address.
		n.docker("network", "create", "--config-only", "--ipam-driver=talkingdata", "--subnet", "10.10.0.0/24",
			"-o", "parent=eth0", "--ipam-opt", "release_delay=0s", "lan-config")
	}
	manager.docker("network", "create", "-d", "macvlan", "--scope", "swarm", "--config-from", "lan-config", "--attachable", "lan")
	for _, n := range nodes {
		if pools := n.said("pool added"); len(pools) != 0 {
			t.Errorf("%s made the network before it had a task: %s", n.net.Host.Name, pools)
		}
	}
	manager.docker("service", "create", "--detach", "--no-resolve-image", "--name", "web", "--network", "lan", "--replicas", "6", swarmImage)
	tasks := manager.tasks(nodes, 6)
	manager.only(tasks...)
	for _, n := range nodes {
		if len(n.names()) == 0 {
			t.Fatalf("%s has none of the tasks", n.net.Host.Name)
		}
	}
	manager.reaches(manager.names()[0], worker.addr(worker.names()[0], "eth0"))
	if via := worker.router(worker.names()[0]); via != "10.10.0.1" {
		t.Errorf("default route by %s, the server's router is 10.10.0.1", via)
	}
	for _, n := range nodes {
		if pools := n.said("pool added"); len(pools) != 1 {
			t.Errorf("%s made the network %d times: %s", n.net.Host.Name, len(pools), pools)
		}
		_, found, err := n.reconciled(n.engine)
		check(t, err)
		for _, f := range found {
			if f.Action != "named" { // engines before 29
				t.Errorf("reconcile on %s finds %+v", n.net.Host.Name, f)
			}
		}
	}

	// An attachable network is there for other containers too, on workers as well.
	solo := worker.run("solo", "lan")
	worker.holds("solo", "eth0")
	manager.only(append(slices.Clone(tasks), solo)...)
	worker.docker("rm", "-f", "solo")
	manager.only(tasks...)

	// A manager's engine lists a swarm network as the swarm knows it, without a
	// word of our driver: reconcile has to look closer.
	manager.loseDatabase()
	var adopted []string
	for _, name := range manager.names() {
		adopted = append(adopted, "adopted "+name)
	}
	manager.reconciles(2, adopted)

	// The tasks of a node that is drained get addresses of other nodes, and their
	// own ones are given back, with the network that no task needs any more.
	drained, rest := nodes[2], nodes[:2]
	manager.docker("node", "update", "--availability", "drain", drained.docker("info", "--format", "{{.Swarm.NodeID}}"))
	drained.left()
	manager.only(manager.tasks(rest, 6)...)
	manager.docker("service", "scale", "--detach", "web=1")
	manager.only(manager.tasks(rest, 1)...)
	manager.docker("service", "rm", "web")
	for _, n := range rest {
		n.left()
	}
	manager.notLeased()
}

// newSwarm makes Docker hosts on one LAN with one DHCP server, and a swarm of
// their engines, of which the first is the manager.
func newSwarm(t *testing.T, size int) (nodes []*site) {
	t.Helper()
	l := lab.ForTest(t, lab.Engines, lab.DHCPServers)
	server := must(l.Node("server", "10.10.0.1/24"))(t)
	dhcp := must(server.StartDHCP(lab.Kea, lab.DHCPConfig{Subnets: []lab.Subnet{lab.SubnetA()}}))(t)
	const managerAddr = "10.10.0.11"
	for i := range size {
		addr := fmt.Sprintf("10.10.0.%d", 11+i)
		host := must(l.Node(fmt.Sprintf("node%d", i), addr+"/24"))(t)
		n := &site{T: t, lab: l, net: &lab.Topology{Server: server, Host: host}, dhcp: dhcp}
		n.daemon = must(host.NewDaemon("", "--debug", "--dhcp-server", "10.10.0.1"))(t)
		n.startEngine("talkingdata")
		n.docker("tag", image, swarmImage)
		if i == 0 {
			n.docker("swarm", "init", "--advertise-addr", addr)
		} else {
			n.docker("swarm", "join", "--token", nodes[0].docker("swarm", "join-token", "--quiet", "worker"), "--advertise-addr", addr, managerAddr)
		}
		nodes = append(nodes, n)
	}
	return nodes
}

// tasks waits until as many containers run on these nodes, and then tries that
// each has its address from the server, that no two have the same, and that the
// node's own daemon leases it, and nothing else.
func (s *site) tasks(nodes []*site, want int) (addrs []netip.Addr) {
	s.Helper()
	eventually(s.T, 30*time.Second, func() error {
		running := 0
		for _, n := range nodes {
			running += len(n.names())
		}
		if running != want {
			return fmt.Errorf("%d tasks run, want %d: %s", running, want, s.docker("service", "ps", "web"))
		}
		return nil
	})
	for _, n := range nodes {
		var here []netip.Addr
		for _, name := range n.names() {
			addr, _ := n.holds(name, "eth0")
			here = append(here, addr)
		}
		n.leasesOnly(here...)
		addrs = append(addrs, here...)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	if len(slices.Compact(slices.Clone(addrs))) != want {
		s.Errorf("%d tasks have the addresses %s", want, addrs)
	}
	return addrs
}

// names are those of the running containers.
func (s *site) names() []string {
	s.Helper()
	return strings.Fields(s.docker("ps", "--format", "{{.Names}}"))
}

// leasesOnly waits until the daemon has just these leases.
func (s *site) leasesOnly(addrs ...netip.Addr) {
	s.Helper()
	slices.SortFunc(addrs, netip.Addr.Compare)
	eventually(s.T, 5*time.Second, func() error {
		var has []netip.Addr
		for _, l := range s.leases() {
			has = append(has, l.Address)
		}
		slices.SortFunc(has, netip.Addr.Compare)
		if !slices.Equal(has, addrs) {
			return fmt.Errorf("the daemon of %s leases %s, its containers have %s", s.net.Host.Name, has, addrs)
		}
		return nil
	})
}

// left waits until the engine has removed the network of its last task.
func (s *site) left() {
	s.Helper()
	eventually(s.T, 20*time.Second, func() error {
		if added, removed := len(s.said("pool added")), len(s.said("pool removed")); added != removed {
			return fmt.Errorf("%s has added %d pools and removed %d", s.net.Host.Name, added, removed)
		}
		return nil
	})
	s.leasesOnly()
}
