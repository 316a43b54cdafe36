package metrics

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

const (
	// maxScrapes bounds those at the same time: each holds all its text.
	maxScrapes = 4
	// healthTime is how long what is stuck may take to answer, answerTime for
	// how long a caller waits: then he is told what is stuck, if that is known.
	healthTime = 5 * time.Second
	answerTime = healthTime + 500*time.Millisecond
)

const index = `oam-docker-ipam, a Docker IPAM driver by DHCP

/metrics  for Prometheus
/healthz  200 while everything that runs gets on with its work, else 503 and what is stuck
/readyz   200 while an address request can be expected to succeed, else 503 and why
`

// Handler serves /metrics, /healthz, which asks alive, and /readyz, which asks
// ready. Neither is asked twice at the same time.
func (m *Metrics) Handler(alive, ready func(context.Context) error) http.Handler {
	mux := http.NewServeMux() // to which GET means HEAD too
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: maxScrapes}))
	mux.Handle("GET /healthz", health(alive))
	mux.Handle("GET /readyz", health(ready))
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { tell(w, http.StatusOK, index) })
	return mux
}

// health tells what a question's answer is. Callers at the same time share one.
func health(ask func(context.Context) error) http.Handler {
	var pulse lease.Pulse[error]
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), answerTime)
		defer cancel()
		found, err := pulse.Ask(ctx, func() error {
			// Its caller may leave while others still want to know.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), healthTime)
			defer cancel()
			return ask(ctx)
		})
		if err == nil {
			err = found
		}
		if err != nil {
			tell(w, http.StatusServiceUnavailable, fmt.Sprintln(err))
			return
		}
		tell(w, http.StatusOK, "ok\n")
	})
}

func tell(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, text) // a caller who is gone needs no answer
}
