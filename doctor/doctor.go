// Package doctor finds what is wrong: it checks, in order, all that an address
// needs on its way from the DHCP server to a container, and says what to do
// about what it finds. It works in its own process, with the daemon running or
// not, takes no lease, changes nothing and starts nothing.
package doctor

import (
	"context"
	"fmt"
	"time"

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
	// Wrong is why the settings can't be used. What could be read of them is there
	// all the same: a daemon may still run by the former ones.
	Wrong error
	// Settings are all of them, Unknown the keys of the file that are none, with
	// their places.
	Settings []server.Setting
	Unknown  []string
	// Global are the global options, unless GlobalErr is why they aren't known.
	Global    lease.Options
	GlobalErr error
	Driver    string // its name
	// Socket is the path of its plugin socket, SocketOf that of each of
	// lease.Drivers.
	Socket   string
	SocketOf func(lease.Driver) string
	DataDir  string
	Docker   string // the engine's address
	// Reloadable reports whether a reload brings a setting into force, Options
	// reads the global options of any settings.
	Reloadable func(key string) bool
	Options    func([]server.Setting) (lease.Options, error)
}

// patient is what the checks share: the site, and what earlier ones have learned.
// Where a daemon runs, Global are the options of its next start.
type patient struct {
	Site
	// units are what systemd says, absent where there is none.
	units units
	// health is the running daemon's, nil where none runs or it doesn't answer;
	// silence is why.
	health  *server.Health
	silence error
	// running are the running daemon's settings.
	running []server.Setting
	// pools and leases are the daemon's, or where it is down its database's; they
	// are known if one of the two has told them.
	pools  []lease.PoolStatus
	leases []lease.Held
	known  bool
	// stored is what the database has, where the daemon is down.
	stored *stored
	// net is what the checks of the network share, see survey.
	net  *network
	tell func(Finding)
	// told counts the findings of the check that runs.
	told int
}

func (p *patient) ok(found string, args ...any) {
	p.tell(Finding{Status: OK, Found: fmt.Sprintf(found, args...)})
}

// otherwise is ok where the check has found nothing yet.
func (p *patient) otherwise(found string, args ...any) {
	if p.told == 0 {
		p.ok(found, args...)
	}
}

func (p *patient) warn(found, advice string) {
	p.tell(Finding{Status: Warning, Found: found, Advice: advice})
}

func (p *patient) fault(found, advice string) {
	p.tell(Finding{Status: Fault, Found: found, Advice: advice})
}

func (p *patient) skip(found, advice string) {
	p.tell(Finding{Status: Skipped, Found: found, Advice: advice})
}

// check is one of them. Its findings need no Check: they get its name.
type check struct {
	name  string
	check func(context.Context, *patient)
}

// checks are all, in the order in which an address depends on them.
var checks = []check{
	{"configuration", checkConfiguration},
	{"daemon", checkDaemon},
	{"relay address", checkRelay},
	{"port 67", checkPort},
	{"route", checkRoute},
	{"answer", checkAnswer},
	{"subnets", checkSubnets},
	{"free addresses", checkFree},
	{"clock", checkClock},
	{"disk", checkDisk},
	{"database", checkDatabase},
	{"socket", checkSocket},
	{"engine", checkEngine},
}

// Names are those of all checks, in their order.
func Names() (names []string) {
	for _, c := range checks {
		names = append(names, c.name)
	}
	return names
}

// Examine makes all checks and tells what they find, each finding at once and
// one after the other. It ends early when ctx does.
func Examine(ctx context.Context, site Site, tell func(Finding)) {
	p := &patient{Site: site, tell: tell}
	p.run(ctx, check{"daemon", meet}, checkTime)
	for _, c := range checks {
		if ctx.Err() != nil {
			return
		}
		p.make(ctx, c)
	}
}

// make makes one check. One that has nothing to tell becomes a finding too.
func (p *patient) make(ctx context.Context, c check) {
	p.run(ctx, check{c.name, func(bound context.Context, p *patient) {
		c.check(bound, p)
		if p.told == 0 && ctx.Err() == nil {
			p.skip("nothing was there to check", "mend what the checks above have found")
		}
	}}, checkTime)
}

// checkTime is how long one check may take until its context ends: the slowest
// wait for servers, several times. patience is how long it may take to notice.
const (
	checkTime = 30 * time.Second
	patience  = 2 * time.Second
)

// run makes one check. One that panics or hangs becomes a finding, and the
// others follow: what hangs is left behind with a patient of its own.
func (p *patient) run(ctx context.Context, c check, limit time.Duration) {
	bound, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	found, left := make(chan Finding), make(chan struct{})
	defer close(left)
	own := *p
	own.told = 0
	own.tell = func(f Finding) {
		own.told++
		if f.Check == "" {
			f.Check = c.name
		}
		if f.Advice == asRoot {
			f.Advice = rights()
		}
		select {
		case found <- f:
		case <-left:
		}
	}
	go func() {
		defer close(found)
		defer func() {
			if wrong := recover(); wrong != nil {
				own.skip(fmt.Sprintf("this check broke off: %v", wrong), "a mistake in oam-docker-ipam: report it with this line and the version")
			}
		}()
		c.check(bound, &own)
	}()
	hangs := make(chan struct{})
	defer context.AfterFunc(bound, func() { time.AfterFunc(patience, func() { close(hangs) }) })()
	for {
		select {
		case f, more := <-found:
			if !more {
				tell := p.tell
				*p = own
				p.tell = tell
				return
			}
			p.tell(f)
		case <-hangs:
			if ctx.Err() == nil {
				p.tell(Finding{Check: c.name, Status: Skipped, Found: fmt.Sprintf("this check hangs: no end after %s", limit+patience), Advice: "what it looked at doesn't answer: a disk, a mount or a process that is stuck (dmesg, and ps for processes in state D)"})
			}
			return
		}
	}
}
