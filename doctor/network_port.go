package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/dhcp"
)

// checkPort: who gets what the servers send to the relay addresses?
func checkPort(ctx context.Context, p *patient) {
	n := survey(ctx, p)
	told := map[netip.AddrPort]bool{}
	for _, w := range n.ways {
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
	if len(told) == 0 && len(n.ways) > 0 {
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
	var ours bool
	others := slices.DeleteFunc(slices.Clone(holders), func(h dhcp.Holder) bool {
		daemon := p.health != nil && h.PID == p.health.PID
		ours = ours || daemon
		return daemon
	})
	if slices.ContainsFunc(others, func(h dhcp.Holder) bool { return h.PID == 0 }) {
		return Finding{Status: Skipped, Found: port + " is taken, and only root can see by whom", Advice: asRoot}
	}
	if p.health == nil {
		return withoutDaemon(at, port, others)
	}
	daemon := fmt.Sprintf("the daemon (pid %d)", p.health.PID)
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
	raw, err := p.daemonMay(unix.CAP_NET_RAW)
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
		if bind, err := p.daemonMay(unix.CAP_NET_BIND_SERVICE); err == nil && !bind {
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

// withoutDaemon tells whether a daemon could bind a port now.
func withoutDaemon(at netip.AddrPort, port string, others []dhcp.Holder) Finding {
	err := tryBind(at)
	switch {
	case err == nil && len(others) > 0:
		return Finding{Status: OK, Found: fmt.Sprintf("%s is free; %s, which has that port of all other addresses, leaves it alone", port, named(others))}
	case err == nil:
		return Finding{Status: OK, Found: port + " is free"}
	case errors.Is(err, unix.EADDRINUSE) && len(others) > 0:
		return Finding{
			Status: Warning, Found: fmt.Sprintf("%s is taken by %s: a daemon can only read beside it, with CAP_NET_RAW", port, where(others)),
			Advice: beside + "; or " + dropIn,
		}
	case errors.Is(err, unix.EACCES):
		return Finding{Status: Skipped, Found: port + ": may not be bound, so that it isn't known whether it is free", Advice: asRoot}
	}
	return Finding{Status: Fault, Found: fmt.Sprintf("%s can't be bound: %v", port, err), Advice: "ss -ulpn shows who has it"}
}

// tryBind binds a port as the daemon does, and lets it go at once.
func tryBind(at netip.AddrPort) error {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		return errors.Join(raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }), err)
	}}
	conn, err := config.ListenPacket(context.Background(), "udp4", at.String())
	if err != nil {
		return err
	}
	return conn.Close()
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

// daemonMay reports whether the daemon has a capability(7).
func (p *patient) daemonMay(capability int) (bool, error) {
	process, err := procfs.NewProc(p.health.PID)
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
