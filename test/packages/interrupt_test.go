package packages

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// An interrupted build ends at once, with all that it started, and leaves
// nothing behind.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	folder := clone(t)
	for script, tool := range map[string]string{"build-rpm.sh": "rpmbuild", "build-deb.sh": "make"} {
		for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
			t.Run(script+" "+sig.String(), func(t *testing.T) {
				t.Parallel()
				needs(t, "rpmbuild", "make")
				tools, temp := t.TempDir(), t.TempDir()
				pids := filepath.Join(tools, "pids")
				check(t, syscall.Mkfifo(pids, 0o600))
				// In its place one that has a child of its own and ends only when
				// it is told to.
				put(t, filepath.Join(tools, tool), `#!/bin/sh
case "$*" in *" version"* | *" revision"*) exec /usr/bin/`+tool+` "$@" ;; esac
sleep 600 &
echo "$$ $!" >`+pids+`
wait
`, 0o755)
				cmd := command(t.Context(), "/", []string{"TMPDIR=" + temp, "PATH=" + tools + ":" + os.Getenv("PATH")},
					filepath.Join(folder, script), "oam-docker-ipam", version)
				check(t, cmd.Start())
				// Opening it waits for the program that writes it.
				started := strings.Fields(read(t, pids))
				check(t, cmd.Process.Signal(sig))
				ended := make(chan error, 1)
				go func() { ended <- cmd.Wait() }()
				select {
				case <-ended:
				case <-time.After(10 * time.Second):
					t.Fatal("it runs on")
				}
				if got, want := cmd.ProcessState.ExitCode(), 128+int(sig); got != want {
					t.Errorf("exit status %d, want %d", got, want)
				}
				if left, _ := os.ReadDir(temp); len(left) > 0 {
					t.Errorf("left in TMPDIR: %s", left)
				}
				for _, word := range started {
					pid, err := strconv.Atoi(word)
					check(t, err)
					for deadline := time.Now().Add(5 * time.Second); alive(pid); time.Sleep(10 * time.Millisecond) {
						if time.Now().After(deadline) {
							t.Fatalf("process %d runs on", pid)
						}
					}
				}
			})
		}
	}
}

// alive tells whether a process is there and no zombie, which is its parent's
// business.
func alive(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	_, state, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(state, "Z")
}
