package lease

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// declineWait is how long nothing is asked for after a DECLINE (RFC 2131
// section 3.1 (5)).
const declineWait = 10 * time.Second

// checkConflict refuses a conflict check that has no interface to probe on.
func (o Options) checkConflict() error {
	if o.Conflict != ConflictOff && o.ConflictInterface == "" {
		return errors.New("conflict_check needs the network's parent interface, of which an IPAM driver isn't told: add --ipam-opt conflict_interface=eth0 (or CONFLICT_INTERFACE to the configuration), or --ipam-opt conflict_check=off")
	}
	return nil
}

// disputed looks for a neighbour who has a lease's address, where the network
// wants that. What it found is taken; err is a probe that couldn't be made.
func (m *Manager) disputed(ctx context.Context, p Pool, l Lease) (taken, err error) {
	o := m.options(p)
	if o.Conflict == ConflictOff {
		return nil, nil
	}
	if err := o.checkConflict(); err != nil {
		return nil, err
	}
	by, found, err := m.prober.Conflict(ctx, o.ConflictInterface, l.Addr(), o.Conflict)
	if err != nil {
		return nil, fmt.Errorf("probe address %s for a conflict: %w", l.Addr(), err)
	}
	if !found {
		return nil, nil
	}
	l.Pool = p.ID
	m.record(l.event(EventConflict, fmt.Sprintf("used by %s on %s", by, o.ConflictInterface)))
	m.log.Warn("address conflict: declined", "address", l.Addr(), "mac", l.MAC, "name", l.Name, "used by", by, "interface", o.ConflictInterface, "server", l.Server)
	return fmt.Errorf("address %s is in use by %s on %s, to which the DHCP server %s didn't lease it: find that host and correct it", l.Addr(), by, o.ConflictInterface, l.Server), nil
}
