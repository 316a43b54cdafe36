package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Contents are what a database has.
type Contents struct {
	lease.Saved
	Schema int
	Path   string
	Size   int64 // of the file in bytes
}

// ErrLocked: another process has the database open.
var ErrLocked = errors.New("locked by another process")

// Read reads the database in a folder and leaves it as it is, an older schema
// included. A daemon that starts meanwhile waits for it, as long as it waits for
// a predecessor. Where there is none the error is fs.ErrNotExist, where another
// process has it open ErrLocked; for the rest errors are Open's.
func Read(folder string) (Contents, error) {
	folder, err := filepath.Abs(folder)
	if err != nil {
		return Contents{}, err
	}
	c := Contents{Path: filepath.Join(folder, File)}
	info, err := os.Stat(c.Path)
	if err == nil {
		if c.Size = info.Size(); c.Size == 0 { // Open takes it for a new one.
			err = &fs.PathError{Op: "open", Path: c.Path, Err: fs.ErrNotExist}
		} else {
			err = c.read()
		}
	}
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		err = fmt.Errorf("open database %s: %w", c.Path, ErrLocked)
	case errors.Is(err, fs.ErrNotExist):
	case errors.Is(err, fs.ErrPermission): // this process's rights, not the daemon's
		err = fmt.Errorf("open database: %w", err)
	case err != nil:
		err = explain(c.Path, err)
	}
	return c, err
}

// read is openFile for a look. Values that can't be read are an error, as for
// Load.
func (c *Contents) read() (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errDamaged, p)
		}
	}()
	if err := verify(c.Path); err != nil {
		return err
	}
	b, err := bolt.Open(c.Path, 0, &bolt.Options{Timeout: lockWait, ReadOnly: true})
	if err != nil {
		return err
	}
	defer b.Close()
	return b.View(func(tx *bolt.Tx) error {
		if err := check(tx); err != nil && !errors.Is(err, errOlder) {
			return err
		}
		c.Schema, err = schemaOf(tx)
		for _, load := range []struct {
			bucket []byte
			into   func(*bolt.Tx) error
		}{{poolBucket, pools.loadInto(&c.Pools)}, {leaseBucket, leases.loadInto(&c.Leases)}, {bindingBucket, bindings.loadInto(&c.Bindings)}} {
			// An older schema has fewer.
			if err == nil && tx.Bucket(load.bucket) != nil {
				err = load.into(tx)
			}
		}
		if data := tx.Bucket(metaBucket).Get(hostKey); err == nil && data != nil {
			c.Host, err = hosts.decode(hostKey, data)
		}
		return err
	})
}

// Rights tells whether a user, by number, may use the database in a folder, as
// far as owners say: an error names whose it is and what to do. Where nothing is
// there yet, nothing is wrong.
func Rights(folder string, uid int) error {
	folder, err := filepath.Abs(folder)
	if err != nil {
		return err
	}
	for _, path := range []string{folder, filepath.Join(folder, File)} {
		info, err := os.Stat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		case uid == 0:
		case int(info.Sys().(*syscall.Stat_t).Uid) != uid, info.Mode().Perm()&0o600 != 0o600:
			return rightsOf(uid, folder, path, fmt.Errorf("use %s: %w", path, fs.ErrPermission))
		}
	}
	return nil
}

// User is a user's name, or the number where it has none.
func User(uid int) string { return account(uid) }
