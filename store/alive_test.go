package store

import (
	"context"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// A commit that hangs makes Alive fail, with the time for which it has, and
// nothing longer than that; a look writes nothing.
func TestAlive(t *testing.T) {
	db := open(t, t.TempDir())
	works(t, db.Commit(putPool(pool("a"))))
	last := lastCommit(t, db)
	before, err := os.Stat(db.bolt.Path())
	works(t, err)
	alive := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		return db.Alive(ctx)
	}
	for range 100 {
		works(t, alive())
	}
	after, err := os.Stat(db.bolt.Path())
	works(t, err)
	if id := lastCommit(t, db); !after.ModTime().Equal(before.ModTime()) || id != last {
		t.Errorf("looking writes: last transaction %d, %d before", id, last)
	}

	// A commit can't get on before another transaction, and a second waits for it.
	hangs, err := db.bolt.Begin(true)
	works(t, err)
	ended := make(chan error)
	for _, id := range []string{"b", "c"} {
		go func() { ended <- db.Commit(putPool(pool(id))) }()
	}
	for db.running.Load() == nil {
		time.Sleep(time.Millisecond)
	}
	for range 3 {
		if err := alive(); err == nil || !strings.Contains(err.Error(), db.bolt.Path()) || !strings.Contains(err.Error(), "stuck for ") {
			t.Errorf("error %v", err)
		}
	}
	works(t, hangs.Rollback())
	works(t, <-ended)
	works(t, <-ended)
	works(t, alive())
}

// A disk that takes its time for each commit isn't stuck while commits end,
// however many wait; one that takes too long for a single one is.
func TestAliveOnASlowDisk(t *testing.T) {
	db := open(t, t.TempDir())
	synctest.Test(t, func(t *testing.T) {
		alive := func() (time.Duration, error) {
			began := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			err := db.Alive(ctx)
			return time.Since(began), err
		}
		end := db.begin()
		go func() {
			for range 10 {
				time.Sleep(15 * time.Second)
				end()
				end = db.begin()
			}
			time.Sleep(45 * time.Second)
			end()
		}()
		for range 10 {
			took, err := alive()
			if works(t, err); took != 15*time.Second {
				t.Errorf("a commit of 15s: alive after %v", took)
			}
		}
		for _, want := range []string{"stuck for 20s", "stuck for 40s"} {
			if _, err := alive(); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("error %v, want %s", err, want)
			}
		}
		took, err := alive()
		if works(t, err); took != 5*time.Second {
			t.Errorf("alive after %v", took)
		}
	})
}

// A disk that is always busy is no reason for an alarm: the turn comes.
func TestAliveUnderLoad(t *testing.T) {
	db := open(t, t.TempDir())
	works(t, db.Commit(putPool(pool("a"))))
	stop := make(chan struct{})
	ended := make(chan error)
	const writers = 64
	for w := range writers {
		go func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					ended <- nil
					return
				default:
				}
				if err := db.Commit(putLease(full("a", w*1000+n%1000))); err != nil {
					ended <- err
					return
				}
			}
		}()
	}
	for end := time.Now().Add(time.Second); time.Now().Before(end); {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		works(t, db.Alive(ctx))
		cancel()
	}
	close(stop)
	for range writers {
		works(t, <-ended)
	}
}
