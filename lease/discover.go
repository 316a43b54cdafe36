package lease

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"
)

const (
	// ProbeTime bounds a probe. It is above dnsmasq's 3 s and udhcpd's 2 s of
	// pinging before they offer.
	ProbeTime = 8 * time.Second
	// FirstWait is the patience of a network whose VLAN comes up with it, until
	// its first lease. A port of IEEE 802.1D listens and learns for 15 s each
	// before it forwards, after up to 20 s of a topology that ages.
	FirstWait = 60 * time.Second
)

// exampleFlags stand in errors where nothing is known.
const exampleFlags = "--subnet 192.0.2.0/24 --gateway 192.0.2.1"

// discovery is what is settled about a pool when it is created.
type discovery struct {
	pool     Pool   // with subnet and gateway
	from     string // where the gateway is from, for the log
	warnings []warning
}

// warning is a line for the log.
type warning struct {
	text string
	args []any
}

func (d *discovery) warn(text string, args ...any) {
	d.warnings = append(d.warnings, warning{text, args})
}

// log writes the warnings.
func (d *discovery) log(log *slog.Logger) {
	for _, w := range d.warnings {
		log.Warn(w.text, w.args...)
	}
}

// probe settles a new pool with these options in force, by the servers' offers
// unless that is off.
func (m *Manager) probe(ctx context.Context, p Pool, o Options) (discovery, error) {
	if o.Probe == Off {
		if o.ByBroadcast() {
			// Whether there is such an interface is known without asking anybody.
			if _, err := m.client.RelayMAC(ctx, p); err != nil {
				return p.settle(nil, err)
			}
		}
		return p.unprobed()
	}
	bound, cancel := context.WithTimeout(ctx, ProbeTime)
	defer cancel()
	offers, err := m.client.Probe(bound, p, MAC{})
	if ctx.Err() != nil {
		return discovery{}, context.Cause(ctx)
	}
	return p.settle(offers, err)
}

// unprobed settles a pool whose servers aren't to be asked.
func (p Pool) unprobed() (discovery, error) {
	if !p.Subnet.IsValid() {
		return discovery{}, errors.New("probe=off leaves nobody to learn the subnet from: create the network with --subnet and --gateway, for example " + exampleFlags + ", or without probe=off")
	}
	return p.guessed(), nil
}

// guessed settles a pool of which the servers have said nothing.
func (p Pool) guessed() discovery {
	p.Gateway = p.firstUsable()
	return discovery{pool: p, from: "first address of the subnet"}
}

// settle settles a pool by the answer to its probe: offers, or why there are
// none.
func (p Pool) settle(offers []Offer, err error) (discovery, error) {
	given := p.Subnet.IsValid()
	switch {
	case errors.Is(err, ErrNoVLAN) && given:
		p.FirstWait = FirstWait
		d := p.guessed()
		d.warn("not probed: the network is created on trust, and its first container may wait for the VLAN's port", "why", err, "for", FirstWait)
		return d, nil
	case errors.Is(err, ErrNoVLAN):
		return discovery{}, fmt.Errorf("%w: spanning tree may block a new VLAN port for up to 50 seconds, so it can't be probed; create the network with --subnet and --gateway, for example %s", err, exampleFlags)
	case errors.Is(err, ErrNoAnswer) && given:
		d := p.guessed()
		d.warn("no DHCP server answered the probe: containers of this network will fail until one does", "error", err)
		return d, nil
	case errors.Is(err, ErrNoAnswer):
		return discovery{}, fmt.Errorf("learn the network's subnet: create the network with --subnet and --gateway, for example %s, or make a server answer: %w", exampleFlags, err)
	case err != nil:
		return discovery{}, err
	case given:
		return p.compare(offers)
	default:
		return p.learn(offers)
	}
}

// learn settles a pool whose subnet is the first that an offer names.
func (p Pool) learn(offers []Offer) (discovery, error) {
	var wrong []string
	for _, o := range offers {
		subnet, err := o.network()
		if err == nil {
			p.Subnet = subnet
			return p.compare(offers)
		}
		wrong = append(wrong, err.Error())
	}
	return discovery{}, fmt.Errorf("learn the network's subnet: %s: correct the server, or create the network with --subnet and --gateway, for example %s", strings.Join(wrong, "; "), offers[0].flags())
}

// minLearned is the least prefix length that a server is believed: no LAN is
// larger than 10.0.0.0/8.
const minLearned = 8

// network is the subnet that an offer names, where a network can have it.
func (o Offer) network() (netip.Prefix, error) {
	offered := fmt.Sprintf("DHCP server %s offers %s", o.Server, o.Address)
	if !o.Subnet.IsValid() {
		return netip.Prefix{}, fmt.Errorf("%s without a subnet mask (option 1) of any use", offered)
	}
	err := checkSubnet(o.Subnet)
	switch {
	case err != nil:
	case o.Subnet.Bits() < minLearned || o.Subnet.Addr().IsLoopback():
		err = fmt.Errorf("subnet %s is nobody's LAN", o.Subnet)
	default:
		err = Pool{Subnet: o.Subnet}.inSubnet(o.Address)
	}
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%s with a wrong subnet mask (option 1): %w", offered, err)
	}
	return o.Subnet, nil
}

// flags are those of `docker network create` that an offer suggests whose mask is
// of no use: the narrowest usual subnet that has address and router.
func (o Offer) flags() string {
	for _, bits := range []int{24, 16, 8} {
		guess := Pool{Subnet: netip.PrefixFrom(o.Address, bits).Masked()}
		if guess.inSubnet(o.Address) == nil && guess.inSubnet(o.Router) == nil {
			return fmt.Sprintf("--subnet %s --gateway %s", guess.Subnet, o.Router)
		}
	}
	guess := Pool{Subnet: netip.PrefixFrom(o.Address, 24).Masked()}
	return fmt.Sprintf("--subnet %s --gateway %s", guess.Subnet, guess.firstUsable())
}

// compare settles a pool whose subnet is known. An offer from another subnet is
// a reason to refuse it, since every container would be refused later, unless
// another server has offered a host of this one.
func (p Pool) compare(offers []Offer) (discovery, error) {
	var wrong []string
	good := slices.DeleteFunc(slices.Clone(offers), func(o Offer) bool {
		outside := p.inSubnet(o.Address) != nil
		if outside {
			wrong = append(wrong, fmt.Sprintf("DHCP server %s offers %s (subnet %s)", o.Server, o.Address, orNone(o.Subnet)))
		}
		return outside
	})
	if len(good) == 0 {
		return discovery{}, fmt.Errorf("%s, not a host of the subnet %s: correct --subnet, let the server serve that subnet, or add --ipam-opt probe=off where it offers strangers another subnet than containers", strings.Join(wrong, "; "), p.Subnet)
	}
	d := p.guessed()
	if texts := Differing(offers); texts != nil {
		d.warn("several DHCP servers answer differently: a container may get its address from any of them", "offers", strings.Join(texts, "; "))
	}
	if o := good[0]; o.Subnet.IsValid() && o.Subnet != p.Subnet {
		d.warn("the DHCP server's subnet is another one: containers get the network's prefix length", "server", o.Server, "offered", o.Subnet)
	}
	for _, o := range good {
		if !o.Router.IsValid() {
			continue
		}
		if p.inSubnet(o.Router) == nil {
			d.pool.Gateway, d.from = o.Router, fmt.Sprintf("option 3 of server %s", o.Server)
			return d, nil
		}
		d.warn("the DHCP server's router is no host of the subnet: it is not used", "server", o.Server, "router", o.Router)
	}
	d.warn("the DHCP server names no router of this subnet: its first address becomes the gateway unless --gateway is given", "server", good[0].Server, "gateway", d.pool.Gateway)
	return d, nil
}

// Differing tells what each server offers, where they don't agree about subnet
// and router; else nil.
func Differing(offers []Offer) []string {
	differs := func(o Offer) bool { return o.Subnet != offers[0].Subnet || o.Router != offers[0].Router }
	if !slices.ContainsFunc(offers, differs) {
		return nil
	}
	texts := make([]string, len(offers))
	for i, o := range offers {
		texts[i] = fmt.Sprintf("server %s offers %s, subnet %s, router %s", o.Server, o.Address, orNone(o.Subnet), orNone(o.Router))
	}
	return texts
}

// optional is an address or a subnet, or none.
type optional interface {
	IsValid() bool
	String() string
}

// orNone is what is there as a text.
func orNone(v optional) string {
	if !v.IsValid() {
		return "none"
	}
	return v.String()
}

// learnSubnet asks the servers for the prefix length and router of a pool of
// which only the network address is known.
func (m *Manager) learnSubnet(ctx context.Context, p Pool) (Pool, error) {
	network := p.Subnet.Addr()
	wrong := func(err error) (Pool, error) {
		return Pool{}, fmt.Errorf("learn the prefix length of the old network %s: %w; mend that, or remove the network and create it anew", network, err)
	}
	ctx, cancel := context.WithTimeout(ctx, ProbeTime)
	defer cancel()
	offers, err := m.client.Probe(ctx, p, MAC{})
	if err != nil {
		return wrong(err)
	}
	var others []string
	for _, o := range offers {
		subnet, err := o.network()
		if err == nil && subnet.Addr() == network {
			p.Subnet = subnet
			if p.inSubnet(o.Router) == nil {
				p.Gateway = o.Router
			}
			return p, nil
		}
		others = append(others, fmt.Sprintf("DHCP server %s offers subnet %s", o.Server, orNone(o.Subnet)))
	}
	return wrong(errors.New(strings.Join(others, "; ")))
}
