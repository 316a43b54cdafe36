package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/talkingdata/oam-docker-ipam/conf"
	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/server"
)

func eventsCommand(file *conf.File, stdout, stderr io.Writer) *cli.Command {
	return &cli.Command{
		Name: "events", Usage: "print what happened, or to whom; exit status 1: nothing did",
		Description: fmt.Sprintf("The daemon remembers the last %d of what comes with ordinary traffic (granted, failed, renewed, left, released), and the last %d of everything else.", lease.MaxEvents, lease.MaxEvents),
		ArgsUsage:   "[CONTAINER|ADDRESS|MAC]",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "go on with what happens, until Ctrl-C"},
			&cli.StringFlag{Name: "since", Usage: "`TIME` from which on, such as 15:04 or \"2006-01-02 15:04\"; or how long ago, such as 10m, 2h or 3d"},
			&cli.StringSliceFlag{Name: "event", Usage: "`KIND` that is wanted, such as lost; may be repeated"},
			&cli.IntFlag{Name: "limit", Usage: "`NUMBER` of those remembered that are printed at most, the last ones; 0 for all"},
			&cli.BoolFlag{Name: "json", Usage: "print a JSON object a line"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			q, err := eventQuery(cmd, time.Now())
			if err != nil {
				return err
			}
			if err := file.Err(); err != nil {
				return err
			}
			show := func(e lease.Event) error { _, err := fmt.Fprintln(stdout, eventLine(e)); return err }
			if cmd.Bool("json") {
				show = func(e lease.Event) error { return writeJSON(stdout, e, "") }
			}
			return events(ctx, socket(cmd), q, show, stderr)
		},
	}
}

// events shows what happened.
func events(ctx context.Context, socket string, q server.EventQuery, show func(lease.Event) error, stderr io.Writer) error {
	found := q.Follow
	away := func(within time.Duration) {
		fmt.Fprintf(stderr, "oam-docker-ipam: events: the daemon has gone: waiting up to %s for it\n", within)
	}
	for e, err := range server.Events(ctx, socket, q, away) {
		if err == nil {
			err = show(e)
		}
		if err != nil {
			return err
		}
		found = true
	}
	if !found {
		return errors.New("events: nothing found among those that the daemon remembers")
	}
	return nil
}

func eventQuery(cmd *cli.Command, now time.Time) (q server.EventQuery, err error) {
	if cmd.Args().Len() > 1 {
		return q, errors.New("events: want one container's name or ID, address or MAC address at most")
	}
	q = server.EventQuery{Key: cmd.Args().First(), Limit: cmd.Int("limit"), Follow: cmd.Bool("follow")}
	if q.Limit < 0 {
		return q, fmt.Errorf("events: --limit %d: want a number of events, or 0 for all", q.Limit)
	}
	if text := cmd.String("since"); text != "" {
		if q.Since, err = parseSince(text, now); err != nil {
			return q, err
		}
	}
	for _, text := range cmd.StringSlice("event") {
		kind, err := server.ParseEventKind(text)
		if err != nil {
			return q, err
		}
		q.Kinds = append(q.Kinds, kind)
	}
	return q, nil
}

// parseSince reads a time before now, or how long before now it was. Times
// without a zone are local; one of a day that is yet to come was yesterday's.
func parseSince(text string, now time.Time) (time.Time, error) {
	if ago, err := parseAgo(text); err == nil && ago >= 0 {
		return now.Add(-ago), nil
	}
	for _, form := range []string{time.RFC3339, time.DateTime, "2006-01-02T15:04:05", "2006-01-02 15:04", time.DateOnly} {
		if at, err := time.ParseInLocation(form, text, now.Location()); err == nil {
			return at, nil
		}
	}
	for _, form := range []string{time.TimeOnly, "15:04"} {
		if at, err := time.Parse(form, text); err == nil {
			on := func(day int) time.Time {
				return time.Date(now.Year(), now.Month(), day, at.Hour(), at.Minute(), at.Second(), 0, now.Location())
			}
			if today := on(now.Day()); !today.After(now) {
				return today, nil
			}
			return on(now.Day() - 1), nil
		}
	}
	return time.Time{}, fmt.Errorf("parse --since %q: want a time such as 15:04, \"2006-01-02 15:04\" or 2006-01-02T15:04:05Z, or how long ago, such as 10m, 2h or 3d", text)
}

// parseAgo is time.ParseDuration with days of 24 hours, as in 3d or 1d12h.
func parseAgo(text string) (time.Duration, error) {
	const day = 24 * time.Hour
	days, rest, found := strings.Cut(text, "d")
	if !found {
		return time.ParseDuration(text)
	}
	n, err := strconv.ParseUint(days, 10, 16) // 179 years
	if err != nil {
		return 0, err
	}
	ago, err := time.ParseDuration(cmp.Or(rest, "0s"))
	if ago < 0 {
		return ago, err
	}
	return time.Duration(n)*day + ago, err
}

// eventLine is an event for people: what isn't known of it is a hyphen.
func eventLine(e lease.Event) string {
	addr := func(a netip.Addr) string {
		if !a.IsValid() {
			return ""
		}
		return a.String()
	}
	var mac string
	if e.MAC != (lease.MAC{}) {
		mac = e.MAC.String()
	}
	line := e.Time.Local().Format(time.DateTime)
	for _, column := range []struct {
		width int
		text  string
	}{{13, string(e.Kind)}, {15, addr(e.Address)}, {17, mac}, {20, e.Name}, {15, addr(e.Server)}} {
		line += fmt.Sprintf("  %-*s", column.width, cmp.Or(printable(column.text), "-"))
	}
	return strings.TrimRight(line+"  "+printable(e.Detail), " ")
}
