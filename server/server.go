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
	"sync"
	"syscall"
	"time"

	"github.com/gorilla/mux"
	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// New makes the handler of all that the socket of one driver serves: its name
// also names both address spaces. Operators are served on every socket alike,
// since all are root's only.
func New(b Backend, as lease.Driver, log *slog.Logger) http.Handler {
	r := newRouter()
	driver{b.Manager, as, log, new(repeats)}.route(r)
	operator{b, log, make(chan struct{}, maxRemembering)}.route(r)
	return r
}

// notServed ends the error about a path that there isn't.
const notServed = " is not served: this is an IPAM driver"

// newRouter makes a router that refuses all there is in words of ours.
func newRouter() *mux.Router {
	// A path that isn't clean is a wrong one: mux would redirect the caller,
	// who expects JSON.
	r := mux.NewRouter().SkipClean(true)
	r.NotFoundHandler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		answer(w, http.StatusNotFound, failure{Err: req.URL.Path + notServed})
	})
	r.MethodNotAllowedHandler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		answer(w, http.StatusMethodNotAllowed, failure{Err: fmt.Sprintf("%s is not served by %s", req.URL.Path, req.Method)})
	})
	return r
}

// maxSocketPath is what fits into the kernel's sun_path, see unix(7).
const maxSocketPath = 107

// Listen makes the plugin socket with mode 0600, and its folder where that is
// missing. A socket that nobody has any more is replaced.
func Listen(path string) (net.Listener, error) {
	l, err := listen(path)
	if errors.Is(err, fs.ErrPermission) {
		err = fmt.Errorf("%w: run this as root, or have systemd make the socket (systemctl restart oam-docker-ipam.socket)", err)
	}
	return l, err
}

func listen(path string) (net.Listener, error) {
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
	// To a socket of another type the kernel tells whether anybody has this
	// one, and makes no connection: at that, systemd would start a daemon.
	conn, err := net.Dial("unixgram", path)
	if err == nil {
		conn.Close()
	}
	switch {
	case err == nil, errors.Is(err, unix.EPROTOTYPE):
		return nil, fmt.Errorf("listen on %s: another process serves this socket, or systemd holds it for the daemon (then start that by systemctl start oam-docker-ipam): stop it (systemctl stop oam-docker-ipam.socket oam-docker-ipam.service), or give this daemon another PLUGIN_SOCKET", path)
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

// Serve answers requests until ctx ends. It closes l then, and every caller who
// has been let in gets an answer, for which there is at most grace. Those who
// haven't stay with the socket: where systemd holds it too, for the next Serve.
//
// Every answer closes its connection: an idle one that broke under the engine's
// next request would make it send that again without its body.
func Serve(ctx context.Context, l net.Listener, h http.Handler, grace time.Duration, log *slog.Logger) error {
	// http.Server's Shutdown drops requests that it reads once it has begun,
	// and callers who were let in 5 s before and have sent nothing yet. So it
	// isn't used: once nobody is let in any more, connections end by themselves.
	var callers sync.WaitGroup
	s := &http.Server{
		Handler: h, ReadHeaderTimeout: headerTime, BaseContext: baseContext(ctx),
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		ConnState: func(_ net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew: // called before s.Serve returns
				callers.Add(1)
			case http.StateClosed:
				callers.Done()
			}
		},
	}
	s.SetKeepAlivesEnabled(false)
	defer context.AfterFunc(ctx, func() { l.Close() })()
	err := fmt.Errorf("serve %s: %w", l.Addr(), s.Serve(l))
	if ctx.Err() != nil {
		err = nil
	}
	answered := make(chan struct{})
	go func() { callers.Wait(); close(answered) }()
	select {
	case <-answered:
		return err
	case <-time.After(grace):
		return errors.Join(err, fmt.Errorf("finish requests in hand: cut off after %s", grace), s.Close())
	}
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
