package server

import (
	"context"
	"net"
	"net/http"
	"sync"
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

const (
	// stalledTime is how long a reader may take none of an answer, pausedTime how
	// long once the daemon stops, which he then holds up.
	stalledTime = 30 * time.Second
	pausedTime  = time.Second
)

// serving is the context that ends when the daemon stops.
func serving(r *http.Request) context.Context {
	if ctx, ok := r.Context().Value(stopping{}).(context.Context); ok {
		return ctx
	}
	return r.Context()
}

// streaming is the context of an answer without an end of its own: it ends when
// its reader has gone, or the daemon stops.
func streaming(r *http.Request) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(r.Context())
	stop := context.AfterFunc(serving(r), cancel)
	return ctx, func() { stop(); cancel() }
}

// reading has the answers of a handler cut off where nobody reads them.
func reading(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		paced := &pacedWriter{ResponseWriter: w, conn: http.NewResponseController(w)}
		defer context.AfterFunc(serving(r), paced.hurry)()
		h(paced, r)
	}
}

// pacedWriter is a response of which each piece has its time to be taken.
type pacedWriter struct {
	http.ResponseWriter
	conn *http.ResponseController

	// mu guards hurried, and the deadline that goes with it.
	mu      sync.Mutex
	hurried bool
}

// Unwrap is for http.ResponseController.
func (w *pacedWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Write implements http.ResponseWriter. Writers that have no deadline are those
// of unit tests.
func (w *pacedWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	if !w.hurried {
		_ = w.conn.SetWriteDeadline(time.Now().Add(stalledTime))
	}
	w.mu.Unlock()
	return w.ResponseWriter.Write(b)
}

// hurry gives all that is left to be written no more than pausedTime.
func (w *pacedWriter) hurry() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hurried = true
	_ = w.conn.SetWriteDeadline(time.Now().Add(pausedTime))
}
