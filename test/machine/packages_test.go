package machine

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// packagers are the programs that make packages.
var packagers = []string{"rpmbuild", "dpkg-deb", "make", "git"}

// workshop is where packages are built: in a copy of the tree, so that those
// that somebody has built in the tree stay as they are.
var workshop = sync.OnceValues(func() (string, error) {
	dir, err := lab.BuildDir()
	if err != nil {
		return "", err
	}
	const script = `
		mkdir -p "$1"
		cd "$(dirname "$(go env GOMOD)")"
		git ls-files -z --cached --others --exclude-standard |
			while IFS= read -r -d '' file; do if [ -e "$file" ]; then printf '%s\0' "$file"; fi; done |
			xargs -0 cp --parents --target-directory="$1"`
	return dir, shell(script, dir)
})

// shell runs a script on this computer.
func shell(script string, args ...string) error {
	out, err := exec.Command("bash", append([]string{"-euo", "pipefail", "-c", script, "bash"}, args...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("run %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// build makes a function that builds a package by a script, once, and returns
// the one file of the pattern.
func build(script, pattern string) func() (string, error) {
	return sync.OnceValues(func() (string, error) {
		dir, err := workshop()
		if err != nil {
			return "", err
		}
		if err := shell("cd " + dir + "\n" + script); err != nil {
			return "", err
		}
		files, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil || len(files) != 1 {
			return "", fmt.Errorf("%s left %q, want one %s; %w", script, files, pattern, err)
		}
		return files[0], nil
	})
}

// Our packages. Of the later ones, Debian's is the same program once more.
var (
	rpm      = build("./build-rpm.sh oam-docker-ipam 3.0.0", "rpms/*-3.0.0-1.[^s]*.rpm")
	laterRPM = build("./build-rpm.sh oam-docker-ipam 3.0.1", "rpms/*-3.0.1-1.[^s]*.rpm")
	deb      = build("./build-deb.sh oam-docker-ipam 3.0.0", "debs/*_3.0.0-1_*.deb")
	laterDeb = build(`
		dpkg-deb --raw-extract debs/*_3.0.0-1_*.deb later
		sed -i 's/^Version: .*/Version: 3.0.1-1/' later/DEBIAN/control
		dpkg-deb --build later debs/`, "debs/*_3.0.1-1_*.deb")
)

//go:embed distribution.spec
var distributionSpec string

//go:embed old.spec
var oldSpec string

// fromSpec builds a package out of a spec of the tests.
func (s *site) fromSpec(spec string) string {
	s.Helper()
	top := s.TempDir()
	file := filepath.Join(top, "a.spec")
	check(s.T, os.WriteFile(file, []byte(spec), 0o644))
	check(s.T, shell(`rpmbuild -bb --quiet --define "_topdir $1" --define "_rpmfilename a.rpm" "$2"`, top, file))
	return filepath.Join(top, "RPMS/a.rpm")
}

// install installs a package by dnf, on a machine whose RPM database says what
// the distribution has.
func (s *site) install(file string) string {
	s.Helper()
	if s.try("rpm", "--query", "distribution") != "distribution-9-1.noarch\n" {
		s.run("rpm", "--install", s.copyIn(s.fromSpec(distributionSpec)))
		// As distributions with RPMs have it: nothing is enabled by itself.
		s.write("/usr/lib/systemd/system-preset/99-default-disable.preset", "disable *\n")
	}
	return s.run("dnf", "install", "--assumeyes", s.copyIn(file))
}
