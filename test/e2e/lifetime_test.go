package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// Beginnings of log lines of the daemon.
const (
	saidSilence  = `level=WARN msg="DHCP servers don't answer`
	saidAnswers  = `level=INFO msg="DHCP server answers again`
	saidLost     = `level=ERROR msg="lease lost`
	saidRegained = `level=INFO msg="lost lease regained`
)

// said are the lines of the daemon's log that have all of these words.
func (s *site) said(words ...string) (lines []string) {
	for line := range strings.Lines(s.daemon.Log()) {
		if !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(line, word) }) {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

// lostOnce waits until the daemon has said of a lease that it is lost, which
// it must say once, and returns the line.
func (s *site) lostOnce(timeout time.Duration, addr netip.Addr) string {
	s.Helper()
	var lines []string
	eventually(s.T, timeout, func() error {
		if lines = s.said(saidLost, " address="+addr.String()+" "); len(lines) == 0 {
			return fmt.Errorf("no word of the loss of %s", addr)
		}
		return nil
	})
	if len(lines) > 1 {
		s.Errorf("the loss of %s is told %d times: %q", addr, len(lines), lines)
	}
	return lines[0]
}

// all waits until the daemon has just these addresses, in one state.
func (s *site) all(timeout time.Duration, state string, addrs ...netip.Addr) {
	s.Helper()
	slices.SortFunc(addrs, netip.Addr.Compare)
	eventually(s.T, timeout, func() error {
		var have []netip.Addr
		for _, l := range s.leases() {
			have = append(have, l.Address)
			if l.State != state {
				return fmt.Errorf("%s is %s, want %s", l.Address, l.State, state)
			}
		}
		if !slices.Equal(have, addrs) {
			return fmt.Errorf("the daemon has %v, want %v", have, addrs)
		}
		return nil
	})
}

// Message types beside those of plugin_test.go.
const (
	offer = 2
	nak   = 6
)

var acknowledged = regexp.MustCompile(`DHCPACK(?: on|\(eth0\)) ([0-9.]+)|lease ([0-9.]+) has been allocated`)

// everLeased are the addresses that the server has acknowledged to anybody, by
// its log.
func (s *site) everLeased() (addrs []netip.Addr) {
	s.Helper()
	for _, found := range acknowledged.FindAllStringSubmatch(s.dhcp.Log(), -1) {
		addrs = append(addrs, must(netip.ParseAddr(found[1]+found[2]))(s.T))
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}

// Each of many leases is renewed at its T1, again and again, by a daemon that
// has one processor. What counts is when the REQUESTs reach the server.
//
//	T1 <= the time between two REQUESTs <= T1 + 1 s < T2
//
// T1 is half of the lease, T2 seven eighths. In CI other tests take the
// processors, hence 3 s there. Leases that were taken at once come due at once,
// some thousand a second, of which the server's own socket loses some: when
// those are asked for again, so is all that is due, a thousand a second, hence
// 2 s.
func TestRenewalsComeInTime(t *testing.T) {
	for _, test := range []struct {
		name            string
		leases, seconds int
		rounds          int
		spread          bool // over T1, or taken at once
		latest          time.Duration
		share           float64 // of a processor
		soak            bool
	}{
		{"1500 leases of 20 s", 1500, 20, 2, false, 3 * time.Second, 0.5, false},
		{"10000 leases of 60 s", 10_000, 60, 3, true, time.Second, 0.25, true},
		{"10000 leases of 60 s taken at once", 10_000, 60, 3, false, 2 * time.Second, 0.25, true},
		{"100 leases of 20 s for 5 minutes", 100, 20, 30, true, time.Second, 0.25, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.soak && !soak {
				t.Skip("OAM_SOAK=1 has the time for this")
			}
			if !test.soak {
				t.Parallel()
			}
			s := newHost(t, lab.Kea, lab.DHCPConfig{
				Subnets: []lab.Subnet{lab.NewSubnet("10.10.0.0/16", "10.10.8.0", "10.10.99.255", "10.10.0.1")}, LeaseSeconds: test.seconds,
			})
			// As it is in production: with --debug each renewal is a line.
			s.daemon.Flags, s.daemon.Env = []string{"--dhcp-server", firstServer}, []string{"GOMAXPROCS=1"}
			check(t, s.daemon.Start())
			onOneProcessor(t, s.daemon.Pid())
			requests := watchRequests(s, s.net.Server)
			pool := must(s.requestPool("10.10.0.0/16", nil))(t)
			addrs := make([]netip.Addr, test.leases)
			t1 := time.Duration(test.seconds) * time.Second / 2
			began := time.Now()
			inParallel(t, 16, test.leases, func(n int) (err error) {
				if test.spread {
					time.Sleep(time.Until(began.Add(t1 * time.Duration(n) / time.Duration(test.leases))))
				}
				addrs[n], err = s.requestAddress(pool, lab.ScatteredMAC(n))
				return err
			})
			filled := time.Since(began)

			from, before := time.Now(), processorTime(t, s.daemon.Pid())
			eventually(t, time.Duration(test.rounds+2)*t1, func() error {
				for n := range test.leases {
					if got := len(requests.of(lab.ScatteredMAC(n))); got <= test.rounds {
						return fmt.Errorf("%s sent %d REQUESTs, want %d", lab.ScatteredMAC(n), got, test.rounds+1)
					}
				}
				return nil
			})
			watched := time.Since(from)
			share := float64(processorTime(t, s.daemon.Pid())-before) / float64(watched)

			var late []time.Duration
			again := 0
			for n := range test.leases {
				got := requests.of(lab.ScatteredMAC(n))
				for i := range test.rounds {
					if wait := got[i+1].Sub(got[i]); wait > t1-time.Second {
						late = append(late, wait-t1)
					} else {
						// Nobody answered the one before: in a burst, servers'
						// sockets overrun.
						again++
					}
				}
			}
			slices.Sort(late)
			at := func(part float64) time.Duration {
				return late[int(part*float64(len(late)-1))].Round(10 * time.Microsecond)
			}
			t.Logf("%d leases taken in %v; %d renewals in %v, late by %v (least), %v (p50), %v (p99), %v (most), and %d again; %.1f %% of a processor",
				test.leases, filled.Round(time.Millisecond), len(late), watched.Round(time.Millisecond), at(0), at(0.5), at(0.99), at(1), again, 100*share)
			if at(1) > test.latest {
				t.Errorf("a renewal was %v late, want at most %v", at(1), test.latest)
			}
			if again > len(late)/20 {
				t.Errorf("%d renewals had to be sent again", again)
			}
			if n := s.overrun(); n > 0 {
				t.Errorf("the daemon's socket lost %d answers", n)
			}
			if share > test.share && os.Getenv("OAM_RACE") != "1" {
				t.Errorf("the daemon used %.0f %% of a processor, want at most %.0f %%", 100*share, 100*test.share)
			}
			if errs := s.said("level=ERROR"); len(errs) > 0 {
				t.Errorf("%d errors, the first: %s", len(errs), errs[0])
			}
			leased := s.serverMACs()
			for n, addr := range addrs {
				if mac := lab.ScatteredMAC(n); leased[mac] != addr {
					t.Fatalf("%s was given to %s, for whom the server's table has %v", addr, mac, leased[mac])
				}
			}
		})
	}
}

// overrun is how many packets were lost on the host because a UDP socket was
// full.
func (s *site) overrun() (lost int) {
	s.Helper()
	check(s.T, s.net.Host.Do(func() error {
		text, err := os.ReadFile("/proc/thread-self/net/snmp")
		var names []string
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line)
			switch {
			case fields[0] != "Udp:":
			case names == nil:
				names = fields
			default:
				lost, err = strconv.Atoi(fields[slices.Index(names, "RcvbufErrors")])
			}
		}
		return err
	}))
	return lost
}

// onOneProcessor keeps a process on the first processor.
func onOneProcessor(t *testing.T, pid int) {
	t.Helper()
	var first unix.CPUSet
	first.Set(0)
	for _, task := range must(filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid)))(t) {
		check(t, unix.SchedSetaffinity(must(strconv.Atoi(filepath.Base(task)))(t), &first))
	}
}

// processorTime is what a process has used, by proc_pid_stat(5).
func processorTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	text := string(must(os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)))(t))
	// Before them is the program's name, which may have anything in it.
	fields := strings.Fields(text[strings.LastIndex(text, ")")+1:])
	user, system := must(strconv.Atoi(fields[11]))(t), must(strconv.Atoi(fields[12]))(t)
	return time.Duration(user+system) * time.Second / 100
}

// requestWatch knows when the REQUESTs of each client reached a node.
type requestWatch struct {
	mu    sync.Mutex // guards times
	times map[[6]byte][]time.Time
}

// of are the times of a client.
func (w *requestWatch) of(mac string) []time.Time {
	address, _ := net.ParseMAC(mac)
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.times[[6]byte(address)]
}

// watchRequests watches a node's eth0 until the end of the test. The times are
// the kernel's, so that it doesn't matter when this process gets to read.
func watchRequests(s *site, node *lab.Node) *requestWatch {
	s.Helper()
	w := &requestWatch{times: map[[6]byte][]time.Time{}}
	var fd int
	check(s.T, node.Do(func() (err error) {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, 0); err != nil {
			return err
		}
		ipv4 := binary.NativeEndian.Uint16([]byte{unix.ETH_P_IP >> 8, unix.ETH_P_IP & 0xff})
		return errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
			// So that it sees the end.
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: ipv4, Ifindex: eth0.Index}),
		)
	}))
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		w.read(fd, stop)
	}()
	s.Cleanup(func() {
		close(stop)
		<-stopped
		check(s.T, unix.Close(fd))
	})
	return w
}

func (w *requestWatch) read(fd int, stop <-chan struct{}) {
	packet, control := make([]byte, 2048), make([]byte, 128)
	for {
		select {
		case <-stop:
			return
		default:
		}
		n, controls, _, _, err := unix.Recvmsg(fd, packet, control, 0)
		if err != nil {
			continue
		}
		mac, isRequest := requester(packet[:n])
		messages, err := unix.ParseSocketControlMessage(control[:controls])
		if !isRequest || err != nil || len(messages) != 1 || len(messages[0].Data) != 16 {
			continue
		}
		seconds := binary.NativeEndian.Uint64(messages[0].Data)
		nanoseconds := binary.NativeEndian.Uint64(messages[0].Data[8:])
		w.mu.Lock()
		w.times[mac] = append(w.times[mac], time.Unix(int64(seconds), int64(nanoseconds)))
		w.mu.Unlock()
	}
}

// requester tells whether an IPv4 packet is a DHCPREQUEST, and whose.
func requester(packet []byte) (mac [6]byte, isRequest bool) {
	const udp, bootp, options = 8, 236, 4 // what stands before the next
	if len(packet) < 20 || packet[9] != unix.IPPROTO_UDP {
		return mac, false
	}
	message := packet[min(len(packet), int(packet[0]&0xf)*4+udp):]
	if len(message) < bootp+options+3 || message[0] != 1 {
		return mac, false
	}
	// The daemon writes the message's type first.
	kind := message[bootp+options:]
	return [6]byte(message[28:34]), kind[0] == 53 && kind[2] == request
}

// Servers are away, first for less than the lease and then for longer.
//
//	T1 = 2 s < T2 = 4 s < first outage < lease = 12 s < second outage
//
// However many leases there are, the log has a line a minute at most about
// it, and one for each that is lost.
func TestOutageOfMany(t *testing.T) {
	t.Parallel()
	const leases = 40
	s := newHost(t, lab.Kea, lab.DHCPConfig{RenewSeconds: 2, RebindSeconds: 4, LeaseSeconds: 12})
	check(t, s.daemon.Start())
	pool := s.pool()
	macs := map[netip.Addr]string{}
	for n := range leases {
		addr := must(s.ask(pool, fmt.Sprintf("web%d", n), lab.ScatteredMAC(n), ""))(t)
		macs[addr] = lab.ScatteredMAC(n)
	}
	var addrs []netip.Addr
	for addr := range macs {
		addrs = append(addrs, addr)
	}
	leased := func() {
		t.Helper()
		for mac, addr := range s.serverMACs() {
			if macs[addr] != mac {
				t.Errorf("the server leases %s to %s, want %s", addr, mac, macs[addr])
			}
		}
		s.only(addrs...)
	}

	check(t, s.dhcp.Kill())
	s.all(10*time.Second, "rebinding", addrs...)
	check(t, s.dhcp.Start())
	// The next attempt comes after half of the time that is left: 8 s at most.
	s.all(8*time.Second, "bound", addrs...)
	leased()
	if n := len(s.said("level=ERROR")); n > 0 {
		t.Errorf("%d errors about an outage that cost nothing", n)
	}
	if lines := s.said(saidSilence); len(lines) != 1 {
		t.Errorf("%d lines about silence: %q", len(lines), lines)
	} else {
		mentions(t, lines[0], firstServer)
	}
	if lines := s.said(saidAnswers); len(lines) != 1 {
		t.Errorf("%d lines about the end of silence: %q", len(lines), lines)
	}

	check(t, s.dhcp.Kill())
	s.all(20*time.Second, "lost", addrs...)
	if soak {
		time.Sleep(150 * time.Second)
		s.all(0, "lost", addrs...)
	}
	check(t, s.dhcp.Start())
	// Attempts of 30 s begin every 60 s, with a DISCOVER every 4 s: the first
	// that is heard brings on all others.
	s.all(40*time.Second, "bound", addrs...)
	leased()
	for n := range leases {
		mac := lab.ScatteredMAC(n)
		lines := s.said(saidLost, "mac="+mac)
		if len(lines) != 1 {
			t.Errorf("the loss of %s is told %d times: %q", mac, len(lines), lines)
			continue
		}
		mentions(t, lines[0], fmt.Sprintf("name=web%d ", n), "address=", "server="+firstServer, "no server renewed it in time", "no DHCP server answered")
		if lines := s.said(saidRegained, "mac="+mac); len(lines) != 1 {
			t.Errorf("the return of %s is told %d times: %q", mac, len(lines), lines)
		}
	}
	var last time.Time
	for _, line := range s.said(saidSilence) {
		field, _, _ := strings.Cut(strings.TrimPrefix(line, "time="), " ")
		at := must(time.Parse(time.RFC3339Nano, field))(t)
		if gap := at.Sub(last); gap < time.Minute-time.Second {
			t.Errorf("two lines about silence within %v", gap)
		}
		last = at
	}
}

// A server that lost its table while it was away makes the leases anew at their
// renewals, before anybody else gets the addresses.
//
//	outage < T1 = 3 s < T2 = 60 s
func TestServerForgets(t *testing.T) {
	t.Parallel()
	for _, kind := range lab.DHCPKinds {
		t.Run(kind.Name, func(t *testing.T) {
			t.Parallel()
			s := newHost(t, kind, lab.DHCPConfig{RenewSeconds: 3, RebindSeconds: 60, LeaseSeconds: 120})
			check(t, s.daemon.Start())
			pool := s.pool()
			mac := lab.ScatteredMAC(1)
			addr := s.acquire(pool, mac)
			check(t, s.dhcp.Kill())
			check(t, s.dhcp.Forget())
			check(t, s.dhcp.Start())
			discovers := s.count(s.net.Server, discover)
			if leases := must(s.dhcp.Leases())(t); len(leases) > 0 {
				t.Fatalf("a server without a table has %v", leases)
			}
			s.leased(addr, mac)
			s.all(time.Second, "bound", addr)
			if n := discovers(); n > 0 {
				t.Errorf("%d DISCOVERs in place of renewals", n)
			}
			if lines := s.said("level=ERROR"); len(lines) > 0 {
				t.Errorf("errors: %q", lines)
			}
			if other := s.acquire(pool, lab.ScatteredMAC(2)); other == addr {
				t.Errorf("%s is given twice", addr)
			}
			check(t, s.releaseAddress(pool, addr))
			s.notLeased(addr)
		})
	}
}

// What servers say when an address is no longer theirs to give: NAK or nothing,
// each in its own way. Either way the lease is lost, the container keeps its
// address, no other one is taken for it, and when the address is served again
// it comes back.
//
//	NAK at T1 = 2 s < T2 = 3 s < lease = 5 s, when silence ends it
func TestAddressNoLongerServed(t *testing.T) {
	t.Parallel()
	const refused, silent = "the server refused its renewal", "no server renewed it in time"
	net := lab.NewSubnet
	a, b := lab.SubnetA(), lab.SubnetB()
	emptyA := a
	emptyA.First, emptyA.Last = netip.Addr{}, netip.Addr{}
	for _, test := range []struct {
		name          string
		subnet        string
		before, after lab.DHCPConfig
		why           map[string]string // by the kind of server
		offers        bool              // of other addresses
	}{
		{
			"subnet made smaller", "10.10.0.0/16",
			lab.DHCPConfig{Subnets: []lab.Subnet{net("10.10.0.0/16", "10.10.8.0", "10.10.8.255", "10.10.0.1")}},
			lab.DHCPConfig{Subnets: []lab.Subnet{a}},
			map[string]string{"isc": refused, "kea": silent, "dnsmasq": refused},
			true,
		},
		{
			"link renumbered", "10.10.0.0/24",
			lab.DHCPConfig{Subnets: []lab.Subnet{a}},
			lab.DHCPConfig{Subnets: []lab.Subnet{emptyA, net("10.30.0.0/24", "10.30.0.100", "10.30.0.199", "10.30.0.1")}, Link: netip.MustParseAddr("10.10.0.2")},
			map[string]string{"isc": silent, "kea": silent, "dnsmasq": refused},
			true,
		},
		{
			"pool shrunk", "10.10.0.0/24",
			lab.DHCPConfig{Subnets: []lab.Subnet{a}},
			lab.DHCPConfig{Subnets: []lab.Subnet{net("10.10.0.0/24", "10.10.0.190", "10.10.0.199", "10.10.0.1")}},
			map[string]string{"isc": silent, "kea": silent, "dnsmasq": refused},
			true,
		},
		{
			"subnet taken away", "10.20.0.0/24",
			lab.DHCPConfig{Subnets: []lab.Subnet{a, b}},
			lab.DHCPConfig{Subnets: []lab.Subnet{a}},
			map[string]string{"isc": silent, "kea": refused, "dnsmasq": silent},
			false,
		},
	} {
		for _, kind := range lab.DHCPKinds {
			t.Run(test.name+"/"+kind.Name, func(t *testing.T) {
				t.Parallel()
				why := test.why[kind.Name]
				end := 15 * time.Second
				config := func(c lab.DHCPConfig) lab.DHCPConfig {
					c.RenewSeconds, c.RebindSeconds, c.LeaseSeconds = 2, 3, 5
					if kind.Name == lab.Dnsmasq.Name {
						c.RenewSeconds, c.RebindSeconds, c.LeaseSeconds = 3, 6, 120
					}
					return c
				}
				if kind.Name == lab.Dnsmasq.Name && why == silent {
					if !soak {
						t.Skip("dnsmasq leases for 120 s at least: OAM_SOAK=1 waits for that")
					}
					end = 150 * time.Second
				}
				s := newHost(t, kind, config(test.before))
				check(t, s.daemon.Start())
				pool := must(s.requestPool(test.subnet, nil))(t)
				const mac = "02:42:0a:0a:00:99"
				addr := must(s.ask(pool, "web", mac, ""))(t)
				s.leased(addr, mac)
				check(t, s.dhcp.Kill())
				s.dhcp.Config = config(test.after)
				check(t, s.dhcp.Start())
				offers, discovers, asked := s.count(s.net.Host, offer), s.count(s.net.Server, discover), s.asksFor(addr)

				line := s.lostOnce(end, addr)
				mentions(t, line, "mac="+mac, "name=web ", "server="+firstServer, why, "policy=keep")
				s.all(time.Second, "lost", addr)
				s.reached(discovers, 1)
				// INIT-REBOOT and DISCOVER both ask for it.
				s.reached(asked, 2)
				if test.offers {
					s.reached(offers, 1)
				}
				s.lostOnce(0, addr)

				// A start tries what is overdue at once.
				check(t, s.dhcp.Kill())
				s.dhcp.Config = config(test.before)
				check(t, s.dhcp.Start())
				if !soak {
					check(t, s.daemon.Restart())
				}
				s.all(70*time.Second, "bound", addr)
				s.leased(addr, mac)
				if n := len(s.said(saidRegained, addr.String())); n != 1 {
					t.Errorf("its return is told %d times", n)
				}
				if given := s.everLeased(); !slices.Equal(given, []netip.Addr{addr}) {
					t.Errorf("the server leased %v, want %s alone", given, addr)
				}
			})
		}
	}
}

// A server that ignores some of its clients for good, as an ISC dhcpd does those
// outside of its range, is no server that falls silent and answers again with
// each of the others' renewals.
//
//	T1 = 1 s < T2 = 3 s < lease = 8 s < the test < a minute
func TestServerIgnoresSome(t *testing.T) {
	t.Parallel()
	s := newHost(t, lab.ISC, lab.DHCPConfig{Subnets: []lab.Subnet{lab.SubnetA()}, RenewSeconds: 1, RebindSeconds: 3, LeaseSeconds: 8})
	check(t, s.daemon.Start())
	pool := s.pool()
	const leases = 20
	first := netip.MustParseAddr("10.10.0.110")
	var served, ignored []netip.Addr
	for n := range leases {
		if addr := s.acquire(pool, lab.ScatteredMAC(n)); addr.Less(first) {
			ignored = append(ignored, addr)
		} else {
			served = append(served, addr)
		}
	}
	if len(served) == 0 || len(ignored) == 0 {
		t.Fatalf("served will be %v, ignored %v", served, ignored)
	}
	check(t, s.dhcp.Kill())
	s.dhcp.Config.Subnets[0].First = first
	check(t, s.dhcp.Start())
	for _, addr := range ignored {
		s.lostOnce(15*time.Second, addr)
	}
	for _, addr := range served {
		if l := s.known(addr); l.State == "lost" {
			t.Errorf("%s is lost as well", addr)
		}
		s.renewed(addr, time.Now())
	}
	silences, answers := s.said(saidSilence), s.said(saidAnswers)
	if len(silences) != 1 || len(answers) > 1 {
		t.Errorf("told of silence %d times, and of its end %d times: %q", len(silences), len(answers), answers)
	}
}

// The partner of a Kea that died renews what that one had leased, and is from
// then on the one that is asked. It takes over only once clients have waited
// for the primary longer than a second, by their secs field.
//
//	max-ack-delay = 1 s < T2 - T1 = 2 s, what secs says in REBINDING
//	T2 = 4 s < fail-over < lease = 12 s
func TestFailOver(t *testing.T) {
	t.Parallel()
	const leases, maxUnacked = 4, 2
	s := &site{T: t, lab: lab.ForTest(t, lab.DHCPServers)}
	s.net = must(s.lab.Standard())(t)
	pair := must(lab.StartKeaPair(s.net.Server, s.net.Second, [2]string{firstServer, secondServer}, lab.DHCPConfig{
		Subnets: []lab.Subnet{lab.SubnetA(), lab.SubnetB()}, RenewSeconds: 2, RebindSeconds: 4, LeaseSeconds: 12,
	}, maxUnacked))(t)
	s.dhcp = pair[0]
	standby := s.on(pair[1])
	s.daemon = must(s.net.Host.NewDaemon(filepath.Join(s.lab.Scratch, "talkingdata.sock"), "--debug", "--dhcp-server", firstServer+","+secondServer))(t)
	check(t, s.daemon.Start())
	pool := s.pool()
	var addrs []netip.Addr
	macs := map[netip.Addr]string{}
	for n := range leases {
		addr := s.acquire(pool, lab.ScatteredMAC(n))
		addrs, macs[addr] = append(addrs, addr), lab.ScatteredMAC(n)
		if by := s.known(addr).Server.String(); by != firstServer {
			t.Fatalf("%s is from %s, want the primary", addr, by)
		}
	}

	check(t, pair[0].Kill())
	eventually(t, 12*time.Second, func() error {
		for _, l := range s.leases() {
			if l.Server.String() != secondServer {
				return fmt.Errorf("%s is still %s's: %s", l.Address, l.Server, l.State)
			}
		}
		return nil
	})
	s.all(time.Second, "bound", addrs...)
	standby.only(addrs...)
	for _, addr := range addrs {
		standby.leased(addr, macs[addr])
	}
	if lines := s.said("level=ERROR"); len(lines) > 0 {
		t.Errorf("errors: %q", lines)
	}
	// Renewed at T1, without a word to the primary.
	toPrimary, toStandby := s.count(s.net.Server, request), s.count(s.net.Second, request)
	s.reached(toStandby, 2*leases)
	if n := toPrimary(); n > 0 {
		t.Errorf("%d REQUESTs to the dead primary", n)
	}
	if lines := s.said("level=ERROR"); len(lines) > 0 {
		t.Errorf("errors: %q", lines)
	}
	for _, addr := range addrs {
		check(t, s.releaseAddress(pool, addr))
	}
	standby.notLeased()
}

// A second server that we ask has another idea of the link: it offers another
// subnet and refuses what it hasn't leased. The first one is slow, so that
// the other's word always comes before its own.
//
//	T2 = 3 s < the first one's silence < T2 + 2 s (how long a NAK is held back)
func TestRogueServer(t *testing.T) {
	t.Parallel()
	s := newHost(t, lab.Kea, lab.DHCPConfig{RenewSeconds: 1, RebindSeconds: 3, LeaseSeconds: 60}, "--dhcp-server", firstServer+","+secondServer)
	a := lab.SubnetA()
	a.First, a.Last = netip.Addr{}, netip.Addr{}
	rogue := s.on(must(s.net.Second.StartDHCP(lab.Dnsmasq, lab.DHCPConfig{
		Subnets: []lab.Subnet{a, lab.NewSubnet("10.30.0.0/24", "10.30.0.100", "10.30.0.199", "10.30.0.1")},
		Link:    netip.MustParseAddr("10.10.0.2"),
	}))(t))
	check(t, s.daemon.Start())
	offers, naks := s.count(s.net.Host, offer), s.count(s.net.Host, nak)
	slowly := func(first func() int, act func()) {
		t.Helper()
		check(t, unix.Kill(s.dhcp.Pid(), unix.SIGSTOP))
		before := first()
		act()
		s.reached(first, before+1)
		check(t, unix.Kill(s.dhcp.Pid(), unix.SIGCONT))
	}

	pool := s.pool()
	mac := lab.ScatteredMAC(1)
	answer := make(chan netip.Addr, 1)
	slowly(offers, func() {
		go func() {
			defer close(answer)
			if addr, err := s.requestAddress(pool, mac); err != nil {
				t.Errorf("request an address: %v", err)
			} else {
				answer <- addr
			}
		}()
	})
	addr, ok := <-answer
	if !ok {
		t.FailNow()
	}
	s.leased(addr, mac)
	if by := s.known(addr).Server.String(); by != firstServer {
		t.Errorf("%s is %s's", addr, by)
	}
	rogue.notLeased()

	obtained := s.known(addr).ObtainedAt
	slowly(naks, func() {})
	eventually(t, 5*time.Second, func() error {
		if l := s.known(addr); l.State != "bound" || !l.ObtainedAt.After(obtained) {
			return fmt.Errorf("not renewed: %+v", l)
		}
		return nil
	})
	s.renewed(addr, s.leased(addr, mac).Expires)
	if lines := s.said("level=ERROR"); len(lines) > 0 {
		t.Errorf("errors: %q", lines)
	}
	if given := rogue.everLeased(); given != nil {
		t.Errorf("the rogue leased %v", given)
	}
}

// The container of a lost lease is stopped or restarted where its network says
// so, and no other.
//
//	T1 = 3 s < T2 = 6 s < the test < lease = 120 s: a NAK ends it, not time
//
// A renewal that the server missed while it was away is asked for again at T2.
func TestOnLeaseLost(t *testing.T) {
	t.Parallel()
	wide := lab.NewSubnet("10.10.0.0/16", "10.10.8.0", "10.10.8.255", "10.10.0.1")
	// Addresses that outlive the new numbers, for neighbours on each network.
	for n := range 3 {
		wide.Reservations = append(wide.Reservations, lab.Reservation{
			MAC: fmt.Sprintf("02:42:0a:0a:00:1%d", n), Addr: netip.AddrFrom4([4]byte{10, 10, 0, byte(10 + n)}),
		})
	}
	narrow := lab.SubnetA()
	narrow.Reservations = wide.Reservations
	config := lab.DHCPConfig{Subnets: []lab.Subnet{wide}, RenewSeconds: 3, RebindSeconds: 6, LeaseSeconds: 120}
	s := newSite(t, lab.Dnsmasq, config)
	s.daemon.Flags = append(s.daemon.Flags, "--docker", "unix://"+s.engine.Socket())
	check(t, s.daemon.Restart())
	check(t, s.net.Host.Attach("eth2"))

	var neighbours []resident
	lost := map[string]resident{}
	for n, policy := range []string{"keep", "stop", "restart"} {
		var options []string
		if policy != "keep" { // the default
			options = []string{"--ipam-opt", "on_lease_lost=" + policy}
		}
		s.network(policy, fmt.Sprintf("eth%d", n), "10.10.0.0/16", options...)
		s.run("neighbour-"+policy, policy, "--mac-address", wide.Reservations[n].MAC)
		neighbours = append(neighbours, s.resident("neighbour-"+policy))
		s.run(policy, policy)
		lost[policy] = s.resident(policy)
	}
	check(t, s.dhcp.Kill())
	s.dhcp.Config.Subnets = []lab.Subnet{narrow}
	check(t, s.dhcp.Start())

	for policy, was := range lost {
		mentions(t, s.lostOnce(20*time.Second, was.addr), "policy="+policy, was.mac, "the server refused its renewal")
	}
	state := func(container string) string {
		t.Helper()
		return s.docker("inspect", "--format", "{{.State.Running}} {{.State.StartedAt}} {{.State.Pid}}", container)
	}
	eventually(t, 20*time.Second, func() error {
		if now := state("stop"); !strings.HasPrefix(now, "false ") {
			return fmt.Errorf("the container to be stopped is %s", now)
		}
		if now := state("restart"); now == "true "+lost["restart"].life || !strings.HasPrefix(now, "true ") {
			return fmt.Errorf("the container to be restarted is %s, was %s", now, lost["restart"].life)
		}
		return nil
	})
	again := s.resident("restart")
	if !narrow.Prefix.Contains(again.addr) {
		t.Errorf("the restarted container has %s", again.addr)
	}
	s.undisturbed(append(neighbours, again)...)
	s.pings(s.net.Client, again.addr)

	if now := state("keep"); now != "true "+lost["keep"].life {
		t.Errorf("the container to be kept is %s, was %s", now, lost["keep"].life)
	}
	if addr := s.addr("keep", "eth0"); addr != lost["keep"].addr {
		t.Errorf("the container to be kept has %s, had %s", addr, lost["keep"].addr)
	}
	if l := s.known(lost["keep"].addr); l.State != "lost" {
		t.Errorf("the lease of the container to be kept: %+v", l)
	}
	for _, policy := range []string{"stop", "restart"} {
		if l, err := s.find(lost[policy].addr); err == nil {
			t.Errorf("%s: the daemon still has %+v", policy, l)
		}
		if lines := s.said("container of the lost lease was dealt with", lost[policy].addr.String(), "policy="+policy); len(lines) != 1 {
			t.Errorf("%s: told in %q", policy, lines)
		}
	}
	// The stopped one starts with an address of the new numbers.
	s.docker("start", "stop")
	if addr, _ := s.holds("stop", "eth0"); !narrow.Prefix.Contains(addr) {
		t.Errorf("the stopped container starts with %s", addr)
	}
}

// Without the engine's socket a lost lease is told of, the container runs on,
// and the daemon with it.
//
//	T1 = 3 s < T2 = 6 s < the test < lease = 120 s: a NAK ends it, not time
//
// A renewal that the server missed while it was away is asked for again at T2.
func TestOnLeaseLostWithoutEngine(t *testing.T) {
	t.Parallel()
	config := lab.DHCPConfig{
		Subnets:      []lab.Subnet{lab.NewSubnet("10.10.0.0/16", "10.10.8.0", "10.10.8.255", "10.10.0.1")},
		RenewSeconds: 3, RebindSeconds: 6, LeaseSeconds: 120,
	}
	s := newHost(t, lab.Dnsmasq, config, "--docker", "unix:///nonexistent/docker.sock", "--on-lease-lost", "restart")
	check(t, s.daemon.Start())
	pool := must(s.requestPool("10.10.0.0/16", nil))(t)
	addr := s.acquire(pool, lab.ScatteredMAC(1))
	check(t, s.dhcp.Kill())
	s.dhcp.Config.Subnets = []lab.Subnet{lab.SubnetA()}
	check(t, s.dhcp.Start())
	mentions(t, s.lostOnce(20*time.Second, addr), "policy=restart")
	var lines []string
	eventually(t, 5*time.Second, func() error {
		if lines = s.said("level=ERROR", "container of the lost lease still runs"); len(lines) == 0 {
			return errors.New("no word of the engine")
		}
		return nil
	})
	mentions(t, lines[0], "address="+addr.String(), "/nonexistent/docker.sock", "--docker", "DOCKER")
	s.all(time.Second, "lost", addr)
	other := s.acquire(pool, lab.ScatteredMAC(2))
	if !lab.SubnetA().Prefix.Contains(other) {
		t.Errorf("got %s", other)
	}
	check(t, s.releaseAddress(pool, addr))
	s.all(time.Second, "bound", other)
}
