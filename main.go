// Oam-docker-ipam is a Docker IPAM driver whose addresses come from the site's
// own DHCP servers. See README.md.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/talkingdata/oam-docker-ipam/conf"
	"github.com/talkingdata/oam-docker-ipam/engine"
	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/server"
	"github.com/talkingdata/oam-docker-ipam/systemd"
)

// version and revision, the source's commit, are set by the build.
var (
	version  = "3.0.0-dev"
	revision string
)

func main() { os.Exit(run(os.Args, os.Stdout, os.Stderr)) }

// Exit statuses beside 0.
const (
	statusFailed = 1
	statusFound  = 2 // a reconcile or the doctor found something
)

// run is the whole program and returns its exit status.
func run(args []string, stdout, stderr io.Writer) int {
	hangup := make(chan os.Signal, 1)
	if slices.Contains(args, "server") {
		// Before anything else: to a daemon this means a reload, however early
		// it comes.
		signal.Notify(hangup, syscall.SIGHUP)
	}
	// A second signal ends the process at once: the first one stops this.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)

	passed, err := systemd.Sockets()
	if err == nil {
		err = command(stdout, stderr, func(ctx context.Context, s settings) error {
			d := newDaemon(s, stderr)
			d.hangup = hangup
			d.passed.Store(&passed)
			d.reread = func() (settings, error) { return reread(args) }
			err := d.serve(ctx, s)
			if d.passed.Swap(nil) == nil {
				passed = nil // served
			}
			return err
		}).Run(ctx, args)
	}
	if err == nil {
		return 0
	}
	if errors.Is(err, errFound) {
		return statusFound
	}
	complain(stderr, err)
	if len(passed) > 0 {
		// Else whoever waits at the sockets would wait until this is mended.
		server.Refuse(ctx, passed, err, refusalTime)
	}
	return statusFailed
}

// refusalTime is how long a daemon that doesn't start answers those who wait.
const refusalTime = 2 * time.Second

// complain prints what went wrong; the journal learns that it is an error, see
// sd-daemon(3).
func complain(stderr io.Writer, err error) {
	var level string
	if file, _ := stderr.(*os.File); file != nil && systemd.JournalConnected(file) {
		level = "<3>"
	}
	// Joined errors have a line each.
	fmt.Fprintf(stderr, "%soam-docker-ipam: %s\n", level, printable(strings.ReplaceAll(err.Error(), "\n", "; ")))
}

// reread reads the settings of a command line again. Not in the context of the
// command that runs: its flags would be looked up before the new one's.
func reread(args []string) (fresh settings, err error) {
	err = command(io.Discard, io.Discard, func(_ context.Context, s settings) error { fresh = s; return nil }).Run(context.Background(), args)
	return fresh, err
}

// command is the command line. Its server command reads and checks the settings
// and leaves the rest to serve.
func command(stdout, stderr io.Writer, serve func(context.Context, settings) error) *cli.Command {
	var file conf.File
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
			ofKey(&file, keyDebug, &cli.BoolFlag{Name: "debug", Usage: "log every packet and call"}),
			ofKey(&file, keyServers, &cli.StringFlag{Name: "dhcp-server", Usage: "DHCP servers: IPv4 `ADDRESSES` or names, comma-separated, with optional :port"}),
			ofKey(&file, keyInterface, &cli.StringFlag{Name: "dhcp-interface", Aliases: []string{"interface"}, Usage: "`INTERFACE` on whose LAN DHCP servers are asked by broadcast, instead of dhcp-server"}),
			ofKey(&file, keyListenAddr, &cli.StringFlag{Name: "listen-addr", Value: "0.0.0.0", Usage: "relay `ADDRESS` (giaddr); 0.0.0.0: the one this host's routing chooses towards each server"}),
			ofKey(&file, keyListenPort, &cli.StringFlag{Name: "listen-port", Value: defaults["listen_port"], Usage: "UDP `PORT` of the relay address; another than 67 for servers that know RFC 8357 only"}),
			ofKey(&file, keyDriverName, &cli.StringFlag{Name: "driver-name", Value: "talkingdata", Usage: "`NAME` for --ipam-driver"}),
			ofKey(&file, keySocket, &cli.StringFlag{Name: "socket", Usage: "Docker's plugin `SOCKET` (default: /run/docker/plugins/NAME.sock)"}),
			ofKey(&file, keyDataDir, &cli.StringFlag{Name: "data-dir", Value: "/var/lib/oam-docker-ipam", Usage: "`FOLDER` of the database"}),
			ofKey(&file, keyClientID, &cli.StringFlag{Name: "client-id", Value: defaults["client_id"], Usage: "what identifies a container to the DHCP servers: auto, mac or name; auto is its name where the engine tells it"}),
			ofKey(&file, keyReleaseDelay, &cli.StringFlag{Name: "release-delay", Value: defaults["release_delay"], Usage: "`TIME` in which a container may come back to its address, where its name identifies it"}),
			ofKey(&file, keyOnLeaseLost, &cli.StringFlag{Name: "on-lease-lost", Value: defaults["on_lease_lost"], Usage: "what to do with the container of a lost lease: keep, stop or restart"}),
			ofKey(&file, keyConflictCheck, &cli.StringFlag{Name: "conflict-check", Value: defaults["conflict_check"], Usage: "probe addresses by ARP before they are handed out: off, on (200 ms), a `TIME`, or rfc"}),
			ofKey(&file, keyConflictInterface, &cli.StringFlag{Name: "conflict-interface", Usage: "`INTERFACE` to probe on, where a network names none"}),
			ofKey(&file, keyDocker, &cli.StringFlag{Name: "docker", Value: "unix:///var/run/docker.sock", Usage: "`ADDRESS` of the engine's API, for reconcile and for on-lease-lost stop and restart"}),
			ofKey(&file, keyLogFormat, &cli.StringFlag{Name: "log-format", Value: string(logAuto), Usage: "how the log is written: text, json or auto, which is journald's own format where it goes there and text elsewhere"}),
			ofKey(&file, keyMetrics, &cli.StringFlag{Name: "metrics-addr", Usage: "serve Prometheus metrics, /healthz and /readyz at this `ADDRESS`: IP:PORT or the path of a unix socket (default: nowhere)"}),
			ofKey(&file, keyTimeout, &cli.DurationFlag{Name: "dhcp-timeout", Value: 30 * time.Second, Usage: "longest `TIME` that one address request may take, but a new VLAN's first"}),
		},
		Commands: []*cli.Command{
			{
				Name: "server", Usage: "run the daemon",
				Action: func(ctx context.Context, cmd *cli.Command) error {
					s, err := readSettings(cmd, &file)
					if err != nil {
						return err
					}
					return serve(ctx, s)
				},
			},
			leasesCommand(&file, stdout),
			poolsCommand(&file, stdout),
			inspectCommand(&file, stdout),
			inspectAllCommand(&file, stdout),
			eventsCommand(&file, stdout, stderr),
			captureCommand(&file, stdout, stderr),
			{
				Name: "release", Usage: "give a lease back by hand", ArgsUsage: "ADDRESS|MAC",
				Flags: []cli.Flag{
					asJSON,
					&cli.StringFlag{Name: "pool", Usage: "`ID` or subnet of the pool, where several have such a lease"},
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
			doctorCommand(&file, stdout),
			{
				Name: "config", Usage: "print every setting and where it came from",
				Flags: []cli.Flag{
					asJSON,
					&cli.BoolFlag{Name: "running", Usage: "those that the running daemon has, not those that a start would have"},
					&cli.BoolFlag{Name: "check", Usage: "print nothing, only tell what is wrong"},
				},
				Action: func(ctx context.Context, cmd *cli.Command) error {
					return config(ctx, cmd, &file, stdout, stderr)
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

// commit is the source's commit, as far as the build knows it.
func commit() string {
	if revision != "" {
		return revision
	}
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

// errFound: a reconcile found a difference or the doctor a fault, and has told
// it.
var errFound = errors.New("something was found")

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
		return errFound
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

func printJSON(w io.Writer, v any) error { return writeJSON(w, v, "  ") }

// writeJSON writes a document, in one line where its indent is "".
func writeJSON(w io.Writer, v any, indent string) error {
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetIndent("", indent)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return err
	}
	_, err := w.Write(escaped(text.Bytes()))
	return err
}
