package main

import (
	"io"
	"os"

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
