package packages

import (
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	helpCommand = regexp.MustCompile(`(?m)^   ([a-z-]+)(?:, h)?  `)
	helpFlag    = regexp.MustCompile(`--[a-z-]+`)
	helpKey     = regexp.MustCompile(`\[\$([A-Z_]+)\]$`)
)

// interfaceOf is what a program's help says of it: commands, flags with their
// keys (empty where they have none).
func interfaceOf(t *testing.T, program string) (commands []string, flags map[string]string) {
	t.Helper()
	help := output(t, program, "--help")
	_, list, _ := strings.Cut(help, "\nCOMMANDS:\n")
	list, options, _ := strings.Cut(list, "\nGLOBAL OPTIONS:\n")
	for _, match := range helpCommand.FindAllStringSubmatch(list, -1) {
		commands = append(commands, match[1])
	}
	flags = map[string]string{}
	add := func(options string) {
		for line := range strings.Lines(options) {
			line = strings.TrimSpace(line)
			head, _, _ := strings.Cut(line, "  ")
			key := ""
			if match := helpKey.FindStringSubmatch(line); match != nil {
				key = match[1]
			}
			for _, flag := range helpFlag.FindAllString(head, -1) {
				flags[flag] = key
			}
		}
	}
	add(options)
	for _, name := range commands {
		if name == "help" {
			continue // takes none
		}
		_, options, _ := strings.Cut(output(t, program, name, "--help"), "\nOPTIONS:\n")
		options, _, _ = strings.Cut(options, "\nGLOBAL OPTIONS:\n")
		add(options)
	}
	return commands, flags
}

var (
	manFlag    = regexp.MustCompile(`Fl (-[a-z-]+)`)
	manCommand = regexp.MustCompile(`(?m)^\.It Cm ([a-z-]+)$`)
	manOption  = regexp.MustCompile(`(?m)^\.It (Fl .*)$`)
	manKey     = regexp.MustCompile(`Pq key Ev ([A-Z_]+)$`)
)

// The manual page has each command, flag and key of the program, and no others.
func TestManualPage(t *testing.T) {
	t.Parallel()
	program := filepath.Join(unpacked(t, rpmFile), "usr/bin/oam-docker-ipam")
	page := read(t, filepath.Join(sources(t), "rpm/oam-docker-ipam.8"))
	commands, flags := interfaceOf(t, program)
	if len(commands) < 7 || len(flags) < 20 {
		t.Fatalf("help has commands %s, flags %s", commands, flags)
	}

	var described []string
	for _, match := range manCommand.FindAllStringSubmatch(page, -1) {
		described = append(described, match[1])
	}
	slices.Sort(commands)
	slices.Sort(described)
	if !slices.Equal(described, commands) {
		t.Errorf("describes the commands %s, there are %s", described, commands)
	}

	mentioned := map[string]bool{}
	for _, match := range manFlag.FindAllStringSubmatch(page, -1) {
		mentioned["-"+match[1]] = true
	}
	delete(mentioned, "--ipam-driver") // Docker's
	if got, want := slices.Sorted(maps.Keys(mentioned)), slices.Sorted(maps.Keys(flags)); !slices.Equal(got, want) {
		t.Errorf("has the flags\n%s, there are\n%s", got, want)
	}
	for _, match := range manOption.FindAllStringSubmatch(page, -1) {
		key := ""
		if found := manKey.FindStringSubmatch(match[1]); found != nil {
			key = found[1]
		}
		for _, flag := range manFlag.FindAllStringSubmatch(match[1], -1) {
			if want := flags["-"+flag[1]]; key != want {
				t.Errorf("-%s has the key %q, want %q", flag[1], key, want)
			}
		}
	}
}

// It is formatted without a warning.
func TestManualPageFormat(t *testing.T) {
	t.Parallel()
	needs(t, "man")
	for _, name := range []string{rpmFile, debFile} {
		page := filepath.Join(unpacked(t, name), "usr/share/man/man8/oam-docker-ipam.8.gz")
		cmd := command(t.Context(), "", []string{"MANWIDTH=80", "LC_ALL=C.UTF-8"}, "sh", "-c", `man --warnings -l "$1" 2>&1 >"$2"`, "sh", page, filepath.Join(t.TempDir(), "page"))
		if warnings := run(t, cmd); warnings != "" {
			t.Error(warnings)
		}
	}
}

// The shells complete commands and flags.
func TestCompletions(t *testing.T) {
	t.Parallel()
	needs(t, "bash", "zsh")
	root := unpacked(t, rpmFile)
	path := []string{"PATH=" + filepath.Join(root, "usr/bin") + ":/usr/bin:/bin"}
	for word, want := range map[string]string{"re": "reconcile release", "--dhcp-s": "--dhcp-server"} {
		const script = `
_get_comp_words_by_ref() { cur=${COMP_WORDS[COMP_CWORD]} words=("${COMP_WORDS[@]}") cword=$COMP_CWORD prev=oam-docker-ipam; }
. "$1"
COMP_WORDS=(oam-docker-ipam "$2") COMP_CWORD=1 COMP_LINE="oam-docker-ipam $2" COMP_POINT=${#COMP_LINE}
$(complete -p oam-docker-ipam | sed 's/.*-F \([^ ]*\).*/\1/')
printf '%s\n' "${COMPREPLY[@]%% *}" | sort | paste -sd' '
`
		got := run(t, command(t.Context(), "/", path, "bash", "-c", script, "bash", filepath.Join(root, "usr/share/bash-completion/completions/oam-docker-ipam"), word))
		if strings.TrimSpace(got) != want {
			t.Errorf("bash completes %q by %q, want %q", word, got, want)
		}
	}
	// zsh finds the function by its folder; what it offers goes to _describe.
	const script = `
fpath=($1 $fpath)
autoload -Uz compinit && compinit -u -d $2
_describe() { print -l -- ${(P)2} }
words=(oam-docker-ipam re)
$_comps[oam-docker-ipam]
`
	for name, folder := range map[string]string{rpmFile: "usr/share/zsh/site-functions", debFile: "usr/share/zsh/vendor-completions"} {
		got := run(t, command(t.Context(), "/", path, "zsh", "-f", "-c", script, "zsh", filepath.Join(unpacked(t, name), folder), filepath.Join(t.TempDir(), "dump")))
		if !strings.Contains(got, "reconcile:compare the leases") {
			t.Errorf("zsh offers %q", got)
		}
	}
}
