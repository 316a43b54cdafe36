package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/demo/dhcpd"
	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// The LAN. The DHCP server's machine passes for the router too.
var (
	lan    = netip.MustParsePrefix("10.10.0.0/24")
	server = netip.MustParseAddr("10.10.0.1")
	relay  = netip.MustParseAddr("10.10.0.2") // the Docker host
	client = netip.MustParseAddr("10.10.0.3")
	first  = netip.MustParseAddr("10.10.0.100")
	last   = netip.MustParseAddr("10.10.0.199")
)

const (
	image   = "demo:1"
	network = "lan"
)

var names = []string{"web", "db"}

// tour is the demo's steps and what they share.
type tour struct {
	*page
	lab    *lab.Lab
	binary string

	host, client *lab.Node
	dhcp         *dhcpd.Server
	daemon       *lab.Daemon
	engine       *lab.Engine

	logShown   int                  // lines of the server's log
	containers map[string]container // by name
}

// container is what a container says of itself.
type container struct {
	prefix netip.Prefix
	mac    string
}

func (t *tour) run() error {
	t.paragraph(
		"Containers whose addresses your own DHCP server leases.",
		"All of this is in network namespaces that are gone at the end, or at Ctrl-C.",
	)
	for _, step := range []func() error{
		t.makeLAN,
		t.startHost,
		t.createNetwork,
		t.runContainers,
		t.lookInside,
		t.compareLeases,
		t.ping,
		t.listSockets,
		t.remove,
	} {
		if err := step(); err != nil {
			return fmt.Errorf("step %d: %w", t.steps, err)
		}
	}
	return nil
}

// close stops what is not the lab's.
func (t *tour) close() error {
	if t.dhcp == nil {
		return nil
	}
	return t.dhcp.Close()
}

func (t *tour) makeLAN() error {
	t.heading("A LAN with a DHCP server, a Docker host and a client")
	machine, err := t.lab.Node("server", server.String()+"/24")
	if err != nil {
		return err
	}
	if t.host, err = t.lab.Node("host", relay.String()+"/24"); err != nil {
		return err
	}
	if err := t.host.Route("default via " + server.String()); err != nil {
		return err
	}
	if t.client, err = t.lab.Node("client", client.String()+"/24"); err != nil {
		return err
	}
	// The server runs in this process, but its socket belongs to the
	// namespace in which it was opened, and hears nothing else.
	var conn net.PacketConn
	err = machine.Do(func() (err error) {
		conn, err = net.ListenPacket("udp4", netip.AddrPortFrom(server, 67).String())
		return err
	})
	if err != nil {
		return err
	}
	t.dhcp = dhcpd.Serve(conn, dhcpd.Config{
		Server: server, Prefix: lan, First: first, Last: last, Router: server, LeaseTime: 10 * time.Minute,
	})
	t.output("" +
		"server 10.10.0.1        host 10.10.0.2          client 10.10.0.3\n" +
		"a small DHCP server     Docker engine and       any machine\n" +
		"inside this program     oam-docker-ipam         of the LAN\n" +
		"       |                       |                       |\n" +
		"-------+-----------------------+-----------------------+-------\n")
	return nil
}

func (t *tour) startHost() error {
	t.heading("On the host: oam-docker-ipam, then a Docker engine")
	var err error
	if t.engine, err = t.host.NewEngine(""); err != nil {
		return err
	}
	// Where the engine looks for plugins. On a real host that is
	// /run/docker/plugins, and needs no saying.
	socket := filepath.Join(t.engine.PluginDir(), "talkingdata.sock")
	flags := []string{"--dhcp-server", server.String()}
	daemon, err := t.host.NewDaemon(socket, flags...)
	if err != nil {
		return err
	}
	daemon.Binary = t.binary
	if err := t.command("host", slices.Concat([]string{"oam-docker-ipam"}, flags, []string{"server", "&"}), daemon.Start); err != nil {
		return err
	}
	t.daemon = daemon
	if err := t.command("host", []string{"dockerd", "&"}, t.engine.Start); err != nil {
		return err
	}
	version, err := t.engine.Docker("version", "--format", "{{.Server.Version}}")
	if err != nil {
		return err
	}
	if err := t.engine.ImportImage(image); err != nil {
		return err
	}
	t.holds("engine %s runs; image %s is a busybox, made here", version, image)
	return nil
}

func (t *tour) createNetwork() error {
	t.heading("A macvlan network whose addresses come from the DHCP server")
	if _, err := t.docker("network", "create", "-d", "macvlan", "--subnet", lan.String(),
		"--ipam-driver=talkingdata", "-o", "parent=eth0", network); err != nil {
		return err
	}
	seen := t.showServerLog()
	if !mentions(seen, "DISCOVER from ", " by relay "+relay.String()) {
		return fmt.Errorf("the DHCP server saw no DISCOVER by relay %s", relay)
	}
	if leases := t.dhcp.Leases(); len(leases) != 0 {
		return fmt.Errorf("the DHCP server has leases before there are containers: %v", leases)
	}
	t.holds("it only asked, to learn the router; nothing is leased yet")
	return nil
}

func (t *tour) runContainers() error {
	t.heading("Two containers")
	for _, name := range names {
		if _, err := t.docker("run", "-d", "--name", name, "--network", network, image); err != nil {
			return err
		}
		seen := t.showServerLog()
		if !mentions(seen, "REQUEST for ", " by relay "+relay.String()) || !mentions(seen, "ACK of ") {
			return fmt.Errorf("the DHCP server leased nothing to %s by relay %s", name, relay)
		}
	}
	t.holds("the host asked as a relay agent, for each container's own MAC")
	return nil
}

func (t *tour) lookInside() error {
	t.heading("What the containers have")
	t.containers = map[string]container{}
	for _, name := range names {
		address, err := t.docker("exec", name, "ip", "addr", "show", "dev", "eth0")
		if err != nil {
			return err
		}
		t.output(address)
		route, err := t.docker("exec", name, "ip", "route")
		if err != nil {
			return err
		}
		t.output(route)

		c := container{mac: fieldAfter(address, "link/ether")}
		if c.prefix, err = netip.ParsePrefix(fieldAfter(address, "inet")); err != nil {
			return fmt.Errorf("find the address of %s: %w", name, err)
		}
		if c.prefix.Masked() != lan || c.prefix.Addr().Less(first) || last.Less(c.prefix.Addr()) {
			return fmt.Errorf("%s has %s, want an address of the server's range %s-%s", name, c.prefix, first, last)
		}
		if via := fieldAfter(lineWith(route, "default "), "via"); via != server.String() {
			return fmt.Errorf("the default route of %s is via %q, want %s", name, via, server)
		}
		t.containers[name] = c
	}
	t.holds("addresses of the server's range, routes by the server's router")
	return nil
}

func (t *tour) compareLeases() error {
	t.heading("What the DHCP server and oam-docker-ipam have on record")
	held := map[string]netip.Addr{}
	for _, l := range t.serverLeases() {
		held[l.MAC] = l.Addr
	}
	if err := t.eachHolds(held, "the DHCP server"); err != nil {
		return err
	}

	known, err := t.daemonLeases()
	if err != nil {
		return err
	}
	held = map[string]netip.Addr{}
	for _, l := range known {
		if l.State != "bound" || l.Server != server {
			return fmt.Errorf("oam-docker-ipam has %s as %s from %s, want it bound from %s", l.Address, l.State, l.Server, server)
		}
		held[l.MAC] = l.Address
	}
	if err := t.eachHolds(held, "oam-docker-ipam"); err != nil {
		return err
	}
	if !slices.ContainsFunc(known, func(l daemonLease) bool { return l.Name != "" }) {
		fmt.Fprintln(t.w, "  (No names: Docker engines before 29 don't tell them.)")
	}
	t.holds("the same two leases, of the containers' own MAC addresses")
	return nil
}

// eachHolds compares addresses by MAC with what the containers have.
func (t *tour) eachHolds(held map[string]netip.Addr, who string) error {
	for name, c := range t.containers {
		if held[c.mac] != c.prefix.Addr() {
			return fmt.Errorf("%s (%s) has %s, but %s gives it %s", name, c.mac, c.prefix.Addr(), who, held[c.mac])
		}
	}
	if len(held) != len(t.containers) {
		return fmt.Errorf("%s has %d leases for %d containers", who, len(held), len(t.containers))
	}
	return nil
}

func (t *tour) ping() error {
	t.heading("A ping from the LAN")
	for _, name := range names {
		args := []string{"busybox", "ping", "-c", "1", "-W", "2", t.containers[name].prefix.Addr().String()}
		out, err := t.runOn("client", t.client, args...)
		if err != nil {
			return err
		}
		t.output(lineWith(out, "bytes from"))
	}
	t.holds("the containers are neighbours of every machine there")
	return nil
}

func (t *tour) listSockets() error {
	t.heading("UDP port 68 stays free for the host's own DHCP client")
	out, err := t.runOn("host", t.host, "sh", "-c", "ss -Huanp | awk '{ print $4, $6 }'")
	if err != nil {
		return err
	}
	t.output(out)
	ours := fmt.Sprintf(",pid=%d,", t.daemon.Pid())
	if !strings.Contains(lineWith(out, relay.String()+":67 "), ours) {
		return fmt.Errorf("port 67 of %s is not oam-docker-ipam's (pid %d)", relay, t.daemon.Pid())
	}
	// Asked of the kernel once more: that a line is missing proves little.
	open, err := t.host.UDPOpen(68)
	if err != nil {
		return err
	}
	if open {
		return errors.New("somebody holds UDP port 68 on the host")
	}
	t.holds("port 67 of the relay address is ours, port 68 is nobody's")
	return nil
}

func (t *tour) remove() error {
	t.heading("Removal: the addresses go back")
	for _, args := range [][]string{
		slices.Concat([]string{"stop"}, names),
		slices.Concat([]string{"rm"}, names),
		{"network", "rm", network},
	} {
		if _, err := t.docker(args...); err != nil {
			return err
		}
	}
	// A release isn't answered, so it may be still on its way.
	err := lab.Eventually(5*time.Second, func() error {
		if leases := t.dhcp.Leases(); len(leases) != 0 {
			return fmt.Errorf("the DHCP server still leases %s to %s", leases[0].Addr, leases[0].MAC)
		}
		return nil
	})
	seen := t.showServerLog()
	t.serverLeases()
	if err != nil {
		return err
	}
	for name, c := range t.containers {
		if !mentions(seen, "RELEASE of "+c.prefix.Addr().String()+" from "+c.mac) {
			return fmt.Errorf("the DHCP server saw no release of the address of %s", name)
		}
	}
	known, err := t.daemonLeases()
	if err != nil {
		return err
	}
	if len(known) != 0 {
		return fmt.Errorf("oam-docker-ipam still has a lease of %s", known[0].Address)
	}
	t.holds("both tables are empty again")
	return nil
}

// docker shows and runs a command of the engine's client.
func (t *tour) docker(args ...string) (out string, err error) {
	err = t.command("host", slices.Concat([]string{"docker"}, args), func() (err error) {
		out, err = t.engine.Docker(args...)
		return err
	})
	return out, err
}

// runOn shows and runs a command on a machine.
func (t *tour) runOn(machine string, node *lab.Node, args ...string) (out string, err error) {
	shown := args
	if args[0] == "sh" {
		shown = args[2:]
	}
	err = t.command(machine, shown, func() (err error) {
		out, err = node.Run(args...)
		return err
	})
	return out, err
}

// daemonLease is what the tour needs of an object of `leases --json`.
type daemonLease struct {
	Address netip.Addr `json:"address"`
	MAC     string     `json:"mac"`
	Name    string     `json:"name"`
	State   string     `json:"state"`
	Server  netip.Addr `json:"server"`
}

// daemonLeases shows the daemon's leases as a table and returns them from the
// form for programs.
func (t *tour) daemonLeases() (leases []daemonLease, err error) {
	var out string
	if err := t.command("host", []string{"oam-docker-ipam", "leases"}, func() (err error) {
		out, err = t.daemon.Run("leases")
		return err
	}); err != nil {
		return nil, err
	}
	t.output(out)
	if out, err = t.daemon.Run("leases", "--json"); err != nil {
		return nil, err
	}
	if err := json.Unmarshal([]byte(out), &leases); err != nil {
		return nil, fmt.Errorf("read leases of oam-docker-ipam: %w", err)
	}
	return leases, nil
}

// serverLeases shows and returns the DHCP server's table.
func (t *tour) serverLeases() []dhcpd.Lease {
	leases := t.dhcp.Leases()
	fmt.Fprintln(t.w, "  The DHCP server's table:")
	t.output(table(leases))
	return leases
}

// showServerLog shows and returns the server's log since the last time.
func (t *tour) showServerLog() []string {
	lines := t.dhcp.Log()[t.logShown:]
	t.logShown += len(lines)
	fmt.Fprintln(t.w, "  The DHCP server saw:")
	t.output(strings.Join(lines, "\n"))
	return lines
}

// daemonLog is the end of the daemon's log, for an error.
func (t *tour) daemonLog() string {
	if t.daemon == nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(t.daemon.Log()), "\n")
	return "\nThe daemon's log:\n  " + strings.Join(lines[max(0, len(lines)-10):], "\n  ")
}

// table writes leases as the daemon does.
func table(leases []dhcpd.Lease) string {
	if len(leases) == 0 {
		return "(empty)"
	}
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ADDRESS\tMAC\tLEFT")
	for _, l := range leases {
		fmt.Fprintf(w, "%s\t%s\t%s\n", l.Addr, l.MAC, time.Until(l.Expires).Round(time.Second))
	}
	w.Flush()
	return text.String()
}

// mentions says whether one of the lines has all of these words.
func mentions(lines []string, words ...string) bool {
	return slices.ContainsFunc(lines, func(line string) bool {
		return !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(line, word) })
	})
}

// fieldAfter is the word that follows another one, as in ip's output.
func fieldAfter(text, word string) string {
	fields := strings.Fields(text)
	if i := slices.Index(fields, word); i >= 0 && i+1 < len(fields) {
		return fields[i+1]
	}
	return ""
}

// lineWith is the first line that has a text in it.
func lineWith(text, part string) string {
	for line := range strings.Lines(text) {
		if strings.Contains(line, part) {
			return line
		}
	}
	return ""
}
