package dhcp

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"time"

	"github.com/krolaw/dhcp4"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Options that krolaw/dhcp4 doesn't name.
const (
	linkSelection = 5 // sub-option of 82 (RFC 3527)

	httypeEthernet = 1
	// relayHops counts the relay agent in us (RFC 1542 section 4.1.1).
	relayHops = 1
	// maxMessage is option 57: the IP datagram that we take, an Ethernet
	// frame's (RFC 2132 section 9.10).
	maxMessage = 1500
	// minMessage is what BOOTP relays and servers may expect (RFC 1542
	// section 2.1).
	minMessage = 300
)

// parameters is option 55, the same in every message of a lease (RFC 2131
// section 4.3.2): subnet mask, router, DNS, domain, MTU, NTP, lease time,
// server, T1, T2, domain search, classless routes.
var parameters = []byte{1, 3, 6, 15, 26, 42, 51, 54, 58, 59, 119, 121}

// message is a BOOTREQUEST before it is bytes. Zero fields are left out.
type message struct {
	kind      dhcp4.MessageType
	xid       uint32
	secs      uint16 // since the exchange began
	ciaddr    netip.Addr
	requested netip.Addr // option 50
	server    netip.Addr // option 54
	party
	options lease.Options // those in force
	place                 // from where it is sent
}

// wants reports whether the message asks for parameters: RELEASE and DECLINE
// must carry neither options 55 and 57 nor 12 (RFC 2131 table 5).
func (m message) wants() bool {
	return m.kind == dhcp4.Discover || m.kind == dhcp4.Request
}

// marshal writes the message. Option 82 is the last option (RFC 3046 section
// 2.1); padding follows the end, since parsers stop there.
func (m message) marshal() []byte {
	p := dhcp4.NewPacket(dhcp4.BootRequest)
	binary.BigEndian.PutUint32(p.XId(), m.xid)
	binary.BigEndian.PutUint16(p.Secs(), m.secs)
	p.SetCHAddr(m.mac[:])
	if m.ciaddr.IsValid() {
		p.SetCIAddr(m.ciaddr.AsSlice())
	}
	if m.broadcast() {
		// The answer is for all, so that it needs no promiscuous interface to be
		// seen here (RFC 2131 section 4.1).
		p.SetBroadcast(true)
	} else {
		p.SetHops(relayHops)
		p.SetGIAddr(m.giaddr().AsSlice())
	}

	p.AddOption(dhcp4.OptionDHCPMessageType, []byte{byte(m.kind)})
	p.AddOption(dhcp4.OptionClientIdentifier, m.clientID)
	if m.requested.IsValid() {
		p.AddOption(dhcp4.OptionRequestedIPAddress, m.requested.AsSlice())
	}
	if m.server.IsValid() {
		p.AddOption(dhcp4.OptionServerIdentifier, m.server.AsSlice())
	}
	if m.wants() {
		p.AddOption(dhcp4.OptionMaximumDHCPMessageSize, binary.BigEndian.AppendUint16(nil, maxMessage))
		m.describe(&p)
		p.AddOption(dhcp4.OptionParameterRequestList, parameters)
	}
	m.relayOptions(&p)
	if short := minMessage - len(p); short > 0 {
		p = append(p, make([]byte, short)...)
	}
	return p
}

// describe adds what tells the servers about the endpoint: its host name.
func (m message) describe(p *dhcp4.Packet) {
	if name := hostName(m.name); name != "" {
		p.AddOption(dhcp4.OptionHostName, []byte(name))
	}
}

// hostName makes a valid host name of a container's name, which may hold dots
// and underscores: letters, digits and inner hyphens, at most 63 (RFC 1123
// section 2.1). It is empty when nothing remains.
func hostName(container string) string {
	name := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '-'
	}, container)
	name = strings.TrimLeft(name, "-")
	return strings.TrimRight(name[:min(len(name), 63)], "-")
}

// seconds is the secs field: whole seconds since the exchange began, 0 where
// that isn't known.
func seconds(since time.Time) uint16 {
	if since.IsZero() {
		return 0
	}
	return uint16(max(0, min(time.Since(since)/time.Second, 0xffff)))
}
