package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Engine is a private Docker engine on a node. It has a PID namespace and a
// /run of its own, and touches nothing of an engine that the
// machine may have.
type Engine struct {
	Node *Node

	dockerd string // the program
	docker  string // its client
	dir     string
	flags   []string

	box     *Process // holds the namespaces
	process *Process // dockerd
}

// NewEngine puts an engine on a node. Dockerd is the path of its program, or
// empty for the system's; containerd and the docker client are looked for
// beside it first. It runs after Start.
func (n *Node) NewEngine(dockerd string, flags ...string) (*Engine, error) {
	if dockerd == "" {
		var err error
		if dockerd, err = lookTool("dockerd"); err != nil {
			return nil, err
		}
	}
	docker, err := clientOf(dockerd)
	if err != nil {
		return nil, err
	}
	e := &Engine{
		Node: n, dockerd: dockerd, docker: docker, flags: flags,
		dir: n.lab.path(n.short + "-engine"),
	}
	for _, dir := range []string{e.dir, e.dir + "/run", e.dir + "/run/docker", e.PluginDir(), e.dir + "/over"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make folder of engine: %w", err)
		}
	}
	// Engines from 29 on give containers a time namespace, of which Debian 12's
	// runc knows nothing. Older engines don't know the feature, nor mind it.
	return e, os.WriteFile(e.dir+"/daemon.json", []byte(`{"features": {"time-namespaces": false}}`), 0o644)
}

// StartEngine is NewEngine and Start.
func (n *Node) StartEngine(dockerd string, flags ...string) (*Engine, error) {
	e, err := n.NewEngine(dockerd, flags...)
	if err != nil {
		return nil, err
	}
	return e, e.Start()
}

// clientOf finds the docker client that belongs to an engine: beside it, or in
// ../bin, where Debian has it, since a newer one refuses some things to an
// older engine. For an engine that has none it is the first of the system's.
func clientOf(dockerd string) (string, error) {
	dir := filepath.Dir(dockerd)
	for _, file := range []string{filepath.Join(dir, "docker"), filepath.Join(dir, "../bin/docker")} {
		if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() {
			return file, nil
		}
	}
	return lookTool("docker")
}

// PluginDir is where the engine looks for the sockets of plugins.
func (e *Engine) PluginDir() string { return e.dir + "/run/docker/plugins" }

// Socket is the engine's own socket.
func (e *Engine) Socket() string { return e.dir + "/docker.sock" }

// openBox starts the process that holds the engine's namespaces. It is the
// first of a PID namespace: when it ends, and it ends at the latest with us,
// the kernel kills everything that the engine started.
//
// Its /run hides the machine's: an existing containerd, the firewall's and
// systemd's sockets, Docker's plugins. What is written to /etc (a key) and
// /opt (containerd's folder) stays in the box. And it is a shell since that
// reaps children whose parents are gone.
func (e *Engine) openBox() error {
	const script = `
		set -e
		mount -t tmpfs over "$1/over"
		for dir in etc opt; do
			mkdir "$1/over/$dir" "$1/over/$dir.work"
			mount -t overlay -o "lowerdir=/$dir,upperdir=$1/over/$dir,workdir=$1/over/$dir.work" over "/$dir"
		done
		mount --bind "$1/run" /run
		echo open
		while :; do sleep 3600 & wait $!; done`
	var err error
	e.box, err = e.Node.Start("engine-box", Command{Args: []string{
		"unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc",
		"sh", "-c", script, "sh", e.dir,
	}})
	if err != nil {
		return err
	}
	return e.box.ready(10*time.Second, func() error {
		if !strings.HasSuffix(e.box.Log(), "open\n") {
			return errors.New("no namespaces yet")
		}
		return e.Node.lab.followChild(e.box)
	})
}

// Start starts the engine and returns when it answers.
func (e *Engine) Start() error {
	if e.box == nil || !e.box.Running() {
		if err := e.openBox(); err != nil {
			return err
		}
	}
	path := filepath.Dir(e.dockerd) + ":" + searchPath
	args := []string{
		"nsenter", "--target", strconv.Itoa(e.box.Pid), "--mount", "--pid", "--net", "--",
		e.dockerd,
		"--host", "unix://" + e.Socket(),
		"--data-root", e.dir + "/data",
		"--exec-root", e.dir + "/exec",
		"--pidfile", e.dir + "/docker.pid",
		"--config-file", e.dir + "/daemon.json",
		// What a sweep removes carries the name of the scratch folder.
		"--cgroup-parent", "/" + filepath.Base(e.Node.lab.Scratch),
		"--bridge", "none", "--iptables=false", "--ip-forward=false",
	}
	args = append(args, e.flags...)
	var err error
	e.process, err = e.Node.lab.start(e.Node.short+"-engine", Command{Args: args, Env: []string{"PATH=" + path}})
	if err != nil {
		return err
	}
	// Entering a PID namespace takes a fork: nsenter waits for dockerd, and
	// ends as it does.
	if err := e.process.ready(10*time.Second, func() error { return e.Node.lab.followChild(e.process) }); err != nil {
		return err
	}
	return e.process.ready(time.Minute, e.ping)
}

// Client is an HTTP client of the engine's API. The host in its URLs means
// nothing.
func (e *Engine) Client() *http.Client { return unixClient(e.Socket()) }

func (e *Engine) ping() error {
	response, err := e.Client().Get("http://engine/_ping")
	if err != nil {
		return err
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("ping engine: %s", response.Status)
	}
	return nil
}

// unixClient makes an HTTP client that always connects to one unix socket,
// anew for each request.
func unixClient(socket string) *http.Client {
	return &http.Client{
		Timeout: time.Minute,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", socket)
			},
		},
	}
}

// Pid is dockerd's process.
func (e *Engine) Pid() int { return e.process.Pid }

// Stop ends the engine with SIGTERM, and with it its containers.
func (e *Engine) Stop() error {
	if e.process == nil {
		return nil
	}
	return e.process.Stop()
}

// Kill ends the engine with SIGKILL. Its containers live on, until the next
// Start finds and ends them.
func (e *Engine) Kill() error {
	if e.process == nil {
		return nil
	}
	return e.process.Kill()
}

// PowerOff ends the engine and all its containers at once, as when the host
// loses power. Start boots it again.
func (e *Engine) PowerOff() error {
	if e.process == nil {
		return nil
	}
	if err := e.box.Kill(); err != nil {
		return err
	}
	return e.process.Kill() // waits for what is dead already
}

// Restart is Stop and Start.
func (e *Engine) Restart() error {
	if err := e.Stop(); err != nil {
		return err
	}
	return e.Start()
}

// Log returns what the engine has written.
func (e *Engine) Log() string {
	return readLog(e.Node.lab.path("log", e.Node.short+"-engine.log"))
}

// Docker runs the engine's own command line client and returns what it
// printed, without the line end.
func (e *Engine) Docker(args ...string) (string, error) {
	return e.DockerCommand(Command{Args: args})
}

// DockerCommand is Docker with everything that a Command can have.
func (e *Engine) DockerCommand(c Command) (string, error) {
	c.Args = append([]string{e.docker, "--host", "unix://" + e.Socket()}, c.Args...)
	// Not the user's credentials and settings.
	c.Env = append(c.Env, "DOCKER_CONFIG="+e.dir+"/client")
	out, err := run(c)
	return strings.TrimSpace(out), err
}

// Shell runs a shell script to its end or first error. Its docker is the
// engine's client.
func (e *Engine) Shell(script string) error {
	_, err := run(Command{Args: []string{"sh", "-ec", script}, Env: []string{
		"PATH=" + filepath.Dir(e.docker) + ":" + searchPath,
		"DOCKER_HOST=unix://" + e.Socket(),
		"DOCKER_CONFIG=" + e.dir + "/client",
	}})
	return err
}
