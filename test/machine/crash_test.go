package machine

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// A daemon that is killed while it works for callers: what it had read fails
// with the connection, what waits is answered by the next one, and no lease is
// left that nobody knows of.
func TestKilledUnderLoad(t *testing.T) {
	s := newRunning(t)
	const workers = 6
	l := s.newLoad(workers)
	const kills = 5
	for range kills {
		l.some(t, s)
		s.run("systemctl", "kill", "--signal=KILL", name)
	}
	l.some(t, s)
	if n := l.cut.Load(); n > kills*workers {
		t.Errorf("%d calls were cut off by %d kills, more than %d at a time", n, kills, workers)
	}
	if n := s.number(name+".service", "NRestarts"); n != kills {
		t.Errorf("%d restarts after %d kills", n, kills)
	}
	l.end(s)
}

// The same, one call at a time: who had been read, and who waits.
func TestKilledWithRequestsInHand(t *testing.T) {
	s := newRunning(t)
	pool := s.pool()
	inHand, waiting := lab.ScatteredMAC(1), lab.ScatteredMAC(2)
	sofar := s.heard(inHand)
	// A server that is stopped hears everything and says nothing.
	check(t, syscall.Kill(s.dhcp.Pid(), syscall.SIGSTOP))
	read := s.begin(func() error { _, err := s.requestAddress(pool, inHand); return err })
	s.eventually(10*time.Second, func() error {
		if sofar() == 0 {
			return errors.New("the server has heard nothing")
		}
		return nil
	})
	s.stop()
	began := time.Now()
	unread := s.begin(func() error { _, err := s.requestAddress(pool, waiting); return err })
	s.waits(1)
	s.run("systemctl", "kill", "--signal=KILL", name)
	if err := <-read; !cutOff(err) {
		t.Errorf("the call in hand ended with %v", err)
	}
	check(t, syscall.Kill(s.dhcp.Pid(), syscall.SIGCONT))
	check(t, <-unread)
	t.Logf("the waiting call was answered after %v", time.Since(began))
	if leased := s.leased(); len(leased) != 1 || !slices.Equal(leased, s.known()) {
		t.Errorf("the server leases %v, the daemon knows %v, and one caller was given one", leased, s.known())
	}
}

// A daemon that hangs is ended and started again by systemd, and who waited
// meanwhile is served.
func TestWatchdog(t *testing.T) {
	s := newInstalled(t)
	s.dropIn("watchdog.conf", "[Service]\nWatchdogSec=3s\n")
	s.run("systemctl", "start", name)
	pool := s.pool()
	// It lives longer than its watchdog, with and without work.
	was := s.pid()
	time.Sleep(4 * time.Second)
	if now := s.pid(); now != was {
		t.Fatalf("process %d was replaced by %d", was, now)
	}
	s.stop()
	var addr netip.Addr
	waiting := s.begin(func() (err error) { addr, err = s.requestAddress(pool, lab.ScatteredMAC(1)); return err })
	s.waits(1)
	check(t, <-waiting)
	if s.pid() == was {
		t.Errorf("process %d is still the daemon", was)
	}
	s.only(addr)
	s.mentions(s.run("journalctl", "--no-pager", "--unit", name), "Watchdog timeout (limit 3s)")
}

// Whoever calls while a wrong configuration keeps the daemon from starting is
// told why, and served once it is mended.
func TestWrongConfiguration(t *testing.T) {
	s := newRunning(t)
	lines := strings.Count(s.run("cat", conf), "\n") + 1
	s.configure("LISTEN_ADDR=10.10.0\n")
	where := fmt.Sprintf("%s:%d", conf, lines+1)
	s.fails("systemctl", "restart", name)
	began := time.Now()
	s.mentions(s.dockerFails("run", "--name", "c1", "--network", network, image), where, "listen_addr", "10.10.0")
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("docker run took %v to say so", took)
	}
	s.mentions(s.try("systemctl", "status", "--no-pager", "--full", name), where)
	s.logged(where)
	s.mentions(s.fails(name, "config"), where)
	// An engine that starts now has the driver all the same, with MACs.
	check(t, s.capabilities())

	s.sh("sed -i '$d' " + conf)
	s.run("systemctl", "restart", name)
	s.docker("rm", "-f", "c1")
	s.only(s.runContainer("c1"))
}

// However often it fails, the socket stays, and who waits at it.
func TestCrashLoop(t *testing.T) {
	s := newRunning(t)
	const often = 20
	s.dropIn("fail.conf", "[Service]\nExecStart=\nExecStart=/bin/false\nRestartSec=20ms\n")
	s.run("systemctl", "--no-block", "restart", name)
	waiting := s.begin(s.capabilities)
	s.eventually(patience, func() error {
		if n := s.number(name+".service", "NRestarts"); n < often {
			return fmt.Errorf("%d restarts", n)
		}
		return nil
	})
	s.state(name+".socket", "active")
	check(t, os.Remove(s.machine.Path("/etc/systemd/system/"+name+".service.d/fail.conf")))
	s.run("systemctl", "daemon-reload")
	check(t, <-waiting)
	s.state(name+".service", "active")
}

// begin runs a call in the background.
func (s *site) begin(f func() error) <-chan error {
	result := make(chan error, 1)
	go func() { result <- f() }()
	return result
}

// stop has the daemon hang. A signal takes effect a moment after it was sent.
func (s *site) stop() {
	s.Helper()
	pid := strconv.Itoa(s.pid())
	s.run("kill", "-s", "STOP", pid)
	s.eventually(10*time.Second, func() error {
		states := s.sh("grep --no-filename State: /proc/" + pid + "/task/*/status")
		for state := range strings.Lines(states) {
			if !strings.Contains(state, "T (stopped)") {
				return fmt.Errorf("the daemon still runs: %s", states)
			}
		}
		return nil
	})
}

// waits waits until n connections to the plugin's socket are in its backlog.
func (s *site) waits(n int) {
	s.Helper()
	s.eventually(10*time.Second, func() error {
		// State, what has queued, and then the address.
		line := s.run("ss", "--no-header", "--listening", "--unix", "src", pluginAt)
		if fields := strings.Fields(line); len(fields) < 3 || fields[2] != strconv.Itoa(n) {
			return fmt.Errorf("want %d connections waiting in %q", n, line)
		}
		return nil
	})
}
