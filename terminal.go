package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"unicode"
	"unicode/utf16"

	"golang.org/x/term"
)

// terminal is the file descriptor of a terminal that a writer is, if it is one.
func terminal(w io.Writer) (fd int, ok bool) {
	file, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(file.Fd())) {
		return 0, false
	}
	return int(file.Fd()), true
}

// colourful reports whether a writer is a terminal that shows colours, and
// nobody minds: see https://no-color.org.
func colourful(w io.Writer) bool {
	_, ok := terminal(w)
	return ok && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// colour is the control sequence that begins it (ECMA-48, SGR); "" is none.
type colour string

const (
	red    colour = "\x1b[31m"
	yellow colour = "\x1b[33m"
	plain  colour = "\x1b[0m"
)

// line is one of a table: whole lines have a colour, so that columns stay where
// they are.
type line struct {
	text   string
	colour colour
}

// shown is the line as a terminal is sent it.
func (l line) shown(colours bool) string {
	if !colours || l.colour == "" {
		return l.text
	}
	return string(l.colour) + l.text + string(plain)
}

// tableRow is a line whose columns aren't aligned yet.
type tableRow struct {
	cells  []string
	colour colour
}

// tabulate aligns the columns of a table. Cells may have any text, of which as much
// is shown as maxCell.
func tabulate(header []string, rows []tableRow) []line {
	rows = append([]tableRow{{cells: header}}, rows...)
	var text strings.Builder
	t := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		cells := make([]string, len(r.cells))
		for i, cell := range r.cells {
			cells[i] = shortened(printable(cell))
		}
		fmt.Fprintln(t, strings.Join(cells, "\t"))
	}
	t.Flush()
	lines := make([]line, len(rows))
	for i, text := range strings.Split(strings.TrimSuffix(text.String(), "\n"), "\n") {
		lines[i] = line{strings.TrimRight(text, " "), rows[i].colour}
	}
	return lines
}

// maxCell is how wide a column can become: one long name mustn't push the others
// off the screen.
const maxCell = 64

func shortened(cell string) string {
	if runes := []rune(cell); len(runes) > maxCell {
		return string(runes[:maxCell-1]) + "…"
	}
	return cell
}

// printLines writes lines, with their colours to a terminal.
func printLines(w io.Writer, lines []line) error {
	var text bytes.Buffer
	colours := colourful(w)
	for _, l := range lines {
		fmt.Fprintln(&text, l.shown(colours))
	}
	_, err := w.Write(text.Bytes())
	return err
}

// printable replaces what a terminal could obey, in texts of others.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

// escaped is JSON without what a terminal could obey, of which encoding/json
// leaves DEL, the controls of ISO 8859 and what reverses text.
func escaped(json []byte) []byte {
	if !bytes.ContainsFunc(json, hidden) {
		return json
	}
	var out []byte
	for _, r := range string(json) {
		if !hidden(r) {
			out = append(out, string(r)...)
			continue
		}
		for _, unit := range utf16.AppendRune(nil, r) {
			out = fmt.Appendf(out, `\u%04x`, unit)
		}
	}
	return out
}

func hidden(r rune) bool { return !unicode.IsPrint(r) && r != '\n' }
