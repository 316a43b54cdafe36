package server

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// held is a socket as systemd holds it: it lives on when a daemon closes its
// own copy.
type held struct {
	t    testing.TB
	path string
	file *os.File
}

func hold(t testing.TB, name string) held {
	t.Helper()
	path := filepath.Join(scratch(t), name)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	file, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return held{t, path, file}
}

// pass is the copy that a daemon gets.
func (h held) pass() net.Listener {
	h.t.Helper()
	l, err := net.FileListener(h.file)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { l.Close() })
	return l
}

// dial connects as an engine does, whether a daemon runs or not.
func (h held) dial() net.Conn {
	h.t.Helper()
	conn, err := net.Dial("unix", h.path)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		h.t.Fatal(err)
	}
	return conn
}

// serve starts Serve; stop ends it and returns its error.
func serve(l net.Listener, h http.Handler) (stop func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, l, h, usual, slog.New(slog.DiscardHandler)) }()
	return func() error { cancel(); return <-ended }
}

// Under a constant load of requests, each on a connection of its own, a daemon
// is restarted again and again, and no request fails or is done by halves: a
// restart is what an upgrade is to an engine.
func TestRestartsUnderLoad(t *testing.T) {
	socket := hold(t, "talkingdata.sock")
	manager, client := newManager(t, fakeStore{})
	client.acquire = func(_ context.Context, req lease.Request) (lease.Lease, error) {
		time.Sleep(time.Millisecond) // some are in hand whenever it stops
		return client.grant(req)
	}
	h := New(Backend{Manager: manager, Settings: noSettings}, drivers[0], slog.New(slog.DiscardHandler))
	pool, err := manager.AddPool(t.Context(), lease.Pool{Subnet: unasked})
	if err != nil {
		t.Fatal(err)
	}

	engine := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", socket.path)
	}}}
	post := func(path, body, want string) error {
		resp, err := engine.Post("http://plugin"+path, "", strings.NewReader(body))
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if got, err := io.ReadAll(resp.Body); resp.StatusCode != 200 || strings.TrimSpace(string(got)) != want {
			return fmt.Errorf("%s answers %d %s, %v", path, resp.StatusCode, got, err)
		}
		return nil
	}
	work, stopWork := context.WithCancel(t.Context())
	defer stopWork()
	answered := make(chan struct{})
	var engines sync.WaitGroup
	for i := range 8 {
		addr := fmt.Sprintf("192.0.2.%d", 100+i)
		engines.Go(func() {
			for work.Err() == nil {
				for _, c := range []struct{ path, body, want string }{
					{"/Plugin.Activate", "", `{"Implements":["IpamDriver"]}`},
					{"/IpamDriver.RequestAddress", endpoint(pool.ID, addr, fmt.Sprintf("02:42:00:00:00:%02x", i), ""), `{"Address":"` + addr + `/24","Data":null}`},
					{"/IpamDriver.ReleaseAddress", `{"PoolID":` + quote(pool.ID) + `,"Address":"` + addr + `"}`, `{}`},
				} {
					if err := post(c.path, c.body, c.want); err != nil {
						t.Error(err)
					}
					select {
					case answered <- struct{}{}:
					default: // while it stops, nobody counts
					}
				}
			}
		})
	}
	for range 50 {
		stop := serve(socket.pass(), h)
		for range 20 {
			<-answered
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	}
	// Those who wait at the end are served once more.
	stop := serve(socket.pass(), h)
	stopWork()
	engines.Wait()
	if err := stop(); err != nil {
		t.Error(err)
	}
	if got := client.leased(); len(got) != 0 {
		t.Errorf("leased %v: each was released", got)
	}
}

// gate is a listener that tells when it lets somebody in and when it closes.
type gate struct {
	net.Listener
	in     chan struct{}
	closed chan struct{}
}

func watch(l net.Listener) *gate { return &gate{l, make(chan struct{}), make(chan struct{})} }

func (g *gate) Accept() (net.Conn, error) {
	conn, err := g.Listener.Accept()
	if err == nil {
		g.in <- struct{}{}
	}
	return conn, err
}

func (g *gate) Close() error {
	err := g.Listener.Close()
	if err == nil {
		close(g.closed)
	}
	return err
}

// Whoever was let in before the end is answered, however little had been sent
// by then; whoever comes later waits for the next daemon.
func TestShutdownAnswersWhoeverIsIn(t *testing.T) {
	request := "POST /Plugin.Activate HTTP/1.1\r\nHost: \r\nContent-Length: 2\r\n\r\n{}"
	const success = "HTTP/1.1 200 OK"
	for name, sent := range map[string]int{"nothing": 0, "some of the header": 20, "the header": len(request) - 2, "some of the body": len(request) - 1} {
		t.Run(name, func(t *testing.T) {
			socket := hold(t, "talkingdata.sock")
			manager, _ := newManager(t, fakeStore{})
			h := New(Backend{Manager: manager, Settings: noSettings}, drivers[0], slog.New(slog.DiscardHandler))
			in := watch(socket.pass())
			stop := serve(in, h)
			early := socket.dial()
			if _, err := io.WriteString(early, request[:sent]); err != nil {
				t.Fatal(err)
			}
			<-in.in
			stopped := make(chan error, 1)
			go func() { stopped <- stop() }()
			<-in.closed
			late := socket.dial()
			if _, err := io.WriteString(late, request); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(early, request[sent:]); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(early); !strings.HasPrefix(string(got), success) {
				t.Errorf("who was let in gets %q, %v", got, err)
			}
			if err := <-stopped; err != nil {
				t.Error(err)
			}
			stop = serve(socket.pass(), h)
			if got, err := io.ReadAll(late); !strings.HasPrefix(string(got), success) {
				t.Errorf("who came later gets %q, %v", got, err)
			}
			if err := stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// pipes is a listener in memory, for bubbles.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	close func()
}

func newPipes() *pipes {
	done := make(chan struct{})
	return &pipes{make(chan net.Conn), done, sync.OnceFunc(func() { close(done) })}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-p.conns:
		return conn, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error { p.close(); return nil }

func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipes", Net: "unix"} }

func (p *pipes) dial() net.Conn {
	ours, theirs := net.Pipe()
	p.conns <- theirs
	return ours
}

// A caller who never says anything, or stops in the middle, holds up the end no
// longer than the reading of a header and a body may take. More than that are
// cut off after the grace.
func TestShutdownSilentCaller(t *testing.T) {
	for name, c := range map[string]struct {
		says  string
		grace time.Duration
		after time.Duration
	}{
		"nothing":            {"", usual, headerTime},
		"some of the header": {"POST /Plug", usual, headerTime},
		"some of the body":   {"POST /IpamDriver.RequestPool HTTP/1.1\r\nHost: \r\nContent-Length: 9\r\n\r\n{", usual, bodyTime},
		"little grace":       {"", time.Second, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				manager, _ := newManager(t, fakeStore{})
				l := newPipes()
				ctx, cancel := context.WithCancel(t.Context())
				ended := make(chan error, 1)
				go func() {
					ended <- Serve(ctx, l, New(Backend{Manager: manager, Settings: noSettings}, drivers[0], slog.New(slog.DiscardHandler)), c.grace, slog.New(slog.DiscardHandler))
				}()
				conn := l.dial()
				go func() { _, _ = io.Copy(io.Discard, conn) }()
				if _, err := io.WriteString(conn, c.says); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				began := time.Now()
				cancel()
				err := <-ended
				if took := time.Since(began); took != c.after {
					t.Errorf("ended after %s, want %s", took, c.after)
				}
				if cut := err != nil && strings.Contains(err.Error(), "finish requests in hand"); cut != (c.grace == c.after) {
					t.Errorf("error %v", err)
				}
			})
		})
	}
}
