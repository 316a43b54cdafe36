package lease

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// HostIdentity is what makes the names of this host's containers unique among
// all hosts, and what it was made of.
type HostIdentity struct {
	ID      string `json:"id"`      // 12 hexadecimal digits
	Machine string `json:"machine"` // hash of the machine id, 12 hexadecimal digits
	MAC     MAC    `json:"mac"`     // of the interface of the relay address
}

// newHostIdentity makes an identity. Cloned machines share all but the MAC. The
// machine id itself is confidential (machine-id(5)), hence the hashes.
func newHostIdentity(machineID string, mac MAC) HostIdentity {
	hash := func(text string) string {
		h := hmac.New(sha256.New, []byte(machineID))
		h.Write([]byte("oam-docker-ipam " + text))
		return hex.EncodeToString(h.Sum(nil)[:6])
	}
	return HostIdentity{ID: hash("host " + mac.String()), Machine: hash("machine"), MAC: mac}
}

// self is this host's identity, found at its first use: the stored one while
// the machine has its id and the interface, however its routing changes. When
// either has gone, this is another machine, which may have got a copy of the
// first one's database, and the identity is made anew. An error means that it
// can't be told yet.
func (m *Manager) self(ctx context.Context, p Pool) (string, error) {
	if known, sure := m.known(); sure {
		return known.ID, nil
	}
	select {
	case m.identifying <- struct{}{}:
		defer func() { <-m.identifying }()
	case <-ctx.Done():
		return "", fmt.Errorf("wait for who finds out which host this is: %w", context.Cause(ctx))
	}
	known, sure := m.known()
	if sure {
		return known.ID, nil
	}
	machineID, err := m.machine.MachineID()
	if err != nil && known.ID != "" {
		// Renewals must not end because a file is gone.
		m.log.Warn("machine id not read: this counts as the same machine", "error", err)
		m.setIdentity(known)
		return known.ID, nil
	}
	if err != nil {
		return "", err
	}
	macs, err := m.machine.HardwareAddrs()
	if err != nil {
		return "", fmt.Errorf("list the network interfaces: %w", err)
	}
	if newHostIdentity(machineID, known.MAC) == known && slices.Contains(macs, known.MAC) {
		m.setIdentity(known)
		return known.ID, nil
	}
	// The interface may only not be there yet; then the relay address isn't
	// either, and this fails.
	mac, err := m.client.RelayMAC(ctx, p)
	if err != nil {
		return "", err
	}
	fresh := newHostIdentity(machineID, mac)
	if err := m.store.Commit(Change{PutHost: fresh}); err != nil {
		return "", fmt.Errorf("store the host's identity: %w", err)
	}
	if known.ID != "" {
		m.log.Warn("this is another host than the one that took the stored leases: they are no longer renewed; run oam-docker-ipam reconcile to keep those of running containers and forget the rest",
			"identity", fresh.ID, "former", known.ID, "machine id changed", fresh.Machine != known.Machine, "MAC address", mac, "former MAC address", known.MAC)
	}
	m.setIdentity(fresh)
	return fresh.ID, nil
}

// known is the identity so far, and whether it is this host's.
func (m *Manager) known() (identity HostIdentity, sure bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.identity, m.identitySure
}

func (m *Manager) setIdentity(h HostIdentity) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.identity, m.identitySure = h, true
}

// waitsLocked reports whether a lease was taken by another host than this is.
func (m *Manager) waitsLocked(l Lease) bool {
	return m.identitySure && l.Host != "" && l.Host != m.identity.ID
}

// foreign finds out whether a lease was taken by another host than this is. One
// of which that can't be told counts as this host's.
func (m *Manager) foreign(ctx context.Context, p Pool, l Lease) bool {
	if l.Host == "" {
		return false
	}
	if _, err := m.self(ctx, p); err != nil {
		m.log.Warn("host identity not known: the lease counts as this host's", "address", l.Addr(), "mac", l.MAC, "error", err)
		return false
	}
	return m.waits(l)
}

// MACClientID is option 61 in the form that servers and their administrators
// know: hardware type Ethernet and the address (RFC 2132 section 9.14).
func MACClientID(mac MAC) []byte { return append([]byte{1}, mac[:]...) }

// maxClientID is how long a name's option 61 may be: Kea 2.2 drops a message with a
// longer one without a word. ISC dhcpd and dnsmasq take all 255 bytes of an option.
const maxClientID = 128

// nameClientID is option 61 made of a name: type 0, no hardware address (RFC
// 2132 section 9.14), and readable text. A network that is created anew has the
// same subnet, and so the same identities.
func nameClientID(host string, subnet netip.Prefix, name string) []byte {
	return Shorten(append([]byte{0}, host+"/"+subnet.String()+"/"+name...), maxClientID)
}

// Shorten cuts an identity that is longer than size bytes, 17 or more. The last
// 17 are then "#" and a hash of all of it, by which those that begin alike differ.
func Shorten(id []byte, size int) []byte {
	if len(id) <= size {
		return id
	}
	sum := sha256.Sum256(id)
	end := "#" + hex.EncodeToString(sum[:8])
	return append(id[:size-len(end):size-len(end)], end...)
}

// checkMode refuses options in force by which servers would answer to a MAC that
// nobody has: to a client without giaddr they send a renewal's answer itself (RFC
// 2131 section 4.1).
func (p Pool) checkMode(o Options) error {
	if p.SharedMAC && o.ByBroadcast() {
		return fmt.Errorf("dhcp_interface=%s: ipvlan's containers share their parent's MAC address, so answers to servers' clients on that LAN would reach none of them: ask the servers as a relay agent, by dhcp_server instead of dhcp_interface", o.Interface)
	}
	return nil
}

// madeMAC is the chaddr of an endpoint that has no MAC of its own: locally
// administered and unicast, made of the identity that its name gives, with
// which it comes again. Without a name, or a host to which it belongs, it is
// random, and known by its stored lease only.
func (m *Manager) madeMAC(ctx context.Context, p Pool, name string) MAC {
	if name != "" {
		if host, err := m.self(ctx, p); err == nil {
			sum := sha256.Sum256(nameClientID(host, p.Subnet, name))
			return MAC(sum[:len(MAC{})]).local()
		}
	}
	return randomMAC()
}

func randomMAC() (mac MAC) {
	_, _ = rand.Read(mac[:]) // it never fails
	return mac.local()
}

// local makes a MAC a locally administered unicast one (IEEE 802 section 8.2).
func (m MAC) local() MAC {
	m[0] = m[0]&^0x01 | 0x02
	return m
}

// byName reports whether the lease's identity is its container's name.
func (l Lease) byName() bool { return len(l.ClientID) > 0 && l.ClientID[0] == 0 }

// clientID makes the client identifier of an endpoint that has no lease.
func (m *Manager) clientID(ctx context.Context, p Pool, ep Endpoint) ([]byte, error) {
	// Leases by MAC need the identity too: a copy of this database must not
	// renew them elsewhere.
	host, err := m.self(ctx, p)
	switch form := m.options(p).ClientID; {
	case form == ClientIDMAC, form == ClientIDAuto && ep.Name == "":
	case ep.Name == "":
		return nil, errors.New("client_id=name needs the container's name, which engines tell from 29.0 on: use client_id=auto, with --mac-address for an address that stays")
	case err == nil:
		return nameClientID(host, p.Subnet, ep.Name), nil
	case form == ClientIDName:
		return nil, fmt.Errorf("make the client identifier of %s: %w (or use client_id=mac)", ep.Name, err)
	default:
		m.log.Warn("client identifier made of the MAC address: the address won't follow the container's name", "name", ep.Name, "mac", ep.MAC, "error", err)
	}
	return MACClientID(ep.MAC), nil
}

// takeIdentity claims the identity of an endpoint that has no lease. A name
// that is live, under another MAC or in another network of the subnet, is left
// to its holder: two endpoints with one identity would get one address. The
// holder may even be another container, which was renamed since. The second one
// uses its MAC.
func (m *Manager) takeIdentity(ctx context.Context, p Pool, ep Endpoint, clientID []byte) ([]byte, func(), error) {
	key := BindingKey{p.Subnet.String(), string(clientID)}
	done, err := m.claimIdentity(ctx, key)
	if err != nil {
		return nil, nil, err
	}
	m.mu.Lock()
	var holder Lease
	if e := m.byIdentity[key]; e != nil && e.lease.byName() {
		holder = e.lease
	}
	m.mu.Unlock()
	if holder.ClientID == nil {
		return clientID, done, nil
	}
	done()
	m.log.Warn("the container's name has a lease already: this one is taken by MAC address", "name", ep.Name, "mac", ep.MAC, "held", holder.Addr(), "pool", holder.Pool)
	return m.takeIdentity(ctx, p, ep, MACClientID(ep.MAC))
}
