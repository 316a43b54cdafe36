package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/store"
)

// ahead is how far what was written may lie in the clock's future.
const ahead = time.Minute

// checkClock: while the machine is up leases count by a clock that nobody sets;
// over a reboot the wall clock is all there is.
func checkClock(_ context.Context, p *patient) {
	now := time.Now()
	for _, past := range p.written() {
		if past.at.After(now.Add(ahead)) {
			p.fault(fmt.Sprintf("this host's clock says %s, before %s (%s)", now.Format(time.DateTime), past.what, past.at.Local().Format(time.DateTime)),
				"set it: timedatectl set-ntp true, or date -s; after a reboot leases would be taken for older or younger than they are")
			break
		}
	}
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	switch {
	case err != nil:
		p.skip(fmt.Sprintf("whether the clock is synchronised can't be told: %v", err), asRoot)
	case state == unix.TIME_ERROR || t.Status&unix.STA_UNSYNC != 0:
		p.warn("the clock is not synchronised", "have it set by the network (timedatectl set-ntp true, or chrony): over a reboot leases count by it")
	}
	p.otherwise("synchronised")
}

type written struct {
	what string
	at   time.Time
}

// written are moments that are past by all means.
func (p *patient) written() (past []written) {
	if program, err := os.Executable(); err == nil {
		if info, err := os.Stat(program); err == nil {
			past = append(past, written{"this program was made", info.ModTime()})
		}
	}
	if p.health != nil {
		past = append(past, written{"the daemon was started", p.health.Started})
	}
	newest := written{what: "the newest lease was obtained"}
	for _, l := range p.leases {
		if l.Obtained.After(newest.at) {
			newest.at = l.Obtained
		}
	}
	return append(past, newest)
}

// Bounds of a disk's free space, in bytes. The database grows by 16 MiB at a
// time.
const (
	diskFull = 16 << 20
	diskLow  = 100 << 20
)

// fileSystems that don't keep the database as a disk does.
var fileSystems = map[int64]struct{ found, advice string }{
	unix.TMPFS_MAGIC:      inMemory,
	unix.RAMFS_MAGIC:      inMemory,
	unix.NFS_SUPER_MAGIC:  overNetwork,
	unix.SMB_SUPER_MAGIC:  overNetwork,
	unix.SMB2_SUPER_MAGIC: overNetwork,
	unix.CIFS_SUPER_MAGIC: overNetwork,
	unix.CEPH_SUPER_MAGIC: overNetwork,
	unix.AFS_SUPER_MAGIC:  overNetwork,
}

var (
	inMemory    = struct{ found, advice string }{"in memory: leases are gone after a reboot", "set DATA_DIR to a folder on a disk"}
	overNetwork = struct{ found, advice string }{"on a network file system: each lease waits for it, and without the network there is none", "set DATA_DIR to a folder on a disk of this host"}
)

// checkDisk: can the database be written, and does it stay?
func checkDisk(_ context.Context, p *patient) {
	folder, err := filepath.Abs(p.folder())
	if err != nil || p.folder() == "" {
		p.skip("no data folder is known", "set DATA_DIR to one by its absolute path")
		return
	}
	there := nearest(folder)
	var fsys unix.Statfs_t
	if err := unix.Statfs(there, &fsys); err != nil {
		p.deniedOr(fmt.Errorf("look at %s: %w", there, err), "is its disk there? mount, dmesg")
		return
	}
	free := fsys.Bavail * uint64(fsys.Bsize)
	switch {
	case fsys.Flags&unix.ST_RDONLY != 0:
		p.fault(there+" is mounted read-only", "dmesg says why, where that happened by itself: mend the disk, then mount -o remount,rw; or set DATA_DIR to another folder")
	case free < diskFull:
		p.fault(fmt.Sprintf("%s is full: %s are free", there, inBytes(free)), "make room there, or set DATA_DIR to another folder: no lease is granted that can't be written")
	case free < diskLow:
		p.warn(fmt.Sprintf("%s is nearly full: %s are free", there, inBytes(free)), "make room there: no lease is granted that can't be written")
	case fsys.Files > 0 && fsys.Ffree == 0:
		p.warn(there+" has no inode left: new files can't be made", "remove files there (df -i)")
	}
	if odd, found := fileSystems[fsys.Type]; found {
		p.warn(folder+" is "+odd.found, odd.advice)
	}
	if fsys.Type == unix.OVERLAYFS_SUPER_MAGIC && p.units == nil && inContainer() {
		p.warn(folder+" is the container's own: leases are gone when that is removed", "mount a volume there")
	}
	p.checkRights(folder)
	p.otherwise("%s: %s are free", folder, inBytes(free))
}

// inContainer reports whether this is a container of Docker's or Podman's, as
// they mark them.
func inContainer() bool {
	for _, mark := range []string{"/.dockerenv", "/run/.containerenv"} {
		if _, err := os.Stat(mark); err == nil {
			return true
		}
	}
	return false
}

// folder is the data folder: the running daemon's, or a start's.
func (p *patient) folder() string {
	if p.health != nil {
		return filepath.Dir(p.health.Database)
	}
	return p.DataDir
}

// checkRights looks whether the data folder is the daemon's user's.
func (p *patient) checkRights(folder string) {
	uid, known := p.user()
	if !known {
		return
	}
	if err := store.Rights(folder, uid); err != nil {
		p.deniedOr(err, p.how("restart"))
		return
	}
	info, err := os.Stat(folder)
	if err == nil && info.Mode().Perm()&0o022 != 0 {
		p.warn(fmt.Sprintf("%s has mode %#o: others may put another database there", folder, info.Mode().Perm()), "chmod 700 "+folder)
	}
}

// user is who the daemon is, or would be, and whether that can be told.
func (p *patient) user() (uid int, known bool) {
	switch name := p.units[serviceUnit].get("User"); {
	case p.health != nil:
		info, err := os.Stat("/proc/" + strconv.Itoa(p.process()))
		if err != nil {
			return 0, false // it can't be found
		}
		return int(info.Sys().(*syscall.Stat_t).Uid), true
	case name != "":
		u, err := user.Lookup(name)
		if err != nil {
			return 0, false
		}
		uid, err := strconv.Atoi(u.Uid)
		return uid, err == nil
	case p.units[serviceUnit].there():
		return 0, true
	}
	return 0, false
}

// deniedOr tells that something can't be looked at without root, or a fault.
func (p *patient) deniedOr(err error, advice string) {
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		p.skip(err.Error(), asRoot)
		return
	}
	p.fault(err.Error(), advice)
}

// nearest is a path, or of the folders above it the first that is there.
func nearest(path string) string {
	for ; ; path = filepath.Dir(path) {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) || path == filepath.Dir(path) {
			return path
		}
	}
}

// inBytes writes a number of bytes, rounded down, in MiB or, from 10 on, in GiB.
func inBytes(n uint64) string {
	if n >= 10<<30 {
		return fmt.Sprintf("%d GiB", n>>30)
	}
	return fmt.Sprintf("%d MiB", n>>20)
}

// large is the size of a database, in bytes, that 10,000 leases with all of
// their history stay far below.
const large = 512 << 20

// checkDatabase: is it there, whole and the daemon's?
func checkDatabase(_ context.Context, p *patient) {
	switch {
	case p.health != nil:
		p.checkOpen(p.health.Database, p.health.PID)
		return
	case p.stored == nil:
		p.skip("the daemon can't be asked", asRoot)
		return
	}
	switch err := p.stored.err; {
	case err == nil:
		p.checkSize(p.stored.Path, p.stored.Size)
		p.otherwise("%s: %s, %s", p.stored.Path, p.counts(), inBytes(uint64(p.stored.Size)))
	case errors.Is(err, fs.ErrNotExist):
		p.ok("none yet in %s: the daemon's first start makes it", p.DataDir)
	case errors.Is(err, store.ErrLocked) && p.hangs():
		p.skip(fmt.Sprintf("%s is locked by %s, and what serves %s doesn't answer", p.stored.Path, listed(p.holders()), p.Socket), "see the daemon, above")
	case errors.Is(err, store.ErrLocked):
		where := "nobody serves " + p.Socket
		if !p.down() {
			where = "no daemon answers on " + p.Socket
		}
		p.fault(fmt.Sprintf("%s is locked by %s, and %s", p.stored.Path, listed(p.holders()), where),
			"if that is a daemon with another socket, name it: oam-docker-ipam --socket PATH doctor; else end that process (kill PID), then "+p.how("start"))
	default:
		p.deniedOr(err, "after that: "+p.how("start")+", and oam-docker-ipam reconcile takes up the leases of running containers")
	}
}

// checkOpen looks whether the file that the daemon has open is the one in its
// place.
func (p *patient) checkOpen(path string, pid int) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		p.fault(path+" is gone: somebody removed it under the running daemon, and its leases will be with it at the next start",
			p.how("restart")+", then oam-docker-ipam reconcile takes up the leases of running containers")
	case err != nil:
		p.deniedOr(fmt.Errorf("look at the database: %w", err), "is its disk well? dmesg")
	default:
		if isOpen, known := opens(pid, path); known && !isOpen {
			p.fault(path+" is another file than the daemon has open: somebody put it there while the daemon ran", p.how("restart")+", then oam-docker-ipam reconcile")
		}
		p.checkSize(path, info.Size())
		p.otherwise("%s: open in the daemon, %s", path, inBytes(uint64(info.Size())))
	}
}

func (p *patient) checkSize(path string, size int64) {
	if size > large {
		p.warn(fmt.Sprintf("%s has %s", path, inBytes(uint64(size))), "it doesn't shrink by itself: while the daemon is stopped, copy it by bbolt compact (go.etcd.io/bbolt/cmd/bbolt)")
	}
}

// opens reports whether a process has a file open, and whether that can be told.
func opens(pid int, path string) (open, known bool) {
	proc, err := procfs.NewProc(pid)
	if err != nil {
		return false, false
	}
	targets, err := proc.FileDescriptorTargets()
	return slices.Contains(targets, path), err == nil && slices.ContainsFunc(targets, func(t string) bool { return strings.Contains(t, store.File) })
}

// holder is a process that has a file open.
type holder struct {
	pid     int
	name    string
	stopped bool // by a signal or a debugger
}

// openers are the processes that have a file open, as far as /proc tells.
func openers(path string) (holders []holder) {
	// What can't be read isn't there.
	procs, _ := procfs.AllProcs()
	for _, proc := range procs {
		if open, _ := opens(proc.PID, path); open && proc.PID != os.Getpid() {
			stat, _ := proc.Stat()
			holders = append(holders, holder{proc.PID, stat.Comm, stat.State == "T" || stat.State == "t"})
		}
	}
	return holders
}

// listed names processes.
func listed(holders []holder) string {
	var names []string
	for _, h := range holders {
		state := ""
		if h.stopped {
			state = ", stopped"
		}
		names = append(names, fmt.Sprintf("%s (pid %d%s)", h.name, h.pid, state))
	}
	return cmp.Or(strings.Join(names, " and "), "another process (as root, fuser -v names it)")
}
