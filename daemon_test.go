package main

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/server"
)

// journal is a log that a test waits on.
type journal struct {
	mu    sync.Mutex
	text  strings.Builder
	wrote chan struct{} // has one when there is more
}

func newJournal() *journal { return &journal{wrote: make(chan struct{}, 1)} }

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	select {
	case j.wrote <- struct{}{}:
	default:
	}
	return j.text.Write(b)
}

// after waits until the log has a text, and returns and forgets all up to its
// line's end.
func (j *journal) after(t *testing.T, text string) (all string) {
	t.Helper()
	for deadline := time.After(10 * time.Second); ; {
		j.mu.Lock()
		if before, rest, found := strings.Cut(j.text.String(), text); found {
			line, rest, _ := strings.Cut(rest, "\n")
			j.text.Reset()
			j.text.WriteString(rest)
			j.mu.Unlock()
			return before + text + line
		}
		j.mu.Unlock()
		select {
		case <-j.wrote:
		case <-deadline:
			t.Fatalf("nothing says %q", text)
		}
	}
}

// A SIGHUP brings into force what a running daemon can change, names what it
// can't, and changes nothing when the file is wrong.
func TestReload(t *testing.T) {
	cleanEnv(t)
	s := home(t)
	own := "DATA_DIR=" + s.dataDir + "\nPLUGIN_SOCKET=" + s.socket + "\n"
	file := configFile(t, own)
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s, err := settingsOf(t, file)
	if err != nil {
		t.Fatal(err)
	}
	log := newJournal()
	d := newDaemon(s, log)
	d.reread = func() (settings, error) {
		return reread([]string{"oam-docker-ipam", "--config", file, "server"})
	}
	signals := make(chan os.Signal, 1)
	d.hangup = signals
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- d.run(ctx, s) }()
	log.after(t, "msg=serving")
	force := func() map[string]string {
		t.Helper()
		running, err := server.Settings(t.Context(), s.socket)
		if err != nil {
			t.Fatal(err)
		}
		values := map[string]string{}
		for _, s := range running {
			values[s.Key] = s.Value
		}
		return values
	}
	hangup := func() { signals <- syscall.SIGHUP }

	want := force()
	write("IPAM_DEBUG=true\nDHCP_SERVER=dhcp.example.org\nRELEASE_DELAY=1m\nDATA_DIR=/elsewhere\nPLUGIN_SOCKET=" + s.socket + "\nDHCP_SEVER=x\n")
	hangup()
	said := log.after(t, "configuration reloaded")
	want["IPAM_DEBUG"], want["DHCP_SERVER"], want["RELEASE_DELAY"] = "true", "dhcp.example.org", "1m"
	if got := force(); !maps.Equal(got, want) {
		t.Errorf("in force is %v, want %v", got, want)
	}
	for _, part := range []string{`needs a restart: systemctl restart oam-docker-ipam" key=DATA_DIR value=/elsewhere`, `msg="setting changed" key=DHCP_SERVER`, file + ":2", "key=DHCP_SEVER", file + ":6"} {
		if !strings.Contains(said, part) {
			t.Errorf("the log lacks %q:\n%s", part, said)
		}
	}
	if strings.Contains(said, "key=PLUGIN_SOCKET") {
		t.Errorf("what hasn't changed is told of:\n%s", said)
	}
	if !d.log.Enabled(ctx, slog.LevelDebug) {
		t.Error("debug is still off")
	}

	for _, wrong := range []string{own + "RELEASE_DELAY=soon\n", own + "IPAM_DEBUG=perhaps\n", "nonsense\n"} {
		write(wrong)
		hangup()
		if said := log.after(t, "configuration not reloaded"); !strings.Contains(said, file) {
			t.Errorf("%q: the log doesn't say where:\n%s", wrong, said)
		}
		if got := force(); !maps.Equal(got, want) {
			t.Errorf("after %q in force is %v, want %v", wrong, got, want)
		}
	}

	write(own)
	hangup()
	log.after(t, "configuration reloaded")
	if got := force(); got["DHCP_SERVER"] != "" || got["IPAM_DEBUG"] != "false" || d.log.Enabled(ctx, slog.LevelDebug) {
		t.Errorf("back again: %v", got)
	}

	// What hasn't changed may stand elsewhere now.
	write("# moved\n" + own)
	hangup()
	log.after(t, "configuration reloaded")
	running, err := server.Settings(t.Context(), s.socket)
	if err != nil || textOf(running, keyDataDir).Source != file+":2" {
		t.Errorf("%+v, %v", running, err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// A start that hangs is told of before systemd ends it; one that is ready may
// run for ever.
func TestAwaitStart(t *testing.T) {
	failed := errors.New("failed")
	for _, c := range []struct {
		name         string
		ready, ended time.Duration // 0: never
		after        time.Duration
		want         error
	}{
		{"fails at once", 0, time.Millisecond, time.Millisecond, failed},
		{"hangs", 0, 0, startTime, errHangs},
		{"ready in time, runs", startTime - 1, time.Hour, time.Hour, failed},
		{"ready too late", startTime + 1, time.Hour, startTime, errHangs},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start, ready, end := time.Now(), make(chan struct{}), make(chan struct{})
				err := awaitStart(ready, func() error {
					if c.ready > 0 {
						time.Sleep(c.ready)
						close(ready)
					}
					if c.ended == 0 {
						<-end
					}
					time.Sleep(c.ended - time.Since(start))
					return failed
				})
				if !errors.Is(err, c.want) || time.Since(start) != c.after {
					t.Errorf("after %s: %v, want %v after %s", time.Since(start), err, c.want, c.after)
				}
				close(end)
				time.Sleep(c.ended) // until run has ended too
			})
		})
	}
}
