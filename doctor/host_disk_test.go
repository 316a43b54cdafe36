package doctor

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/talkingdata/oam-docker-ipam/store"
)

// A lease from the future was taken before the clock went back. Whether this
// machine's clock is synchronised is its own business.
func TestClock(t *testing.T) {
	site := testSite(t)
	for _, f := range site.examine(t, "clock") {
		if f.Status == Fault {
			t.Errorf("found %+v", f)
		}
	}
	future := testLease
	future.Obtained = time.Now().Add(48 * time.Hour)
	site.fill(t, future)
	has(t, site.examine(t, "clock"), Fault, "before the newest lease was obtained", future.Obtained.Local().Format(time.DateTime), "timedatectl")
}

func TestClockBeforeStart(t *testing.T) {
	site := testSite(t)
	d := site.start(t)
	d.health.Started = time.Now().Add(time.Hour)
	has(t, site.examine(t, "clock"), Fault, "before the daemon was started")
}

// mounted mounts a file system in a mount namespace of a process of its own and
// runs the test once more in there, with its folder; it reports whether this is
// that process.
func mounted(t *testing.T, options ...string) (folder string, here bool) {
	t.Helper()
	const variable = "DOCTOR_TEST_FOLDER"
	if folder := os.Getenv(variable); folder != "" {
		return folder, true
	}
	if os.Geteuid() != 0 {
		t.Skip("wants root, to mount")
	}
	folder = t.TempDir()
	self, err := os.Executable()
	works(t, err)
	// $1 is the folder, $2 this test.
	script := `mount --make-rprivate / && ` + strings.Join(options, " && ") + ` && exec "$0" -test.run="^$2\$" -test.v`
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script, self, folder, t.Name())
	cmd.Env = append(os.Environ(), variable+"="+folder)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v\n%s", err, out)
	}
	return "", false
}

func diskOf(t *testing.T, folder string) []Finding {
	t.Helper()
	site := testSite(t)
	site.DataDir = filepath.Join(folder, "not", "there", "yet")
	return site.examine(t, "disk")
}

func TestDiskFull(t *testing.T) {
	if folder, here := mounted(t, `mount -t tmpfs -o size=8m tmpfs "$1"`); here {
		found := diskOf(t, folder)
		has(t, found, Fault, folder+" is full: 8 MiB are free", "make room")
		has(t, found, Warning, "in memory", "DATA_DIR")
	}
}

func TestDiskNearlyFull(t *testing.T) {
	if folder, here := mounted(t, `mount -t tmpfs -o size=64m tmpfs "$1"`); here {
		has(t, diskOf(t, folder), Warning, "nearly full: 64 MiB")
	}
}

func TestDiskWithoutInodes(t *testing.T) {
	if folder, here := mounted(t, `mount -t tmpfs -o size=200m,nr_inodes=2 tmpfs "$1"`, `touch "$1/file"`); here {
		has(t, diskOf(t, folder), Warning, "no inode left")
	}
}

func TestDiskReadOnly(t *testing.T) {
	if folder, here := mounted(t, `mount -t tmpfs -o size=200m tmpfs "$1"`, `mount -o remount,ro "$1"`); here {
		has(t, diskOf(t, folder), Fault, "read-only", "remount")
	}
}

func TestDiskInContainer(t *testing.T) {
	if folder, here := mounted(t, `mount -t tmpfs -o size=200m tmpfs "$1"`, `mkdir "$1/upper" "$1/work"`,
		`mount -t overlay -o lowerdir=/usr/share/doc,upperdir="$1/upper",workdir="$1/work" overlay "$1"`); here {
		site := testSite(t)
		site.DataDir = folder
		works(t, syscall.Mount("tmpfs", "/run", "tmpfs", 0, ""))
		works(t, os.WriteFile("/run/.containerenv", nil, 0o600))
		only(t, site.examine(t, "disk"), Warning, "the container's own", "volume")
		playUnits(t, unitInactive) // a machine whose root is an overlay
		only(t, site.examine(t, "disk"), OK, folder)
	}
}

func TestDiskWell(t *testing.T) {
	site := testSite(t)
	only(t, site.examine(t, "disk"), OK, site.DataDir, "iB are free")
}

// The folder must be the user's as whom systemd starts the daemon.
func TestDiskRights(t *testing.T) {
	site := testSite(t)
	playUnits(t, strings.Replace(unitInactive, "User=", "User=nobody", 1))
	only(t, site.examine(t, "disk"), Fault, site.DataDir+" belongs to root, and the daemon runs as nobody", "chown -R nobody "+site.DataDir)
	works(t, os.Chown(site.DataDir, 65534, -1))
	only(t, site.examine(t, "disk"), OK, site.DataDir)
	works(t, os.WriteFile(filepath.Join(site.DataDir, store.File), nil, 0o600))
	only(t, site.examine(t, "disk"), Fault, "chown nobody "+filepath.Join(site.DataDir, store.File))

	works(t, os.Chown(filepath.Join(site.DataDir, store.File), 65534, -1))
	works(t, os.Chmod(site.DataDir, 0o777))
	only(t, site.examine(t, "disk"), Warning, "mode 0777", "chmod 700 "+site.DataDir)
}

func TestDatabase(t *testing.T) {
	site := testSite(t)
	only(t, site.examine(t, "database"), OK, "none yet in "+site.DataDir)
	site.fill(t, testLease)
	only(t, site.examine(t, "database"), OK, "1 network, 1 lease")

	file := filepath.Join(site.DataDir, store.File)
	setSchema(t, file, "99")
	only(t, site.examine(t, "database"), Fault, "written by a newer version", "install that version again")
	works(t, os.Truncate(file, 10_000))
	only(t, site.examine(t, "database"), Fault, "not usable", "restore it from a backup", "reconcile")
	works(t, os.WriteFile(file, []byte(strings.Repeat("no database ", 1000)), 0o600))
	only(t, site.examine(t, "database"), Fault, "not usable")
}

func setSchema(t *testing.T, file, schema string) {
	t.Helper()
	db, err := bolt.Open(file, 0, nil)
	works(t, err)
	works(t, db.Update(func(tx *bolt.Tx) error { return tx.Bucket([]byte("meta")).Put([]byte("schema"), []byte(schema)) }))
	works(t, db.Close())
}

// Whoever holds the database while nobody serves the socket is named.
func TestDatabaseLocked(t *testing.T) {
	site := testSite(t)
	site.fill(t)
	cmd := exec.CommandContext(t.Context(), "flock", "--no-fork", filepath.Join(site.DataDir, store.File), "sh", "-c", "echo locked; exec sleep 60")
	out, err := cmd.StdoutPipe()
	works(t, err)
	works(t, cmd.Start())
	defer func() { _ = cmd.Wait() }()
	defer func() { works(t, cmd.Process.Kill()) }()
	_, err = bufio.NewReader(out).ReadString('\n')
	works(t, err)
	only(t, site.examine(t, "database"), Fault, fmt.Sprintf("locked by sleep (pid %d)", cmd.Process.Pid), "nobody serves "+site.Socket, "--socket")

	// Its process may be stopped, with the socket open.
	works(t, cmd.Process.Signal(syscall.SIGSTOP))
	_, err = syscall.Wait4(cmd.Process.Pid, nil, syscall.WUNTRACED, nil)
	works(t, err)
	var found []Finding
	p := &patient{Site: site, tell: func(f Finding) { found = append(found, f) }, silence: context.DeadlineExceeded}
	p.open()
	p.run(t.Context(), check{"database", checkDatabase}, checkTime)
	only(t, found, Skipped, fmt.Sprintf("locked by sleep (pid %d, stopped), and what serves %s doesn't answer", cmd.Process.Pid, site.Socket))
	found = nil
	p.run(t.Context(), check{"daemon", checkDaemon}, checkTime)
	only(t, found, Fault, "it doesn't answer", fmt.Sprintf("kill -KILL %d", cmd.Process.Pid))
	p.units = units{serviceUnit: unit{"LoadState": {"loaded"}, "ActiveState": {"active"}}}
	found = nil
	p.run(t.Context(), check{"daemon", checkDaemon}, checkTime)
	only(t, found, Fault, "it doesn't answer", "systemctl restart oam-docker-ipam")
}

func TestDatabaseOfRunning(t *testing.T) {
	site := testSite(t)
	d := site.start(t)
	only(t, site.examine(t, "database"), OK, d.health.Database+": open in the daemon")

	works(t, os.Rename(d.health.Database, d.health.Database+".gone"))
	only(t, site.examine(t, "database"), Fault, "is gone", "reconcile")
	works(t, os.WriteFile(d.health.Database, nil, 0o600))
	only(t, site.examine(t, "database"), Fault, "another file than the daemon has open")
	works(t, os.Truncate(d.health.Database, large+1)) // without blocks
	has(t, site.examine(t, "database"), Warning, strconv.Itoa(large>>20)+" MiB", "bbolt compact")
}
