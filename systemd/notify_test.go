package systemd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// manager is what systemd is to a Notifier: a datagram socket.
type manager struct {
	t  *testing.T
	fd int
}

// newManager makes the socket at path and names it to this process.
func newManager(t *testing.T, path string) manager {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	works(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	works(t, unix.Bind(fd, &unix.SockaddrUnix{Name: path}))
	t.Setenv("NOTIFY_SOCKET", path)
	return manager{t, fd}
}

// heard are the messages since it was last asked.
func (m manager) heard() (messages []string) {
	m.t.Helper()
	for {
		buf := make([]byte, 8192)
		n, err := unix.Read(m.fd, buf)
		if errors.Is(err, unix.EAGAIN) {
			return messages
		}
		works(m.t, err)
		messages = append(messages, string(buf[:n]))
	}
}

func (m manager) hears(what string, want ...string) {
	m.t.Helper()
	if got := m.heard(); !slices.Equal(got, want) {
		m.t.Errorf("%s: systemd heard %q, want %q", what, got, want)
	}
}

// logged is a log as text, without times.
type logged struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// lines are those since it was last asked.
func (l *logged) lines() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.text.Reset()
	return strings.FieldsFunc(l.text.String(), func(r rune) bool { return r == '\n' })
}

func (l *logged) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
}

func sockets(t *testing.T) map[string]string {
	return map[string]string{
		"path":     filepath.Join(t.TempDir(), "notify"),
		"abstract": fmt.Sprintf("@oam-notify-%d", os.Getpid()),
	}
}

func TestNotifier(t *testing.T) {
	for name, path := range sockets(t) {
		t.Run(name, func(t *testing.T) {
			var log logged
			m, n := newManager(t, path), NewNotifier(log.logger())
			n.Status("starting")
			m.hears("status", "STATUS=starting")
			n.Ready("2 leases")
			m.hears("ready", "READY=1\nSTATUS=2 leases")
			n.Status("2 leases")
			m.hears("the same status")
			n.Status("3 leases")
			n.Status("3\nleases")
			m.hears("another status", "STATUS=3 leases")

			before := monotonic(t)
			n.Reloading()
			got := m.heard()
			after := monotonic(t)
			text, ok := strings.CutPrefix(strings.Join(got, "|"), "RELOADING=1\nMONOTONIC_USEC=")
			usec, err := strconv.ParseInt(text, 10, 64)
			if !ok || err != nil || usec < before || usec > after {
				t.Errorf("a reload between %d and %d is announced as %q", before, after, got)
			}
			// That a reload ends matters, also where the status stays.
			n.Ready("3 leases")
			m.hears("reloaded", "READY=1\nSTATUS=3 leases")
			n.Stopping()
			m.hears("stopping", "STOPPING=1")
			if lines := log.lines(); len(lines) != 0 {
				t.Errorf("logged %q", lines)
			}
		})
	}
}

// monotonic is systemd's clock, in microseconds.
func monotonic(t *testing.T) int64 {
	t.Helper()
	var now unix.Timespec
	works(t, unix.ClockGettime(unix.CLOCK_MONOTONIC, &now))
	return now.Nano() / 1000
}

// A status is one line of text, whatever it is made of, and systemd takes it.
func TestStatusLine(t *testing.T) {
	m := newManager(t, filepath.Join(t.TempDir(), "notify"))
	for _, test := range []struct{ text, want string }{
		{" 3 leases,\r\n\trenewed  12:00\n", "3 leases, renewed 12:00"},
		{"x\nSTOPPING=1\nMAINPID=1", "x STOPPING=1 MAINPID=1"},
		{"a\x00b\x1b[31mc\u2028d\u0085e\u202ef", "a b [31mc d e f"},
		{"süß\xff", "süß\uFFFD"},
		{strings.Repeat("x", longestStatus), strings.Repeat("x", longestStatus)},
		{"x" + strings.Repeat("ü", 3000), "x" + strings.Repeat("ü", longestStatus/2-1) + "…"},
	} {
		n := NewNotifier(slog.New(slog.DiscardHandler))
		n.Status(test.text)
		n.Ready(test.text)
		m.hears(fmt.Sprintf("%.30q", test.text), "STATUS="+test.want, "READY=1\nSTATUS="+test.want)
	}
}

// Without systemd, and with one that doesn't listen, the daemon just runs.
func TestNotifierAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	var log logged
	n := NewNotifier(log.logger())
	all := func() {
		n.Ready("ready")
		n.Status("3 leases")
		n.Reloading()
		n.Stopping()
	}
	t.Setenv("NOTIFY_SOCKET", "")
	all()
	if lines := log.lines(); len(lines) != 0 {
		t.Errorf("without a socket: logged %q", lines)
	}

	t.Setenv("NOTIFY_SOCKET", path)
	all()
	all()
	lines := log.lines()
	if len(lines) != 1 || !strings.Contains(lines[0], "level=WARN") || !strings.Contains(lines[0], path) {
		t.Errorf("nobody listens: logged %q, want one warning with %s", lines, path)
	}

	// A status that was not sent is sent again.
	m := newManager(t, path)
	n.Status("3 leases")
	m.hears("at last", "STATUS=3 leases")
	works(t, os.Remove(path))
	all()
	if lines := log.lines(); len(lines) != 1 {
		t.Errorf("nobody listens any more: logged %q, want one warning", lines)
	}
}

const watchdogTime = 30 * time.Second

// watch runs a test with a unit whose watchdog waits watchdogTime, in a bubble.
// Watch ends with the bubble.
func watch(t *testing.T, alive func(context.Context) error, test func(m manager, log *logged)) {
	t.Helper()
	m := newManager(t, filepath.Join(t.TempDir(), "notify"))
	t.Setenv("WATCHDOG_USEC", strconv.FormatInt(watchdogTime.Microseconds(), 10))
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var log logged
		ended := make(chan struct{})
		go func() {
			NewNotifier(log.logger()).Watch(ctx, alive)
			close(ended)
		}()
		test(m, &log)
		log.lines()
		cancel()
		synctest.Wait()
		select {
		case <-ended:
		default:
			t.Error("Watch goes on after its context's end")
		}
		m.heard()
		time.Sleep(watchdogTime)
		synctest.Wait()
		m.hears("after the end")
		if lines := log.lines(); len(lines) != 0 {
			t.Errorf("the end is logged as %q", lines)
		}
	})
}

// after lets time pass and everybody do what is due by then.
func after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

const keepAlive = "WATCHDOG=1"

// The watchdog is told three times in its time, however long the answer takes.
func TestWatch(t *testing.T) {
	const slow = 9 * time.Second
	var asked atomic.Int32
	watch(t, func(ctx context.Context) error {
		asked.Add(1)
		deadline, ok := ctx.Deadline()
		if left := time.Until(deadline); !ok || left != watchdogTime/3 {
			t.Errorf("asked for an answer within %s", left)
		}
		time.Sleep(slow)
		return nil
	}, func(m manager, log *logged) {
		after(slow - time.Second)
		m.hears("before the answer")
		after(time.Second)
		m.hears("after it", keepAlive)
		for range 9 {
			after(watchdogTime / 3)
			m.hears("a third later", keepAlive)
		}
		if asked.Load() != 10 {
			t.Errorf("asked %d times", asked.Load())
		}
		if lines := log.lines(); len(lines) != 0 {
			t.Errorf("logged %q", lines)
		}
	})
}

// What isn't alive gets no keep-alive, and the log says why and until when.
func TestWatchNotAlive(t *testing.T) {
	var stuck atomic.Bool
	watch(t, func(context.Context) error {
		if stuck.Load() {
			return errors.New("the database is stuck")
		}
		return nil
	}, func(m manager, log *logged) {
		after(0)
		m.hears("at first", keepAlive)
		stuck.Store(true)
		for range 4 {
			after(watchdogTime / 3)
			m.hears("stuck")
			lines := log.lines()
			if len(lines) != 1 || !strings.Contains(lines[0], "level=WARN") || !strings.Contains(lines[0], "the database is stuck") {
				t.Errorf("stuck: logged %q", lines)
			}
		}
		stuck.Store(false)
		after(watchdogTime / 3)
		m.hears("alive again", keepAlive)
		if lines := log.lines(); len(lines) != 1 || !strings.Contains(lines[0], "alive again") {
			t.Errorf("alive again: logged %q", lines)
		}
		after(watchdogTime / 3)
		m.hears("still alive", keepAlive)
		if lines := log.lines(); len(lines) != 0 {
			t.Errorf("still alive: logged %q", lines)
		}
	})
}

// One that heeds its context is asked anew as soon as it gave up.
func TestWatchGivesUp(t *testing.T) {
	var asked atomic.Int32
	watch(t, func(ctx context.Context) error {
		asked.Add(1)
		<-ctx.Done()
		return ctx.Err()
	}, func(m manager, log *logged) {
		after(watchdogTime - time.Second)
		m.hears("no answer")
		lines := log.lines()
		if asked.Load() != 3 || len(lines) != 2 || !strings.Contains(lines[0], context.DeadlineExceeded.Error()) {
			t.Errorf("asked %d times, logged %q", asked.Load(), lines)
		}
	})
}

// One that never returns is asked once only, and logged before systemd's time
// is up, counted from the last keep-alive; a late answer isn't trusted, the next
// one is.
func TestWatchHangs(t *testing.T) {
	var asked atomic.Int32
	var hang atomic.Int64
	watch(t, func(context.Context) error {
		asked.Add(1)
		time.Sleep(time.Duration(hang.Load()))
		return nil
	}, func(m manager, log *logged) {
		after(0)
		m.hears("at first", keepAlive)
		hang.Store(int64(10 * watchdogTime))
		after(watchdogTime - time.Second)
		if lines := log.lines(); len(lines) != 1 || !strings.Contains(lines[0], "no answer at all") || !strings.Contains(lines[0], "level=WARN") {
			t.Errorf("before systemd's time is up: logged %q", lines)
		}
		after(9 * watchdogTime)
		m.hears("hanging")
		if lines := log.lines(); asked.Load() != 2 || len(lines) != 0 {
			t.Errorf("hanging: asked %d times, logged %q", asked.Load(), lines)
		}
		hang.Store(0)
		after(watchdogTime/3 + time.Second)
		m.hears("alive again", keepAlive)
		lines := log.lines()
		if asked.Load() != 3 || len(lines) != 2 || !strings.Contains(lines[0], errLate.Error()) || !strings.Contains(lines[1], "alive again") {
			t.Errorf("alive again: asked %d times, logged %q", asked.Load(), lines)
		}
		after(watchdogTime / 3)
		m.hears("still alive", keepAlive)
	})
}

// The daemon's end doesn't wait for what hangs, before or after that was seen.
func TestWatchEndsWhileHanging(t *testing.T) {
	for _, wait := range []time.Duration{time.Second, watchdogTime} {
		watch(t, func(context.Context) error {
			time.Sleep(wait + time.Second)
			return nil
		}, func(m manager, log *logged) {
			after(wait)
			m.hears("hanging")
		})
	}
}

func TestNoWatchdog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	m := newManager(t, path)
	for _, test := range []struct {
		name, notify, usec, pid string
		says                    string // "" for nothing
	}{
		{"none", path, "", "", ""},
		{"another's", path, "30000000", "1", ""},
		{"no socket", "", "30000000", strconv.Itoa(os.Getpid()), ""},
		{"no number", path, "30s", "", "30s"},
		{"no time", path, "0", "", "positive"},
	} {
		t.Setenv("NOTIFY_SOCKET", test.notify)
		t.Setenv("WATCHDOG_USEC", test.usec)
		t.Setenv("WATCHDOG_PID", test.pid)
		var log logged
		NewNotifier(log.logger()).Watch(t.Context(), func(context.Context) error {
			t.Errorf("%s: asked", test.name)
			return nil
		})
		lines := strings.Join(log.lines(), "\n")
		if (lines == "") != (test.says == "") || !strings.Contains(lines, test.says) {
			t.Errorf("%s: logged %q", test.name, lines)
		}
	}
	m.hears("no watchdog")
}
