package arp

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

var (
	probed = netip.MustParseAddr("10.10.0.101")
	other  = netip.MustParseAddr("10.10.0.102")
	none   = netip.IPv4Unspecified()

	ourMAC    = lease.MAC{0x02, 0, 0, 0, 0, 1}
	secondMAC = lease.MAC{0x02, 0, 0, 0, 0, 2} // of another interface of this host
	theirMAC  = lease.MAC{0x02, 0, 0, 0, 0, 9}
	ours      = map[lease.MAC]bool{ourMAC: true, secondMAC: true}
)

// frame makes an ARP frame byte by byte.
func frame(op byte, sender lease.MAC, senderIP, targetIP netip.Addr) []byte {
	return slices.Concat(
		broadcast[:], sender[:], []byte{0x08, 0x06},
		[]byte{0, 1, 0x08, 0, 6, 4, 0, op},
		sender[:], senderIP.AsSlice(), make([]byte, 6), targetIP.AsSlice(),
		make([]byte, 18), // to the 60 bytes of Ethernet
	)
}

const (
	request = 1
	reply   = 2
)

func TestConflicts(t *testing.T) {
	for _, test := range []struct {
		name  string
		frame []byte
		want  bool
	}{
		{"its user answers", frame(reply, theirMAC, probed, none), true},
		{"its user asks for another", frame(request, theirMAC, probed, other), true},
		{"its user announces it", frame(request, theirMAC, probed, probed), true},
		{"its user announces it by a reply", frame(reply, theirMAC, probed, probed), true},
		{"this host itself uses it", frame(request, ourMAC, probed, other), true},
		{"somebody else probes it", frame(request, theirMAC, none, probed), true},
		{"we probe it too", frame(request, ourMAC, none, probed), false},
		{"we probe it on another interface", frame(request, secondMAC, none, probed), false},
		{"somebody wants to reach it", frame(request, theirMAC, other, probed), false},
		{"somebody tells its would-be user", frame(reply, theirMAC, other, probed), false},
		{"somebody else probes another", frame(request, theirMAC, none, other), false},
		{"a reply from no address", frame(reply, theirMAC, none, probed), false},
		{"others talk", frame(reply, theirMAC, other, none), false},
	} {
		m, err := parse(test.frame)
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
		} else if got := m.conflicts(probed, ours); got != test.want {
			t.Errorf("%s: %t", test.name, got)
		}
	}
}

func TestParse(t *testing.T) {
	good := frame(reply, theirMAC, probed, other)
	want := message{reply: true, sender: theirMAC, senderIP: probed, targetIP: other}
	for _, length := range []int{len(good), 42} {
		if m, err := parse(good[:length]); err != nil || m != want {
			t.Errorf("%d bytes: got %v, %v", length, m, err)
		}
	}
	for length := range 42 {
		if m, err := parse(good[:length]); err == nil {
			t.Errorf("cut to %d bytes: got %v", length, m)
		}
	}
	for _, test := range []struct {
		name  string
		at    int
		value byte
		says  string
	}{
		{"IPv4", 13, 0x00, "not ARP"},
		{"length instead of a type", 12, 0x00, "not ARP"},
		{"hardware type", 15, 6, "Ethernet"},
		{"hardware address length", 18, 8, ""},
		{"shorter hardware address", 18, 4, "Ethernet"},
		{"protocol", 17, 0x01, "IPv4"},
		{"protocol address length", 19, 3, "IPv4"},
		{"no operation", 21, 0, "operation 0"},
		{"reverse ARP's operation", 21, 3, "operation 3"},
		{"high byte of the operation", 20, 1, "operation 258"},
	} {
		bad := slices.Clone(good)
		bad[test.at] = test.value
		if m, err := parse(bad); err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: got %v, %v", test.name, m, err)
		}
	}
}

// The bytes are what other hosts get.
func TestProbe(t *testing.T) {
	const want = "ffffffffffff020000000001" + "0806" + // Ethernet
		"0001080006040001" + // request
		"020000000001" + "00000000" + // sender: our MAC, no address
		"000000000000" + "0a0a0065" // target
	got, err := probe(ourMAC, probed)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(hex.EncodeToString(got), want) || len(got) != 60 {
		t.Errorf("got %x", got)
	}
}

// FuzzParse: whatever comes, nothing panics, and what is understood says no
// more than what the frame has.
func FuzzParse(f *testing.F) {
	for _, op := range []byte{0, request, reply, 8} {
		f.Add(frame(op, theirMAC, probed, other))
		f.Add(frame(op, theirMAC, none, probed)[:42])
	}
	f.Add(slices.Concat(broadcast[:], theirMAC[:], []byte{0x81, 0, 0, 5, 0x08, 0x06}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, in []byte) {
		before := slices.Clone(in)
		m, err := parse(in)
		if !bytes.Equal(in, before) {
			t.Fatalf("%x changed to %x", before, in)
		}
		if err != nil {
			if m != (message{}) {
				t.Fatalf("%x: %v, and yet %v", in, err, m)
			}
			return
		}
		op := byte(request)
		if m.reply {
			op = reply
		}
		want := frame(op, m.sender, m.senderIP, m.targetIP)
		// The Ethernet header and the target's hardware address don't count.
		if !bytes.Equal(in[12:32], want[12:32]) || !bytes.Equal(in[38:42], want[38:42]) {
			t.Fatalf("%x was read as %v", in, m)
		}
	})
}
