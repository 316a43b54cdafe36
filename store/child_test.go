package store

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// roleVar makes the test binary play another part: what must be seen from
// outside of a process, such as its death, needs a second one.
const roleVar = "STORE_TEST_ROLE"

// roles get the arguments of child and end with os.Exit.
var roles = map[string]func(args []string){}

func TestMain(m *testing.M) {
	if role := roles[os.Getenv(roleVar)]; role != nil {
		role(os.Args[1:])
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child prepares a process of this test binary in a role.
func child(t testing.TB, role string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	works(t, err)
	cmd := exec.CommandContext(t.Context(), self, args...)
	cmd.Env = append(os.Environ(), roleVar+"="+role)
	return cmd
}

func init() {
	// opener opens the folders whose names it reads, one after the other, and
	// answers with a line for each.
	roles["opener"] = func([]string) {
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			db, err := Open(in.Text())
			if err == nil {
				if _, err = db.Load(); err != nil {
					err = fmt.Errorf("load: %w", err)
				}
				if _, unread := db.Events(0); unread != nil {
					err = fmt.Errorf("events: %w", unread)
				}
				// A usable database is changed by using it.
				_ = db.bolt.Close()
			}
			fmt.Println(strings.ReplaceAll(fmt.Sprint("opened: ", err), "\n", " "))
		}
	}
}
