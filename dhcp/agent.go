package dhcp

import (
	"net/netip"
	"slices"

	"github.com/krolaw/dhcp4"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Sub-options of option 82, and what RFC 3011 has instead of one of them.
const (
	circuitID       = 1  // RFC 3046 section 3.1
	remoteID        = 2  // RFC 3046 section 3.2
	linkSelection   = 5  // RFC 3527
	subscriberID    = 6  // RFC 3993
	relaySourcePort = 19 // RFC 8357 section 4.1

	optionSubnetSelection = dhcp4.OptionCode(118) // RFC 3011
)

// maxAgentPart is how long each text in option 82 may be: three of them, with
// link selection and the port, fit into its 255 bytes.
const maxAgentPart = 64

// agentParts are the sub-options of option 82 that tell who an endpoint is, as
// its network wants it. What isn't known is left out; nil when nothing remains.
func agentParts(o lease.Options, host string, who party) (parts []byte) {
	network := o.NetworkName
	if network == "" && who.pool.Subnet.IsValid() {
		network = who.pool.Subnet.String()
	}
	for _, part := range []struct {
		wanted lease.AgentPart
		code   byte
		text   string
	}{
		{lease.AgentNetwork, circuitID, network},
		{lease.AgentHost, remoteID, host},
		{lease.AgentContainer, subscriberID, who.name},
	} {
		if part.text == "" || !slices.Contains(o.Agent, part.wanted) {
			continue
		}
		text := lease.Shorten([]byte(part.text), maxAgentPart)
		parts = append(append(parts, part.code, byte(len(text))), text...)
	}
	return parts
}

// wantedLink is the subnet that the servers are to choose: the zero address
// where giaddr says it already (RFC 3527), or the choice is left to them.
func (m message) wantedLink() netip.Addr {
	subnet := m.pool.Subnet
	if m.options.LinkSelection == lease.SelectOff || !subnet.IsValid() || subnet.Contains(m.giaddr()) {
		return netip.Addr{}
	}
	return subnet.Addr()
}

// relayOptions adds what a relay agent adds: nothing on a broadcast link, where
// relay agents must drop a message with option 82 and without giaddr (RFC 3046
// section 2.1).
func (m message) relayOptions(p *dhcp4.Packet) {
	if m.broadcast() {
		return
	}
	info := slices.Clone(m.agent)
	switch link := m.wantedLink(); {
	case !link.IsValid():
	case m.options.LinkSelection == lease.Select118:
		p.AddOption(optionSubnetSelection, link.AsSlice())
	default:
		info = append(append(info, linkSelection, 4), link.AsSlice()...)
	}
	if m.relay.Port() != lease.ServerPort {
		info = append(info, relaySourcePort, 0)
	}
	if len(info) > 0 {
		p.AddOption(dhcp4.OptionRelayAgentInformation, info)
	}
}
