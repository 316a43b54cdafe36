// Package server speaks Docker's IPAM plugin protocol on a unix socket, and
// the operator commands' own on the same.
package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/gorilla/mux"
	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// New makes the handler of all that the socket of one driver serves: its name
// also names both address spaces. Operators are served on every socket alike,
// since all are root's only.
func New(manager *lease.Manager, as lease.Driver, log *slog.Logger) http.Handler {
	// A path that isn't clean is a wrong one: mux would redirect the caller,
	// who expects JSON.
	r := mux.NewRouter().SkipClean(true)
	driver{manager, as, log, new(repeats)}.route(r)
	operator{manager, log}.route(r)
	r.NotFoundHandler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		answer(w, http.StatusNotFound, failure{Err: fmt.Sprintf("%s is not served: this is an IPAM driver", req.URL.Path)})
	})
	r.MethodNotAllowedHandler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		answer(w, http.StatusMethodNotAllowed, failure{Err: fmt.Sprintf("%s is not served by %s", req.URL.Path, req.Method)})
	})
	return r
}

// maxSocketPath is what fits into the kernel's sun_path, see unix(7).
const maxSocketPath = 107

// Listen makes the plugin socket with mode 0600, and its folder where that is
// missing. A socket that nobody serves any more is replaced.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make plugin folder: %w", err)
	}
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("listen on %s: the path of a socket has at most %d bytes: give this daemon a shorter PLUGIN_SOCKET", path, maxSocketPath)
	}
	// A plain file refuses connections too, and isn't ours to remove.
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("listen on %s: this is no socket but something else: remove it, or give this daemon another PLUGIN_SOCKET", path)
	}
	conn, err := net.Dial("unix", path)
	switch {
	case err == nil:
		conn.Close()
		return nil, fmt.Errorf("listen on %s: another process serves this socket: stop it, or give this daemon another PLUGIN_SOCKET", path)
	case errors.Is(err, unix.ECONNREFUSED):
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove stale socket: %w", err)
		}
	}
	// The mode must be right from the start: whoever connects is obeyed.
	defer syscall.Umask(syscall.Umask(0o177))
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, nil
}

// headerTime bounds the reading of a request's header.
const headerTime = 10 * time.Second

// Serve answers requests until ctx ends, then finishes those in hand for at
// most grace. Every answer closes its connection: an idle one that broke under
// the engine's next request would make it send that again without its body.
func Serve(ctx context.Context, l net.Listener, h http.Handler, grace time.Duration, log *slog.Logger) error {
	s := &http.Server{
		Handler: h, ReadHeaderTimeout: headerTime,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	s.SetKeepAlivesEnabled(false)
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	select {
	case err := <-ended:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	if err := s.Shutdown(bound); err != nil {
		return errors.Join(fmt.Errorf("finish requests in hand: %w", err), s.Close())
	}
	return nil
}

// bodyLimit is far above any request of an engine.
const bodyLimit = 1 << 20

// failure is an error's answer. The engine reads Error from answers of status
// 200 and Err from others.
type failure struct {
	Error string `json:",omitempty"`
	Err   string `json:",omitempty"`
}

// bodyTime bounds the reading of a request's body, so that a caller who stops
// in the middle of it can't hold up the daemon's end.
const bodyTime = 10 * time.Second

func readBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	// Not http.Server's ReadTimeout: when that is over, a request whose answer
	// takes longer counts as one whose caller is gone. Writers that can't do
	// this are those of unit tests.
	conn := http.NewResponseController(w)
	_ = conn.SetReadDeadline(time.Now().Add(bodyTime))
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err == nil {
		// After an error it stays: net/http would read on.
		_ = conn.SetReadDeadline(time.Time{})
	}
	return body, err
}
