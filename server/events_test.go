package server

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// notAway is for those who ask a daemon that stays.
func notAway(time.Duration) { panic("the daemon went away") }

// seqs asks for events and returns their Seqs.
func seqs(t *testing.T, socket string, q EventQuery) (found []uint64, err error) {
	t.Helper()
	for e, err := range Events(t.Context(), socket, q, notAway) {
		if err != nil {
			return found, err
		}
		found = append(found, e.Seq)
	}
	return found, nil
}

// Each part of a query alone and with others; key by whatever names a
// container.
func TestEventsQuery(t *testing.T) {
	s := someLeases()
	minute := func(n int) time.Time { return at2026.Add(time.Duration(n) * time.Minute) }
	addr := netip.MustParseAddr
	s.put(
		lease.Event{Time: minute(0), Kind: lease.EventGranted, Pool: "a", MAC: mac1, Name: "web", Address: addr("192.0.2.50")}, // 1
		lease.Event{Time: minute(1), Kind: lease.EventRenewed, Pool: "a", MAC: mac1, Name: "web", Address: addr("192.0.2.50")}, // 2
		lease.Event{Time: minute(2), Kind: lease.EventServerSilent, Server: serverAddr},                                        // 3
		lease.Event{Time: minute(3), Kind: lease.EventGranted, Pool: "c", MAC: lease.MAC{2, 0x42, 0, 0, 0, 3}, Address: addr("198.51.100.4")},
		lease.Event{Time: minute(4), Kind: lease.EventLost, Pool: "b", MAC: mac2, Address: addr("192.0.2.50")}, // 5
		lease.Event{Time: minute(5), Kind: lease.EventRenewed, Pool: "c", MAC: mac1, Name: "db"},               // 6
	)
	d := startDaemon(t, s, usual)
	for name, c := range map[string]struct {
		q    EventQuery
		want []uint64
	}{
		"all":               {EventQuery{}, []uint64{1, 2, 3, 4, 5, 6}},
		"after":             {EventQuery{After: 4}, []uint64{5, 6}},
		"after the last":    {EventQuery{After: 6}, nil},
		"kind":              {EventQuery{Kinds: []lease.EventKind{lease.EventGranted}}, []uint64{1, 4}},
		"kinds":             {EventQuery{Kinds: []lease.EventKind{lease.EventLost, lease.EventGranted}}, []uint64{1, 4, 5}},
		"since":             {EventQuery{Since: minute(4)}, []uint64{5, 6}},
		"since, other zone": {EventQuery{Since: minute(4).In(time.FixedZone("", 3600*5))}, []uint64{5, 6}},
		"since between":     {EventQuery{Since: minute(4).Add(time.Nanosecond)}, []uint64{6}},
		"since later":       {EventQuery{Since: minute(6)}, nil},
		"limit":             {EventQuery{Limit: 2}, []uint64{5, 6}},
		"limit above":       {EventQuery{Limit: 20}, []uint64{1, 2, 3, 4, 5, 6}},
		"limit of wanted":   {EventQuery{Limit: 1, Kinds: []lease.EventKind{lease.EventGranted}}, []uint64{4}},
		"name":              {EventQuery{Key: "web"}, []uint64{1, 2}},
		"address":           {EventQuery{Key: "192.0.2.50"}, []uint64{1, 2, 5}},
		"MAC":               {EventQuery{Key: "02-42-00-00-00-01"}, []uint64{1, 2, 6}},
		"ID":                {EventQuery{Key: strings.Repeat("beef", 16)}, []uint64{4}},
		"start of an ID":    {EventQuery{Key: "beef"}, []uint64{4}},
		"nobody":            {EventQuery{Key: "nobody"}, nil},
		"odd":               {EventQuery{Key: "a&b=c;%00\n"}, nil},
		"much":              {EventQuery{Key: "web", Kinds: []lease.EventKind{lease.EventRenewed}, Since: minute(1), After: 1, Limit: 9}, []uint64{2}},
	} {
		if got, err := seqs(t, d.socket, c.q); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, %v; want %v", name, got, err, c.want)
		}
		if got, err := parseEventQuery(c.q.values().Encode()); err != nil || !got.Since.Equal(c.q.Since) {
			t.Errorf("%s: %+v, %v", name, got, err)
		} else if got.Since = c.q.Since; !reflect.DeepEqual(got, c.q) {
			t.Errorf("%s: %+v, want %+v", name, got, c.q)
		}
	}
	if got := d.exchange("GET /v1/events?after=5 HTTP/1.1\r\nHost: \r\n\r\n"); got.status != 200 || got.header.Get("Content-Type") != "application/x-ndjson" ||
		got.body != `{"seq":6,"time":"2026-01-02T03:09:05Z","event":"renewed","pool_id":"c","mac":"02:42:00:00:00:01","name":"db"}` {
		t.Errorf("%d %v %s", got.status, got.header, got.body)
	}
	s.broken = errors.New("disk on fire")
	if _, err := seqs(t, d.socket, EventQuery{}); err == nil || !strings.Contains(err.Error(), "disk on fire") {
		t.Errorf("error %v", err)
	}
}

// A clock that was set back hides nothing that came later, and a database that
// was exchanged nothing of the new one.
func TestEventsOddOrder(t *testing.T) {
	s := new(eventStore)
	for _, minute := range []int{0, 60, 5, 10} {
		s.put(lease.Event{Time: at2026.Add(time.Duration(minute) * time.Minute), Kind: lease.EventRenewed})
	}
	d := startDaemon(t, s, usual)
	for name, c := range map[string]struct {
		q    EventQuery
		want []uint64
	}{
		"since before it":  {EventQuery{Since: at2026.Add(30 * time.Minute)}, []uint64{2, 3, 4}},
		"after":            {EventQuery{After: 2}, []uint64{3, 4}},
		"another database": {EventQuery{After: 5}, []uint64{1, 2, 3, 4}},
	} {
		if got, err := seqs(t, d.socket, c.q); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, %v; want %v", name, got, err, c.want)
		}
	}
}

func TestEventsBadQuery(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	for query, says := range map[string]string{
		"since=yesterday":                 `since="yesterday"`,
		"after=-1":                        `after="-1"`,
		"limit=-1":                        `limit="-1"`,
		"limit=3000000000":                `limit="3000000000"`,
		"follow=perhaps":                  `follow="perhaps"`,
		"event=granted&event=x%0A":        `unknown kind of event "x\n": want one of granted, failed, renewed, rebound, nak, lost, left, released, conflict, declined, reconciled, server-silent, server-back`,
		"event=":                          "unknown kind",
		"name=web":                        "there are since, after, event, key, limit and follow",
		"key=%zz":                         "invalid URL escape",
		"since=" + url.QueryEscape("12h"): "since=",
	} {
		got := d.exchange("GET /v1/events?" + query + " HTTP/1.1\r\nHost: \r\n\r\n")
		if says = strings.ReplaceAll(strings.ReplaceAll(says, `\n`, `\\n`), `"`, `\"`); got.status != http.StatusBadRequest || !strings.Contains(got.body, says) {
			t.Errorf("%s: %d %s, want %s", query, got.status, got.body, says)
		}
	}
}

// happen has the daemon do something of which there are events, by the engine's
// calls.
func (d *daemon) happen(pool string, n int) {
	d.t.Helper()
	addr := fmt.Sprintf("192.0.2.%d", 100+n)
	d.call("/IpamDriver.RequestAddress", endpoint(pool, addr, fmt.Sprintf("02:42:00:00:00:%02x", n), ""), `{"Address":"`+addr+`/24","Data":null}`)
	d.call("/IpamDriver.ReleaseAddress", `{"PoolID":`+quote(pool)+`,"Address":"`+addr+`"}`, `{}`)
}

// What happens is told at once, until the operator has enough, which is no
// error.
func TestEventsFollow(t *testing.T) {
	s := new(eventStore)
	s.put(lease.Event{Time: at2026, Kind: lease.EventLost}, lease.Event{Time: at2026, Kind: lease.EventNAK})
	d := startDaemon(t, s, usual)
	pool := d.addPool()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got []lease.EventKind
	q := EventQuery{Follow: true, Limit: 1, Kinds: []lease.EventKind{lease.EventLost, lease.EventNAK, lease.EventGranted}}
	for e, err := range Events(ctx, d.socket, q, notAway) {
		if err != nil {
			t.Fatal(err)
		}
		if got = append(got, e.Kind); len(got) == 3 {
			cancel()
			continue
		}
		d.happen(pool, len(got))
	}
	if want := []lease.EventKind{lease.EventNAK, lease.EventGranted, lease.EventGranted}; !slices.Equal(got, want) {
		t.Errorf("told of %q, want %q", got, want)
	}
	// Whoever stops listening by himself isn't held.
	for range Events(t.Context(), d.socket, EventQuery{Follow: true}, notAway) {
		break
	}
}

// Over restarts of the daemon under load no event comes twice and none is
// missing, be the socket held meanwhile or not.
func TestEventsFollowRestarts(t *testing.T) {
	const restarts = 3
	for name, socket := range map[string]held{
		"held":     hold(t, "talkingdata.sock"),
		"not held": {path: filepath.Join(scratch(t), "talkingdata.sock")},
	} {
		t.Run(name, func(t *testing.T) {
			s := new(eventStore)
			manager, client := newManager(t, s)
			d := &daemon{t: t, as: drivers[0], socket: socket.path, manager: manager, client: client}
			start := func() (stop func() error) {
				l := socket.pass
				if name == "not held" {
					l = func() net.Listener { return listenOK(t, socket.path) }
				}
				return serve(l(), New(Backend{Manager: manager, Settings: noSettings}, drivers[0], slog.New(slog.DiscardHandler)))
			}
			stop := start()
			pool := d.addPool()
			d.happen(pool, 0)
			away, n := 0, 0
			var got []uint64
			for e, err := range Events(t.Context(), socket.path, EventQuery{Follow: true}, func(time.Duration) { away++ }) {
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, e.Seq)
				if known, _ := s.Events(0); len(got) < len(known) {
					continue
				}
				if n++; n > restarts {
					break
				}
				// Some while the daemon serves, as many while it is away.
				d.happen(pool, n)
				if err := stop(); err != nil {
					t.Error(err)
				}
				s.put(lease.Event{Kind: lease.EventLost}, lease.Event{Kind: lease.EventNAK})
				stop = start()
			}
			if err := stop(); err != nil {
				t.Error(err)
			}
			known, _ := s.Events(0)
			if len(got) != len(known) || got[len(got)-1] != uint64(len(got)) || !slices.IsSorted(got) {
				t.Errorf("told of %v; there are %d", got, len(known))
			}
			if away != restarts {
				t.Errorf("told of %d restarts, want %d", away, restarts)
			}
		})
	}
}

// A daemon that doesn't come back is waited for, but not for ever; one that
// isn't there at first isn't waited for.
func TestEventsDaemonGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(eventStore)
		s.put(lease.Event{Kind: lease.EventLost})
		d := startDaemon(t, s, usual)
		var began time.Time
		var failed error
		for e, err := range Events(t.Context(), d.socket, EventQuery{Follow: true}, func(time.Duration) { began = time.Now() }) {
			if failed = err; err == nil {
				go func() {
					if err := d.stop(); err != nil {
						t.Error(e, err)
					}
				}()
			}
		}
		if took := time.Since(began); took < awayTime-againTime || took > awayTime {
			t.Errorf("gave up after %s", took)
		}
		if !errors.Is(failed, ErrNotRunning) || !strings.Contains(failed.Error(), "nobody serves "+d.socket) {
			t.Errorf("error %v", failed)
		}
		began = time.Now()
		failed = nil
		for _, err := range Events(t.Context(), d.socket, EventQuery{Follow: true}, notAway) {
			failed = err
		}
		if !errors.Is(failed, ErrNotRunning) || time.Since(began) > 0 {
			t.Errorf("error %v", failed)
		}
	})
}

// Who gives up while the daemon is away is obeyed.
func TestEventsCancelledWhileAway(t *testing.T) {
	s := new(eventStore)
	s.put(lease.Event{Kind: lease.EventLost})
	d := startDaemon(t, s, usual)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for _, err := range Events(ctx, d.socket, EventQuery{Follow: true}, func(time.Duration) { cancel() }) {
		if err != nil {
			t.Error(err)
		}
		go func() { _ = d.stop() }()
	}
	if ctx.Err() == nil {
		t.Error("ended by itself")
	}
}

// A socket that is held for a daemon which doesn't come lets callers in.
func TestEventsNobodyAnswers(t *testing.T) {
	socket := hold(t, "talkingdata.sock")
	q := EventQuery{Follow: true}
	answered, err := q.ask(t.Context(), socket.path, time.Now().Add(50*time.Millisecond), nil)
	if answered || !errors.Is(err, ErrNotRunning) || !strings.Contains(err.Error(), socket.path) {
		t.Errorf("%v, %v", answered, err)
	}
}

// An answer that is cut off is no end of what happened.
func TestEventsCutOff(t *testing.T) {
	d := startDaemon(t, fullRings(), usual)
	read := 0
	var failed error
	for _, err := range Events(t.Context(), d.socket, EventQuery{}, notAway) {
		if failed = err; err != nil {
			break
		}
		if read++; read == 1 {
			// The reader pauses for longer than the daemon's stop allows.
			if err := d.stop(); err != nil {
				t.Error(err)
			}
		}
	}
	if failed == nil || !strings.Contains(failed.Error(), "read the daemon's answer") {
		t.Errorf("read %d events, error %v", read, failed)
	}
}

// fullRings has more events than fit between a daemon and a reader who has
// paused.
func fullRings() *eventStore {
	s := new(eventStore)
	for range 2 * lease.MaxEvents {
		s.put(lease.Event{Time: at2026, Kind: lease.EventRenewed, Pool: "192.0.2.0/24?gateway=192.0.2.1", Detail: strings.Repeat("x", 200)})
	}
	return s
}

// A daemon's stop is held up neither by those who follow nor by readers who
// have paused, and whoever reads on gets all of an answer.
func TestEventsStop(t *testing.T) {
	all := 2 * lease.MaxEvents
	for name, c := range map[string]struct {
		store *eventStore
		query string
		lines int // that are read after the stop; -1 for a reader who has paused
		long  time.Duration
	}{
		"follower":        {new(eventStore), "?follow=1", 0, pausedTime},
		"reader":          {fullRings(), "", all, pausedTime},
		"busy follower":   {fullRings(), "?follow=1", all, pausedTime},
		"paused":          {fullRings(), "", -1, 5 * pausedTime},
		"paused follower": {fullRings(), "?follow=1", -1, 5 * pausedTime},
	} {
		t.Run(name, func(t *testing.T) {
			d := startDaemon(t, c.store, usual)
			conn, err := net.Dial("unix", d.socket)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, "GET /v1/events"+c.query+" HTTP/1.1\r\nHost: \r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			began, stopped := time.Now(), make(chan error, 1)
			go func() { stopped <- d.stop() }()
			if c.lines >= 0 {
				text, err := io.ReadAll(answer.Body)
				if n := bytes.Count(text, []byte("\n")); err != nil || n != c.lines {
					t.Errorf("read %d events, %v; want %d", n, err, c.lines)
				}
			}
			if err := <-stopped; err != nil {
				t.Error(err)
			}
			if took := time.Since(began); took > c.long {
				t.Errorf("the stop took %s", took)
			}
		})
	}
}
