package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// Callers who go while the server is busy leave nothing leased, whatever the
// exchange was waiting for.
func TestCallerGoesInTheMiddle(t *testing.T) {
	for _, kind := range lab.DHCPKinds {
		t.Run(kind.Name, func(t *testing.T) {
			s := newHost(t, kind, lab.DHCPConfig{})
			check(t, s.daemon.Start())
			pool := s.pool()

			t.Run("before the OFFER", func(t *testing.T) {
				discovers := s.count(s.net.Server, discover)
				check(t, syscall.Kill(s.dhcp.Pid(), syscall.SIGSTOP))
				s.goAway(pool, lab.ScatteredMAC(1), func() { s.reached(discovers, 1) })
				check(t, syscall.Kill(s.dhcp.Pid(), syscall.SIGCONT))
				// The server works through what has queued before it serves
				// this one.
				addr := s.acquire(pool, lab.ScatteredMAC(2))
				s.onlyLease(addr)
				check(t, s.releaseAddress(pool, addr))
			})
			t.Run("before the ACK", func(t *testing.T) {
				let := s.dropFromServer(ack)
				s.goAway(pool, lab.ScatteredMAC(3), func() {
					// The server has given the lease, and we don't know yet.
					eventually(t, 5*time.Second, func() error {
						if s.serverMACs()[lab.ScatteredMAC(3)].IsValid() {
							return nil
						}
						return errors.New("the server has no lease yet")
					})
				})
				s.notLeased()
				let()
			})
			if left := s.leases(); len(left) != 0 {
				t.Errorf("the daemon has %+v", left)
			}
		})
	}
}

// goAway asks for an address, and goes when now returns.
func (s *site) goAway(pool, mac string, now func()) {
	s.Helper()
	ctx, cancel := context.WithCancel(s.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := s.requestAddressFor(ctx, pool, mac)
		ended <- err
	}()
	now()
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		s.Errorf("the request of %s ended before its caller: %v", mac, err)
	}
}

// onlyLease waits until the server's table has one row.
func (s *site) onlyLease(addr netip.Addr) {
	s.Helper()
	eventually(s.T, 5*time.Second, func() error {
		table, err := s.dhcp.Leases()
		if err == nil && (len(table) != 1 || table[0].Addr != addr) {
			err = fmt.Errorf("the server leases %v, want %s only", table, addr)
		}
		return err
	})
}

// Callers go at all the moments of an exchange. What the daemon then knows
// and what the server's table has is the same. Of those who went little is
// left: an answer that was on its way can't be called back.
func TestCallersGoAtRandomMoments(t *testing.T) {
	const callers = 400
	s := newHost(t, lab.Kea, lab.DHCPConfig{
		Subnets: []lab.Subnet{lab.NewSubnet("10.10.0.0/16", "10.10.8.0", "10.10.99.255", "10.10.0.1")},
	})
	check(t, s.daemon.Start())
	pool := must(s.requestPool("10.10.0.0/16", nil))(t)
	var usual time.Duration
	for n := range 20 {
		began := time.Now()
		addr := must(s.requestAddress(pool, lab.ScatteredMAC(callers+n)))(t)
		usual += time.Since(began) / 20
		check(t, s.releaseAddress(pool, addr))
	}

	told := map[string]netip.Addr{}
	var mu sync.Mutex // guards told
	var asking sync.WaitGroup
	macs := make(chan string)
	for range 2 {
		asking.Go(func() {
			for mac := range macs {
				ctx, cancel := context.WithTimeout(t.Context(), rand.N(2*usual))
				addr, err := s.requestAddressFor(ctx, pool, mac)
				cancel()
				mu.Lock()
				switch {
				case err == nil:
					told[mac] = addr
				case !errors.Is(err, context.DeadlineExceeded):
					t.Errorf("request of %s: %v", mac, err)
				}
				mu.Unlock()
			}
		})
	}
	for n := range callers {
		macs <- lab.ScatteredMAC(n)
	}
	close(macs)
	asking.Wait()

	var left int
	eventually(t, 5*time.Second, func() error {
		known := map[string]netip.Addr{}
		for _, lease := range s.leases() {
			known[lease.MAC] = lease.Address
		}
		leased := s.serverMACs()
		for mac, addr := range told {
			if leased[mac] != addr {
				return fmt.Errorf("%s was told %s, and the server has %v", mac, addr, leased[mac])
			}
		}
		if fmt.Sprint(known) != fmt.Sprint(leased) {
			return fmt.Errorf("the daemon knows %v, the server has %v", known, leased)
		}
		left = len(leased) - len(told)
		return nil
	})
	gone := callers - len(told)
	t.Logf("%d of %d callers went within %v, %d leases are left of them", gone, callers, 2*usual, left)
	if gone < callers/20 || left > gone/3 {
		t.Errorf("%d of %d callers went and %d leases are left of them", gone, callers, left)
	}
}

// A server that offers and then never acknowledges is an error in time, and
// gets its lease back: it may have been only the ACK that was lost.
func TestLostACKs(t *testing.T) {
	t.Parallel()
	for _, kind := range lab.DHCPKinds {
		t.Run(kind.Name, func(t *testing.T) {
			t.Parallel()
			s := newHost(t, kind, lab.DHCPConfig{}, "--dhcp-timeout", "2s")
			check(t, s.daemon.Start())
			pool := s.pool()
			let := s.dropFromServer(ack)
			began := time.Now()
			_, err := s.requestAddress(pool, lab.ScatteredMAC(1))
			took := time.Since(began)
			if !errors.Is(err, lab.ErrRefused) || took > 3*time.Second {
				t.Fatalf("after %v: %v", took, err)
			}
			mentions(t, err.Error(), "DHCP server 10.10.0.1 offered an address and then fell silent")
			s.notLeased()
			let()
			s.acquire(pool, lab.ScatteredMAC(1))
		})
	}
}

// A lease that can't be stored is given back. Once there is room again the
// next request works, without a restart.
func TestDiskFull(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	check(t, os.Mkdir(s.daemon.DataDir, 0o700))
	// The lab unmounts what is mounted in its folder.
	check(t, unix.Mount("tmpfs", s.daemon.DataDir, "tmpfs", 0, "size=256k,mode=0700"))
	check(t, s.daemon.Start())
	pool := s.pool()
	first := s.acquire(pool, lab.ScatteredMAC(0))
	filler := filepath.Join(s.daemon.DataDir, "filler")
	check(t, fill(filler))

	// A few still fit into the pages that the database has.
	addrs := map[string]netip.Addr{lab.ScatteredMAC(0): first}
	var refused error
	var last string
	for n := 1; refused == nil && n < 90; n++ {
		last = lab.ScatteredMAC(n)
		var addr netip.Addr
		if addr, refused = s.requestAddress(pool, last); refused == nil {
			addrs[last] = addr
		}
	}
	if !errors.Is(refused, lab.ErrRefused) {
		t.Fatalf("after %d leases on a full disk: %v", len(addrs), refused)
	}
	mentions(t, refused.Error(), "store the lease", "no space left on device")
	agree := func() {
		t.Helper()
		eventually(t, 5*time.Second, func() error {
			if got := s.serverMACs(); fmt.Sprint(got) != fmt.Sprint(addrs) {
				return fmt.Errorf("the server leases %v, the callers have %v", got, addrs)
			}
			return nil
		})
		if known := s.leases(); len(known) != len(addrs) {
			t.Errorf("the daemon has %d leases, the callers %d", len(known), len(addrs))
		}
	}
	agree()
	// A restart on the full disk loses none.
	check(t, s.daemon.Kill())
	check(t, s.daemon.Start())
	agree()

	check(t, os.Remove(filler))
	addrs[last] = s.acquire(pool, last)
	check(t, s.releaseAddress(pool, first))
	delete(addrs, lab.ScatteredMAC(0))
	agree()
}

// fill writes a file until the disk is full.
func fill(name string) error {
	file, err := os.Create(name)
	if err != nil {
		return err
	}
	page := make([]byte, 4096)
	for err == nil {
		_, err = file.Write(page)
	}
	if errors.Is(err, unix.ENOSPC) {
		err = nil
	}
	return errors.Join(err, file.Close())
}
