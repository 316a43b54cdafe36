package lab

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// Lab is one network with everything that was started in it.
type Lab struct {
	// Scratch is the lab's folder, gone after Close.
	Scratch string
	// LAN is the switch that all nodes hang on. It has no address.
	LAN *Node

	prefix string // of the names of this lab's network namespaces

	// mu guards what follows, and is held while something is added, so that
	// nothing can slip in behind a Close.
	mu        sync.Mutex
	closed    bool
	nodes     []*Node
	processes []*Process
}

var (
	countMu sync.Mutex
	count   int // of the labs made by this process
)

// New makes a lab with nothing but a LAN in it. It first removes what labs of
// killed processes left behind.
func New() (*Lab, error) {
	if err := sweep(); err != nil {
		return nil, fmt.Errorf("sweep up after killed labs: %w", err)
	}
	countMu.Lock()
	count++
	number := count
	countMu.Unlock()

	self, err := ownID()
	if err != nil {
		return nil, err
	}
	l := &Lab{
		Scratch: scratchName(self, strconv.Itoa(number)),
		prefix:  namespacePrefix(self.pid) + strconv.Itoa(number) + "-",
	}
	for _, dir := range []string{l.Scratch, l.path("log"), l.path("bin")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, errors.Join(fmt.Errorf("make scratch folder: %w", err), l.Close())
		}
	}
	if l.LAN, err = l.NewLAN("lan"); err != nil {
		return nil, errors.Join(fmt.Errorf("make lan: %w", err), l.Close())
	}
	return l, nil
}

// path names a file or folder in the scratch folder.
func (l *Lab) path(elem ...string) string {
	return filepath.Join(append([]string{l.Scratch}, elem...)...)
}

// Close ends every process of the lab and removes its namespaces, mounts and
// files. It goes on after an error, and calling it again is harmless.
func (l *Lab) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true

	var errs []error
	for i := len(l.processes) - 1; i >= 0; i-- {
		errs = append(errs, l.processes[i].Kill())
	}
	l.processes = nil
	for _, n := range l.nodes {
		errs = append(errs, removeNamespace(n.Name))
	}
	l.nodes = nil
	errs = append(errs, removeScratch(l.Scratch))
	return errors.Join(errs...)
}

var errClosed = errors.New("the lab is closed")

// CloseOnSignal has SIGINT and SIGTERM close the lab and end the program, as
// these signals would have. The returned function ends that.
func (l *Lab) CloseOnSignal() (stop func()) {
	signals := make(chan os.Signal, 1)
	done := make(chan struct{})
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		select {
		case <-done:
		case sig := <-signals:
			status := 1
			if number, ok := sig.(syscall.Signal); ok {
				status = 128 + int(number)
			}
			if err := l.Close(); err != nil {
				fmt.Fprintln(os.Stderr, "close lab:", err)
			}
			os.Exit(status)
		}
	}()
	return sync.OnceFunc(func() {
		signal.Stop(signals)
		close(done)
	})
}

// Logs returns the end of every process's log, for a test that failed.
func (l *Lab) Logs() string {
	const most = 8 << 10 // of each
	files, err := filepath.Glob(l.path("log", "*.log"))
	if err != nil {
		return err.Error()
	}
	var all strings.Builder
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			text = []byte(err.Error())
		}
		fmt.Fprintf(&all, "==== %s\n%s\n", filepath.Base(file), tail(string(text), most))
	}
	return all.String()
}

// tail cuts text to its last whole lines within size bytes.
func tail(text string, size int) string {
	if len(text) <= size {
		return text
	}
	text = text[len(text)-size:]
	if _, rest, found := strings.Cut(text, "\n"); found {
		return rest
	}
	return text
}
