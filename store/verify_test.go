package store

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	bolt "go.etcd.io/bbolt"
)

// Damage to one page of each kind that holds something: verify alone must see
// it, since bbolt would meet it in a goroutine of its own.
func TestVerify(t *testing.T) {
	sane := populated(t)
	size := os.Getpagesize()
	little := binary.LittleEndian
	element := func(page []byte, n int) []byte { return page[pageHeader+n*pageElement:] }
	for name, c := range map[string]struct {
		kind   string
		damage func(page []byte)
	}{
		"leaf's id":       {"leaf", func(p []byte) { little.PutUint64(p, little.Uint64(p)+1) }},
		"branch's id":     {"branch", func(p []byte) { little.PutUint64(p, 0) }},
		"no kind":         {"leaf", func(p []byte) { little.PutUint16(p[8:], 0) }},
		"two kinds":       {"leaf", func(p []byte) { little.PutUint16(p[8:], branchPage|leafPage) }},
		"empty branch":    {"branch", func(p []byte) { little.PutUint16(p[10:], 0) }},
		"many elements":   {"leaf", func(p []byte) { little.PutUint16(p[10:], 0xffff) }},
		"overflow":        {"leaf", func(p []byte) { little.PutUint32(p[12:], 0xffffffff) }},
		"some overflow":   {"leaf", func(p []byte) { little.PutUint32(p[12:], 1) }},
		"key's place":     {"leaf", func(p []byte) { little.PutUint32(element(p, 0)[4:], 0xfffffff0) }},
		"key's length":    {"leaf", func(p []byte) { little.PutUint32(element(p, 0)[8:], uint32(size)) }},
		"value's length":  {"leaf", func(p []byte) { little.PutUint32(element(p, 0)[12:], uint32(size)) }},
		"branch's key":    {"branch", func(p []byte) { little.PutUint32(element(p, 0), 0xffffffff) }},
		"child is a meta": {"branch", func(p []byte) { little.PutUint64(element(p, 0)[8:], 1) }},
		"child far away":  {"branch", func(p []byte) { little.PutUint64(element(p, 0)[8:], 1<<63) }},
		"child is itself": {"branch", func(p []byte) { copy(element(p, 0)[8:16], p) }},
		"child twice":     {"branch", func(p []byte) { copy(element(p, 1)[8:16], element(p, 0)[8:16]) }},
		"keys not in order": {"leaf", func(p []byte) {
			e := element(p, 1)
			e[little.Uint32(e[4:])] = 0
		}},
		"key under its parent's": {"leaf", func(p []byte) {
			e := element(p, 0)
			e[little.Uint32(e[4:])] = 0
		}},
		"key past its parent's": {"leaf", func(p []byte) {
			e := element(p, int(little.Uint16(p[10:]))-1)
			e[little.Uint32(e[4:])] = 0xff
		}},
		"branch's keys not in order": {"branch", func(p []byte) {
			e := element(p, 1)
			e[little.Uint32(e)] = 0
		}},
	} {
		t.Run(name, func(t *testing.T) {
			folder := folderWith(t, sane)
			path := filepath.Join(folder, File)
			works(t, verify(path))
			page := deepPage(t, path, c.kind)
			data, err := os.ReadFile(path)
			works(t, err)
			c.damage(data[page*size : (page+1)*size])
			works(t, os.WriteFile(path, data, 0o600))
			if err := verify(path); !errors.Is(err, errDamaged) {
				t.Errorf("page %d: %v", page, err)
			}
		})
	}
}

// deepPage finds the topmost branch page of the leases, or one of the leaves
// below it that is neither the first nor the last.
func deepPage(t *testing.T, path, kind string) (id int) {
	t.Helper()
	b, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, PreLoadFreelist: true})
	works(t, err)
	defer b.Close()
	works(t, b.View(func(tx *bolt.Tx) error {
		id = int(tx.Bucket(leaseBucket).Root())
		if kind == "leaf" {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			page := func() []byte { return data[id*os.Getpagesize():] }
			for binary.LittleEndian.Uint16(page()[8:]) == branchPage {
				id = int(binary.LittleEndian.Uint64(page()[pageHeader+pageElement+8:]))
			}
		}
		info, err := tx.Page(id)
		if err == nil && info.Type != kind {
			err = errors.New("it is a " + info.Type)
		}
		return err
	}))
	return id
}

// Small buckets lie inside of their parent's page.
func TestVerifySmallBucket(t *testing.T) {
	folder := t.TempDir()
	db, err := Open(folder)
	works(t, err)
	works(t, db.Commit(putPool(pool("a"))))
	works(t, db.Close())
	path := filepath.Join(folder, File)
	works(t, verify(path))
	sane, err := os.ReadFile(path)
	works(t, err)
	b, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, PreLoadFreelist: true})
	works(t, err)
	var root int
	works(t, b.View(func(tx *bolt.Tx) error { root = int(tx.Cursor().Bucket().Root()); return nil }))
	works(t, b.Close())
	little := binary.LittleEndian
	for name, damage := range map[string]func(head, value []byte){
		"shorter than its header": func(head, _ []byte) { little.PutUint32(head[12:], bucketHeader-1) },
		"without its page":        func(head, _ []byte) { little.PutUint32(head[12:], bucketHeader+pageHeader-1) },
		"branch":                  func(_, value []byte) { little.PutUint16(value[bucketHeader+8:], branchPage) },
		"many elements":           func(_, value []byte) { little.PutUint16(value[bucketHeader+10:], 5) },
		"root is a meta":          func(_, value []byte) { little.PutUint64(value, 1) },
		"root is its parent":      func(_, value []byte) { little.PutUint64(value, uint64(root)) },
	} {
		data := append([]byte(nil), sane...)
		head := data[root*os.Getpagesize()+pageHeader:]
		damage(head, head[little.Uint32(head[4:])+little.Uint32(head[8:]):])
		works(t, os.WriteFile(path, data, 0o600))
		if err := verify(path); !errors.Is(err, errDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
