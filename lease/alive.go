package lease

import (
	"cmp"
	"context"
	"fmt"
	"time"
)

const (
	// overdueTime is how long whoever acts on a MAC may go on when the time to
	// ask servers is over: for two commits, each of which waits for another's. Of
	// one that takes longer than a minute the store tells.
	overdueTime = 4 * time.Minute
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

// late names an attempt that should have begun or ended long ago. One that waits
// for a keeper at work on its lease, or for a request, isn't late before these
// are. Time counts as timers do, which stand still while the machine sleeps.
func (m *Manager) late() error {
	limit := max(m.timeout, FirstWait) + overdueTime
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	for _, p := range m.pools {
		for mac, e := range p.byMAC {
			c := p.claims[mac]
			switch {
			case c != nil && c.interrupt != nil:
				if over := now.Sub(c.until); over > overdueTime {
					return fmt.Errorf("keep lease %s: the attempt that was to end %s ago goes on", inWords(e.lease), over.Round(time.Second))
				}
			case e.due.IsZero() || now.Sub(e.due) <= limit:
			case c == nil:
				return fmt.Errorf("keep lease %s: the attempt that was due %s ago has not begun", inWords(e.lease), now.Sub(e.due).Round(time.Second))
			case now.Sub(c.since) > limit:
				return fmt.Errorf("keep lease %s: a request about it has not ended for %s", inWords(e.lease), now.Sub(c.since).Round(time.Second))
			}
		}
	}
	return nil
}

func inWords(l Lease) string { return l.Addr().String() + " of " + l.holder() }
