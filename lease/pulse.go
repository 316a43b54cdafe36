package lease

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Pulse asks for something that may hang, such as a mutex, without hanging
// itself: one goroutine at most waits for the answer. The zero one is ready, and
// may be used concurrently.
type Pulse[T any] struct {
	mu sync.Mutex
	on *question[T] // that has no answer yet; nil for none
}

type question[T any] struct {
	since  time.Time
	done   chan struct{} // closed when answer is there
	answer T
}

// Ask returns what a function does, or when ctx ends an error that says for how
// long it has not returned. It then runs on, and whoever asks meanwhile waits for
// that answer.
func (p *Pulse[T]) Ask(ctx context.Context, what func() T) (answer T, err error) {
	p.mu.Lock()
	q := p.on
	if q == nil {
		q = &question[T]{since: time.Now(), done: make(chan struct{})}
		p.on = q
		go func() {
			q.answer = what()
			p.mu.Lock()
			p.on = nil
			p.mu.Unlock()
			close(q.done)
		}()
	}
	p.mu.Unlock()
	select {
	case <-q.done:
		return q.answer, nil
	case <-ctx.Done():
		return answer, fmt.Errorf("stuck for %s", time.Since(q.since).Round(time.Millisecond))
	}
}
