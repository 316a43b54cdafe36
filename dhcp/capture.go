package dhcp

import (
	"cmp"
	"context"
	"io"
	"net/netip"
	"slices"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Capture is what is to be written of a client's packets.
type Capture struct {
	// Container is the name or MAC whose packets are wanted, "" for all. A name
	// that nobody has is no error: its container may be yet to start.
	Container string
	// Pool is the ID or the subnet of the pool whose packets are wanted, ""
	// for all.
	Pool string
	// Last is how many of the remembered packets come first, at most: of all
	// packets the last 1000 are remembered, and no more than 1 MiB.
	Last int
}

// captureBatch is how many packets are copied at once while the recorder is
// locked.
const captureBatch = 64

// Capture writes packets in pcapng: what is remembered, then what is sent and
// received, each at once, until ctx ends. What is remembered is also written
// when it has ended already. It returns the error of w, if any.
//
// Frames of an interface are as they were on the wire. What a relay address's
// socket sent and received has no headers: those of IP and UDP are made anew.
// Comments tell the container, the pool, and why a packet was dropped or
// couldn't be sent. Of what others say on an interface's LAN there are only the
// answers to what this client has sent.
//
// Exchanges never wait for w: what it is too slow for is lost, and counted in
// the statistics of the first interface.
func (c *Client) Capture(ctx context.Context, w io.Writer, what Capture) error {
	match := what.matcher()
	next, remembered := c.recorder.back(what.Last, match)
	out, err := newPcapng(w, c.places())
	if err != nil {
		return err
	}
	batch := make([]record, captureBatch)
	for {
		got, first, changed := c.recorder.read(next, batch)
		if lost := first - next; lost > 0 {
			if err := out.lose(lost); err != nil {
				return err
			}
		}
		for i := range got {
			if !match(&got[i]) {
				continue
			}
			if err := out.packet(&got[i]); err != nil {
				return err
			}
		}
		if err := out.Flush(); err != nil {
			return err
		}
		next = first + uint64(len(got))
		var ended <-chan struct{}
		if next >= remembered {
			ended = ctx.Done()
			if ctx.Err() != nil {
				return nil
			}
		}
		if len(got) > 0 {
			continue
		}
		select {
		case <-changed:
		case <-ended:
		}
	}
}

// matcher reports whether a packet is wanted.
func (what Capture) matcher() func(*record) bool {
	mac, err := lease.ParseMAC(what.Container)
	byMAC := err == nil
	subnet, err := netip.ParsePrefix(what.Pool)
	bySubnet := err == nil
	subnet = subnet.Masked()
	return func(r *record) bool {
		return (what.Container == "" || r.name == what.Container || byMAC && r.key.mac == mac) &&
			(what.Pool == "" || r.pool == what.Pool || bySubnet && r.subnet == subnet)
	}
}

// places are where there are links, in order.
func (c *Client) places() (places []place) {
	for _, l := range c.all() {
		places = append(places, l.place)
	}
	slices.SortFunc(places, func(a, b place) int {
		return cmp.Or(cmp.Compare(a.iface, b.iface), a.relay.Compare(b.relay))
	})
	return places
}
