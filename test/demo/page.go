package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// width is that of a terminal which nobody made wider.
const width = 80

// page is what the reader sees: headings, command lines, what they printed,
// and what was found to be so.
type page struct {
	w       io.Writer
	colours bool
	steps   int
}

// newPage uses colours on a terminal, unless it can't or the user doesn't want
// them (https://no-color.org).
func newPage(f *os.File) *page {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return &page{w: f, colours: err == nil && os.Getenv("TERM") != "dumb" && os.Getenv("NO_COLOR") == ""}
}

// Colours, as terminals number them.
const (
	bold  = "1"
	green = "32"
	cyan  = "36"
)

func (p *page) paint(colour, text string) string {
	if !p.colours {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// heading begins the next step.
func (p *page) heading(text string) {
	p.steps++
	fmt.Fprintf(p.w, "\n%s\n", p.paint(bold, fmt.Sprintf("%d. %s", p.steps, text)))
}

// paragraph is text between the other things, broken by hand.
func (p *page) paragraph(lines ...string) {
	fmt.Fprintln(p.w)
	for _, line := range lines {
		fmt.Fprintln(p.w, line)
	}
}

// command shows a command line as a user on that machine types it, runs it,
// and shows how long it took if that is long enough to be noticed.
func (p *page) command(machine string, args []string, run func() error) error {
	fmt.Fprintf(p.w, "  %s", p.paint(cyan, breakCommand(machine+"# ", args)))
	began := time.Now()
	err := run()
	if took := time.Since(began); took >= 50*time.Millisecond {
		fmt.Fprintf(p.w, "  (%.1f s)", took.Seconds())
	}
	fmt.Fprintln(p.w)
	return err
}

// breakCommand breaks a command line between arguments where it gets too long
// for an indented line with a time after it.
func breakCommand(prompt string, args []string) string {
	const most, indent = width - 14, "      "
	var lines []string
	line := prompt
	for i, arg := range args {
		if strings.ContainsAny(arg, " |'\"{}$") && i > 0 {
			arg = "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
		}
		switch {
		case i == 0:
			line += arg
		case len(line)+1+len(arg) > most:
			lines = append(lines, line+" \\")
			line = indent + arg
		default:
			line += " " + arg
		}
	}
	return strings.Join(append(lines, line), "\n")
}

// output shows what a command, or the server, said.
func (p *page) output(text string) {
	for line := range strings.Lines(text) {
		fmt.Fprintf(p.w, "    %s\n", strings.TrimRight(line, "\n "))
	}
}

// holds says what was found to be so.
func (p *page) holds(format string, args ...any) {
	fmt.Fprintf(p.w, "  %s %s\n", p.paint(green, "ok:"), fmt.Sprintf(format, args...))
}
