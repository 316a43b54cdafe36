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

// Networks lists the engine's networks whose IPAM driver is the given one,
// without config-only ones, and their endpoints. It is complete or an error:
// what isn't in it may be released. Only a network that is removed while it is
// asked for is left out, and IPv6.
//
// It is no snapshot, though. An endpoint that is just being made isn't in it
// yet: the engine shows it without a container ("ep-…", left out here, since a
// stale one looks the same) or not at all, until its driver has answered and
// its container is joined.
func (e *Engine) Networks(ctx context.Context, driver string) (lease.Inventory, error) {
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
		if item.IPAM.Driver != driver || item.ConfigOnly {
			continue
		}
		// By ID: a name may be several networks'. The list has no endpoints.
		one, err := c.NetworkInspect(ctx, item.ID, client.NetworkInspectOptions{})
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return lease.Inventory{}, fmt.Errorf("inspect network %s (%s): %w", item.Name, item.ID, err)
		}
		networks, err := read(one.Network)
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

// read makes one network of each IPv4 subnet, of which macvlan allows several,
// and puts each endpoint into its own, sorted by address.
func read(n network.Inspect) ([]lease.Network, error) {
	var networks []lease.Network
	var subnets []netip.Prefix
	for _, config := range n.IPAM.Config {
		if !config.Subnet.Addr().Is4() {
			continue
		}
		one := lease.Network{
			ID: n.ID, Name: n.Name, Driver: n.Driver,
			Subnet: config.Subnet.String(), Options: n.IPAM.Options,
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
		if len(endpoint.MacAddress) != len(lease.MAC{}) {
			return nil, fmt.Errorf("the endpoint of container %s has no 48-bit MAC, but %q", endpoint.Name, endpoint.MacAddress)
		}
		i := slices.IndexFunc(subnets, func(s netip.Prefix) bool { return s.Contains(endpoint.IPv4Address.Addr()) })
		if i < 0 {
			return nil, fmt.Errorf("the endpoint of container %s has address %s, in none of the network's subnets %s", endpoint.Name, endpoint.IPv4Address, subnets)
		}
		networks[i].Attachments = append(networks[i].Attachments, lease.Attachment{
			Container: id, Name: endpoint.Name,
			MAC: lease.MAC(endpoint.MacAddress), Prefix: endpoint.IPv4Address,
		})
	}
	for _, one := range networks {
		slices.SortFunc(one.Attachments, func(a, b lease.Attachment) int { return a.Prefix.Addr().Compare(b.Prefix.Addr()) })
	}
	return networks, nil
}
