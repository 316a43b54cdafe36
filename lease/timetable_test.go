package lease

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// random returns a source whose seed is printed where the test fails.
func random(t *testing.T) *rand.Rand {
	seed := rand.Uint64()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

var birth = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// lasting makes a lease obtained at birth, with its times as the server's
// options 58, 59 and 51 would have them.
func lasting(t1, t2, length time.Duration) Lease {
	return Lease{Obtained: birth, Renew: birth.Add(t1), Rebind: birth.Add(t2), Expires: birth.Add(length)}
}

func TestTimetable(t *testing.T) {
	const h, m, s = time.Hour, time.Minute, time.Second
	day := lasting(12*h, 21*h, 24*h)
	short := lasting(5*s, 8750*time.Millisecond, 10*s)
	tiny := lasting(500*time.Millisecond, 875*time.Millisecond, s)
	cases := []struct {
		name  string
		lease Lease
		at    time.Duration
		state State
		retry time.Duration // from at on
	}{
		{"fresh", day, 0, Bound, 12 * h},
		{"clock stepped back", day, -h, Bound, 13 * h},
		{"just before T1", day, 12*h - 1, Bound, 1},
		{"at T1", day, 12 * h, Renewing, 4*h + 30*m},
		{"half of what is left to T2", day, 20 * h, Renewing, 30 * m},
		{"floor before T2", day, 21*h - 100*s, Renewing, 60 * s},
		{"not past T2", day, 21*h - 30*s, Renewing, 30 * s},
		{"just before T2", day, 21*h - 1, Renewing, 1},
		{"at T2", day, 21 * h, Rebinding, 90 * m},
		{"floor before the end", day, 24*h - 119*s, Rebinding, 60 * s},
		{"not past the end", day, 24*h - 59*s, Rebinding, 59 * s},
		{"at its end", day, 24 * h, Lost, 60 * s},
		{"long ago", day, 1000 * h, Lost, 60 * s},
		{"short lease at T1", short, 5 * s, Renewing, 1875 * time.Millisecond},
		{"short lease, one second's floor", short, 7 * s, Renewing, s},
		{"short lease, not past T2", short, 8 * s, Renewing, 750 * time.Millisecond},
		{"short lease at T2", short, 8750 * time.Millisecond, Rebinding, s},
		{"lease of a second at T1", tiny, 500 * time.Millisecond, Renewing, 375 * time.Millisecond},
		{"T1 is T2", lasting(h, h, 2*h), h, Rebinding, 30 * m},
		{"all at once", lasting(h, h, h), h, Lost, 60 * s},
		{"state of 60 s has the RFC's floor", lasting(h, h+m, 2*h), h, Renewing, 60 * s},
		{"state under 60 s has half", lasting(h, h+59*s, 2*h), h, Renewing, 29500 * time.Millisecond},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			now := birth.Add(c.at)
			if got := c.lease.State(now); got != c.state {
				t.Errorf("State = %v, want %v", got, c.state)
			}
			if got := c.lease.Retry(now).Sub(now); got != c.retry {
				t.Errorf("Retry after %v, want %v", got, c.retry)
			}
		})
	}
}

func TestInfiniteLeaseIsAlwaysBound(t *testing.T) {
	l := Lease{Obtained: birth}
	for _, at := range []time.Duration{-time.Hour, 0, 1, math.MaxInt64} {
		if now := birth.Add(at); !l.Infinite() || l.State(now) != Bound || !l.Retry(now).IsZero() {
			t.Errorf("at %v: state %v, retry %v", at, l.State(now), l.Retry(now))
		}
	}
}

func TestStateNames(t *testing.T) {
	got := []string{Bound.String(), Renewing.String(), Rebinding.String(), Lost.String(), State(9).String()}
	if want := []string{"bound", "renewing", "rebinding", "lost", "state 9"}; !slices.Equal(got, want) {
		t.Errorf("names %q, want %q", got, want)
	}
}

// randomLease has any length from a second to 136 years, all magnitudes alike,
// and any T1 <= T2 <= length.
func randomLease(r *rand.Rand) Lease {
	length := time.Duration(math.Exp(r.Float64()*math.Log(math.MaxUint32-1))) * time.Second
	switch r.IntN(4) {
	case 0: // as most servers have it
		return lasting(length/2, length/8*7, length)
	case 1: // states that are nearly or wholly empty
		t2 := length - time.Duration(r.Int64N(min(int64(length), int64(2*time.Minute))+1))
		t1 := t2 - time.Duration(r.Int64N(min(int64(t2), int64(2*time.Minute))+1))
		return lasting(t1, t2, length)
	}
	a, b := time.Duration(r.Int64N(int64(length)+1)), time.Duration(r.Int64N(int64(length)+1))
	return lasting(min(a, b), max(a, b), length)
}

// ends are the limits of a lease's states.
func (l Lease) ends(s State) (begin, end time.Time) {
	switch s {
	case Bound:
		return l.Obtained, l.Renew
	case Renewing:
		return l.Renew, l.Rebind
	case Rebinding:
		return l.Rebind, l.Expires
	}
	return l.Expires, l.Expires.Add(math.MaxInt64)
}

func TestRetryKeepsToItsState(t *testing.T) {
	r := random(t)
	for range 20000 {
		l := randomLease(r)
		length := l.Expires.Sub(birth)
		now := birth.Add(time.Duration(r.Int64N(int64(length)+int64(length)/4+1)) - length/8)
		state, next := l.State(now), l.Retry(now)
		begin, end := l.ends(state)
		left := end.Sub(now)
		if state != Bound && now.Before(begin) || !now.Before(end) {
			t.Fatalf("%v: at %v it is %v, which lasts from %v to %v", l, now, state, begin, end)
		}
		if !next.After(now) {
			t.Fatalf("%v: at %v (%v) retry at %v isn't after it", l, now, state, next)
		}
		if next.After(end) {
			t.Fatalf("%v: at %v retry at %v is past the end of %v, %v", l, now, next, state, end)
		}
		gap := next.Sub(now)
		switch {
		case state == Bound && !next.Equal(l.Renew):
			t.Fatalf("%v: while bound, retry at %v isn't T1 %v", l, next, l.Renew)
		case state == Lost && gap != time.Minute:
			t.Fatalf("%v: expired, retry after %v", l, gap)
		case state == Bound || state == Lost:
			continue
		}
		// RFC 2131 section 4.4.5, and our bound for shorter states.
		floor := time.Minute
		if end.Sub(begin) < time.Minute {
			floor = time.Second
		}
		if want := min(max(left/2, floor), left); gap != want {
			t.Fatalf("%v: %v with %v left, retry after %v, want %v", l, state, left, gap, want)
		}
	}
}

func TestFollowingRetrySkipsNoState(t *testing.T) {
	r := random(t)
	for range 3000 {
		l := randomLease(r)
		now := birth.Add(-time.Duration(r.Int64N(int64(time.Hour))))
		if r.IntN(2) == 0 {
			now = birth.Add(time.Duration(r.Int64N(int64(l.Expires.Sub(birth)))))
		}
		first := l.State(now)
		seen := map[State]bool{}
		steps := 0
		for ; l.State(now) != Lost; now = l.Retry(now) {
			seen[l.State(now)] = true
			if steps++; steps > 150 {
				t.Fatalf("%v: still %v after %d attempts", l, l.State(now), steps)
			}
		}
		if !now.Equal(l.Expires) {
			t.Fatalf("%v: first attempt after the end is at %v, want %v", l, now, l.Expires)
		}
		for s := first; s < Lost; s++ {
			if begin, end := l.ends(s); begin.Before(end) && !seen[s] {
				t.Fatalf("%v: from %v on no attempt was made while %v", l, first, s)
			}
		}
	}
}

func TestLostLeaseIsExpired(t *testing.T) {
	r := random(t)
	for range 100 {
		l := randomLease(r)
		now := birth.Add(time.Duration(r.Int64N(int64(time.Hour))))
		if l = l.lost(now); l.State(now) != Lost || l.Infinite() {
			t.Fatalf("lost at %v it is %v", now, l.State(now))
		}
	}
}

func TestMAC(t *testing.T) {
	for _, text := range []string{"02:42:ac:11:00:02", "02-42-AC-11-00-02", "0242.ac11.0002"} {
		if mac, err := ParseMAC(text); err != nil || mac.String() != "02:42:ac:11:00:02" {
			t.Errorf("ParseMAC(%q) = %v, %v", text, mac, err)
		}
	}
	for _, text := range []string{"", "02:42:ac:11:00", "02:42:ac:11:00:02:03:04", "02:42:ac:11:00:zz", "192.0.2.1"} {
		var mac MAC
		if err := mac.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("UnmarshalText(%q) = %v, want an error", text, mac)
		}
	}
	r := random(t)
	for range 100 {
		var mac, back MAC
		for i := range mac {
			mac[i] = byte(r.Uint32())
		}
		text, err := mac.MarshalText()
		if err == nil {
			err = back.UnmarshalText(text)
		}
		if err != nil || back != mac {
			t.Errorf("%v became %v, %v", mac, back, err)
		}
	}
}
