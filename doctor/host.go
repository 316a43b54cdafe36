package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/server"
	"github.com/talkingdata/oam-docker-ipam/store"
)

// answerTime is how long the daemon may take to say how it is: longer than it
// waits itself for what is stuck in it.
const answerTime = 6 * time.Second

// stored is what the database has, or why it can't be told.
type stored struct {
	store.Contents
	err error
}

var (
	errStopped = errors.New("systemd holds its socket and has it stopped")
	errDenied  = errors.New("not permitted")
	errLong    = fmt.Errorf("the path of a socket has at most %d bytes", longest)
)

// longest is what the kernel takes as a socket's path, in bytes.
const longest = len(unix.RawSockaddrUnix{}.Path) - 1

// down reports whether nobody serves the daemon's socket.
func (p *patient) down() bool {
	return errors.Is(p.silence, errStopped) || errors.Is(p.silence, server.ErrNotRunning)
}

// hangs reports whether somebody serves it, and answers nothing: a full queue
// refuses at once.
func (p *patient) hangs() bool {
	return errors.Is(p.silence, context.DeadlineExceeded) || errors.Is(p.silence, unix.EAGAIN)
}

// asRoot is the advice where rights are missing, see rights.
const asRoot = "run it as root: sudo oam-docker-ipam doctor"

// rights is the advice where rights are missing: of root, those that it lacks.
func rights() string {
	if os.Geteuid() != 0 {
		return asRoot
	}
	self, err := procfs.Self()
	if err != nil {
		return asRoot
	}
	status, err := self.NewStatus()
	if err != nil {
		return asRoot
	}
	space, err := os.Readlink("/proc/self/ns/pid")
	return lacking(status.CapEff, err == nil && space != firstSpace)
}

// firstSpace is the host's own PID namespace, whose number is the same
// everywhere.
const firstSpace = "pid:[4026531836]"

// lacking is the advice for a root that has only these capabilities(7), or is in
// a PID namespace of its own.
func lacking(capabilities uint64, apart bool) string {
	var lacks []string
	for _, c := range []struct {
		bit  int
		name string
	}{
		{unix.CAP_DAC_OVERRIDE, "CAP_DAC_OVERRIDE"},
		{unix.CAP_NET_BIND_SERVICE, "CAP_NET_BIND_SERVICE"},
		{unix.CAP_NET_RAW, "CAP_NET_RAW"},
		{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE"},
	} {
		if capabilities&(1<<c.bit) == 0 {
			lacks = append(lacks, c.name)
		}
	}
	switch {
	case lacks != nil:
		return fmt.Sprintf("it runs as root without %s: run it on the host itself, with all of root's capabilities", strings.Join(lacks, ", "))
	case apart:
		return "it runs as root of a container, or another PID namespace of its own: run it on the host itself"
	}
	return asRoot
}

// reach tells whether this process may connect to a socket: nil, errDenied or
// fs.ErrNotExist. It doesn't connect.
func reach(socket string) error {
	err := unix.Faccessat(unix.AT_FDCWD, socket, unix.R_OK|unix.W_OK, unix.AT_EACCESS)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return errDenied
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return fs.ErrNotExist
	}
	return nil
}

// meet asks the daemon how it is and what it holds, or looks into its database
// where it is down. A daemon that is meant to be down isn't started: at a
// socket that systemd holds for a stopped one, nobody is asked.
func meet(ctx context.Context, p *patient) {
	p.units = askSystemd(ctx)
	if p.units.asleep(serviceUnit, socketUnit) {
		p.silence = errStopped
	} else {
		p.ask(ctx)
	}
	if p.health == nil && !errors.Is(p.silence, errDenied) && p.DataDir != "" {
		p.open()
	}
}

func (p *patient) ask(ctx context.Context) {
	if len(p.Socket) > longest {
		p.silence = errLong
		return
	}
	if p.silence = reach(p.Socket); errors.Is(p.silence, errDenied) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	health, err := server.AskHealth(ctx, p.Socket)
	if err == nil {
		p.running, err = server.Settings(ctx, p.Socket)
	}
	var held server.Examined
	if err == nil {
		held, err = server.Examine(ctx, p.Socket)
	}
	if p.silence = err; err != nil {
		return
	}
	p.health, p.pools, p.leases, p.known = &health, held.Pools, held.Leases, true
	if global, err := p.Options(p.next()); err == nil {
		p.Global, p.GlobalErr = global, nil
	}
}

// apart reports whether a setting came from a command line or an environment:
// another process may have another value.
func apart(s server.Setting) bool {
	return strings.HasPrefix(s.Source, "flag ") || strings.HasPrefix(s.Source, "environment ")
}

// next are the settings that the running daemon would have after a restart: ours
// but for what only its command line and environment tell, or its own where ours
// can't be used.
func (p *patient) next() []server.Setting {
	if p.Wrong != nil {
		return p.running
	}
	next := slices.Clone(p.Settings)
	for i, fresh := range next {
		for _, now := range p.running {
			if now.Key == fresh.Key && apart(now) && !apart(fresh) {
				next[i] = now
			}
		}
	}
	return next
}

// open takes pools and leases from the database, as the daemon would have them.
func (p *patient) open() {
	contents, err := store.Read(p.DataDir)
	p.stored = &stored{contents, err}
	// Of a daemon that hasn't run yet it is known that it has none.
	p.known = err == nil || errors.Is(err, fs.ErrNotExist)
	if err != nil {
		return
	}
	subnets, counts := map[string]lease.Pool{}, map[string]map[string]int{}
	for _, pool := range contents.Pools {
		subnets[pool.ID], counts[pool.ID] = pool, map[string]int{}
	}
	for _, l := range contents.Leases {
		state := l.State(time.Now()).String()
		p.leases = append(p.leases, lease.Held{Lease: l, Subnet: subnets[l.Pool].Subnet, State: state})
		if counts[l.Pool] != nil {
			counts[l.Pool][state]++
		}
	}
	global := p.Global.Or(lease.Defaults())
	for _, pool := range contents.Pools {
		p.pools = append(p.pools, lease.PoolStatus{Pool: pool, InForce: pool.Options.Or(global), Leases: counts[pool.ID]})
	}
}

// counts is how much is held, for people.
func (p *patient) counts() string {
	return plural(len(p.pools), "network") + ", " + plural(len(p.leases), "lease")
}

func plural(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

// checkConfiguration: can a daemon start by it, and does the running one have it?
func checkConfiguration(_ context.Context, p *patient) {
	if p.Wrong != nil {
		advice := "correct it: oam-docker-ipam config --check says whether it is right"
		if p.health != nil {
			advice += "; the daemon runs on by its former settings, and the next start fails"
		}
		p.fault(oneLine(p.Wrong), advice)
	}
	for _, key := range p.Unknown {
		p.warn(key, "correct or remove it: it has no effect (oam-docker-ipam config lists all keys)")
	}
	if p.Wrong == nil {
		p.compare()
	}
	if p.GlobalErr == nil {
		for _, pool := range p.nowhere() {
			p.warn(pool, "set DHCP_SERVER=ADDRESS or DHCP_INTERFACE=INTERFACE in the configuration (oam-docker-ipam discover --interface eth0 shows who answers), or give each network its own: --ipam-opt dhcp_server=ADDRESS")
		}
	}
	p.otherwise("%s", p.inForce())
}

// compare tells the settings by which a start would differ from the running
// daemon. What came from a command line or an environment, ours or the daemon's,
// says nothing about the next start.
func (p *patient) compare() {
	for _, fresh := range p.Settings {
		for _, now := range p.running {
			if now.Key != fresh.Key || now.Value == fresh.Value || apart(now) || apart(fresh) {
				continue
			}
			verb := "restart"
			if p.Reloadable(fresh.Key) {
				verb = "reload"
			}
			p.warn(fmt.Sprintf("%s is %q (%s), and the running daemon still has %q", fresh.Key, fresh.Value, fresh.Source, now.Value), p.how(verb))
		}
	}
}

// nowhere are the reasons why some network knows no DHCP server to ask.
func (p *patient) nowhere() (reasons []string) {
	if len(p.Global.Servers) > 0 || p.Global.Interface != "" {
		return nil
	}
	if len(p.pools) == 0 {
		return []string{"neither DHCP_SERVER nor DHCP_INTERFACE is set: only networks that name their own are served"}
	}
	for _, pool := range p.pools {
		if len(pool.InForce.Servers) == 0 && pool.InForce.Interface == "" {
			reasons = append(reasons, fmt.Sprintf("network %s has no DHCP server: neither it nor the configuration names one", pool.Subnet))
		}
	}
	return reasons
}

// inForce are the settings that aren't defaults: the daemon's, or a start's.
func (p *patient) inForce() string {
	settings, of := p.Settings, ""
	if p.health != nil {
		settings, of = p.running, ", as the running daemon has it"
	}
	var set []string
	for _, s := range settings {
		if s.Source != "default" {
			set = append(set, fmt.Sprintf("%s=%s (%s)", s.Key, s.Value, s.Source))
		}
	}
	if set == nil {
		return "all defaults" + of
	}
	return strings.Join(set, ", ") + of
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// young is how long after a start a restart is worth a word.
const young = time.Hour

// checkDaemon: does it run, and does all in it get on?
func checkDaemon(ctx context.Context, p *patient) {
	service, socket := p.units[serviceUnit], p.units[socketUnit]
	// Either of the two brings it back.
	if service.is("UnitFileState", "disabled") && socket.is("UnitFileState", "disabled") {
		defer p.warn("it isn't started at boot", "systemctl enable oam-docker-ipam")
	}
	switch {
	case p.health != nil:
		p.checkRunning()
	case errors.Is(p.silence, errDenied):
		p.skip(p.Socket+": not permitted", asRoot)
	case service.is("LoadState", "masked"):
		p.fault("it doesn't run: its unit is masked", "systemctl unmask oam-docker-ipam, then systemctl start oam-docker-ipam")
	case errors.Is(p.silence, errStopped) && !service.is("ActiveState", "failed") && p.stored != nil && len(p.pools) == 0 && (p.stored.err == nil || errors.Is(p.stored.err, fs.ErrNotExist)):
		p.warn("it is stopped, and holds nothing: systemd starts it at Docker's first question", "systemctl start oam-docker-ipam, if it is to run before")
	case errors.Is(p.silence, errLong):
		p.fault(fmt.Sprintf("%s has %d bytes: %v", p.Socket, len(p.Socket), p.silence), "set a shorter PLUGIN_SOCKET, or DRIVER_NAME")
	case p.down():
		found := "it doesn't run" + p.units.why(ctx)
		if len(p.leases) > 0 {
			found += fmt.Sprintf(": nobody renews its %s", plural(len(p.leases), "lease"))
		}
		advice := p.how("start")
		if service.there() {
			advice += "; if that fails, journalctl -u oam-docker-ipam -n 20 says why"
		}
		p.fault(found, advice)
	case p.hangs():
		p.fault(fmt.Sprintf("it doesn't answer: silent for %s on %s", answerTime, p.Socket)+p.units.why(ctx)+p.holding(), p.unhang()+"; its log says what it was doing")
	default:
		if who, err := stranger(ctx, p.Socket); err == nil && who != "" {
			p.fault(who, "end that program, or give the daemon another DRIVER_NAME or PLUGIN_SOCKET; then "+p.how("start"))
			return
		}
		// It refuses to start, or is another version: its words say what to do.
		p.fault(oneLine(p.silence), "mend that, then "+p.how("restart"))
	}
}

// holding tells who has the database of a daemon that hangs.
func (p *patient) holding() string {
	if holders := p.holders(); holders != nil {
		return fmt.Sprintf("; %s has its database open", listed(holders))
	}
	return ""
}

// holders are the processes that have the database open, as far as is known.
func (p *patient) holders() []holder {
	if p.stored == nil || !errors.Is(p.stored.err, store.ErrLocked) {
		return nil
	}
	return openers(p.stored.Path)
}

// unhang is how a daemon that hangs is restarted: one that is stopped doesn't
// heed SIGTERM, to which systemd adds SIGCONT.
func (p *patient) unhang() string {
	if p.units[serviceUnit].there() {
		return p.how("restart")
	}
	pid := "PID"
	if holders := p.holders(); len(holders) == 1 {
		pid = strconv.Itoa(holders[0].pid)
		if holders[0].stopped {
			return fmt.Sprintf("let it go on (kill -CONT %s), or end it (kill -KILL %[1]s) and start it again as it was started", pid)
		}
	}
	return fmt.Sprintf("end it (kill -KILL %s) and start it again as it was started", pid)
}

// checkRunning tells what a running daemon says of itself.
func (p *patient) checkRunning() {
	h := p.health
	age := time.Since(h.Started).Round(time.Second)
	if h.Version != p.Version {
		p.warn(fmt.Sprintf("version %s runs, and %s is installed", h.Version, p.Version), p.how("restart"))
	}
	if n := p.units[serviceUnit].get("NRestarts"); n != "" && n != "0" && age < young {
		p.warn(fmt.Sprintf("systemd has restarted it %s times after failures, the last time %s ago", n, age), "journalctl -u oam-docker-ipam -p warning says what ended it")
	}
	if h.Alive != "" {
		p.fault("it doesn't get on: "+h.Alive, "mend that, or "+p.how("restart"))
	}
	if h.Ready != "" && h.Ready != h.Alive {
		p.warn("an address request would likely fail: "+h.Ready, "the checks below look for the cause")
	}
	p.otherwise("version %s runs since %s (pid %d): %s", h.Version, h.Started.Local().Format(time.DateTime), h.PID, p.counts())
}
