package main

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/server"
)

// somePools has one that is well, a relayed one with a silent server and a
// refusal, one on a LAN where nobody has answered yet, and one without servers.
func somePools() []server.Pool {
	at := func(d time.Duration) *time.Time { return new(now.Add(d)) }
	addr := func(s string) *netip.Addr { return new(netip.MustParseAddr(s)) }
	states := func(bound, lost, releasing int) map[string]int {
		return map[string]int{"bound": bound, "renewing": 0, "rebinding": 0, "lost": lost, "waiting": 0, "releasing": releasing}
	}
	well := server.PoolServer{Server: addr("198.51.100.1"), AnsweredAt: at(-12 * time.Second), TookMS: new(1.2), Offers: 14, ACKs: 31}
	return []server.Pool{
		{
			ID: "10.10.0.0/16?dhcp_server=198.51.100.1&id=A", Subnet: netip.MustParsePrefix("10.10.0.0/16"), Gateway: addr("10.10.0.1"), Mode: server.ModeRelay,
			Options: map[string]string{"dhcp_server": "198.51.100.1", "listen_addr": "0.0.0.0"}, Leases: states(14, 0, 0), Servers: []server.PoolServer{well},
		},
		{
			ID: "10.20.0.0/24?dhcp_server=198.51.100.1,198.51.100.2,198.51.100.3&id=B", Subnet: netip.MustParsePrefix("10.20.0.0/24"), Range: new(netip.MustParsePrefix("10.20.0.128/25")), Gateway: addr("10.20.0.1"), Mode: server.ModeRelay,
			Options: map[string]string{"dhcp_server": "198.51.100.1,198.51.100.2,198.51.100.3", "listen_addr": "10.20.0.5"}, Leases: states(3, 1, 2),
			Servers: []server.PoolServer{
				well,
				{Server: addr("198.51.100.2"), AnsweredAt: at(-2 * time.Hour), TookMS: new(850.3), SilentSince: at(-5 * time.Minute), Unanswered: 7, NAKs: 1},
				{Server: addr("198.51.100.3"), SilentSince: at(-time.Second), Unanswered: 1},
			},
			Refused: 3, LastRefusal: &server.Refusal{At: *at(-2 * time.Minute), Detail: "address 10.20.0.9 is outside the network's --ip-range 10.20.0.128/25: make the DHCP server's range fit it\x1b[2J"},
		},
		{
			ID: "C", Subnet: netip.MustParsePrefix("192.0.2.0/24"), Mode: server.ModeBroadcast, Options: map[string]string{"dhcp_interface": "eth0.30"},
			Leases: states(0, 0, 0), Servers: []server.PoolServer{{}},
		},
		{
			ID: "D", Subnet: netip.MustParsePrefix("203.0.113.0/24"), Gateway: addr("203.0.113.1"), Mode: server.ModeRelay, Options: map[string]string{},
			Leases: states(0, 0, 0), Servers: []server.PoolServer{},
		},
	}
}

// Tables and JSON as people and programs know them.
func TestPoolsOutput(t *testing.T) {
	var got bytes.Buffer
	if err := printPools(&got, somePools(), now); err != nil {
		t.Fatal(err)
	}
	matchGolden(t, "pools.txt", got.String())

	cleanEnv(t)
	d := newStandIn(t, somePools())
	out := program("--socket", d.socket, "pools", "--json")
	if out.status != 0 || out.stderr != "" {
		t.Errorf("%+v", out)
	}
	matchGolden(t, "pools.json", out.stdout)
	if strings.ContainsFunc(got.String()+out.stdout, hidden) {
		t.Error("control characters come out")
	}
	out = program("--socket", d.socket, "pools")
	if out.status != 0 || out.stderr != "" || !strings.HasPrefix(out.stdout, "SUBNET") {
		t.Errorf("%+v", out)
	}
}

func TestPools(t *testing.T) {
	cleanEnv(t)
	d := newStandIn(t, somePools())
	for arg, want := range map[string]string{"": "/v1/pools", "10.20.0.0/24": "/v1/pools?pool=10.20.0.0%2F24", "10.20.0.0/24?a=b&id=B": "/v1/pools?pool=10.20.0.0%2F24%3Fa%3Db%26id%3DB"} {
		got := program(append([]string{"--socket", d.socket, "pools"}, strings.Fields(arg)...)...)
		if asked := d.questions(); got.status != 0 || len(asked) != 1 || asked[0] != want {
			t.Errorf("%s: asks %q, %+v", arg, asked, got)
		}
	}
	d.answers([]server.Pool{})
	const complaint = "oam-docker-ipam: no pool has the ID or subnet \"10.20.0.0/25\": oam-docker-ipam pools lists all\n"
	for args, want := range map[string]outcome{
		"":                    {0, "no pools\n", ""},
		"--json":              {0, "[]\n", ""},
		"10.20.0.0/25":        {1, "", complaint},
		"--json 10.20.0.0/25": {1, "[]\n", complaint},
	} {
		if got := program(append([]string{"--socket", d.socket, "pools"}, strings.Fields(args)...)...); got != want {
			t.Errorf("%s: %+v, want %+v", args, got, want)
		}
	}
	if got := program("--socket", d.socket, "pools", "a", "b"); got.status != 1 || !strings.Contains(got.stderr, "one ID or subnet") {
		t.Errorf("%+v", got)
	}
	if got := program("--socket", "/nonexistent.sock", "pools"); got.status != 1 || !strings.Contains(got.stderr, "not running") {
		t.Errorf("%+v", got)
	}
}
