package lab

import (
	"fmt"
	"net"
)

// Bridge makes an interface of the node a port of a new bridge, which has the
// given addresses from then on. The interface's own go, and with them its
// routes. As it is on hosts that are set up well, the bridge has the
// interface's MAC for good: else it takes the lowest of its ports', and that
// changes as containers come and go.
func (n *Node) Bridge(bridge, port string, addresses ...string) error {
	var mac net.HardwareAddr
	if err := n.Do(func() error {
		i, err := net.InterfaceByName(port)
		if err == nil {
			mac = i.HardwareAddr
		}
		return err
	}); err != nil {
		return fmt.Errorf("make bridge %s: %w", bridge, err)
	}
	commands := []string{
		fmt.Sprintf("link add %s address %s type bridge stp_state 0 forward_delay 0", bridge, mac),
		"address flush dev " + port,
		fmt.Sprintf("link set %s master %s", port, bridge),
		fmt.Sprintf("link set %s up", bridge),
	}
	for _, address := range addresses {
		commands = append(commands, fmt.Sprintf("address add %s dev %s", address, bridge))
	}
	return n.ip(commands...)
}
