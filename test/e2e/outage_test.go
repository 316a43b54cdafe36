package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// A container that starts while the server is down fails in time and says
// why; once the server is back it starts, and of the first try nothing is
// left.
func TestServerDownWhileContainerStarts(t *testing.T) {
	t.Parallel()
	const timeout = 2 * time.Second
	for _, kind := range lab.DHCPKinds {
		t.Run(kind.Name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, kind, lab.DHCPConfig{}, append(byMAC, "--dhcp-timeout", timeout.String())...)
			s.network("a", "eth0", "10.10.0.0/24")
			check(t, s.dhcp.Stop())
			began := time.Now()
			said := s.dockerFails("run", "-d", "--name", "c1", "--network", "a", image)
			took := time.Since(began)
			mentions(t, said, "no DHCP server answered within 2s", "10.10.0.1", "relay address 10.10.0.2")
			// The rest is the engine's own.
			if took < timeout || took > timeout+5*time.Second {
				t.Errorf("docker run failed after %v, with a DHCP_TIMEOUT of %v", took, timeout)
			}
			check(t, s.dhcp.Start())
			s.docker("start", "c1")
			addr := s.addr("c1", "eth0")
			s.leased(addr, s.mac("c1", "eth0"))
			if table := must(s.dhcp.Leases())(t); len(table) != 1 {
				t.Errorf("the server leases %v, want %s only", table, addr)
			}
			if known := s.leases(); len(known) != 1 {
				t.Errorf("the daemon has %+v, want %s only", known, addr)
			}
			s.docker("rm", "-f", "c1")
			s.notLeased()
		})
	}
}

// A network can be created while the server is down: its subnet's first
// address then stands for the router.
func TestServerDownWhileNetworkIsCreated(t *testing.T) {
	t.Parallel() // the probe waits for 8 s
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	check(t, s.daemon.Start())
	check(t, s.dhcp.Stop())
	began := time.Now()
	var pool struct {
		PoolID string
		Data   map[string]string
	}
	check(t, s.call(t.Context(), "RequestPool", map[string]any{"Pool": "10.20.0.0/24"}, &pool))
	if took := time.Since(began); took > 9*time.Second {
		t.Errorf("the network took %v", took)
	}
	if gateway := pool.Data["com.docker.network.gateway"]; gateway != "10.20.0.1/24" {
		t.Errorf("gateway %q", gateway)
	}
	check(t, s.dhcp.Start())
	s.acquire(pool.PoolID, lab.ScatteredMAC(1))
}

// Servers that die while leases run and come back in time cost no lease: the
// attempts at their renewal outlast the outage.
func TestServerOutageWithinLease(t *testing.T) {
	t.Parallel()
	for _, kind := range lab.DHCPKinds {
		t.Run(kind.Name, func(t *testing.T) {
			t.Parallel()
			// T1 = 2 s < T2 = 5 s < outage < lease = 12 s: missed are all of
			// the renewals, and it is a rebinding that succeeds.
			config, missed := lab.DHCPConfig{RenewSeconds: 2, RebindSeconds: 5, LeaseSeconds: 12}, "rebinding"
			if kind.Name == lab.Dnsmasq.Name {
				// It leases for 120 s at least, so that a second rebinding
				// would be tried after a minute (RFC 2131 section 4.4.5):
				// T1 = 3 s < outage < T2 = 12 s.
				config, missed = lab.DHCPConfig{RenewSeconds: 3, RebindSeconds: 12, LeaseSeconds: 120}, "renewing"
			}
			s := newHost(t, kind, config)
			check(t, s.daemon.Start())
			mac := lab.ScatteredMAC(1)
			addr := s.acquire(s.pool(), mac)
			before, end := s.leased(addr, mac).Expires, s.known(addr).ExpiresAt
			check(t, s.dhcp.Kill())
			s.becomes(addr.String(), missed)
			check(t, s.dhcp.Start())
			s.renewed(addr, before)
			s.becomes(addr.String(), "bound")
			if lease := s.known(addr); !lease.ObtainedAt.Before(end) {
				t.Errorf("the lease ended at %v, before it was obtained anew at %v", end, lease.ObtainedAt)
			}
		})
	}
}

// When the outage outlasts the lease, the address is asked for anew as soon as
// somebody answers: the container still has it.
func TestServerOutageBeyondLease(t *testing.T) {
	t.Parallel()
	for _, kind := range lab.DHCPKinds {
		t.Run(kind.Name, func(t *testing.T) {
			t.Parallel()
			// Lease = 4 s < outage.
			config := lab.DHCPConfig{RenewSeconds: 1, RebindSeconds: 2, LeaseSeconds: 4}
			if kind.Name == lab.Dnsmasq.Name {
				if !soak {
					t.Skip("dnsmasq leases for 120 s at least: OAM_SOAK=1 waits for that")
				}
				config = lab.DHCPConfig{LeaseSeconds: 120}
			}
			s := newHost(t, kind, config)
			check(t, s.daemon.Start())
			mac := lab.ScatteredMAC(1)
			pool := s.pool()
			addr := s.acquire(pool, mac)
			check(t, s.dhcp.Kill())
			s.becomes(addr.String(), "lost")
			s.notLeased()
			check(t, s.dhcp.Start())
			// A DISCOVER every 4 s, at least.
			eventually(t, 8*time.Second, func() error {
				lease, found, err := s.dhcp.Lease(addr)
				if err == nil && (!found || !strings.EqualFold(lease.MAC, mac)) {
					err = fmt.Errorf("the server doesn't lease %s to %s again: %+v", addr, mac, lease)
				}
				return err
			})
			s.becomes(addr.String(), "bound")
			check(t, s.releaseAddress(pool, addr))
			s.notLeased()
		})
	}
}

// becomes waits until the daemon sees a lease in a state.
func (s *site) becomes(addr, state string) {
	s.Helper()
	timeout := 15 * time.Second
	if soak {
		timeout = 3 * time.Minute
	}
	eventually(s.T, timeout, func() error {
		for _, lease := range s.leases() {
			if lease.Address.String() == addr && lease.State == state {
				return nil
			}
		}
		return fmt.Errorf("%s is not %s: %+v", addr, state, s.leases())
	})
}

// Leases of a few seconds never lapse.
func TestShortLeases(t *testing.T) {
	t.Parallel()
	const watched = 5                                       // seconds
	for _, kind := range []lab.DHCPKind{lab.ISC, lab.Kea} { // dnsmasq leases for 120 s at least
		for _, seconds := range []int{1, 4} {
			t.Run(fmt.Sprintf("%s/%ds", kind.Name, seconds), func(t *testing.T) {
				t.Parallel()
				s := newHost(t, kind, lab.DHCPConfig{LeaseSeconds: seconds})
				check(t, s.daemon.Start())
				mac := lab.ScatteredMAC(1)
				pool := s.pool()
				addr := s.acquire(pool, mac)
				first := s.leased(addr, mac).Expires
				requests := s.count(s.net.Server, request)
				for end := time.Now().Add(watched * time.Second); time.Now().Before(end) && !t.Failed(); time.Sleep(100 * time.Millisecond) {
					if state := s.known(addr).State; state == "lost" {
						t.Error("expired at the daemon")
					}
					// The tables count whole seconds, so that of a lease of
					// one they show less than the server meant. Of one of 4 s
					// they show 3 s or more, which is a second after T1.
					if lease, _, err := s.dhcp.Lease(addr); err != nil || seconds > 1 && lease.MAC != mac {
						t.Errorf("lapsed at the server: %+v, %v", lease, err)
					}
				}
				s.renewed(addr, first.Add(time.Duration(watched-seconds-1)*time.Second))
				// One at each T1; a short lease is no reason for a storm.
				if n, most := requests(), watched*2/seconds+1; n < most/2 || n > 2*most {
					t.Errorf("%d renewals in %d s of a lease of %d s", n, watched, seconds)
				}
				check(t, s.releaseAddress(pool, addr))
				s.notLeased()
			})
		}
	}
}
