package lab

import (
	"fmt"
	"net"
	"slices"
	"sync"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Wire records the frames that leave a node by one interface, whoever on the
// node sent them: they are read at the cable's other end.
type Wire struct {
	conn *packet.Conn
	done chan struct{} // closed when the reader has ended

	// mu guards frames.
	mu     sync.Mutex
	frames []gopacket.Packet
}

// incoming is a filter that accepts what comes to the interface, not what
// leaves by it: in the switch that is what the node sent.
var incoming = []bpf.Instruction{
	bpf.LoadExtension{Num: bpf.ExtType},
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.PACKET_OUTGOING, SkipTrue: 1},
	bpf.RetConstant{Val: 1 << 16},
	bpf.RetConstant{Val: 0},
}

// Wire records from now on, until Close. The lan is the switch that the
// interface hangs on.
func (n *Node) Wire(lan *Node, ifname string) (*Wire, error) {
	w := &Wire{done: make(chan struct{})}
	err := lan.Do(func() error {
		port, err := net.InterfaceByName(n.Port(ifname))
		if err != nil {
			return err
		}
		filter, err := bpf.Assemble(incoming)
		if err != nil {
			return err
		}
		w.conn, err = packet.Listen(port, packet.Raw, unix.ETH_P_ALL, &packet.Config{Filter: filter})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("record %s of %s: %w", ifname, n.Name, err)
	}
	go w.read()
	return w, nil
}

func (w *Wire) read() {
	defer close(w.done)
	buffer := make([]byte, 1<<16)
	for {
		length, _, err := w.conn.ReadFrom(buffer)
		if err != nil {
			return // closed, or the interface is gone
		}
		frame := gopacket.NewPacket(buffer[:length], layers.LayerTypeEthernet, gopacket.Default)
		w.mu.Lock()
		w.frames = append(w.frames, frame)
		w.mu.Unlock()
	}
}

// Frames are those that have come so far.
func (w *Wire) Frames() []gopacket.Packet {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.frames)
}

// Close ends the recording.
func (w *Wire) Close() error {
	err := w.conn.Close()
	<-w.done
	return err
}
