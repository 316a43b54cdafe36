package doctor

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// checkSubnets: does what the servers offer suit each network?
func checkSubnets(ctx context.Context, p *patient) {
	n := survey(ctx, p)
	if len(p.pools) == 0 {
		p.noNetworks()
		return
	}
	for i := range p.pools {
		n.checkSubnet(p, &p.pools[i])
	}
	if p.told == 0 {
		p.skip("no offer to compare the networks with", "mend what the checks above and below find")
	}
}

// noNetworks tells that there are none, if that is known.
func (p *patient) noNetworks() {
	if !p.known {
		p.skip("networks aren't known: neither the daemon nor its database tells", "mend what the checks of the daemon and the database find")
		return
	}
	p.ok("no network has been created yet")
}

// checkSubnet compares the offers for one network with it.
func (n *network) checkSubnet(p *patient, pool *lease.PoolStatus) {
	var good []string
	var bad []Finding
	for _, o := range n.offers(pool) {
		fault, advice := unsuitable(pool, o)
		if fault != "" {
			bad = append(bad, Finding{Status: Fault, Found: fmt.Sprintf("network %s: DHCP server %s %s", pool.Subnet, o.Server, fault), Advice: advice})
			continue
		}
		good = append(good, fmt.Sprintf("%s offers %s", o.Server, o.Address))
		if o.Subnet.IsValid() && o.Subnet != pool.Subnet && !pool.Subnet.IsSingleIP() {
			p.warn(fmt.Sprintf("network %s: DHCP server %s says that its subnet is %s; containers get the network's prefix length", pool.Subnet, o.Server, o.Subnet),
				"correct the server's subnet mask, or create the network anew with --subnet "+o.Subnet.String())
		}
		if o.Router.IsValid() && pool.Gateway.IsValid() && o.Router != pool.Gateway {
			p.warn(fmt.Sprintf("network %s: its gateway is %s, and DHCP server %s names the router %s", pool.Subnet, pool.Gateway, o.Server, o.Router),
				"containers use the network's: if that is wrong, create the network anew with --gateway "+o.Router.String())
		}
	}
	for _, f := range bad {
		if len(good) > 0 {
			f.Status = Warning
		}
		p.tell(f)
	}
	if len(good) > 0 && len(bad) == 0 {
		p.ok("network %s: %s", pool.Subnet, strings.Join(good, ", "))
	}
}

// offers are those that strangers had for a network, of each server one.
func (n *network) offers(pool *lease.PoolStatus) (offers []lease.Offer) {
	for _, t := range n.trials {
		if !t.stranger() || t.network == nil || t.network.ID != pool.ID {
			continue
		}
		for _, o := range t.offers {
			if !slices.ContainsFunc(offers, func(other lease.Offer) bool { return other.Server == o.Server }) {
				offers = append(offers, o)
			}
		}
	}
	return offers
}

// unsuitable says why the daemon would refuse an offer, and what to do.
func unsuitable(pool *lease.PoolStatus, o lease.Offer) (fault, advice string) {
	outside := !pool.Subnet.Contains(o.Address) && !pool.Subnet.IsSingleIP()
	taken := func(what string) (string, string) {
		return fmt.Sprintf("offers %s, which is %s", o.Address, what), fmt.Sprintf("take %s out of the server's range", o.Address)
	}
	switch {
	case outside:
		subnet := ""
		if o.Subnet.IsValid() {
			subnet = fmt.Sprintf(" (subnet %s)", o.Subnet)
		}
		advice = fmt.Sprintf("let the server serve %s", pool.Subnet)
		if o := pool.InForce; !o.ByBroadcast() {
			advice += ", and choose it by what the relay agent says: link selection (RFC 3527, or --ipam-opt link_selection=118), or a relay address of that subnet"
		}
		return fmt.Sprintf("offers %s%s, an address of another subnet: every container is refused", o.Address, subnet), advice + "; or create the network with the server's subnet"
	case pool.Range.IsValid() && !pool.Range.Contains(o.Address):
		return fmt.Sprintf("offers %s, outside the network's --ip-range %s: containers are refused", o.Address, pool.Range),
			fmt.Sprintf("make the server's range fit %s, or create the network without --ip-range: servers aren't told of it", pool.Range)
	case o.Address == pool.Gateway:
		return taken("the network's gateway")
	case slices.Contains(pool.Reserved, o.Address):
		return taken("an auxiliary address of the network")
	}
	return "", ""
}

// checkFree: has each network's server free addresses for a new container?
func checkFree(ctx context.Context, p *patient) {
	n := survey(ctx, p)
	if len(p.pools) == 0 {
		p.noNetworks()
		return
	}
	var dead, unasked, waiting []string
	for i := range p.pools {
		pool := &p.pools[i]
		ways, trials := n.waysOf(pool), n.of(pool)
		switch {
		case len(n.offers(pool)) > 0:
			p.checkRefusals(pool)
		case !slices.ContainsFunc(ways, n.answers):
			dead = append(dead, pool.Subnet.String())
		case !slices.ContainsFunc(trials, func(t *trial) bool { return n.answers(t.way) }):
			unasked = append(unasked, pool.Subnet.String())
		case slices.ContainsFunc(ways, n.slow):
			waiting = append(waiting, pool.Subnet.String())
		default:
			p.tell(n.noOffer(p, pool, trials))
		}
	}
	if dead != nil {
		p.skip("not known for "+enumerate("network", dead)+": no server has answered", "mend what the checks above have found")
	}
	if unasked != nil {
		p.skip(fmt.Sprintf("the server is slow, or this check's time was up: %s not asked for: %s", plural(len(unasked), "network"), some(unasked)), "mend what the answers above show")
	}
	if waiting != nil {
		p.skip(fmt.Sprintf("not known for %s: no offer within %s, of a server that is slow", enumerate("network", waiting), took(silentTime)), "mend what the answers above show")
	}
}

// waysOf are the ways on which a network asks.
func (n *network) waysOf(pool *lease.PoolStatus) []*way {
	at := slices.IndexFunc(n.needs, func(of *need) bool {
		return slices.ContainsFunc(of.networks, func(other lease.PoolStatus) bool { return other.ID == pool.ID })
	})
	if at < 0 {
		return nil
	}
	return n.needs[at].ways
}

// of are the trials for a network.
func (n *network) of(pool *lease.PoolStatus) (trials []*trial) {
	for _, t := range n.trials {
		if t.network != nil && t.network.ID == pool.ID {
			trials = append(trials, t)
		}
	}
	return trials
}

// noOffer tells of a network for which servers that answer others have no
// offer.
func (n *network) noOffer(p *patient, pool *lease.PoolStatus, trials []*trial) Finding {
	f := Finding{Status: Fault}
	at := slices.IndexFunc(trials, func(t *trial) bool { return len(t.offers) > 0 })
	if at >= 0 {
		t := trials[at]
		f.Found = fmt.Sprintf("network %s: %s has no address for a new client, although it answers one whose lease it knows (%s): its range is used up, or it serves known clients only", pool.Subnet, t.way, t.as.Addr())
		f.Advice = fmt.Sprintf("at the server: enlarge the range of %s, shorten the lease time, or let it serve unknown clients. This host has %s there: oam-docker-ipam leases --pool %[1]s", pool.Subnet, plural(p.held(pool), "lease"))
	} else {
		var servers []string
		for _, t := range trials {
			if n.answers(t.way) && !slices.Contains(servers, t.way.String()) {
				servers = append(servers, t.way.String())
			}
		}
		f.Found = fmt.Sprintf("network %s: %s offers nothing for it, but for other networks", pool.Subnet, strings.Join(servers, " and "))
		f.Advice = fmt.Sprintf("at the server: does it serve %s, to the relay address %s, and has it free addresses there for unknown clients?", pool.Subnet, trials[0].relay.Addr())
		if trials[0].iface != "" {
			f.Advice = fmt.Sprintf("at the server: does it serve %s on that LAN, and has it free addresses there for unknown clients?", pool.Subnet)
		}
	}
	if text := refusals(pool); text != "" {
		f.Found += "; " + text
	}
	return f
}

// held counts this host's leases of a network.
func (p *patient) held(pool *lease.PoolStatus) (n int) {
	for _, l := range p.leases {
		if l.Pool == pool.ID {
			n++
		}
	}
	return n
}

// checkRefusals tells of a network that gets addresses, but not always.
func (p *patient) checkRefusals(pool *lease.PoolStatus) {
	found := fmt.Sprintf("network %s: a new client is offered an address; this host has %s", pool.Subnet, plural(p.held(pool), "lease"))
	text := refusals(pool)
	if text == "" || time.Since(pool.Refusal.Time) > recent {
		p.ok("%s", found)
		return
	}
	p.warn(found+", but "+text, "oam-docker-ipam events --event failed tells each. A range that is nearly used up fails so now and then: compare it with the server's lease table")
}

// refusals tells how many of a network's requests failed.
func refusals(pool *lease.PoolStatus) string {
	if pool.Refused == 0 {
		return ""
	}
	who := pool.Refusal.Name
	if who == "" && pool.Refusal.MAC != (lease.MAC{}) {
		who = pool.Refusal.MAC.String()
	}
	if who != "" {
		who = " for " + who
	}
	return fmt.Sprintf("%s failed since the daemon's start, the last at %s%s: %s", plural(int(pool.Refused), "address request"), pool.Refusal.Time.Local().Format(time.DateTime), who, pool.Refusal.Detail)
}
