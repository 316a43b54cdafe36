package store

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Read sees what Load does, and leaves every byte as it was.
func TestRead(t *testing.T) {
	folder := t.TempDir()
	db, err := Open(folder)
	works(t, err)
	works(t, db.Commit(lease.Change{
		PutPools: []lease.Pool{pool("a")}, PutLeases: []lease.Lease{full("a", 1)},
		PutBindings: []lease.Binding{{Lease: full("a", 2)}}, PutHost: host,
	}))
	want, err := db.Load()
	works(t, err)
	works(t, db.Close())
	file := filepath.Join(folder, File)
	before, err := os.ReadFile(file)
	works(t, err)

	got, err := Read(folder)
	works(t, err)
	if !reflect.DeepEqual(got.Saved, want) || got.Schema != schema || got.Path != file || got.Size != int64(len(before)) {
		t.Errorf("read %+v, want %+v", got, want)
	}
	after, err := os.ReadFile(file)
	works(t, err)
	if !bytes.Equal(before, after) {
		t.Error("the file was changed")
	}
}

// An older schema is read without being migrated: it has fewer buckets.
func TestReadOlderSchema(t *testing.T) {
	folder := t.TempDir()
	db, err := Open(folder)
	works(t, err)
	works(t, db.Commit(lease.Change{PutPools: []lease.Pool{pool("a")}, PutLeases: []lease.Lease{full("a", 1)}}))
	works(t, db.bolt.Update(func(tx *bolt.Tx) error {
		return errors.Join(tx.DeleteBucket(bindingBucket), tx.Bucket(metaBucket).Put(schemaKey, []byte("1")))
	}))
	works(t, db.Close())
	got, err := Read(folder)
	if err != nil || got.Schema != 1 || len(got.Leases) != 1 || len(got.Pools) != 1 || got.Bindings != nil {
		t.Errorf("read %+v, %v", got, err)
	}
	b, err := bolt.Open(filepath.Join(folder, File), 0o600, nil)
	works(t, err)
	defer b.Close()
	works(t, b.View(func(tx *bolt.Tx) error {
		if tx.Bucket(bindingBucket) != nil {
			t.Error("it was migrated")
		}
		return nil
	}))
}

func TestReadRefuses(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "none")
	if _, err := Read(missing); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of a missing folder: %v", err)
	}
	if _, err := os.Stat(missing); err == nil {
		t.Error("the folder was made")
	}

	folder := t.TempDir()
	file := filepath.Join(folder, File)
	works(t, os.WriteFile(file, nil, 0o600))
	if _, err := Read(folder); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of an empty file: %v", err)
	}
	works(t, os.Remove(file))

	db, err := Open(folder)
	works(t, err)
	if _, err := Read(folder); !errors.Is(err, ErrLocked) {
		t.Errorf("of a database in use: %v", err)
	}
	works(t, db.bolt.Update(func(tx *bolt.Tx) error { return tx.Bucket(metaBucket).Put(schemaKey, []byte("99")) }))
	works(t, db.Close())
	if _, err := Read(folder); !errors.Is(err, errNewer) || !strings.Contains(err.Error(), "install that version") {
		t.Errorf("of a newer schema: %v", err)
	}
	works(t, os.Truncate(file, 9000))
	if _, err := Read(folder); !errors.Is(err, errDamaged) || !strings.Contains(err.Error(), "restore it from a backup") {
		t.Errorf("of a cut file: %v", err)
	}
}

// Rights are those of the user that is asked about, not of this process.
func TestRightsOf(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("wants root, to give files away")
	}
	const nobody = 65534
	folder := t.TempDir()
	file := filepath.Join(folder, File)
	works(t, Rights(filepath.Join(folder, "none"), nobody))
	if err := Rights(folder, nobody); err == nil || !strings.Contains(err.Error(), "belongs to root, and the daemon runs as nobody") {
		t.Errorf("a folder of root's: %v", err)
	}
	works(t, os.Chown(folder, nobody, -1))
	works(t, Rights(folder, nobody))
	works(t, os.WriteFile(file, nil, 0o600))
	if err := Rights(folder, nobody); err == nil || !strings.Contains(err.Error(), "chown nobody "+file) {
		t.Errorf("a file of root's: %v", err)
	}
	works(t, Rights(folder, 0))
	works(t, os.Chown(file, nobody, -1))
	works(t, Rights(folder, nobody))
	works(t, os.Chmod(file, 0o400))
	if err := Rights(folder, nobody); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("a file that can't be written: %v", err)
	}
}
