package main

import (
	"context"
	"errors"
	"io"

	"github.com/urfave/cli/v3"

	"github.com/talkingdata/oam-docker-ipam/conf"
	"github.com/talkingdata/oam-docker-ipam/server"
)

func inspectCommand(file *conf.File, stdout io.Writer) *cli.Command {
	return &cli.Command{
		Name: "inspect", Usage: "print all that is known of a container's lease, as JSON: what it was given, times, options, its last events",
		ArgsUsage: "CONTAINER|ADDRESS|MAC",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "pool", Usage: "`ID` or subnet of the pool, where several have such a lease"},
			alwaysJSON(),
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if cmd.Args().Len() != 1 {
				return errors.New("inspect: want one container's name or ID, address or MAC address, as the leases command lists them")
			}
			if err := file.Err(); err != nil {
				return err
			}
			told, err := server.Inspect(ctx, socket(cmd), cmd.Args().First(), cmd.String("pool"))
			if err != nil {
				return err
			}
			return printJSON(stdout, told)
		},
	}
}

// alwaysJSON is for those who type it everywhere.
func alwaysJSON() cli.Flag {
	return &cli.BoolFlag{Name: "json", Usage: "print JSON, as without it"}
}

func inspectAllCommand(file *conf.File, stdout io.Writer) *cli.Command {
	return &cli.Command{
		Name: "inspect-all", Usage: "print what inspect does of all leases, as a JSON list sorted by address",
		Flags: []cli.Flag{alwaysJSON()},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := file.Err(); err != nil {
				return err
			}
			told, err := server.InspectAll(ctx, socket(cmd))
			if err != nil {
				return err
			}
			return printJSON(stdout, told)
		},
	}
}
