package dhcp

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/krolaw/dhcp4"
	afpacket "github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Witness sees the DHCP messages that pass this host's interfaces, both ways,
// and the ICMP errors that tell a sender that nobody got his: as they are on
// the wire, before the firewall and routing take what comes, and after they have
// let go what leaves.
type Witness struct {
	conn  *afpacket.Conn
	raw   syscall.RawConn
	done  chan struct{}  // closed when nothing is read any more
	names map[int]string // of interfaces, by index

	mu   sync.Mutex
	seen []Sighting
}

// Sighting is a packet on an interface. One that passes a bridge is seen there
// and at its port, in the order in which it passed.
type Sighting struct {
	At        time.Time
	Interface string
	Out       bool           // it left
	From, To  netip.AddrPort // of an ICMP error without ports
	// Of a DHCP message: a BOOTREPLY or else a BOOTREQUEST, its type as messages
	// are named, such as MessageDiscover, its transaction ID, client and giaddr,
	// and its client identifier, nil where it has none.
	Reply    bool
	Type     string
	XID      uint32
	MAC      lease.MAC
	ClientID []byte
	Relay    netip.Addr
	// Flaw is why no Client takes such a reply, nil where one does.
	Flaw error
	// Unreachable is what an ICMP error tells, nil for a DHCP message.
	Unreachable *Unreachable
}

// Unreachable is an ICMP error of that name (RFC 792, RFC 1812 section 5.2.7.1).
type Unreachable struct {
	Code     uint8
	From, To netip.AddrPort // of the datagram that didn't arrive
}

// maxSightings bounds what a Witness remembers, the first ones.
const maxSightings = 10_000

// NewWitness begins to watch all interfaces for messages of DHCP's ports and of
// another relay's, see lease.Options.RelayPort. It needs CAP_NET_RAW, without
// which the error is syscall.EPERM.
func NewWitness(ports ...uint16) (*Witness, error) {
	filter, err := bpf.Assemble(witnessed(append([]uint16{lease.ServerPort, clientPort}, ports...)))
	if err != nil {
		return nil, fmt.Errorf("assemble packet filter: %w", err)
	}
	// Index 0 is every interface, those that are yet to come too. What is read
	// begins with the IP header, whatever kind of link it is.
	conn, err := afpacket.Listen(&net.Interface{}, afpacket.Datagram, unix.ETH_P_ALL, &afpacket.Config{Filter: filter})
	if err != nil {
		return nil, fmt.Errorf("open a packet socket on all interfaces: %w", err)
	}
	w := &Witness{conn: conn, done: make(chan struct{}), names: map[int]string{}}
	if w.raw, err = conn.SyscallConn(); err == nil {
		err = w.raw.Control(enlargeBuffer)
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("open a packet socket on all interfaces: %w", err)
	}
	go w.watch()
	return w, nil
}

// witnessed is a packet filter of IPv4 packets from their header on: ICMP's
// unreachable, and UDP from or to one of the ports.
func witnessed(ports []uint16) []bpf.Instruction {
	const keep = 1 << 16 // bytes
	filter := []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtProto},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_IP, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
		bpf.LoadAbsolute{Off: 6, Size: 2}, // flags and fragment offset
		bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: fragment, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
		bpf.LoadMemShift{Off: 0},          // length of the IP header
		bpf.LoadAbsolute{Off: 9, Size: 1}, // protocol
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_ICMP, SkipTrue: 4},
		bpf.LoadIndirect{Off: 0, Size: 1}, // type
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: layers.ICMPv4TypeDestinationUnreachable, SkipTrue: 1},
		bpf.RetConstant{Val: keep},
		bpf.RetConstant{Val: 0},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_UDP, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
	}
	for _, end := range []uint32{0, 2} { // source and destination port
		filter = append(filter, bpf.LoadIndirect{Off: end, Size: 2})
		for _, port := range ports {
			filter = append(filter, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(port), SkipTrue: 1}, bpf.RetConstant{Val: keep})
		}
	}
	return append(filter, bpf.RetConstant{Val: 0})
}

// Seen is what was seen so far.
func (w *Witness) Seen() []Sighting {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.seen)
}

// Close ends it.
func (w *Witness) Close() error {
	err := w.conn.Close()
	<-w.done
	return err
}

// watch reads until the socket is closed.
func (w *Witness) watch() {
	defer close(w.done)
	buf := make([]byte, 1<<16)
	for {
		var n int
		var at unix.Sockaddr
		var failed error
		err := w.raw.Read(func(fd uintptr) bool {
			n, at, failed = unix.Recvfrom(int(fd), buf, 0)
			return failed != unix.EAGAIN && failed != unix.EINTR
		})
		switch {
		case err != nil:
			return
		case failed != nil:
			// An interface went down.
			continue
		}
		link, ok := at.(*unix.SockaddrLinklayer)
		if !ok || link.Pkttype == unix.PACKET_OTHERHOST {
			// Neither from nor for this host.
			continue
		}
		s, ok := readSighting(buf[:n])
		if !ok {
			continue
		}
		s.At, s.Interface, s.Out = time.Now(), w.name(link.Ifindex), link.Pkttype == unix.PACKET_OUTGOING
		w.mu.Lock()
		if len(w.seen) < maxSightings {
			w.seen = append(w.seen, s)
		}
		w.mu.Unlock()
	}
}

// name is an interface's.
func (w *Witness) name(index int) string {
	if w.names[index] == "" {
		w.names[index] = fmt.Sprintf("interface %d", index)
		if i, err := net.InterfaceByIndex(index); err == nil {
			w.names[index] = i.Name
		}
	}
	return w.names[index]
}

// readSighting reads an IPv4 packet.
func readSighting(packet []byte) (s Sighting, ok bool) {
	var ip layers.IPv4
	if ip.DecodeFromBytes(packet, gopacket.NilDecodeFeedback) != nil {
		return s, false
	}
	if ip.Protocol == layers.IPProtocolICMPv4 {
		var icmp layers.ICMPv4
		if icmp.DecodeFromBytes(ip.Payload, gopacket.NilDecodeFeedback) != nil || icmp.TypeCode.Type() != layers.ICMPv4TypeDestinationUnreachable {
			return s, false
		}
		// It carries the beginning of what it is about: at least the ports.
		var about layers.IPv4
		if about.DecodeFromBytes(icmp.Payload, gopacket.NilDecodeFeedback) != nil ||
			about.Protocol != layers.IPProtocolUDP || len(about.Payload) < udpHeaderLen {
			return s, false
		}
		s.From, s.To = addrPort(ip.SrcIP, 0), addrPort(ip.DstIP, 0)
		s.Unreachable = &Unreachable{
			Code: icmp.TypeCode.Code(),
			From: addrPort(about.SrcIP, binary.BigEndian.Uint16(about.Payload)),
			To:   addrPort(about.DstIP, binary.BigEndian.Uint16(about.Payload[2:])),
		}
		return s, true
	}
	var udp layers.UDP
	if udp.DecodeFromBytes(ip.Payload, gopacket.NilDecodeFeedback) != nil || len(udp.Payload) < headerLen {
		return s, false
	}
	p := dhcp4.Packet(udp.Payload)
	if p.HLen() != byte(len(lease.MAC{})) {
		return s, false
	}
	s.From, s.To = addrPort(ip.SrcIP, uint16(udp.SrcPort)), addrPort(ip.DstIP, uint16(udp.DstPort))
	s.XID, s.MAC, s.Relay = binary.BigEndian.Uint32(p.XId()), lease.MAC(p.CHAddr()), netip.AddrFrom4([4]byte(p.GIAddr()))
	// Options that can't be read are a flaw.
	_, options, _ := readOptions(p)
	if kind := options[byte(dhcp4.OptionDHCPMessageType)]; len(kind) == 1 {
		s.Type = messageTypes[dhcp4.MessageType(kind[0])]
	}
	s.ClientID = options[byte(dhcp4.OptionClientIdentifier)]
	if s.Reply = p.OpCode() == dhcp4.BootReply; s.Reply {
		_, s.Flaw = parseReply(udp.Payload)
	}
	return s, true
}

func addrPort(ip net.IP, port uint16) netip.AddrPort {
	addr, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(addr.Unmap(), port)
}
