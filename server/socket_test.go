package server

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// listenOK listens, checks the socket, and closes it with the test.
func listenOK(t *testing.T, path string) net.Listener {
	t.Helper()
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	info, err := os.Lstat(path)
	if err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("mode %v, %v: want a socket of 0600", info.Mode(), err)
	}
	return l
}

func TestListen(t *testing.T) {
	// A mask that lets everything through, and one that lets nothing.
	for _, mask := range []int{0, 0o777} {
		folder := filepath.Join(scratch(t), "run", "docker", "plugins")
		before := unix.Umask(0)
		if mask == 0 {
			listenOK(t, filepath.Join(folder, "a.sock"))
			info, err := os.Stat(folder)
			if err != nil || info.Mode().Perm() != 0o700 {
				t.Errorf("folder %v, %v", info.Mode(), err)
			}
		} else {
			if err := os.MkdirAll(folder, 0o755); err != nil {
				t.Fatal(err)
			}
			unix.Umask(mask)
			listenOK(t, filepath.Join(folder, "a.sock"))
		}
		if got := unix.Umask(before); got != mask {
			t.Errorf("the mask was %#o and is %#o", mask, got)
		}
	}
}

// A folder that is there keeps its mode: Docker's is 0755.
func TestListenKeepsFolder(t *testing.T) {
	folder := scratch(t)
	if err := os.Chmod(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	listenOK(t, filepath.Join(folder, "a.sock"))
	if info, err := os.Stat(folder); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("folder %v, %v", info.Mode(), err)
	}
}

// stale makes a socket as kill -9 leaves it.
func stale(t *testing.T, path string) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
}

func TestListenReplacesStaleSocket(t *testing.T) {
	path := filepath.Join(scratch(t), "a.sock")
	stale(t, path)
	listenOK(t, path)
}

func TestListenLiveSocket(t *testing.T) {
	path := filepath.Join(scratch(t), "a.sock")
	l := listenOK(t, path)
	if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "another process serves this socket") {
		t.Errorf("error %v", err)
	}
	// The one that was there first still serves.
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	l.Close()
	listenOK(t, path)
}

// A socket that systemd holds while no daemon runs is a live one too, and
// whoever is started by hand connects to it at no time: systemd would start
// another daemon at that. That holds for a datagram socket as well.
func TestListenHeldSocket(t *testing.T) {
	socket := hold(t, "a.sock")
	for range 2 {
		_, err := Listen(socket.path)
		for _, part := range []string{socket.path, "systemctl start oam-docker-ipam", "systemctl stop oam-docker-ipam.socket", "PLUGIN_SOCKET"} {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("error %v lacks %q", err, part)
			}
		}
	}
	l := socket.pass()
	if err := l.(*net.UnixListener).SetDeadline(time.Now().Add(time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if conn, err := l.Accept(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("somebody connected: %v, %v", conn, err)
	}

	path := filepath.Join(scratch(t), "b.sock")
	datagrams, err := net.ListenPacket("unixgram", path)
	if err != nil {
		t.Fatal(err)
	}
	defer datagrams.Close()
	if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "another process serves this socket") {
		t.Errorf("error %v", err)
	}
}

// What is no socket is somebody's, and stays.
func TestListenSomethingInTheWay(t *testing.T) {
	for name, makeIt := range map[string]func(string) error{
		"file":           func(path string) error { return os.WriteFile(path, []byte("precious"), 0o644) },
		"empty file":     func(path string) error { return os.WriteFile(path, nil, 0o644) },
		"empty folder":   func(path string) error { return os.Mkdir(path, 0o755) },
		"fifo":           func(path string) error { return unix.Mkfifo(path, 0o600) },
		"link to a file": func(path string) error { return os.WriteFile(path+".real", nil, 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(scratch(t), "a.sock")
			if err := makeIt(path); err != nil {
				t.Fatal(err)
			}
			if name == "link to a file" {
				if err := os.Symlink(path+".real", path); err != nil {
					t.Fatal(err)
				}
			}
			before, err := os.Lstat(path)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), path) {
				t.Errorf("error %v", err)
			}
			after, err := os.Lstat(path)
			if err != nil || !os.SameFile(before, after) {
				t.Errorf("it is gone: %v", err)
			}
		})
	}
}

func TestListenErrors(t *testing.T) {
	file := filepath.Join(scratch(t), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(filepath.Join(file, "a.sock")); err == nil || !strings.Contains(err.Error(), "make plugin folder") {
		t.Errorf("a file as folder: %v", err)
	}
	long := filepath.Join(scratch(t), strings.Repeat("x", 120))
	if _, err := Listen(long); err == nil || !strings.Contains(err.Error(), long) || !strings.Contains(err.Error(), "107 bytes: give this daemon a shorter PLUGIN_SOCKET") {
		t.Errorf("a path too long for a socket: %v", err)
	}
}

// A listener that breaks ends Serve with an error, not silently.
func TestServeBrokenListener(t *testing.T) {
	l := listenOK(t, filepath.Join(scratch(t), "a.sock"))
	l.Close()
	log := slog.New(slog.DiscardHandler)
	if err := Serve(context.Background(), l, http.NotFoundHandler(), usual, log); err == nil || !strings.Contains(err.Error(), "serve ") {
		t.Errorf("error %v", err)
	}
}
