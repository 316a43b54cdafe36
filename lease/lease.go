package lease

import (
	"fmt"
	"net"
	"net/netip"
	"time"
)

// MAC is an Ethernet hardware address, comparable so that it can be a key.
type MAC [6]byte

// ParseMAC reads a 48-bit hardware address in any notation of [net.ParseMAC].
func ParseMAC(s string) (MAC, error) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != len(MAC{}) {
		return MAC{}, fmt.Errorf("parse MAC address %q: want six bytes such as 02:42:ac:11:00:02", s)
	}
	return MAC(hw), nil
}

// Unicast reports whether a network card can have this address: neither zero
// nor a group's.
func (m MAC) Unicast() bool { return m != MAC{} && m[0]&1 == 0 }

// String writes the address in lower case with colons.
func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// MarshalText implements encoding.TextMarshaler as String.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler as ParseMAC.
func (m *MAC) UnmarshalText(text []byte) (err error) {
	*m, err = ParseMAC(string(text))
	return err
}

// Lease is an address that a DHCP server lent to one endpoint of a pool
// (RFC 2131 section 1.6, "binding"). It is a plain value: the Manager replaces
// it whole at each renewal.
type Lease struct {
	Pool string `json:"pool"`           // ID of the pool it belongs to
	MAC  MAC    `json:"mac"`            // chaddr of every message about it
	Name string `json:"name,omitempty"` // the container's name, where the engine gave one

	// Container is the container's ID, where a reconcile has learned it.
	Container string `json:"container,omitempty"`

	// ClientID is option 61 as it was first sent. Servers key the lease on
	// it, so it never changes during the lease's life (RFC 2131 section 4.2).
	ClientID []byte `json:"client_id"`
	// Host is the HostIdentity.ID under which the lease was taken, "" where
	// none was known.
	Host string `json:"host,omitempty"`

	// Prefix is the address with the prefix length of the pool's subnet.
	Prefix netip.Prefix `json:"prefix"`
	// Server is the server identifier (option 54) of the last ACK.
	Server netip.Addr `json:"server"`
	// Via is where messages for that server are sent: the configured address
	// through which it was reached, which need not be its identifier.
	Via netip.AddrPort `json:"via"`
	// Station is the Ethernet address from which the last ACK came, where
	// servers are asked by broadcast: that of the server or of a relay agent.
	Station MAC `json:"station,omitzero"`
	// Agent are the sub-options of option 82 that told who the endpoint is, as
	// they were first sent: servers may key on them (RFC 3046 section 2.1).
	Agent []byte `json:"agent,omitempty"`
	// Options are the options of the last ACK as they came, code, length and
	// value one after the other (RFC 2132), without pads and end.
	Options []byte `json:"options,omitempty"`

	// Obtained is when the acknowledged request was sent, the moment from
	// which all other times count (RFC 2131 section 4.4.1).
	Obtained time.Time `json:"obtained"`
	// Renew and Rebind are T1 and T2, Expires is the end (RFC 2131 section
	// 4.4.5). All three are zero for an infinite lease.
	Renew   time.Time `json:"renew"`
	Rebind  time.Time `json:"rebind"`
	Expires time.Time `json:"expires"`

	// BootID and BootTime say when Obtained was on a clock that nobody sets.
	// They are made for the store, see Manager.stamp.
	BootID   string        `json:"boot_id,omitempty"`
	BootTime time.Duration `json:"boot_time,omitempty"`
}

// Key tells a lease among all of this host's.
type Key struct {
	Pool string
	MAC  MAC
}

// Key is the lease's.
func (l Lease) Key() Key { return Key{l.Pool, l.MAC} }

// Addr is the leased address.
func (l Lease) Addr() netip.Addr { return l.Prefix.Addr() }

// State is where a lease stands in RFC 2131 figure 5.
type State int

// The states of a lease that was granted. An infinite lease is always Bound.
const (
	// Bound: nothing is sent. At T1 it becomes Renewing.
	Bound State = iota
	// Renewing: the leasing server is asked to extend. An ACK makes it Bound,
	// a NAK Lost, T2 Rebinding.
	Renewing
	// Rebinding: every server is asked to extend. An ACK makes it Bound, a
	// NAK or its end Lost.
	Rebinding
	// Lost: the lease ended, and the address is no longer ours to use. The
	// same address is asked for anew, and a grant makes it Bound.
	Lost
)

// String returns the state's name in lower case.
func (s State) String() string {
	switch s {
	case Bound:
		return "bound"
	case Renewing:
		return "renewing"
	case Rebinding:
		return "rebinding"
	case Lost:
		return "lost"
	}
	return fmt.Sprintf("state %d", int(s))
}

// Infinite reports whether the lease never ends (RFC 2131 section 3.3).
func (l Lease) Infinite() bool { return l.Expires.IsZero() }

// State returns the lease's state at a moment.
func (l Lease) State(now time.Time) State {
	switch {
	case l.Infinite() || now.Before(l.Renew):
		return Bound
	case now.Before(l.Rebind):
		return Renewing
	case now.Before(l.Expires):
		return Rebinding
	}
	return Lost
}

const (
	// minRetry is RFC 2131 section 4.4.5's lower bound for the time between
	// two renewals, and the pace at which a lost address is asked for again.
	minRetry = 60 * time.Second
	// minShortRetry takes its place in leases too short for it.
	minShortRetry = time.Second
)

// Retry returns when the attempt after one at now is due: T1 while Bound, then
// after half of the time that the state has left, but not under 60 seconds
// (RFC 2131 section 4.4.5), and never past the state's end. A state of under
// 60 seconds, which the RFC doesn't foresee, has a bound of one second. It is
// zero for an infinite lease, which needs no attempt.
func (l Lease) Retry(now time.Time) time.Time {
	switch l.State(now) {
	case Renewing:
		return halfway(now, l.Renew, l.Rebind)
	case Rebinding:
		return halfway(now, l.Rebind, l.Expires)
	case Lost:
		return now.Add(minRetry)
	default:
		return l.Renew
	}
}

func halfway(now, begin, end time.Time) time.Time {
	bound := minRetry
	if end.Sub(begin) < minRetry {
		bound = minShortRetry
	}
	at := now.Add(max(end.Sub(now)/2, bound))
	if at.After(end) {
		return end
	}
	return at
}
