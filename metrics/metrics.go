// Package metrics counts what happens, for Prometheus, and tells monitoring
// whether the daemon is alive and ready.
//
// Every metric's name begins with oam_docker_ipam_; its Help says what it means
// and what its labels can be. No label has values without bound: pools are this
// host's networks, and of DHCP servers at most maxServers are told apart, since
// on a LAN anybody can call himself one.
package metrics

import (
	"context"
	"errors"
	"net/netip"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

const namespace = "oam_docker_ipam"

// Metrics are the daemon's. It is told what happens as lease.Observer,
// dhcp.Observer and by Committed, and asks its Sources when it is read. Its
// methods may be called concurrently.
type Metrics struct {
	registry *prometheus.Registry
	servers  servers

	requestTime  *prometheus.HistogramVec // outcome
	exchanges    *prometheus.CounterVec   // type, server, outcome
	exchangeTime *prometheus.HistogramVec // type, server
	renewals     *prometheus.CounterVec   // state, outcome
	renewalDelay prometheus.Histogram
	events       *prometheus.CounterVec // event
	commits      *prometheus.CounterVec // outcome
	commitTime   prometheus.Histogram
	changes      prometheus.Counter
}

var _ lease.Observer = (*Metrics)(nil)

// durations are the buckets of what takes as long as an answer from the disk, a
// server, or one that is silent, in seconds. No native histograms beside them: a
// Prometheus that takes these leaves the buckets out, on which the dashboard and
// the alerts rely.
var durations = []float64{.00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}

// delays are those of renewals, which come right after T1, or at the next
// attempts: up to half of the time between T1 and T2 later, in seconds.
var delays = []float64{.01, .1, 1, 10, 60, 300, 900, 3600, 4 * 3600, 24 * 3600, 7 * 24 * 3600}

// Values of the label outcome.
const (
	granted  = "granted"
	canceled = "canceled"
	failed   = "failed"
	ack      = "ack"
	nak      = "nak"
	silent   = "silent"
	stored   = "stored"
)

// New makes those of a version and the source's commit.
func New(version, revision string) *Metrics {
	r := prometheus.NewRegistry()
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help}, labels)
		r.MustRegister(c)
		return c
	}
	histograms := func(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
		h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: namespace, Name: name, Help: help, Buckets: buckets}, labels)
		r.MustRegister(h)
		return h
	}
	m := &Metrics{
		registry: r,
		requestTime: histograms("address_request_duration_seconds",
			"Time that the engine's requests of an address for a container took. Outcome: granted, failed, or canceled (the engine gave up).", durations, "outcome"),
		exchanges: counters("dhcp_exchanges_total",
			"DHCP messages and what came of them, retransmissions not counted. Type: discover, request, release, decline. Server: its address; none where all on a LAN were asked; other beyond the first 100. Outcome: offer, ack, nak, silent (nobody answered), sent (no answer is awaited), refused (an offer that the container must not have), failed (it could not be sent).", "type", "server", "outcome"),
		exchangeTime: histograms("dhcp_exchange_duration_seconds",
			"Time from the first sending of a DHCP message to its answer; those that nobody answered aren't in it. Type and server as in dhcp_exchanges_total.", durations, "type", "server"),
		renewals: counters("renewals_total",
			"Attempts to keep a lease. State: the lease's when it began: renewing (in time), rebinding (late: its server hasn't answered since T1), lost (too late). Outcome: ack, nak, silent (nobody answered), failed (anything else).", "state", "outcome"),
		renewalDelay: histograms("renewal_delay_seconds",
			"How long after T1, when its renewal was due, a lease was extended; of one that was lost, or handed out from the store, how long after that.", delays).WithLabelValues().(prometheus.Histogram),
		events: counters("events_total",
			"What happened to leases and with servers. Event: as the command events lists them.", "event"),
		commits: counters("store_commits_total",
			"Commits of the database. Outcome: stored, failed.", "outcome"),
		commitTime: histograms("store_commit_duration_seconds",
			"Time that commits of the database took, failed ones too.", durations).WithLabelValues().(prometheus.Histogram),
		changes: counters("store_changes_total",
			"Changes in the stored commits: those made at the same time share one.").WithLabelValues(),
	}
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "build_info",
		Help: "Always 1. Labels: the daemon's version, its source's revision, and the version of Go that compiled it.",
	}, []string{"version", "revision", "goversion"})
	build.WithLabelValues(version, revision, runtime.Version()).Set(1)
	r.MustRegister(build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	// What is counted from 0 on can be alerted on at its first time.
	for _, outcome := range []string{granted, failed, canceled} {
		m.requestTime.WithLabelValues(outcome)
	}
	for _, state := range []lease.State{lease.Renewing, lease.Rebinding, lease.Lost} {
		for _, outcome := range []string{ack, nak, silent, failed} {
			m.renewals.WithLabelValues(state.String(), outcome)
		}
	}
	for _, kind := range lease.EventKinds {
		m.events.WithLabelValues(string(kind))
	}
	for _, outcome := range []string{stored, failed} {
		m.commits.WithLabelValues(outcome)
	}
	return m
}

// Requested implements lease.Observer.
func (m *Metrics) Requested(took time.Duration, err error) {
	outcome := granted
	switch {
	case errors.Is(err, context.Canceled):
		outcome = canceled
	case err != nil:
		outcome = failed
	}
	m.requestTime.WithLabelValues(outcome).Observe(took.Seconds())
}

// Attempted implements lease.Observer.
func (m *Metrics) Attempted(state lease.State, late time.Duration, err error) {
	outcome := failed
	switch {
	case err == nil:
		outcome = ack
		m.renewalDelay.Observe(late.Seconds())
	case errors.Is(err, lease.ErrNAK):
		outcome = nak
	case errors.Is(err, lease.ErrNoAnswer):
		outcome = silent
	}
	m.renewals.WithLabelValues(state.String(), outcome).Inc()
}

// Happened implements lease.Observer.
func (m *Metrics) Happened(e lease.Event) { m.events.WithLabelValues(string(e.Kind)).Inc() }

// Exchanged implements dhcp.Observer.
func (m *Metrics) Exchanged(message string, server netip.Addr, outcome string, took time.Duration) {
	name := m.servers.name(server)
	m.exchanges.WithLabelValues(message, name, outcome).Inc()
	switch outcome {
	case "offer", ack, nak, "refused":
		m.exchangeTime.WithLabelValues(message, name).Observe(took.Seconds())
	}
}

// Committed counts a commit of the database, see store.DB's Observe.
func (m *Metrics) Committed(took time.Duration, changes int, err error) {
	m.commitTime.Observe(took.Seconds())
	if err != nil {
		m.commits.WithLabelValues(failed).Inc()
		return
	}
	m.commits.WithLabelValues(stored).Inc()
	m.changes.Add(float64(changes))
}
