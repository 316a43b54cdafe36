// Bench measures what one address costs: RequestAddress through the plugin
// socket against the bare exchange and the bare commit that are in it, against
// a real Kea, all in one run, in network namespaces of its own.
//
// It wants root and the built daemon, ./oam-docker-ipam: run make bench.
package main

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

var (
	rounds = flag.Int("rounds", 5, "how often the measurements take turns")
	alone  = flag.Int("alone", 200, "requests of a round, one at a time")
	busy   = flag.Int("busy", 2000, "requests of a round, with 64 callers")
	stored = flag.Int("leases", 10000, "leases for the figures of memory and start")
	client = flag.String("client-id", "auto", "the daemon's --client-id; with mac, releases leave at once")
	daemon = flag.String("daemon", "./oam-docker-ipam", "the daemon's binary")
)

// callers is how many ask at once, each on a pool of its own: an engine's lock
// on each network lets one through.
const callers = 64

func main() {
	flag.Parse()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() (err error) {
	path, err := filepath.Abs(*daemon)
	if err != nil {
		return err
	}
	if err := lab.Check([]string{"kea-dhcp4"}); err != nil {
		return err
	}
	l, err := lab.New()
	if err != nil {
		return err
	}
	defer l.CloseOnSignal()()
	defer func() { err = errors.Join(err, l.Close()) }()

	server, err := l.Node("server", "10.10.0.1/16")
	if err != nil {
		return err
	}
	// Our daemon relays from the first address, the bare client from the
	// second.
	host, err := l.Node("host", "10.10.0.2/16", "10.10.0.3/16")
	if err != nil {
		return err
	}
	if _, err := server.StartDHCP(lab.Kea, lab.DHCPConfig{
		LeaseSeconds: 7200,
		Subnets:      []lab.Subnet{lab.NewSubnet(subnet, "10.10.1.0", "10.10.255.254", "10.10.0.1")},
	}); err != nil {
		return err
	}
	b := bench{host: host, binary: path, data: filepath.Join(l.Scratch, "data"), socket: filepath.Join(l.Scratch, "plugin.sock")}
	if err := host.Do(func() (err error) {
		b.raw, err = newRawClient(netip.MustParseAddr("10.10.0.3"), netip.MustParseAddrPort("10.10.0.1:67"))
		return err
	}); err != nil {
		return err
	}
	if b.db, err = bolt.Open(filepath.Join(l.Scratch, "bare.db"), 0o600, &bolt.Options{NoFreelistSync: true, FreelistType: bolt.FreelistMapType}); err != nil {
		return err
	}
	return b.report()
}

const subnet = "10.10.0.0/16"

// bench is what the measurements share.
type bench struct {
	host         *lab.Node
	binary       string
	data, socket string
	raw          *rawClient
	db           *bolt.DB
	daemon       *lab.Process
	plugin       plugin
	next         int // number of the next client; each is used once
}

func (b *bench) start() error {
	daemon, err := b.host.Start("daemon", lab.Command{Args: []string{
		b.binary, "--dhcp-server", "10.10.0.1", "--listen-addr", "10.10.0.2", "--socket", b.socket, "--data-dir", b.data, "--client-id", *client, "server",
	}})
	b.daemon, b.plugin = daemon, newPlugin(b.socket)
	return err
}

// answers waits until the daemon answers, to the millisecond.
func (b *bench) answers() error {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		_, err := b.plugin.capabilities()
		if err == nil || time.Now().After(end) {
			return err
		}
	}
}

// take runs an action on n clients that weren't used yet.
func (b *bench) take(n, workers int, action timed) (sample, error) {
	from := b.next
	b.next += n
	return measure(from, n, workers, action)
}

func (b *bench) rawAcquire(_, i int) (time.Duration, error) {
	began := time.Now()
	err := b.raw.acquire(i)
	return time.Since(began), err
}

func (b *bench) commit(_, i int) (time.Duration, error) {
	began := time.Now()
	err := b.db.Update(func(tx *bolt.Tx) error {
		bucket, err := tx.CreateBucketIfNotExists([]byte("leases"))
		if err != nil {
			return err
		}
		// About as much as a lease takes.
		return bucket.Put(fmt.Appendf(nil, "lease-%d", i), make([]byte, 600))
	})
	return time.Since(began), err
}

// figures are those of the two sides under one load.
type figures struct {
	raw, commit, plain, request, release sample
	requestCPU, releaseCPU               time.Duration
}

// load measures in turns, so that a machine that slows down slows all of them.
func (b *bench) load(n, workers int, pools []string) (f figures, err error) {
	for range *rounds {
		s, err := b.take(n, workers, b.rawAcquire)
		if err != nil {
			return f, fmt.Errorf("bare exchange: %w", err)
		}
		f.raw = f.raw.add(s)

		if workers == 1 {
			if s, err = b.take(n, workers, b.commit); err != nil {
				return f, fmt.Errorf("bare commit: %w", err)
			}
			f.commit = f.commit.add(s)
		}

		if s, err = measure(0, n, workers, func(int, int) (time.Duration, error) {
			return b.plugin.capabilities()
		}); err != nil {
			return f, fmt.Errorf("GetCapabilities: %w", err)
		}
		f.plain = f.plain.add(s)

		addresses := make([]string, n)
		from := b.next
		before, err := cpuTime(b.daemon.Pid)
		if err != nil {
			return f, err
		}
		if s, err = b.take(n, workers, func(w, i int) (took time.Duration, err error) {
			addresses[i-from], took, err = b.plugin.requestAddress(pools[w], i)
			return took, err
		}); err != nil {
			return f, fmt.Errorf("RequestAddress: %w", err)
		}
		f.request = f.request.add(s)
		between, err := cpuTime(b.daemon.Pid)
		if err != nil {
			return f, err
		}
		if s, err = measure(from, n, workers, func(w, i int) (time.Duration, error) {
			return b.plugin.releaseAddress(pools[w], addresses[i-from])
		}); err != nil {
			return f, fmt.Errorf("ReleaseAddress: %w", err)
		}
		f.release = f.release.add(s)
		after, err := cpuTime(b.daemon.Pid)
		if err != nil {
			return f, err
		}
		f.requestCPU += between - before
		f.releaseCPU += after - between
	}
	return f, nil
}

func (b *bench) report() error {
	idle, pools, err := b.begin()
	if err != nil {
		return err
	}
	// Warm: the server's and our own first requests cost more.
	if _, err := b.load(20, 1, pools); err != nil {
		return err
	}
	one, err := b.load(*alone, 1, pools)
	if err != nil {
		return err
	}
	many, err := b.load(*busy, callers, pools)
	if err != nil {
		return err
	}

	fmt.Println("| one at a time | p50 | p99 | per second |\n|---|---|---|---|")
	fmt.Println("| DISCOVER to ACK over a bare socket |", one.raw.row(), "|")
	fmt.Println("| one fsynced bbolt commit |", one.commit.row(), "|")
	fmt.Println("| a call that does nothing (GetCapabilities) |", one.plain.row(), "|")
	fmt.Println("| RequestAddress |", one.request.row(), "|")
	fmt.Println("| ReleaseAddress |", one.release.row(), "|")
	bare := one.raw.quantile(0.5) + one.commit.quantile(0.5)
	fmt.Printf("\np50 of RequestAddress / (exchange + commit): %.2f (to reach: at most 1.5)\n\n", float64(one.request.quantile(0.5))/float64(bare))

	fmt.Printf("| %d at once, on %d pools of one subnet | p50 | p99 | per second |\n|---|---|---|---|\n", callers, callers)
	fmt.Println("| DISCOVER to ACK over a bare socket |", many.raw.row(), "|")
	fmt.Println("| a call that does nothing (GetCapabilities) |", many.plain.row(), "|")
	fmt.Println("| RequestAddress |", many.request.row(), "|")
	fmt.Println("| ReleaseAddress |", many.release.row(), "|")
	fmt.Printf("\nrate of RequestAddress / bare exchange: %.2f (to reach: at least 0.5)\n\n", many.request.rate()/many.raw.rate())

	perRequest := func(total time.Duration, s sample) string { return ms(total / time.Duration(len(s.times))) }
	fmt.Println("| processor time of the daemon | RequestAddress | ReleaseAddress |\n|---|---|---|")
	fmt.Println("| one at a time |", perRequest(one.requestCPU, one.request), "|", perRequest(one.releaseCPU, one.release), "|")
	fmt.Printf("| %d at once | %s | %s |\n\n", callers, perRequest(many.requestCPU, many.request), perRequest(many.releaseCPU, many.release))

	if err := b.reportStored("more than as many bindings of containers that left", idle, pools); err != nil {
		return err
	}
	if err := b.daemon.Stop(); err != nil {
		return err
	}
	b.data += "-2"
	if idle, pools, err = b.begin(); err != nil {
		return err
	}
	return b.reportStored("no bindings", idle, pools)
}

// begin starts the daemon on an empty database. It returns its resident memory
// and a pool for each caller.
func (b *bench) begin() (idle int, pools []string, err error) {
	if err := b.start(); err != nil {
		return 0, nil, err
	}
	if err := b.answers(); err != nil {
		return 0, nil, err
	}
	if idle, err = residentBytes(b.daemon.Pid); err != nil {
		return 0, nil, err
	}
	for range callers {
		pool, err := b.plugin.requestPool(subnet)
		if err != nil {
			return 0, nil, err
		}
		pools = append(pools, pool)
	}
	return idle, pools, nil
}

// reportStored measures with many leases in place.
func (b *bench) reportStored(beside string, idle int, pools []string) error {
	if _, err := b.take(*stored, callers, func(w, i int) (time.Duration, error) {
		_, took, err := b.plugin.requestAddress(pools[w], i)
		return took, err
	}); err != nil {
		return fmt.Errorf("take %d leases: %w", *stored, err)
	}
	full, err := residentBytes(b.daemon.Pid)
	if err != nil {
		return err
	}
	if err := b.daemon.Stop(); err != nil {
		return err
	}
	began := time.Now()
	if err := b.start(); err != nil {
		return err
	}
	if err := b.answers(); err != nil {
		return err
	}
	started := time.Since(began)
	fresh, err := residentBytes(b.daemon.Pid)
	if err != nil {
		return err
	}
	kib := func(b int) float64 { return float64(b) / 1024 / float64(*stored) }
	fmt.Printf("| with %d leases and %s | |\n|---|---|\n", *stored, beside)
	fmt.Printf("| resident memory of a lease, above the idle daemon's %.1f MiB | %.1f KiB (to reach: at most 5) |\n", float64(idle)/(1<<20), kib(full-idle))
	fmt.Printf("| the same after a restart | %.1f KiB |\n", kib(fresh-idle))
	fmt.Printf("| from start to first answer | %s (to reach: under 300 ms) |\n\n", ms(started))
	return nil
}
