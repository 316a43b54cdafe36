package lease

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ServerPort is the UDP port of DHCP servers and relay agents (RFC 2131
// section 4.1).
const ServerPort = 67

// Server is a DHCP server as its user wrote it.
type Server struct {
	Host string // IPv4 address or DNS name
	Port uint16 // 67 unless written
}

// String writes the server as it is configured, without the usual port.
func (s Server) String() string {
	if s.Port == ServerPort {
		return s.Host
	}
	return net.JoinHostPort(s.Host, strconv.Itoa(int(s.Port)))
}

// MarshalText implements encoding.TextMarshaler as String.
func (s Server) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler: "host" or "host:port".
func (s *Server) UnmarshalText(text []byte) error {
	host, port, found := strings.Cut(string(text), ":")
	s.Host, s.Port = host, ServerPort
	if found {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return fmt.Errorf("DHCP server %q: want an IPv4 address or a name, with an optional :port of 1 to 65535", text)
		}
		s.Port = uint16(n)
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		if !Unicast(addr) {
			return fmt.Errorf("DHCP server %q: not a unicast IPv4 address", text)
		}
		return nil
	}
	if !isHostName(host) {
		return fmt.Errorf("DHCP server %q: neither an IPv4 address nor a host name", text)
	}
	return nil
}

const hostNameChars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"

// isHostName tells names that DNS can answer (RFC 1123 section 2.1, and the
// underscores that people use) from slips such as 10.0.0.300 or an empty word.
func isHostName(s string) bool {
	labels := strings.Split(strings.TrimSuffix(s, "."), ".")
	for _, label := range labels {
		if label == "" || len(label) > 63 || strings.Trim(label, hostNameChars) != "" {
			return false
		}
	}
	_, err := strconv.Atoi(labels[len(labels)-1])
	return err != nil && len(s) <= 253
}

// Unicast reports whether an IPv4 host or server can have this address.
func Unicast(a netip.Addr) bool {
	return a.Is4() && !a.IsUnspecified() && !a.IsMulticast() && a.As4()[0] < 240
}

// Options are the settings that a network's user may give with --ipam-opt. Those
// that the daemon's configuration has too are keys there by the same names in upper
// case; what a network says itself beats them. Zero fields are unset.
type Options struct {
	// Servers are asked for leases, all of them at once.
	Servers []Server `json:"dhcp_server,omitempty"`
	// Relay is giaddr; 0.0.0.0 leaves the choice to the host's routing, for
	// each server and exchange.
	Relay netip.Addr `json:"listen_addr,omitzero"`
	// ClientID is what identifies an endpoint to the servers.
	ClientID ClientIDForm `json:"client_id,omitempty"`
	// ReleaseDelay is how long a lease whose identity is a name waits for its
	// container to come back before it is released, 0 to maxReleaseDelay.
	ReleaseDelay *time.Duration `json:"release_delay,omitempty"`
	// OnLost is what happens to a container whose lease is lost.
	OnLost LossPolicy `json:"on_lease_lost,omitempty"`
	// Conflict is how addresses are probed before they are handed out.
	Conflict ConflictCheck `json:"conflict_check,omitempty"`
	// ConflictInterface is where they are probed: the network's parent, of
	// which an IPAM driver isn't told.
	ConflictInterface string `json:"conflict_interface,omitempty"`

	// RelayPort is the UDP port of the relay address, ServerPort unless set.
	// Another one is told to the servers (RFC 8357), of which few know it.
	RelayPort uint16 `json:"listen_port,omitempty"`
	// Interface is the one on whose LAN servers are asked by broadcast, instead
	// of Servers: at most one of the two is set.
	Interface string `json:"dhcp_interface,omitempty"`
	// EtherSource is the Ethernet source address of what is broadcast.
	EtherSource EtherSource `json:"ether_source,omitempty"`
	// Probe is whether the servers are asked for an offer when the network is
	// created.
	Probe Switch `json:"probe,omitempty"`
	// LinkSelection is how servers are told the wanted subnet.
	LinkSelection LinkSelection `json:"link_selection,omitempty"`
	// Agent is what option 82 tells of an endpoint (RFC 3046), nothing by
	// default.
	Agent []AgentPart `json:"option82,omitempty"`
	// NetworkName is the network's name there, of which an IPAM driver isn't
	// told. The subnet stands for it.
	NetworkName string `json:"network_name,omitempty"`
	// VendorClass is option 60, "off" for none; UserClass option 77.
	VendorClass string `json:"vendor_class,omitempty"`
	UserClass   string `json:"user_class,omitempty"`
	// HostName is whether option 12 tells the container's name.
	HostName Switch `json:"host_name,omitempty"`
	// FQDN is the domain in which the servers are asked to enter the
	// container's name into DNS (option 81, RFC 4702). Option 12 is then left
	// out unless HostName is on.
	FQDN string `json:"fqdn,omitempty"`
}

// Switch is "on" or "off"; "" is unset.
type Switch string

// The values of a Switch.
const (
	On  Switch = "on"
	Off Switch = "off"
)

// EtherSource is an Ethernet source address; "" is unset.
type EtherSource string

// The Ethernet sources.
const (
	// SourceInterface is the interface's own address.
	SourceInterface EtherSource = "interface"
	// SourceContainer is the container's, for switches that drop DHCP
	// messages whose chaddr is another.
	SourceContainer EtherSource = "container"
)

// LinkSelection is how a server is told which subnet is wanted; "" is unset.
type LinkSelection string

// The ways of link selection.
const (
	// SelectAuto is sub-option 5 of option 82 (RFC 3527), where the subnet
	// doesn't contain the relay address.
	SelectAuto LinkSelection = "auto"
	// SelectOff leaves the choice to the server.
	SelectOff LinkSelection = "off"
	// Select118 is option 118 (RFC 3011), where the subnet doesn't contain
	// the relay address.
	Select118 LinkSelection = "118"
)

// AgentPart is something that option 82 tells.
type AgentPart string

// The parts, with their sub-options.
const (
	AgentNetwork   AgentPart = "network"   // 1, circuit id (RFC 3046)
	AgentHost      AgentPart = "host"      // 2, remote id: this host's name
	AgentContainer AgentPart = "container" // 6, subscriber id (RFC 3993)
)

// ClientIDForm is how option 61 is made; "" is unset.
type ClientIDForm string

// The forms of option 61.
const (
	// ClientIDAuto is ClientIDName where the engine tells a name (29 and
	// later), else ClientIDMAC.
	ClientIDAuto ClientIDForm = "auto"
	// ClientIDMAC is hardware type and address (RFC 2132 section 9.14).
	ClientIDMAC ClientIDForm = "mac"
	// ClientIDName is made of host, subnet and container name.
	ClientIDName ClientIDForm = "name"
)

// LossPolicy is what happens to a container whose lease is lost; "" is unset.
// Whatever it is, the same address is asked for again.
type LossPolicy string

// The loss policies.
const (
	KeepLost    LossPolicy = "keep"    // nothing more
	StopLost    LossPolicy = "stop"    // the engine is asked to stop the container
	RestartLost LossPolicy = "restart" // or to restart it
)

// ConflictCheck is "off", "on" (200 ms), "rfc" (RFC 5227 section 1.1's times)
// or a time in which the probes are sent and answers awaited, such as "1s";
// "" is unset.
type ConflictCheck string

// The conflict checks that are words.
const (
	ConflictOff ConflictCheck = "off"
	ConflictOn  ConflictCheck = "on"
	ConflictRFC ConflictCheck = "rfc"
)

const (
	usualReleaseDelay = 30 * time.Second
	maxReleaseDelay   = 24 * time.Hour
	usualConflictTime = 200 * time.Millisecond
	maxConflictTime   = 10 * time.Second
)

// Time is how long a check of a fixed time lasts; 0 for "off" and "rfc", which
// have none.
func (c ConflictCheck) Time() time.Duration {
	if c == ConflictOn {
		return usualConflictTime
	}
	d, _ := time.ParseDuration(string(c))
	return d
}

// Defaults are the options where neither a network nor the global ones say.
func Defaults() Options {
	return Options{
		ClientID: ClientIDAuto, ReleaseDelay: new(usualReleaseDelay), OnLost: KeepLost, Conflict: ConflictOff,
		RelayPort: ServerPort, EtherSource: SourceInterface, Probe: On, LinkSelection: SelectAuto,
		VendorClass: "oam-docker-ipam",
	}
}

// ByBroadcast reports whether servers are asked by broadcast on an interface,
// instead of as a relay agent.
func (o Options) ByBroadcast() bool { return o.Interface != "" }

// suits refuses options that belong to one way of asking servers where the other
// is in force, in o. Own are the network's: the daemon's relay address is no
// mistake where a network has left it unused.
func (o Options) suits(own Options) error {
	if !o.ByBroadcast() {
		if len(o.Servers) > 0 && own.EtherSource == SourceContainer {
			return fmt.Errorf("ether_source=%s is for servers that are asked by broadcast, and these are asked as a relay agent: leave it out, or give dhcp_interface instead of dhcp_server", own.EtherSource)
		}
		return nil
	}
	texts := Options{Relay: own.Relay, RelayPort: own.RelayPort, LinkSelection: own.LinkSelection, Agent: own.Agent}.Texts()
	if len(texts) == 0 {
		return nil
	}
	var settings []string
	for _, name := range slices.Sorted(maps.Keys(texts)) {
		settings = append(settings, name+"="+texts[name])
	}
	return fmt.Errorf("%s: for relay agents only, and the servers are asked by broadcast on %s (option 82 without giaddr is discarded on the way, RFC 3046 section 2.1): leave it out, or give dhcp_server instead of dhcp_interface", strings.Join(settings, " "), o.Interface)
}

// maxServers bounds what one request asks.
const maxServers = 16

// option is one name of Options: how its text is read and written.
type option struct {
	parse  func(*Options, string) error
	format func(Options) string // "" when unset
}

var options = map[string]option{
	"dhcp_server": {
		parse: func(o *Options, s string) error {
			if n := strings.Count(s, ",") + 1; n > maxServers {
				return fmt.Errorf("%d servers: at most %d are asked", n, maxServers)
			}
			for text := range strings.SplitSeq(s, ",") {
				var server Server
				if err := server.UnmarshalText([]byte(strings.TrimSpace(text))); err != nil {
					return err
				}
				o.Servers = append(o.Servers, server)
			}
			return nil
		},
		format: func(o Options) string {
			texts := make([]string, len(o.Servers))
			for i, s := range o.Servers {
				texts[i] = s.String()
			}
			return strings.Join(texts, ",")
		},
	},
	"listen_addr": {
		parse: func(o *Options, s string) (err error) {
			o.Relay, err = netip.ParseAddr(s)
			if err != nil || !o.Relay.IsUnspecified() && !Unicast(o.Relay) || !o.Relay.Is4() {
				return errors.New("want an IPv4 address of this host, or 0.0.0.0 to let its routing choose")
			}
			return nil
		},
		format: func(o Options) string {
			if !o.Relay.IsValid() {
				return ""
			}
			return o.Relay.String()
		},
	},
	"client_id":     word(func(o *Options) *ClientIDForm { return &o.ClientID }, ClientIDAuto, ClientIDMAC, ClientIDName),
	"on_lease_lost": word(func(o *Options) *LossPolicy { return &o.OnLost }, KeepLost, StopLost, RestartLost),
	"release_delay": {
		parse: func(o *Options, s string) error {
			d, err := time.ParseDuration(s)
			if err != nil || d < 0 || d > maxReleaseDelay {
				return fmt.Errorf("want a time from 0s to %s such as 30s", maxReleaseDelay)
			}
			o.ReleaseDelay = &d
			return nil
		},
		format: func(o Options) string {
			if o.ReleaseDelay == nil {
				return ""
			}
			return o.ReleaseDelay.String()
		},
	},
	"conflict_check": {
		parse: func(o *Options, s string) error {
			switch o.Conflict = ConflictCheck(s); o.Conflict {
			case ConflictOff, ConflictOn, ConflictRFC:
				return nil
			}
			if d := o.Conflict.Time(); d <= 0 || d > maxConflictTime {
				return fmt.Errorf("want off, on, rfc, or a time up to %s such as 1s", maxConflictTime)
			}
			return nil
		},
		format: func(o Options) string { return string(o.Conflict) },
	},
	"conflict_interface": text(func(o *Options) *string { return &o.ConflictInterface }, isInterface),

	"dhcp_interface": text(func(o *Options) *string { return &o.Interface }, isInterface),
	"ether_source":   word(func(o *Options) *EtherSource { return &o.EtherSource }, SourceInterface, SourceContainer),
	"listen_port": {
		parse: func(o *Options, s string) error {
			n, err := strconv.ParseUint(s, 10, 16)
			if err != nil || n == 0 {
				return errors.New("want a UDP port from 1 to 65535")
			}
			o.RelayPort = uint16(n)
			return nil
		},
		format: func(o Options) string {
			if o.RelayPort == 0 {
				return ""
			}
			return strconv.Itoa(int(o.RelayPort))
		},
	},
	"probe":          word(func(o *Options) *Switch { return &o.Probe }, On, Off),
	"link_selection": word(func(o *Options) *LinkSelection { return &o.LinkSelection }, SelectAuto, SelectOff, Select118),
	"option82": {
		parse: func(o *Options, s string) error {
			for text := range strings.SplitSeq(s, ",") {
				part := AgentPart(strings.TrimSpace(text))
				switch part {
				case AgentHost, AgentNetwork, AgentContainer:
				default:
					return fmt.Errorf("known are %s, %s and %s, separated by commas", AgentHost, AgentNetwork, AgentContainer)
				}
				if !slices.Contains(o.Agent, part) {
					o.Agent = append(o.Agent, part)
				}
			}
			return nil
		},
		format: func(o Options) string {
			texts := make([]string, len(o.Agent))
			for i, part := range o.Agent {
				texts[i] = string(part)
			}
			return strings.Join(texts, ",")
		},
	},
	"network_name": text(func(o *Options) *string { return &o.NetworkName }, isPrintable),
	"vendor_class": text(func(o *Options) *string { return &o.VendorClass }, isPrintable),
	"user_class":   text(func(o *Options) *string { return &o.UserClass }, isPrintable),
	"host_name":    word(func(o *Options) *Switch { return &o.HostName }, On, Off),
	"fqdn": text(func(o *Options) *string { return &o.FQDN }, func(s string) error {
		if !isHostName(s) || len(s) > maxDomain {
			return fmt.Errorf("want a DNS domain such as example.org, of at most %d characters", maxDomain)
		}
		return nil
	}),
}

// isInterface refuses what is no name of a network interface: IFNAMSIZ, and
// what the kernel's dev_valid_name refuses.
func isInterface(s string) error {
	if len(s) > 15 || s == "." || s == ".." || strings.ContainsAny(s, "/: \t\n\v\f\r") {
		return errors.New("want the name of a network interface such as eth0")
	}
	return nil
}

// maxText is the longest of the texts that go into DHCP options, in bytes.
const maxText = 64

// maxDomain is the longest domain of an FQDN: with three bytes before it, a host
// name of 63 and the lengths of labels, it fits into the 255 of option 81.
const maxDomain = 186

// isPrintable refuses what would be unreadable in a server's log.
func isPrintable(s string) error {
	if len(s) > maxText || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) {
		return fmt.Errorf("want at most %d printable ASCII characters", maxText)
	}
	return nil
}

// text makes an option of a text that is checked.
func text(field func(*Options) *string, check func(string) error) option {
	return option{
		parse: func(o *Options, s string) error {
			*field(o) = s
			return check(s)
		},
		format: func(o Options) string { return *field(&o) },
	}
}

// word makes an option of which some words are known.
func word[T ~string](field func(*Options) *T, known ...T) option {
	return option{
		parse: func(o *Options, s string) error {
			if !slices.Contains(known, T(s)) {
				texts := make([]string, len(known))
				for i, k := range known {
					texts[i] = string(k)
				}
				return fmt.Errorf("known are %s", strings.Join(texts, ", "))
			}
			*field(o) = T(s)
			return nil
		},
		format: func(o Options) string { return string(*field(&o)) },
	}
}

// OptionNames lists the known options, sorted.
func OptionNames() []string { return slices.Sorted(maps.Keys(options)) }

// ParseOptions reads options by their names. Unknown names and wrong values
// are refused, naming them and what is known. Empty values are unset.
func ParseOptions(texts map[string]string) (Options, error) {
	var o Options
	for _, name := range slices.Sorted(maps.Keys(texts)) {
		known, ok := options[name]
		if !ok {
			return Options{}, fmt.Errorf("unknown option %q: known are %s", name, strings.Join(OptionNames(), ", "))
		}
		if texts[name] == "" {
			continue
		}
		if err := known.parse(&o, texts[name]); err != nil {
			return Options{}, fmt.Errorf("option %s=%q: %w", name, texts[name], err)
		}
	}
	if len(o.Servers) > 0 && o.Interface != "" {
		return Options{}, fmt.Errorf("dhcp_server=%s and dhcp_interface=%s exclude each other: servers are asked as a relay agent or by broadcast; leave one out", texts["dhcp_server"], o.Interface)
	}
	return o, nil
}

// Texts is the inverse of ParseOptions.
func (o Options) Texts() map[string]string {
	texts := map[string]string{}
	for name, known := range options {
		if text := known.format(o); text != "" {
			texts[name] = text
		}
	}
	return texts
}

// Or fills what is unset in o from the global settings.
func (o Options) Or(global Options) Options {
	if len(o.Servers) == 0 && o.Interface == "" {
		o.Servers, o.Interface = global.Servers, global.Interface
	}
	if !o.Relay.IsValid() {
		o.Relay = global.Relay
	}
	o.ClientID = cmp.Or(o.ClientID, global.ClientID)
	o.ReleaseDelay = cmp.Or(o.ReleaseDelay, global.ReleaseDelay)
	o.OnLost = cmp.Or(o.OnLost, global.OnLost)
	o.Conflict = cmp.Or(o.Conflict, global.Conflict)
	o.ConflictInterface = cmp.Or(o.ConflictInterface, global.ConflictInterface)
	o.RelayPort = cmp.Or(o.RelayPort, global.RelayPort)
	o.EtherSource = cmp.Or(o.EtherSource, global.EtherSource)
	o.Probe = cmp.Or(o.Probe, global.Probe)
	o.LinkSelection = cmp.Or(o.LinkSelection, global.LinkSelection)
	if len(o.Agent) == 0 {
		o.Agent = global.Agent
	}
	o.NetworkName = cmp.Or(o.NetworkName, global.NetworkName)
	o.VendorClass = cmp.Or(o.VendorClass, global.VendorClass)
	o.UserClass = cmp.Or(o.UserClass, global.UserClass)
	o.HostName = cmp.Or(o.HostName, global.HostName)
	o.FQDN = cmp.Or(o.FQDN, global.FQDN)
	return o
}
