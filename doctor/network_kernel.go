package doctor

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// route is where the kernel sends packets for an address.
type route struct {
	iface   string
	source  netip.Addr // preferred
	gateway netip.Addr // zero where it is on the link
	local   bool       // the address is this host's
	down    bool       // the interface has no link
}

// String says it for people.
func (r route) String() string {
	if r.gateway.IsValid() {
		return fmt.Sprintf("via %s out of %s", r.gateway, r.iface)
	}
	return "directly out of " + r.iface
}

// next is the address to which frames for another one go.
func (r route) next(to netip.Addr) netip.Addr {
	if r.gateway.IsValid() {
		return r.gateway
	}
	return to
}

// errRejected: a route, or a rule, is there to reject what goes somewhere.
var errRejected = errors.New("its routing table rejects it")

// rejections are the kinds of such routes, by the kernel's answer.
var rejections = map[unix.Errno]string{unix.EINVAL: "blackhole", unix.EHOSTUNREACH: "unreachable", unix.EACCES: "prohibit"}

// routeTo asks the kernel for its route to an address, from another one unless
// that is zero, and where it isn't must be one of this host's that leads out of
// it. No packet is sent.
func routeTo(to, from netip.Addr) (route, error) {
	routes, err := netlink.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{SrcAddr: from.AsSlice()})
	var errno unix.Errno
	errors.As(err, &errno)
	switch {
	case rejections[errno] != "":
		return route{}, fmt.Errorf("%w: a %s route (%w)", errRejected, rejections[errno], errno)
	case errors.Is(err, unix.ENETUNREACH):
		return route{}, errors.New("this host has none (network is unreachable)")
	case err != nil:
		return route{}, fmt.Errorf("its routing table refuses: %w", err)
	case len(routes) == 0:
		return route{}, errors.New("this host has none")
	}
	got := routes[0]
	r := route{local: got.Type == unix.RTN_LOCAL, iface: fmt.Sprintf("interface %d", got.LinkIndex)}
	if i, err := net.InterfaceByIndex(got.LinkIndex); err == nil {
		r.iface, r.down = i.Name, i.Flags&net.FlagRunning == 0
	}
	r.gateway, _ = netip.AddrFromSlice(got.Gw.To4())
	r.source, _ = netip.AddrFromSlice(got.Src.To4())
	if from.IsValid() {
		r.source = from
	}
	return r, nil
}

// neighbour is what is known of a neighbour's hardware address.
type neighbour struct {
	mac  net.HardwareAddr
	dead bool // it was asked for its address (ARP) and doesn't answer
}

// neighbourAt looks an address up in an interface's neighbour table.
func neighbourAt(iface string, addr netip.Addr) (n neighbour) {
	i, err := net.InterfaceByName(iface)
	if err != nil {
		return n
	}
	// A table that can't be read tells nothing.
	table, _ := netlink.NeighList(i.Index, netlink.FAMILY_V4)
	for _, entry := range table {
		if entry.IP.Equal(addr.AsSlice()) {
			n.dead = entry.State&(netlink.NUD_FAILED|netlink.NUD_INCOMPLETE) != 0
			if entry.State&(netlink.NUD_REACHABLE|netlink.NUD_STALE|netlink.NUD_DELAY|netlink.NUD_PROBE|netlink.NUD_PERMANENT) != 0 {
				n.mac = entry.HardwareAddr
			}
		}
	}
	return n
}

const (
	pings    = 3
	pingWait = 400 * time.Millisecond // for each of them
)

// ping sends echo requests and reports whether one is answered.
func ping(ctx context.Context, from, to netip.Addr) bool {
	conn, err := icmp.ListenPacket("ip4:icmp", from.String())
	if err != nil {
		return false
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	body := &icmp.Echo{ID: rand.IntN(1 << 16), Data: []byte("oam-docker-ipam doctor")}
	buf := make([]byte, 1500)
	for body.Seq = range pings {
		// It doesn't fail: nothing in it is too large.
		request, _ := (&icmp.Message{Type: ipv4.ICMPTypeEcho, Body: body}).Marshal(nil)
		// What a firewall refuses to send now it may let through later.
		_, _ = conn.WriteTo(request, &net.IPAddr{IP: to.AsSlice()})
		if conn.SetReadDeadline(time.Now().Add(pingWait)) != nil {
			return false
		}
		for {
			n, _, err := conn.ReadFrom(buf)
			if err != nil {
				break
			}
			m, err := icmp.ParseMessage(unix.IPPROTO_ICMP, buf[:n])
			if err != nil || m.Type != ipv4.ICMPTypeEchoReply {
				continue
			}
			if echo, ok := m.Body.(*icmp.Echo); ok && echo.ID == body.ID {
				return true
			}
		}
	}
	return false
}

// pathFilter are the reverse path filters of all interfaces and of one, of which
// the larger counts: 0 off, 1 strict, 2 loose. One that can't be read isn't there.
func pathFilter(iface string) (all, own int) {
	all, _ = sysctl("net/ipv4/conf/all/rp_filter")
	own, _ = sysctl("net/ipv4/conf/" + iface + "/rp_filter")
	return all, own
}

// sysctl reads a kernel parameter that is a number, by its path.
func sysctl(name string) (int, error) {
	text, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}
