package lab

import "fmt"

// Topology is the network that most tests want.
type Topology struct {
	Server *Node // 10.10.0.1, for a DHCP server
	Second *Node // 10.10.0.3, for another one
	Host   *Node // 10.10.0.2, with an engine and our daemon; also an eth1 without an address, as a second parent
	Client *Node // 10.10.0.4 and 10.20.0.1, from where containers of both subnets can be reached
}

// Standard adds that network to the lab.
func (l *Lab) Standard() (*Topology, error) {
	var t Topology
	for _, node := range []struct {
		where     **Node
		name      string
		addresses []string
	}{
		{&t.Server, "server", []string{"10.10.0.1/24"}},
		{&t.Second, "second", []string{"10.10.0.3/24"}},
		{&t.Host, "host", []string{"10.10.0.2/24"}},
		{&t.Client, "client", []string{"10.10.0.4/24", "10.20.0.1/24"}},
	} {
		var err error
		if *node.where, err = l.Node(node.name, node.addresses...); err != nil {
			return nil, err
		}
	}
	if err := t.Host.Route("default via 10.10.0.1"); err != nil {
		return nil, fmt.Errorf("route of host: %w", err)
	}
	if err := t.Host.Attach("eth1"); err != nil {
		return nil, fmt.Errorf("second interface of host: %w", err)
	}
	return &t, nil
}
