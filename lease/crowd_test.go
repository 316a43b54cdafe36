package lease_test

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// moody is a DHCP server with a true lease table, whose mood differs from
// message to message.
type moody struct {
	*dhcpServer
	ends map[netip.Addr]time.Time // guarded by dhcpServer.mu, as table
	calm knob[bool]
}

// expire forgets leases that have ended. It needs mu.
func (s *moody) expire() {
	for a, end := range s.ends {
		if !time.Now().Before(end) {
			delete(s.table, a)
			delete(s.ends, a)
		}
	}
}

// linger waits as the network would, or is silent; then it says so.
func (s *moody) linger(ctx context.Context) error {
	wait := time.Duration(0)
	if !s.calm.get() {
		wait = rand.N(200 * time.Millisecond)
		if rand.N(10) == 0 {
			wait = rand.N(time.Hour)
		}
	}
	select {
	case <-time.After(wait):
		return nil
	case <-ctx.Done():
		return lease.ErrNoAnswer
	}
}

func (s *moody) acquire(ctx context.Context, r lease.Request) (lease.Lease, error) {
	if err := s.linger(ctx); err != nil {
		return lease.Lease{}, err
	}
	if !s.calm.get() && rand.N(20) == 0 {
		return lease.Lease{}, lease.ErrNAK
	}
	s.mu.Lock()
	s.expire()
	s.length.set(10*time.Minute + rand.N(time.Hour))
	s.mu.Unlock()
	l, err := s.grant(r)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.ends[l.Addr()] = l.Expires
	}
	return l, err
}

// confirm is the answer to INIT-REBOOT, which leaves the lease where it is.
func (s *moody) confirm(ctx context.Context, l lease.Lease) (lease.Lease, error) {
	if err := s.linger(ctx); err != nil {
		return lease.Lease{}, err
	}
	s.mu.Lock()
	s.expire()
	holder, taken := s.table[l.Addr()]
	s.mu.Unlock()
	switch {
	case !taken:
		return silent(ctx, l)
	case holder != string(l.ClientID):
		return lease.Lease{}, lease.ErrNAK
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l = s.extended(l)
	s.ends[l.Addr()] = l.Expires
	return l, nil
}

func (s *moody) extend(ctx context.Context, l lease.Lease) (lease.Lease, error) {
	if err := s.linger(ctx); err != nil {
		return lease.Lease{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire()
	switch dice := rand.N(30); {
	case s.table[l.Addr()] != string(l.ClientID):
		return lease.Lease{}, lease.ErrNAK
	case s.calm.get() || dice > 1:
	case dice == 0:
		delete(s.table, l.Addr())
		delete(s.ends, l.Addr())
		return lease.Lease{}, lease.ErrNAK
	default: // another address; the old one is free
		for n := byte(200); n < 250; n++ {
			a := netip.AddrFrom4([4]byte{192, 0, 2, n})
			if _, taken := s.table[a]; !taken {
				delete(s.table, l.Addr())
				delete(s.ends, l.Addr())
				l.Prefix = netip.PrefixFrom(a, 32)
				break
			}
		}
	}
	l = s.extended(l)
	s.table[l.Addr()], s.ends[l.Addr()] = string(l.ClientID), l.Expires
	return l, nil
}

// TestCrowd lets many containers come and go on networks that come and go, at
// a server and on a disk that fail now and then, over days. At no time may two
// of them have one address, expired or not; in the end memory, disk and server must agree.
func TestCrowd(t *testing.T) {
	const networks, workers, steps = 3, 24, 60
	inWorld(t, func(w *world) {
		server := &moody{dhcpServer: w.server, ends: map[netip.Addr]time.Time{}}
		w.server.onAcquire.set(server.acquire)
		w.server.onConfirm.set(server.confirm)
		w.server.onExtend.set(server.extend)
		var mu sync.Mutex
		pools := make([]string, networks)
		for i := range pools {
			pools[i] = w.pool()
		}
		pool := func(i int) string {
			mu.Lock()
			defer mu.Unlock()
			return pools[i]
		}
		alone := func() {
			t.Helper()
			if t.Failed() {
				return // once is enough
			}
			has := map[netip.Addr]lease.Held{}
			for _, h := range w.manager.Leases() {
				if other, twice := has[h.Addr()]; twice {
					t.Errorf("%v is held by %v and %v", h.Addr(), h.MAC, other.MAC)
				}
				has[h.Addr()] = h
			}
		}
		// container lives a life of its own on one network, and shares its MAC
		// with a neighbour.
		container := func(n int) {
			network := n % networks
			ep := lease.Endpoint{MAC: mac(n/2 + 1)}
			if rand.N(2) == 0 {
				ep.Name = string(rune('a' + n%2))
			}
			for range steps {
				ep.Address = netip.Addr{}
				if rand.N(4) == 0 {
					ep.Address = netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + rand.N(20))})
				}
				ctx, cancel := context.WithTimeout(w.Context(), 100*time.Millisecond+rand.N(time.Minute))
				l, err := w.manager.Acquire(ctx, pool(network), ep)
				cancel()
				alone()
				time.Sleep(rand.N(30 * time.Minute))
				if err == nil && rand.N(3) > 0 {
					_ = w.manager.Release(w.Context(), l.Pool, l.Addr())
				}
				if rand.N(100) == 0 {
					_, _ = w.manager.ReleaseByHand(w.Context(), ep.MAC.String(), "")
				}
				if rand.N(50) == 0 {
					id := pool(network)
					if p, err := w.manager.AddPool(w.Context(), subnet(t, "192.0.2.0/24")); err == nil && w.manager.RemovePool(w.Context(), id) == nil {
						mu.Lock()
						pools[network] = p.ID
						mu.Unlock()
					}
				}
				_, _ = w.manager.Gateway(w.Context(), pool(network), netip.AddrFrom4([4]byte{192, 0, 2, byte(1 + rand.N(3))}))
				alone()
			}
		}
		for range 2 {
			w.store.before.set(func(string) error {
				if rand.N(50) == 0 {
					return errDiskFull
				}
				return nil
			})
			var wg sync.WaitGroup
			for n := range workers {
				wg.Go(func() { container(n) })
			}
			wg.Wait()

			w.store.before.set(nil)
			server.calm.set(true)
			time.Sleep(3 * time.Hour)
			synctest.Wait()
			w.server.mu.Lock()
			server.expire()
			known := map[netip.Addr]string{}
			for _, h := range w.manager.Leases() {
				if h.State != lease.Lost.String() {
					known[h.Addr()] = string(h.ClientID)
					if w.server.table[h.Addr()] != string(h.ClientID) {
						t.Errorf("%v of %v: the server has it for %v", h.Addr(), h.MAC, w.server.table[h.Addr()])
					}
				}
			}
			for a, holder := range w.server.table {
				if known[a] != holder {
					t.Errorf("the server has leased %v to %v, of which nothing is known", a, holder)
				}
			}
			t.Logf("%d leases held, %d at the server, %d messages", len(w.manager.Leases()), len(w.server.table), len(w.server.seen))
			w.server.mu.Unlock()
			w.agree()
			w.restart(time.Minute)
			server.calm.set(false)
		}
		// Nothing is left behind at the server.
		server.calm.set(true)
		for i := range pools {
			w.works(w.manager.RemovePool(w.Context(), pool(i)))
		}
		w.holds()
		w.server.leased(t)
	})
}

// crowded makes a network whose server gives each MAC its own address, without
// searching for one.
func (w *world) crowded() (pool string) {
	w.server.onAcquire.set(func(_ context.Context, r lease.Request) (lease.Lease, error) {
		a := netip.AddrFrom4([4]byte{198, 18, r.MAC[4], r.MAC[5]})
		w.server.mu.Lock()
		defer w.server.mu.Unlock()
		w.server.table[a] = string(r.ClientID)
		return w.server.lease(r, a), nil
	})
	return w.network("198.18.0.0/15", "")
}

// T1 30s < lease 60s: 10,000 leases in five minutes, all renewed at T1 itself.
func TestTenThousandShortLeases(t *testing.T) {
	const leases, apart, lasts, length = 10_000, 6 * time.Millisecond, 5 * time.Minute, time.Minute
	inWorld(t, func(w *world) {
		pool := w.crowded()
		w.server.length.set(length)
		var mu sync.Mutex
		renewals := 0
		w.server.onExtend.set(func(_ context.Context, l lease.Lease) (lease.Lease, error) {
			if age := time.Since(l.Obtained); age != length/2 {
				t.Errorf("%v renewed after %v", l.Addr(), age)
			}
			mu.Lock()
			defer mu.Unlock()
			renewals++
			return w.server.extended(l), nil
		})
		want := 0
		for n := range leases {
			w.acquire(pool, lease.Endpoint{MAC: mac(n + 1)})
			want += int((lasts - time.Duration(n)*apart - 1) / (length / 2))
			time.Sleep(apart)
		}
		time.Sleep(lasts - leases*apart - 1)
		synctest.Wait()
		if renewals != want {
			t.Errorf("%d renewals, want %d", renewals, want)
		}
		w.agree()
	})
}
