package server

import (
	"context"
	"net"
	"net/http"
	"time"
)

// stopping is the key under which a request's context has the one that ends when
// the daemon stops.
type stopping struct{}

// baseContext makes what ends ctx known to all requests of a listener, without
// ending them: those in hand are finished.
func baseContext(ctx context.Context) func(net.Listener) context.Context {
	return func(net.Listener) context.Context {
		return context.WithValue(context.Background(), stopping{}, ctx)
	}
}

// pausedTime is how long a reader who has paused may hold up the daemon's stop.
const pausedTime = time.Second

// streaming is for an answer without an end of its own: its context ends when its
// reader has gone, or the daemon stops. Call end when all is written.
func streaming(w http.ResponseWriter, r *http.Request) (ctx context.Context, conn *http.ResponseController, end func()) {
	ctx, cancel := context.WithCancel(r.Context())
	conn = http.NewResponseController(w)
	paused := context.AfterFunc(ctx, func() { _ = conn.SetWriteDeadline(time.Now().Add(pausedTime)) })
	stopped := func() bool { return true }
	if serving, ok := ctx.Value(stopping{}).(context.Context); ok {
		stopped = context.AfterFunc(serving, cancel)
	}
	return ctx, conn, func() { paused(); stopped(); cancel() }
}
