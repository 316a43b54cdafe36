package engine

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/moby/client"
	"github.com/moby/moby/client/pkg/versions"
)

// Version is what an engine is and can do.
type Version struct {
	Engine string // its own version, any word where somebody built it himself
	API    string // the newest that it speaks, such as "1.52"
	// Names: it tells IPAM drivers the containers' names (29 and later).
	Names bool
	// LearnsSubnets: it takes a subnet that its IPAM driver has learned also
	// where the host has a route to it (27 and later).
	LearnsSubnets bool
	// Rootless: it has a network namespace of its own. Desktop: it runs in a
	// virtual machine of Docker Desktop's.
	Rootless, Desktop bool
}

// learnsSince is the API version of engine 27.0.
const learnsSince = "1.46"

// Version asks the engine what it is. What it can do is told by its API's
// version.
func (e *Engine) Version(ctx context.Context) (Version, error) {
	c, err := e.connect(ctx)
	if err != nil {
		return Version{}, err
	}
	defer c.Close()
	version, err := c.ServerVersion(ctx, client.ServerVersionOptions{})
	if err != nil {
		return Version{}, fmt.Errorf("ask the engine for its version: %w", err)
	}
	about, err := c.Info(ctx, client.InfoOptions{})
	if err != nil {
		return Version{}, fmt.Errorf("ask the engine about its host: %w", err)
	}
	since := func(api string) bool { return versions.GreaterThanOrEqualTo(version.APIVersion, api) }
	return Version{
		Engine: version.Version, API: version.APIVersion,
		Names: since(namesSince), LearnsSubnets: since(learnsSince),
		Rootless: slices.ContainsFunc(about.Info.SecurityOptions, func(o string) bool {
			return o == "rootless" || strings.HasPrefix(o, "name=rootless")
		}),
		Desktop: strings.Contains(about.Info.OperatingSystem, "Docker Desktop"),
	}, nil
}
