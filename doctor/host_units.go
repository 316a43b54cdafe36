package doctor

import (
	"context"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// The units whose state counts.
const (
	serviceUnit = "oam-docker-ipam.service"
	socketUnit  = "oam-docker-ipam.socket"
	dockerUnit  = "docker.service"
	dockerPlug  = "docker.socket"
)

// unit is what systemd says of a unit: the values of each property.
type unit map[string][]string

// units are those above by their names; none where there is no systemd.
type units map[string]unit

// askTime bounds each question to something that should answer at once.
const askTime = 3 * time.Second

// askSystemd reads the units' state, which starts nothing. What it can't learn
// is absent.
func askSystemd(ctx context.Context) units {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	const properties = "--property=Id,LoadState,ActiveState,SubState,Result,UnitFileState,NRestarts,User,Listen"
	cmd := exec.CommandContext(ctx, "systemctl", "show", properties, serviceUnit, socketUnit, dockerUnit, dockerPlug)
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return nil
	}
	all := units{}
	for block := range strings.SplitSeq(string(out), "\n\n") {
		u := unit{}
		for line := range strings.Lines(block) {
			if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && value != "" {
				u[name] = append(u[name], value)
			}
		}
		all[u.get("Id")] = u
	}
	return all
}

// get is a property's value, "" where there is none.
func (u unit) get(property string) string {
	if values := u[property]; len(values) > 0 {
		return values[0]
	}
	return ""
}

func (u unit) is(property string, values ...string) bool {
	return slices.Contains(values, u.get(property))
}

// there reports whether the unit is installed.
func (u unit) there() bool { return u.is("LoadState", "loaded", "masked") }

// asleep reports whether a service is stopped while its socket unit listens: a
// connection would start it.
func (u units) asleep(service, socket string) bool {
	return u[service].is("ActiveState", "inactive", "failed", "deactivating") && u[socket].is("ActiveState", "active")
}

// how is the command that starts, restarts or reloads the daemon.
func (p *patient) how(verb string) string {
	switch {
	case p.units[serviceUnit].there():
		return "systemctl " + verb + " oam-docker-ipam"
	case verb == "reload":
		return "send it SIGHUP (kill -HUP PID)"
	case verb == "restart":
		return "end it (kill PID) and start it again as it was started"
	}
	return "as root: oam-docker-ipam server"
}
