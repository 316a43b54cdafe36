package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Local times are the same everywhere.
func init() { time.Local = time.UTC }

// someEvents are one of each kind, in a pool and in none, long ones and hostile
// ones.
func someEvents(pool string) []lease.Event {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.UTC)
	addr, server, mac := netip.MustParseAddr("198.51.100.10"), netip.MustParseAddr("192.0.2.3"), lease.MAC{2, 0, 0, 0, 0, 10}
	var events []lease.Event
	for i, kind := range lease.EventKinds {
		e := lease.Event{Time: at.Add(time.Duration(i) * 7 * time.Minute), Kind: kind, Pool: pool, Address: addr, MAC: mac, Name: "web", Server: server}
		switch kind {
		case lease.EventServerSilent, lease.EventServerBack:
			e = lease.Event{Time: e.Time, Kind: kind, Server: netip.MustParseAddr("198.51.100.200"), Detail: "leases 12"}
		case lease.EventFailed:
			e.Address, e.Server, e.Detail = netip.Addr{}, netip.Addr{}, `no DHCP server answered: asked 192.0.2.3 <"ha & ha">`
		case lease.EventNAK:
			e.Name, e.Detail = "a-name-that-is-longer-than-its-column", "\x1b[2J\u009b31m\a\t\nx\u202e"
		case lease.EventConflict:
			e.Name, e.MAC = "\x1b]0;x\a\r\n", lease.MAC{}
		}
		events = append(events, e)
	}
	return events
}

// The log, as people and as programs read it: what the daemon remembers, and
// what is asked of it.
func TestEventsOutput(t *testing.T) {
	cleanEnv(t)
	s := home(t)
	put(t, s, otherLease())
	stop := startServe(t, s)
	events := func(args ...string) outcome {
		return program(append([]string{"--socket", s.socket, "events"}, args...)...)
	}
	all := events()
	all.expect(t, 0)
	matchGolden(t, "events.txt", all.stdout)
	asJSON := events("--json")
	asJSON.expect(t, 0)
	matchGolden(t, "events.jsonl", asJSON.stdout)
	var read []lease.Event
	for text := range strings.Lines(asJSON.stdout) {
		var e lease.Event
		if err := json.Unmarshal([]byte(text), &e); err != nil {
			t.Errorf("%q: %v", text, err)
		}
		read = append(read, e)
	}
	for i, want := range someEvents(otherLease().PutPools[0].ID) {
		want.Seq = uint64(i) + 1
		if i >= len(read) || read[i] != want {
			t.Errorf("event %d of %d differs from %+v", i, len(read), want)
		}
	}

	lines := slices.Collect(strings.Lines(all.stdout))
	for _, c := range []struct {
		args []string
		want []int // lines
	}{
		{[]string{"--event", "granted", "--event", "declined"}, []int{0, 9}},
		{[]string{"--event", "granted,declined"}, []int{0, 9}},
		{[]string{"--limit", "2"}, []int{11, 12}},
		{[]string{"--since", "2026-01-02 04:20"}, []int{11, 12}},
		{[]string{"--since=2026-01-02T06:20:00+02:00"}, []int{11, 12}},
		{[]string{"192.0.2.3"}, nil}, // a server is no container
		{[]string{"web", "--event", "failed"}, []int{1}},
		{[]string{"c0ffee", "--limit=1"}, []int{10}},
		{[]string{"--since", "10m"}, nil},
		{[]string{"nobody"}, nil},
	} {
		got := events(c.args...)
		if c.want == nil {
			got.expect(t, 1, "nothing found", "nothing found")
			continue
		}
		var want string
		for _, i := range c.want {
			want += lines[i]
		}
		if got != (outcome{0, want, ""}) {
			t.Errorf("%q: %+v, want\n%s", c.args, got, want)
		}
	}

	events("--event", "grant\x1bed").expect(t, 1, "unknown kind", "granted, failed, renewed", "server-back")
	events("--since", "yesterday").expect(t, 1, `--since "yesterday"`, "15:04", "3d")
	events("--limit", "-1").expect(t, 1, "limit")
	events("a", "b").expect(t, 1, "want one container")
	if err := stop(); err != nil {
		t.Error(err)
	}
	events().expect(t, 1, "not running", s.socket)
	events("--follow").expect(t, 1, "not running")
}

// An operator who follows is told of everything once, over a restart of the
// daemon, of which he hears, and ends with Ctrl-C without an error.
func TestEventsFollow(t *testing.T) {
	cleanEnv(t)
	s := home(t)
	events := someEvents("p")
	put(t, s, lease.Change{PutEvents: events[:2]})
	stop := startServe(t, s)
	ctx, interrupt := context.WithCancel(t.Context())
	stdout, stderr, ended := newJournal(), newJournal(), make(chan error, 1)
	go func() {
		args := []string{"oam-docker-ipam", "--socket", s.socket, "events", "-f", "--json"}
		ended <- command(stdout, stderr, nil).Run(ctx, args)
	}()
	told := stdout.after(t, `"failed"`)
	if err := stop(); err != nil {
		t.Error(err)
	}
	put(t, s, lease.Change{PutEvents: events[2:]})
	stop = startServe(t, s)
	told += stdout.after(t, fmt.Sprintf("%q", lease.EventServerBack))
	for i := range events {
		if seq := fmt.Sprintf(`{"seq":%d,`, i+1); strings.Count(told, seq) != 1 {
			t.Errorf("%s comes %d times", seq, strings.Count(told, seq))
		}
	}
	interrupt()
	if err := <-ended; err != nil {
		t.Errorf("after Ctrl-C: %v", err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	const away = "oam-docker-ipam: events: the daemon has gone: waiting up to 30s for it\n"
	if said := stderr.text.String(); said != away {
		t.Errorf("stderr %q, want %q", said, away)
	}
}

func TestParseSince(t *testing.T) {
	zone := time.FixedZone("", -3*3600)
	now := time.Date(2026, 3, 1, 0, 10, 30, 5, zone)
	for text, want := range map[string]string{
		"10m":                  "2026-03-01T00:00:30-03:00",
		"0s":                   "2026-03-01T00:10:30-03:00",
		"1h30m":                "2026-02-28T22:40:30-03:00",
		"3d":                   "2026-02-26T00:10:30-03:00",
		"1d12h":                "2026-02-27T12:10:30-03:00",
		"2026-02-28":           "2026-02-28T00:00:00-03:00",
		"2026-02-28 15:04":     "2026-02-28T15:04:00-03:00",
		"2026-02-28 15:04:05":  "2026-02-28T15:04:05-03:00",
		"2026-02-28T15:04:05Z": "2026-02-28T12:04:05-03:00",
		"00:10":                "2026-03-01T00:10:00-03:00",
		"00:10:31":             "2026-02-28T00:10:31-03:00", // yesterday's
		"23:50":                "2026-02-28T23:50:00-03:00",
	} {
		got, err := parseSince(text, now)
		if err != nil || got.In(zone).Format(time.RFC3339) != want {
			t.Errorf("%s is %s, %v; want %s", text, got, err, want)
		}
	}
	for _, text := range []string{"", "x", "10", "-10m", "-1d", "d", "1d-2h", "1.5d", "70000d", "25:00", "2026-02-30", "today", "2h3d"} {
		if got, err := parseSince(text, now); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", text)) {
			t.Errorf("%q is %s, %v", text, got, err)
		}
	}
}
