package host

import (
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/lease"
)

func TestMachineID(t *testing.T) {
	const id = "b08dfa6083e7567a1921a715000001fb"
	for _, test := range []struct {
		name, text string
		want       string // "" for an error that says says
		says       string
	}{
		{"usual", id + "\n", id, ""},
		{"no line end", id, id, ""},
		{"empty", "", "", "it is empty"},
		{"only a line end", "\n", "", "it is empty"},
		{"first boot", "uninitialized\n", "", "it says uninitialized"},
		{"too short", id[1:] + "\n", "", "not 32 hexadecimal digits"},
		{"too long", id + "00\n", "", "not 32 hexadecimal digits"},
		{"UUID", "b08dfa60-83e7-567a-1921-a715000001fb\n", "", "not 32 hexadecimal digits"},
		{"not hexadecimal", strings.Replace(id, "b", "g", 1), "", "not 32 hexadecimal digits"},
		{"two lines", id + "\n" + id + "\n", "", "not 32 hexadecimal digits"},
		{"null", strings.Repeat("0", 32) + "\n", "", "it is all zeros"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "machine-id")
			if err := os.WriteFile(path, []byte(test.text), 0o444); err != nil {
				t.Fatal(err)
			}
			got, err := Machine{machineID: path}.MachineID()
			if got != test.want || (err != nil) != (test.want == "") {
				t.Fatalf("got %q, %v", got, err)
			}
			if err != nil {
				mentions(t, err, path, test.says, "systemd-machine-id-setup")
			}
		})
	}
	t.Run("missing", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "machine-id")
		got, err := Machine{machineID: path}.MachineID()
		if err == nil {
			t.Fatalf("got %q", got)
		}
		mentions(t, err, path, "no such file", "systemd-machine-id-setup")
	})
	if got := New().machineID; got != "/etc/machine-id" {
		t.Errorf("the real one is read from %s", got)
	}
}

func mentions(t *testing.T, err error, words ...string) {
	t.Helper()
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%q doesn't mention %q", err, word)
		}
	}
}

// What the kernel lists in /sys counts.
func TestHardwareAddrs(t *testing.T) {
	files, err := filepath.Glob("/sys/class/net/*/address")
	if err != nil || len(files) == 0 {
		t.Skipf("no interfaces in /sys: %v", err)
	}
	var want []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		mac := strings.TrimSpace(string(text))
		if hw, err := net.ParseMAC(mac); err == nil && len(hw) == 6 && mac != "00:00:00:00:00:00" {
			want = append(want, mac)
		}
	}
	macs, err := New().HardwareAddrs()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, mac := range macs {
		if mac == (lease.MAC{}) {
			t.Error("all zeros")
		}
		got = append(got, mac.String())
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("got %s, /sys has %s", got, want)
	}
}

func TestBootID(t *testing.T) {
	m := New()
	got := m.BootID()
	if !regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`).MatchString(got) {
		t.Errorf("got %q", got)
	}
	if again := m.BootID(); again != got {
		t.Errorf("got %q, then %q", got, again)
	}
	if got := (Machine{bootID: filepath.Join(t.TempDir(), "none")}).BootID(); got != "" {
		t.Errorf("got %q from a missing file", got)
	}
}

// The kernel counts the same in another way, in whole seconds.
func TestBootTime(t *testing.T) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		t.Fatal(err)
	}
	first := New().BootTime()
	if off := first - time.Duration(info.Uptime)*time.Second; off.Abs() > 5*time.Second {
		t.Errorf("%s since boot, the kernel says %d s", first, info.Uptime)
	}
	time.Sleep(time.Millisecond)
	if second := New().BootTime(); second < first+time.Millisecond {
		t.Errorf("%s, then %s", first, second)
	}
}
