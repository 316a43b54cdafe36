package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	runTimeout  = 2 * time.Minute  // of a command that is run to its end
	stopTimeout = time.Minute      // from SIGTERM to giving up
	killTimeout = 10 * time.Second // from SIGKILL to giving up
	searchPath  = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// Command is what to run and how.
type Command struct {
	Args  []string
	Env   []string // in addition to a PATH, HOME and LANG
	Stdin io.Reader
}

// environment is the same everywhere, so that no setting of the person who
// runs the tests gets into them.
func (c Command) environment() []string {
	return append([]string{"PATH=" + searchPath, "HOME=/root", "LANG=C.UTF-8"}, c.Env...)
}

// forks runs functions on one thread that never ends. A parent-death signal is
// sent when the *thread* that started the child ends, and Go ends threads
// (https://go.dev/issue/27505).
var forks = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	return work
})

// startCommand starts a command in a process group of its own, so that
// Ctrl-C reaches it only through us, to be killed when this process ends.
func startCommand(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	result := make(chan error)
	forks() <- func() { result <- cmd.Start() }
	return <-result
}

// run runs a command to its end and returns what it wrote to standard output.
// What it wrote to standard error is part of the error.
func run(c Command) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), runTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.Args[0], c.Args[1:]...)
	cmd.Env, cmd.Stdin = c.environment(), c.Stdin
	cmd.WaitDelay = time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := startCommand(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("%w after %v", err, runTimeout)
		}
		err = fmt.Errorf("run %s: %w: %s", strings.Join(c.Args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), err
}

// Process is something that the lab started and that runs until it is
// stopped.
type Process struct {
	Name string
	// Pid is who gets the signals.
	Pid int

	logFile string
	done    chan struct{} // closed when it has ended
	err     error         // how, once done is closed
}

// start starts a background process. Its output is appended to NAME.log in
// the lab's log folder.
func (l *Lab) start(name string, c Command) (*Process, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, fmt.Errorf("start %s: %w", name, errClosed)
	}
	p := &Process{Name: name, logFile: l.path("log", name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.logFile, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer log.Close() // the child has its own
	cmd := exec.Command(c.Args[0], c.Args[1:]...)
	cmd.Env, cmd.Stdin = c.environment(), c.Stdin
	cmd.Stdout, cmd.Stderr = log, log
	if err := startCommand(cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p.Pid = cmd.Process.Pid
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	l.processes = append(l.processes, p)
	return p, l.recordPID(p.Pid)
}

// followChild makes the one child of a process the one that gets the signals.
// A program that starts another in a new PID namespace, or enters one, has to
// fork, and then waits for its child and ends as it does.
func (l *Lab) followChild(p *Process) error {
	pid, err := onlyChild(p.Pid)
	if err != nil {
		return fmt.Errorf("follow %s: %w", p.Name, err)
	}
	return l.follow(p, pid)
}

// follow makes another process the one that gets the signals.
func (l *Lab) follow(p *Process, pid int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	p.Pid = pid
	return l.recordPID(pid)
}

// onlyChild finds the one child of a process.
func onlyChild(pid int) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return 0, fmt.Errorf("find child of process %d: %w", pid, err)
	}
	children := strings.Fields(string(text))
	if len(children) != 1 {
		return 0, fmt.Errorf("find child of process %d: it has %d", pid, len(children))
	}
	return strconv.Atoi(children[0])
}

// Running says whether the process has not ended yet.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Log returns everything that the process, and those of the same name before
// it, have written.
func (p *Process) Log() string { return readLog(p.logFile) }

func readLog(file string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Signal sends a signal. To a process that has ended it does nothing.
func (p *Process) Signal(sig syscall.Signal) error {
	if !p.Running() {
		return nil
	}
	if err := syscall.Kill(p.Pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("send %v to %s: %w", sig, p.Name, err)
	}
	return nil
}

// Wait waits for the end and returns how the process ended, as exec.Cmd.Wait
// does.
func (p *Process) Wait(timeout time.Duration) error {
	select {
	case <-p.done:
	case <-time.After(timeout):
	}
	if p.Running() {
		return fmt.Errorf("wait for the end of %s: still running after %v", p.Name, timeout)
	}
	return p.err
}

// Stop sends SIGTERM and waits. A process that doesn't end is killed, and
// that is an error; how one ends that does is not.
func (p *Process) Stop() error {
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	if err := p.Wait(stopTimeout); p.Running() {
		return errors.Join(err, p.Kill())
	}
	return nil
}

// Kill sends SIGKILL and waits.
func (p *Process) Kill() error {
	if err := p.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	if err := p.Wait(killTimeout); p.Running() {
		return err
	}
	return nil
}

// ready waits until cond returns nil, but no longer than the process runs.
func (p *Process) ready(timeout time.Duration, cond func() error) error {
	var ended error
	err := Eventually(timeout, func() error {
		if err := cond(); err == nil || p.Running() {
			return err
		}
		ended = fmt.Errorf("it ended: %w", p.Wait(0))
		return nil
	})
	if err = errors.Join(ended, err); err != nil {
		return fmt.Errorf("start %s: %w\n%s", p.Name, err, tail(p.Log(), 2<<10))
	}
	return nil
}

// copyTool copies a program into the scratch folder. Distributions confine
// some programs by their path to the system's own files (AppArmor's profiles
// of dhcpd, kea-dhcp4 and dhclient); a copy is free to use ours.
func (l *Lab) copyTool(name string) (string, error) {
	source, err := lookTool(name)
	if err != nil {
		return "", err
	}
	target := l.path("bin", name)
	if _, err := os.Stat(target); err == nil {
		return target, nil
	}
	program, err := os.ReadFile(source)
	if err != nil {
		return "", fmt.Errorf("copy %s: %w", name, err)
	}
	// A child that is forked while the file is open for writing holds it open
	// too, and until it executes its own program nobody can execute this one
	// (https://go.dev/issue/22315).
	syscall.ForkLock.RLock()
	err = os.WriteFile(target, program, 0o755)
	syscall.ForkLock.RUnlock()
	if err != nil {
		return "", fmt.Errorf("copy %s: %w", name, err)
	}
	return target, nil
}

// lookTool finds a program where administrators' programs are, whatever PATH
// says.
func lookTool(name string) (string, error) {
	for _, dir := range filepath.SplitList(searchPath) {
		file := filepath.Join(dir, name)
		if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("find %s: %w", name, exec.ErrNotFound)
}
