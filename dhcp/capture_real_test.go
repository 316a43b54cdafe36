package dhcp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket/pcapgo"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// tshark reads some fields of the packets of a file that match a filter. It
// captures nothing itself.
func tshark(t *testing.T, file, filter string, fields ...string) (lines []string) {
	t.Helper()
	args := []string{"-n", "-r", file, "-o", "ip.check_checksum:TRUE", "-o", "udp.check_checksum:TRUE", "-Y", filter, "-T", "fields", "-E", "separator=|"}
	for _, f := range fields {
		args = append(args, "-e", f)
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), "tshark", args...)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tshark: %v\n%s", err, &stderr)
	}
	if len(out) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

// captureWhile captures what a function sends and receives into a file.
func captureWhile(t *testing.T, c *Client, do func()) (name string) {
	t.Helper()
	name = filepath.Join(t.TempDir(), "test.pcapng")
	file, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- errors.Join(c.Capture(ctx, file, Capture{}), file.Close()) }()
	err = lab.Eventually(5*time.Second, func() error {
		info, err := os.Stat(name)
		if err == nil && info.Size() == 0 {
			err = errors.New("nothing is written")
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	do()
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	return name
}

// lifeOf is what a lease's packets are in its life: its four messages, its
// renewal and its end.
func lifeOf(t *testing.T, r real) {
	l := r.lease(t, mac1, "web")
	l, err := r.client.Renew(within(t, 5*time.Second), home, l)
	if err != nil {
		t.Error(err)
	}
	if err := r.client.Release(within(t, usual), home, l); err != nil {
		t.Error(err)
	}
}

func (r real) checkCapture(t *testing.T, name string, want ...string) {
	t.Helper()
	got := tshark(t, name, "frame", "frame.interface_name", "frame.packet_flags_direction", "frame.comment", "dhcp.option.dhcp", "dhcp.hw.mac_addr", "ip.src", "udp.srcport", "ip.dst", "udp.dstport", "ip.checksum.status", "udp.checksum.status")
	if !slices.Equal(got, want) {
		t.Errorf("tshark reads\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if bad := tshark(t, name, "_ws.malformed or _ws.expert.severity >= warning", "frame.number", "_ws.expert.message"); len(bad) > 0 {
		t.Errorf("tshark complains about %q", bad)
	}
	for i, at := range tshark(t, name, "frame", "frame.time_epoch") {
		var seconds float64
		if _, err := fmt.Sscan(at, &seconds); err != nil || time.Since(time.Unix(int64(seconds), 0)).Abs() > time.Minute {
			t.Errorf("packet %d at %s: %v", i+1, at, err)
		}
	}
}

// Wireshark's own reader shows a lease's life at a relay address, with right
// checksums, also where the port is somebody else's and the socket a raw one.
func TestRealCaptureRelay(t *testing.T) {
	for _, raw := range []bool{false, true} {
		t.Run(fmt.Sprintf("raw %t", raw), func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.DHCPServers, lab.Wireshark)
			topology, err := l.Standard()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := topology.Server.StartDHCP(lab.Dnsmasq, lab.DHCPConfig{Subnets: []lab.Subnet{lab.SubnetA()}}); err != nil {
				t.Fatal(err)
			}
			c := NewClient(lease.Options{Servers: []lease.Server{{Host: server1.Addr().String(), Port: 67}}, Relay: relay1}, slog.New(slog.DiscardHandler))
			t.Cleanup(func() {
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			})
			if err := topology.Host.Do(func() error {
				if raw {
					holder, err := net.ListenPacket("udp4", ":67")
					if err != nil {
						return err
					}
					t.Cleanup(func() { holder.Close() })
				}
				return c.Open()
			}); err != nil {
				t.Fatal(err)
			}
			if held := c.links[place1].socket.holder != ""; held != raw {
				t.Fatalf("the port is held: %t", held)
			}
			r := real{client: c, pool: home}
			name := captureWhile(t, c, func() { lifeOf(t, r) })
			out := "relay 10.10.0.2|0x00000002|container web; pool home|%d|02:42:0a:0a:00:64|10.10.0.2|67|10.10.0.1|67|1|1"
			in := "relay 10.10.0.2|0x00000001|container web; pool home|%d|02:42:0a:0a:00:64|10.10.0.1|67|10.10.0.2|67|1|1"
			var want []string
			for i, kind := range []byte{discover, offer, request, ack, request, ack, release} {
				want = append(want, fmt.Sprintf([]string{out, in}[i%2], kind))
			}
			r.checkCapture(t, name, want...)
		})
	}
}

// On a LAN the frames are to the byte what left and came, and Wireshark's reader
// finds nothing wrong with them.
func TestRealCaptureBroadcast(t *testing.T) {
	t.Parallel()
	l := lab.ForTest(t, lab.DHCPServers, lab.Wireshark)
	r := newRealLAN(t, l, lab.ISC, false)
	sent, err := r.host.Wire(l.LAN, "eth0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sent.Close() })
	name := captureWhile(t, r.client, func() { lifeOf(t, r.real) })
	out := "eth0|0x00000002|container web; pool home|%d|02:42:0a:0a:00:64|%s|68|255.255.255.255|67|1|1"
	in := "eth0|0x00000001|container web; pool home|%d|02:42:0a:0a:00:64|10.10.0.1|67|255.255.255.255|68|1|1"
	leased := r.held.Addr()
	r.checkCapture(t, name,
		fmt.Sprintf(out, discover, "0.0.0.0"), fmt.Sprintf(in, offer), fmt.Sprintf(out, request, "0.0.0.0"), fmt.Sprintf(in, ack),
		fmt.Sprintf(out, request, leased), fmt.Sprintf(in, ack), fmt.Sprintf(out, release, leased))
	// They are remembered so, whatever came after them.
	var kinds []byte
	for _, p := range remembered(t, r.client, Capture{Last: 7}) {
		kinds = append(kinds, p.dhcp.kind())
	}
	if want := []byte{discover, offer, request, ack, request, ack, release}; !slices.Equal(kinds, want) {
		t.Errorf("remembered %v, want %v", kinds, want)
	}

	file, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	reader, err := pcapgo.NewNgReader(file, pcapgo.DefaultNgReaderOptions)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 7 {
		captured, _, err := reader.ReadPacketData()
		if err != nil {
			t.Fatal(err)
		}
		wire := []*lab.Wire{sent, r.wire}[i%2]
		if err := lab.Eventually(5*time.Second, func() error {
			for _, frame := range wire.Frames() {
				if bytes.Equal(frame.Data(), captured) {
					return nil
				}
			}
			return fmt.Errorf("frame %d wasn't on the wire: % x", i+1, captured)
		}); err != nil {
			t.Error(err)
		}
	}
}
