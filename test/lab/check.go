package lab

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Programs that the parts of a lab need, for Check and ForTest.
var (
	Network     = []string{"ip", "nsenter", "iptables"}
	Engines     = []string{"ip", "nsenter", "unshare", "mount", "dockerd", "containerd", "runc", "busybox"}
	DHCPServers = []string{"ip", "nsenter", "dhcpd", "kea-dhcp4", "dnsmasq"}
	Clients     = []string{"busybox", "dhclient"}
	Relays      = []string{"dhcrelay"}
	Wireshark   = []string{"tshark"}
	Machines    = []string{"unshare", "systemd-nspawn", "mmdebstrap", "busybox"}
)

// Check says what keeps a lab from working here: not being root, having no
// right to make network namespaces, missing programs.
func Check(programs ...[]string) error {
	var errs []error
	if os.Geteuid() != 0 {
		errs = append(errs, errors.New("not root"))
	} else if err := canUnshare(); err != nil {
		errs = append(errs, fmt.Errorf("cannot make network namespaces: %w", err))
	}
	var missing []string
	for _, set := range append(programs, Network) {
		for _, name := range set {
			if _, err := lookTool(name); err != nil && !slices.Contains(missing, name) {
				missing = append(missing, name)
			}
		}
	}
	if missing != nil {
		errs = append(errs, fmt.Errorf("missing %s (test/install installs them)", strings.Join(missing, ", ")))
	}
	return errors.Join(errs...)
}

// canUnshare tries on a thread that ends afterwards: its goroutine never
// unlocks it.
func canUnshare() error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		result <- unix.Unshare(unix.CLONE_NEWNET)
	}()
	return <-result
}

// TB is what ForTest needs of a testing.TB.
type TB interface {
	Helper()
	Cleanup(func())
	Failed() bool
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Skipf(format string, args ...any)
}

// ForTest makes a lab that is closed at the end of the test. Where a lab
// can't work the test is skipped, or fails if CI=true: there, a test that
// silently doesn't run is worse than one that fails.
func ForTest(t TB, programs ...[]string) *Lab {
	t.Helper()
	if err := Check(programs...); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("no lab here, and CI=true: %v", err)
		}
		t.Skipf("no lab here: %v", err)
	}
	l, err := New()
	if err != nil {
		t.Fatalf("make lab: %v", err)
	}
	stop := l.CloseOnSignal()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("logs of the lab:\n%s", l.Logs())
		}
		if err := l.Close(); err != nil {
			t.Errorf("close lab: %v", err)
		}
		stop()
	})
	return l
}
