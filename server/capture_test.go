package server

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// captureDaemon is a daemon whose packets are made by a function.
func captureDaemon(t *testing.T, packets func(context.Context, io.Writer, Capture) error) (socket string, stop func() error) {
	t.Helper()
	l := hold(t, "talkingdata.sock")
	manager, _ := newManager(t, fakeStore{pools: []lease.Pool{{ID: "192.0.2.0/24?id=A&x", Subnet: netip.MustParsePrefix("192.0.2.0/24")}}})
	stop = serve(l.pass(), New(Backend{Manager: manager, Settings: noSettings, Capture: packets}, drivers[0], slog.New(slog.DiscardHandler)))
	return l.path, stop
}

// What is asked for arrives as it was typed, and what is written is there at
// once, long before the end.
func TestCapture(t *testing.T) {
	for _, c := range []struct {
		what   Capture
		length time.Duration
		waits  bool
	}{
		{Capture{}, usual, true},
		{Capture{Container: "a&b=c d", Pool: "192.0.2.0/24?id=A&x", Last: 1000}, usual, true},
		{Capture{Last: 3}, 0, false},
	} {
		asked := make(chan Capture, 1)
		socket, stop := captureDaemon(t, func(ctx context.Context, w io.Writer, what Capture) error {
			asked <- what
			// Before the reader has what it wants, and goes.
			if waits := ctx.Err() == nil; waits != c.waits {
				t.Errorf("%+v: waits %t", c, waits)
			}
			_, err := io.WriteString(w, "packets")
			if end, ok := ctx.Deadline(); !ok || time.Until(end) > c.length {
				t.Errorf("%+v: until %s", c, end)
			}
			<-ctx.Done()
			return err
		})
		in, err := OpenCapture(t.Context(), socket, c.what, c.length)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len("packets"))
		if _, err := io.ReadFull(in, got); err != nil || string(got) != "packets" {
			t.Errorf("%q, %v", got, err)
		}
		if what := <-asked; what != c.what {
			t.Errorf("asked for %+v", what)
		}
		in.Close()
		if err := stop(); err != nil {
			t.Error(err)
		}
	}
}

// Of a pool that there isn't no packet will ever come.
func TestCaptureOfNoPool(t *testing.T) {
	socket, stop := captureDaemon(t, func(context.Context, io.Writer, Capture) error {
		t.Error("captured")
		return nil
	})
	_, err := OpenCapture(t.Context(), socket, Capture{Pool: "lan"}, usual)
	if err == nil || !strings.Contains(err.Error(), `no pool has the ID or subnet "lan"`) {
		t.Errorf("error %v", err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// Programs may ask without an end, and have the format's own type.
func TestCaptureWithoutEnd(t *testing.T) {
	ended := make(chan bool)
	socket, stop := captureDaemon(t, func(ctx context.Context, w io.Writer, what Capture) error {
		_, err := io.WriteString(w, "packets")
		_, ends := ctx.Deadline()
		if ends || what != (Capture{}) {
			t.Errorf("%+v, ends %t", what, ends)
		}
		<-ctx.Done()
		close(ended)
		return err
	})
	defer stop()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "GET /v1/capture HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1000)
	var got []byte
	for !bytes.Contains(got, []byte("packets")) {
		n, err := conn.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, b[:n]...)
	}
	if !bytes.HasPrefix(got, []byte("HTTP/1.1 200 ")) || !bytes.Contains(got, []byte("Content-Type: application/x-pcapng\r\n")) {
		t.Errorf("answers %s", got)
	}
	// It ends with its reader.
	conn.Close()
	<-ended
}

// Wrong values are named.
func TestCaptureBadInput(t *testing.T) {
	socket, stop := captureDaemon(t, func(context.Context, io.Writer, Capture) error {
		t.Error("captured all the same")
		return nil
	})
	defer stop()
	d := &daemon{t: t, socket: socket}
	for query, says := range map[string]string{
		"last=x":              `last=\"x\"`,
		"last=-1":             `last=\"-1\"`,
		"last=99999999999999": "out of range",
		"last=":               "invalid syntax",
		"for=x":               "invalid duration",
		"for=-1s":             "want a time such as 30s",
		"container=a&x=1":     "there are container, pool, last and for",
		"container=%zz":       "invalid URL escape",
	} {
		if got := d.exchange("GET /v1/capture?" + query + " HTTP/1.1\r\nHost: \r\n\r\n"); got.status != http.StatusBadRequest || !strings.Contains(got.body, says) || !strings.Contains(got.body, "capture: ") {
			t.Errorf("%s: %d %s", query, got.status, got.body)
		}
	}
	if got := d.exchange("POST /v1/capture HTTP/1.1\r\nHost: \r\nContent-Length: 0\r\n\r\n"); got.status != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", got.status)
	}
}

// Neither one who waits for packets nor one who has stopped reading them holds up
// the daemon's end.
func TestCaptureStops(t *testing.T) {
	for _, full := range []bool{false, true} {
		writing := make(chan bool)
		socket, stop := captureDaemon(t, func(ctx context.Context, w io.Writer, _ Capture) error {
			_, err := io.WriteString(w, "packets")
			close(writing)
			for full && err == nil {
				_, err = w.Write(make([]byte, 1<<16))
			}
			<-ctx.Done()
			return err
		})
		in, err := OpenCapture(t.Context(), socket, Capture{}, usual)
		if err != nil {
			t.Fatal(err)
		}
		<-writing
		began := time.Now()
		if err := stop(); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("full %t: the daemon took %s to stop", full, took)
		}
		in.Close()
	}
}

func TestCaptureNotRunning(t *testing.T) {
	if _, err := OpenCapture(t.Context(), scratch(t)+"/none.sock", Capture{}, usual); !errors.Is(err, ErrNotRunning) {
		t.Errorf("error %v", err)
	}
}
