package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// screen is a terminal on which a view is shown anew all the time.
type screen struct {
	w  io.Writer
	fd int
}

// newScreen fails where a writer is no terminal, or one without a cursor to move.
func newScreen(w io.Writer) (screen, error) {
	fd, ok := terminal(w)
	if !ok || os.Getenv("TERM") == "dumb" {
		return screen{}, errors.New("--watch needs a terminal: elsewhere oam-docker-ipam events --follow tells what happens")
	}
	return screen{w, fd}, nil
}

// refresh is the time from one view to the next.
const refresh = time.Second

// Control sequences that every terminal of today knows (ECMA-48, and xterm's).
const (
	// enter goes to the alternate screen, hides the cursor and cuts what is
	// wider than the screen; leave brings back what was there.
	enter = "\x1b[?1049h\x1b[?25l\x1b[?7l"
	leave = "\x1b[?7h\x1b[?25h\x1b[?1049l"

	toTop      = "\x1b[H"
	eraseRight = "\x1b[K"
	eraseBelow = "\x1b[J"
)

// show draws a view, at most height lines, once and every refresh until ctx
// ends, and leaves the terminal as it was.
func (s screen) show(ctx context.Context, view func(height int) []line) error {
	suspend := make(chan os.Signal, 1)
	signal.Notify(suspend, unix.SIGTSTP)
	defer signal.Stop(suspend)
	if _, err := io.WriteString(s.w, enter); err != nil {
		return err
	}
	defer func() { _, _ = io.WriteString(s.w, leave) }()
	tick := time.NewTicker(refresh)
	defer tick.Stop()
	for {
		width, height := s.size()
		lines := view(height)
		if ctx.Err() != nil {
			return nil
		}
		if _, err := io.WriteString(s.w, frame(lines, width, height, colourful(s.w))); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-suspend:
			// Ctrl-Z: until fg the screen is the shell's.
			_, _ = io.WriteString(s.w, leave)
			if err := pause(ctx); err != nil {
				return err
			}
			_, _ = io.WriteString(s.w, enter)
		}
	}
}

// pause stops this process until it is continued, or ctx ends.
func pause(ctx context.Context) error {
	resumed := make(chan os.Signal, 1)
	signal.Notify(resumed, unix.SIGCONT)
	defer signal.Stop(resumed)
	if err := unix.Kill(os.Getpid(), unix.SIGSTOP); err != nil {
		return err
	}
	// Another thread may be stopped first, and this one run on for a moment.
	select {
	case <-resumed:
	case <-ctx.Done():
	}
	return nil
}

// size is the terminal's, or the usual one where it doesn't know.
func (s screen) size() (width, height int) {
	width, height, err := term.GetSize(s.fd)
	if err != nil || width <= 0 || height <= 0 {
		return 80, 24
	}
	return width, height
}

// frame is what draws lines over what was there, without a moment of emptiness.
func frame(lines []line, width, height int, colours bool) string {
	var out strings.Builder
	out.WriteString(toTop)
	for i, l := range lines {
		if i > 0 {
			out.WriteString("\r\n")
		}
		if n := utf8.RuneCountInString(l.text); n > width {
			l.text = string([]rune(l.text)[:width])
		}
		out.WriteString(l.shown(colours))
		if utf8.RuneCountInString(l.text) < width {
			// Not behind a full line: there the cursor stands on its last character.
			out.WriteString(eraseRight)
		}
	}
	if len(lines) < height {
		out.WriteString("\r\n" + eraseBelow)
	}
	return out.String()
}
