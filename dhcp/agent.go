package dhcp

import (
	"net/netip"

	"github.com/krolaw/dhcp4"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// agentParts are the sub-options of option 82 that tell who an endpoint is, as
// its network wants it; nil for none.
func agentParts(o lease.Options, who party) []byte { return nil }

// wantedLink is the subnet that the servers are to choose: the zero address
// where giaddr says it already (RFC 3527).
func (m message) wantedLink() netip.Addr {
	if !m.pool.Subnet.IsValid() || m.pool.Subnet.Contains(m.giaddr()) {
		return netip.Addr{}
	}
	return m.pool.Subnet.Addr()
}

// relayOptions adds what a relay agent adds.
func (m message) relayOptions(p *dhcp4.Packet) {
	if m.broadcast() {
		return
	}
	if link := m.wantedLink(); link.IsValid() {
		p.AddOption(dhcp4.OptionRelayAgentInformation, append([]byte{linkSelection, 4}, link.AsSlice()...))
	}
}
