package lease

import "net/netip"

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

	Attachments []Attachment `json:"attachments"`
}

// Attachment is a running container's endpoint in a network.
type Attachment struct {
	Container string       `json:"container"` // its ID
	Name      string       `json:"name"`
	MAC       MAC          `json:"mac"`
	Prefix    netip.Prefix `json:"prefix"` // address and prefix length
}
