package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/talkingdata/oam-docker-ipam"

// mayImport are the packages of the product and which of ours each may import;
// what isn't here is a test's. ARCHITECTURE.md draws it.
var mayImport = map[string][]string{
	"":        {"arp", "conf", "dhcp", "doctor", "engine", "host", "lease", "metrics", "server", "store", "systemd"},
	"doctor":  {"dhcp", "engine", "lease", "server", "store"},
	"server":  {"lease"},
	"dhcp":    {"lease"},
	"store":   {"lease"},
	"arp":     {"lease"},
	"engine":  {"lease"},
	"host":    {"lease"},
	"metrics": {"lease"},
	"lease":   {},
	"conf":    {},
	"systemd": {},
}

// goPackage is what `go list -json` says of a package.
type goPackage struct {
	ImportPath string
	Imports    []string // without those of its tests
	Standard   bool
}

// ours cuts the module from an import path.
func ours(path string) (folder string, ok bool) {
	if path == module {
		return "", true
	}
	return strings.CutPrefix(path, module+"/")
}

// violations are the imports that the product's packages must not have.
func violations(packages []goPackage, standard func(path string) bool) (found []string) {
	for _, p := range packages {
		folder, _ := ours(p.ImportPath)
		allowed, product := mayImport[folder]
		if !product && folder != "test" && !strings.HasPrefix(folder, "test/") {
			found = append(found, p.ImportPath+" is neither in the architecture nor under test/")
		}
		for _, path := range p.Imports {
			to, ofUs := ours(path)
			if product && ofUs && !slices.Contains(allowed, to) ||
				folder == "lease" && !ofUs && !standard(path) {
				found = append(found, p.ImportPath+" imports "+path)
			}
		}
	}
	return found
}

func goList(t *testing.T, args ...string) (packages []goPackage) {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list", "-json=ImportPath,Imports,Standard"}, args...)...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
}

func TestImportArrows(t *testing.T) {
	std := map[string]bool{}
	for _, p := range goList(t, "std") {
		std[p.ImportPath] = p.Standard
	}
	isStd := func(path string) bool { return std[path] }
	packages := goList(t, "./...")
	seen := map[string]bool{}
	for _, p := range packages {
		folder, _ := ours(p.ImportPath)
		seen[folder] = true
	}
	for folder := range mayImport {
		if !seen[folder] {
			t.Errorf("package %q isn't there: is this test run at the module's root?", folder)
		}
	}
	for _, v := range violations(packages, isStd) {
		t.Error(v)
	}

	// Each rule is broken once, to see it hold.
	for _, rule := range []struct{ from, to string }{
		{"/lease", module + "/dhcp"},
		{"/metrics", module + "/dhcp"},
		{"/doctor", module + "/conf"},
		{"/lease", "go.etcd.io/bbolt"},
		{"/lease", "golang.org/x/sys/unix"},
		{"/server", module + "/store"},
		{"/server", module},
		{"/dhcp", module + "/server"},
		{"/store", module + "/dhcp"},
		{"/conf", module + "/lease"},
		{"/systemd", module + "/conf"},
		{"", module + "/test/lab"},
		{"/util", "fmt"},
	} {
		planted := goPackage{ImportPath: module + rule.from, Imports: []string{"net/netip", rule.to}}
		if got := violations([]goPackage{planted}, isStd); len(got) != 1 {
			t.Errorf("%s importing %s: found %q", planted.ImportPath, rule.to, got)
		}
	}
}
