package dhcp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// path is one way to one server, or by broadcast to all of an interface's LAN.
type path struct {
	link *Link
	// to is the server; on a broadcast link the one that is meant, if any.
	to netip.AddrPort
	// station is who gets the frames on a broadcast link, all where it is
	// zero.
	station lease.MAC
}

// ErrSecondCopy: another daemon of ours already serves a relay address. It
// would take half of the answers.
var ErrSecondCopy = errors.New("another oam-docker-ipam already serves")

// resolveTime is how long a server's name may take when another server is
// known already: a dead resolver must not take the time of a good server.
const resolveTime = 2 * time.Second

// paths finds the ways to all servers of the options in force for a pool,
// opening links where needed. Servers that can't be reached are an error only
// when none remains.
func (c *Client) paths(ctx context.Context, options lease.Options) ([]path, error) {
	if options.ByBroadcast() {
		link, err := c.link(place{iface: options.Interface})
		return []path{{link: link}}, err
	}
	if len(options.Servers) == 0 {
		return nil, errors.New("no DHCP server is configured, and no interface to ask by broadcast: to ask as a relay agent set DHCP_SERVER in /etc/oam-docker-ipam.conf or with --dhcp-server, or create the network with --ipam-opt dhcp_server=ADDRESS; to ask by broadcast set DHCP_INTERFACE or --dhcp-interface, or create it with --ipam-opt dhcp_interface=eth0")
	}
	var paths []path
	var failed []error
	add := func(addr netip.Addr, port uint16) {
		p, err := c.path(options, netip.AddrPortFrom(addr, port))
		if err != nil {
			failed = append(failed, err)
		} else if !slices.Contains(paths, p) {
			paths = append(paths, p)
		}
	}
	var names []lease.Server
	for _, server := range options.Servers {
		if addr, err := netip.ParseAddr(server.Host); err == nil {
			add(addr, server.Port)
		} else {
			names = append(names, server)
		}
	}
	if len(names) > 0 {
		for _, found := range c.resolveAll(ctx, names, len(paths) > 0) {
			if found.err != nil {
				failed = append(failed, fmt.Errorf("resolve DHCP server %s: %w", found.server, found.err))
			} else {
				c.servers.name(found.server.Host, found.addrs)
			}
			for _, addr := range found.addrs {
				add(addr, found.server.Port)
			}
		}
	}
	if len(paths) == 0 {
		err := failed[0]
		for _, another := range failed[1:] {
			err = fmt.Errorf("%w; %w", err, another)
		}
		return nil, err
	}
	for _, err := range failed {
		c.log.Warn("DHCP server left out", "error", err)
	}
	return paths, nil
}

// resolved is what a server's name stands for.
type resolved struct {
	server lease.Server
	addrs  []netip.Addr
	err    error
}

// resolveAll resolves names at the same time, until ctx ends. Once one server
// is known, as known says or by its name, the others have resolveTime.
func (c *Client) resolveAll(ctx context.Context, names []lease.Server, known bool) []resolved {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan resolved, len(names))
	for _, server := range names {
		go func() {
			addrs, err := c.resolve(ctx, server.Host)
			answers <- resolved{server, addrs, err}
		}()
	}
	var patience <-chan time.Time
	var all []resolved
	for len(all) < len(names) {
		if known && patience == nil {
			patience = time.After(resolveTime)
		}
		select {
		case answer := <-answers:
			all = append(all, answer)
			known = known || len(answer.addrs) > 0
		case <-patience:
			// The rest now answer that they were cancelled.
			cancel()
			patience, known = nil, false
		}
	}
	return all
}

// fixed reports whether a relay address is configured rather than left to the
// host's routing.
func fixed(relay netip.Addr) bool { return relay.IsValid() && !relay.IsUnspecified() }

// path finds the way to one server of a relay agent's.
func (c *Client) path(options lease.Options, to netip.AddrPort) (path, error) {
	at, err := c.placeTowards(options, to)
	if err != nil {
		return path{}, err
	}
	link, err := c.link(at)
	return path{link: link, to: to}, err
}

// placeTowards is where a server is asked from as a relay agent: the relay
// address, or where that is unspecified the source address that the host's
// routing chooses.
func (c *Client) placeTowards(options lease.Options, to netip.AddrPort) (place, error) {
	relay := options.Relay
	if !fixed(relay) {
		var err error
		if relay, err = c.source(to); err != nil {
			return place{}, fmt.Errorf("find the relay address towards DHCP server %s: %w", to.Addr(), err)
		}
	}
	at := place{relay: netip.AddrPortFrom(relay, options.RelayPort)}
	if at.relay == to {
		return place{}, fmt.Errorf("DHCP server %s is the relay address itself: this daemon's socket would swallow what is meant for the server; give the daemon another address of this host with LISTEN_ADDR or --ipam-opt listen_addr=", to.Addr())
	}
	return at, nil
}

// placesOf are those that global settings name, as far as names are resolved by
// now, and why others can't be told.
func (c *Client) placesOf(global lease.Options) (places []place, errs []error) {
	switch {
	case global.ByBroadcast():
		return []place{{iface: global.Interface}}, nil
	case fixed(global.Relay):
		return []place{{relay: netip.AddrPortFrom(global.Relay, global.RelayPort)}}, nil
	}
	for _, to := range c.servers.addrs(global.Servers) {
		at, err := c.placeTowards(global, to)
		switch {
		case err != nil:
			errs = append(errs, err)
		case !slices.Contains(places, at):
			places = append(places, at)
		}
	}
	return places, errs
}

// link returns the link of a place, opening it at its first use. All pools
// share it. What fails is tried again with the next request: addresses and
// interfaces come and ports become free.
func (c *Client) link(at place) (*Link, error) {
	c.mu.Lock()
	l := c.links[at]
	if l == nil {
		open := c.openRelay
		if at.broadcast() {
			open = c.openBroadcast
		}
		l = newLink(at, open, &c.drops, &c.recorder, c.log)
		l.heard = c.servers.heard
		c.links[at] = l
	}
	c.mu.Unlock()
	_, err := l.ready()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unopened[at] = err
	return l, err
}

// look returns nil where a place's link is open and something could be sent
// there, without opening it or waiting for who does.
func (c *Client) look(at place) error {
	c.mu.Lock()
	l, err := c.links[at], c.unopened[at]
	c.mu.Unlock()
	var r *reader
	if l != nil {
		r = l.reader.Load()
	}
	switch {
	case r == nil && err != nil:
		return fmt.Errorf("%s is not open, which the next request tries again: %w", at, err)
	case r == nil:
		return fmt.Errorf("%s is not open yet", at)
	case r.stale != nil && r.stale():
		return fmt.Errorf("%s is gone or another one by now: the next request opens it anew", at)
	case r.socket.hardware == nil:
		return nil
	}
	if _, err := r.socket.hardware(); err != nil {
		return fmt.Errorf("ask on %s: %w", at, err)
	}
	return nil
}

// resolveHost returns the IPv4 addresses of a name.
func resolveHost(ctx context.Context, host string) ([]netip.Addr, error) {
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip4", host)
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	return addrs, err
}

// sourceTowards asks the host's routing which source address it uses towards a
// server. No packet is sent.
func sourceTowards(to netip.AddrPort) (netip.Addr, error) {
	conn, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		if errors.Is(err, unix.ENETUNREACH) {
			return netip.Addr{}, errors.New("this host has no route to it")
		}
		return netip.Addr{}, err
	}
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
}

// replyBuffer is what a relay address's socket holds in bytes until it is read.
// The kernel's usual 208 KiB lost 330 of 1500 ACKs to renewals that came due
// within half a second, on one processor.
const replyBuffer = 4 << 20

// enlargeBuffer gives a socket its replyBuffer, as far as it may have it.
func enlargeBuffer(fd uintptr) {
	if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, replyBuffer) != nil {
		// Without CAP_NET_ADMIN it is what net.core.rmem_max allows.
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, replyBuffer)
	}
}

// relaySockets opens the sockets of relay addresses. SO_REUSEADDR lets us live
// beside a dnsmasq, dhcpd or dhcrelay on other addresses of the host in either
// start order.
var relaySockets = net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
	var set error
	err := raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		enlargeBuffer(fd)
	})
	return errors.Join(err, set)
}}

// openRelay binds a relay address and port, never the wildcard, and locks it
// against a second copy of this daemon, which SO_REUSEADDR would also let in.
// Where somebody else has the port, as a dnsmasq that binds the wildcard, a raw
// socket is opened beside it.
func openRelay(at place) (s socket, err error) {
	lock, err := net.Listen("unix", LockName(at.relay))
	if err != nil {
		if errors.Is(err, unix.EADDRINUSE) {
			return socket{}, fmt.Errorf("%w %s: stop it, or give this one another LISTEN_ADDR", ErrSecondCopy, at)
		}
		return socket{}, fmt.Errorf("lock %s: %w", at, err)
	}
	s.unlock = func() { lock.Close() }
	s.PacketConn, err = relaySockets.ListenPacket(context.Background(), "udp4", at.relay.String())
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		s.holder = portHolder(at.relay.Addr(), at.relay.Port())
		if s.PacketConn, err = listenRaw(at.relay); err != nil {
			err = explainTaken(at.relay, s.holder, err)
		}
	case err != nil:
		err = explainBind(at.relay, err)
	}
	if err != nil {
		lock.Close()
		return socket{}, err
	}
	return s, nil
}

// openBeside opens a relay address and port whoever has it, this daemon
// included.
func openBeside(at place) (socket, error) {
	conn, err := listenRaw(at.relay)
	if err != nil {
		return socket{}, explainBind(at.relay, err)
	}
	return socket{PacketConn: conn}, nil
}

// explainTaken says what to do about a port that holder has, where no raw socket
// can be opened beside it.
func explainTaken(at netip.AddrPort, holder string, err error) error {
	return fmt.Errorf("UDP port %d of relay address %s is taken by %s, and beside it no raw socket can be opened: %w: stop it, let it bind other addresses only (dnsmasq: bind-interfaces), give this daemon another LISTEN_ADDR, or let it work beside that program, which %s",
		at.Port(), at.Addr(), holder, err, lease.NeedsNetRaw)
}

// explainBind says what to do about a relay address that can't be bound.
func explainBind(at netip.AddrPort, err error) error {
	relay := at.Addr()
	switch {
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("relay address %s is not an address of this host (it has %s): correct LISTEN_ADDR or listen_addr, or bring the address up", relay, strings.Join(hostAddrs(), ", "))
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("UDP port %d of relay address %s may not be bound: run as root or with CAP_NET_BIND_SERVICE, which the package's unit has (systemctl cat oam-docker-ipam shows what takes it away)", at.Port(), relay)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("a raw socket on relay address %s may not be opened: run as root or with CAP_NET_RAW", relay)
	}
	return fmt.Errorf("bind relay address %s: %w", at, err)
}

// hostAddrs lists the host's IPv4 addresses for an error message.
func hostAddrs() []string {
	var texts []string
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return []string{err.Error()}
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && !p.Addr().IsLoopback() {
			texts = append(texts, p.Addr().String())
		}
	}
	if len(texts) == 0 {
		return []string{"none"}
	}
	return texts
}
