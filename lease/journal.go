package lease

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"
	"unicode"
)

const (
	// flushPace is how long an event that no commit takes along waits for others,
	// flushRetry how long when the store has failed.
	flushPace  = time.Second
	flushRetry = 10 * time.Second
	// flushBatch bounds the waiting events that one commit stores.
	flushBatch = 1000
	// maxDetail and maxPool bound texts of events, in bytes: errors may quote
	// what strangers wrote.
	maxDetail = 300
	maxPool   = 1000
)

// journal has the events that are not on disk yet.
type journal struct {
	// flushing has a place for the one who flushes. It comes before mu.
	flushing chan struct{}
	// pulse keeps readers from waiting for a disk that hangs.
	pulse Pulse[error]
	// wake has a value while something waits to be flushed.
	wake chan struct{}

	// mu guards what follows. Nothing comes after it.
	mu      sync.Mutex
	queue   []Event // at most MaxEvents, of which no store keeps more
	dropped int     // that were too many, since the last flush
	// awaited is closed at the next event, nil while nobody waits for it.
	awaited chan struct{}
}

// announce ends the wait for another event.
func (j *journal) announce() {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.awaited != nil {
		close(j.awaited)
		j.awaited = nil
	}
}

// add puts events behind those in the queue, or in front of them. Of too many,
// the oldest are dropped.
func (j *journal) add(front bool, events ...Event) {
	if len(events) == 0 {
		return
	}
	j.mu.Lock()
	many := max(len(j.queue)+len(events)-MaxEvents, 0)
	j.dropped += many
	if front {
		j.queue = append(events[many:], j.queue...)
	} else {
		j.queue = append(j.queue, events...)[many:]
	}
	j.mu.Unlock()
	select {
	case j.wake <- struct{}{}:
	default:
	}
}

// take takes the oldest events out of the queue, at most so many.
func (j *journal) take(most int) []Event {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := min(most, len(j.queue))
	taken := j.queue[:n:n]
	if j.queue = j.queue[n:]; len(j.queue) == 0 {
		j.queue = nil
	}
	return taken
}

// takeAll takes all events out of the queue, or none where there are more than so
// many.
func (j *journal) takeAll(most int) []Event {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.queue) > most {
		return nil
	}
	taken := j.queue
	j.queue = nil
	return taken
}

// Events lists what happened after the event of a Seq, 0 standing for all that
// is remembered (see MaxEvents), the oldest first. What the disk doesn't take is
// listed only when it does.
func (m *Manager) Events(after uint64) ([]Event, error) {
	ctx, cancel := context.WithTimeout(context.Background(), flushPace)
	defer cancel()
	// The flusher tells of errors.
	_, _ = m.journal.pulse.Ask(ctx, m.flush)
	events, err := m.store.Events(after)
	if err != nil {
		return nil, fmt.Errorf("read the events: %w", err)
	}
	return events, nil
}

// EventsAwaited returns a channel that is closed when there is another event.
func (m *Manager) EventsAwaited() <-chan struct{} {
	m.journal.mu.Lock()
	defer m.journal.mu.Unlock()
	if m.journal.awaited == nil {
		m.journal.awaited = make(chan struct{})
	}
	return m.journal.awaited
}

// record notes events that no commit belongs to. It never waits.
func (m *Manager) record(events ...Event) {
	if len(events) == 0 {
		return
	}
	m.journal.add(false, events...)
	m.observe(events)
	m.journal.announce()
}

// commitEvents commits a change with its events, which have happened when that
// succeeds. Those that wait go with it, before its own, so that all are stored in
// their order. Only where the disk has left too many waiting do these come later:
// a change without its event would be worse.
func (m *Manager) commitEvents(c Change) error {
	waiting, mine := m.journal.takeAll(flushBatch), c.PutEvents
	c.PutEvents = append(waiting, mine...)
	if err := m.store.Commit(c); err != nil {
		m.journal.add(true, waiting...)
		return err
	}
	m.observe(mine)
	if len(c.PutEvents) > 0 {
		m.journal.announce()
	}
	return nil
}

func (m *Manager) observe(events []Event) {
	for _, e := range events {
		m.observer.Happened(e)
	}
}

// flush stores what is in the queue, as far as the store takes it.
func (m *Manager) flush() error {
	j := &m.journal
	j.flushing <- struct{}{}
	defer func() { <-j.flushing }()
	for {
		events := j.take(flushBatch)
		if len(events) == 0 {
			break
		}
		if err := m.store.Commit(Change{PutEvents: events}); err != nil {
			j.add(true, events...)
			return err
		}
		// Who was told of them before may not have found them.
		j.announce()
	}
	j.mu.Lock()
	dropped := j.dropped
	j.dropped = 0
	j.mu.Unlock()
	if dropped > 0 {
		m.log.Warn("events not stored: they were too many while the database took none", "dropped", dropped)
	}
	return nil
}

// keepJournal flushes until the Manager is closed.
func (m *Manager) keepJournal() {
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-m.journal.wake:
		}
		if !sleep(m.ctx, flushPace) {
			return
		}
		err := m.flush()
		if err != nil {
			m.log.Error("events not stored: tried again", "in", flushRetry, "error", err)
		}
		for err != nil {
			if !sleep(m.ctx, flushRetry) {
				return
			}
			err = m.flush()
		}
	}
}

// happening completes an event: it is now, and its texts are bounded and of one
// line.
func happening(e Event) Event {
	e.Time = time.Now().Round(0).Truncate(time.Millisecond)
	e.Pool, e.Name, e.Detail = plain(e.Pool, maxPool), plain(e.Name, maxDetail), plain(e.Detail, maxDetail)
	return e
}

// plain makes a text one of a line, of so many bytes at most.
func plain(text string, most int) string {
	const more = "…"
	if len(text) > most {
		text = text[:most-len(more)] + more
	}
	return strings.Map(func(r rune) rune {
		switch {
		case unicode.IsControl(r):
			return ' '
		case r == unicode.ReplacementChar:
			return '?'
		}
		return r
	}, text)
}

// event is one of a lease.
func (l Lease) event(kind EventKind, detail string) Event {
	return happening(Event{Kind: kind, Pool: l.Pool, Address: l.Addr(), MAC: l.MAC, Name: l.Name, Server: l.Server, Detail: detail})
}

// until tells when a lease ends, for people.
func (m *Manager) until(l Lease) string {
	if l.Infinite() {
		return "for ever"
	}
	return "until " + m.clock.wall(l.Expires).Local().Format(time.DateTime)
}
