package machine

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// finding is an object of `doctor --json`.
type finding struct{ Check, Status, Found, Advice string }

// doctor runs it as root, or as what a prefix makes of it, and returns its exit
// status and what isn't well.
func (s *site) doctor(as ...string) (status int, unwell []finding) {
	s.Helper()
	out, err := s.machine.Run(append(as, "/usr/bin/"+name, "doctor", "--json")...)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		status = exit.ExitCode()
	} else {
		check(s.T, err)
	}
	var all []finding
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		s.Fatalf("doctor: %v: %s", err, out)
	}
	for _, f := range all {
		if f.Status != "ok" {
			unwell = append(unwell, f)
		}
	}
	return status, unwell
}

// finds tries that the doctor finds something of a status that has these words.
func (s *site) finds(found []finding, status string, words ...string) {
	s.Helper()
	for _, f := range found {
		text := f.Check + " " + f.Found + " " + f.Advice
		missing := false
		for _, word := range words {
			missing = missing || !strings.Contains(text, word)
		}
		if f.Status == status && !missing {
			return
		}
	}
	s.Errorf("no %s with %q in %+v", status, words, found)
}

// On a machine installed by the README the doctor finds nothing wrong, although
// the daemon may do so little, and names what is wrong of systemd, Docker and the
// package. It starts no daemon that was stopped.
func TestDoctor(t *testing.T) {
	s := newRunning(t)
	s.runContainer("c1")
	status, unwell := s.doctor()
	for _, f := range unwell {
		// The machine has no time server.
		if f.Status != "warning" || f.Check != "clock" {
			t.Errorf("%+v", f)
		}
	}
	if status != 0 {
		t.Errorf("status %d", status)
	}

	if _, unwell := s.doctor("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"); len(unwell) == 0 {
		t.Error("nobody may see all")
	} else {
		s.finds(unwell, "skipped", "root")
	}

	s.configure("DHCP_SERVER=10.10.0.9\nDATA_DIR=/srv/elsewhere\n")
	status, unwell = s.doctor()
	if status != 2 {
		t.Errorf("status %d with a wrong server: %+v", status, unwell)
	}
	s.finds(unwell, "warning", "DHCP_SERVER", "systemctl reload")
	s.finds(unwell, "warning", "DATA_DIR", "systemctl restart")
	s.finds(unwell, "fault", "10.10.0.9")
	s.configure("DHCP_SERVER=10.10.0.1\nDATA_DIR=" + stateDir + "\n")

	s.run("systemctl", "stop", name+".service")
	status, unwell = s.doctor()
	if status != 2 {
		t.Errorf("status %d without a daemon: %+v", status, unwell)
	}
	s.finds(unwell, "fault", "daemon", "systemctl start "+name)
	s.state(name+".service", "inactive")
}

// The metrics' socket is where the unit lets it be, and open to others.
func TestMetricsSocket(t *testing.T) {
	s := newInstalled(t)
	const path = "/run/oam-docker-ipam/metrics.sock"
	s.configure("METRICS_ADDR=" + path + "\n")
	s.run("systemctl", "start", name)
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", s.machine.Path(path))
	}}}
	// Its socket may come a moment after the daemon says that it is ready.
	get := func(path string) (body string) {
		s.eventually(5*time.Second, func() error {
			response, err := client.Get("http://metrics" + path)
			if err != nil {
				return err
			}
			defer response.Body.Close()
			text, err := io.ReadAll(response.Body)
			body = string(text)
			return err
		})
		return body
	}
	s.mentions(get("/metrics"), "oam_docker_ipam_build_info{", "process_resident_memory_bytes")
	if ok := get("/readyz"); ok != "ok\n" {
		t.Errorf("ready: %q", ok)
	}
	s.mentions(s.run("stat", "-c", "%a", path, "/run/oam-docker-ipam"), "666\n755")
	s.run("systemctl", "restart", name)
	s.mentions(get("/healthz"), "ok")
	s.run("systemctl", "stop", name+".service", name+".socket")
	if out := s.try("ls", "/run/oam-docker-ipam"); !strings.Contains(out, "No such file") {
		t.Errorf("left behind: %s", out)
	}
}
