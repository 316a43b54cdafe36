// Package dhcpd is the demo's DHCP server: one subnet, leases in memory,
// relayed requests only. It is small enough to be read, and strict, so that
// what the demo shows means something. For anything else there are ISC dhcpd,
// Kea and dnsmasq.
//
// Table decides, without clock and network; Server does the rest.
package dhcpd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/krolaw/dhcp4"
)

// Config is the subnet that is served.
type Config struct {
	Server      netip.Addr // the server's own address, option 54
	Prefix      netip.Prefix
	First, Last netip.Addr // of the range that is handed out
	Router      netip.Addr
	LeaseTime   time.Duration
}

// Lease is an address that a client holds.
type Lease struct {
	Addr    netip.Addr
	MAC     string // like 02:42:0a:0a:00:64
	Name    string // option 12, if the client sent it
	Expires time.Time
}

// Table is the leases, and what is decided by them.
type Table struct {
	config Config
	rows   map[netip.Addr]row // at most one of each client, expired ones among them
}

// row is an address that isn't free until it expires.
type row struct {
	Lease
	client string // see clientOf; empty if the address was declined
	bound  bool   // acknowledged; before that it is an offer
}

// offerTime is how long an offered address waits for its REQUEST.
const offerTime = 10 * time.Second

// NewTable returns a table without leases.
func NewTable(config Config) *Table {
	return &Table{config: config, rows: map[netip.Addr]row{}}
}

// Leases lists what clients hold, by address.
func (t *Table) Leases(now time.Time) []Lease {
	t.expire(now)
	var leases []Lease
	for _, r := range t.rows {
		if r.bound {
			leases = append(leases, r.Lease)
		}
	}
	slices.SortFunc(leases, func(a, b Lease) int { return a.Addr.Compare(b.Addr) })
	return leases
}

// Answer takes a request up into the table and returns the answer to it. Nil
// and no error is the right answer to a RELEASE; an error says why there is
// none.
func (t *Table) Answer(p dhcp4.Packet, now time.Time) (dhcp4.Packet, error) {
	if err := valid(p); err != nil {
		return nil, err
	}
	if relay := relayOf(p); !t.config.Prefix.Contains(relay) {
		return nil, fmt.Errorf("no subnet for relay %s", relay)
	}
	t.expire(now)
	q := question{Packet: p, options: p.ParseOptions()}
	switch kind := q.kind(); kind {
	case dhcp4.Discover:
		return t.discover(q, now)
	case dhcp4.Request:
		return t.request(q, now)
	case dhcp4.Release:
		return nil, t.release(q)
	case dhcp4.Decline:
		return nil, t.decline(q, now)
	default:
		return nil, fmt.Errorf("%s is not served", nameOf(kind))
	}
}

// discover offers the client's own address, else the one that it asks for,
// else any that is free (RFC 2131 section 4.3.1).
func (t *Table) discover(q question, now time.Time) (dhcp4.Packet, error) {
	client := q.client()
	own, known := t.rowOf(client)
	if known && own.bound {
		return t.reply(q, dhcp4.Offer, own.Addr), nil
	}
	addr := q.addr(dhcp4.OptionRequestedIPAddress)
	if !t.freeFor(client, addr) {
		addr = own.Addr // none, unless it has an offer
	}
	if !addr.IsValid() {
		addr = t.unused()
	}
	if !addr.IsValid() {
		return nil, errors.New("no address is free")
	}
	delete(t.rows, own.Addr)
	t.rows[addr] = row{Lease: q.lease(addr, now.Add(offerTime)), client: client}
	return t.reply(q, dhcp4.Offer, addr), nil
}

// request grants or refuses. What the client is at follows from the options
// that it sends (RFC 2131 section 4.3.2).
func (t *Table) request(q question, now time.Time) (dhcp4.Packet, error) {
	client := q.client()
	own, known := t.rowOf(client)
	wanted := q.addr(dhcp4.OptionRequestedIPAddress)
	chosen := q.addr(dhcp4.OptionServerIdentifier)
	current := addrOf(q.CIAddr())

	switch {
	case chosen.IsValid() && chosen != t.config.Server:
		if known && !own.bound {
			delete(t.rows, own.Addr)
		}
		return nil, fmt.Errorf("the client chose server %s", chosen)

	case chosen.IsValid(): // SELECTING
		if !wanted.IsValid() {
			return t.refuse(q, "no address requested"), nil
		}
		if !known || own.Addr != wanted {
			return t.refuse(q, fmt.Sprintf("%s was not offered", wanted)), nil
		}
		return t.grant(q, wanted, now), nil

	case wanted.IsValid(): // INIT-REBOOT
		if !t.config.Prefix.Contains(wanted) {
			return t.refuse(q, fmt.Sprintf("%s is not of this subnet", wanted)), nil
		}
		if !known && t.freeFor(client, wanted) {
			return nil, errors.New("no record of this client")
		}
		if !known || own.Addr != wanted {
			return t.refuse(q, fmt.Sprintf("%s is not this client's", wanted)), nil
		}
		return t.grant(q, wanted, now), nil

	case current.IsValid(): // RENEWING or REBINDING
		if known && own.Addr != current || !t.freeFor(client, current) {
			return t.refuse(q, fmt.Sprintf("%s is not this client's", current)), nil
		}
		// Also what is not in the table: as with ISC dhcpd and Kea, a table
		// that was lost fills again.
		return t.grant(q, current, now), nil
	}
	return nil, errors.New("the request names no address")
}

// release frees an address. The server identifier is required, as dnsmasq
// does and RFC 2131 table 5 says.
func (t *Table) release(q question) error {
	if chosen := q.addr(dhcp4.OptionServerIdentifier); chosen != t.config.Server {
		return errors.New("the release doesn't name this server")
	}
	addr := addrOf(q.CIAddr())
	if own, known := t.rowOf(q.client()); !known || !own.bound || own.Addr != addr {
		return errors.New("the address is not this client's")
	}
	delete(t.rows, addr)
	return nil
}

// decline keeps an address that somebody else uses from everybody, for the
// time of a lease.
func (t *Table) decline(q question, now time.Time) error {
	addr := q.addr(dhcp4.OptionRequestedIPAddress)
	if chosen := q.addr(dhcp4.OptionServerIdentifier); chosen != t.config.Server {
		return errors.New("the decline doesn't name this server")
	}
	if own, known := t.rowOf(q.client()); !known || own.Addr != addr {
		return errors.New("the address is not this client's")
	}
	t.rows[addr] = row{Lease: Lease{Addr: addr, Expires: now.Add(t.config.LeaseTime)}}
	return nil
}

func (t *Table) grant(q question, addr netip.Addr, now time.Time) dhcp4.Packet {
	t.rows[addr] = row{Lease: q.lease(addr, now.Add(t.config.LeaseTime)), client: q.client(), bound: true}
	return t.reply(q, dhcp4.ACK, addr)
}

// reply is an OFFER or an ACK.
func (t *Table) reply(q question, kind dhcp4.MessageType, addr netip.Addr) dhcp4.Packet {
	options := []dhcp4.Option{
		{Code: dhcp4.OptionSubnetMask, Value: mask(t.config.Prefix)},
		{Code: dhcp4.OptionRouter, Value: t.config.Router.AsSlice()},
	}
	p := dhcp4.ReplyPacket(q.Packet, kind, t.config.Server.AsSlice(), addr.AsSlice(), t.config.LeaseTime, q.echoed(options))
	if kind == dhcp4.ACK {
		p.SetCIAddr(q.CIAddr())
	}
	return p
}

// refuse is a NAK, with its reason for the client's log.
func (t *Table) refuse(q question, reason string) dhcp4.Packet {
	options := []dhcp4.Option{{Code: dhcp4.OptionMessage, Value: []byte(reason)}}
	p := dhcp4.ReplyPacket(q.Packet, dhcp4.NAK, t.config.Server.AsSlice(), nil, 0, q.echoed(options))
	p.SetBroadcast(true) // for the relay to do (RFC 2131 section 4.3.2)
	return p
}

func (t *Table) expire(now time.Time) {
	maps.DeleteFunc(t.rows, func(_ netip.Addr, r row) bool { return !r.Expires.After(now) })
}

func (t *Table) rowOf(client string) (r row, known bool) {
	for _, r := range t.rows {
		if r.client == client {
			return r, true
		}
	}
	return row{}, false
}

// freeFor says whether a client may have an address.
func (t *Table) freeFor(client string, addr netip.Addr) bool {
	if !addr.IsValid() || addr.Less(t.config.First) || t.config.Last.Less(addr) {
		return false
	}
	r, taken := t.rows[addr]
	return !taken || r.client == client
}

// unused is the first address without a row, or none.
func (t *Table) unused() netip.Addr {
	for addr := t.config.First; !t.config.Last.Less(addr); addr = addr.Next() {
		if _, taken := t.rows[addr]; !taken {
			return addr
		}
	}
	return netip.Addr{}
}

// question is a request that is valid.
type question struct {
	dhcp4.Packet
	options dhcp4.Options
}

func (q question) kind() dhcp4.MessageType {
	return dhcp4.MessageType(q.options[dhcp4.OptionDHCPMessageType][0])
}

// client is who a lease belongs to: option 61 if it is there, else the MAC
// (RFC 2131 section 4.2).
func (q question) client() string {
	if id := q.options[dhcp4.OptionClientIdentifier]; len(id) > 0 {
		return "id " + string(id)
	}
	return "mac " + q.CHAddr().String()
}

// addr is an option that is an address. One of another length counts as
// absent.
func (q question) addr(code dhcp4.OptionCode) netip.Addr { return addrOf(q.options[code]) }

func (q question) lease(addr netip.Addr, expires time.Time) Lease {
	return Lease{Addr: addr, MAC: q.CHAddr().String(), Name: string(q.options[dhcp4.OptionHostName]), Expires: expires}
}

// echoed adds the client identifier (RFC 6842).
func (q question) echoed(options []dhcp4.Option) []dhcp4.Option {
	if id, sent := q.options[dhcp4.OptionClientIdentifier]; sent {
		options = append(options, dhcp4.Option{Code: dhcp4.OptionClientIdentifier, Value: id})
	}
	return options
}

// cookie tells DHCP from BOOTP (RFC 2131 section 3).
var cookie = []byte{99, 130, 83, 99}

// valid refuses what isn't a relayed request of an Ethernet client.
func valid(p dhcp4.Packet) error {
	switch {
	case len(p) < 240 || !bytes.Equal(p.Cookie(), cookie):
		return errors.New("not DHCP")
	case p.OpCode() != dhcp4.BootRequest:
		return errors.New("not a request")
	case p.HType() != 1 || p.HLen() != 6:
		return errors.New("not an Ethernet client")
	case !hasKind(p.ParseOptions()[dhcp4.OptionDHCPMessageType]):
		return errors.New("no message type")
	case !relayOf(p).IsValid():
		return errors.New("not relayed")
	}
	return nil
}

// hasKind keeps out what RFC 2132 section 9.6 doesn't know, and krolaw/dhcp4
// neither: MessageType(0).String() panics.
func hasKind(option []byte) bool {
	return len(option) == 1 && dhcp4.MessageType(option[0]) >= dhcp4.Discover && dhcp4.MessageType(option[0]) <= dhcp4.Inform
}

func relayOf(p dhcp4.Packet) netip.Addr { return addrOf(p.GIAddr()) }

// addrOf reads an address. 0.0.0.0 is none.
func addrOf(b []byte) netip.Addr {
	addr, ok := netip.AddrFromSlice(b)
	if !ok || !addr.Is4() || addr.IsUnspecified() {
		return netip.Addr{}
	}
	return addr
}

// mask is option 1.
func mask(prefix netip.Prefix) []byte {
	return binary.BigEndian.AppendUint32(nil, ^uint32(0)<<(32-prefix.Bits()))
}
