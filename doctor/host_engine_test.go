package doctor

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// testEngine answers what is asked of an engine, with one network of the
// driver's.
type testEngine struct {
	api, version, info string
	containers         string // JSON
	ipam               string // the network's driver
}

func (e *testEngine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	lan := `{"Name":"lan","Id":"1a","Driver":"macvlan","IPAM":{"Driver":"` + e.ipam + `","Config":[{"Subnet":"192.0.2.0/24"}]},"Containers":{` + e.containers + `}}`
	w.Header().Set("Api-Version", e.api)
	w.Header().Set("Content-Type", "application/json")
	switch strings.TrimPrefix(r.URL.Path, "/v"+min(e.api, "1.56")) {
	case "/_ping":
	case "/version":
		fmt.Fprintf(w, `{"Version":%q,"ApiVersion":%q}`, e.version, e.api)
	case "/info":
		fmt.Fprint(w, e.info)
	case "/networks":
		fmt.Fprintf(w, "[%s]", lan)
	case "/networks/1a":
		fmt.Fprint(w, lan)
	default:
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"message":"not here"}`)
	}
}

// serveEngine puts an engine on a site's address.
func (s Site) serveEngine(t *testing.T, handler http.Handler) {
	t.Helper()
	server := &httptest.Server{Listener: listenAt(t, strings.TrimPrefix(s.Docker, "unix://")), Config: &http.Server{Handler: handler}}
	server.Start()
	t.Cleanup(server.Close)
}

const webContainer = `"c24bf5b5bd8f":{"Name":"web","MacAddress":"02:00:00:00:00:09","IPv4Address":"192.0.2.9/24"}`

func TestEngine(t *testing.T) {
	site := testSite(t)
	site.start(t, testLease)
	e := &testEngine{api: "1.52", version: "29.0.1", info: `{"OperatingSystem":"Debian GNU/Linux 12"}`, containers: webContainer, ipam: "td"}
	site.serveEngine(t, e)
	only(t, site.examine(t, "engine"), OK, "Docker 29.0.1 (API 1.52)", "tells the containers' names", "1 network of td with 1 running container")
	e.api, e.version = "1.46", "27.0.3"
	only(t, site.examine(t, "engine"), OK, "--mac-address only: 1 network")
	e.api, e.version = "1.41", "20.10.24"
	only(t, site.examine(t, "engine"), OK, "Docker 20.10.24", "--mac-address", "need --subnet and --gateway")

	e.info = `{"SecurityOptions":["name=seccomp","name=rootless"]}`
	only(t, site.examine(t, "engine"), Warning, "rootless")
	e.info = `{"OperatingSystem":"Docker Desktop"}`
	only(t, site.examine(t, "engine"), Warning, "virtual machine")
	e.info = `{}`

	e.containers = strings.Replace(webContainer, ".9/24", ".77/24", 1)
	only(t, site.examine(t, "engine"), Warning, "differ in 1 place", "reconcile --dry-run")
	e.ipam = "default"
	only(t, site.examine(t, "engine"), Warning, "no network of this driver, but 1 leases are held")
	e.api = "1.39"
	only(t, site.examine(t, "engine"), Fault, "too old", "1.40")
}

// An identity by name needs an engine that tells names.
func TestEngineWithoutNames(t *testing.T) {
	site := testSite(t)
	site.Global.ClientID = lease.ClientIDName
	e := &testEngine{api: "1.41", version: "20.10.24", info: `{}`, ipam: "td"}
	site.serveEngine(t, e)
	only(t, site.examine(t, "engine"), Fault, "CLIENT_ID=name", "CLIENT_ID=auto")
	e.api = "1.52"
	only(t, site.examine(t, "engine"), OK, "0 running containers")
}

func TestEngineAway(t *testing.T) {
	site := testSite(t)
	only(t, site.examine(t, "engine"), Warning, "no engine is there", "--docker")
	path := strings.TrimPrefix(site.Docker, "unix://")
	listenAt(t, path).Close()
	only(t, site.examine(t, "engine"), Warning, "no engine is there", "systemctl start docker")
	works(t, os.Remove(path))

	site.serveEngine(t, http.NotFoundHandler())
	works(t, os.Chmod(path, 0o600))
	works(t, os.Chmod(strings.TrimSuffix(path, "/docker.sock"), 0o755))
	asNobody(t, func() { only(t, site.examine(t, "engine"), Skipped, path, "sudo") })
}

// An engine that hangs doesn't hang the doctor.
func TestEngineHangs(t *testing.T) {
	site := testSite(t)
	site.serveEngine(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	only(t, site.examine(t, "engine"), Fault, "hangs: no answer in 3s", "journalctl -u docker")
}

// An engine that is stopped at a socket of systemd's is not started.
func TestEngineStopped(t *testing.T) {
	site := testSite(t)
	site.Docker = "unix:///var/run/docker.sock"
	playUnits(t, "Id=docker.service\nLoadState=loaded\nActiveState=inactive", "Id=docker.socket\nLoadState=loaded\nActiveState=active")
	only(t, site.examine(t, "engine"), Warning, "Docker is stopped", "systemctl start docker")
	site.Docker = "unix:///run/another-engine.sock"
	only(t, site.examine(t, "engine"), Warning, "no engine is there")
}
