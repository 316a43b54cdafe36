package server

import (
	"context"
	"net"
	"net/http"
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

// streaming is the context of an answer without an end of its own: it ends when
// its reader has gone, or the daemon stops.
func streaming(r *http.Request) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(r.Context())
	serving, ok := ctx.Value(stopping{}).(context.Context)
	if !ok {
		return ctx, cancel
	}
	stop := context.AfterFunc(serving, cancel)
	return ctx, func() { stop(); cancel() }
}
