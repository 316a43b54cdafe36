package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/talkingdata/oam-docker-ipam/arp"
	"github.com/talkingdata/oam-docker-ipam/dhcp"
	"github.com/talkingdata/oam-docker-ipam/engine"
	"github.com/talkingdata/oam-docker-ipam/host"
	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/metrics"
	"github.com/talkingdata/oam-docker-ipam/server"
	"github.com/talkingdata/oam-docker-ipam/store"
	"github.com/talkingdata/oam-docker-ipam/systemd"
)

// daemon is the server command: it wires the packages and lives until it is
// stopped.
type daemon struct {
	log *slog.Logger
	// level is log's.
	level *slog.LevelVar
	// passed are the sockets that systemd holds for this daemon, by their paths,
	// and none where something else started it. Who serves them takes them away.
	passed atomic.Pointer[map[string]net.Listener]
	// ready is closed when the daemon serves.
	ready chan struct{}
	// hangup has the signals to reload.
	hangup <-chan os.Signal
	// reread reads the settings again, as at the start.
	reread func() (settings, error)

	// texts are the settings in force.
	texts    atomic.Pointer[[]server.Setting]
	notifier *systemd.Notifier
	started  time.Time
	db       *store.DB
	client   *dhcp.Client
	manager  *lease.Manager
	metrics  *metrics.Metrics
	// silence is how long a server that was asked may be silent until the
	// daemon is not ready any more.
	silence time.Duration
}

// newDaemon makes one that logs to stderr as the settings say.
func newDaemon(s settings, stderr io.Writer) *daemon {
	d := &daemon{level: new(slog.LevelVar), ready: make(chan struct{})}
	d.passed.Store(&map[string]net.Listener{})
	d.log = newLogger(stderr, s.logFormat, d.level)
	d.level.Set(level(s.debug, slog.LevelInfo))
	return d
}

// startTime is how long a start may take. systemd gives it 30 s
// (TimeoutStartSec=), without a word to those who wait.
const startTime = 20 * time.Second

// serve is run, but where others wait at passed sockets a start that hangs is an
// error, so that they can be told.
func (d *daemon) serve(ctx context.Context, s settings) error {
	if len(*d.passed.Load()) == 0 {
		return d.run(ctx, s)
	}
	err := awaitStart(d.ready, func() error { return d.run(ctx, s) })
	if errors.Is(err, errHangs) {
		return fmt.Errorf("%w: is the disk of %s well?", err, s.dataDir)
	}
	return err
}

var errHangs = fmt.Errorf("the start has taken %s and isn't over", startTime)

// awaitStart returns what run does, or errHangs when it isn't ready in time.
func awaitStart(ready <-chan struct{}, run func() error) error {
	ended := make(chan error, 1)
	go func() { ended <- run() }()
	select {
	case err := <-ended:
		return err
	case <-ready:
		return <-ended
	case <-time.After(startTime):
		return errHangs
	}
}

// run runs the daemon until ctx ends. It stops in the reverse order of its
// start and releases nothing: containers outlive it.
func (d *daemon) run(ctx context.Context, s settings) (err error) {
	d.notifier = systemd.NewNotifier(d.log)
	d.started, d.silence = time.Now(), s.timeout
	d.warnUnknown(s)

	d.metrics = metrics.New(version, commit())
	d.db, err = store.Open(s.dataDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.db.Close()) }()
	d.db.Observe(d.metrics.Committed)

	d.client = dhcp.NewClient(s.global, d.log)
	d.client.Observe(d.metrics)
	defer func() { err = errors.Join(err, d.client.Close()) }()
	if err := d.client.Open(); err != nil {
		return err
	}

	drivers := lease.Drivers(s.driver)
	docker, err := engine.New(s.docker, drivers...)
	if err != nil {
		return err
	}
	d.manager, err = lease.NewManager(d.db, d.client, lease.Config{
		Timeout: s.timeout, Global: s.global, Machine: host.New(), Prober: arp.NewProber(), Engine: docker, Observer: d.metrics, Log: d.log,
	})
	if err != nil {
		return err
	}
	defer d.manager.Close()
	if os.Getenv("GOGC") == "" {
		// From here on the heap is leases that stay, and requests wait for the
		// network and the disk. At the default of 100, half of the memory would
		// be garbage; while they were loaded, that saved time.
		debug.SetGCPercent(50)
	}

	listeners, err := d.listen(s, drivers)
	if err != nil {
		return err
	}
	d.texts.Store(&s.texts)
	d.log.Info("serving", "version", version, "driver", s.driver, "socket", s.socket, "data", s.dataDir)
	close(d.ready)
	d.notifier.Ready(d.status())
	// What is in hand ends by itself within the time of one request and its
	// commit.
	grace := max(s.timeout, lease.FirstWait) + 10*time.Second
	group, ctx := errgroup.WithContext(ctx)
	backend := server.Backend{Manager: d.manager, Settings: d.settings, Capture: d.capture, Health: d.health, Options: dhcp.Describe}
	for driver, l := range listeners {
		group.Go(func() error {
			return server.Serve(ctx, l, server.New(backend, driver, d.log), grace, d.log)
		})
	}
	d.metrics.From(metrics.Sources{Pools: d.manager.Pools, Drops: d.client.Drops().Counts, DatabaseSize: d.db.Size})
	group.Go(func() error {
		metrics.Serve(ctx, s.metrics, d.metrics.Handler(d.alive, d.readiness), d.log)
		return nil
	})
	group.Go(func() error { d.notifier.Watch(ctx, d.alive); return nil })
	group.Go(func() error { d.attend(ctx); return nil })
	if err := group.Wait(); err != nil {
		return err
	}
	d.log.Info("stopped: leases are kept", "packets dropped", d.client.Drops().Counts())
	return nil
}

func (d *daemon) warnUnknown(s settings) {
	for _, key := range s.unknown {
		d.log.Warn("unknown key in the configuration file", "key", key.Name(), "at", key.Where())
	}
}

// listen takes the sockets that systemd passed, or makes those of all drivers,
// or none.
func (d *daemon) listen(s settings, drivers []lease.Driver) (map[lease.Driver]net.Listener, error) {
	passed := d.passed.Load()
	if passed == nil {
		return nil, errHangs
	}
	if len(*passed) > 0 {
		listeners, err := take(*passed, s, drivers)
		if err == nil && !d.passed.CompareAndSwap(passed, nil) {
			err = errHangs
		}
		return listeners, err
	}
	listeners := map[lease.Driver]net.Listener{}
	for _, driver := range drivers {
		l, err := server.Listen(s.socketOf(driver))
		if err != nil {
			for _, made := range listeners {
				err = errors.Join(err, made.Close())
			}
			return nil, err
		}
		listeners[driver] = l
	}
	return listeners, nil
}

// take gives each passed socket to the driver whose path it has. All of them
// have to be some driver's, and the first driver needs one: Docker would never
// find the others.
func take(passed map[string]net.Listener, s settings, drivers []lease.Driver) (map[lease.Driver]net.Listener, error) {
	byPath := map[string]net.Listener{}
	for path, l := range passed {
		byPath[canonical(path)] = l
	}
	listeners := map[lease.Driver]net.Listener{}
	var lines []string
	for _, driver := range drivers {
		path := s.socketOf(driver)
		lines = append(lines, "ListenStream="+path)
		if l := byPath[canonical(path)]; l != nil {
			listeners[driver] = l
		}
	}
	if listeners[drivers[0]] == nil || len(listeners) < len(passed) {
		return nil, fmt.Errorf("systemd listens on %s for this daemon, which by %s and %s is to serve %s: set them back, or have oam-docker-ipam.socket say the same: systemctl stop oam-docker-ipam.socket, systemctl edit oam-docker-ipam.socket, write [Socket], ListenStream= and %s, each on a line of its own, and systemctl start oam-docker-ipam.socket",
			strings.Join(slices.Sorted(maps.Keys(passed)), " and "), keyDriverName, keySocket, s.socket, strings.Join(lines, ", "))
	}
	return listeners, nil
}

// canonical is a socket's path without the old name of /run, which newer
// systemds replace in units.
func canonical(path string) string {
	path = filepath.Clean(path)
	if rest, old := strings.CutPrefix(path, "/var/run/"); old {
		return "/run/" + rest
	}
	return path
}

// settings are those in force, for operators.
func (d *daemon) settings() []server.Setting { return *d.texts.Load() }

// alive reports whether everything that runs gets on with its work.
func (d *daemon) alive(ctx context.Context) error { return d.manager.Alive(ctx) }

// readiness reports whether an address request can be expected to succeed.
func (d *daemon) readiness(ctx context.Context) error {
	if err := d.db.Ready(ctx); err != nil {
		return err
	}
	return d.client.Ready(d.silence)
}

// healthTime bounds how long what is stuck is waited for.
const healthTime = 2 * time.Second

// health is how the daemon is, for operators.
func (d *daemon) health(ctx context.Context) server.Health {
	ctx, cancel := context.WithTimeout(ctx, healthTime)
	defer cancel()
	text := func(err error) string {
		if err == nil {
			return ""
		}
		return err.Error()
	}
	return server.Health{
		Version: version, Revision: commit(), PID: os.Getpid(), Started: d.started.UTC().Truncate(time.Second), Database: d.db.Path(),
		Alive: text(d.alive(ctx)), Ready: text(d.readiness(ctx)),
	}
}

// capture writes packets for operators.
func (d *daemon) capture(ctx context.Context, w io.Writer, what server.Capture) error {
	return d.client.Capture(ctx, w, dhcp.Capture(what))
}

const (
	// statusEvery is how often the status line is made anew.
	statusEvery = 10 * time.Second
	// reviveEvery is how often a daemon that isn't ready tries what was wrong, so
	// that it is ready again without a request; reviveTime is how long servers
	// have for their answers then.
	reviveEvery, reviveTime = time.Minute, 4 * time.Second
)

// attend keeps the status line true and reloads at a SIGHUP, until ctx ends.
func (d *daemon) attend(ctx context.Context) {
	tick, again := time.NewTicker(statusEvery), time.NewTicker(reviveEvery)
	defer tick.Stop()
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			d.notifier.Stopping()
			return
		case <-tick.C:
			d.notifier.Status(d.status())
		case <-again.C:
			if d.client.Ready(d.silence) != nil {
				d.revive(ctx)
			}
		case <-d.hangup:
			d.notifier.Reloading()
			d.reload()
			d.notifier.Ready(d.status())
		}
	}
}

// revive opens links that couldn't be opened, as where the host's address came
// late, and asks servers that are silent.
func (d *daemon) revive(ctx context.Context) {
	if err := d.client.Open(); err != nil {
		d.log.Warn("link not opened yet", "error", err)
	}
	ctx, cancel := context.WithTimeout(ctx, reviveTime)
	defer cancel()
	d.client.AskSilent(ctx)
}

// reload reads the settings again and brings into force what can be while the
// daemon runs. After an error all stay as they were.
func (d *daemon) reload() {
	fresh, err := d.reread()
	if err == nil {
		err = d.client.Configure(fresh.global)
	}
	if err != nil {
		d.log.Error("configuration not reloaded: the former one stays in force", "error", err)
		return
	}
	d.warnUnknown(fresh)
	d.manager.Configure(fresh.global)
	d.level.Set(level(fresh.debug, slog.LevelInfo))
	texts := slices.Clone(d.settings())
	for i, setting := range fresh.texts { // in the same order
		changed := setting.Value != texts[i].Value
		switch {
		case changed && !reloadable(setting.Key):
			d.log.Warn("changed setting needs a restart: systemctl restart oam-docker-ipam", "key", setting.Key, "value", setting.Value, "at", setting.Source)
			continue
		case changed:
			d.log.Info("setting changed", "key", setting.Key, "value", setting.Value, "at", setting.Source)
		}
		texts[i] = setting
	}
	d.texts.Store(&texts)
	d.log.Info("configuration reloaded")
}

// status is the daemon in one line: whom it asks, what it has, and when a
// server last granted or renewed something.
func (d *daemon) status() string {
	servers := "servers by network"
	for _, s := range d.settings() {
		switch {
		case s.Value == "":
		case s.Key == keyServers:
			servers = "servers " + s.Value
		case s.Key == keyInterface:
			servers = "servers on the LAN of " + s.Value
		}
	}
	return servers + "; " + d.manager.Summary().String()
}
