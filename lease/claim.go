package lease

import (
	"context"
	"fmt"
	"time"
)

// claim is the exclusive right to act on one MAC of a pool, or on one identity.
type claim struct {
	// interrupt ends the holder's action early; nil where it must finish.
	interrupt context.CancelFunc
	since     time.Time
	// until is when a keeper's attempt ends, but for what is then left to store.
	until time.Time
	done  chan struct{}
}

// interruptLocked ends a keeper's attempt now.
func (c *claim) interruptLocked() {
	if now := time.Now(); now.Before(c.until) {
		c.until = now
	}
	c.interrupt()
}

// claim waits until nobody else acts on the MAC and returns the function that
// ends the claim. A keeper, which passes interrupt, waits its turn; a request,
// which passes nil, interrupts a keeper.
func (m *Manager) claim(ctx context.Context, p *pool, mac MAC, interrupt context.CancelFunc) (func(), error) {
	done, err := takeClaim(ctx, m, p.claims, mac, interrupt)
	if err != nil {
		return nil, fmt.Errorf("wait for another request about %s: %w", mac, err)
	}
	return done, nil
}

// claimIdentity waits until nobody else acts on an identity and returns the
// function that ends the claim. It comes after the claim of a MAC.
func (m *Manager) claimIdentity(ctx context.Context, key BindingKey) (func(), error) {
	done, err := takeClaim(ctx, m, m.identities, key, nil)
	if err != nil {
		return nil, fmt.Errorf("wait for another request of the same client identifier: %w", err)
	}
	return done, nil
}

// takeClaim takes the claim of a key, as soon as nobody has it.
func takeClaim[K comparable](ctx context.Context, m *Manager, claims map[K]*claim, key K, interrupt context.CancelFunc) (func(), error) {
	mine := &claim{interrupt: interrupt, done: make(chan struct{})}
	for {
		m.mu.Lock()
		held := claims[key]
		if held == nil {
			mine.since = time.Now()
			mine.until = mine.since
			claims[key] = mine
		} else if interrupt == nil && held.interrupt != nil {
			held.interruptLocked()
		}
		m.mu.Unlock()
		if held == nil {
			return func() {
				m.mu.Lock()
				delete(claims, key)
				m.mu.Unlock()
				close(mine.done)
			}, nil
		}
		select {
		case <-held.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
