package doctor

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/dhcp"
	"github.com/talkingdata/oam-docker-ipam/lease"
)

// silentTime is how long a server may take to offer. A dnsmasq pings for 3 s
// before it does. Tests are in more of a hurry.
var silentTime = 4500 * time.Millisecond

const (
	// slow is an offer's time from which a server makes starts slow.
	slow = time.Second
	// atOnce bounds the probes that run at the same time, eachAtOnce those of one
	// server: it has others to serve.
	atOnce     = 32
	eachAtOnce = 4
	// slowTime is how long a slow server is asked, one question after the other:
	// whoever waits for it meanwhile waits longer.
	slowTime = 8 * time.Second
	// afterwards is what the check needs when its last probe is over.
	afterwards = 2 * time.Second
)

// trial is one probe: DISCOVERs on one way until the first offer.
type trial struct {
	*way
	network *lease.PoolStatus // whose subnet was asked for; nil: none
	as      lease.Lease       // in whose name; zero: this host's
	pings   bool              // the server is pinged meanwhile

	offers []lease.Offer
	err    error
	xid    uint32
	ended  time.Time
	seen   []dhcp.Sighting // its messages and the ICMP errors about them
	// pinged are the sources from which the server was pinged, and whether it
	// answered.
	pinged map[netip.Addr]bool
}

// stranger reports whether it asked as a client that the server doesn't know.
func (t *trial) stranger() bool { return t.as.MAC == lease.MAC{} }

func newProber() *dhcp.Client {
	return dhcp.NewProber(lease.Options{}, slog.New(slog.DiscardHandler))
}

// checkAnswer asks each server, and where it is silent finds out how far
// question and answer come.
func checkAnswer(ctx context.Context, p *patient) {
	n := survey(ctx, p)
	var ways []*way
	ports := []uint16{}
	for _, w := range n.ways {
		if !w.blocked {
			ways, ports = append(ways, w), append(ports, w.relay.Port(), w.to.Port())
		}
	}
	if len(ways) == 0 {
		if len(n.ways) > 0 {
			p.skip("no server can be asked", "mend the relay address, the interface or the route, see above")
		}
		return
	}
	witness, err := dhcp.NewWitness(ports...)
	if err != nil {
		p.skip("no server was asked, and nothing watched on the wire: "+err.Error(), asRoot)
		return
	}
	defer witness.Close()
	n.ask(ctx, p, ways)
	if ctx.Err() != nil {
		p.skip("the time of this check was up before it was known who answers", "try again when this host is less busy")
		return
	}
	n.notice(witness.Seen())
	found := map[*way]Finding{}
	var unasked []string
	for _, w := range ways {
		if n.tried(w) {
			found[w] = n.checkAnswerOf(p, w)
		} else if name := w.String(); !slices.Contains(unasked, name) {
			unasked = append(unasked, name)
		}
	}
	works := func(w *way) bool { s := found[w].Status; return s == OK || s == Warning }
	for _, w := range ways {
		f, tried := found[w]
		if !tried {
			continue
		}
		if f.Status == Fault && w.spare(works) {
			f.Status = Warning
		}
		p.tellOf(w, f)
		p.checkRecord(w, works(w))
	}
	if unasked != nil {
		p.skip(fmt.Sprintf("%s not asked from every relay address: the time of this check was up, or they are slow: %s", plural(len(unasked), "server"), some(unasked)),
			"mend what the others have, then run it again")
	}
	n.checkAgreement(p)
}

// networks are those that ask on the way, those with leases first: their servers
// are known to serve them.
func (w *way) networks() (networks []lease.PoolStatus) {
	for _, of := range w.needs {
		networks = append(networks, of.networks...)
	}
	slices.SortStableFunc(networks, func(a, b lease.PoolStatus) int { return min(1, len(b.Leases)) - min(1, len(a.Leases)) })
	return networks
}

// ask makes the trials, of all servers at the same time.
func (n *network) ask(ctx context.Context, p *patient, ways []*way) {
	prober := newProber()
	defer prober.Close()
	var asked []*interview
	places := make(chan struct{}, atOnce)
	for _, w := range ways {
		at := slices.IndexFunc(asked, func(i *interview) bool { return i.ways[0].asks(w) })
		if at < 0 {
			at = len(asked)
			asked = append(asked, &interview{prober: prober, places: places})
			if end, bound := ctx.Deadline(); bound {
				asked[at].end = end.Add(-silentTime - afterwards)
			}
		}
		asked[at].ways = append(asked[at].ways, w)
	}
	var all sync.WaitGroup
	for _, i := range asked {
		all.Go(func() { i.hold(ctx, p) })
	}
	all.Wait()
	for _, i := range asked {
		n.trials = append(n.trials, i.trials...)
	}
}

// asks reports whether another way leads to the same servers.
func (w *way) asks(other *way) bool { return w.iface == other.iface && w.to == other.to }

// interview is all trials of one server, or of those of one LAN.
type interview struct {
	ways   []*way
	prober *dhcp.Client
	places chan struct{} // of the trials that run
	end    time.Time     // when the last one may begin; zero: any time
	began  time.Time
	trials []*trial // that are over
}

// hold makes the trials: on each way one for a network, then those for the
// others, and where there was no offer one in the name of a lease.
func (i *interview) hold(ctx context.Context, p *patient) {
	i.began = time.Now()
	var first []*trial
	for _, w := range i.ways {
		t := &trial{way: w, pings: true}
		if networks := w.networks(); len(networks) > 0 {
			t.network = &networks[0]
		}
		first = append(first, t)
	}
	i.try(ctx, first)
	var second, known []*trial
	for _, t := range i.trials {
		networks := t.networks()
		for at := range networks[min(1, len(networks)):] {
			second = append(second, &trial{way: t.way, network: &networks[1+at]})
		}
		if again := p.again(t); again != nil {
			known = append(known, again)
		}
	}
	second = append(known, second...)
	if !offered(i.trials) {
		// A server that is dead needs no more.
		second = second[:min(len(second), eachAtOnce)]
	}
	i.try(ctx, second)
	var third []*trial
	for _, t := range i.trials[min(len(first), len(i.trials)):] {
		if again := p.again(t); again != nil && offered(of(t.way, i.trials)) {
			third = append(third, again)
		}
	}
	i.try(ctx, third)
}

// again is a silent trial in the name of a lease, nil where it wouldn't tell
// more.
func (p *patient) again(t *trial) *trial {
	if len(t.offers) > 0 || !t.stranger() || t.network == nil {
		return nil
	}
	if l := p.leaseOf(t); l.Addr().IsValid() {
		return &trial{way: t.way, network: t.network, as: l}
	}
	return nil
}

// of are those of some trials that went one way.
func of(w *way, trials []*trial) []*trial {
	return slices.DeleteFunc(slices.Clone(trials), func(t *trial) bool { return t.way != w })
}

// offered reports whether one of some trials had an offer.
func offered(trials []*trial) bool {
	return slices.ContainsFunc(trials, func(t *trial) bool { return len(t.offers) > 0 })
}

// late reports whether one of some trials had an offer, but a slow one.
func late(trials []*trial) bool {
	return slices.ContainsFunc(trials, func(t *trial) bool { return len(t.offers) > 0 && t.offers[0].After > slow })
}

// leaseOf is a lease in force of a trial's network and server, zero where there
// is none.
func (p *patient) leaseOf(t *trial) lease.Lease {
	idle := []string{lease.Releasing, lease.Waiting, lease.Lost.String()}
	for _, l := range p.leases {
		if l.Pool == t.network.ID && !slices.Contains(idle, l.State) && (t.iface != "" || l.Via == t.to) {
			return l.Lease
		}
	}
	return lease.Lease{}
}

// try runs trials: the interview's first one alone, since it tells whether the
// server is slow, then several at the same time. Those for which there is no
// time are left out.
func (i *interview) try(ctx context.Context, trials []*trial) {
	over := make(chan *trial)
	running := 0
	for {
		width := eachAtOnce
		if len(i.trials) == 0 || late(i.trials) {
			width = 1
		}
		for running < width && len(trials) > 0 {
			i.places <- struct{}{}
			if !i.end.IsZero() && time.Now().After(i.end) || late(i.trials) && time.Since(i.began) > slowTime {
				<-i.places
				trials = nil
				break
			}
			t := trials[0]
			trials = trials[1:]
			running++
			go func() {
				t.run(ctx, i.prober)
				<-i.places
				over <- t
			}()
		}
		if running == 0 {
			return
		}
		i.trials = append(i.trials, <-over)
		running--
	}
}

func (t *trial) run(ctx context.Context, prober *dhcp.Client) {
	ctx, cancel := context.WithTimeout(ctx, silentTime)
	defer cancel()
	pool := lease.Pool{Options: t.needs[0].options}
	if t.network != nil {
		pool = t.network.Pool
		pool.Options = t.network.InForce
	}
	var pinged sync.WaitGroup
	if t.iface == "" {
		pool.Options.Servers = []lease.Server{{Host: t.to.Addr().String(), Port: t.to.Port()}}
		pool.Options.Relay = t.relay.Addr()
		if t.pings {
			pinged.Go(func() { t.ping(ctx) })
		}
	}
	t.offers, t.xid, t.err = prober.ProbeAs(ctx, pool, t.as)
	t.ended = time.Now()
	if len(t.offers) > 0 {
		cancel()
	}
	pinged.Wait()
}

// ping pings the server from the relay address, and from the one that this host
// would choose.
func (t *trial) ping(ctx context.Context) {
	sources := t.sources()
	answers := make([]bool, len(sources))
	var all sync.WaitGroup
	for i, from := range sources {
		all.Go(func() { answers[i] = ping(ctx, from, t.to.Addr()) })
	}
	all.Wait()
	t.pinged = map[netip.Addr]bool{}
	for i, from := range sources {
		t.pinged[from] = answers[i]
	}
}

// sources are the relay address, and the source that the host's routing prefers
// where that is another.
func (t *trial) sources() []netip.Addr {
	sources := []netip.Addr{t.relay.Addr()}
	if r, err := routeTo(t.to.Addr(), netip.Addr{}); err == nil && r.source.IsValid() && r.source != sources[0] {
		sources = append(sources, r.source)
	}
	return sources
}

// notice gives each trial what was seen that is about it: its messages, ICMP
// errors about them, and answers of its server to a question that nobody asked.
func (n *network) notice(seen []dhcp.Sighting) {
	xids := map[uint32]bool{}
	for _, t := range n.trials {
		xids[t.xid] = true
	}
	for _, t := range n.trials {
		var mac lease.MAC
		for _, s := range seen {
			lost := s.Unreachable != nil && s.Unreachable.From == t.relay && s.Unreachable.To == t.to
			own := s.Unreachable == nil && s.XID == t.xid && t.xid != 0
			if own && !s.Reply {
				mac = s.MAC
			}
			stray := s.Reply && !xids[s.XID] && s.MAC == mac && s.From.Addr() == t.to.Addr() && s.To.Addr() == t.relay.Addr()
			if lost || own || stray {
				t.seen = append(t.seen, s)
			}
		}
	}
}

// tried reports whether a way was tried.
func (n *network) tried(w *way) bool { return len(of(w, n.trials)) > 0 }

// answers reports whether a way's servers have answered anything.
func (n *network) answers(w *way) bool { return offered(of(w, n.trials)) }

// slow reports whether the servers of a way have made somebody wait.
func (n *network) slow(w *way) bool {
	return late(slices.DeleteFunc(slices.Clone(n.trials), func(t *trial) bool { return !t.asks(w) }))
}

// checkAnswerOf tells what came of asking on one way, which was tried.
func (n *network) checkAnswerOf(p *patient, w *way) Finding {
	trials := of(w, n.trials)
	if at := slices.IndexFunc(trials, func(t *trial) bool { return len(t.offers) > 0 }); at >= 0 {
		return answered(trials[at])
	}
	silent := trials[0]
	f := silent.diagnose()
	if f.Status == Fault && n.slow(w) {
		// It may have been busy with the other questions.
		f.Status = Warning
		f.Found += "; it is slow to answer others"
	}
	if f.Status == Fault {
		if last := p.lastAnswer(w); !last.IsZero() {
			f.Found += "; the daemon had its last answer at " + last.Local().Format(time.DateTime)
		}
	}
	return f
}

func answered(t *trial) Finding {
	offer := t.offers[0]
	f := Finding{Status: OK, Found: fmt.Sprintf("%s answers the relay address %s within %s: it offers %s", t.way, t.relay.Addr(), took(offer.After), offer.Address)}
	if t.iface != "" {
		f.Found = fmt.Sprintf("DHCP server %s answers on %s within %s: it offers %s", offer.Server, t.iface, took(offer.After), offer.Address)
	}
	if offer.After > slow {
		f.Status, f.Advice = Warning, "each new container waits as long. "+whySlow
	}
	return f
}

const whySlow = "The server pings an address before it offers it (ISC dhcpd: ping-check false; dnsmasq: no-ping), or is overloaded, or packets get lost on the way"

// took is a time for people.
func took(d time.Duration) time.Duration {
	if d > slow {
		return d.Round(100 * time.Millisecond)
	}
	return d.Round(100 * time.Microsecond)
}

// journey is how far a trial's question and its answer came.
type journey struct {
	sent    int            // DISCOVERs that left
	left    *dhcp.Sighting // the first one
	refused *dhcp.Sighting // the ICMP error
	came    *dhcp.Sighting // the answer, and one after the trial's end
	late    *dhcp.Sighting
}

func (t *trial) journey() (j journey) {
	for _, s := range t.seen {
		switch {
		case s.Unreachable != nil:
			j.refused = &s
		case s.Reply && !s.Out && s.At.After(t.ended):
			j.late = &s
		case s.Reply && !s.Out && j.came != nil && j.came.Type == "offer" && s.Type != "offer":
			// What explains the silence is the OFFER that wasn't taken.
		case s.Reply && !s.Out:
			// Of a bridge and its port, the bridge is where the kernel looks at it.
			j.came = &s
		case !s.Reply && s.Out:
			if j.left == nil {
				j.left = &s
			}
			if s.Interface == j.left.Interface {
				j.sent++
			}
		}
	}
	return j
}

// diagnose says why a trial had no offer, by how far question and answer came.
func (t *trial) diagnose() Finding {
	j := t.journey()
	var silence *dhcp.Silence
	switch {
	case j.came != nil:
		return t.kept(*j.came, j.left)
	case errors.Is(t.err, unix.EPERM):
		return wrong(letPass("OUTPUT", "raw/mangle OUTPUT, or mangle POSTROUTING", t.relay, t.to), "%s isn't asked: this host's own firewall drops DISCOVERs from %s to UDP port %d of %s (sending fails: %v)",
			t.way, t.relay.Addr(), t.to.Port(), t.to.Addr(), unix.EPERM)
	case !errors.As(t.err, &silence):
		return wrong("oam-docker-ipam discover --debug tries the same by hand", "%s can't be asked: %v", t.way, t.err)
	case j.late != nil:
		return wrong(whySlow, "%s answers too late: its %s came more than %s after the first DISCOVER", t.way, strings.ToUpper(cmp.Or(j.late.Type, "answer")), took(silentTime))
	case t.iface != "":
		return wrong(fmt.Sprintf("is %s in the LAN and VLAN of the DHCP server, or is there a relay agent? Is the switch's port forwarding (spanning tree takes up to 50 s), does DHCP snooping trust the server's port, has the server free addresses for unknown clients? tcpdump -ni %[1]s udp port 67 or udp port 68 shows all that passes", t.iface),
			"no DHCP server answers on the LAN of %s: DISCOVERs were broadcast for %s, and nothing came back", t.iface, took(silentTime))
	}
	return t.unanswered(j)
}

func wrong(advice, found string, args ...any) Finding {
	return Finding{Status: Fault, Found: fmt.Sprintf(found, args...), Advice: advice}
}

// unanswered says why nothing came back from a server that was asked as a relay
// agent.
func (t *trial) unanswered(j journey) Finding {
	server, relay := t.to.Addr(), t.relay.Addr()
	silent := fmt.Sprintf("%s doesn't answer the relay address %s", t.way, relay)
	r, err := routeTo(server, relay)
	if err != nil {
		return wrong(fmt.Sprintf("ip route get %s from %s", server, relay), "%s: %v", silent, err)
	}
	next := r.next(server)
	who := "its host"
	if next != server {
		who = "the router " + next.String() + " to it"
	}
	var at neighbour
	if !r.local {
		at = neighbourAt(r.iface, next)
	}
	switch {
	case at.dead:
		return wrong(fmt.Sprintf("is %s up, and on the LAN and VLAN of %s? Is the address right? ip neigh show %[1]s; arping -I %[2]s %[1]s", next, r.iface),
			"%s: %s doesn't answer ARP on %s, so that no DISCOVER could leave", silent, who, r.iface)
	case j.refused != nil:
		return t.unreachable(silent, *j.refused)
	case j.left == nil:
		return wrong("a rule or queue of this host takes them: nft list ruleset, iptables-save, ip rule, tc -s qdisc show dev "+r.iface,
			"%s: this host sent DISCOVERs, but none left on %s", silent, r.iface)
	}
	gone := fmt.Sprintf("%s: %s left on %s within %s, and nothing came back", silent, plural(j.sent, "DISCOVER"), j.left.Interface, took(silentTime))
	var other netip.Addr // that the server answers
	for from, answers := range t.pinged {
		if answers && from != relay {
			other = from
		}
	}
	switch {
	case t.pinged[relay]:
		return wrong(fmt.Sprintf("at the server: does its DHCP service run (and not hang), does it serve %s, with free addresses for unknown clients, does a firewall there drop UDP port %d? Its log tells whether the DISCOVERs of %s come", t.subnet(), t.to.Port(), relay),
			"%s. Its host answers pings of %s: it is up, and its route back is right", gone, relay)
	case other.IsValid():
		back := fmt.Sprintf("ip route add %s via %s", relay, other)
		if next != server {
			back = "at its routers too, to this host"
		}
		return wrong(fmt.Sprintf("give the server a route back to %s: %s; or set LISTEN_ADDR to %s, if it chooses the subnet by link selection", relay, back, other),
			"%s. Its host answers pings of %s, but none of the relay address: it has no route back to %s", gone, other, relay)
	case at.mac != nil && next == server:
		return wrong(fmt.Sprintf("at the server: a route back to %s, a firewall (UDP port %d, and ping), its DHCP service", relay, t.to.Port()),
			"%s, not even an answer to pings. Its host is up: it answers ARP (%s)", gone, at.mac)
	}
	return wrong(fmt.Sprintf("is the server up? Has it a route back to %s? Does a firewall on the way drop UDP port %d? traceroute -s %[1]s %[3]s shows how far packets come", relay, t.to.Port(), server),
		"%s, not even an answer to pings", gone)
}

// subnet is what the server was asked for.
func (t *trial) subnet() string {
	if t.network == nil {
		return "the subnet of " + t.relay.Addr().String()
	}
	return t.network.Subnet.String()
}

// unreachable tells what an ICMP error says.
func (t *trial) unreachable(answered string, s dhcp.Sighting) Finding {
	f := Finding{Status: Fault}
	const host, port, noNet, noHost, admin = 1, 3, 9, 10, 13 // RFC 792, RFC 1812 section 5.2.7.1
	by := s.From.Addr()
	switch code := s.Unreachable.Code; {
	case code == port && by == t.to.Addr():
		f.Found = fmt.Sprintf("%s: nobody listens at UDP port %d there (it says ICMP port unreachable)", answered, t.to.Port())
		f.Advice = "start the DHCP server on " + by.String() + ", or correct the address; if it does run, its firewall rejects us with those words"
	case code == noNet, code == noHost, code == admin, code == port:
		f.Found = fmt.Sprintf("%s: the firewall of %s rejects the DISCOVERs (ICMP unreachable, code %d)", answered, by, code)
		f.Advice = fmt.Sprintf("let UDP from %s to %s pass at %s, and the answers", t.relay, t.to, by)
	case code == host && by == t.relay.Addr():
		f.Found = fmt.Sprintf("%s: it, or the router to it, doesn't answer ARP", answered)
		f.Advice = "is it up, and on this LAN? ip neigh show " + t.to.Addr().String()
	default:
		f.Found = fmt.Sprintf("%s: the router %s can't reach it (ICMP unreachable, code %d)", answered, by, code)
		f.Advice = fmt.Sprintf("mend the route to %s at %s, or start the server", t.to.Addr(), by)
	}
	return f
}

// kept says why an answer that came to this host on the wire was not received,
// to a DISCOVER that is nil if it was not seen to leave.
func (t *trial) kept(s dhcp.Sighting, to *dhcp.Sighting) Finding {
	relay := t.relay.Addr()
	const culprit = "correct or update the server, or what relays its messages"
	came := fmt.Sprintf("%s answers: its %s comes in on %s, from %s to %s", t.way, strings.ToUpper(cmp.Or(s.Type, "message without a type")), s.Interface, s.From, s.To)
	switch {
	case s.Flaw != nil:
		return wrong("correct the server's configuration, or update it; oam-docker-ipam capture -o file.pcapng shows the packet", "%s, but no client can use it: %v", came, s.Flaw)
	case s.XID != t.xid:
		return wrong(culprit, "%s, but with the transaction ID %08x instead of %08x", came, s.XID, t.xid)
	case s.Type != "offer":
		return wrong("correct or update the server; its log says why it does so", "%s, and that is no answer to a DISCOVER", came)
	case to != nil && s.MAC != to.MAC:
		return wrong(culprit, "%s, but for the client %s (chaddr) instead of %s", came, s.MAC, to.MAC)
	case to != nil && s.ClientID != nil && !bytes.Equal(s.ClientID, to.ClientID):
		return wrong(culprit+": it has to echo the client identifier, or leave it out (RFC 6842)", "%s, but for the client identifier %x (option 61) instead of %x", came, s.ClientID, to.ClientID)
	case t.iface != "":
		return wrong("a rule on that interface drops it (tc, nft netdev)", "%s, but not to this client", came)
	case s.Relay != relay:
		return wrong("another relay agent or NAT on the way rewrites it: let it leave relayed messages alone", "%s, but for the relay address %s instead of %s (giaddr)", came, s.Relay, relay)
	case s.To.Addr() == relay && s.To != t.relay && t.relay.Port() == lease.ServerPort:
		return wrong("let the server answer relay agents at their port 67, as RFC 2131 section 4.1 has it; NAT on the way may rewrite it too", "%s, instead of %s", came, t.relay)
	case s.To.Addr() == relay && s.To != t.relay:
		return wrong(fmt.Sprintf("set LISTEN_PORT=%d: only servers that know RFC 8357, such as Kea, answer to another port; ISC dhcpd and dnsmasq don't", lease.ServerPort), "%s, instead of %s", came, t.relay)
	case s.To != t.relay:
		return wrong("NAT on the way rewrites it: let it leave relayed messages alone", "%s, instead of %s", came, t.relay)
	}
	all, own := pathFilter(s.Interface)
	back, err := routeTo(s.From.Addr(), relay)
	route := fmt.Sprintf("goes %s", back)
	if err != nil {
		route = "isn't there"
	}
	if strict := max(all, own) == 1; strict && (err != nil || back.iface != s.Interface) || all|own != 0 && err != nil {
		return wrong(fmt.Sprintf("sysctl -w net.ipv4.conf.%s.rp_filter=2 (and in /etc/sysctl.d), or route %s out of %s", strings.ReplaceAll(s.Interface, ".", "/"), s.From.Addr(), s.Interface),
			"%s, and the kernel's reverse path filter drops it: rp_filter is %d for all and %d for %s, and the route to %s %s", came, all, own, s.Interface, s.From.Addr(), route)
	}
	return wrong(letPass("INPUT", "raw/mangle PREROUTING", s.From, s.To), "%s, and this host's own firewall drops it", came)
}

// letPass is the advice about a firewall of this host, by the tools that it has.
// The rule may be in a chain, where another one before it helps, or elsewhere.
func letPass(chain, elsewhere string, from, to netip.AddrPort) string {
	var ways []string
	for _, tool := range []struct{ name, way string }{
		{"iptables", fmt.Sprintf("iptables-save -c | grep -E 'DROP|REJECT' counts what each rule drops: in %s, or %s. If in %[1]s: iptables -I %[1]s -p udp -s %[3]s -d %[4]s --dport %[5]d -j ACCEPT", chain, elsewhere, from.Addr(), to.Addr(), to.Port())},
		{"nft", fmt.Sprintf("nft list ruleset shows the rule that drops it: in %s, or %s; before it: ip saddr %s ip daddr %s udp dport %d accept", chain, elsewhere, from.Addr(), to.Addr(), to.Port())},
	} {
		if _, err := exec.LookPath(tool.name); err == nil {
			ways = append(ways, tool.way)
		}
	}
	return strings.Join(append([]string{fmt.Sprintf("let UDP from %s to %s pass", from.Addr(), to)}, ways...), ". ")
}

// records are the daemon's own about a way's servers.
func (p *patient) records(w *way) (records []lease.ServerStatus) {
	for _, network := range w.networks() {
		for _, s := range network.Servers {
			if w.iface != "" || s.Server == w.to.Addr() {
				records = append(records, s)
			}
		}
	}
	return records
}

func (p *patient) lastAnswer(w *way) (last time.Time) {
	for _, s := range p.records(w) {
		if s.Answered.After(last) {
			last = s.Answered
		}
	}
	return last
}

// checkRecord tells what the daemon has had of servers, where a probe doesn't
// show it: refusals, and silence to its own messages.
func (p *patient) checkRecord(w *way, answers bool) {
	told := map[netip.Addr]bool{}
	for _, s := range p.records(w) {
		if told[s.Server] {
			continue
		}
		told[s.Server] = true
		name := w.String()
		if w.iface != "" && s.Server.IsValid() {
			name = fmt.Sprintf("DHCP server %s on %s", s.Server, w.iface)
		}
		if s.NAKs > 0 {
			p.warn(fmt.Sprintf("%s has refused %s of the daemon since its start (NAK)", name, plural(int(s.NAKs), "request")),
				"oam-docker-ipam events --event nak tells whose. The server has lost its lease table, was set to other subnets, or another one on its LAN answers for what isn't its own")
		}
		if answers && s.Unanswered > 0 && time.Since(s.Silent) < recent {
			p.warn(fmt.Sprintf("%s answers now, but not the daemon's last %s, since %s", name, plural(s.Unanswered, "message"), s.Silent.Local().Format(time.DateTime)),
				"if this goes on, compare: oam-docker-ipam capture shows what passes the daemon's sockets")
		}
	}
}

// recent is how old a silence may be to tell of it.
const recent = time.Hour

// checkAgreement compares the offers of servers that may answer the same
// endpoint.
func (n *network) checkAgreement(p *patient) {
	for _, of := range n.needs {
		told := map[string]bool{}
		for _, network := range of.asked() {
			var offers []lease.Offer
			for _, t := range n.trials {
				if t.stranger() && t.subnetIs(network) && slices.Contains(of.ways, t.way) {
					offers = append(offers, t.offers...)
				}
			}
			if len(offers) < 2 {
				continue
			}
			if texts := lease.Differing(offers); texts != nil {
				text := "servers contradict each other: " + strings.Join(texts, "; ")
				if !told[text] {
					p.warn(text, "a container may get its address from any of them: make them agree about subnet mask and router, or stop the one that isn't yours")
				}
				told[text] = true
				continue
			}
			if of.options.ByBroadcast() && !told["several"] {
				told["several"] = true
				var servers []string
				for _, o := range offers {
					servers = append(servers, o.Server.String())
				}
				p.warn(fmt.Sprintf("%d DHCP servers answer on %s: %s", len(offers), of.options.Interface, strings.Join(servers, ", ")),
					"are all of them yours? ip neigh show and the switch's MAC table tell where they are. Servers of a failover pair are no fault")
			}
		}
	}
}

// asked are the networks of a need, or one nil where it has none.
func (of *need) asked() (networks []*lease.PoolStatus) {
	for i := range of.networks {
		networks = append(networks, &of.networks[i])
	}
	if networks == nil {
		networks = []*lease.PoolStatus{nil}
	}
	return networks
}

// subnetIs reports whether a trial asked for a network's addresses.
func (t *trial) subnetIs(network *lease.PoolStatus) bool {
	if network == nil || t.network == nil {
		return network == t.network
	}
	return t.network.ID == network.ID
}
