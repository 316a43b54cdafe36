package lab

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// LosePackets drops the given part of the node's DHCP packets on eth0, each
// way. The returned function ends that.
//
// A packet that a rule of the OUTPUT chain drops is reported to its sender as
// EPERM, and a network says nothing. So those that leave are marked instead,
// and the marked are routed into a cable that nobody listens on.
func (n *Node) LosePackets(part float64) (stop func() error, err error) {
	const mark = "0xdead"
	statistic := []string{"-m", "statistic", "--mode", "random", "--probability", strconv.FormatFloat(part, 'f', -1, 64)}
	in := append([]string{"INPUT", "-i", "eth0", "-p", "udp", "--dport", "67:68"}, append(statistic, "-j", "DROP")...)
	out := append([]string{"OUTPUT", "-t", "mangle", "-o", "eth0", "-p", "udp", "--dport", "67:68"}, append(statistic, "-j", "MARK", "--set-mark", mark)...)
	rules := [][]string{in, out}
	stop = func() error {
		var errs []error
		for _, rule := range rules {
			errs = append(errs, n.iptables("-D", rule))
		}
		return errors.Join(append(errs, n.ip(
			"rule delete fwmark "+mark,
			"link delete lost type veth", // its route goes with it
		))...)
	}
	if err := n.ip(
		"link add lost type veth peer name nowhere",
		"link set lost arp off up",
		"link set nowhere arp off up",
		"route add default dev lost table 100",
		"rule add fwmark "+mark+" table 100",
	); err != nil {
		return nil, fmt.Errorf("lose packets: %w", err)
	}
	for _, rule := range rules {
		if err := n.iptables("-A", rule); err != nil {
			return nil, fmt.Errorf("lose packets: %w", err)
		}
	}
	return stop, nil
}

// iptables adds (-A) or deletes (-D) a rule, of which the chain comes first.
func (n *Node) iptables(action string, rule []string) error {
	_, err := n.Run(append([]string{"iptables", "--wait", action}, rule...)...)
	return err
}

// LostPackets says how many packets LosePackets has dropped so far.
func (n *Node) LostPackets() (in, out int, err error) {
	count := func(table, chain, target string) (int, error) {
		text, err := n.Run("iptables", "--wait", "-t", table, "-n", "-v", "-x", "-L", chain)
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(text) {
			if fields := strings.Fields(line); len(fields) > 2 && fields[2] == target {
				return strconv.Atoi(fields[0])
			}
		}
		return 0, fmt.Errorf("count lost packets: no rule in %s", chain)
	}
	if in, err = count("filter", "INPUT", "DROP"); err != nil {
		return 0, 0, err
	}
	out, err = count("mangle", "OUTPUT", "MARK")
	return in, out, err
}
