package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// Sockets are the listening unix sockets that systemd passed to this process,
// by their paths; none where it passed nothing. They are systemd's: a path
// outlives its listener, and what connects then waits for the next process.
// What was passed is forgotten, so that neither a second call nor a child of
// this process takes it up.
//
// An error names each descriptor that is no such socket, and what to correct in
// its socket unit. The others are returned all the same, so that whoever waits
// on them can be told.
func Sockets() (map[string]net.Listener, error) {
	sockets := map[string]net.Listener{}
	var wrong []error
	for _, f := range activation.Files(true) {
		l, err := listener(f)
		f.Close()
		if err == nil && sockets[l.Addr().String()] != nil {
			// The path leads to one of them, and nothing tells to which.
			err = errors.Join(fmt.Errorf("%s was passed twice: it must be in one ListenStream= of one socket unit", l.Addr()), l.Close())
		}
		if err != nil {
			wrong = append(wrong, fmt.Errorf("take %s from systemd: %w", f.Name(), err))
			continue
		}
		sockets[l.Addr().String()] = l
	}
	return sockets, errors.Join(wrong...)
}

// listener makes a listener of its own of what f is.
func listener(f *os.File) (net.Listener, error) {
	listens, err := unix.GetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if errors.Is(err, unix.ENOTSOCK) {
		path, _ := os.Readlink("/proc/self/fd/" + strconv.Itoa(int(f.Fd())))
		return nil, fmt.Errorf("%s is no socket: its socket unit must name the plugin socket by ListenStream=, and nothing else", path)
	}
	if err != nil {
		return nil, fmt.Errorf("look at the socket: %w", err)
	}
	// A connection can be made of every kind of socket, and knows its kind.
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("look at the socket: %w: its socket unit must name the plugin socket by ListenStream=, and nothing else", err)
	}
	defer conn.Close()
	switch at := conn.LocalAddr(); {
	case at.Network() != "unix":
		return nil, fmt.Errorf("%s is a socket of type %s: its socket unit must have ListenStream= with the path of the plugin socket instead", at, at.Network())
	case listens == 0:
		return nil, fmt.Errorf("%s doesn't listen: its socket unit must have Accept=no", at)
	}
	return net.FileListener(f)
}
