package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// On a network that loses three packets of ten in each direction, 99 of 100
// containers start within the default DHCP_TIMEOUT, and of those that don't
// nothing stays leased but what a lost release leaves.
func TestPacketLoss(t *testing.T) {
	t.Parallel() // retransmissions wait most of the time
	// Of 600 about one fails, which makes seven one chance in ten thousand.
	// With the RFC's own timetable it would be a hundred.
	const containers, mayFail = 600, 6
	s := newHost(t, lab.Kea, lab.DHCPConfig{
		Subnets: []lab.Subnet{lab.NewSubnet("10.10.0.0/16", "10.10.8.0", "10.10.99.255", "10.10.0.1")}, LeaseSeconds: 3600,
	})
	check(t, s.daemon.Start())
	pool := must(s.requestPool("10.10.0.0/16", nil))(t)
	heal := must(s.net.Host.LosePackets(0.3))(t)

	// mu guards what follows.
	var mu sync.Mutex
	given := map[netip.Addr]string{}
	var failed []string
	var longest time.Duration
	var callers sync.WaitGroup
	for n := range containers {
		callers.Go(func() {
			mac, began := lab.ScatteredMAC(n), time.Now()
			addr, err := s.requestAddress(pool, mac)
			took := time.Since(began)
			mu.Lock()
			defer mu.Unlock()
			longest = max(longest, took)
			switch {
			case errors.Is(err, lab.ErrRefused):
				t.Logf("%s: %v", mac, err)
				failed = append(failed, mac)
			case err != nil:
				t.Errorf("%s: %v", mac, err)
			case given[addr] != "":
				t.Errorf("%s was given to %s and to %s", addr, given[addr], mac)
			default:
				given[addr] = mac
			}
		})
	}
	callers.Wait()
	if longest > 31*time.Second {
		t.Errorf("the longest request took %v", longest)
	}
	if len(failed) > mayFail {
		t.Errorf("%d of %d requests failed", len(failed), containers)
	}
	in, out, err := s.net.Host.LostPackets()
	check(t, err)
	t.Logf("%d of %d failed, the longest took %v; lost %d packets in and %d out", len(failed), containers, longest, in, out)
	leased := s.serverMACs()
	for addr, mac := range given {
		if leased[mac] != addr {
			t.Errorf("%s was given to %s, for whom the server's table has %v", addr, mac, leased[mac])
		}
	}
	for _, mac := range failed {
		// Three in ten of their releases are lost as well; what they then
		// leave is freed when the same client comes again, see below.
		delete(leased, mac)
	}
	if len(leased) != len(given) {
		t.Errorf("the server has %d leases of %d containers", len(leased), len(given))
	}

	// A release is sent once and has no answer (RFC 2131 section 4.4.6): the
	// server keeps those leases, and only those, whose release was lost.
	check(t, heal())
	for _, mac := range failed {
		addr := s.acquire(pool, mac)
		check(t, s.releaseAddress(pool, addr))
	}
	heal = must(s.net.Host.LosePackets(0.3))(t)
	addrs := make(chan netip.Addr)
	// Few at a time: a burst of hundreds overruns Kea's own receive buffer.
	for range 4 {
		callers.Go(func() {
			for addr := range addrs {
				if err := s.releaseAddress(pool, addr); err != nil {
					t.Errorf("release of %s: %v", addr, err)
				}
			}
		})
	}
	for addr := range given {
		addrs <- addr
	}
	close(addrs)
	callers.Wait()
	_, out, err = s.net.Host.LostPackets()
	check(t, err)
	if left := s.leases(); len(left) != 0 {
		t.Errorf("the daemon still has %d leases", len(left))
	}
	eventually(t, 5*time.Second, func() error {
		table, err := s.dhcp.Leases()
		if err == nil && len(table) != out {
			err = fmt.Errorf("the server still has %d leases, and %d releases were lost", len(table), out)
		}
		return err
	})
	check(t, heal())
	if out == 0 || out > containers/2 {
		t.Errorf("%d of %d releases were lost", out, len(given))
	}
}
