package server

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Refuse serves the sockets, by path, of a daemon that can't start for a
// reason, for a time of patience or until ctx ends: else those who wait at
// sockets that systemd holds would wait for ever, an engine that boots among
// them. Whoever is let in is answered as by Serve; it closes the listeners.
//
// All calls get the reason but those by which an engine learns what the driver
// is: an error there costs the driver its MAC addresses until the engine
// restarts.
func Refuse(ctx context.Context, sockets map[string]net.Listener, reason error, patience time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	// Nobody is cut off: an answer takes no longer than to read its request.
	const grace = headerTime + bodyTime + time.Second
	var serving sync.WaitGroup
	for path, l := range sockets {
		serving.Go(func() {
			// The daemon ends with reason, whatever else goes wrong.
			_ = Serve(ctx, l, refusal(driverOf(path), reason), grace, slog.New(slog.DiscardHandler))
		})
	}
	serving.Wait()
}

// driverOf is the driver that a socket is: the engine knows both by this name.
func driverOf(path string) lease.Driver {
	as := lease.Driver{Name: strings.TrimSuffix(filepath.Base(path), ".sock")}
	for _, d := range lease.Drivers("") {
		// The one of no suffix comes first.
		if strings.HasSuffix(as.Name, d.Name) {
			as.SharedMAC = d.SharedMAC
		}
	}
	return as
}

// refusal is the handler of a driver's socket when there is no daemon behind it.
func refusal(as lease.Driver, reason error) http.Handler {
	text := "doesn't start: " + reason.Error()
	refuse := func(status int, f failure) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			// Whoever is cut off while writing doesn't read the answer.
			_, _ = readBody(w, r, reconcileLimit)
			answer(w, status, f)
		}
	}
	r := newRouter()
	driver{as: as, repeats: new(repeats)}.introduce(r)
	r.PathPrefix("/IpamDriver.").Methods(http.MethodPost).Handler(refuse(http.StatusOK, failure{Error: "oam-docker-ipam " + text}))
	r.PathPrefix(operatorPath).Handler(refuse(http.StatusServiceUnavailable, failure{Err: "the daemon " + text}))
	return r
}
