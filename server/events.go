package server

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

const eventsPath = operatorPath + "events"

// EventQuery is which events an operator wants. The zero one: all that are
// remembered.
type EventQuery struct {
	// Since is the clock's time from which on; zero for all. Events are in the
	// order in which they happened: whatever came after the first such one is
	// among them, also where the clock was set back.
	Since time.Time
	// After is the Seq of the event after which it begins, 0 for all.
	After uint64
	Kinds []lease.EventKind // none stands for all
	// Key is an address, a MAC, or the name, ID or start of an ID of a
	// container; "" for all. The IDs are those that a reconcile has learned.
	Key string
	// Limit is how many of those that are remembered come at most, the last
	// ones; 0 for all.
	Limit int
	// Follow goes on with what happens.
	Follow bool
}

// ParseEventKind reads a kind of event.
func ParseEventKind(text string) (lease.EventKind, error) {
	kind := lease.EventKind(text)
	if slices.Contains(lease.EventKinds, kind) {
		return kind, nil
	}
	var all []string
	for _, k := range lease.EventKinds {
		all = append(all, string(k))
	}
	return "", fmt.Errorf("unknown kind of event %q: want one of %s", text, strings.Join(all, ", "))
}

func (q EventQuery) values() url.Values {
	v := url.Values{}
	if !q.Since.IsZero() {
		v.Set("since", q.Since.Format(time.RFC3339Nano))
	}
	if q.After > 0 {
		v.Set("after", strconv.FormatUint(q.After, 10))
	}
	for _, kind := range q.Kinds {
		v.Add("event", string(kind))
	}
	if q.Key != "" {
		v.Set("key", q.Key)
	}
	if q.Limit > 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	if q.Follow {
		v.Set("follow", "1")
	}
	return v
}

func parseEventQuery(raw string) (q EventQuery, err error) {
	err = parameters(raw, "since, after, event, key, limit and follow", func(name, text string, all []string) (known bool, err error) {
		switch name {
		case "since":
			q.Since, err = time.Parse(time.RFC3339Nano, text)
		case "after":
			q.After, err = strconv.ParseUint(text, 10, 64)
		case "event":
			for _, text := range all {
				kind, unknown := ParseEventKind(text)
				q.Kinds, err = append(q.Kinds, kind), cmp.Or(err, unknown)
			}
		case "key":
			q.Key = text
		case "limit":
			q.Limit, err = parseCount(text)
		case "follow":
			q.Follow, err = strconv.ParseBool(text)
		default:
			return false, nil
		}
		return true, err
	})
	return q, err
}

// selection makes what takes out of events those that are wanted, by their kind
// and whom they are about. Events have no container IDs: those of leases stand
// for them.
func (q EventQuery) selection(leases []lease.Held) func([]lease.Event) []lease.Event {
	addr, _ := netip.ParseAddr(q.Key)
	mac, noMAC := lease.ParseMAC(q.Key)
	byID := map[lease.Key]bool{}
	if q.Key != "" {
		for _, l := range namedBy(q.Key, leases) {
			if strings.HasPrefix(l.Container, q.Key) {
				byID[l.Key()] = true
			}
		}
	}
	unwanted := func(e lease.Event) bool {
		about := q.Key == "" || e.Name == q.Key || addr.IsValid() && e.Address == addr || noMAC == nil && e.MAC == mac || byID[lease.Key{Pool: e.Pool, MAC: e.MAC}]
		return !about || len(q.Kinds) > 0 && !slices.Contains(q.Kinds, e.Kind)
	}
	return func(events []lease.Event) []lease.Event { return slices.DeleteFunc(events, unwanted) }
}

// remembered makes what takes out of all events so far those that are wanted.
func (q EventQuery) remembered(selection func([]lease.Event) []lease.Event) func([]lease.Event) []lease.Event {
	return func(events []lease.Event) []lease.Event {
		if !q.Since.IsZero() {
			first := slices.IndexFunc(events, func(e lease.Event) bool { return !e.Time.Before(q.Since) })
			if first < 0 {
				return nil
			}
			events = events[first:]
		}
		events = selection(events)
		if q.Limit > 0 {
			events = events[max(0, len(events)-q.Limit):]
		}
		return events
	}
}

// followPace is how long an event waits for others on its way to those who follow,
// each of whom has them written to the database.
const followPace = 100 * time.Millisecond

// events writes a JSON object a line, at once.
func (o operator) events(w http.ResponseWriter, r *http.Request) {
	q, err := parseEventQuery(r.URL.RawQuery)
	if err != nil {
		answer(w, http.StatusBadRequest, failure{Err: "events: " + err.Error()})
		return
	}
	ctx, end := streaming(r)
	defer end()
	done, err := o.remember(ctx)
	if err != nil {
		return // the reader has gone, or the daemon stops
	}
	defer done()
	conn := http.NewResponseController(w)
	awaited := o.Manager.EventsAwaited()
	events, err := o.eventsAfter(q.After)
	if err != nil {
		answer(w, http.StatusInternalServerError, failure{Err: err.Error()})
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	selection, after := q.selection(o.Manager.Leases()), q.After
	for choose := q.remembered(selection); ; choose = selection {
		if len(events) > 0 {
			after = events[len(events)-1].Seq
		}
		for _, event := range choose(events) {
			if e.Encode(event) != nil {
				return // the reader has gone
			}
		}
		if !q.Follow || conn.Flush() != nil {
			return
		}
		done()
		if !follow(ctx, awaited) {
			return
		}
		awaited = o.Manager.EventsAwaited()
		if events, err = o.eventsAfter(after); err != nil {
			o.log.Warn("events not read: who follows them asks again", "error", err)
			return
		}
	}
}

// follow waits until there are more events, and reports whether ctx still lasts.
func follow(ctx context.Context, awaited <-chan struct{}) bool {
	select {
	case <-ctx.Done():
		return false
	case <-awaited:
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(followPace):
		return true
	}
}

// eventsAfter are those after the one of a Seq, with times in UTC. Where nothing
// is known from that one on, it was of a database that isn't there any more:
// then all are new.
func (o operator) eventsAfter(seq uint64) ([]lease.Event, error) {
	events, err := o.Manager.Events(max(seq, 1) - 1)
	switch {
	case err != nil:
		return nil, err
	case len(events) == 0 && seq > 1:
		return o.eventsAfter(0)
	case len(events) > 0 && events[0].Seq == seq:
		events = events[1:]
	}
	for i, e := range events {
		events[i].Time = e.Time.UTC()
	}
	return events, nil
}

const (
	// awayTime is how long the daemon may be away from those who follow.
	awayTime = 30 * time.Second
	// againTime is the pause between two looks whether it is back.
	againTime = 500 * time.Millisecond
)

// Events asks the daemon on a socket what happened, the oldest first. To follow
// goes on until ctx ends, which is no error, over restarts of the daemon: away
// is told of each, and a daemon that isn't back within that time is an error. No
// event comes twice, and none is left out that the daemon still remembers.
func Events(ctx context.Context, socket string, q EventQuery, away func(within time.Duration)) iter.Seq2[lease.Event, error] {
	return func(yield func(lease.Event, error) bool) {
		wanted := true
		tell := func(e lease.Event) bool {
			q.After, q.Since, q.Limit = e.Seq, time.Time{}, 0
			wanted = yield(e, nil)
			return wanted
		}
		var by time.Time // when the daemon must be back; at first it must be there
		for {
			answered, err := q.ask(ctx, socket, by, tell)
			switch {
			case !wanted, q.Follow && ctx.Err() != nil:
				return
			case answered && q.Follow:
				by = time.Now().Add(awayTime)
				away(awayTime)
			case !q.Follow, !time.Now().Add(againTime).Before(by):
				// There is no time left for another look.
				if err != nil {
					yield(lease.Event{}, err)
				}
				return
			}
			select {
			case <-ctx.Done():
			case <-time.After(againTime):
			}
		}
	}
}

// ask reads one answer, which must have begun by a time unless that is zero:
// whoever holds the socket for a daemon lets callers in without one.
func (q EventQuery) ask(ctx context.Context, socket string, by time.Time, tell func(lease.Event) bool) (answered bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	inTime := func() bool { return true }
	if !by.IsZero() {
		inTime = time.AfterFunc(time.Until(by), cancel).Stop
	}
	text, err := open(ctx, socket, http.MethodGet, eventsPath+"?"+q.values().Encode(), nil)
	if err == nil {
		defer text.Close()
	}
	if !inTime() && (err == nil || errors.Is(err, context.Canceled)) {
		err = fmt.Errorf("%w: %s lets callers in, and nobody answers them: see systemctl status oam-docker-ipam", ErrNotRunning, socket)
	}
	if err != nil {
		return false, err
	}
	d := json.NewDecoder(text)
	for {
		var e lease.Event
		switch err := d.Decode(&e); {
		case errors.Is(err, io.EOF):
			return true, nil
		case err != nil:
			return true, fmt.Errorf("read the daemon's answer: %w", err)
		case !tell(e):
			return true, nil
		}
	}
}
