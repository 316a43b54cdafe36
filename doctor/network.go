package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// network is what the checks of the network share: who is to be asked, from
// where, and what came of it. See survey.
type network struct {
	needs []*need
	ways  []*way // of all needs, each once
	hosts map[netip.Addr]net.Interface
	// trials are the probes that were made, see checkAnswer; none where nothing
	// could be sent.
	trials []*trial
}

// need is where networks, or the configuration, want the same servers to be asked
// in the same way.
type need struct {
	options  lease.Options // in force
	global   bool          // they are the running daemon's own
	planned  bool          // they will be, after a reload or restart
	networks []lease.PoolStatus
	ways     []*way
	// unresolved are the servers whose names have no address, with the reason.
	unresolved map[lease.Server]error
}

// way is one way to be asked: a server as a relay agent, or all of an interface's
// LAN.
type way struct {
	iface string // "" as a relay agent
	// server is as it was configured, to where that leads.
	server lease.Server
	to     netip.AddrPort
	relay  netip.AddrPort // giaddr; the address is zero where there is no route
	noWay  error          // why there is no route
	// blocked: a check has found that nothing can be sent.
	blocked bool
	needs   []*need
}

// String names the way's servers.
func (w *way) String() string {
	name := "DHCP server " + w.to.Addr().String()
	switch {
	case w.iface != "":
		return "the LAN of " + w.iface
	case w.to.Port() != lease.ServerPort:
		name = "DHCP server " + w.to.String()
	}
	if w.server.Host != w.to.Addr().String() {
		name += " (" + w.server.Host + ")"
	}
	return name
}

// spare reports whether everybody who needs the way has another one of which a
// test holds.
func (w *way) spare(works func(*way) bool) bool {
	return !slices.ContainsFunc(w.needs, func(n *need) bool { return !slices.ContainsFunc(n.ways, works) })
}

// tellOf tells something about a way, and whether nobody takes it yet.
func (p *patient) tellOf(w *way, f Finding) {
	if !slices.ContainsFunc(w.needs, func(n *need) bool { return !n.planned || n.networks != nil }) {
		f.Found = "by the configuration that isn't in force yet: " + f.Found
	}
	p.tell(f)
}

// resolveTime is how long a server's name may take.
const resolveTime = 2 * time.Second

// survey finds out who is to be asked.
func survey(ctx context.Context, p *patient) *network {
	if p.net != nil {
		return p.net
	}
	p.net = &network{hosts: hostAddrs()}
	p.net.want(p.Global).planned = p.health != nil
	now := p.Global
	if p.health != nil {
		// What can't be read is the configuration's finding.
		if running, err := p.Options(p.running); err == nil {
			now = running
		}
	}
	n := p.net.want(now)
	n.global, n.planned = true, false
	for _, pool := range p.pools {
		n := p.net.want(pool.InForce)
		n.networks = append(n.networks, pool)
	}
	// Networks may bring all that they need.
	p.net.needs = slices.DeleteFunc(p.net.needs, func(n *need) bool { return len(n.options.Servers) == 0 && !n.options.ByBroadcast() })
	for _, n := range p.net.needs {
		p.net.find(ctx, n)
	}
	return p.net
}

// want is the need with these options, a new one where there is none.
func (n *network) want(o lease.Options) *need {
	o = o.Or(lease.Defaults())
	for _, known := range n.needs {
		if k := known.options; slices.Equal(k.Servers, o.Servers) && k.Interface == o.Interface && k.Relay == o.Relay && k.RelayPort == o.RelayPort {
			return known
		}
	}
	n.needs = append(n.needs, &need{options: o, unresolved: map[lease.Server]error{}})
	return n.needs[len(n.needs)-1]
}

// find finds the ways of a need.
func (n *network) find(ctx context.Context, of *need) {
	if of.options.ByBroadcast() {
		n.add(of, way{iface: of.options.Interface})
		return
	}
	addrs, errs := make([][]netip.Addr, len(of.options.Servers)), make([]error, len(of.options.Servers))
	var all sync.WaitGroup
	for i, server := range of.options.Servers {
		all.Go(func() { addrs[i], errs[i] = resolve(ctx, server.Host) })
	}
	all.Wait()
	for i, server := range of.options.Servers {
		if errs[i] != nil {
			of.unresolved[server] = errs[i]
		}
		for _, addr := range addrs[i] {
			w := way{server: server, to: netip.AddrPortFrom(addr, server.Port)}
			relay := of.options.Relay
			if !relay.IsValid() || relay.IsUnspecified() {
				var r route
				r, w.noWay = routeTo(addr, netip.Addr{})
				relay = r.source
			}
			w.relay = netip.AddrPortFrom(relay, of.options.RelayPort)
			n.add(of, w)
		}
	}
}

// add adds a way to a need, one that others have too if there is one.
func (n *network) add(of *need, w way) {
	at := slices.IndexFunc(n.ways, func(known *way) bool {
		return known.iface == w.iface && known.to == w.to && known.relay == w.relay
	})
	if at < 0 {
		at = len(n.ways)
		n.ways = append(n.ways, &w)
	}
	known := n.ways[at]
	if !slices.Contains(of.ways, known) {
		of.ways, known.needs = append(of.ways, known), append(known.needs, of)
	}
}

// resolve returns the IPv4 addresses of a server.
func resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	if addr, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{addr}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, resolveTime)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip4", host)
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	return addrs, err
}

// hostAddrs are the host's IPv4 addresses, with their interfaces.
func hostAddrs() map[netip.Addr]net.Interface {
	hosts := map[netip.Addr]net.Interface{}
	// What can't be listed isn't there.
	all, _ := net.Interfaces()
	for _, i := range all {
		addrs, _ := i.Addrs()
		for _, a := range addrs {
			if prefix, err := netip.ParsePrefix(a.String()); err == nil && prefix.Addr().Is4() {
				hosts[prefix.Addr()] = i
			}
		}
	}
	return hosts
}

// listed are the host's addresses for people.
func (n *network) listed() string {
	var addrs []netip.Addr
	for addr := range n.hosts {
		if !addr.IsLoopback() {
			addrs = append(addrs, addr)
		}
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	texts := make([]string, len(addrs))
	for i, addr := range addrs {
		texts[i] = fmt.Sprintf("%s on %s", addr, n.hosts[addr].Name)
	}
	return cmp.Or(strings.Join(texts, ", "), "none")
}

// setting says where a need has an option from: its networks, or the
// configuration.
func (p *patient) setting(n *need, option string) string {
	var own []string
	for _, pool := range n.networks {
		if pool.Options.Texts()[option] != "" {
			own = append(own, pool.Subnet.String())
		}
	}
	if own != nil {
		return option + " of " + enumerate("network", own)
	}
	key := strings.ToUpper(option)
	settings := append(slices.Clone(p.running), p.Settings...)
	if n.planned {
		settings = p.Settings
	}
	for _, s := range settings {
		if s.Key == key {
			return fmt.Sprintf("%s (%s)", key, s.Source)
		}
	}
	return key
}

// enumerate names at most some of many.
func enumerate(what string, names []string) string {
	if len(names) > 1 {
		what += "s"
	}
	return what + " " + some(names)
}

// some are the first of many.
func some(names []string) string {
	const most = 3
	if more := len(names) - most; more > 0 {
		names = append(slices.Clone(names[:most]), fmt.Sprintf("%d more", more))
	}
	return strings.Join(names, ", ")
}

// checkRelay: are the relay addresses this host's, and can the interfaces be used
// on which servers are asked by broadcast?
func checkRelay(ctx context.Context, p *patient) {
	n := survey(ctx, p)
	if len(n.needs) == 0 && p.GlobalErr != nil {
		p.skip("which DHCP servers are to be asked isn't known: the configuration can't be used", "correct it, see above")
		return
	}
	if len(n.needs) == 0 {
		p.skip("no DHCP server and no interface to ask on is configured", "the configuration's finding above says how")
		return
	}
	for _, w := range n.ways {
		on, here := n.hosts[w.relay.Addr()]
		switch {
		case w.iface != "":
			w.blocked = !p.checkInterface(w.iface)
		case w.noWay == nil:
			w.blocked = !here || on.Flags&net.FlagUp == 0 || n.confined(w)
		}
	}
	told := map[netip.Addr]bool{}
	for _, w := range n.ways {
		relay := w.relay.Addr()
		if w.iface != "" || told[relay] {
			continue
		}
		told[relay] = true
		if w.noWay != nil {
			p.skip("none: there is no route to the servers, by which it is chosen", "mend the route, see below")
			continue
		}
		p.checkRelayAddress(w)
	}
}

// confined reports whether a way's relay address is one of this host's loopback,
// and its server elsewhere.
func (n *network) confined(w *way) bool {
	_, here := n.hosts[w.to.Addr()]
	return w.relay.Addr().IsLoopback() && !here && !w.to.Addr().IsLoopback()
}

// checkRelayAddress tells of the relay address of a way, and of all ways that
// have it.
func (p *patient) checkRelayAddress(w *way) {
	relay := w.relay.Addr()
	set := w.needs[0].options.Relay == relay
	by := p.setting(w.needs[0], "listen_addr")
	on, here := p.net.hosts[relay]
	var confined *way
	spare := true
	for _, other := range p.net.ways {
		if other.iface != "" || other.relay.Addr() != relay {
			continue
		}
		spare = spare && other.spare(func(w *way) bool { return !w.blocked && w.noWay == nil })
		if p.net.confined(other) {
			confined = other
		}
	}
	var f Finding
	switch {
	case !here:
		f = wrong(fmt.Sprintf("correct %s, or bring the address up: ip address add %s/PREFIXLENGTH dev INTERFACE", by, relay),
			"relay address %s is not an address of this host, which has %s", relay, p.net.listed())
	case on.Flags&net.FlagUp == 0:
		f = wrong("ip link set "+on.Name+" up", "relay address %s is on %s, which is down", relay, on.Name)
	case confined != nil:
		f = wrong(fmt.Sprintf("set %s to an address at which servers reach this host, which has %s", by, p.net.listed()),
			"relay address %s is loopback: %s can't answer there", relay, confined)
	case on.Flags&net.FlagRunning == 0:
		// Hosts answer at an address whose interface has no link. If this one's way
		// is cut, that is the finding of the servers' answers.
		p.warn(fmt.Sprintf("relay address %s is on %s, which has no link", relay, on.Name),
			fmt.Sprintf("plug the cable of %s in, bring its other end up (ethtool %[1]s), or set %s to an address of another interface", on.Name, by))
		return
	case set:
		p.ok("%s, on %s", relay, on.Name)
		return
	default:
		p.ok("%s, on %s, chosen by the route to %s", relay, on.Name, w)
		return
	}
	if spare {
		f.Status = Warning
	}
	p.tellOf(w, f)
}

// checkInterface reports whether it can be used, as far as that is known.
func (p *patient) checkInterface(name string) bool {
	prober := newProber()
	defer prober.Close()
	err := prober.CheckInterface(name)
	f := Finding{Check: "interface", Status: Fault}
	switch {
	case err == nil:
		f.Status, f.Found = OK, name+" is up, has a link, and servers can be asked there by broadcast"
	case errors.Is(err, unix.EPERM):
		f.Status, f.Found, f.Advice = Skipped, name+": a packet socket may not be opened", asRoot
	case errors.Is(err, lease.ErrNoVLAN):
		f.Status = Warning
		f.Found, f.Advice = splitAdvice(err.Error())
	default:
		f.Found, f.Advice = splitAdvice(strings.TrimPrefix(err.Error(), "ask on "))
	}
	p.tell(f)
	return err == nil || f.Status == Skipped
}

// splitAdvice cuts an error of ours, which ends in what to do about it.
func splitAdvice(text string) (found, advice string) {
	if at := strings.LastIndex(text, ": "); at > 0 {
		return text[:at], text[at+2:]
	}
	return text, ""
}

// checkRoute: is there a route to each server?
func checkRoute(ctx context.Context, p *patient) {
	n := survey(ctx, p)
	found := map[*way]Finding{}
	for _, w := range n.ways {
		if w.iface == "" {
			found[w] = n.checkRouteOf(p, w)
			w.blocked = w.blocked || found[w].Status == Fault
		}
	}
	works := func(w *way) bool { return !w.blocked }
	for _, of := range n.needs {
		for _, server := range of.options.Servers {
			err, none := of.unresolved[server]
			if !none {
				continue
			}
			f := Finding{Status: Fault, Found: fmt.Sprintf("the name of DHCP server %s leads nowhere: %s", server, oneLine(err))}
			f.Advice = fmt.Sprintf("correct it in %s, or the name service: getent ahostsv4 %s, /etc/resolv.conf. Its IPv4 address does as well", p.setting(of, "dhcp_server"), server.Host)
			if slices.ContainsFunc(of.ways, works) {
				f.Status = Warning
			}
			p.tell(f)
		}
	}
	for _, w := range n.ways {
		if w.iface != "" {
			continue
		}
		f := found[w]
		if f.Status == Fault && w.spare(works) {
			f.Status = Warning
		}
		p.tellOf(w, f)
	}
	if len(found) == 0 && len(n.ways) > 0 {
		p.ok("none is needed: servers are asked by broadcast")
	}
}

func (n *network) checkRouteOf(p *patient, w *way) Finding {
	server, relay := w.to.Addr(), w.relay.Addr()
	r, err := route{}, w.noWay
	on, here := n.hosts[relay]
	if err == nil {
		// Of an address that can't be used nothing can be sent.
		from := relay
		if !here || w.blocked {
			from = netip.Addr{}
		}
		r, err = routeTo(server, from)
	}
	switch {
	case errors.Is(err, errRejected):
		return Finding{
			Status: Fault, Found: fmt.Sprintf("no route to %s: %v", w, err),
			Advice: "ip route show table all | grep -E 'blackhole|unreachable|prohibit' and ip rule show it: take it back, or add a narrower route to the server",
		}
	case err != nil:
		return Finding{
			Status: Fault, Found: fmt.Sprintf("no route to %s: %v", w, err),
			Advice: fmt.Sprintf("ip route add %s via ROUTER, or correct %s; ip route get %[1]s shows what this host does now", server, p.setting(w.needs[0], "dhcp_server")),
		}
	case w.relay == w.to:
		return Finding{
			Status: Fault, Found: fmt.Sprintf("%s is the relay address itself: what is meant for the server would come to the daemon", w),
			Advice: fmt.Sprintf("give the daemon another address of this host, which has %s: %s", n.listed(), p.setting(w.needs[0], "listen_addr")),
		}
	case r.local:
		return Finding{Status: OK, Found: fmt.Sprintf("%s is on this host (%s)", w, on.Name)}
	case r.down:
		return Finding{
			Status: Fault, Found: fmt.Sprintf("the route to %s leads out of %s, which has no link", w, r.iface),
			Advice: fmt.Sprintf("plug the cable of %s in, or bring its other end up (ethtool %[1]s)", r.iface),
		}
	}
	return Finding{Status: OK, Found: fmt.Sprintf("to %s: %s", w, r)}
}
