package store

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"

	bolt "go.etcd.io/bbolt"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// ErrNoPool: a lease was put into a pool that isn't there.
var ErrNoPool = errors.New("no such pool in the database")

// change is a lease.Change made ready, so that nothing is left to be refused
// between its first step and its last.
type change struct {
	steps  []step
	events []slot
	pools  []string // of its leases; all must be there before the first step

	// done and err are its caller's answer, guarded by DB.writer.
	done bool
	err  error
}

// step puts a value under a key, or drops the key where the value is nil.
type step struct{ bucket, key, value []byte }

// prepare makes a change ready, in the order of its fields. Whatever can be
// refused without a look at the database is refused here.
func prepare(c lease.Change) (*change, error) {
	ready := &change{}
	var refusal error
	add := func(s step, err error) {
		ready.steps = append(ready.steps, s)
		refusal = cmp.Or(refusal, err)
	}
	for _, key := range c.DropBindings {
		add(step{bucket: bindingBucket, key: bindingKey(key)}, nil)
	}
	for _, key := range c.DropLeases {
		add(step{bucket: leaseBucket, key: leaseKey(key)}, nil)
	}
	for _, id := range c.DropPools {
		add(step{bucket: poolBucket, key: []byte(id)}, nil)
	}
	for _, pool := range c.PutPools {
		add(pools.put(pool))
	}
	for _, l := range c.PutLeases {
		s, err := leases.put(l)
		switch {
		case slices.ContainsFunc(c.PutPools, func(p lease.Pool) bool { return p.ID == l.Pool }):
		case slices.Contains(c.DropPools, l.Pool):
			err = noPool(l.Pool)
		default:
			ready.pools = append(ready.pools, l.Pool)
		}
		add(s, err)
	}
	for _, b := range c.PutBindings {
		add(bindings.put(b))
	}
	if c.PutHost != (lease.HostIdentity{}) {
		add(hosts.put(c.PutHost))
	}
	for _, e := range c.PutEvents {
		ready.events = append(ready.events, newSlot(e))
	}
	return ready, refusal
}

// refusal is why a change can't be made, asked before its first step.
func (c *change) refusal(tx *bolt.Tx) error {
	for _, id := range c.pools {
		if tx.Bucket(poolBucket).Get([]byte(id)) == nil {
			return noPool(id)
		}
	}
	return nil
}

func noPool(id string) error { return fmt.Errorf("put a lease of pool %.200q: %w", id, ErrNoPool) }

func (s step) apply(tx *bolt.Tx) error {
	bucket := tx.Bucket(s.bucket)
	if s.value != nil {
		return bucket.Put(s.key, s.value)
	}
	if bytes.Equal(s.bucket, poolBucket) {
		if err := dropLeases(tx.Bucket(leaseBucket), string(s.key)); err != nil {
			return err
		}
	}
	return bucket.Delete(s.key)
}

// dropLeases drops a pool's leases.
func dropLeases(bucket *bolt.Bucket, pool string) error {
	first := leaseKey(lease.Key{Pool: pool})
	prefix := first[:len(pool)+1]
	var keys [][]byte
	c := bucket.Cursor()
	for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, _ = c.Next() {
		// An ID that begins with all of the prefix makes longer keys.
		if len(k) == len(first) {
			keys = append(keys, bytes.Clone(k))
		}
	}
	for _, k := range keys {
		if err := bucket.Delete(k); err != nil {
			return err
		}
	}
	return nil
}
