package lab

import (
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ISC is the ISC's dhcpd. It works on packet sockets, which firewall rules
// don't reach.
var ISC = DHCPKind{
	Name:    "isc",
	program: "dhcpd",
	command: func(program string, f dhcpFiles) Command {
		return Command{Args: []string{program, "-4", "-f", "-d", "--no-pid", "-cf", f.Config, "-lf", f.Leases, "eth0"}}
	},
	parse: parseISC,
}

var (
	iscLease = regexp.MustCompile(`(?ms)^lease ([0-9.]+) \{\n(.*?)^\}`)
	iscOctal = regexp.MustCompile(`\\[0-7]{3}|\\.`)
)

// parseISC reads dhcpd.leases(5), a journal of blocks of statements.
func parseISC(table string) ([]DHCPLease, error) {
	var rows []DHCPLease
	for _, block := range iscLease.FindAllStringSubmatch(table, -1) {
		row, err := parseISCLease(block[1], block[2])
		if err != nil {
			return nil, err
		}
		rows = append(rows, row)
	}
	return rows, nil
}

func parseISCLease(address, statements string) (DHCPLease, error) {
	addr, err := netip.ParseAddr(address)
	if err != nil {
		return DHCPLease{}, err
	}
	row := DHCPLease{Addr: addr}
	active := false
	agent := map[string]string{}
	for line := range strings.Lines(statements) {
		line = strings.TrimSuffix(strings.TrimSpace(line), ";")
		if value, ok := strings.CutPrefix(line, "ends "); ok && value != "never" {
			// The day of the week comes first. Times are in UTC.
			if row.Expires, err = time.Parse("2006/01/02 15:04:05", value[min(2, len(value)):]); err != nil {
				return DHCPLease{}, err
			}
		} else if value, ok := strings.CutPrefix(line, "binding state "); ok {
			active = value == "active"
		} else if value, ok := strings.CutPrefix(line, "hardware ethernet "); ok {
			row.MAC = value
		} else if value, ok := strings.CutPrefix(line, "uid "); ok {
			row.ClientID = fmt.Sprintf("%x", unquoteISC(value))
		} else if value, ok := strings.CutPrefix(line, "client-hostname "); ok {
			row.Hostname = unquoteISC(value)
		} else if value, ok := strings.CutPrefix(line, "option agent."); ok {
			name, value, _ := strings.Cut(value, " ")
			agent[name] = unquoteISC(value)
		}
	}
	for _, code := range slices.Sorted(maps.Keys(agentNames)) {
		if value, ok := agent[agentNames[code]]; ok {
			row.Agent += fmt.Sprintf("%02x%02x%x", code, len(value), value)
		}
	}
	if !active {
		row.Expires = gone
	}
	return row, nil
}

// unquoteISC reads a string in quotes with three octal digits, or the
// character itself, after a backslash.
func unquoteISC(s string) string {
	return iscOctal.ReplaceAllStringFunc(strings.TrimSuffix(strings.TrimPrefix(s, `"`), `"`), func(escape string) string {
		if value, err := strconv.ParseUint(escape[1:], 8, 8); err == nil && len(escape) == 4 {
			return string([]byte{byte(value)})
		}
		return escape[1:]
	})
}
