package packages

import (
	"cmp"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/conf"
)

// What the package puts where, with which rights, and what is configuration (c),
// documentation (d), a licence (l), or only known (g), and stays when the user
// has changed it (n).
func TestRPMContents(t *testing.T) {
	t.Parallel()
	const want = `drwxr-xr-x root:root g /etc/oam-docker-ipam
-rw-r--r-- root:root cn /etc/oam-docker-ipam.conf
-rw-r--r-- root:root g /etc/oam-docker-ipam/copied
-rw-r--r-- root:root cng /etc/oam-docker-ipam/oam-docker-ipam.conf
-rwxr-xr-x root:root - /usr/bin/oam-docker-ipam
-rw-r--r-- root:root - /usr/lib/systemd/system/oam-docker-ipam-reconcile.service
-rw-r--r-- root:root - /usr/lib/systemd/system/oam-docker-ipam-reconcile.timer
-rw-r--r-- root:root - /usr/lib/systemd/system/oam-docker-ipam.service
-rw-r--r-- root:root - /usr/lib/systemd/system/oam-docker-ipam.socket
-rw-r--r-- root:root - /usr/lib/sysusers.d/oam-docker-ipam.conf
-rw-r--r-- root:root - /usr/share/bash-completion/completions/oam-docker-ipam
drwxr-xr-x root:root - /usr/share/doc/oam-docker-ipam
-rw-r--r-- root:root d /usr/share/doc/oam-docker-ipam/CHANGELOG.md
-rw-r--r-- root:root d /usr/share/doc/oam-docker-ipam/README.md
-rw-r--r-- root:root d /usr/share/doc/oam-docker-ipam/alerts.yml
-rw-r--r-- root:root d /usr/share/doc/oam-docker-ipam/broadcast.conf
drwxr-xr-x root:root - /usr/share/doc/oam-docker-ipam/docs
-rw-r--r-- root:root d /usr/share/doc/oam-docker-ipam/docs/JSON.md
-rw-r--r-- root:root d /usr/share/doc/oam-docker-ipam/grafana-dashboard.json
drwxr-xr-x root:root - /usr/share/licenses/oam-docker-ipam
-rw-r--r-- root:root l /usr/share/licenses/oam-docker-ipam/LICENSE
-rw-r--r-- root:root l /usr/share/licenses/oam-docker-ipam/LICENSE.modules
-rw-r--r-- root:root d /usr/share/man/man8/oam-docker-ipam.8.gz
-rw-r--r-- root:root - /usr/share/zsh/site-functions/_oam-docker-ipam
drwx------ oam-docker-ipam:oam-docker-ipam - /var/lib/oam-docker-ipam
`
	got := output(t, "rpm", "-qp", "--qf", `[%{FILEMODES:perms} %{FILEUSERNAME}:%{FILEGROUPNAME} -%{FILEFLAGS:fflags} %{FILENAMES}\n]`, packageOf(t, rpmFile))
	got = strings.ReplaceAll(strings.ReplaceAll(got, " - ", "\x00"), " -", " ")
	if got = strings.ReplaceAll(got, "\x00", " - "); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// It depends on systemd and on nothing of Docker, and on no rpm that is newer
// than EL8's.
func TestRPMDependencies(t *testing.T) {
	t.Parallel()
	file := packageOf(t, rpmFile)
	needed := strings.Split(strings.TrimSpace(output(t, "rpm", "-qp", "--requires", file)), "\n")
	slices.Sort(needed)
	want := []string{
		"/bin/sh", "config(oam-docker-ipam) = " + version + "-1", "coreutils",
		"rpmlib(CompressedFileNames) <= 3.0.4-1", "rpmlib(FileDigests) <= 4.6.0-1",
		"rpmlib(PayloadFilesHavePrefix) <= 4.0-1", "rpmlib(PayloadIsXz) <= 5.2-1", "sed", "systemd", "systemd >= 239",
	}
	if got := slices.Compact(needed); !slices.Equal(got, want) {
		t.Errorf("requires\n%q, want\n%q", got, want)
	}
	if got := output(t, "rpm", "-qp", "--qf", "%{BUILDHOST} %{BUILDTIME} %{RELEASE} %{ARCH}", file); got != "localhost 1790000000 1 x86_64" {
		t.Errorf("built by %s", got)
	}
}

func TestRPMLint(t *testing.T) {
	t.Parallel()
	needs(t, "rpmlint")
	folder := sources(t)
	rc := filepath.Join(folder, "rpm/oam-docker-ipam.rpmlintrc")
	out := run(t, command(t.Context(), folder, nil, "rpmlint", "-r", rc, packageOf(t, rpmFile), packageOf(t, srcFile)))
	if !strings.Contains(out, "2 packages and 0 specfiles checked; 0 errors, 0 warnings") {
		t.Error(out)
	}
}

// scriptlet is the text of one.
func scriptlet(t *testing.T, tag string) string {
	t.Helper()
	return output(t, "rpm", "-qp", "--qf", "%{"+tag+"}", packageOf(t, rpmFile))
}

// The scriptlets are what the shells of any distribution read.
func TestScriptletsParse(t *testing.T) {
	t.Parallel()
	for _, tag := range []string{"PREIN", "POSTIN", "PREUN", "POSTUN", "POSTTRANS"} {
		text := scriptlet(t, tag)
		if len(text) < 100 || strings.Contains(text, "%{") {
			t.Errorf("%s is %s", tag, text)
		}
		for _, shell := range []string{"sh", "bash"} {
			cmd := command(t.Context(), "", nil, shell, "-n")
			cmd.Stdin = strings.NewReader(text)
			run(t, cmd)
		}
	}
}

// machine is a root folder with busybox for its programs. There is no /dev, as
// in a folder that dnf --installroot has just made.
type machine struct {
	t    *testing.T
	root string
}

// systemctl notes what it is told, and plays it on files.
const systemctl = `#!/bin/sh
verb= units=
for word; do
	case $word in
	-*) ;;
	*.*) units="$units $word" ;;
	*) verb=$word ;;
	esac
done
case $verb in
is-active | is-enabled) ;;
*) echo "systemctl $*" >>/calls ;;
esac
for unit in $units; do
	case $verb in
	is-active) [ -e /active/$unit ] || exit 3 ;;
	is-enabled) [ -e /enabled/$unit ] || exit 1 ;;
	start) touch /active/$unit ;;
	stop) rm -f /active/$unit ;;
	enable)
		touch /enabled/$unit
		file=/etc/systemd/system/$unit
		[ -e $file ] || file=/usr/lib/systemd/system/$unit
		! grep -q ^Also= $file || touch /enabled/oam-docker-ipam.socket
		;;
	disable) rm -f /enabled/$unit ;;
	esac
done
`

const sysusers = `#!/bin/sh
echo "systemd-sysusers $*" >>/calls
cat >/sysusers
echo oam-docker-ipam:x:999:999::/:/bin/false >>/etc/passwd
echo oam-docker-ipam:x:999: >>/etc/group
`

// fill makes the programs in a folder.
func fill(t *testing.T, root string) {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	check(t, err)
	for _, folder := range []string{"usr/bin", "active", "enabled", "run", "tmp", "var/tmp"} {
		check(t, os.MkdirAll(filepath.Join(root, folder), 0o755))
	}
	check(t, os.Symlink("usr/bin", filepath.Join(root, "bin")))
	put(t, filepath.Join(root, "usr/bin/busybox"), read(t, busybox), 0o755)
	for _, applet := range []string{
		"basename", "cat", "chmod", "chown", "cp", "diff", "echo", "env", "grep", "id", "ls", "mkdir", "mv", "readlink", "rm", "rmdir", "sed", "sh", "tail", "touch",
	} {
		check(t, os.Symlink("busybox", filepath.Join(root, "usr/bin", applet)))
	}
	put(t, filepath.Join(root, "usr/bin/systemctl"), systemctl, 0o755)
	put(t, filepath.Join(root, "usr/bin/systemd-sysusers"), sysusers, 0o755)
	put(t, filepath.Join(root, "etc/passwd"), "root:x:0:0::/:/bin/sh\n", 0o644)
	put(t, filepath.Join(root, "etc/group"), "root:x:0:\n", 0o644)
}

// newMachine makes one, where systemd runs or doesn't.
func newMachine(t *testing.T, running bool) *machine {
	t.Helper()
	needs(t, "root", "rpm", "busybox")
	m := &machine{t, t.TempDir()}
	fill(t, m.root)
	if running {
		check(t, os.MkdirAll(m.path("run/systemd/system"), 0o755))
	}
	return m
}

func (m *machine) path(name string) string { return filepath.Join(m.root, name) }

// rpm runs rpm on it and returns what it and the scriptlets said.
func (m *machine) rpm(args ...string) string {
	m.t.Helper()
	out := run(m.t, command(m.t.Context(), "/", nil, append([]string{"rpm", "--root", m.root, "--dbpath", "/var/lib/rpm", "--nodeps"}, args...)...))
	var said []string
	for line := range strings.Lines(out) {
		if !strings.HasPrefix(line, "rpm: ") { // Debian's own words
			said = append(said, line)
		}
	}
	return strings.Join(said, "")
}

// run runs a scriptlet on it as rpm does, and returns what it said.
func (m *machine) run(script, count string) string {
	m.t.Helper()
	cmd := command(m.t.Context(), "/", []string{"PATH=/usr/bin"}, "/usr/sbin/chroot", m.root, "/bin/sh", "-s", count)
	cmd.Stdin = strings.NewReader(script)
	return run(m.t, cmd)
}

// calls returns, and forgets, what systemctl has been told.
func (m *machine) calls() string {
	m.t.Helper()
	text, err := os.ReadFile(m.path("calls"))
	if err != nil && !os.IsNotExist(err) {
		m.t.Fatal(err)
	}
	os.Remove(m.path("calls"))
	return string(text)
}

func (m *machine) wantCalls(after, want string) {
	m.t.Helper()
	if got := m.calls(); got != want {
		m.t.Errorf("%s:\n%swant\n%s", after, got, want)
	}
}

// The package by itself: installed, upgraded, removed.
func TestRPMOnMachine(t *testing.T) {
	t.Parallel()
	const (
		user    = "systemd-sysusers --replace=/usr/lib/sysusers.d/oam-docker-ipam.conf -\n"
		preset  = "systemctl --quiet --no-reload preset oam-docker-ipam.socket oam-docker-ipam.service\n"
		reload  = "systemctl daemon-reload\n"
		restart = "systemctl try-restart oam-docker-ipam.service\n"
		all     = "oam-docker-ipam.service oam-docker-ipam.socket oam-docker-ipam-reconcile.timer oam-docker-ipam-reconcile.service\n"
		disable = "systemctl --quiet --no-reload disable " + all
		stop    = "systemctl stop " + all
	)
	file := packageOf(t, rpmFile)
	for name, test := range map[string]struct {
		running                  bool
		install, upgrade, remove string
	}{
		"systemd":      {true, user + preset + reload, user + reload + reload + restart, disable + stop + reload},
		"installroot":  {false, user + preset, user, disable},
		"no systemctl": {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, test.running)
			if test.install == "" {
				check(t, os.Remove(m.path("usr/bin/systemctl")))
			}
			// Of a daemon that root started by hand.
			put(t, m.path("var/lib/oam-docker-ipam/leases.db"), "leases", 0o600)
			if said := m.rpm("-i", file); said != "" {
				t.Errorf("installation said %s", said)
			}
			if test.install == "" {
				m.calls()
			} else {
				m.wantCalls("installation", test.install)
			}
			shipped, installed := read(t, filepath.Join(sources(t), "systemd/oam-docker-ipam.sysusers")), read(t, m.path("sysusers"))
			if installed != shipped {
				t.Errorf("the user was made by %q, and the file is %q", installed, shipped)
			}
			for _, path := range []string{"var/lib/oam-docker-ipam", "var/lib/oam-docker-ipam/leases.db"} {
				if owner := output(t, "stat", "-c", "%u:%g", m.path(path)); owner != "999:999\n" {
					t.Errorf("%s belongs to %s", path, owner)
				}
			}
			if _, err := os.Stat(m.path("etc/oam-docker-ipam")); err == nil {
				t.Error("made the old package's folder")
			}

			// An upgrade to the same version is one to rpm. What the user has set
			// stays, and what runs is restarted, but never the socket.
			put(t, m.path("etc/oam-docker-ipam.conf"), "DHCP_SERVER=192.0.2.9\n", 0o644)
			put(t, m.path("active/oam-docker-ipam.service"), "", 0o644)
			put(t, m.path("active/oam-docker-ipam.socket"), "", 0o644)
			if said := m.rpm("-U", "--force", file); said != "" {
				t.Errorf("upgrade said %s", said)
			}
			if test.install == "" {
				m.calls()
			} else {
				m.wantCalls("upgrade", test.upgrade)
			}
			if got := read(t, m.path("etc/oam-docker-ipam.conf")); got != "DHCP_SERVER=192.0.2.9\n" {
				t.Errorf("the upgrade made the configuration %q", got)
			}

			m.rpm("-e", "oam-docker-ipam")
			m.wantCalls("removal", test.remove)
			left := output(t, "sh", "-c", "cd \"$1\" && find . -name '*oam-docker-ipam*' -o -name leases.db | sort", "sh", m.root)
			want := "./etc/oam-docker-ipam.conf.rpmsave\n./var/lib/oam-docker-ipam\n./var/lib/oam-docker-ipam/leases.db\n"
			if !test.running { // that systemctl has removed nothing
				left = strings.ReplaceAll(left, "./active/oam-docker-ipam.service\n./active/oam-docker-ipam.socket\n", "")
			}
			if left != want {
				t.Errorf("removal leaves\n%swant\n%s", left, want)
			}
		})
	}
}

// old builds a package as those below 3 were, with a configuration, and these
// scriptlets besides.
func old(t *testing.T, scriptlets string) string {
	t.Helper()
	top := t.TempDir()
	put(t, filepath.Join(top, "old.spec"), `
%global debug_package %{nil}
%global __os_install_post %{nil}
Name: oam-docker-ipam
Version: 2.0.1
Release: 1.el7.centos
Summary: What its files and scriptlets were
License: none
%description
%install
mkdir -p %{buildroot}/etc/oam-docker-ipam %{buildroot}/usr/bin %{buildroot}/usr/lib/systemd/system
echo DHCP_SERVER= >%{buildroot}/etc/oam-docker-ipam/oam-docker-ipam.conf
touch %{buildroot}/usr/bin/oam-docker-ipam %{buildroot}/usr/bin/ip-pool-usage %{buildroot}/usr/lib/systemd/system/oam-docker-ipam.service
%post
systemctl daemon-reload
%postun
systemctl daemon-reload
`+scriptlets+`
%files
%config(noreplace) /etc/oam-docker-ipam/oam-docker-ipam.conf
/usr/bin/oam-docker-ipam
/usr/bin/ip-pool-usage
/usr/lib/systemd/system/oam-docker-ipam.service
`, 0o644)
	run(t, command(t.Context(), top, nil, "rpmbuild", "-bb", "--quiet", "--target", "x86_64", "--define", "_topdir "+top, "--define", "_rpmfilename old.rpm", "old.spec"))
	return filepath.Join(top, "RPMS/old.rpm")
}

const (
	oldConf = "etc/oam-docker-ipam/oam-docker-ipam.conf"
	newConf = "etc/oam-docker-ipam.conf"
)

// The old package's settings, as people have them, reach the daemon.
func TestSettingsOfTheOldPackage(t *testing.T) {
	t.Parallel()
	post := scriptlet(t, "POSTIN")
	program := filepath.Join(unpacked(t, rpmFile), "usr/bin/oam-docker-ipam")
	type values map[string]string
	none := values{"DHCP_SERVER": "", "LISTEN_ADDR": "0.0.0.0", "IPAM_DEBUG": "false"}
	for name, test := range map[string]struct {
		old, new string // new is "" where nobody made one
		want     values
		says     string
	}{
		"as shipped": {
			old:  "[ipam]\nIPAM_DEBUG=true\nDHCP_SERVER=192.168.59.203  #DHCP服务器地址\nLISTEN_ADDR=0.0.0.0         #本机\n",
			want: values{"DHCP_SERVER": "192.168.59.203", "LISTEN_ADDR": "0.0.0.0", "IPAM_DEBUG": "true"},
			says: "oam-docker-ipam: copied DHCP_SERVER IPAM_DEBUG from /etc/oam-docker-ipam/oam-docker-ipam.conf to /etc/oam-docker-ipam.conf\n",
		},
		"comments and quotes": {
			old:  "; old\n# DHCP_SERVER=10.9.9.9\n  DHCP_SERVER = \"10.0.0.1, 10.0.0.2\" # two\nexport LISTEN_ADDR='10.0.0.9';x\nIPAM_DEBUG=false#no\n",
			want: values{"DHCP_SERVER": "10.0.0.1, 10.0.0.2", "LISTEN_ADDR": "10.0.0.9", "IPAM_DEBUG": "false"},
		},
		"CRLF and a byte order mark": {
			old:  "\ufeffDHCP_SERVER=dhcp.example.org:6767\r\nLISTEN_ADDR=10.0.0.9\r\nIPAM_DEBUG=1\r\n",
			want: values{"DHCP_SERVER": "dhcp.example.org:6767", "LISTEN_ADDR": "10.0.0.9", "IPAM_DEBUG": "1"},
		},
		"the last counts, without a line end": {
			old:  "DHCP_SERVER=10.0.0.1\nMY_DHCP_SERVER=10.0.0.3\nDHCP_SERVERS=10.0.0.4\nDHCP_SERVER=10.0.0.2",
			want: values{"DHCP_SERVER": "10.0.0.2", "LISTEN_ADDR": "0.0.0.0", "IPAM_DEBUG": "false"},
		},
		"empty values": {old: "DHCP_SERVER=\nLISTEN_ADDR= # none\nIPAM_DEBUG=\"\"\n", want: none},
		"an empty file": {
			old: "", want: none,
		},
		"no text":              {old: "\x00\x01\xff\n\x7fELF=\n", want: none},
		"more than it's worth": {old: strings.Repeat("# x\n", 20000), want: none},
		"what would be refused": {
			old:  "DHCP_SERVER=$(reboot)\nLISTEN_ADDR=eth0\nIPAM_DEBUG=yes\n",
			want: none,
			says: "oam-docker-ipam: not copied from /etc/oam-docker-ipam/oam-docker-ipam.conf, since this version refuses it: DHCP_SERVER=$(reboot): " +
				"oam-docker-ipam: configuration: environment variable DHCP_SERVER: option dhcp_server=\"$(reboot)\": DHCP server \"$(reboot)\": neither an IPv4 address nor a host name\n" +
				"oam-docker-ipam: not copied from /etc/oam-docker-ipam/oam-docker-ipam.conf, since this version refuses it: LISTEN_ADDR=eth0: " +
				"oam-docker-ipam: configuration: environment variable LISTEN_ADDR: option listen_addr=\"eth0\": want an IPv4 address of this host, or 0.0.0.0 to let its routing choose\n" +
				"oam-docker-ipam: not copied from /etc/oam-docker-ipam/oam-docker-ipam.conf, since this version refuses it: IPAM_DEBUG=yes: " +
				"oam-docker-ipam: configuration: environment variable IPAM_DEBUG: IPAM_DEBUG=\"yes\": want true or false\n",
		},
		"servers without commas": {old: "DHCP_SERVER=\"10.0.0.1 10.0.0.2\"\n", want: none},
		"a comma too many":       {old: "DHCP_SERVER=10.0.0.1,\n", want: none},
		"no address":             {old: "DHCP_SERVER=10.0.0.300\nLISTEN_ADDR=10.0.0\n", want: none},
		"IPv6":                   {old: "DHCP_SERVER=fe80::1\n", want: none},
		"control characters":     {old: "DHCP_SERVER=10.0.0.1\x1b[2J\n", want: none, says: "oam-docker-ipam: not copied from /etc/oam-docker-ipam/oam-docker-ipam.conf, since it has control characters: DHCP_SERVER\n"},
		"a yes that is one":      {old: "IPAM_DEBUG=True\n", want: values{"IPAM_DEBUG": "True"}},
		"what the user has set": {
			old:  "DHCP_SERVER=10.0.0.1\nLISTEN_ADDR=10.0.0.9\nIPAM_DEBUG=true\n",
			new:  "DHCP_SERVER=192.0.2.1 # mine\nLISTEN_ADDR=192.0.2.9\n",
			want: values{"DHCP_SERVER": "192.0.2.1", "LISTEN_ADDR": "192.0.2.9", "IPAM_DEBUG": "true"},
		},
		"an interface excludes servers": {
			old:  "DHCP_SERVER=10.0.0.1\n",
			new:  "DHCP_INTERFACE=eth0",
			want: values{"DHCP_INTERFACE": "eth0", "DHCP_SERVER": "", "LISTEN_ADDR": ""},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, false)
			check(t, os.Link(program, m.path("usr/bin/oam-docker-ipam")))
			put(t, m.path(oldConf), test.old, 0o644)
			put(t, m.path(newConf), cmp.Or(test.new, conf.Shipped), 0o640)
			said := m.run(post, "2")
			if test.says != "" && said != test.says {
				t.Errorf("said\n%swant\n%s", said, test.says)
			}
			f := conf.File{Name: m.path(newConf)}
			check(t, f.Err())
			for key, want := range test.want {
				if got, _ := f.Key(key).Lookup(); got != want {
					t.Errorf("%s=%s, want %s", key, got, want)
				}
			}
			if got := read(t, m.path(oldConf)); got != test.old {
				t.Errorf("the old file is now %q", got)
			}
			copied := strings.Contains(said, "oam-docker-ipam: copied ")
			text := read(t, m.path(newConf))
			if told := strings.Contains(text, "\n# Copied from /etc/oam-docker-ipam/oam-docker-ipam.conf, which nothing reads any more:\n"); told != copied {
				t.Errorf("said %q, and the file is\n%s", said, text)
			}
			if !copied && text != cmp.Or(test.new, conf.Shipped) {
				t.Errorf("nothing was copied, and the file is\n%s", text)
			}
			if mode := output(t, "stat", "-c", "%a", m.path(newConf)); mode != "640\n" {
				t.Errorf("the configuration has mode %s", mode)
			}
			if left, _ := filepath.Glob(m.path("etc/*.copy")); left != nil {
				t.Errorf("left %s", left)
			}

			// Once: what the user does afterwards stays.
			put(t, m.path(newConf), "LISTEN_ADDR=0.0.0.0\n", 0o644)
			if said := m.run(post, "2"); said != "" {
				t.Errorf("the second upgrade said %s", said)
			}
			if got := read(t, m.path(newConf)); got != "LISTEN_ADDR=0.0.0.0\n" {
				t.Errorf("the second upgrade made it\n%s", got)
			}
		})
	}
}

// A configuration that is a link stays one. What can't be checked, here since
// there is no program, is copied.
func TestSettingsOfTheOldPackageIntoALink(t *testing.T) {
	t.Parallel()
	m := newMachine(t, false)
	put(t, m.path(oldConf), "DHCP_SERVER=10.0.0.1\n", 0o644)
	put(t, m.path("etc/site/ipam.conf"), conf.Shipped, 0o644)
	check(t, os.Symlink("site/ipam.conf", m.path(newConf)))
	if said := m.run(scriptlet(t, "POSTIN"), "2"); said != "oam-docker-ipam: copied DHCP_SERVER from /etc/oam-docker-ipam/oam-docker-ipam.conf to /etc/site/ipam.conf\n" {
		t.Errorf("said %q", said)
	}
	if target, err := os.Readlink(m.path(newConf)); target != "site/ipam.conf" {
		t.Errorf("the link leads to %q, %v", target, err)
	}
	if text := read(t, m.path(newConf)); !strings.Contains(text, "\nDHCP_SERVER=10.0.0.1\n") {
		t.Errorf("the configuration is\n%s", text)
	}
}

// A file system without room leaves the file whole.
func TestSettingsOfTheOldPackageWithoutRoom(t *testing.T) {
	t.Parallel()
	m := newMachine(t, false)
	put(t, m.path(oldConf), "DHCP_SERVER=10.0.0.1\n", 0o644)
	put(t, m.path(newConf), conf.Shipped, 0o644)
	check(t, os.Remove(m.path("usr/bin/sed")))
	put(t, m.path("usr/bin/sed"), "#!/bin/sh\ncase \"$*\" in *'#DHCP'*) echo half; exit 1 ;; esac\nexec busybox sed \"$@\"\n", 0o755)
	if said := m.run(scriptlet(t, "POSTIN"), "2"); !strings.Contains(said, "cannot copy DHCP_SERVER from /etc/oam-docker-ipam/oam-docker-ipam.conf to /etc/oam-docker-ipam.conf: do it by hand\n") {
		t.Errorf("said %q", said)
	}
	if got := read(t, m.path(newConf)); got != conf.Shipped {
		t.Errorf("the configuration is\n%s", got)
	}
}

// The old daemon goes, and what it served goes on where it did.
func TestUpgradeFromTheOldPackage(t *testing.T) {
	t.Parallel()
	file, before := packageOf(t, rpmFile), old(t, "")
	stopping := old(t, "%preun\nsystemctl stop oam-docker-ipam.service\nsystemctl disable oam-docker-ipam.service\n")
	const (
		user    = "systemd-sysusers --replace=/usr/lib/sysusers.d/oam-docker-ipam.conf -\n"
		reload  = "systemctl daemon-reload\n"
		enable  = "systemctl --quiet enable oam-docker-ipam.service\n"
		stop    = "systemctl stop oam-docker-ipam.service\n"
		disable = "systemctl disable oam-docker-ipam.service\n"
		socket  = "systemctl start oam-docker-ipam.socket\n"
		start   = "systemctl --no-block start oam-docker-ipam.service\n"
		// Of our package, and of the old one.
		files = user + reload + reload
	)
	for name, test := range map[string]struct {
		chroot, active, enabled, noConf, own, stops bool
		want, says                                  string
	}{
		"runs and is enabled":           {active: true, enabled: true, want: files + enable + stop + socket + start},
		"runs":                          {active: true, want: files + stop + socket + start},
		"is enabled":                    {enabled: true, want: files + enable + socket},
		"does neither":                  {want: files},
		"no configuration":              {active: true, enabled: true, noConf: true, want: files + enable + stop + socket + start},
		"installroot":                   {chroot: true, enabled: true, want: user + reload + enable},
		"is stopped by its own package": {active: true, enabled: true, stops: true, want: user + reload + stop + disable + reload + enable + stop + socket + start},
		"a unit of the user's": {
			active: true, enabled: true, noConf: true, own: true,
			want: files + enable + stop + start,
			says: "oam-docker-ipam: /etc/systemd/system/oam-docker-ipam.service hides the unit of this package, which has systemd hold the sockets, a watchdog and no root: " +
				"remove it unless it is wanted, and then chown -R oam-docker-ipam: /var/lib/oam-docker-ipam, if that daemon ran as root\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, !test.chroot)
			if test.stops {
				m.rpm("-i", stopping)
			} else {
				m.rpm("-i", before)
			}
			m.calls()
			const settings = "DHCP_SERVER=10.0.0.1\n"
			put(t, m.path(oldConf), settings, 0o644)
			if test.noConf {
				check(t, os.Remove(m.path(oldConf)))
			}
			if test.active {
				put(t, m.path("active/oam-docker-ipam.service"), "", 0o644)
			}
			if test.enabled {
				put(t, m.path("enabled/oam-docker-ipam.service"), "", 0o644)
			}
			if test.own {
				put(t, m.path("etc/systemd/system/oam-docker-ipam.service"), "[Service]\n", 0o644)
			}
			copied := "oam-docker-ipam: copied DHCP_SERVER from /etc/oam-docker-ipam/oam-docker-ipam.conf to /etc/oam-docker-ipam.conf\n"
			if test.noConf {
				copied = ""
			}
			if said := m.rpm("-U", file); said != copied+test.says {
				t.Errorf("said %q, want %q", said, copied+test.says)
			}
			m.wantCalls("upgrade", test.want)
			for _, state := range []string{"active", "enabled"} {
				for _, unit := range []string{"service", "socket"} {
					was := test.active && state == "active" || test.enabled && state == "enabled"
					if unit == "socket" && state == "active" {
						was = !test.chroot && (test.active || test.enabled)
					}
					if unit == "socket" && test.own {
						was = false
					}
					if _, err := os.Stat(m.path(state + "/oam-docker-ipam." + unit)); was != (err == nil) {
						t.Errorf("the %s is %s: %t, want %t", unit, state, err == nil, was)
					}
				}
			}
			if left, _ := filepath.Glob(m.path("run/oam*")); left != nil {
				t.Errorf("left %s", left)
			}

			if name != "runs and is enabled" {
				return
			}
			// The next upgrade is one like any other, and the old file stays.
			m.rpm("-U", "--force", file)
			m.wantCalls("second upgrade", files+"systemctl try-restart oam-docker-ipam.service\n")
			// The way back, and here again.
			m.rpm("-U", "--oldpackage", before)
			m.wantCalls("downgrade", reload+"systemctl stop oam-docker-ipam.socket oam-docker-ipam-reconcile.timer\n"+reload+"systemctl restart oam-docker-ipam.service\n")
			m.rpm("-U", file)
			m.wantCalls("third upgrade", test.want)
			m.rpm("-e", "oam-docker-ipam")
			if got := read(t, m.path(oldConf)); got != settings {
				t.Errorf("after the removal the old file is %q", got)
			}
		})
	}
}

// dnf installs it into a folder, where another package gives what it needs, and
// removes it.
func TestInstallRoot(t *testing.T) {
	t.Parallel()
	needs(t, "root", "dnf", "rpmbuild", "busybox")
	file, top, root := packageOf(t, rpmFile), t.TempDir(), t.TempDir()
	fill(t, filepath.Join(top, "files"))
	put(t, filepath.Join(top, "base.spec"), `
%global debug_package %{nil}
%global __os_install_post %{nil}
Name: base
Version: 1
Release: 1
Summary: What a distribution has
License: none
AutoReqProv: no
Provides: systemd = 239, coreutils, sed, /bin/sh
%description
%install
cp -a %{_topdir}/files/* %{buildroot}/
%files
/*
`, 0o644)
	run(t, command(t.Context(), top, nil, "rpmbuild", "-bb", "--quiet", "--target", "x86_64", "--define", "_topdir "+top, "--define", "_rpmfilename base.rpm", "base.spec"))
	dnf := func(args ...string) string {
		t.Helper()
		return run(t, command(t.Context(), "/", nil, append([]string{"dnf", "--assumeyes", "--installroot=" + root, "--releasever=9", "--disablerepo=*"}, args...)...))
	}
	out := dnf("install", filepath.Join(top, "RPMS/base.rpm"), file)
	for _, bad := range []string{"warning", "rror", "not found", "can't"} {
		if strings.Contains(out, bad) {
			t.Errorf("dnf install:\n%s", out)
			break
		}
	}
	if info := output(t, "stat", "-c", "%u %a", filepath.Join(root, "var/lib/oam-docker-ipam")); info != "999 700\n" {
		t.Errorf("the state folder is %s", info)
	}
	dnf("remove", "oam-docker-ipam")
	want := "systemctl --quiet --no-reload preset oam-docker-ipam.socket oam-docker-ipam.service\n" +
		"systemctl --quiet --no-reload disable oam-docker-ipam.service oam-docker-ipam.socket oam-docker-ipam-reconcile.timer oam-docker-ipam-reconcile.service\n"
	if got := read(t, filepath.Join(root, "calls")); !strings.HasSuffix(got, want) {
		t.Errorf("calls are\n%swant\n%s", got, want)
	}
}
