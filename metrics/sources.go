package metrics

import (
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Sources are what is asked each time the metrics are read.
type Sources struct {
	Pools func() []lease.PoolStatus
	// Drops are the packets that were not used, by reason, of which there are
	// only so many.
	Drops func() map[string]uint64
	// DatabaseSize is in bytes.
	DatabaseSize func() int64
}

// From sets what is asked when the metrics are read. Call it once, before
// Handler's is used.
func (m *Metrics) From(s Sources) { m.registry.MustRegister(&scrape{s, &m.servers}) }

// scrape makes metrics of Sources (prometheus.Collector).
type scrape struct {
	Sources
	servers *servers
}

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(namespace, "", name), help, labels, nil)
}

var (
	poolsDesc      = describe("pools", "Pools, which are the engine's networks of this driver.")
	leasesDesc     = describe("leases", "Leases now. Pool: the subnet; pools of the same subnet are summed. State: bound, renewing, rebinding, lost, waiting (another host's until a reconcile), releasing (its container left, the release waits).", "pool", "state")
	refusedDesc    = describe("pool_failed_address_requests_total", "Address requests for containers that failed, by the pool's subnet.", "pool")
	answeredDesc   = describe("server_last_answer_timestamp_seconds", "When a DHCP server's last answer came, since the epoch; missing before the first one. Server as in dhcp_exchanges_total.", "server")
	unansweredDesc = describe("server_unanswered_messages", "Messages to a DHCP server since its last answer.", "server")
	dropsDesc      = describe("dropped_packets_total", "Received packets that were not used. Reason: one of the daemon's texts.", "reason")
	sizeDesc       = describe("store_size_bytes", "Size of the database's file.")
)

// Describe implements prometheus.Collector.
func (s *scrape) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{poolsDesc, leasesDesc, refusedDesc, answeredDesc, unansweredDesc, dropsDesc, sizeDesc} {
		to <- d
	}
}

// states are those that Held.State has.
var states = []string{
	lease.Bound.String(), lease.Renewing.String(), lease.Rebinding.String(), lease.Lost.String(), lease.Waiting, lease.Releasing,
}

// subnetStatus is what the pools of one subnet have.
type subnetStatus struct {
	leases  map[string]int
	refused uint64
}

// serverStatus is how a server answered, over all pools that ask it.
type serverStatus struct {
	answered   time.Time
	unanswered int
}

// Collect implements prometheus.Collector.
func (s *scrape) Collect(to chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	counter := func(d *prometheus.Desc, value uint64, label string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(value), label)
	}
	pools := s.Pools()
	subnets, servers := map[netip.Prefix]*subnetStatus{}, map[string]serverStatus{}
	for _, p := range pools {
		at := subnets[p.Subnet]
		if at == nil {
			at = &subnetStatus{leases: map[string]int{}}
			subnets[p.Subnet] = at
		}
		for state, n := range p.Leases {
			at.leases[state] += n
		}
		at.refused += p.Refused
		for _, srv := range p.Servers {
			name := s.servers.name(srv.Server)
			all := servers[name]
			// What pools tell of one server overlaps.
			all.unanswered = max(all.unanswered, srv.Unanswered)
			if srv.Answered.After(all.answered) {
				all.answered = srv.Answered
			}
			servers[name] = all
		}
	}
	gauge(poolsDesc, float64(len(pools)))
	for subnet, at := range subnets {
		for _, state := range states {
			gauge(leasesDesc, float64(at.leases[state]), subnet.String(), state)
		}
		counter(refusedDesc, at.refused, subnet.String())
	}
	for name, srv := range servers {
		gauge(unansweredDesc, float64(srv.unanswered), name)
		if !srv.answered.IsZero() {
			gauge(answeredDesc, float64(srv.answered.UnixMilli())/1000, name)
		}
	}
	for reason, n := range s.Drops() {
		counter(dropsDesc, n, reason)
	}
	gauge(sizeDesc, float64(s.DatabaseSize()))
}

// maxServers bounds the values of the label server, "none" and "other" beside
// them.
const maxServers = 100

// servers names DHCP servers in labels, the first maxServers by their address.
// The zero one is ready, and may be used concurrently.
type servers struct {
	mu    sync.Mutex
	names map[netip.Addr]string
}

func (s *servers) name(addr netip.Addr) string {
	if !addr.IsValid() {
		return "none"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	name := s.names[addr]
	switch {
	case name != "":
		return name
	case len(s.names) == maxServers:
		return "other"
	case s.names == nil:
		s.names = map[netip.Addr]string{}
	}
	name = addr.String()
	s.names[addr] = name
	return name
}
