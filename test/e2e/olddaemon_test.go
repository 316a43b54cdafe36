package e2e

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// The old daemon called a pool by its bare network address, and its networks
// are still there when we take its place.
func TestNetworksOfTheOldDaemon(t *testing.T) {
	eachServer(t, func(t *testing.T, kind lab.DHCPKind) {
		s := takeOver(t, kind, map[string]any{"RequiresMACAddress": true})
		s.run("c1", "a")
		addr, _ := s.holds("c1", "eth0")
		if prefix := s.prefix("c1", "eth0"); prefix.Bits() != 24 {
			t.Errorf("the container has %s", prefix)
		}
		if router := s.router("c1"); router != "10.10.0.1" {
			t.Errorf("default route by %s", router)
		}
		if known := s.known(addr); known.PoolID != "10.10.0.0" || known.Subnet != lab.SubnetA().Prefix {
			t.Errorf("lease of pool %s, subnet %s", known.PoolID, known.Subnet)
		}
		s.pings(s.net.Client, addr)
		check(t, s.daemon.Restart())
		s.docker("restart", "c1")
		again, _ := s.holds("c1", "eth0")
		s.only(again)
		s.docker("rm", "-f", "c1")
		s.notLeased()
		s.docker("network", "rm", "a")
	})
}

// An engine asks what a driver wants once, and tells the next one no MACs when
// the first wanted none. Without one we can't lease anything.
func TestEngineThatTellsNoMACs(t *testing.T) {
	s := takeOver(t, lab.Kea, nil)
	for _, args := range [][]string{nil, {"--ip", "10.10.0.150"}} {
		mentions(t, s.refused("a", args...), "registered this driver without MAC addresses", "restart the engine")
	}
	s.notLeased()
	check(t, s.engine.Restart())
	s.run("c1", "a")
	s.holds("c1", "eth0")
}

// takeOver makes a site where the old daemon, with these capabilities, has
// served a network's creation and ours has taken its place.
func takeOver(t *testing.T, kind lab.DHCPKind, capabilities map[string]any) *site {
	t.Helper()
	s := newHost(t, kind, lab.DHCPConfig{}, byMAC...)
	s.engine = newEngine(t, s.net.Host)
	s.daemon.Socket = filepath.Join(s.engine.PluginDir(), "talkingdata.sock")
	stop := serveOldDaemon(t, s.daemon.Socket, capabilities)
	check(t, s.engine.Start())
	check(t, s.engine.ImportImage(image))
	s.network("a", "eth0", "10.10.0.0/24", "--gateway", "10.10.0.1", "--aux-address", "DefaultGatewayIPv4=10.10.0.1")
	stop()
	check(t, s.daemon.Start())
	return s
}

// serveOldDaemon answers the engine as the old daemon did, as far as creating
// a network goes.
func serveOldDaemon(t *testing.T, socket string, capabilities map[string]any) (stop func()) {
	t.Helper()
	answers := map[string]map[string]any{
		"/Plugin.Activate":                    {"Implements": []string{"IpamDriver"}},
		"/IpamDriver.GetCapabilities":         capabilities,
		"/IpamDriver.GetDefaultAddressSpaces": {"LocalDefaultAddressSpace": "LocalDefault", "GlobalDefaultAddressSpace": "GlobalDefault"},
		"/IpamDriver.RequestPool":             {"PoolID": "10.10.0.0", "Pool": "10.10.0.0/24"},
		"/IpamDriver.RequestAddress":          {"Address": "10.10.0.1/24"},
	}
	listener := must(net.Listen("unix", socket))(t)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_ = json.NewEncoder(w).Encode(answers[r.URL.Path])
	})}
	go func() { _ = server.Serve(listener) }()
	return func() { check(t, server.Shutdown(context.Background())) }
}
