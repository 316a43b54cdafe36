package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// explainRights adds to an error about a path in the data folder, or the folder
// itself, whose that is, who this process is, and the command that mends it,
// where rights are what is missing.
func explainRights(folder, path string, err error) error {
	if errors.Is(err, syscall.EROFS) {
		return fmt.Errorf("%w: give the daemon a DATA_DIR that it may write to; a package's may write to %s after: systemctl edit oam-docker-ipam.service, with the lines [Service] and ReadWritePaths=%[2]s, and systemctl restart oam-docker-ipam", err, folder)
	}
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	me := os.Geteuid()
	there, owner := nearest(path)
	command := fmt.Sprintf("chown -R %s %s", account(me), folder)
	switch {
	case there != folder && !strings.HasPrefix(there, folder+"/"):
		command = fmt.Sprintf("install -d -m 0700 -o %s %s", account(me), folder)
	case owner == me:
		command = "chmod -R u+rwX " + folder
	}
	return fmt.Errorf("%w: %s belongs to %s, and this process runs as %s: as root run: %s", err, there, account(owner), account(me), command)
}

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
