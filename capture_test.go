package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"

	"github.com/talkingdata/oam-docker-ipam/server"
)

// stream is a daemon that streams what a test says.
func stream(t *testing.T, answer func(w http.ResponseWriter, r *http.Request)) (socket string) {
	t.Helper()
	folder, err := os.MkdirTemp("", "ipam")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	socket = filepath.Join(folder, "plugin.sock")
	l, err := server.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(answer))
	s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	return socket
}

// pcapng is a file of some packets, of which others are lost.
func pcapng(t *testing.T, packets int, lost uint64) []byte {
	t.Helper()
	var file bytes.Buffer
	w, err := pcapgo.NewNgWriter(&file, layers.LinkTypeIPv4)
	if err != nil {
		t.Fatal(err)
	}
	write := func(n int) {
		data := make([]byte, n)
		if err := w.WritePacketWithOptions(gopacket.CaptureInfo{CaptureLength: n, Length: n}, data, pcapgo.NgPacketOptions{Comments: []string{"container web"}}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range packets {
		write(300 + i)
	}
	if lost > 0 {
		if err := w.WriteInterfaceStats(0, pcapgo.NgInterfaceStatistics{LastUpdate: time.Now(), PacketsReceived: pcapgo.NgNoValue64, PacketsDropped: lost}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	return file.Bytes()
}

// checkFile reads a file to its end.
func checkFile(t *testing.T, file []byte, packets int) {
	t.Helper()
	r, err := pcapgo.NewNgReader(bytes.NewReader(file), pcapgo.DefaultNgReaderOptions)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for ; ; n++ {
		if _, _, err := r.ReadPacketData(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if n != packets {
		t.Errorf("%d packets, want %d", n, packets)
	}
}

// runCapture runs the command in a folder of its own.
func runCapture(ctx context.Context, t *testing.T, socket string, args ...string) (stdout []byte, stderr string, err error) {
	t.Helper()
	cleanEnv(t)
	t.Chdir(t.TempDir())
	var out, errs bytes.Buffer
	root := command(&out, &errs, func(context.Context, settings) error { return nil })
	err = root.Run(ctx, append([]string{"oam-docker-ipam", "--config", configFile(t, ""), "--socket", socket, "capture"}, args...))
	return out.Bytes(), errs.String(), err
}

// What the daemon is asked, and where its packets go.
func TestCaptureCommand(t *testing.T) {
	for _, c := range []struct {
		args  []string
		query string
		file  string // "" for standard output
		says  string
	}{
		{[]string{"--for", "1ms"}, "container=&for=1ms&last=0&pool=", "", "capturing for 1ms: Ctrl-C ends it\n3 packets in standard output\n"},
		{[]string{"--for", "1ms", "-o", "-"}, "container=&for=1ms&last=0&pool=", "", "capturing for 1ms: Ctrl-C ends it\n3 packets in standard output\n"},
		{[]string{"--last", "20"}, "container=&for=0s&last=20&pool=", "", "3 packets in standard output\n"},
		{[]string{"--last", "20", "--for", "2ms"}, "container=&for=2ms&last=20&pool=", "", "capturing for 2ms: Ctrl-C ends it\n3 packets in standard output\n"},
		{[]string{"--last", "1", "--container", "a&b", "--pool", "192.0.2.0/24", "-o", "x.pcapng"}, "container=a%26b&for=0s&last=1&pool=192.0.2.0%2F24", "x.pcapng", "3 packets in x.pcapng\n"},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			file := pcapng(t, 3, 0)
			socket := stream(t, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/v1/capture" || r.URL.RawQuery != c.query {
					t.Errorf("asked %s", r.URL)
				}
				_, _ = w.Write(file)
				time.Sleep(3 * time.Millisecond)
			})
			stdout, stderr, err := runCapture(t.Context(), t, socket, c.args...)
			if err != nil || stderr != c.says {
				t.Errorf("%q, %v", stderr, err)
			}
			if c.file != "" {
				info, err := os.Stat(c.file)
				if err != nil || info.Mode() != 0o600 || len(stdout) > 0 {
					t.Errorf("%v, %v, and %d bytes beside it", info.Mode(), err, len(stdout))
				}
				if stdout, err = os.ReadFile(c.file); err != nil {
					t.Fatal(err)
				}
			}
			checkFile(t, stdout, 3)
			if !bytes.Equal(stdout, file) {
				t.Error("the packets were changed")
			}
		})
	}
}

// What is at a name stays there.
func TestCaptureKeepsFiles(t *testing.T) {
	socket := stream(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(pcapng(t, 1, 0)) })
	name := filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(name, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err := runCapture(t.Context(), t, socket, "--last", "1", "-o", name)
	if err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "file exists: name a new one") {
		t.Errorf("error %v", err)
	}
	if got, err := os.ReadFile(name); err != nil || string(got) != "mine" {
		t.Errorf("%q, %v", got, err)
	}
}

// No packets: exit status 1, what to look at, and no file.
func TestCaptureNone(t *testing.T) {
	socket := stream(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(pcapng(t, 0, 0))
		time.Sleep(3 * time.Millisecond)
	})
	for _, c := range []struct {
		args []string
		says []string
	}{
		{[]string{"--for", "1ms", "--container", "web", "-o", "x"}, []string{"no packet of container web in this time", "--last 100", "doctor"}},
		{[]string{"--last", "5", "--pool", "192.0.2.0/24", "-o", "x"}, []string{"no packet of pool 192.0.2.0/24 is remembered", "--for 30s"}},
	} {
		_, _, err := runCapture(t.Context(), t, socket, c.args...)
		for _, part := range c.says {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("error %v lacks %q", err, part)
			}
		}
		if _, err := os.Stat("x"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the file is there: %v", err)
		}
	}
	// To standard output it is a file without packets, all the same.
	stdout, _, err := runCapture(t.Context(), t, socket, "--last", "1")
	if err == nil {
		t.Error("no error")
	}
	checkFile(t, stdout, 0)
}

// Ctrl-C ends it well, with what there is, whose last block is whole.
func TestCaptureInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	socket := stream(t, func(w http.ResponseWriter, r *http.Request) {
		file := pcapng(t, 3, 0)
		_, _ = w.Write(file[:len(file)-10])
		_ = http.NewResponseController(w).Flush()
		time.AfterFunc(100*time.Millisecond, cancel)
		<-r.Context().Done()
	})
	_, stderr, err := runCapture(ctx, t, socket, "-o", "x")
	if err != nil || !strings.HasSuffix(stderr, "2 packets in x\n") {
		t.Errorf("%q, %v", stderr, err)
	}
	file, err := os.ReadFile("x")
	if err != nil {
		t.Fatal(err)
	}
	checkFile(t, file, 2)
}

// A daemon that stops, or is killed, in the middle: that is said, and what there
// is stays. What isn't a capture is none.
func TestCaptureDaemonStops(t *testing.T) {
	for _, c := range []struct {
		name string
		cut  int
		kill bool
		junk string
		want int
		says string
	}{
		{"stopped", 0, false, "", 3, "the daemon stopped in the middle of it"},
		{"killed", 0, true, "", 3, "the daemon stopped in the middle of it"},
		{"killed within a packet", 10, true, "", 2, "the daemon stopped in the middle of it"},
		{"junk", 0, false, "junk that isn't pcapng", 3, "no block of pcapng"},
	} {
		t.Run(c.name, func(t *testing.T) {
			socket := stream(t, func(w http.ResponseWriter, r *http.Request) {
				file := pcapng(t, 3, 0)
				_, _ = w.Write(append(file[:len(file)-c.cut], c.junk...))
				_ = http.NewResponseController(w).Flush()
				if c.kill {
					panic(http.ErrAbortHandler)
				}
			})
			_, _, err := runCapture(t.Context(), t, socket, "-o", "x")
			if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), fmt.Sprintf(": %d packets in x", c.want)) {
				t.Errorf("error %v", err)
			}
			file, err := os.ReadFile("x")
			if err != nil {
				t.Fatal(err)
			}
			checkFile(t, file, c.want)
		})
	}
}

// What the daemon had to leave out is told.
func TestCaptureLost(t *testing.T) {
	socket := stream(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(pcapng(t, 2, 77)) })
	_, stderr, err := runCapture(t.Context(), t, socket, "--last", "10")
	if err != nil || stderr != "77 packets came faster than they were read and are lost\n2 packets in standard output\n" {
		t.Errorf("%q, %v", stderr, err)
	}
}

// Without a daemon, and with values that make no sense, nothing is made.
func TestCaptureBadInput(t *testing.T) {
	socket := stream(t, func(http.ResponseWriter, *http.Request) { t.Error("the daemon was asked") })
	for args, says := range map[string]string{
		"--for 0s":    "want a time to wait for packets",
		"--for -1s":   "want a time to wait for packets",
		"--for soon":  "soon",
		"--last -1":   "--last -1: want a number",
		"--last many": "many",
		"web":         `unexpected argument "web"`,
	} {
		_, _, err := runCapture(t.Context(), t, socket, append([]string{"-o", "x"}, strings.Fields(args)...)...)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", args, err)
		}
		if _, err := os.Stat("x"); err == nil {
			t.Errorf("%s: there is a file", args)
		}
	}
	_, _, err := runCapture(t.Context(), t, filepath.Join(t.TempDir(), "none.sock"), "-o", "x")
	if !errors.Is(err, server.ErrNotRunning) {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat("x"); err == nil {
		t.Error("there is a file without a daemon")
	}
}

// A full disk is named, with the file.
func TestCaptureFullDisk(t *testing.T) {
	socket := stream(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(pcapng(t, 2, 0)) })
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err)
	}
	defer full.Close()
	root := command(full, io.Discard, func(context.Context, settings) error { return nil })
	err = root.Run(t.Context(), []string{"oam-docker-ipam", "--config", configFile(t, ""), "--socket", socket, "capture", "--last", "1"})
	if err == nil || !strings.Contains(err.Error(), "write packets to standard output") || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("error %v", err)
	}
}

// Nobody gets packets on his terminal unasked: they go to a new file of this
// moment's name.
func TestCaptureOnTerminal(t *testing.T) {
	socket := stream(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(pcapng(t, 2, 0)) })
	t.Chdir(t.TempDir())
	_, screen := openTerminal(t, 80, 24)
	var stderr bytes.Buffer
	root := command(screen, &stderr, func(context.Context, settings) error { return nil })
	if err := root.Run(t.Context(), []string{"oam-docker-ipam", "--config", configFile(t, ""), "--socket", socket, "capture", "--last", "2"}); err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob("oam-docker-ipam-2???????-??????.pcapng")
	if err != nil || len(names) != 1 || stderr.String() != "2 packets in "+names[0]+"\n" {
		t.Fatalf("%q, %v: %s", names, err, &stderr)
	}
	file, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	checkFile(t, file, 2)
}
