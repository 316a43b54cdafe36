// Package conf reads the daemon's configuration file. The file that ships lies
// beside it.
package conf

import (
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Path is where the file lies on an installed system.
const Path = "/etc/oam-docker-ipam.conf"

// Shipped is the text of the configuration file that the packages install.
//
//go:embed oam-docker-ipam.conf
var Shipped string

// File is a configuration file: KEY=VALUE lines as in systemd's
// EnvironmentFile, with comments on lines of their own and after values, with
// quotes and with [section] lines, which mean nothing. It is read when the
// first key is asked for, so that its path may come from a flag.
type File struct {
	// Name is the file's path. Empty means Path, which then may be missing.
	Name string

	read   bool
	values map[string]string
	err    error
}

// load reads the file once.
func (f *File) load() {
	if f.read {
		return
	}
	f.read = true
	name := f.Name
	if name == "" {
		name = Path
	}
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) && f.Name == "" {
		return
	}
	if err == nil {
		f.values, err = parse(text)
	}
	if err != nil {
		f.err = fmt.Errorf("read configuration %s: %w", name, err)
	}
}

// parse reads a file's text. The last of a repeated key counts. Written by
// hand, since the libraries for this and for INI files know neither comments
// after quoted values nor which line is wrong.
func parse(text []byte) (map[string]string, error) {
	values := map[string]string{}
	n := 0
	for line := range strings.Lines(strings.TrimPrefix(string(text), "\ufeff")) {
		n++
		line = strings.TrimSpace(line)
		key, value, err := parseLine(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %.60q: %w", n, line, err)
		}
		if key != "" {
			values[key] = value
		}
	}
	return values, nil
}

var keys = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// commentSigns begin a comment where a line or value could begin, or after
// white space.
const commentSigns = "#;"

// parseLine reads one line without the white space around it. The key is ""
// where it sets nothing.
func parseLine(line string) (key, value string, err error) {
	notText := func(r rune) bool { return r == utf8.RuneError || unicode.IsControl(r) && r != '\t' }
	section := strings.HasPrefix(line, "[") && strings.Contains(line, "]")
	switch {
	case strings.ContainsFunc(line, notText):
		return "", "", errors.New("not a text file")
	case line == "" || section || strings.Contains(commentSigns, line[:1]):
		return "", "", nil
	}
	key, value, found := strings.Cut(line, "=")
	key = strings.TrimSpace(strings.TrimPrefix(key, "export "))
	value = strings.TrimSpace(value)
	switch {
	case !found || !keys.MatchString(key):
		return "", "", errors.New("want KEY=VALUE")
	case value == "":
	case value[0] == '"' || value[0] == '\'':
		quoted, rest, closed := strings.Cut(value[1:], value[:1])
		rest = strings.TrimSpace(rest)
		if !closed || rest != "" && !strings.Contains(commentSigns, rest[:1]) {
			return "", "", errors.New("want one value in quotes")
		}
		value = quoted
	default:
		for i := range value {
			if strings.Contains(commentSigns, value[i:i+1]) && (i == 0 || value[i-1] == ' ' || value[i-1] == '\t') {
				value = strings.TrimSpace(value[:i])
				break
			}
		}
	}
	return key, value, nil
}

// Err returns what was wrong with the file, with its name.
func (f *File) Err() error {
	f.load()
	return f.err
}

// Unknown lists the file's keys that are not among the known ones, sorted.
func (f *File) Unknown(known []string) []string {
	f.load()
	var unknown []string
	for key := range f.values {
		if !slices.Contains(known, key) {
			unknown = append(unknown, key)
		}
	}
	slices.Sort(unknown)
	return unknown
}

// Key is one key of the file as a source of a flag's value (cli.ValueSource).
func (f *File) Key(name string) Key { return Key{f, name} }

// Key looks one key up in a File.
type Key struct {
	file *File
	name string
}

// Lookup returns the key's value. An empty one counts as not set.
func (k Key) Lookup() (string, bool) {
	k.file.load()
	value := k.file.values[k.name]
	return value, value != ""
}

// String names the source in error messages.
func (k Key) String() string { return "key " + k.name + " of the configuration file" }

// GoString is String, as cli.ValueSource asks for it.
func (k Key) GoString() string { return k.String() }
