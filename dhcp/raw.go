package dhcp

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/krolaw/dhcp4"
	"golang.org/x/net/bpf"
	"golang.org/x/net/ipv4"
)

// rawUDP is a raw IP socket that looks like a UDP socket of a relay address
// and port which somebody else has: it gets a copy of what comes to the
// address, whoever has the port. Routing, fragments and firewall stay the
// kernel's.
type rawUDP struct {
	net.PacketConn // ip4:udp
	at             netip.AddrPort
}

// listenRaw opens a raw socket on a relay address; it needs CAP_NET_RAW.
func listenRaw(at netip.AddrPort) (net.PacketConn, error) {
	conn, err := relaySockets.ListenPacket(context.Background(), "ip4:udp", at.Addr().String())
	if err != nil {
		return nil, err
	}
	// All other traffic of the address is kept from this process.
	filter, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadMemShift{Off: 0}, // X: the IP header's length
		bpf.LoadIndirect{Off: 2, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(at.Port()), SkipTrue: 3},
		bpf.LoadIndirect{Off: udpHeaderLen, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(dhcp4.BootReply), SkipTrue: 1},
		bpf.RetConstant{Val: 1 << 16}, // bytes to keep
		bpf.RetConstant{Val: 0},
	})
	if err == nil {
		err = ipv4.NewPacketConn(conn).SetBPF(filter)
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("filter what is read: %w", err)
	}
	return rawUDP{conn, at}, nil
}

const udpHeaderLen = 8

// ReadFrom implements net.PacketConn. The checksum isn't looked at: the kernel
// of a virtual link leaves it open, and what is read is checked as a reply.
func (c rawUDP) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		n, from, err := c.PacketConn.ReadFrom(b)
		if err != nil {
			return 0, nil, err
		}
		var udp layers.UDP
		// What came before the filter was there may be anything.
		if udp.DecodeFromBytes(b[:n], gopacket.NilDecodeFeedback) != nil || uint16(udp.DstPort) != c.at.Port() {
			continue
		}
		return copy(b, udp.Payload), &net.UDPAddr{IP: from.(*net.IPAddr).IP, Port: int(udp.SrcPort)}, nil
	}
}

// WriteTo implements net.PacketConn. Its UDP header is made here.
func (c rawUDP) WriteTo(b []byte, to net.Addr) (int, error) {
	dest := to.(*net.UDPAddr)
	udp := layers.UDP{SrcPort: layers.UDPPort(c.at.Port()), DstPort: layers.UDPPort(dest.Port)}
	err := udp.SetNetworkLayerForChecksum(&layers.IPv4{SrcIP: c.at.Addr().AsSlice(), DstIP: dest.IP})
	buffer := gopacket.NewSerializeBuffer()
	if err == nil {
		err = gopacket.SerializeLayers(buffer, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, &udp, gopacket.Payload(b))
	}
	if err == nil {
		_, err = c.PacketConn.WriteTo(buffer.Bytes(), &net.IPAddr{IP: dest.IP})
	}
	if err != nil {
		return 0, err
	}
	return len(b), nil
}
