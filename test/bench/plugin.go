package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// plugin calls the daemon over its socket with the bytes that an engine sends,
// a new connection for each call, but without net/http's client: the goroutines
// that it starts for each connection would be measured too.
type plugin struct{ socket string }

func newPlugin(socket string) plugin { return plugin{socket} }

// call posts a request and reads its answer, whose Error becomes an error. The
// time is what an engine waits: from connecting to the answer's last byte.
func (p plugin) call(method string, in, out any) (time.Duration, error) {
	body, err := json.Marshal(in)
	if err != nil {
		return 0, err
	}
	request := fmt.Appendf(nil, "POST /IpamDriver.%s HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: %d\r\n"+
		"Accept: application/vnd.docker.plugins.v1.2+json\r\n\r\n%s", method, len(body), body)
	began := time.Now()
	answer, err := p.exchange(request)
	took := time.Since(began)
	if err != nil {
		return took, fmt.Errorf("%s: %w", method, err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(answer)), nil)
	if err != nil {
		return took, fmt.Errorf("%s: %w", method, err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return took, fmt.Errorf("%s: %w", method, err)
	}
	var failed struct{ Error, Err string }
	if err := json.Unmarshal(raw, &failed); err == nil && failed.Error+failed.Err != "" {
		return took, fmt.Errorf("%s: %s", method, failed.Error+failed.Err)
	}
	return took, json.Unmarshal(raw, out)
}

// exchange sends bytes over a new connection and reads until it is closed.
func (p plugin) exchange(request []byte) ([]byte, error) {
	conn, err := net.Dial("unix", p.socket)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if _, err := conn.Write(request); err != nil {
		return nil, err
	}
	return io.ReadAll(conn)
}

func (p plugin) capabilities() (time.Duration, error) {
	return p.call("GetCapabilities", struct{}{}, &struct{}{})
}

func (p plugin) requestPool(subnet string) (id string, err error) {
	var out struct{ PoolID string }
	_, err = p.call("RequestPool", map[string]any{"Pool": subnet}, &out)
	return out.PoolID, err
}

func (p plugin) requestAddress(pool string, n int) (address string, took time.Duration, err error) {
	var out struct{ Address string }
	took, err = p.call("RequestAddress", map[string]any{
		"PoolID": pool, "Address": "",
		"Options": map[string]string{
			"com.docker.network.endpoint.macaddress": macOf(n).String(),
			"com.docker.network.endpoint.name":       fmt.Sprintf("bench-%d", n),
		},
	}, &out)
	// The answer comes with a prefix length, the release goes without.
	address, _, _ = strings.Cut(out.Address, "/")
	return address, took, err
}

func (p plugin) releaseAddress(pool, address string) (time.Duration, error) {
	return p.call("ReleaseAddress", map[string]any{"PoolID": pool, "Address": address}, &struct{}{})
}
