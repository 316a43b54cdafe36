package metrics

import (
	"context"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestParseAddr(t *testing.T) {
	long := "/" + strings.Repeat("a", maxSocketPath-1)
	for _, c := range []struct {
		text   string
		want   Addr
		public bool
	}{
		{"", Addr{}, false},
		{"127.0.0.1:9767", Addr{"tcp", "127.0.0.1:9767"}, false},
		{"127.8.8.8:1", Addr{"tcp", "127.8.8.8:1"}, false},
		{"[::1]:9767", Addr{"tcp", "[::1]:9767"}, false},
		{"[::ffff:127.0.0.1]:9767", Addr{"tcp", "[::ffff:127.0.0.1]:9767"}, false},
		{"localhost:65535", Addr{"tcp", "localhost:65535"}, false},
		{":9767", Addr{"tcp", ":9767"}, true},
		{"0.0.0.0:9767", Addr{"tcp", "0.0.0.0:9767"}, true},
		{"[::]:9767", Addr{"tcp", "[::]:9767"}, true},
		{"192.0.2.5:9767", Addr{"tcp", "192.0.2.5:9767"}, true},
		{"[fe80::1%eth0]:9767", Addr{"tcp", "[fe80::1%eth0]:9767"}, true},
		{"/run/oam-docker-ipam/metrics.sock", Addr{"unix", "/run/oam-docker-ipam/metrics.sock"}, false},
		{long, Addr{"unix", long}, false},
	} {
		got, err := ParseAddr(c.text)
		if err != nil || got != c.want || got.Public() != c.public {
			t.Errorf("%q is %+v, public %v, %v", c.text, got, got.Public(), err)
		}
	}
}

// What is wrong is said, with what would be right.
func TestParseAddrRefuses(t *testing.T) {
	for text, why := range map[string]string{
		"9767":                                   "neither an address with a port nor an absolute path",
		"127.0.0.1":                              "neither an address with a port nor an absolute path",
		"::1:9767":                               "neither an address with a port nor an absolute path",
		"metrics.sock":                           "neither an address with a port nor an absolute path",
		"127.0.0.1:0":                            "the port is no number from 1 to 65535",
		"127.0.0.1:":                             "the port is no number from 1 to 65535",
		"127.0.0.1:65536":                        "the port is no number from 1 to 65535",
		"127.0.0.1:http":                         "the port is no number from 1 to 65535",
		"127.0.0.1:-1":                           "the port is no number from 1 to 65535",
		"monitoring.lan:9767":                    "the host is no IP address",
		"127.0.0.256:9767":                       "the host is no IP address",
		"http://127.0.0.1:9767":                  "neither an address with a port nor an absolute path",
		"unix:/run/metrics.sock":                 "the port is no number from 1 to 65535",
		"/run/metrics/":                          "no file can have that name",
		"/run/a\x00b":                            "no file can have that name",
		"/" + strings.Repeat("a", maxSocketPath): "the path of a socket has at most 107 bytes",
	} {
		got, err := ParseAddr(text)
		if err == nil || got != (Addr{}) {
			t.Errorf("%q is %+v", text, got)
			continue
		}
		for _, part := range []string{why, "METRICS_ADDR", "127.0.0.1:9767", "/run/oam-docker-ipam/metrics.sock"} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%q: error %q doesn't say %q", text, err, part)
			}
		}
	}
}

// FuzzParseAddr: whatever is taken can be listened on, as far as it is well
// formed, and is either this host's only or said to be public.
func FuzzParseAddr(f *testing.F) {
	for _, text := range []string{"", ":1", "[::1]:9767", "/run/x.sock", "localhost:1", "[::1%25lo]:7"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		a, err := ParseAddr(text)
		if err != nil || a == (Addr{}) {
			return
		}
		if a.Address != text {
			t.Errorf("%q became %q", text, a.Address)
		}
		switch a.Network {
		case "unix":
			if _, err := net.ResolveUnixAddr("unix", text); err != nil || !filepath.IsAbs(text) {
				t.Errorf("%q: %v", text, err)
			}
		default:
			host, _ := a.host()
			if host == "localhost" {
				break
			}
			tcp, err := net.ResolveTCPAddr("tcp", text)
			if err != nil || a.Public() == tcp.IP.IsLoopback() {
				t.Errorf("%q is %v, public %v, %v", text, tcp, a.Public(), err)
			}
		}
	})
}

// lines is a log.
type lines chan string

func (l lines) Write(p []byte) (int, error) {
	l <- string(p)
	return len(p), nil
}

// take returns what was logged since the last time.
func (l lines) take() (text string) {
	for {
		select {
		case line := <-l:
			text += line
		default:
			return text
		}
	}
}

// start serves at an address, "ok" to everybody, until stop, which waits for the
// end.
func start(t *testing.T, a Addr) (log lines, stop func()) {
	t.Helper()
	log = make(lines, 100)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		Serve(ctx, a, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { tell(w, 200, "ok\n") }), slog.New(slog.NewTextHandler(log, nil)))
	}()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(stop)
	return log, stop
}

// client speaks to an address, whatever the URL says, with a connection for each
// request.
func client(a Addr) *http.Client {
	return &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, a.Network, a.Address)
		}},
	}
}

// freeTCP is an address that nobody has at the moment.
func freeTCP(t *testing.T) Addr {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return Addr{"tcp", l.Addr().String()}
}

// await waits until somebody listens.
func await(t *testing.T, a Addr) {
	t.Helper()
	for range 500 {
		if conn, err := net.Dial(a.Network, a.Address); err == nil {
			conn.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("nobody listens on %s", a.Address)
}

func TestServe(t *testing.T) {
	unix := Addr{"unix", filepath.Join(t.TempDir(), "metrics.sock")}
	for _, a := range []Addr{freeTCP(t), unix} {
		log, stop := start(t, a)
		await(t, a)
		if status, text := get(t, client(a), "http://metrics/"); status != 200 || text != "ok\n" {
			t.Errorf("%s answers %d %q", a.Network, status, text)
		}
		if a == unix {
			info, err := os.Stat(a.Address)
			if err != nil || info.Mode() != fs.ModeSocket|0o666 {
				t.Errorf("the socket is %v, %v: want it for all", info.Mode(), err)
			}
		}
		stop()
		if _, err := net.Dial(a.Network, a.Address); err == nil {
			t.Errorf("%s is open after the end", a.Network)
		}
		if text := log.take(); strings.Count(text, "\n") != 1 || !strings.Contains(text, `level=INFO msg="metrics served" address=`+a.Address) {
			t.Errorf("log:\n%s", text)
		}
	}
	if _, err := os.Lstat(unix.Address); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
}

func TestServeNowhere(t *testing.T) {
	log, _ := start(t, Addr{}) // ends by itself: stop waits for it
	Serve(t.Context(), Addr{}, nil, slog.New(slog.NewTextHandler(log, nil)))
	if text := log.take(); text != "" {
		t.Errorf("log: %s", text)
	}
}

func TestServeWarnsOfTheNetwork(t *testing.T) {
	_, port := freeTCP(t).host()
	a := Addr{"tcp", ":" + port}
	log, stop := start(t, a)
	await(t, Addr{"tcp", "127.0.0.1:" + port})
	stop()
	if text := log.take(); strings.Count(text, "level=WARN") != 1 || !strings.Contains(text, "can be read from the network") {
		t.Errorf("log:\n%s", text)
	}
}

// A socket that a killed daemon left is replaced.
func TestServeReplacesStaleSocket(t *testing.T) {
	a := Addr{"unix", filepath.Join(t.TempDir(), "metrics.sock")}
	l, err := net.Listen(a.Network, a.Address)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	start(t, a)
	await(t, a)
}

// Whatever is in the way is named, with the way out, once; when it is gone the
// metrics are there within listenPace.
func TestServeTriesAgain(t *testing.T) {
	hold := func(a Addr) func(t *testing.T) func() {
		return func(t *testing.T) func() {
			l, err := net.Listen(a.Network, a.Address)
			if err != nil {
				t.Fatal(err)
			}
			return func() { l.Close() }
		}
	}
	folder := t.TempDir()
	tcp, unix := freeTCP(t), Addr{"unix", filepath.Join(folder, "metrics.sock")}
	_, port := tcp.host()
	for name, c := range map[string]struct {
		at   Addr
		take func(t *testing.T) (free func())
		says []string
	}{
		"port":   {tcp, hold(tcp), []string{tcp.Address, "address already in use", "ss -tlnp 'sport = :" + port + "'", "another METRICS_ADDR"}},
		"socket": {unix, hold(unix), []string{unix.Address, "another process serves this socket", "ss -xlp src " + unix.Address, "another METRICS_ADDR"}},
		"file": {unix, func(t *testing.T) func() {
			if err := os.WriteFile(unix.Address, []byte("diary"), 0o600); err != nil {
				t.Fatal(err)
			}
			return func() {
				if text, err := os.ReadFile(unix.Address); err != nil || string(text) != "diary" {
					t.Errorf("the file has %q, %v", text, err)
				}
				os.Remove(unix.Address)
			}
		}, []string{unix.Address, "no socket but something else", "another METRICS_ADDR"}},
		"no folder": {Addr{"unix", filepath.Join(folder, "later", "metrics.sock")}, func(t *testing.T) func() {
			return func() {
				if err := os.Mkdir(filepath.Join(folder, "later"), 0o755); err != nil {
					t.Error(err)
				}
			}
		}, []string{"its folder must be there", "METRICS_ADDR=/run/oam-docker-ipam/metrics.sock"}},
	} {
		t.Run(name, func(t *testing.T) {
			free := c.take(t)
			synctest.Test(t, func(t *testing.T) {
				log, stop := start(t, c.at)
				time.Sleep(5*listenPace + time.Second)
				text := log.take()
				if strings.Count(text, "\n") != 1 || !strings.Contains(text, "level=ERROR") {
					t.Errorf("log:\n%s", text)
				}
				for _, part := range c.says {
					if !strings.Contains(text, part) {
						t.Errorf("the log doesn't say %q:\n%s", part, text)
					}
				}
				free()
				began := time.Now()
				text = <-log
				if took := time.Since(began); took > listenPace || !strings.Contains(text, "level=INFO msg=\"metrics served\"") {
					t.Errorf("log after %s:\n%s", took, text)
				}
				if status, _ := get(t, client(c.at), "http://metrics/"); status != 200 {
					t.Errorf("status %d", status)
				}
				stop()
				if text := log.take(); text != "" {
					t.Errorf("log:\n%s", text)
				}
			})
		})
	}
}

// An address that this host doesn't have is explained too. 192.0.2.0/24 is
// nobody's (RFC 5737).
func TestServeForeignAddress(t *testing.T) {
	_, err := Addr{"tcp", "192.0.2.77:9767"}.listen(t.Context())
	if err == nil || !strings.Contains(err.Error(), "192.0.2.77 is no address of this host") {
		t.Errorf("error %v", err)
	}
}

// Those who hold connections and say nothing take neither all that the daemon has,
// nor its end.
func TestServeBoundsCallers(t *testing.T) {
	a := freeTCP(t)
	_, stop := start(t, a)
	await(t, a)
	var held []net.Conn
	for range maxCallers {
		conn, err := net.Dial(a.Network, a.Address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		held = append(held, conn)
	}
	// The kernel has let the next one in, the server hasn't.
	status := make(chan int)
	go func() {
		res, err := client(a).Get("http://metrics/")
		if err != nil {
			status <- 0
			return
		}
		res.Body.Close()
		status <- res.StatusCode
	}()
	select {
	case got := <-status:
		t.Errorf("status %d for one too many", got)
	case <-time.After(200 * time.Millisecond):
		held[0].Close()
		if got := <-status; got != 200 {
			t.Errorf("status %d when another had left", got)
		}
	}
	began := time.Now()
	stop()
	if took := time.Since(began); took > stopTime+2*time.Second {
		t.Errorf("the end took %s", took)
	}
}
