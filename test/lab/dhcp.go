package lab

import (
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/template"
	"time"
)

// Subnet is one subnet of a DHCP server.
type Subnet struct {
	Prefix       netip.Prefix
	First, Last  netip.Addr // of the range that is handed out; none if zero
	Router       netip.Addr // none if zero
	Reservations []Reservation
}

// Reservation keeps an address for a MAC.
type Reservation struct {
	MAC  string
	Addr netip.Addr
}

// NewSubnet makes a subnet from text. An empty router is none.
func NewSubnet(prefix, first, last, router string) Subnet {
	s := Subnet{
		Prefix: netip.MustParsePrefix(prefix),
		First:  netip.MustParseAddr(first),
		Last:   netip.MustParseAddr(last),
	}
	if router != "" {
		s.Router = netip.MustParseAddr(router)
	}
	return s
}

// SubnetA is the one that the LAN of Standard is in.
func SubnetA() Subnet {
	return NewSubnet("10.10.0.0/24", "10.10.0.100", "10.10.0.199", "10.10.0.1")
}

// SubnetB is one that no relay address is in.
func SubnetB() Subnet {
	return NewSubnet("10.20.0.0/24", "10.20.0.100", "10.20.0.199", "10.20.0.1")
}

// Netmask is the prefix length as a mask, for the templates.
func (s Subnet) Netmask() string {
	mask := uint32(0xffffffff) << (32 - s.Prefix.Bits())
	return netip.AddrFrom4([4]byte{byte(mask >> 24), byte(mask >> 16), byte(mask >> 8), byte(mask)}).String()
}

// DHCPConfig is what a DHCP server is told, whatever its kind.
type DHCPConfig struct {
	Subnets []Subnet
	// LeaseSeconds is the lease time, 600 if zero. Dnsmasq takes 120 as the
	// least: use RenewSeconds to see it renew sooner.
	LeaseSeconds int
	// RenewSeconds and RebindSeconds are sent as T1 and T2; if zero the server
	// does as it does by itself.
	RenewSeconds, RebindSeconds int
	// Threads are those in which Kea serves, as it does by itself from 2.4 on;
	// one if zero.
	Threads int
	// Circuit is the circuit id (option 82) of the clients that are served; all
	// are if it is empty.
	Circuit string
	// Link is a relay address of the first subnet, on whose link all of them
	// are: the server then chooses among all ranges for it. If zero, each
	// subnet is a link of its own.
	Link netip.Addr

	pair *keaPair // see StartKeaPair
}

// DHCPLease is a row of a DHCP server's lease table.
type DHCPLease struct {
	Addr     netip.Addr
	MAC      string // like 02:00:00:00:00:01
	ClientID string // option 61 in hexadecimal; empty if the client sent none
	Hostname string
	// Agent are the sub-options 1, 2 and 6 of option 82 in hexadecimal, code and
	// length before each. Dnsmasq keeps none.
	Agent   string
	Expires time.Time // zero: never
}

// agentNames are the sub-options of DHCPLease.Agent, as ISC dhcpd calls them.
var agentNames = map[byte]string{1: "circuit-id", 2: "remote-id", 6: "unknown-6"}

// DHCPKind is a DHCP server product.
type DHCPKind struct {
	Name string

	program string
	command func(program string, f dhcpFiles) Command
	// parse returns the rows in the table's order; one that gives an address
	// back is a row that expired at gone.
	parse func(table string) ([]DHCPLease, error)
}

var gone = time.Unix(0, 0)

// DHCPKinds are all there are, for tests to range over.
var DHCPKinds = []DHCPKind{ISC, Kea, Dnsmasq}

// dhcpFiles are a server's files, as its template and command line see them.
type dhcpFiles struct {
	Dir, Config, Leases string
}

//go:embed templates
var templates embed.FS

// DHCPServer is a real DHCP server on a node's eth0.
type DHCPServer struct {
	Kind DHCPKind
	Node *Node
	// Config is read at each Start.
	Config DHCPConfig

	files   dhcpFiles
	process *Process
}

// NewDHCP puts a DHCP server on a node. It runs after Start.
func (n *Node) NewDHCP(kind DHCPKind, config DHCPConfig) (*DHCPServer, error) {
	dir := n.lab.path(n.short + "-" + kind.Name)
	s := &DHCPServer{Kind: kind, Node: n, Config: config, files: dhcpFiles{
		Dir: dir, Config: dir + "/config", Leases: dir + "/leases",
	}}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make folder of %s: %w", kind.Name, err)
	}
	return s, nil
}

// StartDHCP is NewDHCP and Start.
func (n *Node) StartDHCP(kind DHCPKind, config DHCPConfig) (*DHCPServer, error) {
	s, err := n.NewDHCP(kind, config)
	if err != nil {
		return nil, err
	}
	return s, s.Start()
}

// Start starts the server, with the lease table that it had, and returns when
// it hears requests.
func (s *DHCPServer) Start() error {
	if err := s.configure(); err != nil {
		return fmt.Errorf("configure %s: %w", s.Kind.Name, err)
	}
	program, err := s.Node.lab.copyTool(s.Kind.program)
	if err != nil {
		return err
	}
	s.process, err = s.Node.Start(s.Kind.Name, s.Kind.command(program, s.files))
	if err != nil {
		return err
	}
	// From the moment of its bind on, the kernel keeps requests for it.
	return s.process.ready(20*time.Second, func() error {
		open, err := udpOpen(strconv.Itoa(s.process.Pid), 67)
		if err == nil && !open {
			err = errors.New("UDP port 67 is not open")
		}
		return err
	})
}

// configure writes the configuration, and an empty lease table if there is
// none: ISC dhcpd wants to find one.
func (s *DHCPServer) configure() error {
	name := s.Kind.Name + ".tmpl"
	// Kea counts subnets from one.
	next := func(i int) int { return i + 1 }
	text, err := template.New(name).Funcs(template.FuncMap{"next": next}).ParseFS(templates, "templates/"+name)
	if err != nil {
		return err
	}
	data := struct {
		dhcpFiles
		DHCPConfig
		Pair *keaPair
	}{s.files, s.Config, s.Config.pair}
	if data.LeaseSeconds == 0 {
		data.LeaseSeconds = 600
	}
	config, err := os.Create(s.files.Config)
	if err != nil {
		return err
	}
	if err := errors.Join(text.Execute(config, data), config.Close()); err != nil {
		return err
	}
	leases, err := os.OpenFile(s.files.Leases, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	return leases.Close()
}

// Stop ends the server with SIGTERM.
func (s *DHCPServer) Stop() error {
	if s.process == nil {
		return nil
	}
	return s.process.Stop()
}

// Kill ends the server with SIGKILL.
func (s *DHCPServer) Kill() error {
	if s.process == nil {
		return nil
	}
	return s.process.Kill()
}

// Forget removes the lease table of a server that isn't running, as when its
// disk is lost.
func (s *DHCPServer) Forget() error {
	// Each keeps a backup of some name beside it.
	files, err := filepath.Glob(s.files.Leases + "*")
	for _, file := range files {
		err = errors.Join(err, os.Remove(file))
	}
	return err
}

// Log returns what the server has written.
func (s *DHCPServer) Log() string {
	return readLog(s.Node.lab.path("log", s.Node.short+"-"+s.Kind.Name+".log"))
}

// Pid is the server's process.
func (s *DHCPServer) Pid() int { return s.process.Pid }

// Leases reads the leases that are active now out of the server's own table.
// ISC dhcpd has no row there for an address that is reserved for a MAC: look
// for those in its Log.
func (s *DHCPServer) Leases() ([]DHCPLease, error) {
	table, err := os.ReadFile(s.files.Leases)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read leases of %s: %w", s.Kind.Name, err)
	}
	leases, err := s.Kind.parse(string(table))
	if err != nil {
		return nil, fmt.Errorf("read leases of %s: %w", s.Kind.Name, err)
	}
	return activeAt(lastRows(leases), time.Now()), nil
}

// Lease returns the active lease of an address, if there is one.
func (s *DHCPServer) Lease(addr netip.Addr) (lease DHCPLease, found bool, err error) {
	leases, err := s.Leases()
	for _, lease := range leases {
		if lease.Addr == addr {
			return lease, true, err
		}
	}
	return DHCPLease{}, false, err
}

// activeAt drops what has expired: servers leave such rows until they tidy up.
func activeAt(leases []DHCPLease, now time.Time) []DHCPLease {
	var active []DHCPLease
	for _, lease := range leases {
		if lease.Expires.IsZero() || lease.Expires.After(now) {
			active = append(active, lease)
		}
	}
	return active
}

// lastRows keeps the last row of each address: the tables are journals.
func lastRows(rows []DHCPLease) []DHCPLease {
	var last []DHCPLease
	seen := make(map[netip.Addr]bool)
	for _, row := range slices.Backward(rows) {
		if !seen[row.Addr] {
			last = append(last, row)
		}
		seen[row.Addr] = true
	}
	slices.Reverse(last)
	return last
}

// plainHex checks bytes that are written in hexadecimal with colons, and
// leaves the colons out.
func plainHex(s string) (string, error) {
	s = strings.ReplaceAll(s, ":", "")
	_, err := hex.DecodeString(s)
	return s, err
}
