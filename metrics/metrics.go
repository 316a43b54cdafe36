// Package metrics counts what happens, for Prometheus, and tells monitoring
// whether the daemon is alive and ready.
package metrics

import (
	"context"
	"log/slog"
	"net/http"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Metrics are the daemon's. It is told what happens as lease.Observer,
// dhcp.Observer and by Committed, and asks its Sources when it is read. Its
// methods may be called concurrently.
type Metrics struct{ registry *prometheus.Registry }

var _ lease.Observer = (*Metrics)(nil)

// New makes those of a version and the source's commit.
func New(version, revision string) *Metrics { return &Metrics{registry: prometheus.NewRegistry()} }

// Sources are what is asked each time the metrics are read.
type Sources struct {
	Pools func() []lease.PoolStatus
	// Drops are the packets that were not used, by reason.
	Drops func() map[string]uint64
	// DatabaseSize is in bytes.
	DatabaseSize func() int64
}

// From sets what is asked when the metrics are read. Call it once, before
// Handler's is used.
func (m *Metrics) From(s Sources) {}

// Handler serves /metrics, /healthz, which asks alive, and /readyz, which asks
// ready.
func (m *Metrics) Handler(alive, ready func(context.Context) error) http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

// Requested implements lease.Observer.
func (m *Metrics) Requested(took time.Duration, err error) {}

// Attempted implements lease.Observer.
func (m *Metrics) Attempted(state lease.State, late time.Duration, err error) {}

// Happened implements lease.Observer.
func (m *Metrics) Happened(e lease.Event) {}

// Exchanged implements dhcp.Observer.
func (m *Metrics) Exchanged(message string, server netip.Addr, outcome string, took time.Duration) {
}

// Committed counts a commit of the database, see store.DB's Observe.
func (m *Metrics) Committed(took time.Duration, changes int, err error) {}

// Addr is where the metrics are served: a unix socket's path or an IP address
// and port. The zero one is nowhere.
type Addr struct{ Network, Address string }

// ParseAddr reads an absolute path, host:port or "" for nowhere.
func ParseAddr(text string) (Addr, error) { return Addr{}, nil }

// Public reports whether others than this host's users can reach it.
func (a Addr) Public() bool { return false }

// Serve serves a handler at an address until ctx ends. Where that can't be
// opened it logs why, with the way out, and tries again: addresses are leased
// without metrics too.
func Serve(ctx context.Context, a Addr, h http.Handler, log *slog.Logger) {}
