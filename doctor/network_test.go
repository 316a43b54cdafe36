package doctor

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/dhcp"
	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/server"
	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// networkChecks are the checks that look at the network.
var networkChecks = []string{"relay address", "port 67", "route", "answer", "subnets", "free addresses"}

// complaint is what a patient of a test comes with.
type complaint struct {
	Global lease.Options
	Pools  []lease.PoolStatus
	Leases []lease.Held
	PID    int // the daemon's, 0: it is down
	// Database is the daemon's, by its path.
	Database string
	// Within is how long a server may take, Limit how long a check, if it isn't
	// checkTime.
	Within, Limit time.Duration
	// Unknown: nobody tells which networks there are.
	Unknown bool
	// Running are the options of the daemon, where the configuration has others.
	Running *lease.Options
}

// Variables by which processes of a test are told what to examine, where to write
// what was found, and which port to hold.
const (
	caseVar   = "OAM_DOCTOR_CASE"
	reportVar = "OAM_DOCTOR_REPORT"
	holdVar   = "OAM_DOCTOR_HOLD"
)

// TestNetworkInside is no test: it examines the network namespace in which a test
// runs it.
func TestNetworkInside(t *testing.T) {
	if os.Getenv(caseVar) == "" {
		t.Skip("run by the other tests, in network namespaces")
	}
	var c complaint
	if err := json.Unmarshal([]byte(os.Getenv(caseVar)), &c); err != nil {
		t.Fatal(err)
	}
	var found []Finding
	p := &patient{Site: Site{Global: c.Global}, pools: c.Pools, leases: c.Leases, known: !c.Unknown, tell: func(f Finding) { found = append(found, f) }}
	silentTime = c.Within
	p.Options = func([]server.Setting) (lease.Options, error) { return *cmp.Or(c.Running, &c.Global), nil }
	if c.PID != 0 {
		p.health = &server.Health{PID: c.PID, Database: c.Database}
	}
	for _, check := range checks {
		if slices.Contains(networkChecks, check.name) {
			p.run(t.Context(), check, cmp.Or(c.Limit, checkTime))
		}
	}
	text, err := json.Marshal(found)
	if err == nil {
		err = os.WriteFile(os.Getenv(reportVar), text, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// ward is a host that asks a DHCP server in another network namespace of its LAN.
type ward struct {
	*testing.T
	lab          *lab.Lab
	host, server *lab.Node
	complaint
	as []string // what the examiner's command line begins with
}

// newWard makes the network, in which the host asks 10.10.0.1 as a relay agent
// for its network 10.10.0.0/24. There is no server yet.
func newWard(t *testing.T) *ward {
	t.Helper()
	w := &ward{T: t, lab: lab.ForTest(t, lab.DHCPServers)}
	w.server = must(w.lab.Node("server", "10.10.0.1/24"))(t)
	w.host = must(w.lab.Node("host", "10.10.0.2/24"))(t)
	for _, node := range []*lab.Node{w.server, w.host} {
		noError(t, node.Sysctl("net/ipv4/conf/all/rp_filter", "0"))
		noError(t, node.Sysctl("net/ipv4/conf/eth0/rp_filter", "0"))
	}
	w.Within = time.Second
	// The test's process may stand for the daemon too.
	w.Database = filepath.Join(w.lab.Scratch, "oam-docker-ipam.db")
	database := must(os.Create(w.Database))(t)
	t.Cleanup(func() { database.Close() })
	w.Global = lease.Options{Servers: []lease.Server{{Host: "10.10.0.1", Port: 67}}, Relay: netip.MustParseAddr("10.10.0.2")}
	w.network("10.10.0.0/24", lease.Options{})
	return w
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		noError(t, err)
		return v
	}
}

func noError(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// network adds a network, of which the first addresses are the gateway's and the
// server's.
func (w *ward) network(subnet string, o lease.Options) *lease.PoolStatus {
	prefix := netip.MustParsePrefix(subnet)
	w.Pools = append(w.Pools, lease.PoolStatus{Pool: lease.Pool{ID: subnet, Subnet: prefix, Gateway: prefix.Addr().Next(), Options: o}})
	return &w.Pools[len(w.Pools)-1]
}

// serve starts a DHCP server.
func (w *ward) serve(kind lab.DHCPKind, subnets ...lab.Subnet) *lab.DHCPServer {
	w.Helper()
	if subnets == nil {
		subnets = []lab.Subnet{lab.SubnetA()}
	}
	return must(w.server.StartDHCP(kind, lab.DHCPConfig{Subnets: subnets}))(w.T)
}

// sh runs a command in a node.
func (w *ward) sh(n *lab.Node, command string) {
	w.Helper()
	must(n.Run(strings.Fields(command)...))(w.T)
}

// daemon is a process that stands for the daemon, with a wrapper that may take
// rights from it.
func (w *ward) daemon(wrapper ...string) {
	w.Helper()
	process := must(w.host.Start("daemon", lab.Command{Args: append(w.open9(wrapper...), "sleep", "120")}))(w.T)
	w.PID = process.Pid
	// The wrapper becomes the command.
	noError(w.T, lab.Eventually(5*time.Second, func() error {
		name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", process.Pid))
		if err == nil && strings.TrimSpace(string(name)) != "sleep" {
			err = fmt.Errorf("it is still %s", name)
		}
		return err
	}))
}

// open9 is how a command begins that has the database open.
func (w *ward) open9(wrapper ...string) []string {
	return append([]string{"sh", "-c", `exec "$@" 9<"$0"`, w.Database}, wrapper...)
}

// bind holds a UDP port in the host as this test's own process.
func (w *ward) bind(at string) {
	w.Helper()
	var conn net.PacketConn
	noError(w.T, w.host.Do(func() (err error) {
		conn, err = listenShared(at)
		return err
	}))
	w.Cleanup(func() { conn.Close() })
}

// listenShared binds a UDP port beside others who do so too.
func listenShared(at string) (net.PacketConn, error) {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		return errors.Join(raw.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1) }), err)
	}}
	return config.ListenPacket(context.Background(), "udp", at)
}

// TestNetworkHold is no test: it holds a UDP port as a process of its own, until
// it is killed.
func TestNetworkHold(t *testing.T) {
	at := os.Getenv(holdVar)
	if at == "" {
		t.Skip("run by the other tests, in network namespaces")
	}
	conn, err := listenShared(at)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, _, err = conn.ReadFrom(make([]byte, 1))
	}
	t.Fatal(err)
}

// open waits until some port 67 of the host is bound.
func (w *ward) open() {
	w.Helper()
	w.openAt(w.host)
}

func (w *ward) openAt(n *lab.Node) {
	w.Helper()
	noError(w.T, lab.Eventually(5*time.Second, func() error {
		if open, err := n.UDPOpen(67); err != nil || !open {
			return fmt.Errorf("port 67 isn't open: %w", err)
		}
		return nil
	}))
}

// examine runs the network's checks in the host.
func (w *ward) examine() []Finding {
	w.Helper()
	for i := range w.Pools {
		w.Pools[i].InForce = w.Pools[i].Options.Or(*cmp.Or(w.Running, &w.Global)).Or(lease.Defaults())
	}
	report := filepath.Join(w.TempDir(), "report")
	noError(w.T, os.WriteFile(report, nil, 0o666))
	noError(w.T, os.Chmod(report, 0o666))
	program := must(os.Executable())(w.T)
	text := must(json.Marshal(w.complaint))(w.T)
	began := time.Now()
	_, err := w.host.RunCommand(lab.Command{
		Args: append(slices.Clone(w.as), program, "-test.run=^TestNetworkInside$"),
		// With -race a process would wait for a second before it ends.
		Env: []string{caseVar + "=" + string(text), reportVar + "=" + report, "GORACE=atexit_sleep_ms=0"},
	})
	noError(w.T, err)
	if took := time.Since(began); took > 12*time.Second {
		w.Errorf("it took %s", took)
	}
	var found []Finding
	noError(w.T, json.Unmarshal(must(os.ReadFile(report))(w.T), &found))
	return found
}

// expect is a finding, with words of Found and Advice.
type expect struct {
	check  string
	status Status
	words  []string
}

// finds tries that these and no others aren't ok, in this order.
func (w *ward) finds(wants ...expect) []Finding {
	w.Helper()
	all := w.examine()
	unwell := slices.DeleteFunc(slices.Clone(all), func(f Finding) bool { return f.Status == OK })
	text, _ := json.MarshalIndent(all, "", "  ")
	w.Logf("%s", text)
	for _, f := range all {
		if f.Status != OK && f.Advice == "" {
			w.Errorf("no advice: %+v", f)
		}
	}
	if len(unwell) != len(wants) {
		w.Fatalf("%d findings that aren't ok, want %d", len(unwell), len(wants))
	}
	for i, want := range wants {
		f := unwell[i]
		if f.Check != want.check || f.Status != want.status {
			w.Errorf("finding %d is %s: %s, want %s: %s", i, f.Check, f.Status, want.check, want.status)
		}
		for _, word := range want.words {
			if !strings.Contains(f.Found+"\n"+f.Advice, word) {
				w.Errorf("finding %d lacks %q: %+v", i, word, f)
			}
		}
	}
	return all
}

func fault(check string, words ...string) expect   { return expect{check, Fault, words} }
func warning(check string, words ...string) expect { return expect{check, Warning, words} }
func skipped(check string, words ...string) expect { return expect{check, Skipped, words} }

// silent is finds where no server answers.
func (w *ward) silent(wants ...expect) {
	w.Helper()
	w.finds(append(wants, skipped("subnets", "no offer"), skipped("free addresses", "10.10.0.0/24", "no server has answered"))...)
}

// Each finding, provoked for real.
func TestNetworkFindings(t *testing.T) {
	for _, c := range []struct {
		name   string
		findit func(w *ward)
	}{
		{"all is well", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.bind("10.10.0.2:67")
			w.PID = os.Getpid()
			checked := map[string]bool{}
			for _, f := range w.finds() {
				checked[f.Check] = true
			}
			for _, name := range networkChecks {
				if !checked[name] {
					w.Errorf("%s has told nothing", name)
				}
			}
		}},
		{"relay address by routing, no daemon, no network", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.Global.Relay, w.Pools = netip.Addr{}, nil
			w.finds()
		}},
		{"not root", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.bind("10.10.0.2:67")
			w.as = []string{"setpriv", "--bounding-set=-all"}
			w.silent(skipped("port 67", "only root can see by whom"), skipped("answer", "root"))
		}},

		{"relay address missing", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.Global.Relay = netip.MustParseAddr("10.10.0.9")
			w.silent(fault("relay address", "10.10.0.9 is not an address of this host", "10.10.0.2 on eth0", "LISTEN_ADDR", "ip address add 10.10.0.9/"),
				skipped("port 67"), skipped("answer"))
		}},
		{"relay address of a network missing", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.Pools[0].Options.Relay = netip.MustParseAddr("10.10.0.9")
			w.silent(fault("relay address", "listen_addr of network 10.10.0.0/24"), skipped("port 67"))
		}},
		{"relay address without link", func(w *ward) {
			w.sh(w.host, "ip link add off0 type veth peer name off1")
			w.sh(w.host, "ip address add 10.30.0.2/24 dev off0")
			w.sh(w.host, "ip link set off0 up")
			w.serve(lab.Dnsmasq)
			w.sh(w.server, "ip route add 10.30.0.2 via 10.10.0.2")
			w.Global.Relay = netip.MustParseAddr("10.30.0.2")
			w.finds(warning("relay address", "10.30.0.2 is on off0, which has no link"))
		}},
		{"one of two interfaces without link", func(w *ward) {
			w.sh(w.host, "ip link add off0 type veth peer name off1")
			w.sh(w.host, "ip address add 10.30.0.2/24 dev off0")
			w.sh(w.host, "ip link set off0 up")
			w.serve(lab.Dnsmasq)
			w.Global.Relay = netip.Addr{}
			w.Global.Servers = append(w.Global.Servers, lease.Server{Host: "10.30.0.1", Port: 67})
			w.finds(warning("relay address", "10.30.0.2 is on off0, which has no link"), warning("route", "out of off0, which has no link"))
		}},
		{"relay address of loopback", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.Global.Relay = netip.MustParseAddr("127.0.0.1")
			w.silent(fault("relay address", "127.0.0.1 is loopback: DHCP server 10.10.0.1 can't answer there", "10.10.0.2 on eth0", "LISTEN_ADDR"), skipped("answer"))
		}},
		{"networks that nobody tells", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.Pools, w.Unknown = nil, true
			w.finds(skipped("subnets", "networks aren't known"), skipped("free addresses", "networks aren't known"))
		}},

		{"relay address on an interface that is down", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.sh(w.host, "ip link add off0 type veth peer name off1")
			w.sh(w.host, "ip address add 10.30.0.2/24 dev off0")
			w.Global.Relay = netip.MustParseAddr("10.30.0.2")
			w.silent(fault("relay address", "10.30.0.2 is on off0, which is down", "ip link set off0 up"), skipped("answer"))
		}},

		{"interface missing", func(w *ward) {
			w.Global = lease.Options{Interface: "eth9"}
			w.silent(fault("interface", "eth9", "no such network interface", "eth0"), skipped("answer"))
		}},
		{"interface down", func(w *ward) {
			w.sh(w.host, "ip link set eth0 down")
			w.Global = lease.Options{Interface: "eth0"}
			w.silent(fault("interface", "eth0", "is down", "bring it up"), skipped("answer"))
		}},
		{"interface is a bridge's port", func(w *ward) {
			w.sh(w.host, "ip link add br0 type bridge")
			w.sh(w.host, "ip link set eth0 master br0")
			w.Global = lease.Options{Interface: "eth0"}
			w.silent(fault("interface", "eth0 is a port of bridge br0", "dhcp_interface=br0"), skipped("answer"))
		}},
		{"interface of a VLAN that is yet to be made", func(w *ward) {
			w.Global = lease.Options{Interface: "eth0.10"}
			w.silent(warning("interface", "eth0.10", "Docker's macvlan driver makes it on eth0"), skipped("answer"))
		}},
		{"broadcast is well", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.Global = lease.Options{Interface: "eth0"}
			w.finds()
		}},
		{"nobody on the LAN", func(w *ward) {
			w.Global = lease.Options{Interface: "eth0"}
			w.silent(fault("answer", "no DHCP server answers on the LAN of eth0", "VLAN"))
		}},
		{"several servers on the LAN", func(w *ward) {
			w.serve(lab.Dnsmasq)
			second := must(w.lab.Node("second", "10.10.0.3/24"))(w.T)
			must(second.StartDHCP(lab.Dnsmasq, lab.DHCPConfig{Subnets: []lab.Subnet{lab.SubnetA()}}))(w.T)
			w.Global = lease.Options{Interface: "eth0"}
			w.Within = silentTime
			w.finds(warning("answer", "2 DHCP servers answer on eth0", "10.10.0.1", "10.10.0.3"))
		}},

		{"port held by the daemon beside a wildcard", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.bind("0.0.0.0:67")
			w.PID = os.Getpid()
			w.bind("10.10.0.2:67")
			w.finds()
		}},
		{"wildcard dnsmasq, daemon without CAP_NET_RAW", func(w *ward) {
			w.serve(lab.Dnsmasq)
			pid := w.wildcardDnsmasq()
			w.daemon("setpriv", "--bounding-set=-all")
			w.finds(fault("port 67", "UDP port 67 of 10.10.0.2 is taken by dnsmasq (pid "+pid+"), on all addresses (wildcard)", "CAP_NET_RAW", "bind-interfaces", "broadcast.conf"))
		}},
		{"wildcard dnsmasq, daemon with CAP_NET_RAW", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.wildcardDnsmasq()
			w.daemon()
			w.finds(warning("port 67", "dnsmasq", "will read beside it", "bind-interfaces"))
			w.lock("10.10.0.2:67")
			w.finds(warning("port 67", "dnsmasq", "reads beside it, by a raw socket", "bind-interfaces"))
		}},
		{"wildcard dnsmasq, no daemon", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.wildcardDnsmasq()
			w.finds(warning("port 67", "dnsmasq", "bind-interfaces", "broadcast.conf"))
		}},
		{"port shared by somebody, no daemon", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.bind("10.10.0.2:67")
			w.finds(warning("port 67", fmt.Sprintf("10.10.0.2 is taken by doctor.test (pid %d)", os.Getpid())))
			w.lock("10.10.0.2:67")
			w.finds(warning("port 67", fmt.Sprintf("(pid %d), and a daemon that isn't this one", os.Getpid())))
		}},
		{"daemon in a PID namespace of its own", func(w *ward) {
			w.serve(lab.Dnsmasq)
			hold := []string{"unshare", "--pid", "--fork", "--kill-child", must(os.Executable())(w.T), "-test.run=^TestNetworkHold$"}
			must(w.host.Start("apart", lab.Command{Args: append(w.open9(), hold...), Env: []string{holdVar + "=10.10.0.2:67"}}))(w.T)
			w.open()
			w.PID = 1
			found := w.finds()
			if i := slices.IndexFunc(found, func(f Finding) bool { return f.Check == "port 67" }); !strings.Contains(found[i].Found, "is held by the daemon (pid ") || strings.Contains(found[i].Found, "(pid 1)") {
				w.Errorf("%+v", found[i])
			}
			w.Database = "/nowhere/oam-docker-ipam.db"
			w.finds(skipped("port 67", "is held by doctor.test (pid ", "which process is the daemon isn't known"))
		}},
		{"wildcard of IPv6", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.bind("[::]:67")
			w.daemon("setpriv", "--bounding-set=-all")
			w.finds(fault("port 67", fmt.Sprintf("(pid %d), on all addresses (wildcard)", os.Getpid())))
		}},
		{"port of the same address held twice", func(w *ward) {
			w.serve(lab.Dnsmasq)
			other := must(w.host.Start("other", lab.Command{Args: []string{must(os.Executable())(w.T), "-test.run=^TestNetworkHold$"}, Env: []string{holdVar + "=10.10.0.2:67"}}))(w.T)
			w.open()
			w.bind("10.10.0.2:67")
			w.PID = os.Getpid()
			w.finds(fault("port 67", fmt.Sprintf("(pid %d) too", other.Pid), "only one of them gets the answers"))
		}},
		{"port not opened", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.daemon()
			w.finds(warning("port 67", "is free", "couldn't open it"))
		}},
		{"port may not be opened", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.daemon("setpriv", "--bounding-set=-all")
			w.finds(fault("port 67", "lacks CAP_NET_BIND_SERVICE"))
		}},

		{"configuration that isn't in force yet", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.bind("10.10.0.2:67")
			w.PID = os.Getpid()
			now := w.Global
			w.Running = &now
			w.Global.Servers = []lease.Server{{Host: "10.10.0.9", Port: 67}}
			w.finds(fault("answer", "isn't in force yet: DHCP server 10.10.0.9 doesn't answer"))
			w.Global, now = now, w.Global
			w.silent(fault("answer", "DHCP server 10.10.0.9 doesn't answer"))
		}},
		{"no route", func(w *ward) {
			w.Global.Servers[0].Host = "10.99.0.1"
			w.silent(fault("route", "no route to DHCP server 10.99.0.1", "ip route add 10.99.0.1"), skipped("answer"))
		}},
		{"no route, by which the relay address is chosen", func(w *ward) {
			w.Global.Relay = netip.Addr{}
			w.Global.Servers[0].Host = "10.99.0.1"
			w.silent(skipped("relay address", "no route"), skipped("port 67", "not known"), fault("route", "no route to DHCP server 10.99.0.1"), skipped("answer"))
		}},
		{"blackhole", func(w *ward) {
			for kind, errno := range map[string]syscall.Errno{"blackhole": syscall.EINVAL, "unreachable": syscall.EHOSTUNREACH, "prohibit": syscall.EACCES} {
				w.sh(w.host, "ip route replace "+kind+" 10.99.0.0/24")
				w.Global.Servers[0].Host = "10.99.0.1"
				w.silent(fault("route", "no route to DHCP server 10.99.0.1", "a "+kind+" route ("+errno.Error()+")", "ip route show table all"), skipped("answer"))
				w.sh(w.host, "ip route del "+kind+" 10.99.0.0/24")
			}
		}},
		{"server is the relay address", func(w *ward) {
			w.Global.Servers[0].Host = "10.10.0.2"
			w.silent(fault("route", "relay address itself", "LISTEN_ADDR"), skipped("answer"))
		}},
		{"name of one server leads nowhere", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.Global.Servers = append(w.Global.Servers, lease.Server{Host: "dhcp.invalid", Port: 67})
			w.finds(warning("route", "dhcp.invalid leads nowhere", "DHCP_SERVER", "getent ahostsv4 dhcp.invalid"))
		}},

		{"own firewall, out", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.sh(w.host, "iptables -A OUTPUT -p udp --dport 67 -j DROP")
			w.silent(fault("answer", "own firewall drops DISCOVERs", "iptables -I OUTPUT -p udp -s 10.10.0.2 -d 10.10.0.1 --dport 67 -j ACCEPT"))
		}},
		{"taken behind the firewall, out", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.sh(w.host, "ip neigh replace 10.10.0.1 lladdr 02:00:00:00:00:01 dev eth0")
			w.sh(w.host, "tc qdisc replace dev eth0 root pfifo limit 0")
			w.silent(fault("answer", "sent DISCOVERs, but none left on eth0"))
		}},
		{"own firewall, in", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.sh(w.host, "iptables -A INPUT -p udp --dport 67 -j DROP")
			w.silent(fault("answer", "OFFER comes in on eth0, from 10.10.0.1:67 to 10.10.0.2:67", "own firewall drops it", "iptables -I INPUT -p udp -s 10.10.0.1 -d 10.10.0.2 --dport 67 -j ACCEPT", "iptables-save -c", "raw/mangle PREROUTING"))
		}},
		{"reverse path filter", func(w *ward) {
			w.serve(lab.Dnsmasq)
			noError(w.T, w.host.Attach("eth1", "10.40.0.2/24"))
			w.sh(w.host, "ip link set eth1 address 02:00:00:00:00:41")
			w.sh(w.server, "ip route add 10.40.0.2 dev eth0")
			w.sh(w.server, "ip neigh replace 10.40.0.2 lladdr 02:00:00:00:00:41 nud permanent dev eth0")
			noError(w.T, w.host.Sysctl("net/ipv4/conf/all/rp_filter", "1"))
			noError(w.T, w.host.Sysctl("net/ipv4/conf/eth1/rp_filter", "0"))
			w.Global.Relay = netip.MustParseAddr("10.40.0.2")
			w.silent(fault("answer", "comes in on eth1", "rp_filter is 1 for all and 0 for eth1", "the route to 10.10.0.1 goes directly out of eth0", "sysctl -w net.ipv4.conf.eth1.rp_filter=2"))
			// The advice helps.
			noError(w.T, w.host.Sysctl("net/ipv4/conf/eth1/rp_filter", "2"))
			w.finds()
		}},
		{"no route back", func(w *ward) {
			// A dnsmasq answers where the question came from, route or not.
			w.serve(lab.ISC)
			w.sh(w.host, "ip address add 10.30.0.2/24 dev eth0")
			w.Global.Relay = netip.MustParseAddr("10.30.0.2")
			w.silent(fault("answer", "nothing came back", "answers pings of 10.10.0.2", "no route back to 10.30.0.2", "ip route add 10.30.0.2 via 10.10.0.2"))
			w.sh(w.server, "ip route add 10.30.0.2 via 10.10.0.2")
			w.finds()
		}},
		{"no route back, and no other address", func(w *ward) {
			w.serve(lab.ISC)
			w.sh(w.host, "ip address add 10.30.0.2/24 dev eth0")
			w.sh(w.host, "ip address del 10.10.0.2/24 dev eth0")
			w.sh(w.host, "ip route add 10.10.0.1 dev eth0")
			w.Global.Relay = netip.MustParseAddr("10.30.0.2")
			w.silent(fault("answer", "not even an answer to pings", "route back to 10.30.0.2"))
		}},
		{"server's process isn't there", func(w *ward) {
			w.silent(fault("answer", "nobody listens at UDP port 67", "ICMP port unreachable", "start the DHCP server on 10.10.0.1"))
		}},
		{"server's process hangs", func(w *ward) {
			server := w.serve(lab.Dnsmasq)
			noError(w.T, syscall.Kill(server.Pid(), syscall.SIGSTOP))
			w.Pools[0].Servers = []lease.ServerStatus{{Server: netip.MustParseAddr("10.10.0.1"), Answered: time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local)}}
			w.silent(fault("answer", "nothing came back", "answers pings of 10.10.0.2", "its route back is right", "last answer at 2026-01-02 03:04:05", "does it serve 10.10.0.0/24"))
		}},
		{"server's firewall drops", func(w *ward) {
			// ISC and Kea read below it.
			w.serve(lab.Dnsmasq)
			w.sh(w.server, "iptables -A INPUT -j DROP")
			w.silent(fault("answer", "not even an answer to pings", "it answers ARP"))
		}},
		{"server's firewall rejects", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.sh(w.server, "iptables -A INPUT -p udp --dport 67 -j REJECT --reject-with icmp-admin-prohibited")
			w.silent(fault("answer", "firewall of 10.10.0.1 rejects", "code 13"))
		}},
		{"server isn't there", func(w *ward) {
			w.Global.Servers[0].Host = "10.10.0.9"
			w.silent(fault("answer", "doesn't answer ARP on eth0", "ip neigh show 10.10.0.9"))
		}},
		{"thirty networks of a server that isn't there", func(w *ward) {
			w.Within = silentTime
			for i := range 29 {
				w.network(fmt.Sprintf("10.20.%d.0/24", i), lease.Options{})
			}
			w.Global.Servers[0].Host = "10.10.0.9"
			w.finds(fault("answer", "doesn't answer ARP"), skipped("subnets"), skipped("free addresses", "networks 10.10.0.0/24, 10.20.0.0/24, 10.20.1.0/24, 27 more"))
		}},
		{"router to the server isn't there", func(w *ward) {
			w.sh(w.host, "ip route add default via 10.10.0.254")
			w.Global.Servers[0].Host = "10.99.0.1"
			w.silent(fault("answer", "the router 10.10.0.254 to it doesn't answer ARP on eth0"))
		}},
		{"router can't reach the server", func(w *ward) {
			noError(w.T, w.server.Sysctl("net/ipv4/ip_forward", "1"))
			w.sh(w.host, "ip route add default via 10.10.0.1")
			w.Global.Servers[0].Host = "10.99.0.1"
			w.silent(fault("answer", "the router 10.10.0.1 can't reach it"))
		}},
		{"one of two servers is dead", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.Global.Servers = append(w.Global.Servers, lease.Server{Host: "10.10.0.9", Port: 67})
			w.finds(warning("answer", "10.10.0.9", "doesn't answer ARP"))
		}},
		{"servers contradict each other", func(w *ward) {
			w.serve(lab.Dnsmasq)
			second := must(w.lab.Node("second", "10.10.0.3/24"))(w.T)
			must(second.StartDHCP(lab.Dnsmasq, lab.DHCPConfig{Subnets: []lab.Subnet{lab.NewSubnet("10.10.0.0/24", "10.10.0.100", "10.10.0.199", "10.10.0.3")}}))(w.T)
			w.Global.Servers = append(w.Global.Servers, lease.Server{Host: "10.10.0.3", Port: 67})
			w.finds(warning("answer", "contradict", "router 10.10.0.1", "router 10.10.0.3"), warning("subnets", "gateway is 10.10.0.1", "router 10.10.0.3"))
		}},
		{"server is slow", func(w *ward) {
			w.Within = silentTime
			file := filepath.Join(w.lab.Scratch, "slow.conf")
			noError(w.T, os.WriteFile(file, []byte("port=0\nno-daemon\ninterface=eth0\nbind-interfaces\ndhcp-range=10.10.0.100,10.10.0.199,255.255.255.0,600\ndhcp-leasefile="+filepath.Join(w.lab.Scratch, "slow.leases")+"\nuser=root\n"), 0o644))
			must(w.server.Start("slow", lab.Command{Args: []string{"dnsmasq", "-C", file}}))(w.T)
			w.openAt(w.server)
			w.finds(warning("answer", "answers the relay address 10.10.0.2 within 3", "no-ping", "ping-check false"))
		}},
		{"server is slow, eight networks", func(w *ward) {
			w.Within = silentTime
			conf := "port=0\nno-daemon\ninterface=eth0\nbind-interfaces\nuser=root\ndhcp-option=3\ndhcp-range=10.10.0.100,10.10.0.199,255.255.255.0,600\ndhcp-leasefile=" + filepath.Join(w.lab.Scratch, "slow.leases") + "\n"
			for i := range 7 {
				conf += fmt.Sprintf("dhcp-range=10.20.%d.100,10.20.%[1]d.199,255.255.255.0,600\n", i)
				w.network(fmt.Sprintf("10.20.%d.0/24", i), lease.Options{})
			}
			file := filepath.Join(w.lab.Scratch, "slow.conf")
			noError(w.T, os.WriteFile(file, []byte(conf), 0o644))
			must(w.server.Start("slow", lab.Command{Args: []string{"dnsmasq", "-C", file}}))(w.T)
			w.openAt(w.server)
			w.finds(warning("answer", "within 3"), skipped("free addresses", "slow", "5 networks not asked for"))
		}},
		{"servers for which there is no time", func(w *ward) {
			w.Within, w.Limit = 500*time.Millisecond, 4*time.Second
			for i := range 200 {
				server := lease.Server{Host: fmt.Sprintf("10.10.0.%d", 10+i), Port: 67}
				w.network(fmt.Sprintf("10.20.%d.0/24", i), lease.Options{Servers: []lease.Server{server}})
			}
			count := map[Status]int{}
			var last Finding
			for _, f := range w.examine() {
				if f.Check == "answer" {
					count[f.Status]++
					last = f
				}
			}
			if count[Fault] < atOnce || count[Skipped] != 1 || !strings.HasPrefix(last.Found, fmt.Sprintf("%d servers not asked", 201-count[Fault])) {
				w.Errorf("%d faults, %d skipped, the last %+v", count[Fault], count[Skipped], last)
			}
		}},
		{"what the daemon has had", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.Pools[0].Servers = []lease.ServerStatus{{Server: netip.MustParseAddr("10.10.0.1"), NAKs: 3, Unanswered: 2, Silent: time.Now().Add(-time.Minute)}}
			w.finds(warning("answer", "refused 3 requests", "NAK", "events --event nak"), warning("answer", "answers now, but not the daemon's last 2 messages"))
		}},
		{"answer for another relay address", func(w *ward) {
			w.fake(w.server, "10.10.0.1:67", func(m []byte) { m[27] = 77 })
			w.silent(fault("answer", "for the relay address 10.10.0.77 instead of 10.10.0.2"))
		}},
		{"answer to another question", func(w *ward) {
			w.fake(w.server, "10.10.0.1:67", func(m []byte) { m[7]++ })
			w.silent(fault("answer", "with the transaction ID", "instead of"))
		}},
		{"refusal of a question", func(w *ward) {
			w.fake(w.server, "10.10.0.1:67", func(m []byte) { m[242] = 6 })
			w.silent(fault("answer", "its NAK comes in on eth0", "no answer to a DISCOVER"))
		}},
		{"answer to another client", func(w *ward) {
			w.fake(w.server, "10.10.0.1:67", func(m []byte) { m[33] = ^m[33] })
			w.silent(fault("answer", "its OFFER comes in", "(chaddr) instead of"))
		}},
		{"answer to another client identifier", func(w *ward) {
			w.fake(w.server, "10.10.0.1:67", func(m []byte) { m[255] = 61 }) // instead of the mask
			w.silent(fault("answer", "its OFFER comes in", "for the client identifier ffffff00 (option 61) instead of 01"))
		}},
		{"answer to another port", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.Global.RelayPort = 1067
			w.silent(fault("answer", "to 10.10.0.2:67, instead of 10.10.0.2:1067", "LISTEN_PORT=67"))
		}},
		{"server on this host", func(w *ward) {
			w.sh(w.host, "ip address add 10.10.0.5/24 dev eth0")
			w.Global.Servers[0].Host = "10.10.0.5"
			w.silent(fault("answer", "nobody listens at UDP port 67"))
			w.fake(w.host, "10.10.0.5:67", func([]byte) {})
			w.finds()
		}},
		{"answer that nobody can use", func(w *ward) {
			w.fake(w.server, "10.10.0.1:67", func(m []byte) { copy(m[16:], []byte{0, 0, 0, 0}) })
			w.silent(fault("answer", "no client can use it: offered address is not unicast"))
		}},

		{"another subnet", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.network("10.20.0.0/24", lease.Options{LinkSelection: lease.SelectOff})
			w.finds(fault("subnets", "network 10.20.0.0/24: DHCP server 10.10.0.1 offers 10.10.0.", "(subnet 10.10.0.0/24)", "link selection"))
		}},
		{"outside of the range", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.Pools[0].Range = netip.MustParsePrefix("10.10.0.0/28")
			w.finds(fault("subnets", "outside the network's --ip-range 10.10.0.0/28"))
		}},
		{"the gateway's address", func(w *ward) {
			w.serve(lab.Dnsmasq, lab.NewSubnet("10.10.0.0/24", "10.10.0.100", "10.10.0.100", "10.10.0.100"))
			w.Pools[0].Gateway = netip.MustParseAddr("10.10.0.100")
			w.finds(fault("subnets", "offers 10.10.0.100, which is the network's gateway", "take 10.10.0.100 out"))
		}},
		{"an auxiliary address", func(w *ward) {
			w.serve(lab.Dnsmasq, lab.NewSubnet("10.10.0.0/24", "10.10.0.100", "10.10.0.100", "10.10.0.1"))
			w.Pools[0].Reserved = []netip.Addr{netip.MustParseAddr("10.10.0.100")}
			w.finds(fault("subnets", "offers 10.10.0.100, which is an auxiliary address"))
		}},
		{"another mask and router", func(w *ward) {
			w.serve(lab.Dnsmasq, lab.NewSubnet("10.10.0.0/24", "10.10.0.100", "10.10.0.199", "10.10.0.254"))
			w.Pools = nil
			w.network("10.10.0.0/16", lease.Options{}).Gateway = netip.MustParseAddr("10.10.0.1")
			w.finds(warning("subnets", "network 10.10.0.0/16", "its subnet is 10.10.0.0/24", "--subnet 10.10.0.0/24"), warning("subnets", "gateway is 10.10.0.1", "router 10.10.0.254", "--gateway 10.10.0.254"))
		}},

		{"a network that no server serves", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.network("10.20.0.0/24", lease.Options{})
			w.finds(fault("free addresses", "network 10.20.0.0/24: DHCP server 10.10.0.1 offers nothing for it, but for other networks"))
		}},
		{"refusals", func(w *ward) {
			w.serve(lab.Dnsmasq)
			w.Pools[0].Refused, w.Pools[0].Refusal = 7, lease.Event{Time: time.Now().Add(-time.Minute), Name: "web", Detail: "no DHCP server answered"}
			w.finds(warning("free addresses", "7 address requests failed", "for web: no DHCP server answered", "events --event failed"))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.findit(newWard(t))
		})
	}
}

// An answer after the probe's end is no firewall's fault.
func TestNetworkLateAnswer(t *testing.T) {
	w := &way{server: lease.Server{Host: "10.10.0.1", Port: 67}, to: netip.MustParseAddrPort("10.10.0.1:67"), relay: netip.MustParseAddrPort("10.10.0.2:67")}
	now := time.Now()
	tried := &trial{way: w, xid: 1, ended: now, err: &dhcp.Silence{}}
	n := &network{trials: []*trial{tried}}
	n.notice([]dhcp.Sighting{
		{At: now.Add(-time.Second), Out: true, XID: 1, From: w.relay, To: w.to},
		{At: now.Add(time.Second), Reply: true, Type: "offer", XID: 1, From: w.to, To: w.relay, Relay: w.relay.Addr()},
	})
	if f := tried.diagnose(); f.Status != Fault || !strings.Contains(f.Found, "answers too late: its OFFER came more than 4.5s after") {
		t.Errorf("%+v", f)
	}
}

// A relay agent at port 67 that is answered at a client's port isn't told to
// listen where it does.
func TestNetworkClientPort(t *testing.T) {
	w := &way{to: netip.MustParseAddrPort("10.10.0.1:67"), relay: netip.MustParseAddrPort("10.10.0.2:67")}
	tried := &trial{way: w, xid: 1}
	f := tried.kept(dhcp.Sighting{Reply: true, Type: "offer", XID: 1, From: w.to, To: netip.MustParseAddrPort("10.10.0.2:68"), Relay: w.relay.Addr()}, nil)
	if !strings.Contains(f.Found, "to 10.10.0.2:68, instead of 10.10.0.2:67") || strings.Contains(f.Advice, "LISTEN_PORT") {
		t.Errorf("%+v", f)
	}
}

// wildcardDnsmasq is a dnsmasq in the host as distributions ship it: it takes the
// port of all addresses, whatever its interface.
func (w *ward) wildcardDnsmasq() (pid string) {
	w.Helper()
	w.sh(w.host, "ip link add virbr0 type bridge")
	w.sh(w.host, "ip address add 192.168.122.1/24 dev virbr0")
	process := must(w.host.Start("wildcard", lab.Command{Args: []string{
		"dnsmasq", "-C", "/dev/null", "--port=0", "--no-daemon", "--user=root", "--interface=virbr0",
		"--dhcp-range=192.168.122.10,192.168.122.20", "--dhcp-leasefile=" + filepath.Join(w.lab.Scratch, "wildcard.leases"),
	}}))(w.T)
	w.open()
	return fmt.Sprint(process.Pid)
}

// lock takes the daemon's lock on a relay address.
func (w *ward) lock(relay string) {
	w.Helper()
	var lock net.Listener
	noError(w.T, w.host.Do(func() (err error) {
		lock, err = net.Listen("unix", dhcp.LockName(netip.MustParseAddrPort(relay)))
		return err
	}))
	w.Cleanup(func() { lock.Close() })
}

// fake is a server that offers 10.10.0.150 with a mistake.
func (w *ward) fake(on *lab.Node, at string, mistake func(message []byte)) {
	w.Helper()
	var conn net.PacketConn
	noError(w.T, on.Do(func() (err error) {
		conn, err = net.ListenPacket("udp4", at)
		return err
	}))
	var done sync.WaitGroup
	done.Go(func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if n < 240 {
				continue
			}
			m := append(slices.Clone(buf[:240]), 53, 1, 2, 54, 4, 10, 10, 0, 1, 51, 4, 0, 0, 1, 0, 1, 4, 255, 255, 255, 0, 255)
			m[0] = 2
			copy(m[16:], []byte{10, 10, 0, 150})
			mistake(m)
			// The test sees what doesn't arrive.
			_, _ = conn.WriteTo(m, from)
		}
	})
	w.Cleanup(func() { conn.Close(); done.Wait() })
}

// A server without a free address answers the one client that it knows, and
// asking in its name changes nothing in the server's table.
func TestNetworkNoFreeAddress(t *testing.T) {
	for _, kind := range lab.DHCPKinds {
		t.Run(kind.Name, func(t *testing.T) {
			t.Parallel()
			w := newWard(t)
			s := w.serve(kind, lab.NewSubnet("10.10.0.0/24", "10.10.0.100", "10.10.0.100", "10.10.0.1"))
			c := dhcp.NewClient(w.Global, slog.New(slog.DiscardHandler))
			noError(t, w.host.Do(c.Open))
			l, err := c.Acquire(t.Context(), lease.Request{Pool: w.Pools[0].Pool, MAC: lease.MAC{2, 0, 0, 0, 0, 9}, Name: "web", ClientID: []byte("\x00web"), Accept: func(netip.Addr) error { return nil }})
			noError(t, err)
			noError(t, c.Close())
			l.Pool = w.Pools[0].ID
			w.Leases, w.Pools[0].Leases = []lease.Held{{Lease: l, Subnet: w.Pools[0].Subnet, State: lease.Bound.String()}}, map[string]int{"bound": 1}
			var before lab.DHCPLease
			noError(t, lab.Eventually(5*time.Second, func() (err error) {
				var found bool
				if before, found, err = s.Lease(l.Addr()); err == nil && !found {
					err = errors.New("it isn't in the server's table")
				}
				return err
			}))
			w.finds(skipped("subnets"), fault("free addresses", "network 10.10.0.0/24: DHCP server 10.10.0.1 has no address for a new client", "10.10.0.100", "1 lease"))
			rows, err := s.Leases()
			if err != nil || len(rows) != 1 || rows[0] != before {
				t.Errorf("the table was %+v, and is %+v (%v)", before, rows, err)
			}
		})
	}
}
