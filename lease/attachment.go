package lease

import "net/netip"

// Driver is an IPAM driver as an engine knows it.
type Driver struct {
	Name string
	// SharedMAC: the engine tells it no endpoint's MAC (see Pool.SharedMAC).
	SharedMAC bool
}

// Drivers are those that one daemon is: the one of its name, and NAME-ipvlan,
// since Docker's ipvlan refuses endpoints for which a MAC was chosen.
func Drivers(name string) []Driver {
	return []Driver{{Name: name}, {Name: name + "-ipvlan", SharedMAC: true}}
}

// Inventory is what a container engine says of the networks whose IPAM driver
// we are.
type Inventory struct {
	// NamesEndpoints: the engine tells IPAM drivers the containers' names (29
	// and later).
	NamesEndpoints bool      `json:"names_endpoints"`
	Networks       []Network `json:"networks"`
}

// Network is one IPv4 subnet of a network, as its user created it. Engines
// don't show its PoolID.
type Network struct {
	ID       string            `json:"id"`
	Name     string            `json:"name"`
	Driver   string            `json:"driver"`
	Subnet   string            `json:"subnet"`
	Range    string            `json:"range,omitempty"`
	Gateway  string            `json:"gateway,omitempty"`
	Reserved map[string]string `json:"reserved,omitempty"` // --aux-address, by name
	Options  map[string]string `json:"options,omitempty"`  // --ipam-opt
	// SharedMAC is its IPAM driver's.
	SharedMAC bool `json:"shared_mac,omitempty"`

	Attachments []Attachment `json:"attachments"`
}

// Attachment is a running container's endpoint in a network.
type Attachment struct {
	Container string       `json:"container"` // its ID
	Name      string       `json:"name"`
	MAC       MAC          `json:"mac,omitzero"` // zero where MACs are shared
	Prefix    netip.Prefix `json:"prefix"`       // address and prefix length
}

// pool is the network as the pool that its engine asked for, without ID.
func (n Network) pool() (Pool, error) {
	p, err := NewPool(n.Subnet, n.Range, n.Options)
	p.SharedMAC = n.SharedMAC
	return p, err
}

// MayHave reports whether a lease can be of this network: its PoolID tells the
// same subnet, range and options.
func (n Network) MayHave(l Lease) bool {
	p, err := n.pool()
	p.ID, p.Adopted = p.adoptedID(), true
	return err == nil && (p.ID == l.Pool || p.standsFor(l.Pool))
}
