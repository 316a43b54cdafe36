package machine

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// Load comes by the hundred a second when nobody has to start containers: what
// is here speaks for an engine on the plugin's socket.

// patience is longer than any start of the daemon.
const patience = time.Minute

// plugin speaks on one of the machine's sockets, which is elsewhere after each of
// its boots.
func (s *site) plugin(socket string) lab.Plugin { return lab.NewPlugin(s.machine.Path(socket)) }

// call posts a request as the engine does and reads its answer. It may be called
// from any goroutine.
func (s *site) call(method string, in, out any) error {
	return s.plugin(pluginAt).Call(s.Context(), method, in, out)
}

// cutOff says whether a call failed as one does that the daemon had read when
// it was killed.
func cutOff(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// capabilities is the call that asks nobody else.
func (s *site) capabilities() error {
	var out struct{ RequiresMACAddress bool }
	err := s.call("GetCapabilities", struct{}{}, &out)
	if err == nil && !out.RequiresMACAddress {
		err = errors.New("GetCapabilities: the driver wants no MAC addresses")
	}
	return err
}

// pool is a network of the subnet.
func (s *site) pool() string {
	s.Helper()
	return must(s.plugin(pluginAt).RequestPool(s.Context(), "10.10.0.0/24", nil))(s.T)
}

// requestAddress is the start of a container.
func (s *site) requestAddress(pool, mac string) (netip.Addr, error) {
	return s.plugin(pluginAt).RequestAddress(s.Context(), pool, mac)
}

// releaseAddress is the end of a container.
func (s *site) releaseAddress(pool string, addr netip.Addr) error {
	return s.call("ReleaseAddress", map[string]any{"PoolID": pool, "Address": addr}, &struct{}{})
}

// load is a constant one of requests.
type load struct {
	stopped chan struct{}
	workers sync.WaitGroup
	// calls were answered well, cut have failed as cutOff says.
	calls, cut atomic.Int64

	mu   sync.Mutex
	errs []error // all others
	held []netip.Addr
}

// newLoad starts workers that ask what the driver is, request an address and
// release it, until the load is ended. Then each requests one that it keeps.
// What was cut off is asked for again, by the same MAC.
func (s *site) newLoad(workers int) *load {
	s.Helper()
	pool := s.pool()
	l := &load{stopped: make(chan struct{})}
	for n := range workers {
		l.workers.Go(func() {
			mac := lab.ScatteredMAC(n + 1)
			var addr netip.Addr
			request := func() (err error) { addr, err = s.requestAddress(pool, mac); return err }
			release := func() error { return s.releaseAddress(pool, addr) }
			for {
				select {
				case <-l.stopped:
					if l.call(request) {
						l.mu.Lock()
						l.held = append(l.held, addr)
						l.mu.Unlock()
					}
					return
				default:
				}
				if !l.call(s.capabilities) || !l.call(request) || !l.call(release) {
					return
				}
			}
		})
	}
	return l
}

// call makes a call until it isn't cut off, and notes what came of it.
func (l *load) call(f func() error) (ok bool) {
	for {
		err := f()
		switch {
		case err == nil:
			l.calls.Add(1)
			return true
		case cutOff(err):
			l.cut.Add(1)
		default:
			l.mu.Lock()
			l.errs = append(l.errs, err)
			l.mu.Unlock()
			return false
		}
	}
}

// some waits until some more calls were answered.
func (l *load) some(t *testing.T, s *site) {
	t.Helper()
	const more = 50
	before := l.calls.Load()
	s.eventually(patience, func() error {
		if now := l.calls.Load(); now < before+more {
			return fmt.Errorf("only %d calls were answered; %v", now-before, l.failures())
		}
		return nil
	})
}

func (l *load) failures() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return errors.Join(l.errs...)
}

// end ends the load and sees that nothing has failed that must not, and that
// the server and the daemon know of the same leases as the callers. They are
// given back then.
func (l *load) end(s *site) {
	s.Helper()
	close(l.stopped)
	l.workers.Wait()
	s.Logf("%d calls were answered, %d cut off", l.calls.Load(), l.cut.Load())
	if err := l.failures(); err != nil {
		s.Errorf("calls failed: %v", err)
	}
	s.only(l.held...)
}

// heard counts the DHCP messages from a MAC that reach the server from now on.
// They are counted on their way to its socket, before it reads them.
func (s *site) heard(mac string) (sofar func() int) {
	s.Helper()
	comment := "from " + mac
	must(s.server.Run("iptables", "--wait", "-I", "INPUT", "-p", "udp", "--dport", "67", "-m", "string", "--algo", "bm",
		"--hex-string", "|"+strings.ReplaceAll(mac, ":", "")+"|", "-m", "comment", "--comment", comment))(s.T)
	return func() int {
		s.Helper()
		for line := range strings.Lines(must(s.server.Run("iptables", "--wait", "-n", "-v", "-x", "-L", "INPUT"))(s.T)) {
			if strings.Contains(line, "/* "+comment+" */") {
				return must(strconv.Atoi(strings.Fields(line)[0]))(s.T)
			}
		}
		s.Fatal("no rule does: " + comment)
		return 0
	}
}
