package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/gorilla/mux"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

const inspectPath = operatorPath + "inspect"

// Inspection is all that is known of one lease. Container and NetworkSettings
// have the shape that network-wrapper's users know: every value a text.
type Inspection struct {
	// Container is the container's name, else its ID, else its MAC.
	Container       string
	NetworkSettings NetworkSettings
	Lease           InspectedLease
}

// NetworkSettings are what a container was given. What isn't known is "".
type NetworkSettings struct {
	HWAddr string
	// Bridge is the network's parent, as far as its options tell: an IPAM
	// driver doesn't hear of it.
	Bridge      string
	IPAddress   string
	IPPrefixLen string
	Gateway     string
	DNS         string // those that the server named, with ", " between them
}

// InspectedLease is a lease with what was received and what happened.
type InspectedLease struct {
	Lease
	ContainerID string                 `json:"container_id"` // "" unless a reconcile has learned it
	Options     []lease.ReceivedOption `json:"options"`      // of the last ACK
	History     []lease.Event          `json:"history"`      // the last maxHistory, the oldest first
}

// maxHistory bounds a lease's history.
const maxHistory = 20

// Options of RFC 2132 that are looked into.
const (
	optionRouter = 3
	optionDNS    = 6
)

// describe tells all of a lease but what happened. Of its pool nothing is known
// when it is a pending release whose network was removed.
func describe(l lease.Held, pool lease.PoolStatus, options []lease.ReceivedOption) Inspection {
	name, bridge := l.Name, pool.InForce.Interface
	if name == "" {
		name = l.Container
	}
	if name == "" {
		name = l.MAC.String()
	}
	if bridge == "" {
		bridge = pool.InForce.ConflictInterface
	}
	var gateway string
	if pool.Gateway.IsValid() {
		gateway = pool.Gateway.String()
	} else if routers := addresses(options, optionRouter); len(routers) > 0 {
		gateway = routers[0]
	}
	return Inspection{
		Container: name,
		NetworkSettings: NetworkSettings{
			HWAddr: l.MAC.String(), Bridge: bridge, IPAddress: l.Addr().String(), IPPrefixLen: strconv.Itoa(l.Prefix.Bits()),
			Gateway: gateway, DNS: strings.Join(addresses(options, optionDNS), ", "),
		},
		Lease: InspectedLease{Lease: present(l), ContainerID: l.Container, Options: append([]lease.ReceivedOption{}, options...)},
	}
}

// addresses are those in the options of a code. A value that a server has
// malformed has none.
func addresses(options []lease.ReceivedOption, code uint8) (found []string) {
	for _, o := range options {
		for text := range strings.SplitSeq(o.Value, ",") {
			if addr, err := netip.ParseAddr(strings.TrimSpace(text)); err == nil && o.Code == code {
				found = append(found, addr.String())
			}
		}
	}
	return found
}

// histories are the last events of each lease, in the leases' order: those of
// its MAC, its address or its container's name in its pool, or in its subnet
// while that was another pool's, one that is gone or was adopted.
func histories(leases []lease.Held, pools map[string]lease.PoolStatus, events []lease.Event) [][]lease.Event {
	byMAC, byAddr, byName := map[lease.MAC][]int{}, map[netip.Addr][]int{}, map[string][]int{}
	for i, l := range leases {
		byMAC[l.MAC], byAddr[l.Addr()] = append(byMAC[l.MAC], i), append(byAddr[l.Addr()], i)
		if l.Name != "" {
			byName[l.Name] = append(byName[l.Name], i)
		}
	}
	found := make([][]lease.Event, len(leases))
	for _, e := range slices.Backward(events) {
		for _, of := range [][]int{byMAC[e.MAC], byAddr[e.Address], byName[e.Name]} {
			for _, i := range of {
				l, have := leases[i], found[i]
				pool, exists := pools[e.Pool]
				within := e.Pool == l.Pool || l.Subnet.Contains(e.Address) && (!exists || pool.Adopted)
				counted := len(have) > 0 && have[len(have)-1].Seq == e.Seq
				if within && !counted && len(have) < maxHistory {
					found[i] = append(have, e)
				}
			}
		}
	}
	for _, history := range found {
		slices.Reverse(history)
	}
	return found
}

// inspections returns what tells all of the n-th of some leases.
func (o operator) inspections(leases []lease.Held) (nth func(n int) Inspection, err error) {
	events, err := o.eventsAfter(0)
	if err != nil {
		return nil, err
	}
	pools := map[string]lease.PoolStatus{}
	for _, p := range o.Manager.Pools() {
		pools[p.ID] = p
	}
	happened := histories(leases, pools, events)
	return func(n int) Inspection {
		l := leases[n]
		told := describe(l, pools[l.Pool], o.Options(l.Options))
		told.Lease.History = append([]lease.Event{}, happened[n]...)
		return told
	}, nil
}

// idStart is what an operator may give of a container's ID.
var idStart = regexp.MustCompile(`^[0-9a-f]{4,64}$`)

// namedBy lists the leases that an operator's word means: an address, a MAC, or
// the name or ID of a container; else, as docker has it, the start of an ID.
func namedBy(word string, leases []lease.Held) (found []lease.Held) {
	addr, _ := netip.ParseAddr(word)
	mac, noMAC := lease.ParseMAC(word)
	for _, l := range leases {
		if l.Addr() == addr || noMAC == nil && l.MAC == mac || l.Name == word || l.Container == word {
			found = append(found, l)
		}
	}
	if len(found) > 0 || !idStart.MatchString(word) {
		return found
	}
	for _, l := range leases {
		if strings.HasPrefix(l.Container, word) {
			found = append(found, l)
		}
	}
	return found
}

// one is the lease that an operator's word means, in the pool of an ID or
// subnet or, with "", in any.
func one(leases []lease.Held, word, pool string) (lease.Held, error) {
	if word == "" {
		return lease.Held{}, errors.New("inspect: want a container's name or ID, an address or a MAC address")
	}
	if pool != "" {
		named := poolNamed(pool)
		leases = slices.DeleteFunc(leases, func(l lease.Held) bool { return !named(l.Pool, l.Subnet) })
	}
	found := namedBy(word, leases)
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) == 0 && pool != "":
		return lease.Held{}, fmt.Errorf("inspect %q in pool %q: %w: see oam-docker-ipam leases", word, pool, lease.ErrNoLease)
	case len(found) == 0:
		return lease.Held{}, fmt.Errorf("inspect %q: %w: see oam-docker-ipam leases", word, lease.ErrNoLease)
	}
	var candidates []string
	for _, l := range found {
		candidates = append(candidates, fmt.Sprintf("%s (%s) of %s in pool %s", l.Addr(), l.MAC, l.Subnet, l.Pool))
	}
	return lease.Held{}, fmt.Errorf("inspect %q: several leases, name one by its address, or with --pool by its subnet or pool: %s", word, strings.Join(candidates, "; "))
}

func (o operator) inspect(w http.ResponseWriter, r *http.Request) {
	l, err := one(o.Manager.Leases(), mux.Vars(r)["key"], r.URL.Query().Get("pool"))
	switch {
	case errors.Is(err, lease.ErrNoLease):
		answer(w, http.StatusNotFound, failure{Err: err.Error()})
		return
	case err != nil:
		answer(w, http.StatusConflict, failure{Err: err.Error()})
		return
	}
	done, err := o.remember(r.Context())
	if err != nil {
		return // the reader has gone
	}
	defer done()
	nth, err := o.inspections([]lease.Held{l})
	if err != nil {
		answer(w, http.StatusInternalServerError, failure{Err: err.Error()})
		return
	}
	answer(w, http.StatusOK, nth(0))
}

func (o operator) inspectAll(w http.ResponseWriter, r *http.Request) {
	done, err := o.remember(r.Context())
	if err != nil {
		return // the reader has gone
	}
	defer done()
	leases := o.Manager.Leases()
	nth, err := o.inspections(leases)
	if err != nil {
		answer(w, http.StatusInternalServerError, failure{Err: err.Error()})
		return
	}
	// One by one: all texts together would be more than all leases.
	w.Header().Set("Content-Type", mediaType)
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	_, _ = io.WriteString(w, "[")
	for i := range leases {
		if i > 0 {
			_, _ = io.WriteString(w, ",")
		}
		if e.Encode(nth(i)) != nil {
			return // the reader has gone
		}
	}
	_, _ = io.WriteString(w, "]")
}

// Inspect asks the daemon on a socket for all that it knows of a lease: that of
// an address, a MAC or a container, by its name, ID or the start of that, in
// the pool of an ID or subnet or, with "", in any.
func Inspect(ctx context.Context, socket, key, pool string) (Inspection, error) {
	path := inspectPath + "/" + url.PathEscape(key)
	if pool != "" {
		path += "?" + url.Values{"pool": {pool}}.Encode()
	}
	var told Inspection
	err := ask(ctx, socket, http.MethodGet, path, nil, &told)
	return told, err
}

// InspectAll is Inspect of all leases, sorted by address.
func InspectAll(ctx context.Context, socket string) ([]Inspection, error) {
	var told []Inspection
	err := ask(ctx, socket, http.MethodGet, inspectPath, nil, &told)
	return told, err
}
