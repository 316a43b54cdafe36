package packages

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The same files as in the RPM, where Debian looks for them.
func TestDebContents(t *testing.T) {
	t.Parallel()
	const want = `-rw-r--r-- /etc/oam-docker-ipam.conf
-rwxr-xr-x /usr/bin/oam-docker-ipam
-rw-r--r-- /usr/lib/systemd/system/oam-docker-ipam-reconcile.service
-rw-r--r-- /usr/lib/systemd/system/oam-docker-ipam-reconcile.timer
-rw-r--r-- /usr/lib/systemd/system/oam-docker-ipam.service
-rw-r--r-- /usr/lib/systemd/system/oam-docker-ipam.socket
-rw-r--r-- /usr/lib/sysusers.d/oam-docker-ipam.conf
-rw-r--r-- /usr/share/bash-completion/completions/oam-docker-ipam
-rw-r--r-- /usr/share/doc/oam-docker-ipam/README.md
-rw-r--r-- /usr/share/doc/oam-docker-ipam/alerts.yml
-rw-r--r-- /usr/share/doc/oam-docker-ipam/broadcast.conf
-rw-r--r-- /usr/share/doc/oam-docker-ipam/changelog.Debian.gz
-rw-r--r-- /usr/share/doc/oam-docker-ipam/changelog.gz
-rw-r--r-- /usr/share/doc/oam-docker-ipam/copyright
-rw-r--r-- /usr/share/doc/oam-docker-ipam/docs/JSON.md
-rw-r--r-- /usr/share/doc/oam-docker-ipam/grafana-dashboard.json
-rw-r--r-- /usr/share/lintian/overrides/oam-docker-ipam
-rw-r--r-- /usr/share/man/man8/oam-docker-ipam.8.gz
-rw-r--r-- /usr/share/zsh/vendor-completions/_oam-docker-ipam
`
	file := packageOf(t, debFile)
	var got strings.Builder
	for line := range strings.Lines(output(t, "dpkg-deb", "--contents", file)) {
		words := strings.Fields(line)
		if words[1] != "root/root" {
			t.Errorf("not root's: %s", line)
		}
		if folder := strings.HasPrefix(line, "d"); !folder {
			got.WriteString(words[0] + " " + strings.TrimPrefix(words[5], ".") + "\n")
		} else if words[0] != "drwxr-xr-x" {
			t.Errorf("a folder for not all: %s", line)
		}
	}
	if got.String() != want {
		t.Errorf("got\n%swant\n%s", &got, want)
	}

	if got := output(t, "dpkg-deb", "--info", file, "conffiles"); got != "/etc/oam-docker-ipam.conf\n" {
		t.Errorf("configuration files: %q", got)
	}
	for field, want := range map[string]string{"Version": version + "-1", "Architecture": "amd64", "Depends": "systemd (>= 239)"} {
		if got := output(t, "dpkg-deb", "--field", file, field); got != want+"\n" {
			t.Errorf("%s is %q, want %q", field, got, want)
		}
	}
	run(t, command(t.Context(), unpacked(t, debFile), nil, "sh", "-c", `dpkg-deb --info "$1" md5sums | md5sum --check --quiet`, "sh", file))
	copyright := read(t, filepath.Join(unpacked(t, debFile), "usr/share/doc/oam-docker-ipam/copyright"))
	for _, module := range []string{"go.etcd.io/bbolt", "golang.org/x/net"} {
		if !strings.Contains(copyright, module) {
			t.Errorf("the licence of %s is missing", module)
		}
	}
}

func TestLintian(t *testing.T) {
	t.Parallel()
	needs(t, "lintian")
	out := run(t, command(t.Context(), "/", nil, "lintian", "--allow-root", packageOf(t, debFile)))
	if out != "" {
		t.Error(out)
	}
}

// helper stands for deb-systemd-helper and deb-systemd-invoke, which keep what
// the administrator has disabled.
const helper = `#!/bin/sh
echo "${0##*/} $*" >>/calls
case $* in
*was-enabled*) for unit; do :; done; [ ! -e "/disabled/$unit" ] ;;
esac
`

// dpkg installs, upgrades, removes and purges it.
func TestDebOnMachine(t *testing.T) {
	t.Parallel()
	file := packageOf(t, debFile)
	const (
		state  = "var/lib/oam-docker-ipam/leases.db"
		stamp  = "var/lib/systemd/timers/stamp-oam-docker-ipam-reconcile.timer"
		user   = "systemd-sysusers oam-docker-ipam.conf\n"
		enable = "deb-systemd-helper --quiet was-enabled oam-docker-ipam.socket\n" +
			"deb-systemd-helper enable oam-docker-ipam.socket\n" +
			"deb-systemd-helper --quiet was-enabled oam-docker-ipam.service\n" +
			"deb-systemd-helper enable oam-docker-ipam.service\n"
		timer   = "deb-systemd-helper update-state oam-docker-ipam-reconcile.timer\n"
		reload  = "systemctl --system daemon-reload\n"
		start   = "deb-systemd-invoke start oam-docker-ipam.socket\n"
		restart = "deb-systemd-invoke restart oam-docker-ipam.service oam-docker-ipam-reconcile.timer\n"
		stop    = "deb-systemd-invoke stop oam-docker-ipam.service oam-docker-ipam.socket oam-docker-ipam-reconcile.timer oam-docker-ipam-reconcile.service\n"
		purge   = "deb-systemd-helper purge oam-docker-ipam.socket oam-docker-ipam.service oam-docker-ipam-reconcile.timer\n"
	)
	for name, test := range map[string]struct {
		running                         bool
		install, upgrade, remove, purge string
	}{
		"systemd": {true, user + enable + timer + reload + start, user + enable + timer + reload + start + restart, stop + reload, purge},
		"chroot":  {false, user + enable + timer, user + enable + timer, "", purge},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, test.running)
			// Maintainer scripts have a /dev.
			check(t, os.Mkdir(m.path("dev"), 0o755))
			for _, name := range []string{"deb-systemd-helper", "deb-systemd-invoke"} {
				put(t, m.path("usr/bin/"+name), helper, 0o755)
			}
			for _, name := range []string{"status", "available"} {
				put(t, m.path("var/lib/dpkg/"+name), "", 0o644)
			}
			for _, folder := range []string{"info", "updates"} {
				check(t, os.MkdirAll(m.path("var/lib/dpkg/"+folder), 0o755))
			}
			dpkg := func(args ...string) {
				t.Helper()
				run(t, command(t.Context(), "/", nil, append([]string{"dpkg", "--root=" + m.root, "--force-depends", "--force-unsafe-io"}, args...)...))
			}
			dpkg("--install", file)
			m.wantCalls("installation", test.install)
			dpkg("--install", file)
			m.wantCalls("upgrade", test.upgrade)

			put(t, m.path("disabled/oam-docker-ipam.service"), "", 0o644)
			dpkg("--install", file)
			if got := m.calls(); strings.Contains(got, "enable oam-docker-ipam.service") || !strings.Contains(got, "update-state oam-docker-ipam.service") {
				t.Errorf("upgrade of a disabled unit:\n%s", got)
			}

			check(t, os.Remove(m.path("disabled/oam-docker-ipam.service")))
			put(t, m.path(state), "leases", 0o600)
			put(t, m.path(stamp), "", 0o644)
			dpkg("--remove", "oam-docker-ipam")
			m.wantCalls("removal", test.remove)
			dpkg("--install", file)
			m.wantCalls("installation after it", test.upgrade)
			// A removal that another package hinders is taken back.
			for arg, want := range map[string]string{"abort-remove": test.upgrade, "abort-upgrade": test.upgrade, "triggered": ""} {
				run(t, command(t.Context(), "/", []string{"PATH=/usr/bin"}, "/usr/sbin/chroot", m.root, "/bin/sh", "/var/lib/dpkg/info/oam-docker-ipam.postinst", arg))
				m.wantCalls(arg, want)
			}
			dpkg("--remove", "oam-docker-ipam")
			m.calls()
			for _, path := range []string{newConf, state} {
				read(t, m.path(path))
			}
			dpkg("--purge", "oam-docker-ipam")
			m.wantCalls("purge", test.purge)
			left := output(t, "sh", "-c", "cd \"$1\" && find etc usr var -name '*oam-docker-ipam*'", "sh", m.root)
			if left != "" {
				t.Errorf("the purge leaves\n%s", left)
			}
		})
	}
}
