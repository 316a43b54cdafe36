package lease

import (
	"context"
	"errors"
	"math"
	"net/netip"
	"time"
)

// Client speaks DHCP for the Manager's endpoints. Every call ends when its
// context does, with an error that tells what was missing.
type Client interface {
	// Probe asks for offers to a MAC, the zero one standing for one of this
	// host, and never takes one (DHCPDISCOVER only). The pool's subnet may be
	// zero: then the servers choose. It returns when every server that is
	// known has offered, a while after the first offer, or when ctx ends, and
	// ErrNoAnswer when there was none.
	Probe(ctx context.Context, pool Pool, mac MAC) ([]Offer, error)

	// Acquire takes a lease, from DHCPDISCOVER to DHCPACK, or returns an
	// error and leaves nothing leased.
	Acquire(ctx context.Context, req Request) (Lease, error)

	// Confirm asks the leasing server, and no other, for the address of a
	// lease that isn't in use (INIT-REBOOT, RFC 2131 sections 3.2 and 4.3.2).
	// It repeats itself until the answer comes or ctx ends. The server's
	// refusal is ErrNAK, its silence ErrNoAnswer.
	Confirm(ctx context.Context, pool Pool, lease Lease) (Lease, error)

	// Renew asks the leasing server once to extend the lease and waits for
	// the answer as long as ctx lasts. The server's refusal is ErrNAK.
	Renew(ctx context.Context, pool Pool, lease Lease) (Lease, error)

	// Rebind is Renew, asking every server.
	Rebind(ctx context.Context, pool Pool, lease Lease) (Lease, error)

	// Release sends one DHCPRELEASE, to which there is no answer. In a crowd it
	// waits for its turn; what Acquire and Confirm ask for the same client
	// identifier waits until it has left.
	Release(ctx context.Context, pool Pool, lease Lease) error

	// Decline sends one DHCPDECLINE, as Release does: the address is used by
	// somebody else.
	Decline(ctx context.Context, pool Pool, lease Lease) error

	// RelayMAC is the hardware address of the interface that has the pool's
	// relay address, or on which servers are asked by broadcast; of several
	// relay addresses, the first server's.
	RelayMAC(ctx context.Context, pool Pool) (MAC, error)

	// Servers tells how the servers of a pool have answered since the start: as
	// a relay agent each that is configured and whose address is known, by
	// broadcast each that has answered on that interface. It sends nothing.
	Servers(pool Pool) []ServerStatus

	// Alive returns nil as soon as it is sure that the client can send and
	// receives, else when ctx ends an error that says what is stuck and for how
	// long. It sends nothing.
	Alive(ctx context.Context) error
}

// ServerStatus is how one DHCP server has answered since the daemon's start.
type ServerStatus struct {
	// Server is the address by which it is asked, or on a LAN its identifier;
	// zero on a LAN where none has answered yet.
	Server netip.Addr `json:"server,omitzero"`
	// Answered is when its last answer came, Took the time from the message to
	// that answer. Both are zero before the first.
	Answered time.Time     `json:"answered,omitzero"`
	Took     time.Duration `json:"-"`
	// Silent is when the first message was sent that it hasn't answered since
	// its last answer, and Unanswered how many these are by now. Zero: none.
	Silent     time.Time `json:"silent,omitzero"`
	Unanswered int       `json:"unanswered"`
	// Offers, ACKs and NAKs count its answers that an exchange took.
	Offers uint64 `json:"offers"`
	ACKs   uint64 `json:"acks"`
	NAKs   uint64 `json:"naks"`
}

// Host is the machine that this daemon runs on.
type Host interface {
	// MachineID tells this machine from others, see machine-id(5).
	MachineID() (string, error)
	// HardwareAddrs are the MACs of all network interfaces.
	HardwareAddrs() ([]MAC, error)
	// BootID is another one after each boot.
	BootID() string
	// BootTime is the time since boot, that of suspend included
	// (CLOCK_BOOTTIME).
	BootTime() time.Duration
}

// Prober looks for other users of an address.
type Prober interface {
	// Conflict sends ARP probes for an address on an interface (RFC 5227
	// section 2.1.1) as check says, and reports who has it or asks for it too.
	Conflict(ctx context.Context, iface string, addr netip.Addr, check ConflictCheck) (by MAC, found bool, err error)
}

// Engine is the container engine behind its API. It is asked only where a
// network's on_lease_lost says so, and never while it waits for an answer. A
// lease without a MAC is of an endpoint that has none of its own.
type Engine interface {
	// Stop stops the container that has a lease's address.
	Stop(ctx context.Context, lease Lease) error
	// Restart restarts it.
	Restart(ctx context.Context, lease Lease) error
}

// Errors of a Client that its callers tell apart.
var (
	// ErrNoAnswer: no server said anything.
	ErrNoAnswer = errors.New("no DHCP server answered")
	// ErrNAK: the server refused (DHCPNAK).
	ErrNAK = errors.New("DHCP server refused (NAK)")
	// ErrNoVLAN: servers would be asked on a VLAN's interface that isn't there
	// yet, although its parent is.
	ErrNoVLAN = errors.New("VLAN interface doesn't exist yet")
)

// NeedsNetRaw ends errors about sockets that this process may not open, for
// Clients and Probers.
const NeedsNetRaw = "needs root or CAP_NET_RAW (for a daemon installed from a package: put /usr/share/doc/oam-docker-ipam/broadcast.conf into /etc/systemd/system/oam-docker-ipam.service.d, then systemctl daemon-reload and systemctl restart oam-docker-ipam)"

// Request is what an endpoint asks of the servers.
type Request struct {
	Pool     Pool
	MAC      MAC
	Name     string     // the container's name, or ""
	ClientID []byte     // option 61; nil for the usual 01 + MAC
	Address  netip.Addr // option 50, a wish; zero for none
	// InUse: the endpoint has Address already, from a lease that was lost. It
	// is never released, not even when the server falls silent after its
	// offer.
	InUse bool
	// Accept refuses addresses that the endpoint must not have. It is asked
	// at the offer and again at the acknowledgment.
	Accept func(netip.Addr) error
}

// Offer is what a server would give.
type Offer struct {
	Server  netip.Addr   // server identifier, option 54
	From    netip.Addr   // IP source of the message
	Address netip.Addr   // yiaddr
	Subnet  netip.Prefix // by option 1; zero where it is missing or absurd
	Router  netip.Addr   // first of option 3; zero where it is missing
	DNS     []netip.Addr // option 6
	// Length of the lease (option 51); LeaseForEver for an infinite one.
	Length time.Duration
	// T1 and T2 as they would count (RFC 2131 section 4.4.5).
	T1, T2 time.Duration
	// After is the time from the first DISCOVER to this offer.
	After time.Duration
}

// LeaseForEver is the length of an infinite lease (RFC 2131 section 3.3).
const LeaseForEver = time.Duration(math.MaxUint32) * time.Second

// Store remembers everything that must outlive the daemon.
type Store interface {
	Load() (Saved, error)
	// Commit makes a change. All of it is on disk when Commit returns; after
	// an error nothing has changed. It fails when a lease's pool is not there.
	Commit(Change) error
	// Events returns the stored events that come after the one of a Seq, 0
	// standing for all, the oldest first.
	Events(after uint64) ([]Event, error)
	// Alive returns nil as soon as a change could be made, else when ctx ends an
	// error that says what is stuck and for how long. It writes nothing.
	Alive(ctx context.Context) error
}

// Saved is everything in a Store.
type Saved struct {
	Pools    []Pool
	Leases   []Lease
	Bindings []Binding
	Host     HostIdentity // zero where none was put yet
}

// Change is what one Commit does, in the order of the fields.
type Change struct {
	DropBindings []BindingKey
	DropLeases   []Key
	DropPools    []string // IDs; with their leases
	PutPools     []Pool
	PutLeases    []Lease      // each the only one of its Key
	PutBindings  []Binding    // each the only one of its BindingKey
	PutHost      HostIdentity // unless zero
	PutEvents    []Event      // which get their Seq here, in this order
}
