package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/talkingdata/oam-docker-ipam/conf"
	"github.com/talkingdata/oam-docker-ipam/server"
)

func poolsCommand(file *conf.File, stdout io.Writer) *cli.Command {
	return &cli.Command{
		Name: "pools", Usage: "list the networks' pools, and how their DHCP servers answer; exit status 1: there is no such pool", ArgsUsage: "[ID|SUBNET]",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "print JSON instead of a table"}},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if cmd.Args().Len() > 1 {
				return fmt.Errorf("pools: want one ID or subnet at most, not %q: see oam-docker-ipam --help", cmd.Args().Slice())
			}
			if err := file.Err(); err != nil {
				return err
			}
			wanted := cmd.Args().First()
			pools, err := server.Pools(ctx, socket(cmd), wanted)
			switch {
			case err != nil:
				return err
			case cmd.Bool("json"):
				err = printJSON(stdout, pools)
			case len(pools) > 0:
				err = printPools(stdout, pools, time.Now())
			case wanted == "":
				_, err = fmt.Fprintln(stdout, "no pools")
			}
			if err == nil && len(pools) == 0 && wanted != "" {
				err = fmt.Errorf("no pool has the ID or subnet %q: oam-docker-ipam pools lists all", wanted)
			}
			return err
		},
	}
}

// printPools prints a line for each server of each pool, and below these
// what else is to be told of the pools.
func printPools(w io.Writer, pools []server.Pool, now time.Time) error {
	since := func(t time.Time) string { return max(0, now.Sub(t).Round(time.Second)).String() }
	networks := map[netip.Prefix]int{} // of a subnet
	for _, p := range pools {
		networks[p.Subnet]++
	}
	var rows []tableRow
	var notes []line
	for _, p := range pools {
		first := []string{p.Subnet.String(), "", mode(p), counted(p.Leases), fmt.Sprint(p.Refused)}
		if p.Gateway != nil {
			first[1] = p.Gateway.String()
		}
		if len(p.Servers) == 0 {
			rows = append(rows, tableRow{append(first, "none", "", "", ""), red})
		}
		for i, s := range p.Servers {
			r := tableRow{cells: make([]string, len(first))}
			if i == 0 {
				r.cells = first
			}
			from, answered, took, unanswered := "none yet", "never", "", ""
			if s.Server != nil {
				from = s.Server.String()
			}
			if s.AnsweredAt != nil {
				answered = since(*s.AnsweredAt) + " ago"
			}
			if s.TookMS != nil {
				took = fmt.Sprintf("%gms", *s.TookMS)
			}
			if s.SilentSince != nil {
				unanswered = fmt.Sprintf("%d in %s", s.Unanswered, since(*s.SilentSince))
				r.colour = yellow
			}
			r.cells = append(r.cells, from, answered, took, unanswered)
			rows = append(rows, r)
		}
		if networks[p.Subnet] > 1 {
			notes = append(notes, line{text: printable(fmt.Sprintf("%s, with %d leases, has the ID %s", p.Subnet, total(p.Leases), p.ID))})
		}
		if p.LastRefusal != nil {
			text := fmt.Sprintf("%s refused a request %s ago: %s", p.Subnet, since(p.LastRefusal.At), p.LastRefusal.Detail)
			notes = append(notes, line{text: printable(text)})
		}
	}
	lines := tabulate([]string{"SUBNET", "GATEWAY", "MODE", "LEASES", "REFUSED", "SERVER", "ANSWERED", "TOOK", "UNANSWERED"}, rows)
	if len(notes) > 0 {
		lines = append(append(lines, line{}), notes...)
	}
	return printLines(w, lines)
}

// total is how many leases there are in all states.
func total(leases map[string]int) (n int) {
	for _, count := range leases {
		n += count
	}
	return n
}

// mode is how and, where a setting says so, from where a pool's servers are
// asked: "relay 10.10.0.5", "broadcast eth0".
func mode(p server.Pool) string {
	from := p.Options["dhcp_interface"]
	if p.Mode == server.ModeRelay {
		if from = p.Options["listen_addr"]; from == "0.0.0.0" {
			from = "" // the routing chooses
		}
	}
	return strings.TrimSpace(p.Mode + " " + from)
}
