// Package store keeps pools, leases, bindings and events in a bbolt file. Every
// change is on disk, whole, before its call returns; changes that are asked for
// at the same time share one commit.
package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sync/errgroup"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// File is the database's name in the data folder.
const File = "oam-docker-ipam.db"

// schema is the version of the layout below. A database of an older one is
// migrated when it is opened, one of a newer one is not opened.
//
//	meta      "schema" -> decimal number
//	          "host" -> JSON of lease.HostIdentity, once there is one (schema 2)
//	pools     pool ID -> JSON of lease.Pool
//	leases    pool ID, NUL, MAC -> JSON of lease.Lease
//	bindings  subnet, NUL, client identifier -> JSON of lease.Binding (schema 2)
//	events    slot of a ring, two bytes -> Seq, JSON of an event
//	renewals  the same, of events that are renewals
//
// A database of schema 2 may lack the last two.
const schema = len(migrations)

var (
	metaBucket    = []byte("meta")
	poolBucket    = []byte("pools")
	leaseBucket   = []byte("leases")
	bindingBucket = []byte("bindings")

	schemaKey = []byte("schema")
	hostKey   = []byte("host")
)

// migrations bring a database from the schema of their index to the next. A
// new file has schema 0, so that it goes the same way as an old one.
var migrations = [...]func(*bolt.Tx) error{
	func(tx *bolt.Tx) error { return createBuckets(tx, metaBucket, poolBucket, leaseBucket) },
	func(tx *bolt.Tx) error { return createBuckets(tx, bindingBucket) },
}

func createBuckets(tx *bolt.Tx, names ...[]byte) error {
	for _, name := range names {
		if _, err := tx.CreateBucket(name); err != nil {
			return fmt.Errorf("create bucket %s: %w", name, err)
		}
	}
	return nil
}

// lockWait is how long Open waits for another process to let go of the file,
// such as a predecessor that is just ending.
const lockWait = 2 * time.Second

// DB is an open database. It implements lease.Store.
type DB struct {
	bolt *bolt.DB

	// committed is called after each commit.
	committed func(took time.Duration, changes int, err error)

	// writer is held by the one caller who commits. It comes before mu.
	writer sync.Mutex
	// running is the commit that is on its way to the disk, nil while none is.
	running atomic.Pointer[run]
	// failed is why the last commit failed, nil when it did not.
	failed atomic.Pointer[error]
	// mu guards queue: the changes that no commit has taken up yet.
	mu    sync.Mutex
	queue []*change
}

var _ lease.Store = (*DB)(nil)

// run is one commit.
type run struct {
	since time.Time
	done  chan struct{} // closed when it has ended
}

// begin says that a commit begins, and the function that it has ended.
func (db *DB) begin() (end func()) {
	r := &run{since: time.Now(), done: make(chan struct{})}
	db.running.Store(r)
	return func() {
		db.running.Store(nil)
		close(r.done)
	}
}

// Open opens the database in a folder, making both where they are missing,
// with modes 0700 and 0600. Close ends it. An older schema is brought up to
// date. A file that is locked, damaged, of a newer schema or not this user's is
// an error and stays as it is.
func Open(folder string) (*DB, error) {
	folder, err := filepath.Abs(folder)
	if err == nil {
		err = os.MkdirAll(folder, 0o700)
	}
	if err != nil {
		return nil, fmt.Errorf("make data folder: %w", explainRights(folder, folder, err))
	}
	path := filepath.Join(folder, File)
	b, err := openFile(path)
	if err != nil {
		return nil, explain(path, err)
	}
	return &DB{bolt: b, committed: func(time.Duration, int, error) {}}, nil
}

// openFile opens and checks the file and brings its schema up to date. bbolt
// panics on some damage: here, where nothing has been committed yet, that
// becomes an error.
func openFile(path string) (b *bolt.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errDamaged, p)
		}
		if err != nil && b != nil {
			// Closing may touch the damaged pages too; the lock matters more
			// than the error.
			func() {
				defer func() { _ = recover() }()
				_ = b.Close()
			}()
			b = nil
		}
	}()
	if info, err := os.Stat(path); err == nil && info.Size() > 0 {
		if err := verify(path); err != nil {
			return nil, err
		}
	}
	// With a synced freelist, every commit would write it again.
	b, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: lockWait, NoFreelistSync: true, FreelistType: bolt.FreelistMapType})
	if err != nil {
		return nil, err
	}
	err = b.View(check)
	if errors.Is(err, errOlder) {
		err = b.Update(migrate)
	}
	return b, err
}

var (
	errDamaged = errors.New("damaged")
	errOlder   = errors.New("of an older schema")
	errNewer   = errors.New("written by a newer version")
)

// explain says what to do about a database that can't be used.
func explain(path string, err error) error {
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return fmt.Errorf("open database %s: locked: another oam-docker-ipam is running on it", path)
	case errors.Is(err, errNewer):
		return fmt.Errorf("open database %s: %w: install that version again, or move the file away to start without leases", path, err)
	case errors.Is(err, errDamaged), errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrChecksum), errors.Is(err, bolterrors.ErrVersionMismatch):
		return fmt.Errorf("open database %s: not usable (left as it is): %w: restore it from a backup, or move it away: networks are then taken up again by their IDs, and the leases end at the server", path, err)
	}
	return fmt.Errorf("open database %s: %w", path, explainRights(filepath.Dir(path), path, err))
}

// schemaOf is a database's schema. An empty one is new, or its first start was
// cut short.
func schemaOf(tx *bolt.Tx) (int, error) {
	if first, _ := tx.Cursor().First(); first == nil {
		return 0, nil
	}
	meta := tx.Bucket(metaBucket)
	if meta == nil {
		return 0, fmt.Errorf("%w: it has no bucket %s", errDamaged, metaBucket)
	}
	text := string(meta.Get(schemaKey))
	version, err := strconv.Atoi(text)
	if err != nil || version < 1 {
		return 0, fmt.Errorf("%w: schema %q", errDamaged, text)
	}
	return version, nil
}

// check refuses what later transactions would stumble over. errOlder is what
// migrate mends.
func check(tx *bolt.Tx) error {
	version, err := schemaOf(tx)
	switch {
	case err != nil:
		return err
	case version < schema:
		return errOlder
	case version > schema:
		return fmt.Errorf("%w (schema %d, this one knows %d)", errNewer, version, schema)
	}
	for _, name := range [][]byte{poolBucket, leaseBucket, bindingBucket} {
		if tx.Bucket(name) == nil {
			return fmt.Errorf("%w: it has no bucket %s", errDamaged, name)
		}
	}
	return nil
}

// migrate brings an older schema up to date. What check then refuses is left
// as it was.
func migrate(tx *bolt.Tx) error {
	version, err := schemaOf(tx)
	if err != nil {
		return err
	}
	for from := version; from < schema; from++ {
		if err := migrations[from](tx); err != nil {
			return fmt.Errorf("%w: migrate from schema %d: %w", errDamaged, from, err)
		}
	}
	if err := tx.Bucket(metaBucket).Put(schemaKey, []byte(strconv.Itoa(schema))); err != nil {
		return err
	}
	return check(tx)
}

// Close closes the file. No call may come after it.
func (db *DB) Close() error { return db.bolt.Close() }

// Load implements lease.Store. Values that can't be read are an error that
// names them: a lease left out silently would be given to somebody else.
func (db *DB) Load() (saved lease.Saved, err error) {
	// Each has a transaction of its own, since goroutines can't share one.
	// Without commits, all see the same.
	db.writer.Lock()
	defer db.writer.Unlock()
	var g errgroup.Group
	g.Go(func() error { return db.bolt.View(pools.loadInto(&saved.Pools)) })
	// Decoding these two is most of a start's time.
	g.Go(func() error { return db.bolt.View(leases.loadInto(&saved.Leases)) })
	g.Go(func() error { return db.bolt.View(bindings.loadInto(&saved.Bindings)) })
	g.Go(func() error {
		return db.bolt.View(func(tx *bolt.Tx) (err error) {
			if data := tx.Bucket(metaBucket).Get(hostKey); data != nil {
				saved.Host, err = hosts.decode(hostKey, data)
			}
			return err
		})
	})
	err = g.Wait()
	return saved, err
}

// Alive implements lease.Store: it waits until the commit that is on its way has
// ended. A disk that is slow, but ends one after the other, is no alarm.
func (db *DB) Alive(ctx context.Context) error {
	r := db.running.Load()
	if r == nil {
		return nil
	}
	select {
	case <-r.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("write to database %s: stuck for %s: does its disk answer?", db.bolt.Path(), time.Since(r.since).Round(time.Millisecond))
	}
}

// Ready returns nil if a change can be expected to be stored: none hangs until
// ctx ends, and the last one didn't fail. It writes nothing.
func (db *DB) Ready(ctx context.Context) error {
	if err := db.Alive(ctx); err != nil {
		return err
	}
	if err := db.failed.Load(); err != nil {
		return fmt.Errorf("write to database %s: the last change was not stored: %w", db.bolt.Path(), *err)
	}
	return nil
}

// Commit implements lease.Store. It returns when the change is on disk. Whoever
// gets to write commits whatever has queued while the commit before was on its
// way, so callers at the same time share an fsync, and a lone one waits for
// nobody, as it would in bbolt's Batch.
func (db *DB) Commit(c lease.Change) error {
	mine, err := prepare(c)
	if err != nil || len(mine.steps)+len(mine.events) == 0 {
		return err
	}
	db.mu.Lock()
	db.queue = append(db.queue, mine)
	db.mu.Unlock()

	db.writer.Lock()
	defer db.writer.Unlock()
	if !mine.done {
		db.mu.Lock()
		batch := db.queue
		db.queue = nil
		db.mu.Unlock()
		db.commit(batch)
	}
	return mine.err
}

// commit applies a batch in one transaction. A change that is refused has done
// nothing yet, so the others still go to disk. An error after that is none that
// anybody foresaw, and takes all of them back.
func (db *DB) commit(batch []*change) {
	defer db.begin()()
	began := time.Now()
	// Stays when one of the changes panics, which fails all of them.
	err := errors.New("cut short")
	defer func() {
		stored := 0
		for _, c := range batch {
			c.done = true
			if err != nil {
				c.err = fmt.Errorf("commit: %w", err)
			}
			if c.err == nil {
				stored++
			}
		}
		db.failed.Store(nil)
		if err != nil {
			db.failed.Store(&err)
		}
		db.committed(time.Since(began), stored, err)
	}()
	err = db.bolt.Update(func(tx *bolt.Tx) error {
		for _, c := range batch {
			if c.err = c.refusal(tx); c.err != nil {
				continue
			}
			for _, s := range c.steps {
				if err := s.apply(tx); err != nil {
					return err
				}
			}
			for _, s := range c.events {
				s.put(tx)
			}
		}
		return nil
	})
}
