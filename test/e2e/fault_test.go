package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// metricsAddr is a loopback address, of which each host has its own.
const metricsAddr = "127.0.0.1:9767"

// get asks the daemon's metrics address and returns the status and the body.
func (s *site) get(path string) (status, body string) {
	s.Helper()
	var conn net.Conn
	check(s.T, s.net.Host.Do(func() (err error) {
		conn, err = net.Dial("tcp4", metricsAddr) // by this thread
		return err
	}))
	defer conn.Close()
	must(fmt.Fprintf(conn, "GET %s HTTP/1.0\r\n\r\n", path))(s.T)
	response := must(http.ReadResponse(bufio.NewReader(conn), nil))(s.T)
	defer response.Body.Close()
	return response.Status, string(must(io.ReadAll(response.Body))(s.T))
}

// samples are the daemon's metrics of some names, with their labels and values.
func (s *site) samples(names ...string) map[string]string {
	s.Helper()
	status, body := s.get("/metrics")
	if status != "200 OK" {
		s.Fatalf("metrics: %s: %s", status, body)
	}
	found := map[string]string{}
	for line := range strings.Lines(body) {
		sample, value, _ := strings.Cut(strings.TrimSpace(line), "} ")
		if name, labels, has := strings.Cut(sample, "{"); has && slices.Contains(names, strings.TrimPrefix(name, "oam_docker_ipam_")) {
			found[strings.TrimPrefix(name, "oam_docker_ipam_")+"{"+labels+"}"] = value
		}
	}
	return found
}

// counts tries that of some metrics these are the ones above zero.
func (s *site) counts(want map[string]string, names ...string) {
	s.Helper()
	eventually(s.T, 5*time.Second, func() error {
		got := s.samples(names...)
		maps.DeleteFunc(got, func(_, value string) bool { return value == "0" })
		if !maps.Equal(got, want) {
			return fmt.Errorf("metrics are %q, want %q", got, want)
		}
		return nil
	})
}

// The metrics count what was done, no more and no less.
func TestMetrics(t *testing.T) {
	t.Parallel()
	s := newHost(t, lab.ISC, lab.DHCPConfig{}, "--metrics-addr", metricsAddr, "--dhcp-timeout", "3s", "--release-delay", "0s")
	check(t, s.daemon.Start())
	pool := s.pool()
	first, second := s.acquire(pool, lab.ScatteredMAC(1)), s.acquire(pool, lab.ScatteredMAC(2))
	check(t, s.releaseAddress(pool, first))
	if _, err := s.requestThe(pool, lab.ScatteredMAC(3), second.String()); err == nil {
		t.Fatal("an address was given twice")
	}

	s.counts(map[string]string{
		`address_request_duration_seconds_count{outcome="granted"}`: "2",
		`address_request_duration_seconds_count{outcome="failed"}`:  "1",
		`events_total{event="granted"}`:                             "2",
		`events_total{event="released"}`:                            "1",
		`events_total{event="failed"}`:                              "1",
		`leases{pool="10.10.0.0/24",state="bound"}`:                 "1",
		// The network's own probe is the third one.
		`dhcp_exchanges_total{outcome="offer",server="10.10.0.1",type="discover"}`: "3",
		`dhcp_exchanges_total{outcome="ack",server="10.10.0.1",type="request"}`:    "2",
		`dhcp_exchanges_total{outcome="sent",server="10.10.0.1",type="release"}`:   "1",
	}, "address_request_duration_seconds_count", "events_total", "leases", "dhcp_exchanges_total")
	for _, path := range []string{"/healthz", "/readyz"} {
		if status, body := s.get(path); status != "200 OK" {
			t.Errorf("%s: %s: %s", path, status, body)
		}
	}

	check(t, s.dhcp.Kill())
	if _, err := s.requestAddress(pool, lab.ScatteredMAC(4)); err == nil {
		t.Fatal("an address without a server")
	}
	s.counts(map[string]string{
		`dhcp_exchanges_total{outcome="offer",server="10.10.0.1",type="discover"}`:  "3",
		`dhcp_exchanges_total{outcome="silent",server="10.10.0.1",type="discover"}`: "1",
		`dhcp_exchanges_total{outcome="ack",server="10.10.0.1",type="request"}`:     "2",
		`dhcp_exchanges_total{outcome="sent",server="10.10.0.1",type="release"}`:    "1",
	}, "dhcp_exchanges_total")
	// Ready again when the server is.
	eventually(t, 10*time.Second, func() error {
		if status, body := s.get("/readyz"); status != "503 Service Unavailable" || !strings.Contains(body, "10.10.0.1") {
			return fmt.Errorf("ready without a server: %s: %s", status, body)
		}
		return nil
	})
	if status, body := s.get("/healthz"); status != "200 OK" {
		t.Errorf("not alive without a server: %s: %s", status, body)
	}
	check(t, s.dhcp.Start())
	s.acquire(pool, lab.ScatteredMAC(5))
	if status, body := s.get("/readyz"); status != "200 OK" {
		t.Errorf("not ready: %s: %s", status, body)
	}
}

// requestThe requests an address of its own for a MAC.
func (s *site) requestThe(pool, mac, address string) (answer struct{ Address string }, err error) {
	err = s.call(s.Context(), "RequestAddress", map[string]any{
		"PoolID": pool, "Address": address, "Options": map[string]string{"com.docker.network.endpoint.macaddress": mac},
	}, &answer)
	return answer, err
}

// symptom is an object of `doctor --json`.
type symptom struct {
	Check  string `json:"check"`
	Status string `json:"status"`
	Found  string `json:"found"`
	Advice string `json:"advice"`
}

// doctor runs `doctor`, where /run/docker is the engine's, and returns its exit
// status and what it found.
func (s *site) doctor() (status int, found []symptom) {
	s.Helper()
	const box = `mkdir -p /run/docker && mount --bind "$0" /run/docker && exec "$@"`
	run := filepath.Dir(s.engine.PluginDir())
	out, err := s.net.Host.Run(slices.Concat([]string{"unshare", "--mount", "sh", "-c", box, run, must(lab.Build())(s.T)}, s.daemon.Flags,
		[]string{"--config", "/dev/null", "--data-dir", s.daemon.DataDir, "--docker", "unix://" + s.engine.Socket(), "doctor", "--json"})...)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		status = exit.ExitCode()
	} else {
		check(s.T, err)
	}
	if err := json.Unmarshal([]byte(out), &found); err != nil {
		s.Fatalf("doctor: %v: %s", err, out)
	}
	return status, found
}

// of are the findings of a status.
func of(found []symptom, status string) (these []symptom) {
	for _, f := range found {
		if f.Status == status {
			these = append(these, f)
		}
	}
	return these
}

// A night shift with a real engine: all is well and the commands say so; the
// server dies and the doctor names it; it is back, and nothing is left of it.
func TestNightShift(t *testing.T) {
	t.Parallel()
	s := newSite(t, lab.Dnsmasq, lab.DHCPConfig{}, "--metrics-addr", metricsAddr, "--dhcp-timeout", "4s", "--client-id", "mac")
	s.network("a", "eth0", "10.10.0.0/24")
	const mac = "02:42:0a:0a:00:77"
	capture := filepath.Join(s.lab.Scratch, "web.pcapng")
	captured := make(chan error, 1)
	go func() {
		_, err := s.daemon.Run("capture", "--container", mac, "--for", "6s", "-o", capture)
		captured <- err
	}()
	// It has begun when the file is there.
	eventually(t, 5*time.Second, func() error { _, err := os.Stat(capture); return err })
	s.docker("run", "-d", "--name", "other", "--network", "a", image)
	addr := s.run("web", "a", "--mac-address", mac)
	s.holds("web", "eth0")

	t.Run("all is well", func(t *testing.T) {
		status, found := s.doctor()
		if faults := of(found, "fault"); status != 0 || faults != nil {
			t.Errorf("status %d: %+v", status, faults)
		}
		if skipped := of(found, "skipped"); skipped != nil {
			t.Errorf("skipped: %+v", skipped)
		}
	})
	t.Run("inspect", func(t *testing.T) {
		for _, key := range []string{addr.String(), mac} {
			var inspected struct {
				Container       string
				NetworkSettings map[string]string
			}
			check(t, json.Unmarshal([]byte(must(s.daemon.Run("inspect", key))(t)), &inspected))
			want := map[string]string{
				"HWAddr": mac, "Bridge": "", "IPAddress": addr.String(), "IPPrefixLen": "24", "Gateway": s.router("web"),
				"DNS": inspected.NetworkSettings["DNS"],
			}
			if !maps.Equal(inspected.NetworkSettings, want) {
				t.Errorf("inspect %s: %v, want %v", key, inspected.NetworkSettings, want)
			}
		}
	})
	t.Run("capture", func(t *testing.T) {
		check(t, <-captured)
		// 1 DISCOVER, 2 OFFER, 3 REQUEST, 5 ACK.
		types := strings.Fields(must(s.net.Host.Run("tshark", "-r", capture, "-T", "fields", "-e", "dhcp.option.dhcp"))(t))
		if want := []string{"1", "2", "3", "5"}; !slices.Equal(slices.Compact(types), want) {
			t.Errorf("captured %q, want %q", types, want)
		}
	})
	t.Run("server dies", func(t *testing.T) {
		check(t, s.dhcp.Kill())
		said := s.refused("a")
		mentions(t, said, "10.10.0.1")
		status, found := s.doctor()
		faults := of(found, "fault")
		if status != 2 || len(faults) == 0 {
			t.Fatalf("status %d: %+v", status, found)
		}
		mentions(t, faults[0].Found+faults[0].Advice, "10.10.0.1")
		mentions(t, must(s.daemon.Run("events", "--event", "failed"))(t), "10.10.0.1")
		mentions(t, must(s.daemon.Run("pools"))(t), "10.10.0.0/24", "10.10.0.1")
	})
	t.Run("server is back", func(t *testing.T) {
		check(t, s.dhcp.Start())
		s.docker("rm", "-f", "other")
		s.run("third", "a")
		if status, found := s.doctor(); status != 0 {
			t.Errorf("status %d: %+v", status, of(found, "fault"))
		}
		if status, body := s.get("/readyz"); status != "200 OK" {
			t.Errorf("not ready: %s: %s", status, body)
		}
	})
}
