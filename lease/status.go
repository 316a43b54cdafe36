package lease

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
	// start, Refusal is the last one's event, zero where there was none.
	Refused uint64
	Refusal Event
}

// Pools lists every pool, sorted by subnet, then ID.
func (m *Manager) Pools() []PoolStatus { return nil }

// ReceivedOption is a DHCP option that a server sent, as people read it.
type ReceivedOption struct {
	Code  uint8  `json:"code"`
	Name  string `json:"name"`  // as in RFC 2132, in lower case; "" where it isn't known
	Value string `json:"value"` // addresses with commas, numbers, text; else hexadecimal bytes with colons
}
