package server

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// begin sends a call and leaves the connection open.
func (d *daemon) begin(path, body string) net.Conn {
	d.t.Helper()
	conn, err := net.Dial("unix", d.socket)
	if err != nil {
		d.t.Fatal(err)
	}
	if _, err := fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: \r\nContent-Length: %d\r\n\r\n%s", path, len(body), body); err != nil {
		d.t.Fatal(err)
	}
	return conn
}

// Every answer closes its connection and is JSON, whatever was asked.
func TestEveryAnswer(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	pool := quote(d.addPool())
	request := func(method, path, body string) string {
		return fmt.Sprintf("%s %s HTTP/1.1\r\nHost: \r\nContent-Length: %d\r\n\r\n%s", method, path, len(body), body)
	}
	huge := strings.Repeat(" ", bodyLimit+1)
	for _, c := range []struct {
		name   string
		raw    string
		status int
		key    string // that the answer must have
	}{
		{"success", request("POST", "/Plugin.Activate", ""), 200, "Implements"},
		{"refusal", request("POST", "/IpamDriver.RequestPool", `{"Pool":"192.0.2.0/31"}`), 200, "Error"},
		{"empty body", request("POST", "/IpamDriver.RequestPool", ""), 200, "Error"},
		{"empty body, RequestAddress", request("POST", "/IpamDriver.RequestAddress", ""), 200, "Error"},
		{"empty body, ReleaseAddress", request("POST", "/IpamDriver.ReleaseAddress", ""), 200, "Error"},
		{"empty body, ReleasePool", request("POST", "/IpamDriver.ReleasePool", ""), 200, "Error"},
		{"blank body", request("POST", "/IpamDriver.RequestAddress", " \r\n\t"), 200, "Error"},
		{"no Content-Length", "POST /IpamDriver.RequestAddress HTTP/1.1\r\nHost: \r\n\r\n", 200, "Error"},
		{"malformed JSON", request("POST", "/IpamDriver.RequestAddress", `{"PoolID":`), 400, "Err"},
		{"wrong type", request("POST", "/IpamDriver.RequestAddress", `{"PoolID":5}`), 400, "Err"},
		{"array", request("POST", "/IpamDriver.RequestAddress", `[]`), 400, "Err"},
		{"two objects", request("POST", "/IpamDriver.RequestAddress", `{"PoolID":`+pool+`}{}`), 400, "Err"},
		{"binary", request("POST", "/IpamDriver.RequestAddress", "\x00\xff\x01"), 400, "Err"},
		{"huge body", request("POST", "/IpamDriver.RequestAddress", huge), 400, "Err"},
		{"huge chunked body", "POST /IpamDriver.RequestAddress HTTP/1.1\r\nHost: \r\nTransfer-Encoding: chunked\r\n\r\n" + fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(huge), huge), 400, "Err"},
		{"broken chunk", "POST /IpamDriver.RequestAddress HTTP/1.1\r\nHost: \r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "Err"},
		{"wrong path", request("POST", "/IpamDriver.Nonsense", "{}"), 404, "Err"},
		{"network driver", request("POST", "/NetworkDriver.GetCapabilities", ""), 404, "Err"},
		{"root", request("GET", "/", ""), 404, "Err"},
		{"path with slashes", request("POST", "//IpamDriver.RequestPool", "{}"), 404, "Err"},
		{"path with dots", request("POST", "/x/../IpamDriver.RequestPool", "{}"), 404, "Err"},
		{"wrong method", request("GET", "/Plugin.Activate", ""), 405, "Err"},
		{"wrong method with body", request("PUT", "/IpamDriver.RequestAddress", "{}"), 405, "Err"},
		{"wrong method of leases", request("POST", "/v1/leases", "{}"), 405, "Err"},
		{"lease that isn't there", request("DELETE", "/v1/leases/192.0.2.9", ""), 404, "Err"},
		{"lease by nonsense", request("DELETE", "/v1/leases/nonsense", ""), 409, "Err"},
		{"lease by address with prefix", request("DELETE", "/v1/leases/192.0.2.9%2F24", ""), 409, "Err"},
		{"lease by nothing", request("DELETE", "/v1/leases/", ""), 409, "Err"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := d.exchange(c.raw)
			var answer map[string]any
			if err := json.Unmarshal([]byte(got.body), &answer); err != nil {
				t.Fatalf("answers %d %q: %v", got.status, got.body, err)
			}
			if text, isText := answer[c.key].(string); got.status != c.status || answer[c.key] == nil || isText && text == "" {
				t.Errorf("answers %d %s, want %d with %s", got.status, got.body, c.status, c.key)
			}
			if c.key != "Implements" && len(answer) != 1 {
				t.Errorf("answers %s: want %s only", got.body, c.key)
			}
			if !got.closes {
				t.Error("no Connection: close: an idle one that broke would cut the engine's next body")
			}
			if got.header.Get("Content-Type") != accept {
				t.Errorf("Content-Type: %q", got.header.Get("Content-Type"))
			}
		})
	}
	if len(d.client.asked()) != 0 || len(d.client.leased()) != 0 {
		t.Errorf("leased %v", d.client.leased())
	}
}

// The Host line of engines before 20.10.26 is empty; later ones and curl send
// something. None may be missing by HTTP's own rules, which is not ours.
func TestHostHeader(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	for _, host := range []string{"Host:\r\n", "Host: \r\n", "Host: docker\r\n", "Host: %2Frun%2Fdocker%2Fplugins%2Ftalkingdata.sock\r\n"} {
		got := d.exchange("POST /Plugin.Activate HTTP/1.1\r\n" + host + "Content-Length: 0\r\n\r\n")
		if got.status != http.StatusOK || got.body != `{"Implements":["IpamDriver"]}` {
			t.Errorf("%q: answers %d %s", host, got.status, got.body)
		}
	}
}

// What comes behind a request on its connection is not served: the engine
// finds it closed and opens another.
func TestOneRequestAConnection(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	conn, err := net.Dial("unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	call := "POST /Plugin.Activate HTTP/1.1\r\nHost: \r\nContent-Length: 0\r\n\r\n"
	if _, err := io.WriteString(conn, call+call); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	all, err := io.ReadAll(conn)
	if n := strings.Count(string(all), "HTTP/1.1 200"); n != 1 {
		t.Errorf("%d answers, %v", n, err)
	}
}

// The end of the daemon: what is in hand is answered, new callers are not let
// in, and the socket is gone.
func TestShutdown(t *testing.T) {
	d := startDaemon(t, fakeStore{}, usual)
	pool := d.addPool()
	began, proceed := make(chan bool), make(chan bool)
	d.client.acquire = func(ctx context.Context, req lease.Request) (lease.Lease, error) {
		began <- true
		<-proceed
		if err := ctx.Err(); err != nil {
			return lease.Lease{}, err
		}
		return d.client.grant(req)
	}
	conn := d.begin("/IpamDriver.RequestAddress", endpoint(pool, "", "02:42:ab:75:9f:69", ""))
	defer conn.Close()
	<-began
	stopped := make(chan error, 1)
	go func() { stopped <- d.stop() }()
	for deadline := time.Now().Add(10 * time.Second); ; {
		other, err := net.Dial("unix", d.socket)
		if err != nil {
			break
		}
		other.Close()
		if time.Now().After(deadline) {
			t.Fatal("new callers are still let in")
		}
	}
	select {
	case err := <-stopped:
		t.Fatalf("stopped with a request in hand: %v", err)
	default:
	}
	close(proceed)
	answer, err := io.ReadAll(conn)
	if err != nil || !strings.Contains(string(answer), `{"Address":"192.0.2.100/24","Data":null}`) {
		t.Errorf("the request in hand was answered %q, %v", answer, err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if got := d.client.leased(); len(got) != 1 {
		t.Errorf("leased %v: stopping releases nothing", got)
	}
}

// A request that doesn't end in time is cut off, and that is told.
func TestShutdownGrace(t *testing.T) {
	d := startDaemon(t, fakeStore{}, 10*time.Millisecond)
	pool := d.addPool()
	began, ended := make(chan bool), make(chan bool)
	d.client.acquire = func(ctx context.Context, _ lease.Request) (lease.Lease, error) {
		began <- true
		<-ctx.Done()
		close(ended)
		return lease.Lease{}, ctx.Err()
	}
	conn := d.begin("/IpamDriver.RequestAddress", endpoint(pool, "", "02:42:ab:75:9f:69", ""))
	defer conn.Close()
	<-began
	if err := d.stop(); err == nil || !strings.Contains(err.Error(), "finish requests in hand") {
		t.Errorf("error %v", err)
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the request goes on")
	}
}
