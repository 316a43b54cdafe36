package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v3"

	"github.com/talkingdata/oam-docker-ipam/conf"
	"github.com/talkingdata/oam-docker-ipam/doctor"
	"github.com/talkingdata/oam-docker-ipam/server"
)

// aNight is what a doctor may find at 3 a.m.
var aNight = []doctor.Finding{
	{Check: "configuration", Status: doctor.OK, Found: "DHCP_SERVER=10.10.0.1 (/etc/oam-docker-ipam.conf:7), as the running daemon has it"},
	{Check: "daemon", Status: doctor.Warning, Found: "version 3.0.0 runs, and 3.1.0 is installed", Advice: "systemctl restart oam-docker-ipam"},
	{Check: "relay address", Status: doctor.OK, Found: "10.10.0.2 is on eth0"},
	{Check: "answer", Status: doctor.Fault, Found: "10.10.0.1 sees our DISCOVER and its answer is dropped here\x1b[2J", Advice: "let UDP port 67 of 10.10.0.2 pass: nft insert rule …"},
	{Check: "disk", Status: doctor.Fault, Found: "/var is full: 3 MiB are free", Advice: "make room there"},
	{Check: "socket", Status: doctor.Skipped, Found: "/run/docker/plugins/talkingdata.sock: not permitted", Advice: "run it as root: sudo oam-docker-ipam doctor"},
}

func examined(t *testing.T, asJSON bool, findings ...doctor.Finding) (string, error) {
	t.Helper()
	var out bytes.Buffer
	err := examine(t.Context(), func(tell func(doctor.Finding)) {
		for _, f := range findings {
			tell(f)
		}
	}, asJSON, &out)
	return out.String(), err
}

// What the doctor prints, for people and for programs.
func TestDoctorPrints(t *testing.T) {
	for file, asJSON := range map[string]bool{"doctor.txt": false, "doctor.json": true} {
		out, err := examined(t, asJSON, aNight...)
		if !errors.Is(err, errFound) {
			t.Errorf("%s: %v, want errFound", file, err)
		}
		matchGolden(t, file, out)
	}
}

// A finding is printed when it is found, not at the end.
func TestDoctorPrintsAtOnce(t *testing.T) {
	r, w := io.Pipe()
	go func() {
		_ = examine(t.Context(), func(tell func(doctor.Finding)) { tell(aNight[0]); select {} }, false, w)
	}()
	got := make([]byte, 200)
	n, err := r.Read(got)
	if err != nil || !strings.HasPrefix(string(got[:n]), "ok       configuration") {
		t.Errorf("got %q, %v", got[:n], err)
	}
}

// Only faults make the exit status 2, and the last line sums up.
func TestDoctorConcludes(t *testing.T) {
	well, warned, wrong, also, skipped := aNight[0], aNight[1], aNight[3], aNight[4], aNight[5]
	for _, test := range []struct {
		findings []doctor.Finding
		last     string
		fault    bool
	}{
		{[]doctor.Finding{well}, "all is well", false},
		{[]doctor.Finding{well, warned, warned, skipped}, "no fault: 2 warnings, 1 skipped", false},
		{[]doctor.Finding{well, wrong}, "1 fault", true},
		{[]doctor.Finding{wrong, well, also, warned}, "2 faults, 1 warning: the first fault is the likeliest cause", true},
	} {
		out, err := examined(t, false, test.findings...)
		lines := strings.Split(strings.TrimSpace(out), "\n")
		if lines[len(lines)-1] != test.last || errors.Is(err, errFound) != test.fault || err != nil && !test.fault {
			t.Errorf("%q, %v; want %q", lines[len(lines)-1], err, test.last)
		}
	}
}

func TestDoctorStopped(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("interrupted"))
	if err := examine(ctx, func(func(doctor.Finding)) {}, false, io.Discard); err == nil || errors.Is(err, errFound) || !strings.Contains(err.Error(), "interrupted") {
		t.Errorf("got %v", err)
	}
}

// doctorOf runs the command where no daemon and no engine is, and reads its JSON.
func doctorOf(t *testing.T, file string, args ...string) (status int, found []doctor.Finding) {
	t.Helper()
	cleanEnv(t)
	t.Setenv("PATH", t.TempDir()) // without systemctl
	folder := t.TempDir()
	line := append([]string{
		"oam-docker-ipam", "--config", file, "--socket", filepath.Join(folder, "td.sock"), "--docker", "unix://" + filepath.Join(folder, "docker.sock"),
	}, args...)
	if !slices.Contains(args, "--data-dir") {
		line = append(line, "--data-dir", filepath.Join(folder, "data"))
	}
	var out, stderr bytes.Buffer
	status = run(append(line, "doctor", "--json"), &out, &stderr)
	if err := json.Unmarshal(out.Bytes(), &found); err != nil {
		t.Fatalf("%v in %q, %q", err, &out, &stderr)
	}
	return status, found
}

// The whole command, with nothing there: the checks come in their order, all
// say something, and the missing daemon is a fault.
func TestDoctor(t *testing.T) {
	status, found := doctorOf(t, configFile(t, "DHCP_SERVRE=192.0.2.1\n"))
	var order []string
	for _, f := range found {
		if !slices.Contains(order, f.Check) {
			order = append(order, f.Check)
		}
	}
	if status != statusFound || !slices.Equal(order, doctor.Names()) {
		t.Errorf("status %d, checks %q, want %q", status, order, doctor.Names())
	}
	for _, want := range []string{"unknown key DHCP_SERVRE", "it doesn't run", "none yet in", "no engine is there"} {
		if !slices.ContainsFunc(found, func(f doctor.Finding) bool { return strings.Contains(f.Found, want) }) {
			t.Errorf("no %q in %+v", want, found)
		}
	}
}

// A configuration that can't be used is a fault, not the doctor's end.
func TestDoctorOfWrongConfiguration(t *testing.T) {
	for text, want := range map[string]string{
		"DHCP_SERVER\n":            "want KEY=VALUE",
		"DHCP_SERVER=10.0.0.300\n": "10.0.0.300",
		"DHCP_TIMEOUT=-1s\n":       "DHCP_TIMEOUT",
		"LOG_FORMAT=xml\n":         "LOG_FORMAT",
		"DHCP_TIMEOUT=abc\n":       ":1: DHCP_TIMEOUT=\"abc\"",
		"IPAM_DEBUG=perhaps\n":     ":1: IPAM_DEBUG=\"perhaps\"",
	} {
		status, found := doctorOf(t, configFile(t, text))
		if status != statusFound || found[0].Check != "configuration" || found[0].Status != doctor.Fault || !strings.Contains(found[0].Found, want) {
			t.Errorf("%q: status %d, %+v", text, status, found)
		}
		if i := len(found) - 1; found[i].Check != "engine" {
			t.Errorf("%q: the last check is %q", text, found[i].Check)
		}
	}
}

// A wrong setting leaves the others to be examined; of a file that can't be read
// none is known.
func TestSiteOfWrongConfiguration(t *testing.T) {
	cleanEnv(t)
	for text, known := range map[string]bool{
		"DHCP_SERVER=192.0.2.1\nLOG_FORMAT=xml\n":   true,
		"DHCP_SERVER=192.0.2.1\nDHCP_TIMEOUT=abc\n": true,
		"DHCP_SERVER=192.0.2.1\nCLIENT_ID=abc\n":    false,
		"DHCP_SERVER=192.0.2.1\nLOG_FORMAT\n":       false,
	} {
		file := conf.File{Name: configFile(t, text)}
		root := command(io.Discard, io.Discard, nil)
		var site doctor.Site
		root.Command("doctor").Action = func(_ context.Context, cmd *cli.Command) error {
			site = siteOf(cmd, &file)
			return nil
		}
		if err := root.Run(t.Context(), []string{"oam-docker-ipam", "--config", file.Name, "doctor"}); err != nil {
			t.Fatal(err)
		}
		if site.Wrong == nil || known != (site.GlobalErr == nil) || known != (site.Global.Texts()["dhcp_server"] == "192.0.2.1") {
			t.Errorf("%q: %v, options %v, %v", text, site.Wrong, site.Global.Texts(), site.GlobalErr)
		}
	}
}

func TestDoctorCannotRun(t *testing.T) {
	for _, args := range [][]string{{"doctor", "--jsn"}, {"doctor", "web"}} {
		if status := run(append([]string{"oam-docker-ipam", "--config", configFile(t, "")}, args...), io.Discard, io.Discard); status != statusFailed {
			t.Errorf("%q: status %d", args, status)
		}
	}
}

// A daemon's settings are read as its start read them.
func TestOptionsOf(t *testing.T) {
	cleanEnv(t)
	s, err := settingsOf(t, configFile(t, "DHCP_SERVER=192.0.2.1\nCLIENT_ID=mac\nRELEASE_DELAY=5s\n"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := optionsOf(s.texts)
	if err != nil || got.Texts()["dhcp_server"] != "192.0.2.1" || got.Texts()["client_id"] != "mac" || got.Texts()["release_delay"] != "5s" {
		t.Errorf("got %v, %v", got.Texts(), err)
	}
	if _, err := optionsOf([]server.Setting{{Key: keyServers, Value: "300.1"}}); err == nil {
		t.Error("a wrong server is taken")
	}
}
