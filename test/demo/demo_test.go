package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// asDemo has this test program be the demo, with the daemon that it names.
const asDemo = "OAM_DEMO_DAEMON"

func TestMain(m *testing.M) {
	if binary := os.Getenv(asDemo); binary != "" {
		os.Exit(run(binary))
	}
	os.Exit(lab.RunTests(m))
}

func TestDemo(t *testing.T) {
	d := start(t)
	out := d.readTo(t, "")
	if status := d.wait(); status != 0 {
		t.Fatalf("exit status %d\n%s\n%s", status, out, d.stderr.String())
	}
	d.leftNothing(t)

	// What must be the same everywhere it is shown, whatever it is.
	inside := regexp.MustCompile(`link/ether (\S+) .*\n +inet (10\.10\.0\.1\d\d)/24 `).FindAllStringSubmatch(out, -1)
	if len(inside) != 2 || inside[0][1] == inside[1][1] || inside[0][2] == inside[1][2] {
		t.Fatalf("two containers' own MACs and addresses: %q\n%s", inside, out)
	}
	for _, c := range inside {
		mac, addr := c[1], c[2]
		for _, want := range []string{
			"DISCOVER from " + mac + " by relay 10.10.0.2",
			"OFFER of " + addr + " to " + mac,
			"REQUEST for " + addr + " from " + mac + " by relay 10.10.0.2",
			"ACK of " + addr + " to " + mac,
			"64 bytes from " + addr + ":",
			"RELEASE of " + addr + " from " + mac + " by relay 10.10.0.2",
		} {
			if !strings.Contains(out, want) {
				t.Errorf("nothing says %q", want)
			}
		}
		const left = ` +(10m0s|9m\d+s)`
		for table, row := range map[string]string{"the server's": left, "our": ` +(\w+ +)?10\.10\.0\.0/24 +bound +10\.10\.0\.1` + left} {
			if !regexp.MustCompile(`(?m)^ +` + addr + ` +` + mac + row + `$`).MatchString(out) {
				t.Errorf("%s table has no row of %s", table, addr)
			}
		}
	}
	if n := strings.Count(out, "default via 10.10.0.1 dev eth0"); n != 2 {
		t.Errorf("%d default routes", n)
	}
	if !strings.Contains(out, "10.10.0.2:67 users:") || strings.Contains(out, ":68 ") {
		t.Error("UDP port 67 is not ours alone, or 68 is taken")
	}
	for line := range strings.Lines(out) {
		line = strings.TrimSuffix(line, "\n")
		if len(line) > width || strings.HasSuffix(line, " ") || strings.Contains(line, "\x1b") {
			t.Errorf("not plain, or wider than %d columns: %q", width, line)
		}
	}
	if !regexp.MustCompile(`saw:\n( +RELEASE .*\n){2} +The DHCP server's table:\n +\(empty\)\n`).MatchString(out) {
		t.Error("the server's table isn't empty after two releases")
	}
	if t.Failed() {
		t.Log(out)
	}
}

func TestInterruptedDemoLeavesNothing(t *testing.T) {
	for _, test := range []struct {
		signal syscall.Signal
		at     string // the command that is running
	}{
		{syscall.SIGINT, "dockerd &"},
		{syscall.SIGTERM, "docker run -d --name db"},
	} {
		t.Run(test.signal.String(), func(t *testing.T) {
			d := start(t)
			d.readTo(t, test.at)
			if err := d.cmd.Process.Signal(test.signal); err != nil {
				t.Fatal(err)
			}
			d.readTo(t, "")
			if status := d.wait(); status != 128+int(test.signal) {
				t.Errorf("exit status %d", status)
			}
			if said := d.stderr.String(); !strings.Contains(said, "interrupted") || !strings.Contains(said, "everything is removed") {
				t.Errorf("it said %q", said)
			}
			d.leftNothing(t)
		})
	}
	t.Run("its reader is gone", func(t *testing.T) {
		d := start(t)
		d.readTo(t, "docker run -d --name db")
		d.stdout.Close()
		if status := d.wait(); status != 128+int(syscall.SIGPIPE) {
			t.Errorf("exit status %d: %s", status, d.stderr.String())
		}
		d.leftNothing(t)
	})
}

// A demo that shows what isn't so would be worse than none.
func TestWrongFactsAreFound(t *testing.T) {
	l := lab.ForTest(t, lab.Engines)
	binary, err := lab.Build()
	if err != nil {
		t.Fatal(err)
	}
	tour := &tour{page: &page{w: io.Discard}, lab: l, binary: binary}
	defer tour.close()
	for _, step := range []func() error{
		tour.makeLAN, tour.startHost, tour.createNetwork, tour.runContainers, tour.lookInside,
		tour.compareLeases, tour.ping, tour.listSockets,
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	fails := func(step func() error, want string) {
		t.Helper()
		if err := step(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want an error with %q", err, want)
		}
	}

	// Inside the host's namespace, not on this machine.
	var conn net.PacketConn
	if err := tour.host.Do(func() (err error) {
		conn, err = net.ListenPacket("udp4", "127.0.0.1:68")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	fails(tour.listSockets, "somebody holds UDP port 68")
	conn.Close()

	web := tour.containers["web"]
	tour.containers["web"] = container{mac: web.mac, prefix: netip.MustParsePrefix("10.10.0.99/24")}
	fails(tour.compareLeases, "web ("+web.mac+") has 10.10.0.99, but the DHCP server gives it "+web.prefix.Addr().String())
	fails(tour.ping, "10.10.0.99")
	delete(tour.containers, "web")
	fails(tour.compareLeases, "2 leases for 1 containers")
	tour.containers["web"] = web

	// Without the daemon there are neither answers nor a socket.
	if err := tour.daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	fails(tour.listSockets, "port 67 of 10.10.0.2 is not oam-docker-ipam's")
	fails(tour.compareLeases, "the daemon is not running")
}

func TestDemoSaysWhatIsMissing(t *testing.T) {
	err := show("no-such-daemon", &page{w: io.Discard}, nil)
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "make demo") {
		t.Errorf("error %v", err)
	}
}

func TestBreakCommand(t *testing.T) {
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"docker", "rm", "web"}, "host# docker rm web"},
		{[]string{"docker", "inspect", "--format", "{{.State}}"}, "host# docker inspect --format '{{.State}}'"},
		{[]string{"ss | awk '{ print $4 }'"}, "host# ss | awk '{ print $4 }'"},
		{
			[]string{"docker", "run", strings.Repeat("a", 40), strings.Repeat("b", 40)},
			"host# docker run " + strings.Repeat("a", 40) + " \\\n      " + strings.Repeat("b", 40),
		},
	} {
		if got := breakCommand("host# ", test.args); got != test.want {
			t.Errorf("%q, want %q", got, test.want)
		}
	}
}

// process is a demo that runs.
type process struct {
	cmd    *exec.Cmd
	stdout io.ReadCloser
	stderr bytes.Buffer
}

// start starts a demo, or skips the test where that can't work.
func start(t *testing.T) *process {
	t.Helper()
	lab.ForTest(t, lab.Engines)
	binary, err := lab.Build()
	if err != nil {
		t.Fatal(err)
	}
	d := &process{cmd: exec.Command(os.Args[0])}
	d.cmd.Env = append(os.Environ(), asDemo+"="+binary)
	d.cmd.Stderr = &d.stderr
	if d.stdout, err = d.cmd.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return d
}

// readTo reads what the demo says up to a text, or all of it.
func (d *process) readTo(t *testing.T, text string) string {
	t.Helper()
	var out strings.Builder
	buf := make([]byte, 1024)
	for text == "" || !strings.Contains(out.String(), text) {
		n, err := d.stdout.Read(buf)
		out.Write(buf[:n])
		if err != nil && text != "" {
			t.Errorf("it never said %q:\n%s\n%s", text, out.String(), d.stderr.String())
		}
		if err != nil {
			break
		}
	}
	return out.String()
}

// wait waits for the end and returns the exit status.
func (d *process) wait() int {
	_ = d.cmd.Wait()
	return d.cmd.ProcessState.ExitCode()
}

// leftNothing looks for everything that the demo could leave behind: the lab
// writes its owner's number into every name.
func (d *process) leftNothing(t *testing.T) {
	t.Helper()
	scratch, namespace := fmt.Sprintf("oam-lab-%d-", d.cmd.Process.Pid), fmt.Sprintf("oam-%d-", d.cmd.Process.Pid)
	var left []string
	for _, pattern := range []string{
		filepath.Join(os.TempDir(), scratch+"*"),
		"/run/netns/" + namespace + "*",
		"/sys/fs/cgroup/" + scratch + "*",
		"/sys/fs/cgroup/*/" + scratch + "*",
	} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, found...)
	}
	for file, names := range map[string][]string{
		"/proc/self/mountinfo":   {scratch, namespace},
		"/proc/[0-9]*/cmdline":   {scratch, namespace},
		"/proc/[0-9]*/cgroup":    {scratch},
		"/proc/[0-9]*/mountinfo": {scratch, namespace},
	} {
		found, err := filepath.Glob(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range found {
			text, _ := os.ReadFile(file) // the process may be gone by now
			for _, name := range names {
				if bytes.Contains(text, []byte(name)) {
					left = append(left, file+" mentions "+name)
				}
			}
		}
	}
	if left != nil {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}
