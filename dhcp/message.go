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
	optionFQDN = dhcp4.OptionCode(81) // RFC 4702

	// Flags of option 81: the server is to update the A record, too, and the
	// name is in DNS' own form (RFC 4702 section 2.1).
	fqdnServerUpdates, fqdnEncoded = 0x01, 0x04

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

// describe adds what tells the servers about the endpoint: its name, and the
// classes by which they choose what to answer.
func (m message) describe(p *dhcp4.Packet) {
	o, name := m.options, hostName(m.name)
	if name != "" && (o.HostName == lease.On || o.HostName == "" && o.FQDN == "") {
		p.AddOption(dhcp4.OptionHostName, []byte(name))
	}
	if o.VendorClass != "" && o.VendorClass != string(lease.Off) {
		p.AddOption(dhcp4.OptionVendorClassIdentifier, []byte(o.VendorClass))
	}
	if o.UserClass != "" {
		// One of the classes that there may be (RFC 3004 section 4).
		p.AddOption(dhcp4.OptionUserClass, append([]byte{byte(len(o.UserClass))}, o.UserClass...))
	}
	if name != "" && o.FQDN != "" {
		// The two zeros were result codes once (RFC 4702 section 2.2).
		p.AddOption(optionFQDN, append([]byte{fqdnServerUpdates | fqdnEncoded, 0, 0}, dnsName(name+"."+o.FQDN)...))
	}
}

// dnsName is a domain name as DNS writes it: labels, each after its length, and
// an empty one (RFC 1035 section 3.1).
func dnsName(name string) (wire []byte) {
	for label := range strings.SplitSeq(strings.TrimSuffix(name, "."), ".") {
		wire = append(append(wire, byte(len(label))), label...)
	}
	return append(wire, 0)
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
