package dhcp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/krolaw/dhcp4"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// realLAN is a client that asks a real server by broadcast, and the container
// that has its lease.
type realLAN struct {
	real
	held lease.Lease
	ours lease.MAC // of the interface
	wire *lab.Wire // what the server sends
}

type extendFunc = func(context.Context, lease.Pool, lease.Lease) (lease.Lease, error)

// eachServerOnLAN runs a test with each kind of DHCP server, the container once
// as a macvlan on the client's interface and once at a port of its bridge.
func eachServerOnLAN(t *testing.T, f func(t *testing.T, r realLAN, bridged bool)) {
	for _, kind := range lab.DHCPKinds {
		for _, bridged := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, bridge %t", kind.Name, bridged), func(t *testing.T) {
				t.Parallel()
				l := lab.ForTest(t, lab.DHCPServers)
				f(t, newRealLAN(t, l, kind, bridged), bridged)
			})
		}
	}
}

func newRealLAN(t *testing.T, l *lab.Lab, kind lab.DHCPKind, bridged bool) realLAN {
	t.Helper()
	fatal := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	server, err := l.Node("server", "10.10.0.1/24")
	fatal(err)
	host, err := l.Node("host")
	fatal(err)
	iface := "eth0"
	if bridged {
		iface = "br0"
		for _, command := range [][]string{
			{"link", "add", "br0", "type", "bridge", "stp_state", "0", "forward_delay", "0"},
			{"link", "set", "br0", "up"},
			{"link", "set", "eth0", "master", "br0"},
		} {
			_, err := host.Run(append([]string{"ip"}, command...)...)
			fatal(err)
		}
	}
	var r realLAN
	r.host = host
	r.server, err = server.StartDHCP(kind, lab.DHCPConfig{Subnets: []lab.Subnet{lab.SubnetA()}})
	fatal(err)
	r.client, r.pool = NewClient(lease.Options{Interface: iface}, slog.New(slog.DiscardHandler)), home
	t.Cleanup(func() {
		if err := r.client.Close(); err != nil {
			t.Error(err)
		}
	})
	// The socket stays in the namespace where it was opened. A bridge carries
	// once a port does.
	fatal(lab.Eventually(5*time.Second, func() error {
		return host.Do(func() error {
			_, err := r.client.link(place{iface: iface})
			return err
		})
	}))
	r.held = r.real.lease(t, mac1, "web")
	address := r.held.Addr().String() + "/24"
	if bridged {
		container, err := l.NodeOn(host, "c1", address)
		fatal(err)
		_, err = container.Run("ip", "link", "set", "eth0", "address", mac1.String())
		fatal(err)
	} else {
		_, err = host.Macvlan("c1", "eth0", mac1.String(), address)
		fatal(err)
	}
	// What frames carry: a bridge's is that of one of its ports.
	fatal(host.Do(func() error {
		i, err := net.InterfaceByName(iface)
		if err == nil {
			r.ours = lease.MAC(i.HardwareAddr)
		}
		return err
	}))
	r.wire, err = server.Wire(l.LAN, "eth0")
	fatal(err)
	t.Cleanup(func() { r.wire.Close() })
	return r
}

// answerTo is where the server sends its answer to a message: Ethernet and IP.
func (r realLAN) answerTo(t *testing.T, xid uint32) (answer string) {
	t.Helper()
	if err := lab.Eventually(5*time.Second, func() error {
		for _, frame := range r.wire.Frames() {
			m, ok := frame.Layer(layers.LayerTypeDHCPv4).(*layers.DHCPv4)
			if !ok || m.Xid != xid {
				continue
			}
			station := lease.MAC(frame.LinkLayer().(*layers.Ethernet).DstMAC)
			who := map[lease.MAC]string{allMAC: "all", r.ours: "host", mac1: "container"}[station]
			ip := frame.NetworkLayer().(*layers.IPv4).DstIP
			switch {
			case ip.Equal(net.IPv4bcast):
				who += ", all"
			case ip.Equal(r.held.Addr().AsSlice()):
				who += ", container"
			}
			answer = who
			return nil
		}
		return fmt.Errorf("no answer to %#x", xid)
	}); err != nil {
		t.Fatal(err)
	}
	return answer
}

// What servers make of the forms of a renewal without a relay agent, see
// doc.go. Each prolongs the lease.
func TestRealBroadcastForms(t *testing.T) {
	to := map[string]map[string]string{
		lab.ISC.Name:     {"RENEWING": "all, all", "REBINDING": "all, all", "INIT-REBOOT": "all, all"},
		lab.Kea.Name:     {"RENEWING": "host, container", "REBINDING": "host, container", "INIT-REBOOT": "host, all"},
		lab.Dnsmasq.Name: {"RENEWING": "container, container", "REBINDING": "container, container", "INIT-REBOOT": "all, all"},
	}
	eachServerOnLAN(t, func(t *testing.T, r realLAN, bridged bool) {
		for _, form := range []string{"RENEWING", "REBINDING", "INIT-REBOOT"} {
			before := r.expires(t, time.Time{})
			// The servers count in seconds.
			time.Sleep(1100 * time.Millisecond)
			x, err := r.client.resume(dhcp4.Request, home, r.held)
			if err != nil {
				t.Fatal(err)
			}
			m := message{kind: dhcp4.Request, ciaddr: r.held.Addr()}
			switch form {
			case "REBINDING":
				x.paths[0].station = lease.MAC{}
			case "INIT-REBOOT":
				m = message{kind: dhcp4.Request, requested: r.held.Addr()}
			}
			x.send(m, x.paths...)
			want := to[r.server.Kind.Name][form]
			if got := r.answerTo(t, x.key.xid); got != want {
				t.Errorf("%s: answered to %s, want %s", form, got, want)
			}
			r.expires(t, before)
			seen := true
			if _, err := x.answer(within(t, 5*time.Second), r.held, time.After(time.Second)); err == errPause {
				seen = false
			} else if err != nil {
				t.Errorf("%s: %v", form, err)
			}
			if hidden := bridged && want == "container, container"; seen == hidden {
				t.Errorf("%s: the answer to %s was seen: %t", form, want, seen)
			}
			x.end()
		}
	})
}

// expires waits until the lease ends later than at a moment, and returns that.
func (r realLAN) expires(t *testing.T, after time.Time) (expires time.Time) {
	t.Helper()
	if err := lab.Eventually(5*time.Second, func() error {
		row, found, err := r.server.Lease(r.held.Addr())
		if err == nil && (!found || !row.Expires.After(after)) {
			err = fmt.Errorf("found %t, to %s, want later than %s", found, row.Expires, after)
		}
		expires = row.Expires
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return expires
}

// The client finds its way with every server, also when that has lost its
// leases: the first form makes them anew, and the second is granted then.
func TestRealBroadcast(t *testing.T) {
	eachServerOnLAN(t, func(t *testing.T, r realLAN, bridged bool) {
		hidden := bridged && r.server.Kind.Name == lab.Dnsmasq.Name
		for _, forgotten := range []bool{false, true} {
			if forgotten {
				for _, step := range []func() error{r.server.Stop, r.server.Forget, r.server.Start} {
					if err := step(); err != nil {
						t.Fatal(err)
					}
				}
				// Kea has its UDP port before it hears anything.
				if err := r.client.Release(within(t, usual), home, r.real.lease(t, mac2, "db")); err != nil {
					t.Fatal(err)
				}
			}
			began := time.Now()
			got, err := r.client.Renew(within(t, 10*time.Second), home, r.held)
			if took := time.Since(began); err != nil || (took >= rebootWait) != hidden {
				t.Fatalf("renewed after %s, %v", took, err)
			}
			r.row(t, got)
		}
		for name, extend := range map[string]extendFunc{"confirm": r.client.Confirm, "rebind": r.client.Rebind} {
			got, err := extend(within(t, 10*time.Second), home, r.held)
			if err != nil || got.Addr() != r.held.Addr() || got.Station != r.held.Station {
				t.Fatalf("%s: %s at %s, %v", name, got.Addr(), got.Station, err)
			}
			r.row(t, got)
		}
		if err := r.client.Release(within(t, usual), home, r.held); err != nil {
			t.Fatal(err)
		}
		if err := lab.Eventually(5*time.Second, func() error {
			leases, err := r.server.Leases()
			if err == nil && len(leases) != 0 {
				err = fmt.Errorf("%d leases", len(leases))
			}
			return err
		}); err != nil {
			t.Error("after the RELEASE:", err)
		}
	})
}

// Two servers on one LAN, of which one is authoritative for the other's range
// too: it refuses what isn't its own, and the leases go on.
func TestRealBroadcastTwoServers(t *testing.T) {
	t.Parallel()
	l := lab.ForTest(t, lab.DHCPServers)
	r := newRealLAN(t, l, lab.ISC, false)
	second, err := l.Node("second", "10.10.0.3/24")
	if err != nil {
		t.Fatal(err)
	}
	subnet := lab.SubnetA()
	subnet.First, subnet.Last = ip("10.10.0.200"), ip("10.10.0.220")
	other, err := second.StartDHCP(lab.Dnsmasq, lab.DHCPConfig{Subnets: []lab.Subnet{subnet}})
	if err != nil {
		t.Fatal(err)
	}
	got := r.held
	for _, extend := range []extendFunc{r.client.Renew, r.client.Rebind, r.client.Confirm} {
		if got, err = extend(within(t, 10*time.Second), home, got); err != nil || got.Server != server1.Addr() {
			t.Fatalf("lease of %s, %v", got.Server, err)
		}
	}
	for n := range 10 {
		req := want(home, lease.MAC{2, 0, 0, 0, 1, byte(n)})
		got, err := r.client.Acquire(within(t, usual), req)
		if err != nil {
			t.Fatal(err)
		}
		if got, err = r.client.Renew(within(t, 10*time.Second), home, got); err != nil {
			t.Fatal(err)
		}
		if err := r.client.Release(within(t, usual), home, got); err != nil {
			t.Fatal(err)
		}
	}
	if !containsAll(other.Log(), "DHCPNAK") {
		t.Error("the other server has refused nothing")
	}
}

// A server on the client's own host: one that reads and writes packet sockets
// is heard, as its clients elsewhere hear it.
func TestRealBroadcastOwnHost(t *testing.T) {
	for _, kind := range lab.DHCPKinds {
		t.Run(kind.Name, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.DHCPServers)
			host, err := l.Node("host", "10.10.0.1/24")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := host.StartDHCP(kind, lab.DHCPConfig{Subnets: []lab.Subnet{lab.SubnetA()}}); err != nil {
				t.Fatal(err)
			}
			c := NewClient(lease.Options{Interface: "eth0"}, slog.New(slog.DiscardHandler))
			t.Cleanup(func() {
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			})
			if err := host.Do(c.Open); err != nil {
				t.Fatal(err)
			}
			_, err = c.Acquire(within(t, 3*time.Second), want(home, mac1))
			if kind.Name == lab.Dnsmasq.Name {
				if !errors.Is(err, lease.ErrNoAnswer) {
					t.Errorf("error %v", err)
				}
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}
