package dhcp

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// A witness sees what leaves, what comes, and the ICMP error about it, of DHCP's
// ports and those that it is told, and nothing else.
func TestWitness(t *testing.T) {
	if !inNetns(t) {
		return
	}
	w, err := NewWitness(1067)
	if err != nil {
		t.Fatal(err)
	}
	say := func(from uint16, to string, message []byte) {
		t.Helper()
		conn := listenAt(t, "udp4", "192.0.2.1", int(from), 1)
		if _, err := conn.WriteTo(message, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to))); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	ask := message{kind: discover, xid: 7, party: party{mac: mac1, clientID: []byte{1, 2}}, place: at67(relay1)}.marshal()
	say(5000, "192.0.2.2:5000", ask)
	say(67, "192.0.2.2:67", []byte("no DHCP"))
	say(67, "192.0.2.2:67", ask)
	say(5000, "192.0.2.2:1067", goodOffer())

	from, to := netip.MustParseAddrPort("192.0.2.1:67"), netip.MustParseAddrPort("192.0.2.2:67")
	odd, high := netip.MustParseAddrPort("192.0.2.1:5000"), netip.MustParseAddrPort("192.0.2.2:1067")
	icmp := func(out bool, about Unreachable) Sighting {
		about.Code = 3
		return Sighting{Out: out, From: netip.AddrPortFrom(to.Addr(), 0), To: netip.AddrPortFrom(from.Addr(), 0), Unreachable: &about}
	}
	question := Sighting{Type: MessageDiscover, ClientID: []byte{1, 2}, XID: 7, MAC: mac1, Relay: relay1, From: from, To: to}
	reply := Sighting{Reply: true, Type: "offer", XID: asked.xid, MAC: mac1, Relay: relay1, From: odd, To: high}
	var want []string
	for _, s := range []Sighting{
		// Nobody listens, and the datagram that is none of DHCP's makes an error too.
		icmp(true, Unreachable{From: odd, To: netip.MustParseAddrPort("192.0.2.2:5000")}), icmp(false, Unreachable{From: odd, To: netip.MustParseAddrPort("192.0.2.2:5000")}),
		icmp(true, Unreachable{From: from, To: to}), icmp(false, Unreachable{From: from, To: to}),
		question.out(), question, icmp(true, Unreachable{From: from, To: to}), icmp(false, Unreachable{From: from, To: to}),
		reply.out(), reply, icmp(true, Unreachable{From: odd, To: high}), icmp(false, Unreachable{From: odd, To: high}),
	} {
		s.Interface = "lo"
		want = append(want, s.text())
	}
	var got []string
	if err := lab.Eventually(5*time.Second, func() error {
		got = nil
		for _, s := range w.Seen() {
			if time.Since(s.At) > time.Minute {
				t.Errorf("seen at %s", s.At)
			}
			got = append(got, s.text())
		}
		// An answer is seen to come before what it answers has.
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			return fmt.Errorf("seen\n%q, want\n%q", got, want)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}

func (s Sighting) out() Sighting {
	s.Out = true
	return s
}

// text is a sighting without its time.
func (s Sighting) text() string {
	about := Unreachable{}
	if s.Unreachable != nil {
		about = *s.Unreachable
	}
	return fmt.Sprintln(s.Interface, s.Out, s.From, s.To, s.Reply, s.Type, s.XID, s.MAC, s.ClientID, s.Relay, s.Flaw, about)
}

// Without CAP_NET_RAW there is none.
func TestWitnessNoPermission(t *testing.T) {
	if !inNetns(t) {
		return
	}
	withoutNetRaw(t, func() {
		_, err := NewWitness()
		checkError(t, err, "packet socket on all interfaces", "operation not permitted")
	})
}

// ipPacket is an IPv4 packet of UDP.
func ipPacket(payload []byte) []byte {
	ip := layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: net.IPv4(10, 10, 0, 1), DstIP: net.IPv4(10, 10, 0, 2)}
	udp := layers.UDP{SrcPort: 67, DstPort: 67}
	buffer := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buffer, gopacket.SerializeOptions{FixLengths: true}, &ip, &udp, gopacket.Payload(payload)); err != nil {
		panic(err)
	}
	return buffer.Bytes()
}

// A reply that no client takes is seen with the reason.
func TestSightingFlaw(t *testing.T) {
	noServer := goodOffer()
	copy(noServer[16:], []byte{0, 0, 0, 0})
	s, ok := readSighting(ipPacket(noServer))
	if !ok || !s.Reply || s.Flaw != errAddress || s.MAC != lease.MAC(mac1) {
		t.Errorf("%+v, %t", s, ok)
	}
}

// Whatever passes on the wire, reading it ends well, and what was read as a
// message has its place there.
func FuzzSighting(f *testing.F) {
	for _, b := range realReplies() {
		f.Add(ipPacket(b))
	}
	icmp := []byte{0x45, 0, 0, 56, 0, 0, 0, 0, 64, 1, 0, 0, 10, 10, 0, 1, 10, 10, 0, 2, 3, 3, 0, 0, 0, 0, 0, 0}
	f.Add(append(slices.Clone(icmp), ipPacket(nil)...))
	icmp[20] = 0 // no error but an echo's answer
	f.Add(append(slices.Clone(icmp), ipPacket(nil)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, ok := readSighting(slices.Clone(b))
		switch {
		case !ok:
		case !s.From.Addr().Is4() || !s.To.Addr().Is4():
			t.Errorf("%+v of % x", s, b)
		case s.Unreachable == nil && len(b) < 20+udpHeaderLen+headerLen:
			t.Errorf("a message of %d bytes", len(b))
		case s.Unreachable != nil && (!s.Unreachable.From.Addr().Is4() || b[20] == 0 && b[0] == 0x45):
			t.Errorf("%+v of % x", *s.Unreachable, b)
		}
	})
}
