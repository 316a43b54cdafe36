package dhcp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/krolaw/dhcp4"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// asked is the message that the replies of this file answer.
var asked = packet{xid: 0x01020304, giaddr: relay1, chaddr: [16]byte(append(mac1[:], make([]byte, 10)...))}

var leasedAddr = ip("10.10.0.100")

func goodOffer(extra ...option) []byte {
	return grant(asked, offer, server1.Addr(), leasedAddr, extra...)
}

// with changes one byte.
func with(b []byte, at int, value byte) []byte {
	b = slices.Clone(b)
	b[at] = value
	return b
}

// plain is a reply of just these options, with or without an end.
func plain(options ...option) []byte { return answer{asked, leasedAddr, options}.bytes() }

// hostile packets and the reason for which each is dropped.
func hostilePackets() map[string]struct {
	data []byte
	want error
} {
	type hostile = struct {
		data []byte
		want error
	}
	offered := func(addr string) []byte { return grant(asked, offer, server1.Addr(), ip(addr)) }
	kind, id, hour := opt(53, offer), addrOpt(54, "10.10.0.1"), timeOpt(51, 3600)
	ackKind := opt(53, ack)
	good := goodOffer()
	foreign := asked
	foreign.giaddr = ip("10.10.0.3")
	otherXID := asked
	otherXID.xid++
	otherMAC := asked
	otherMAC.chaddr[5]++
	noRelay := asked
	noRelay.giaddr = netip.IPv4Unspecified()
	return map[string]hostile{
		"nothing":                      {nil, errShort},
		"one byte":                     {good[:1], errShort},
		"half of the fixed part":       {good[:120], errShort},
		"fixed part without cookie":    {good[:236], errShort},
		"cookie cut":                   {good[:239], errShort},
		"BOOTREQUEST":                  {with(good, 0, 1), errOp},
		"op 0":                         {with(good, 0, 0), errOp},
		"op 255":                       {with(good, 0, 255), errOp},
		"htype of token ring":          {with(good, 1, 6), errHardware},
		"hlen 0":                       {with(good, 2, 0), errHardware},
		"hlen 5":                       {with(good, 2, 5), errHardware},
		"hlen 16":                      {with(good, 2, 16), errHardware},
		"hlen 255":                     {with(good, 2, 255), errHardware},
		"cookie wrong":                 {with(good, 239, 0), errCookie},
		"BOOTP without cookie":         {withoutCookie(good, 300), errCookie},
		"option code without length":   {append(good[:len(good)-1:len(good)-1], 60), errCut},
		"option longer than packet":    {append(good[:len(good)-1:len(good)-1], 60, 4, 1, 2, 3), errCut},
		"overlong option 255":          {append(good[:len(good)-1:len(good)-1], 60, 255, 1), errCut},
		"cut option in file":           {fields(overloaded(1), 108, opt(60, 1, 2, 3), 127), errCut},
		"cut option in sname":          {fields(overloaded(2), 44, opt(60, 1, 2, 3), 63), errCut},
		"no options":                   {good[:240], errType},
		"only pads":                    {append(good[:240:240], make([]byte, 60)...), errType},
		"end at once":                  {append(good[:240:240], 255), errType},
		"type after the end":           {append(append(good[:240:240], 255), good[240:]...), errType},
		"no type":                      {plain(id, hour), errType},
		"empty type":                   {plain(opt(53), id, hour), errType},
		"long type":                    {plain(opt(53, offer, offer), id, hour), errType},
		"type twice":                   {plain(kind, ackKind, id, hour), errType},
		"type DISCOVER":                {plain(opt(53, discover), id, hour), errType},
		"type REQUEST":                 {plain(opt(53, request), id, hour), errType},
		"type DECLINE":                 {plain(opt(53, decline), id, hour), errType},
		"type RELEASE":                 {plain(opt(53, release), id, hour), errType},
		"type INFORM":                  {plain(opt(53, 8), id, hour), errType},
		"type FORCERENEW":              {plain(opt(53, 9), id, hour), errType},
		"type 0":                       {plain(opt(53, 0), id, hour), errType},
		"OFFER without server":         {plain(kind, hour), errServer},
		"ACK without server":           {plain(ackKind, hour), errServer},
		"server of zero bytes":         {plain(kind, hour, opt(54)), errServer},
		"server of three bytes":        {plain(kind, hour, opt(54, 10, 10, 0)), errServer},
		"server 0":                     {plain(kind, hour, addrOpt(54, "0.0.0.0")), errServer},
		"server broadcast":             {plain(kind, hour, addrOpt(54, "255.255.255.255")), errServer},
		"server multicast":             {plain(kind, hour, addrOpt(54, "224.0.0.1")), errServer},
		"yiaddr 0":                     {offered("0.0.0.0"), errAddress},
		"yiaddr broadcast":             {offered("255.255.255.255"), errAddress},
		"yiaddr multicast":             {offered("224.0.0.1"), errAddress},
		"yiaddr last multicast":        {offered("239.255.255.255"), errAddress},
		"yiaddr class E":               {offered("240.0.0.1"), errAddress},
		"ACK of yiaddr 0":              {grant(asked, ack, server1.Addr(), ip("0.0.0.0")), errAddress},
		"no lease time":                {plain(kind, id), errTime},
		"ACK without lease time":       {plain(ackKind, id), errTime},
		"lease time 0":                 {plain(kind, id, timeOpt(51, 0)), errTime},
		"lease time of three bytes":    {plain(kind, id, opt(51, 0, 0, 1)), errTime},
		"lease time of five bytes":     {plain(kind, id, opt(51, 0, 0, 1, 0, 0)), errTime},
		"lease time of zero bytes":     {plain(kind, id, opt(51)), errTime},
		"giaddr of another relay":      {grant(foreign, offer, server1.Addr(), leasedAddr), errRelay},
		"no giaddr":                    {grant(noRelay, offer, server1.Addr(), leasedAddr), errRelay},
		"NAK with another giaddr":      {refuse(foreign, server1.Addr()), errRelay},
		"xid of nobody":                {grant(otherXID, offer, server1.Addr(), leasedAddr), errForeign},
		"chaddr of nobody":             {grant(otherMAC, offer, server1.Addr(), leasedAddr), errForeign},
		"NAK with xid of nobody":       {refuse(otherXID, server1.Addr()), errForeign},
		"another client's identifier":  {plain(kind, id, hour, opt(61, 1, 2, 3, 4, 5, 6, 7)), errClientID},
		"empty client identifier":      {plain(kind, id, hour, opt(61)), errClientID},
		"largest datagram, no options": {withoutCookie(nil, 1<<16-1), errOp},
	}
}

// withoutCookie is the packet's fixed part without a cookie, of a given size.
func withoutCookie(b []byte, size int) []byte {
	out := make([]byte, size)
	if len(b) > 236 {
		copy(out, b[:236])
	}
	return out
}

// overloaded is an OFFER whose option 52 announces options in file (1), sname
// (2) or both (3).
func overloaded(how byte) []byte { return goodOffer(opt(52, how)) }

// fields writes options into the packet's sname or file field; pad zeros come
// before.
func fields(b []byte, at int, o option, pad int) []byte {
	b = slices.Clone(b)
	end := map[int]int{44: 108, 108: 236}[at]
	copy(b[at+pad:end], appendOptions(nil, o))
	return b
}

func TestHostilePackets(t *testing.T) {
	for name, c := range hostilePackets() {
		t.Run(name, func(t *testing.T) {
			var drops Drops
			l, replies := quietLink(&drops)
			before := slices.Clone(c.data)
			err := l.deliver(c.data, nil)
			if !errors.Is(err, c.want) {
				t.Errorf("dropped as %v, want %v", err, c.want)
			}
			if len(replies) != 0 {
				t.Error("delivered all the same")
			}
			if !bytes.Equal(c.data, before) {
				t.Error("the packet was changed")
			}
		})
	}
}

// quietLink is a link without a socket, with one exchange that waits for the
// answers to asked.
func quietLink(drops *Drops) (*Link, chan reply) {
	l := &Link{place: place1, drops: drops, log: slog.New(slog.DiscardHandler), waiting: map[exchangeKey]waiter{}}
	replies := make(chan reply, replyQueue)
	l.await(exchangeKey{asked.xid, mac1}, party{clientID: lease.MACClientID(mac1)}, replies)
	return l, replies
}

func TestGoodReplies(t *testing.T) {
	kind, id, hour := opt(53, offer), addrOpt(54, "10.10.0.1"), timeOpt(51, 3600)
	for name, data := range map[string][]byte{
		"OFFER":                 goodOffer(),
		"ACK":                   grant(asked, ack, server1.Addr(), leasedAddr),
		"NAK":                   refuse(asked, server1.Addr()),
		"NAK without server":    answer{to: asked, options: []option{opt(53, nak)}}.bytes(),
		"no end":                goodOffer()[:len(goodOffer())-1],
		"pads between":          append(goodOffer()[:240:240], 0, 0, 53, 1, offer, 0, 54, 4, 10, 10, 0, 1, 0, 0, 51, 4, 0, 0, 14, 16, 0, 255),
		"zero-length options":   plain(opt(80), kind, opt(12), id, opt(60), hour),
		"a lot of padding":      append(goodOffer(), make([]byte, 1000)...),
		"garbage after the end": append(goodOffer(), 1, 2, 3, 255, 53),
		"unknown options":       goodOffer(opt(224, 1, 2), opt(254, 9)),
		"longest option":        goodOffer(opt(43, make([]byte, 255)...)),
		"relay information":     goodOffer(opt(82, 5, 4, 10, 10, 0, 0)),
	} {
		t.Run(name, func(t *testing.T) {
			l, replies := quietLink(&Drops{})
			from := &net.UDPAddr{IP: net.IPv4(10, 10, 0, 1), Port: 67}
			if err := l.deliver(data, from); err != nil {
				t.Fatal(err)
			}
			r := <-replies
			if r.from != server1.Addr() {
				t.Errorf("from %s", r.from)
			}
			if r.kind == dhcp4.NAK {
				return
			}
			if r.addr != leasedAddr || r.server != server1.Addr() || r.seconds(51) != 3600 {
				t.Errorf("read %+v", r)
			}
		})
	}
}

// A source that is no UDP address, as packet sockets may have it, is no
// reason to fall.
func TestReplyFromOtherSource(t *testing.T) {
	l, replies := quietLink(&Drops{})
	for _, from := range []net.Addr{nil, &net.UnixAddr{}, &net.UDPAddr{}} {
		if err := l.deliver(goodOffer(), from); err != nil {
			t.Fatal(err)
		}
		if r := <-replies; r.from.IsValid() && !r.from.IsUnspecified() {
			t.Errorf("from %v became %s", from, r.from)
		}
	}
}

func TestIPv4InIPv6Source(t *testing.T) {
	l, replies := quietLink(&Drops{})
	if err := l.deliver(goodOffer(), &net.UDPAddr{IP: net.ParseIP("::ffff:10.10.0.1"), Port: 67}); err != nil {
		t.Fatal(err)
	}
	if r := <-replies; r.from != server1.Addr() {
		t.Errorf("from %s", r.from)
	}
}

func TestRawOptions(t *testing.T) {
	// RFC 2131 section 4.1: options first, then file, then sname.
	base := func(how byte) []byte {
		b := plain(opt(53, offer), addrOpt(54, "10.10.0.1"), timeOpt(51, 3600), opt(52, how), opt(3, 1, 1, 1, 1))
		b = fields(b, 108, opt(3, 2, 2, 2, 2), 7)
		return fields(b, 44, opt(3, 3, 3, 3, 3), 5)
	}
	fixed := appendOptions(nil, opt(53, offer), addrOpt(54, "10.10.0.1"), timeOpt(51, 3600))
	for _, c := range []struct {
		name    string
		data    []byte
		routers []byte
		raw     []byte
	}{
		{"no overload", base(0), []byte{1, 1, 1, 1}, appendOptions(nil, opt(3, 1, 1, 1, 1))},
		{"file", base(1), []byte{1, 1, 1, 1, 2, 2, 2, 2}, appendOptions(nil, opt(3, 1, 1, 1, 1), opt(3, 2, 2, 2, 2))},
		{"sname", base(2), []byte{1, 1, 1, 1, 3, 3, 3, 3}, appendOptions(nil, opt(3, 1, 1, 1, 1), opt(3, 3, 3, 3, 3))},
		{"both", base(3), []byte{1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3}, appendOptions(nil, opt(3, 1, 1, 1, 1), opt(3, 2, 2, 2, 2), opt(3, 3, 3, 3, 3))},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := parseReply(c.data)
			if err != nil {
				t.Fatal(err)
			}
			if got := r.options[3]; !bytes.Equal(got, c.routers) {
				t.Errorf("option 3 is %v, want %v", got, c.routers)
			}
			if want := append(slices.Clone(fixed), c.raw...); !bytes.Equal(r.raw, want) {
				t.Errorf("raw options\n% x, want\n% x: without pads, end and 52", r.raw, want)
			}
		})
	}
}

// An option 52 that stands in file or sname, or is malformed, means nothing.
func TestOverloadOnlyOnce(t *testing.T) {
	b := fields(overloaded(1), 108, opt(52, 3), 0)
	b = fields(b, 44, opt(60, 'x'), 0)
	if r, err := parseReply(b); err != nil || r.options[60] != nil {
		t.Errorf("sname was read: %v, %v", r.options[60], err)
	}
	for _, o := range []option{opt(52), opt(52, 1, 1), opt(52, 0), opt(52, 4)} {
		b := fields(goodOffer(o), 108, opt(60, 'x'), 0)
		if r, err := parseReply(b); err != nil || r.options[60] != nil {
			t.Errorf("option 52 % x: file was read: %v, %v", o.value, r.options[60], err)
		}
	}
}

// RFC 3396: values of a split option are joined in their order, wherever the
// parts stand, also when the whole is longer than 255 bytes.
func TestSplitOptions(t *testing.T) {
	first, second := bytes.Repeat([]byte{1}, 255), bytes.Repeat([]byte{2}, 100)
	r, err := parseReply(goodOffer(opt(121, first...), opt(60, 9), opt(121, second...), opt(121), opt(60, 8)))
	if err != nil {
		t.Fatal(err)
	}
	if want := slices.Concat(first, second); !bytes.Equal(r.options[121], want) {
		t.Errorf("option 121 is % x", r.options[121])
	}
	if !bytes.Equal(r.options[60], []byte{9, 8}) {
		t.Errorf("option 60 is % x", r.options[60])
	}
	// The lease time too may come in two halves.
	r, err = parseReply(plain(opt(53, offer), addrOpt(54, "10.10.0.1"), opt(51, 0, 0), opt(51, 14, 16)))
	if err != nil || r.seconds(51) != 3600 {
		t.Errorf("split option 51: %d s, %v", r.seconds(51), err)
	}
}

// The link reads all packets into one buffer.
func TestReplyOwnsItsMemory(t *testing.T) {
	b := fields(goodOffer(opt(52, 3), opt(60, 'a'), opt(60, 'b')), 108, opt(15, 'd', 'n', 's'), 0)
	b = fields(b, 44, opt(12, 'h'), 0)
	r, err := parseReply(b)
	if err != nil {
		t.Fatal(err)
	}
	raw, options := slices.Clone(r.raw), map[byte][]byte{}
	for code, value := range r.options {
		options[code] = slices.Clone(value)
	}
	for i := range b {
		b[i] ^= 0xff
	}
	if !bytes.Equal(raw, r.raw) || !maps.EqualFunc(options, r.options, bytes.Equal) {
		t.Error("the reply changes with the buffer")
	}
	if r.addr != leasedAddr || r.server != server1.Addr() {
		t.Error("the addresses change with the buffer")
	}
	// Nor do values share memory with each other: growing one must not write
	// into the next.
	for code := range r.options {
		_ = append(r.options[code], 0xee, 0xee, 0xee, 0xee)
	}
	if !bytes.Equal(raw, r.raw) || !maps.EqualFunc(options, r.options, bytes.Equal) {
		t.Error("appending to a value changes another one")
	}
}

func TestTimes(t *testing.T) {
	sent := time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)
	for _, c := range []struct {
		name                   string
		options                []option
		renew, rebind, expires time.Duration // 0 all: infinite
	}{
		{"neither 58 nor 59", []option{timeOpt(51, 3600)}, 1800 * time.Second, 3150 * time.Second, 3600 * time.Second},
		{"both", []option{timeOpt(51, 3600), timeOpt(58, 900), timeOpt(59, 3000)}, 900 * time.Second, 3000 * time.Second, 3600 * time.Second},
		{"only 58", []option{timeOpt(51, 3600), timeOpt(58, 900)}, 900 * time.Second, 3150 * time.Second, 3600 * time.Second},
		{"only 59", []option{timeOpt(51, 3600), timeOpt(59, 3000)}, 1800 * time.Second, 3000 * time.Second, 3600 * time.Second},
		{"58 = 59", []option{timeOpt(51, 3600), timeOpt(58, 900), timeOpt(59, 900)}, 1800 * time.Second, 3150 * time.Second, 3600 * time.Second},
		{"58 after 59", []option{timeOpt(51, 3600), timeOpt(58, 3000), timeOpt(59, 900)}, 1800 * time.Second, 3150 * time.Second, 3600 * time.Second},
		{"59 = 51", []option{timeOpt(51, 3600), timeOpt(58, 900), timeOpt(59, 3600)}, 1800 * time.Second, 3150 * time.Second, 3600 * time.Second},
		{"59 after 51", []option{timeOpt(51, 3600), timeOpt(58, 900), timeOpt(59, 7200)}, 1800 * time.Second, 3150 * time.Second, 3600 * time.Second},
		{"58 of 0", []option{timeOpt(51, 3600), timeOpt(58, 0), timeOpt(59, 3000)}, 1800 * time.Second, 3000 * time.Second, 3600 * time.Second},
		{"58 and 59 of 2^32-1", []option{timeOpt(51, 3600), timeOpt(58, 1<<32-1), timeOpt(59, 1<<32-1)}, 1800 * time.Second, 3150 * time.Second, 3600 * time.Second},
		{"58 of three bytes", []option{timeOpt(51, 3600), opt(58, 0, 0, 9), timeOpt(59, 3000)}, 1800 * time.Second, 3000 * time.Second, 3600 * time.Second},
		{"59 of 0", []option{timeOpt(51, 3600), timeOpt(58, 900), timeOpt(59, 0)}, 900 * time.Second, 3150 * time.Second, 3600 * time.Second},
		{"59 of five bytes", []option{timeOpt(51, 3600), timeOpt(58, 900), opt(59, 0, 0, 0, 9, 0)}, 900 * time.Second, 3150 * time.Second, 3600 * time.Second},
		{"only 58, after the default of 59", []option{timeOpt(51, 3600), timeOpt(58, 3200)}, 1800 * time.Second, 3150 * time.Second, 3600 * time.Second},
		{"only 58, at the default of 59", []option{timeOpt(51, 3600), timeOpt(58, 3150)}, 1800 * time.Second, 3150 * time.Second, 3600 * time.Second},
		{"only 59, before the default of 58", []option{timeOpt(51, 3600), timeOpt(59, 1200)}, 1800 * time.Second, 3150 * time.Second, 3600 * time.Second},
		{"only 59, after 51", []option{timeOpt(51, 3600), timeOpt(59, 7200)}, 1800 * time.Second, 3150 * time.Second, 3600 * time.Second},
		{"one second", []option{timeOpt(51, 1)}, 500 * time.Millisecond, 875 * time.Millisecond, time.Second},
		{"longest", []option{timeOpt(51, 1<<32-2)}, 2147483647 * time.Second, 3758096382250 * time.Millisecond, 4294967294 * time.Second},
		{"infinite (RFC 2131 section 3.3)", []option{timeOpt(51, 1<<32-1)}, 0, 0, 0},
		{"infinite with 58 and 59", []option{timeOpt(51, 1<<32-1), timeOpt(58, 900), timeOpt(59, 3000)}, 0, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := parseReply(plain(append([]option{opt(53, ack), addrOpt(54, "10.10.0.1")}, c.options...)...))
			if err != nil {
				t.Fatal(err)
			}
			// What an earlier lease left must not shine through.
			l := held(server1)
			r.times(&l, sent)
			want := lease.Lease{Obtained: sent}
			if c.expires != 0 {
				want.Renew, want.Rebind, want.Expires = sent.Add(c.renew), sent.Add(c.rebind), sent.Add(c.expires)
			}
			if !l.Obtained.Equal(want.Obtained) || !l.Renew.Equal(want.Renew) || !l.Rebind.Equal(want.Rebind) || !l.Expires.Equal(want.Expires) {
				t.Errorf("renew %s, rebind %s, expires %s; want %s, %s, %s", l.Renew, l.Rebind, l.Expires, want.Renew, want.Rebind, want.Expires)
			}
			if l.Infinite() != (c.expires == 0) {
				t.Errorf("infinite: %t", l.Infinite())
			}
		})
	}
}

func TestOffer(t *testing.T) {
	for mask, bits := range map[string]int{
		"255.255.255.0": 24, "255.255.255.255": 32, "128.0.0.0": 1, "0.0.0.0": 0, "255.255.255.252": 30,
		"255.0.255.0": -1, "0.0.0.255": -1, "255.255.255.1": -1, "127.255.255.255": -1,
	} {
		r, err := parseReply(plain(opt(53, offer), addrOpt(54, "10.10.0.1"), timeOpt(51, 60), addrOpt(1, mask), opt(3, 10, 10, 0, 1, 10, 10, 0, 2)))
		if err != nil {
			t.Fatal(err)
		}
		want := lease.Offer{Server: server1.Addr(), Address: leasedAddr, Router: ip("10.10.0.1")}
		if bits >= 0 {
			want.Subnet = netip.PrefixFrom(leasedAddr, bits).Masked()
		}
		if got := r.offer(time.Now()); got.Server != want.Server || got.Address != want.Address || got.Subnet != want.Subnet || got.Router != want.Router {
			t.Errorf("mask %s: %+v, want %+v", mask, got, want)
		}
	}
	r, err := parseReply(plain(opt(53, offer), addrOpt(54, "10.10.0.1"), timeOpt(51, 60), opt(1, 255, 255), opt(3, 10)))
	if err != nil {
		t.Fatal(err)
	}
	if got := r.offer(time.Now()); got.Subnet.IsValid() || got.Router.IsValid() {
		t.Errorf("cut options 1 and 3: %+v", got)
	}
}

// realReplies are seeds as real servers write them.
func realReplies() [][]byte {
	kea := grant(asked, offer, server1.Addr(), leasedAddr, addrOpt(6, "10.10.0.53"), option{15, []byte("example.org")}, opt(61, append([]byte{1}, mac1[:]...)...), opt(82, 5, 4, 10, 10, 0, 0))
	dnsmasq := grant(asked, ack, server1.Addr(), leasedAddr, timeOpt(58, 1740), timeOpt(59, 3100), addrOpt(28, "10.10.0.255"), option{12, []byte("web")})
	return [][]byte{kea, dnsmasq, refuse(asked, server1.Addr()), fields(overloaded(3), 108, opt(15, 'a', '.', 'b'), 3), goodOffer(opt(121, make([]byte, 200)...), opt(121, 1, 2)), {}, kea[:241]}
}

func FuzzParseReply(f *testing.F) {
	for _, b := range realReplies() {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		before := slices.Clone(b)
		r, err := parseReply(b)
		if !bytes.Equal(b, before) {
			t.Fatal("the packet was changed")
		}
		if err != nil {
			known := []error{errShort, errOp, errHardware, errCookie, errCut, errType, errServer, errAddress, errTime}
			if !slices.Contains(known, err) {
				t.Fatalf("unknown reason %v", err)
			}
			return
		}
		checkReply(t, b, r)
	})
}

// checkReply asserts what holds for every packet that is accepted.
func checkReply(t *testing.T, b []byte, r reply) {
	t.Helper()
	if b[0] != 2 || r.xid != binary.BigEndian.Uint32(b[4:]) || r.mac != lease.MAC(b[28:34]) || r.relay != netip.AddrFrom4([4]byte(b[24:28])) {
		t.Fatalf("header read wrongly: %+v", r)
	}
	switch r.kind {
	case dhcp4.NAK:
	case dhcp4.Offer, dhcp4.ACK:
		for _, addr := range []netip.Addr{r.addr, r.server} {
			if first := addr.As4()[0]; addr.IsUnspecified() || first >= 224 {
				t.Fatalf("address %s was accepted", addr)
			}
		}
		var l lease.Lease
		now := time.Now()
		r.times(&l, now)
		inOrder := now.Before(l.Renew) && l.Renew.Before(l.Rebind) && l.Rebind.Before(l.Expires)
		if !l.Infinite() && !inOrder {
			t.Fatalf("times out of order: %+v", l)
		}
	default:
		t.Fatalf("type %d was accepted", r.kind)
	}
	// The raw options are well-formed and say the same as the map.
	joined := map[byte][]byte{}
	for rest := r.raw; len(rest) > 0; rest = rest[2+int(rest[1]):] {
		if rest[0] == 0 || rest[0] == 52 || rest[0] == 255 {
			t.Fatalf("option %d among the raw ones", rest[0])
		}
		joined[rest[0]] = append(joined[rest[0]], rest[2:2+int(rest[1])]...)
	}
	for code, value := range joined {
		if !bytes.Equal(value, r.options[code]) {
			t.Fatalf("option %d is % x raw and % x read", code, value, r.options[code])
		}
	}
	_ = r.offer(time.Now())
	_ = refusal(r).Error()
}
