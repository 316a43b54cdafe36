package lease_test

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Who asks what hangs gets an error when its time is over, which counts from the
// first one, and however many ask, it is asked once. Then all is as before.
func TestPulse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var pulse lease.Pulse[int]
		var asked atomic.Int32
		hangs := make(chan struct{})
		ask := func(limit time.Duration) (int, error) {
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			return pulse.Ask(ctx, func() int { <-hangs; return int(asked.Add(1)) })
		}
		began := time.Now()
		for _, want := range []string{"stuck for 20s", "stuck for 40s"} {
			if _, err := ask(20 * time.Second); err == nil || err.Error() != want {
				t.Errorf("%v, want %s", err, want)
			}
		}
		time.AfterFunc(5*time.Second, func() { close(hangs) })
		if n, err := ask(20 * time.Second); n != 1 || err != nil {
			t.Errorf("%d, %v; want the answer to the first question", n, err)
		}
		if took := time.Since(began); took != 45*time.Second {
			t.Errorf("took %v", took)
		}
		if n, err := ask(0); err == nil && n != 2 {
			t.Errorf("%d, %v", n, err)
		}
		synctest.Wait()
		if n, err := ask(time.Second); n != 3 || err != nil {
			t.Errorf("%d, %v; want an answer of now", n, err)
		}
	})
}
