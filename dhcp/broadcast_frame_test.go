package dhcp

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/krolaw/dhcp4"
	"golang.org/x/net/bpf"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

var (
	ourMAC = lease.MAC{0x02, 0, 0, 0, 0, 1}
	allMAC = lease.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
)

// frameOf makes the frame of a server's message, byte by byte. A test changes
// one of them.
func frameOf(message []byte) []byte {
	b := slices.Concat(allMAC[:], ourMAC[:], []byte{8, 0},
		[]byte{0x45, 0, 0, 0, 0, 1, 0, 0, 64, 17, 0, 0}, []byte{10, 10, 0, 1}, []byte{255, 255, 255, 255},
		[]byte{0, 67, 0, 68, 0, 0, 0, 0}, message)
	binary.BigEndian.PutUint16(b[16:], uint16(20+8+len(message)))
	binary.BigEndian.PutUint16(b[38:], uint16(8+len(message)))
	binary.BigEndian.PutUint16(b[24:], checksum(b[14:34]))
	return b
}

// withIPOptions lengthens the IP header by four bytes.
func withIPOptions(b []byte) []byte {
	b = slices.Insert(b, 34, 1, 1, 1, 0)
	b[14]++
	binary.BigEndian.PutUint16(b[16:], uint16(len(b)-14))
	return b
}

// checksum is RFC 1071's; of what has a right one in it, it is zero.
func checksum(b []byte) uint16 {
	var sum uint32
	for i, v := range b {
		sum += uint32(v) << (8 * (1 - i%2))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// frames are what a LAN carries: what the filter keeps, and what not.
func frames() map[string]struct {
	frame []byte
	kept  bool
} {
	type row = struct {
		frame []byte
		kept  bool
	}
	good := func(change func(b []byte)) []byte {
		b := frameOf(goodOffer())
		change(b)
		return b
	}
	set := func(at int, v ...byte) []byte { return good(func(b []byte) { copy(b[at:], v) }) }
	return map[string]row{
		"offer":                    {set(0), true},
		"offer to another station": {set(0, 2, 9, 9, 9, 9, 9), true},
		"offer to an address":      {set(30, 10, 10, 0, 100), true},
		"don't fragment":           {set(20, 0x40), true},
		"odd source port":          {set(34, 0x12, 0x34), true},
		"offer, IP options":        {withIPOptions(set(0)), true},
		"padded":                   {append(set(0), make([]byte, 20)...), true},
		"ARP":                      {set(12, 8, 6), false},
		"IPv6":                     {set(12, 0x86, 0xdd), false},
		"VLAN in the frame":        {set(12, 0x81, 0), false},
		"TCP":                      {set(23, 6), false},
		"first fragment":           {set(20, 0x20), false},
		"second fragment":          {set(20, 0, 185), false},
		"to a server":              {set(36, 0, 67), false},
		"to another port":          {set(36, 1, 68), false},
		"request":                  {set(42, 1), false},
		"request, IP options":      {withIPOptions(set(42, 1)), false},
		"cut in Ethernet":          {set(0)[:13], false},
		"cut in IP":                {set(0)[:30], false},
		"cut in UDP":               {set(0)[:41], false},
		"no message":               {set(0)[:42], false},
		"empty":                    {nil, false},
	}
}

func TestFrameFilter(t *testing.T) {
	vm, err := bpf.NewVM(bootReplies)
	if err != nil {
		t.Fatal(err)
	}
	for name, row := range frames() {
		if n, err := vm.Run(row.frame); err != nil || (n >= len(row.frame) && n > 0) != row.kept {
			t.Errorf("%s: kept %d bytes, %v, want it kept: %t", name, n, err, row.kept)
		}
	}
}

func TestReadFrame(t *testing.T) {
	for name, row := range frames() {
		message, from, err := readFrame(row.frame)
		if !row.kept {
			continue
		}
		if err != nil || !bytes.Equal(message, goodOffer()) {
			t.Errorf("%s: %d bytes, %v", name, len(message), err)
		}
		port := uint16(67)
		if name == "odd source port" {
			port = 0x1234
		}
		if from != (station{mac: ourMAC, addr: netip.AddrPortFrom(ip("10.10.0.1"), port)}) {
			t.Errorf("%s: from %s", name, from)
		}
	}
}

// What the filter keeps is well-formed or not: nothing ends the reader, and
// nothing comes out that doesn't stand in the frame.
func FuzzFrame(f *testing.F) {
	for _, row := range frames() {
		f.Add(row.frame)
	}
	vm, err := bpf.NewVM(bootReplies)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		kept, err := vm.Run(b)
		if err != nil {
			t.Fatal(err)
		}
		if kept > 0 && (b[12] != 8 || b[13] != 0 || b[23] != 17) {
			t.Errorf("kept % x", b)
		}
		message, from, err := readFrame(slices.Clone(b))
		if err != nil {
			return
		}
		if !bytes.Contains(b, message) || !bytes.Equal(from.mac[:], b[6:12]) || !from.addr.Addr().Is4() {
			t.Errorf("message % x from %s in % x", message, from, b)
		}
		if len(message) < headerLen || len(message) > 1<<16-1-28 {
			return // it is no message, or can't be one datagram
		}
		frame, err := writeFrame(ourMAC, allMAC, message)
		if err != nil {
			t.Fatal(err)
		}
		again, from, err := readFrame(frame)
		if err != nil || !bytes.Equal(again, message) || from.mac != ourMAC || from.addr.Port() != 68 {
			t.Errorf("wrote % x and read % x, %v", message, again, err)
		}
	})
}

// The frames that leave, to all before there is an address, and to the leasing
// server for a renewal.
func TestGoldenFrames(t *testing.T) {
	for _, c := range []struct {
		name  string
		dest  lease.MAC
		build message
	}{
		{"frame-discover", allMAC, message{kind: dhcp4.Discover}},
		{"frame-renewing", stationOf(server1), message{kind: dhcp4.Request, ciaddr: leasedAddr}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := c.build
			m.xid, m.place, m.party = goldenXID, lanPlace, party{mac: mac1, clientID: lease.MACClientID(mac1)}
			frame, err := writeFrame(ourMAC, c.dest, m.marshal())
			if err != nil {
				t.Fatal(err)
			}
			pseudo := slices.Concat(frame[26:34], []byte{0, 17}, frame[38:40], frame[34:])
			if checksum(frame[14:34]) != 0 || checksum(pseudo) != 0 {
				t.Errorf("checksums %#x, %#x", checksum(frame[14:34]), checksum(pseudo))
			}
			matchGolden(t, c.name, annotateFrame(frame)+annotate(t, frame[42:]))
		})
	}
}

// annotateFrame writes the headers of a frame as hexadecimal lines with their
// meaning (RFC 894, 791 and 768).
func annotateFrame(b []byte) string {
	var s strings.Builder
	line := func(bytes []byte, format string, args ...any) {
		fmt.Fprintf(&s, "%-47s # %s\n", fmt.Sprintf("% x", bytes), fmt.Sprintf(format, args...))
	}
	addr := func(at int) netip.Addr { return netip.AddrFrom4([4]byte(b[at : at+4])) }
	number := func(at int) uint16 { return binary.BigEndian.Uint16(b[at:]) }
	line(b[0:6], "Ethernet to %s", lease.MAC(b[0:6]))
	line(b[6:12], "from %s", lease.MAC(b[6:12]))
	line(b[12:14], "type IPv4")
	line(b[14:18], "IPv4, no options, TOS 0, length %d of %d", number(16), len(b)-14)
	line(b[18:22], "identification 0, don't fragment")
	line(b[22:26], "TTL %d, protocol %d, checksum", b[22], b[23])
	line(b[26:30], "from %s", addr(26))
	line(b[30:34], "to %s", addr(30))
	line(b[34:38], "UDP from %d to %d", number(34), number(36))
	line(b[38:42], "length %d of %d, checksum", number(38), len(b)-34)
	return s.String()
}

func BenchmarkFrame(b *testing.B) {
	m := message{kind: dhcp4.Discover, xid: goldenXID, place: lanPlace, party: party{mac: mac1, clientID: lease.MACClientID(mac1)}}
	for b.Loop() {
		frame, err := writeFrame(ourMAC, allMAC, m.marshal())
		if err != nil {
			b.Fatal(err)
		}
		if _, _, err := readFrame(frame); err != nil {
			b.Fatal(err)
		}
	}
}
