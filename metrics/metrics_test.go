package metrics

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

var (
	near = netip.MustParseAddr("192.0.2.1")
	far  = netip.MustParseAddr("198.51.100.1")
)

// fed are metrics of everything that there is to tell, told as the daemon does.
func fed() *Metrics {
	m := New("3.1.4", "c0ffee")
	m.Requested(20*time.Millisecond, nil)
	m.Requested(3*time.Second, nil)
	m.Requested(30*time.Second, fmt.Errorf("lease an address: %w", lease.ErrNoAnswer))
	m.Requested(time.Second, fmt.Errorf("lease an address: %w", context.Canceled))

	m.Attempted(lease.Renewing, 5*time.Millisecond, nil)
	m.Attempted(lease.Renewing, time.Second, fmt.Errorf("%w: context deadline exceeded", lease.ErrNoAnswer))
	m.Attempted(lease.Rebinding, 2*time.Hour, nil)
	m.Attempted(lease.Rebinding, 2*time.Hour, lease.ErrNAK)
	m.Attempted(lease.Lost, 3*time.Hour, errors.New("network is unreachable"))

	for i, kind := range lease.EventKinds {
		for range i + 1 {
			m.Happened(lease.Event{Kind: kind})
		}
	}

	m.Exchanged("discover", near, "offer", 2*time.Millisecond)
	m.Exchanged("request", near, "ack", 40*time.Second)
	m.Exchanged("request", near, "nak", 3*time.Millisecond)
	m.Exchanged("discover", far, "refused", 3*time.Millisecond)
	m.Exchanged("discover", netip.Addr{}, "silent", 30*time.Second)
	m.Exchanged("request", far, "failed", time.Second)
	m.Exchanged("release", near, "sent", 0)

	m.Committed(4*time.Millisecond, 1, nil)
	m.Committed(2*time.Second, 7, nil)
	m.Committed(time.Second, 3, errors.New("no space left on device"))

	pool := func(subnet string, refused uint64, leases map[string]int, servers ...lease.ServerStatus) lease.PoolStatus {
		return lease.PoolStatus{Pool: lease.Pool{Subnet: netip.MustParsePrefix(subnet)}, Leases: leases, Refused: refused, Servers: servers}
	}
	answered := time.Unix(1_800_000_000, 0)
	m.From(Sources{
		Pools: func() []lease.PoolStatus {
			return []lease.PoolStatus{
				pool("10.0.0.0/24", 1, map[string]int{"bound": 5, "lost": 1}, lease.ServerStatus{Server: near, Answered: answered, Unanswered: 1}, lease.ServerStatus{Server: far, Unanswered: 3}),
				pool("10.0.0.0/24", 2, map[string]int{"bound": 2, "releasing": 4}, lease.ServerStatus{Server: near, Answered: answered.Add(-time.Hour)}),
				pool("10.1.0.0/16", 0, nil, lease.ServerStatus{Unanswered: 2}),
			}
		},
		Drops:        func() map[string]uint64 { return map[string]uint64{"wrong cookie": 9} },
		DatabaseSize: func() int64 { return 131072 },
	})
	return m
}

func fine(context.Context) error { return nil }

// scraped are the samples that a scrape of the metrics has, by name and labels.
func scraped(t *testing.T, m *Metrics) (samples map[string]string, text string) {
	t.Helper()
	s := httptest.NewServer(m.Handler(fine, fine))
	defer s.Close()
	status, text := get(t, http.DefaultClient, s.URL+"/metrics")
	if status != http.StatusOK {
		t.Fatalf("status %d: %s", status, text)
	}
	samples = map[string]string{}
	for line := range strings.Lines(text) {
		if at := strings.LastIndex(line, " "); line[0] != '#' {
			samples[line[:at]] = strings.TrimSpace(line[at+1:])
		}
	}
	return samples, text
}

func get(t *testing.T, client *http.Client, url string) (status int, text string) {
	t.Helper()
	res, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(body)
}

// What Prometheus reads is what the daemon told.
func TestScrape(t *testing.T) {
	samples, text := scraped(t, fed())
	want := map[string]string{
		`address_request_duration_seconds_bucket{outcome="granted",le="0.025"}`: "1",
		`address_request_duration_seconds_count{outcome="granted"}`:             "2",
		`address_request_duration_seconds_sum{outcome="granted"}`:               "3.02",
		`address_request_duration_seconds_bucket{outcome="failed",le="10"}`:     "0",
		`address_request_duration_seconds_bucket{outcome="failed",le="30"}`:     "1",
		`address_request_duration_seconds_count{outcome="failed"}`:              "1",
		`address_request_duration_seconds_count{outcome="canceled"}`:            "1",

		`renewals_total{outcome="ack",state="renewing"}`:     "1",
		`renewals_total{outcome="silent",state="renewing"}`:  "1",
		`renewals_total{outcome="nak",state="renewing"}`:     "0",
		`renewals_total{outcome="failed",state="renewing"}`:  "0",
		`renewals_total{outcome="ack",state="rebinding"}`:    "1",
		`renewals_total{outcome="nak",state="rebinding"}`:    "1",
		`renewals_total{outcome="silent",state="rebinding"}`: "0",
		`renewals_total{outcome="failed",state="rebinding"}`: "0",
		`renewals_total{outcome="failed",state="lost"}`:      "1",
		`renewals_total{outcome="silent",state="lost"}`:      "0",
		`renewals_total{outcome="nak",state="lost"}`:         "0",
		`renewals_total{outcome="ack",state="lost"}`:         "0",
		`renewal_delay_seconds_bucket{le="0.01"}`:            "1",
		`renewal_delay_seconds_bucket{le="3600"}`:            "1",
		`renewal_delay_seconds_bucket{le="14400"}`:           "2",
		`renewal_delay_seconds_count`:                        "2",

		`dhcp_exchanges_total{outcome="offer",server="192.0.2.1",type="discover"}`:            "1",
		`dhcp_exchanges_total{outcome="ack",server="192.0.2.1",type="request"}`:               "1",
		`dhcp_exchanges_total{outcome="nak",server="192.0.2.1",type="request"}`:               "1",
		`dhcp_exchanges_total{outcome="refused",server="198.51.100.1",type="discover"}`:       "1",
		`dhcp_exchanges_total{outcome="silent",server="none",type="discover"}`:                "1",
		`dhcp_exchanges_total{outcome="failed",server="198.51.100.1",type="request"}`:         "1",
		`dhcp_exchanges_total{outcome="sent",server="192.0.2.1",type="release"}`:              "1",
		`dhcp_exchange_duration_seconds_count{server="192.0.2.1",type="discover"}`:            "1",
		`dhcp_exchange_duration_seconds_bucket{server="192.0.2.1",type="request",le="0.005"}`: "1",
		`dhcp_exchange_duration_seconds_bucket{server="192.0.2.1",type="request",le="30"}`:    "1",
		`dhcp_exchange_duration_seconds_bucket{server="192.0.2.1",type="request",le="60"}`:    "2",
		`dhcp_exchange_duration_seconds_count{server="198.51.100.1",type="discover"}`:         "1",
		`dhcp_exchange_duration_seconds_count{server="none",type="discover"}`:                 "",
		`dhcp_exchange_duration_seconds_count{server="192.0.2.1",type="release"}`:             "",

		`store_commits_total{outcome="stored"}`: "2",
		`store_commits_total{outcome="failed"}`: "1",
		`store_commit_duration_seconds_count`:   "3",
		`store_changes_total`:                   "8",
		`store_size_bytes`:                      "131072",

		`pools`: "3",
		`leases{pool="10.0.0.0/24",state="bound"}`:                                            "7",
		`leases{pool="10.0.0.0/24",state="lost"}`:                                             "1",
		`leases{pool="10.0.0.0/24",state="releasing"}`:                                        "4",
		`leases{pool="10.0.0.0/24",state="rebinding"}`:                                        "0",
		`leases{pool="10.1.0.0/16",state="bound"}`:                                            "0",
		`leases{pool="10.1.0.0/16",state="waiting"}`:                                          "0",
		`pool_failed_address_requests_total{pool="10.0.0.0/24"}`:                              "3",
		`pool_failed_address_requests_total{pool="10.1.0.0/16"}`:                              "0",
		`server_last_answer_timestamp_seconds{server="192.0.2.1"}`:                            "1.8e+09",
		`server_last_answer_timestamp_seconds{server="198.51.100.1"}`:                         "", // never
		`server_unanswered_messages{server="192.0.2.1"}`:                                      "1",
		`server_unanswered_messages{server="198.51.100.1"}`:                                   "3",
		`server_unanswered_messages{server="none"}`:                                           "2",
		`dropped_packets_total{reason="wrong cookie"}`:                                        "9",
		`build_info{goversion="` + runtime.Version() + `",revision="c0ffee",version="3.1.4"}`: "1",
	}
	for i, kind := range lease.EventKinds {
		want[fmt.Sprintf("events_total{event=%q}", kind)] = fmt.Sprint(i + 1)
	}
	for name, value := range want {
		if got := samples["oam_docker_ipam_"+name]; got != value {
			t.Errorf("%s is %q, want %q", name, got, value)
		}
	}
	for _, name := range []string{"go_goroutines", "process_resident_memory_bytes"} {
		if samples[name] == "" {
			t.Errorf("no %s", name)
		}
	}
	if t.Failed() {
		t.Log(text)
	}
}

// An alert on the first loss, refusal or late renewal needs the 0 before it.
func TestCountedFromZero(t *testing.T) {
	samples, _ := scraped(t, New("", ""))
	for _, kind := range lease.EventKinds {
		if got := samples[fmt.Sprintf("oam_docker_ipam_events_total{event=%q}", kind)]; got != "0" {
			t.Errorf("event %s is %q", kind, got)
		}
	}
	for _, name := range []string{
		`store_commits_total{outcome="failed"}`, `renewals_total{outcome="silent",state="rebinding"}`,
		`address_request_duration_seconds_count{outcome="failed"}`,
	} {
		if got := samples["oam_docker_ipam_"+name]; got != "0" {
			t.Errorf("%s is %q", name, got)
		}
	}
}

// On a LAN anybody can answer as many servers.
func TestLabelsAreBounded(t *testing.T) {
	m := New("", "")
	var servers []lease.ServerStatus
	for i := range 100_000 {
		server := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		m.Exchanged("discover", server, "offer", time.Millisecond)
		servers = append(servers, lease.ServerStatus{Server: server, Answered: time.Now()})
	}
	m.Exchanged("discover", netip.Addr{}, "silent", time.Second)
	m.From(Sources{
		Pools:        func() []lease.PoolStatus { return []lease.PoolStatus{{Servers: servers}} },
		Drops:        func() map[string]uint64 { return nil },
		DatabaseSize: func() int64 { return 0 },
	})
	samples, _ := scraped(t, m)
	for name, want := range map[string]int{"dhcp_exchanges_total": maxServers + 2, "server_last_answer_timestamp_seconds": maxServers + 1} {
		got := 0
		for sample := range samples {
			if strings.HasPrefix(sample, "oam_docker_ipam_"+name+"{") {
				got++
			}
		}
		if got != want {
			t.Errorf("%s has %d label values, want %d", name, got, want)
		}
	}
	if got := samples[`oam_docker_ipam_dhcp_exchanges_total{outcome="offer",server="other",type="discover"}`]; got != fmt.Sprint(100_000-maxServers) {
		t.Errorf("others have %q offers", got)
	}
	if n := len(m.servers.names); n != maxServers {
		t.Errorf("%d servers are remembered", n)
	}
}

// The ecosystem's rules for names and Help, by both who know them.
func TestNames(t *testing.T) {
	m := fed()
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		name := f.GetName()
		if !strings.HasPrefix(name, "oam_docker_ipam_") && !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") {
			t.Errorf("%s has no prefix of ours", name)
		}
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}

	_, text := scraped(t, m)
	if out := promtool(t, text, "check", "metrics"); out != "" {
		t.Error(out)
	}
}

// promtool runs it and returns what it has to say, in case of an error.
func promtool(t *testing.T, stdin string, args ...string) (complaint string) {
	t.Helper()
	if _, err := exec.LookPath("promtool"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("promtool is missing (test/install installs it)")
		}
		t.Skip("promtool is missing")
	}
	cmd := exec.CommandContext(t.Context(), "promtool", args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Sprintf("promtool %s: %v\n%s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return ""
}

// It is told while it is read, by everybody at the same time.
func TestConcurrent(t *testing.T) {
	m := fed()
	h := m.Handler(fine, fine)
	done := make(chan struct{})
	const callers, calls = 4, 200
	for range callers {
		go func() {
			defer func() { done <- struct{}{} }()
			for i := range calls {
				m.Requested(time.Second, nil)
				m.Attempted(lease.Renewing, time.Second, nil)
				m.Happened(lease.Event{Kind: lease.EventRenewed})
				m.Exchanged("request", netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), "ack", time.Second)
				m.Committed(time.Second, 1, nil)
			}
		}()
	}
	for left := callers; left > 0; {
		select {
		case <-done:
			left--
		default:
			h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/metrics", nil))
		}
	}
	samples, _ := scraped(t, m)
	if got := samples[`oam_docker_ipam_address_request_duration_seconds_count{outcome="granted"}`]; got != fmt.Sprint(callers*calls+2) {
		t.Errorf("%q were granted", got)
	}
}

// What the daemon does a thousand times a second, some of it with locks held.
func BenchmarkTold(b *testing.B) {
	m := New("", "")
	err := fmt.Errorf("renew: %w", lease.ErrNoAnswer)
	calls := map[string]func(){
		"Happened":  func() { m.Happened(lease.Event{Kind: lease.EventRenewed}) },
		"Requested": func() { m.Requested(time.Second, nil) },
		"Attempted": func() { m.Attempted(lease.Renewing, time.Second, err) },
		"Exchanged": func() { m.Exchanged("request", near, "ack", time.Millisecond) },
		"Committed": func() { m.Committed(time.Millisecond, 1, nil) },
	}
	for _, name := range slices.Sorted(maps.Keys(calls)) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				calls[name]()
			}
		})
	}
}

func BenchmarkScrape(b *testing.B) {
	h := fed().Handler(fine, fine)
	b.ReportAllocs()
	for b.Loop() {
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/metrics", nil))
	}
}
