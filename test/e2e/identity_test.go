package e2e

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// Engines from 29 on tell containers' names and draw a new MAC at each start.
// Most of what follows replays that on the plugin's socket, with real servers.

// container is one as engine 29 tells of it.
type container struct {
	name, mac string
	addr      netip.Addr
	took      time.Duration // its start
}

// randomMAC is one of those that engines draw.
func randomMAC() string {
	mac := make(net.HardwareAddr, 6)
	for i := range mac {
		mac[i] = byte(rand.Uint32())
	}
	mac[0] = mac[0]&^0x01 | 0x02
	return mac.String()
}

// ask is a RequestAddress. Empty are a name of an engine before 29, and an
// address that nobody asks for.
func (s *site) ask(pool, name, mac, ip string) (netip.Addr, error) {
	options := map[string]string{"com.docker.network.endpoint.macaddress": mac}
	if name != "" {
		options["com.docker.network.endpoint.name"] = name
	}
	var out struct{ Address string }
	err := s.call(s.Context(), "RequestAddress", map[string]any{"PoolID": pool, "Address": ip, "Options": options}, &out)
	if err != nil {
		return netip.Addr{}, err
	}
	prefix, err := netip.ParsePrefix(out.Address)
	return prefix.Addr(), err
}

// begin starts a container under a name, with a MAC that it never had, and
// finds it in the server's table.
func (s *site) begin(pool, name string) container {
	s.Helper()
	return s.beginAt(pool, name, "")
}

// beginAt is begin with --ip.
func (s *site) beginAt(pool, name, ip string) container {
	s.Helper()
	c := container{name: name, mac: randomMAC()}
	began := time.Now()
	c.addr = must(s.ask(pool, name, c.mac, ip))(s.T)
	c.took = time.Since(began)
	s.leased(c.addr, c.mac)
	return c
}

// end stops a container.
func (s *site) end(pool string, c container) {
	s.Helper()
	check(s.T, s.releaseAddress(pool, c.addr))
}

// traffic is what came to the server.
type traffic struct{ discovers, requests, releases int }

// oneRoundTrip is an INIT-REBOOT and nothing else.
var oneRoundTrip = traffic{requests: 1}

// watch counts what comes to the server from now on. The returned function
// tells what came since its last call.
func (s *site) watch() (since func() traffic) {
	s.Helper()
	discovers, requests, releases := s.count(s.net.Server, discover), s.count(s.net.Server, request), s.count(s.net.Server, release)
	var last traffic
	return func() traffic {
		s.Helper()
		before := last
		last = traffic{discovers(), requests(), releases()}
		return traffic{last.discovers - before.discovers, last.requests - before.requests, last.releases - before.releases}
	}
}

// asksFor counts the messages that ask the server for an address (option 50).
func (s *site) asksFor(addr netip.Addr) (sofar func() int) {
	s.Helper()
	return s.countBytes(s.net.Server, fmt.Sprintf("|3204%x|", addr.AsSlice()))
}

// is reports whether the server got just that. A machine that is so loaded that
// an answer takes longer than the daemon waits before it repeats itself may
// have it count more of the same.
func (did traffic) is(want traffic, took time.Duration) bool {
	const patience = 150 * time.Millisecond
	if took > patience {
		if want.discovers > 0 {
			did.discovers = min(did.discovers, want.discovers)
		}
		if want.requests > 0 {
			did.requests = min(did.requests, want.requests)
		}
	}
	return did == want
}

// sameAs fails unless a container has the address that it had, for which the
// server was asked as it should be.
func (s *site) sameAs(when string, now, before container, did, want traffic) {
	s.Helper()
	if now.addr != before.addr || !did.is(want, now.took) {
		s.Errorf("%s: %s had %s and has %s; the server got %+v, want %+v", when, now.name, before.addr, now.addr, did, want)
	}
}

// A container keeps its address through restarts, removals and new networks of
// the same subnet, by one round trip to the server, and nobody else gets it.
//
//	every pause < RELEASE_DELAY = 30 s < T1 = 300 s
//
// so that each REQUEST is an INIT-REBOOT's and none a renewal's.
func TestNameKeepsAddress(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		s := newHost(t, kind, lab.DHCPConfig{})
		check(t, s.daemon.Start())
		pool := s.pool()
		did := s.watch()
		first := s.begin(pool, "web")
		if did := did(); !did.is(traffic{discovers: 1, requests: 1}, first.took) {
			t.Errorf("for its first address the server got %+v", did)
		}
		// The form of the identity: no hardware type, then text.
		id := string(must(hex.DecodeString(s.leased(first.addr, first.mac).ClientID))(t))
		if !strings.HasPrefix(id, "\x00") || !strings.HasSuffix(id, "/10.10.0.0/24/web") {
			t.Errorf("client identifier %q in the server's table", id)
		}

		web := first
		for _, pause := range []time.Duration{10 * time.Millisecond, 80 * time.Millisecond, 200 * time.Millisecond} {
			s.end(pool, web)
			time.Sleep(pause) // the engine's own
			web = s.begin(pool, "web")
			s.sameAs(fmt.Sprintf("restart with a pause of %v", pause), web, first, did(), oneRoundTrip)
		}

		// rm, and somebody else comes before the next run.
		s.end(pool, web)
		if state := s.known(web.addr).State; state != "releasing" {
			t.Errorf("the lease of a container that left is %s", state)
		}
		other := s.begin(pool, "other")
		if other.addr == web.addr {
			t.Errorf("%s was given to another while its release waits", other.addr)
		}
		did()
		web = s.begin(pool, "web")
		s.sameAs("rm and run", web, first, did(), oneRoundTrip)

		// Its network goes and comes back.
		s.end(pool, web)
		s.end(pool, other)
		s.releasePool(pool)
		pool = s.pool() // with a probe
		did()
		web = s.begin(pool, "web")
		s.sameAs("another network of the subnet", web, first, did(), oneRoundTrip)

		// One container in two networks of the subnet.
		second := must(s.requestPool("10.10.0.0/24", map[string]string{"client_id": "name"}))(t)
		did()
		twin := s.begin(second, "web")
		if did := did(); twin.addr == web.addr || !did.is(traffic{discovers: 1, requests: 1}, twin.took) {
			t.Errorf("web has %s in one network and %s in the other, after %+v", web.addr, twin.addr, did)
		}
		if id, want := s.leased(twin.addr, twin.mac).ClientID, "01"+strings.ReplaceAll(twin.mac, ":", ""); id != want {
			t.Errorf("client identifier %s in the second network, want %s", id, want)
		}
		mentions(t, s.daemon.Log(), "the container's name has a lease already", "held="+web.addr.String())
		s.end(second, twin)
		s.notLeased(twin.addr)

		// docker rename web web-old, docker run --name web: the driver isn't
		// told of the former.
		green := s.begin(pool, "web")
		if green.addr == web.addr {
			t.Errorf("both have %s", web.addr)
		}
		s.leased(web.addr, web.mac)
		// Each restarts, under the name that it has now.
		s.end(pool, web)
		blue := s.begin(pool, "web-old")
		s.end(pool, green)
		green = s.begin(pool, "web")
		if blue.addr == green.addr {
			t.Errorf("both have %s", blue.addr)
		}
		for _, c := range []container{blue, green} {
			s.leased(c.addr, c.mac)
			if known := s.known(c.addr); known.MAC != c.mac || known.State != "bound" {
				t.Errorf("%+v is known as %+v", c, known)
			}
		}
	})
}

// After the delay the server has the address back. It is still asked for, and
// given when it is free.
//
//	release_delay = 2 s < T1 = 300 s
func TestReleaseDelay(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		const delay = 2 * time.Second
		s := newHost(t, kind, lab.DHCPConfig{})
		check(t, s.daemon.Start())
		pool := must(s.requestPool("10.10.0.0/24", map[string]string{"release_delay": delay.String()}))(t)
		first := s.begin(pool, "web")
		asks := s.asksFor(first.addr)
		did := s.watch()
		left := time.Now()
		s.end(pool, first)
		s.leased(first.addr, first.mac)
		// The table first: a loaded machine may be late with either.
		s.notLeased(first.addr)
		if took := time.Since(left); took < delay || took > delay+2*time.Second {
			t.Errorf("released after %v, want %v", took, delay)
		}
		if did := did(); did != (traffic{releases: 1}) {
			t.Errorf("meanwhile the server got %+v", did)
		}
		if left := s.leases(); len(left) != 0 {
			t.Errorf("the daemon still has %+v", left)
		}

		web := s.begin(pool, "web")
		s.sameAs("after the release", web, first, did(), traffic{discovers: 1, requests: 1})
		if n := asks(); n < 2 {
			t.Errorf("%d of DISCOVER and REQUEST asked for %s", n, first.addr)
		}

		// With 0s nothing waits, whatever the others say.
		atOnce := must(s.requestPool("10.10.0.0/24", map[string]string{"release_delay": "0s"}))(t)
		job := s.begin(atOnce, "job")
		did()
		s.end(atOnce, job)
		s.notLeased(job.addr)
		if did := did(); did != (traffic{releases: 1}) {
			t.Errorf("with release_delay=0s the server got %+v", did)
		}

		// Somebody else has the address by then: nobody is disturbed.
		s.end(pool, web)
		s.notLeased(web.addr)
		taker := s.beginAt(pool, "taker", web.addr.String())
		if web = s.begin(pool, "web"); web.addr == taker.addr {
			t.Errorf("%s was given twice", web.addr)
		}
		s.leased(taker.addr, taker.mac)
	})
}

// A release that waits outlives the network and the daemon, however that ends,
// and is sent in the end, once.
//
//	the daemon's absence, and the look at it < release_delay = 4 s, which begins anew with it
func TestPendingReleaseSurvives(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		const delay = 4 * time.Second
		s := newHost(t, kind, lab.DHCPConfig{})
		check(t, s.daemon.Start())
		pool := must(s.requestPool("10.10.0.0/24", map[string]string{"release_delay": delay.String()}))(t)
		stays, goes := s.begin(pool, "stays"), s.begin(pool, "goes")
		did := s.watch()
		s.end(pool, stays)
		s.end(pool, goes)
		s.releasePool(pool)
		check(t, s.daemon.Kill())
		began := time.Now()
		check(t, s.daemon.Start())
		known := map[netip.Addr]daemonLease{}
		for _, lease := range s.leases() {
			known[lease.Address] = lease
		}
		for _, c := range []container{stays, goes} {
			if lease := known[c.addr]; lease.State != "releasing" || lease.Name != c.name {
				t.Errorf("%+v is known as %+v", c, lease)
			}
			s.leased(c.addr, c.mac)
		}
		if did := did(); did != (traffic{}) {
			t.Errorf("meanwhile the server got %+v", did)
		}
		// One comes back in time.
		pool = s.pool()
		did()
		back := s.begin(pool, "stays")
		s.sameAs("after kill -9", back, stays, did(), oneRoundTrip)
		s.notLeased(goes.addr)
		if took := time.Since(began); took < delay || took > delay+3*time.Second {
			t.Errorf("released %v after the start, want %v", took, delay)
		}
		if did := did(); did != (traffic{releases: 1}) {
			t.Errorf("in the end the server got %+v", did)
		}
		s.leased(back.addr, back.mac)

		// And over a SIGTERM, on the new network with the usual delay.
		s.end(pool, back)
		check(t, s.daemon.Restart())
		if state := s.known(back.addr).State; state != "releasing" {
			t.Errorf("after SIGTERM the lease is %s", state)
		}
		did()
		s.sameAs("after SIGTERM", s.begin(pool, "stays"), stays, did(), oneRoundTrip)
	})
}

// An address, or a MAC, whose release waits goes to who asks for it, at once.
// A server with threads may read the DISCOVER before it has done what the
// RELEASE says, about twice in 100 rounds: then it is asked again.
//
//	every round < RELEASE_DELAY = 30 s < T1 = 300 s
func TestPendingReleaseInTheWay(t *testing.T) {
	t.Parallel()
	for _, server := range []struct {
		name    string
		kind    lab.DHCPKind
		threads int
		rounds  int
	}{
		{"isc", lab.ISC, 0, 20}, {"kea", lab.Kea, 0, 20}, {"dnsmasq", lab.Dnsmasq, 0, 20}, {"kea with threads", lab.Kea, 4, 200},
	} {
		t.Run(server.name, func(t *testing.T) {
			t.Parallel()
			rounds := server.rounds
			if soak {
				rounds *= 20
			}
			s := newHost(t, server.kind, lab.DHCPConfig{Threads: server.threads})
			check(t, s.daemon.Start())
			pool := s.pool()
			holder := s.begin(pool, "c0")
			did := s.watch()
			var longest time.Duration
			for n := range rounds {
				s.end(pool, holder)
				next := container{name: fmt.Sprintf("c%d", n+1), mac: randomMAC()}
				began := time.Now()
				var err error
				if next.addr, err = s.ask(pool, next.name, next.mac, holder.addr.String()); err != nil {
					t.Fatalf("round %d: %v", n, err)
				}
				longest = max(longest, time.Since(began))
				holder = next
			}
			s.leased(holder.addr, holder.mac)
			got, want := did(), traffic{rounds, rounds, rounds}
			t.Logf("in %d rounds, of which the longest took %v, the server got %+v", rounds, longest, got)
			if server.threads > 0 {
				want.discovers = got.discovers
			}
			if !got.is(want, longest) {
				t.Errorf("want %+v", want)
			}
			if longest > time.Second {
				t.Errorf("a round took %v", longest)
			}

			// The same MAC under another name.
			s.end(pool, holder)
			began := time.Now()
			successor := container{name: "successor", mac: holder.mac, addr: must(s.ask(pool, "successor", holder.mac, ""))(t)}
			if did := did(); !did.is(traffic{1, 1, 1}, time.Since(began)) {
				t.Errorf("for a MAC whose release waits the server got %+v", did)
			}
			s.leased(successor.addr, successor.mac)

			// The same name, which wants another address this time. Servers
			// offer what the client has, whatever it asks for.
			s.end(pool, successor)
			wanted := "10.10.0.180"
			if successor.addr.String() == wanted {
				// dnsmasq chooses by a hash.
				wanted = "10.10.0.181"
			}
			moved := s.beginAt(pool, "successor", wanted)
			if moved.addr.String() != wanted {
				t.Errorf("asked for %s, got %s", wanted, moved.addr)
			}
			s.notLeased(successor.addr)
		})
	}
}

// second puts another Docker host on the LAN: a machine that was cloned, so
// that only its MACs differ.
func (s *site) second() *site {
	s.Helper()
	other := s.on(s.dhcp)
	other.daemon = must(s.net.Second.NewDaemon(filepath.Join(s.lab.Scratch, "second.sock"), "--debug", "--dhcp-server", firstServer))(s.T)
	return other
}

// Containers of one name on two hosts are two clients, whatever their hosts
// have in common.
//
//	T1 = 1 s (dnsmasq 3 s)  <  the time that it waits  <  T2 = 60 s  <  the lease = 120 s
func TestTwoHostsOneName(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		config := lab.DHCPConfig{LeaseSeconds: 120, RenewSeconds: 1, RebindSeconds: 60}
		if kind.Name == lab.Dnsmasq.Name {
			config.RenewSeconds = 3
		}
		s := newHost(t, kind, config)
		other := s.second()
		check(t, s.daemon.Start())
		check(t, other.daemon.Start())
		pool, otherPool := s.pool(), other.pool()
		here, there := s.begin(pool, "web"), other.begin(otherPool, "web")
		if here.addr == there.addr {
			t.Fatalf("both have %s", here.addr)
		}
		s.only(here.addr, there.addr)
		// Each comes back to its own, also when the other has just gone.
		for range 3 {
			s.end(pool, here)
			other.end(otherPool, there)
			thereAgain, hereAgain := other.begin(otherPool, "web"), s.begin(pool, "web")
			if thereAgain.addr != there.addr || hereAgain.addr != here.addr {
				t.Fatalf("had %s and %s, have %s and %s", here.addr, there.addr, hereAgain.addr, thereAgain.addr)
			}
			here, there = hereAgain, thereAgain
		}
		other.end(otherPool, there)

		// The second host gets a copy of the first one's disk. What the first
		// one holds is not its to renew, nor is it what its containers get.
		check(t, s.daemon.Stop())
		check(t, other.daemon.Stop())
		file := filepath.Join(s.daemon.DataDir, "oam-docker-ipam.db")
		check(t, os.WriteFile(filepath.Join(other.daemon.DataDir, filepath.Base(file)), must(os.ReadFile(file))(t), 0o600))
		fromThere := s.countBytes(s.net.Server, fmt.Sprintf("|%x|", netip.MustParseAddr("10.10.0.3").AsSlice()))
		check(t, s.daemon.Start())
		check(t, other.daemon.Start())
		before := s.leased(here.addr, here.mac).Expires
		eventually(t, 15*time.Second, func() error {
			if lease, err := other.find(here.addr); err != nil || lease.State != "waiting" {
				return fmt.Errorf("the copy's lease is %+v: %v", lease, err)
			}
			return nil
		})
		mentions(t, other.daemon.Log(), "this is another host than the one that took the stored leases", "reconcile")
		s.renewed(here.addr, before)
		if n := fromThere(); n != 0 {
			t.Errorf("%d messages about copied leases", n)
		}
		if copied := other.begin(pool, "web"); copied.addr == here.addr {
			t.Errorf("both have %s", copied.addr)
		}
		s.leased(here.addr, here.mac)
		if state := s.known(here.addr).State; state != "bound" {
			t.Errorf("the first host's lease is %s", state)
		}
	})
}

// Names that engines take and that don't fit into an option, or only just,
// work as others do, and stay apart.
//
//	every pause < RELEASE_DELAY = 30 s < T1 = 300 s
func TestLongNames(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		s := newHost(t, kind, lab.DHCPConfig{})
		check(t, s.daemon.Start())
		pool := s.pool()
		var containers []container
		given := map[netip.Addr]string{}
		ids := map[string]string{}
		for _, length := range []int{63, 100, 101, 102, 200, 255, 500} {
			for _, end := range []string{"a", "b"} {
				c := s.begin(pool, strings.Repeat("x", length-1)+end)
				id := s.leased(c.addr, c.mac).ClientID
				if given[c.addr] != "" || ids[id] != "" {
					t.Errorf("%s and %s share %s or the client identifier %s", given[c.addr], c.name, c.addr, id)
				}
				if n := len(id) / 2; n > 254 {
					t.Errorf("client identifier of %d bytes", n)
				}
				given[c.addr], ids[id] = c.name, c.name
				containers = append(containers, c)
			}
		}
		did := s.watch()
		for _, c := range containers {
			s.end(pool, c)
			s.sameAs("restart", s.begin(pool, c.name), c, did(), oneRoundTrip)
		}
	})
}

// client_id=mac is how it was before there were names: the server sees the
// MAC, whose lease ends with the container.
func TestClientIDMAC(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		s := newHost(t, kind, lab.DHCPConfig{})
		check(t, s.daemon.Start())
		pool := must(s.requestPool("10.10.0.0/24", map[string]string{"client_id": "mac"}))(t)
		did := s.watch()
		web := s.begin(pool, "web")
		row := s.leased(web.addr, web.mac)
		if want := "01" + strings.ReplaceAll(web.mac, ":", ""); row.ClientID != want || row.Hostname != "web" {
			t.Errorf("in the server's table %+v, want the client identifier %s", row, want)
		}
		s.end(pool, web)
		s.notLeased(web.addr)
		if did := did(); !did.is(traffic{1, 1, 1}, web.took) {
			t.Errorf("the server got %+v", did)
		}
		// A MAC of its own, as by --mac-address, finds its address again.
		asks := s.asksFor(web.addr)
		began := time.Now()
		again := container{name: "web", mac: web.mac, addr: must(s.ask(pool, "web", web.mac, ""))(t), took: time.Since(began)}
		s.sameAs("again", again, web, did(), traffic{discovers: 1, requests: 1})
		if n := asks(); n < 2 {
			t.Errorf("%d of DISCOVER and REQUEST asked for %s", n, web.addr)
		}
		// An engine before 29 tells no name: with client_id=name that is refused.
		byName := must(s.requestPool("10.10.0.0/24", map[string]string{"client_id": "name"}))(t)
		did()
		_, err := s.ask(byName, "", randomMAC(), "")
		if !errors.Is(err, lab.ErrRefused) {
			t.Fatalf("client_id=name without a name: %v", err)
		}
		mentions(t, err.Error(), "client_id=name", "29", "client_id=auto")
		if did := did(); did != (traffic{}) {
			t.Errorf("for nothing the server got %+v", did)
		}
	})
}

// A whole conversation of an engine 29, as it was recorded, with each server:
// every container keeps its first address to the end, and one release for each
// is all that there is.
//
//	the recording's pauses < RELEASE_DELAY = 30 s < T1 = 300 s
func TestRecordingOfEngine29(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		s := newHost(t, kind, lab.DHCPConfig{Subnets: []lab.Subnet{
			lab.SubnetA(),
			lab.NewSubnet("192.168.59.0/24", "192.168.59.100", "192.168.59.199", "192.168.59.1"),
			lab.NewSubnet("10.9.0.0/24", "10.9.0.100", "10.9.0.199", "10.9.0.1"),
		}})
		// The server that one of its networks names. Kea looks for addresses at
		// its start, at which an ISC dhcpd takes this one for its own.
		must(s.net.Server.Run("ip", "address", "add", "192.168.59.203/32", "dev", "eth0"))(t)
		if kind.Name == lab.Kea.Name {
			check(t, s.dhcp.Stop())
			check(t, s.dhcp.Start())
		}
		check(t, s.daemon.Start())
		did := s.watch()

		pools := map[string]string{}     // recorded ID -> ours
		addrs := map[string]string{}     // recorded pool and address -> ours
		first := map[string]netip.Addr{} // a container's
		var starts, probes, refused int
		var longest time.Duration
		next := 10 // the number that the recording plugin gave last
		file := must(os.Open("../../server/testdata/engine-29.jsonl"))(t)
		defer file.Close()
		for lines := bufio.NewScanner(file); lines.Scan(); {
			var call struct {
				Step, Path string
				Body       map[string]any
			}
			check(t, json.Unmarshal(lines.Bytes(), &call))
			method := strings.TrimPrefix(call.Path, "/IpamDriver.")
			if call.Body == nil {
				continue // what a daemon of ours is asked at every start
			}
			poolID, _ := call.Body["PoolID"].(string)
			addr, _ := call.Body["Address"].(string)
			options, _ := call.Body["Options"].(map[string]any)
			if ours := pools[poolID]; ours != "" {
				call.Body["PoolID"] = ours
			}
			if ours := addrs[poolID+" "+addr]; ours != "" && method == "ReleaseAddress" {
				call.Body["Address"] = ours
			}
			var out struct{ PoolID, Address string }
			began := time.Now()
			err := s.call(t.Context(), method, call.Body, &out)
			longest = max(longest, time.Since(began))
			if errors.Is(err, lab.ErrRefused) {
				refused++ // TestReplay in server says which and why
			} else {
				check(t, err)
			}
			switch method {
			case "RequestPool":
				pools[fmt.Sprintf("pool-%t-%s", call.Body["V6"], call.Body["Pool"])] = out.PoolID
				if err == nil {
					probes++
				}
			case "RequestAddress":
				if addr == "" {
					addr = fmt.Sprintf("192.168.59.%d", next)
				}
				next++
				if err != nil {
					continue
				}
				got := must(netip.ParsePrefix(out.Address))(t).Addr()
				addrs[poolID+" "+addr] = got.String()
				mac, isEndpoint := options["com.docker.network.endpoint.macaddress"].(string)
				if !isEndpoint {
					continue
				}
				starts++
				name := options["com.docker.network.endpoint.name"].(string)
				if _, known := first[name]; !known {
					first[name] = got
				}
				if got != first[name] {
					t.Errorf("%s: %s had %s and has %s", call.Step, name, first[name], got)
				}
				s.leased(got, mac)
			}
		}
		if len(first) != 4 || starts < 9 || refused != 2 {
			t.Errorf("%d containers, %d starts, %d refusals", len(first), starts, refused)
		}
		if first["c2"].String() != "192.168.59.177" {
			t.Errorf("asked for 192.168.59.177, got %s", first["c2"])
		}
		if did, want := did(), (traffic{discovers: len(first) + probes, requests: starts}); !did.is(want, longest) {
			t.Errorf("the server got %+v, want %+v", did, want)
		}
		for _, known := range s.leases() {
			if known.State != "releasing" || known.Address != first[known.Name] {
				t.Errorf("in the end there is %+v", known)
			}
		}
		// They wait for the daemon's delay, since their networks had none of
		// their own: with the next daemon for another one.
		s.daemon.Flags = append(s.daemon.Flags, "--release-delay", "0s")
		check(t, s.daemon.Restart())
		s.notLeased()
		if did := did(); did != (traffic{releases: len(first)}) {
			t.Errorf("in the end the server got %+v", did)
		}
	})
}

// A container whose identity has a lease starts on it when no server answers,
// after 4 s, and has it renewed as soon as one does. Everybody else is refused
// within DHCP_TIMEOUT.
//
//	4 s  <  DHCP_TIMEOUT = 6 s  <  the outage  <  RELEASE_DELAY = 30 s  <  T1 = 300 s  <  the lease = 600 s
func TestContainersStartInAnOutage(t *testing.T) {
	t.Parallel()
	outages := []struct {
		name   string
		flags  []string
		begin  func(s *site)
		finish func(s *site)
	}{
		{
			"server killed", nil,
			func(s *site) { check(s.T, s.dhcp.Kill()) },
			func(s *site) { check(s.T, s.dhcp.Start()) },
		},
		{
			"relay interface down",
			[]string{"--listen-addr", "10.10.0.2"},
			func(s *site) { must(s.net.Host.Run("ip", "link", "set", "eth0", "down"))(s.T) },
			func(s *site) { must(s.net.Host.Run("ip", "link", "set", "eth0", "up"))(s.T) },
		},
		{
			"relay interface down, no address configured", nil,
			func(s *site) { must(s.net.Host.Run("ip", "link", "set", "eth0", "down"))(s.T) },
			func(s *site) { must(s.net.Host.Run("ip", "link", "set", "eth0", "up"))(s.T) },
		},
	}
	for _, outage := range outages {
		kinds := lab.DHCPKinds
		if outage.name != "server killed" {
			kinds = []lab.DHCPKind{lab.Kea} // which doesn't notice
		}
		for _, kind := range kinds {
			t.Run(outage.name+"/"+kind.Name, func(t *testing.T) {
				t.Parallel()
				const timeout = 6 * time.Second
				s := newHost(t, kind, lab.DHCPConfig{}, append(outage.flags, "--dhcp-timeout", timeout.String())...)
				check(t, s.daemon.Start())
				pool := s.pool()
				released := must(s.requestPool("10.10.0.0/24", map[string]string{"release_delay": "0s"}))(t)
				before, gone := s.begin(pool, "web"), s.begin(released, "gone")
				s.end(released, gone)
				s.notLeased(gone.addr)
				s.end(pool, before)
				outage.begin(s)

				type start struct {
					addr netip.Addr
					err  error
					took time.Duration
				}
				begin := func(pool, name, mac string) <-chan start {
					result := make(chan start, 1)
					began := time.Now()
					go func() {
						addr, err := s.ask(pool, name, mac, "")
						result <- start{addr, err, time.Since(began)}
					}()
					return result
				}
				web := container{name: "web", mac: randomMAC()}
				known, fresh, left := begin(pool, "web", web.mac), begin(pool, "new", randomMAC()), begin(released, "gone", randomMAC())
				got := <-known
				check(t, got.err)
				t.Logf("the address came after %v", got.took)
				if got.addr != before.addr {
					t.Errorf("had %s and has %s", before.addr, got.addr)
				}
				if got.took < 4*time.Second || got.took > 6*time.Second {
					t.Errorf("the address came after %v", got.took)
				}
				mentions(t, s.daemon.Log(), "no DHCP server answers: the container starts on its stored lease", "address="+before.addr.String(), "mac="+web.mac, "name=web")
				for name, result := range map[string]<-chan start{"new": fresh, "gone": left} {
					got := <-result
					t.Logf("%s after %v: %v", name, got.took, got.err)
					if !errors.Is(got.err, lab.ErrRefused) || got.took > timeout+time.Second {
						t.Errorf("%s: %s and %v after %v", name, got.addr, got.err, got.took)
						continue
					}
					mentions(t, got.err.Error(), firstServer)
				}
				if state := s.known(before.addr).State; state != "renewing" {
					t.Errorf("meanwhile the lease is %s", state)
				}

				outage.finish(s)
				back := time.Now()
				// Which is when the server sees the container's new MAC.
				eventually(t, 10*time.Second, func() error {
					lease, _, err := s.dhcp.Lease(before.addr)
					if err == nil && !strings.EqualFold(lease.MAC, web.mac) {
						err = fmt.Errorf("the server leases %s to %q, want %s", before.addr, lease.MAC, web.mac)
					}
					return err
				})
				t.Logf("renewed %v after the outage", time.Since(back))
				s.becomes(before.addr.String(), "bound")
				s.begin(pool, "new")
				s.begin(released, "gone")
			})
		}
	}
}

// callDone is what the daemon's log says of a call that was answered.
var callDone = regexp.MustCompile(`msg="call done" call=/IpamDriver.RequestAddress after=(\S+)`)

// answered is how long the daemon took for its last RequestAddress.
func (s *site) answered() time.Duration {
	s.Helper()
	all := callDone.FindAllStringSubmatch(s.daemon.Log(), -1)
	if len(all) == 0 {
		s.Fatal("the daemon's log tells of no RequestAddress")
	}
	return must(time.ParseDuration(all[len(all)-1][1]))(s.T)
}

// With a real engine: --mac-address keeps a container's address with every
// engine, its name with those from 29 on, and the lease of a MAC that the
// engine drew ends with its container.
//
//	docker's own time between rm and run  <  RELEASE_DELAY = 30 s  <  T1 = 300 s
func TestContainersKeepTheirAddresses(t *testing.T) {
	t.Parallel()
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		s := newSite(t, kind, lab.DHCPConfig{})
		s.network("a", "eth0", "10.10.0.0/24", "--ipam-opt", "client_id=mac")
		const mac = "02:42:0a:0a:00:99"
		did := s.watch()
		first := s.run("c1", "a", "--mac-address", mac)
		want := traffic{1, 1, 1} // by its MAC, a container releases and starts over
		did()
		same := func(when string) {
			t.Helper()
			addr, has := s.holds("c1", "eth0")
			if did := did(); addr != first || has != mac || !did.is(want, s.answered()) {
				t.Errorf("%s: %s had %s and %s has %s; the server got %+v, want %+v", when, mac, first, has, addr, did, want)
			}
		}
		s.docker("restart", "c1")
		same("restart")
		s.docker("rm", "-f", "c1")
		s.docker("run", "-d", "--name", "c1", "--network", "a", "--mac-address", mac, image)
		same("rm and run")
		// In between comes another client. The address is anybody's now: ISC
		// dhcpd gives it away when it has no other, Kea when its turn comes,
		// dnsmasq to whose MAC it suits.
		s.docker("rm", "-f", "c1")
		other := s.run("other", "a")
		s.docker("run", "-d", "--name", "c1", "--network", "a", "--mac-address", mac, image)
		addr, _ := s.holds("c1", "eth0")
		t.Logf("%s had %s, another took %s, then it has %s", mac, first, other, addr)
		if addr == other || other != first && addr != first {
			t.Errorf("%s had %s, another took %s, then it has %s", mac, first, other, addr)
		}
		s.docker("rm", "-f", "c1", "other")
		s.notLeased()
		s.docker("network", "rm", "a")

		if !s.tellsNames() {
			return
		}
		s.network("a", "eth0", "10.10.0.0/24")
		want = oneRoundTrip
		named := s.run("web", "a")
		did()
		sameName := func(when string) {
			t.Helper()
			addr, _ := s.holds("web", "eth0")
			if did := did(); addr != named || !did.is(want, s.answered()) {
				t.Errorf("%s: had %s and has %s; the server got %+v, want %+v", when, named, addr, did, want)
			}
		}
		s.docker("restart", "web")
		sameName("restart")
		s.docker("rm", "-f", "web")
		s.docker("run", "-d", "--name", "web", "--network", "a", image)
		sameName("rm and run")
		s.docker("rm", "-f", "web")
		s.docker("network", "rm", "a")
		s.network("a", "eth0", "10.10.0.0/24")
		did()
		s.docker("run", "-d", "--name", "web", "--network", "a", image)
		sameName("network rm and create")
		// Blue and green, over some deployments.
		for range 3 {
			s.docker("rename", "web", "web-old")
			s.run("web", "a")
			blue, _ := s.holds("web-old", "eth0")
			green, _ := s.holds("web", "eth0")
			if blue == green {
				t.Fatalf("both have %s", blue)
			}
			s.docker("restart", "web-old", "web")
			blue, _ = s.holds("web-old", "eth0")
			green, _ = s.holds("web", "eth0")
			if blue == green {
				t.Fatalf("after a restart both have %s", blue)
			}
			s.docker("rm", "-f", "web-old")
			s.holds("web", "eth0")
		}
	})
}
