package server

import (
	"fmt"
	"maps"
	"net/http"
	"sync"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// repeatTime is how soon after our answer an engine repeats itself at the latest.
// It takes milliseconds to look at its routes.
const repeatTime = 2 * time.Second

// repeats finds the requests that engines before 27 repeat without pause or end:
// a pool whose subnet wasn't given and to which the host has a route is kept
// aside, and another one asked for, until it gets an error. Then all of them are
// released. Nothing else tells such an engine from newer ones.
type repeats struct {
	mu sync.Mutex
	// What was learned last, for whom, and when that was answered. At is zero
	// when another call has come since.
	options map[string]string
	pool    lease.Pool
	at      time.Time
}

// check refuses a request that repeats the last one.
func (s *repeats) check(r poolRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.at
	s.at = time.Time{}
	if r.Pool != "" || last.IsZero() || time.Since(last) > repeatTime || !maps.Equal(r.Options, s.options) {
		return nil
	}
	return fmt.Errorf("the DHCP server's subnet is %s, which this engine doesn't take, since the host has a route to it or a name server in it: create the network with --subnet %s --gateway %s (engines from 27 on need neither)", s.pool.Subnet, s.pool.Subnet, s.pool.Gateway)
}

// answered notes what a request is about to be answered with.
func (s *repeats) answered(r poolRequest, p lease.Pool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Pool == "" {
		s.options, s.pool, s.at = r.Options, p, time.Now()
	}
}

// other makes a handler of another call: what comes after it repeats nothing.
func (s *repeats) other(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.at = time.Time{}
		s.mu.Unlock()
		h(w, r)
	}
}
