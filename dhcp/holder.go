package dhcp

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/prometheus/procfs"
)

// Holder is a UDP socket that takes what comes to an address and port.
type Holder struct {
	// Addr is where it is bound; unspecified: on all addresses.
	Addr netip.Addr
	// PID and Name are its process, 0 and "" where /proc doesn't show it to us.
	PID  int
	Name string
}

// String names the process as well as it is known.
func (h Holder) String() string {
	if h.PID == 0 {
		return "another program (as root, ss -ulpn names it)"
	}
	return fmt.Sprintf("%s (pid %d)", h.Name, h.PID)
}

// PortHolders lists who holds a UDP port of an IPv4 address or of the wildcard,
// those at the address itself first: they get the packets.
func PortHolders(addr netip.Addr, port uint16) ([]Holder, error) {
	fs, err := procfs.NewDefaultFS()
	if err != nil {
		return nil, fmt.Errorf("open /proc: %w", err)
	}
	sockets, err := fs.NetUDP()
	if err != nil {
		return nil, fmt.Errorf("list UDP sockets: %w", err)
	}
	// A socket on [::] takes the port of all IPv4 addresses too. Hosts without
	// IPv6 lack the table.
	sockets6, _ := fs.NetUDP6()
	var holders []Holder
	var inodes []string
	for _, s := range append(sockets, sockets6...) {
		local, _ := netip.AddrFromSlice(s.LocalAddr)
		local = local.Unmap()
		if s.LocalPort != uint64(port) || local != addr && !local.IsUnspecified() {
			continue
		}
		at := len(holders)
		if local == addr {
			at = 0
		}
		holders = slices.Insert(holders, at, Holder{Addr: local})
		inodes = slices.Insert(inodes, at, fmt.Sprintf("socket:[%d]", s.Inode))
	}
	if len(holders) == 0 {
		return nil, nil
	}
	procs, err := fs.AllProcs()
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	for _, p := range procs {
		// Processes may end meanwhile, or be none of our business.
		targets, _ := p.FileDescriptorTargets()
		for i := range holders {
			if holders[i].PID == 0 && slices.Contains(targets, inodes[i]) {
				name, _ := p.Comm()
				holders[i].PID, holders[i].Name = p.PID, strings.TrimSpace(name)
			}
		}
	}
	return holders, nil
}

// LockName is the abstract unix socket by which a daemon shows that it has opened a
// relay address.
func LockName(relay netip.AddrPort) string { return "@oam-docker-ipam/" + relay.String() }

// portHolder names the process that holds a UDP port of an address or of the
// wildcard, as well as /proc tells us.
func portHolder(addr netip.Addr, port uint16) string {
	// Without an answer it is a program that isn't known.
	holders, _ := PortHolders(addr, port)
	return append(holders, Holder{})[0].String()
}
