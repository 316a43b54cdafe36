package engine

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"github.com/moby/moby/client/pkg/versions"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// namesSince is the API version of engine 29.0, the first that tells IPAM
// drivers the containers' names. The engine's own version can be any word where
// somebody built it himself.
const namesSince = "1.52"

// Networks lists the engine's networks whose IPAM drivers we are, without
// config-only ones, and their endpoints. It is complete or an error:
// what isn't in it may be released. Only a network that is removed while it is
// asked for is left out, and IPv6.
//
// It is no snapshot, though. An endpoint that is just being made isn't in it
// yet: the engine shows it without a container ("ep-…", left out here, since a
// stale one looks the same) or not at all, until its driver has answered and
// its container is joined.
func (e *Engine) Networks(ctx context.Context) (lease.Inventory, error) {
	c, err := e.connect(ctx)
	if err != nil {
		return lease.Inventory{}, err
	}
	defer c.Close()
	version, err := c.ServerVersion(ctx, client.ServerVersionOptions{})
	if err != nil {
		return lease.Inventory{}, fmt.Errorf("ask the engine for its version: %w", err)
	}
	inventory := lease.Inventory{NamesEndpoints: versions.GreaterThanOrEqualTo(version.APIVersion, namesSince)}
	list, err := c.NetworkList(ctx, client.NetworkListOptions{})
	if err != nil {
		return lease.Inventory{}, fmt.Errorf("list the engine's networks: %w", err)
	}
	for _, item := range list.Items {
		// A swarm's manager lists a swarm network as the swarm knows it. What
		// comes by --config-from is each node's own, and isn't in that.
		if _, ours := e.driver(item.IPAM.Driver); !ours && item.IPAM.Driver != "" || item.ConfigOnly {
			continue
		}
		networks, err := e.inspect(ctx, c, item.ID)
		if err != nil {
			return lease.Inventory{}, fmt.Errorf("network %s (%s): %w", item.Name, item.ID, err)
		}
		inventory.Networks = append(inventory.Networks, networks...)
	}
	slices.SortFunc(inventory.Networks, func(a, b lease.Network) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID))
	})
	return inventory, nil
}

// driver is the one of a name, if that is ours.
func (e *Engine) driver(name string) (d lease.Driver, ours bool) {
	i := slices.IndexFunc(e.drivers, func(d lease.Driver) bool { return d.Name == name })
	if i < 0 {
		return lease.Driver{}, false
	}
	return e.drivers[i], true
}

// inspect reads one network, by its ID: a name may be several networks'. It is
// none when it is gone meanwhile, is another driver's, or has no driver yet, as a
// swarm's of which no task runs on this node.
func (e *Engine) inspect(ctx context.Context, c *client.Client, id string) ([]lease.Network, error) {
	// A list of networks has no endpoints.
	one, err := c.NetworkInspect(ctx, id, client.NetworkInspectOptions{})
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("inspect it: %w", err)
	}
	d, ours := e.driver(one.Network.IPAM.Driver)
	if !ours {
		return nil, nil
	}
	return read(one.Network, d.SharedMAC)
}

// read makes one network of each IPv4 subnet, of which macvlan allows several,
// and puts each endpoint into its own, sorted by address. Where MACs are shared,
// an endpoint has none (ipvlan), or one that its driver didn't hear of.
func read(n network.Inspect, sharedMAC bool) ([]lease.Network, error) {
	var networks []lease.Network
	var subnets []netip.Prefix
	for _, config := range n.IPAM.Config {
		if !config.Subnet.Addr().Is4() {
			continue
		}
		one := lease.Network{
			ID: n.ID, Name: n.Name, Driver: n.Driver,
			Subnet: config.Subnet.String(), Options: n.IPAM.Options, SharedMAC: sharedMAC,
			Attachments: []lease.Attachment{},
		}
		if config.IPRange.IsValid() {
			one.Range = config.IPRange.String()
		}
		if config.Gateway.IsValid() {
			one.Gateway = config.Gateway.String()
		}
		for name, addr := range config.AuxAddress {
			if one.Reserved == nil {
				one.Reserved = map[string]string{}
			}
			one.Reserved[name] = addr.String()
		}
		networks = append(networks, one)
		subnets = append(subnets, config.Subnet)
	}
	for id, endpoint := range n.Containers {
		if strings.HasPrefix(id, "ep-") || !endpoint.IPv4Address.IsValid() {
			continue
		}
		attachment := lease.Attachment{Container: id, Name: endpoint.Name, Prefix: endpoint.IPv4Address}
		if !sharedMAC {
			if len(endpoint.MacAddress) != len(attachment.MAC) {
				return nil, fmt.Errorf("the endpoint of container %s has no 48-bit MAC, but %q", endpoint.Name, endpoint.MacAddress)
			}
			attachment.MAC = lease.MAC(endpoint.MacAddress)
		}
		i := slices.IndexFunc(subnets, func(s netip.Prefix) bool { return s.Contains(endpoint.IPv4Address.Addr()) })
		if i < 0 {
			return nil, fmt.Errorf("the endpoint of container %s has address %s, in none of the network's subnets %s", endpoint.Name, endpoint.IPv4Address, subnets)
		}
		networks[i].Attachments = append(networks[i].Attachments, attachment)
	}
	for _, one := range networks {
		slices.SortFunc(one.Attachments, func(a, b lease.Attachment) int { return a.Prefix.Addr().Compare(b.Prefix.Addr()) })
	}
	return networks, nil
}
