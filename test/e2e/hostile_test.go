package e2e

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// Whatever somebody sends to the plugin's socket is answered with an error, at
// most, while the containers of others come and go.
func TestHostileRequests(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{}, "--release-delay", "0s")
	check(t, s.daemon.Start())
	pid := s.daemon.Pid()
	pool := s.pool()
	kept := s.acquire(pool, lab.ScatteredMAC(0))
	ended := make(chan struct{})
	var others sync.WaitGroup
	others.Go(func() {
		for n := 1; ; n++ {
			select {
			case <-ended:
				return
			default:
			}
			addr, err := s.requestAddress(pool, lab.ScatteredMAC(n))
			if err == nil {
				err = s.releaseAddress(pool, addr)
			}
			if err != nil {
				t.Errorf("container %d beside hostile requests: %v", n, err)
				return
			}
		}
	})

	endpoint := func(mac, name, address string) string {
		return string(must(json.Marshal(map[string]any{"PoolID": pool, "Address": address, "Options": map[string]string{
			"com.docker.network.endpoint.macaddress": mac, "com.docker.network.endpoint.name": name,
		}}))(t))
	}
	const mac = "02:42:00:00:00:99"
	for _, c := range []struct{ method, path, body string }{
		{"POST", "/IpamDriver.RequestAddress", ""},
		{"POST", "/IpamDriver.RequestAddress", "{"},
		{"POST", "/IpamDriver.RequestAddress", "null"},
		{"POST", "/IpamDriver.RequestAddress", "[]"},
		{"POST", "/IpamDriver.RequestAddress", `{"PoolID":7}`},
		{"POST", "/IpamDriver.RequestAddress", `{"PoolID":"nobody's"}`},
		{"POST", "/IpamDriver.RequestAddress", `{"PoolID":"10.20.0.0/24?gateway=10.30.0.1&id=x","Options":{"com.docker.network.endpoint.macaddress":"` + mac + `"}}`},
		{"POST", "/IpamDriver.RequestAddress", strings.Repeat("[", 100_000)},
		{"POST", "/IpamDriver.RequestAddress", `{"PoolID":"` + strings.Repeat("x", 2<<20) + `"}`},
		{"POST", "/IpamDriver.RequestAddress", "\x00\xff\xfe\x80"},
		{"POST", "/IpamDriver.RequestAddress", endpoint("02:42", "", "")},
		{"POST", "/IpamDriver.RequestAddress", endpoint("02:42:00:00:00:99:00:00", "", "")},
		{"POST", "/IpamDriver.RequestAddress", endpoint(mac, "", "10.10.0.300")},
		{"POST", "/IpamDriver.RequestAddress", endpoint(mac, "", "fd00::1")},
		{"POST", "/IpamDriver.RequestAddress", endpoint(mac, "", "10.10.0.0")},
		{"POST", "/IpamDriver.RequestAddress", endpoint(mac, "", "10.10.0.255")},
		{"POST", "/IpamDriver.RequestAddress", endpoint(mac, "", "192.0.2.7")},
		{"POST", "/IpamDriver.RequestAddress", endpoint(mac, "", kept.String())},
		{"POST", "/IpamDriver.RequestAddress", `{"PoolID":"` + pool + `"}`},
		{"POST", "/IpamDriver.RequestPool", `{"Pool":"10.10.0.0/24","Options":{"dhcp_sever":"10.10.0.1"}}`},
		{"POST", "/IpamDriver.RequestPool", `{"Pool":"10.10.0.0/33"}`},
		{"POST", "/IpamDriver.RequestPool", `{"Pool":"10.10.0.0/31"}`},
		{"POST", "/IpamDriver.RequestPool", `{"Pool":"0.0.0.0/0"}`},
		{"POST", "/IpamDriver.RequestPool", `{"Pool":"fd00::/64","V6":true}`},
		{"POST", "/IpamDriver.RequestPool", `{"Pool":"10.10.0.0/24","SubPool":"10.20.0.0/25"}`},
		{"POST", "/IpamDriver.ReleaseAddress", `{"PoolID":"` + pool + `","Address":"all"}`},
		{"POST", "/IpamDriver.ReleasePool", `{"PoolID":["` + pool + `"]}`},
		{"POST", "/IpamDriver.Surrender", "{}"},
		{"GET", "/IpamDriver.ReleasePool", ""},
		{"DELETE", "/v1/leases/everything", ""},
		{"DELETE", "/v1/leases/10.10.0.1", ""},
		{"GET", "/../../etc/passwd", ""},
	} {
		request := must(http.NewRequest(c.method, "http://plugin"+c.path, strings.NewReader(c.body)))(t)
		response := must(s.daemon.Client().Do(request))(t)
		body := must(io.ReadAll(response.Body))(t)
		response.Body.Close()
		var failed struct{ Error, Err string }
		if err := json.Unmarshal(body, &failed); err != nil || failed.Error+failed.Err == "" {
			t.Errorf("%s %s %.80q is answered with %s %q", c.method, c.path, c.body, response.Status, body)
		}
	}
	// Callers that speak no HTTP, stop in the middle, or say nothing at all.
	var odd []net.Conn
	for _, bytes := range []string{
		"", "\x16\x03\x01\x02\x00", "GET", "POST /IpamDriver.ReleasePool HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
		"POST /IpamDriver.ReleasePool HTTP/1.1\r\nHost: \r\nContent-Length: 100\r\n\r\n{",
		"POST /IpamDriver.ReleasePool HTTP/1.1\r\nHost: \r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
		strings.Repeat("X", 2<<20),
	} {
		for range max(1, 200-len(bytes)) { // an overlong one takes half a second
			conn := must(net.Dial("unix", s.daemon.Socket))(t)
			check(t, conn.SetDeadline(time.Now().Add(5*time.Second)))
			_, _ = io.WriteString(conn, bytes) // it may be thrown out before it has said all
			odd = append(odd, conn)
		}
	}
	// Names of containers end up in option 12, whatever they are.
	for n, name := range []string{"/../../x", "a\x00b\nc", strings.Repeat("ä", 300), "$(reboot)", "-"} {
		mac := fmt.Sprintf("02:42:00:00:01:%02x", n)
		var out struct{ Address netip.Prefix }
		check(t, s.call(t.Context(), "RequestAddress", json.RawMessage(endpoint(mac, name, "")), &out))
		lease := s.leased(out.Address.Addr(), mac)
		if strings.Trim(lease.Hostname, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || len(lease.Hostname) > 63 {
			t.Errorf("the server has a host named %q", lease.Hostname)
		}
		check(t, s.releaseAddress(pool, out.Address.Addr()))
	}
	close(ended)
	others.Wait()
	for _, conn := range odd {
		check(t, conn.Close())
	}
	s.survived(pid, pool, kept)
}

// survived sees that the same process still has a lease, and works.
func (s *site) survived(pid int, pool string, kept netip.Addr) {
	s.Helper()
	if known := s.known(kept); s.daemon.Pid() != pid || known.PoolID != pool {
		s.Errorf("%s is known as %+v", kept, known)
	}
	s.onlyLease(kept)
	addr := s.acquire(pool, "02:42:00:00:00:01")
	check(s.T, s.releaseAddress(pool, addr))
	check(s.T, s.releaseAddress(pool, kept))
	s.notLeased()
	if left := s.leases(); len(left) != 0 {
		s.Errorf("the daemon has %+v", left)
	}
	check(s.T, s.daemon.Stop()) // which tells of a crash, too
}

// A caller who stops in the middle of a request doesn't keep the daemon from
// ending well.
func TestHalfARequestDoesNotHoldUpTheEnd(t *testing.T) {
	t.Parallel() // it waits
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	process := s.launch()
	conn := must(net.Dial("unix", s.daemon.Socket))(t)
	defer conn.Close()
	must(io.WriteString(conn, "POST /IpamDriver.ReleasePool HTTP/1.1\r\nHost: \r\nContent-Length: 100\r\n\r\n{"))(t)
	// By the time that this is answered, that is being read.
	check(t, s.call(t.Context(), "GetCapabilities", struct{}{}, &struct{}{}))
	check(t, s.daemon.Signal(syscall.SIGTERM))
	// A request's own time is DHCP_TIMEOUT = 30 s; to be read it has less.
	if err := process.Wait(15 * time.Second); err != nil {
		t.Errorf("the end of the daemon: %v", err)
	}
}

// Everybody on the LAN can send to our port 67. Forged, broken and random
// packets by the thousand change nothing.
func TestHostilePackets(t *testing.T) {
	const packets = 3000
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	check(t, s.daemon.Start())
	pid := s.daemon.Pid()
	pool := s.pool()
	kept := s.acquire(pool, lab.ScatteredMAC(0))
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)

	var conn net.PacketConn
	check(t, s.net.Client.Do(func() (err error) {
		conn, err = net.ListenPacket("udp4", "10.10.0.4:67")
		return err
	}))
	defer conn.Close()
	received := s.count(s.net.Host, discover) // one of the forged types, to see that they come
	var flood sync.WaitGroup
	over := make(chan struct{})
	var starting atomic.Int32 // the container that the forger has heard of
	flood.Go(func() {
		defer close(over)
		random := rand.New(rand.NewPCG(seed, 0))
		to := &net.UDPAddr{IP: net.IPv4(10, 10, 0, 2), Port: 67}
		for n := range packets {
			if _, err := conn.WriteTo(forgery(random, lab.ScatteredMAC(int(starting.Load()))), to); err != nil {
				t.Errorf("send packet %d: %v", n, err)
				return
			}
			if n%4 == 0 {
				time.Sleep(time.Millisecond) // not to drown the answers
			}
		}
	})
	started := 0
	for flooded := false; !flooded; {
		started++
		starting.Store(int32(started))
		mac := lab.ScatteredMAC(started)
		addr := s.acquire(pool, mac)
		if !lab.SubnetA().Prefix.Contains(addr) {
			t.Errorf("%s was given %s", mac, addr)
		}
		check(t, s.releaseAddress(pool, addr))
		select {
		case <-over:
			flooded = true
		default:
		}
	}
	flood.Wait()
	t.Logf("%d containers came and went", started)
	if started < 10 {
		t.Errorf("only %d containers came and went beside %d packets", started, packets)
	}
	if received() < packets/100 {
		t.Errorf("of %d packets hardly any came", packets)
	}
	s.survived(pid, pool, kept)
}

// forgery makes a packet that looks like an answer to a container's request,
// and then spoils it in one of many ways, or not at all: then nothing but its
// transaction number is wrong.
func forgery(random *rand.Rand, mac string) []byte {
	p := make([]byte, 240, 400)
	p[0], p[1], p[2] = 2, 1, 6
	binary.BigEndian.PutUint32(p[4:], random.Uint32())
	copy(p[16:], []byte{10, 10, 0, byte(random.IntN(256))}) // yiaddr
	copy(p[24:], []byte{10, 10, 0, 2})                      // giaddr
	hw, _ := net.ParseMAC(mac)
	copy(p[28:], hw)
	binary.BigEndian.PutUint32(p[236:], 0x63825363)
	p = append(p, 53, 1, []byte{1, 2, 2, 5, 5, 6}[random.IntN(6)], 54, 4, 10, 10, 0, 1, 51, 4, 0, 0, 255, 255, 1, 4, 255, 255, 255, 0, 255)
	switch random.IntN(10) {
	case 0: // cut
		p = p[:random.IntN(len(p)+1)]
	case 1: // random bytes
		for range 1 + random.IntN(20) {
			p[random.IntN(len(p))] = byte(random.Uint32())
		}
	case 2: // nothing but random bytes
		p = p[:cap(p)]
		for i := range p {
			p[i] = byte(random.Uint32())
		}
	case 3: // options that go on for ever
		p = append(p[:240], strings.Repeat("\x35\x01\x05\x34\x01\x03", 1000)...)
	case 4: // an option longer than the packet
		p = append(p[:240], 53, 255, 5)
	case 5: // times that aren't
		copy(p[251:], []byte{0, 0, 0, 0})
	case 6: // an address that isn't
		copy(p[16:], []byte{255, 255, 255, 255})
	}
	return p
}
