package lab

import (
	"encoding/csv"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Kea is the ISC's kea-dhcp4.
var Kea = DHCPKind{
	Name:    "kea",
	program: "kea-dhcp4",
	command: func(program string, f dhcpFiles) Command {
		return Command{
			Args: []string{program, "-c", f.Config},
			Env:  []string{"KEA_PIDFILE_DIR=" + f.Dir, "KEA_LOCKFILE_DIR=none"},
		}
	},
	parse: parseKea,
}

// keaRelayInfo finds option 82 in the column user_context. Kea 2.4 has it one
// level deeper than 2.2.
var keaRelayInfo = regexp.MustCompile(`"relay-agent-info":[^x]*"0x([0-9A-F]*)"`)

// endpointParts takes the sub-options that tell who an endpoint is out of
// those of option 82. Kea keeps them in the order of their codes.
func endpointParts(text string) (string, error) {
	info, err := hex.DecodeString(text)
	var parts []byte
	for err == nil && len(info) > 0 {
		if len(info) < 2 || len(info) < 2+int(info[1]) {
			return "", fmt.Errorf("cut sub-option in %s", text)
		}
		end := 2 + int(info[1])
		if _, known := agentNames[info[0]]; known {
			parts = append(parts, info[:end]...)
		}
		info = info[end:]
	}
	return hex.EncodeToString(parts), err
}

// parseKea reads the journal of Kea's memfile backend. A release is a row
// whose valid lifetime is zero; a state other than zero is an address that is
// declined or expired.
func parseKea(table string) ([]DHCPLease, error) {
	r := csv.NewReader(strings.NewReader(table))
	r.FieldsPerRecord = -1
	r.LazyQuotes = true // the last column is JSON, its commas written in another way
	records, err := r.ReadAll()
	if err != nil || len(records) == 0 {
		return nil, err
	}
	column := make(map[string]int)
	for i, name := range records[0] {
		column[name] = i
	}
	var rows []DHCPLease
	for _, record := range records[1:] {
		if len(record) < len(column) {
			return nil, fmt.Errorf("short row %q", record)
		}
		field := func(name string) string { return record[column[name]] }
		addr, err := netip.ParseAddr(field("address"))
		if err != nil {
			return nil, err
		}
		clientID, err := plainHex(field("client_id"))
		if err != nil {
			return nil, err
		}
		expires, err := strconv.ParseInt(field("expire"), 10, 64)
		if err != nil {
			return nil, err
		}
		row := DHCPLease{
			Addr: addr, MAC: field("hwaddr"), ClientID: clientID, Hostname: field("hostname"),
			Expires: time.Unix(expires, 0),
		}
		if info := keaRelayInfo.FindStringSubmatch(field("user_context")); info != nil {
			if row.Agent, err = endpointParts(info[1]); err != nil {
				return nil, err
			}
		}
		if field("valid_lifetime") == "0" || field("state") != "0" {
			row.Expires = gone
		}
		rows = append(rows, row)
	}
	return rows, nil
}

// keaPair is what a template needs to make one of a pair.
type keaPair struct {
	Hooks            string // the folder of Kea's hook libraries
	Self             string // primary or standby
	Primary, Standby string // addresses
	MaxUnacked       int
}

// StartKeaPair starts two Keas of one configuration, of which the standby
// answers nobody while the primary does (high availability, hot-standby). Once
// the primary has been silent to it for 1.5 s, and to more than maxUnacked
// clients for a second by the secs of their messages, the standby takes over.
// The addresses are those by which they reach each other.
func StartKeaPair(primary, standby *Node, addrs [2]string, config DHCPConfig, maxUnacked int) (servers [2]*DHCPServer, err error) {
	libraries, _ := filepath.Glob("/usr/lib*/kea/hooks/libdhcp_ha.so")
	ofDebian, _ := filepath.Glob("/usr/lib/*/kea/hooks/libdhcp_ha.so")
	libraries = append(libraries, ofDebian...)
	if len(libraries) == 0 {
		return servers, errors.New("find Kea's library libdhcp_ha.so: there is none")
	}
	config.Threads = 2 // its own connection between them asks for several
	for i, node := range []*Node{primary, standby} {
		config.pair = &keaPair{
			Hooks: filepath.Dir(libraries[0]), Self: []string{"primary", "standby"}[i],
			Primary: addrs[0], Standby: addrs[1], MaxUnacked: maxUnacked,
		}
		if servers[i], err = node.StartDHCP(Kea, config); err != nil {
			return servers, err
		}
	}
	// Each waits for the other before it serves.
	for _, s := range servers {
		if err := Eventually(20*time.Second, func() error {
			if !strings.Contains(s.Log(), "to HOT-STANDBY state") {
				return fmt.Errorf("kea on %s isn't in hot standby", s.Node.Name)
			}
			return nil
		}); err != nil {
			return servers, err
		}
	}
	return servers, nil
}
