package lease

import (
	"net/netip"
	"time"
)

// EventKind is what happened.
type EventKind string

// The kinds of events.
const (
	// EventGranted: an endpoint has a lease, by a server's word or, during an
	// outage, the stored one; or again one that was lost.
	EventGranted EventKind = "granted"
	// EventFailed: an endpoint's request for an address was refused, or the
	// engine gave it up.
	EventFailed EventKind = "failed"
	// EventRenewed: the leasing server extended a lease.
	EventRenewed EventKind = "renewed"
	// EventRebound: a server extended a lease in Rebinding.
	EventRebound EventKind = "rebound"
	// EventNAK: a server refused to extend or to confirm.
	EventNAK EventKind = "nak"
	// EventLost: a lease ended under its container.
	EventLost EventKind = "lost"
	// EventLeft: a container left, and the release of its lease waits, or could
	// not be sent.
	EventLeft EventKind = "left"
	// EventReleased: a DHCPRELEASE was sent.
	EventReleased EventKind = "released"
	// EventConflict: somebody else has an address that a server granted.
	EventConflict EventKind = "conflict"
	// EventDeclined: a DHCPDECLINE was sent.
	EventDeclined EventKind = "declined"
	// EventReconciled: a reconcile adopted, resumed, released or forgot a lease.
	EventReconciled EventKind = "reconciled"
	// EventServerSilent: a server of some leases doesn't answer. There is one
	// until it does, however long that takes.
	EventServerSilent EventKind = "server-silent"
	// EventServerBack: such a server answers again.
	EventServerBack EventKind = "server-back"
)

// EventKinds are all of them.
var EventKinds = []EventKind{
	EventGranted, EventFailed, EventRenewed, EventRebound, EventNAK, EventLost, EventLeft, EventReleased,
	EventConflict, EventDeclined, EventReconciled, EventServerSilent, EventServerBack,
}

// Routine reports whether events of the kind come with ordinary traffic: there
// are as many as containers start, fail to start and stop, and leases are renewed.
func (k EventKind) Routine() bool {
	switch k {
	case EventGranted, EventFailed, EventRenewed, EventLeft, EventReleased:
		return true
	}
	return false
}

// Event is something that happened to a lease, or with a server. What isn't
// known of it is zero.
type Event struct {
	// Seq numbers events in the order in which they were stored, which is that
	// in which they happened, but for those of the same moment and those that
	// the disk took only later. The Store gives it.
	Seq     uint64     `json:"seq"`
	Time    time.Time  `json:"time"` // by the wall clock
	Kind    EventKind  `json:"event"`
	Pool    string     `json:"pool_id,omitempty"`
	Address netip.Addr `json:"address,omitzero"`
	MAC     MAC        `json:"mac,omitzero"`
	Name    string     `json:"name,omitempty"`
	Server  netip.Addr `json:"server,omitzero"`
	Detail  string     `json:"detail,omitempty"` // for people: one line, at most 300 bytes
}

// MaxEvents bounds the stored events: that many of the kinds that are Routine,
// and that many of all others. Newer ones take the place of the oldest.
const MaxEvents = 10_000

// Observer is told what happens, to be counted. Its methods return at once and
// may be called concurrently, also with locks held.
type Observer interface {
	// Requested: an endpoint's address request ended, with err or nil.
	Requested(took time.Duration, err error)
	// Attempted: an attempt to keep a lease ended, with err or nil. State is the
	// lease's when it began, late how long it ended after T1, or after what came
	// before T1: the lease was handed out from the store, or lost.
	Attempted(state State, late time.Duration, err error)
	// Happened: an event, whose Seq isn't known yet.
	Happened(Event)
}

// Unobserved is an Observer for whom nothing counts.
type Unobserved struct{}

// Requested implements Observer.
func (Unobserved) Requested(time.Duration, error) {}

// Attempted implements Observer.
func (Unobserved) Attempted(State, time.Duration, error) {}

// Happened implements Observer.
func (Unobserved) Happened(Event) {}
