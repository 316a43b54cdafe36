package lab

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// udpOpen says whether somebody holds a UDP port in the network namespace of
// a process, or of a thread: who is its name in /proc.
func udpOpen(who string, port int) (bool, error) {
	for _, table := range []string{"udp", "udp6"} {
		text, err := os.ReadFile("/proc/" + who + "/net/" + table)
		if err != nil {
			return false, fmt.Errorf("read UDP sockets: %w", err)
		}
		if holdsPort(string(text), port) {
			return true, nil
		}
	}
	return false, nil
}

// holdsPort looks for a local port in a /proc/net/udp.
func holdsPort(table string, port int) bool {
	for line := range strings.Lines(table) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		_, local, found := strings.Cut(fields[1], ":")
		if !found {
			continue // the head
		}
		if number, err := strconv.ParseUint(local, 16, 16); err == nil && int(number) == port {
			return true
		}
	}
	return false
}

// UDPOpen says whether somebody holds a UDP port in the node, on whatever
// address.
func (n *Node) UDPOpen(port int) (open bool, err error) {
	err = n.Do(func() error {
		open, err = udpOpen("thread-self", port)
		return err
	})
	return open, err
}
