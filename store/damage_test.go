package store

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// populated makes a database of several pages and depths and returns its
// bytes.
func populated(t testing.TB) []byte {
	t.Helper()
	folder := t.TempDir()
	db, err := Open(folder)
	works(t, err)
	for p := range 3 {
		id := fmt.Sprintf("10.%d.0.0/16?gateway=10.%d.0.1&id=%s", p, p, strings.Repeat("X", 26))
		some := putPool(pool(id))
		for n := range 200 {
			some.PutLeases = append(some.PutLeases, full(id, n))
			some.PutBindings = append(some.PutBindings, left(full(id, n)))
		}
		works(t, db.Commit(some))
		for n := range 20 {
			works(t, db.Commit(putLease(full(id, n))))
		}
	}
	for n := range 300 {
		works(t, db.Commit(putEvents(eventOf(lease.EventKinds[n%len(lease.EventKinds)], n))))
	}
	works(t, db.Commit(lease.Change{PutHost: host}))
	works(t, db.Close())
	data, err := os.ReadFile(filepath.Join(folder, File))
	works(t, err)
	return data
}

// folderWith makes a data folder with a database of these bytes.
func folderWith(t testing.TB, data []byte) string {
	t.Helper()
	folder := t.TempDir()
	works(t, os.WriteFile(filepath.Join(folder, File), data, 0o600))
	return folder
}

// refuses opens a folder in vain, and checks that the file stays as it is.
func refuses(t testing.TB, folder string, parts ...string) {
	t.Helper()
	before := sum(t, folder)
	db, err := Open(folder)
	if err == nil {
		_ = db.Close()
		t.Error("it was opened")
		return
	}
	for _, part := range append(parts, filepath.Join(folder, File)) {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("no %q in: %v", part, err)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("more than a line: %v", err)
	}
	if sum(t, folder) != before {
		t.Error("the file was changed")
	}
}

func sum(t testing.TB, folder string) [sha256.Size]byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(folder, File))
	works(t, err)
	return sha256.Sum256(data)
}

func TestLockedFile(t *testing.T) {
	folder := t.TempDir()
	db := open(t, folder)
	works(t, db.Commit(putPool(pool("a"))))
	refuses(t, folder, "locked", "another oam-docker-ipam")
	works(t, db.Commit(putPool(pool("b")))) // the first is undisturbed
}

func TestNewerSchema(t *testing.T) {
	folder := t.TempDir()
	db, err := Open(folder)
	works(t, err)
	works(t, db.Commit(putPool(pool("a"))))
	works(t, db.bolt.Update(func(tx *bolt.Tx) error { return tx.Bucket(metaBucket).Put(schemaKey, []byte("3")) }))
	works(t, db.Close())
	refuses(t, folder, "newer version", "schema 3", "knows 2")
	refuses(t, folder, "newer version") // and isn't left locked
}

func TestOddSchemas(t *testing.T) {
	for _, text := range []string{"", "0", "-1", "one", "1.0", "1\n"} {
		folder := t.TempDir()
		db, err := Open(folder)
		works(t, err)
		works(t, db.bolt.Update(func(tx *bolt.Tx) error { return tx.Bucket(metaBucket).Put(schemaKey, []byte(text)) }))
		works(t, db.Close())
		refuses(t, folder, "damaged", fmt.Sprintf("schema %q", text))
	}
}

func TestMissingBucket(t *testing.T) {
	for _, bucket := range [][]byte{metaBucket, poolBucket, leaseBucket, bindingBucket} {
		folder := t.TempDir()
		db, err := Open(folder)
		works(t, err)
		works(t, db.bolt.Update(func(tx *bolt.Tx) error { return tx.DeleteBucket(bucket) }))
		works(t, db.Close())
		refuses(t, folder, "damaged", "no bucket "+string(bucket))
	}
}

// A start that was cut short before its first commit leaves an empty file, or
// one with nothing in it.
func TestEmptyFile(t *testing.T) {
	bare := filepath.Join(t.TempDir(), "bare")
	b, err := bolt.Open(bare, 0o600, nil)
	works(t, err)
	works(t, b.Close())
	nothing, err := os.ReadFile(bare)
	works(t, err)
	for _, data := range [][]byte{nil, nothing} {
		db := open(t, folderWith(t, data))
		works(t, db.Commit(putPool(pool("a"))))
	}
}

func TestForeignFiles(t *testing.T) {
	random := make([]byte, 100000)
	r, seed := seeded()
	for i := range random {
		random[i] = byte(r.Uint32())
	}
	for name, data := range map[string][]byte{
		"a byte": {0}, "text": []byte("DHCP_SERVER=192.0.2.1\n"), "zeros": make([]byte, 65536), "random bytes": random, "random page": random[:4096],
	} {
		t.Run(name, func(t *testing.T) {
			refuses(t, folderWith(t, data))
			if t.Failed() {
				t.Logf("seed %d", seed)
			}
		})
	}
	t.Run("folder", func(t *testing.T) {
		folder := t.TempDir()
		works(t, os.Mkdir(filepath.Join(folder, File), 0o700))
		if _, err := Open(folder); err == nil || !strings.Contains(err.Error(), File) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("file as data folder", func(t *testing.T) {
		if _, err := Open(filepath.Join(folderWith(t, nil), File)); err == nil || !strings.Contains(err.Error(), "data folder") {
			t.Errorf("error %v", err)
		}
	})
}

func TestUnreadableValues(t *testing.T) {
	bad := func(bucket []byte, value any) func(tx *bolt.Tx) error {
		return func(tx *bolt.Tx) error {
			text, err := json.Marshal(value)
			return errors.Join(err, tx.Bucket(bucket).Put([]byte("bad"), text))
		}
	}
	for name, put := range map[string]func(tx *bolt.Tx) error{
		"pool":               bad(poolBucket, map[string]string{"subnet": "x"}),
		"pool of another":    bad(poolBucket, pool("bat")),
		"lease":              bad(leaseBucket, 1),
		"lease of another":   bad(leaseBucket, full("a", 1)),
		"binding":            bad(bindingBucket, []string{}),
		"binding of another": bad(bindingBucket, left(full("a", 1))),
		"host": func(tx *bolt.Tx) error {
			return tx.Bucket(metaBucket).Put(hostKey, []byte(`{"mac":"bad"}`))
		},
	} {
		db := open(t, t.TempDir())
		works(t, db.bolt.Update(put))
		kind, _, another := strings.Cut(name, " ")
		_, err := db.Load()
		if err == nil || !strings.Contains(err.Error(), "read "+kind) || !strings.Contains(err.Error(), "bad") || errors.Is(err, errDamaged) != another {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

// Each key of a binding is of a subnet and an identity; one that differs in
// either is of another.
func TestBindingUnderAnothersKey(t *testing.T) {
	b := left(full("a", 1))
	value, err := json.Marshal(b)
	works(t, err)
	subnet, id := b.Key().Subnet, b.Key().ClientID
	for _, key := range []lease.BindingKey{
		{Subnet: "10.0.0.0/9", ClientID: id}, {Subnet: subnet, ClientID: id + "\x00"}, {Subnet: subnet}, {Subnet: subnet + "\x00", ClientID: id},
	} {
		db := open(t, t.TempDir())
		works(t, db.bolt.Update(func(tx *bolt.Tx) error { return tx.Bucket(bindingBucket).Put(bindingKey(key), value) }))
		if _, err := db.Load(); !errors.Is(err, errDamaged) {
			t.Errorf("under %q: error %v", key, err)
		}
	}
}

func seeded() (*rand.Rand, uint64) {
	seed := rand.Uint64()
	return rand.New(rand.NewPCG(seed, 0)), seed
}

// opener is a child that opens databases, since some damage could kill it.
type opener struct {
	in   io.WriteCloser
	out  *bufio.Scanner
	errs *bytes.Buffer
	wait func() error
	kill func()
}

func newOpener(t *testing.T) *opener {
	t.Helper()
	cmd := child(t, "opener")
	o := &opener{errs: &bytes.Buffer{}, wait: cmd.Wait, kill: func() { _ = cmd.Process.Kill() }}
	cmd.Stderr = o.errs
	var err error
	o.in, err = cmd.StdinPipe()
	works(t, err)
	out, err := cmd.StdoutPipe()
	works(t, err)
	o.out = bufio.NewScanner(out)
	works(t, cmd.Start())
	return o
}

func (o *opener) close() error {
	_ = o.in.Close()
	return o.wait()
}

// errDied: the child didn't survive the file.
var errDied = errors.New("the process died")

// open returns what the child says of a folder.
func (o *opener) open(folder string) (refusal string, err error) {
	hung := time.AfterFunc(10*time.Second, o.kill)
	defer hung.Stop()
	if _, err := fmt.Fprintln(o.in, folder); err == nil && o.out.Scan() {
		answer := strings.TrimPrefix(o.out.Text(), "opened: ")
		if answer == "<nil>" {
			answer = ""
		}
		return answer, nil
	}
	if o.out.Err() != nil {
		o.kill() // an endless line
	}
	err = cmp.Or(o.out.Err(), o.close())
	return "", fmt.Errorf("%w (%w): %.600s", errDied, err, o.errs)
}

// eachDamage opens many variants of a sound database in a child. None may kill
// it, and what is refused must stay as it is.
func eachDamage(t *testing.T, count int, damage func(r *rand.Rand, data []byte) []byte) {
	t.Helper()
	r, seed := seeded()
	sane := populated(t)
	folder := t.TempDir()
	path := filepath.Join(folder, File)
	o := newOpener(t)
	defer func() { _ = o.close() }()
	deaths, refused := 0, 0
	for n := range count {
		works(t, os.RemoveAll(path))
		data := damage(r, bytes.Clone(sane))
		works(t, os.WriteFile(path, data, 0o600))
		refusal, err := o.open(folder)
		if err != nil {
			if deaths++; deaths < 4 {
				t.Errorf("seed %d, number %d: %v", seed, n, err)
			}
			o = newOpener(t)
		}
		if refusal == "" {
			continue
		}
		refused++
		if len(refusal) > 1000 {
			t.Errorf("seed %d, number %d: %d characters: %.300s…", seed, n, len(refusal), refusal)
		}
		if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, data) {
			t.Errorf("seed %d, number %d: refused (%s), but the file was changed (%v)", seed, n, refusal, err)
		}
	}
	t.Logf("seed %d: %d of %d files were refused", seed, refused, count)
	if refused == 0 {
		t.Error("no file was refused: the damage does nothing")
	}
	if deaths > 0 {
		t.Errorf("%d of %d files killed the process", deaths, count)
	}
}

func TestTruncatedFile(t *testing.T) {
	eachDamage(t, 60, func(r *rand.Rand, data []byte) []byte { return data[:1+r.IntN(len(data)-1)] })
}

func TestFlippedBytes(t *testing.T) {
	page := os.Getpagesize()
	eachDamage(t, 400, func(r *rand.Rand, data []byte) []byte {
		for range 1 + r.IntN(3) {
			at := r.IntN(len(data) - 8)
			if r.IntN(2) == 0 { // where a page says what it is and where its elements are
				at = r.IntN(len(data)/page)*page + r.IntN(64)
			}
			if r.IntN(3) == 0 {
				binary.LittleEndian.PutUint64(data[at:], r.Uint64()>>r.IntN(64))
			} else {
				data[at] ^= 1 << r.IntN(8)
			}
		}
		return data
	})
}

// Pages in each other's places, as a disk that lost writes leaves them.
func TestSwappedPages(t *testing.T) {
	page := os.Getpagesize()
	eachDamage(t, 100, func(r *rand.Rand, data []byte) []byte {
		from, to := r.IntN(len(data)/page)*page, r.IntN(len(data)/page)*page
		copy(data[to:to+page], bytes.Clone(data[from:from+page]))
		return data
	})
}
