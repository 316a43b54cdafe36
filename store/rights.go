package store

import (
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
)

// packageFolder is the data folder of packages, the daemon's alone.
const packageFolder = "/var/lib/oam-docker-ipam"

// explainRights adds to an error about a path in the data folder, or the folder
// itself, what to do where rights are what is missing. People run such commands as
// they stand: what isn't surely the daemon's own, they leave alone.
func explainRights(folder, path string, err error) error {
	return rightsOf(os.Geteuid(), folder, path, err)
}

// rightsOf is explainRights for the daemon's user.
func rightsOf(me int, folder, path string, err error) error {
	readOnly := errors.Is(err, syscall.EROFS)
	if !readOnly && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	user := account(me)
	newFolder := "install -d -m 0700 -o " + user + " "
	entries, unread := os.ReadDir(folder)
	missing := errors.Is(unread, fs.ErrNotExist)
	ours := folder == packageFolder || unread == nil && !slices.ContainsFunc(entries, foreign)
	elsewhere := fmt.Sprintf("give the daemon a folder of its own: as root run: %s%s, and set DATA_DIR=%[2]s", newFolder, packageFolder)
	if readOnly {
		first := ""
		switch {
		case missing:
			first = newFolder + folder + ", "
		case !ours:
			return fmt.Errorf("%w: %s", err, elsewhere)
		}
		return fmt.Errorf("%w: give the daemon a DATA_DIR that it may write to; a package's may write to %s after: %ssystemctl edit oam-docker-ipam.service, with the lines [Service] and ReadWritePaths=-%[2]s, and systemctl restart oam-docker-ipam", err, folder, first)
	}
	there, owner := nearest(path)
	advice := elsewhere
	switch {
	case missing:
		advice = "as root run: " + newFolder + folder
	case owner == me:
		advice = "run: chmod u+rwX " + there
	case there == filepath.Join(folder, File):
		advice = fmt.Sprintf("as root run: chown %s %s", user, there)
	case there != folder:
	case ours:
		advice = fmt.Sprintf("as root run: chown -R %s %s", user, folder)
	case unread != nil:
		advice = fmt.Sprintf("if there is nothing in it but the daemon's database, as root run: chown -R %s %s; else %s", user, folder, elsewhere)
	}
	return fmt.Errorf("%w: %s belongs to %s, and the daemon runs as %s: %s", err, there, account(owner), user, advice)
}

// foreign reports whether something in the data folder is neither the database
// nor a copy of it.
func foreign(e fs.DirEntry) bool { return !strings.HasPrefix(e.Name(), File) }

// nearest is a path, or of the folders above it the first that can be seen, and
// its owner.
func nearest(path string) (there string, owner int) {
	// The root folder can always be seen.
	for there = path; ; there = filepath.Dir(there) {
		if info, err := os.Stat(there); err == nil {
			return there, int(info.Sys().(*syscall.Stat_t).Uid)
		}
	}
}

// account is a user's name, or the number where it has none.
func account(uid int) string {
	id := strconv.Itoa(uid)
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return id
}
