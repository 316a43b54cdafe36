package lab

import (
	"errors"
	"strconv"
	"time"
)

// StartRelay runs the ISC's dhcrelay on a node: it relays the requests that
// are broadcast on the interface down to a server beyond the interface up.
// Both have addresses; down's is giaddr.
func (n *Node) StartRelay(down, up, server string) (*Process, error) {
	program, err := n.lab.copyTool("dhcrelay")
	if err != nil {
		return nil, err
	}
	relay, err := n.Start("dhcrelay", Command{Args: []string{program, "-4", "-d", "--no-pid", "-id", down, "-iu", up, server}})
	if err != nil {
		return nil, err
	}
	return relay, relay.ready(10*time.Second, func() error {
		open, err := udpOpen(strconv.Itoa(relay.Pid), 67)
		if err == nil && !open {
			err = errors.New("UDP port 67 is not open")
		}
		return err
	})
}
