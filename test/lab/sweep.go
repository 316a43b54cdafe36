package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// processID tells a process from a later one with the same number.
type processID struct {
	pid   int
	start uint64 // clock ticks since boot
}

func ownID() (processID, error) { return identify(os.Getpid()) }

// identify reads when a process started. A zombie counts as gone.
func identify(pid int) (processID, error) {
	fields, err := statFields(pid)
	if err != nil {
		return processID{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return processID{}, fmt.Errorf("identify process %d: %w", pid, os.ErrProcessDone)
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return processID{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	return processID{pid, start}, nil
}

// statFields returns /proc/PID/stat from the third field (the state) on: the
// second, the command's name, may contain anything.
func statFields(pid int) ([]string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	_, rest, _ := strings.Cut(string(text[max(0, strings.LastIndexByte(string(text), ')')):]), " ")
	fields := strings.Fields(rest)
	if len(fields) < 20 {
		return nil, fmt.Errorf("parse /proc/%d/stat: %q", pid, text)
	}
	return fields, nil
}

// alive says whether this very process still runs.
func (id processID) alive() bool {
	now, err := identify(id.pid)
	return err == nil && now == id
}

func (id processID) String() string { return fmt.Sprintf("%d-%d", id.pid, id.start) }

func parseProcessID(s string) (id processID, err error) {
	pid, start, _ := strings.Cut(s, "-")
	if id.pid, err = strconv.Atoi(pid); err != nil {
		return id, err
	}
	id.start, err = strconv.ParseUint(start, 10, 64)
	return id, err
}

// The owner stands in the name of everything that a killed run could leave.
const (
	scratchPrefix = "oam-lab-" // then PID-START-NUMBER
	pidsFile      = "pids"     // in the scratch folder: a PID-START a line
)

func scratchName(owner processID, suffix string) string {
	return filepath.Join(os.TempDir(), scratchPrefix+owner.String()+"-"+suffix)
}

func namespacePrefix(pid int) string { return fmt.Sprintf("oam-%d-", pid) }

// recordPID notes a process of the lab for a later sweep.
func (l *Lab) recordPID(pid int) error {
	id, err := identify(pid)
	if errors.Is(err, os.ErrProcessDone) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return nil // it has ended already, or does while we read
	}
	if err != nil {
		return err
	}
	file, err := os.OpenFile(l.path(pidsFile), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("record process: %w", err)
	}
	_, err = fmt.Fprintln(file, id)
	return errors.Join(err, file.Close())
}

// sweep removes what labs of processes that are dead left behind. Several
// processes may sweep at once, so what is gone already is no error.
func sweep() error {
	folders, err := filepath.Glob(filepath.Join(os.TempDir(), scratchPrefix+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, folder := range folders {
		name := strings.TrimPrefix(filepath.Base(folder), scratchPrefix)
		cut := strings.LastIndexByte(name, '-')
		if cut < 0 {
			continue
		}
		owner, err := parseProcessID(name[:cut])
		if err != nil || owner.alive() {
			continue
		}
		errs = append(errs, killRecorded(filepath.Join(folder, pidsFile)))
		namespaces, err := filepath.Glob(filepath.Join(namespaceDir, namespacePrefix(owner.pid)+name[cut+1:]+"-*"))
		errs = append(errs, err)
		for _, namespace := range namespaces {
			errs = append(errs, removeNamespace(filepath.Base(namespace)))
		}
		errs = append(errs, removeScratch(folder))
	}
	return errors.Join(errs...)
}

// killRecorded ends those processes of a pids file that are still the same.
func killRecorded(file string) error {
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for line := range strings.Lines(string(text)) {
		id, err := parseProcessID(strings.TrimSpace(line))
		if err != nil || !id.alive() {
			continue
		}
		if err := syscall.Kill(id.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			errs = append(errs, fmt.Errorf("kill process %d: %w", id.pid, err))
			continue
		}
		errs = append(errs, Eventually(10*time.Second, func() error {
			if id.alive() {
				return fmt.Errorf("process %d is still alive", id.pid)
			}
			return nil
		}))
	}
	return errors.Join(errs...)
}

func removeNamespace(name string) error {
	if _, err := os.Stat(filepath.Join(namespaceDir, name)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	out, err := exec.Command("ip", "netns", "delete", name).CombinedOutput()
	if _, gone := os.Stat(filepath.Join(namespaceDir, name)); errors.Is(gone, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("delete network namespace %s: %w: %s", name, err, out)
	}
	return nil
}

// removeScratch removes a lab's folder, the mounts in it and the control
// groups that are named after it.
func removeScratch(folder string) error {
	errs := []error{unmountBelow(folder), removeCgroups(filepath.Base(folder))}
	// While a mount is left, removing would reach into what is mounted.
	if errs[0] == nil {
		errs = append(errs, os.RemoveAll(folder))
	}
	return errors.Join(errs...)
}

// mountsBelow lists the mount points in a folder, the latest first.
func mountsBelow(folder string) ([]string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var points []string
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) > 4 && strings.HasPrefix(fields[4], folder+"/") {
			points = append(points, fields[4])
		}
	}
	slices.Reverse(points)
	return points, nil
}

func unmountBelow(folder string) error {
	points, err := mountsBelow(folder)
	if err != nil {
		return err
	}
	var errs []error
	for _, point := range points {
		if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", point, err))
		}
	}
	return errors.Join(errs...)
}

// removeCgroups removes the empty control groups that an engine made below
// its --cgroup-parent, in the one hierarchy of version 2 or the many of 1.
func removeCgroups(name string) error {
	const root = "/sys/fs/cgroup"
	tops, err := filepath.Glob(filepath.Join(root, "*", name))
	if err != nil {
		return err
	}
	var errs []error
	for _, top := range append(tops, filepath.Join(root, name)) {
		var groups []string
		err := filepath.WalkDir(top, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				groups = append(groups, path)
			}
			return nil // gone while we walk
		})
		errs = append(errs, err)
		for _, group := range slices.Backward(groups) {
			// The kernel lets go of a group a moment after its last process.
			errs = append(errs, Eventually(5*time.Second, func() error {
				if err := unix.Rmdir(group); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return fmt.Errorf("remove control group %s: %w", group, err)
				}
				return nil
			}))
		}
	}
	return errors.Join(errs...)
}
