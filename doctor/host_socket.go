package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/server"
	"github.com/talkingdata/oam-docker-ipam/store"
)

// Where an engine looks for a plugin NAME: for NAME.sock or NAME/NAME.sock in
// the first folder, and only where neither is a socket for NAME.spec, a URL, or
// NAME.json in the others
// (https://docs.docker.com/engine/extend/plugin_api/#plugin-discovery).
var (
	pluginFolder = "/run/docker/plugins"
	specFolders  = []string{"/etc/docker/plugins", "/usr/lib/docker/plugins"}
)

// checkSocket: are the drivers' sockets there, the daemon's, and where the engine
// looks?
func checkSocket(ctx context.Context, p *patient) {
	if p.Socket == "" || p.SocketOf == nil {
		p.skip("its path isn't known", "correct the configuration")
		return
	}
	if errors.Is(p.silence, errDenied) || errors.Is(reach(pluginFolder), errDenied) {
		p.skip(p.Socket+": not permitted", asRoot)
		return
	}
	if errors.Is(p.silence, errLong) {
		p.skip(p.Socket+" can't be a socket's path", "see the daemon, above")
		return
	}
	var paths []string
	var hidden []lease.Driver
	for _, d := range lease.Drivers(p.Driver) {
		path := p.SocketOf(d)
		paths = append(paths, path)
		p.checkPlugin(ctx, d, path)
		if !p.checkPlace(d.Name, path) {
			hidden = append(hidden, d)
		}
	}
	if hidden != nil {
		p.tellHidden(hidden)
	}
	p.checkUnit(paths)
	for _, path := range stale() {
		p.warn(path+" is a socket that nobody serves: an engine that meets it waits 15 s, even for docker volume ls", "rm "+path+", unless its program is just not running")
	}
	state := "served"
	if p.health == nil {
		state = "there"
	}
	p.otherwise("%s: %s, root's only, and where Docker looks", strings.Join(paths, " and "), state)
}

// checkPlugin looks at a driver's socket itself.
func (p *patient) checkPlugin(ctx context.Context, d lease.Driver, path string) {
	info, err := os.Lstat(path)
	switch {
	case len(path) > longest:
		p.fault(fmt.Sprintf("%s has %d bytes: %v", path, len(path), errLong), "set a shorter PLUGIN_SOCKET, or DRIVER_NAME")
		return
	case errors.Is(err, fs.ErrNotExist) && p.health != nil:
		p.warn(fmt.Sprintf("%s isn't there: networks of the driver %s find none", path, d.Name), "have oam-docker-ipam.socket make it (ListenStream="+path+"), or "+p.how("restart"))
		return
	case errors.Is(err, fs.ErrNotExist) && d.SharedMAC: // one word is enough
		return
	case errors.Is(err, fs.ErrNotExist):
		p.skip(path+" isn't there", "the daemon makes it, or oam-docker-ipam.socket: see above")
		return
	case err != nil:
		p.deniedOr(fmt.Errorf("look at the socket: %w", err), "is it in a folder that is there?")
		return
	case info.Mode().Type() != fs.ModeSocket:
		p.fault(path+" is no socket but something else", "remove it, then "+p.how("restart"))
		return
	}
	// Who may write connects.
	if owner := int(info.Sys().(*syscall.Stat_t).Uid); owner != 0 || info.Mode().Perm()&0o022 != 0 {
		p.warn(fmt.Sprintf("%s belongs to %s and has mode %#o: whoever connects can release every lease", path, store.User(owner), info.Mode().Perm()), "chown root "+path+"; chmod 600 "+path)
	}
	if p.health == nil {
		// Who connects at systemd's socket starts the daemon.
		return
	}
	if who, err := stranger(ctx, path); err != nil {
		p.fault(fmt.Sprintf("%s doesn't answer: %v", path, err), p.how("restart"))
	} else if who != "" {
		p.fault(who, "end that program, or give this daemon another DRIVER_NAME; then "+p.how("restart"))
	}
}

// stranger tells of another program that serves a driver's socket, "" where it
// is an address driver. An error means that nobody has answered.
func stranger(ctx context.Context, socket string) (who string, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	implements, err := server.Activate(ctx, socket)
	var unreached *net.OpError
	switch {
	case err == nil && slices.Contains(implements, "IpamDriver"):
		return "", nil
	case err == nil:
		return fmt.Sprintf("another plugin serves %s: %s", socket, strings.Join(implements, ", ")), nil
	case ctx.Err() != nil, errors.Is(err, server.ErrNotRunning), errors.Is(err, io.EOF), errors.As(err, &unreached):
		return "", err
	}
	return fmt.Sprintf("another program serves %s: it doesn't answer as a plugin does", socket), nil
}

// tellHidden tells of drivers whose sockets lie where no engine looks.
func (p *patient) tellHidden(drivers []lease.Driver) {
	var names, paths, lines []string
	for _, d := range drivers {
		path := p.SocketOf(d)
		names, paths = append(names, d.Name), append(paths, path)
		lines = append(lines, fmt.Sprintf("echo unix://%s >%s", path, filepath.Join(specFolders[0], d.Name+".spec")))
	}
	p.fault(fmt.Sprintf("Docker doesn't look for %s at %s", strings.Join(names, " and "), strings.Join(paths, " and ")),
		fmt.Sprintf("leave PLUGIN_SOCKET at %s, or tell Docker: mkdir -p %s; %s", sockets(p.Driver)[0], specFolders[0], strings.Join(lines, "; ")))
}

// checkPlace reports whether an engine looks for a driver somewhere: where that
// isn't its socket, it tells so.
func (p *patient) checkPlace(name, path string) (looked bool) {
	by, at, err := discovered(name)
	switch {
	case err != nil:
		p.fault(fmt.Sprintf("Docker would look for the driver %s in %s: %v", name, by, err), "correct or remove that file")
	case by != "" && same(at, path):
	case by != "":
		p.fault(fmt.Sprintf("Docker finds the driver %s at %s (by %s), and the daemon's socket is %s", name, at, by, path), "remove "+by+", or set PLUGIN_SOCKET or DRIVER_NAME so that both are the same")
	default:
		return slices.Contains(sockets(name), canonical(path))
	}
	return true
}

// sockets are the paths at which an engine looks for a plugin's socket, in its
// order.
func sockets(name string) []string {
	return []string{filepath.Join(pluginFolder, name+".sock"), filepath.Join(pluginFolder, name, name+".sock")}
}

// discovered is where an engine finds a plugin, and by which file: its socket
// itself, or one that names the address. Both are "" where it finds none.
func discovered(name string) (by, at string, err error) {
	for _, path := range sockets(name) {
		if isSocket(path) {
			return path, path, nil
		}
	}
	for _, folder := range specFolders {
		for _, file := range []string{name + ".spec", filepath.Join(name, name+".spec"), name + ".json", filepath.Join(name, name+".json")} {
			path := filepath.Join(folder, file)
			text, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			address := strings.TrimSpace(string(text))
			if err == nil && filepath.Ext(path) == ".json" {
				var spec struct{ Addr string }
				err = json.Unmarshal(text, &spec)
				address = spec.Addr
			}
			return path, strings.TrimPrefix(address, "unix://"), err
		}
	}
	return "", "", nil
}

// same reports whether two paths are one file's, or would be.
func same(a, b string) bool {
	one, err := os.Stat(a)
	if err != nil {
		return canonical(a) == canonical(b)
	}
	other, err := os.Stat(b)
	return err == nil && os.SameFile(one, other)
}

// canonical is a path without the old name of /run.
func canonical(path string) string {
	path = filepath.Clean(path)
	if rest, old := strings.CutPrefix(path, "/var/run/"); old {
		return "/run/" + rest
	}
	return path
}

// checkUnit looks whether systemd holds the sockets that the daemon is to serve.
func (p *patient) checkUnit(paths []string) {
	unit := p.units[socketUnit]
	if !unit.there() {
		return
	}
	if !unit.is("ActiveState", "active") {
		p.warn(socketUnit+" is not active: Docker's requests fail while the daemon restarts", "systemctl enable "+socketUnit+", then systemctl start "+socketUnit+", with the daemon stopped")
		return
	}
	var held, wanted []string
	for _, listen := range unit["Listen"] {
		path, _, _ := strings.Cut(listen, " (")
		held = append(held, canonical(path))
	}
	for _, path := range paths {
		wanted = append(wanted, canonical(path))
	}
	slices.Sort(held)
	switch {
	case !slices.Contains(held, wanted[0]), slices.ContainsFunc(held, func(h string) bool { return !slices.Contains(wanted, h) }):
		p.fault(fmt.Sprintf("%s holds %s, and by DRIVER_NAME and PLUGIN_SOCKET the daemon serves %s: it can't start", socketUnit, strings.Join(held, " and "), strings.Join(wanted, " and ")),
			"set them back, or have the unit say the same: systemctl stop "+socketUnit+", systemctl edit "+socketUnit+", write [Socket], ListenStream= and ListenStream="+strings.Join(wanted, ", ListenStream=")+", each on a line of its own, and systemctl start "+socketUnit)
	case len(held) < len(wanted):
		p.warn(fmt.Sprintf("%s holds no socket for ipvlan networks", socketUnit), "add ListenStream="+wanted[1]+" to it: systemctl edit "+socketUnit)
	}
}

// stale lists the sockets in the plugin folder that nobody has.
func stale() (paths []string) {
	for _, pattern := range []string{"*.sock", "*/*.sock"} {
		// The only error is of a malformed pattern.
		found, _ := filepath.Glob(filepath.Join(pluginFolder, pattern))
		for _, path := range found {
			if isSocket(path) && abandoned(path) {
				paths = append(paths, path)
			}
		}
	}
	return paths
}

func isSocket(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().Type() == fs.ModeSocket
}

// abandoned reports whether nobody serves a path: it is no socket, or nobody's
// any more. To a socket of another type the kernel tells it, and makes no
// connection.
func abandoned(path string) bool {
	conn, err := net.Dial("unixgram", path)
	if err == nil {
		conn.Close()
	}
	return errors.Is(err, unix.ECONNREFUSED)
}
