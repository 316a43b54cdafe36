package lease

import (
	"fmt"
	"runtime"
	"testing"
)

// A queue that is full, for the disk takes none, drops its oldest, and costs an
// event no more than its own place. What comes back to it drops first.
func TestFullJournal(t *testing.T) {
	j := journal{wake: make(chan struct{}, 1)}
	names := func(from, to int) (events []Event) {
		for n := from; n < to; n++ {
			events = append(events, Event{Name: fmt.Sprint(n)})
		}
		return events
	}
	is := func(from, to, dropped int) {
		t.Helper()
		if len(j.queue) != to-from || j.queue[0].Name != fmt.Sprint(from) || j.queue[len(j.queue)-1].Name != fmt.Sprint(to-1) || j.dropped != dropped {
			t.Errorf("%d events from %s on, %d dropped, want %d from %d on, %d dropped", len(j.queue), j.queue[0].Name, j.dropped, to-from, from, dropped)
		}
	}
	j.add(false, names(0, MaxEvents)...)
	is(0, MaxEvents, 0)
	more := names(MaxEvents, 2*MaxEvents)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for _, e := range more {
		j.add(false, e)
	}
	runtime.ReadMemStats(&after)
	is(MaxEvents, 2*MaxEvents, MaxEvents)
	if each := (after.TotalAlloc - before.TotalAlloc) / MaxEvents; each > 4096 {
		t.Errorf("%d bytes for an event", each)
	}
	taken := j.take(100)
	j.add(false, names(2*MaxEvents, 2*MaxEvents+30)...)
	j.add(true, taken...)
	is(MaxEvents+30, 2*MaxEvents+30, MaxEvents+30)
	taken = j.take(100)
	j.add(false, names(2*MaxEvents+30, 2*MaxEvents+130)...)
	j.add(true, taken...)
	is(MaxEvents+130, 2*MaxEvents+130, MaxEvents+130)
}
