package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/server"
)

// standIn is a daemon that answers as a test says.
type standIn struct {
	socket string

	mu     sync.Mutex
	answer any
	asked  []string // paths with their queries
	stop   func()
}

// newStandIn makes one that serves.
func newStandIn(t testing.TB, answer any) *standIn {
	t.Helper()
	folder, err := os.MkdirTemp("", "ipam")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	d := &standIn{socket: filepath.Join(folder, "plugin.sock"), answer: answer}
	d.start(t)
	t.Cleanup(func() { d.stop() })
	return d
}

func (d *standIn) start(t testing.TB) {
	t.Helper()
	l, err := server.Listen(d.socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: d, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}
	go func() { _ = s.Serve(l) }()
	d.stop = func() { s.Close() }
}

func (d *standIn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked = append(d.asked, r.URL.String())
	_ = json.NewEncoder(w).Encode(d.answer)
}

// questions are those since the last look.
func (d *standIn) questions() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	asked := d.asked
	d.asked = nil
	return asked
}

func (d *standIn) answers(answer any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.answer = answer
}

// now is when the golden files were made.
var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// someLeases has one of each state, one that never ends, and one whose name
// would move the cursor, ring the bell and add a column and a line.
func someLeases() []server.Lease {
	at := func(d time.Duration) *time.Time { return new(now.Add(d)) }
	subnet := netip.MustParsePrefix("192.0.2.0/24")
	l := server.Lease{
		PrefixLength: 24, PoolID: "192.0.2.0/24?dhcp_server=192.0.2.3&id=A", Subnet: subnet, Server: netip.MustParseAddr("192.0.2.3"),
		ObtainedAt: at(-time.Hour), RenewAt: at(time.Minute), RebindAt: at(30 * time.Minute), ExpiresAt: at(90*time.Minute + 400*time.Millisecond),
	}
	var leases []server.Lease
	for i, c := range []struct{ name, state string }{
		{"web", "bound"},
		{"a-rather-long-name", "renewing"},
		{"db", "rebinding"},
		{"", "lost"},
		{"mail", "waiting"},
		{"cron", "releasing"},
		{"for-ever", "bound"},
		{"\x1b[2J\u009b31m\a\t\nx\u202e\xff", "bound"},
	} {
		l.Address, l.MAC = netip.AddrFrom4([4]byte{192, 0, 2, byte(9 + 31*i)}), lease.MAC{2, 0, 0, 0, 0, byte(i)}
		l.ClientID, l.Name, l.State = fmt.Sprintf("01:%02x", i), c.name, c.state
		leases = append(leases, l)
	}
	leases[3].ExpiresAt = at(-time.Hour)
	leases[4].Server = netip.MustParseAddr("198.51.100.200")
	leases[6].RenewAt, leases[6].RebindAt, leases[6].ExpiresAt = nil, nil, nil
	return leases
}

// Tables and JSON as people and programs know them.
func TestLeasesOutput(t *testing.T) {
	var got bytes.Buffer
	if err := printLines(&got, leaseTable(someLeases(), now)); err != nil {
		t.Fatal(err)
	}
	matchGolden(t, "leases.txt", got.String())

	var coloured strings.Builder
	for _, l := range leaseTable(someLeases(), now) {
		coloured.WriteString(l.shown(true) + "\n")
	}
	matchGolden(t, "leases-colour.txt", coloured.String())
	if without := strings.NewReplacer(string(red), "", string(yellow), "", string(plain), "").Replace(coloured.String()); without != got.String() {
		t.Errorf("columns with colours stand elsewhere:\n%s", without)
	}

	cleanEnv(t)
	d := newStandIn(t, someLeases())
	out := program("--socket", d.socket, "leases", "--json")
	if out.status != 0 || out.stderr != "" {
		t.Errorf("%+v", out)
	}
	matchGolden(t, "leases.json", out.stdout)
	var read []server.Lease
	if err := json.Unmarshal([]byte(out.stdout), &read); err != nil || len(read) != len(someLeases()) || read[7].Name != "\x1b[2J\u009b31m\a\t\nx\u202e\ufffd" {
		t.Errorf("%v: %+v", err, read)
	}
	out = program("--socket", d.socket, "leases")
	if out.status != 0 || out.stderr != "" || strings.Count(out.stdout, "\n") != len(someLeases())+1 {
		t.Errorf("%+v", out)
	}
}

// No control character of a name comes out, by whatever way.
func TestHostileNames(t *testing.T) {
	cleanEnv(t)
	d := newStandIn(t, someLeases())
	flags := []string{"--socket", d.socket, "leases"}
	outcomes := []outcome{program(flags...), program(append(flags, "--json")...)}
	d.answers([]server.Lease{})
	outcomes = append(outcomes, program(append(flags, "--name", "\x1bc\u009b31m\nx\u202e*")...))
	for _, got := range outcomes {
		if got.stdout == "" && !strings.Contains(got.stderr, "no lease has name") {
			t.Errorf("%+v", got)
		}
		if i := strings.IndexFunc(got.stdout+got.stderr, hidden); i >= 0 {
			t.Errorf("%q", (got.stdout + got.stderr)[i:])
		}
	}
	for name, want := range map[string]string{`{"a":"é😀 b"}`: `{"a":"é😀 b"}`, "{\"a\":\"\x7f\u0085\u202e\U000e0001b\"}": `{"a":"\u007f\u0085\u202e\udb40\udc01b"}`} {
		if got := string(escaped([]byte(name))); got != want {
			t.Errorf("%q becomes %s, want %s", name, got, want)
		}
	}
}

// What the command line says arrives at the daemon.
func TestLeasesAsked(t *testing.T) {
	cleanEnv(t)
	d := newStandIn(t, someLeases())
	for args, want := range map[string]string{
		"":                                 "",
		"--sort expires":                   "sort=expires",
		"192.0.2.9":                        "address=192.0.2.9",
		"--state lost --state bound":       "state=lost&state=bound",
		"--state lost,bound":               "state=lost&state=bound",
		"--pool 192.0.2.0/24?id=A&x=%2C,b": "pool=192.0.2.0/24?id=A%26x=%252C,b",
		"--name web*x --mac 02:00:00:00:00:01 --pool 192.0.2.0/24 192.0.2.9": "address=192.0.2.9&mac=02:00:00:00:00:01&name=web*x&pool=192.0.2.0/24",
	} {
		got := program(append([]string{"--socket", d.socket, "leases"}, strings.Fields(args)...)...)
		if got.status != 0 {
			t.Errorf("%s: %+v", args, got)
		}
		asked := d.questions()
		if len(asked) != 1 {
			t.Errorf("%s: asks %q", args, asked)
			continue
		}
		u, err := url.Parse(asked[0])
		if err != nil {
			t.Fatal(err)
		}
		wanted, err := url.ParseQuery(want)
		if err != nil {
			t.Fatal(err)
		}
		if u.Path != "/v1/leases" || u.RawQuery != wanted.Encode() {
			t.Errorf("%s: asks %s, want %s", args, asked[0], wanted.Encode())
		}
	}
}

// A search that finds nothing says so; a listing of nothing is a listing.
func TestNoLeases(t *testing.T) {
	cleanEnv(t)
	d := newStandIn(t, []server.Lease{})
	const complaint = "oam-docker-ipam: no lease has name web* and state lost\n"
	for args, want := range map[string]outcome{
		"":                                   {0, "no leases\n", ""},
		"--json":                             {0, "[]\n", ""},
		"--sort name":                        {0, "no leases\n", ""},
		"--state lost --name web*":           {1, "", complaint},
		"--state lost --name web* --json":    {1, "[]\n", complaint},
		"192.0.2.9":                          {1, "", "oam-docker-ipam: no lease has address 192.0.2.9\n"},
		"--pool 192.0.2.0/24 --sort expires": {1, "", "oam-docker-ipam: no lease has pool 192.0.2.0/24\n"},
	} {
		if got := program(append([]string{"--socket", d.socket, "leases"}, strings.Fields(args)...)...); got != want {
			t.Errorf("%s: %+v, want %+v", args, got, want)
		}
	}
}

// What can't be is refused before the daemon is asked.
func TestLeasesErrors(t *testing.T) {
	cleanEnv(t)
	d := newStandIn(t, someLeases())
	for args, parts := range map[string][]string{
		"--state gone":            {`"gone"`, "lost, rebinding, renewing, waiting, releasing, bound"},
		"--mac 02:00":             {`"02:00"`, "six bytes"},
		"--sort age":              {`"age"`, "address, expires, mac, name, state"},
		"--name [*":               {`"[*"`, "pattern"},
		"web":                     {`"web"`, "IPv4 address"},
		"192.0.2.9 192.0.2.10":    {"one address", "192.0.2.10"},
		"--watch":                 {"--watch needs a terminal", "events --follow"},
		"--watch --json":          {"--watch and --json", "events --follow"},
		"--watch --state nothing": {`"nothing"`},
	} {
		got := program(append([]string{"--socket", d.socket, "leases"}, strings.Fields(args)...)...)
		if got.status != 1 || got.stdout != "" || strings.Count(got.stderr, "\n") != 1 {
			t.Errorf("%s: %+v", args, got)
		}
		for _, part := range parts {
			if !strings.Contains(got.stderr, part) {
				t.Errorf("%s: %q lacks %q", args, got.stderr, part)
			}
		}
	}
	if asked := d.questions(); len(asked) != 0 {
		t.Errorf("asks %q", asked)
	}
}

// A view fits into any height, and tells what is left out and what is wrong.
func TestLeaseView(t *testing.T) {
	wanted, err := server.ParseSelection(url.Values{"name": {"web\x1b*"}})
	if err != nil {
		t.Fatal(err)
	}
	view := func(n, height int, wanted server.Selection, trouble error) []string {
		var texts []string
		for _, l := range leaseView(someLeases()[:n], wanted, now.Add(-3*time.Second), trouble, now, height) {
			texts = append(texts, l.text)
		}
		if len(texts) > height {
			t.Errorf("%d lines of %d", len(texts), height)
		}
		return texts
	}
	const head = "2026-01-02 03:04:05  leases 8 (lost 1, rebinding 1, renewing 1, waiting 1, releasing 1, bound 3)"
	all := view(8, 11, server.Selection{}, nil)
	if len(all) != 11 || all[0] != head || all[1] != "" || !strings.HasPrefix(all[2], "ADDRESS") || !strings.HasPrefix(all[10], "192.0.2.226") {
		t.Errorf("%q", all)
	}
	some := view(8, 10, wanted, net.ErrClosed)
	if len(some) != 10 || some[0] != head+" with name web\ufffd*" || some[1] != "as of 03:04:02: "+net.ErrClosed.Error() || !strings.HasPrefix(some[8], "192.0.2.164") || some[9] != "and 2 more" {
		t.Errorf("%q", some)
	}
	if none := view(0, 24, server.Selection{}, nil); len(none) != 3 || none[0] != "2026-01-02 03:04:05  leases 0" {
		t.Errorf("%q", none)
	}
	for height := range 4 {
		if got := view(8, height, wanted, errors.New("x")); len(got) != height {
			t.Errorf("%d: %q", height, got)
		}
	}
}

// Colours are for terminals whose user wants them.
func TestColour(t *testing.T) {
	cleanEnv(t)
	d := newStandIn(t, someLeases())
	for _, c := range []struct {
		noColor, term string
		want          bool
	}{{"", "xterm", true}, {"", "", true}, {"1", "xterm", false}, {"", "dumb", false}} {
		t.Setenv("NO_COLOR", c.noColor)
		t.Setenv("TERM", c.term)
		master, slave := openTerminal(t, 200, 24)
		var stderr bytes.Buffer
		if status := run([]string{"oam-docker-ipam", "--socket", d.socket, "leases"}, slave, &stderr); status != 0 {
			t.Errorf("%+v: status %d, %s", c, status, &stderr)
		}
		slave.Close()
		text, _ := io.ReadAll(master) // which ends with an error: nobody has the terminal any more
		got := strings.ReplaceAll(string(text), "\r\n", "\n")
		if strings.Contains(got, string(red)+"192.0.2.102 ") != c.want || strings.Contains(got, string(yellow)+"192.0.2.40 ") != c.want || strings.Contains(got, "\x1b") != c.want {
			t.Errorf("%+v: %q", c, got)
		}
		if !slices.Contains(strings.Split(got, "\n"), leaseTable(someLeases(), time.Now())[0].text) {
			t.Errorf("%+v: no header in %q", c, got)
		}
	}
	file, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if colourful(file) || colourful(new(bytes.Buffer)) {
		t.Error("a file or a buffer gets colours")
	}
}

// The command with 10,000 leases, from its start to its end.
func BenchmarkLeases(b *testing.B) {
	d := newStandIn(b, countedLeases(10_000))
	for name, args := range map[string][]string{"table": nil, "json": {"--json"}} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				got := program(append([]string{"--socket", d.socket, "leases"}, args...)...)
				if got.status != 0 {
					b.Fatal(got.stderr)
				}
				b.ReportMetric(float64(len(got.stdout)), "output-B")
			}
		})
	}
}
