package lab

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Machine is a whole Debian with the network of a node: systemd boots in it,
// and starts a Docker engine. It keeps its disk while it is off.
type Machine struct {
	Node *Node

	dir     string // its disk: what differs from the tree that all begin with
	tree    string
	process *Process // its first process
}

// NewMachine puts a machine on a node. It runs after Boot. The first on this
// computer takes a minute, for the tree.
func (n *Node) NewMachine() (*Machine, error) {
	tree, err := machineTree()
	if err != nil {
		return nil, err
	}
	m := &Machine{Node: n, dir: n.lab.path(n.short + "-machine"), tree: tree}
	for _, dir := range []string{"", "disk", "work", "root"} {
		if err := os.Mkdir(filepath.Join(m.dir, dir), 0o755); err != nil {
			return nil, fmt.Errorf("make folder of machine: %w", err)
		}
	}
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	for name, text := range map[string]string{
		"/etc/hostname": n.short + "\n",
		// A machine without one is at its first boot, and then enables every
		// service that it has.
		"/etc/machine-id": fmt.Sprintf("%x\n", id),
		// Where there is such a folder, the journal outlives the machine's boots.
		"/var/log/journal/.kept": "",
		// No overlay on an overlay.
		"/etc/docker/daemon.json": `{"iptables": false, "ip-forward": false, "bridge": "none", "storage-driver": "vfs", "log-level": "warn"}` + "\n",
		// The machine sees control groups of version 1 as systemd-nspawn mounts
		// them, read-only. A bind is remounted, else the computer's own would be.
		"/etc/systemd/system/docker.service.d/cgroups.conf": `[Service]
ExecStartPre=/bin/sh -c 'for group in /sys/fs/cgroup/*/; do mount -o remount,bind,rw $$group || :; done'
`,
	} {
		if err := m.WriteFile(name, text, 0o644); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// BootMachine is NewMachine and Boot.
func (n *Node) BootMachine() (*Machine, error) {
	m, err := n.NewMachine()
	if err != nil {
		return nil, err
	}
	return m, m.Boot()
}

// Boot starts the machine, with the disk that it had, and returns when
// everything that starts at boot has started or failed.
//
// It is in a PID namespace, as an engine's box is: systemd-nspawn alone, when
// it is killed, leaves what it booted behind. And it is in control groups of its
// own, since each systemd takes its group for the root of all.
func (m *Machine) Boot() error {
	const script = `
		set -e
		for all in /sys/fs/cgroup /sys/fs/cgroup/*; do
			[ -e "$all/cgroup.procs" ] || continue
			for group in "$all/${3%/*}" "$all/$3"; do
				mkdir -p "$group"
				for file in cpuset.cpus cpuset.mems; do
					if [ -e "$all/$file" ]; then cat "$all/$file" >"$group/$file"; fi
				done
			done
			echo $$ >"$group/cgroup.procs"
		done
		mount -t overlay -o "lowerdir=$2,upperdir=$1/disk,workdir=$1/work" machine "$1/root"
		mkdir -p /run/systemd
		mount -t tmpfs run /run/systemd
		exec systemd-nspawn --quiet --boot --directory="$1/root" --machine="${3#*/}" --network-namespace-path="$4" \
			--register=no --keep-unit --link-journal=no --resolv-conf=off --timezone=off --console=pipe \
			--capability=all --system-call-filter='@keyring bpf'`
	lab := m.Node.lab
	var err error
	m.process, err = lab.start(m.Node.short+"-machine", Command{Args: []string{
		"unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc",
		"sh", "-c", script, "sh",
		m.dir, m.tree, filepath.Base(lab.Scratch) + "/" + m.Node.short, filepath.Join(namespaceDir, m.Node.Name),
	}})
	if err != nil {
		return err
	}
	if err := m.process.ready(10*time.Second, m.followInit); err != nil {
		return err
	}
	return m.process.ready(time.Minute, func() error {
		// Degraded is a machine with a unit that failed: the caller's business.
		state, err := m.Run("systemctl", "is-system-running", "--wait")
		if state = strings.TrimSpace(state); state == "running" || state == "degraded" {
			return nil
		}
		return errors.Join(fmt.Errorf("machine is %q", state), err)
	})
}

// followInit makes the machine's first process the one that gets the signals:
// the first of the PID namespace that systemd-nspawn makes, itself the first
// of one.
func (m *Machine) followInit() error {
	nspawn, err := onlyChild(m.process.Pid)
	if err != nil {
		return err
	}
	init, err := onlyChild(nspawn)
	if err != nil {
		return err
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", init))
	if err != nil {
		return err
	}
	// Its numbers, in our namespace and in each below.
	_, numbers, _ := strings.Cut(string(status), "\nNSpid:")
	numbers, _, _ = strings.Cut(numbers, "\n")
	if !strings.HasSuffix(numbers, "\t1") {
		return fmt.Errorf("find first process of machine: %d has the numbers %q", init, numbers)
	}
	return m.Node.lab.follow(m.process, init)
}

// Shutdown ends the machine as its administrator does.
func (m *Machine) Shutdown() error {
	const halt = syscall.Signal(34 + 3) // SIGRTMIN+3 of glibc: systemd starts halt.target
	if m.process == nil {
		return nil
	}
	if err := m.process.Signal(halt); err != nil {
		return err
	}
	if err := m.process.Wait(stopTimeout); m.process.Running() {
		return errors.Join(err, m.PowerOff())
	}
	return nil
}

// PowerOff ends the machine as the loss of power does. What it had written to
// its disk is there, synced or not.
func (m *Machine) PowerOff() error {
	if m.process == nil {
		return nil
	}
	return m.process.Kill()
}

// Running says whether the machine is on.
func (m *Machine) Running() bool { return m.process != nil && m.process.Running() }

// Path is where a file of the machine is for us. A link in it must not be
// absolute, and the one to a file of the tree is there only while it runs.
func (m *Machine) Path(name string) string {
	if !m.Running() {
		return filepath.Join(m.dir, "disk", name)
	}
	return filepath.Join("/proc", strconv.Itoa(m.process.Pid), "root", name)
}

// WriteFile writes a file of the machine, and makes the folders to it.
func (m *Machine) WriteFile(name, text string, mode os.FileMode) error {
	file := m.Path(name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return fmt.Errorf("write file of machine: %w", err)
	}
	if err := os.WriteFile(file, []byte(text), mode); err != nil {
		return fmt.Errorf("write file of machine: %w", err)
	}
	return os.Chmod(file, mode)
}

// Run runs a command in the machine to its end and returns its standard
// output.
func (m *Machine) Run(args ...string) (string, error) { return m.RunCommand(Command{Args: args}) }

// RunCommand is Run with everything that a Command can have.
func (m *Machine) RunCommand(c Command) (string, error) {
	if !m.Running() {
		return "", errors.New("run in machine: it is off")
	}
	c.Args = append([]string{"nsenter", "--target", strconv.Itoa(m.process.Pid), "--all", "--"}, c.Args...)
	return run(c)
}

// Docker is Engine.Docker.
func (m *Machine) Docker(args ...string) (string, error) {
	return m.DockerCommand(Command{Args: args})
}

// DockerCommand is Docker with everything that a Command can have.
func (m *Machine) DockerCommand(c Command) (string, error) {
	c.Args = append([]string{"docker"}, c.Args...)
	out, err := m.RunCommand(c)
	return strings.TrimSpace(out), err
}

// ImportImage is Engine.ImportImage.
func (m *Machine) ImportImage(name string) error { return importImage(m.DockerCommand, name) }
