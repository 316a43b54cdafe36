package main

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// sample is the times of equal actions and how long all of them took together.
type sample struct {
	times []time.Duration
	wall  time.Duration
}

func (s sample) add(other sample) sample {
	return sample{append(s.times, other.times...), s.wall + other.wall}
}

func (s sample) quantile(q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(s.times))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

// rate is actions a second.
func (s sample) rate() float64 { return float64(len(s.times)) / s.wall.Seconds() }

func (s sample) row() string {
	return fmt.Sprintf("%s | %s | %.0f", ms(s.quantile(0.5)), ms(s.quantile(0.99)), s.rate())
}

func ms(d time.Duration) string { return fmt.Sprintf("%.2f ms", float64(d.Microseconds())/1000) }

// timed is something that measures itself. It is given the worker's number and
// its own.
type timed func(worker, i int) (time.Duration, error)

// measure runs an action for each number in [from, from+n), by so many workers
// at once.
func measure(from, n, workers int, action timed) (sample, error) {
	s := sample{times: make([]time.Duration, n)}
	errs := make([]error, workers)
	var wg sync.WaitGroup
	began := time.Now()
	for w := range workers {
		wg.Go(func() {
			for i := w; i < n; i += workers {
				if s.times[i], errs[w] = action(w, from+i); errs[w] != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	s.wall = time.Since(began)
	for _, err := range errs {
		if err != nil {
			return s, err
		}
	}
	return s, nil
}

// clockTick is the unit of the times in /proc/PID/stat, 1/100 s on Linux.
const clockTick = 10 * time.Millisecond

// cpuTime is what a process has used of the processors so far.
func cpuTime(pid int) (time.Duration, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The name, in parentheses, may hold anything.
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	if len(fields) < 13 {
		return 0, fmt.Errorf("short /proc/%d/stat", pid)
	}
	user, err1 := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	if err1 != nil || err2 != nil {
		return 0, fmt.Errorf("odd /proc/%d/stat", pid)
	}
	return time.Duration(user+system) * clockTick, nil
}

// residentBytes is a process's resident memory.
func residentBytes(pid int) (int, error) {
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(statm))
	if len(fields) < 2 {
		return 0, fmt.Errorf("short /proc/%d/statm", pid)
	}
	pages, err := strconv.Atoi(fields[1])
	return pages * os.Getpagesize(), err
}
