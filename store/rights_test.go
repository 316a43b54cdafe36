package store

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// openAs is Open by another user, in a thread of its own, which ends with it.
func openAs(t *testing.T, uid int, folder string) error {
	t.Helper()
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked
		if _, _, failed := syscall.RawSyscall(syscall.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); failed != 0 {
			result <- failed
			return
		}
		db, err := Open(folder)
		if err == nil {
			err = db.Close()
		}
		result <- err
	}()
	return <-result
}

// Rights that are missing are an error that says whose the thing is, who asks,
// and the command that mends it, which does.
func TestRights(t *testing.T) {
	needRoot(t)
	for name, c := range map[string]struct {
		spoil func(t *testing.T, folder string)
		parts []string
		mend  func(folder string) error // what the command does
	}{
		"root's folder": {
			func(t *testing.T, folder string) { works(t, os.Chown(folder, 0, 0)) },
			[]string{"FOLDER belongs to root", "runs as nobody", "if there is nothing in it but the daemon's database, as root run: chown -R nobody FOLDER;"},
			func(folder string) error { return chownAll(folder, nobody) },
		},
		"root's folder, empty and readable": {
			func(t *testing.T, folder string) {
				works(t, errors.Join(os.Remove(filepath.Join(folder, File)), os.Chown(folder, 0, 0), os.Chmod(folder, 0o755)))
			},
			[]string{"FOLDER belongs to root", "nobody: as root run: chown -R nobody FOLDER"},
			func(folder string) error { return chownAll(folder, nobody) },
		},
		"root's folder with copies of the database": {
			func(t *testing.T, folder string) {
				path := filepath.Join(folder, File)
				works(t, errors.Join(os.Rename(path, path+".old"), os.Chown(folder, 0, 0), os.Chmod(folder, 0o755)))
			},
			[]string{"FOLDER belongs to root", "nobody: as root run: chown -R nobody FOLDER"},
			func(folder string) error { return chownAll(folder, nobody) },
		},
		"root's file": {
			func(t *testing.T, folder string) { works(t, os.Chown(filepath.Join(folder, File), 0, 0)) },
			[]string{"FOLDER/" + File + " belongs to root", "runs as nobody", "as root run: chown nobody FOLDER/" + File},
			func(folder string) error { return os.Chown(filepath.Join(folder, File), nobody, -1) },
		},
		"a user without a name": {
			func(t *testing.T, folder string) { works(t, chownAll(folder, 54321)) },
			[]string{"FOLDER belongs to 54321", "chown -R nobody FOLDER"},
			func(folder string) error { return chownAll(folder, nobody) },
		},
		"its own file, read-only": {
			func(t *testing.T, folder string) { works(t, os.Chmod(filepath.Join(folder, File), 0o400)) },
			[]string{"FOLDER/" + File + " belongs to nobody", "run: chmod u+rwX FOLDER/" + File},
			func(folder string) error { return os.Chmod(filepath.Join(folder, File), 0o600) },
		},
		"its own folder, closed": {
			func(t *testing.T, folder string) { works(t, os.Chmod(folder, 0)) },
			[]string{"FOLDER belongs to nobody", "run: chmod u+rwX FOLDER"},
			func(folder string) error { return os.Chmod(folder, 0o700) },
		},
		"no folder yet": {
			func(t *testing.T, folder string) { works(t, os.RemoveAll(folder)) },
			[]string{"make data folder", " belongs to root", "install -d -m 0700 -o nobody FOLDER"},
			func(folder string) error { return errors.Join(os.Mkdir(folder, 0o700), os.Chown(folder, nobody, -1)) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			folder := theirs(t)
			works(t, openAs(t, nobody, folder))
			c.spoil(t, folder)
			err := openAs(t, nobody, folder)
			if err == nil {
				t.Fatal("no error")
			}
			for _, part := range c.parts {
				if part = strings.ReplaceAll(part, "FOLDER", folder); !strings.Contains(err.Error(), part) {
					t.Errorf("%q lacks %q", err, part)
				}
			}
			works(t, c.mend(folder))
			works(t, openAs(t, nobody, folder))
		})
	}
}

const nobody = 65534 // of this name everywhere

func needRoot(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to be somebody else")
	}
}

// theirs is a folder of nobody's.
func theirs(t *testing.T) string {
	above, err := os.MkdirTemp("", "rights")
	works(t, err)
	t.Cleanup(func() { os.RemoveAll(above) })
	folder := filepath.Join(above, "data")
	works(t, errors.Join(os.Chmod(above, 0o755), os.Mkdir(folder, 0o700), os.Chown(folder, nobody, -1)))
	return folder
}

// A folder that is for something else, such as /etc, stays as it is: its owner's,
// and read-only where it is that, also with our database in it. So does one of
// which nothing can be seen.
func TestFoldersOfOthers(t *testing.T) {
	needRoot(t)
	const own = ": give the daemon a folder of its own: as root run: install -d -m 0700 -o nobody /var/lib/oam-docker-ipam, and set DATA_DIR=/var/lib/oam-docker-ipam"
	for name, spoil := range map[string]func(folder string) error{
		"alone": func(folder string) error { return os.Remove(filepath.Join(folder, File)) },
		"beside our database's copy": func(folder string) error {
			path := filepath.Join(folder, File)
			return os.Rename(path, path+".old")
		},
	} {
		folder := theirs(t)
		works(t, openAs(t, nobody, folder))
		works(t, errors.Join(spoil(folder), os.WriteFile(filepath.Join(folder, "passwd"), nil, 0o644), os.Chown(folder, 0, 0), os.Chmod(folder, 0o755)))
		err := openAs(t, nobody, folder)
		if err == nil || !strings.HasSuffix(err.Error(), folder+" belongs to root, and the daemon runs as nobody"+own) {
			t.Errorf("%s: error %v", name, err)
		}
		err = explainRights(folder, filepath.Join(folder, File), unix.EROFS)
		if want := strings.ReplaceAll("read-only file system"+own, "nobody", "root"); err.Error() != want {
			t.Errorf("%s, read-only: error %v", name, err)
		}
		works(t, os.Chmod(filepath.Dir(folder), 0o700))
		if err := openAs(t, nobody, folder); err == nil || !strings.HasSuffix(err.Error(), own) {
			t.Errorf("%s, not to be seen: error %v", name, err)
		}
	}
}

// A folder of our own that the unit's ProtectSystem= leaves out, or that has yet
// to be made there; what has nothing to do with rights is left as it is.
func TestReadOnly(t *testing.T) {
	there := t.TempDir()
	missing := filepath.Join(there, "data")
	for folder, part := range map[string]string{
		there:   " may write to " + there + " after: systemctl edit ",
		missing: " after: install -d -m 0700 -o " + account(os.Geteuid()) + " " + missing + ", systemctl edit ",
	} {
		path := filepath.Join(folder, File)
		err := explainRights(folder, path, &os.PathError{Op: "open", Path: path, Err: unix.EROFS})
		for _, part := range []string{"read-only file system", "DATA_DIR", part, "ReadWritePaths=-" + folder + ","} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%q lacks %q", err, part)
			}
		}
	}
	full := &os.PathError{Op: "open", Path: there, Err: unix.ENOSPC}
	if err := explainRights(there, there, full); err != error(full) {
		t.Errorf("error %v", err)
	}
}

// chownAll is chown -R.
func chownAll(folder string, uid int) error {
	return filepath.WalkDir(folder, func(path string, _ os.DirEntry, err error) error {
		return errors.Join(err, os.Chown(path, uid, -1))
	})
}
