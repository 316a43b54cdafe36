package lease

import (
	"cmp"
	"context"
	"fmt"
	"time"
)

const (
	// overdueTime is how late an attempt may begin, beyond the longest request,
	// which may hold its MAC's claim for as long.
	overdueTime = 2 * time.Minute
	// alivePace is the time between two looks at attempts that are overdue: a
	// process that was stopped, or had no processor, needs a moment for them.
	alivePace = time.Second
)

// Alive returns nil if everything here gets on with its work: the store, the
// client, and the keepers of leases. Else it returns when ctx ends, with an error
// that says what is stuck and for how long. It changes nothing.
func (m *Manager) Alive(ctx context.Context) error {
	if err := m.store.Alive(ctx); err != nil {
		return err
	}
	if err := m.client.Alive(ctx); err != nil {
		return err
	}
	var late error
	for {
		found, err := m.pulse.Ask(ctx, m.late)
		switch {
		case err != nil:
			return cmp.Or(late, fmt.Errorf("look at the leases: %w", err))
		case found == nil:
			return nil
		}
		late = found
		if !sleep(ctx, alivePace) {
			return late
		}
	}
}

// late names an attempt that should have begun long ago. One that waits for a
// keeper at work on its lease, or for a request, isn't late before these are. Time
// counts as timers do, which stand still while the machine sleeps.
func (m *Manager) late() error {
	limit := max(m.timeout, FirstWait) + overdueTime
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	for _, p := range m.pools {
		for mac, e := range p.byMAC {
			by := now.Sub(e.due)
			if e.due.IsZero() || by <= limit {
				continue
			}
			c := p.claims[mac]
			switch {
			case c == nil:
				return fmt.Errorf("keep lease %s: the attempt that was due %s ago has not begun", inWords(e.lease), by.Round(time.Second))
			case c.interrupt == nil && now.Sub(c.since) > limit:
				return fmt.Errorf("keep lease %s: a request about it has not ended for %s", inWords(e.lease), now.Sub(c.since).Round(time.Second))
			}
		}
	}
	return nil
}

func inWords(l Lease) string { return l.Addr().String() + " of " + l.holder() }
