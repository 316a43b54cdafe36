package dhcp

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

var errNoRoute = errors.New("no route")

// What a network's own options say beats the global settings, each by itself.
func TestPathsOfPool(t *testing.T) {
	global := lease.Options{Servers: []lease.Server{{Host: "10.10.0.1", Port: 67}}, Relay: netip.IPv4Unspecified()}
	for _, c := range []struct {
		name  string
		pool  lease.Options
		relay string
		to    string
	}{
		{"global", lease.Options{}, "10.10.0.2", "10.10.0.1:67"},
		{"own server", lease.Options{Servers: []lease.Server{{Host: "10.11.0.1", Port: 1067}}}, "10.10.0.2", "10.11.0.1:1067"},
		{"own relay", lease.Options{Relay: ip("10.10.0.3")}, "10.10.0.3", "10.10.0.1:67"},
		{"own relay 0.0.0.0", lease.Options{Relay: netip.IPv4Unspecified()}, "10.10.0.2", "10.10.0.1:67"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				client := l.client()
				client.global.Store(&global)
				paths, err := client.paths(t.Context(), client.inForce(c.pool))
				if err != nil || len(paths) != 1 {
					t.Fatalf("paths %v, %v", paths, err)
				}
				if got := paths[0]; got.link.giaddr() != ip(c.relay) || got.to.String() != c.to {
					t.Errorf("from %s to %s, want %s to %s", got.link.relay, got.to, c.relay, c.to)
				}
			})
		})
	}
}

// Names are resolved for each exchange; what can't be is left out as long as
// another server remains.
func TestPathsByName(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client()
		names := map[string][]netip.Addr{"dhcp.example.org": {server1.Addr(), server2.Addr()}, "alias": {server1.Addr()}}
		c.resolve = func(_ context.Context, host string) ([]netip.Addr, error) {
			if addrs := names[host]; addrs != nil {
				return addrs, nil
			}
			return nil, fmt.Errorf("no such host %s", host)
		}
		servers := func(hosts ...string) lease.Options {
			var o lease.Options
			for _, h := range hosts {
				o.Servers = append(o.Servers, lease.Server{Host: h, Port: 67})
			}
			return o
		}
		to := func(o lease.Options) ([]string, error) {
			paths, err := c.paths(t.Context(), c.inForce(o))
			var to []string
			for _, p := range paths {
				to = append(to, p.to.Addr().String())
			}
			return to, err
		}
		if got, err := to(servers("dhcp.example.org", "alias")); err != nil || !slices.Equal(got, []string{"10.10.0.1", "10.11.0.1"}) {
			t.Errorf("paths to %v, %v: want each server once", got, err)
		}
		if got, err := to(servers("missing", "alias")); err != nil || !slices.Equal(got, []string{"10.10.0.1"}) {
			t.Errorf("paths to %v, %v", got, err)
		}
		_, err := to(servers("missing", "lost"))
		if err == nil {
			t.Fatal("no error without any server")
		}
		for _, name := range []string{"missing", "lost"} {
			if !containsAll(err.Error(), "resolve DHCP server "+name, "no such host "+name) {
				t.Errorf("error %q doesn't tell of %s", err, name)
			}
		}
		names["missing"] = names["alias"]
		if got, err := to(servers("missing")); err != nil || len(got) != 1 {
			t.Errorf("paths to %v, %v once the name resolves", got, err)
		}
	})
}

// A resolver that doesn't answer takes all the time there is only where no
// other server is known.
func TestDeadResolver(t *testing.T) {
	for name, c := range map[string]struct {
		hosts []string
		takes time.Duration
		paths int
	}{
		"beside an address":     {[]string{"dead.example.org", "10.10.0.1"}, resolveTime, 1},
		"beside another name":   {[]string{"dead.example.org", "slow.example.org"}, time.Second + resolveTime, 1},
		"beside one as slow":    {[]string{"slow.example.org", "slower.example.org"}, 2 * time.Second, 2},
		"two, and nothing else": {[]string{"dead.example.org", "dead.example.net"}, 30 * time.Second, 0},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				client := l.client()
				client.resolve = func(ctx context.Context, host string) ([]netip.Addr, error) {
					switch host {
					case "slow.example.org":
						time.Sleep(time.Second)
						return []netip.Addr{server1.Addr()}, nil
					case "slower.example.org":
						time.Sleep(2 * time.Second)
						return []netip.Addr{server2.Addr()}, nil
					}
					<-ctx.Done()
					return nil, ctx.Err()
				}
				var o lease.Options
				for _, host := range c.hosts {
					o.Servers = append(o.Servers, lease.Server{Host: host, Port: 67})
				}
				began := time.Now()
				paths, err := client.paths(within(t, 30*time.Second), client.inForce(o))
				if took := time.Since(began); took != c.takes || len(paths) != c.paths || (err == nil) != (c.paths > 0) {
					t.Errorf("%d paths after %v, %v; want %d after %v", len(paths), took, err, c.paths, c.takes)
				}
			})
		})
	}
}

// A server that is the relay address itself would never hear us.
func TestServerIsRelay(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client(netip.AddrPortFrom(relay1, 67))
		_, err := c.Acquire(within(t, usual), want(home, mac1))
		checkError(t, err, "10.10.0.2 is the relay address itself", "LISTEN_ADDR", "listen_addr=")
		if len(l.conns) != 0 {
			t.Error("the port was opened")
		}
	})
}

func TestNoRoute(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		c := l.client(server1, server2)
		c.source = func(to netip.AddrPort) (netip.Addr, error) {
			if to == server1 {
				return netip.Addr{}, errNoRoute
			}
			return relay1, nil
		}
		l.attach(newDHCPD(server2))
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); err != nil {
			t.Errorf("one server is reachable: %v", err)
		}
		_, err := c.Renew(within(t, usual), home, held(server1))
		if !errors.Is(err, errNoRoute) {
			t.Errorf("error %v", err)
		}
		checkError(t, err, "10.10.0.1")
		if err := c.Release(within(t, usual), home, held(server1)); !errors.Is(err, errNoRoute) {
			t.Errorf("error %v", err)
		}
	})
}

// What can't be opened now may be opened later, by the request that needs it.
func TestOpenIsTriedAgain(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1))
		c := l.client(server1)
		busy := errors.New("port 67 is taken")
		taken := true
		c.openRelay = func(at place) (socket, error) {
			if taken {
				return socket{}, busy
			}
			return l.open(at)
		}
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); !errors.Is(err, busy) {
			t.Errorf("error %v", err)
		}
		if took := time.Since(l.began); took != 0 {
			t.Errorf("took %s", took)
		}
		taken = false
		if _, err := c.Acquire(within(t, usual), want(home, mac1)); err != nil {
			t.Error(err)
		}
	})
}

// At the start, only a second copy is a reason to end. Everything else may be
// mended by the time of the first request.
func TestOpen(t *testing.T) {
	second := func(relay netip.Addr) error { return fmt.Errorf("%w %s", ErrSecondCopy, relay) }
	fails := func(err error) func(netip.Addr) error { return func(netip.Addr) error { return err } }
	relay2 := ip("10.11.0.2")
	servers := []lease.Server{{Host: "10.10.0.1", Port: 67}, {Host: "10.11.0.1", Port: 67}}
	byName := []lease.Server{{Host: "dhcp.example.org", Port: 67}}
	for _, c := range []struct {
		name    string
		servers []lease.Server
		relay   netip.Addr
		open    func(netip.Addr) error
		refused bool
		opened  []netip.Addr
	}{
		{"nothing configured", nil, netip.IPv4Unspecified(), nil, false, nil},
		{"no server, but a relay address", nil, relay1, nil, false, []netip.Addr{relay1}},
		{"two relay addresses", servers, netip.IPv4Unspecified(), nil, false, []netip.Addr{relay1, relay2}},
		{"one relay address", servers, relay1, nil, false, []netip.Addr{relay1}},
		{"second copy", servers, netip.IPv4Unspecified(), second, true, nil},
		{"second copy on the last relay address", servers, netip.IPv4Unspecified(), func(relay netip.Addr) error {
			if relay == relay2 {
				return second(relay)
			}
			return nil
		}, true, []netip.Addr{relay1}},
		{"second copy on the first relay address", servers, netip.IPv4Unspecified(), func(relay netip.Addr) error {
			if relay == relay1 {
				return second(relay)
			}
			return nil
		}, true, []netip.Addr{relay2}},
		{"port taken", servers, netip.IPv4Unspecified(), fails(errors.New("taken")), false, nil},
		{"a name, and no relay address", byName, netip.IPv4Unspecified(), second, false, nil},
		{"a name, and a relay address", byName, relay1, nil, false, []netip.Addr{relay1}},
		{"a name, and a relay address of a second copy", byName, relay1, second, true, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				client := l.client()
				client.global.Store(new(lease.Options{Servers: c.servers, Relay: c.relay}))
				client.resolve = func(_ context.Context, host string) ([]netip.Addr, error) {
					addr, err := netip.ParseAddr(host)
					if err != nil {
						t.Errorf("%s was resolved at the start", host)
					}
					return []netip.Addr{addr}, err
				}
				client.source = func(to netip.AddrPort) (netip.Addr, error) {
					return map[netip.AddrPort]netip.Addr{server1: relay1, server2: relay2}[to], nil
				}
				client.openRelay = func(at place) (socket, error) {
					if c.open != nil {
						if err := c.open(at.giaddr()); err != nil {
							return socket{}, err
						}
					}
					return l.open(at)
				}
				err := client.Open()
				if got := errors.Is(err, ErrSecondCopy); got != c.refused || !c.refused && err != nil {
					t.Errorf("error %v", err)
				}
				if !c.refused {
					var opened []netip.Addr
					for at := range l.conns {
						opened = append(opened, at.giaddr())
					}
					slices.SortFunc(opened, netip.Addr.Compare)
					if !slices.Equal(opened, c.opened) {
						t.Errorf("opened %v, want %v", opened, c.opened)
					}
				}
				if len(l.log()) != 0 {
					t.Error("messages at the start")
				}
			})
		})
	}
}

// The hardware address is that of the configured relay address, or of the one
// towards the first server, whatever can be reached.
func TestRelayMAC(t *testing.T) {
	relay2, relay3 := ip("10.11.0.2"), ip("10.12.0.2")
	byName := lease.Server{Host: "dhcp.example.org", Port: 67}
	numbers := []lease.Server{{Host: "10.10.0.1", Port: 67}, {Host: "10.11.0.1", Port: 67}}
	for _, c := range []struct {
		name    string
		global  lease.Options
		pool    lease.Options
		want    netip.Addr
		wantErr error
	}{
		{"global relay", lease.Options{Servers: numbers, Relay: relay3}, lease.Options{}, relay3, nil},
		{"pool's relay", lease.Options{Servers: numbers, Relay: relay3}, lease.Options{Relay: relay2}, relay2, nil},
		{"relay, no server", lease.Options{Relay: relay3}, lease.Options{}, relay3, nil},
		{"first server", lease.Options{Servers: numbers, Relay: netip.IPv4Unspecified()}, lease.Options{}, relay1, nil},
		{"pool's server", lease.Options{Servers: numbers}, lease.Options{Servers: numbers[1:]}, relay2, nil},
		{"first by name", lease.Options{Servers: []lease.Server{byName, numbers[0]}}, lease.Options{}, relay2, nil},
		{"first without a route", lease.Options{Servers: []lease.Server{{Host: "10.99.0.1", Port: 67}, numbers[0]}}, lease.Options{}, netip.Addr{}, errNoRoute},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				client := l.client()
				client.global.Store(&c.global)
				client.resolve = func(context.Context, string) ([]netip.Addr, error) { return []netip.Addr{server2.Addr()}, nil }
				client.source = func(to netip.AddrPort) (netip.Addr, error) {
					if relay, ok := map[netip.AddrPort]netip.Addr{server1: relay1, server2: relay2}[to]; ok {
						return relay, nil
					}
					return netip.Addr{}, errNoRoute
				}
				client.hardware = func(relay netip.Addr) (lease.MAC, error) {
					return lease.MAC(append([]byte{2, 0}, relay.AsSlice()...)), nil
				}
				got, err := client.RelayMAC(t.Context(), lease.Pool{Options: c.pool})
				if !errors.Is(err, c.wantErr) || err == nil && got != lease.MAC(append([]byte{2, 0}, c.want.AsSlice()...)) {
					t.Errorf("%s, %v; want that of %s", got, err, c.want)
				}
				if len(l.log()) != 0 {
					t.Error("something was sent")
				}
			})
		})
	}
	bubble(t, func(t *testing.T, l *lan) {
		_, err := l.client().RelayMAC(t.Context(), home)
		checkError(t, err, "no DHCP server is configured")
	})
}
