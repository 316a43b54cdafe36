package dhcp

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/krolaw/dhcp4"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Link carries the messages of one relay address: a socket, one reader, and
// the exchanges that wait for its replies.
type Link struct {
	relay netip.Addr // giaddr
	conn  net.PacketConn
	lock  func() // ends the lock on the relay address
	drops *Drops
	log   *slog.Logger
	done  chan struct{} // closed when the reader has ended

	// mu guards waiting.
	mu      sync.Mutex
	waiting map[exchangeKey]waiter
}

// exchangeKey tells whose a reply is. The xid alone is a number that another
// relay's client may have drawn too.
type exchangeKey struct {
	xid uint32
	mac lease.MAC
}

// waiter is where the replies of an exchange go.
type waiter struct {
	clientID []byte // option 61 of its requests
	to       chan<- reply
}

// startLink reads from a socket until Close.
func startLink(relay netip.Addr, conn net.PacketConn, lock func(), drops *Drops, log *slog.Logger) *Link {
	l := &Link{
		relay: relay, conn: conn, lock: lock, drops: drops, log: log,
		done: make(chan struct{}), waiting: map[exchangeKey]waiter{},
	}
	go l.read()
	return l
}

// Close ends the reader and frees the relay address.
func (l *Link) Close() error {
	err := l.conn.Close()
	<-l.done
	l.lock()
	return err
}

// readPause keeps a socket that fails at every read from taking a core.
const readPause = 100 * time.Millisecond

func (l *Link) read() {
	defer close(l.done)
	// The largest UDP payload: a longer message than we asked for is cut by
	// nobody but its sender.
	buf := make([]byte, 1<<16)
	for {
		n, from, err := l.conn.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			l.log.Warn("relay socket not read", "relay", l.relay, "error", err)
			time.Sleep(readPause)
			continue
		}
		if err := l.deliver(buf[:n], from); err != nil {
			l.drops.count(err)
			l.log.Debug("packet dropped", "relay", l.relay, "from", from, "length", n, "reason", err)
		}
	}
}

// deliver hands a reply to its exchange or says why not. It never blocks: an
// exchange that is slow, or a flood of copies, holds up nobody.
func (l *Link) deliver(b []byte, from net.Addr) error {
	r, err := parseReply(b)
	if err != nil {
		return err
	}
	if udp, ok := from.(*net.UDPAddr); ok {
		r.from = udp.AddrPort().Addr().Unmap()
	}
	if r.relay != l.relay {
		return errRelay
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

// await directs the replies of an exchange to a channel, until forget.
func (l *Link) await(key exchangeKey, clientID []byte, to chan<- reply) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waiting[key] = waiter{clientID, to}
}

func (l *Link) forget(key exchangeKey) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.waiting, key)
}

func (l *Link) send(b []byte, to netip.AddrPort) error {
	_, err := l.conn.WriteTo(b, net.UDPAddrFromAddrPort(to))
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EINVAL):
		// So the kernel says it when the address is gone since it was bound.
		if !slices.Contains(hostAddrs(), l.relay.String()) {
			return explainBind(l.relay, syscall.EADDRNOTAVAIL)
		}
	}
	return fmt.Errorf("send to DHCP server %s from relay address %s: %w", to, l.relay, err)
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
