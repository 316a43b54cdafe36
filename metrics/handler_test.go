package metrics

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// answer is what a handler says to a request without a network.
func answer(h http.Handler, method, path string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
	return w
}

func TestHandler(t *testing.T) {
	wrong := func(text string) func(context.Context) error {
		return func(context.Context) error { return errors.New(text) }
	}
	well, ill := fed().Handler(fine, fine), fed().Handler(wrong("keep lease 10.0.0.7: stuck"), wrong("server 192.0.2.1 is silent"))
	for _, c := range []struct {
		h            http.Handler
		method, path string
		status       int
		text         string // all of it, or with … its beginning
	}{
		{well, "GET", "/healthz", 200, "ok\n"},
		{well, "GET", "/readyz", 200, "ok\n"},
		{well, "HEAD", "/readyz", 200, "ok\n"}, // the server leaves the text out
		{ill, "GET", "/healthz", 503, "keep lease 10.0.0.7: stuck\n"},
		{ill, "GET", "/readyz", 503, "server 192.0.2.1 is silent\n"},
		{ill, "GET", "/metrics", 200, "# HELP …"},
		{well, "GET", "/", 200, "oam-docker-ipam, a Docker IPAM driver by DHCP…"},
		{well, "GET", "/metrics/", 404, "404 page not found\n"},
		{well, "GET", "/debug/pprof/", 404, "404 page not found\n"},
		{well, "POST", "/metrics", 405, "Method Not Allowed\n"},
		{well, "DELETE", "/healthz", 405, "Method Not Allowed\n"},
		{well, "PUT", "/", 405, "Method Not Allowed\n"},
	} {
		w := answer(c.h, c.method, c.path)
		text := w.Body.String()
		begin, more := strings.CutSuffix(c.text, "…")
		if w.Code != c.status || more && !strings.HasPrefix(text, begin) || !more && text != c.text {
			t.Errorf("%s %s: %d %q", c.method, c.path, w.Code, text)
		}
		if strings.HasSuffix(c.path, "z") && c.status != 405 && w.Header().Get("Cache-Control") != "no-store" {
			t.Errorf("%s %s may be cached: %v", c.method, c.path, w.Header())
		}
	}
}

// The index names what there is.
func TestIndex(t *testing.T) {
	h := fed().Handler(fine, fine)
	text := answer(h, "GET", "/").Body.String()
	for _, path := range []string{"/metrics", "/healthz", "/readyz"} {
		if !strings.Contains(text, path+" ") || answer(h, "GET", path).Code != http.StatusOK {
			t.Errorf("%s is not in the index, or isn't there:\n%s", path, text)
		}
	}
}

// What is stuck is told after healthTime, also where the question itself hangs,
// and asked once for all who want to know.
func TestHealthIsBounded(t *testing.T) {
	for _, hangs := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			var asked atomic.Int32
			release := make(chan struct{})
			h := New("", "").Handler(func(ctx context.Context) error {
				asked.Add(1)
				<-ctx.Done()
				if hangs {
					<-release
				}
				return errors.New("the store is stuck")
			}, fine)
			began := time.Now()
			answers := make(chan *httptest.ResponseRecorder)
			const callers = 10
			for range callers {
				go func() { answers <- answer(h, "GET", "/healthz") }()
			}
			want, limit := "the store is stuck\n", healthTime
			if hangs {
				want, limit = "stuck for 5.5s\n", answerTime
			}
			for range callers {
				if w := <-answers; w.Code != http.StatusServiceUnavailable || w.Body.String() != want {
					t.Errorf("hangs %v: %d %q", hangs, w.Code, w.Body)
				}
			}
			if took := time.Since(began); took != limit || asked.Load() != 1 {
				t.Errorf("hangs %v: told after %s, asked %d times", hangs, took, asked.Load())
			}
			if w := answer(h, "GET", "/readyz"); w.Code != http.StatusOK {
				t.Errorf("readiness waits for life: %d %q", w.Code, w.Body)
			}
			close(release)
			synctest.Wait()
		})
	}
}

// A caller who hangs up doesn't take the answer from the others.
func TestHealthOutlivesItsCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := New("", "").Handler(fine, func(ctx context.Context) error {
			select {
			case <-time.After(time.Second):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		ctx, cancel := context.WithCancel(t.Context())
		first := make(chan struct{})
		go func() {
			defer close(first)
			h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/readyz", nil).WithContext(ctx))
		}()
		synctest.Wait()
		time.AfterFunc(time.Millisecond, cancel)
		if w := answer(h, "GET", "/readyz"); w.Code != http.StatusOK {
			t.Errorf("the second caller was told %d %q", w.Code, w.Body)
		}
		<-first
	})
}

// Many who scrape at the same time don't hold many scrapes in memory.
func TestScrapesAreBounded(t *testing.T) {
	m := New("", "")
	entered, release := make(chan struct{}, maxScrapes), make(chan struct{})
	m.From(Sources{
		Pools: func() []lease.PoolStatus {
			select {
			case entered <- struct{}{}:
				<-release
			default: // one too many
			}
			return nil
		},
		Drops:        func() map[string]uint64 { return nil },
		DatabaseSize: func() int64 { return 0 },
	})
	h := m.Handler(fine, fine)
	codes := make(chan int)
	for range maxScrapes {
		go func() { codes <- answer(h, "GET", "/metrics").Code }()
	}
	for len(entered) < maxScrapes {
		runtime.Gosched()
	}
	if code := answer(h, "GET", "/metrics").Code; code != http.StatusServiceUnavailable {
		t.Errorf("one scrape too many: %d", code)
	}
	close(release)
	for range maxScrapes {
		if code := <-codes; code != http.StatusOK {
			t.Errorf("a scrape in time: %d", code)
		}
	}
}
