package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/krolaw/dhcp4"
)

// rawClient takes leases over one bare socket, with nothing kept: what the
// network and the server cost by themselves.
type rawClient struct {
	conn   net.PacketConn
	relay  netip.Addr
	server netip.AddrPort

	// mu guards waiting.
	mu      sync.Mutex
	waiting map[uint32]chan dhcp4.Packet
}

// newRawClient binds port 67 of a relay address in the current namespace.
func newRawClient(relay netip.Addr, server netip.AddrPort) (*rawClient, error) {
	conn, err := net.ListenPacket("udp4", netip.AddrPortFrom(relay, 67).String())
	if err != nil {
		return nil, err
	}
	c := &rawClient{conn: conn, relay: relay, server: server, waiting: map[uint32]chan dhcp4.Packet{}}
	go c.read()
	return c, nil
}

func (c *rawClient) read() {
	buf := make([]byte, 1500)
	for {
		n, _, err := c.conn.ReadFrom(buf)
		if err != nil {
			return
		}
		if n < 240 {
			continue
		}
		p := dhcp4.Packet(bytes.Clone(buf[:n]))
		c.mu.Lock()
		to := c.waiting[binary.BigEndian.Uint32(p.XId())]
		c.mu.Unlock()
		if to != nil {
			to <- p
		}
	}
}

// answerTime is far above any answer of a server that is there.
const answerTime = 5 * time.Second

// acquire runs DISCOVER to ACK for a client.
func (c *rawClient) acquire(n int) error {
	mac := macOf(n)
	answers := make(chan dhcp4.Packet, 4)
	xid := uint32(n)
	c.mu.Lock()
	c.waiting[xid] = answers
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiting, xid)
		c.mu.Unlock()
	}()
	// The daemon's own options, so that the server does the same work.
	options := []dhcp4.Option{
		{Code: dhcp4.OptionClientIdentifier, Value: append([]byte{1}, mac...)},
		{Code: dhcp4.OptionMaximumDHCPMessageSize, Value: []byte{0x05, 0xdc}},
		{Code: dhcp4.OptionHostName, Value: fmt.Appendf(nil, "bench-%d", n)},
		{Code: dhcp4.OptionParameterRequestList, Value: []byte{1, 3, 6, 15, 26, 42, 51, 54, 58, 59, 119, 121}},
	}
	offer, err := c.ask(xid, mac, answers, dhcp4.Discover, options)
	if err != nil {
		return err
	}
	_, err = c.ask(xid, mac, answers, dhcp4.Request, append(options,
		dhcp4.Option{Code: dhcp4.OptionRequestedIPAddress, Value: offer.YIAddr()},
		dhcp4.Option{Code: dhcp4.OptionServerIdentifier, Value: offer.ParseOptions()[dhcp4.OptionServerIdentifier]},
	))
	return err
}

func (c *rawClient) ask(xid uint32, mac net.HardwareAddr, answers <-chan dhcp4.Packet, kind dhcp4.MessageType, options []dhcp4.Option) (dhcp4.Packet, error) {
	p := dhcp4.RequestPacket(kind, mac, nil, binary.BigEndian.AppendUint32(nil, xid), false, options)
	p.SetGIAddr(c.relay.AsSlice())
	if _, err := c.conn.WriteTo(p, net.UDPAddrFromAddrPort(c.server)); err != nil {
		return nil, err
	}
	select {
	case answer := <-answers:
		if kind := answer.ParseOptions()[dhcp4.OptionDHCPMessageType]; len(kind) != 1 || dhcp4.MessageType(kind[0]) == dhcp4.NAK {
			return nil, errors.New("the server refused")
		}
		return answer, nil
	case <-time.After(answerTime):
		return nil, fmt.Errorf("no answer to %s within %s", kind, answerTime)
	}
}

// macOf scatters MAC addresses, as Docker does: some servers choose addresses
// by a hash of them.
func macOf(n int) net.HardwareAddr {
	mac := binary.BigEndian.AppendUint64(nil, uint64(n)*0x9e3779b97f4a7c15)[:6]
	mac[0] = mac[0]&^0x01 | 0x02
	return mac
}
