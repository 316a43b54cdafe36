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
	if os.Getuid() != 0 {
		t.Skip("needs root to be somebody else")
	}
	const nobody = 65534 // of this name everywhere
	for name, c := range map[string]struct {
		spoil func(t *testing.T, folder string)
		parts []string
		mend  func(folder string) error // what the command does
	}{
		"root's folder": {
			func(t *testing.T, folder string) { works(t, os.Chown(folder, 0, 0)) },
			[]string{"FOLDER belongs to root", "runs as nobody", "chown -R nobody FOLDER"},
			func(folder string) error { return chownAll(folder, nobody) },
		},
		"root's file": {
			func(t *testing.T, folder string) { works(t, os.Chown(filepath.Join(folder, File), 0, 0)) },
			[]string{"FOLDER/" + File + " belongs to root", "runs as nobody", "chown -R nobody FOLDER"},
			func(folder string) error { return chownAll(folder, nobody) },
		},
		"a user without a name": {
			func(t *testing.T, folder string) { works(t, chownAll(folder, 54321)) },
			[]string{"FOLDER belongs to 54321", "chown -R nobody FOLDER"},
			func(folder string) error { return chownAll(folder, nobody) },
		},
		"its own file, read-only": {
			func(t *testing.T, folder string) { works(t, os.Chmod(filepath.Join(folder, File), 0o400)) },
			[]string{"FOLDER/" + File + " belongs to nobody", "chmod -R u+rwX FOLDER"},
			func(folder string) error { return os.Chmod(filepath.Join(folder, File), 0o600) },
		},
		"no folder yet": {
			func(t *testing.T, folder string) { works(t, os.RemoveAll(folder)) },
			[]string{"make data folder", " belongs to root", "install -d -m 0700 -o nobody FOLDER"},
			func(folder string) error { return errors.Join(os.Mkdir(folder, 0o700), os.Chown(folder, nobody, -1)) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			above, err := os.MkdirTemp("", "rights")
			works(t, err)
			t.Cleanup(func() { os.RemoveAll(above) })
			works(t, os.Chmod(above, 0o755))
			folder := filepath.Join(above, "data")
			works(t, os.Mkdir(folder, 0o700))
			works(t, os.Chown(folder, nobody, -1))
			works(t, openAs(t, nobody, folder))
			c.spoil(t, folder)
			err = openAs(t, nobody, folder)
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

// So is a folder that the unit's ProtectSystem= leaves out; what has nothing to do
// with rights is left as it is.
func TestReadOnly(t *testing.T) {
	err := explainRights("/srv/ipam", "/srv/ipam/"+File, &os.PathError{Op: "open", Path: "/srv/ipam/" + File, Err: unix.EROFS})
	for _, part := range []string{"read-only file system", "DATA_DIR", "ReadWritePaths=/srv/ipam"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q lacks %q", err, part)
		}
	}
	full := &os.PathError{Op: "open", Path: "/srv/ipam", Err: unix.ENOSPC}
	if err := explainRights("/srv/ipam", "/srv/ipam", full); err != error(full) {
		t.Errorf("error %v", err)
	}
}

// chownAll is chown -R.
func chownAll(folder string, uid int) error {
	return filepath.WalkDir(folder, func(path string, _ os.DirEntry, err error) error {
		return errors.Join(err, os.Chown(path, uid, -1))
	})
}
