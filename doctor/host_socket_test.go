package doctor

import (
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// listenAt makes a socket as another program would, which nobody has any more
// when it is closed.
func listenAt(t *testing.T, path string) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	works(t, err)
	l.SetUnlinkOnClose(false)
	t.Cleanup(func() { l.Close() })
	return l
}

func TestSocketServed(t *testing.T) {
	site := testSite(t)
	site.start(t)
	only(t, site.examine(t, "socket"), OK, site.Socket+" and ", "td-ipvlan.sock: served")

	works(t, os.Chmod(site.Socket, 0o755)) // others can't write, so not connect
	only(t, site.examine(t, "socket"), OK, "served")
	works(t, os.Chmod(site.Socket, 0o666))
	only(t, site.examine(t, "socket"), Warning, "mode 0666", "chmod 600 "+site.Socket)
	works(t, os.Chmod(site.Socket, 0o600))

	// Docker looks for a socket first, and for files only where there is none.
	spec := filepath.Join(specFolders[0], "td.spec")
	works(t, os.WriteFile(spec, []byte("tcp://192.0.2.1:80\n"), 0o644))
	only(t, site.examine(t, "socket"), OK, "served")
	works(t, os.Remove(spec))

	works(t, os.Remove(pluginFolder+"/td-ipvlan.sock"))
	only(t, site.examine(t, "socket"), Warning, "td-ipvlan", "ListenStream="+pluginFolder+"/td-ipvlan.sock")
}

// A daemon whose socket isn't where Docker looks works only with a file that
// leads there.
func TestSocketElsewhere(t *testing.T) {
	site := testSite(t)
	elsewhere := short(t)
	site.Socket = elsewhere + "/td.sock"
	site.SocketOf = func(d lease.Driver) string { return elsewhere + "/" + d.Name + ".sock" }
	site.start(t)
	second := elsewhere + "/td-ipvlan.sock"
	only(t, site.examine(t, "socket"), Fault, "doesn't look for td and td-ipvlan at "+site.Socket+" and "+second, "leave PLUGIN_SOCKET at "+pluginFolder+"/td.sock, or",
		"echo unix://"+site.Socket+" >"+specFolders[0]+"/td.spec; echo unix://"+second+" >"+specFolders[0]+"/td-ipvlan.spec")

	works(t, os.WriteFile(filepath.Join(specFolders[0], "td.spec"), []byte("unix://"+site.Socket+"\n"), 0o644))
	// The setting is always the first driver's socket.
	only(t, site.examine(t, "socket"), Fault, "doesn't look for td-ipvlan at "+second, "leave PLUGIN_SOCKET at "+pluginFolder+"/td.sock, or")
	works(t, os.MkdirAll(filepath.Join(specFolders[1], "td-ipvlan"), 0o755))
	json := filepath.Join(specFolders[1], "td-ipvlan", "td-ipvlan.json")
	works(t, os.WriteFile(json, []byte(`{"Name":"td-ipvlan","Addr":"unix://`+elsewhere+`/td-ipvlan.sock"}`), 0o644))
	only(t, site.examine(t, "socket"), OK, "served")

	works(t, os.WriteFile(json, []byte(`{"Addr":"tcp://192.0.2.1:80"}`), 0o644))
	only(t, site.examine(t, "socket"), Fault, "at tcp://192.0.2.1:80 (by "+json+")", "remove "+json)
	works(t, os.WriteFile(json, []byte(`{`), 0o644))
	only(t, site.examine(t, "socket"), Fault, "would look for the driver td-ipvlan in "+json)

	// Another program's socket comes before the file.
	listenAt(t, pluginFolder+"/td.sock")
	has(t, site.examine(t, "socket"), Fault, "finds the driver td at "+pluginFolder+"/td.sock")
}

func TestSocketDown(t *testing.T) {
	site := testSite(t)
	found := site.examine(t, "socket")
	has(t, found, Skipped, site.Socket+" isn't there")
}

// What is no socket is told once, and nobody is told to end what doesn't run.
func TestSocketIsNone(t *testing.T) {
	site := testSite(t)
	for _, make := range []func() error{
		func() error { return os.WriteFile(site.Socket, nil, 0o600) },
		func() error { return os.Mkdir(site.Socket, 0o700) },
	} {
		works(t, make())
		only(t, site.examine(t, "socket"), Fault, "no socket but something else", "remove it, then as root: oam-docker-ipam server")
		works(t, os.Remove(site.Socket))
	}
	playUnits(t, unitInactive)
	works(t, os.Mkdir(site.Socket, 0o700))
	only(t, site.examine(t, "socket"), Fault, "remove it, then systemctl start oam-docker-ipam")
}

// The kernel takes no longer path, whoever is there.
func TestSocketTooLong(t *testing.T) {
	site := testSite(t)
	site.Socket = pluginFolder + "/" + strings.Repeat("t", longest-len(pluginFolder)-len("/.sock")+1) + ".sock"
	found := site.examine(t, "daemon", "socket")
	has(t, found, Fault, site.Socket+" has 108 bytes", "the path of a socket has at most 107 bytes", "PLUGIN_SOCKET")
	has(t, found, Skipped, "see the daemon")

	site = testSite(t)
	long := pluginFolder + "/" + strings.Repeat("t", 108)
	site.SocketOf = func(d lease.Driver) string {
		if d.SharedMAC {
			return long
		}
		return site.Socket
	}
	has(t, site.examine(t, "socket"), Fault, long, "at most 107 bytes")
}

// Sockets that nobody serves make engines wait.
func TestSocketStale(t *testing.T) {
	site := testSite(t)
	site.start(t)
	works(t, os.Mkdir(pluginFolder+"/other", 0o700))
	old, alive := pluginFolder+"/other/other.sock", pluginFolder+"/alive.sock"
	listenAt(t, old).Close()
	listenAt(t, alive)
	only(t, site.examine(t, "socket"), Warning, old+" is a socket that nobody serves", "rm "+old)
}

// Another plugin on the driver's socket.
func TestSocketOfAnother(t *testing.T) {
	site := testSite(t)
	site.start(t)
	path := pluginFolder + "/td-ipvlan.sock"
	works(t, os.Remove(path))
	other := &httptest.Server{Listener: listenAt(t, path), Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Write([]byte(`{"Implements":["VolumeDriver"]}`))
	})}}
	other.Start()
	defer other.Close()
	works(t, os.Chmod(path, 0o600))
	only(t, site.examine(t, "socket"), Fault, "another plugin serves "+path+": VolumeDriver", "DRIVER_NAME")
	other.Config.Handler = http.NotFoundHandler()
	only(t, site.examine(t, "socket"), Fault, "another program serves "+path, "end that program")
}

func TestSocketUnit(t *testing.T) {
	site := testSite(t)
	site.start(t)
	main, second := site.Socket, pluginFolder+"/td-ipvlan.sock"
	playUnits(t, unitActive, socketUnitOf("active", main, second))
	only(t, site.examine(t, "socket"), OK, "served")
	playUnits(t, unitActive, socketUnitOf("inactive", main, second))
	only(t, site.examine(t, "socket"), Warning, "oam-docker-ipam.socket is not active", "systemctl enable")
	playUnits(t, unitActive, socketUnitOf("active", main))
	only(t, site.examine(t, "socket"), Warning, "no socket for ipvlan", "ListenStream="+second)
	playUnits(t, unitActive, socketUnitOf("active", second))
	only(t, site.examine(t, "socket"), Fault, "holds "+second+", and by DRIVER_NAME")
	playUnits(t, unitActive, socketUnitOf("active", "/run/docker/plugins/talkingdata.sock", second))
	only(t, site.examine(t, "socket"), Fault, "holds /run/docker/plugins/talkingdata.sock and "+second, "ListenStream="+main, "systemctl edit")
}
