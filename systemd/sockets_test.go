package systemd

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// roleVar makes the test binary play another part: descriptors are passed to a
// process, not to a test.
const roleVar = "SYSTEMD_TEST_ROLE"

func TestMain(m *testing.M) {
	if os.Getenv(roleVar) == "serve" {
		if err := serveOnce(); err != nil {
			fmt.Println("error:", err)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// serveOnce prints what Sockets says, answers one caller on each socket, and
// closes them all.
func serveOnce() error {
	sockets, err := Sockets()
	if err != nil {
		fmt.Println("error:", err)
	}
	for _, path := range slices.Sorted(maps.Keys(sockets)) {
		l := sockets[path]
		fmt.Println("socket:", path)
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(conn, "served")
		if err := errors.Join(err, conn.Close(), l.Close()); err != nil {
			return err
		}
	}
	again, err := Sockets()
	fmt.Println("again:", len(again), err)
	env, err := exec.Command("env").Output()
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(env)) {
		if strings.HasPrefix(line, "LISTEN_") {
			fmt.Print("inherited: ", line)
		}
	}
	return nil
}

// activate starts a process as systemd does, with files from descriptor 3 on,
// under their names. pid is the shell's text for LISTEN_PID.
func activate(t *testing.T, pid string, files ...*os.File) (output func() string) {
	t.Helper()
	self, err := os.Executable()
	works(t, err)
	var names []string
	for _, f := range files {
		names = append(names, f.Name())
	}
	cmd := exec.CommandContext(t.Context(), "sh", "-c", "LISTEN_PID="+pid+` exec "$0"`, self)
	cmd.Env = append(os.Environ(), roleVar+"=serve", "GORACE=atexit_sleep_ms=0",
		fmt.Sprintf("LISTEN_FDS=%d", len(files)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	cmd.ExtraFiles = files
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	works(t, err)
	works(t, cmd.Start())
	return func() string {
		t.Helper()
		text, err := io.ReadAll(out)
		works(t, errors.Join(err, cmd.Wait()))
		return string(text)
	}
}

const ownPID = "$$"

// socket makes one by hand, since Go's own would be removed and can't be of
// every type.
func socket(t *testing.T, name string, domain, kind int, bind unix.Sockaddr, listen bool) *os.File {
	t.Helper()
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
	works(t, err)
	f := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { f.Close() })
	works(t, unix.Bind(fd, bind))
	if listen {
		works(t, unix.Listen(fd, 100))
	}
	return f
}

func unixListener(t *testing.T, name, path string) *os.File {
	t.Helper()
	return socket(t, name, unix.AF_UNIX, unix.SOCK_STREAM, &unix.SockaddrUnix{Name: path}, true)
}

// call connects and returns what reads the answer.
func call(t *testing.T, path string) (answer func() string) {
	t.Helper()
	conn, err := net.Dial("unix", path)
	works(t, err)
	t.Cleanup(func() { conn.Close() })
	return func() string {
		t.Helper()
		works(t, conn.SetDeadline(time.Now().Add(time.Minute)))
		text, err := io.ReadAll(conn)
		works(t, err)
		return string(text)
	}
}

// Callers of a passed socket see no gap between two processes: the path stays,
// and who came in between is served by the next.
func TestSockets(t *testing.T) {
	folder := t.TempDir()
	plain, abstract := filepath.Join(folder, "a.sock"), fmt.Sprintf("@oam-test-%d", os.Getpid())
	files := []*os.File{unixListener(t, "a.socket", plain), unixListener(t, "b.socket", abstract)}
	for range 2 {
		answers := []func() string{call(t, plain), call(t, abstract)}
		output := activate(t, ownPID, files...)
		for _, answer := range answers {
			if got := answer(); got != "served\n" {
				t.Errorf("answered %q", got)
			}
		}
		want := "socket: " + plain + "\nsocket: " + abstract + "\nagain: 0 <nil>\n"
		if got := output(); got != want {
			t.Errorf("the process says\n%swant\n%s", got, want)
		}
	}
}

// What is meant for another process, or for none, is left alone.
func TestSocketsOfNobody(t *testing.T) {
	l := unixListener(t, "a.socket", filepath.Join(t.TempDir(), "a.sock"))
	const want = "again: 0 <nil>\n"
	for _, test := range []struct {
		name, pid string
		files     []*os.File
	}{
		{"another's", "1", []*os.File{l}},
		{"no process named", "", []*os.File{l}},
		{"nothing passed", ownPID, nil},
	} {
		if got := activate(t, test.pid, test.files...)(); got != want {
			t.Errorf("%s: the process says\n%s", test.name, got)
		}
	}
	if got, err := Sockets(); len(got) != 0 || err != nil {
		t.Errorf("got %v, %v", got, err)
	}
}

// Each mistake in a socket unit is named with its cure, and the sockets that
// are right are still served.
func TestWrongSockets(t *testing.T) {
	folder := t.TempDir()
	at := func(name string) string { return filepath.Join(folder, name) }
	loopback := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}

	works(t, unix.Mkfifo(at("fifo"), 0o600))
	fd, err := unix.Open(at("fifo"), unix.O_RDWR|unix.O_CLOEXEC, 0)
	works(t, err)
	fifo := os.NewFile(uintptr(fd), "fifo.socket")
	t.Cleanup(func() { fifo.Close() })
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	works(t, err)
	accepted := os.NewFile(uintptr(pair[0]), "accept.socket")
	t.Cleanup(func() { accepted.Close(); unix.Close(pair[1]) })
	tcp := socket(t, "tcp.socket", unix.AF_INET, unix.SOCK_STREAM, loopback, true)
	name, err := unix.Getsockname(int(tcp.Fd()))
	works(t, err)
	tcpAddress := fmt.Sprintf("127.0.0.1:%d", name.(*unix.SockaddrInet4).Port)
	right := unixListener(t, "right.socket", at("right.sock"))

	for _, test := range []struct {
		file *os.File
		says []string
	}{
		{socket(t, "gram.socket", unix.AF_UNIX, unix.SOCK_DGRAM, &unix.SockaddrUnix{Name: at("gram")}, false), []string{at("gram"), "type unixgram", "ListenStream="}},
		{socket(t, "packet.socket", unix.AF_UNIX, unix.SOCK_SEQPACKET, &unix.SockaddrUnix{Name: at("packet")}, true), []string{at("packet"), "type unixpacket", "ListenStream="}},
		{tcp, []string{tcpAddress, "type tcp", "ListenStream="}},
		{socket(t, "udp.socket", unix.AF_INET, unix.SOCK_DGRAM, loopback, false), []string{"127.0.0.1:", "type udp", "ListenStream="}},
		{socket(t, "netlink.socket", unix.AF_NETLINK, unix.SOCK_RAW, &unix.SockaddrNetlink{}, false), []string{"protocol not supported", "ListenStream="}},
		{fifo, []string{at("fifo") + " is no socket", "ListenStream="}},
		{accepted, []string{"doesn't listen", "Accept=no"}},
		{right, []string{at("right.sock"), "passed twice", "one ListenStream="}},
	} {
		answer := call(t, at("right.sock"))
		got := activate(t, ownPID, right, test.file)()
		var wrong string
		for line := range strings.Lines(got) {
			if strings.HasPrefix(line, "error:") {
				wrong += line
			}
		}
		for _, word := range append(test.says, "take "+test.file.Name()+" from systemd: ") {
			if !strings.Contains(wrong, word) {
				t.Errorf("%q doesn't mention %q", wrong, word)
			}
		}
		if strings.Count(wrong, "\n") != 1 {
			t.Errorf("want one error: %q", wrong)
		}
		if !strings.Contains(got, "socket: "+at("right.sock")+"\n") || answer() != "served\n" {
			t.Errorf("%s: the right socket isn't served: %s", test.file.Name(), got)
		}
	}
}

func works(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
