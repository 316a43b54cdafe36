package dhcp

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/krolaw/dhcp4"
	"golang.org/x/time/rate"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Messages without an answer can't be repeated, and a server's socket holds some
// 256 of them: 600 at once, as when an engine stops, left 390 leased on ISC
// dhcpd and dnsmasq. At this pace a server may stand still for most of a second,
// as one whose disk is busy does; with 2 ms between them, such a one lost some.
const (
	farewellBurst   = 64
	farewellSpacing = 5 * time.Millisecond
)

// farewellRest is how long after a farewell its client doesn't ask for an
// address. A server of several threads, as Kea is, may take the client's next
// messages first and then free the address that it has just leased by them
// (seen with Kea 2.2, DISCOVER less than 1 ms after the RELEASE).
const farewellRest = 100 * time.Millisecond

// farewells are the messages without an answer, RELEASE and DECLINE, of all
// clients.
type farewells struct {
	pace *rate.Limiter

	mu sync.Mutex
	// last is when the last one of a client left, or will: it may still wait
	// for its turn. Those older than farewellRest are forgotten.
	last map[string]time.Time
}

func newFarewells() *farewells {
	return &farewells{pace: rate.NewLimiter(rate.Every(farewellSpacing), farewellBurst), last: map[string]time.Time{}}
}

// turn waits until a client's farewell may leave. From its call on, whoever
// speaks for that client waits for it.
func (f *farewells) turn(ctx context.Context, clientID []byte) error {
	now := time.Now()
	turn := f.pace.ReserveN(now, 1)
	wait := turn.DelayFrom(now)
	f.note(clientID, now.Add(wait))
	if wait > 0 && !sleep(ctx, wait) {
		turn.Cancel()
		f.forget(clientID, now.Add(wait))
		return fmt.Errorf("wait for the releases before this one: %w", ctx.Err())
	}
	return nil
}

// note remembers when a client's farewell leaves, unless a later one waits.
func (f *farewells) note(clientID []byte, at time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.last[string(clientID)].After(at) {
		return
	}
	f.last[string(clientID)] = at
	time.AfterFunc(time.Until(at)+farewellRest, func() { f.forget(clientID, at) })
}

// forget takes back one note, unless another has followed.
func (f *farewells) forget(clientID []byte, at time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.last[string(clientID)].Equal(at) {
		delete(f.last, string(clientID))
	}
}

// rest waits until a client may ask for an address.
func (f *farewells) rest(ctx context.Context, clientID []byte) error {
	for {
		f.mu.Lock()
		wait := time.Until(f.last[string(clientID)].Add(farewellRest))
		f.mu.Unlock()
		if wait <= 0 {
			return nil
		}
		if !sleep(ctx, wait) {
			return fmt.Errorf("wait until the server has read the release before: %w", ctx.Err())
		}
	}
}

// Release implements lease.Client. Once only: a copy that comes late could
// release what the same client was granted in between.
func (c *Client) Release(ctx context.Context, pool lease.Pool, l lease.Lease) error {
	return c.farewell(ctx, pool, l, message{kind: dhcp4.Release, ciaddr: l.Addr()})
}

// Decline implements lease.Client.
func (c *Client) Decline(ctx context.Context, pool lease.Pool, l lease.Lease) error {
	return c.farewell(ctx, pool, l, message{kind: dhcp4.Decline, requested: l.Addr()})
}

// farewell sends a message that has no answer, with the server identifier,
// without which dnsmasq ignores it.
func (c *Client) farewell(ctx context.Context, pool lease.Pool, l lease.Lease, m message) error {
	if err := c.farewells.turn(ctx, l.ClientID); err != nil {
		return err
	}
	x, err := c.resume(m.kind, pool, l)
	if err != nil {
		return err
	}
	defer x.end()
	m.server = l.Server
	x.send(m, x.paths...)
	return x.failed
}

// giveBack releases what may have been leased in this exchange, also when that
// has ended because its caller is gone.
func (x *exchange) giveBack(ctx context.Context, server, addr netip.Addr, to path) {
	if x.farewells.turn(context.WithoutCancel(ctx), x.clientID) == nil {
		x.send(message{kind: dhcp4.Release, ciaddr: addr, server: server}, to)
	}
}
