package store

import (
	"os"
	"time"
)

// Observe has a function called after each commit, before its callers go on:
// how long it took, how many changes it stored, and its error or nil. Call it
// before the first commit.
func (db *DB) Observe(committed func(took time.Duration, stored int, err error)) {
	db.committed = committed
}

// Path is the database's file.
func (db *DB) Path() string { return db.bolt.Path() }

// Size is the file's in bytes, 0 where that can't be told.
func (db *DB) Size() int64 {
	info, err := os.Stat(db.bolt.Path())
	if err != nil {
		return 0
	}
	return info.Size()
}
