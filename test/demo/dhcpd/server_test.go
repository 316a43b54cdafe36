package dhcpd

import (
	"errors"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/krolaw/dhcp4"
)

// wire is a socket in memory. What is written to it goes to answers.
type wire struct {
	net.PacketConn // nil: nothing else is used
	requests       chan dhcp4.Packet
	answers        chan sent
	closed         chan struct{}
	broken         error // of each write
}

type sent struct {
	packet dhcp4.Packet
	to     string
}

func newWire() *wire {
	return &wire{requests: make(chan dhcp4.Packet), answers: make(chan sent, 1), closed: make(chan struct{})}
}

func (w *wire) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case p := <-w.requests:
		// A port that no answer may go to.
		return copy(b, p), &net.UDPAddr{IP: net.IPv4(10, 10, 0, 7), Port: 1234}, nil
	case <-w.closed:
		return 0, nil, net.ErrClosed
	}
}

func (w *wire) WriteTo(b []byte, to net.Addr) (int, error) {
	if w.broken != nil {
		return 0, w.broken
	}
	w.answers <- sent{b, to.String()}
	return len(b), nil
}

func (w *wire) Close() error {
	close(w.closed)
	return nil
}

func TestServerAnswersTheRelay(t *testing.T) {
	w := newWire()
	s := Serve(w, small)

	for _, test := range []struct {
		ask
		want string
	}{
		{discover(1), "OFFER 10.10.0.100"},
		{request(1, a100), "ACK 10.10.0.100"},
		{request(2, a101), "NAK: 10.10.0.101 was not offered"},
	} {
		w.requests <- test.packet()
		answer := <-w.answers
		if got := say(answer.packet, nil); got != test.want || answer.to != "10.10.0.2:67" {
			t.Errorf("%q to %s, want %q to the relay", got, answer.to, test.want)
		}
	}
	if leases := s.Leases(); len(leases) != 1 || leases[0].Addr != small.First {
		t.Errorf("leases %+v", leases)
	}
	w.requests <- release(1, a100).packet()
	w.requests <- renew(2, "").packet()
	w.requests <- dhcp4.Packet("noise")
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if leases := s.Leases(); leases != nil {
		t.Errorf("leases %+v after their release", leases)
	}
	want := []string{
		"DISCOVER from 02:00:00:00:00:01 by relay 10.10.0.2",
		"OFFER of 10.10.0.100 to 02:00:00:00:00:01",
		"REQUEST for 10.10.0.100 from 02:00:00:00:00:01 by relay 10.10.0.2",
		"ACK of 10.10.0.100 to 02:00:00:00:00:01",
		"REQUEST for 10.10.0.101 from 02:00:00:00:00:02 by relay 10.10.0.2",
		"NAK to 02:00:00:00:00:02: 10.10.0.101 was not offered",
		"RELEASE of 10.10.0.100 from 02:00:00:00:00:01 by relay 10.10.0.2",
		"REQUEST from 02:00:00:00:00:02 by relay 10.10.0.2",
		"no answer: the request names no address",
		"5 bytes dropped: not DHCP",
	}
	if got := s.Log(); !slices.Equal(got, want) {
		t.Errorf("log:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestServerGoesOnWhenAnAnswerIsNotSent(t *testing.T) {
	w := newWire()
	w.broken = errors.New("no route")
	s := Serve(w, small)
	w.requests <- discover(1).packet()
	w.requests <- release(1, a100).packet() // it reads again
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if log := s.Log(); !slices.Contains(log, "the answer was not sent: no route") {
		t.Errorf("log:\n%s", strings.Join(log, "\n"))
	}
}
