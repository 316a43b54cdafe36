package dhcp

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/krolaw/dhcp4"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

const (
	// maxServers is how many servers are told apart of those that are asked as a
	// relay agent, and of those on each interface's LAN, where anybody can call
	// itself one. The first ones have the places for good: they are labels of
	// metrics.
	maxServers = 64
	// maxNames is how many servers' names are remembered with their addresses.
	maxNames = 256
	// lateTime is how long after an exchange's end an answer still counts for
	// its server: the offers of those who lost the race come then.
	lateTime = 10 * time.Second
	// fairTime is how long an exchange must have waited until its servers count
	// as silent, and offerWait where its caller went away: in less, they need
	// not have answered. It is below the time that a lease.Client's Confirm gets.
	fairTime = 500 * time.Millisecond
	// silentAfter is how many messages in a row a silent server has left
	// unanswered. One or two may be lost, or in flight.
	silentAfter = 3
)

// servers remembers how each server answers, and tells the Observer. Whatever
// is sent and received passes here, and all is told by its time.
type servers struct {
	observer Observer

	// mu guards the rest. No Observer is called under it.
	mu sync.Mutex
	// by interface, "" for those that are asked as a relay agent, and by address:
	// that which is asked, or on a LAN the server's identifier. The zero address
	// stands for all on the LAN, and for those beyond maxServers.
	by        map[string]map[netip.Addr]*server
	inquiries map[exchangeKey]*inquiry
	names     map[string][]netip.Addr // of servers, to their addresses
}

// server is what is known of one, or by the zero address of all on a LAN.
type server struct {
	lease.ServerStatus
	asked  Asked        // the last time
	subnet netip.Prefix // that was wanted then
}

// inquiry is what an exchange has asked, kept until its servers have answered or
// lateTime has passed.
type inquiry struct {
	key      exchangeKey
	clientID []byte
	subnet   netip.Prefix
	paths    []path
	// asked has the last message to each server, guarded by servers.mu.
	asked []question
}

// question is a message to one server, or to all on a LAN, with its repetitions.
type question struct {
	server   netip.Addr
	kind     dhcp4.MessageType
	since    time.Time // when it was first sent
	sent     int       // copies that left
	answered bool
}

func newServers() *servers {
	return &servers{by: map[string]map[netip.Addr]*server{}, inquiries: map[exchangeKey]*inquiry{}, names: map[string][]netip.Addr{}}
}

// serverLocked returns a server, which it makes, and by which address it is
// known.
func (s *servers) serverLocked(iface string, addr netip.Addr) (*server, netip.Addr) {
	on := s.by[iface]
	if on == nil {
		on = map[netip.Addr]*server{}
		s.by[iface] = on
	}
	if on[addr] == nil && len(on) >= maxServers {
		addr = netip.Addr{}
	}
	if on[addr] == nil {
		on[addr] = &server{ServerStatus: lease.ServerStatus{Server: addr}}
	}
	return on[addr], addr
}

// begin takes in an inquiry, until end.
func (s *servers) begin(q *inquiry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inquiries[q.key] = q
}

// end forgets an inquiry as soon as no answer can come any more.
func (s *servers) end(q *inquiry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.ContainsFunc(q.asked, func(a question) bool { return !a.answered }) {
		delete(s.inquiries, q.key)
		return
	}
	time.AfterFunc(lateTime, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.inquiries, q.key)
	})
}

// ask counts a message that has an answer. It comes before its sending: the
// answer may be there before that returns.
func (s *servers) ask(q *inquiry, kind dhcp4.MessageType, p path) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	to, _ := s.serverLocked(p.link.iface, p.to.Addr())
	if to.Unanswered == 0 {
		to.Silent = now
	}
	to.Unanswered++
	to.asked, to.subnet = Asked{Interface: p.link.iface, Server: p.to, Relay: p.link.relay}, q.subnet
	a := q.to(p.to.Addr())
	if a.kind != kind {
		*a = question{server: p.to.Addr(), kind: kind, since: now}
	}
	a.sent++
}

// unsent takes back a message that could not be sent: that isn't its server's
// silence.
func (s *servers) unsent(q *inquiry, p path) {
	s.mu.Lock()
	defer s.mu.Unlock()
	q.to(p.to.Addr()).sent--
	to, _ := s.serverLocked(p.link.iface, p.to.Addr())
	if to.Unanswered = max(0, to.Unanswered-1); to.Unanswered == 0 {
		to.Silent = time.Time{}
	}
}

// to is the message to a server, which it makes.
func (q *inquiry) to(server netip.Addr) *question {
	i := slices.IndexFunc(q.asked, func(a question) bool { return a.server == server })
	if i < 0 {
		i, q.asked = len(q.asked), append(q.asked, question{server: server})
	}
	return &q.asked[i]
}

// since is when a message was first sent to a server, or to all.
func (q *inquiry) since(server netip.Addr) time.Time {
	i := slices.IndexFunc(q.asked, func(a question) bool { return a.server == server })
	return q.asked[max(i, 0)].since
}

// heard counts a reply as its server's answer, whether its exchange still waits
// for it or not.
func (s *servers) heard(l *Link, r reply) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	q := s.inquiries[exchangeKey{r.xid, r.mac}]
	if q == nil || len(q.asked) == 0 || !slices.ContainsFunc(q.paths, func(p path) bool { return p.link == l }) {
		return
	}
	if echo, ok := r.options[byte(dhcp4.OptionClientIdentifier)]; ok && !bytes.Equal(echo, q.clientID) {
		return
	}
	addr := via(r, q.paths).to.Addr()
	if !addr.IsValid() {
		// A NAK that doesn't say whose it is.
		return
	}
	by, _ := s.serverLocked(l.iface, addr)
	by.Answered, by.Took = now, now.Sub(q.since(addr))
	by.heard()
	known := false
	for i := range q.asked {
		a := &q.asked[i]
		switch {
		case a.server == addr:
			a.answered, known = true, true
		case !a.server.IsValid():
			// One of all has answered, and others still may.
			all, _ := s.serverLocked(l.iface, a.server)
			all.heard()
		}
	}
	if known || l.broadcast() {
		return
	}
	// A server that is asked by another address than those from which it
	// speaks. Which one of them it is can't be told, so none is silent.
	for _, p := range q.paths {
		if p.link == l {
			by, _ := s.serverLocked(l.iface, p.to.Addr())
			by.heard()
		}
	}
}

// heard ends a silence.
func (s *server) heard() { s.Unanswered, s.Silent = 0, time.Time{} }

// take reports what came of a message: the reply that its exchange took or
// refused.
func (s *servers) take(q *inquiry, kind dhcp4.MessageType, r reply, outcome string) {
	to := via(r, q.paths)
	s.mu.Lock()
	by, addr := s.serverLocked(to.link.iface, to.to.Addr())
	switch outcome {
	case OutcomeOffer:
		by.Offers++
	case OutcomeACK:
		by.ACKs++
	case OutcomeNAK:
		by.NAKs++
	}
	since := q.since(to.to.Addr())
	s.mu.Unlock()
	s.report(kind, addr, outcome, time.Since(since))
}

// unanswered reports a message that ended without a reply, for each server that
// was asked.
func (s *servers) unanswered(ctx context.Context, q *inquiry, kind dhcp4.MessageType) {
	enough := fairTime
	if errors.Is(ctx.Err(), context.Canceled) {
		enough = offerWait
	}
	type end struct {
		server  netip.Addr
		outcome string
		took    time.Duration
	}
	var ends []end
	s.mu.Lock()
	for _, a := range q.asked {
		e := end{outcome: OutcomeSilent, took: time.Since(a.since)}
		switch {
		case a.kind != kind:
			continue
		case a.sent == 0:
			e.outcome = OutcomeFailed
		case e.took < enough:
			continue
		}
		_, e.server = s.serverLocked(q.paths[0].link.iface, a.server)
		ends = append(ends, e)
	}
	s.mu.Unlock()
	for _, e := range ends {
		s.report(kind, e.server, e.outcome, e.took)
	}
}

// farewell reports a message without an answer.
func (s *servers) farewell(kind dhcp4.MessageType, p path, began time.Time, err error) {
	outcome := OutcomeSent
	if err != nil {
		outcome = OutcomeFailed
	}
	s.report(kind, s.known(p.link.iface, p.to.Addr()), outcome, time.Since(began))
}

// known is the address by which a server is known.
func (s *servers) known(iface string, addr netip.Addr) netip.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, addr = s.serverLocked(iface, addr)
	return addr
}

// report tells the Observer.
func (s *servers) report(kind dhcp4.MessageType, server netip.Addr, outcome string, took time.Duration) {
	if s.observer != nil {
		s.observer.Exchanged(messageTypes[kind], server, outcome, took)
	}
}

// name remembers to which addresses a server's name was resolved.
func (s *servers) name(host string, addrs []netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.names[host]; !known && len(s.names) >= maxNames {
		for other := range s.names {
			delete(s.names, other)
			break
		}
	}
	s.names[host] = slices.Clone(addrs[:min(len(addrs), maxServers)])
}

// addrs are the addresses of servers that are asked as a relay agent: of a name
// those that it last had.
func (s *servers) addrs(of []lease.Server) (addrs []netip.AddrPort) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, server := range of {
		known := s.names[server.Host]
		if addr, err := netip.ParseAddr(server.Host); err == nil {
			known = []netip.Addr{addr}
		}
		for _, addr := range known {
			addrs = append(addrs, netip.AddrPortFrom(addr, server.Port))
		}
	}
	return addrs
}

// statuses are those of the servers that settings name.
func (s *servers) statuses(options lease.Options) (all []lease.ServerStatus) {
	if options.ByBroadcast() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for addr, server := range s.by[options.Interface] {
			// Where others have answered, that nobody is silent to all is nothing
			// to tell.
			if addr.IsValid() || len(s.by[options.Interface]) == 1 || server.Unanswered > 0 || !server.Answered.IsZero() {
				all = append(all, server.ServerStatus)
			}
		}
		slices.SortFunc(all, func(a, b lease.ServerStatus) int { return a.Server.Compare(b.Server) })
		return all
	}
	addrs := s.addrs(options.Servers)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, to := range addrs {
		if slices.ContainsFunc(all, func(other lease.ServerStatus) bool { return other.Server == to.Addr() }) {
			continue
		}
		status := lease.ServerStatus{Server: to.Addr()}
		if known := s.by[""][to.Addr()]; known != nil {
			status = known.ServerStatus
		}
		all = append(all, status)
	}
	return all
}

// silence is that of the servers that settings name, of all where they name
// none: nil unless one of them has been silent for longer than a time and none
// answers.
func (s *servers) silence(options lease.Options, longer time.Duration) *Silence {
	addrs := s.addrs(options.Servers)
	s.mu.Lock()
	defer s.mu.Unlock()
	var silent []*server
	for iface, on := range s.by {
		if options.ByBroadcast() && iface != options.Interface {
			continue
		}
		all := on[netip.Addr{}]
		for addr, one := range on {
			asked := options.ByBroadcast() || len(options.Servers) == 0 ||
				iface == "" && slices.ContainsFunc(addrs, func(to netip.AddrPort) bool { return to.Addr() == addr })
			switch {
			case !asked:
			case one.silent(longer):
				silent = append(silent, one)
			case one.Answered.IsZero():
				// It was hardly asked yet, which tells nothing.
			case all != nil && all.silent(longer) && one.Answered.Before(all.Silent):
				// It has heard what goes to all.
			default:
				return nil
			}
		}
	}
	if len(silent) == 0 {
		return nil
	}
	slices.SortFunc(silent, func(a, b *server) int {
		return cmp.Or(cmp.Compare(a.asked.Interface, b.asked.Interface), a.Server.Compare(b.Server))
	})
	why := &Silence{Subnet: silent[0].subnet}
	for i, one := range silent {
		if within := time.Since(one.Silent); i == 0 || within < why.Within {
			why.Within = within
		}
		why.Asked = append(why.Asked, one.asked)
	}
	return why
}

// silent reports whether a server hasn't answered for longer than a time.
func (s *server) silent(longer time.Duration) bool {
	return s.Unanswered >= silentAfter && time.Since(s.Silent) > longer
}
