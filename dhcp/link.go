package dhcp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/krolaw/dhcp4"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Link carries the messages of one place: a socket, one reader, and the
// exchanges that wait for its replies. openRelay and openBroadcast make the
// two kinds of sockets; nothing else differs but where messages go.
type Link struct {
	place
	open     func(place) (socket, error)
	drops    *Drops
	recorder *recorder
	log      *slog.Logger
	heard    func(*Link, reply) // told of each reply, whoever waits for it; nil where none counts

	// reader is that of the socket, nil while there is none.
	reader atomic.Pointer[reader]
	// openable and readable ask whether these hang.
	openable, readable lease.Pulse[struct{}]

	// opening is held while the socket is opened or exchanged, and guards what
	// follows. Exchanges outlive their socket: they wait on the link.
	opening sync.Mutex
	socket  socket // zero while there is none
	closed  bool

	// mu guards waiting.
	mu      sync.Mutex
	waiting map[exchangeKey]waiter
}

// place is where a link is: at a relay address and port, or on an interface
// whose servers are asked by broadcast.
type place struct {
	relay netip.AddrPort
	iface string
}

func (p place) broadcast() bool { return p.iface != "" }

// giaddr is the relay address of its messages: none where they are broadcast.
func (p place) giaddr() netip.Addr {
	if p.broadcast() {
		return netip.IPv4Unspecified()
	}
	return p.relay.Addr()
}

// String names the place in logs and errors.
func (p place) String() string {
	switch {
	case p.broadcast():
		return "interface " + p.iface
	case p.relay.Port() == lease.ServerPort:
		return "relay address " + p.relay.Addr().String()
	}
	return "relay address " + p.relay.String()
}

// socket is what a Link reads from and writes to.
type socket struct {
	net.PacketConn
	// unlock ends the lock on the place, where it has one.
	unlock func()
	// holder is who has the port, where that is another program.
	holder string
	// stale says that the socket is no longer of use, and is to be opened
	// anew. Nil: never.
	stale func() bool
	// hardware is the Ethernet source of what is sent, or says why nothing can
	// be sent at the moment. Nil: there is none, and it isn't known before it is
	// tried.
	hardware func() (lease.MAC, error)
}

// station is where a broadcast link's messages come from and go to: the
// sender's or receiver's Ethernet address, zero for all, and what IP and UDP
// say beside it.
type station struct {
	mac  lease.MAC
	addr netip.AddrPort
	// as is the Ethernet source of what is sent.
	as lease.MAC
}

// heard is the station that a message came from, with the frame in which it
// came, until the next one is read.
type heard struct {
	station
	frame []byte
}

// Network implements net.Addr.
func (station) Network() string { return "ethernet" }

// String implements net.Addr.
func (s station) String() string { return s.addr.String() + " (" + s.mac.String() + ")" }

// exchangeKey tells whose a reply is. The xid alone is a number that another
// relay's client may have drawn too.
type exchangeKey struct {
	xid uint32
	mac lease.MAC
}

// waiter is where the replies of an exchange go.
type waiter struct {
	clientID []byte // option 61 of its requests
	owner    owner
	to       chan<- reply
}

// newLink makes the link of a place, which is opened when it is used.
func newLink(at place, open func(place) (socket, error), drops *Drops, recorder *recorder, log *slog.Logger) *Link {
	return &Link{place: at, open: open, drops: drops, recorder: recorder, log: log, waiting: map[exchangeKey]waiter{}}
}

// ready returns the link's socket, which is opened where there is none, or none
// that is of use any more.
func (l *Link) ready() (socket, error) {
	l.opening.Lock()
	defer l.opening.Unlock()
	switch {
	case l.closed:
		return socket{}, net.ErrClosed
	case l.socket.PacketConn == nil:
	case l.socket.stale == nil || !l.socket.stale():
		return l.socket, nil
	default:
		l.log.Warn("link is gone: it is opened anew", "at", l.place)
		// That closing it fails changes nothing.
		_ = l.end()
	}
	s, err := l.open(l.place)
	if err != nil {
		return socket{}, err
	}
	l.log.Info("link opened", "at", l.place)
	if s.holder != "" {
		l.log.Warn("UDP port is taken by another program: answers are read beside it, by a raw socket", "at", l.place, "port", l.relay.Port(), "taken by", s.holder)
	}
	r := newReader(s)
	l.socket = s
	l.reader.Store(r)
	go l.read(r)
	return s, nil
}

// end closes the socket, if there is one, and waits for its reader.
func (l *Link) end() error {
	s := l.socket
	if s.PacketConn == nil {
		return nil
	}
	l.socket = socket{}
	err := s.Close()
	<-l.reader.Load().done
	l.reader.Store(nil)
	if s.unlock != nil {
		s.unlock()
	}
	return err
}

// Close ends the reader and frees the place.
func (l *Link) Close() error {
	l.opening.Lock()
	defer l.opening.Unlock()
	l.closed = true
	return l.end()
}

// alive returns nil as soon as nobody is opening the link any more and its
// reader has shown that it reads, or there is none.
func (l *Link) alive(ctx context.Context) error {
	if _, err := l.openable.Ask(ctx, func() (none struct{}) {
		l.opening.Lock()
		defer l.opening.Unlock()
		return none
	}); err != nil {
		return fmt.Errorf("open %s: %w", l.place, err)
	}
	if _, err := l.readable.Ask(ctx, func() (none struct{}) {
		if r := l.reader.Load(); r != nil {
			r.poke()
		}
		return none
	}); err != nil {
		return fmt.Errorf("read what comes to %s: %w", l.place, err)
	}
	return nil
}

// usable says why nothing can be sent at the moment, as far as that is known.
func (l *Link) usable() error {
	s, err := l.ready()
	if err != nil || s.hardware == nil {
		return err
	}
	if _, err := s.hardware(); err != nil {
		return fmt.Errorf("ask on %s: %w", l.place, err)
	}
	return nil
}

// reader is what reads one socket.
type reader struct {
	socket
	done chan struct{} // closed when it has ended
	// poked is closed by the reader when it was poked, and replaced by another.
	poked atomic.Pointer[chan struct{}]
}

func newReader(s socket) *reader {
	r := &reader{socket: s, done: make(chan struct{})}
	r.poked.Store(new(make(chan struct{})))
	return r
}

// poke waits until the reader has noticed a deadline in the past, or has ended.
// No packet is lost: those that have come are read afterwards.
func (r *reader) poke() {
	poked := *r.poked.Load()
	// It fails on a closed socket, whose reader ends.
	_ = r.SetReadDeadline(time.Unix(1, 0))
	select {
	case <-poked:
	case <-r.done:
	}
}

// answer is the reader's to a poke. Whoever pokes while it is given has it too.
func (r *reader) answer() {
	_ = r.SetReadDeadline(time.Time{})
	close(*r.poked.Swap(new(make(chan struct{}))))
}

// readPause keeps a socket that fails at every read from taking a core.
const readPause = 100 * time.Millisecond

// read reads from a socket until it is closed.
func (l *Link) read(r *reader) {
	defer close(r.done)
	// The largest UDP payload: a longer message than we asked for is cut by
	// nobody but its sender.
	buf := make([]byte, 1<<16)
	for {
		n, from, err := r.ReadFrom(buf)
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case errors.Is(err, os.ErrDeadlineExceeded):
			r.answer()
			continue
		case err != nil:
			l.log.Warn("socket not read", "at", l.place, "error", err)
			time.Sleep(readPause)
			continue
		}
		if err := l.receive(buf[:n], from); err != nil {
			l.drops.count(err)
			l.log.Debug("packet dropped", "at", l.place, "from", from, "length", n, "reason", err)
		}
	}
}

// receive records a packet and delivers it, or says why not.
func (l *Link) receive(b []byte, from net.Addr) error {
	r := record{at: time.Now(), place: l.place}
	ours := false
	if len(b) >= headerLen {
		// Where the MAC would be: it may be no message at all.
		r.key = exchangeKey{binary.BigEndian.Uint32(dhcp4.Packet(b).XId()), lease.MAC(b[28:34])}
		r.owner, ours = l.whose(r.key)
	}
	if l.broadcast() && !ours {
		// The whole LAN's answers would leave no room for ours, and what is wrong
		// with them is nothing to count.
		if l.deliver(b, from) != nil {
			return errForeign
		}
		return nil
	}
	switch from := from.(type) {
	case *net.UDPAddr:
		peer := from.AddrPort()
		r.peer, r.data = netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port()), bytes.Clone(b)
	case heard:
		r.data = bytes.Clone(from.frame)
	}
	n := l.recorder.note(r)
	err := l.deliver(b, from)
	l.recorder.settle(n, err)
	return err
}

// whose is the owner of an exchange that waits, or that is over and has sent
// something lately: its late answers are its own.
func (l *Link) whose(key exchangeKey) (owner, bool) {
	l.mu.Lock()
	w, waits := l.waiting[key]
	l.mu.Unlock()
	if waits {
		return w.owner, true
	}
	return l.recorder.asker(key)
}

// deliver hands a reply to its exchange or says why not. It never blocks: an
// exchange that is slow, or a flood of copies, holds up nobody.
func (l *Link) deliver(b []byte, from net.Addr) error {
	r, err := parseReply(b)
	if err != nil {
		return err
	}
	switch from := from.(type) {
	case *net.UDPAddr:
		r.from = from.AddrPort().Addr().Unmap()
	case heard:
		r.from, r.station = from.addr.Addr(), from.mac
	}
	// A relay agent on a broadcast link's LAN leaves its own giaddr in.
	if !l.broadcast() && r.relay != l.giaddr() {
		return errRelay
	}
	if l.heard != nil {
		l.heard(l, r)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	w, waits := l.waiting[exchangeKey{r.xid, r.mac}]
	if !waits {
		return errForeign
	}
	if echo, ok := r.options[byte(dhcp4.OptionClientIdentifier)]; ok && !bytes.Equal(echo, w.clientID) {
		return errClientID
	}
	select {
	case w.to <- r:
		return nil
	default:
		return errFull
	}
}

// await directs the replies of a party's exchange to a channel, until forget.
func (l *Link) await(key exchangeKey, who party, to chan<- reply) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waiting[key] = waiter{who.clientID, who.owner(), to}
}

func (l *Link) forget(key exchangeKey) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.waiting, key)
}

// sendTime is how long a message may wait for room in the socket's buffer, as
// where an interface sends nothing: an exchange sends it again anyway.
const sendTime = time.Second

// send sends a message on a path of this link.
func (l *Link) send(m message, p path) error {
	s, err := l.ready()
	if err != nil {
		return err
	}
	m.place = l.place
	// Those who send at the same time share it. It fails on a closed socket, to
	// which nothing can be written either.
	_ = s.SetWriteDeadline(time.Now().Add(sendTime))
	r := record{
		at: time.Now(), place: l.place, sent: true, key: exchangeKey{m.xid, m.mac}, owner: m.owner(),
		data: m.marshal(), peer: p.to, dest: p.station,
	}
	var to net.Addr = net.UDPAddrFromAddrPort(p.to)
	if l.broadcast() {
		r.source, err = s.hardware()
		if m.options.EtherSource == lease.SourceContainer {
			r.source = m.mac
		}
		to = station{mac: p.station, addr: p.to, as: r.source}
	}
	n := l.recorder.note(r)
	if err == nil {
		_, err = s.WriteTo(r.data, to)
	}
	l.recorder.settle(n, err)
	switch {
	case err == nil:
		return nil
	case l.broadcast():
		return fmt.Errorf("send on %s: %w", l.place, err)
	case errors.Is(err, syscall.EPERM):
		return fmt.Errorf("send to DHCP server %s from %s: %w: a firewall on this host drops it: let UDP from %s to %s pass in OUTPUT", p.to, l.place, err, l.relay, p.to)
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EINVAL):
		// So the kernel says it when the address is gone since it was bound.
		if !slices.Contains(hostAddrs(), l.giaddr().String()) {
			return explainBind(l.relay, syscall.EADDRNOTAVAIL)
		}
		return fmt.Errorf("send to DHCP server %s from %s: %w: this host has no route to it from there: add one, or correct LISTEN_ADDR or listen_addr", p.to, l.place, err)
	}
	return fmt.Errorf("send to DHCP server %s from %s: %w", p.to, l.place, err)
}

// Drops counts the packets that were received and not used, by reason.
type Drops struct {
	mu sync.Mutex
	by map[string]uint64
}

func (d *Drops) count(reason error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.by == nil {
		d.by = map[string]uint64{}
	}
	d.by[reason.Error()]++
}

// Counts returns the counters by reason since the start.
func (d *Drops) Counts() map[string]uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	counts := make(map[string]uint64, len(d.by))
	for reason, n := range d.by {
		counts[reason] = n
	}
	return counts
}
