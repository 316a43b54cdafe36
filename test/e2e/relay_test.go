package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// What option 82 tells the servers of a container stands in their tables from
// its first message on, over renewals and restarts of the daemon. A dnsmasq
// keeps it nowhere.
func TestOption82(t *testing.T) {
	host := must(os.Hostname())(t)
	for _, kind := range []lab.DHCPKind{lab.ISC, lab.Kea} {
		t.Run(kind.Name, func(t *testing.T) {
			t.Parallel() // it waits for renewals
			s := newHost(t, kind, soonRenewed(kind))
			s.daemon.Flags = append(s.daemon.Flags, "--release-delay", "0s")
			check(t, s.daemon.Start())
			byName := must(s.requestPool("10.10.0.0/24", map[string]string{"option82": "host, container,network", "network_name": "vlan 20"}))(t)
			bySubnet := must(s.requestPool("10.20.0.0/24", map[string]string{"option82": "network"}))(t)
			web, db := s.begin(byName, "web"), s.begin(bySubnet, "db")
			told := map[netip.Addr]string{
				web.addr: fmt.Sprintf("\x01\x07vlan 20\x02%c%s\x06\x03web", len(host), host),
				db.addr:  "\x01\x0c10.20.0.0/24",
			}
			knows := func(when string) {
				t.Helper()
				for addr, want := range told {
					row, _, err := s.dhcp.Lease(addr)
					if want := fmt.Sprintf("%x", want); err != nil || row.Agent != want {
						t.Errorf("%s the server knows %q of %s, want %q; %v", when, row.Agent, addr, want, err)
					}
				}
			}
			knows("at first")
			check(t, s.daemon.Restart())
			for _, c := range []container{web, db} {
				s.renewed(c.addr, s.leased(c.addr, c.mac).Expires)
			}
			knows("after a renewal")
			s.end(byName, web)
			s.end(bySubnet, db)
			s.notLeased()
		})
	}
}

// With a port of its own the daemon runs where another relay agent owns port
// 67, for a server that knows RFC 8357.
func TestListenPort(t *testing.T) {
	s := newHost(t, lab.Kea, soonRenewed(lab.Kea), "--listen-port", "1067")
	var relay net.PacketConn
	check(t, s.net.Host.Do(func() (err error) {
		relay, err = net.ListenPacket("udp4", "10.10.0.2:67")
		return err
	}))
	defer relay.Close()
	check(t, s.daemon.Start())
	for _, subnet := range []string{"10.10.0.0/24", "10.20.0.0/24"} {
		pool := must(s.requestPool(subnet, nil))(t)
		mac := lab.ScatteredMAC(1)
		addr := s.acquire(pool, mac)
		s.renewed(addr, s.leased(addr, mac).Expires)
		check(t, s.releaseAddress(pool, addr))
		s.notLeased()
	}
	if holders := s.portHolders(1067); len(holders) != 1 || holders[0] != s.daemon.Pid() {
		t.Errorf("UDP port 1067 is held by processes %v, want the daemon's %d", holders, s.daemon.Pid())
	}
	if holders := s.portHolders(67); len(holders) != 1 || holders[0] != os.Getpid() {
		t.Errorf("UDP port 67 is held by processes %v, want the relay agent's %d", holders, os.Getpid())
	}
	if strings.Contains(s.daemon.Log(), "raw socket") {
		t.Error("the daemon reads beside somebody")
	}
}
