package dhcp

import (
	"bytes"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// A probe in the name of a lease says what the lease's own messages say, and is
// not followed by a REQUEST.
func TestProbeAs(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		server := newDHCPD(server1)
		l.attach(server)
		c := l.client(server1)
		held := lease.Lease{MAC: mac2, Name: "web", ClientID: []byte("\x00host/web"), Agent: []byte{1, 1, 'a'}, Via: server1}
		offers, xid, err := c.ProbeAs(within(t, usual), home, held)
		if err != nil || len(offers) != 1 || offers[0].Address != server.addrOf(mac2) {
			t.Fatalf("%+v, %v", offers, err)
		}
		checkKinds(t, l, discover)
		m := l.log()[0]
		if m.mac() != mac2 || m.xid != xid || !bytes.Equal(m.get(61), held.ClientID) || !bytes.HasPrefix(m.get(82), held.Agent) || string(m.get(12)) != "web" {
			t.Errorf("asked as %s with the options %v, xid %x, want %x", m.mac(), m.options, m.xid, xid)
		}
		if _, _, err := c.ProbeAs(within(t, usual), home, lease.Lease{}); err != nil {
			t.Fatal(err)
		}
		if m := l.log()[1]; m.mac() != c.probeMAC {
			t.Errorf("a stranger asked as %s", m.mac())
		}
	})
}

// Who has a port: at the address itself first, then on the wildcard.
func TestPortHolders(t *testing.T) {
	if !inNetns(t) {
		return
	}
	if holders, err := PortHolders(ip("192.0.2.1"), 67); err != nil || len(holders) != 0 {
		t.Errorf("nobody's port: %v, %v", holders, err)
	}
	for _, addr := range []string{"", "192.0.2.1", "192.0.2.2"} {
		network := "udp4"
		if addr == "" {
			network = "udp" // [::]
		}
		listen(t, network, addr, 1)
	}
	holders, err := PortHolders(ip("192.0.2.1"), 67)
	if err != nil || len(holders) != 2 {
		t.Fatalf("%v, %v", holders, err)
	}
	for i, want := range []netip.Addr{ip("192.0.2.1"), netip.IPv6Unspecified()} {
		if h := holders[i]; h.Addr != want || h.PID != os.Getpid() || !strings.HasPrefix(h.String(), h.Name+" (pid ") {
			t.Errorf("%+v, want %s of process %d", h, want, os.Getpid())
		}
	}
}
