package arp

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

var broadcast = lease.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// message is what counts in an ARP packet between Ethernet and IPv4 (RFC 826).
type message struct {
	reply    bool // or a request
	sender   lease.MAC
	senderIP netip.Addr
	targetIP netip.Addr
}

// parse reads an Ethernet frame. It refuses what isn't an ARP request or reply
// about IPv4 addresses. Nothing that it returns is part of the frame.
func parse(frame []byte) (message, error) {
	var ethernet layers.Ethernet
	if err := ethernet.DecodeFromBytes(frame, gopacket.NilDecodeFeedback); err != nil {
		return message{}, err
	}
	if ethernet.EthernetType != layers.EthernetTypeARP {
		return message{}, fmt.Errorf("type %s is not ARP", ethernet.EthernetType)
	}
	var arp layers.ARP
	if err := arp.DecodeFromBytes(ethernet.Payload, gopacket.NilDecodeFeedback); err != nil {
		return message{}, err
	}
	switch {
	case arp.AddrType != layers.LinkTypeEthernet || arp.HwAddressSize != 6:
		return message{}, errors.New("not about Ethernet addresses")
	case arp.Protocol != layers.EthernetTypeIPv4 || arp.ProtAddressSize != 4:
		return message{}, errors.New("not about IPv4 addresses")
	case arp.Operation != layers.ARPRequest && arp.Operation != layers.ARPReply:
		// Reverse and inverse ARP have the same form.
		return message{}, fmt.Errorf("operation %d is neither request nor reply", arp.Operation)
	}
	return message{
		reply:    arp.Operation == layers.ARPReply,
		sender:   lease.MAC(arp.SourceHwAddress),
		senderIP: netip.AddrFrom4([4]byte(arp.SourceProtAddress)),
		targetIP: netip.AddrFrom4([4]byte(arp.DstProtAddress)),
	}, nil
}

// probe makes the Ethernet frame of an ARP Probe (RFC 5227 section 2.1.1): a
// broadcast request for the address, from no address, so that it changes
// nobody's ARP cache.
func probe(from lease.MAC, addr netip.Addr) ([]byte, error) {
	buffer := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(buffer, gopacket.SerializeOptions{FixLengths: true},
		&layers.Ethernet{SrcMAC: from[:], DstMAC: broadcast[:], EthernetType: layers.EthernetTypeARP},
		&layers.ARP{
			AddrType:          layers.LinkTypeEthernet,
			Protocol:          layers.EthernetTypeIPv4,
			Operation:         layers.ARPRequest,
			SourceHwAddress:   from[:],
			SourceProtAddress: make([]byte, 4),
			DstHwAddress:      make([]byte, 6),
			DstProtAddress:    addr.AsSlice(),
		})
	return buffer.Bytes(), err
}

// conflicts reports whether a message tells that somebody else uses an address
// or is about to (RFC 5227 section 2.1.1). The MACs are this host's: another
// probe of ours for the same address is no conflict.
func (m message) conflicts(addr netip.Addr, ours map[lease.MAC]bool) bool {
	if m.senderIP == addr {
		return true
	}
	isProbe := !m.reply && m.senderIP.IsUnspecified()
	return isProbe && m.targetIP == addr && !ours[m.sender]
}
