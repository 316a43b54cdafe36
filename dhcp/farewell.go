package dhcp

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/krolaw/dhcp4"
	"golang.org/x/time/rate"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Messages without an answer can't be repeated, and a server's socket holds some
// 256 of them: 600 at once, as when an engine stops, left 390 leased on ISC
// dhcpd and dnsmasq. At this pace a server may stand still for a second, as one
// whose disk is busy does; with 2 ms between them, such a one lost some.
const (
	farewellBurst   = 64
	farewellSpacing = 5 * time.Millisecond
)

// farewellRest is how long a client is silent after a farewell. A server of
// several threads, as Kea is, may take the client's next messages first and
// then free the address that it has just leased by them (seen with Kea 2.2,
// DISCOVER less than 1 ms after the RELEASE).
const farewellRest = 100 * time.Millisecond

// farewells are the messages without an answer, RELEASE and DECLINE, of all
// clients.
type farewells struct {
	pace *rate.Limiter

	mu   sync.Mutex
	last map[string]time.Time // the recent ones, by client identifier
}

func newFarewells() *farewells {
	return &farewells{pace: rate.NewLimiter(rate.Every(farewellSpacing), farewellBurst), last: map[string]time.Time{}}
}

// left notes that a farewell of a client has left.
func (f *farewells) left(clientID []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(f.last, func(_ string, at time.Time) bool { return now.Sub(at) >= farewellRest })
	f.last[string(clientID)] = now
}

// rest waits until a client may speak again.
func (f *farewells) rest(ctx context.Context, clientID []byte) error {
	f.mu.Lock()
	wait := time.Until(f.last[string(clientID)].Add(farewellRest))
	f.mu.Unlock()
	if wait > 0 && !sleep(ctx, wait) {
		return fmt.Errorf("wait until the server has read the release before: %w", ctx.Err())
	}
	return nil
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
	x, err := c.resume(pool, l)
	if err != nil {
		return err
	}
	defer x.end()
	if err := c.farewells.pace.Wait(ctx); err != nil {
		return fmt.Errorf("wait for the releases before this one: %w", err)
	}
	m.server = l.Server
	x.send(m, x.paths...)
	return x.failed
}
