package dhcp

import (
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// pcapng writes packets of several places, each of which is one of its
// interfaces.
type pcapng struct {
	*pcapgo.NgWriter
	interfaces map[place]int
	lost       uint64
}

// newPcapng begins a file with the interfaces that there are so far.
func newPcapng(w io.Writer, places []place) (*pcapng, error) {
	// A file has at least one.
	first := pcapgo.NgInterface{Name: "none", Description: "no relay address or interface is in use yet", LinkType: layers.LinkTypeIPv4}
	if len(places) > 0 {
		first = interfaceOf(places[0])
	}
	out, err := pcapgo.NewNgWriterInterface(w, first, pcapgo.NgWriterOptions{SectionInfo: pcapgo.NgSectionInfo{Application: "oam-docker-ipam"}})
	if err != nil {
		return nil, err
	}
	f := &pcapng{NgWriter: out, interfaces: map[place]int{}}
	for i, p := range places {
		if i == 0 {
			f.interfaces[p] = 0
		} else if _, err := f.at(p); err != nil {
			return nil, err
		}
	}
	return f, nil
}

func interfaceOf(p place) pcapgo.NgInterface {
	if p.broadcast() {
		return pcapgo.NgInterface{Name: p.iface, LinkType: layers.LinkTypeEthernet}
	}
	name := p.relay.String()
	if p.relay.Port() == lease.ServerPort {
		name = p.relay.Addr().String()
	}
	return pcapgo.NgInterface{Name: "relay " + name, Description: "DHCP messages of a socket: the headers of IP and UDP are made anew", LinkType: layers.LinkTypeIPv4}
}

// at is the number of a place's interface, which is added where it is new.
func (f *pcapng) at(p place) (int, error) {
	id, ok := f.interfaces[p]
	if ok {
		return id, nil
	}
	id, err := f.AddInterface(interfaceOf(p))
	f.interfaces[p] = id
	return id, err
}

// packet writes one.
func (f *pcapng) packet(r *record) error {
	data, err := r.bytes()
	if err != nil {
		return fmt.Errorf("make the headers of a packet: %w", err)
	}
	id, err := f.at(r.place)
	if err != nil {
		return err
	}
	options := pcapgo.NgPacketOptions{Flags: &pcapgo.NgEpbFlags{Direction: pcapgo.NgEpbFlagDirectionInbound}}
	if r.sent {
		options.Flags.Direction = pcapgo.NgEpbFlagDirectionOutbound
	}
	if comment := r.comment(); comment != "" {
		options.Comments = []string{comment}
	}
	return f.WritePacketWithOptions(gopacket.CaptureInfo{
		Timestamp: r.at, CaptureLength: len(data), Length: len(data), InterfaceIndex: id,
	}, data, options)
}

// lose writes that packets have been lost, of whatever interface.
func (f *pcapng) lose(n uint64) error {
	f.lost += n
	return f.WriteInterfaceStats(0, pcapgo.NgInterfaceStatistics{LastUpdate: time.Now(), PacketsReceived: pcapgo.NgNoValue64, PacketsDropped: f.lost})
}

// bytes is the packet from its place's outermost header on.
func (r *record) bytes() ([]byte, error) {
	switch {
	case !r.place.broadcast() && r.sent:
		return udpDatagram(r.place.relay, r.peer, r.data)
	case !r.place.broadcast():
		return udpDatagram(r.peer, r.place.relay, r.data)
	case r.sent:
		return writeFrame(r.source, r.dest, r.data)
	}
	return r.data, nil
}

// udpDatagram puts the headers before a message that it has lost in a socket, or
// got there.
func udpDatagram(from, to netip.AddrPort, message []byte) ([]byte, error) {
	ip := layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: from.Addr().AsSlice(), DstIP: to.Addr().AsSlice()}
	udp := layers.UDP{SrcPort: layers.UDPPort(from.Port()), DstPort: layers.UDPPort(to.Port())}
	// It refuses what isn't IP.
	_ = udp.SetNetworkLayerForChecksum(&ip)
	buffer := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(buffer, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, &ip, &udp, gopacket.Payload(message))
	return buffer.Bytes(), err
}

// maxComment bounds a comment, which has 16 bits for its length.
const maxComment = 1024

// comment tells whose a packet is, and why it wasn't sent or used.
func (r *record) comment() string {
	var parts []string
	if r.name != "" {
		parts = append(parts, "container "+r.name)
	}
	if r.pool != "" {
		parts = append(parts, "pool "+r.pool)
	}
	switch {
	case r.fate == nil:
	case r.sent:
		parts = append(parts, "not sent: "+r.fate.Error())
	default:
		parts = append(parts, "dropped: "+r.fate.Error())
	}
	return strings.ToValidUTF8(string(lease.Shorten([]byte(strings.Join(parts, "; ")), maxComment)), "?")
}
