package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// open opens a database that must be usable, closes it at the test's end and
// lets bbolt check it then.
func open(t testing.TB, folder string) *DB {
	t.Helper()
	db, err := Open(folder)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		sound(t, db)
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return db
}

// sound runs bbolt's own check.
func sound(t testing.TB, db *DB) {
	t.Helper()
	err := db.bolt.View(func(tx *bolt.Tx) error {
		var errs []error
		for err := range tx.Check() {
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	})
	if err != nil {
		t.Error(err)
	}
}

func works(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mac is the n-th container's.
func mac(n int) lease.MAC {
	return lease.MAC{2, 0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}
}

// pool is one with nothing but its ID and subnet.
func pool(id string) lease.Pool {
	return lease.Pool{ID: id, Subnet: netip.MustParsePrefix("10.0.0.0/8")}
}

// full is a lease with a value in every field.
func full(pool string, n int) lease.Lease {
	at := time.Date(2026, 3, 1, 12, 0, 0, 123456789, time.UTC)
	return lease.Lease{
		Pool: pool, MAC: mac(n), Name: fmt.Sprintf("web-%d \"ä\"\x00", n), ClientID: binary.BigEndian.AppendUint32([]byte{1, 0xff, 0}, uint32(n)),
		Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), 8),
		Server: netip.MustParseAddr("198.51.100.1"), Via: netip.MustParseAddrPort("198.51.100.2:1067"),
		Options:  []byte{1, 4, 255, 255, 255, 0, 51, 4, 0, 0, 14, 16},
		Obtained: at, Renew: at.Add(time.Hour), Rebind: at.Add(2*time.Hour + 1), Expires: at.Add(136 * 365 * 24 * time.Hour),
	}
}

// left is the binding of a lease whose endpoint has left.
func left(l lease.Lease) lease.Binding {
	return lease.Binding{
		Lease: l, Left: l.Obtained.Add(time.Minute),
		Options: lease.Options{
			Servers: []lease.Server{{Host: "198.51.100.1", Port: 67}, {Host: "dhcp.example", Port: 6767}},
			Relay:   netip.MustParseAddr("203.0.113.1"), ClientID: lease.ClientIDName, ReleaseDelay: new(90 * time.Second),
			OnLost: lease.RestartLost, Conflict: lease.ConflictRFC, ConflictInterface: "eth0",
		},
	}
}

// host is an identity with a value in every field.
var host = lease.HostIdentity{ID: "0123456789ab", Machine: "ba9876543210", MAC: mac(1)}

// Changes of one kind.

func putPool(p lease.Pool) lease.Change   { return lease.Change{PutPools: []lease.Pool{p}} }
func putLease(l lease.Lease) lease.Change { return lease.Change{PutLeases: []lease.Lease{l}} }
func dropPool(id string) lease.Change     { return lease.Change{DropPools: []string{id}} }

func putBinding(b lease.Binding) lease.Change {
	return lease.Change{PutBindings: []lease.Binding{b}}
}

func dropLease(pool string, mac lease.MAC) lease.Change {
	return lease.Change{DropLeases: []lease.Key{{Pool: pool, MAC: mac}}}
}

// leave turns a lease into a binding, comeBack is its inverse.
func leave(l lease.Lease) lease.Change {
	return lease.Change{DropLeases: []lease.Key{l.Key()}, PutBindings: []lease.Binding{left(l)}}
}

func comeBack(l lease.Lease) lease.Change {
	return lease.Change{DropBindings: []lease.BindingKey{left(l).Key()}, PutLeases: []lease.Lease{l}}
}

// content is what a database holds, in its own order.
func content(t testing.TB, db *DB) lease.Saved {
	t.Helper()
	saved, err := db.Load()
	works(t, err)
	return saved
}

// holds compares a database with what it should hold.
func holds(t testing.TB, db *DB, want lease.Saved) {
	t.Helper()
	if got := content(t, db); !reflect.DeepEqual(got, want) {
		t.Errorf("it holds\n%+v, want\n%+v", got, want)
	}
}

func TestRoundTrip(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "a", "b")
	db, err := Open(folder)
	works(t, err)
	holds(t, db, lease.Saved{})
	infinite := lease.Lease{
		Pool: "b", MAC: mac(3), ClientID: []byte{1}, Prefix: netip.MustParsePrefix("192.0.2.9/24"),
		Server: netip.MustParseAddr("198.51.100.1"), Obtained: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC),
	}
	released := lease.Binding{Lease: infinite, Left: infinite.Obtained, Released: true}
	want := lease.Saved{
		Pools: []lease.Pool{
			pool("a"),
			{
				ID: "b", Subnet: netip.MustParsePrefix("192.0.2.0/24"), Range: netip.MustParsePrefix("192.0.2.128/25"),
				Gateway:  netip.MustParseAddr("192.0.2.1"),
				Reserved: []netip.Addr{netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("192.0.2.3")},
				Options:  left(infinite).Options,
				AuxUntil: time.Date(2026, 3, 1, 12, 1, 0, 1, time.UTC),
			},
		},
		Leases:   []lease.Lease{full("a", 1), full("a", 2), full("b", 1), infinite},
		Bindings: []lease.Binding{left(full("a", 3)), left(full("gone", 4)), released},
		Host:     host,
	}
	for _, p := range want.Pools {
		works(t, db.Commit(putPool(p)))
	}
	for _, l := range want.Leases {
		works(t, db.Commit(putLease(l)))
	}
	for _, b := range want.Bindings {
		works(t, db.Commit(putBinding(b)))
	}
	works(t, db.Commit(lease.Change{PutHost: host}))
	for range 2 {
		holds(t, db, want)
		works(t, db.Close())
		db, err = Open(folder)
		works(t, err)
	}

	// Replaced and dropped, once and again.
	want.Leases[1].Name = "other"
	want.Pools[0].Gateway = netip.MustParseAddr("10.0.0.1")
	want.Bindings[0].Released = true
	want.Host.MAC = mac(2)
	works(t, db.Commit(lease.Change{
		PutPools: want.Pools[:1], PutLeases: want.Leases[1:2], PutBindings: want.Bindings[:1], PutHost: want.Host,
	}))
	unknown := lease.Change{
		DropBindings: []lease.BindingKey{{}, {Subnet: "10.0.0.0/8"}}, DropLeases: []lease.Key{{}, {Pool: "unknown", MAC: mac(1)}},
		DropPools: []string{"", "unknown"},
	}
	for range 2 {
		works(t, db.Commit(dropLease("a", mac(1))))
		works(t, db.Commit(lease.Change{DropBindings: []lease.BindingKey{released.Key()}}))
		works(t, db.Commit(unknown))
	}
	want.Leases, want.Bindings = want.Leases[1:], want.Bindings[:2]
	holds(t, db, want)
	works(t, db.Close())
}

// What comes back is the same instant, whatever clock and zone it came with.
func TestTimes(t *testing.T) {
	now := time.Now() // with a monotonic reading
	for _, at := range []time.Time{
		{}, now, now.UTC(), now.In(time.FixedZone("east", 5*3600+45*60)), time.Date(9999, 12, 31, 23, 59, 59, 999999999, time.UTC),
	} {
		folder := t.TempDir()
		db, err := Open(folder)
		works(t, err)
		p, l := pool("a"), full("a", 1)
		p.AuxUntil = at
		l.Obtained, l.Renew, l.Rebind, l.Expires, l.BootTime = at, at, at, at, 1<<62+1
		b := left(l)
		b.Left = at
		works(t, db.Commit(lease.Change{PutPools: []lease.Pool{p}, PutLeases: []lease.Lease{l}, PutBindings: []lease.Binding{b}}))
		works(t, db.Close())
		saved := content(t, open(t, folder))
		p, l, b = saved.Pools[0], saved.Leases[0], saved.Bindings[0]
		for name, got := range map[string]time.Time{
			"aux": p.AuxUntil, "obtained": l.Obtained, "renew": l.Renew, "rebind": l.Rebind, "expires": l.Expires,
			"left": b.Left, "binding's expires": b.Lease.Expires,
		} {
			if !got.Equal(at) || got.IsZero() != at.IsZero() || strings.Contains(got.String(), "m=") {
				t.Errorf("%s: %v was put, %v came back", name, at, got)
			}
		}
		if l.BootTime != 1<<62+1 {
			t.Errorf("boot time %d", l.BootTime)
		}
	}
}

// Client identifiers are any bytes, up to what an option can hold.
func TestBindingKeys(t *testing.T) {
	long := bytes.Repeat([]byte{0xff}, 254)
	ids := [][]byte{nil, {0}, {0, 0}, {0, 'a'}, {'a'}, {'0', 'a'}, {'a', 0}, {'a', 0, 'b'}, {1, 2, 0, 0, 0, 0, 1}, []byte("10.0.0.0/8\x00"), make([]byte, 254), long[:253], long}
	prefixes := []string{"10.0.0.1/8", "10.0.0.1/9", "128.0.0.1/1", "128.0.0.1/10"}
	folder := t.TempDir()
	db, err := Open(folder)
	works(t, err)
	all := map[lease.BindingKey]lease.Binding{}
	for _, prefix := range prefixes {
		for _, id := range ids {
			b := left(full("a", len(all)))
			b.Lease.Prefix, b.Lease.ClientID = netip.MustParsePrefix(prefix), id
			all[b.Key()] = b
			works(t, db.Commit(putBinding(b)))
		}
	}
	if want := len(ids) * len(prefixes); len(all) != want {
		t.Fatalf("%d keys, want %d", len(all), want)
	}
	works(t, db.Close())
	db = open(t, folder)
	compare := func() {
		t.Helper()
		bindings := content(t, db).Bindings
		if len(bindings) != len(all) {
			t.Errorf("%d bindings, want %d", len(bindings), len(all))
		}
		for _, b := range bindings {
			if !reflect.DeepEqual(b, all[b.Key()]) {
				t.Errorf("the binding of %q is of %q", b.Key(), all[b.Key()].Key())
			}
		}
	}
	compare()
	for key := range all {
		works(t, db.Commit(lease.Change{DropBindings: []lease.BindingKey{key}}))
		delete(all, key)
		compare()
	}
}

// The identity stays until another one is put.
func TestHost(t *testing.T) {
	folder := t.TempDir()
	for _, id := range []lease.HostIdentity{host, {ID: "x"}, {Machine: "y"}, {MAC: mac(9)}} {
		db, err := Open(folder)
		works(t, err)
		works(t, db.Commit(lease.Change{PutHost: id}))
		works(t, db.Commit(putPool(pool("a"))))
		works(t, db.Close())
		db, err = Open(folder)
		works(t, err)
		if got := content(t, db).Host; got != id {
			t.Errorf("%+v came back, want %+v", got, id)
		}
		works(t, db.Close())
	}
}

// The steps of a change go by its fields: what is dropped can be put again.
func TestOrderWithinAChange(t *testing.T) {
	db := open(t, t.TempDir())
	a, b := full("a", 1), left(full("a", 2))
	works(t, db.Commit(lease.Change{PutPools: []lease.Pool{pool("a")}, PutLeases: []lease.Lease{full("a", 0), a}, PutBindings: []lease.Binding{b}}))
	a.Name, b.Released = "other", true
	works(t, db.Commit(lease.Change{
		DropBindings: []lease.BindingKey{b.Key()}, DropLeases: []lease.Key{a.Key()}, DropPools: []string{"a"},
		PutPools: []lease.Pool{pool("a")}, PutLeases: []lease.Lease{a}, PutBindings: []lease.Binding{b}, PutHost: host,
	}))
	holds(t, db, lease.Saved{Pools: []lease.Pool{pool("a")}, Leases: []lease.Lease{a}, Bindings: []lease.Binding{b}, Host: host})
}

func TestEmptyChange(t *testing.T) {
	db := open(t, t.TempDir())
	before := lastCommit(t, db)
	works(t, db.Commit(lease.Change{}))
	works(t, db.Commit(lease.Change{DropPools: []string{}, PutLeases: []lease.Lease{}}))
	if lastCommit(t, db) != before {
		t.Error("nothing was committed")
	}
}

func TestModes(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "data")
	open(t, folder)
	for path, want := range map[string]os.FileMode{folder: os.ModeDir | 0o700, filepath.Join(folder, File): 0o600} {
		info, err := os.Stat(path)
		works(t, err)
		if info.Mode() != want {
			t.Errorf("%s has mode %v, want %v", path, info.Mode(), want)
		}
	}
}

func TestLeaseWithoutPool(t *testing.T) {
	db := open(t, t.TempDir())
	works(t, db.Commit(putPool(pool("a"))))
	works(t, db.Commit(putLease(full("a", 1))))
	works(t, db.Commit(dropPool("a")))
	for _, id := range []string{"a", "b", ""} {
		if err := db.Commit(putLease(full(id, 1))); !errors.Is(err, ErrNoPool) {
			t.Errorf("pool %q: error %v", id, err)
		}
	}
	holds(t, db, lease.Saved{})
}

// A lease without its pool keeps all of its change from being made, wherever
// in the change it is, and none of the changes in the same commit.
func TestRefusedChangeLeavesNothing(t *testing.T) {
	folder := t.TempDir()
	db := open(t, folder)
	works(t, db.Commit(lease.Change{
		PutPools: []lease.Pool{pool("a"), pool("b")}, PutLeases: []lease.Lease{full("a", 1), full("b", 1)},
		PutBindings: []lease.Binding{left(full("a", 9))}, PutHost: host,
	}))
	before := content(t, db)
	everything := func(leases ...lease.Lease) lease.Change {
		return lease.Change{
			DropBindings: []lease.BindingKey{left(full("a", 9)).Key()}, DropLeases: []lease.Key{full("a", 1).Key()}, DropPools: []string{"b"},
			PutPools: []lease.Pool{pool("c")}, PutLeases: leases, PutBindings: []lease.Binding{left(full("a", 8))},
			PutHost: lease.HostIdentity{ID: "other"},
		}
	}
	refused := map[string]lease.Change{
		"first":                       everything(full("gone", 1), full("a", 2)),
		"last":                        everything(full("a", 2), full("c", 1), full("gone", 1)),
		"dropped by the same change":  everything(full("a", 2), full("b", 2)),
		"put only by another, later":  everything(full("later", 1)),
		"dropped by another, earlier": everything(full("earlier", 1)),
	}
	for name, c := range refused {
		if err := db.Commit(c); !errors.Is(err, ErrNoPool) {
			t.Errorf("%s: error %v", name, err)
		}
		holds(t, db, before)
	}

	works(t, db.Commit(putPool(pool("earlier"))))
	changes := []lease.Change{putLease(full("a", 3)), dropPool("earlier")}
	for _, name := range slices.Sorted(maps.Keys(refused)) {
		changes = append(changes, refused[name])
	}
	changes = append(changes, putPool(pool("later")), putLease(full("later", 2)), leave(full("b", 1)))
	for i, err := range together(t, db, changes...) {
		if isRefused := i >= 2 && i < 2+len(refused); errors.Is(err, ErrNoPool) != isRefused || !isRefused && err != nil {
			t.Errorf("change %d: error %v", i, err)
		}
	}
	want := before
	want.Pools = append(want.Pools, pool("later"))
	want.Leases = []lease.Lease{full("a", 1), full("a", 3), full("later", 2)}
	want.Bindings = []lease.Binding{left(full("b", 1)), left(full("a", 9))}
	holds(t, db, want)
}

// IDs that begin with others, or look like keys of their leases.
func TestDroppedPoolTakesJustItsLeases(t *testing.T) {
	ids := []string{
		"192.0.2.0", "192.0.2.0/24", "192.0.2.0/24?id=A", "192.0.2.0/24?id=AB", "a", "a\x00", "a\x00b", "a\x00\x02\x00\x00\x00\x00", "a\x00\x02\x00\x00\x00\x00\x01",
		"a\x00\x02\x00\x00\x00\x00\x01\x00", "b", "\x00", "\u00ff",
	}
	for _, dropped := range ids {
		db := open(t, t.TempDir())
		for _, id := range ids {
			works(t, db.Commit(putPool(pool(id))))
			for n := range 3 {
				works(t, db.Commit(putLease(full(id, n+1))))
			}
		}
		works(t, db.Commit(dropPool(dropped)))
		saved := content(t, db)
		left := map[string]int{}
		for _, l := range saved.Leases {
			left[l.Pool]++
		}
		for _, p := range saved.Pools {
			if left[p.ID] != 3 {
				t.Errorf("without %q: %q has %d leases, want 3", dropped, p.ID, left[p.ID])
			}
		}
		if _, still := left[dropped]; still || len(saved.Pools) != len(ids)-1 || len(left) != len(saved.Pools) {
			t.Errorf("without %q: %d pools, leases %v", dropped, len(saved.Pools), left)
		}
	}
}

// What can't be written is refused with all of its change, and with none of its
// neighbours.
func TestUnusableValues(t *testing.T) {
	db := open(t, t.TempDir())
	works(t, db.Commit(putPool(pool("a"))))
	works(t, db.Commit(putLease(full("a", 2))))
	works(t, db.Commit(putLease(full("a", 3))))
	before := content(t, db)
	lateLease, longLease := full("a", 1), full("a", 1)
	lateLease.Expires = time.Date(12000, 1, 1, 0, 0, 0, 0, time.UTC)
	longLease.ClientID = make([]byte, bolt.MaxKeySize)
	for name, c := range map[string]lease.Change{
		"pool without ID":            putPool(pool("")),
		"pool with an endless ID":    putPool(pool(strings.Repeat("x", 40000))),
		"lease past year 9999":       putLease(lateLease),
		"binding past year 9999":     putBinding(left(lateLease)),
		"binding with an endless ID": putBinding(left(longLease)),
	} {
		c.PutPools = append(c.PutPools, pool("b"))
		c.DropLeases = []lease.Key{full("a", 3).Key()}
		answers := together(t, db, putLease(full("a", 2)), c, putLease(full("a", 2)))
		if err := answers[1]; err == nil {
			t.Errorf("%s was stored", name)
		} else if strings.Contains(err.Error(), "\n") || len(err.Error()) > 1000 {
			t.Errorf("%s: error %v", name, err)
		}
		works(t, errors.Join(answers[0], answers[2]))
		holds(t, db, before)
	}
}

// A change that fails takes no other down that shares its commit.
func TestFailedChangeSparesItsNeighbours(t *testing.T) {
	db := open(t, t.TempDir())
	works(t, db.Commit(putPool(pool("a"))))
	var wg sync.WaitGroup
	for n := range 200 {
		wg.Go(func() {
			if n%2 == 0 {
				if err := db.Commit(putLease(full("a", n))); err != nil {
					t.Error(err)
				}
			} else if err := db.Commit(putLease(full("gone", n))); !errors.Is(err, ErrNoPool) {
				t.Errorf("error %v", err)
			}
		})
	}
	wg.Wait()
	if leases := content(t, db).Leases; len(leases) != 100 {
		t.Errorf("%d leases, want 100", len(leases))
	}
}

// held lets changes queue up, one after the other, while a commit seems to be
// on its way. Some may return at once.
func held(db *DB, changes ...func()) {
	db.writer.Lock()
	var wg sync.WaitGroup
	var returned atomic.Int64
	for i, change := range changes {
		wg.Go(func() {
			change()
			returned.Add(1)
		})
		for queued := 0; queued+int(returned.Load()) <= i; runtime.Gosched() {
			db.mu.Lock()
			queued = len(db.queue)
			db.mu.Unlock()
		}
	}
	db.writer.Unlock()
	wg.Wait()
}

func TestConcurrentWritersShareCommits(t *testing.T) {
	db := open(t, t.TempDir())
	works(t, db.Commit(putPool(pool("a"))))
	const writers = 100
	var changes []func()
	for n := range writers {
		changes = append(changes, func() {
			if err := db.Commit(putLease(full("a", n))); err != nil {
				t.Error(err)
			}
		})
	}
	before := lastCommit(t, db)
	held(db, changes...)
	if commits := lastCommit(t, db) - before; commits != 1 {
		t.Errorf("%d changes that waited together took %d commits", writers, commits)
	}
	if leases := content(t, db).Leases; len(leases) != writers {
		t.Errorf("%d leases, want %d", len(leases), writers)
	}

	before = lastCommit(t, db)
	for n := range 20 {
		works(t, db.Commit(putLease(full("a", n))))
	}
	if commits := lastCommit(t, db) - before; commits != 20 {
		t.Errorf("20 changes by a lone writer took %d commits", commits)
	}
}

// No test here can cut the power, so this looks at the switches.
func TestCommitsAreSynced(t *testing.T) {
	db := open(t, t.TempDir())
	if db.bolt.NoSync || db.bolt.NoGrowSync {
		t.Error("bbolt doesn't sync")
	}
}

func lastCommit(t *testing.T, db *DB) (id int) {
	t.Helper()
	works(t, db.bolt.View(func(tx *bolt.Tx) error { id = tx.ID(); return nil }))
	return id
}

func BenchmarkPutLease(b *testing.B) {
	b.Run("alone", func(b *testing.B) {
		db := open(b, b.TempDir())
		works(b, db.Commit(putPool(pool("a"))))
		for n := 0; b.Loop(); n++ {
			works(b, db.Commit(putLease(full("a", n%1000))))
		}
	})
	b.Run("64 at once", func(b *testing.B) {
		db := open(b, b.TempDir())
		works(b, db.Commit(putPool(pool("a"))))
		b.SetParallelism(64)
		b.RunParallel(func(pb *testing.PB) {
			for n := 0; pb.Next(); n++ {
				if err := db.Commit(putLease(full("a", n%1000))); err != nil {
					b.Error(err)
				}
			}
		})
	})
	// What one commit costs at the least.
	b.Run("bolt's Update", func(b *testing.B) {
		db := open(b, b.TempDir())
		works(b, db.Commit(putPool(pool("a"))))
		value := make([]byte, 600)
		for n := 0; b.Loop(); n++ {
			works(b, db.bolt.Update(func(tx *bolt.Tx) error {
				return tx.Bucket(leaseBucket).Put(leaseKey(lease.Key{Pool: "a", MAC: mac(n % 1000)}), value)
			}))
		}
	})
}
