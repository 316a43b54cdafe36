// Package engine asks a Docker engine about its networks and their containers,
// and has it stop and restart them, over the engine's own API.
//
// The API's version is negotiated anew for each call, from 1.40 (engine 19.03)
// to what the client library knows: an engine may be exchanged while we run.
//
// Nothing here may be called while the engine waits for an answer of this
// driver's: it holds locks then, and would wait for itself.
package engine

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Engine is the Docker engine of this host.
type Engine struct {
	host    string // unix:///PATH
	drivers []lease.Driver
}

var _ lease.Engine = (*Engine)(nil)

// wayOut is what the user can do about an address that is of no use.
const wayOut = "name the engine's socket with --docker (DOCKER in the configuration), such as unix:///var/run/docker.sock"

// New returns the engine behind a unix socket, "unix://" and an absolute path,
// to which we are these IPAM drivers. It isn't asked anything yet: it may well
// start after us. Other addresses are refused, since an IPAM driver serves the
// engine of its own host.
func New(host string, drivers ...lease.Driver) (*Engine, error) {
	path, ok := strings.CutPrefix(host, "unix://")
	if !ok || !filepath.IsAbs(path) {
		return nil, fmt.Errorf("engine address %q: not the absolute path of a unix socket after unix://: %s", host, wayOut)
	}
	e := &Engine{host: host, drivers: drivers}
	c, err := e.client()
	if err != nil {
		return nil, err
	}
	return e, c.Close()
}

func (e *Engine) client() (*client.Client, error) {
	// Not the environment's DOCKER_HOST and the like: they are the user's.
	c, err := client.New(client.WithHost(e.host))
	if err != nil {
		return nil, fmt.Errorf("engine address %q: %w: %s", e.host, err, wayOut)
	}
	return c, nil
}

// connect makes sure that an engine answers that we can talk to.
func (e *Engine) connect(ctx context.Context) (*client.Client, error) {
	c, err := e.client()
	if err != nil {
		return nil, err
	}
	ping, err := c.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true})
	switch {
	case client.IsErrConnectionFailed(err):
		err = fmt.Errorf("%w: start the engine and run this as root, or %s", err, wayOut)
	case err != nil && ping.APIVersion != "":
		// The only other reason to fail after an answer.
		err = fmt.Errorf("the Docker engine at %s is too old: it speaks API %s, and %s (engine 19.03) is the least: upgrade it, or %s", e.host, ping.APIVersion, client.MinAPIVersion, wayOut)
	case err != nil:
		err = fmt.Errorf("ask the Docker engine at %s for its version: %w", e.host, err)
	case ping.APIVersion == "":
		err = fmt.Errorf("what answers at %s is no Docker engine: %s", e.host, wayOut)
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// Stop stops the container that has a lease's address: gracefully, with the
// container's own signal and time (10 seconds unless it sets another), which
// ctx has to outlast. Restart policies don't start it again.
func (e *Engine) Stop(ctx context.Context, l lease.Lease) error {
	return e.act(ctx, "stop", l, func(c *client.Client, id string) error {
		_, err := c.ContainerStop(ctx, id, client.ContainerStopOptions{})
		return err
	})
}

// Restart is Stop and a start. At that the engine asks its IPAM driver for an
// address before Restart returns.
func (e *Engine) Restart(ctx context.Context, l lease.Lease) error {
	return e.act(ctx, "restart", l, func(c *client.Client, id string) error {
		_, err := c.ContainerRestart(ctx, id, client.ContainerRestartOptions{})
		return err
	})
}

// act does something to the container that has a lease's address.
func (e *Engine) act(ctx context.Context, what string, l lease.Lease, do func(c *client.Client, id string) error) error {
	c, err := e.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	id, err := e.find(ctx, c, l)
	if err == nil {
		err = do(c, id)
	}
	if err != nil {
		return fmt.Errorf("%s the container of %s: %w", what, l.Addr(), err)
	}
	return nil
}

// find returns the ID of the running container that has a lease's address and
// MAC. Where the lease knows its container, it must be that one, and still have
// both: it may have been started anew since, with a good lease. Never by its
// name, which may meanwhile be another's.
func (e *Engine) find(ctx context.Context, c *client.Client, l lease.Lease) (string, error) {
	running, err := c.ContainerList(ctx, client.ContainerListOptions{})
	if err != nil {
		return "", fmt.Errorf("list running containers: %w", err)
	}
	var ids []string
	for _, container := range running.Items {
		if container.NetworkSettings == nil || l.Container != "" && container.ID != l.Container {
			continue
		}
		for _, endpoint := range container.NetworkSettings.Networks {
			if endpoint == nil || endpoint.IPAddress != l.Addr() {
				continue
			}
			if has, err := e.has(ctx, c, endpoint, l); err != nil {
				return "", err
			} else if has {
				ids = append(ids, container.ID)
			}
		}
	}
	what := fmt.Sprintf("address %s and MAC %s", l.Addr(), l.MAC)
	if l.MAC == (lease.MAC{}) {
		what = fmt.Sprintf("address %s in the network of its lease", l.Addr())
	}
	switch {
	case len(ids) == 1:
		return ids[0], nil
	case len(ids) > 1:
		return "", fmt.Errorf("%d running containers have %s", len(ids), what)
	case l.Container != "":
		return "", fmt.Errorf("container %s doesn't run, or no longer has %s", l.Container, what)
	}
	return "", fmt.Errorf("no running container has %s", what)
}

// has reports whether a lease is of an endpoint that has its address: by the
// MAC, or without one by the network.
func (e *Engine) has(ctx context.Context, c *client.Client, endpoint *network.EndpointSettings, l lease.Lease) (bool, error) {
	if l.MAC != (lease.MAC{}) {
		return slices.Equal(endpoint.MacAddress, l.MAC[:]), nil
	}
	networks, err := e.inspect(ctx, c, endpoint.NetworkID)
	return slices.ContainsFunc(networks, func(n lease.Network) bool { return n.MayHave(l) }), err
}
