package server

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

const capturePath = operatorPath + "capture"

// capture streams packets as pcapng.
func (o operator) capture(w http.ResponseWriter, r *http.Request) {
	what, length, err := parseCapture(r.URL.RawQuery)
	if err != nil {
		answer(w, http.StatusBadRequest, failure{Err: "capture: " + err.Error()})
		return
	}
	if err := o.knows(what.Pool); err != nil {
		answer(w, http.StatusNotFound, failure{Err: "capture: " + err.Error()})
		return
	}
	ctx, end := streaming(r)
	defer end()
	conn := http.NewResponseController(w)
	if length >= 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, length)
		defer cancel()
	}
	w.Header().Set("Content-Type", "application/x-pcapng")
	if err := o.Capture(ctx, flushed{w, conn}, what); err != nil {
		o.log.Debug("capture cut off", "error", err)
	}
}

// parseCapture reads a request for packets, with the time that it lasts, which is
// negative where it has no end.
func parseCapture(raw string) (what Capture, length time.Duration, err error) {
	length = -1
	err = parameters(raw, "container, pool, last and for", func(name, text string, _ []string) (known bool, err error) {
		switch name {
		case "container":
			what.Container = text
		case "pool":
			what.Pool = text
		case "last":
			what.Last, err = parseCount(text)
		case "for":
			length, err = time.ParseDuration(text)
			if err == nil && length < 0 {
				err = errors.New("want a time such as 30s, or 0s for what is remembered alone")
			}
		default:
			return false, nil
		}
		return true, err
	})
	return what, length, err
}

// flushed sends what is written at once.
type flushed struct {
	io.Writer
	conn *http.ResponseController
}

// Write implements io.Writer.
func (f flushed) Write(b []byte) (int, error) {
	n, err := f.Writer.Write(b)
	if err == nil {
		err = f.conn.Flush()
	}
	return n, err
}

// OpenCapture asks the daemon on a socket for packets, as pcapng, for a time; 0
// is for what it remembers alone. The caller must close what it returns. It ends
// before that time when the daemon stops.
func OpenCapture(ctx context.Context, socket string, what Capture, length time.Duration) (io.ReadCloser, error) {
	q := url.Values{
		"container": {what.Container}, "pool": {what.Pool},
		"last": {strconv.Itoa(what.Last)}, "for": {length.String()},
	}
	return open(ctx, socket, http.MethodGet, capturePath+"?"+q.Encode(), nil)
}
