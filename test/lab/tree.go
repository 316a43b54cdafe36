package lab

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// treeCache keeps the trees of machines from one run to the next: to build one
// takes half a minute. Each may be removed at any time when no test runs.
const treeCache = "/var/cache/oam-docker-ipam-test"

// treeCommand builds the tree in the folder that it is given last. Both
// families of packages are in it: dnf is Debian's own.
var treeCommand = []string{
	"mmdebstrap", "--quiet", "--mode=root", "--variant=apt",
	"--include=systemd,systemd-sysv,dbus,iproute2,iptables,docker.io,busybox-static,procps,rpm,dnf",
	"--aptopt=Acquire::Languages none", "--dpkgopt=force-unsafe-io",
	"bookworm",
}

// machineTree returns the folder with the system that all machines begin with,
// and builds it if it isn't there.
var machineTree = sync.OnceValues(func() (string, error) {
	tree, err := buildTree(treeCommand)
	if err != nil {
		return "", fmt.Errorf("build the tree of machines: %w", err)
	}
	return tree, nil
})

// buildTree runs a command once for all programs and all times.
func buildTree(command []string) (string, error) {
	key := sha256.Sum256([]byte(strings.Join(command, "\n")))
	tree := filepath.Join(treeCache, fmt.Sprintf("%x", key[:6]))
	if err := os.MkdirAll(treeCache, 0o755); err != nil {
		return "", err
	}
	// The lock ends with us at the latest. What is half built while nobody has
	// it was left by one who was killed.
	lock, err := os.Create(tree + ".lock")
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	if _, err := os.Stat(tree); !errors.Is(err, fs.ErrNotExist) {
		return tree, err
	}
	half := tree + ".half"
	if err := os.RemoveAll(half); err != nil {
		return "", err
	}
	// In namespaces, so that nothing is left running or mounted.
	box := []string{"unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"}
	build := exec.Command(box[0], append(append(box[1:], command...), half)...)
	build.Env = Command{}.environment()
	var out strings.Builder
	build.Stdout, build.Stderr = &out, &out
	if err := startCommand(build); err != nil {
		return "", err
	}
	if err := build.Wait(); err != nil {
		return "", errors.Join(fmt.Errorf("run %s: %w: %s", strings.Join(command, " "), err, out.String()), os.RemoveAll(half))
	}
	return tree, os.Rename(half, tree)
}
