// Package doctor finds what is wrong: it checks, in order, all that an address
// needs on its way from the DHCP server to a container, and says what to do
// about what it finds. It works in its own process, with the daemon running or
// not, takes no lease and changes nothing.
package doctor

import (
	"context"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/server"
)

// Status is how a check ended.
type Status string

// The statuses.
const (
	OK      Status = "ok"
	Warning Status = "warning" // works, but not as well or as safely as it could
	Fault   Status = "fault"   // containers get no address, or will not
	Skipped Status = "skipped" // couldn't be checked; the advice says how it can
)

// Finding is what a check found. A check has one or more.
type Finding struct {
	Check  string `json:"check"` // its name, such as "relay address"
	Status Status `json:"status"`
	Found  string `json:"found"`            // what is, in one sentence
	Advice string `json:"advice,omitempty"` // what to do; empty where all is well
}

// Site is what there is to be examined: the settings that a start of the daemon
// would have.
type Site struct {
	Version string
	// Wrong is why the settings can't be used. The others are zero then.
	Wrong error
	// Settings are all of them, Unknown the keys of the file that are none, with
	// their places.
	Settings []server.Setting
	Unknown  []string
	Global   lease.Options
	Driver   string // its name
	Socket   string // path of its plugin socket
	DataDir  string
	Docker   string // the engine's address
}

// patient is what the checks share: the site, and what earlier ones have learned.
type patient struct {
	Site
	// health is the running daemon's, nil where none runs.
	health *server.Health
	// pools and leases are the daemon's, or where it is down its database's.
	pools  []lease.PoolStatus
	leases []lease.Held
	tell   func(Finding)
}

// checks are all, in the order in which an address depends on them.
var checks = []struct {
	name  string
	check func(context.Context, *patient)
}{}

// Examine makes all checks and tells what they find, each finding at once.
func Examine(ctx context.Context, site Site, tell func(Finding)) {
	p := &patient{Site: site, tell: tell}
	for _, c := range checks {
		if ctx.Err() != nil {
			return
		}
		c.check(ctx, p)
	}
}
