package lab

import (
	"fmt"
	"time"
)

// Eventually calls cond until it returns nil, and gives up after timeout with
// its last error.
func Eventually(timeout time.Duration, cond func() error) error {
	const most = 100 * time.Millisecond
	pause := time.Millisecond
	for end := time.Now().Add(timeout); ; {
		err := cond()
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("wait %v: %w", timeout, err)
		}
		time.Sleep(pause)
		pause = min(2*pause, most)
	}
}
