package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/talkingdata/oam-docker-ipam/conf"
	"github.com/talkingdata/oam-docker-ipam/doctor"
	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/server"
)

// doctorCommand examines this host.
func doctorCommand(file *conf.File, stdout io.Writer) *cli.Command {
	return &cli.Command{
		Name: "doctor", Usage: "find what is wrong, and say what to do about it; exit status 2: a fault was found",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "print JSON instead of lines"}},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			site := siteOf(cmd, file)
			look := func(tell func(doctor.Finding)) { doctor.Examine(ctx, site, tell) }
			return examine(ctx, look, cmd.Bool("json"), stdout)
		},
	}
}

// siteOf is what a start of the daemon would have. Settings that can't be used
// are a finding, no error.
func siteOf(cmd *cli.Command, file *conf.File) doctor.Site {
	_, err := readSettings(cmd, file)
	all := inForce(cmd)
	global, globalErr := optionsOf(all)
	if file.Err() != nil {
		globalErr = file.Err() // nothing is known of what it says
	}
	paths := settings{driver: cmd.String("driver-name"), socket: socket(cmd)}
	site := doctor.Site{
		Version: version, Wrong: err, Settings: all, Global: global, GlobalErr: globalErr,
		Driver: paths.driver, Socket: paths.socket, SocketOf: paths.socketOf, DataDir: cmd.String("data-dir"), Docker: cmd.String("docker"),
		Reloadable: reloadable, Options: optionsOf,
	}
	for _, key := range file.Unknown(knownKeys(cmd.Root())) {
		site.Unknown = append(site.Unknown, fmt.Sprintf("%s: unknown key %s", key.Where(), key.Name()))
	}
	return site
}

// optionsOf are the global options of a daemon that has these settings.
func optionsOf(all []server.Setting) (lease.Options, error) {
	texts := map[string]string{}
	for _, key := range optionKeys {
		for _, s := range all {
			if s.Key == key {
				texts[optionName(key)] = s.Value
			}
		}
	}
	return lease.ParseOptions(texts)
}

// examine prints what a doctor finds: lines as it finds them, or JSON at the end.
func examine(ctx context.Context, look func(tell func(doctor.Finding)), asJSON bool, stdout io.Writer) error {
	var failed error // to print
	findings := []doctor.Finding{}
	look(func(f doctor.Finding) {
		findings = append(findings, f)
		if !asJSON && failed == nil {
			failed = printLines(stdout, diagnosis(f))
		}
	})
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("stopped before the last check: %w", context.Cause(ctx))
	case asJSON:
		failed = printJSON(stdout, findings)
	case failed == nil:
		_, failed = fmt.Fprintln(stdout, conclusion(findings))
	}
	if failed == nil && count(findings, doctor.Fault) > 0 {
		return errFound
	}
	return failed
}

// diagnosis is a finding in lines: what was found, and under it what to do.
func diagnosis(f doctor.Finding) []line {
	names := 0
	for _, name := range doctor.Names() {
		names = max(names, len(name))
	}
	colours := map[doctor.Status]colour{doctor.Fault: red, doctor.Warning: yellow}
	lines := []line{{fmt.Sprintf("%-7s  %-*s  %s", f.Status, names, f.Check, printable(f.Found)), colours[f.Status]}}
	if f.Advice != "" {
		lines = append(lines, line{text: strings.Repeat(" ", 7+2+names+2) + printable(f.Advice)})
	}
	return lines
}

// conclusion sums the findings up.
func conclusion(findings []doctor.Finding) string {
	var parts []string
	for _, of := range []struct {
		status    doctor.Status
		one, many string
	}{{doctor.Fault, "fault", "faults"}, {doctor.Warning, "warning", "warnings"}, {doctor.Skipped, "skipped", "skipped"}} {
		switch n := count(findings, of.status); n {
		case 0:
		case 1:
			parts = append(parts, "1 "+of.one)
		default:
			parts = append(parts, fmt.Sprintf("%d %s", n, of.many))
		}
	}
	switch faults := count(findings, doctor.Fault); {
	case len(parts) == 0:
		return "all is well"
	case faults == 0:
		return "no fault: " + strings.Join(parts, ", ")
	case faults == 1:
		return strings.Join(parts, ", ")
	}
	return strings.Join(parts, ", ") + ": the first fault is the likeliest cause"
}

func count(findings []doctor.Finding, status doctor.Status) (n int) {
	for _, f := range findings {
		if f.Status == status {
			n++
		}
	}
	return n
}
