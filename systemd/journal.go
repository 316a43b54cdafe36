package systemd

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
)

// JournalConnected reports whether what is written to f goes to journald, as
// systemd says in JOURNAL_STREAM.
func JournalConnected(f *os.File) bool {
	info, err := f.Stat()
	if err != nil {
		return false
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && os.Getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", stat.Dev, stat.Ino)
}

// identifier is the SYSLOG_IDENTIFIER of all entries: `journalctl -t` knows them
// by it.
const identifier = "oam-docker-ipam"

// journalHandler is a slog.Handler, see NewJournalHandler.
type journalHandler struct {
	level    slog.Leveler
	fallback slog.Handler
	send     func(message string, priority journal.Priority, fields map[string]string) error

	group  string            // before a field's name: the open groups, each with its _
	fields map[string]string // of WithAttrs; never changed, but exchanged
	text   slog.Handler      // writes attributes to line
	line   *line
}

// line is one line of text in the making, by all handlers that were derived
// from one.
type line struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

// NewJournalHandler makes a handler that sends records of at least level to
// journald in its own protocol, and those that can't be sent to fallback.
//
// An entry's MESSAGE is the record's message and then its attributes as
// slog.TextHandler writes them, for plain journalctl. PRIORITY is 7, 6, 4 or 3:
// debug, info, warning, error. There is no time: journald notes its own.
//
// Each attribute is a field, too, the last one if several have its name:
// "packets dropped" is PACKETS_DROPPED, and "mac" in the group "lease" LEASE_MAC.
// Capital letters, digits and _ make a name, any other character becomes _, and
// 64 characters are the most that journald takes. A name that has a meaning
// of its own (MESSAGE, UNIT, SYSLOG_… and others, see systemd.journal-fields(7))
// or begins with _ or a digit gets OAM_ before it: "message" is OAM_MESSAGE.
func NewJournalHandler(level slog.Leveler, fallback slog.Handler) slog.Handler {
	l := new(line)
	return &journalHandler{
		level: level, fallback: fallback, send: journal.Send,
		fields: map[string]string{}, text: slog.NewTextHandler(&l.buf, nil), line: l,
	}
}

// Enabled implements slog.Handler.
func (h *journalHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= h.level.Level()
}

// Handle implements slog.Handler. Its error is the fallback's.
func (h *journalHandler) Handle(ctx context.Context, r slog.Record) error {
	attributes, err := h.attributes(ctx, r)
	if err == nil {
		fields := maps.Clone(h.fields)
		r.Attrs(func(a slog.Attr) bool {
			addField(fields, h.group, a)
			return true
		})
		fields["SYSLOG_IDENTIFIER"] = identifier
		err = h.send(r.Message+attributes, priority(r.Level), fields)
	}
	if err != nil {
		return h.fallback.Handle(ctx, r)
	}
	return nil
}

// WithAttrs implements slog.Handler.
func (h *journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	with.fallback, with.text = h.fallback.WithAttrs(attrs), h.text.WithAttrs(attrs)
	with.fields = maps.Clone(h.fields)
	for _, a := range attrs {
		addField(with.fields, h.group, a)
	}
	return &with
}

// WithGroup implements slog.Handler.
func (h *journalHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	with := *h
	with.fallback, with.text = h.fallback.WithGroup(name), h.text.WithGroup(name)
	with.group += name + "_"
	return &with
}

// attributes writes those of the handler and of r, each with a space before it.
func (h *journalHandler) attributes(ctx context.Context, r slog.Record) (string, error) {
	h.line.mu.Lock()
	defer h.line.mu.Unlock()
	h.line.buf.Reset()
	// A TextHandler can't leave out level and message without doing so to
	// attributes of the same names: these are cut off again.
	r.Time, r.Level, r.Message = time.Time{}, slog.LevelInfo, ""
	err := h.text.Handle(ctx, r)
	return strings.TrimSuffix(strings.TrimPrefix(h.line.buf.String(), `level=INFO msg=""`), "\n"), err
}

func priority(level slog.Level) journal.Priority {
	switch {
	case level >= slog.LevelError:
		return journal.PriErr
	case level >= slog.LevelWarn:
		return journal.PriWarning
	case level >= slog.LevelInfo:
		return journal.PriInfo
	}
	return journal.PriDebug
}

// addField adds an attribute, or those of a group.
func addField(fields map[string]string, group string, a slog.Attr) {
	v := a.Value.Resolve()
	switch {
	case v.Kind() == slog.KindGroup:
		if a.Key != "" {
			group += a.Key + "_"
		}
		for _, member := range v.Group() {
			addField(fields, group, member)
		}
	case a.Equal(slog.Attr{}):
	default:
		fields[fieldName(group+a.Key)] = fieldText(v)
	}
}

// taken are names that mean something to journald, and those that it doesn't
// take from a program.
var taken = regexp.MustCompile(`^(|[_0-9].*|MESSAGE(_ID)?|PRIORITY|ERRNO|TID|DOCUMENTATION|(USER_)?(UNIT|INVOCATION_ID)|(SYSLOG|CODE|OBJECT|COREDUMP)_.*)$`)

// longestField is the most characters that journald takes for a name.
const longestField = 64

func fieldName(key string) string {
	name := strings.Map(func(r rune) rune {
		switch {
		case 'a' <= r && r <= 'z':
			return r - 'a' + 'A'
		case 'A' <= r && r <= 'Z', '0' <= r && r <= '9':
			return r
		}
		return '_'
	}, key)
	if taken.MatchString(name) {
		name = "OAM_" + name
	}
	return name[:min(len(name), longestField)]
}

// fieldText is a value as TextHandler writes it, but without quotes: a type's
// MarshalText and its String say the same.
func fieldText(v slog.Value) string {
	switch x := v.Any().(type) {
	case time.Time:
		return x.Format(time.RFC3339Nano)
	case []byte:
		return string(x)
	}
	return v.String()
}
