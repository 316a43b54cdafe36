package lease

import (
	"cmp"
	"slices"
)

// PoolStatus is a pool as operators see it.
type PoolStatus struct {
	Pool
	// InForce are its options over the global ones.
	InForce Options
	// Leases counts those of it by Held.State, without the states that none
	// has. Pending releases count for the pool that their lease was of.
	Leases  map[string]int
	Servers []ServerStatus
	// Refused counts the address requests of endpoints that failed since the
	// start, but for those that the engine gave up; Refusal is the last one's
	// event, zero where there was none.
	Refused uint64
	Refusal Event
}

// Pools lists every pool, sorted by subnet, then ID.
func (m *Manager) Pools() []PoolStatus {
	now := m.clock.now()
	m.mu.Lock()
	all := make([]PoolStatus, 0, len(m.pools))
	index := make(map[string]map[string]int, len(m.pools))
	for id, p := range m.pools {
		s := PoolStatus{Pool: p.Pool, Leases: map[string]int{}, Refused: p.refused}
		if p.refusal != nil {
			s.Refusal = *p.refusal
		}
		m.countLocked(p, now, s.Leases)
		all, index[id] = append(all, s), s.Leases
	}
	for _, r := range m.bindings.pending {
		if leases := index[r.Lease.Pool]; leases != nil {
			leases[Releasing]++
		}
	}
	m.mu.Unlock()
	for i, s := range all {
		all[i].InForce, all[i].Servers = m.options(s.Pool), m.client.Servers(s.Pool)
	}
	slices.SortFunc(all, func(a, b PoolStatus) int {
		return cmp.Or(a.Subnet.Compare(b.Subnet), cmp.Compare(a.ID, b.ID))
	})
	return all
}

// ReceivedOption is a DHCP option that a server sent, as people read it.
type ReceivedOption struct {
	Code  uint8  `json:"code"`
	Name  string `json:"name"`  // as in RFC 2132, in lower case; "" where it isn't known
	Value string `json:"value"` // addresses with commas, numbers, text; else hexadecimal bytes with colons
}
