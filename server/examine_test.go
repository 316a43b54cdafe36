package server

import (
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// The doctor gets leases and pools as the Manager has them, with what the
// operators' own form leaves out.
func TestExamine(t *testing.T) {
	networks := twoNetworks()
	first := &networks.leases[0]
	first.Agent, first.Station, first.Options = []byte{1, 1, 'x'}, lease.MAC{2, 1}, []byte{51, 4, 0, 0, 0, 1}
	d := startDaemon(t, networks, time.Second)
	got, err := Examine(t.Context(), d.socket)
	if err != nil {
		t.Fatal(err)
	}
	want := d.manager.Leases()
	// The times of each look are the wall clock's then.
	for _, held := range [][]lease.Held{got.Leases, want} {
		for i := range held {
			l := &held[i].Lease
			l.Obtained, l.Renew, l.Rebind, l.Expires = time.Time{}, time.Time{}, time.Time{}, time.Time{}
		}
	}
	if len(want) == 0 || !reflect.DeepEqual(got.Leases, want) {
		t.Errorf("got %+v, want %+v", got.Leases, want)
	}
	pools := d.manager.Pools()
	if len(pools) == 0 || len(got.Pools) != len(pools) || !reflect.DeepEqual(got.Pools[0].Pool, pools[0].Pool) || !reflect.DeepEqual(got.Pools[0].InForce, pools[0].InForce) {
		t.Errorf("got %+v, want %+v", got.Pools, pools)
	}
}

func TestActivate(t *testing.T) {
	d := startDaemon(t, fakeStore{}, time.Second)
	if got, err := Activate(t.Context(), d.socket); err != nil || !slices.Equal(got, []string{"IpamDriver"}) {
		t.Errorf("got %q, %v", got, err)
	}
}
