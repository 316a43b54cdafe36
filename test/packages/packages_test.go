// Package packages tests what build-rpm.sh, build-deb.sh and make install make:
// what is in it, and what it does to a machine when it is installed, upgraded
// and removed. The machines here are folders whose systemctl only notes what it
// is told.
package packages

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

const (
	version = "3.0.0"
	rpmFile = "rpms/oam-docker-ipam-" + version + "-1.x86_64.rpm"
	srcFile = "rpms/oam-docker-ipam-" + version + "-1.src.rpm"
	debFile = "debs/oam-docker-ipam_" + version + "-1_amd64.deb"
)

// scratch is for what all tests share.
var scratch string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if scratch, err = os.MkdirTemp("", "oam-packages-"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(scratch)
		return m.Run()
	}())
}

// command is a program with its own environment: nothing of the user's but the
// way to Go's caches. No proxy: what Go needs must be in them.
func command(ctx context.Context, dir string, env []string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = dir
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + scratch, "TMPDIR=" + scratch, "LC_ALL=C", "GOARCH=amd64",
		"GOPROXY=off", "GOFLAGS=", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null",
	}
	for _, name := range []string{"GOCACHE", "GOMODCACHE", "GOPATH"} {
		cmd.Env = append(cmd.Env, name+"="+goEnv()[name])
	}
	cmd.Env = append(cmd.Env, env...)
	return cmd
}

var goEnv = sync.OnceValue(func() map[string]string {
	found := map[string]string{}
	for _, name := range []string{"GOCACHE", "GOMODCACHE", "GOPATH"} {
		out, _ := exec.Command("go", "env", name).Output()
		found[name] = strings.TrimSpace(string(out))
	}
	return found
})

// run returns what a program wrote, to both of its outputs.
func run(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return string(out)
}

// output runs a program as it is and returns its standard output.
func output(t *testing.T, args ...string) string {
	t.Helper()
	var stderr bytes.Buffer
	cmd := command(t.Context(), "", nil, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, out, &stderr)
	}
	return string(out)
}

// needs skips a test where something is missing, but not in CI.
func needs(t *testing.T, programs ...string) {
	t.Helper()
	var missing []string
	for _, name := range programs {
		if name == "root" {
			if os.Geteuid() != 0 {
				missing = append(missing, name)
			}
		} else if _, err := exec.LookPath(name); err != nil {
			missing = append(missing, name)
		}
	}
	if missing == nil {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("missing %s (test/install packages installs programs), and CI=true", missing)
	}
	t.Skipf("missing %s", missing)
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func put(t *testing.T, name, text string, mode os.FileMode) {
	t.Helper()
	check(t, os.MkdirAll(filepath.Dir(name), 0o755))
	check(t, os.WriteFile(name, []byte(text), mode))
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	check(t, err)
	return string(text)
}

// tree is a copy of the sources in a git repository of its own with one commit.
// They are read by this process, so that go test knows that its result depends
// on them.
var tree = sync.OnceValues(func() (string, error) {
	folder := filepath.Join(scratch, "tree")
	list, err := exec.Command("git", "-C", "../..", "ls-files", "-z", "--cached", "--others", "--exclude-standard").Output()
	if err != nil {
		return "", fmt.Errorf("list sources: %w", err)
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		from, to := filepath.Join("../..", name), filepath.Join(folder, name)
		text, err := os.ReadFile(from)
		if os.IsNotExist(err) {
			continue // removed, and not yet from the index
		}
		info, statErr := os.Stat(from)
		if err := cmp.Or(err, statErr, os.MkdirAll(filepath.Dir(to), 0o755)); err != nil {
			return "", err
		}
		if err := os.WriteFile(to, text, info.Mode()); err != nil {
			return "", err
		}
	}
	for _, args := range [][]string{
		{"init", "-q"},
		{"add", "."},
		{"-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-q", "-m", "all"},
	} {
		cmd := command(context.Background(), folder, []string{"GIT_COMMITTER_DATE=@1790000000 +0000"}, append([]string{"git"}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("git %s: %w\n%s", args, err, out)
		}
	}
	return folder, nil
})

func sources(t *testing.T) string {
	t.Helper()
	needs(t, "git")
	folder, err := tree()
	check(t, err)
	return folder
}

// clone is another copy of the tree.
func clone(t *testing.T) string {
	t.Helper()
	folder := filepath.Join(t.TempDir(), "a copy") // with a space
	run(t, command(t.Context(), "", nil, "git", "clone", "-q", sources(t), folder))
	return folder
}

// build runs both scripts, at the same time, in a copy of the tree.
func build(ctx context.Context, folder, dir string, env ...string) error {
	errs := make(chan error)
	for _, script := range []string{"build-rpm.sh", "build-deb.sh"} {
		go func() {
			cmd := command(ctx, dir, env, filepath.Join(folder, script), "oam-docker-ipam", version)
			out, err := cmd.CombinedOutput()
			if err != nil {
				err = fmt.Errorf("%s: %w\n%s", script, err, out)
			}
			errs <- err
		}()
	}
	return cmp.Or(<-errs, <-errs)
}

var built = sync.OnceValues(func() (string, error) {
	folder, err := tree()
	if err != nil {
		return "", err
	}
	return folder, build(context.Background(), folder, folder)
})

// packageOf returns the path of a package of this tree.
func packageOf(t *testing.T, name string) string {
	t.Helper()
	needs(t, "git", "make", "rpmbuild", "rpm", "dpkg-deb")
	folder, err := built()
	check(t, err)
	return filepath.Join(folder, name)
}

// The same commit makes the same bytes: at another time, in another folder, in
// another time zone and language, by another home, umask and temporary folder, by
// one who has set Go to make other code.
func TestSameBytes(t *testing.T) {
	t.Parallel()
	packageOf(t, rpmFile)
	other := clone(t)
	temp := t.TempDir()
	wrapper := filepath.Join(t.TempDir(), "sh")
	put(t, wrapper, "#!/bin/sh\numask 077\nexec bash \"$@\"\n", 0o755)
	goenv := filepath.Join(t.TempDir(), "env")
	put(t, goenv, "GOAMD64=v3\nGOFLAGS=-gcflags=-N\nGOMODCACHE="+goEnv()["GOMODCACHE"]+"\n", 0o644)
	for _, script := range []string{"build-rpm.sh", "build-deb.sh"} {
		run(t, command(t.Context(), "/", []string{
			"TZ=Asia/Tokyo", "LC_ALL=C.UTF-8", "HOME=" + t.TempDir(), "TMPDIR=" + temp, "PREFIX=/opt", "VERSION=9", "REVISION=none", "MAKEFLAGS=-k",
			"GOENV=" + goenv, "GOMODCACHE=", "GOAMD64=v2", "GOEXPERIMENT=none", "GOFLAGS=-tags=x", "GOWORK=/nowhere", "GOOS=freebsd",
		}, wrapper, filepath.Join(other, script), "oam-docker-ipam", version))
	}
	for _, name := range []string{rpmFile, srcFile, debFile} {
		first, second := read(t, packageOf(t, name)), read(t, filepath.Join(other, name))
		if sha256.Sum256([]byte(first)) != sha256.Sum256([]byte(second)) {
			t.Errorf("%s: two builds differ", name)
		}
		t.Logf("%s: %.1f MB", name, float64(len(first))/1e6)
		for _, path := range []string{scratch, other, temp} {
			if strings.Contains(first, path) || strings.Contains(second, path) {
				t.Errorf("%s: has the path %s", name, path)
			}
		}
	}
	if left, _ := os.ReadDir(temp); len(left) > 0 {
		t.Errorf("left in TMPDIR: %s", left)
	}
	if status := run(t, command(t.Context(), other, nil, "git", "status", "--porcelain")); status != "" {
		t.Errorf("the builds changed the tree:\n%s", status)
	}
}

// unpacked is a package's content in a folder.
func unpacked(t *testing.T, name string) string {
	t.Helper()
	file, root := packageOf(t, name), t.TempDir()
	if name == debFile {
		output(t, "dpkg-deb", "--extract", file, root)
		return root
	}
	needs(t, "rpm2cpio", "cpio")
	run(t, command(t.Context(), root, nil, "sh", "-c", `rpm2cpio "$1" | cpio -idm --quiet --no-absolute-filenames`, "sh", file))
	return root
}

// Both packages have the same program, which says of which version and commit
// it is, and depends on nothing.
func TestProgram(t *testing.T) {
	t.Parallel()
	commit := strings.TrimSpace(run(t, command(t.Context(), sources(t), nil, "git", "rev-parse", "HEAD")))
	var programs []string
	for _, name := range []string{rpmFile, debFile} {
		program := filepath.Join(unpacked(t, name), "usr/bin/oam-docker-ipam")
		if got, want := output(t, program, "version"), "oam-docker-ipam "+version+" (commit "+commit+")\n"; got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
		if out := run(t, command(t.Context(), "", nil, "go", "version", "-m", program)); strings.Contains(out, "vcs.") {
			t.Errorf("%s: has what differs between builds:\n%s", name, out)
		}
		programs = append(programs, read(t, program))
	}
	if programs[0] != programs[1] {
		t.Error("the packages' programs differ")
	}
}

// What stands in a tree without git, or isn't committed, is built too, and the
// package says so. A file that has been removed is no error.
func TestSources(t *testing.T) {
	t.Parallel()
	folder, tools := clone(t), t.TempDir()
	commit := strings.TrimSpace(run(t, command(t.Context(), folder, nil, "git", "rev-parse", "HEAD")))
	// In rpmbuild's place one that leaves what it is given.
	put(t, filepath.Join(tools, "rpmbuild"), `#!/bin/sh
for word; do
	case $word in
	"_topdir "*) top=${word#_topdir } ;;
	esac
done
mkdir "$top/RPMS" "$top/SRPMS"
cp "$top"/SOURCES/*.tar.gz "$top/RPMS/sources.rpm"
cp "$top"/SPECS/*.spec "$top/SRPMS/spec.rpm"
echo "$@" >"$top/SRPMS/words.rpm"
`, 0o755)
	list := func(env ...string) (files []string, spec, words string) {
		out := run(t, command(t.Context(), "/", append(env, "PATH="+tools+":"+os.Getenv("PATH")), filepath.Join(folder, "build-rpm.sh")))
		if want := "rpms/sources.rpm\nrpms/spec.rpm\nrpms/words.rpm\n"; out != want {
			t.Errorf("printed %q, want %q", out, want)
		}
		files = strings.Fields(output(t, "tar", "-tzf", filepath.Join(folder, "rpms/sources.rpm")))
		return files, read(t, filepath.Join(folder, "rpms/spec.rpm")), read(t, filepath.Join(folder, "rpms/words.rpm"))
	}
	clean, spec, words := list()
	if !slices.Contains(clean, "oam-docker-ipam-3.0.0~dev/main.go") || !strings.Contains(spec, "revision "+commit+"\n") {
		t.Errorf("sources %s\n%.200s", clean, spec)
	}
	if !strings.Contains(words, "--target x86_64 ") {
		t.Errorf("rpmbuild got %s", words)
	}
	if _, _, words := list("GOARCH=arm64"); !strings.Contains(words, "--target aarch64 ") {
		t.Errorf("rpmbuild got %s", words)
	}

	check(t, os.Remove(filepath.Join(folder, "ARCHITECTURE.md")))
	put(t, filepath.Join(folder, "new file.go"), "package main\n", 0o644)
	put(t, filepath.Join(folder, "oam-docker-ipam"), "built", 0o755)
	dirty, spec, _ := list()
	if len(dirty) != len(clean)+1 || !strings.Contains(spec, "revision "+commit+"-dirty\n") {
		t.Errorf("changed: sources %s\n%.200s", dirty, spec)
	}

	check(t, os.RemoveAll(filepath.Join(folder, ".git")))
	without, spec, _ := list()
	slices.Sort(dirty)
	slices.Sort(without)
	if !slices.Equal(without, dirty) || !strings.Contains(spec, "revision %nil\n") {
		t.Errorf("without git: sources %s, want %s\n%.200s", without, dirty, spec)
	}
}

// What can't be built is refused before anything is, with what to do.
func TestRefused(t *testing.T) {
	t.Parallel()
	folder := clone(t)
	refused := func(t *testing.T, env, args, want []string) {
		t.Helper()
		for _, script := range []string{"build-rpm.sh", "build-deb.sh"} {
			out, err := command(t.Context(), "/", env, append([]string{"/bin/bash", filepath.Join(folder, script)}, args...)...).CombinedOutput()
			if err == nil {
				t.Errorf("%s %q: not refused", script, args)
			}
			for _, want := range want {
				if !strings.Contains(string(out), want) {
					t.Errorf("%s %q: said %q, want %q", script, args, out, want)
				}
			}
		}
	}
	for _, version := range []string{
		"", " ", "3.0.0-rc1", "-3", "~", "~1", "3~", "3..0", "3.0.0 ", "3 0", "3.0.0\n", "v3", "drei", "3.ü", "3.0_1", "3^1", "3:0", "%{name}", "$(id)", "../3", "3/0",
	} {
		refused(t, nil, []string{"oam-docker-ipam", version}, []string{"3.0.0~rc1"})
	}
	for _, name := range []string{"", "oam", "oam-docker-ipam2", "-h"} {
		refused(t, nil, []string{name, version}, []string{"the package's name is oam-docker-ipam"})
	}
	refused(t, nil, []string{"--help"}, []string{"usage: "})
	refused(t, nil, []string{"oam-docker-ipam"}, []string{"usage: "})
	refused(t, nil, []string{"oam-docker-ipam", version, "1"}, []string{"usage: "})
	refused(t, []string{"GOARCH=mips"}, []string{"oam-docker-ipam", version}, []string{"GOARCH=mips", "arm64"})

	// A commit that git doesn't tell: the tree is another user's.
	if os.Geteuid() == 0 {
		check(t, os.Chown(folder, 12345, 12345))
		refused(t, nil, nil, []string{"git doesn't tell which commit this is: fatal: detected dubious ownership", "git config --global --add safe.directory "})
		check(t, os.Chown(folder, 0, 0))
	}

	// Missing programs, in a PATH of what else is needed.
	tools := t.TempDir()
	for _, name := range []string{"bash", "sh", "dirname", "make", "git", "tar", "sed", "tr", "mktemp", "rm", "stat"} {
		path, err := exec.LookPath(name)
		check(t, err)
		check(t, os.Symlink(path, filepath.Join(tools, name)))
	}
	path := []string{"PATH=" + tools}
	refused(t, path, nil, []string{" is missing. Install it: apt-get install ", "dnf install "})
	for _, name := range []string{"rpmbuild", "dpkg-deb"} {
		put(t, filepath.Join(tools, name), "#!/bin/sh\nexit 1\n", 0o755)
	}
	refused(t, path, nil, []string{"go is missing", "apt-get install golang", "dnf install golang"})
	put(t, filepath.Join(tools, "go"), "#!/bin/sh\ncase $1 in version) exit 1 ;; env) case $2 in GOVERSION) echo go1.19.8 ;; *) echo amd64 ;; esac ;; esac\n", 0o755)
	refused(t, path, nil, []string{"go.mod wants Go 1.", "this is go1.19.8", "apt-get install golang"})

	for _, made := range []string{"rpms", "debs", "oam-docker-ipam"} {
		if _, err := os.Stat(filepath.Join(folder, made)); err == nil {
			t.Errorf("%s is there", made)
		}
	}
	status := run(t, command(t.Context(), folder, nil, "git", "status", "--porcelain"))
	if status != "" {
		t.Errorf("left in the tree:\n%s", status)
	}
}

// make install needs no package.
func TestMakeInstall(t *testing.T) {
	t.Parallel()
	folder, root := sources(t), t.TempDir()
	put(t, filepath.Join(root, "etc/oam-docker-ipam.conf"), "DHCP_SERVER=192.0.2.9\n", 0o600)
	install := []string{"make", "install", "DESTDIR=" + root, "PREFIX=/usr/local", "UNITDIR=/etc/systemd/system", "OUT=" + t.TempDir()}
	// A root without Go installs what another user has built, all or nothing.
	withoutGo := append(install, "GO=no-go")
	out, err := command(t.Context(), folder, nil, withoutGo...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "There is no no-go here to build them. Build them first, as a user who has it: make completions licences\n") {
		t.Errorf("without Go: %v\n%s", err, out)
	}
	if _, err := os.Stat(filepath.Join(root, "usr")); err == nil {
		t.Error("without Go: half an installation")
	}
	install[1] = "completions"
	run(t, command(t.Context(), folder, nil, append(install, "licences")...))
	if out := run(t, command(t.Context(), folder, nil, withoutGo...)); strings.Contains(out, "left to do") {
		t.Errorf("an installation elsewhere said %s", out)
	}
	if got := read(t, filepath.Join(root, "etc/oam-docker-ipam.conf")); got != "DHCP_SERVER=192.0.2.9\n" {
		t.Errorf("the user's configuration is now %q", got)
	}
	if unit := read(t, filepath.Join(root, "etc/systemd/system/oam-docker-ipam.service")); !strings.Contains(unit, "ExecStart=/usr/local/bin/oam-docker-ipam server\n") {
		t.Errorf("the unit starts another program:\n%s", unit)
	}
	for _, name := range []string{"etc/systemd/system/oam-docker-ipam.service", "usr/local/share/doc/oam-docker-ipam/broadcast.conf"} {
		if text := read(t, filepath.Join(root, name)); !strings.Contains(text, "/usr/local/share/doc/oam-docker-ipam/") || strings.Contains(text, "/usr/share/doc/oam-docker-ipam") {
			t.Errorf("%s names other places:\n%s", name, text)
		}
	}
	output(t, filepath.Join(root, "usr/local/bin/oam-docker-ipam"), "version")
}
