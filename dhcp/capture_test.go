package dhcp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// seen is a packet as a program that opens the file has it.
type seen struct {
	at      time.Time
	iface   string
	out     bool
	comment string
	from    string // IP and port
	to      string
	dhcp    packet
}

// line is what the tests compare.
func (s seen) line() string {
	arrow := "<-"
	if s.out {
		arrow = "->"
	}
	return strings.TrimSpace(fmt.Sprintf("%s %s %d %s", s.iface, arrow, s.dhcp.kind(), s.comment))
}

// opened reads a capture as Wireshark would, with how many packets are lost. It
// checks lengths and checksums.
func opened(t *testing.T, file []byte) (all []seen, lost uint64) {
	t.Helper()
	r, err := pcapgo.NewNgReader(bytes.NewReader(file), pcapgo.NgReaderOptions{
		WantMixedLinkType:  true,
		StatisticsCallback: func(_ int, s pcapgo.NgInterfaceStatistics) { lost = s.PacketsDropped },
	})
	if err != nil {
		t.Fatal(err)
	}
	for {
		data, info, options, err := r.ReadPacketDataWithOptions()
		if err == io.EOF {
			return all, lost
		}
		if err != nil {
			t.Fatal(err)
		}
		at, err := r.Interface(info.InterfaceIndex)
		if err != nil {
			t.Fatal(err)
		}
		var first gopacket.Decoder = layers.LayerTypeIPv4
		if at.LinkType == layers.LinkTypeEthernet {
			first = layers.LayerTypeEthernet
		}
		p := gopacket.NewPacket(data, first, gopacket.Default)
		ip, udp := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4), p.Layer(layers.LayerTypeUDP).(*layers.UDP)
		s := seen{at: info.Timestamp, iface: at.Name, out: options.Flags.Direction == pcapgo.NgEpbFlagDirectionOutbound, comment: strings.Join(options.Comments, "|")}
		s.from, s.to = fmt.Sprintf("%s:%d", ip.SrcIP, udp.SrcPort), fmt.Sprintf("%s:%d", ip.DstIP, udp.DstPort)
		if s.dhcp, err = readPacket(udp.Payload); err != nil {
			s.dhcp = packet{} // a hostile one
		}
		if checksum(ip.Contents) != 0 || int(ip.Length) != len(ip.Contents)+len(ip.Payload) || int(udp.Length) != len(ip.Payload) {
			t.Errorf("IP header % x with %d bytes", ip.Contents, len(ip.Payload))
		}
		if pseudo := slices.Concat(ip.Contents[12:20], []byte{0, 17}, udp.Contents[4:6], ip.Payload); udp.Checksum != 0 && checksum(pseudo) != 0 {
			t.Errorf("UDP checksum %#x", udp.Checksum)
		}
		all = append(all, s)
	}
}

// remembered is what a client has in memory, of all of its packets or some.
func remembered(t *testing.T, c *Client, what Capture) []seen {
	t.Helper()
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if what.Last == 0 {
		what.Last = 2 * maxRecords
	}
	var file bytes.Buffer
	if err := c.Capture(over, &file, what); err != nil {
		t.Fatal(err)
	}
	all, lost := opened(t, file.Bytes())
	if lost > 0 {
		t.Errorf("%d packets lost", lost)
	}
	return all
}

func checkLines(t *testing.T, got []seen, want ...string) {
	t.Helper()
	var lines []string
	for _, s := range got {
		lines = append(lines, s.line())
	}
	if !slices.Equal(lines, want) {
		t.Errorf("captured\n%s\nwant\n%s", strings.Join(lines, "\n"), strings.Join(want, "\n"))
	}
}

// web is a request of a container with a name.
func web(pool lease.Pool) lease.Request {
	req := want(pool, mac1)
	req.Name = "web"
	return req
}

// A lease's packets, both ways, with whose they are, at their times, from the
// server's and the relay's address.
func TestCaptureRelay(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1))
		c := l.client(server1)
		if _, err := c.Acquire(within(t, usual), web(home)); err != nil {
			t.Fatal(err)
		}
		got := remembered(t, c, Capture{})
		checkLines(t, got,
			"relay 10.10.0.2 -> 1 container web; pool home", "relay 10.10.0.2 <- 2 container web; pool home",
			"relay 10.10.0.2 -> 3 container web; pool home", "relay 10.10.0.2 <- 5 container web; pool home")
		for i, p := range got {
			from, to := relay1.String()+":67", server1.String()
			if !p.out {
				from, to = to, from
			}
			if p.from != from || p.to != to || p.dhcp.mac() != mac1 || p.at.Sub(l.began) != time.Duration((i+1)/2)*time.Millisecond {
				t.Errorf("packet %d: %+v", i, p)
			}
		}
	})
}

// On a LAN the frames are those of the wire: to all, from the station that sent
// them.
func TestCaptureBroadcast(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1))
		c := l.broadcaster()
		if _, err := c.Acquire(within(t, usual), web(home)); err != nil {
			t.Fatal(err)
		}
		got := remembered(t, c, Capture{})
		checkLines(t, got,
			"eth0 -> 1 container web; pool home", "eth0 <- 2 container web; pool home",
			"eth0 -> 3 container web; pool home", "eth0 <- 5 container web; pool home")
		if got[0].from != "0.0.0.0:68" || got[0].to != "255.255.255.255:67" || got[1].from != "10.10.0.1:67" || got[1].to != "255.255.255.255:68" {
			t.Errorf("%+v", got[:2])
		}
	})
}

// What was dropped has its reason. A late answer is its exchange's; what answers
// nobody of ours is shown at a relay address, whose own it is, and not on a LAN.
func TestCaptureDrops(t *testing.T) {
	for _, c := range []struct {
		name   string
		client func(*lan) *Client
		at     place
		iface  string
		others []string
	}{
		{"relay", func(l *lan) *Client { return l.client(server1) }, place1, "relay 10.10.0.2", []string{
			"relay 10.10.0.2 <- 5 dropped: no exchange waits for it", "relay 10.10.0.2 <- 0 dropped: shorter than a DHCP message",
		}},
		{"broadcast", (*lan).broadcaster, lanPlace, "eth0", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lan) {
				server := newDHCPD(server1)
				l.attach(server)
				client := c.client(l)
				if _, err := client.Acquire(within(t, usual), web(home)); err != nil {
					t.Fatal(err)
				}
				mine := l.log()[1].packet
				bad, others := grant(mine, ack, server.id, leasedAddr), mine
				bad[237] = 0 // the cookie
				others.xid++
				conn := l.conn(c.at)
				for _, b := range [][]byte{grant(mine, ack, server.id, leasedAddr), bad, grant(others, ack, server.id, leasedAddr), {2, 1, 6}} {
					conn.receive(datagram{data: b, from: server1, mac: stationOf(server1)})
				}
				synctest.Wait()
				checkLines(t, remembered(t, client, Capture{})[4:], append([]string{
					c.iface + " <- 5 container web; pool home; dropped: no exchange waits for it",
					c.iface + " <- 0 container web; pool home; dropped: wrong cookie",
				}, c.others...)...)
			})
		})
	}
}

// An answer is that of the exchange that waits for it, however much was sent
// since it asked.
func TestCaptureWaiting(t *testing.T) {
	link := newLink(place1, nil, &Drops{}, &recorder{}, slog.New(slog.DiscardHandler))
	link.await(exchangeKey{asked.xid, mac1}, party{name: "web", pool: home, clientID: lease.MACClientID(mac1)}, make(chan reply, 1))
	if err := link.receive(goodOffer(), net.UDPAddrFromAddrPort(server1)); err != nil {
		t.Fatal(err)
	}
	all, _ := everything(link.recorder)
	if len(all) != 1 || all[0].owner != (owner{"web", "home", home.Subnet}) || all[0].peer != server1 {
		t.Errorf("%+v", all)
	}
}

// What couldn't be sent says so.
func TestCaptureUnsent(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.write = func(netip.AddrPort) error { return errors.New("network is down") }
		c := l.client(server1)
		if _, err := c.Acquire(within(t, time.Second/4), web(home)); err == nil {
			t.Fatal("no error")
		}
		checkLines(t, remembered(t, c, Capture{}), "relay 10.10.0.2 -> 1 container web; pool home; not sent: network is down")
	})
}

// Filters are exact, and one that fits nobody isn't an error.
func TestCaptureFilters(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1))
		c := l.client(server1)
		for i, name := range []string{"web", "web", "web2", ""} {
			req := want([]lease.Pool{home, away}[i%2], lease.MAC{2, 0, 0, 0, 1, byte(i)})
			req.Name = name
			if _, err := c.Acquire(within(t, usual), req); err != nil {
				t.Fatal(err)
			}
		}
		for _, row := range []struct {
			what Capture
			want int // exchanges, of four packets each
		}{
			{Capture{}, 4},
			{Capture{Container: "web"}, 2},
			{Capture{Container: "we"}, 0},
			{Capture{Container: "WEB"}, 0},
			{Capture{Container: "02:00:00:00:01:03"}, 1},
			{Capture{Container: "02-00-00-00-01-03"}, 1},
			{Capture{Container: "02:00:00:00:01:04"}, 0},
			{Capture{Container: "later"}, 0},
			{Capture{Pool: "home"}, 2},
			{Capture{Pool: "10.10.0.0/24"}, 2},
			{Capture{Pool: "10.20.0.9/24"}, 2},
			{Capture{Pool: "10.10.0.0/16"}, 0},
			{Capture{Pool: "hom"}, 0},
			{Capture{Container: "web", Pool: "away"}, 1},
			{Capture{Container: "web2", Pool: "away"}, 0},
		} {
			if got := len(remembered(t, c, row.what)); got != 4*row.want {
				t.Errorf("%+v: %d packets, want %d", row.what, got, 4*row.want)
			}
		}
		// The last ones that match, not those of the last ones that do.
		got := remembered(t, c, Capture{Container: "web2", Last: 3})
		checkLines(t, got, "relay 10.10.0.2 <- 2 container web2; pool home", "relay 10.10.0.2 -> 3 container web2; pool home", "relay 10.10.0.2 <- 5 container web2; pool home")
	})
}

// pipe is a file that is read while it is written.
type pipe struct {
	bytes.Buffer
	// hold, where set, is waited for at every write once it has begun.
	hold chan struct{}
}

func (p *pipe) Write(b []byte) (int, error) {
	if p.Len() > 0 && p.hold != nil {
		<-p.hold
	}
	return p.Buffer.Write(b)
}

// What is remembered and what comes then: each packet is there once, at once, a
// new place of a network created meanwhile included.
func TestCaptureLive(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1))
		c := l.client(server1)
		acquire := func(i int, pool lease.Pool) {
			t.Helper()
			if _, err := c.Acquire(within(t, usual), want(pool, lease.MAC{2, 0, 0, 0, byte(i >> 8), byte(i)})); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 10 {
			acquire(i, home)
		}
		var file pipe
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- c.Capture(ctx, &file, Capture{Last: 6}) }()
		synctest.Wait()
		if got, _ := opened(t, file.Bytes()); len(got) != 6 {
			t.Errorf("begins with %d packets", len(got))
		}
		byBroadcast := home
		byBroadcast.Options.Interface = "eth0"
		for i := range 200 {
			acquire(10+i, home)
			synctest.Wait()
			if got, _ := opened(t, file.Bytes()); len(got) != 6+4*(i+1) {
				t.Fatalf("%d packets after %d exchanges", len(got), i+1)
			}
		}
		acquire(300, byBroadcast)
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		got, lost := opened(t, file.Bytes())
		var sent []string
		for _, m := range l.log() {
			sent = append(sent, fmt.Sprint(m.kind(), m.xid))
		}
		var captured []string
		for _, p := range got {
			if p.out {
				captured = append(captured, fmt.Sprint(p.dhcp.kind(), p.dhcp.xid))
			}
		}
		// The first six are three of the requests.
		if !slices.Equal(captured, sent[17:]) || len(got) != 6+4*201 || lost != 0 {
			t.Errorf("captured %d packets, %d of %d requests, lost %d", len(got), len(captured), len(sent), lost)
		}
		if last := got[len(got)-1]; last.iface != "eth0" {
			t.Errorf("the last one is %s", last.line())
		}
		// All of it is there again for whoever comes when it is over.
		if again := remembered(t, c, Capture{}); len(again) != 4*211 {
			t.Errorf("%d packets are remembered", len(again))
		}
	})
}

// A reader who stands still holds up nobody, and learns how many packets it has
// lost.
func TestCaptureSlowReader(t *testing.T) {
	bubble(t, func(t *testing.T, l *lan) {
		l.attach(newDHCPD(server1))
		c := l.client(server1)
		slow := &pipe{hold: make(chan struct{})}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ended := make(chan error)
		go func() { ended <- c.Capture(ctx, slow, Capture{}) }()
		synctest.Wait()
		began := time.Now()
		const leases = 700
		for i := range leases {
			if _, err := c.Acquire(within(t, usual), want(home, lease.MAC{2, 0, 0, 0, byte(i >> 8), byte(i)})); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(began); took != leases*2*time.Millisecond {
			t.Errorf("took %s", took)
		}
		close(slow.hold)
		synctest.Wait()
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		got, lost := opened(t, slow.Bytes())
		if uint64(len(got))+lost != 4*leases || lost == 0 || len(got) < maxRecords {
			t.Errorf("%d captured, %d lost", len(got), lost)
		}
	})
}

// A place that doesn't answer to its writing ends the capture, which says so.
func TestCaptureBadWriter(t *testing.T) {
	l := newLAN(t)
	c := l.client(server1)
	full := errors.New("disk full")
	if err := c.Capture(t.Context(), failing{full}, Capture{}); !errors.Is(err, full) {
		t.Errorf("error %v", err)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

// Before there is any link, the file can be opened all the same.
func TestCaptureNothing(t *testing.T) {
	l := newLAN(t)
	if got := remembered(t, l.client(), Capture{}); len(got) != 0 {
		t.Errorf("%+v", got)
	}
}

// Names of others don't break the file's form.
func TestCaptureComments(t *testing.T) {
	r := record{owner: owner{name: "a\xff" + strings.Repeat("n", 1<<17), pool: "p"}, fate: errForeign}
	if got := r.comment(); len(got) > maxComment+2 || !strings.HasPrefix(got, "container a?nnn") {
		t.Errorf("%d bytes: %.40s", len(got), got)
	}
	if got := (&record{}).comment(); got != "" {
		t.Errorf("%q", got)
	}
}

// What an exchange of four packets takes in all, with its packets remembered and,
// in the second, captured.
func BenchmarkCapture(b *testing.B) {
	for _, captured := range []bool{false, true} {
		b.Run(fmt.Sprint(captured), func(b *testing.B) {
			l := newLAN(b)
			l.serve = func(m sent) {
				kind := map[byte]byte{discover: offer, request: ack}[m.kind()]
				l.conn(m.place).receive(datagram{data: grant(m.packet, kind, server1.Addr(), leasedAddr), from: server1})
			}
			c := l.client(server1)
			if captured {
				ctx, cancel := context.WithCancel(b.Context())
				ended := make(chan error)
				go func() { ended <- c.Capture(ctx, io.Discard, Capture{}) }()
				defer func() { cancel(); <-ended }()
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Acquire(within(b, usual), want(home, mac1)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
