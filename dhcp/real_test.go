package dhcp

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// real is a client on a lab's host, with a real server of one kind.
type real struct {
	host   *lab.Node
	client *Client
	server *lab.DHCPServer
	pool   lease.Pool
}

// eachServer runs a test with each kind of DHCP server that there is, in
// network namespaces.
func eachServer(t *testing.T, f func(t *testing.T, r real)) {
	eachServerOf(t, lab.DHCPConfig{Subnets: []lab.Subnet{lab.SubnetA(), lab.SubnetB()}}, f)
}

func eachServerOf(t *testing.T, config lab.DHCPConfig, f func(t *testing.T, r real)) {
	for _, kind := range lab.DHCPKinds {
		t.Run(kind.Name, func(t *testing.T) {
			l := lab.ForTest(t, lab.DHCPServers)
			topology, err := l.Standard()
			if err != nil {
				t.Fatal(err)
			}
			server, err := topology.Server.StartDHCP(kind, config)
			if err != nil {
				t.Fatal(err)
			}
			c := NewClient(lease.Options{Servers: []lease.Server{{Host: server1.Addr().String(), Port: 67}}, Relay: relay1}, slog.New(slog.DiscardHandler))
			// The socket stays in the namespace where it was opened.
			if err := topology.Host.Do(c.Open); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			})
			f(t, real{topology.Host, c, server, home})
		})
	}
}

// lease takes a lease by a client identifier that is a name.
func (r real) lease(t *testing.T, mac lease.MAC, name string) lease.Lease {
	t.Helper()
	req := want(r.pool, mac)
	req.Name, req.ClientID = name, []byte("\x00host/"+r.pool.Subnet.String()+"/"+name)
	l, err := r.client.Acquire(within(t, usual), req)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// row asserts on the lease's row in the server's own table.
func (r real) row(t *testing.T, l lease.Lease) {
	t.Helper()
	// Tables are written a moment after the ACK.
	err := lab.Eventually(5*time.Second, func() error {
		row, found, err := r.server.Lease(l.Addr())
		if err != nil || !found {
			return fmt.Errorf("%s is not in the server's table: %w", l.Addr(), err)
		}
		if row.MAC != l.MAC.String() || row.ClientID != fmt.Sprintf("%x", l.ClientID) || row.Hostname != hostName(l.Name) {
			return fmt.Errorf("row %+v, want %s, %x, %s", row, l.MAC, l.ClientID, l.Name)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// A container that comes back with another MAC keeps its address, which is
// asked for without a DISCOVER.
func TestRealConfirm(t *testing.T) {
	eachServer(t, func(t *testing.T, r real) {
		for _, pool := range []lease.Pool{home, away} {
			r.pool = pool
			old := r.lease(t, mac1, "web")
			r.row(t, old)
			old.MAC = mac2
			got, err := r.client.Confirm(within(t, 5*time.Second), pool, old)
			if err != nil || got.Addr() != old.Addr() {
				t.Fatalf("confirmed %s as %s, %v", old.Addr(), got.Prefix, err)
			}
			r.row(t, got)
			if leases, err := r.server.Leases(); err != nil || len(leases) != 1 {
				t.Errorf("%d leases, %v", len(leases), err)
			}
			if err := r.client.Release(within(t, usual), pool, got); err != nil {
				t.Fatal(err)
			}
			err = lab.Eventually(5*time.Second, func() error {
				if leases, err := r.server.Leases(); err != nil || len(leases) != 0 {
					return fmt.Errorf("%d leases, %w", len(leases), err)
				}
				return nil
			})
			if err != nil {
				t.Error("after the RELEASE:", err)
			}
		}
	})
}

// What the servers say of addresses that the client doesn't hold, see doc.go.
func TestRealConfirmOfOthers(t *testing.T) {
	const refused, silent, granted = "NAK", "silence", "ACK"
	cases := map[string]struct{ isc, kea, dnsmasq string }{
		"unknown subnet":       {refused, refused, refused},
		"another subnet":       {refused, refused, refused},
		"outside of the range": {silent, refused, refused},
		"another client's":     {refused, refused, refused},
		"nobody's":             {granted, refused, granted},
		"released":             {granted, refused, granted},
	}
	eachServer(t, func(t *testing.T, r real) {
		others, released := r.lease(t, mac1, "web"), r.lease(t, mac2, "db")
		r.row(t, released)
		if err := r.client.Release(within(t, usual), home, released); err != nil {
			t.Fatal(err)
		}
		for name, addr := range map[string]netip.Addr{
			"unknown subnet": ip("10.99.0.7"), "another subnet": ip("10.20.0.150"), "outside of the range": ip("10.10.0.250"),
			"another client's": others.Addr(), "nobody's": ip("10.10.0.177"), "released": released.Addr(),
		} {
			l := released
			l.Prefix = netip.PrefixFrom(addr, 24)
			if name != "released" {
				l.MAC, l.ClientID = lease.MAC{2, 0, 0, 0, 0, addr.As4()[3]}, []byte("\x00host/"+name)
			}
			got, err := r.client.Confirm(within(t, time.Second), home, l)
			answer := fmt.Sprint(err)
			switch {
			case errors.Is(err, lease.ErrNAK):
				answer = refused
			case errors.Is(err, lease.ErrNoAnswer):
				answer = silent
			case err == nil && got.Addr() == addr:
				answer = granted
			}
			want := map[string]string{lab.ISC.Name: cases[name].isc, lab.Kea.Name: cases[name].kea, lab.Dnsmasq.Name: cases[name].dnsmasq}[r.server.Kind.Name]
			if answer != want {
				t.Errorf("%s: %s, want %s", name, answer, want)
			}
		}
	})
}

// The longest client identifier that every server takes, beside the longest
// host name. All of it counts: the last byte tells two clients apart.
func TestRealLongClientID(t *testing.T) {
	eachServer(t, func(t *testing.T, r real) {
		lengths := []int{128}
		if r.server.Kind.Name != lab.Kea.Name {
			lengths = append(lengths, 254)
		}
		for _, n := range lengths {
			req := want(away, lease.MAC{2, 0, 0, 0, 0, byte(n)})
			req.Name, req.ClientID = strings.Repeat("n", 63), append([]byte{0}, bytes.Repeat([]byte{'x'}, n-1)...)
			first, err := r.client.Acquire(within(t, usual), req)
			if err != nil {
				t.Fatal(err)
			}
			r.row(t, first)
			second := req
			second.MAC[4], second.Name, second.ClientID = 1, "", bytes.Clone(req.ClientID)
			second.ClientID[n-1] = 'y'
			if got, err := r.client.Acquire(within(t, usual), second); err != nil || got.Addr() == first.Addr() {
				t.Fatalf("%d bytes: %s, then %s, %v", n, first.Addr(), got.Addr(), err)
			}
			first.MAC[4] = 2
			got, err := r.client.Confirm(within(t, 5*time.Second), away, first)
			if err != nil {
				t.Fatal(err)
			}
			if got, err = r.client.Renew(within(t, 5*time.Second), away, got); err != nil || got.Addr() != first.Addr() {
				t.Fatalf("%d bytes: %s renewed as %s, %v", n, first.Addr(), got.Addr(), err)
			}
			r.row(t, got)
		}
	})
}

// A lease whose record was lost is extended by what its endpoint tells alone.
func TestRealRebindWithoutRecord(t *testing.T) {
	eachServer(t, func(t *testing.T, r real) {
		old := r.lease(t, mac1, "web")
		got, err := r.client.Rebind(within(t, 5*time.Second), home, lease.Lease{
			Pool: home.ID, MAC: old.MAC, Name: old.Name, ClientID: old.ClientID, Prefix: old.Prefix,
		})
		if err != nil {
			t.Fatal(err)
		}
		if got.Addr() != old.Addr() || got.Server != old.Server || got.Via != old.Via || !got.Obtained.After(old.Obtained) || !got.Expires.After(old.Expires) {
			t.Errorf("got %+v, of %+v", got, old)
		}
		r.row(t, got)
	})
}
