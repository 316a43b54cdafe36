package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/talkingdata/oam-docker-ipam/engine"
	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/server"
)

// systemdDocker is the address of an engine that systemd would start at a
// connection.
const systemdDocker = "/run/docker.sock"

// checkEngine: what can the engine do, and do its containers and the leases
// agree? An engine that is meant to be down isn't started.
func checkEngine(ctx context.Context, p *patient) {
	docker, err := engine.New(p.Docker, lease.Drivers(p.Driver)...)
	if err != nil {
		p.skip(err.Error(), "correct the configuration")
		return
	}
	path := strings.TrimPrefix(p.Docker, "unix://")
	if canonical(path) == systemdDocker && p.units.asleep(dockerUnit, dockerPlug) {
		p.warn("Docker is stopped", "systemctl start docker")
		return
	}
	switch err := reach(path); {
	case errors.Is(err, errDenied):
		p.skip(path+": not permitted", asRoot)
		return
	case errors.Is(err, fs.ErrNotExist), abandoned(path):
		p.warn("no engine is there: nobody serves "+path, "systemctl start docker, or name the engine's socket with --docker (DOCKER in the configuration)")
		return
	}
	ask, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	version, err := docker.Version(ask)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		p.fault(fmt.Sprintf("the engine at %s hangs: no answer in %s", path, askTime), "journalctl -u docker says what it waits for; systemctl restart docker")
		return
	case err != nil:
		p.fault(oneLine(err), "systemctl status docker")
		return
	}
	p.checkKind(version)
	// Of many containers a slow disk may have to tell.
	list, cancel := context.WithTimeout(ctx, 4*askTime)
	defer cancel()
	inventory, err := docker.Networks(list)
	if err != nil {
		p.fault("its networks can't be read: "+oneLine(err), "journalctl -u docker says why")
		return
	}
	containers := 0
	for _, n := range inventory.Networks {
		containers += len(n.Attachments)
	}
	p.compareLeases(list, inventory)
	p.otherwise("Docker %s (API %s), %s: %s of %s with %s", version.Engine, version.API, abilities(version),
		plural(len(inventory.Networks), "network"), p.Driver, plural(containers, "running container"))
}

// checkKind looks for engines that this driver can't serve as it should.
func (p *patient) checkKind(version engine.Version) {
	if version.Rootless {
		p.warn("Docker "+version.Engine+" is rootless: its macvlan and ipvlan networks don't reach the LAN, and it looks for plugins elsewhere", "use an engine that runs as root")
	}
	if version.Desktop {
		p.warn("Docker "+version.Engine+" is Docker Desktop's: it runs in a virtual machine, where this daemon isn't", "use an engine on this host itself")
	}
	byName := p.Global.ClientID == lease.ClientIDName
	for _, pool := range p.pools {
		byName = byName || pool.InForce.ClientID == lease.ClientIDName
	}
	if byName && !version.Names {
		p.fault("CLIENT_ID=name, and Docker "+version.Engine+" doesn't tell the containers' names: it refuses them all", "CLIENT_ID=auto, with --mac-address for an address that stays; or Docker 29")
	}
}

// abilities is what an engine's version means.
func abilities(version engine.Version) string {
	switch {
	case version.Names:
		return "which tells the containers' names: addresses follow them"
	case version.LearnsSubnets:
		return "which tells no names (from 29 on): addresses follow --mac-address only"
	}
	return "which tells no names (from 29 on): addresses follow --mac-address only; and networks on the host's own LAN need --subnet and --gateway (before 27)"
}

// compareLeases has the running daemon compare its leases with the containers.
func (p *patient) compareLeases(ctx context.Context, inventory lease.Inventory) {
	if p.health == nil || len(inventory.Networks) == 0 && len(p.leases) == 0 {
		return
	}
	findings, err := server.Reconcile(ctx, p.Socket, inventory, true)
	if err != nil {
		p.warn("leases and containers can't be compared: "+oneLine(err), "oam-docker-ipam reconcile --dry-run")
		return
	}
	differ := 0
	for _, f := range findings {
		if f.Action != lease.Named {
			differ++
		}
	}
	if differ > 0 {
		p.warn(fmt.Sprintf("leases and containers differ in %s", plural(differ, "place")), "oam-docker-ipam reconcile --dry-run lists them, oam-docker-ipam reconcile mends them")
	}
}
