// Demo shows a newcomer the whole of it in some seconds: a LAN, a DHCP server,
// a Docker engine and our daemon, two containers with leased addresses, and
// their release, all in network namespaces of its own. Each fact that it shows
// it has checked; it fails if one isn't so.
//
// It wants root and the built daemon, ./oam-docker-ipam: run make demo.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

var daemon = flag.String("daemon", "./oam-docker-ipam", "the daemon's binary")

func main() {
	flag.Parse()
	os.Exit(run(*daemon))
}

// run is the whole program and returns its exit status.
func run(binary string) int {
	signals := make(chan os.Signal, 1)
	// SIGHUP comes when the terminal is closed, and SIGPIPE when a pager is.
	// Further signals of these kinds change nothing: it is cleaning up already.
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)

	err := show(binary, newPage(os.Stdout), signals)
	var sig interruption
	switch {
	case errors.As(err, &sig):
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		return 128 + int(sig)
	case err != nil:
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		return 1
	}
	return 0
}

// interruption is the signal that ended the demo before its time.
type interruption syscall.Signal

func (i interruption) Error() string { return "interrupted (" + syscall.Signal(i).String() + ")" }

// show makes the lab, runs the tour of it and removes it.
func show(binary string, p *page, signals <-chan os.Signal) error {
	began := time.Now()
	binary, err := filepath.Abs(binary)
	if err == nil {
		_, err = os.Stat(binary)
	}
	if err != nil {
		return fmt.Errorf("find the built daemon: %w (make demo builds it)", err)
	}
	if err := lab.Check(lab.Engines, []string{"ss", "awk"}); err != nil {
		return fmt.Errorf("this can't work here: %w", err)
	}
	l, err := lab.New()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	go func() {
		select {
		case sig := <-signals:
			cancel(interruption(sig.(syscall.Signal)))
		case <-ctx.Done():
		}
	}()
	// Whatever the tour is doing then fails: what it talks to is gone, and a
	// closed lab takes nothing new.
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })

	t := &tour{page: p, lab: l, binary: binary}
	err = t.run()
	stop()
	if err != nil {
		err = fmt.Errorf("%w%s", err, t.daemonLog())
	}
	// After an interruption too: this close finds what the first one missed
	// because the tour was still at work.
	left := errors.Join(t.close(), l.Close())
	if cause := context.Cause(ctx); cause != nil {
		err = cause
		if left == nil {
			err = fmt.Errorf("%w; everything is removed again", cause)
		}
	}
	if err := errors.Join(err, left); err != nil {
		return err
	}
	p.paragraph(
		fmt.Sprintf("All of this was checked, and nothing of it is left on this machine (%.1f s).", time.Since(began).Seconds()),
		"Read on: README.md, \"Quick start on a real host\".",
	)
	return nil
}
