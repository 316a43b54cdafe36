package metrics

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"
)

// Addr is where the metrics are served: a unix socket's path or an IP address
// and port. The zero one is nowhere.
type Addr struct {
	Network string // tcp or unix
	Address string
}

// maxSocketPath is what fits into the kernel's sun_path, see unix(7).
const maxSocketPath = 107

// ParseAddr reads an absolute path; an IP address, localhost or nothing, which
// stands for all addresses of the host, with a port from 1 to 65535; or "" for
// nowhere.
func ParseAddr(text string) (Addr, error) {
	wrong := func(why string) (Addr, error) {
		return Addr{}, fmt.Errorf("parse METRICS_ADDR %q: %s: want an address and port such as 127.0.0.1:9767 or [::1]:9767, or the absolute path of a unix socket such as /run/oam-docker-ipam/metrics.sock", text, why)
	}
	switch {
	case text == "":
		return Addr{}, nil
	case filepath.IsAbs(text):
		if len(text) > maxSocketPath {
			return wrong(fmt.Sprintf("the path of a socket has at most %d bytes", maxSocketPath))
		}
		if strings.HasSuffix(text, "/") || strings.ContainsRune(text, 0) {
			return wrong("no file can have that name")
		}
		return Addr{"unix", text}, nil
	}
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		return wrong("neither an address with a port nor an absolute path")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return wrong("the port is no number from 1 to 65535")
	}
	// No other names: whatever answers for them may be slow, or change its mind.
	if _, err := netip.ParseAddr(host); err != nil && host != "" && host != "localhost" {
		return wrong("the host is no IP address")
	}
	return Addr{"tcp", text}, nil
}

// host is that of a TCP address, and its port.
func (a Addr) host() (host, port string) {
	host, port, _ = net.SplitHostPort(a.Address) // ParseAddr has seen it
	return host, port
}

// Public reports whether others than this host's users can reach it.
func (a Addr) Public() bool {
	if a.Network != "tcp" {
		return false
	}
	host, _ := a.host()
	ip, _ := netip.ParseAddr(host)
	return host != "localhost" && !ip.IsLoopback()
}

const (
	// listenPace is the time between two attempts to open an address.
	listenPace = 10 * time.Second
	// maxCallers bounds the connections: more of them wait, with the kernel.
	maxCallers = 100
	// What a caller may take for his request and, the time to find the answer
	// included, to read that, which keeps others from scraping; and how long his
	// connection may wait for the next request.
	readTime, writeTime, idleTime = 10 * time.Second, answerTime + 5*time.Second, 3 * time.Minute
	// maxHeader is above what any Prometheus sends.
	maxHeader = 16 << 10
	// stopTime is how long answers in hand have when ctx has ended.
	stopTime = time.Second
)

// Serve serves a handler at an address until ctx ends. Where that can't be
// opened it logs why, with the way out, and tries again: addresses are leased
// without metrics too.
func Serve(ctx context.Context, a Addr, h http.Handler, log *slog.Logger) {
	if a == (Addr{}) {
		return
	}
	if a.Public() {
		log.Warn("metrics can be read from the network: by all who reach this address, unless a firewall says otherwise", "address", a.Address)
	}
	told := ""
	for ctx.Err() == nil {
		l, err := a.listen(ctx)
		if err == nil {
			log.Info("metrics served", "address", a.Address)
			told = ""
			err = serve(ctx, l, h, log)
		}
		// Said once: whoever reads it needs no reminder every 10 s.
		if err != nil && ctx.Err() == nil && err.Error() != told {
			told = err.Error()
			log.Error("metrics not served: tried again", "address", a.Address, "every", listenPace, "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(listenPace):
		}
	}
}

// serve serves at a listener until ctx ends, or until that fails.
func serve(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	s := &http.Server{
		Handler: h, ReadTimeout: readTime, WriteTimeout: writeTime, IdleTimeout: idleTime, MaxHeaderBytes: maxHeader,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	stopped := make(chan struct{})
	unwatch := context.AfterFunc(ctx, func() {
		defer close(stopped)
		bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
		defer cancel()
		if s.Shutdown(bound) != nil {
			s.Close()
		}
	})
	err := s.Serve(netutil.LimitListener(l, maxCallers))
	if !unwatch() {
		<-stopped
		return nil
	}
	return errors.Join(fmt.Errorf("serve metrics: %w", err), s.Close())
}

// listen opens the address. A socket that nobody has any more is replaced.
func (a Addr) listen(ctx context.Context) (net.Listener, error) {
	if a.Network == "unix" {
		return listenUnix(ctx, a.Address)
	}
	l, err := new(net.ListenConfig).Listen(ctx, a.Network, a.Address)
	host, port := a.host()
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return nil, fmt.Errorf("%w: another program has the port (ss -tlnp 'sport = :%s' shows it): stop it, or give the daemon another METRICS_ADDR and restart it", err, port)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return nil, fmt.Errorf("%w: %s is no address of this host (ip address shows these): add it, or give the daemon another METRICS_ADDR and restart it", err, host)
	case errors.Is(err, unix.EACCES):
		return nil, fmt.Errorf("%w: ports under 1024 need root or CAP_NET_BIND_SERVICE: give the daemon another METRICS_ADDR and restart it", err)
	}
	return l, err
}

func listenUnix(ctx context.Context, path string) (net.Listener, error) {
	// A plain file refuses connections too, and isn't ours to remove.
	info, missing := os.Lstat(path)
	if missing == nil && info.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("listen on %s: this is no socket but something else: remove it, or give the daemon another METRICS_ADDR and restart it", path)
	}
	// To a socket of another type the kernel tells whether anybody has this one,
	// and makes no connection.
	conn, err := new(net.Dialer).DialContext(ctx, "unixgram", path)
	if err == nil {
		conn.Close()
	}
	switch {
	case err == nil, errors.Is(err, unix.EPROTOTYPE):
		return nil, fmt.Errorf("listen on %s: another process serves this socket (ss -xlp src %s shows it): stop it, or give the daemon another METRICS_ADDR and restart it", path, path)
	case missing == nil && errors.Is(err, unix.EACCES):
		return nil, fmt.Errorf("listen on %s: this is another user's socket: as root see who serves it (ss -xlp src %s) and stop that or remove it, or give the daemon another METRICS_ADDR and restart it", path, path)
	case errors.Is(err, unix.ECONNREFUSED):
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove stale socket: %w: remove it as root, or give the daemon another METRICS_ADDR and restart it", err)
		}
	}
	l, err := new(net.ListenConfig).Listen(ctx, "unix", path)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		return nil, fmt.Errorf("%w: its folder must be there, and the daemon's user must be allowed to write into it, as /run/oam-docker-ipam is under systemd: METRICS_ADDR=/run/oam-docker-ipam/metrics.sock", err)
	case err != nil:
		return nil, err
	}
	// Not by the umask, which others of this process need meanwhile. Who may
	// reach the folder may read.
	if err := os.Chmod(path, 0o666); err != nil {
		return nil, errors.Join(fmt.Errorf("let others read the metrics: %w", err), l.Close())
	}
	return l, nil
}
