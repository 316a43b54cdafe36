package dhcp

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	"github.com/krolaw/dhcp4"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// ProbeAs is Probe in the name of a lease, so that the servers see a client that
// they know: it tells a server that has no free address from one that is
// silent. The zero lease stands for this host, as with Probe. DHCPDISCOVER alone
// changes nothing about a lease (RFC 2131 section 4.3.1). The transaction ID is
// that of all messages, 0 where none could be sent.
func (c *Client) ProbeAs(ctx context.Context, pool lease.Pool, l lease.Lease) (offers []lease.Offer, xid uint32, err error) {
	pool.Options = c.inForce(pool.Options)
	if l.MAC == (lease.MAC{}) {
		return c.probe(ctx, stranger(pool, c.probeMAC))
	}
	return c.probe(ctx, about(pool, l))
}

// stranger is a client without a lease.
func stranger(pool lease.Pool, mac lease.MAC) party {
	return party{pool: pool, mac: mac, clientID: lease.MACClientID(mac)}
}

// probe asks for offers, as Probe says.
func (c *Client) probe(ctx context.Context, who party) (offers []lease.Offer, xid uint32, err error) {
	paths, err := c.paths(ctx, who.pool.Options)
	if err != nil {
		c.servers.report(dhcp4.Discover, netip.Addr{}, OutcomeFailed, 0)
		return nil, 0, err
	}
	for _, p := range paths {
		// Somebody waits for the answer who can mend it now.
		if err := p.link.usable(); err != nil {
			c.servers.report(dhcp4.Discover, netip.Addr{}, OutcomeFailed, 0)
			return nil, 0, err
		}
	}
	x := c.begin(who, paths)
	defer x.end()
	_, err = x.discover(ctx, &message{kind: dhcp4.Discover}, func(o lease.Offer) error {
		if !slices.ContainsFunc(offers, func(other lease.Offer) bool { return other.Server == o.Server }) {
			offers = append(offers, o)
		}
		return errMore
	})
	if len(offers) > 0 {
		err = nil
	}
	return offers, x.key.xid, err
}

// errMore: a probe listens on for the offers of others.
var errMore = errors.New("another server may offer too")

// CheckInterface says why servers can't be asked by broadcast on an interface
// now, nil where they can.
func (c *Client) CheckInterface(name string) error {
	link, err := c.link(place{iface: name})
	if err != nil {
		return err
	}
	return link.usable()
}
