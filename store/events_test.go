package store

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// eventOf is the n-th event of a kind, with a value in every field.
func eventOf(kind lease.EventKind, n int) lease.Event {
	l := full("192.0.2.0/24?dhcp_server=198.51.100.1&gateway=192.0.2.1&id=3KDPZ5XEQ7NJ32KA7OOKOPXECQ", n)
	return lease.Event{
		Time: time.UnixMilli(1772366400123 + int64(n)), Kind: kind, Pool: l.Pool, Address: l.Addr(), MAC: l.MAC, Name: fmt.Sprint("web-", n),
		Server: l.Server, Detail: "until 2026-03-01 13:00:00",
	}
}

func putEvents(events ...lease.Event) lease.Change { return lease.Change{PutEvents: events} }

// events lists what is stored after a Seq, and checks the order.
func events(t testing.TB, db *DB, after uint64) []lease.Event {
	t.Helper()
	all, err := db.Events(after)
	works(t, err)
	last := after
	for _, e := range all {
		if e.Seq <= last {
			t.Fatalf("event %d after %d", e.Seq, last)
		}
		last = e.Seq
	}
	return all
}

// listed compares the stored events after a Seq with names and kinds.
func listed(t testing.TB, db *DB, after uint64, want ...string) {
	t.Helper()
	var got []string
	for _, e := range events(t, db, after) {
		got = append(got, fmt.Sprintf("%d %s %s", e.Seq, e.Kind, e.Name))
	}
	if !slices.Equal(got, want) {
		t.Errorf("listed are %q, want %q", got, want)
	}
}

func TestEvents(t *testing.T) {
	folder := t.TempDir()
	db, err := Open(folder)
	works(t, err)
	listed(t, db, 0)
	put := []lease.Event{
		eventOf(lease.EventGranted, 1), eventOf(lease.EventRenewed, 2),
		{Kind: "of a newer version"},
		{Kind: lease.EventRenewed},
		{Kind: lease.EventServerSilent, Time: time.Now(), Server: netip.MustParseAddr("2001:db8::1"), Name: "<&>\x00\n\"ä", Detail: strings.Repeat("\xff", 300)},
	}
	works(t, db.Commit(putEvents(put[:2]...)))
	works(t, db.Commit(lease.Change{PutPools: []lease.Pool{pool("a")}, PutEvents: put[2:]}))
	put[4].Detail = strings.Repeat("\ufffd", 300)
	for range 2 {
		got := events(t, db, 0)
		for i, e := range got {
			at := put[i].Time.Truncate(time.Millisecond)
			if !e.Time.Equal(at) && i != 2 && i != 3 {
				t.Errorf("event %d is of %v, want %v", i, e.Time, at)
			}
			want := put[i]
			want.Seq, want.Time = uint64(i)+1, e.Time
			if e != want {
				t.Errorf("event\n%+v, want\n%+v", e, want)
			}
		}
		for after := range 8 {
			if got := len(events(t, db, uint64(after))); got != max(0, len(put)-after) {
				t.Errorf("%d events after %d", got, after)
			}
		}
		works(t, db.Close())
		db, err = Open(folder)
		works(t, err)
	}
	works(t, db.Commit(putEvents(eventOf(lease.EventLost, 9))))
	listed(t, db, 5, "6 lost web-9")
	works(t, db.Close())
}

// Each ring keeps its newest lease.MaxEvents, over laps and restarts; what is
// routine displaces nothing else, and nothing else displaces that. The file
// doesn't grow with the laps.
func TestEventRings(t *testing.T) {
	folder := t.TempDir()
	db, err := Open(folder)
	works(t, err)
	works(t, db.Commit(putEvents(eventOf(lease.EventNAK, 1), eventOf(lease.EventLost, 2))))
	r, seed := seeded()
	seq := uint64(2)
	lap := func(kind lease.EventKind, n int) {
		t.Helper()
		for n > 0 {
			var some []lease.Event
			for range min(n, 1+r.IntN(500)) {
				e := eventOf(kind, int(seq)+len(some)+1)
				e.Detail = strings.Repeat("x", r.IntN(300))
				some = append(some, e)
			}
			works(t, db.Commit(putEvents(some...)))
			seq += uint64(len(some))
			n -= len(some)
		}
	}
	var sizes []int64
	for range 4 {
		lap(lease.EventRenewed, lease.MaxEvents+1234)
		works(t, db.Close())
		db, err = Open(folder)
		works(t, err)
		sizes = append(sizes, db.Size())
		all := events(t, db, 0)
		if len(all) != 2+lease.MaxEvents || all[0].Name != "web-1" || all[1].Kind != lease.EventLost {
			t.Fatalf("seed %d: %d events, the first %+v", seed, len(all), all[0])
		}
		for i, e := range all[2:] {
			if want := seq - lease.MaxEvents + uint64(i) + 1; e.Seq != want || e.Name != fmt.Sprint("web-", want) {
				t.Fatalf("seed %d: event %d is %+v, want the one of Seq %d", seed, i, e, want)
			}
		}
	}
	if sizes[3] > sizes[1]*3/2 {
		t.Errorf("seed %d: sizes after each lap are %v", seed, sizes)
	}
	lap(lease.EventLost, 2*lease.MaxEvents)
	lap(lease.EventRenewed, 1)
	all := events(t, db, 0)
	if len(all) != 2*lease.MaxEvents || all[0].Kind != lease.EventRenewed || all[2*lease.MaxEvents-2].Kind != lease.EventLost {
		t.Errorf("seed %d: %d events", seed, len(all))
	}
	// The newest are found without a look at the others.
	if n := testing.AllocsPerRun(10, func() { _ = events(t, db, seq-3) }); n > 300 {
		t.Errorf("%.0f allocations for three events", n)
	}
	// One more rewrites a leaf with the pages above it, not more.
	before := db.bolt.Stats().TxStats
	works(t, db.Commit(putEvents(eventOf(lease.EventGranted, 1))))
	after := db.bolt.Stats().TxStats
	if written := after.Sub(&before); written.GetWrite() > 6 {
		t.Errorf("%d writes for an event", written.GetWrite())
	}
	sound(t, db)
	works(t, db.Close())
}

// However many containers fail to start, in a loop, with what a loop of those
// that do start leaves: what an operator looks for later stays.
func TestRoutineDisplacesNoIncidents(t *testing.T) {
	db := open(t, t.TempDir())
	incidents := []lease.EventKind{
		lease.EventRebound, lease.EventNAK, lease.EventLost, lease.EventConflict, lease.EventDeclined, lease.EventReconciled,
		lease.EventServerSilent, lease.EventServerBack, "of a newer version",
	}
	var put []lease.Event
	for n, kind := range incidents {
		put = append(put, eventOf(kind, n))
	}
	works(t, db.Commit(putEvents(put...)))
	for _, kind := range []lease.EventKind{lease.EventGranted, lease.EventFailed, lease.EventRenewed, lease.EventLeft, lease.EventReleased} {
		put = put[:0]
		for n := range lease.MaxEvents {
			put = append(put, eventOf(kind, n))
		}
		works(t, db.Commit(putEvents(put...)))
		all := events(t, db, 0)
		for n, e := range all[:len(incidents)] {
			if e.Kind != incidents[n] {
				t.Errorf("%s displaced %s", kind, incidents[n])
			}
		}
		if len(all) != len(incidents)+lease.MaxEvents || all[len(incidents)].Kind != kind {
			t.Errorf("%s: %d events", kind, len(all))
		}
	}
}

// A change that is refused hasn't happened.
func TestEventsOfRefusedChanges(t *testing.T) {
	db := open(t, t.TempDir())
	works(t, db.Commit(putPool(pool("a"))))
	with := func(c lease.Change, n int) lease.Change {
		c.PutEvents = []lease.Event{eventOf(lease.EventGranted, n)}
		return c
	}
	for i, err := range together(t, db, with(putLease(full("a", 1)), 1), with(putLease(full("gone", 2)), 2), with(putLease(full("a", 3)), 3)) {
		if errors.Is(err, ErrNoPool) != (i == 1) {
			t.Errorf("change %d: error %v", i, err)
		}
	}
	listed(t, db, 0, "1 granted web-1", "2 granted web-3")
}

// An event costs no commit of its own.
func TestEventsGoWithTheirChange(t *testing.T) {
	db := open(t, t.TempDir())
	works(t, db.Commit(putPool(pool("a"))))
	before := lastCommit(t, db)
	c := putLease(full("a", 1))
	c.PutEvents = []lease.Event{eventOf(lease.EventGranted, 1)}
	works(t, db.Commit(c))
	if n := lastCommit(t, db) - before; n != 1 {
		t.Errorf("%d commits", n)
	}
	works(t, db.Commit(lease.Change{PutEvents: []lease.Event{}}))
	if n := lastCommit(t, db) - before; n != 1 {
		t.Errorf("%d commits after one of nothing", n)
	}
}

// A database of a version before events is used as it is, and has nothing but
// more buckets once there are some: that version opens it again.
func TestEventsInAnOlderFile(t *testing.T) {
	folder := t.TempDir()
	db, err := Open(folder)
	works(t, err)
	works(t, db.Commit(lease.Change{PutPools: []lease.Pool{pool("a")}, PutLeases: []lease.Lease{full("a", 1)}, PutHost: host}))
	before, was := lastCommit(t, db), content(t, db)
	works(t, db.Close())
	for range 2 {
		db, err = Open(folder)
		works(t, err)
		listed(t, db, 0)
		if lastCommit(t, db) != before {
			t.Error("it was written to when it was opened")
		}
		works(t, db.Close())
	}
	db = open(t, folder)
	works(t, db.Commit(putEvents(eventOf(lease.EventGranted, 1), eventOf(lease.EventRenewed, 2))))
	holds(t, db, was)
	var names []string
	works(t, db.bolt.View(func(tx *bolt.Tx) error {
		if got := string(tx.Bucket(metaBucket).Get(schemaKey)); got != "2" {
			t.Errorf("schema %s", got)
		}
		return tx.ForEach(func(name []byte, _ *bolt.Bucket) error {
			names = append(names, string(name))
			return nil
		})
	}))
	if want := "bindings incidents leases meta pools routine"; strings.Join(names, " ") != want {
		t.Errorf("buckets %s, want %s", names, want)
	}
}

// An event that can't be read is left out; what can't be written to keeps no
// lease from being stored.
func TestDamagedEvents(t *testing.T) {
	seq := func(n uint64, text string) []byte { return append(binary.BigEndian.AppendUint64(nil, n), text...) }
	slot := func(value []byte) func(*bolt.Tx) error {
		return func(tx *bolt.Tx) error { return tx.Bucket(routineBucket).Put(slotKey(1), value) }
	}
	rest := []string{"1 granted web-1", "3 granted web-3"}
	for name, c := range map[string]struct {
		damage func(*bolt.Tx) error
		want   []string
	}{
		"nothing":        {slot(nil), rest},
		"short":          {slot([]byte{0, 0, 0, 0, 0, 0, 0}), rest},
		"no text":        {slot(seq(2, "")), rest},
		"half a text":    {slot(seq(2, `{"t":1,"k":"gra`)), rest},
		"another text":   {slot(seq(2, `["granted"]`)), rest},
		"no kind":        {slot(seq(2, `{"t":1}`)), rest},
		"bad MAC":        {slot(seq(2, `{"k":"granted","m":"x"}`)), rest},
		"time of no use": {slot(seq(2, `{"t":9223372036854775807,"k":"granted"}`)), rest},
		"missing slot":   {func(tx *bolt.Tx) error { return tx.Bucket(routineBucket).Delete(slotKey(1)) }, rest},
		"a bucket as slot": {func(tx *bolt.Tx) error {
			ring := tx.Bucket(routineBucket)
			_, err := ring.CreateBucket(slotKey(3))
			return err
		}, []string{"1 granted web-1", "2 granted web-2", "3 granted web-3"}},
		"no ring":         {func(tx *bolt.Tx) error { return tx.DeleteBucket(routineBucket) }, nil},
		"foreign key":     {func(tx *bolt.Tx) error { return tx.Bucket(routineBucket).Put([]byte("x"), []byte("y")) }, []string{rest[0], "2 granted web-2", rest[1]}},
		"endless counter": {func(tx *bolt.Tx) error { return tx.Bucket(routineBucket).SetSequence(1<<64 - 1) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			folder := t.TempDir()
			db, err := Open(folder)
			works(t, err)
			works(t, db.Commit(putPool(pool("a"))))
			for n := range 3 {
				works(t, db.Commit(putEvents(eventOf(lease.EventGranted, n+1))))
			}
			works(t, db.bolt.Update(c.damage))
			works(t, db.Close())
			db = open(t, folder)
			if name != "endless counter" {
				listed(t, db, 0, c.want...)
			}
			change := putLease(full("a", 1))
			change.PutEvents = []lease.Event{eventOf(lease.EventGranted, 4), eventOf(lease.EventRenewed, 5)}
			for range 2 {
				works(t, db.Commit(change))
			}
			if _, err := db.Events(0); err != nil || len(content(t, db).Leases) != 1 {
				t.Errorf("leases %v, events: %v", content(t, db).Leases, err)
			}
		})
	}
}

// Whatever is stored as an event can be sent to a program, or is left out.
func FuzzEvent(f *testing.F) {
	f.Add([]byte(`{"t":1772366400123,"k":"granted","a":"192.0.2.1","m":"02:00:00:00:00:01"}`))
	f.Add([]byte(`{"t":-62135596800001,"k":"lost","n":"\ud800"}`))
	f.Add([]byte(`{"t":253402300800000,"k":"lost"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		e, ok := decodeEvent(data)
		if !ok {
			return
		}
		if _, err := json.Marshal(e); err != nil {
			t.Errorf("%+v: %v", e, err)
		}
		again, ok := decodeEvent(newSlot(e).value[seqSize:])
		if !ok || again != e {
			t.Errorf("%+v comes back as %+v", e, again)
		}
	})
}

// What an event adds to the commit of a grant: full rings, in turns.
func BenchmarkGrantWithEvent(b *testing.B) {
	dbs := [2]*DB{}
	for i := range dbs {
		dbs[i] = open(b, filepath.Join(b.TempDir(), fmt.Sprint(i)))
		works(b, dbs[i].Commit(putPool(pool("a"))))
		var fill []lease.Event
		for n := range 2 * lease.MaxEvents {
			fill = append(fill, eventOf([]lease.EventKind{lease.EventGranted, lease.EventLost}[n%2], n))
		}
		works(b, dbs[i].Commit(putEvents(fill...)))
	}
	var took [2]time.Duration
	n := 0
	for ; b.Loop(); n++ {
		for i := range took {
			c := putLease(full("a", n%1000))
			if i == 1 {
				c.PutEvents = []lease.Event{eventOf(lease.EventGranted, n)}
			}
			began := time.Now()
			works(b, dbs[i].Commit(c))
			took[i] += time.Since(began)
		}
	}
	b.ReportMetric(float64(took[1])/float64(took[0]), "with/without")
	b.ReportMetric(float64(took[1]-took[0])/float64(n)/1000, "µs/event")
}

// All events, and the newest.
func BenchmarkEvents(b *testing.B) {
	db := open(b, b.TempDir())
	var fill []lease.Event
	for n := range 2 * lease.MaxEvents {
		fill = append(fill, eventOf(lease.EventKinds[rand.IntN(len(lease.EventKinds))], n))
	}
	works(b, db.Commit(putEvents(fill...)))
	for name, after := range map[string]uint64{"all": 0, "last": 2*lease.MaxEvents - 1} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				_ = events(b, db, after)
			}
		})
	}
}
