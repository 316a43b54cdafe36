package dhcp

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/prometheus/procfs"
)

// portHolder names the process that holds a UDP port of an address or of the
// wildcard, as well as /proc tells us.
func portHolder(addr netip.Addr, port uint16) string {
	const unknown = "another program (as root, ss -ulpn names it)"
	fs, err := procfs.NewDefaultFS()
	if err != nil {
		return unknown
	}
	sockets, err := fs.NetUDP()
	if err != nil {
		return unknown
	}
	// A socket on [::] takes the port of all IPv4 addresses too. Hosts without
	// IPv6 lack the table.
	sockets6, _ := fs.NetUDP6()
	for _, s := range append(sockets, sockets6...) {
		local, _ := netip.AddrFromSlice(s.LocalAddr)
		if s.LocalPort == uint64(port) && (local == addr || local.IsUnspecified()) {
			return socketOwner(fs, s.Inode, unknown)
		}
	}
	return unknown
}

func socketOwner(fs procfs.FS, inode uint64, unknown string) string {
	procs, err := fs.AllProcs()
	if err != nil {
		return unknown
	}
	socket := fmt.Sprintf("socket:[%d]", inode)
	for _, p := range procs {
		// Processes may end meanwhile, or be none of our business.
		targets, _ := p.FileDescriptorTargets()
		if slices.Contains(targets, socket) {
			name, _ := p.Comm()
			return fmt.Sprintf("%s (pid %d)", strings.TrimSpace(name), p.PID)
		}
	}
	return unknown
}
