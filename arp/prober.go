// Package arp finds out who else uses an IPv4 address on a LAN, by ARP probes
// (RFC 5227 section 2.1.1). It never claims an address: announcing and
// defending it is its container's business.
//
// Who isn't seen:
//   - this host's own containers on macvlan and ipvlan, whose parent the
//     interface is. The kernel passes nothing from a parent to its children;
//     their leases are known.
//   - anybody, where the interface is a port of a bridge: the bridge takes all
//     frames away. The bridge is then the interface to probe on.
package arp

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Prober looks for other users of an address. It needs CAP_NET_RAW.
type Prober struct {
	open func(iface string) (link, error)
}

var _ lease.Prober = Prober{}

// NewProber returns a prober, which holds no socket while it doesn't probe.
func NewProber() Prober { return Prober{open: open} }

// link is an interface to probe on.
type link struct {
	conn net.PacketConn     // Ethernet frames of ARP, in and out
	mac  lease.MAC          // of the interface
	ours map[lease.MAC]bool // the MACs of all interfaces of this host
}

// Conflict sends probes on an interface as check says, and listens from the
// first on. It returns at once when it finds a conflict: by whom, as the ARP
// packet's sender hardware address says. Without one it takes the check's whole
// time, 4 to 7 s for "rfc", or until ctx ends, which is an error. A check that
// is off or unset needs no interface and finds nothing.
//
// An interface that can't be probed on is an error too, which names it and
// the options to change.
func (p Prober) Conflict(ctx context.Context, iface string, addr netip.Addr, check lease.ConflictCheck) (by lease.MAC, found bool, err error) {
	probes, end := schedule(check, rand.N[time.Duration])
	if len(probes) == 0 {
		return lease.MAC{}, false, nil
	}
	if !lease.Unicast(addr) {
		return lease.MAC{}, false, fmt.Errorf("probe %s: not a unicast IPv4 address", addr)
	}
	l, err := p.open(iface)
	if err != nil {
		return lease.MAC{}, false, fmt.Errorf("probe %s: %w", addr, err)
	}
	defer l.conn.Close()
	// Closing ends a read that waits.
	stop := context.AfterFunc(ctx, func() { l.conn.Close() })
	defer stop()

	by, found, err = l.conflict(addr, probes, end)
	switch {
	case err != nil && ctx.Err() != nil:
		err = fmt.Errorf("probe %s on interface %s: %w", addr, iface, context.Cause(ctx))
	case err != nil:
		err = fmt.Errorf("probe %s on interface %s: %w", addr, iface, err)
	}
	return by, found, err
}

// conflict sends and listens by a schedule, see there.
func (l link) conflict(addr netip.Addr, probes []time.Duration, end time.Duration) (by lease.MAC, found bool, err error) {
	frame, err := probe(l.mac, addr)
	if err != nil {
		return lease.MAC{}, false, err
	}
	began := time.Now()
	for _, at := range probes {
		by, found, err = l.listen(addr, began.Add(at))
		if found || err != nil {
			return by, found, err
		}
		if _, err := l.conn.WriteTo(frame, &packet.Addr{HardwareAddr: broadcast[:]}); err != nil {
			return lease.MAC{}, false, err
		}
	}
	return l.listen(addr, began.Add(end))
}

// listen reads until it finds a conflict, or until a moment.
func (l link) listen(addr netip.Addr, until time.Time) (by lease.MAC, found bool, err error) {
	if err := l.conn.SetReadDeadline(until); err != nil {
		return lease.MAC{}, false, err
	}
	// A frame of ARP on Ethernet has 60 bytes. What a longer one has behind
	// them counts for nothing.
	buf := make([]byte, 128)
	for {
		n, _, err := l.conn.ReadFrom(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return lease.MAC{}, false, nil
		}
		if err != nil {
			return lease.MAC{}, false, err
		}
		// What isn't understood is no conflict, and a LAN is full of it.
		if m, err := parse(buf[:n]); err == nil && m.conflicts(addr, l.ours) {
			return m.sender, true, nil
		}
	}
}

// wayOut is what the user can do about an interface that is of no use.
const wayOut = "correct conflict_interface, which is the network's parent, or set conflict_check=off"

// open opens a socket for ARP on an interface.
func open(iface string) (link, error) {
	if iface == "" {
		return link{}, errors.New("conflict_check needs the interface to probe on: set conflict_interface to the network's parent, or conflict_check=off")
	}
	i, err := net.InterfaceByName(iface)
	if err != nil {
		return link{}, fmt.Errorf("interface %s: %w: %s", iface, err, wayOut)
	}
	switch {
	case i.Flags&net.FlagLoopback != 0, len(i.HardwareAddr) != len(lease.MAC{}):
		return link{}, fmt.Errorf("interface %s is not Ethernet: %s", iface, wayOut)
	case i.Flags&net.FlagUp == 0:
		return link{}, fmt.Errorf("interface %s is down: bring it up, %s", iface, wayOut)
	case i.Flags&net.FlagRunning == 0:
		// The kernel drops what is sent on it, without an error.
		return link{}, fmt.Errorf("interface %s has no carrier: plug it in, %s", iface, wayOut)
	}
	ours, err := hostMACs()
	if err != nil {
		return link{}, err
	}
	filter, err := bpf.Assemble(forUs)
	if err != nil {
		return link{}, fmt.Errorf("assemble packet filter: %w", err)
	}
	conn, err := packet.Listen(i, packet.Raw, unix.ETH_P_ARP, &packet.Config{Filter: filter})
	switch {
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EAFNOSUPPORT):
		// The latter is how systemd's RestrictAddressFamilies= refuses it.
		return link{}, fmt.Errorf("interface %s: %w: set conflict_check=off, or let this daemon probe by ARP, which %s", iface, err, lease.NeedsNetRaw)
	case err != nil:
		return link{}, fmt.Errorf("interface %s: %w: %s", iface, err, wayOut)
	}
	return link{conn: conn, mac: lease.MAC(i.HardwareAddr), ours: ours}, nil
}

// forUs is a packet filter that keeps what is sent to this host or to all. The
// kernel marks frames of a VLAN that has no interface here as another host's,
// and then takes their tag away: who has an address there doesn't have it here.
var forUs = []bpf.Instruction{
	bpf.LoadExtension{Num: bpf.ExtType},
	bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: unix.PACKET_OTHERHOST, SkipTrue: 1},
	bpf.RetConstant{Val: 1 << 16}, // bytes to keep
	bpf.RetConstant{Val: 0},
}

// hostMACs are the MACs of all interfaces in this network namespace: none of
// them is somebody else's (RFC 5227 section 2.1.1).
func hostMACs() (map[lease.MAC]bool, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	macs := map[lease.MAC]bool{}
	for _, i := range interfaces {
		if len(i.HardwareAddr) == len(lease.MAC{}) {
			macs[lease.MAC(i.HardwareAddr)] = true
		}
	}
	return macs, nil
}
