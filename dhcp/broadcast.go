package dhcp

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/krolaw/dhcp4"
	afpacket "github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

const (
	clientPort = 68

	// vlanID are the bits of a tag that tell the VLAN; 0 is none (IEEE 802.1Q).
	vlanID = 0x0fff
	// fragment are the bits of IPv4's flags and offset that a whole datagram
	// hasn't: more fragments, and any offset.
	fragment = 0x3fff
)

// forNoVLAN begins a packet filter: the frame isn't a VLAN's, whose tag the
// kernel has moved out of it. A VLAN's interface is another link.
var forNoVLAN = []bpf.Instruction{
	bpf.LoadExtension{Num: bpf.ExtVLANTag},
	bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: vlanID, SkipTrue: 1},
	bpf.RetConstant{Val: 0},
}

// bootReplies is a packet filter that keeps the BOOTREPLYs to DHCP's client
// port, for whomever they are and in either direction: a server may be on this
// host and send by a packet socket too.
var bootReplies = []bpf.Instruction{
	bpf.LoadAbsolute{Off: 12, Size: 2}, // EtherType
	bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.ETH_P_IP, SkipTrue: 9},
	bpf.LoadAbsolute{Off: 14 + 9, Size: 1}, // protocol
	bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_UDP, SkipTrue: 7},
	bpf.LoadAbsolute{Off: 14 + 6, Size: 2}, // flags and fragment offset
	bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: fragment, SkipTrue: 5},
	bpf.LoadMemShift{Off: 14},              // length of the IP header
	bpf.LoadIndirect{Off: 14 + 2, Size: 2}, // destination port
	bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: clientPort, SkipTrue: 2},
	bpf.LoadIndirect{Off: 14 + 8, Size: 1}, // op
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(dhcp4.BootReply), SkipTrue: 1},
	bpf.RetConstant{Val: 0},
	bpf.RetConstant{Val: 1 << 16}, // bytes to keep
}

// broadcastConn is a packet socket on an interface, dressed as a
// net.PacketConn of DHCP messages whose addresses are stations.
type broadcastConn struct {
	*afpacket.Conn
	place
	raw    syscall.RawConn
	closed atomic.Bool
	frame  []byte // that was read last
}

// openBroadcast opens a packet socket on an interface. UDP port 68 stays free
// for the host's own DHCP client. The socket taps what comes in before a
// macvlan on the interface takes it (ETH_P_ALL), so that it sees what servers
// send to a container's own MAC.
func openBroadcast(at place) (socket, error) {
	i, err := broadcastInterface(at.iface)
	if err != nil {
		return socket{}, err
	}
	filter, err := bpf.Assemble(slices.Concat(forNoVLAN, bootReplies))
	if err != nil {
		return socket{}, fmt.Errorf("assemble packet filter: %w", err)
	}
	conn, err := afpacket.Listen(&i, afpacket.Raw, unix.ETH_P_ALL, &afpacket.Config{Filter: filter})
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EAFNOSUPPORT):
		// The latter is how systemd's RestrictAddressFamilies= refuses it.
		return socket{}, fmt.Errorf("open a packet socket on %s: %w: ask as a relay agent, with dhcp_server, or by broadcast, which %s", at, err, lease.NeedsNetRaw)
	case err != nil:
		return socket{}, fmt.Errorf("open a packet socket on %s: %w", at, err)
	}
	c := &broadcastConn{Conn: conn, place: at, frame: make([]byte, 1<<16)}
	if c.raw, err = conn.SyscallConn(); err == nil {
		err = c.raw.Control(enlargeBuffer)
	}
	if err != nil {
		conn.Close()
		return socket{}, fmt.Errorf("open %s: %w", at, err)
	}
	return socket{PacketConn: c, stale: c.stale, hardware: c.hardware}, nil
}

// ReadFrom returns the next DHCP message and the station that it came from, as
// one that was heard.
func (c *broadcastConn) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		n, _, err := c.Conn.ReadFrom(c.frame)
		if c.closed.Load() {
			// The error that it gives then can't be told by its value.
			return 0, nil, net.ErrClosed
		}
		if err != nil {
			return 0, nil, err
		}
		if message, from, err := readFrame(c.frame[:n]); err == nil {
			return copy(b, message), heard{from, c.frame[:n]}, nil
		}
	}
}

// WriteTo sends a message to a station, as the one that it says.
func (c *broadcastConn) WriteTo(b []byte, to net.Addr) (int, error) {
	frame, err := writeFrame(to.(station).as, to.(station).mac, b)
	if err == nil {
		_, err = c.Conn.WriteTo(frame, &afpacket.Addr{HardwareAddr: frame[:6]})
	}
	if err != nil {
		return 0, err
	}
	return len(b), nil
}

// Close ends a ReadFrom that waits.
func (c *broadcastConn) Close() error {
	c.closed.Store(true)
	return c.Conn.Close()
}

// readFrame returns the UDP payload of an Ethernet frame, which is a part of
// the frame, and its source. Checksums aren't looked at: a virtual interface
// leaves that of UDP for later, and Ethernet has its own.
func readFrame(frame []byte) ([]byte, station, error) {
	var ethernet layers.Ethernet
	var ip layers.IPv4
	var udp layers.UDP
	for _, layer := range []gopacket.DecodingLayer{&ethernet, &ip, &udp} {
		if err := layer.DecodeFromBytes(frame, gopacket.NilDecodeFeedback); err != nil {
			return nil, station{}, err
		}
		frame = layer.LayerPayload()
	}
	source := netip.AddrFrom4([4]byte(ip.SrcIP))
	return frame, station{mac: lease.MAC(ethernet.SrcMAC), addr: netip.AddrPortFrom(source, uint16(udp.SrcPort))}, nil
}

// writeFrame makes the Ethernet frame of a message to servers, the zero
// destination standing for all. To IP it is
// always broadcast, also where its frame is for one station alone: so it passes
// relay agents, and the host needs neither an address there nor a route. Its
// source is the address that the container has, if any (RFC 2131 section 4.1).
func writeFrame(source, dest lease.MAC, message []byte) ([]byte, error) {
	if dest == (lease.MAC{}) {
		dest = lease.MAC(layers.EthernetBroadcast)
	}
	ip := layers.IPv4{
		Version: 4, Flags: layers.IPv4DontFragment, TTL: 64, Protocol: layers.IPProtocolUDP,
		SrcIP: dhcp4.Packet(message).CIAddr(), DstIP: net.IPv4bcast,
	}
	udp := layers.UDP{SrcPort: clientPort, DstPort: lease.ServerPort}
	// It refuses what isn't IP.
	_ = udp.SetNetworkLayerForChecksum(&ip)
	buffer := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(buffer, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&layers.Ethernet{SrcMAC: source[:], DstMAC: dest[:], EthernetType: layers.EthernetTypeIPv4},
		&ip, &udp, gopacket.Payload(message))
	return buffer.Bytes(), err
}

// hardware is the MAC that the interface has now, or why nothing can be sent
// there: the kernel drops what is sent without a carrier, and says nothing.
func (c *broadcastConn) hardware() (mac lease.MAC, err error) {
	err = c.control(func(fd int) error {
		at, err := socketAddr(fd)
		if err != nil {
			return err
		}
		if at.Halen == 0 {
			return errors.New("it is gone: bring it back, or correct dhcp_interface")
		}
		mac = lease.MAC(at.Addr[:len(mac)])
		name, err := ioctl(fd, unix.SIOCGIFNAME, "", uint32(at.Ifindex))
		if err != nil {
			return err
		}
		flags, err := ioctl(fd, unix.SIOCGIFFLAGS, name.Name(), 0)
		switch {
		case err != nil:
			return err
		case flags.Uint16()&unix.IFF_UP == 0:
			return errors.New("it is down: bring it up, or correct dhcp_interface")
		case flags.Uint16()&unix.IFF_RUNNING == 0:
			return errors.New("it has no link: plug it in, or correct dhcp_interface")
		}
		return nil
	})
	return mac, err
}

// stale reports whether the interface is another than when the socket was
// opened. One that was only renamed is the same.
func (c *broadcastConn) stale() (stale bool) {
	err := c.control(func(fd int) error {
		at, err := socketAddr(fd)
		if err != nil {
			return err
		}
		named, err := ioctl(fd, unix.SIOCGIFINDEX, c.iface, 0)
		stale = at.Halen == 0 || err == nil && named.Uint32() != uint32(at.Ifindex)
		return nil
	})
	return stale || err != nil
}

// control runs a function on the socket, whose network namespace then counts.
func (c *broadcastConn) control(f func(fd int) error) (err error) {
	failed := c.raw.Control(func(fd uintptr) { err = f(int(fd)) })
	return errors.Join(failed, err)
}

// socketAddr is where a packet socket is bound: an interface, and its MAC of
// now, which has no bytes once the interface is gone.
func socketAddr(fd int) (*unix.SockaddrLinklayer, error) {
	at, err := unix.Getsockname(fd)
	if err != nil {
		return nil, err
	}
	return at.(*unix.SockaddrLinklayer), nil
}

// ioctl asks for an interface by its name or index, see netdevice(7).
func ioctl(fd int, what uint, name string, index uint32) (*unix.Ifreq, error) {
	request, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	request.SetUint32(index)
	return request, unix.IoctlIfreq(fd, what, request)
}

// broadcastInterface finds the interface to broadcast on, or says why it is of
// no use.
func broadcastInterface(name string) (net.Interface, error) {
	all, err := net.Interfaces()
	if err != nil {
		return net.Interface{}, fmt.Errorf("list the network interfaces: %w", err)
	}
	bridges, err := bridgesOfPorts()
	if err != nil {
		return net.Interface{}, fmt.Errorf("list the ports of bridges: %w", err)
	}
	byName, byIndex := map[string]net.Interface{}, map[int]net.Interface{}
	var useful []string
	for _, i := range all {
		byName[i.Name], byIndex[i.Index] = i, i
		if _, port := bridges[i.Index]; !port && isEthernet(i) {
			useful = append(useful, i.Name)
		}
	}
	i, found := byName[name]
	bridge, port := bridges[i.Index]
	switch {
	case found && !isEthernet(i):
		err = fmt.Errorf("interface %s is not Ethernet: correct dhcp_interface", name)
	case found && port:
		err = fmt.Errorf("interface %s is a port of bridge %s, on which its containers are: use dhcp_interface=%[2]s", name, byIndex[bridge].Name)
	case !found:
		if parent, ok := vlanParent(name); ok && byName[parent].Index != 0 {
			return i, fmt.Errorf("interface %s: %w: Docker's macvlan driver makes it on %s, for a network that has it as its parent", name, lease.ErrNoVLAN, parent)
		}
		err = fmt.Errorf("interface %s: no such network interface: correct dhcp_interface; there are %s", name, strings.Join(useful, ", "))
	}
	return i, err
}

func isEthernet(i net.Interface) bool {
	return i.Flags&net.FlagLoopback == 0 && len(i.HardwareAddr) == len(lease.MAC{})
}

// vlanParent splits a VLAN's name as Docker's macvlan driver does: eth0.10 is
// VLAN 10 of eth0.
func vlanParent(name string) (parent string, ok bool) {
	at := strings.LastIndexByte(name, '.')
	if at < 1 {
		return "", false
	}
	id, err := strconv.ParseUint(name[at+1:], 10, 16)
	return name[:at], err == nil && 1 <= id && id < vlanID
}
