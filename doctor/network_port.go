package doctor

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/dhcp"
)

// checkPort: who gets what the servers send to the relay addresses?
func checkPort(ctx context.Context, p *patient) {
	n := survey(ctx, p)
	told := map[netip.AddrPort]bool{}
	unknown := false
	for _, w := range n.ways {
		unknown = unknown || w.noWay != nil
		if w.iface != "" || w.noWay != nil || told[w.relay] {
			continue
		}
		told[w.relay] = true
		if _, here := n.hosts[w.relay.Addr()]; !here {
			p.skip(fmt.Sprintf("UDP port %d of %s: no address of this host", w.relay.Port(), w.relay.Addr()), "mend the relay address, see above")
			continue
		}
		p.tell(p.checkPortOf(w))
	}
	switch {
	case unknown:
		p.skip("of the relay address that is chosen by the route to a server: not known without that", "mend the route, see below")
	case len(told) == 0 && len(n.ways) > 0:
		p.ok("none is needed: no server is asked as a relay agent")
	}
}

// beside is the advice where another program has the port of all addresses.
const beside = "let it bind other addresses only (dnsmasq: bind-interfaces with interface= or listen-address=, in its configuration), or stop it"

// dropIn is the advice where the daemon has no raw socket.
const dropIn = "let the daemon read beside it: put /usr/share/doc/oam-docker-ipam/broadcast.conf into /etc/systemd/system/oam-docker-ipam.service.d, then systemctl daemon-reload and systemctl restart oam-docker-ipam"

func (p *patient) checkPortOf(w *way) Finding {
	at := w.relay
	port := fmt.Sprintf("UDP port %d of %s", at.Port(), at.Addr())
	holders, err := dhcp.PortHolders(at.Addr(), at.Port())
	if err != nil {
		return Finding{Status: Skipped, Found: fmt.Sprintf("%s: who has it can't be told: %v", port, err), Advice: asRoot}
	}
	if slices.ContainsFunc(holders, func(h dhcp.Holder) bool { return h.PID == 0 }) {
		return Finding{Status: Skipped, Found: port + " is taken, and only root can see by whom", Advice: asRoot}
	}
	if p.health == nil {
		return p.withoutDaemon(at, port, holders)
	}
	pid := p.process()
	if pid == 0 {
		return p.withHiddenDaemon(at, port, holders)
	}
	var ours bool
	others := slices.DeleteFunc(slices.Clone(holders), func(h dhcp.Holder) bool {
		ours = ours || h.PID == pid
		return h.PID == pid
	})
	daemon := fmt.Sprintf("the daemon (pid %d)", pid)
	// Of several sockets the kernel chooses the one that is bound most narrowly.
	rivals := slices.DeleteFunc(slices.Clone(others), func(h dhcp.Holder) bool { return h.Addr.IsUnspecified() })
	switch {
	case ours && len(rivals) > 0:
		return Finding{
			Status: Fault, Found: fmt.Sprintf("%s is held by %s, and by %s too: only one of them gets the answers", port, daemon, named(rivals)),
			Advice: fmt.Sprintf("stop %s, or let it bind another address", named(rivals)),
		}
	case ours && len(others) > 0:
		return Finding{Status: OK, Found: fmt.Sprintf("%s is held by %s; %s, which has that port of all other addresses, leaves it alone", port, daemon, named(others))}
	case ours:
		return Finding{Status: OK, Found: fmt.Sprintf("%s is held by %s", port, daemon)}
	}
	raw, err := mayDo(pid, unix.CAP_NET_RAW)
	if err != nil {
		return Finding{Status: Skipped, Found: fmt.Sprintf("%s: what %s may do can't be told: %v", port, daemon, err), Advice: asRoot}
	}
	opened := p.opened(at)
	switch {
	case len(others) > 0 && !raw:
		return Finding{
			Status: Fault, Found: fmt.Sprintf("%s is taken by %s, and %s lacks CAP_NET_RAW to read beside it: it gets no answers", port, where(others), daemon),
			Advice: beside + "; or " + dropIn,
		}
	case len(others) > 0 && opened:
		return Finding{Status: Warning, Found: fmt.Sprintf("%s is taken by %s; %s reads beside it, by a raw socket", port, where(others), daemon), Advice: beside}
	case len(others) > 0:
		return Finding{Status: Warning, Found: fmt.Sprintf("%s is taken by %s; %s hasn't opened it yet, and will read beside it by a raw socket", port, where(others), daemon), Advice: beside}
	case opened:
		return Finding{Status: OK, Found: fmt.Sprintf("%s: %s reads it by a raw socket, since another program had it at its start", port, daemon)}
	case at.Port() < unprivileged():
		if bind, err := mayDo(pid, unix.CAP_NET_BIND_SERVICE); err == nil && !bind {
			return Finding{
				Status: Fault, Found: fmt.Sprintf("%s is free, but %s lacks CAP_NET_BIND_SERVICE to bind it", port, daemon),
				Advice: "start the daemon by its unit, or as root; systemctl cat oam-docker-ipam shows what takes the right away",
			}
		}
	}
	if !slices.ContainsFunc(w.needs, func(n *need) bool { return n.global }) {
		return Finding{Status: OK, Found: fmt.Sprintf("%s is free: %s opens it with the network's next request", port, daemon)}
	}
	return Finding{
		Status: Warning, Found: fmt.Sprintf("%s is free: %s couldn't open it when it started", port, daemon),
		Advice: "it tries again with the next request, or at once: " + p.how("reload") + "; its log says why (link not opened yet)",
	}
}

// withoutDaemon tells whether a daemon could open a port now. Nothing is bound for
// that: it would take packets from whoever has the port, and a port that several
// share can be bound all the same.
func (p *patient) withoutDaemon(at netip.AddrPort, port string, holders []dhcp.Holder) Finding {
	switch {
	case len(holders) == 0:
		return Finding{Status: OK, Found: port + " is free"}
	case !holders[0].Addr.IsUnspecified() && p.opened(at):
		return Finding{Status: Warning, Found: fmt.Sprintf("%s is taken by %s, and a daemon that isn't this one has opened it", port, named(holders)), Advice: "a daemon that hangs, or has another socket: see the daemon's finding above"}
	}
	return Finding{
		Status: Warning, Found: fmt.Sprintf("%s is taken by %s: unless that shares it, a daemon can only read beside it, with CAP_NET_RAW", port, where(holders)),
		Advice: beside + "; or " + dropIn,
	}
}

// withHiddenDaemon tells what can be told where the daemon's process isn't known.
func (p *patient) withHiddenDaemon(at netip.AddrPort, port string, holders []dhcp.Holder) Finding {
	const hidden = "which process is the daemon isn't known: none that can be seen from here has its database open"
	const advice = "run it as root on the host, where all processes can be seen"
	switch {
	case len(holders) == 0 && p.opened(at):
		return Finding{Status: OK, Found: port + ": a daemon reads it by a raw socket"}
	case len(holders) == 0:
		return Finding{Status: Skipped, Found: fmt.Sprintf("%s is free, and %s", port, hidden), Advice: advice}
	}
	return Finding{Status: Skipped, Found: fmt.Sprintf("%s is held by %s, and %s", port, where(holders), hidden), Advice: advice}
}

// named are the programs that hold sockets.
func named(holders []dhcp.Holder) string {
	var names []string
	for _, h := range holders {
		if name := h.String(); !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return strings.Join(names, " and ")
}

// where is named, with the addresses of their sockets.
func where(holders []dhcp.Holder) string {
	if holders[0].Addr.IsUnspecified() {
		return named(holders) + ", on all addresses (wildcard)"
	}
	return named(holders)
}

// process is the daemon's PID here, 0 where it isn't known. It calls itself
// health.PID, which is another process here if it has a PID namespace of its own.
func (p *patient) process() int {
	if hasOpen(p.health.PID, p.health.Database) {
		return p.health.PID
	}
	// What can't be read isn't there.
	procs, _ := procfs.AllProcs()
	var found []int
	for _, proc := range procs {
		status, err := proc.NewStatus()
		own := status.NSpids
		if err == nil && len(own) > 0 && own[len(own)-1] == uint64(p.health.PID) && hasOpen(proc.PID, p.health.Database) {
			found = append(found, proc.PID)
		}
	}
	if len(found) != 1 {
		return 0
	}
	return found[0]
}

// hasOpen reports whether a process has the file open that it knows by a path, or
// has known: it may be removed.
func hasOpen(pid int, path string) bool {
	folder := fmt.Sprintf("/proc/%d/", pid)
	// Its root is another one in a container. What can't be read isn't there.
	file, _ := os.Stat(folder + "root" + path)
	entries, _ := os.ReadDir(folder + "fd")
	return slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		target, _ := os.Readlink(folder + "fd/" + e.Name())
		if filepath.Base(strings.TrimSuffix(target, " (deleted)")) != filepath.Base(path) {
			return false
		}
		info, err := os.Stat(folder + "fd/" + e.Name())
		return strings.HasSuffix(target, " (deleted)") || err == nil && os.SameFile(info, file)
	})
}

// mayDo reports whether a process has a capability(7).
func mayDo(pid, capability int) (bool, error) {
	process, err := procfs.NewProc(pid)
	if err != nil {
		return false, err
	}
	status, err := process.NewStatus()
	return status.CapEff&(1<<capability) != 0, err
}

// opened reports whether a daemon has opened a relay address: then it has its
// lock, a name without a file.
func (p *patient) opened(at netip.AddrPort) bool {
	fs, err := procfs.NewDefaultFS()
	if err != nil {
		return false
	}
	table, err := fs.NetUNIX()
	return err == nil && slices.ContainsFunc(table.Rows, func(row *procfs.NetUNIXLine) bool { return row.Path == dhcp.LockName(at) })
}

// unprivileged is the first port that everybody may bind.
func unprivileged() uint16 {
	port, err := sysctl("net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		// Kernels before 4.11.
		return 1024
	}
	return uint16(port)
}
