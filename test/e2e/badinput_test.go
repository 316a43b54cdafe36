package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// A daemon whose configuration is wrong ends at once and says which setting
// it is.
func TestWrongConfiguration(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	file := func(text string) []string {
		t.Helper()
		name := filepath.Join(t.TempDir(), "daemon.conf")
		check(t, os.WriteFile(name, []byte(text), 0o644))
		return []string{"--config", name}
	}
	for _, c := range []struct {
		name  string
		flags []string
		env   []string
		says  []string
	}{
		{"no such file", []string{"--config", "/nowhere/daemon.conf"}, nil, []string{"read configuration /nowhere/daemon.conf", "no such file"}},
		{"file without keys", file("DHCP_SERVER 10.10.0.1\n"), nil, []string{"read configuration", "daemon.conf", "DHCP_SERVER 10.10.0.1"}},
		{"server in the file", file("DHCP_SERVER=10.10.0.300 # ours\n"), nil, []string{"dhcp_server", `"10.10.0.300"`}},
		{"server in the environment", nil, []string{"DHCP_SERVER=10.10.0.1,,10.10.0.3"}, []string{"dhcp_server", `"10.10.0.1,,10.10.0.3"`}},
		{"server's port", []string{"--dhcp-server", "10.10.0.1:0"}, nil, []string{"10.10.0.1:0", ":port of 1 to 65535"}},
		{"relay address", []string{"--listen-addr", "eth0"}, nil, []string{"listen_addr", `"eth0"`, "IPv4 address of this host"}},
		{"time in the file", file("DHCP_TIMEOUT=soon\n"), nil, []string{"daemon.conf:1", "DHCP_TIMEOUT", `"soon"`, "30s"}},
		{"no time", []string{"--dhcp-timeout", "0s"}, nil, []string{"DHCP_TIMEOUT", "above zero"}},
		{"driver's name", []string{"--driver-name", "../talkingdata"}, nil, []string{"DRIVER_NAME", "../talkingdata"}},
		{"unknown flag", []string{"--dhcp-servers", "10.10.0.1"}, nil, []string{"dhcp-servers"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.daemon.Flags, s.daemon.Env = c.flags, c.env
			mentions(t, doesNotStart(t, s.daemon), c.says...)
			if _, err := os.Stat(s.daemon.DataDir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("it has made its data folder: %v", err)
			}
		})
	}
}

// A database that can't be used ends the start, and is left as it is.
func TestUnusableDatabase(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	check(t, s.daemon.Start())
	pool := s.pool()
	addr := s.acquire(pool, lab.ScatteredMAC(1))
	check(t, s.daemon.Stop())
	name := filepath.Join(s.daemon.DataDir, "oam-docker-ipam.db")
	good := must(os.ReadFile(name))(t)

	for _, c := range []struct {
		name string
		make func() error
		says string
	}{
		{"newer schema", func() error {
			db, err := bolt.Open(name, 0o600, nil)
			if err != nil {
				return err
			}
			err = db.Update(func(tx *bolt.Tx) error { return tx.Bucket([]byte("meta")).Put([]byte("schema"), []byte("1000")) })
			return errors.Join(err, db.Close())
		}, "written by a newer version"},
		{"something else", func() error {
			return os.WriteFile(name, bytes.Repeat([]byte("not a database\n"), 3000), 0o600)
		}, "not usable (left as it is)"},
		{"cut", func() error { return os.WriteFile(name, good[:len(good)/2], 0o600) }, "not usable (left as it is)"},
		{"pages lost", func() error {
			// All but the two pages that bbolt begins with.
			lost := bytes.Clone(good)
			clear(lost[2*os.Getpagesize():])
			return os.WriteFile(name, lost, 0o600)
		}, "not usable (left as it is)"},
		{"pages overwritten", func() error {
			lost := bytes.Clone(good)
			for i := 2 * os.Getpagesize(); i < len(lost); i++ {
				lost[i] = 0xff
			}
			return os.WriteFile(name, lost, 0o600)
		}, "not usable (left as it is)"},
	} {
		t.Run(c.name, func(t *testing.T) {
			check(t, c.make())
			before, _ := os.ReadFile(name)
			mentions(t, doesNotStart(t, s.daemon), "open database "+name, c.says)
			if after, _ := os.ReadFile(name); !bytes.Equal(before, after) {
				t.Error("the file has changed")
			}
		})
	}

	// The way out that the message gives: the container's next start works
	// without the database.
	check(t, os.Remove(name))
	check(t, s.daemon.Start())
	if again := s.acquire(pool, lab.ScatteredMAC(1)); again != addr {
		t.Errorf("the same MAC had %s and now has %s", addr, again)
	}
	check(t, s.daemon.Stop())
	check(t, os.WriteFile(name, good, 0o600)) // from the backup
	check(t, s.daemon.Start())
	s.known(addr)
	check(t, s.releaseAddress(pool, addr))
	s.notLeased()
}

func TestReadOnlyDataFolder(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	check(t, os.Mkdir(s.daemon.DataDir, 0o700))
	remount := func(how string, flags uintptr) {
		t.Helper()
		if err := unix.Mount("tmpfs", s.daemon.DataDir, "tmpfs", flags, ""); err != nil {
			t.Fatalf("mount data folder %s: %v", how, err)
		}
	}
	remount("for writing", 0)
	check(t, s.daemon.Start())
	addr := s.acquire(s.pool(), lab.ScatteredMAC(1))
	check(t, s.daemon.Stop())
	remount("read-only", unix.MS_REMOUNT|unix.MS_RDONLY)
	mentions(t, doesNotStart(t, s.daemon), "open database "+s.daemon.DataDir, "read-only file system")
	s.leased(addr, lab.ScatteredMAC(1))
	remount("for writing again", unix.MS_REMOUNT)
	check(t, s.daemon.Start())
	s.known(addr)
}

// Nobody named a server: the daemon runs, for networks may do it.
func TestNoServerConfigured(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	s.daemon.Flags = nil
	check(t, s.daemon.Start())
	_, err := s.requestPool("10.10.0.0/24", nil)
	if !errors.Is(err, lab.ErrRefused) {
		t.Fatalf("a network without a DHCP server: %v", err)
	}
	mentions(t, err.Error(), "no DHCP server is configured", "DHCP_SERVER", "--ipam-opt dhcp_server=")
	pool := must(s.requestPool("10.10.0.0/24", map[string]string{"dhcp_server": "10.10.0.1"}))(t)
	s.acquire(pool, lab.ScatteredMAC(1))
}

// A server's name that can't be resolved is reported by each request, until it
// can.
func TestServerNameComesLater(t *testing.T) {
	t.Parallel() // it waits
	s := newHost(t, lab.Kea, lab.DHCPConfig{}, "--dhcp-server", "dhcp.example")
	// A resolver of its own, on which nobody answers, and names of its own.
	files := map[string]string{"resolv.conf": "nameserver 127.0.0.1\n", "hosts": "127.0.0.1 localhost\n", "nsswitch.conf": "hosts: files dns\n"}
	script := "#!/bin/sh\nset -e\n"
	for name, text := range files {
		file := filepath.Join(s.lab.Scratch, name)
		check(t, os.WriteFile(file, []byte(text), 0o644))
		script += fmt.Sprintf("[ ! -e /etc/%[1]s ] || mount --bind %[2]s /etc/%[1]s\n", name, file)
	}
	inner, outer := filepath.Join(s.lab.Scratch, "inner"), filepath.Join(s.lab.Scratch, "outer")
	script += fmt.Sprintf("exec %s \"$@\"\n", must(lab.Build())(t))
	check(t, os.WriteFile(inner, []byte(script), 0o755))
	check(t, os.WriteFile(outer, fmt.Appendf(nil, "#!/bin/sh\nexec unshare --mount %s \"$@\"\n", inner), 0o755))
	s.daemon.Binary = outer

	check(t, s.daemon.Start())
	began := time.Now()
	_, err := s.requestPool("10.10.0.0/24", nil)
	if took := time.Since(began); !errors.Is(err, lab.ErrRefused) || took > 9*time.Second {
		t.Fatalf("a network of an unknown server, after %v: %v", took, err)
	}
	mentions(t, err.Error(), "resolve DHCP server dhcp.example", "127.0.0.1:53")
	// Go looks at the file again after 5 s.
	check(t, os.WriteFile(filepath.Join(s.lab.Scratch, "hosts"), []byte("10.10.0.1 dhcp.example\n"), 0o644))
	var pool string
	eventually(t, 8*time.Second, func() (err error) {
		pool, err = s.requestPool("10.10.0.0/24", nil)
		return err
	})
	s.acquire(pool, lab.ScatteredMAC(1))
}
