package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// namespaceDir is where ip keeps named network namespaces.
const namespaceDir = "/run/netns"

// Node is a machine on the LAN, as far as its network goes: a network
// namespace with an eth0.
type Node struct {
	// Name is the network namespace's.
	Name string

	lab   *Lab
	short string // the name within the lab
}

// NewLAN makes a switch of its own, without an address: a namespace with a
// bridge that forwards at once. Interfaces come there by AttachTo.
func (l *Lab) NewLAN(name string) (*Node, error) {
	n, err := l.newNode(name)
	if err != nil {
		return nil, err
	}
	return n, n.ip(
		"link add br0 type bridge stp_state 0 forward_delay 0",
		"link set br0 up",
	)
}

func (l *Lab) newNode(name string) (*Node, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, errClosed
	}
	n := &Node{Name: l.prefix + name, lab: l, short: name}
	if _, err := run(Command{Args: []string{"ip", "netns", "add", n.Name}}); err != nil {
		return nil, err
	}
	l.nodes = append(l.nodes, n)
	if err := n.ip("link set lo up"); err != nil {
		return nil, err
	}
	// With two interfaces on one LAN each would answer for the other's
	// addresses.
	return n, n.Sysctl("net/ipv4/conf/all/arp_ignore", "1")
}

// Node adds a machine whose eth0 has the given addresses, like
// "10.10.0.1/24". Names are at most 10 characters long.
func (l *Lab) Node(name string, addresses ...string) (*Node, error) {
	return l.NodeOn(l.LAN, name, addresses...)
}

// NodeOn is Node on a switch of NewLAN.
func (l *Lab) NodeOn(lan *Node, name string, addresses ...string) (*Node, error) {
	n, err := l.newNode(name)
	if err == nil {
		err = n.AttachTo(lan, "eth0", addresses...)
	}
	if err != nil {
		return nil, fmt.Errorf("add node %s: %w", name, err)
	}
	return n, nil
}

// Attach gives the node one more interface on the LAN, which may be without
// an address. It returns when the link carries.
func (n *Node) Attach(ifname string, addresses ...string) error {
	return n.AttachTo(n.lab.LAN, ifname, addresses...)
}

// AttachTo is Attach to a switch of NewLAN.
func (n *Node) AttachTo(lan *Node, ifname string, addresses ...string) error {
	port := n.Port(ifname)
	if len(port) > unix.IFNAMSIZ-1 {
		return fmt.Errorf("attach %s: name %q is too long for an interface", ifname, port)
	}
	commands := []string{
		fmt.Sprintf("link add %s type veth peer name %s netns %s", ifname, port, lan.Name),
		fmt.Sprintf("link set %s up", ifname),
	}
	for _, address := range addresses {
		commands = append(commands, fmt.Sprintf("address add %s dev %s", address, ifname))
	}
	if err := n.ip(commands...); err != nil {
		return err
	}
	if err := lan.ip(
		fmt.Sprintf("link set %s master br0", port),
		fmt.Sprintf("link set %s up", port),
	); err != nil {
		return err
	}
	return Eventually(5*time.Second, func() error {
		out, err := n.Run("ip", "-oneline", "link", "show", "dev", ifname)
		if err == nil && !strings.Contains(out, "state UP") {
			err = fmt.Errorf("%s has no carrier: %s", ifname, out)
		}
		return err
	})
}

// Macvlan adds a machine whose eth0 is a macvlan on a parent interface of this
// node, as Docker's driver makes one: what is left of a container without an
// engine. The address is one like "10.10.0.100/24".
func (n *Node) Macvlan(name, parent, mac, address string) (*Node, error) {
	m, err := n.lab.newNode(name)
	if err != nil {
		return nil, err
	}
	if err := n.ip(fmt.Sprintf("link add link %s name eth0 netns %s address %s type macvlan mode bridge", parent, m.Name, mac)); err != nil {
		return nil, fmt.Errorf("add %s on %s: %w", name, parent, err)
	}
	return m, m.ip(
		"address add "+address+" dev eth0",
		"link set eth0 up",
	)
}

// Port is the name of an interface's other end, in the switch.
func (n *Node) Port(ifname string) string { return n.short + "-" + ifname }

// Route adds a route as ip writes it, like "default via 10.10.0.1".
func (n *Node) Route(route string) error { return n.ip("route add " + route) }

// ip runs ip commands in the node.
func (n *Node) ip(commands ...string) error {
	_, err := run(Command{
		Args:  []string{"ip", "-netns", n.Name, "-batch", "-"},
		Stdin: strings.NewReader(strings.Join(commands, "\n") + "\n"),
	})
	return err
}

// Sysctl sets a kernel parameter, named by its path below /proc/sys.
func (n *Node) Sysctl(name, value string) error {
	return n.Do(func() error { return os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0) })
}

// enter turns a command into one that enters the node's network namespace
// first. Only the network's: `ip netns exec` would mount /sys anew as well,
// and an engine then has no control groups. nsenter executes the command in
// its own place, so that the process keeps its number.
func (n *Node) enter(c Command) Command {
	c.Args = append([]string{"nsenter", "--net=" + filepath.Join(namespaceDir, n.Name), "--"}, c.Args...)
	return c
}

// Start starts a background process in the node; see Process.
func (n *Node) Start(name string, c Command) (*Process, error) {
	return n.lab.start(n.short+"-"+name, n.enter(c))
}

// Run runs a command in the node to its end and returns its standard output.
func (n *Node) Run(args ...string) (string, error) { return n.RunCommand(Command{Args: args}) }

// RunCommand is Run with everything that a Command can have.
func (n *Node) RunCommand(c Command) (string, error) { return run(n.enter(c)) }

// Do runs a function in the node's network namespace. Sockets that it opens
// stay there; goroutines that it starts do not run there.
func (n *Node) Do(f func() error) error { return InNetns(n.Name, f) }

// InNetns runs a function in a named network namespace.
func InNetns(name string, f func() error) error {
	result := make(chan error)
	go func() {
		err := errors.New("the function in " + name + " ended its goroutine") // as a testing.T's FailNow does
		defer func() { result <- err }()
		err = inNetns(name, f)
	}()
	return <-result
}

// inNetns locks its goroutine to a thread and unlocks it only when the thread
// is back where it was: Go then ends a thread that isn't with the goroutine.
func inNetns(name string, f func() error) error {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer home.Close()
	target, err := os.Open(filepath.Join(namespaceDir, name))
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer target.Close()
	if err := unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace %s: %w", name, err)
	}
	err = f()
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
		return fmt.Errorf("leave network namespace %s: %w", name, back)
	}
	runtime.UnlockOSThread()
	return err
}
