package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/mux"
	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

const (
	operatorPath  = "/v1/"
	leasesPath    = operatorPath + "leases"
	poolsPath     = operatorPath + "pools"
	reconcilePath = operatorPath + "reconcile"
	settingsPath  = operatorPath + "settings"
	healthPath    = operatorPath + "health"
)

// Backend is what operators are answered from.
type Backend struct {
	Manager *lease.Manager
	// Settings are those in force.
	Settings func() []Setting
	// Capture writes DHCP packets as pcapng until ctx ends, each at once.
	Capture func(ctx context.Context, w io.Writer, what Capture) error
	// Health is how the daemon is.
	Health func(ctx context.Context) Health
	// Options reads the options of an ACK, as lease.Lease has them.
	Options func(raw []byte) []lease.ReceivedOption
}

// Capture is what an operator wants of the daemon's packets.
type Capture struct {
	Container string // its name or MAC; "" for all
	Pool      string // the pool's ID or subnet; "" for all
	Last      int    // how many of the remembered packets come first, at most
}

// Health is how a daemon is.
type Health struct {
	Version  string    `json:"version"`
	Revision string    `json:"commit"`
	PID      int       `json:"pid"`
	Started  time.Time `json:"started"`
	Database string    `json:"database"` // the file
	// Alive and Ready say what is wrong, "" for nothing, as /healthz and
	// /readyz do.
	Alive string `json:"alive"`
	Ready string `json:"ready"`
}

// operator answers the operator commands. Whoever may open the socket may do
// everything: it is root's.
type operator struct {
	Backend
	log *slog.Logger
	// remembering has a place for each answer that has all events in memory.
	remembering chan struct{}
}

func (o operator) route(r *mux.Router) {
	get := func(path string, h http.HandlerFunc) { r.Handle(path, reading(h)).Methods(http.MethodGet) }
	get(leasesPath, o.leases)
	// Whatever stands there is a key, so that ReleaseByHand can say what is
	// wrong with it.
	r.HandleFunc(leasesPath+"/{key:.*}", o.release).Methods(http.MethodDelete)
	get(poolsPath, o.pools)
	get(inspectPath, o.inspectAll)
	get(inspectPath+"/{key:(?s:.*)}", o.inspect)
	get(eventsPath, o.events)
	get(capturePath, o.capture)
	r.HandleFunc(reconcilePath, o.reconcile).Methods(http.MethodPost)
	get(settingsPath, o.inForce)
	get(healthPath, o.health)
	get(examinePath, o.examine)
}

// parameters has each parameter of a query taken, in the order of their names, with
// its first text and all of them. There are those that are listed.
func parameters(raw, listed string, take func(name, text string, all []string) (known bool, err error)) error {
	values, err := url.ParseQuery(raw)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		text := values.Get(name)
		known, err := take(name, text, values[name])
		if !known {
			err = errors.New("there are " + listed)
		}
		if err != nil {
			return fmt.Errorf("parameter %s=%q: %w", name, text, err)
		}
	}
	return nil
}

// parseCount reads how many of something are wanted.
func parseCount(text string) (int, error) {
	n, err := strconv.ParseUint(text, 10, 31)
	return int(n), err
}

// maxRemembering is how many answers at the same time may have all events in
// memory, some 10 MB each.
const maxRemembering = 4

// remember waits for its turn to read all events, or for ctx. Call done when they
// aren't needed any more.
func (o operator) remember(ctx context.Context) (done func(), err error) {
	select {
	case o.remembering <- struct{}{}:
		return sync.OnceFunc(func() { <-o.remembering }), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (o operator) release(w http.ResponseWriter, r *http.Request) {
	key := mux.Vars(r)["key"]
	pool, err := o.poolWithLeases(r.URL.Query().Get("pool"))
	var l lease.Held
	if err == nil {
		l, err = o.Manager.ReleaseByHand(r.Context(), key, pool)
	}
	switch {
	case errors.Is(err, lease.ErrNoLease):
		answer(w, http.StatusNotFound, failure{Err: err.Error()})
	case err != nil:
		answer(w, http.StatusConflict, failure{Err: err.Error()})
	default:
		o.log.Info("lease released by hand", "address", l.Addr(), "mac", l.MAC)
		answer(w, http.StatusOK, present(l))
	}
}

// reconciliation is what a reconcile command sends.
type reconciliation struct {
	Inventory lease.Inventory `json:"inventory"`
	DryRun    bool            `json:"dry_run"`
}

// reconcileLimit bounds an inventory: 100,000 containers have about 20 MB.
const reconcileLimit = 64 << 20

func (o operator) reconcile(w http.ResponseWriter, r *http.Request) {
	var in reconciliation
	body, err := readBody(w, r, reconcileLimit)
	if err == nil {
		err = json.Unmarshal(body, &in)
	}
	if err != nil {
		answer(w, http.StatusBadRequest, failure{Err: fmt.Sprintf("read the inventory: %v", err)})
		return
	}
	findings, err := o.Manager.Reconcile(r.Context(), in.Inventory, in.DryRun)
	level := slog.LevelInfo
	if in.DryRun {
		level = slog.LevelDebug // the doctor makes one too
	}
	for _, f := range findings {
		o.log.Log(r.Context(), level, "reconciled", "action", f.Action, "dry run", in.DryRun, "address", f.Address, "mac", f.MAC, "name", f.Name, "network", f.Network, "detail", f.Detail)
	}
	if err != nil {
		answer(w, http.StatusConflict, failure{Err: err.Error()})
		return
	}
	answer(w, http.StatusOK, append([]lease.Finding{}, findings...))
}

// Setting is one of the daemon's settings in force.
type Setting struct {
	Key    string `json:"key"`    // as in the configuration file
	Value  string `json:"value"`  // as it may be written there
	Source string `json:"source"` // where it was set, for people
}

func (o operator) inForce(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, append([]Setting{}, o.Settings()...))
}

func (o operator) health(w http.ResponseWriter, r *http.Request) {
	answer(w, http.StatusOK, o.Health(r.Context()))
}

// AskHealth asks the daemon on a socket how it is.
func AskHealth(ctx context.Context, socket string) (Health, error) {
	var h Health
	err := ask(ctx, socket, http.MethodGet, healthPath, nil, &h)
	return h, err
}

// Settings asks the daemon on a socket for its settings in force, in the order
// in which it has them.
func Settings(ctx context.Context, socket string) ([]Setting, error) {
	var settings []Setting
	err := ask(ctx, socket, http.MethodGet, settingsPath, nil, &settings)
	return settings, err
}

// Reconcile has the daemon on a socket compare its leases with an engine's
// inventory.
func Reconcile(ctx context.Context, socket string, inventory lease.Inventory, dryRun bool) ([]lease.Finding, error) {
	var findings []lease.Finding
	err := ask(ctx, socket, http.MethodPost, reconcilePath, reconciliation{inventory, dryRun}, &findings)
	return findings, err
}

// Release asks the daemon on a socket to give back the lease of an address or
// MAC, in the pool of an ID or subnet or, with "", in whichever has it. It
// returns the lease.
func Release(ctx context.Context, socket, key, pool string) (Lease, error) {
	path := leasesPath + "/" + url.PathEscape(key)
	if pool != "" {
		path += "?" + url.Values{"pool": {pool}}.Encode()
	}
	var l Lease
	err := ask(ctx, socket, http.MethodDelete, path, nil, &l)
	return l, err
}

// ask calls the daemon, with a body unless in is nil, and reads its answer. Its
// errors are for the operator.
func ask(ctx context.Context, socket, method, path string, in, out any) error {
	answer, err := open(ctx, socket, method, path, in)
	if err != nil {
		return err
	}
	defer answer.Close()
	text, err := io.ReadAll(answer)
	if err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	if err := json.Unmarshal(text, out); err != nil {
		return fmt.Errorf("parse the daemon's answer: %w", err)
	}
	return nil
}

// open calls the daemon, with a body unless in is nil, and returns its answer,
// which the caller must close. Its errors are for the operator.
func open(ctx context.Context, socket, method, path string, in any) (io.ReadCloser, error) {
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(text)
	}
	var dialer net.Dialer
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dialer.DialContext(ctx, "unix", socket)
	}}}
	req, err := http.NewRequestWithContext(ctx, method, "http://oam-docker-ipam"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("open %s: not permitted: run this as root", socket)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ENOTSOCK):
		return nil, fmt.Errorf("%w: nobody serves %s: start it (systemctl start oam-docker-ipam), or name its socket with --socket", ErrNotRunning, socket)
	case err != nil:
		return nil, fmt.Errorf("ask the daemon: %w", err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("read the daemon's answer: %w", err)
	}
	var failed failure
	_ = json.Unmarshal(text, &failed)
	switch {
	case strings.HasSuffix(failed.Err, notServed):
		return nil, errors.New("the running daemon is older than this program and doesn't know this command: systemctl restart oam-docker-ipam")
	case failed.Err != "":
		return nil, errors.New(failed.Err)
	}
	return nil, fmt.Errorf("the daemon answers %s", resp.Status)
}

// ErrNotRunning: nobody serves the daemon's socket.
var ErrNotRunning = errors.New("the daemon is not running")
