package server

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Pool is a pool as operators and their programs read it. What there is none of
// is null; times are UTC in whole seconds.
type Pool struct {
	ID      string        `json:"id"`
	Subnet  netip.Prefix  `json:"subnet"`
	Range   *netip.Prefix `json:"range"` // --ip-range
	Gateway *netip.Addr   `json:"gateway"`
	Mode    string        `json:"mode"` // ModeRelay or ModeBroadcast
	// Options are those in force, the daemon's own ones among them, by their
	// names.
	Options     map[string]string `json:"options"`
	Leases      map[string]int    `json:"leases"` // by state, each of LeaseStates
	Servers     []PoolServer      `json:"servers"`
	Refused     uint64            `json:"refused"` // address requests that failed since the start
	LastRefusal *Refusal          `json:"last_refusal"`
}

// How the servers of a pool are asked.
const (
	ModeRelay     = "relay"
	ModeBroadcast = "broadcast"
)

// PoolServer is how a pool's server has answered since the daemon's start.
type PoolServer struct {
	Server      *netip.Addr `json:"server"` // null on a LAN where none has answered yet
	AnsweredAt  *time.Time  `json:"answered_at"`
	TookMS      *float64    `json:"took_ms"`      // from the message to that answer
	SilentSince *time.Time  `json:"silent_since"` // when the first of Unanswered was sent
	Unanswered  int         `json:"unanswered"`   // messages since its last answer
	Offers      uint64      `json:"offers"`
	ACKs        uint64      `json:"acks"`
	NAKs        uint64      `json:"naks"`
}

// Refusal is why an address request failed.
type Refusal struct {
	At     time.Time `json:"at"`
	Detail string    `json:"detail"`
}

func presentPool(p lease.PoolStatus) Pool {
	shown := Pool{
		ID: p.ID, Subnet: p.Subnet, Mode: ModeRelay, Options: p.InForce.Texts(),
		Leases: map[string]int{}, Servers: []PoolServer{}, Refused: p.Refused,
	}
	if p.Range.IsValid() {
		shown.Range = &p.Range
	}
	if p.Gateway.IsValid() {
		shown.Gateway = &p.Gateway
	}
	if p.InForce.ByBroadcast() {
		shown.Mode = ModeBroadcast
	}
	for _, state := range LeaseStates {
		shown.Leases[state] = p.Leases[state]
	}
	for _, s := range p.Servers {
		server := PoolServer{
			AnsweredAt: at(s.Answered), SilentSince: at(s.Silent), Unanswered: s.Unanswered,
			Offers: s.Offers, ACKs: s.ACKs, NAKs: s.NAKs,
		}
		if s.Server.IsValid() {
			server.Server = &s.Server
		}
		if !s.Answered.IsZero() {
			server.TookMS = new(float64(s.Took.Round(shownTime)) / float64(time.Millisecond))
		}
		shown.Servers = append(shown.Servers, server)
	}
	if t := at(p.Refusal.Time); t != nil {
		shown.LastRefusal = &Refusal{At: *t, Detail: p.Refusal.Detail}
	}
	return shown
}

// shownTime is what times to answers are rounded to.
const shownTime = 100 * time.Microsecond

// poolNamed tells the pools that a word names: the ID of one, or the subnet of
// some.
func poolNamed(word string) func(id string, subnet netip.Prefix) bool {
	prefix, err := netip.ParsePrefix(word)
	return func(id string, subnet netip.Prefix) bool {
		return id == word || err == nil && subnet == prefix.Masked()
	}
}

// knows refuses a word that names no pool, but "" for all.
func (o operator) knows(word string) error {
	named := poolNamed(word)
	if word == "" || slices.ContainsFunc(o.Manager.Pools(), func(p lease.PoolStatus) bool { return named(p.ID, p.Subnet) }) {
		return nil
	}
	return fmt.Errorf("no pool has the ID or subnet %q: oam-docker-ipam pools lists all", word)
}

// poolWithLeases is the ID of the only pool with leases that a word names. It is
// the word itself where there is none, as for "".
func (o operator) poolWithLeases(word string) (string, error) {
	named, found := poolNamed(word), map[string]bool{}
	for _, l := range o.Manager.Leases() {
		if named(l.Pool, l.Subnet) {
			found[l.Pool] = true
		}
	}
	ids := slices.Sorted(maps.Keys(found))
	switch len(ids) {
	case 0:
		return word, nil
	case 1:
		return ids[0], nil
	}
	return "", fmt.Errorf("several pools have the subnet %s, name one by its ID: %s", word, strings.Join(ids, "; "))
}

// Pools asks the daemon on a socket for the pools that a word names, an ID or a
// subnet, or with "" for all, sorted by subnet.
func Pools(ctx context.Context, socket, word string) ([]Pool, error) {
	target := poolsPath
	if word != "" {
		target += "?" + url.Values{"pool": {word}}.Encode()
	}
	var pools []Pool
	err := ask(ctx, socket, http.MethodGet, target, nil, &pools)
	return pools, err
}

func (o operator) pools(w http.ResponseWriter, r *http.Request) {
	values, err := url.ParseQuery(r.URL.RawQuery)
	for name := range values {
		if err == nil && name != "pool" {
			err = fmt.Errorf("unknown parameter %q: there is pool", name)
		}
	}
	if err != nil {
		answer(w, http.StatusBadRequest, failure{Err: err.Error()})
		return
	}
	word := values.Get("pool")
	named := poolNamed(word)
	pools := []Pool{}
	for _, p := range o.Manager.Pools() {
		if word == "" || named(p.ID, p.Subnet) {
			pools = append(pools, presentPool(p))
		}
	}
	answer(w, http.StatusOK, pools)
}
