package dhcp

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"time"

	"github.com/krolaw/dhcp4"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

const (
	headerLen = 240 // BOOTP's fixed part and DHCP's cookie
	cookie    = 0x63825363

	// Values of option 52 (RFC 2132 section 9.3).
	overloadFile, overloadSName = 1, 2
)

// reply is an OFFER, ACK or NAK that is well-formed. It owns its memory.
type reply struct {
	kind    dhcp4.MessageType
	xid     uint32
	mac     lease.MAC
	from    netip.Addr // IP source, set by the link
	station lease.MAC  // Ethernet source, set by a broadcast link
	relay   netip.Addr // giaddr
	addr    netip.Addr // yiaddr; unspecified in a NAK
	server  netip.Addr // option 54; zero where a NAK has none
	raw     []byte     // options with those in sname and file, without pads, end and 52
	options map[byte][]byte
}

// Reasons to drop a packet. Each has a counter.
var (
	errShort    = errors.New("shorter than a DHCP message")
	errOp       = errors.New("not a BOOTREPLY")
	errHardware = errors.New("not for an Ethernet address")
	errCookie   = errors.New("wrong cookie")
	errCut      = errors.New("cut option")
	errType     = errors.New("not an OFFER, ACK or NAK")
	errServer   = errors.New("no unicast server identifier")
	errAddress  = errors.New("offered address is not unicast")
	errTime     = errors.New("no lease time, or zero")
	errRelay    = errors.New("foreign giaddr")
	errForeign  = errors.New("no exchange waits for it")
	errClientID = errors.New("foreign client identifier") // RFC 6842 section 3
	errFull     = errors.New("its exchange doesn't keep up")
)

// parseReply reads and checks a packet. Its errors are the reasons above.
func parseReply(b []byte) (reply, error) {
	if len(b) < headerLen {
		return reply{}, errShort
	}
	p := dhcp4.Packet(b)
	switch {
	case p.OpCode() != dhcp4.BootReply:
		return reply{}, errOp
	case p.HType() != httypeEthernet || p.HLen() != byte(len(lease.MAC{})):
		return reply{}, errHardware
	case binary.BigEndian.Uint32(p.Cookie()) != cookie:
		return reply{}, errCookie
	}
	raw, options, err := readOptions(p)
	if err != nil {
		return reply{}, err
	}
	r := reply{
		xid:     binary.BigEndian.Uint32(p.XId()),
		mac:     lease.MAC(p.CHAddr()),
		relay:   netip.AddrFrom4([4]byte(p.GIAddr())),
		addr:    netip.AddrFrom4([4]byte(p.YIAddr())),
		raw:     raw,
		options: options,
	}
	if kind := options[byte(dhcp4.OptionDHCPMessageType)]; len(kind) == 1 {
		r.kind = dhcp4.MessageType(kind[0])
	}
	r.server, _ = r.ip(dhcp4.OptionServerIdentifier)
	switch r.kind {
	case dhcp4.Offer, dhcp4.ACK:
		switch {
		case !lease.Unicast(r.server):
			return reply{}, errServer
		case !lease.Unicast(r.addr):
			return reply{}, errAddress
		case r.seconds(dhcp4.OptionIPAddressLeaseTime) == 0:
			return reply{}, errTime
		}
	case dhcp4.NAK:
	default:
		return reply{}, errType
	}
	return r, nil
}

// readOptions walks the options field and, where option 52 says so, file and
// then sname (RFC 2131 section 4.1). Values of a code that comes several times
// are joined (RFC 3396 section 7). The result shares no memory with the packet.
func readOptions(p dhcp4.Packet) (raw []byte, options map[byte][]byte, err error) {
	options = make(map[byte][]byte, 16)
	// One allocation holds all values: joined ones move out by themselves.
	raw = make([]byte, 0, len(p)-headerLen)
	var overload byte
	walk := func(area []byte) error {
		for len(area) > 0 {
			code := area[0]
			switch dhcp4.OptionCode(code) {
			case dhcp4.Pad:
				area = area[1:]
				continue
			case dhcp4.End:
				return nil
			}
			if len(area) < 2 || len(area) < 2+int(area[1]) {
				return errCut
			}
			end := 2 + int(area[1])
			if dhcp4.OptionCode(code) == dhcp4.OptionOverload {
				// It is about this packet's layout, which raw no longer has.
				if end == 3 {
					overload = area[2]
				}
				area = area[end:]
				continue
			}
			start := len(raw)
			raw = append(raw, area[:end]...)
			value := raw[start+2 : len(raw) : len(raw)]
			if before, ok := options[code]; ok {
				value = append(before[:len(before):len(before)], value...)
			}
			options[code] = value
			area = area[end:]
		}
		return nil
	}
	if err := walk(p.Options()); err != nil {
		return nil, nil, err
	}
	// What stands in file and sname can't extend them.
	inFile, inSName := overload&overloadFile != 0, overload&overloadSName != 0
	// krolaw's File and SName stop at the first zero, which is a pad here.
	if inFile {
		err = walk(p[108:236])
	}
	if inSName && err == nil {
		err = walk(p[44:108])
	}
	return raw, options, err
}

// ip reads an option of one or more addresses and returns the first.
func (r reply) ip(code dhcp4.OptionCode) (netip.Addr, bool) {
	value := r.options[byte(code)]
	if len(value) < 4 {
		return netip.Addr{}, false
	}
	return netip.AddrFrom4([4]byte(value[:4])), true
}

// seconds reads an option of 32 bits; 0 where it is missing or malformed.
func (r reply) seconds(code dhcp4.OptionCode) uint32 {
	value := r.options[byte(code)]
	if len(value) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(value)
}

// subnet is the offered address's network by option 1, zero when that is
// missing or no mask.
func (r reply) subnet() netip.Prefix {
	mask, ok := r.ip(dhcp4.OptionSubnetMask)
	if !ok {
		return netip.Prefix{}
	}
	b := mask.As4()
	inverse := ^binary.BigEndian.Uint32(b[:])
	if inverse&(inverse+1) != 0 {
		return netip.Prefix{}
	}
	bits := 32
	for ; inverse != 0; inverse >>= 1 {
		bits--
	}
	return netip.PrefixFrom(r.addr, bits).Masked()
}

// offer is what an OFFER says, to a DISCOVER that was first sent at a moment.
func (r reply) offer(began time.Time) lease.Offer {
	o := lease.Offer{Server: r.server, From: r.from, Address: r.addr, Subnet: r.subnet(), After: time.Since(began)}
	o.Router, _ = r.ip(dhcp4.OptionRouter)
	for dns := r.options[byte(dhcp4.OptionDomainNameServer)]; len(dns) >= 4; dns = dns[4:] {
		o.DNS = append(o.DNS, netip.AddrFrom4([4]byte(dns[:4])))
	}
	o.T1, o.T2, o.Length = r.lengths()
	return o
}

// lengths are the times until T1, T2 and the lease's end: by options 58 and 59, at
// 0.5 and 0.875 of the lease where one is missing, and both so where they aren't
// in order (RFC 2131 section 4.4.5).
func (r reply) lengths() (t1, t2, length time.Duration) {
	length = time.Duration(r.seconds(dhcp4.OptionIPAddressLeaseTime)) * time.Second
	if length == lease.LeaseForEver {
		return length, length, length
	}
	t1 = time.Duration(r.seconds(dhcp4.OptionRenewalTimeValue)) * time.Second
	t2 = time.Duration(r.seconds(dhcp4.OptionRebindingTimeValue)) * time.Second
	if t1 == 0 {
		t1 = length / 2
	}
	if t2 == 0 {
		t2 = length / 8 * 7
	}
	if t1 >= t2 || t2 >= length {
		t1, t2 = length/2, length/8*7
	}
	return t1, t2, length
}

// times sets the lease's times from an ACK to a request sent at a moment. A
// lease of 0xffffffff s never ends (RFC 2131 section 3.3).
func (r reply) times(l *lease.Lease, sent time.Time) {
	l.Obtained = sent
	l.Renew, l.Rebind, l.Expires = time.Time{}, time.Time{}, time.Time{}
	if t1, t2, length := r.lengths(); length != lease.LeaseForEver {
		l.Renew, l.Rebind, l.Expires = sent.Add(t1), sent.Add(t2), sent.Add(length)
	}
}
