package dhcp

import (
	"net/netip"
	"sync"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// The recorder remembers this many packets, the newest, and no more than this
// many bytes of them. Half a minute of a host whose 1000 containers start at once
// doesn't fit, but all that one container's start took does.
const (
	maxRecords  = 1000
	maxRecorded = 1 << 20
)

// record is a packet that was sent or received.
type record struct {
	at    time.Time
	place place
	sent  bool
	// key is the zero one where what was received is too short to have one.
	key exchangeKey
	owner
	// data is the DHCP message, or the whole frame of what an interface received.
	// It is never changed.
	data []byte
	// peer is who it is to or from, at a relay address.
	peer netip.AddrPort
	// source and dest are the stations of what an interface sent.
	source, dest lease.MAC
	// fate is why it wasn't sent or used. It isn't known while it is pending.
	fate    error
	pending bool
}

// owner is whose a packet is.
type owner struct {
	name   string // the container's, "" where it isn't known
	pool   string // its ID, "" for none
	subnet netip.Prefix
}

func (p party) owner() owner {
	return owner{name: p.name, pool: p.pool.ID, subnet: p.pool.Subnet}
}

// recorder is a flight recorder: it remembers the last packets of all links.
// Packets are numbered in their order. Whoever reads them has a position and
// comes back, so that readers hold up nobody and cost nothing: what has been
// overwritten meanwhile is lost to them. The zero recorder is empty.
type recorder struct {
	// mu guards the rest.
	mu sync.Mutex
	// ring has the packets from oldest to before next, n at n % maxRecords.
	ring         []record
	oldest, next uint64
	size         int // in bytes
	// asked are the numbers of the last packets that were sent by exchanges.
	asked map[exchangeKey]uint64
	// changed is closed when there is more to read, nil while nobody waits.
	changed chan struct{}
}

// note remembers a packet before anybody can answer it, so that its answer
// comes after it; settle must follow.
func (r *recorder) note(p record) (n uint64) {
	p.pending = true
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.next-r.oldest == maxRecords || r.oldest < r.next && r.size+cap(p.data) > maxRecorded {
		r.forgetOldestLocked()
	}
	n = r.next
	r.next++
	r.size += cap(p.data)
	if i := n % maxRecords; i < uint64(len(r.ring)) {
		r.ring[i] = p
	} else {
		r.ring = append(r.ring, p)
	}
	if p.sent {
		if r.asked == nil {
			r.asked = map[exchangeKey]uint64{}
		}
		r.asked[p.key] = n
	}
	return n
}

func (r *recorder) forgetOldestLocked() {
	p := r.atLocked(r.oldest)
	r.size -= cap(p.data)
	if n, ok := r.asked[p.key]; ok && n == r.oldest {
		delete(r.asked, p.key)
	}
	*p = record{}
	r.oldest++
}

func (r *recorder) atLocked(n uint64) *record { return &r.ring[n%maxRecords] }

// settle says what became of a packet that was noted: nil, or why it wasn't
// sent or used.
func (r *recorder) settle(n uint64, fate error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n >= r.oldest {
		p := r.atLocked(n)
		p.fate, p.pending = fate, false
	}
	if r.changed != nil {
		close(r.changed)
		r.changed = nil
	}
}

// asker is whose exchange has sent something lately.
func (r *recorder) asker(key exchangeKey) (of owner, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n, ok := r.asked[key]
	if ok {
		of = r.atLocked(n).owner
	}
	return of, ok
}

// back is the position from which at most this many packets are remembered that
// match, and the one at which nothing is.
func (r *recorder) back(last int, match func(*record) bool) (from, end uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	from, end = r.next, r.next
	for n := r.next; last > 0 && n > r.oldest; n-- {
		if match(r.atLocked(n - 1)) {
			from = n - 1
			last--
		}
	}
	return from, end
}

// read copies what there is from a position on, as much as fits, and returns it
// with the number of the first, which is a later one where packets have been
// lost. Where there is nothing, changed is closed when there may be.
func (r *recorder) read(from uint64, into []record) (got []record, first uint64, changed <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	first = max(from, r.oldest)
	got = into[:0]
	for n := first; n < r.next && len(got) < len(into) && !r.atLocked(n).pending; n++ {
		got = append(got, *r.atLocked(n))
	}
	if len(got) == 0 {
		if r.changed == nil {
			r.changed = make(chan struct{})
		}
		changed = r.changed
	}
	return got, first, changed
}
