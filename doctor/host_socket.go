package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
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
	var paths []string
	for _, d := range lease.Drivers(p.Driver) {
		path := p.SocketOf(d)
		paths = append(paths, path)
		p.checkPlugin(ctx, d, path)
		p.checkPlace(d.Name, path)
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
	if owner := int(info.Sys().(*syscall.Stat_t).Uid); owner != 0 || info.Mode().Perm()&0o077 != 0 {
		p.warn(fmt.Sprintf("%s belongs to %s and has mode %#o: whoever opens it can release every lease", path, store.User(owner), info.Mode().Perm()), "chown root "+path+"; chmod 600 "+path)
	}
	if p.health == nil {
		// Who connects at systemd's socket starts the daemon.
		return
	}
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	if implements, err := server.Activate(ctx, path); err != nil {
		p.fault(fmt.Sprintf("%s doesn't answer as a plugin: %v", path, err), p.how("restart"))
	} else if !slices.Contains(implements, "IpamDriver") {
		p.fault(fmt.Sprintf("what answers on %s is another plugin: %s", path, strings.Join(implements, ", ")), "end that program, or give this daemon another DRIVER_NAME; then "+p.how("restart"))
	}
}

// checkPlace looks whether an engine finds a driver at its socket.
func (p *patient) checkPlace(name, path string) {
	by, at, err := discovered(name)
	switch {
	case err != nil:
		p.fault(fmt.Sprintf("Docker would look for the driver %s in %s: %v", name, by, err), "correct or remove that file")
	case by != "" && same(at, path):
	case by != "":
		p.fault(fmt.Sprintf("Docker finds the driver %s at %s (by %s), and the daemon's socket is %s", name, at, by, path), "remove "+by+", or set PLUGIN_SOCKET or DRIVER_NAME so that both are the same")
	case !slices.Contains(sockets(name), canonical(path)):
		spec := filepath.Join(specFolders[0], name+".spec")
		p.fault(fmt.Sprintf("Docker doesn't look for the driver %s at %s", name, path), fmt.Sprintf("leave PLUGIN_SOCKET at %s, or tell Docker: mkdir -p %s; echo unix://%s >%s", sockets(name)[0], specFolders[0], path, spec))
	}
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
		if info, err := os.Stat(path); err == nil && info.Mode().Type() == fs.ModeSocket {
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
			if abandoned(path) {
				paths = append(paths, path)
			}
		}
	}
	return paths
}

// abandoned reports whether a socket is nobody's any more. To a socket of
// another type the kernel tells it, and makes no connection.
func abandoned(path string) bool {
	conn, err := net.Dial("unixgram", path)
	if err == nil {
		conn.Close()
	}
	return errors.Is(err, unix.ECONNREFUSED)
}
