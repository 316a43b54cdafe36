package arp

import (
	"time"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// The times of RFC 5227 section 1.1.
const (
	probeWait    = time.Second     // PROBE_WAIT: the longest delay of the first probe
	probeNum     = 3               // PROBE_NUM
	probeMin     = time.Second     // PROBE_MIN: between two probes, at least
	probeMax     = 2 * time.Second // PROBE_MAX: and at most
	announceWait = 2 * time.Second // ANNOUNCE_WAIT: after the last probe
)

// schedule is when probes are sent and when the waiting ends, counted from the
// beginning. Where a check has a fixed time, the probes are spread in it, and
// the last is awaited as long as the others. A check that is off or unset sends
// nothing. Random gives a time of at least 0 and under d.
func schedule(check lease.ConflictCheck, random func(d time.Duration) time.Duration) (probes []time.Duration, end time.Duration) {
	if check == lease.ConflictRFC {
		at := random(probeWait)
		for range probeNum {
			probes = append(probes, at)
			at += probeMin + random(probeMax-probeMin)
		}
		return probes, probes[probeNum-1] + announceWait
	}
	d := check.Time()
	if d <= 0 {
		return nil, 0
	}
	for i := range time.Duration(probeNum) {
		probes = append(probes, d*i/probeNum)
	}
	return probes, d
}
