package systemd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// Notifier tells systemd what state this process is in, see sd_notify(3), or
// nobody where it was started otherwise: its methods then do nothing. That
// systemd can't be told is logged, once while it lasts, and is no reason to
// fail.
type Notifier struct {
	log *slog.Logger

	mu      sync.Mutex // held while sending, so that systemd sees calls in their order
	status  string     // as systemd knows it
	failing bool
}

// NewNotifier makes the process's one Notifier.
func NewNotifier(log *slog.Logger) *Notifier { return &Notifier{log: log} }

// Ready says that the start, or the reload that Reloading announced, is over,
// and gives the status line.
func (n *Notifier) Ready(status string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sendStatusLocked(daemon.SdNotifyReady+"\n", oneLine(status))
}

// Status gives the line that `systemctl status` shows, if it is another than
// before.
func (n *Notifier) Status(text string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if text = oneLine(text); text != n.status {
		n.sendStatusLocked("", text)
	}
}

// Reloading announces a reload, which Ready ends. Units of Type=notify and of
// Type=notify-reload both understand it.
func (n *Notifier) Reloading() {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		// Every Linux has this clock.
		panic(fmt.Sprintf("read CLOCK_MONOTONIC: %v", err))
	}
	n.send(fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, now.Nano()/1000))
}

// Stopping says that the end has begun.
func (n *Notifier) Stopping() { n.send(daemon.SdNotifyStopping) }

// errLate is the answer of what should have given up long before.
var errLate = errors.New("it answered too late")

// Watch keeps the unit's watchdog quiet until ctx ends, and returns at once
// where there is none. Every third of the watchdog's time it asks alive, which
// has that third to return, and a keep-alive is sent only if it returned nil:
// what it finds missing makes systemd restart this process. It isn't asked
// again before it returned. If it is still running when ctx ends, it is left to
// its context.
func (n *Notifier) Watch(ctx context.Context, alive func(context.Context) error) {
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		n.log.Warn("watchdog's time not read: it gets no keep-alives", "error", err)
	}
	if watchdog == 0 || os.Getenv("NOTIFY_SOCKET") == "" {
		return
	}
	for well := true; ; {
		next := time.After(watchdog / 3)
		err := n.ask(ctx, alive, watchdog/3)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			n.log.Warn("not alive: the watchdog gets no keep-alive", "watchdog", watchdog, "error", err)
		default:
			if !well {
				n.log.Info("alive again: the watchdog gets its keep-alives")
			}
			n.send(daemon.SdNotifyWatchdog)
		}
		well = err == nil
		select {
		case <-ctx.Done():
			return
		case <-next:
		}
	}
}

// ask returns what alive does, or ctx's error if that ends first.
func (n *Notifier) ask(ctx context.Context, alive func(context.Context) error, limit time.Duration) error {
	bound, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	answer := make(chan error, 1)
	go func() { answer <- alive(bound) }()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err := <-answer:
		return err
	// One that heeds its context has returned by now, and systemd still waits:
	// this is in the log before the process is ended.
	case <-time.After(limit + limit/2):
		n.log.Warn("not alive: no answer at all, the watchdog gets no keep-alive", "watchdog", 3*limit)
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err := <-answer:
		if err == nil {
			err = errLate
		}
		return err
	}
}

// longestStatus in bytes, before it is cut. systemd drops messages of more than
// 4096, whatever else is in them.
const longestStatus = 1000

// oneLine makes a status of any text: a line end would begin another assignment.
func oneLine(text string) string {
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, text)
	text = strings.Join(strings.Fields(text), " ")
	if len(text) > longestStatus {
		text = strings.ToValidUTF8(text[:longestStatus], "") + "…"
	}
	return text
}

func (n *Notifier) send(state string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sendLocked(state)
}

func (n *Notifier) sendStatusLocked(before, status string) {
	if n.sendLocked(before + "STATUS=" + status) {
		n.status = status
	}
}

func (n *Notifier) sendLocked(state string) (sent bool) {
	sent, err := daemon.SdNotify(false, state)
	if err != nil && !n.failing {
		n.log.Warn("systemd can't be told this daemon's state: is its NOTIFY_SOCKET there?", "error", err)
	}
	n.failing = err != nil
	return sent
}
