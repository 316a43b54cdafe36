package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
)

// Plugin speaks for an engine on a plugin's socket, each call on a connection of
// its own: failures and load come by the hundred when no engine starts
// containers for them. It may be used concurrently.
type Plugin struct{ client *http.Client }

// NewPlugin speaks on the socket of a path.
func NewPlugin(socket string) Plugin { return Plugin{unixClient(socket)} }

// ErrRefused is an answer that is an error, unlike a connection that broke.
var ErrRefused = errors.New("the plugin says")

// Call posts a request as the engine does and reads its answer.
func (p Plugin) Call(ctx context.Context, method string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://plugin/IpamDriver."+method, bytes.NewReader(body))
	if err != nil {
		return err
	}
	response, err := p.client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	var failed struct{ Error, Err string }
	if err := json.Unmarshal(answer, &failed); err != nil {
		return fmt.Errorf("%s: %s: %q: %w", method, response.Status, answer, err)
	}
	if failed.Error+failed.Err != "" {
		return fmt.Errorf("%s: %w: %s", method, ErrRefused, failed.Error+failed.Err)
	}
	return json.Unmarshal(answer, out)
}

// RequestPool is `docker network create`.
func (p Plugin) RequestPool(ctx context.Context, subnet string, options map[string]string) (id string, err error) {
	var out struct{ PoolID string }
	err = p.Call(ctx, "RequestPool", map[string]any{"Pool": subnet, "Options": options}, &out)
	return out.PoolID, err
}

// RequestAddress is the start of a container without a name.
func (p Plugin) RequestAddress(ctx context.Context, pool, mac string) (netip.Addr, error) {
	var out struct{ Address string }
	err := p.Call(ctx, "RequestAddress", map[string]any{
		"PoolID": pool, "Options": map[string]string{"com.docker.network.endpoint.macaddress": mac},
	}, &out)
	if err != nil {
		return netip.Addr{}, err
	}
	prefix, err := netip.ParsePrefix(out.Address)
	return prefix.Addr(), err
}

// ScatteredMAC is one of many MACs, as far apart as an engine's.
func ScatteredMAC(n int) string {
	mac := binary.BigEndian.AppendUint64(nil, uint64(n)*0x9e3779b97f4a7c15)[:6]
	mac[0] = mac[0]&^0x01 | 0x02
	return net.HardwareAddr(mac).String()
}
