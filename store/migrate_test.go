package store

import (
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// schema1 is a database as the version before bindings left it.
var schema1 = map[string]map[string]string{
	"meta": {"schema": "1"},
	"pools": {
		"192.0.2.0/24?dhcp_server=198.51.100.1&gateway=192.0.2.1&id=3KDPZ5": `{"id":"192.0.2.0/24?dhcp_server=198.51.100.1\u0026gateway=192.0.2.1\u0026id=3KDPZ5","subnet":"192.0.2.0/24","gateway":"192.0.2.1","reserved":["192.0.2.2"],"options":{"dhcp_server":["198.51.100.1"],"listen_addr":"203.0.113.1"},"aux_until":"2026-03-01T12:01:00.000000001Z"}`,
		"10.0.0.0": `{"id":"10.0.0.0","subnet":"10.0.0.0/8","options":{}}`,
	},
	"leases": {
		"10.0.0.0\x00\x02\x00\x00\x00\x00\x01": `{"pool":"10.0.0.0","mac":"02:00:00:00:00:01","name":"web","client_id":"AQIAAAAAAQ==","prefix":"10.1.2.3/8","server":"198.51.100.1","via":"198.51.100.2:1067","options":"MwQAAA4Q","obtained":"2026-03-01T13:00:00.123456789+01:00","renew":"2026-03-01T12:30:00Z","rebind":"2026-03-01T12:52:30Z","expires":"2026-03-01T13:00:00Z"}`,
		"192.0.2.0/24?dhcp_server=198.51.100.1&gateway=192.0.2.1&id=3KDPZ5\x00\x02\x00\x00\x00\x00\x02": `{"pool":"192.0.2.0/24?dhcp_server=198.51.100.1\u0026gateway=192.0.2.1\u0026id=3KDPZ5","mac":"02:00:00:00:00:02","client_id":"AQIAAAAAAg==","prefix":"192.0.2.9/24","server":"198.51.100.1","via":"","obtained":"2026-03-01T12:00:00Z","renew":"0001-01-01T00:00:00Z","rebind":"0001-01-01T00:00:00Z","expires":"0001-01-01T00:00:00Z"}`,
	},
}

// made makes a data folder with a database of this content, after a change.
func made(t *testing.T, content map[string]map[string]string, change func(*bolt.Tx) error) string {
	t.Helper()
	folder := t.TempDir()
	b, err := bolt.Open(filepath.Join(folder, File), 0o600, &bolt.Options{NoFreelistSync: true, FreelistType: bolt.FreelistMapType})
	works(t, err)
	works(t, b.Update(func(tx *bolt.Tx) error {
		for name, values := range content {
			bucket, err := tx.CreateBucket([]byte(name))
			if err != nil {
				return err
			}
			for key, value := range values {
				if err := bucket.Put([]byte(key), []byte(value)); err != nil {
					return err
				}
			}
		}
		return change(tx)
	}))
	works(t, b.Close())
	return folder
}

func asItIs(*bolt.Tx) error { return nil }

func TestMigration(t *testing.T) {
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	id := "192.0.2.0/24?dhcp_server=198.51.100.1&gateway=192.0.2.1&id=3KDPZ5"
	want := lease.Saved{
		Pools: []lease.Pool{
			{ID: "10.0.0.0", Subnet: netip.MustParsePrefix("10.0.0.0/8")},
			{
				ID: id, Subnet: netip.MustParsePrefix("192.0.2.0/24"), Gateway: netip.MustParseAddr("192.0.2.1"),
				Reserved: []netip.Addr{netip.MustParseAddr("192.0.2.2")},
				Options:  lease.Options{Servers: []lease.Server{{Host: "198.51.100.1", Port: 67}}, Relay: netip.MustParseAddr("203.0.113.1")},
				AuxUntil: at.Add(time.Minute + 1),
			},
		},
		Leases: []lease.Lease{
			{
				Pool: "10.0.0.0", MAC: mac(1), Name: "web", ClientID: []byte{1, 2, 0, 0, 0, 0, 1}, Prefix: netip.MustParsePrefix("10.1.2.3/8"),
				Server: netip.MustParseAddr("198.51.100.1"), Via: netip.MustParseAddrPort("198.51.100.2:1067"), Options: []byte{51, 4, 0, 0, 14, 16},
				Obtained: at.Add(123456789), Renew: at.Add(30 * time.Minute), Rebind: at.Add(52*time.Minute + 30*time.Second), Expires: at.Add(time.Hour),
			},
			{
				Pool: id, MAC: mac(2), ClientID: []byte{1, 2, 0, 0, 0, 0, 2}, Prefix: netip.MustParsePrefix("192.0.2.9/24"),
				Server: netip.MustParseAddr("198.51.100.1"), Obtained: at,
			},
		},
	}
	folder := made(t, schema1, asItIs)
	db, err := Open(folder)
	works(t, err)
	if migrated := lastCommit(t, db); migrated != 3 { // bbolt's first, made's, the migration
		t.Errorf("the migration's transaction has number %d", migrated)
	}
	// DeepEqual compares places too.
	saved := content(t, db)
	if !saved.Leases[0].Obtained.Equal(want.Leases[0].Obtained) {
		t.Errorf("obtained %v", saved.Leases[0].Obtained)
	}
	want.Leases[0].Obtained = saved.Leases[0].Obtained
	holds(t, db, want)

	// From now on it is one like any other, and not migrated again.
	l := want.Leases[0]
	works(t, db.Commit(lease.Change{DropLeases: []lease.Key{l.Key()}, PutBindings: []lease.Binding{left(l)}, PutHost: host}))
	want.Leases, want.Bindings, want.Host = want.Leases[1:], []lease.Binding{left(l)}, host
	before := lastCommit(t, db)
	works(t, db.Close())
	db = open(t, folder)
	if lastCommit(t, db) != before {
		t.Error("it was written to when it was opened again")
	}
	saved = content(t, db)
	if !saved.Bindings[0].Lease.Obtained.Equal(l.Obtained) {
		t.Errorf("obtained %v", saved.Bindings[0].Lease.Obtained)
	}
	want.Bindings[0].Lease.Obtained = saved.Bindings[0].Lease.Obtained
	holds(t, db, want)
}

// A migrated database and a new one have the same layout.
func TestMigratedLikeNew(t *testing.T) {
	layout := func(folder string) (names []string) {
		db := open(t, folder)
		works(t, db.bolt.View(func(tx *bolt.Tx) error {
			names = append(names, string(tx.Bucket(metaBucket).Get(schemaKey)))
			return tx.ForEach(func(name []byte, _ *bolt.Bucket) error {
				names = append(names, string(name))
				return nil
			})
		}))
		return names
	}
	const want = "2 bindings leases meta pools"
	for _, folder := range []string{t.TempDir(), made(t, schema1, asItIs)} {
		if got := strings.Join(layout(folder), " "); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// What can't be migrated stays as it is.
func TestRefusedMigration(t *testing.T) {
	for name, c := range map[string]struct {
		damage func(tx *bolt.Tx) error
		want   string
	}{
		"no leases": {func(tx *bolt.Tx) error { return tx.DeleteBucket(leaseBucket) }, "no bucket leases"},
		"no pools":  {func(tx *bolt.Tx) error { return tx.DeleteBucket(poolBucket) }, "no bucket pools"},
		"bindings already": {func(tx *bolt.Tx) error {
			_, err := tx.CreateBucket(bindingBucket)
			return err
		}, "migrate from schema 1"},
	} {
		t.Run(name, func(t *testing.T) { refuses(t, made(t, schema1, c.damage), "damaged", c.want) })
	}
}
