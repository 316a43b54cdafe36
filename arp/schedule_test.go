package arp

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

const ms = time.Millisecond

func TestSchedule(t *testing.T) {
	least := func(time.Duration) time.Duration { return 0 }
	most := func(d time.Duration) time.Duration { return d }
	for _, test := range []struct {
		check  lease.ConflictCheck
		random func(time.Duration) time.Duration
		want   []time.Duration
		end    time.Duration
	}{
		{"", most, nil, 0},
		{lease.ConflictOff, most, nil, 0},
		{lease.ConflictOn, most, []time.Duration{0, 66666666, 133333333}, 200 * ms},
		{"600ms", most, []time.Duration{0, 200 * ms, 400 * ms}, 600 * ms},
		{"9s", most, []time.Duration{0, 3 * time.Second, 6 * time.Second}, 9 * time.Second},
		{lease.ConflictRFC, least, []time.Duration{0, time.Second, 2 * time.Second}, 4 * time.Second},
		{lease.ConflictRFC, most, []time.Duration{time.Second, 3 * time.Second, 5 * time.Second}, 7 * time.Second},
	} {
		got, end := schedule(test.check, test.random)
		if !slices.Equal(got, test.want) || end != test.end {
			t.Errorf("%q: got %v, %s", test.check, got, end)
		}
	}
}

// Whatever is drawn, the times are within RFC 5227's bounds, and they differ.
func TestScheduleRandom(t *testing.T) {
	seen := map[time.Duration]bool{}
	for range 1000 {
		probes, end := schedule(lease.ConflictRFC, rand.N[time.Duration])
		if len(probes) != 3 || probes[0] < 0 || probes[0] > time.Second {
			t.Fatalf("got %v", probes)
		}
		for i := range 2 {
			if gap := probes[i+1] - probes[i]; gap < time.Second || gap > 2*time.Second {
				t.Fatalf("got %v", probes)
			}
		}
		if end-probes[2] != 2*time.Second {
			t.Fatalf("got %v, end %s", probes, end)
		}
		seen[end] = true
	}
	if len(seen) < 900 {
		t.Errorf("only %d different times", len(seen))
	}
}
