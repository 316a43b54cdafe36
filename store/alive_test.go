package store

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"
)

// A commit that hangs in the disk makes Alive fail, with the time for which the
// writer was waited for, and nothing longer than that; a look writes nothing.
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

	// The writer's part of a commit that doesn't end.
	db.writer.Lock()
	for range 3 {
		if err := alive(); err == nil || !strings.Contains(err.Error(), db.bolt.Path()) || !strings.Contains(err.Error(), "stuck for ") {
			t.Errorf("error %v", err)
		}
	}
	db.writer.Unlock()
	works(t, db.Commit(putPool(pool("b"))))
	for end := time.Now().Add(10 * time.Second); alive() != nil; {
		if time.Now().After(end) {
			t.Fatal("not alive 10s after the commit")
		}
	}
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
