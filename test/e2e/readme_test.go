package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/talkingdata/oam-docker-ipam/test/lab"
)

// codeBlock is one of README.md, between its fences.
var codeBlock = regexp.MustCompile("(?ms)^```[a-z]*\n(.*?)^```$")

// codeBlocks are those of a chapter of README.md.
func codeBlocks(t *testing.T, chapter string) (blocks []string) {
	t.Helper()
	readme := string(must(os.ReadFile("../../README.md"))(t))
	_, text, found := strings.Cut(readme, "\n## "+chapter+"\n")
	if !found {
		t.Fatalf("README.md has no chapter %q", chapter)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	for _, block := range codeBlock.FindAllStringSubmatch(text, -1) {
		blocks = append(blocks, block[1])
	}
	return blocks
}

// What users of the old experimental driver typed works as README.md writes
// it. The parent of VLAN 10 is a veth of that name, which is there already,
// since this kernel may know no VLANs: TestDiscoveryOfNewVLAN has one that isn't.
func TestReadmeExperimentalDriver(t *testing.T) {
	t.Parallel()
	// Routers that aren't first addresses.
	a := lab.NewSubnet("10.10.0.0/24", "10.10.0.100", "10.10.0.199", "10.10.0.4")
	b := lab.NewSubnet("10.20.0.0/24", "10.20.0.100", "10.20.0.199", "10.20.0.254")
	blocks := codeBlocks(t, "From the experimental dhcp driver")
	wants := []struct {
		subnet lab.Subnet
		router string
	}{
		{a, "10.10.0.4"},
		{a, "10.10.0.1"},
		{a, "10.10.0.4"},
		{b, "10.20.0.1"},
		{b, "10.20.0.254"},
	}
	if len(blocks) != 1+len(wants)+1 {
		t.Fatalf("README.md has %d code blocks there, want a configuration, %d examples and their end:\n%s", len(blocks), len(wants), strings.Join(blocks, "\n"))
	}
	configuration, examples, end := blocks[0], blocks[1:len(blocks)-1], blocks[len(blocks)-1]
	file := filepath.Join(t.TempDir(), "oam-docker-ipam.conf")
	check(t, os.WriteFile(file, []byte(configuration), 0o644))

	s := newBroadcaster(t, lab.Dnsmasq, lab.DHCPConfig{Subnets: []lab.Subnet{a}}, append(byMAC, "--config", file)...)
	s.startEngine("dhcp")
	mentions(t, s.daemon.Log(), "driver=dhcp")
	check(t, s.engine.ImportImage("alpine"))
	if s.version() < 27 {
		must(s.net.Host.Run("ip", "address", "flush", "dev", "eth0"))(t)
	}
	_, vlan := s.secondLAN("eth0.10", b)
	for i, want := range wants {
		at := s
		if want.subnet.Prefix == b.Prefix {
			at = vlan
		}
		check(t, s.engine.Shell(examples[i]))
		addr, _ := at.holds("c1", "eth0")
		if has := s.prefix("c1", "eth0"); has.Masked() != want.subnet.Prefix {
			t.Errorf("example %d: the container has %s of %s", i+1, has, want.subnet.Prefix)
		}
		if router := s.router("c1"); router != want.router {
			t.Errorf("example %d: default route by %s, want %s", i+1, router, want.router)
		}
		at.only(addr)
		check(t, s.engine.Shell(end))
		at.notLeased()
	}
}
