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

// path is one way to one server.
type path struct {
	link *Link
	to   netip.AddrPort
}

// ErrSecondCopy: another daemon of ours already serves a relay address. It
// would take half of the answers.
var ErrSecondCopy = errors.New("another oam-docker-ipam already serves relay address")

// resolveTime is how long a server's name may take when another server is
// known already: a dead resolver must not take the time of a good server.
const resolveTime = 2 * time.Second

// paths finds the ways to all servers of a pool, opening links where needed.
// Servers that can't be reached are an error only when none remains.
func (c *Client) paths(ctx context.Context, options lease.Options) ([]path, error) {
	options = options.Or(c.global)
	if len(options.Servers) == 0 {
		return nil, errors.New("no DHCP server is configured: set DHCP_SERVER in /etc/oam-docker-ipam.conf or with --dhcp-server, or create the network with --ipam-opt dhcp_server=ADDRESS")
	}
	var paths []path
	var failed []error
	add := func(addr netip.Addr, port uint16) {
		p, err := c.path(options.Relay, netip.AddrPortFrom(addr, port))
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

// path finds the way to one server: from the relay address, or where that is
// unspecified from the source address that the host's routing chooses.
func (c *Client) path(relay netip.Addr, to netip.AddrPort) (path, error) {
	if !fixed(relay) {
		var err error
		if relay, err = c.source(to); err != nil {
			return path{}, fmt.Errorf("find the relay address towards DHCP server %s: %w", to.Addr(), err)
		}
	}
	if relay == to.Addr() {
		return path{}, fmt.Errorf("DHCP server %s is the relay address itself: this daemon's socket would swallow what is meant for the server; give the daemon another address of this host with LISTEN_ADDR or --ipam-opt listen_addr=", to.Addr())
	}
	link, err := c.link(relay)
	return path{link, to}, err
}

// link returns the link of a relay address, opening it at its first use. All
// pools share it. What fails is tried again with the next request: addresses
// come and ports become free.
func (c *Client) link(relay netip.Addr) (*Link, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.links[relay]; l != nil {
		return l, nil
	}
	conn, lock, err := c.open(relay)
	if err != nil {
		return nil, err
	}
	c.log.Info("relay address opened", "relay", relay)
	l := startLink(relay, conn, lock, &c.drops, c.log)
	c.links[relay] = l
	return l, nil
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

// hardwareOf is the MAC of the interface that has a relay address.
func hardwareOf(relay netip.Addr) (lease.MAC, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return lease.MAC{}, fmt.Errorf("list the network interfaces: %w", err)
	}
	for _, i := range interfaces {
		// One that goes meanwhile has no addresses.
		addrs, _ := i.Addrs()
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); !ok || !n.IP.Equal(relay.AsSlice()) {
				continue
			}
			if len(i.HardwareAddr) != len(lease.MAC{}) {
				return lease.MAC{}, fmt.Errorf("interface %s of relay address %s has no MAC address", i.Name, relay)
			}
			return lease.MAC(i.HardwareAddr), nil
		}
	}
	return lease.MAC{}, explainBind(relay, unix.EADDRNOTAVAIL)
}

// replyBuffer is what a relay address's socket holds in bytes until it is read.
// The kernel's usual 208 KiB lost 330 of 1500 ACKs to renewals that came due
// within half a second, on one processor.
const replyBuffer = 4 << 20

// openRelay binds port 67 of a relay address, never the wildcard, and locks
// the address against a second copy of this daemon. SO_REUSEADDR lets us live
// beside a dnsmasq, dhcpd or dhcrelay on other addresses of the host in either
// start order; it would also let two of us bind, hence the lock.
func openRelay(relay netip.Addr) (net.PacketConn, func(), error) {
	port := netip.AddrPortFrom(relay, lease.ServerPort)
	lock, err := net.Listen("unix", "@oam-docker-ipam/"+port.String())
	if err != nil {
		if errors.Is(err, unix.EADDRINUSE) {
			return nil, nil, fmt.Errorf("%w %s: stop it, or give this one another LISTEN_ADDR", ErrSecondCopy, relay)
		}
		return nil, nil, fmt.Errorf("lock relay address %s: %w", relay, err)
	}
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var set error
		err := raw.Control(func(fd uintptr) {
			set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, replyBuffer) != nil {
				// Without CAP_NET_ADMIN it is what net.core.rmem_max allows.
				_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, replyBuffer)
			}
		})
		return errors.Join(err, set)
	}}
	conn, err := config.ListenPacket(context.Background(), "udp4", port.String())
	if err != nil {
		lock.Close()
		return nil, nil, explainBind(relay, err)
	}
	return conn, func() { lock.Close() }, nil
}

// explainBind says what to do about a relay address that can't be bound.
func explainBind(relay netip.Addr, err error) error {
	switch {
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("relay address %s is not an address of this host (it has %s): correct LISTEN_ADDR or listen_addr, or bring the address up", relay, strings.Join(hostAddrs(), ", "))
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("UDP port 67 of relay address %s is taken by %s: stop it, let it bind other addresses only (dnsmasq: bind-interfaces), or give this daemon another LISTEN_ADDR", relay, portHolder(relay, lease.ServerPort))
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("UDP port 67 of relay address %s may not be bound: run the daemon as root or with CAP_NET_BIND_SERVICE", relay)
	}
	return fmt.Errorf("bind relay address %s: %w", relay, err)
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
