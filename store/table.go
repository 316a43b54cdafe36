package store

import (
	"bytes"
	"encoding/json"
	"fmt"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// table is a bucket of values, each under the key that follows from it.
type table[T any] struct {
	bucket []byte
	name   string // of one value, for people
	key    func(T) []byte
}

var (
	pools    = table[lease.Pool]{poolBucket, "pool", func(p lease.Pool) []byte { return []byte(p.ID) }}
	leases   = table[lease.Lease]{leaseBucket, "lease", func(l lease.Lease) []byte { return leaseKey(l.Key()) }}
	bindings = table[lease.Binding]{bindingBucket, "binding", func(b lease.Binding) []byte { return bindingKey(b.Key()) }}
	// hosts has one value, among others in its bucket.
	hosts = table[lease.HostIdentity]{metaBucket, "host identity", func(lease.HostIdentity) []byte { return hostKey }}
)

func leaseKey(k lease.Key) []byte {
	return append(append([]byte(k.Pool), 0), k.MAC[:]...)
}

// bindingKey can be any: the first NUL ends the subnet, which has none.
func bindingKey(k lease.BindingKey) []byte {
	return append(append([]byte(k.Subnet), 0), k.ClientID...)
}

// put makes the step that stores a value. What bbolt wouldn't take is refused.
func (t table[T]) put(value T) (step, error) {
	key := t.key(value)
	data, err := json.Marshal(value)
	switch {
	case err != nil:
	case len(key) == 0:
		err = bolterrors.ErrKeyRequired
	case len(key) > bolt.MaxKeySize:
		err = bolterrors.ErrKeyTooLarge
	}
	if err != nil {
		err = fmt.Errorf("put %s %.200q: %w", t.name, key, err)
	}
	return step{t.bucket, key, data}, err
}

// decode reads a value, which must fit its key.
func (t table[T]) decode(key, data []byte) (T, error) {
	var value T
	err := json.Unmarshal(data, &value)
	if fit := t.key(value); err == nil && !bytes.Equal(fit, key) {
		err = fmt.Errorf("%w: it belongs under %.200q", errDamaged, fit)
	}
	if err != nil {
		return value, fmt.Errorf("read %s %.200q: %w", t.name, key, err)
	}
	return value, nil
}

// loadInto reads all values of the bucket.
func (t table[T]) loadInto(all *[]T) func(*bolt.Tx) error {
	return func(tx *bolt.Tx) error {
		return tx.Bucket(t.bucket).ForEach(func(key, data []byte) error {
			value, err := t.decode(key, data)
			*all = append(*all, value)
			return err
		})
	}
}
