package main

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/server"
)

// openTerminal makes a pseudoterminal: who reads and writes the first sees and
// types what the program writes to and reads from the second.
func openTerminal(t *testing.T, width, height int) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetUint32(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	resize(t, master, width, height)
	return master, slave
}

func resize(t *testing.T, master *os.File, width, height int) {
	t.Helper()
	if err := unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: uint16(width), Row: uint16(height)}); err != nil {
		t.Fatal(err)
	}
}

// eyes are what a user sees of a terminal: they understand what the program may
// write to it, and nothing else.
type eyes struct {
	changed chan struct{}

	mu        sync.Mutex
	lines     map[int][]rune // what isn't there is blank
	x, y      int
	width     int
	alternate bool // screen
	hidden    bool // cursor
	cuts      bool // what is too wide
	draws     int
	wrong     []string
}

var (
	sequence = regexp.MustCompile(`^\x1b\[(\??[0-9;]*)([A-Za-z])`)
	begun    = regexp.MustCompile(`^\x1b(\[\??[0-9;]*)?$`)
)

// watchTerminal sees what is written to a terminal, until its end.
func watchTerminal(master *os.File, width int) *eyes {
	e := &eyes{changed: make(chan struct{}, 1), lines: map[int][]rune{}, width: width}
	go func() {
		var unread []byte
		for buf := make([]byte, 1<<16); ; {
			n, err := master.Read(buf)
			unread = e.see(append(unread, buf[:n]...))
			if err != nil {
				return
			}
		}
	}()
	return e
}

// see returns what it can't understand before there is more.
func (e *eyes) see(b []byte) (unread []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for len(b) > 0 && !begun.Match(b) {
		if m := sequence.FindSubmatch(b); m != nil {
			e.obey(string(m[1]) + string(m[2]))
			b = b[len(m[0]):]
			continue
		}
		r, n := utf8.DecodeRune(b)
		b = b[n:]
		switch {
		case r == '\r':
			e.x = 0
		case r == '\n':
			e.y++
		case r < ' ':
			e.wrong = append(e.wrong, strconv.QuoteRune(r))
		default:
			row := e.lines[e.y]
			for len(row) <= e.x {
				row = append(row, ' ')
			}
			row[e.x] = r
			e.lines[e.y] = row
			if e.x++; e.x > e.width {
				e.wrong = append(e.wrong, "wider than the terminal: "+string(row))
			}
		}
	}
	select {
	case e.changed <- struct{}{}:
	default:
	}
	return b
}

func (e *eyes) obey(command string) {
	switch command {
	case "H":
		e.x, e.y = 0, 0
		e.draws++
	case "K":
		e.eraseRight()
	case "J":
		for y := range e.lines {
			if y > e.y {
				delete(e.lines, y)
			}
		}
		e.eraseRight()
	case "?1049h", "?1049l":
		e.alternate = command == "?1049h"
		e.lines = map[int][]rune{}
	case "?25l", "?25h":
		e.hidden = command == "?25l"
	case "?7l", "?7h":
		e.cuts = command == "?7l"
	case "0m", "31m", "33m":
	default:
		e.wrong = append(e.wrong, command)
	}
}

// eraseRight erases what is under the cursor too, which doesn't go beyond the
// last column.
func (e *eyes) eraseRight() {
	e.lines[e.y] = e.lines[e.y][:min(e.x, e.width-1, len(e.lines[e.y]))]
}

// screen is what stands there.
func (e *eyes) screen() []string {
	height := 0
	for y, row := range e.lines {
		if len(row) > 0 {
			height = max(height, y+1)
		}
	}
	lines := make([]string, height)
	for y := range lines {
		lines[y] = string(e.lines[y])
	}
	return lines
}

// await waits until what is seen is as wanted.
func (e *eyes) await(t *testing.T, what string, wanted func(lines []string) bool) {
	t.Helper()
	end := time.After(20 * time.Second)
	for {
		e.mu.Lock()
		lines, wrong := e.screen(), e.wrong
		ok := wanted(lines)
		e.mu.Unlock()
		if len(wrong) > 0 {
			t.Fatalf("the terminal was sent %q", wrong)
		}
		if ok {
			return
		}
		select {
		case <-e.changed:
		case <-end:
			t.Fatalf("no %s:\n%s", what, strings.Join(lines, "\n"))
		}
	}
}

// commandKey has a command line that the test's binary is to run as the program.
const commandKey = "MAIN_TEST_COMMAND"

// startOn runs the program as a shell would, on a terminal of its own.
func startOn(t *testing.T, slave *os.File, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestWatch$")
	cmd.Env = append(os.Environ(), commandKey+"="+strings.Join(args, " "), "TERM=xterm", "NO_COLOR=")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return cmd
}

func countedLeases(n int) []server.Lease {
	leases := make([]server.Lease, n)
	for i := range leases {
		leases[i] = someLeases()[0]
		leases[i].Address, leases[i].MAC = netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), lease.MAC{2, 0, 0, 0, byte(i >> 8), byte(i)}
	}
	return leases
}

// A live list on a terminal: drawn anew, cut to its size of the moment, true
// over a restart of the daemon, and gone without a trace.
func TestWatch(t *testing.T) {
	if line := os.Getenv(commandKey); line != "" {
		os.Exit(run(append([]string{"oam-docker-ipam"}, strings.Fields(line)...), os.Stdout, os.Stderr))
	}
	cleanEnv(t)
	d := newStandIn(t, countedLeases(100))
	master, slave := openTerminal(t, 60, 10)
	before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	e := watchTerminal(master, 60)
	cmd := startOn(t, slave, "--socket", d.socket, "leases", "--watch", "--pool", "192.0.2.0/24")

	last := func(lines []string, height int, text string) bool {
		return len(lines) == height && lines[height-1] == text
	}
	e.await(t, "list", func(lines []string) bool {
		return e.alternate && e.hidden && e.cuts && last(lines, 10, "and 94 more") &&
			strings.HasSuffix(lines[0], "  leases 100 (bound 100) with pool 192.0.") && lines[1] == "" &&
			lines[2] == "ADDRESS   MAC                NAME  SUBNET        STATE  SERVER"[:60] && strings.HasPrefix(lines[8], "10.0.0.5 ") && len(lines[8]) == 60
	})
	e.await(t, "third view", func([]string) bool { return e.draws >= 3 })

	// Shorter and longer.
	d.answers(countedLeases(3))
	e.await(t, "shorter list", func(lines []string) bool { return len(lines) == 6 && strings.HasPrefix(lines[5], "10.0.0.2 ") })
	d.answers(countedLeases(7))
	e.await(t, "full screen", func(lines []string) bool { return len(lines) == 10 && strings.HasPrefix(lines[9], "10.0.0.6 ") })
	d.answers(countedLeases(100))

	e.mu.Lock()
	e.width = 100
	e.mu.Unlock()
	resize(t, master, 100, 30)
	e.await(t, "larger list", func(lines []string) bool {
		return last(lines, 30, "and 74 more") && strings.HasSuffix(lines[0], "with pool 192.0.2.0/24") && strings.HasSuffix(lines[2], " LEFT")
	})

	d.stop()
	e.await(t, "word of the daemon's end", func(lines []string) bool {
		return len(lines) == 30 && strings.HasPrefix(lines[1], "as of ") && strings.Contains(lines[1], "the daemon is not running")
	})
	d.start(t)
	e.await(t, "daemon's return", func(lines []string) bool { return len(lines) == 30 && lines[1] == "" })

	// Ctrl-Z and fg.
	if _, err := master.WriteString("\x1a"); err != nil {
		t.Fatal(err)
	}
	e.await(t, "shell's screen", func([]string) bool { return !e.alternate && !e.hidden && !e.cuts })
	for state := ""; state != "T"; {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		state = rest[:1]
	}
	if err := cmd.Process.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	e.await(t, "list again", func(lines []string) bool { return e.alternate && e.hidden && last(lines, 30, "and 74 more") })

	if _, err := master.WriteString("\x03"); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after Ctrl-C: %v", err)
	}
	e.await(t, "shell's screen", func(lines []string) bool { return !e.alternate && !e.hidden && !e.cuts && len(lines) == 0 })
	after, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	if err != nil || *after != *before {
		t.Errorf("the terminal's modes are %+v, were %+v: %v", after, before, err)
	}
}

// A live list begins with a daemon, and ends at once while one hangs.
func TestWatchDaemon(t *testing.T) {
	cleanEnv(t)
	_, slave := openTerminal(t, 80, 24)
	var stderr bytes.Buffer
	if status := run([]string{"oam-docker-ipam", "--socket", "/nonexistent.sock", "leases", "--watch"}, slave, &stderr); status != 1 || !strings.Contains(stderr.String(), "not running") {
		t.Errorf("no daemon: status %d, %s", status, &stderr)
	}
	t.Setenv("TERM", "dumb")
	stderr.Reset()
	if status := run([]string{"oam-docker-ipam", "leases", "--watch"}, slave, &stderr); status != 1 || !strings.Contains(stderr.String(), "needs a terminal") {
		t.Errorf("a teletype: status %d, %s", status, &stderr)
	}

	d := newStandIn(t, countedLeases(3))
	master, slave := openTerminal(t, 80, 24)
	e := watchTerminal(master, 80)
	cmd := startOn(t, slave, "--socket", d.socket, "leases", "--watch")
	e.await(t, "list", func(lines []string) bool { return len(lines) == 6 })
	d.mu.Lock() // who asks now waits
	defer d.mu.Unlock()
	e.await(t, "word of the daemon's silence", func(lines []string) bool {
		return len(lines) == 6 && strings.HasSuffix(lines[1], ": the daemon doesn't answer")
	})
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}
