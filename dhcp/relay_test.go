package dhcp

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// of is what is expected of each kind of server.
type of[T any] struct{ isc, kea, dnsmasq T }

func (w of[T]) by(r real) T {
	return map[string]T{lab.ISC.Name: w.isc, lab.Kea.Name: w.kea, lab.Dnsmasq.Name: w.dnsmasq}[r.server.Kind.Name]
}

// eventually waits for what a server writes a moment after it has answered.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	if err := lab.Eventually(5*time.Second, f); err != nil {
		t.Error(err)
	}
}

// gone asserts that the server's table is empty.
func (r real) gone(t *testing.T) {
	t.Helper()
	eventually(t, func() error {
		if leases, err := r.server.Leases(); err != nil || len(leases) != 0 {
			return fmt.Errorf("%d leases, %w", len(leases), err)
		}
		return nil
	})
}

// life takes a lease through all that can be said about it, up to its release.
// check is called when the server's table has it, and after each renewal.
func (r real) life(t *testing.T, req lease.Request, check func(l lease.Lease)) {
	t.Helper()
	l, err := r.client.Acquire(within(t, usual), req)
	if err != nil {
		t.Error("acquire:", err)
		return
	}
	check(l)
	for _, extend := range []func() (lease.Lease, error){
		func() (lease.Lease, error) { return r.client.Renew(within(t, 5*time.Second), req.Pool, l) },
		func() (lease.Lease, error) { return r.client.Rebind(within(t, 5*time.Second), req.Pool, l) },
		func() (lease.Lease, error) { return r.client.Confirm(within(t, 5*time.Second), req.Pool, l) },
	} {
		got, err := extend()
		if err != nil || got.Addr() != l.Addr() {
			t.Errorf("extend %s: %s, %v", l.Addr(), got.Addr(), err)
			continue
		}
		check(got)
	}
	if err := r.client.Release(within(t, usual), req.Pool, l); err != nil {
		t.Error("release:", err)
	}
	r.gone(t)
}

// openAt opens the client's link of one more place, in the host's namespace.
func (r real) openAt(t *testing.T, at place) {
	t.Helper()
	err := r.host.Do(func() error {
		_, err := r.client.link(at)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Who an endpoint is reaches the servers with each message, keeps none of them
// from granting, renewing and releasing, and stands in their tables; dnsmasq
// keeps it nowhere, but says in its log what it has echoed.
func TestRealAgent(t *testing.T) {
	eachServer(t, func(t *testing.T, r real) {
		for _, network := range []lease.Pool{home, away} {
			for _, selection := range []lease.LinkSelection{lease.SelectAuto, lease.Select118} {
				network.Options = lease.Options{Agent: allParts, NetworkName: "vlan 20", LinkSelection: selection}
				req := want(network, mac1)
				req.Name = "my_web.1"
				parts := []byte("\x01\x07vlan 20\x02" + string(byte(len(r.client.host))) + r.client.host + "\x06\x08my_web.1")
				r.life(t, req, func(l lease.Lease) {
					if !bytes.Equal(l.Agent, parts) {
						t.Errorf("the lease has % x, want % x", l.Agent, parts)
					}
					eventually(t, func() error {
						row, _, err := r.server.Lease(l.Addr())
						if want := fmt.Sprintf("%x", parts); row.Agent != want && r.server.Kind.Name != lab.Dnsmasq.Name {
							return fmt.Errorf("the table has %q, want %q: %w", row.Agent, want, err)
						}
						return nil
					})
				})
			}
		}
		if echoed := "option: 82 agent-id  01:07:76:6c:61:6e:20:32:30:02"; r.server.Kind.Name == lab.Dnsmasq.Name && !strings.Contains(r.server.Log(), echoed) {
			t.Errorf("dnsmasq's log lacks %q", echoed)
		}
	})
}

// Servers that choose by circuit id serve the network that it names, from the
// DISCOVER to the RELEASE, and no other.
func TestRealChosenByAgent(t *testing.T) {
	config := lab.DHCPConfig{Subnets: []lab.Subnet{lab.SubnetA(), lab.SubnetB()}, Circuit: "vlan20"}
	eachServerOf(t, config, func(t *testing.T, r real) {
		for _, network := range []lease.Pool{home, away} {
			network.Options = lease.Options{Agent: allParts, NetworkName: "vlan20"}
			r.life(t, want(network, mac1), func(lease.Lease) {})
			network.Options.NetworkName = "vlan21"
			if _, err := r.client.Probe(within(t, 300*time.Millisecond), network, mac1); !errors.Is(err, lease.ErrNoAnswer) {
				t.Errorf("another network: %v", err)
			}
		}
	})
}

// Which subnet the servers choose for the container of another one than the
// relay address's. RFC 3011 wants its option back.
func TestRealLinkSelection(t *testing.T) {
	eachServer(t, func(t *testing.T, r real) {
		for selection, want := range map[lease.LinkSelection]netip.Prefix{
			lease.SelectAuto: away.Subnet, lease.Select118: away.Subnet, lease.SelectOff: home.Subnet,
		} {
			network := withOptions("net", lease.Options{LinkSelection: selection})
			offers, err := r.client.Probe(within(t, 5*time.Second), network, mac1)
			if err != nil || len(offers) != 1 || offers[0].Subnet != want {
				t.Errorf("%s: offers %+v, %v; want %s", selection, offers, err, want)
			}
		}
		l, err := r.client.Acquire(within(t, 5*time.Second), want(by118, mac1))
		if err != nil || !bytes.Contains(l.Options, []byte{118, 4, 10, 20, 0, 0}) {
			t.Errorf("option 118 isn't returned: % x, %v", l.Options, err)
		}
	})
}

// Kea answers to the port that a message came from when it says so (RFC 8357),
// the others to port 67 all the same.
func TestRealRelayPort(t *testing.T) {
	honours := of[bool]{kea: true}
	eachServer(t, func(t *testing.T, r real) {
		r.openAt(t, place{relay: netip.AddrPortFrom(relay1, 1067)})
		for _, network := range []lease.Pool{home, away} {
			network.Options.RelayPort = 1067
			if honours.by(r) {
				r.life(t, want(network, mac1), func(lease.Lease) {})
				continue
			}
			// What comes to port 67 is of no exchange there.
			missed := r.client.Drops().Counts()[errForeign.Error()]
			_, err := r.client.Probe(within(t, 300*time.Millisecond), network, mac1)
			if !errors.Is(err, lease.ErrNoAnswer) || r.client.Drops().Counts()[errForeign.Error()] == missed {
				t.Errorf("%v; drops %v", err, r.client.Drops().Counts())
				continue
			}
			checkError(t, err, "relay address 10.10.0.2:1067", "RFC 8357")
		}
	})
}

// What the servers make of names and classes.
func TestRealNames(t *testing.T) {
	classes := lease.Options{VendorClass: "box of ours", UserClass: "gold"}
	cases := map[string]struct {
		options  lease.Options
		hostname of[string] // in the table
	}{
		"host name": {lease.Options{}, of[string]{"my-web-1", "my-web-1", "my-web-1"}},
		"no name":   {lease.Options{HostName: lease.Off}, of[string]{}},
		"DNS":       {lease.Options{FQDN: "example.org"}, of[string]{"", "my-web-1.example.org.", "my-web-1"}},
		"both":      {lease.Options{FQDN: "example.org", HostName: lease.On}, of[string]{"my-web-1", "my-web-1.example.org.", "my-web-1"}},
		"classes":   {classes, of[string]{"my-web-1", "my-web-1", "my-web-1"}},
	}
	eachServer(t, func(t *testing.T, r real) {
		for name, c := range cases {
			req := want(home, mac1)
			req.Name, req.Pool.Options = "my_web.1", c.options
			r.life(t, req, func(l lease.Lease) {
				eventually(t, func() error {
					row, found, err := r.server.Lease(l.Addr())
					if want := c.hostname.by(r); !found || row.Hostname != want {
						return fmt.Errorf("%s: the table has %q, want %q: %w", name, row.Hostname, want, err)
					}
					return nil
				})
			})
		}
		if r.server.Kind.Name == lab.Dnsmasq.Name {
			for _, text := range []string{"vendor class: oam-docker-ipam", "vendor class: box of ours", "user class: gold", "client provides name: my-web-1.example.org"} {
				if !strings.Contains(r.server.Log(), text) {
					t.Errorf("dnsmasq's log lacks %q", text)
				}
			}
		}
	})
}

// The longest message that there is arrives, and is understood.
func TestRealLargestMessage(t *testing.T) {
	eachServer(t, func(t *testing.T, r real) {
		m := largest(t, 128)
		r.client.host = strings.Repeat("h", 64)
		req := want(away, mac1)
		req.Name, req.ClientID, req.Pool.Options = m.name, m.clientID, m.options
		req.Pool.Options.RelayPort = 0
		r.life(t, req, func(l lease.Lease) {
			if !away.Subnet.Contains(l.Addr()) || !bytes.Equal(l.Agent, m.agent) {
				t.Errorf("leased %s with % x", l.Addr(), l.Agent)
			}
			eventually(t, func() error {
				row, _, err := r.server.Lease(l.Addr())
				if row.ClientID != fmt.Sprintf("%x", m.clientID) || row.Agent != fmt.Sprintf("%x", m.agent) && r.server.Kind.Name != lab.Dnsmasq.Name {
					return fmt.Errorf("row %+v, %w", row, err)
				}
				return nil
			})
		})
	})
}

// hostDnsmasq runs a dnsmasq on the Docker host that takes port 67 of all its
// addresses.
func (r real) hostDnsmasq(t *testing.T) *lab.Process {
	t.Helper()
	process, err := r.host.Start("dnsmasq", lab.Command{Args: []string{
		"dnsmasq", "--conf-file=/dev/null", "--no-daemon", "--port=0", "--user=root", "--log-dhcp",
		"--dhcp-leasefile=" + filepath.Join(t.TempDir(), "leases"), "--dhcp-range=192.168.122.2,192.168.122.254",
	}})
	if err != nil {
		t.Fatal(err)
	}
	err = lab.Eventually(5*time.Second, func() error {
		if open, err := r.host.UDPOpen(67); err != nil || !open {
			return fmt.Errorf("dnsmasq doesn't serve yet: %t, %w", open, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return process
}

// Beside a dnsmasq that has port 67 of all addresses of the host everything
// works, through a raw socket, and the log says so once.
func TestRealBesideDnsmasq(t *testing.T) {
	eachServer(t, func(t *testing.T, r real) {
		if err := r.client.Close(); err != nil {
			t.Fatal(err)
		}
		neighbour := r.hostDnsmasq(t)
		var log bytes.Buffer
		r.client.log = slog.New(slog.NewTextHandler(&log, nil))
		r.openAt(t, at67(relay1))
		for _, network := range []lease.Pool{home, away} {
			network.Options = told.Options
			req := want(network, mac1)
			req.Name = "web"
			r.life(t, req, func(lease.Lease) {})
		}
		// A crowd, of which nothing may be lost.
		errs := make(chan error)
		for i := range 64 {
			go func() {
				_, err := r.client.Acquire(within(t, usual), want(home, lease.MAC{2, byte(i * 7), byte(i * 31), 0, 0, byte(i)}))
				errs <- err
			}()
		}
		for range 64 {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		if drops := r.client.Drops().Counts(); len(drops) != 0 {
			t.Errorf("dropped %v", drops)
		}
		if text := log.String(); strings.Count(text, "raw socket") != 1 {
			t.Errorf("the log doesn't say it once: %s", text)
		}
		// The other program has answered nobody, and serves on.
		if !neighbour.Running() || strings.Contains(neighbour.Log(), "DHCPOFFER") {
			t.Errorf("the dnsmasq beside us says: %s", neighbour.Log())
		}
		// Once it has gone, what is open works on.
		if err := neighbour.Stop(); err != nil {
			t.Error(err)
		}
		if _, err := r.client.Acquire(within(t, usual), want(away, mac1)); err != nil {
			t.Error("without the other program:", err)
		}
	})
}

// A probe by hand disturbs no running daemon, and needs none.
func TestRealObserver(t *testing.T) {
	eachServer(t, func(t *testing.T, r real) {
		l := r.lease(t, mac1, "web")
		global := lease.Options{Servers: []lease.Server{{Host: server1.Addr().String(), Port: 67}}, Relay: relay1}
		prober := NewProber(global, slog.New(slog.DiscardHandler))
		defer prober.Close()
		observe := func() {
			t.Helper()
			for _, c := range []struct {
				pool lease.Pool
				want netip.Prefix
			}{{home, home.Subnet}, {away, away.Subnet}, {lease.Pool{}, home.Subnet}} {
				var offers []lease.Offer
				err := r.host.Do(func() (err error) {
					offers, err = prober.Probe(within(t, 5*time.Second), c.pool, mac2)
					return err
				})
				if err != nil || len(offers) != 1 || offers[0].Subnet != c.want {
					t.Errorf("offers %+v, %v; want one of %s", offers, err, c.want)
				}
			}
		}
		observe()
		if _, err := r.client.Renew(within(t, 5*time.Second), home, l); err != nil {
			t.Error("the daemon beside it:", err)
		}
		if err := r.client.Close(); err != nil {
			t.Fatal(err)
		}
		observe()
		r.row(t, l)
		leases, err := r.server.Leases()
		if others := slices.DeleteFunc(leases, func(row lab.DHCPLease) bool { return row.Addr == l.Addr() }); err != nil || len(others) != 0 {
			t.Errorf("the probes have leased %+v, %v", others, err)
		}
	})
}
