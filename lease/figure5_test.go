package lease_test

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Each arrow of RFC 2131 figure 5 that is the Manager's to go, by its ends and
// its label. The arrows within an exchange are dhcp's: SELECTING to SELECTING
// and to REQUESTING (TestSeveralServers, TestAcquire), REQUESTING to REQUESTING
// (TestLateOffer) and, after a NAK, to INIT (TestNAKOnce); BOUND to BOUND
// (TestHostilePackets). T1 30m < T2 52m30s < lease 1h.
func TestFigure5(t *testing.T) {
	web := lease.Endpoint{MAC: mac(1), Name: "web"}
	restarted := func(w *world, pool string) {
		w.acquire(pool, web)
		time.Sleep(time.Minute)
		w.works(w.manager.Release(w.Context(), pool, addr("192.0.2.10")))
		time.Sleep(10 * time.Second) // less than the release delay, 30s
		w.server.saw(w.T, "0s acquire 02:00:00:00:00:01")
	}
	renewing := func(w *world, pool string) {
		w.acquire(pool, web)
		time.Sleep(29 * time.Minute)
		w.server.saw(w.T, "0s acquire 02:00:00:00:00:01")
	}
	rebinding := func(w *world, pool string) {
		w.acquire(pool, web)
		w.server.onExtend.set(silent)
		time.Sleep(52*time.Minute + 29*time.Second)
		w.holds("192.0.2.10 renewing")
		w.server.forget()
	}
	nak := func(_ context.Context, l lease.Lease) (lease.Lease, error) {
		time.Sleep(2 * time.Second)
		return lease.Lease{}, lease.ErrNAK
	}
	// late is an ACK that takes its time, which counts against the lease.
	late := func(w *world, server netip.Addr) func(context.Context, lease.Lease) (lease.Lease, error) {
		return func(_ context.Context, l lease.Lease) (lease.Lease, error) {
			l = w.server.extended(l)
			l.Server, l.Via = server, netip.AddrPortFrom(server, 67)
			time.Sleep(3 * time.Second)
			return l, nil
		}
	}

	for _, c := range []struct {
		arrow string
		test  func(w *world, pool string)
	}{
		{"INIT to SELECTING: DHCPDISCOVER", func(w *world, pool string) {
			w.acquire(pool, web)
			w.server.saw(w.T, "0s acquire 02:00:00:00:00:01")
		}},
		{"REQUESTING to BOUND: DHCPACK, record lease, set timers", func(w *world, pool string) {
			w.server.onAcquire.set(func(_ context.Context, r lease.Request) (lease.Lease, error) {
				l, err := w.server.grant(r)
				time.Sleep(2 * time.Second)
				return l, err
			})
			l := w.acquire(pool, web)
			if from := w.server.began; !l.Renew.Equal(from.Add(30*time.Minute)) || !l.Rebind.Equal(from.Add(52*time.Minute+30*time.Second)) || !l.Expires.Equal(from.Add(time.Hour)) {
				w.Errorf("granted until %v, T1 %v, T2 %v", l.Expires, l.Renew, l.Rebind)
			}
			w.holds("192.0.2.10 bound")
			w.agree()
			time.Sleep(30 * time.Minute)
			w.server.saw(w.T, "0s acquire 02:00:00:00:00:01", "30m0s renew 192.0.2.10")
		}},
		{"REQUESTING to INIT: DHCPACK not accepted, DHCPDECLINE", func(w *world, _ string) {
			p, err := lease.NewPool("192.0.2.0/24", "", map[string]string{"conflict_check": "on", "conflict_interface": "eth0"})
			w.works(err)
			p, err = w.manager.AddPool(w.Context(), p)
			w.works(err)
			w.server.forget()
			w.neighbours.have = map[netip.Addr]lease.MAC{addr("192.0.2.10"): mac(666)}
			declined := false
			w.server.onAcquire.set(func(_ context.Context, r lease.Request) (lease.Lease, error) {
				if declined {
					w.server.takes(addr("192.0.2.10"))
				}
				declined = true
				return w.server.grant(r)
			})
			w.acquire(p.ID, web)
			w.server.saw(w.T, "0s acquire 02:00:00:00:00:01", "0s decline 192.0.2.10", "10s acquire 02:00:00:00:00:01")
			w.holds("192.0.2.11 bound")
		}},
		{"INIT-REBOOT to REBOOTING: DHCPREQUEST; to BOUND: DHCPACK", func(w *world, pool string) {
			restarted(w, pool)
			w.acquire(pool, web)
			w.holds("192.0.2.10 bound")
			time.Sleep(30 * time.Minute)
			w.server.saw(w.T, "1m10s confirm 192.0.2.10", "31m10s renew 192.0.2.10")
		}},
		{"REBOOTING to INIT: DHCPNAK, restart", func(w *world, pool string) {
			restarted(w, pool)
			w.server.takes(addr("192.0.2.10"))
			w.acquire(pool, web)
			w.holds("192.0.2.11 bound")
			w.server.saw(w.T, "1m10s confirm 192.0.2.10", "1m10s acquire 02:00:00:00:00:01")
		}},
		{"BOUND to RENEWING: T1, DHCPREQUEST to the leasing server", func(w *world, pool string) {
			renewing(w, pool)
			w.server.onExtend.set(silent)
			time.Sleep(time.Minute - 1)
			w.holds("192.0.2.10 bound")
			w.server.saw(w.T)
			time.Sleep(time.Nanosecond)
			w.holds("192.0.2.10 renewing")
			w.server.saw(w.T, "30m0s renew 192.0.2.10")
		}},
		{"RENEWING to BOUND: DHCPACK, record lease, set timers", func(w *world, pool string) {
			renewing(w, pool)
			w.server.onExtend.set(late(w, addr("198.51.100.1")))
			time.Sleep(time.Minute + 4*time.Second)
			w.holds("192.0.2.10 bound")
			w.agree()
			time.Sleep(30 * time.Minute)
			w.server.saw(w.T, "30m0s renew 192.0.2.10", "1h0m0s renew 192.0.2.10")
		}},
		{"RENEWING to INIT: DHCPNAK", func(w *world, pool string) {
			renewing(w, pool)
			w.server.onExtend.set(nak)
			w.server.onConfirm.set(silent)
			w.server.onAcquire.set(silentAcquire)
			time.Sleep(time.Minute + 2*time.Second)
			w.holds("192.0.2.10 lost")
			w.agree()
			time.Sleep(2 * time.Second)
			w.server.saw(w.T, "30m0s renew 192.0.2.10", "30m3s confirm 192.0.2.10", "30m4s acquire 02:00:00:00:00:01 192.0.2.10")
		}},
		{"RENEWING to REBINDING: T2, DHCPREQUEST to all servers", func(w *world, pool string) {
			rebinding(w, pool)
			time.Sleep(time.Second - 1)
			w.holds("192.0.2.10 renewing")
			w.server.saw(w.T)
			time.Sleep(time.Nanosecond)
			w.holds("192.0.2.10 rebinding")
			w.server.saw(w.T, "52m30s rebind 192.0.2.10")
		}},
		{"REBINDING to BOUND: DHCPACK, record lease, set timers", func(w *world, pool string) {
			rebinding(w, pool)
			w.server.onExtend.set(late(w, addr("198.51.100.2")))
			time.Sleep(4 * time.Second)
			w.holds("192.0.2.10 bound")
			w.agree()
			w.server.saw(w.T, "52m30s rebind 192.0.2.10")
			time.Sleep(30 * time.Minute)
			w.server.saw(w.T, "1h22m30s renew 192.0.2.10")
		}},
		{"REBINDING to INIT: DHCPNAK", func(w *world, pool string) {
			rebinding(w, pool)
			w.server.onExtend.set(nak)
			w.server.onConfirm.set(silent)
			time.Sleep(3 * time.Second)
			w.holds("192.0.2.10 lost")
			w.agree()
			time.Sleep(time.Second)
			w.server.saw(w.T, "52m30s rebind 192.0.2.10", "52m33s confirm 192.0.2.10")
		}},
		{"REBINDING to INIT: lease expired", func(w *world, pool string) {
			rebinding(w, pool)
			w.server.down()
			time.Sleep(7*time.Minute + 31*time.Second - 1)
			w.holds("192.0.2.10 rebinding")
			w.server.saw(w.T, "52m30s rebind 192.0.2.10", "56m15s rebind 192.0.2.10", "58m7.5s rebind 192.0.2.10", "59m7.5s rebind 192.0.2.10")
			time.Sleep(time.Nanosecond)
			w.holds("192.0.2.10 lost")
			w.agree()
			w.server.saw(w.T, "1h0m0s confirm 192.0.2.10")
		}},
	} {
		t.Run(c.arrow, func(t *testing.T) {
			inWorldOf(t, lease.Options{}, func(w *world) { c.test(w, w.pool()) })
		})
	}
}
