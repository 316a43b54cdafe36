package dhcp

import (
	"encoding/binary"
	"errors"
	"sync"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// remember notes a packet that is settled, of an exchange of its own.
func remember(r *recorder, i int, data []byte) {
	key := exchangeKey{xid: uint32(i), mac: mac1}
	r.settle(r.note(record{place: place1, sent: i%2 == 0, key: key, owner: owner{pool: "home"}, data: data}), nil)
}

// everything reads what is remembered.
func everything(r *recorder) (all []record, from uint64) {
	batch := make([]record, 7)
	_, from, _ = r.read(0, batch)
	for next := from; ; {
		got, first, _ := r.read(next, batch)
		if len(got) == 0 {
			return all, from
		}
		all = append(all, got...)
		next = first + uint64(len(got))
	}
}

// However many packets come, and however large they are: the newest are kept, in
// their order, and nothing else grows.
func TestRecorderBounds(t *testing.T) {
	for _, c := range []struct{ packets, size, kept int }{
		{3, 300, 3},
		{maxRecords, 300, maxRecords},
		{3*maxRecords + 7, 300, maxRecords},
		{100, 1 << 16, 16},
		{3 * maxRecords, 1500, maxRecorded / 1500},
		{2, maxRecorded, 1},
	} {
		var r recorder
		for i := range c.packets {
			remember(&r, i, make([]byte, c.size))
		}
		all, from := everything(&r)
		if len(all) != c.kept || from != uint64(c.packets-c.kept) || len(r.ring) > maxRecords || r.size != c.kept*c.size || len(r.asked) > c.kept {
			t.Errorf("%+v: %d from %d on, ring %d, %d bytes, %d exchanges", c, len(all), from, len(r.ring), r.size, len(r.asked))
			continue
		}
		for i, p := range all {
			if p.key.xid != uint32(c.packets-c.kept+i) {
				t.Fatalf("%+v: packet %d is of exchange %d", c, i, p.key.xid)
			}
		}
		for i := range c.packets {
			_, known := r.asker(exchangeKey{uint32(i), mac1})
			if want := i%2 == 0 && i >= c.packets-c.kept; known != want {
				t.Errorf("%+v: exchange %d known %t", c, i, known)
			}
		}
	}
}

// What is forgotten isn't held by the ring.
func TestRecorderForgets(t *testing.T) {
	var r recorder
	for i := range 100 {
		remember(&r, i, make([]byte, 1000))
	}
	remember(&r, 100, make([]byte, maxRecorded))
	for i, p := range r.ring {
		if i < 100 && p.data != nil {
			t.Fatalf("packet %d is still there", i)
		}
	}
}

// An answer comes after what it answers, also where it is here before the
// sending is over; and a packet that is forgotten meanwhile is nobody's any more.
func TestRecorderOrder(t *testing.T) {
	var r recorder
	request := r.note(record{sent: true, key: exchangeKey{xid: 1}})
	answer := r.note(record{key: exchangeKey{xid: 1}})
	r.settle(answer, errFull)
	batch := make([]record, 10)
	got, _, changed := r.read(0, batch)
	if len(got) != 0 {
		t.Fatalf("read %d packets before the first was sent", len(got))
	}
	reason := errors.New("no route")
	r.settle(request, reason)
	select {
	case <-changed:
	default:
		t.Error("whoever waits isn't told")
	}
	if got, _, _ = r.read(0, batch); len(got) != 2 || !got[0].sent || got[0].fate != reason || got[1].fate != errFull {
		t.Fatalf("read %+v", got)
	}

	late := r.note(record{})
	for i := range maxRecords {
		remember(&r, i, nil)
	}
	r.settle(late, reason)
	all, _ := everything(&r)
	for _, p := range all {
		if p.fate != nil {
			t.Error("the wrong packet was settled")
		}
	}
	if len(all) != maxRecords {
		t.Errorf("%d packets", len(all))
	}
}

// Readers of any speed see each packet once, in order, or know that it is lost.
func TestRecorderConcurrently(t *testing.T) {
	const writers, each = 4, 2000
	var r recorder
	var writing, reading sync.WaitGroup
	for range 3 {
		reading.Go(func() {
			batch := make([]record, captureBatch)
			last := [writers]uint32{}
			var seen, lost uint64
			for next := uint64(0); next < writers*each; {
				got, first, changed := r.read(next, batch)
				lost += first - next
				next = first + uint64(len(got))
				seen += uint64(len(got))
				for _, p := range got {
					if w := p.key.mac[5]; p.key.xid <= last[w] {
						t.Errorf("writer %d: packet %d after %d", w, p.key.xid, last[w])
					} else {
						last[w] = p.key.xid
					}
				}
				if changed != nil {
					<-changed
				}
			}
			if seen+lost != writers*each {
				t.Errorf("%d seen and %d lost", seen, lost)
			}
		})
	}
	for w := range writers {
		writing.Go(func() {
			for i := range each {
				key := exchangeKey{uint32(i + 1), lease.MAC{5: byte(w)}}
				r.settle(r.note(record{sent: true, key: key, data: binary.BigEndian.AppendUint32(nil, uint32(i))}), nil)
				r.asker(key)
			}
		})
	}
	writing.Wait()
	reading.Wait()
}

// BenchmarkRecorder is what a packet costs whoever sends or receives it, beside
// others who do.
func BenchmarkRecorder(b *testing.B) {
	data := make([]byte, 400)
	b.ReportAllocs()
	var r recorder
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			remember(&r, i, data)
		}
	})
}
