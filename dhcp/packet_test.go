package dhcp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Message types (RFC 2132 section 9.6), not taken from the library on purpose:
// what stands here is what the other side thinks.
const (
	discover = 1
	offer    = 2
	request  = 3
	decline  = 4
	ack      = 5
	nak      = 6
	release  = 7
)

// option is one option as it stands in a packet.
type option struct {
	code  byte
	value []byte
}

func opt(code byte, value ...byte) option { return option{code, value} }

func addrOpt(code byte, addr string) option { return opt(code, ip(addr).AsSlice()...) }

func timeOpt(code byte, seconds uint32) option {
	return opt(code, binary.BigEndian.AppendUint32(nil, seconds)...)
}

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

// packet is a DHCP message as the other side reads it.
type packet struct {
	op, htype, hlen, hops          byte
	xid                            uint32
	secs, flags                    uint16
	ciaddr, yiaddr, siaddr, giaddr netip.Addr
	chaddr                         [16]byte
	sname, file                    []byte
	options                        []option
	padding                        []byte // what follows the end option
	size                           int
}

// readPacket is a parser written from RFC 2131 section 2 alone, so that a
// mistake of the product's own isn't repeated here.
func readPacket(b []byte) (packet, error) {
	if len(b) < 240 {
		return packet{}, fmt.Errorf("%d bytes are no DHCP message", len(b))
	}
	addr := func(at int) netip.Addr { return netip.AddrFrom4([4]byte(b[at : at+4])) }
	p := packet{
		op: b[0], htype: b[1], hlen: b[2], hops: b[3],
		xid: binary.BigEndian.Uint32(b[4:]), secs: binary.BigEndian.Uint16(b[8:]), flags: binary.BigEndian.Uint16(b[10:]),
		ciaddr: addr(12), yiaddr: addr(16), siaddr: addr(20), giaddr: addr(24),
		chaddr: [16]byte(b[28:44]), sname: b[44:108], file: b[108:236], size: len(b),
	}
	if !bytes.Equal(b[236:240], []byte{99, 130, 83, 99}) {
		return packet{}, errors.New("no magic cookie")
	}
	for rest := b[240:]; ; {
		if len(rest) == 0 {
			return packet{}, errors.New("no end option")
		}
		code := rest[0]
		if code == 255 {
			p.padding = rest[1:]
			return p, nil
		}
		if code == 0 {
			rest = rest[1:]
			continue
		}
		if len(rest) < 2 || len(rest) < 2+int(rest[1]) {
			return packet{}, fmt.Errorf("option %d is cut", code)
		}
		end := 2 + int(rest[1])
		p.options = append(p.options, option{code, rest[2:end]})
		rest = rest[end:]
	}
}

func mustRead(t testing.TB, b []byte) packet {
	t.Helper()
	p, err := readPacket(b)
	if err != nil {
		t.Fatalf("%v in % x", err, b)
	}
	return p
}

func (p packet) mac() lease.MAC { return lease.MAC(p.chaddr[:6]) }

// get returns an option's value, nil where the message hasn't it.
func (p packet) get(code byte) []byte {
	for _, o := range p.options {
		if o.code == code {
			return o.value
		}
	}
	return nil
}

func (p packet) has(code byte) bool { return p.get(code) != nil }

func (p packet) kind() byte {
	if v := p.get(53); len(v) == 1 {
		return v[0]
	}
	return 0
}

// addr returns an option's address, the zero one where there is none.
func (p packet) addr(code byte) netip.Addr {
	addr, _ := netip.AddrFromSlice(p.get(code))
	return addr
}

// answer is a server's message, made byte by byte.
type answer struct {
	to      packet // xid, chaddr and giaddr are echoed
	yiaddr  netip.Addr
	options []option
}

func (a answer) bytes() []byte {
	b := make([]byte, 240, 400)
	b[0], b[1], b[2] = 2, 1, 6
	binary.BigEndian.PutUint32(b[4:], a.to.xid)
	if a.yiaddr.IsValid() {
		copy(b[16:], a.yiaddr.AsSlice())
	}
	copy(b[24:], a.to.giaddr.AsSlice())
	copy(b[28:], a.to.chaddr[:])
	copy(b[236:], []byte{99, 130, 83, 99})
	return append(appendOptions(b, a.options...), 255)
}

func appendOptions(b []byte, options ...option) []byte {
	for _, o := range options {
		b = append(append(b, o.code, byte(len(o.value))), o.value...)
	}
	return b
}

// grant is an OFFER or ACK of an hour, as ISC dhcpd writes it.
func grant(to packet, kind byte, server, addr netip.Addr, extra ...option) []byte {
	options := []option{opt(53, kind), opt(54, server.AsSlice()...), timeOpt(51, 3600), addrOpt(1, "255.255.255.0"), addrOpt(3, "10.10.0.1")}
	return answer{to, addr, append(options, extra...)}.bytes()
}

func refuse(to packet, server netip.Addr) []byte {
	return answer{to: to, options: []option{opt(53, nak), opt(54, server.AsSlice()...), {56, []byte("wrong network")}}}.bytes()
}
