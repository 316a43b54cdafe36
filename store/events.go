package store

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"net/netip"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// The events are in two rings, buckets of lease.MaxEvents slots, so that those of
// the routine kinds, of which there are many, displace no others. The bucket's
// sequence counts what was put there, and says which slot is next: no event is
// deleted, each takes the place of the ring's oldest. Nothing but events depends
// on these buckets: they are made with the first one, an older version doesn't
// look at them, and what can't be read or put there is left out.
var (
	routineBucket  = []byte("routine")
	incidentBucket = []byte("incidents")
)

// rings are both.
var rings = [...][]byte{routineBucket, incidentBucket}

// ringFill is how full the pages of the rings become: slots are filled in order.
const ringFill = 0.9

// seqSize is the length of the Seq, big-endian, with which each value begins.
const seqSize = 8

// event is a lease.Event as it is stored after its Seq. There are up to 20,000,
// hence the names.
type event struct {
	Time    int64           `json:"t"` // Unix time in milliseconds
	Kind    lease.EventKind `json:"k"`
	Pool    string          `json:"p,omitempty"`
	Address netip.Addr      `json:"a,omitzero"`
	MAC     lease.MAC       `json:"m,omitzero"`
	Name    string          `json:"n,omitempty"`
	Server  netip.Addr      `json:"s,omitzero"`
	Detail  string          `json:"d,omitempty"`
}

// slot is an event on its way to its ring.
type slot struct {
	ring  []byte
	value []byte // with room for the Seq
}

// newSlot makes an event ready.
func newSlot(e lease.Event) slot {
	s := slot{ring: incidentBucket}
	if e.Kind.Routine() {
		s.ring = routineBucket
	}
	text := bytes.NewBuffer(make([]byte, seqSize, 400))
	to := json.NewEncoder(text)
	to.SetEscapeHTML(false) // pool IDs have some &
	// None of these types can fail, and a buffer doesn't.
	_ = to.Encode(event{e.Time.UnixMilli(), e.Kind, e.Pool, e.Address, e.MAC, e.Name, e.Server, e.Detail})
	s.value = bytes.TrimSuffix(text.Bytes(), []byte("\n"))
	return s
}

// put puts an event into its ring. Its Seq is how many events there were in both
// rings so far.
func (s slot) put(tx *bolt.Tx) {
	var seq, next uint64
	for _, name := range rings {
		ring, err := tx.CreateBucketIfNotExists(name)
		if err != nil {
			return
		}
		seq += ring.Sequence()
		if string(name) == string(s.ring) {
			next = ring.Sequence()
		}
	}
	ring := tx.Bucket(s.ring)
	ring.FillPercent = ringFill
	binary.BigEndian.PutUint64(s.value, seq+1)
	// An error leaves the slot as it was, and everything else in the transaction:
	// leases don't depend on events.
	_ = ring.SetSequence(next + 1)
	_ = ring.Put(slotKey(next), s.value)
}

// slotKey is the key of the n-th event of a ring, from 0 on.
func slotKey(n uint64) []byte {
	return binary.BigEndian.AppendUint16(nil, uint16(n%lease.MaxEvents))
}

// Events implements lease.Store. What can't be read isn't among them.
func (db *DB) Events(after uint64) (events []lease.Event, err error) {
	err = db.bolt.View(func(tx *bolt.Tx) error {
		for _, name := range rings {
			if ring := tx.Bucket(name); ring != nil {
				events = append(events, recent(ring, after)...)
			}
		}
		return nil
	})
	slices.SortFunc(events, func(a, b lease.Event) int { return cmp.Compare(a.Seq, b.Seq) })
	return events, err
}

// recent are the events of a ring after one, back from the newest.
func recent(ring *bolt.Bucket, after uint64) (events []lease.Event) {
	last := ring.Sequence()
	for n := last; n > 0 && last-n < lease.MaxEvents; n-- {
		value := ring.Get(slotKey(n - 1))
		if len(value) < seqSize {
			continue
		}
		seq := binary.BigEndian.Uint64(value)
		if seq <= after {
			break
		}
		if e, ok := decodeEvent(value[seqSize:]); ok {
			e.Seq = seq
			events = append(events, e)
		}
	}
	return events
}

// decodeEvent reads an event without its Seq.
func decodeEvent(data []byte) (e lease.Event, ok bool) {
	var s event
	err := json.Unmarshal(data, &s)
	at := time.UnixMilli(s.Time)
	// Of another year no text can be made for programs (RFC 3339).
	return lease.Event{
		Time: at, Kind: s.Kind, Pool: s.Pool, Address: s.Address, MAC: s.MAC, Name: s.Name, Server: s.Server, Detail: s.Detail,
	}, err == nil && s.Kind != "" && at.Year() >= 0 && at.Year() <= 9999
}
