// Oam-docker-ipam is a Docker IPAM driver whose addresses come from the site's
// own DHCP servers. See README.md.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"
	"golang.org/x/sync/errgroup"

	"github.com/talkingdata/oam-docker-ipam/arp"
	"github.com/talkingdata/oam-docker-ipam/conf"
	"github.com/talkingdata/oam-docker-ipam/dhcp"
	"github.com/talkingdata/oam-docker-ipam/engine"
	"github.com/talkingdata/oam-docker-ipam/host"
	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/server"
	"github.com/talkingdata/oam-docker-ipam/store"
)

// version is set by the build.
var version = "3.0.0-dev"

func main() { os.Exit(run(os.Args, os.Stdout, os.Stderr)) }

// run is the whole program and returns its exit status.
func run(args []string, stdout, stderr io.Writer) int {
	// A second signal ends the process at once: the first one stops this.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)

	err := command(stdout, stderr).Run(ctx, args)
	if errors.Is(err, errDiffers) {
		return 2
	}
	if err != nil {
		fmt.Fprintln(stderr, "oam-docker-ipam:", err)
		return 1
	}
	return 0
}

// Keys of the settings, in the configuration file and the environment.
const (
	keyDebug      = "IPAM_DEBUG"
	keyServers    = "DHCP_SERVER"
	keyInterface  = "DHCP_INTERFACE"
	keyListenAddr = "LISTEN_ADDR"
	keyListenPort = "LISTEN_PORT"
	keyDriverName = "DRIVER_NAME"
	keySocket     = "PLUGIN_SOCKET"
	keyDataDir    = "DATA_DIR"
	keyTimeout    = "DHCP_TIMEOUT"
	keyDocker     = "DOCKER"

	keyClientID          = "CLIENT_ID"
	keyReleaseDelay      = "RELEASE_DELAY"
	keyOnLeaseLost       = "ON_LEASE_LOST"
	keyConflictCheck     = "CONFLICT_CHECK"
	keyConflictInterface = "CONFLICT_INTERFACE"
)

// optionKeys are those that a network may set for itself, as --ipam-opt in lower
// case.
var optionKeys = []string{
	keyServers, keyInterface, keyListenAddr, keyListenPort,
	keyClientID, keyReleaseDelay, keyOnLeaseLost, keyConflictCheck, keyConflictInterface,
}

// flagName is a key as a flag.
func flagName(key string) string { return strings.ReplaceAll(strings.ToLower(key), "_", "-") }

// optionName is a key as an option of a network.
func optionName(key string) string { return strings.ToLower(key) }

func command(stdout, stderr io.Writer) *cli.Command {
	var file conf.File
	// A flag beats the environment, which beats the file.
	sources := func(key string) cli.ValueSourceChain {
		return cli.NewValueSourceChain(variable(key), file.Key(key))
	}
	// Errors go through run, each once and without the usage text.
	usageError := func(_ context.Context, _ *cli.Command, err error, _ bool) error {
		return fmt.Errorf("%w: see oam-docker-ipam --help", err)
	}
	defaults := lease.Defaults().Texts()
	asJSON := &cli.BoolFlag{Name: "json", Usage: "print JSON instead of a table"}

	root := &cli.Command{
		Name:                  "oam-docker-ipam",
		Usage:                 "Docker IPAM driver that leases every container's address from your DHCP servers",
		Version:               version,
		Writer:                stdout,
		ErrWriter:             stderr,
		EnableShellCompletion: true,
		ExitErrHandler:        func(context.Context, *cli.Command, error) {},
		OnUsageError:          usageError,
		Flags: []cli.Flag{
			// First, since the others' values may come from it; and before the
			// command only, since they are read before a command's flags are.
			&cli.StringFlag{Name: "config", Local: true, Destination: &file.Name, Usage: "configuration `FILE` (default: " + conf.Path + " if it exists)"},
			&cli.BoolFlag{Name: "debug", Sources: sources(keyDebug), Usage: "log every packet and call"},
			&typedFlag{StringFlag: &cli.StringFlag{Name: "dhcp-server", Sources: sources(keyServers), Usage: "DHCP servers: IPv4 `ADDRESSES` or names, comma-separated, with optional :port"}},
			&typedFlag{StringFlag: &cli.StringFlag{Name: "dhcp-interface", Aliases: []string{"interface"}, Sources: sources(keyInterface), Usage: "`INTERFACE` on whose LAN DHCP servers are asked by broadcast, instead of dhcp-server"}},
			&cli.StringFlag{Name: "listen-addr", Sources: sources(keyListenAddr), Value: "0.0.0.0", Usage: "relay `ADDRESS` (giaddr); 0.0.0.0: the one this host's routing chooses towards each server"},
			&cli.StringFlag{Name: "listen-port", Sources: sources(keyListenPort), Value: defaults["listen_port"], Usage: "UDP `PORT` of the relay address; another than 67 for servers that know RFC 8357 only"},
			&cli.StringFlag{Name: "driver-name", Sources: sources(keyDriverName), Value: "talkingdata", Usage: "`NAME` for --ipam-driver"},
			&cli.StringFlag{Name: "socket", Sources: sources(keySocket), Usage: "Docker's plugin `SOCKET` (default: /run/docker/plugins/NAME.sock)"},
			&cli.StringFlag{Name: "data-dir", Sources: sources(keyDataDir), Value: "/var/lib/oam-docker-ipam", Usage: "`FOLDER` of the database"},
			&cli.StringFlag{Name: "client-id", Sources: sources(keyClientID), Value: defaults["client_id"], Usage: "what identifies a container to the DHCP servers: auto, mac or name; auto is its name where the engine tells it"},
			&cli.StringFlag{Name: "release-delay", Sources: sources(keyReleaseDelay), Value: defaults["release_delay"], Usage: "`TIME` in which a container may come back to its address, where its name identifies it"},
			&cli.StringFlag{Name: "on-lease-lost", Sources: sources(keyOnLeaseLost), Value: defaults["on_lease_lost"], Usage: "what to do with the container of a lost lease: keep, stop or restart"},
			&cli.StringFlag{Name: "conflict-check", Sources: sources(keyConflictCheck), Value: defaults["conflict_check"], Usage: "probe addresses by ARP before they are handed out: off, on (200 ms), a `TIME`, or rfc"},
			&cli.StringFlag{Name: "conflict-interface", Sources: sources(keyConflictInterface), Usage: "`INTERFACE` to probe on, where a network names none"},
			&cli.StringFlag{Name: "docker", Sources: sources(keyDocker), Value: "unix:///var/run/docker.sock", Usage: "`ADDRESS` of the engine's API, for reconcile and for on-lease-lost stop and restart"},
			&cli.DurationFlag{Name: "dhcp-timeout", Sources: sources(keyTimeout), Value: 30 * time.Second, Usage: "longest `TIME` that one address request may take, but a new VLAN's first"},
		},
		Commands: []*cli.Command{
			{
				Name: "server", Usage: "run the daemon",
				Action: func(ctx context.Context, cmd *cli.Command) error {
					s, err := readSettings(cmd, &file)
					if err != nil {
						return err
					}
					log := newLogger(stderr, slog.LevelInfo, s.debug)
					for _, key := range file.Unknown(knownKeys(cmd.Root())) {
						log.Warn("unknown key in the configuration file", "key", key)
					}
					return serve(ctx, s, log)
				},
			},
			{
				Name: "leases", Usage: "list the leases of the running daemon",
				Flags: []cli.Flag{asJSON},
				Action: func(ctx context.Context, cmd *cli.Command) error {
					if err := file.Err(); err != nil {
						return err
					}
					leases, err := server.Leases(ctx, socket(cmd))
					if err != nil {
						return err
					}
					if cmd.Bool("json") {
						return printJSON(stdout, leases)
					}
					return printLeases(stdout, leases, time.Now())
				},
			},
			{
				Name: "release", Usage: "give a lease back by hand", ArgsUsage: "ADDRESS|MAC",
				Flags: []cli.Flag{
					asJSON,
					&cli.StringFlag{Name: "pool", Usage: "`ID` of the pool, where several have such a lease"},
				},
				Action: func(ctx context.Context, cmd *cli.Command) error {
					if cmd.Args().Len() != 1 {
						return errors.New("release: want one address or MAC address, as the leases command lists them")
					}
					if err := file.Err(); err != nil {
						return err
					}
					l, err := server.Release(ctx, socket(cmd), cmd.Args().First(), cmd.String("pool"))
					if err != nil {
						return err
					}
					if cmd.Bool("json") {
						return printJSON(stdout, l)
					}
					fmt.Fprintf(stdout, "released %s of %s to %s\n", l.Address, l.MAC, l.Server)
					return nil
				},
			},
			{
				Name: "reconcile", Usage: "compare the leases with the engine's containers and mend what differs; exit status 2: something did",
				Flags: []cli.Flag{
					asJSON,
					&cli.BoolFlag{Name: "dry-run", Usage: "tell what would be done, do nothing"},
				},
				Action: func(ctx context.Context, cmd *cli.Command) error {
					if err := file.Err(); err != nil {
						return err
					}
					return reconcile(ctx, cmd, stdout)
				},
			},
			{
				Name: "discover", Usage: "ask the DHCP servers for offers and take none; exit status 1: nobody answered",
				Flags: []cli.Flag{
					asJSON,
					&cli.StringFlag{Name: "subnet", Usage: "`SUBNET` that is wanted, such as 192.0.2.0/24; else the servers choose"},
					&cli.StringFlag{Name: "mac", Usage: "`MAC` address that is asked for, such as one with a reservation; else one of this host's own"},
				},
				Action: func(ctx context.Context, cmd *cli.Command) error {
					if err := file.Err(); err != nil {
						return err
					}
					return discover(ctx, cmd, stdout, stderr)
				},
			},
			{
				Name: "version", Usage: "print the version",
				Flags: []cli.Flag{asJSON},
				Action: func(_ context.Context, cmd *cli.Command) error {
					if cmd.Bool("json") {
						return printJSON(stdout, map[string]string{"version": version, "commit": commit()})
					}
					fmt.Fprintf(stdout, "oam-docker-ipam %s (commit %s)\n", version, commit())
					return nil
				},
			},
		},
		// Without a command, and with a wrong one.
		Action: func(_ context.Context, cmd *cli.Command) error {
			if name := cmd.Args().First(); name != "" {
				return fmt.Errorf("unknown command %q: see oam-docker-ipam --help", name)
			}
			return cli.ShowAppHelp(cmd)
		},
	}
	for _, c := range root.Commands {
		c.OnUsageError = usageError
		if c.ArgsUsage == "" {
			c.ArgValidator = noArguments
		}
	}
	return root
}

func noArguments(_ context.Context, cmd *cli.Command) error {
	if cmd.Args().Present() {
		return fmt.Errorf("%s: unexpected argument %q: see oam-docker-ipam --help", cmd.Name, cmd.Args().First())
	}
	return nil
}

// variable is an environment variable as a source of a flag's value
// (cli.ValueSource). As in the file, an empty one counts as not set: systemd
// makes such variables of a file's empty values.
type variable string

// Lookup returns the variable's value.
func (v variable) Lookup() (string, bool) {
	value := os.Getenv(string(v))
	return value, value != ""
}

// String names the source in error messages.
func (v variable) String() string { return "environment variable " + string(v) }

// GoString is String, as cli.ValueSource asks for it.
func (v variable) GoString() string { return v.String() }

// IsFromEnv makes the help text name the variable (cli.EnvValueSource).
func (v variable) IsFromEnv() bool { return true }

// Key is the variable's name.
func (v variable) Key() string { return string(v) }

// typedFlag is a flag that knows whether its value was typed on the command
// line: the values of its sources don't come through Set.
type typedFlag struct {
	*cli.StringFlag
	typed bool
}

// Set takes a value from the command line (cli.Flag).
func (f *typedFlag) Set(name, value string) error {
	f.typed = true
	return f.StringFlag.Set(name, value)
}

// typed reports whether the flag of a key was typed.
func typed(cmd *cli.Command, key string) bool {
	return slices.ContainsFunc(cmd.Root().Flags, func(flag cli.Flag) bool {
		f, ok := flag.(*typedFlag)
		return ok && f.typed && f.Name == flagName(key)
	})
}

// commit is the source's commit, as far as the build knows it.
func commit() string {
	info, _ := debug.ReadBuildInfo()
	if info != nil {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return s.Value
			}
		}
	}
	return "unknown"
}

// knownKeys are the keys that some flag reads from the environment.
func knownKeys(root *cli.Command) []string {
	var keys []string
	for _, flag := range root.Flags {
		if documented, ok := flag.(cli.DocGenerationFlag); ok {
			keys = append(keys, documented.GetEnvVars()...)
		}
	}
	return keys
}

// settings are the daemon's, checked.
type settings struct {
	debug   bool
	global  lease.Options
	driver  string
	socket  string
	dataDir string
	docker  string
	timeout time.Duration
}

// driverNames are those that make a file name and that Docker takes.
var driverNames = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

func readSettings(cmd *cli.Command, file *conf.File) (settings, error) {
	if err := file.Err(); err != nil {
		return settings{}, err
	}
	s := settings{
		debug: cmd.Bool("debug"), driver: cmd.String("driver-name"), socket: socket(cmd),
		dataDir: cmd.String("data-dir"), docker: cmd.String("docker"), timeout: cmd.Duration("dhcp-timeout"),
	}
	var err error
	s.global, err = globalOptions(optionTexts(cmd))
	switch {
	case err != nil:
		return settings{}, err
	case s.dataDir == "":
		return settings{}, fmt.Errorf("configuration: %s is empty: want a folder", keyDataDir)
	case !driverNames.MatchString(s.driver):
		return settings{}, fmt.Errorf("configuration: %s=%q: want letters, digits, dots, hyphens and underscores", keyDriverName, s.driver)
	case s.timeout <= 0:
		return settings{}, fmt.Errorf("configuration: %s=%s: want a time above zero such as 30s", keyTimeout, s.timeout)
	}
	return s, nil
}

// optionTexts are the settings that a network may set too, by its names for
// them.
func optionTexts(cmd *cli.Command) map[string]string {
	texts := map[string]string{}
	for _, key := range optionKeys {
		texts[optionName(key)] = cmd.String(flagName(key))
	}
	return texts
}

// globalOptions are those that apply where a network has none.
func globalOptions(texts map[string]string) (lease.Options, error) {
	servers, iface := texts[optionName(keyServers)], texts[optionName(keyInterface)]
	if servers != "" && iface != "" {
		return lease.Options{}, fmt.Errorf("configuration: %s=%s and %s=%s exclude each other: the servers are asked as a relay agent or by broadcast; take one out of the configuration file, the environment or the command line (single networks may have --ipam-opt %s= or %s=)",
			keyServers, servers, keyInterface, iface, optionName(keyServers), optionName(keyInterface))
	}
	options, err := lease.ParseOptions(texts)
	if err != nil {
		return lease.Options{}, fmt.Errorf("configuration: %w", err)
	}
	return options, nil
}

// socket is the path of the plugin socket, all of the settings that operator
// commands need.
func socket(cmd *cli.Command) string {
	if path := cmd.String("socket"); path != "" {
		return path
	}
	return "/run/docker/plugins/" + cmd.String("driver-name") + ".sock"
}

// socketOf is the path of a driver's socket: Docker knows a driver by its file's
// name.
func (s settings) socketOf(d lease.Driver) string {
	path, cut := strings.CutSuffix(s.socket, ".sock")
	path += strings.TrimPrefix(d.Name, s.driver)
	if cut {
		path += ".sock"
	}
	return path
}

// newLogger logs what is at least of a level, or all of it.
func newLogger(w io.Writer, level slog.Level, debug bool) *slog.Logger {
	if debug {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

// serve runs the daemon until ctx ends. It stops in the reverse order of its
// start and releases nothing: containers outlive it.
func serve(ctx context.Context, s settings, log *slog.Logger) (err error) {
	db, err := store.Open(s.dataDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()

	client := dhcp.NewClient(s.global, log)
	defer func() { err = errors.Join(err, client.Close()) }()
	if err := client.Open(); err != nil {
		return err
	}

	drivers := lease.Drivers(s.driver)
	docker, err := engine.New(s.docker, drivers...)
	if err != nil {
		return err
	}
	manager, err := lease.NewManager(db, client, lease.Config{
		Timeout: s.timeout, Global: s.global, Machine: host.New(), Prober: arp.NewProber(), Engine: docker, Log: log,
	})
	if err != nil {
		return err
	}
	defer manager.Close()
	if os.Getenv("GOGC") == "" {
		// From here on the heap is leases that stay, and requests wait for the
		// network and the disk. At the default of 100, half of the memory would
		// be garbage; while they were loaded, that saved time.
		debug.SetGCPercent(50)
	}

	listeners, err := listen(s, drivers)
	if err != nil {
		return err
	}
	log.Info("serving", "version", version, "driver", s.driver, "socket", s.socket, "data", s.dataDir)
	// What is in hand ends by itself within the time of one request and its
	// commit.
	grace := max(s.timeout, lease.FirstWait) + 10*time.Second
	group, ctx := errgroup.WithContext(ctx)
	for i, d := range drivers {
		group.Go(func() error { return server.Serve(ctx, listeners[i], server.New(manager, d, log), grace, log) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	log.Info("stopped: leases are kept", "packets dropped", client.Drops().Counts())
	return nil
}

// listen makes the sockets of all drivers, or none.
func listen(s settings, drivers []lease.Driver) (listeners []net.Listener, err error) {
	for _, d := range drivers {
		l, err := server.Listen(s.socketOf(d))
		if err != nil {
			for _, made := range listeners {
				err = errors.Join(err, made.Close())
			}
			return nil, err
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

// errDiffers: a reconcile found something.
var errDiffers = errors.New("leases and containers differ")

// reconcile reads the engine's networks and has the daemon compare them. The
// daemon itself needs no access to the engine for this.
func reconcile(ctx context.Context, cmd *cli.Command, stdout io.Writer) error {
	docker, err := engine.New(cmd.String("docker"), lease.Drivers(cmd.String("driver-name"))...)
	if err != nil {
		return err
	}
	inventory, err := docker.Networks(ctx)
	if err != nil {
		return err
	}
	findings, err := server.Reconcile(ctx, socket(cmd), inventory, cmd.Bool("dry-run"))
	if err != nil {
		return err
	}
	if cmd.Bool("json") {
		err = printJSON(stdout, findings)
	} else {
		err = printFindings(stdout, findings)
	}
	differs := slices.ContainsFunc(findings, func(f lease.Finding) bool { return f.Action != lease.Named })
	if err == nil && differs {
		return errDiffers
	}
	return err
}

func printFindings(w io.Writer, findings []lease.Finding) error {
	if len(findings) == 0 {
		_, err := fmt.Fprintln(w, "leases and containers agree")
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ACTION\tADDRESS\tMAC\tNAME\tNETWORK\tDETAIL")
	for _, f := range findings {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", f.Action, f.Address, f.MAC, f.Name, f.Network, f.Detail)
	}
	return t.Flush()
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

func printLeases(w io.Writer, leases []server.Lease, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ADDRESS\tMAC\tNAME\tSUBNET\tSTATE\tSERVER\tLEFT")
	for _, l := range leases {
		left := "for ever"
		if l.ExpiresAt != nil {
			left = max(0, l.ExpiresAt.Sub(now).Round(time.Second)).String()
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.Address, l.MAC, l.Name, l.Subnet, l.State, l.Server, left)
	}
	return t.Flush()
}
