package store

import "github.com/talkingdata/oam-docker-ipam/lease"

// Events implements lease.Store.
func (db *DB) Events(after uint64) ([]lease.Event, error) { return nil, nil }
