package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/talkingdata/oam-docker-ipam/conf"
	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/server"
)

func leasesCommand(file *conf.File, stdout io.Writer) *cli.Command {
	return &cli.Command{
		Name: "leases", Usage: "list the leases of the running daemon; exit status 1: none is as wanted", ArgsUsage: "[ADDRESS]",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "pool", Usage: "those of a pool, by `ID` or subnet"},
			&cli.StringSliceFlag{Name: "state", Usage: "those in a `STATE`: " + strings.Join(server.LeaseStates, ", ") + "; may be given several times"},
			&cli.StringFlag{Name: "name", Usage: "those of a container's `NAME`, or of a pattern such as 'web*'"},
			&cli.StringFlag{Name: "mac", Usage: "those of a `MAC` address"},
			&cli.StringFlag{Name: "sort", Usage: "by `COLUMN`: address, name, state (the worst first), mac or expires (the next first); by address unless it says otherwise, and by state with --watch"},
			&cli.BoolFlag{Name: "watch", Usage: "show them anew every second, until Ctrl-C"},
			&cli.BoolFlag{Name: "json", Usage: "print JSON instead of a table"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := file.Err(); err != nil {
				return err
			}
			byDefault := ""
			if cmd.Bool("watch") {
				// What is wrong, of more than fit onto a screen.
				byDefault = "state"
			}
			wanted, err := selection(cmd, byDefault)
			if err != nil {
				return err
			}
			ask := func(ctx context.Context) ([]server.Lease, error) { return server.Leases(ctx, socket(cmd), wanted) }
			if cmd.Bool("watch") {
				if cmd.Bool("json") {
					return errors.New("leases: --watch and --json exclude each other: programs read oam-docker-ipam events --follow --json")
				}
				return watchLeases(ctx, stdout, wanted, ask)
			}
			leases, err := ask(ctx)
			switch {
			case err != nil:
				return err
			case cmd.Bool("json"):
				err = printJSON(stdout, leases)
			case len(leases) > 0:
				err = printLines(stdout, leaseTable(leases, time.Now()))
			case wanted.All():
				_, err = fmt.Fprintln(stdout, "no leases")
			}
			if err == nil && len(leases) == 0 && !wanted.All() {
				err = fmt.Errorf("no lease has %s", wanted)
			}
			return err
		},
	}
}

// selection is which leases a command line wants, and in which order unless it
// says that, "" for the usual one.
func selection(cmd *cli.Command, order string) (server.Selection, error) {
	if cmd.Args().Len() > 1 {
		return server.Selection{}, fmt.Errorf("leases: want one address at most, not %q: see oam-docker-ipam --help", cmd.Args().Slice())
	}
	values := url.Values{}
	if order != "" {
		values.Set("sort", order)
	}
	if cmd.Args().Present() {
		values.Set("address", cmd.Args().First())
	}
	for _, name := range []string{"pool", "name", "mac", "sort"} {
		if cmd.IsSet(name) {
			values.Set(name, cmd.String(name))
		}
	}
	if cmd.IsSet("state") {
		values["state"] = cmd.StringSlice("state")
	}
	return server.ParseSelection(values)
}

// leaseTable has the header and a line for each lease.
func leaseTable(leases []server.Lease, now time.Time) []line {
	rows := make([]tableRow, len(leases))
	for i, l := range leases {
		left := "for ever"
		if l.ExpiresAt != nil {
			left = max(0, l.ExpiresAt.Sub(now).Round(time.Second)).String()
		}
		rows[i].cells = []string{l.Address.String(), l.MAC.String(), l.Name, l.Subnet.String(), l.State, l.Server.String(), left}
		switch l.State {
		case lease.Bound.String():
		case lease.Lost.String():
			rows[i].colour = red
		default:
			rows[i].colour = yellow
		}
	}
	return tabulate([]string{"ADDRESS", "MAC", "NAME", "SUBNET", "STATE", "SERVER", "LEFT"}, rows)
}

// patience is how long a live view waits for the daemon's answer, which a
// restarting one gives late.
const patience = 2 * time.Second

// watchLeases shows the wanted leases until ctx ends. A daemon that goes while
// it does may come back.
func watchLeases(ctx context.Context, stdout io.Writer, wanted server.Selection, ask func(context.Context) ([]server.Lease, error)) error {
	s, err := newScreen(stdout)
	if err != nil {
		return err
	}
	leases, err := ask(ctx)
	if err != nil {
		return err
	}
	asked := time.Now()
	return s.show(ctx, func(height int) []line {
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		fresh, err := ask(ctx)
		now := time.Now()
		if err == nil {
			leases, asked = fresh, now
		}
		return leaseView(leases, wanted, asked, err, now, height)
	})
}

// leaseView is what fits into a screen's height: what there is in numbers, what
// is wrong with asking for it, and as much of the table as there is room for.
func leaseView(leases []server.Lease, wanted server.Selection, asked time.Time, trouble error, now time.Time, height int) []line {
	states := map[string]int{}
	for _, l := range leases {
		states[l.State]++
	}
	head := []line{{text: now.Format(time.DateTime) + "  leases " + counted(states)}, {}}
	if !wanted.All() {
		head[0].text += " with " + printable(wanted.String())
	}
	if trouble != nil {
		if errors.Is(trouble, context.DeadlineExceeded) {
			trouble = errors.New("the daemon doesn't answer")
		}
		head[1] = line{printable(fmt.Sprintf("as of %s: %v", asked.Format(time.TimeOnly), trouble)), red}
	}
	var tail []line
	room := max(0, height-len(head)-1) // under the table's header
	if len(leases) > room {
		room = max(0, room-1)
		tail = []line{{text: fmt.Sprintf("and %d more", len(leases)-room)}}
		leases = leases[:room]
	}
	view := slices.Concat(head, leaseTable(leases, now), tail)
	return view[:min(height, len(view))]
}

// counted is leases by state in numbers: "3 (lost 1, bound 2)".
func counted(leases map[string]int) string {
	all := 0
	var parts []string
	for _, state := range server.LeaseStates {
		if n := leases[state]; n > 0 {
			all += n
			parts = append(parts, fmt.Sprintf("%s %d", state, n))
		}
	}
	if all == 0 {
		return "0"
	}
	return fmt.Sprintf("%d (%s)", all, strings.Join(parts, ", "))
}
