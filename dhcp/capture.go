package dhcp

import (
	"context"
	"io"
)

// Capture is what is to be written of a client's packets.
type Capture struct {
	// Container is the name or MAC whose packets are wanted, "" for all.
	Container string
	// Pool is the ID or the subnet of the pool whose packets are wanted, ""
	// for all.
	Pool string
	// Last is how many of the remembered packets come first, at most.
	Last int
}

// Capture writes packets as they are sent and received, each at once, in pcapng,
// until ctx ends.
func (c *Client) Capture(ctx context.Context, w io.Writer, what Capture) error { return nil }
