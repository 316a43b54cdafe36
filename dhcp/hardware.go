package dhcp

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// hardwareOf is the MAC of the interface that has a relay address, see
// steadyMAC.
func hardwareOf(relay netip.Addr) (lease.MAC, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return lease.MAC{}, fmt.Errorf("list the network interfaces: %w", err)
	}
	for _, i := range interfaces {
		// One that goes meanwhile has no addresses.
		addrs, _ := i.Addrs()
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); !ok || !n.IP.Equal(relay.AsSlice()) {
				continue
			}
			if len(i.HardwareAddr) != len(lease.MAC{}) {
				return lease.MAC{}, fmt.Errorf("interface %s of relay address %s has no MAC address", i.Name, relay)
			}
			return steadyMAC(i)
		}
	}
	return lease.MAC{}, explainBind(netip.AddrPortFrom(relay, lease.ServerPort), unix.EADDRNOTAVAIL)
}

// interfaceMAC is the MAC of the interface to broadcast on, see steadyMAC.
func interfaceMAC(name string) (lease.MAC, error) {
	i, err := broadcastInterface(name)
	if err != nil {
		return lease.MAC{}, err
	}
	return steadyMAC(i)
}

// steadyMAC is the MAC by which this host is told from others: the interface's.
// A bridge that was given none has the least of its ports', among which are
// containers that come and go: then it is that of its oldest port, the host's
// own.
func steadyMAC(i net.Interface) (lease.MAC, error) {
	mac := lease.MAC(i.HardwareAddr)
	bridges, err := bridgesOfPorts()
	if err != nil {
		return lease.MAC{}, fmt.Errorf("list the ports of bridges: %w", err)
	}
	var oldest net.Interface
	inherited := false
	for port, bridge := range bridges {
		if bridge != i.Index {
			continue
		}
		p, err := net.InterfaceByIndex(port)
		if err != nil || !isEthernet(*p) {
			// It has just gone.
			continue
		}
		inherited = inherited || lease.MAC(p.HardwareAddr) == mac
		if oldest.Index == 0 || p.Index < oldest.Index {
			oldest = *p
		}
	}
	if inherited {
		mac = lease.MAC(oldest.HardwareAddr)
	}
	return mac, nil
}

// bridgesOfPorts tells the bridge of each interface that is a port of one, by
// their indexes (rtnetlink(7)).
func bridgesOfPorts() (map[int]int, error) {
	rib, err := syscall.NetlinkRIB(unix.RTM_GETLINK, unix.AF_BRIDGE)
	if err != nil {
		return nil, err
	}
	messages, err := syscall.ParseNetlinkMessage(rib)
	if err != nil {
		return nil, err
	}
	bridges := map[int]int{}
	for _, m := range messages {
		if m.Header.Type != unix.RTM_NEWLINK {
			continue
		}
		attributes, err := syscall.ParseNetlinkRouteAttr(&m)
		if err != nil {
			return nil, err
		}
		// The attributes follow an ifinfomsg, of which this is the index.
		port := binary.NativeEndian.Uint32(m.Data[4:])
		for _, a := range attributes {
			if a.Attr.Type == unix.IFLA_MASTER {
				bridges[int(port)] = int(binary.NativeEndian.Uint32(a.Value))
			}
		}
	}
	return bridges, nil
}
