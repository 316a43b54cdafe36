package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// soak runs the long variants.
var soak = os.Getenv("OAM_SOAK") == "1"

// Containers don't notice that the daemon ended and came back, however it
// ended: nothing is released, renewals go on, and so does the release at rm.
func TestDaemonRestartsUnderContainers(t *testing.T) {
	t.Parallel()
	for _, kind := range lab.DHCPKinds {
		t.Run(kind.Name, func(t *testing.T) {
			t.Parallel()
			// T1 = 3 s, the least that dnsmasq takes: what the server's table
			// says of the end has grown by then.
			s := newSite(t, kind, lab.DHCPConfig{RenewSeconds: 3, RebindSeconds: 300}, byMAC...)
			s.network("a", "eth0", "10.10.0.0/24")
			releases := s.count(s.net.Server, release)
			addrs := map[string]netip.Addr{}
			for _, name := range []string{"c1", "c2"} {
				addrs[name] = s.run(name, "a")
			}
			for _, end := range []struct {
				how string
				act func() error
			}{{"SIGTERM", s.daemon.Stop}, {"SIGKILL", s.daemon.Kill}} {
				check(t, end.act())
				if n := releases(); n != 0 {
					t.Errorf("after %s the server got %d releases", end.how, n)
				}
				ends := map[string]time.Time{}
				for name, addr := range addrs {
					ends[name] = s.leased(addr, s.mac(name, "eth0")).Expires
				}
				check(t, s.daemon.Start())
				for name, addr := range addrs {
					if mac := s.mac(name, "eth0"); s.known(addr).MAC != mac {
						t.Errorf("after %s, %s of %s is known as %+v", end.how, addr, mac, s.known(addr))
					}
					if end.how == "SIGKILL" {
						s.renewed(addr, ends[name])
					}
				}
			}
			s.docker("rm", "-f", "c1", "c2")
			s.notLeased()
			if left := s.leases(); len(left) != 0 {
				t.Errorf("the daemon still has %+v", left)
			}
		})
	}
}

// renewed waits until the server's table has a later end of a lease.
func (s *site) renewed(addr netip.Addr, before time.Time) {
	s.Helper()
	eventually(s.T, 10*time.Second, func() error {
		lease, found, err := s.dhcp.Lease(addr)
		if err == nil && (!found || !lease.Expires.After(before)) {
			err = fmt.Errorf("%s was not renewed since %v: %+v", addr, before, lease)
		}
		return err
	})
}

// The engine gives up its releases when the plugin is away. The leases are
// kept then, until the same MAC or an operator comes.
func TestContainersStopWhileDaemonIsDown(t *testing.T) {
	t.Parallel() // the engine's patience of 15 s is most of its time
	s := newSite(t, lab.Kea, lab.DHCPConfig{}, byMAC...)
	const mac = "02:42:0a:0a:00:77"
	s.network("a", "eth0", "10.10.0.0/24")
	s.network("b", "eth1", "10.20.0.0/24")
	again := s.run("again", "a", "--mac-address", mac)
	lost := s.run("lost", "b")
	lostMAC := s.mac("lost", "eth0")

	check(t, s.daemon.Kill())
	var stops sync.WaitGroup
	for _, name := range []string{"again", "lost"} {
		stops.Go(func() {
			if _, err := s.engine.Docker("stop", name); err != nil {
				t.Error(err)
			}
		})
	}
	stops.Wait()
	s.leased(again, mac)
	s.leased(lost, lostMAC)
	check(t, s.daemon.Start())
	s.known(again)
	s.known(lost)

	s.docker("start", "again")
	if addr := s.addr("again", "eth0"); addr != again {
		t.Errorf("the same MAC had %s and now has %s", again, addr)
	}
	must(s.daemon.Run("release", lost.String()))(t)
	s.notLeased(lost)
	if _, err := s.find(lost); err == nil {
		t.Errorf("%s is still known after its release by hand", lost)
	}
	s.docker("start", "lost")
	s.leased(s.addr("lost", "eth0"), s.mac("lost", "eth0"))
	s.docker("rm", "-f", "again", "lost")
	s.notLeased()
}

// SIGTERM finishes what is in hand, and the answers are worth something.
func TestSIGTERMFinishesRequestsInHand(t *testing.T) {
	const requests = 8
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	process := s.launch()
	pool := s.pool()
	var heard []func() int
	for n := range requests {
		heard = append(heard, s.countBytes(s.net.Server, "|"+strings.ReplaceAll(lab.ScatteredMAC(n), ":", "")+"|"))
	}
	// A server that is stopped hears everything and says nothing.
	check(t, syscall.Kill(s.dhcp.Pid(), syscall.SIGSTOP))
	type answer struct {
		mac  string
		addr netip.Addr
		err  error
	}
	answers := make(chan answer, requests)
	for n := range requests {
		go func() {
			mac := lab.ScatteredMAC(n)
			addr, err := s.requestAddress(pool, mac)
			answers <- answer{mac, addr, err}
		}()
	}
	for _, sofar := range heard {
		s.reached(sofar, 1)
	}
	check(t, s.daemon.Signal(syscall.SIGTERM))
	// The listener's end is the sign that the signal has been taken.
	eventually(t, 5*time.Second, func() error {
		if _, err := s.daemon.Client().Get("http://plugin/v1/leases"); err == nil {
			return errors.New("the socket still answers after SIGTERM")
		}
		return nil
	})
	check(t, syscall.Kill(s.dhcp.Pid(), syscall.SIGCONT))
	granted := map[string]netip.Addr{}
	for range requests {
		a := <-answers
		if a.err != nil {
			t.Errorf("request in hand of %s: %v", a.mac, a.err)
			continue
		}
		granted[a.mac] = a.addr
	}
	check(t, process.Wait(5*time.Second))
	check(t, s.daemon.Start())
	for mac, addr := range granted {
		s.leased(addr, mac)
		if known := s.known(addr); known.MAC != mac {
			t.Errorf("%s of %s is known as %+v", addr, mac, known)
		}
	}
}

// Killing the daemon doesn't try what a power failure does: the kernel writes
// what a dead process left. So look whether it still has to.
func TestAnsweredLeasesAreOnDisk(t *testing.T) {
	s := newHost(t, lab.Kea, lab.DHCPConfig{})
	check(t, s.daemon.Start())
	pool := s.pool()
	database := must(filepath.Glob(filepath.Join(s.daemon.DataDir, "*.db")))(t)
	if len(database) != 1 {
		t.Fatalf("databases: %v", database)
	}
	var system unix.Statfs_t
	check(t, unix.Statfs(database[0], &system))
	if system.Type == unix.TMPFS_MAGIC {
		t.Skip("the temporary folder is in memory, where nothing is ever written to a disk")
	}
	for n := range 20 {
		addr := must(s.requestAddress(pool, lab.ScatteredMAC(n)))(t)
		if dirty := dirtyPages(t, database[0]); dirty != 0 {
			t.Fatalf("%s was answered while %d pages of the database are not on disk", addr, dirty)
		}
	}
}

// dirtyPages counts the pages of a file that the kernel has yet to write.
func dirtyPages(t *testing.T, name string) (dirty int) {
	t.Helper()
	file := must(os.Open(name))(t)
	defer file.Close()
	size := int(must(file.Stat())(t).Size())
	pages := must(unix.Mmap(int(file.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED))(t)
	defer func() { check(t, unix.Munmap(pages)) }()
	// See the kernel's admin-guide/mm/pagemap.rst.
	word := func(table string, index uint64) uint64 {
		t.Helper()
		f := must(os.Open(table))(t)
		defer f.Close()
		var b [8]byte
		must(f.ReadAt(b[:], int64(index*8)))(t)
		return binary.NativeEndian.Uint64(b[:])
	}
	const present, frame = 1 << 63, 1<<55 - 1
	const isDirty, isBeingWritten = 1 << 4, 1 << 8
	pageSize := os.Getpagesize()
	first := uint64(uintptr(unsafe.Pointer(&pages[0]))) / uint64(pageSize)
	var touched byte
	for n := range size / pageSize {
		touched += pages[n*pageSize]
		entry := word("/proc/self/pagemap", first+uint64(n))
		if entry&present == 0 || entry&frame == 0 {
			t.Skip("this kernel doesn't tell the state of pages")
		}
		if word("/proc/kpageflags", entry&frame)&(isDirty|isBeingWritten) != 0 {
			dirty++
		}
	}
	runtime.KeepAlive(touched)
	return dirty
}
