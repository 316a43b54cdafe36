// Package host tells what sets this machine apart from others, and how long it
// has been up.
package host

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

// Machine is the machine that this process runs on.
type Machine struct {
	machineID string // path, see machine-id(5)
	bootID    string // path, see random(4)
}

var _ lease.Host = Machine{}

// New returns this machine. Nothing is read before it is asked for.
func New() Machine {
	return Machine{machineID: "/etc/machine-id", bootID: "/proc/sys/kernel/random/boot_id"}
}

// MachineID is the 32 hexadecimal digits of /etc/machine-id, which outlive
// reboots. It is an error that there are none: images are shipped without, to
// get their own at their first boot.
func (m Machine) MachineID() (string, error) {
	text, err := os.ReadFile(m.machineID)
	id := strings.TrimSpace(string(text))
	if err == nil {
		err = checkMachineID(id)
	}
	if err != nil {
		return "", fmt.Errorf("read machine ID from %s: %w: run systemd-machine-id-setup, which makes one", m.machineID, err)
	}
	return id, nil
}

// checkMachineID refuses what machine-id(5) calls invalid or not yet set.
func checkMachineID(id string) error {
	_, err := hex.DecodeString(id)
	switch {
	case id == "":
		return errors.New("it is empty")
	case id == "uninitialized":
		return errors.New("it says uninitialized")
	case err != nil || len(id) != 32:
		return fmt.Errorf("%q is not 32 hexadecimal digits", id)
	case strings.Trim(id, "0") == "":
		return errors.New("it is all zeros")
	}
	return nil
}

// HardwareAddrs are the 48-bit hardware addresses of all interfaces in this
// process's network namespace, up or down, without those that are all zeros:
// the loopback's, and tunnels'.
func (Machine) HardwareAddrs() ([]lease.MAC, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	var macs []lease.MAC
	for _, i := range interfaces {
		if len(i.HardwareAddr) != len(lease.MAC{}) {
			continue
		}
		if mac := lease.MAC(i.HardwareAddr); mac != (lease.MAC{}) {
			macs = append(macs, mac)
		}
	}
	return macs, nil
}

// BootID is a random UUID that the kernel draws at boot, or "" where it can't
// be read: one boot is then not told from another.
func (m Machine) BootID() string {
	text, err := os.ReadFile(m.bootID)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// BootTime is the time since boot, that of suspend included. Nobody can set
// this clock.
func (Machine) BootTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		// Linux has this clock since 2.6.39.
		panic(fmt.Sprintf("read CLOCK_BOOTTIME: %v", err))
	}
	return time.Duration(t.Nano())
}
