package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

var (
	serverAddr = netip.MustParseAddr("192.0.2.3")
	usual      = 30 * time.Second
)

// fakeClient is a DHCP server that has all of a subnet, from .100 up, and
// keeps a table of what it leased.
type fakeClient struct {
	// acquire, where set, replaces Acquire.
	acquire func(context.Context, lease.Request) (lease.Lease, error)

	mu       sync.Mutex
	probes   []lease.Pool
	table    map[netip.Addr]lease.MAC
	next     int
	requests []lease.Request
}

var _ lease.Client = (*fakeClient)(nil)

// unasked is the subnet of whoever asks for none.
var unasked = netip.MustParsePrefix("192.0.2.0/24")

func (c *fakeClient) Probe(_ context.Context, p lease.Pool, _ lease.MAC) ([]lease.Offer, error) {
	c.mu.Lock()
	c.probes = append(c.probes, p)
	c.mu.Unlock()
	if !p.Subnet.IsValid() {
		p.Subnet = unasked
	}
	o := lease.Offer{Server: serverAddr, Address: c.host(p, 99), Subnet: p.Subnet, Router: c.host(p, 1)}
	return []lease.Offer{o}, nil
}

// host is the n-th address of a pool's subnet, a /24.
func (c *fakeClient) host(p lease.Pool, n int) netip.Addr {
	b := p.Subnet.Addr().As4()
	b[3] = byte(n)
	return netip.AddrFrom4(b)
}

func (c *fakeClient) Acquire(ctx context.Context, req lease.Request) (lease.Lease, error) {
	if c.acquire != nil {
		return c.acquire(ctx, req)
	}
	return c.grant(req)
}

func (c *fakeClient) grant(req lease.Request) (lease.Lease, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests = append(c.requests, req)
	addr := req.Address
	if !addr.IsValid() {
		addr = c.host(req.Pool, 100+c.next)
		c.next++
	}
	if err := req.Accept(addr); err != nil {
		return lease.Lease{}, err
	}
	c.table[addr] = req.MAC
	now := time.Now()
	return lease.Lease{
		MAC: req.MAC, Name: req.Name, ClientID: append([]byte{1}, req.MAC[:]...), Prefix: netip.PrefixFrom(addr, 32),
		Server: serverAddr, Via: netip.AddrPortFrom(serverAddr, 67),
		Obtained: now, Renew: now.Add(30 * time.Minute), Rebind: now.Add(50 * time.Minute), Expires: now.Add(time.Hour),
	}, nil
}

func (c *fakeClient) Confirm(_ context.Context, _ lease.Pool, l lease.Lease) (lease.Lease, error) {
	return l, nil
}

func (c *fakeClient) RelayMAC(context.Context, lease.Pool) (lease.MAC, error) {
	return lease.MAC{}, errors.New("no interface")
}

func (c *fakeClient) Renew(_ context.Context, _ lease.Pool, l lease.Lease) (lease.Lease, error) {
	return l, nil
}

func (c *fakeClient) Rebind(_ context.Context, _ lease.Pool, l lease.Lease) (lease.Lease, error) {
	return l, nil
}

func (c *fakeClient) Release(_ context.Context, _ lease.Pool, l lease.Lease) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.table, l.Addr())
	return nil
}

func (c *fakeClient) Decline(context.Context, lease.Pool, lease.Lease) error { return nil }

func (c *fakeClient) Alive(context.Context) error { return nil }

func (c *fakeClient) leased() map[netip.Addr]lease.MAC {
	c.mu.Lock()
	defer c.mu.Unlock()
	leased := map[netip.Addr]lease.MAC{}
	for addr, mac := range c.table {
		leased[addr] = mac
	}
	return leased
}

// probed lists the pools that were probed for since the last look.
func (c *fakeClient) probed() []lease.Pool {
	c.mu.Lock()
	defer c.mu.Unlock()
	probes := c.probes
	c.probes = nil
	return probes
}

func (c *fakeClient) asked() []lease.Request {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]lease.Request(nil), c.requests...)
}

// fakeStore remembers nothing but what a new Manager is to find.
type fakeStore struct {
	pools  []lease.Pool
	leases []lease.Lease
}

func (s fakeStore) Load() (lease.Saved, error) {
	return lease.Saved{Pools: s.pools, Leases: s.leases}, nil
}
func (fakeStore) Commit(lease.Change) error   { return nil }
func (fakeStore) Alive(context.Context) error { return nil }

// fakeHost is a machine without an identity: all leases are by MAC.
type fakeHost struct{}

func (fakeHost) MachineID() (string, error)          { return "", errors.New("no machine id") }
func (fakeHost) HardwareAddrs() ([]lease.MAC, error) { return nil, nil }
func (fakeHost) BootID() string                      { return "boot" }
func (fakeHost) BootTime() time.Duration             { return time.Since(began) }

var began = time.Now()

// daemon is the plugin as the engine sees it: a socket.
type daemon struct {
	t       testing.TB
	as      lease.Driver
	socket  string
	client  *fakeClient
	manager *lease.Manager
	// stop ends Serve and returns its error; it is called with the test's end
	// at the latest.
	stop func() error
}

// scratch is a folder whose path is short enough for a socket's.
func scratch(t testing.TB) string {
	t.Helper()
	folder, err := os.MkdirTemp("", "ipam")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	return folder
}

func newManager(t testing.TB, store lease.Store) (*lease.Manager, *fakeClient) {
	t.Helper()
	client := &fakeClient{table: map[netip.Addr]lease.MAC{}}
	manager, err := lease.NewManager(store, client, lease.Config{Timeout: usual, Machine: fakeHost{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(manager.Close)
	return manager, client
}

// drivers are both that a daemon is.
var drivers = lease.Drivers("talkingdata")

func startDaemon(t testing.TB, store lease.Store, grace time.Duration) *daemon {
	t.Helper()
	return startDaemonAs(t, drivers[0], store, grace)
}

func startDaemonAs(t testing.TB, as lease.Driver, store lease.Store, grace time.Duration) *daemon {
	t.Helper()
	d := &daemon{t: t, as: as, socket: filepath.Join(scratch(t), "talkingdata.sock")}
	d.manager, d.client = newManager(t, store)
	log := slog.New(slog.DiscardHandler)
	l, err := Listen(d.socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- Serve(ctx, l, New(Backend{Manager: d.manager, Settings: noSettings, Options: fakeOptions}, d.as, log), grace, log)
	}()
	d.stop = sync.OnceValue(func() error { cancel(); return <-ended })
	t.Cleanup(func() { _ = d.stop() })
	return d
}

// response is an answer as it was on the wire.
type response struct {
	status int
	header http.Header
	body   string
	closes bool // the answer says Connection: close
}

// exchange writes raw bytes to a new connection and reads one answer.
func (d *daemon) exchange(raw string) response {
	d.t.Helper()
	conn, err := net.Dial("unix", d.socket)
	if err != nil {
		d.t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		d.t.Fatal(err)
	}
	// A server that refuses a body need not read all of it.
	_, writeErr := io.WriteString(conn, raw)
	reader := bufio.NewReader(conn)
	resp, err := http.ReadResponse(reader, nil)
	if err != nil {
		d.t.Fatalf("%v (write: %v)", err, writeErr)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		d.t.Fatal(err)
	}
	if resp.Close {
		if _, err := reader.ReadByte(); err != io.EOF {
			d.t.Errorf("after the answer: %v, want the connection's end", err)
		}
	}
	return response{resp.StatusCode, resp.Header, strings.TrimSuffix(string(body), "\n"), resp.Close}
}

// accept is the header that every engine sends.
const accept = "application/vnd.docker.plugins.v1.2+json"

// post sends a call as engine 20.10 does: with an empty Host line and without
// Content-Type.
func (d *daemon) post(path, body string) response {
	d.t.Helper()
	return d.exchange(fmt.Sprintf("POST %s HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: %d\r\nAccept: %s\r\nAccept-Encoding: gzip\r\n\r\n%s", path, len(body), accept, body))
}

// call is post, of a call that must be answered with this JSON.
func (d *daemon) call(path, body, want string) {
	d.t.Helper()
	got := d.post(path, body)
	if got.status != http.StatusOK || got.body != want {
		d.t.Errorf("%s %s\nanswers %d %s\nwant    200 %s", path, body, got.status, got.body, want)
	}
}

func noSettings() []Setting { return nil }

func (c *fakeClient) Servers(lease.Pool) []lease.ServerStatus { return nil }

func (fakeStore) Events(uint64) ([]lease.Event, error) { return nil, nil }
