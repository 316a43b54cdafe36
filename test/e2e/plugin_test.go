package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// Failures come by the dozen when nobody has to wait for an engine: these
// helpers speak for one on the plugin's socket.

// errRefused is an answer that is an error, unlike a connection that broke.
var errRefused = errors.New("the plugin says")

// call posts a request as the engine does and reads its answer.
func (s *site) call(ctx context.Context, method string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://plugin/IpamDriver."+method, bytes.NewReader(body))
	if err != nil {
		return err
	}
	response, err := s.daemon.Client().Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	var failed struct{ Error, Err string }
	if err := json.Unmarshal(answer, &failed); err != nil {
		return fmt.Errorf("%s: %s: %q: %w", method, response.Status, answer, err)
	}
	if failed.Error+failed.Err != "" {
		return fmt.Errorf("%s: %w: %s", method, errRefused, failed.Error+failed.Err)
	}
	return json.Unmarshal(answer, out)
}

// launch starts the daemon as a process whose end can be waited for.
func (s *site) launch() *lab.Process {
	s.Helper()
	process := must(s.daemon.Launch())(s.T)
	eventually(s.T, 10*time.Second, func() error {
		return s.call(s.Context(), "GetCapabilities", struct{}{}, &struct{}{})
	})
	return process
}

// requestPool is `docker network create`.
func (s *site) requestPool(subnet string, options map[string]string) (id string, err error) {
	var out struct{ PoolID string }
	err = s.call(s.Context(), "RequestPool", map[string]any{"Pool": subnet, "Options": options}, &out)
	return out.PoolID, err
}

// pool is a network of subnet A.
func (s *site) pool() string {
	s.Helper()
	return must(s.requestPool("10.10.0.0/24", nil))(s.T)
}

// requestAddress is the start of a container.
func (s *site) requestAddress(pool, mac string) (netip.Addr, error) {
	return s.requestAddressFor(s.Context(), pool, mac)
}

// requestAddressFor is requestAddress for a caller who goes away with ctx.
func (s *site) requestAddressFor(ctx context.Context, pool, mac string) (netip.Addr, error) {
	var out struct{ Address string }
	err := s.call(ctx, "RequestAddress", map[string]any{
		"PoolID": pool, "Options": map[string]string{"com.docker.network.endpoint.macaddress": mac},
	}, &out)
	if err != nil {
		return netip.Addr{}, err
	}
	prefix, err := netip.ParsePrefix(out.Address)
	return prefix.Addr(), err
}

// acquire is a requestAddress that works, down to the server's table.
func (s *site) acquire(pool, mac string) netip.Addr {
	s.Helper()
	addr := must(s.requestAddress(pool, mac))(s.T)
	s.leased(addr, mac)
	return addr
}

// releaseAddress is the end of a container.
func (s *site) releaseAddress(pool string, addr netip.Addr) error {
	return s.call(s.Context(), "ReleaseAddress", map[string]any{"PoolID": pool, "Address": addr}, &struct{}{})
}

// scatteredMAC is one of many MACs, as far apart as an engine's.
func scatteredMAC(n int) string {
	mac := binary.BigEndian.AppendUint64(nil, uint64(n)*0x9e3779b97f4a7c15)[:6]
	mac[0] = mac[0]&^0x01 | 0x02
	return net.HardwareAddr(mac).String()
}

// serverMACs are the server's active leases, by MAC.
func (s *site) serverMACs() map[string]netip.Addr {
	s.Helper()
	leases := map[string]netip.Addr{}
	for _, lease := range must(s.dhcp.Leases())(s.T) {
		leases[strings.ToLower(lease.MAC)] = lease.Addr
	}
	return leases
}

// DHCP message types (option 53). Every sender in the lab writes the option
// first, so that its bytes behind the cookie tell a message's type.
const (
	discover = 1
	request  = 3
	ack      = 5
	release  = 7
)

// The option alone would be found by chance: a request begins with 01 01, and
// the last byte of its UDP checksum may be 35.
func typeBytes(kind int) string { return fmt.Sprintf("|638253633501%02x|", kind) }

// count counts the messages of a type that reach a node from now on. They are
// counted on their way to the sockets, before anybody reads them.
func (s *site) count(node *lab.Node, kind int) (sofar func() int) {
	s.Helper()
	return s.countBytes(node, typeBytes(kind))
}

// countBytes is count of messages that have these bytes somewhere, written as
// iptables' string match wants it.
func (s *site) countBytes(node *lab.Node, pattern string) (sofar func() int) {
	s.Helper()
	name := "count " + pattern
	must(node.Run("iptables", "--wait", "-I", "INPUT", "-p", "udp", "--dport", "67",
		"-m", "string", "--algo", "bm", "--hex-string", pattern, "-m", "comment", "--comment", name))(s.T)
	return func() int {
		s.Helper()
		for line := range strings.Lines(must(node.Run("iptables", "--wait", "-n", "-v", "-x", "-L", "INPUT"))(s.T)) {
			if strings.Contains(line, "/* "+name+" */") {
				return must(strconv.Atoi(strings.Fields(line)[0]))(s.T)
			}
		}
		s.Fatal("no rule does: " + name)
		return 0
	}
}

// reached waits until a count is at least n.
func (s *site) reached(sofar func() int, n int) {
	s.Helper()
	check(s.T, lab.Eventually(10*time.Second, func() error {
		if now := sofar(); now < n {
			return fmt.Errorf("%d messages came, want %d", now, n)
		}
		return nil
	}))
}

// dropFromServer drops the messages of a type on their way to the daemon, as
// an unlucky network does. The returned function ends that.
func (s *site) dropFromServer(kind int) (stop func()) {
	s.Helper()
	rule := []string{
		"INPUT", "-p", "udp", "--dport", "67", "-m", "string", "--algo", "bm", "--hex-string", typeBytes(kind), "-j", "DROP",
	}
	act := func(action string) {
		s.Helper()
		must(s.net.Host.Run(append([]string{"iptables", "--wait", action}, rule...)...))(s.T)
	}
	act("-I")
	return func() { s.Helper(); act("-D") }
}

// eventually is lab.Eventually for a test.
func eventually(t *testing.T, timeout time.Duration, cond func() error) {
	t.Helper()
	check(t, lab.Eventually(timeout, cond))
}
