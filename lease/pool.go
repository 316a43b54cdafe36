package lease

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Pool is one IPv4 subnet of one Docker network, as the engine asked for it.
// It holds only what its user gave and what was learned from the servers, so
// that the daemon's global settings apply to old networks too.
type Pool struct {
	// ID is the engine's handle. It is unique for each request of a pool and
	// describes the pool in readable text (see ParsePoolID).
	ID string `json:"id"`
	// Subnet is the network's address and prefix length, /1 to /30; zero until
	// AddPool has learned it, where its user gave none.
	Subnet netip.Prefix `json:"subnet"`
	// Range is --ip-range, zero without it. Servers don't know of it: an
	// address outside is refused.
	Range netip.Prefix `json:"range,omitzero"`
	// Gateway is the router of the containers.
	Gateway netip.Addr `json:"gateway,omitzero"`
	// Reserved are the auxiliary addresses (--aux-address).
	Reserved []netip.Addr `json:"reserved,omitempty"`
	// Options are the user's --ipam-opt.
	Options Options `json:"options"`
	// AuxUntil ends the time in which an address request without a MAC can
	// be an auxiliary one; zero from the pool's first endpoint on.
	AuxUntil time.Time `json:"aux_until,omitzero"`
	// FirstWait is how long a request may take at least while the network has
	// had no lease yet: its VLAN's port may be blocked at first. Zero from the
	// first lease on, and for all other networks.
	FirstWait time.Duration `json:"first_wait,omitzero"`
	// SharedMAC: its endpoints share their parent's MAC, as on ipvlan, and the
	// engine tells none. Theirs are made here and go to the servers only, so
	// that these must be asked as a relay agent.
	SharedMAC bool `json:"shared_mac,omitempty"`
	// Adopted: made by a reconcile for endpoints whose PoolID isn't known.
	Adopted bool `json:"adopted,omitempty"`
}

// auxWindow is how long after its creation a network can ask for auxiliary
// addresses: the engine does so at once, so this is generous.
const auxWindow = 60 * time.Second

// NewPool reads what RequestPool carries: --subnet (or "", for AddPool to learn
// it), --ip-range (or "") and --ipam-opt. The pool has neither ID nor gateway
// yet.
func NewPool(subnet, ipRange string, texts map[string]string) (Pool, error) {
	var pool Pool
	var err error
	if subnet != "" {
		if pool.Subnet, err = parseSubnet(subnet); err != nil {
			return Pool{}, err
		}
	} else if ipRange != "" {
		return Pool{}, fmt.Errorf("--ip-range %s without --subnet: a subnet that is yet to be learned need not contain it; give both", ipRange)
	}
	if ipRange != "" {
		within, err := netip.ParsePrefix(ipRange)
		if err != nil {
			return Pool{}, fmt.Errorf("parse --ip-range %q: want an address with a prefix length, such as 192.0.2.128/25", ipRange)
		}
		if within.Bits() < pool.Subnet.Bits() || !pool.Subnet.Contains(within.Addr()) {
			return Pool{}, fmt.Errorf("--ip-range %s is not within the subnet %s", ipRange, pool.Subnet)
		}
		pool.Range = within.Masked()
	}
	if pool.Options, err = ParseOptions(texts); err != nil {
		return Pool{}, err
	}
	if err := pool.Options.suits(pool.Options); err != nil {
		return Pool{}, err
	}
	return pool, nil
}

func parseSubnet(s string) (netip.Prefix, error) {
	prefix, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("parse subnet %q: want an address with a prefix length, such as 192.0.2.0/24", s)
	}
	// Engine 20.10 passes host bits on.
	return prefix.Masked(), checkSubnet(prefix)
}

// checkSubnet refuses what no network of ours can have.
func checkSubnet(prefix netip.Prefix) error {
	switch first := prefix.Masked().Addr(); {
	case !first.Is4():
		return fmt.Errorf("IPv6 subnet %s: this driver serves IPv4 only; create the network without --ipv6", prefix)
	case prefix.Bits() == 0 || prefix.Bits() > 30:
		return fmt.Errorf("subnet %s: a prefix length from /1 to /30 is needed, since a network has a gateway and containers", prefix)
	case !Unicast(first) && !first.IsUnspecified():
		return fmt.Errorf("subnet %s: not a unicast range", prefix)
	}
	return nil
}

// newID makes an ID that is unique and from which the pool can be told:
//
//	192.0.2.0/24?dhcp_server=198.51.100.1&gateway=192.0.2.1&id=3KDPZ5…
func (p Pool) newID() string { return p.describe(url.Values{"id": {rand.Text()}}) }

// adoptedID is the ID of the adopted pool of all pools like this one.
func (p Pool) adoptedID() string {
	p.Gateway = netip.Addr{}
	return p.describe(url.Values{"adopted": {"yes"}})
}

// standsFor reports whether this is the adopted pool that holds the leases of a
// pool of which only the ID is known. The old daemon's tells no more than the
// network's address.
func (p Pool) standsFor(id string) bool {
	if !p.Adopted {
		return false
	}
	other, err := ParsePoolID(id)
	return err == nil && (other.adoptedID() == p.ID || other.Subnet.IsSingleIP() && other.Subnet.Addr() == p.Subnet.Addr())
}

// describe writes a pool as a text, with more values.
func (p Pool) describe(values url.Values) string {
	for name, text := range p.Options.Texts() {
		values.Set(name, text)
	}
	if p.Range.IsValid() {
		values.Set("range", p.Range.String())
	}
	if p.Gateway.IsValid() {
		values.Set("gateway", p.Gateway.String())
	}
	if p.SharedMAC {
		values.Set("shared_mac", "yes")
	}
	// A query may hold these three bare (RFC 3986 section 3.4), and people
	// read IDs in logs.
	readable := strings.NewReplacer("%2F", "/", "%3A", ":", "%2C", ",")
	return p.Subnet.String() + "?" + readable.Replace(values.Encode())
}

// ParsePoolID makes a pool from an ID that newID made, for networks of an
// engine whose plugin lost its database. A bare network address, which the old
// daemon of this name used as ID, gives a pool whose prefix length is not
// known: a /32, to be learned from a server.
func ParsePoolID(id string) (Pool, error) {
	unknown := fmt.Errorf("unknown pool %q: remove the network and create it anew", id)
	if addr, err := netip.ParseAddr(id); err == nil && Unicast(addr) {
		return Pool{ID: id, Subnet: netip.PrefixFrom(addr, addr.BitLen())}, nil
	}
	subnet, query, _ := strings.Cut(id, "?")
	values, err := url.ParseQuery(query)
	if err != nil || subnet == "" || values.Get("id") == "" {
		return Pool{}, unknown
	}
	texts := map[string]string{}
	for name := range values {
		texts[name] = values.Get(name)
	}
	ipRange, gateway := texts["range"], texts["gateway"]
	delete(texts, "id")
	delete(texts, "range")
	delete(texts, "gateway")
	delete(texts, "shared_mac")
	pool, err := NewPool(subnet, ipRange, texts)
	if err != nil {
		return Pool{}, fmt.Errorf("%w (%w)", unknown, err)
	}
	if gateway != "" {
		if pool.Gateway, err = netip.ParseAddr(gateway); err == nil {
			err = pool.inSubnet(pool.Gateway)
		}
		if err != nil {
			return Pool{}, fmt.Errorf("%w (gateway: %w)", unknown, err)
		}
	}
	pool.ID, pool.SharedMAC = id, values.Has("shared_mac")
	return pool, nil
}

// firstUsable is the subnet's first host address.
func (p Pool) firstUsable() netip.Addr { return p.Subnet.Addr().Next() }

// broadcast is the subnet's last address.
func (p Pool) broadcast() netip.Addr {
	network := p.Subnet.Addr().As4()
	host := ^uint32(0) >> p.Subnet.Bits()
	var last [4]byte
	binary.BigEndian.PutUint32(last[:], binary.BigEndian.Uint32(network[:])|host)
	return netip.AddrFrom4(last)
}

// inSubnet refuses an address that no host of the subnet can have.
func (p Pool) inSubnet(addr netip.Addr) error {
	switch {
	case !p.Subnet.IsValid():
		return fmt.Errorf("address %s: no subnet of the network is known", addr)
	case !p.Subnet.Contains(addr):
		return fmt.Errorf("address %s is outside the network's subnet %s", addr, p.Subnet)
	case addr == p.Subnet.Addr() || addr == p.broadcast():
		return fmt.Errorf("address %s is the network or broadcast address of the subnet %s", addr, p.Subnet)
	}
	return nil
}

// allows refuses an address that an endpoint of this pool must not have. An
// address that the user asked for by name may lie outside --ip-range.
func (p Pool) allows(addr netip.Addr, asked bool) error {
	if err := p.inSubnet(addr); err != nil {
		return err
	}
	var err error
	switch {
	case !asked && p.Range.IsValid() && !p.Range.Contains(addr):
		return fmt.Errorf("address %s is outside the network's --ip-range %s: make the DHCP server's range fit it", addr, p.Range)
	case addr == p.Gateway:
		err = fmt.Errorf("address %s is the gateway of the network (subnet %s)", addr, p.Subnet)
	case slices.Contains(p.Reserved, addr):
		err = fmt.Errorf("address %s is an auxiliary address of the network (subnet %s)", addr, p.Subnet)
	}
	if err != nil && !asked {
		err = fmt.Errorf("%w: take it out of the DHCP server's range", err)
	}
	return err
}
