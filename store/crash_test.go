package store

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

func init() {
	// writer changes leases from several goroutines without end, and prints
	// each change when its call has returned. Before one after which the lease
	// is no longer what it was last known as, it says so.
	roles["writer"] = func(args []string) {
		db, err := Open(args[0])
		if err != nil {
			fmt.Println("error:", err)
			return
		}
		first, _ := strconv.Atoi(args[1])
		var mu sync.Mutex
		say := func(what string, n int, err error) {
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				fmt.Println("error:", err)
				return
			}
			// In one write, so that no line is cut.
			_, _ = os.Stdout.WriteString(fmt.Sprintln(what, n))
		}
		// An event tells what the change that it goes with does.
		with := func(kind lease.EventKind, n int, c lease.Change) error {
			c.PutEvents = []lease.Event{{Kind: kind, Name: strconv.Itoa(n)}}
			return db.Commit(c)
		}
		say("pool", 0, db.Commit(putPool(pool("a"))))
		var wg sync.WaitGroup
		for w := range 8 {
			wg.Go(func() {
				for n := first + w; ; n += 8 {
					say("leased", n, with(lease.EventGranted, n, putLease(full("a", n))))
					switch n % 3 {
					case 0:
						say("dropping", n, nil)
						say("dropped", n, with(lease.EventReleased, n, dropLease("a", mac(n))))
					case 1:
						say("moving", n, nil)
						say("left", n, with(lease.EventLeft, n, leave(full("a", n))))
						if n%2 == 0 {
							say("moving", n, nil)
							say("leased", n, with(lease.EventGranted, n, comeBack(full("a", n))))
						}
					}
				}
			})
		}
		wg.Wait()
	}
}

// A power cut it isn't, but a kill at any moment: what was acknowledged is
// there, a change is there whole or not at all, and the file is sound.
func TestKilledWriter(t *testing.T) {
	const kills = 30
	folder := filepath.Join(t.TempDir(), "data")
	known := map[int]string{} // by the last line about each lease
	r, seed := seeded()
	acknowledged := 0
	seq := uint64(0)
	for round := range kills {
		cmd := child(t, "writer", folder, strconv.Itoa(round*1000000))
		out, err := cmd.StdoutPipe()
		works(t, err)
		works(t, cmd.Start())
		// Killed after so many lines, and a little later: some are in flight.
		left := 1 + r.IntN(200)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			what, number, _ := strings.Cut(lines.Text(), " ")
			n, err := strconv.Atoi(number)
			if what == "error:" || err != nil {
				t.Fatalf("the writer says %q", lines.Text())
			}
			if known[n] = what; what == "pool" {
				delete(known, n)
			}
			acknowledged++
			if left--; left == 0 {
				time.AfterFunc(time.Duration(r.Int64N(int64(3*time.Millisecond))), func() { _ = cmd.Process.Kill() })
			}
			if left < -200000 {
				break
			}
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()

		db, err := Open(folder)
		works(t, err)
		sound(t, db)
		saved, newest := content(t, db), events(t, db, seq)
		works(t, db.Close())
		leased, bound := map[lease.MAC]bool{}, map[lease.MAC]bool{}
		for _, l := range saved.Leases {
			leased[l.MAC] = true
		}
		for _, b := range saved.Bindings {
			bound[b.Lease.MAC] = true
			if leased[b.Lease.MAC] {
				t.Errorf("seed %d, round %d: half a change left both lease and binding of %s", seed, round, b.Lease.MAC)
			}
		}
		for n, what := range known {
			l, b := leased[mac(n)], bound[mac(n)]
			wrong := false
			switch what {
			case "leased":
				wrong = !l
			case "dropping":
				wrong = b
			case "dropped":
				wrong = l || b
			case "moving":
				wrong = l == b
			case "left":
				wrong = !b
			}
			if wrong {
				t.Errorf("seed %d, round %d: %d was last said to be %s; lease: %t, binding: %t", seed, round, n, what, l, b)
			}
		}
		// The last event of each lease says what became of it, acknowledged or not.
		last := map[int]lease.EventKind{}
		for _, e := range newest {
			n, err := strconv.Atoi(e.Name)
			works(t, err)
			last[n], seq = e.Kind, e.Seq
		}
		for n, kind := range last {
			l, b := leased[mac(n)], bound[mac(n)]
			if l != (kind == lease.EventGranted) || b != (kind == lease.EventLeft) {
				t.Errorf("seed %d, round %d: the last event of %d is %s; lease: %t, binding: %t", seed, round, n, kind, l, b)
			}
		}
		for n, what := range known {
			// Of a long round the ring has the end only.
			if last[n] == "" && n/1000000 == round && len(newest) < lease.MaxEvents {
				t.Errorf("seed %d, round %d: %d was said to be %s, and has no event", seed, round, n, what)
			}
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d changes acknowledged over %d kills", acknowledged, kills)
}

// together commits changes in one batch, in their order, and returns their
// answers; a panic is one of them, caught as net/http does.
func together(t *testing.T, db *DB, changes ...lease.Change) []error {
	t.Helper()
	answers := make([]error, len(changes))
	var attempts []func()
	for i, c := range changes {
		attempts = append(attempts, func() {
			defer func() {
				if p := recover(); p != nil {
					answers[i] = errPanic
				}
			}()
			answers[i] = db.Commit(c)
		})
	}
	before := lastCommit(t, db)
	held(db, attempts...)
	if commits := lastCommit(t, db) - before; commits > 1 {
		t.Errorf("%d commits", commits)
	}
	return answers
}

var errPanic = errors.New("panicked")

// A panic in one change, caught by its caller, must not pass for the success of
// the others in its commit.
func TestPanicIsNoSuccess(t *testing.T) {
	db := open(t, t.TempDir())
	works(t, db.Commit(putPool(pool("a"))))
	works(t, db.bolt.Update(func(tx *bolt.Tx) error { return tx.DeleteBucket(bindingBucket) }))
	changes := []lease.Change{putLease(full("a", 0)), leave(full("a", 1))}
	for n := range 4 {
		changes = append(changes, putLease(full("a", n+2)))
	}
	panics := 0
	for i, err := range together(t, db, changes...) {
		if err == nil {
			t.Errorf("change %d passed", i)
		}
		if errors.Is(err, errPanic) {
			panics++
		}
	}
	works(t, db.bolt.Update(func(tx *bolt.Tx) error { _, err := tx.CreateBucket(bindingBucket); return err }))
	if saved := content(t, db); panics != 1 || len(saved.Leases) != 0 {
		t.Errorf("%d panicked, %d leases are stored", panics, len(saved.Leases))
	}
	works(t, db.Commit(leave(full("a", 1)))) // it goes on
}

// An error of bbolt amid a change takes its whole commit back, and every caller
// is told.
func TestErrorAmidAChange(t *testing.T) {
	db := open(t, t.TempDir())
	works(t, db.Commit(putPool(pool("a"))))
	works(t, db.Commit(putLease(full("a", 1))))
	before := content(t, db)
	// A bucket where the binding's value belongs.
	inTheWay := bindingKey(left(full("a", 1)).Key())
	works(t, db.bolt.Update(func(tx *bolt.Tx) error {
		_, err := tx.Bucket(bindingBucket).CreateBucket(inTheWay)
		return err
	}))
	for i, err := range together(t, db, putLease(full("a", 2)), leave(full("a", 1)), dropPool("a"), putLease(full("gone", 1))) {
		if !errors.Is(err, bolterrors.ErrIncompatibleValue) {
			t.Errorf("change %d: error %v", i, err)
		}
	}
	works(t, db.bolt.Update(func(tx *bolt.Tx) error { return tx.Bucket(bindingBucket).DeleteBucket(inTheWay) }))
	if after := content(t, db); !reflect.DeepEqual(after, before) {
		t.Errorf("left is\n%+v, want\n%+v", after, before)
	}
	works(t, db.Commit(leave(full("a", 1)))) // it goes on
}

// inOwnMounts runs a test again, in a child with a mount namespace of its own,
// and reports whether this is the child. It needs root: skipped without, but
// not in CI.
func inOwnMounts(t *testing.T) bool {
	t.Helper()
	if os.Getenv("STORE_TEST_MOUNTS") != "" {
		return true
	}
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("mounting needs root")
		}
		t.Skip("mounting needs root")
	}
	self, err := os.Executable()
	works(t, err)
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), "STORE_TEST_MOUNTS=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

// mounted mounts a small file system on a folder of its own.
func mounted(t *testing.T, size string) string {
	t.Helper()
	works(t, syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""))
	folder := t.TempDir()
	works(t, syscall.Mount("tmpfs", folder, "tmpfs", 0, "size="+size))
	t.Cleanup(func() { works(t, syscall.Unmount(folder, 0)) })
	return folder
}

func TestFullDisk(t *testing.T) {
	if !inOwnMounts(t) {
		return
	}
	disk := mounted(t, "1m")
	folder := filepath.Join(disk, "data")
	db, err := Open(folder)
	works(t, err)
	works(t, db.Commit(putPool(pool("a"))))
	for n := range 10 {
		works(t, db.Commit(putLease(full("a", n))))
	}
	filler := filepath.Join(disk, "filler")
	fill(t, filler)

	stored := 10
	var refusal error
	for ; refusal == nil; stored++ {
		if stored > 100000 {
			t.Fatal("the disk is never full")
		}
		refusal = db.Commit(putLease(full("a", stored)))
	}
	stored--
	t.Logf("%d leases, then: %v", stored, refusal)
	if !strings.Contains(refusal.Error(), "no space left") {
		t.Errorf("the reason isn't named: %v", refusal)
	}
	for range 5 {
		if err := db.Commit(putLease(full("a", stored+1))); err == nil {
			t.Error("it was stored on a full disk")
		}
	}
	if err := db.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "no space left") || !strings.Contains(err.Error(), folder) {
		t.Errorf("ready on a full disk: %v", err)
	}
	works(t, db.Alive(t.Context()))
	check := func(want int) {
		t.Helper()
		sound(t, db)
		if leases := content(t, db).Leases; len(leases) != want {
			t.Errorf("%d leases, want %d", len(leases), want)
		}
	}
	check(stored)

	works(t, os.Remove(filler))
	works(t, db.Commit(putLease(full("a", stored+2))))
	works(t, db.Ready(t.Context()))
	check(stored + 1)
	works(t, db.Close())
	db, err = Open(folder)
	works(t, err)
	check(stored + 1)
	works(t, db.Close())

	// No room for the database at all.
	works(t, os.RemoveAll(folder))
	fill(t, filler)
	if db, err := Open(folder); err == nil {
		_ = db.Close()
		t.Error("a database was made on a full disk")
	} else {
		t.Log(err)
	}
	works(t, os.Remove(filler))
	db, err = Open(folder) // what the attempt left is in nobody's way
	works(t, err)
	works(t, db.Close())
}

// fill takes all the room that is left.
func fill(t *testing.T, path string) {
	t.Helper()
	file, err := os.Create(path)
	works(t, err)
	defer file.Close()
	for err == nil {
		_, err = file.Write(make([]byte, 4096))
	}
}

func TestReadOnlyFolder(t *testing.T) {
	if !inOwnMounts(t) {
		return
	}
	disk := mounted(t, "1m")
	used := filepath.Join(disk, "used")
	db, err := Open(used)
	works(t, err)
	works(t, db.Close())
	works(t, syscall.Mount("", disk, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, "size=1m"))
	for _, folder := range []string{used, disk, filepath.Join(disk, "new")} {
		db, err := Open(folder)
		if err == nil {
			_ = db.Close()
			t.Errorf("%s was opened", folder)
		} else if !strings.Contains(err.Error(), "read-only") || !strings.Contains(err.Error(), folder) {
			t.Errorf("the reason isn't named: %v", err)
		}
	}
}
