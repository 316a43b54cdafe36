package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// Failures come by the dozen when nobody has to wait for an engine: these
// helpers speak for one on the plugin's socket.

func (s *site) plugin() lab.Plugin { return lab.NewPlugin(s.daemon.Socket) }

// call posts a request as the engine does and reads its answer.
func (s *site) call(ctx context.Context, method string, in, out any) error {
	return s.plugin().Call(ctx, method, in, out)
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
	return s.plugin().RequestPool(s.Context(), subnet, options)
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
	return s.plugin().RequestAddress(ctx, pool, mac)
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
