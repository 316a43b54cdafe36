package systemd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/slogtest"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
	"golang.org/x/sys/unix"
)

func TestJournalConnected(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "stream"))
	works(t, err)
	defer f.Close()
	var stat unix.Stat_t
	works(t, unix.Fstat(int(f.Fd()), &stat))
	for _, test := range []struct {
		stream string
		want   bool
	}{
		{fmt.Sprintf("%d:%d", stat.Dev, stat.Ino), true},
		{fmt.Sprintf("%d:%d", stat.Dev, stat.Ino+1), false},
		{fmt.Sprintf("%d:%d", stat.Dev+1, stat.Ino), false},
		{"nonsense", false},
		{"", false},
	} {
		t.Setenv("JOURNAL_STREAM", test.stream)
		if got := JournalConnected(f); got != test.want {
			t.Errorf("JOURNAL_STREAM=%s: %v", test.stream, got)
		}
	}
	t.Setenv("JOURNAL_STREAM", fmt.Sprintf("%d:%d", stat.Dev, stat.Ino))
	works(t, f.Close())
	if JournalConnected(f) {
		t.Error("a closed file is connected")
	}
}

// entry is what journald would get.
type entry struct {
	message  string
	priority journal.Priority
	fields   map[string]string
}

// newJournal makes a handler whose entries are kept, or refused with err.
func newJournal(level slog.Leveler, fallback slog.Handler, err error) (slog.Handler, *[]entry) {
	h := NewJournalHandler(level, fallback).(*journalHandler)
	entries := new([]entry)
	h.send = func(message string, priority journal.Priority, fields map[string]string) error {
		*entries = append(*entries, entry{message, priority, fields})
		return err
	}
	return h, entries
}

// stackError has several lines and a pointer receiver.
type stackError struct{ lines string }

func (e *stackError) Error() string { return e.lines }

func TestJournalEntry(t *testing.T) {
	when := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	long := strings.Repeat("long ", 20)
	for _, test := range []struct {
		name    string
		log     func(*slog.Logger)
		message string
		fields  map[string]string
	}{
		{"plain", func(l *slog.Logger) { l.Info("serving") }, "serving", nil},
		{
			"attributes", func(l *slog.Logger) {
				l.Info("stopped", "packets dropped", 3, "after", 1500*time.Millisecond, "ok", true, "to", net.IPv4(10, 0, 0, 1))
			},
			`stopped "packets dropped"=3 after=1.5s ok=true to=10.0.0.1`,
			map[string]string{"PACKETS_DROPPED": "3", "AFTER": "1.5s", "OK": "true", "TO": "10.0.0.1"},
		},
		{
			"empty value", func(l *slog.Logger) { l.Info("x", "name", "") },
			`x name=""`,
			map[string]string{"NAME": ""},
		},
		{
			"empty attribute", func(l *slog.Logger) { l.Info("x", slog.Attr{}, "a", 1) },
			"x a=1",
			map[string]string{"A": "1"},
		},
		{
			"names", func(l *slog.Logger) {
				l.Info("x", "giaddr.port", 1, "_pid", 2, "9", 3, "öl", 4, "é", 5, "", 6)
			},
			`x giaddr.port=1 _pid=2 9=3 öl=4 é=5 ""=6`,
			map[string]string{"GIADDR_PORT": "1", "OAM__PID": "2", "OAM_9": "3", "OAM__L": "4", "OAM__": "5", "OAM_": "6"},
		},
		{
			"names that are taken", func(l *slog.Logger) {
				l.Info("x", "message", 1, "PRIORITY", 2, "syslog identifier", 3, "unit", 4, "code_line", 5, "errno", 6, "messages", 7, "object", 8)
			},
			`x message=1 PRIORITY=2 "syslog identifier"=3 unit=4 code_line=5 errno=6 messages=7 object=8`,
			map[string]string{
				"OAM_MESSAGE": "1", "OAM_PRIORITY": "2", "OAM_SYSLOG_IDENTIFIER": "3", "OAM_UNIT": "4", "OAM_CODE_LINE": "5", "OAM_ERRNO": "6",
				"MESSAGES": "7", "OBJECT": "8",
			},
		},
		{
			// As TextHandler's own.
			"names of slog", func(l *slog.Logger) { l.Info("x", "msg", "m", "level", slog.LevelInfo, "time", when) },
			"x msg=m level=INFO time=2026-01-02T03:04:05.000Z",
			map[string]string{"MSG": "m", "LEVEL": "INFO", "TIME": "2026-01-02T03:04:05.000000006Z"},
		},
		{
			"long name", func(l *slog.Logger) { l.Info("x", long, 1) },
			fmt.Sprintf("x %q=1", long),
			map[string]string{strings.Repeat("LONG_", 20)[:64]: "1"},
		},
		{
			"several lines, and bytes", func(l *slog.Logger) {
				l.Error("panic", "stack", "a\nb\n", "error", &stackError{"c\nd"}, "body", []byte{'{', 0, '\n', 0xff})
			},
			`panic stack="a\nb\n" error="c\nd" body="{\x00\n\xff"`,
			map[string]string{"STACK": "a\nb\n", "ERROR": "c\nd", "BODY": "{\x00\n\xff"},
		},
		{
			"what must not panic", func(l *slog.Logger) { l.Info("x", "error", (*stackError)(nil), "none", nil) },
			"x error=<nil> none=<nil>",
			map[string]string{"ERROR": "<nil>", "NONE": "<nil>"},
		},
		{
			"groups", func(l *slog.Logger) {
				l = l.With("pool", "a").WithGroup("lease").With("mac", 1).WithGroup("")
				l.With("unused", 2)
				l.Info("x", slog.Group("from", "server", 3, "mac", 4), slog.Group("", "id", 5), slog.Group("none"))
			},
			"x pool=a lease.mac=1 lease.from.server=3 lease.from.mac=4 lease.id=5",
			map[string]string{"POOL": "a", "LEASE_MAC": "1", "LEASE_FROM_SERVER": "3", "LEASE_FROM_MAC": "4", "LEASE_ID": "5"},
		},
		{
			"the last of one name", func(l *slog.Logger) { l.With("pool", "a").Info("x", "pool", "b", "Pool", "c") },
			"x pool=a pool=b Pool=c",
			map[string]string{"POOL": "c"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			h, entries := newJournal(slog.LevelDebug, slog.DiscardHandler, nil)
			test.log(slog.New(h))
			if len(*entries) != 1 {
				t.Fatalf("%d entries", len(*entries))
			}
			got := (*entries)[0]
			if got.message != test.message {
				t.Errorf("MESSAGE=%s\nwant    %s", got.message, test.message)
			}
			want := map[string]string{"SYSLOG_IDENTIFIER": "oam-docker-ipam"}
			maps.Copy(want, test.fields)
			if !maps.Equal(got.fields, want) {
				t.Errorf("fields %q\nwant   %q", got.fields, want)
			}
		})
	}
}

func TestJournalPriority(t *testing.T) {
	var level slog.LevelVar
	h, entries := newJournal(&level, slog.DiscardHandler, nil)
	log := slog.New(h)
	all := func() (got string) {
		*entries = nil
		for _, l := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelInfo + 1, slog.LevelWarn, slog.LevelError, slog.LevelError + 4} {
			log.Log(t.Context(), l, "x")
		}
		for _, e := range *entries {
			got += fmt.Sprint(int(e.priority))
		}
		return got
	}
	if got := all(); got != "66433" {
		t.Errorf("info and above: priorities %s", got)
	}
	// As at a reload.
	level.Set(slog.LevelDebug)
	if got := all(); got != "766433" {
		t.Errorf("debug and above: priorities %s", got)
	}
	level.Set(slog.LevelError)
	if got := all(); got != "33" {
		t.Errorf("errors: priorities %s", got)
	}
}

// What the journal doesn't take is in the fallback, with all that was added.
func TestJournalFallback(t *testing.T) {
	var log logged
	h, entries := newJournal(slog.LevelInfo, log.logger().Handler(), errors.New("no journald"))
	slog.New(h).With("a", 1).WithGroup("g").With("b", 2).Warn("x", "c", 3)
	lines := log.lines()
	if len(*entries) != 1 || len(lines) != 1 || lines[0] != "level=WARN msg=x a=1 g.b=2 g.c=3" {
		t.Errorf("tried %d times, logged %q", len(*entries), lines)
	}
}

// The fields follow slog's rules of attributes and groups. journald notes the
// time itself, and names are in capital letters: the test suite's have one
// letter, those of groups a capital one.
func TestJournalSlog(t *testing.T) {
	var entries *[]entry
	slogtest.Run(t, func(*testing.T) (h slog.Handler) {
		h, entries = newJournal(slog.LevelInfo, slog.DiscardHandler, nil)
		return h
	}, func(t *testing.T) map[string]any {
		if len(*entries) != 1 {
			t.Fatalf("%d entries", len(*entries))
		}
		e := (*entries)[0]
		message, _, _ := strings.Cut(e.message, " ")
		result := map[string]any{slog.MessageKey: message, slog.LevelKey: e.priority}
		if !strings.HasSuffix(t.Name(), "/zero-time") {
			result[slog.TimeKey] = nil
		}
		delete(e.fields, "SYSLOG_IDENTIFIER")
		for name, value := range e.fields {
			path := strings.Split(name, "_")
			group := result
			for _, name := range path[:len(path)-1] {
				if group[name] == nil {
					group[name] = map[string]any{}
				}
				group = group[name].(map[string]any)
			}
			group[strings.ToLower(path[len(path)-1])] = value
		}
		return result
	})
}

// Nothing of a record, or of a handler, is left in the next one's.
func TestJournalApart(t *testing.T) {
	h, entries := newJournal(slog.LevelInfo, slog.DiscardHandler, nil)
	if h.WithGroup("") != h {
		t.Error("a group without a name changes the handler")
	}
	log := slog.New(h).With("a", 1)
	log.With("b", 2).WithGroup("g").Info("x", "c", 3)
	log.Info("x", "d", 4)
	log.Info("y")
	last := (*entries)[2]
	want := map[string]string{"SYSLOG_IDENTIFIER": "oam-docker-ipam", "A": "1"}
	if last.message != "y a=1" || !maps.Equal(last.fields, want) {
		t.Errorf("got %q with %q", last.message, last.fields)
	}
}

// Several goroutines share one handler's family.
func TestJournalConcurrent(t *testing.T) {
	done := make(chan string)
	h := NewJournalHandler(slog.LevelInfo, slog.DiscardHandler).(*journalHandler)
	h.send = func(message string, _ journal.Priority, fields map[string]string) error {
		if want := fmt.Sprintf("x who=%s n=%s", fields["WHO"], fields["N"]); message != want {
			done <- message + ", want " + want
		}
		return nil
	}
	const writers = 8
	for who := range writers {
		go func() {
			log := slog.New(h).With("who", who)
			for n := range 500 {
				log.Info("x", "n", n)
			}
			done <- ""
		}()
	}
	for left := writers; left > 0; {
		if wrong := <-done; wrong != "" {
			t.Error(wrong)
		} else {
			left--
		}
	}
}

// What journald reads from its socket: in a mount namespace of this test's
// thread, where /run is empty, the test is journald.
func TestJournalProtocol(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can mount")
	}
	// Never unlocked: the thread ends with the test, and its namespace too.
	runtime.LockOSThread()
	works(t, unix.Unshare(unix.CLONE_NEWNS))
	works(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	works(t, unix.Mount("test", "/run", "tmpfs", 0, ""))
	works(t, os.MkdirAll("/run/systemd/journal", 0o755))
	const path = "/run/systemd/journal/socket"

	var fallback logged
	log := slog.New(NewJournalHandler(slog.LevelInfo, fallback.logger().Handler()))
	log.Info("early")
	if lines := fallback.lines(); len(lines) != 1 {
		t.Errorf("without journald: the fallback has %q", lines)
	}

	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	works(t, err)
	defer conn.Close()
	works(t, conn.SetReadDeadline(time.Now().Add(time.Minute)))
	huge := strings.Repeat("x", 1<<20)
	for _, test := range []struct{ value, text string }{
		{"one line", `"one line"`},
		{"two\nlines", `"two\nlines"`},
		{"a\nMESSAGE=forged\nb\x00", `"a\nMESSAGE=forged\nb\x00"`},
		// Longer than a datagram: sent as a file.
		{huge, huge},
	} {
		log.Warn("lease lost", "detail", test.value, "mac", "02:00:00:00:00:01")
		want := map[string]string{
			"MESSAGE": "lease lost detail=" + test.text + " mac=02:00:00:00:00:01", "PRIORITY": "4", "SYSLOG_IDENTIFIER": "oam-docker-ipam",
			"DETAIL": test.value, "MAC": "02:00:00:00:00:01",
		}
		if got := receive(t, conn); !maps.Equal(got, want) {
			t.Errorf("journald reads %.300q, want %.300q", got, want)
		}
	}
	if lines := fallback.lines(); len(lines) != 0 {
		t.Errorf("with journald: the fallback has %q", lines)
	}
}

// receive reads one entry in journald's protocol, see
// https://systemd.io/JOURNAL_NATIVE_PROTOCOL/.
func receive(t *testing.T, conn *net.UnixConn) map[string]string {
	t.Helper()
	buf, rights := make([]byte, 1<<16), make([]byte, 64)
	n, nr, _, _, err := conn.ReadMsgUnix(buf, rights)
	works(t, err)
	data := buf[:n]
	if nr > 0 {
		messages, err := unix.ParseSocketControlMessage(rights[:nr])
		works(t, err)
		fds, err := unix.ParseUnixRights(&messages[0])
		works(t, err)
		f := os.NewFile(uintptr(fds[0]), "entry")
		defer f.Close()
		data, err = io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
		works(t, err)
	}
	fields := map[string]string{}
	for len(data) > 0 {
		first, rest, ok := bytes.Cut(data, []byte("\n"))
		name, value, plain := bytes.Cut(first, []byte("="))
		if !plain {
			size := binary.LittleEndian.Uint64(rest)
			value, rest = rest[8:8+size], rest[8+size:]
			rest, ok = bytes.CutPrefix(rest, []byte("\n"))
		}
		if _, twice := fields[string(name)]; twice || !ok {
			t.Errorf("%s: twice, or without its end", name)
		}
		fields[string(name)], data = string(value), rest
	}
	return fields
}
