package dhcp

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Silence is the error of an exchange that no server answered: a
// lease.ErrNoAnswer that knows who was asked.
type Silence struct {
	Asked  []Asked       // at least one
	Within time.Duration // from the first message to the end of the last wait
	Subnet netip.Prefix  // the wanted one, zero where the servers choose
	Failed error         // of the last message that could not be sent, if any

	// Messages is how many had no answer in several exchanges, and First and Last
	// when these were sent: to the server that answered others last. Zero in the
	// error of one exchange.
	Messages    int
	First, Last time.Time
}

// Asked is one way on which servers were asked.
type Asked struct {
	Interface string         // on whose LAN; "" as a relay agent
	Server    netip.AddrPort // who was asked; zero for all on the LAN
	Relay     netip.AddrPort // from which relay address; zero on a LAN
}

// Summary is the error without the advice.
func (s *Silence) Summary() string {
	asked := make([]string, len(s.Asked))
	for i, a := range s.Asked {
		at := place{relay: a.Relay, iface: a.Interface}
		switch {
		case !at.broadcast():
			asked[i] = fmt.Sprintf("%s from %s", a.Server.Addr(), at)
		case a.Server.IsValid():
			asked[i] = fmt.Sprintf("%s on %s", a.Server.Addr(), at)
		default:
			asked[i] = "by broadcast on " + at.String()
		}
	}
	text := fmt.Sprintf("%v within %s (asked %s", lease.ErrNoAnswer, s.Within.Round(time.Second), strings.Join(asked, ", "))
	if s.Messages > 0 {
		text += fmt.Sprintf("; %d messages from %s to %s", s.Messages, s.First.Format(time.DateTime), s.Last.Format(time.DateTime))
	}
	text += ")"
	if s.Failed != nil {
		text += fmt.Sprintf(" (some messages failed: %v)", s.Failed)
	}
	return text
}

// Error implements error.
func (s *Silence) Error() string {
	switch {
	case s.Asked[0].Interface != "" && s.Asked[0].Server.IsValid():
		return s.Summary() + ": is it running, has it still the Ethernet address from which it answered, does a switch or firewall drop UDP ports 67 and 68?"
	case s.Asked[0].Interface != "":
		return s.Summary() + ": is there one on its LAN, or a relay agent, does it serve that LAN with free addresses, does a switch or firewall drop UDP ports 67 and 68?"
	}
	subnet := "that address's subnet"
	if s.Subnet.IsValid() {
		subnet = "subnet " + s.Subnet.String()
	}
	text := s.Summary() + ": is it running, does it serve " + subnet + " with free addresses, has it a route back to the relay address, "
	if port := s.Asked[0].Relay.Port(); port != lease.ServerPort {
		return text + fmt.Sprintf("does it answer to the relay's source port %d instead of 67 (RFC 8357: Kea does, ISC dhcpd and dnsmasq don't), does a firewall drop it?", port)
	}
	return text + "does a firewall drop UDP port 67?"
}

// Unwrap makes it a lease.ErrNoAnswer.
func (s *Silence) Unwrap() []error {
	if s.Failed == nil {
		return []error{lease.ErrNoAnswer}
	}
	return []error{lease.ErrNoAnswer, s.Failed}
}
