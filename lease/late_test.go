package lease

import (
	"context"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// An attempt is late when it is overdue by more than the longest request may take
// and 4m, unless a keeper is at work on its lease or requests come and go. That
// keeper is when its end is 4m ago.
func TestLate(t *testing.T) {
	const limit = FirstWait + 4*time.Minute
	mac := MAC{2, 0, 0, 0, 0, 1}
	for name, c := range map[string]struct {
		timeout time.Duration
		by      time.Duration // 0: nothing is due
		claim   *claim
		held    time.Duration // the claim: for how long, beyond its end for a keeper
		want    string
	}{
		"nothing due":                 {0, 0, nil, 0, ""},
		"due in an hour":              {0, -time.Hour, nil, 0, ""},
		"a little late":               {0, limit, nil, 0, ""},
		"late":                        {0, limit + 1, nil, 0, "keep lease 192.0.2.10 of web (02:00:00:00:00:01): the attempt that was due 5m0s ago has not begun"},
		"late, with longer requests":  {5 * time.Minute, limit + 1, nil, 0, ""},
		"later, with longer requests": {5 * time.Minute, 10 * time.Minute, nil, 0, "keep lease 192.0.2.10 of web (02:00:00:00:00:01): the attempt that was due 10m0s ago has not begun"},
		"a keeper at work":            {0, time.Hour, &claim{interrupt: func() {}}, -time.Hour, ""},
		"a keeper that stores":        {0, time.Hour, &claim{interrupt: func() {}}, 4 * time.Minute, ""},
		"a keeper without end":        {0, 0, &claim{interrupt: func() {}}, 4*time.Minute + time.Second, "keep lease 192.0.2.10 of web (02:00:00:00:00:01): the attempt that was to end 4m1s ago goes on"},
		"one request after another":   {0, time.Hour, &claim{}, limit, ""},
		"a request without end":       {0, time.Hour, &claim{}, limit + time.Second, "keep lease 192.0.2.10 of web (02:00:00:00:00:01): a request about it has not ended for 5m1s"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				now := time.Now()
				e := &entry{lease: Lease{Name: "web", MAC: mac, Prefix: netip.MustParsePrefix("192.0.2.10/24")}}
				if c.by != 0 {
					e.due = now.Add(-c.by)
				}
				p := &pool{byMAC: map[MAC]*entry{mac: e}, claims: map[MAC]*claim{}}
				if c.claim != nil {
					c.claim.since, c.claim.until = now.Add(-c.held), now.Add(-c.held)
					p.claims[mac] = c.claim
				}
				m := &Manager{timeout: c.timeout, pools: map[string]*pool{"a": p}}
				got := ""
				if err := m.late(); err != nil {
					got = err.Error()
				}
				if got != c.want {
					t.Errorf("%q, want %q", got, c.want)
				}
			})
		})
	}
}

// quiet is a store and a client of which nothing else is asked.
type quiet struct {
	Store
	Client
}

func (quiet) Alive(context.Context) error { return nil }

// A process that was stopped finds all of its timers overdue when it goes on: they
// get a moment.
func TestLateForAMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &entry{due: time.Now().Add(-time.Hour)}
		p := &pool{byMAC: map[MAC]*entry{{}: e}, claims: map[MAC]*claim{}}
		m := &Manager{store: quiet{}, client: quiet{}, pools: map[string]*pool{"a": p}}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		time.AfterFunc(2500*time.Millisecond, func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			e.due = time.Time{}
		})
		began := time.Now()
		if err := m.Alive(ctx); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took != 3*time.Second {
			t.Errorf("took %v", took)
		}
	})
}
