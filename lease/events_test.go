package lease_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// observer is a lease.Observer that notes what it is told.
type observer struct {
	mu        sync.Mutex
	requested []string
	attempted []string
	happened  []lease.Event
}

func (o *observer) Requested(took time.Duration, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	text := fmt.Sprintf("%v %t", took, err == nil)
	if errors.Is(err, context.Canceled) {
		text += " canceled"
	}
	o.requested = append(o.requested, text)
}

func (o *observer) Attempted(state lease.State, late time.Duration, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.attempted = append(o.attempted, fmt.Sprintf("%v %v %v", state, late, err))
}

func (o *observer) Happened(e lease.Event) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.happened = append(o.happened, e)
}

// told compares what the observer was told since the last look.
func (w *world) told(what *[]string, want ...string) {
	w.Helper()
	synctest.Wait()
	w.observer.mu.Lock()
	defer w.observer.mu.Unlock()
	if !slices.Equal(*what, want) {
		w.Errorf("told was\n\t%s\nwant\n\t%s", strings.Join(*what, "\n\t"), strings.Join(want, "\n\t"))
	}
	*what = nil
}

// written are the events after the last look: when, what, to whom, in which words.
func (w *world) written() (lines []string) {
	w.Helper()
	synctest.Wait()
	events, err := w.manager.Events(w.seen)
	if err != nil {
		w.Fatal(err)
	}
	for _, e := range events {
		if e.Seq <= w.seen {
			w.Errorf("event %d comes after %d", e.Seq, w.seen)
		}
		w.seen = e.Seq
		if e.Address.IsValid() && e.Pool == "" {
			w.Errorf("event of no pool: %+v", e)
		}
		text := fmt.Sprintf("%v %s", e.Time.Sub(w.server.began).Round(time.Second), e.Kind)
		for _, part := range []any{e.Address, e.Name, e.Server, e.Detail} {
			if part := fmt.Sprint(part); part != "" && part != "invalid IP" {
				text += " | " + part
			}
		}
		lines = append(lines, text)
	}
	return lines
}

// happens compares the events since the last look.
func (w *world) happens(want ...string) {
	w.Helper()
	if got := w.written(); !slices.Equal(got, want) {
		w.Errorf("events are\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

// until is how an event tells the end of a lease, at a time from the test's begin.
func (w *world) until(end time.Duration) string {
	return "until " + w.server.began.Add(end).Local().Format(time.DateTime)
}

const server = " | 198.51.100.1"

// A container's day: each event once, in order, with what a person needs. T1 30m,
// T2 52m30s, lease 1h; the release waits 30s.
func TestEventsOfALife(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		l := w.acquire(pool, ep(1, "web"))
		w.happens("0s granted | 192.0.2.10 | web" + server + " | " + w.until(time.Hour))
		w.acquire(pool, ep(1, "web"))
		w.happens("0s granted | 192.0.2.10 | web" + server + " | it has this lease already: its release was lost, or the engine asked twice")
		time.Sleep(31 * time.Minute)
		w.happens("30m0s renewed | 192.0.2.10 | web" + server + " | " + w.until(90*time.Minute))

		// Silent from 31m until T2 of the renewal, 1h22m30s, has passed. The first
		// attempt is at T1, 1h, and ends 11m15s later.
		w.server.down()
		time.Sleep(52 * time.Minute)
		w.happens("1h11m15s server-silent" + server + " | attempts without an answer: 1: no DHCP server answered")
		w.server.up()
		time.Sleep(5 * time.Minute)
		lines := w.written()
		if len(lines) != 2 || !strings.Contains(lines[0], " rebound | 192.0.2.10 | web"+server+" | until ") ||
			!strings.Contains(lines[1], " server-back"+server+" | attempts without an answer: ") || !strings.HasSuffix(lines[1], ", leases overdue: 0") {
			t.Errorf("back: %q", lines)
		}

		w.release(pool, l)
		at := time.Since(w.server.began).Round(time.Second)
		w.happens(fmt.Sprint(at, " left | 192.0.2.10 | web", server, " | released in 30s unless it comes back"))
		time.Sleep(time.Minute)
		w.happens(fmt.Sprint(at+30*time.Second, " released | 192.0.2.10 | web", server))

		events, err := w.manager.Events(0)
		w.works(err)
		kinds := map[lease.EventKind]int{}
		for _, e := range events {
			kinds[e.Kind]++
			if (e.MAC == mac(1)) != (e.Address == l.Addr()) || (e.Pool == pool) != (e.Address == l.Addr()) {
				t.Errorf("event %+v", e)
			}
		}
		for kind, n := range map[lease.EventKind]int{lease.EventGranted: 2, lease.EventRenewed: 1, lease.EventLeft: 1, lease.EventReleased: 1} {
			if kinds[kind] != n {
				t.Errorf("%d of %s, want %d", kinds[kind], kind, n)
			}
		}
	})
}

// How leases are lost and come back. T1 30m, lease 1h.
func TestEventsOfALoss(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, ep(1, "web"))
		w.written()
		w.server.onExtend.set(refusing)
		time.Sleep(30*time.Minute + 500*time.Millisecond)
		w.happens(
			"30m0s nak | 192.0.2.10 | web"+server+" | DHCP server refused (NAK)",
			"30m0s lost | 192.0.2.10 | web"+server+" | the server refused its renewal: DHCP server refused (NAK)")
		time.Sleep(time.Second)
		w.happens("30m1s granted | 192.0.2.10 | web" + server + " | lost lease regained: " + w.until(90*time.Minute+time.Second))

		w.server.down()
		time.Sleep(2 * time.Hour)
		w.happens(
			"1h11m16s server-silent"+server+" | attempts without an answer: 1: no DHCP server answered",
			"1h30m1s lost | 192.0.2.10 | web"+server+" | no server renewed it in time: no DHCP server answered")
	})
}

// Another address than the one that the container uses goes back.
func TestEventsOfAnotherAddress(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, ep(1, "web"))
		w.written()
		w.server.onExtend.set(func(_ context.Context, l lease.Lease) (lease.Lease, error) {
			l.Prefix = netip.PrefixFrom(addr("192.0.2.77"), 32)
			return w.server.extended(l), nil
		})
		time.Sleep(30*time.Minute + 500*time.Millisecond)
		w.happens(
			"30m0s released | 192.0.2.77 | web"+server,
			"30m0s lost | 192.0.2.10 | web"+server+" | server 198.51.100.1 gave 192.0.2.77 at renewal, which was given back")
		w.told(&w.observer.attempted, "renewing 0s server 198.51.100.1 gave 192.0.2.77 at renewal, which was given back")
	})
}

// An outage: the container starts on its stored lease, which is confirmed later.
func TestEventsOfAStoredLease(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool, _ := w.leftOne()
		w.written()
		w.server.down()
		w.acquire(pool, ep(2, "web"))
		w.happens("1m4s granted | 192.0.2.10 | web" + server + " | stored lease, no server answered: " + w.until(time.Hour))
		w.server.up()
		time.Sleep(10 * time.Second)
		w.happens("1m8s renewed | 192.0.2.10 | web" + server + " | stored lease confirmed: " + w.until(time.Hour+68*time.Second))
	})
}

// A server that refuses the address that an identity had, in a network that was
// created anew since.
func TestEventOfARefusedConfirmation(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		former, _ := w.leftOne()
		w.works(w.manager.RemovePool(w.Context(), former))
		pool := w.networkOf()
		w.written()
		last := w.seen
		w.server.takes(addr("192.0.2.10"))
		w.acquire(pool, ep(2, "web"))
		w.happens(
			"1m0s nak | 192.0.2.10 | web"+server+" | DHCP server refused (NAK)",
			"1m0s granted | 192.0.2.11 | web"+server+" | "+w.until(time.Hour+time.Minute))
		events, err := w.manager.Events(last)
		w.works(err)
		for _, e := range events {
			if e.Pool != pool {
				t.Errorf("event of pool %q, want %q", e.Pool, pool)
			}
		}
	})
}

func TestEventsOfAConflict(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf("conflict_check=on", "conflict_interface=eth0")
		w.neighbours.set(map[netip.Addr]lease.MAC{addr("192.0.2.10"): theirs}, nil)
		w.server.keepsDeclined()
		w.acquire(pool, ep(1, "web"))
		w.happens(
			"0s conflict | 192.0.2.10 | web"+server+" | used by "+theirs.String()+" on eth0",
			"0s declined | 192.0.2.10 | web"+server,
			"10s granted | 192.0.2.11 | web"+server+" | "+w.until(time.Hour+10*time.Second))
		// A server that gives out what another container has.
		w.neighbours.set(nil, nil)
		w.server.gives(addr("192.0.2.11"))
		w.refused(pool, ep(2, "db"), "twice")
		twice := "the DHCP server 198.51.100.1 gave out an address twice: address 192.0.2.11 is leased to web (02:00:00:00:00:01): if that container is gone run: oam-docker-ipam release 192.0.2.11"
		w.happens(
			"10s declined | 192.0.2.11 | db"+server,
			"10s conflict | 192.0.2.11 | db"+server+" | "+twice,
			"10s failed | db | "+twice)
	})
}

// A release that can't be sent, and a lease that another host has by now.
func TestEventsOfReleasesThatAreNotSent(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.networkOf()
		l, other := w.acquire(pool, ep(1, "web")), w.acquire(pool, ep(2, "db"))
		w.written()
		w.server.onRelease.set(func() error { return errors.New("no route to host") })
		w.release(pool, l)
		w.happens("0s left | 192.0.2.10 | web" + server + " | release not sent, the server keeps the lease " + w.until(time.Hour) + ": no route to host")
		w.server.onRelease.set(nil)
		anotherHost["interface"](w)
		w.restart(time.Second)
		w.release(pool, other)
		w.happens("1s left | 192.0.2.11 | db" + server + " | the lease was taken by another host: nothing is sent")
	})
}

// A network that goes takes its leases along.
func TestEventsOfARemovedPool(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		w.acquire(pool, ep(1, "web"))
		w.acquire(pool, ep(2, "db"))
		w.written()
		w.works(w.manager.RemovePool(w.Context(), pool))
		lines := w.written()
		slices.Sort(lines)
		want := []string{
			"0s left | 192.0.2.10 | web" + server + " | released in 30s unless it comes back",
			"0s left | 192.0.2.11 | db" + server + " | released in 30s unless it comes back",
		}
		if !slices.Equal(lines, want) {
			t.Errorf("events are %q", lines)
		}
	})
}

// What a reconcile does, not what it would do or only sees.
func TestEventsOfAReconcile(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		w.acquire(pool, ep(1, "web"))
		w.acquire(pool, ep(2, "gone"))
		anotherHost["interface"](w)
		w.restart(time.Second)
		seen := engine29(network(at(1, "web", "192.0.2.10"), at(3, "new", "192.0.2.30")))
		w.server.down()
		w.written()
		_, err := w.manager.Reconcile(w.Context(), seen, true) // finds out which host this is
		w.works(err)
		w.wouldFind(seen, "adopted 192.0.2.30 new lan", "missed 192.0.2.11 gone", "resumed 192.0.2.10 web lan")
		w.happens()
		w.finds(seen, "adopted 192.0.2.30 new lan", "missed 192.0.2.11 gone", "resumed 192.0.2.10 web lan")
		lines := w.written()
		want := []string{
			"1s reconciled | 192.0.2.10 | web" + server + " | resumed: renewed again",
			"5s reconciled | 192.0.2.30 | new | adopted: not confirmed yet, its address is asked for again: no DHCP server answered",
		}
		if !slices.Equal(lines, want) {
			t.Errorf("events are %q, want %q", lines, want)
		}
		w.server.up()
		time.Sleep(6 * time.Minute)
		w.written()
		w.finds(seen, "forgotten 192.0.2.11 gone")
		w.happens(
			"6m5s left | 192.0.2.11 | gone"+server+" | the lease was taken by another host: nothing is sent",
			"6m5s reconciled | 192.0.2.11 | gone"+server+" | forgotten: no container has had it for 6m0s")
		w.finds(engine29(network(at(1, "web", "192.0.2.10"))), "missed 192.0.2.30 new")
		time.Sleep(6 * time.Minute)
		w.finds(engine29(network(at(1, "web", "192.0.2.10"))), "released 192.0.2.30 new")
		w.happens(
			"12m5s released | 192.0.2.30 | new"+server,
			"12m5s reconciled | 192.0.2.30 | new"+server+" | released: no container has had it for 6m0s")
	})
}

// A request that fails is one event, counted for its pool; so is one for a pool
// that nobody knows, which may be anything.
func TestEventsOfRefusals(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.server.onAcquire.set(func(context.Context, lease.Request) (lease.Lease, error) {
			return lease.Lease{}, errors.New("the link\nis \x1b[31mdown: \xff" + strings.Repeat("ä", 500))
		})
		w.refused(pool, wants(1, "web", "192.0.2.50"), "the link")
		w.refused(pool, ep(2, "db\n"), "the link")
		w.refused(strings.Repeat("x\x00", 5000), ep(3, "lost"), "unknown pool")
		events, err := w.manager.Events(0)
		w.works(err)
		if len(events) != 3 {
			t.Fatalf("events are %+v", events)
		}
		for i, e := range events {
			unfit := strings.IndexFunc(e.Pool+e.Name+e.Detail, unicode.IsControl)
			if e.Kind != lease.EventFailed || e.MAC != mac(i+1) || len(e.Detail) > 300 || len(e.Pool) > 1000 || unfit >= 0 {
				t.Errorf("event %+v", e)
			}
		}
		if e := events[0]; e.Address != addr("192.0.2.50") || e.Pool != pool || e.Name != "web" || !strings.HasPrefix(e.Detail, "the link is  [31mdown: ?ää") || !strings.HasSuffix(e.Detail, "ä?…") && !strings.HasSuffix(e.Detail, "ä…") {
			t.Errorf("event %+v", e)
		}
		pools := w.manager.Pools()
		events[1].Seq = 0
		if len(pools) != 1 || pools[0].Refused != 2 || pools[0].Refusal != events[1] {
			t.Errorf("pools are %+v, want the refusal %+v", pools, events[1])
		}
		w.told(&w.observer.requested, "0s false", "0s false", "0s false")
	})
}

// The observer is told each event once, of what was stored and what wasn't, how
// long requests took, and how attempts ended. T1 30m, T2 52m30s.
func TestObserver(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.networkOf("conflict_check=on", "conflict_interface=eth0")
		w.neighbours.set(map[netip.Addr]lease.MAC{addr("192.0.2.10"): theirs}, nil)
		w.server.keepsDeclined()
		w.acquire(pool, ep(1, "web"))
		w.told(&w.observer.requested, "10s true")
		w.told(&w.observer.attempted)
		w.server.down()
		time.Sleep(50 * time.Minute)
		w.told(&w.observer.attempted, "renewing 11m15s no DHCP server answered", "renewing 16m52.5s no DHCP server answered", "renewing 19m41.25s no DHCP server answered")
		w.server.up()
		time.Sleep(5 * time.Minute)
		w.told(&w.observer.attempted, "renewing 21m5.625s no DHCP server answered", "renewing 21m5.625s <nil>")
		// Neither a probe nor an auxiliary address is an endpoint's request.
		w.told(&w.observer.requested)
		w.store.before.set(failing("PutLease"))
		w.refused(pool, ep(2, "db"), "no space left")
		time.Sleep(2 * time.Second)

		stored, err := w.manager.Events(0)
		w.works(err)
		for i := range stored {
			stored[i].Seq = 0
		}
		w.observer.mu.Lock()
		defer w.observer.mu.Unlock()
		key := func(e lease.Event) string { return fmt.Sprintf("%+v", e) }
		told := slices.SortedFunc(slices.Values(w.observer.happened), func(a, b lease.Event) int { return strings.Compare(key(a), key(b)) })
		slices.SortFunc(stored, func(a, b lease.Event) int { return strings.Compare(key(a), key(b)) })
		if !slices.Equal(told, stored) || len(told) < 6 {
			t.Errorf("told were\n%+v, stored\n%+v", told, stored)
		}
	})
}

// The engine gives up while servers are asked, which the client tells as their
// silence: it is no refusal.
func TestEventOfARequestThatTheEngineGaveUp(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.server.down()
		ctx, cancel := context.WithCancelCause(w.Context())
		time.AfterFunc(5*time.Second, func() { cancel(errors.New("the caller is gone")) })
		_, err := w.manager.Acquire(ctx, pool, ep(1, "web"))
		if !errors.Is(err, context.Canceled) || !errors.Is(err, lease.ErrNoAnswer) {
			t.Errorf("error %v", err)
		}
		w.told(&w.observer.requested, "5s false canceled")
		w.happens("5s failed | web | the engine gave up: context canceled (no DHCP server answered)")
		if p := w.manager.Pools()[0]; p.Refused != 0 || p.Refusal != (lease.Event{}) {
			t.Errorf("pool %+v", p)
		}
		// Where the time is over, it is the servers' fault.
		w.refused(pool, ep(1, "web"), "no DHCP server answered")
		w.told(&w.observer.requested, "30s false")
		if p := w.manager.Pools()[0]; p.Refused != 1 {
			t.Errorf("pool %+v", p)
		}
	})
}

// Each silent server is told with its own error, also when another's makes the
// line. T1 30m, the first attempt ends at 41m15s, the next line is a minute later.
func TestEventsOfSilentServers(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		for n := range 3 {
			w.server.id.set(addr(fmt.Sprint("198.51.100.", n+1)))
			w.acquire(pool, ep(n+1, ""))
			time.Sleep(time.Second)
		}
		w.written()
		w.server.onExtend.set(func(ctx context.Context, l lease.Lease) (lease.Lease, error) {
			<-ctx.Done()
			return lease.Lease{}, fmt.Errorf("%w (asked %s)", lease.ErrNoAnswer, l.Server)
		})
		time.Sleep(50 * time.Minute)
		lines := w.written()
		slices.Sort(lines[1:])
		want := []string{
			"41m15s server-silent | 198.51.100.1 | attempts without an answer: 1: no DHCP server answered (asked 198.51.100.1)",
			"46m53s server-silent | 198.51.100.2 | attempts without an answer: 1: no DHCP server answered (asked 198.51.100.2)",
			"46m53s server-silent | 198.51.100.3 | attempts without an answer: 1: no DHCP server answered (asked 198.51.100.3)",
		}
		if !slices.Equal(lines, want) {
			t.Errorf("events are\n\t%s", strings.Join(lines, "\n\t"))
		}
	})
}

// What the host could not send is nobody's silence, nor is what a lease without a
// server misses: the log tells, which has its end, too.
func TestHostsFaultIsNoSilence(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, ep(1, "web"))
		w.acquire(pool, ep(2, "db"))
		w.written()
		fault := func(context.Context, lease.Lease) (lease.Lease, error) {
			return lease.Lease{}, errors.New("no interface has the relay address")
		}
		w.server.onExtend.set(fault)
		time.Sleep(50 * time.Minute)
		w.happens()
		if len(w.lines("DHCP servers don't answer", "servers=[198.51.100.1]", "no interface has the relay address")) == 0 {
			t.Error("not a word of it in the log")
		}
		w.server.onExtend.set(nil)
		time.Sleep(5 * time.Minute)
		for _, line := range w.written() {
			if !strings.Contains(line, " renewed ") {
				t.Errorf("event %s", line)
			}
		}
		w.logged(1, "DHCP server answers again", "server=198.51.100.1")
	})
	inWorld(t, func(w *world) {
		w.networkOf()
		w.server.down()
		w.finds(engine29(network(at(3, "new", "192.0.2.30"))), "adopted 192.0.2.30 new lan")
		w.written()
		time.Sleep(10 * time.Minute)
		w.happens()
		w.logged(1, "DHCP servers don't answer", "servers=[]", "attempts=1 ")
	})
}

// A server whose leases others take over, one by one, is silent once, and back
// once: when it is heard of, by whomever. T1 30m, T2 52m30s, lease 1h, 20 leases
// from 0 to 19m, every other one of which is rebound by the second server.
func TestOneSilenceIsOnePair(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		for n := range 20 {
			w.acquire(pool, ep(n+1, ""))
			time.Sleep(time.Minute)
		}
		w.written()
		first, second := addr("198.51.100.1"), addr("198.51.100.2")
		takesOver := func(a netip.Addr) bool { return a.As4()[3]%2 == 0 }
		w.server.onConfirm.set(silent)
		w.server.onAcquire.set(silentAcquire)
		w.server.onExtend.set(func(ctx context.Context, l lease.Lease) (lease.Lease, error) {
			switch {
			case l.Server == second, time.Now().After(l.Rebind) && takesOver(l.Addr()):
				l.Server, l.Via = second, netip.AddrPortFrom(second, 67)
				return w.server.extended(l), nil
			}
			return silent(ctx, l)
		})
		// 2h: those that are not taken over are lost and asked for again.
		time.Sleep(2 * time.Hour)
		servers := func() (lines []string) {
			for _, line := range w.written() {
				if strings.Contains(line, " server-") {
					lines = append(lines, strings.Join(strings.Fields(line)[1:4], " "))
				}
			}
			return lines
		}
		if got, want := servers(), []string{"server-silent | " + first.String()}; !slices.Equal(got, want) {
			t.Errorf("events are %q, want %q", got, want)
		}
		// The last ones are gone, and nobody asks there.
		for _, l := range w.manager.Leases() {
			if !takesOver(l.Addr()) {
				w.works(w.manager.Release(w.Context(), pool, l.Addr()))
			}
		}
		time.Sleep(time.Hour)
		if got := servers(); len(got) != 0 {
			t.Errorf("events are %q", got)
		}
		// Nor is it among those of whom the log says that they are silent.
		w.server.down()
		time.Sleep(50 * time.Minute)
		if got, want := servers(), []string{"server-silent | " + second.String()}; !slices.Equal(got, want) || len(w.lines("don't answer", "servers=[198.51.100.2]")) == 0 {
			t.Errorf("events are %q, want %q", got, want)
		}
		w.server.up()
		w.acquire(pool, ep(30, ""))
		time.Sleep(15 * time.Minute)
		if got, want := servers(), []string{"server-back | " + first.String(), "server-back | " + second.String()}; !slices.Equal(got, want) {
			t.Errorf("events are %q, want %q", got, want)
		}
		// Another silence is another pair.
		w.server.down()
		time.Sleep(50 * time.Minute)
		w.server.up()
		time.Sleep(15 * time.Minute)
		want := []string{
			"server-back | " + first.String(), "server-back | " + second.String(),
			"server-silent | " + first.String(), "server-silent | " + second.String(),
		}
		if got := servers(); !slices.Equal(slices.Sorted(slices.Values(got)), want) {
			t.Errorf("events are %q", got)
		}
	})
}

// 1,000 leases in an outage are one event for the server, and one for each loss.
// Renewals 30m, outage to 50m: none is lost.
func TestAnOutageIsNoFlood(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.crowded()
		for n := range 1000 {
			w.acquire(pool, lease.Endpoint{MAC: mac(n + 1)})
		}
		w.written()
		w.server.down()
		time.Sleep(50 * time.Minute)
		w.happens("41m15s server-silent" + server + " | attempts without an answer: 1: no DHCP server answered")
		w.server.up()
		time.Sleep(10 * time.Minute)
		kinds := map[string]int{}
		for _, line := range w.written() {
			kinds[strings.Fields(line)[1]]++
		}
		if want := map[string]int{"server-back": 1, "renewed": 1000}; !maps.Equal(kinds, want) {
			t.Errorf("events are %v, want %v", kinds, want)
		}
	})
}

// A grant is one commit, with its event and what waited before it; what no commit
// belongs to is stored a second later, all in one.
func TestEventsCostNoCommits(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		w.acquire(pool, ep(9, "first")) // ends the time of auxiliary addresses
		commits := func(want ...string) {
			t.Helper()
			synctest.Wait()
			w.store.mu.Lock()
			defer w.store.mu.Unlock()
			if !slices.Equal(w.store.calls, want) {
				t.Errorf("commits were %q, want %q", w.store.calls, want)
			}
			w.store.calls = nil
		}
		w.store.mu.Lock()
		w.store.calls = nil
		w.store.mu.Unlock()
		l := w.acquire(pool, ep(1, "web"))
		time.Sleep(2 * time.Second)
		commits("PutLease")
		w.release(pool, l)
		time.Sleep(2 * time.Second)
		commits("DeleteLease")
		w.server.takes(addr("192.0.2.11"))
		w.acquire(pool, ep(1, "web")) // after a NAK
		time.Sleep(2 * time.Second)
		commits("PutLease")
		for range 3 {
			w.acquire(pool, ep(9, "first"))
		}
		time.Sleep(999 * time.Millisecond)
		commits()
		time.Sleep(time.Millisecond)
		commits("PutEvent")
		time.Sleep(time.Hour)
		commits("PutLease", "PutLease", "PutLease", "PutLease") // renewals
	})
}

// While the disk takes no events, all else goes on as before, the newest events
// wait, and one line tells how many were dropped.
func TestEventsOnAFullDisk(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		l := w.acquire(pool, ep(1, "web"))
		w.written()
		var tries int
		w.store.before.set(func(call string) error {
			if call != "PutEvent" {
				return nil
			}
			tries++
			return errDiskFull
		})
		w.acquire(pool, ep(1, "web"))
		w.happens() // it tries, too
		time.Sleep(time.Minute)
		synctest.Wait()
		if tries < 5 || tries > 10 {
			t.Errorf("%d tries in a minute", tries)
		}
		for n := range lease.MaxEvents + 100 {
			if n%2 == 0 {
				w.acquire(pool, ep(1, "web"))
			} else {
				w.refused(pool, ep(1, "db"), "in use")
			}
		}
		if l := w.acquire(pool, ep(2, "")); !l.Addr().IsValid() {
			t.Error("no lease")
		}
		w.logged(1, "level=ERROR", "events not stored", errDiskFull.Error())
		w.logged(0, "dropped")
		w.store.before.set(nil)
		time.Sleep(11 * time.Second)
		synctest.Wait()
		w.logged(1, "level=WARN", "events not stored", "dropped=101")
		// The grant's didn't wait with so many others.
		if lines := w.written(); len(lines) != lease.MaxEvents+1 || !strings.HasPrefix(lines[0], "1m0s granted | 192.0.2.11 ") {
			t.Errorf("%d events, the first %s", len(lines), lines[0])
		}
		w.works(w.manager.Release(w.Context(), pool, l.Addr()))
		w.happens("1m11s released | 192.0.2.10 | web" + server)
	})
}

// Each has its place behind what happened before, as long as one commit stores
// all of that.
func TestEventsInOrder(t *testing.T) {
	for _, waiting := range []int{0, 1, 65, 1000} {
		inWorld(t, func(w *world) {
			pool := w.pool()
			w.acquire(pool, ep(1, "web"))
			w.written()
			var want []string
			for n := range waiting {
				w.refused(pool, wants(9, fmt.Sprint("db-", n), "192.0.2.10"), "leased to")
				want = append(want, fmt.Sprint("db-", n))
			}
			w.acquire(pool, ep(2, "last"))
			var got []string
			for _, line := range w.written() {
				fields := strings.Split(line, " | ")
				got = append(got, fields[2])
			}
			if want = append(want, "last"); !slices.Equal(got, want) {
				t.Errorf("%d waited: events are of %q", waiting, got)
			}
			w.observer.mu.Lock()
			defer w.observer.mu.Unlock()
			if n := len(w.observer.happened); n != len(want)+1 {
				t.Errorf("%d waited: told were %d events", waiting, n)
			}
		})
	}
}

// A change that isn't made hasn't happened; what had happened before is kept.
func TestRefusedChangeIsNoEvent(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		pool := w.networkOf()
		w.acquire(pool, ep(1, "web"))
		w.written()
		w.acquire(pool, ep(1, "web")) // which waits for a commit
		w.store.before.set(failing("PutLease", "DeleteLease"))
		w.refused(pool, ep(2, "db"), "no space left")
		w.fails(w.manager.Release(w.Context(), pool, addr("192.0.2.10")), "no space left")
		w.happens(
			"0s granted | 192.0.2.10 | web"+server+" | it has this lease already: its release was lost, or the engine asked twice",
			"0s released | 192.0.2.11 | db"+server,
			"0s failed | db | store the lease: no space left on device")
		// A renewal has happened, whatever the disk does.
		time.Sleep(31 * time.Minute)
		w.happens("30m0s renewed | 192.0.2.10 | web" + server + " | " + w.until(90*time.Minute))
		w.store.before.set(nil)
		time.Sleep(30 * time.Minute)
	})
}

// Each event ends the wait for it when it can be listed: at once, or when a disk
// that took none takes it.
func TestEventsAwaited(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		another := w.manager.EventsAwaited()
		is := func(ended bool) {
			t.Helper()
			synctest.Wait()
			select {
			case <-another:
				if !ended {
					t.Error("the wait has ended")
				}
				another = w.manager.EventsAwaited()
			default:
				if ended {
					t.Error("the wait goes on")
				}
			}
		}
		is(false)
		w.acquire(pool, ep(1, "web"))
		is(true)
		is(false)
		w.store.before.set(failing("PutEvent"))
		w.refused(pool, wants(2, "db", "192.0.2.10"), "leased to")
		is(true)
		time.Sleep(time.Minute)
		is(false)
		w.store.before.set(nil)
		time.Sleep(10 * time.Second)
		is(true)
		time.Sleep(time.Minute)
		is(false)
	})
}

// What waits is stored when the daemon stops.
func TestCloseStoresEvents(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, ep(1, "web"))
		w.acquire(pool, ep(1, "web"))
		w.manager.Close()
		if n := len(w.store.events); n != 2 {
			t.Errorf("%d events are stored, want 2", n)
		}
		w.start()
		w.acquire(pool, ep(1, "web"))
		w.store.before.set(failing("PutEvent"))
		w.manager.Close()
		w.logged(1, "level=ERROR", "last events were not stored")
		w.store.before.set(nil)
		w.start()
		w.acquire(pool, ep(1, "web"))
		if lines := w.written(); len(lines) != 3 {
			t.Errorf("events are %q", lines)
		}
	})
}

// A disk that hangs keeps nobody waiting for events but a second.
func TestEventsWhileTheDiskHangs(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.pool()
		w.acquire(pool, ep(1, "web"))
		w.written()
		release := make(chan struct{})
		w.store.before.set(func(call string) error {
			if call == "PutEvent" {
				<-release
			}
			return nil
		})
		w.acquire(pool, ep(1, "web"))
		for range 3 {
			began := time.Now()
			w.happens()
			if took := time.Since(began); took > time.Second {
				t.Errorf("it took %v", took)
			}
		}
		close(release)
		synctest.Wait()
		if lines := w.written(); len(lines) != 1 {
			t.Errorf("events are %q", lines)
		}
	})
}

// Whoever waits for another event, and then lists what is new, misses none and
// gets none twice, whatever happens meanwhile. Run by the race detector.
func TestFollowersMissNoEvent(t *testing.T) {
	inWorld(t, func(w *world) {
		pool := w.crowded()
		w.acquire(pool, lease.Endpoint{MAC: mac(1000)}) // ends the time of auxiliary addresses
		const endpoints = 50
		w.store.before.set(func(string) error { time.Sleep(7 * time.Millisecond); return nil })
		ctx, stop := context.WithCancel(w.Context())
		followed := make([][]lease.Event, 3)
		var followers, endpointsDone sync.WaitGroup
		for f := range followed {
			followers.Go(func() {
				for last := uint64(0); ; {
					another := w.manager.EventsAwaited()
					events, err := w.manager.Events(last)
					if err != nil {
						w.Error(err)
					}
					for _, e := range events {
						last = e.Seq
					}
					followed[f] = append(followed[f], events...)
					select {
					case <-another:
					case <-ctx.Done():
						return
					}
				}
			})
		}
		for n := range endpoints {
			endpointsDone.Go(func() {
				for range 3 {
					l := w.acquire(pool, lease.Endpoint{MAC: mac(n + 1)})
					time.Sleep(time.Duration(n) * 100 * time.Millisecond)
					w.works(w.manager.Release(w.Context(), pool, l.Addr()))
				}
			})
		}
		endpointsDone.Wait()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		stop()
		followers.Wait()
		w.store.before.set(nil)
		w.store.mu.Lock()
		defer w.store.mu.Unlock()
		if n := len(w.store.events); n < 6*endpoints {
			t.Errorf("%d events", n)
		}
		for _, events := range followed {
			if !slices.Equal(events, w.store.events) {
				t.Errorf("a follower got %d of %d events", len(events), len(w.store.events))
			}
		}
	})
}

// What nobody observes works as well.
func TestUnobserved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.global, w.observer = byMAC, nil
		w.start()
		w.acquire(w.pool(), ep(1, "web"))
		time.Sleep(31 * time.Minute)
		w.manager.Close()
	})
}

// Pools are as they are listed, each with its leases of every state.
func TestPools(t *testing.T) {
	inWorldOf(t, auto, func(w *world) {
		second := w.network("192.0.2.128/25", "198.51.100.2")
		first := w.networkOf("release_delay=1m")
		w.server.forget()
		w.acquire(first, ep(1, ""))
		w.release(first, w.acquire(first, ep(2, "web")))
		is := func(want string) {
			t.Helper()
			var got []string
			for _, p := range w.manager.Pools() {
				got = append(got, fmt.Sprintf("%v %v %d", p.Subnet, p.Leases, p.Refused))
				if p.InForce.Texts()["release_delay"] == "" || p.InForce.Texts()["conflict_check"] == "" {
					t.Errorf("in force are %v", p.InForce.Texts())
				}
				if len(p.Servers) != 1 || p.Servers[0].Server != addr("198.51.100.1") {
					t.Errorf("servers are %+v", p.Servers)
				}
			}
			if text := strings.Join(got, ", "); text != want {
				t.Errorf("pools are %s, want %s", text, want)
			}
		}
		is("192.0.2.0/24 map[bound:1 releasing:1] 0, 192.0.2.128/25 map[] 0")
		time.Sleep(2 * time.Minute)
		w.server.down()
		w.refused(second, ep(3, ""), "no DHCP server")
		time.Sleep(30 * time.Minute)
		is("192.0.2.0/24 map[renewing:1] 0, 192.0.2.128/25 map[] 1")
		pools := w.manager.Pools()
		if pools[0].ID != first || pools[1].ID != second || (pools[0].Refusal != lease.Event{}) || pools[1].Refusal.Detail == "" {
			t.Errorf("pools are %+v", pools)
		}
		w.restart(time.Second)
		is("192.0.2.0/24 map[renewing:1] 0, 192.0.2.128/25 map[] 0")
		w.works(w.manager.RemovePool(w.Context(), second))
		is("192.0.2.0/24 map[renewing:1] 0")
	})
}
