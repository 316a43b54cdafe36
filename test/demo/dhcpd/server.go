package dhcpd

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/krolaw/dhcp4"
)

// relayPort is where relay agents and servers talk to each other (RFC 2131
// section 4.1).
const relayPort = 67

// Server answers requests that come in on a socket.
type Server struct {
	conn net.PacketConn
	done chan struct{} // closed when the reader has ended

	// mu guards what follows.
	mu    sync.Mutex
	table *Table
	log   []string
}

// Serve reads from a socket until Close.
func Serve(conn net.PacketConn, config Config) *Server {
	s := &Server{conn: conn, done: make(chan struct{}), table: NewTable(config)}
	go s.read()
	return s
}

// Close ends the server and closes its socket.
func (s *Server) Close() error {
	err := s.conn.Close()
	<-s.done
	return err
}

// Leases lists what clients hold now, by address.
func (s *Server) Leases() []Lease {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.table.Leases(time.Now())
}

// Log is what the server saw and did so far, one line a message. A line is
// there before its answer is on the way.
func (s *Server) Log() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.log)
}

func (s *Server) read() {
	defer close(s.done)
	buf := make([]byte, 1500)
	for {
		n, _, err := s.conn.ReadFrom(buf)
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				s.note("the socket failed: " + err.Error())
			}
			return
		}
		request := dhcp4.Packet(bytes.Clone(buf[:n]))
		answer := s.answer(request)
		if answer == nil {
			continue
		}
		// Not to where the request came from: a relay is reached at giaddr
		// (RFC 2131 section 4.1).
		if _, err := s.conn.WriteTo(answer, &net.UDPAddr{IP: request.GIAddr(), Port: relayPort}); err != nil {
			s.note("the answer was not sent: " + err.Error())
		}
	}
}

// answer decides and writes the log.
func (s *Server) answer(request dhcp4.Packet) dhcp4.Packet {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := valid(request); err != nil {
		s.log = append(s.log, fmt.Sprintf("%d bytes dropped: %v", len(request), err))
		return nil
	}
	s.log = append(s.log, describeRequest(request))
	answer, err := s.table.Answer(request, time.Now())
	switch {
	case err != nil:
		s.log = append(s.log, "no answer: "+err.Error())
	case answer != nil:
		s.log = append(s.log, describeAnswer(answer))
	}
	return answer
}

func (s *Server) note(line string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, line)
}

// describeRequest is a log line of a valid request, like "REQUEST for
// 10.10.0.100 from 02:42:0a:0a:00:64 by relay 10.10.0.2".
func describeRequest(p dhcp4.Packet) string {
	q := question{Packet: p, options: p.ParseOptions()}
	line := nameOf(q.kind())
	if addr := q.addr(dhcp4.OptionRequestedIPAddress); addr.IsValid() {
		line += " for " + addr.String()
	}
	if addr := addrOf(p.CIAddr()); addr.IsValid() {
		line += " of " + addr.String()
	}
	return fmt.Sprintf("%s from %s by relay %s", line, p.CHAddr(), p.GIAddr())
}

// describeAnswer is a log line like "ACK of 10.10.0.100 to 02:42:0a:0a:00:64".
func describeAnswer(p dhcp4.Packet) string {
	q := question{Packet: p, options: p.ParseOptions()}
	line := nameOf(q.kind())
	if addr := addrOf(p.YIAddr()); addr.IsValid() {
		line += " of " + addr.String()
	}
	line += " to " + p.CHAddr().String()
	if reason := q.options[dhcp4.OptionMessage]; len(reason) > 0 {
		line += ": " + string(reason)
	}
	return line
}

// nameOf is how RFC 2131 writes a message type.
func nameOf(kind dhcp4.MessageType) string { return strings.ToUpper(kind.String()) }
