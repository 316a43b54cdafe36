package lab

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// Dnsmasq is dnsmasq with its DNS server off.
var Dnsmasq = DHCPKind{
	Name:    "dnsmasq",
	program: "dnsmasq",
	command: func(program string, f dhcpFiles) Command {
		return Command{Args: []string{program, "-C", f.Config, "--user=root"}}
	},
	parse: parseDnsmasq,
}

// parseDnsmasq reads dnsmasq's lease file: expiry, MAC, address, name and
// client identifier, with a star for none.
func parseDnsmasq(table string) ([]DHCPLease, error) {
	var rows []DHCPLease
	for line := range strings.Lines(table) {
		fields := strings.Fields(line)
		if len(fields) != 5 {
			return nil, fmt.Errorf("odd row %q", line)
		}
		for i, field := range fields {
			if field == "*" {
				fields[i] = ""
			}
		}
		expires, err := strconv.ParseInt(fields[0], 10, 64)
		if err != nil {
			return nil, err
		}
		addr, err := netip.ParseAddr(fields[2])
		if err != nil {
			return nil, err
		}
		clientID, err := plainHex(fields[4])
		if err != nil {
			return nil, err
		}
		row := DHCPLease{Addr: addr, MAC: fields[1], Hostname: fields[3], ClientID: clientID}
		if expires != 0 {
			row.Expires = time.Unix(expires, 0)
		}
		rows = append(rows, row)
	}
	return rows, nil
}
