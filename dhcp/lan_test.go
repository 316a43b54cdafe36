package dhcp

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// The test network: a relay address with its server, and a second server
// behind a router.
var (
	relay1  = ip("10.10.0.2")
	place1  = at67(relay1)
	server1 = netip.MustParseAddrPort("10.10.0.1:67")
	server2 = netip.MustParseAddrPort("10.11.0.1:67")
	mac1    = lease.MAC{0x02, 0x42, 0x0a, 0x0a, 0x00, 0x64}

	// home contains the relay address, away needs link selection.
	home = lease.Pool{ID: "home", Subnet: netip.MustParsePrefix("10.10.0.0/24")}
	away = lease.Pool{ID: "away", Subnet: netip.MustParsePrefix("10.20.0.0/24")}
)

// at67 is the usual port of a relay address.
func at67(relay netip.Addr) place {
	return place{relay: netip.AddrPortFrom(relay, lease.ServerPort)}
}

// lan is an in-memory network between the client under test and a script that
// plays the servers. It lives in a synctest bubble.
type lan struct {
	t     testing.TB
	began time.Time
	// serve is called for each message that the client sends, in its turn.
	serve func(sent)
	// write, where set, lets sending fail.
	write func(to netip.AddrPort) error

	// mu guards the rest.
	mu     sync.Mutex
	sent   []sent
	conns  map[place]*memConn
	locked map[place]bool
}

// sent is a message of the client's, as the servers see it.
type sent struct {
	packet
	at    time.Duration // since the lan's beginning
	to    netip.AddrPort
	relay netip.Addr // the socket's own address
	place place      // of the socket
	// station is who gets a frame on an interface's LAN, all where it is zero.
	station lease.MAC
}

func newLAN(t testing.TB) *lan {
	return &lan{t: t, began: time.Now(), conns: map[place]*memConn{}, locked: map[place]bool{}}
}

// client makes a client with one socket on this network. It is closed at the
// end, which also proves that its reader ends.
func (l *lan) client(servers ...netip.AddrPort) *Client {
	global := lease.Options{Relay: netip.IPv4Unspecified()}
	for _, s := range servers {
		global.Servers = append(global.Servers, lease.Server{Host: s.Addr().String(), Port: s.Port()})
	}
	c := NewClient(global, slog.New(slog.DiscardHandler))
	c.host = "docker1"
	c.openRelay, c.openBroadcast = l.open, l.open
	c.source = func(netip.AddrPort) (netip.Addr, error) { return relay1, nil }
	c.resolve = func(_ context.Context, host string) ([]netip.Addr, error) {
		addr, err := netip.ParseAddr(host)
		return []netip.Addr{addr}, err
	}
	l.t.Cleanup(func() {
		if err := c.Close(); err != nil {
			l.t.Errorf("close the client: %v", err)
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		for at, locked := range l.locked {
			if locked {
				l.t.Errorf("the lock on %s outlives the client", at)
			}
		}
	})
	return c
}

// broadcaster is a client that asks by broadcast on eth0.
func (l *lan) broadcaster() *Client {
	c := l.client()
	alter(c, func(o *lease.Options) { o.Interface = lanPlace.iface })
	return c
}

// alter changes the global settings of a client that has opened nothing yet.
func alter(c *Client, change func(*lease.Options)) {
	global := *c.global.Load()
	change(&global)
	c.global.Store(&global)
}

var lanPlace = place{iface: "eth0"}

func (l *lan) open(at place) (socket, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.locked[at] {
		return socket{}, errors.New("opened twice")
	}
	c := &memConn{lan: l, place: at, in: make(chan datagram, 1<<15), closed: make(chan struct{}), past: make(chan struct{})}
	l.conns[at], l.locked[at] = c, true
	s := socket{PacketConn: c, unlock: func() { l.mu.Lock(); defer l.mu.Unlock(); l.locked[at] = false }, stale: c.stale.Load}
	if at.broadcast() {
		s.hardware = func() (lease.MAC, error) { return ourMAC, nil }
	}
	return s, nil
}

func (l *lan) conn(at place) *memConn {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.conns[at]
}

// reply brings a packet to the socket that a message came from.
func (l *lan) reply(m sent, after time.Duration, from netip.AddrPort, data []byte) {
	l.replyBy(m, after, station{addr: from}, data)
}

// replyBy is reply by a station of the LAN.
func (l *lan) replyBy(m sent, after time.Duration, by station, data []byte) {
	c := l.conn(m.place)
	time.AfterFunc(after, func() { c.receive(datagram{data: data, from: by.addr, mac: by.mac}) })
}

// log returns what was sent so far, of some kinds or all.
func (l *lan) log(kinds ...byte) []sent {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(kinds) == 0 {
		return slices.Clone(l.sent)
	}
	var some []sent
	for _, m := range l.sent {
		if slices.Contains(kinds, m.kind()) {
			some = append(some, m)
		}
	}
	return some
}

// kinds lists the types of all messages, in order.
func (l *lan) kinds() []byte {
	kinds := []byte{}
	for _, m := range l.log() {
		kinds = append(kinds, m.kind())
	}
	return kinds
}

// datagram is what ReadFrom returns.
type datagram struct {
	data []byte
	from netip.AddrPort
	mac  lease.MAC // of the sender, on an interface's LAN
	err  error
}

// memConn is a UDP socket on a lan, or one that broadcasts there.
type memConn struct {
	lan    *lan
	place  place
	in     chan datagram
	once   sync.Once
	closed chan struct{}
	stale  atomic.Bool
	// past is closed while the read deadline is in the past.
	mu   sync.Mutex
	past chan struct{}
}

// receive puts a packet into the socket's buffer, or loses it when that is
// full, as a real one does.
func (c *memConn) receive(d datagram) {
	select {
	case c.in <- d:
	default:
	}
}

func (c *memConn) ReadFrom(b []byte) (int, net.Addr, error) {
	c.mu.Lock()
	past := c.past
	c.mu.Unlock()
	select {
	case <-past:
		return 0, nil, os.ErrDeadlineExceeded
	case d := <-c.in:
		var from net.Addr = net.UDPAddrFromAddrPort(d.from)
		if c.place.broadcast() {
			from = heard{station{mac: d.mac, addr: d.from}, frameOf(d.data)}
		}
		return copy(b, d.data), from, d.err
	case <-c.closed:
		return 0, nil, net.ErrClosed
	}
}

func (c *memConn) WriteTo(b []byte, to net.Addr) (int, error) {
	select {
	case <-c.closed:
		return 0, net.ErrClosed
	default:
	}
	var mac lease.MAC
	var dest netip.AddrPort
	if c.place.broadcast() {
		mac, dest = to.(station).mac, to.(station).addr
	} else {
		dest = to.(*net.UDPAddr).AddrPort()
	}
	l := c.lan
	if l.write != nil {
		if err := l.write(dest); err != nil {
			return 0, err
		}
	}
	p, err := readPacket(slices.Clone(b))
	if err != nil {
		l.t.Errorf("sent %v: % x", err, b)
		return len(b), nil
	}
	m := sent{packet: p, at: time.Since(l.began), to: dest, relay: c.place.giaddr(), place: c.place, station: mac}
	l.mu.Lock()
	l.sent = append(l.sent, m)
	l.mu.Unlock()
	if l.serve != nil {
		l.serve(m)
	}
	return len(b), nil
}

func (c *memConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

func (c *memConn) LocalAddr() net.Addr {
	return net.UDPAddrFromAddrPort(c.place.relay)
}

func (c *memConn) SetDeadline(time.Time) error      { return errors.ErrUnsupported }
func (c *memConn) SetWriteDeadline(time.Time) error { return nil } // it never waits

// SetReadDeadline knows deadlines in the past, and none.
func (c *memConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.past:
		c.past = make(chan struct{})
	default:
	}
	if !t.IsZero() {
		close(c.past)
	}
	return nil
}

// dhcpd is a well-behaved server with a lease table. Each MAC has its own
// address, made of the MAC's last two bytes.
type dhcpd struct {
	id     netip.Addr     // server identifier
	from   netip.AddrPort // source of its answers
	mac    lease.MAC      // of its interface
	delay  time.Duration  // of offers
	prefix [2]byte        // first two bytes of its addresses

	mu    sync.Mutex
	table map[netip.Addr]lease.MAC
}

func newDHCPD(at netip.AddrPort) *dhcpd {
	return &dhcpd{id: at.Addr(), from: at, mac: stationOf(at), prefix: [2]byte{10, 10}, table: map[netip.Addr]lease.MAC{}}
}

// stationOf is the MAC of a machine of the LAN.
func stationOf(at netip.AddrPort) lease.MAC {
	return lease.MAC(append([]byte{2, 1}, at.Addr().AsSlice()...))
}

// hears reports whether a message comes to the server.
func (s *dhcpd) hears(m sent) bool {
	if m.place.broadcast() {
		return m.station == lease.MAC{} || m.station == s.mac
	}
	return m.to.Addr() == s.id || m.to == s.from
}

func (s *dhcpd) addrOf(mac lease.MAC) netip.Addr {
	return netip.AddrFrom4([4]byte{s.prefix[0], s.prefix[1], mac[4], mac[5]})
}

// answer is the server's reply to a message, nil for none.
func (s *dhcpd) answer(m packet) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	addr := s.addrOf(m.mac())
	switch m.kind() {
	case discover:
		return grant(m, offer, s.id, addr)
	case request:
		switch {
		case m.has(54) && m.addr(54) != s.id:
			// Chosen was another.
			return nil
		case m.has(50) && m.addr(50) != addr, !m.has(50) && m.ciaddr != addr:
			return refuse(m, s.id)
		}
		s.table[addr] = m.mac()
		return grant(m, ack, s.id, addr)
	case release:
		if m.addr(54) == s.id && s.table[m.ciaddr] == m.mac() {
			delete(s.table, m.ciaddr)
		}
	}
	return nil
}

func (s *dhcpd) leased() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.table)
}

// attach lets servers answer on a lan what is sent to their address.
func (l *lan) attach(servers ...*dhcpd) {
	l.serve = func(m sent) {
		for _, s := range servers {
			if !s.hears(m) {
				continue
			}
			if b := s.answer(m.packet); b != nil {
				after := time.Millisecond
				if m.kind() == discover {
					after += s.delay
				}
				l.replyBy(m, after, station{mac: s.mac, addr: s.from}, b)
			}
		}
	}
}

// anyAddr accepts every address.
func anyAddr(netip.Addr) error { return nil }

// want is a request that takes what it gets.
func want(pool lease.Pool, mac lease.MAC) lease.Request {
	return lease.Request{Pool: pool, MAC: mac, Accept: anyAddr}
}

// within is the context of one request, of 30 s unless the test wants less.
func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

const usual = 30 * time.Second

// held is a lease of mac1 that was obtained now.
func held(server netip.AddrPort) lease.Lease {
	now := time.Now()
	return lease.Lease{
		Pool: "home", MAC: mac1, Name: "web", ClientID: append([]byte{1}, mac1[:]...),
		Prefix: netip.MustParsePrefix("10.10.0.100/24"), Server: server.Addr(), Via: server,
		Obtained: now, Renew: now.Add(30 * time.Minute), Rebind: now.Add(52*time.Minute + 30*time.Second), Expires: now.Add(time.Hour),
	}
}

// recordRaw keeps the bytes of the n-th message that a client's sockets send.
func recordRaw(open openFunc, n int, raw *[]byte) openFunc {
	return func(at place) (socket, error) {
		s, err := open(at)
		s.PacketConn = &rawConn{s.PacketConn, n, raw}
		return s, err
	}
}

type openFunc = func(place) (socket, error)

type rawConn struct {
	net.PacketConn
	left int
	raw  *[]byte
}

func (c *rawConn) WriteTo(b []byte, to net.Addr) (int, error) {
	if c.left == 0 {
		*c.raw = slices.Clone(b)
	}
	c.left--
	return c.PacketConn.WriteTo(b, to)
}

func containsAll(s string, parts ...string) bool {
	for _, part := range parts {
		if !strings.Contains(s, part) {
			return false
		}
	}
	return true
}
