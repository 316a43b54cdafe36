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
	// maxServers is how many servers are remembered of those that are asked as a
	// relay agent, and of those on each interface's LAN, where anybody can call
	// itself one: the last ones that were asked or, on a LAN, heard.
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
	// stands for all on the LAN.
	by        map[string]map[netip.Addr]*server
	inquiries map[exchangeKey]*inquiry
	names     map[string][]netip.Addr // of servers, to their addresses
}

// server is what is known of one, or by the zero address of all on a LAN.
type server struct {
	lease.ServerStatus
	asked  Asked        // the last time
	subnet netip.Prefix // that was wanted then
	used   time.Time    // when it was asked or heard last
	// last is when the last message left, and waited until when an answer was
	// awaited that didn't come.
	last, waited time.Time
	// failed is why the last message could not be sent, nil once one left or an
	// answer came.
	failed error
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

// useLocked returns a server, which it makes, in place of the one that wasn't of
// use for longest where there are too many.
func (s *servers) useLocked(iface string, addr netip.Addr) *server {
	on := s.by[iface]
	if on == nil {
		on = map[netip.Addr]*server{}
		s.by[iface] = on
	}
	one := on[addr]
	if one == nil {
		if len(on) >= maxServers {
			delete(on, idlest(on))
		}
		one = &server{ServerStatus: lease.ServerStatus{Server: addr}}
		on[addr] = one
	}
	one.used = time.Now()
	return one
}

// idlest is the server that was asked or heard longest ago, never all on a LAN.
func idlest(on map[netip.Addr]*server) (addr netip.Addr) {
	for other, one := range on {
		if other.IsValid() && (!addr.IsValid() || one.used.Before(on[addr].used)) {
			addr = other
		}
	}
	return addr
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
	awaited := false
	for _, a := range q.asked {
		if a.answered {
			continue
		}
		awaited = true
		if one := s.by[q.iface()][a.server]; one != nil {
			one.waited = time.Now()
		}
	}
	if !awaited {
		delete(s.inquiries, q.key)
		return
	}
	time.AfterFunc(lateTime, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.inquiries, q.key)
	})
}

// ask counts a message that has an answer. It comes before its sending, whose
// answer may be there before that returns; sent must follow.
func (s *servers) ask(q *inquiry, kind dhcp4.MessageType, p path) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	to := s.useLocked(p.link.iface, p.to.Addr())
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

// sent says how the sending of a message ended, nil where it left. What didn't
// is no silence of its server's.
func (s *servers) sent(q *inquiry, p path, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	to := s.useLocked(p.link.iface, p.to.Addr())
	to.failed = err
	if err == nil {
		to.last = time.Now()
		return
	}
	q.to(p.to.Addr()).sent--
	if to.Unanswered = max(0, to.Unanswered-1); to.Unanswered == 0 {
		to.Silent = time.Time{}
	}
}

// iface is where an inquiry asks by broadcast, "" as a relay agent.
func (q *inquiry) iface() string { return q.paths[0].link.iface }

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
	by := s.by[l.iface][addr]
	if l.broadcast() {
		by = s.useLocked(l.iface, addr)
		// Whatever one of all answers, not all are silent.
		s.by[l.iface][netip.Addr{}].speaks()
	}
	if by != nil {
		by.Answered, by.Took = now, now.Sub(q.since(addr))
		by.speaks()
	}
	known := false
	for i := range q.asked {
		if a := &q.asked[i]; a.server == addr {
			a.answered, known = true, true
		}
	}
	if known || l.broadcast() {
		return
	}
	// A server that is asked by another address than those from which it
	// speaks. Which one of them it is can't be told, so none is silent.
	for _, p := range q.paths {
		if p.link == l {
			s.by[l.iface][p.to.Addr()].speaks()
		}
	}
}

// speaks ends the silence of a server, if it is known.
func (s *server) speaks() {
	if s != nil {
		s.Unanswered, s.Silent, s.failed = 0, time.Time{}, nil
	}
}

// moved ends the silence of all that were asked as a relay agent: that they
// didn't answer to another relay address tells nothing any more.
func (s *servers) moved() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, one := range s.by[""] {
		one.speaks()
	}
}

// take reports what came of a message: the reply that its exchange took or
// refused. As a relay agent, a server that is known by none of the addresses that
// are asked has none: anybody can make up others.
func (s *servers) take(q *inquiry, kind dhcp4.MessageType, r reply, outcome string) {
	to := via(r, q.paths)
	addr := to.to.Addr()
	s.mu.Lock()
	since := q.since(addr)
	by := s.by[q.iface()][addr]
	switch {
	case by == nil:
		if !to.link.broadcast() {
			addr = netip.Addr{}
		}
	case outcome == OutcomeOffer:
		by.Offers++
	case outcome == OutcomeACK:
		by.ACKs++
	case outcome == OutcomeNAK:
		by.NAKs++
	}
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
		e := end{a.server, OutcomeSilent, time.Since(a.since)}
		switch {
		case a.kind != kind:
			continue
		case a.sent == 0:
			e.outcome = OutcomeFailed
		case e.took < enough:
			continue
		}
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
	s.report(kind, p.to.Addr(), outcome, time.Since(began))
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
			if addr.IsValid() || len(s.by[options.Interface]) == 1 || server.Unanswered > 0 {
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

// mute are the servers that settings name, of all where they name none, that
// have been silent for longer than a time or can't be sent to: none where another
// one answers.
func (s *servers) mute(options lease.Options, longer time.Duration) (mute []server) {
	addrs := s.addrs(options.Servers)
	s.mu.Lock()
	defer s.mu.Unlock()
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
			case one.mute(longer):
				mute = append(mute, *one)
			case one.Answered.IsZero():
				// It was hardly asked yet, which tells nothing.
			case all != nil && all.mute(longer):
				// It is one of all, and hasn't answered since either.
			default:
				return nil
			}
		}
	}
	slices.SortFunc(mute, func(a, b server) int {
		return cmp.Or(cmp.Compare(a.asked.Interface, b.asked.Interface), a.Server.Compare(b.Server))
	})
	return mute
}

// mute reports whether a server hasn't answered for longer than a time, or
// can't be sent to.
func (s *server) mute(longer time.Duration) bool {
	return s.failed != nil || s.Unanswered >= silentAfter && time.Since(s.Silent) > longer
}

// silence says why none of the servers answers that settings name, of all where
// they name none, nil where that isn't known of any: a *Silence, or why nothing
// can be sent to those.
func (s *servers) silence(options lease.Options, longer time.Duration) error {
	why := &Silence{}
	for _, one := range s.mute(options, longer) {
		if one.failed != nil {
			why.Failed = cmp.Or(why.Failed, one.failed)
			continue
		}
		why.Asked = append(why.Asked, one.asked)
		if one.Silent.Before(why.First) {
			// The others have been so for less.
			continue
		}
		end := one.waited
		if end.Before(one.last) {
			// It may yet answer.
			end = time.Now()
		}
		why.Subnet, why.Within = one.subnet, end.Sub(one.Silent)
		why.Messages, why.First, why.Last = one.Unanswered, one.Silent, one.last
	}
	if len(why.Asked) == 0 {
		return why.Failed
	}
	return why
}
