package doctor

import (
	"context"
	"fmt"
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
	const properties = "--property=Id,LoadState,ActiveState,SubState,Result,UnitFileState,NRestarts,User,Listen,InvocationID"
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

// lastWordsTime bounds the search in the journal, which may be large.
const lastWordsTime = 2 * time.Second

// why is what systemd says of a service that doesn't run, with the last error
// that this run of it has logged.
func (u units) why(ctx context.Context) string {
	service := u[serviceUnit]
	if !service.there() || service.is("ActiveState", "active") {
		return ""
	}
	why := fmt.Sprintf(" (systemd: %s, %s)", service.get("ActiveState"), service.get("Result"))
	run := service.get("InvocationID")
	if run == "" || service.is("Result", "success") {
		return why
	}
	ctx, cancel := context.WithTimeout(ctx, lastWordsTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "journalctl", "--quiet", "--no-pager", "--lines=1", "--priority=err", "--output=cat", "_SYSTEMD_INVOCATION_ID="+run)
	cmd.WaitDelay = time.Second
	// Without a journal there are none.
	out, _ := cmd.Output()
	if words := strings.TrimSpace(string(out)); words != "" {
		why += fmt.Sprintf(", its last error %q", words)
	}
	return why
}

// how is the command that starts, restarts or reloads the daemon.
func (p *patient) how(verb string) string {
	switch {
	case p.units[serviceUnit].there():
		if verb == "restart" && p.down() {
			verb = "start"
		}
		return "systemctl " + verb + " oam-docker-ipam"
	case verb == "reload":
		return "send it SIGHUP (kill -HUP PID)"
	case verb == "restart" && !p.down():
		return "end it (kill PID) and start it again as it was started"
	}
	return "as root: oam-docker-ipam server"
}
