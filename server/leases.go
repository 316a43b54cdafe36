package server

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Lease is a lease as operators and their programs read it. Times are UTC in
// whole seconds; those of an infinite lease are null.
type Lease struct {
	Address      netip.Addr   `json:"address"`
	PrefixLength int          `json:"prefix_length"`
	MAC          lease.MAC    `json:"mac"`
	Name         string       `json:"name"`
	PoolID       string       `json:"pool_id"`
	Subnet       netip.Prefix `json:"subnet"`
	State        string       `json:"state"` // one of LeaseStates
	Server       netip.Addr   `json:"server"`
	ClientID     string       `json:"client_id"` // hexadecimal bytes with colons
	ObtainedAt   *time.Time   `json:"obtained_at"`
	RenewAt      *time.Time   `json:"renew_at"`
	RebindAt     *time.Time   `json:"rebind_at"`
	ExpiresAt    *time.Time   `json:"expires_at"`
}

// LeaseStates are all states of a Lease, the one that wants an operator most
// first.
var LeaseStates = []string{
	lease.Lost.String(), lease.Rebinding.String(), lease.Renewing.String(), lease.Waiting, lease.Releasing, lease.Bound.String(),
}

func present(l lease.Held) Lease {
	return Lease{
		Address: l.Addr(), PrefixLength: l.Prefix.Bits(), MAC: l.MAC, Name: l.Name, PoolID: l.Pool, Subnet: l.Subnet,
		State: l.State, Server: l.Server,
		ClientID:   strings.ReplaceAll(fmt.Sprintf("% x", l.ClientID), " ", ":"),
		ObtainedAt: at(l.Obtained), RenewAt: at(l.Renew), RebindAt: at(l.Rebind), ExpiresAt: at(l.Expires),
	}
}

// at is a time as operators read it, nil for none.
func at(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return new(t.UTC().Truncate(time.Second))
}

// Selection is which leases are wanted, and in which order. The zero one is all
// of them by address.
type Selection struct {
	values url.Values
	tests  []func(lease.Held) bool
	order  func(a, b lease.Held) int
}

// ParseSelection reads texts by their names:
//
//	address  an IPv4 address
//	mac      as lease.ParseMAC reads it
//	name     a container's name, or with * and ? a pattern of path.Match
//	pool     a pool's ID or subnet
//	state    one of LeaseStates
//	sort     by address, expires (those that never do last), mac, name (those
//	         without one last) or state (as LeaseStates has them)
//
// A lease is wanted if of each name that is there one text fits.
func ParseSelection(values url.Values) (Selection, error) {
	s := Selection{values: values}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		if name == sortKey {
			key := values.Get(name)
			if s.order = orders[key]; s.order == nil {
				return Selection{}, fmt.Errorf("sort by %q: there are %s", key, list(orders))
			}
			continue
		}
		parse := filters[name]
		if parse == nil {
			return Selection{}, fmt.Errorf("unknown parameter %q: there are %s and %s", name, list(filters), sortKey)
		}
		var either []func(lease.Held) bool
		for _, text := range values[name] {
			fits, err := parse(text)
			if err != nil {
				return Selection{}, err
			}
			either = append(either, fits)
		}
		s.tests = append(s.tests, func(l lease.Held) bool {
			return slices.ContainsFunc(either, func(fits func(lease.Held) bool) bool { return fits(l) })
		})
	}
	return s, nil
}

// All reports whether every lease is wanted.
func (s Selection) All() bool { return len(s.tests) == 0 }

// String is what a wanted lease has: "name web* and state lost or rebinding".
func (s Selection) String() string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(s.values)) {
		if name != sortKey {
			parts = append(parts, name+" "+strings.Join(s.values[name], " or "))
		}
	}
	return strings.Join(parts, " and ")
}

// fits reports whether a lease is wanted.
func (s Selection) fits(l lease.Held) bool {
	return !slices.ContainsFunc(s.tests, func(fits func(lease.Held) bool) bool { return !fits(l) })
}

// sort puts leases in order that are sorted by address.
func (s Selection) sort(leases []lease.Held) {
	if s.order != nil {
		slices.SortStableFunc(leases, s.order)
	}
}

// filters are the texts of a Selection by which leases are chosen.
var filters = map[string]func(text string) (fits func(lease.Held) bool, err error){
	"address": func(text string) (func(lease.Held) bool, error) {
		addr, err := netip.ParseAddr(text)
		if err != nil || !addr.Is4() {
			return nil, fmt.Errorf("parse address %q: want an IPv4 address such as 192.0.2.7; a container is chosen by its name or MAC", text)
		}
		return func(l lease.Held) bool { return l.Addr() == addr }, nil
	},
	"mac": func(text string) (func(lease.Held) bool, error) {
		mac, err := lease.ParseMAC(text)
		return func(l lease.Held) bool { return l.MAC == mac }, err
	},
	"name": func(text string) (func(lease.Held) bool, error) {
		if !strings.ContainsAny(text, "*?") {
			return func(l lease.Held) bool { return l.Name == text }, nil
		}
		if _, err := path.Match(text, ""); err != nil {
			return nil, fmt.Errorf("parse name %q: want a container's name or a pattern such as web*, with ? for any one character and [0-9] for one of several", text)
		}
		return func(l lease.Held) bool { fits, _ := path.Match(text, l.Name); return fits }, nil
	},
	"pool": func(text string) (func(lease.Held) bool, error) {
		named := poolNamed(text)
		return func(l lease.Held) bool { return named(l.Pool, l.Subnet) }, nil
	},
	"state": func(text string) (func(lease.Held) bool, error) {
		if !slices.Contains(LeaseStates, text) {
			return nil, fmt.Errorf("unknown state %q: there are %s", text, strings.Join(LeaseStates, ", "))
		}
		return func(l lease.Held) bool { return l.State == text }, nil
	},
}

const sortKey = "sort"

// orders are those of a Selection. What is equal stays sorted by address.
var orders = map[string]func(a, b lease.Held) int{
	"address": func(a, b lease.Held) int { return 0 },
	"expires": func(a, b lease.Held) int {
		return cmp.Or(lastIf(a.Infinite(), b.Infinite()), a.Expires.Compare(b.Expires))
	},
	"mac": func(a, b lease.Held) int { return bytes.Compare(a.MAC[:], b.MAC[:]) },
	"name": func(a, b lease.Held) int {
		return cmp.Or(lastIf(a.Name == "", b.Name == ""), cmp.Compare(a.Name, b.Name))
	},
	"state": func(a, b lease.Held) int {
		return cmp.Compare(slices.Index(LeaseStates, a.State), slices.Index(LeaseStates, b.State))
	},
}

// lastIf puts what is so behind what isn't.
func lastIf(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// list is the names of a table for an error.
func list[V any](table map[string]V) string {
	return strings.Join(slices.Sorted(maps.Keys(table)), ", ")
}

// Leases asks the daemon on a socket for leases.
func Leases(ctx context.Context, socket string, wanted Selection) ([]Lease, error) {
	target := leasesPath
	if query := wanted.values.Encode(); query != "" {
		target += "?" + query
	}
	var leases []Lease
	err := ask(ctx, socket, http.MethodGet, target, nil, &leases)
	return leases, err
}

func (o operator) leases(w http.ResponseWriter, r *http.Request) {
	values, err := url.ParseQuery(r.URL.RawQuery)
	var wanted Selection
	if err == nil {
		wanted, err = ParseSelection(values)
	}
	if err != nil {
		answer(w, http.StatusBadRequest, failure{Err: err.Error()})
		return
	}
	held := o.Manager.LeasesThat(wanted.fits)
	wanted.sort(held)
	leases := make([]Lease, len(held))
	for i, l := range held {
		leases[i] = present(l)
	}
	answer(w, http.StatusOK, leases)
}
