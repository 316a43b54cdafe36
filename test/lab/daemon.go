package lab

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Daemon is the daemon under test, on a node.
type Daemon struct {
	Node *Node
	// Binary is built by Build, unless given.
	Binary string
	// Socket is the plugin's; for an engine, a NAME.sock in its PluginDir.
	Socket string
	// DataDir outlives restarts.
	DataDir string
	// Flags are global ones, read at each Start.
	Flags []string
	// Env is added to an environment that has nothing in it for the daemon.
	Env []string

	config  string
	process *Process
}

// NewDaemon puts our daemon on a node, with a database of its own. Fields may
// be changed before it is started.
func (n *Node) NewDaemon(socket string, flags ...string) (*Daemon, error) {
	d := &Daemon{
		Node: n, Socket: socket, Flags: flags,
		DataDir: n.lab.path(n.short + "-daemon"),
		config:  n.lab.path(n.short + "-daemon.conf"),
	}
	return d, os.WriteFile(d.config, nil, 0o644) // hides the machine's own
}

// StartDaemon is NewDaemon and Start.
func (n *Node) StartDaemon(socket string, flags ...string) (*Daemon, error) {
	d, err := n.NewDaemon(socket, flags...)
	if err != nil {
		return nil, err
	}
	return d, d.Start()
}

func (d *Daemon) command(args ...string) (Command, error) {
	if d.Binary == "" {
		var err error
		if d.Binary, err = Build(); err != nil {
			return Command{}, err
		}
	}
	args = append([]string{d.Binary, "--config", d.config, "--socket", d.Socket, "--data-dir", d.DataDir}, args...)
	return Command{Args: args, Env: d.Env}, nil
}

// Launch starts the daemon and doesn't wait for it, for starts that fail.
func (d *Daemon) Launch() (*Process, error) {
	c, err := d.command(append(d.Flags[:len(d.Flags):len(d.Flags)], "server")...)
	if err != nil {
		return nil, err
	}
	d.process, err = d.Node.Start("daemon", c)
	return d.process, err
}

// Start starts the daemon and returns when its socket answers.
func (d *Daemon) Start() error {
	process, err := d.Launch()
	if err != nil {
		return err
	}
	return process.ready(20*time.Second, d.activate)
}

func (d *Daemon) activate() error {
	response, err := d.Client().Post("http://plugin/Plugin.Activate", "", nil)
	if err != nil {
		return err
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("activate plugin: %s", response.Status)
	}
	return nil
}

// Client is an HTTP client of the plugin's socket. The host in its URLs means
// nothing.
func (d *Daemon) Client() *http.Client { return unixClient(d.Socket) }

// Run runs another of the program's commands, like leases, against the
// daemon.
func (d *Daemon) Run(args ...string) (string, error) {
	c, err := d.command(args...)
	if err != nil {
		return "", err
	}
	return d.Node.RunCommand(c)
}

// Stop ends the daemon with SIGTERM. That it ends well is part of it.
func (d *Daemon) Stop() error {
	if d.process == nil {
		return nil
	}
	if err := d.process.Stop(); err != nil {
		return err
	}
	if err := d.process.Wait(0); err != nil {
		return fmt.Errorf("stop daemon: %w\n%s", err, tail(d.process.Log(), 2<<10))
	}
	return nil
}

// Kill ends the daemon with SIGKILL.
func (d *Daemon) Kill() error {
	if d.process == nil {
		return nil
	}
	return d.process.Kill()
}

// Restart is Stop and Start.
func (d *Daemon) Restart() error {
	if err := d.Stop(); err != nil {
		return err
	}
	return d.Start()
}

// Signal sends a signal to the daemon.
func (d *Daemon) Signal(sig syscall.Signal) error { return d.process.Signal(sig) }

// Pid is the daemon's process.
func (d *Daemon) Pid() int { return d.process.Pid }

// Log returns what the daemon has written.
func (d *Daemon) Log() string {
	return readLog(d.Node.lab.path("log", d.Node.short+"-daemon.log"))
}

// Build builds the program once per process and returns its path. OAM_RACE=1
// builds it with the race detector. See RemoveBuild.
var Build = sync.OnceValues(func() (string, error) {
	dir, err := BuildDir()
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make folder of the build: %w", err)
	}
	mod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find the module: %w", err)
	}
	root := filepath.Dir(strings.TrimSpace(string(mod)))
	binary := filepath.Join(dir, "oam-docker-ipam")
	args := []string{"build", "-o", binary}
	if os.Getenv("OAM_RACE") == "1" {
		args = append(args, "-race")
	}
	build := exec.Command("go", append(args, ".")...)
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", root, err, out)
	}
	return binary, nil
})

// BuildDir is the folder of what this program builds, which need not be there
// yet. It is named as a lab's scratch folder, so that a sweep finds it.
func BuildDir() (string, error) {
	self, err := ownID()
	return scratchName(self, "build"), err
}

// RunTests is for TestMain: it runs the tests and then removes BuildDir.
//
//	func TestMain(m *testing.M) { os.Exit(lab.RunTests(m)) }
func RunTests(m interface{ Run() int }) int {
	status := m.Run()
	if err := RemoveBuild(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return max(status, 1)
	}
	return status
}

// RemoveBuild removes BuildDir. A later lab would do it otherwise.
func RemoveBuild() error {
	dir, err := BuildDir()
	return errors.Join(err, os.RemoveAll(dir))
}
