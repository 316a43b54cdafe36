package lease

import (
	"fmt"
	"strings"
	"time"
)

// Summary is what a Manager holds, in numbers.
type Summary struct {
	// Leases counts them by Held.State, without the states that none has.
	Leases map[string]int
	Pools  int
	// Renewed is when a server last granted or renewed a lease, by the wall
	// clock. Zero: not yet since the start.
	Renewed time.Time
}

// Summary counts what Leases lists, and is cheaper.
func (m *Manager) Summary() Summary {
	now := m.clock.now()
	m.mu.Lock()
	defer m.mu.Unlock()
	s := Summary{Leases: map[string]int{}, Pools: len(m.pools), Renewed: m.renewed}
	for _, p := range m.pools {
		m.countLocked(p, now, s.Leases)
	}
	if pending := len(m.bindings.pending); pending > 0 {
		s.Leases[Releasing] = pending
	}
	return s
}

// countLocked adds the leases of a pool to those of each Held.State.
func (m *Manager) countLocked(p *pool, now time.Time, leases map[string]int) {
	for _, e := range p.byMAC {
		leases[m.stateLocked(e.lease, now)]++
	}
}

// String is the summary in one line: "leases 3 (bound 2, renewing 1), pools 1,
// last renewal 2006-01-02 15:04:05", in local time.
func (s Summary) String() string {
	all := 0
	var counts []string
	for _, state := range []string{Bound.String(), Renewing.String(), Rebinding.String(), Lost.String(), Waiting, Releasing} {
		if n := s.Leases[state]; n > 0 {
			all += n
			counts = append(counts, fmt.Sprintf("%s %d", state, n))
		}
	}
	text := fmt.Sprintf("leases %d", all)
	if all > 0 {
		text += " (" + strings.Join(counts, ", ") + ")"
	}
	text += fmt.Sprintf(", pools %d, last renewal ", s.Pools)
	if s.Renewed.IsZero() {
		return text + "none yet"
	}
	return text + s.Renewed.Local().Format(time.DateTime)
}
