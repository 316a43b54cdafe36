package store

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"

	bolt "go.etcd.io/bbolt"
)

// The layout of bbolt's pages, as far as it points at something.
const (
	pageHeader    = 16 // id uint64, flags uint16, count uint16, overflow uint32
	pageElement   = 16 // branch: pos, ksize uint32, child uint64; leaf: flags, pos, ksize, vsize uint32
	branchPage    = 1
	leafPage      = 2
	bucketElement = 1  // flag of a leaf's element whose value is a bucket
	bucketHeader  = 16 // root uint64, sequence uint64; root 0: the bucket's only page follows
)

// verify checks that everything in the file points into the file, twice at
// nothing, and that keys are in order. bbolt trusts its pages and walks them in
// goroutines of its own, at Open already: what it meets there in a cut or
// damaged file ends the process, since nobody else can recover in them.
func verify(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	// Read-only, bbolt takes the lock, chooses the valid one of its two meta
	// pages, and leaves all others alone.
	b, err := bolt.Open(path, 0, &bolt.Options{Timeout: lockWait, ReadOnly: true})
	if err != nil {
		return err
	}
	defer b.Close()
	return b.View(func(tx *bolt.Tx) error {
		if tx.Size() > info.Size() {
			return fmt.Errorf("%w: %d of %d bytes are there", errDamaged, info.Size(), tx.Size())
		}
		size := int64(b.Info().PageSize)
		w := walker{file: file, size: size, seen: make([]bool, tx.Size()/size)}
		return w.page(uint64(tx.Cursor().Bucket().Root()), nil, nil)
	})
}

// walker reads the pages of a file, each once.
type walker struct {
	file *os.File
	size int64  // of a page
	seen []bool // of all pages that can be used
}

// page checks a page and what is below it. Its keys must not be under least, and
// be under end, unless these are nil.
func (w *walker) page(id uint64, least, end []byte) error {
	damaged := fmt.Errorf("%w: page %d", errDamaged, id)
	// The first two are the meta pages.
	if id < 2 || id >= uint64(len(w.seen)) {
		return damaged
	}
	header := make([]byte, pageHeader)
	if _, err := w.file.ReadAt(header, int64(id)*w.size); err != nil {
		return fmt.Errorf("%w: %w", damaged, err)
	}
	pages := uint64(binary.LittleEndian.Uint32(header[12:])) + 1
	if binary.LittleEndian.Uint64(header) != id || pages > uint64(len(w.seen))-id {
		return damaged
	}
	for i := range pages {
		if w.seen[id+i] {
			return damaged
		}
		w.seen[id+i] = true
	}
	page := make([]byte, int64(pages)*w.size)
	if _, err := w.file.ReadAt(page, int64(id)*w.size); err != nil {
		return fmt.Errorf("%w: %w", damaged, err)
	}
	return w.elements(page, least, end, damaged)
}

// elements checks the content of a page, or of a small bucket, which lies in
// the page of its parent.
func (w *walker) elements(page, least, end []byte, damaged error) error {
	kind, count := binary.LittleEndian.Uint16(page[8:]), int(binary.LittleEndian.Uint16(page[10:]))
	if kind != leafPage && (kind != branchPage || count == 0) || pageHeader+count*pageElement > len(page) {
		return damaged
	}
	// The key and value of an element begin pos behind it.
	all := make([]struct{ key, value, head []byte }, count)
	for i := range all {
		head := page[pageHeader+i*pageElement:]
		field := func(n int) uint64 { return uint64(binary.LittleEndian.Uint32(head[4*n:])) }
		pos, ksize, vsize := field(0), field(1), uint64(0)
		if kind == leafPage {
			pos, ksize, vsize = field(1), field(2), field(3)
		}
		if pos+ksize+vsize > uint64(len(head)) {
			return damaged
		}
		all[i].head, all[i].key, all[i].value = head, head[pos:pos+ksize], head[pos+ksize:pos+ksize+vsize]
		below := bytes.Compare(all[i].key, least) < 0
		if i > 0 {
			below = bytes.Compare(all[i].key, all[i-1].key) <= 0
		}
		if below || end != nil && bytes.Compare(all[i].key, end) >= 0 {
			return damaged
		}
	}
	for i, e := range all {
		var err error
		switch {
		case kind == branchPage:
			next := end
			if i+1 < count {
				next = all[i+1].key
			}
			err = w.page(binary.LittleEndian.Uint64(e.head[8:]), e.key, next)
		case binary.LittleEndian.Uint32(e.head)&bucketElement == 0:
		case len(e.value) < bucketHeader:
			err = damaged
		default:
			err = w.bucket(e.value, damaged)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *walker) bucket(value []byte, damaged error) error {
	if root := binary.LittleEndian.Uint64(value); root != 0 {
		return w.page(root, nil, nil)
	}
	small := value[bucketHeader:]
	if len(small) < pageHeader || binary.LittleEndian.Uint16(small[8:]) != leafPage {
		return damaged
	}
	return w.elements(small, nil, nil, damaged)
}
