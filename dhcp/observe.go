package dhcp

import (
	"net/netip"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Observer is told how exchanges end, to be counted. Its method returns at once
// and may be called concurrently.
type Observer interface {
	// Exchanged: a message and what came of it. Message is its type in lower case
	// (discover, request, release, decline), server who was asked by address, or
	// who answered on a LAN, zero where nobody did. Outcome is offer, ack, nak,
	// silent (nobody answered), sent (no answer is awaited), refused (an offer
	// that the endpoint must not have) or failed (it could not be sent). Took is
	// from the first sending to the outcome.
	Exchanged(message string, server netip.Addr, outcome string, took time.Duration)
}

// Observe has an Observer told of every exchange. Call it before the first one.
func (c *Client) Observe(o Observer) {}

// Servers implements lease.Client.
func (c *Client) Servers(pool lease.Pool) []lease.ServerStatus { return nil }

// Ready returns nil if the links of the global settings are open and no server
// has been silent for longer than a time. Else it says what is missing. It
// sends nothing.
func (c *Client) Ready(silence time.Duration) error { return nil }
