package server

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Whoever has stopped reading an answer holds up the daemon's stop for no longer
// than a moment, whatever he has asked for.
func TestPausedReader(t *testing.T) {
	subnet := netip.MustParsePrefix("10.0.0.0/16")
	store := fakeStore{pools: []lease.Pool{{ID: "a", Subnet: subnet, Gateway: subnet.Addr().Next()}}}
	for n, addr := 0, subnet.Addr().Next().Next(); n < 10_000; n, addr = n+1, addr.Next() {
		store.leases = append(store.leases, storedLease("a", addr.String()+"/16", lease.MAC{2, 0, 0, 0, byte(n >> 8), byte(n)}))
	}
	for _, path := range []string{leasesPath, inspectPath} {
		t.Run(path, func(t *testing.T) {
			d := startDaemon(t, store, usual)
			conn, err := net.Dial("unix", d.socket)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, "GET "+path+" HTTP/1.1\r\nHost: \r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			if _, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			if err := d.stop(); err != nil {
				t.Error(err)
			}
			if took := time.Since(began); took > 5*pausedTime {
				t.Errorf("the stop took %s", took)
			}
		})
	}
}
