// Package conf reads the daemon's configuration file. The file that ships lies
// beside it.
package conf

import (
	"cmp"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"maps"
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
	values map[string]value
	err    error
}

// value is a key's, with the number of its line, the first being 1.
type value struct {
	text string
	line int
}

// load reads the file once.
func (f *File) load() {
	if f.read {
		return
	}
	f.read = true
	text, err := os.ReadFile(f.path())
	switch {
	case errors.Is(err, fs.ErrNotExist) && f.Name == "":
		return
	case errors.Is(err, fs.ErrPermission):
		err = fmt.Errorf("%w for user %d, who must be able to read it: chmod 644 %s", err, os.Geteuid(), f.path())
	case err == nil:
		f.values, err = parse(text)
	}
	if err != nil {
		f.err = fmt.Errorf("read configuration %s: %w", f.path(), err)
	}
}

func (f *File) path() string { return cmp.Or(f.Name, Path) }

// parse reads a file's text. The last of a repeated key counts. Written by
// hand, since the libraries for this and for INI files know neither comments
// after quoted values nor which line is wrong.
func parse(text []byte) (map[string]value, error) {
	values := map[string]value{}
	n := 0
	for line := range strings.Lines(strings.TrimPrefix(string(text), "\ufeff")) {
		n++
		line = strings.TrimSpace(line)
		key, text, err := parseLine(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %.60q: %w", n, line, err)
		}
		if key != "" {
			values[key] = value{text, n}
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
func (f *File) Unknown(known []string) []Key {
	f.load()
	var unknown []Key
	for _, name := range slices.Sorted(maps.Keys(f.values)) {
		if !slices.Contains(known, name) {
			unknown = append(unknown, f.Key(name))
		}
	}
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
	text := k.file.values[k.name].text
	return text, text != ""
}

// Name is the key's own.
func (k Key) Name() string { return k.name }

// Where is the file and line of a key that is set, as FILE:LINE.
func (k Key) Where() string {
	k.file.load()
	return fmt.Sprintf("%s:%d", k.file.path(), k.file.values[k.name].line)
}

// String names the source in error messages.
func (k Key) String() string { return k.name + " at " + k.Where() }

// GoString is String, as cli.ValueSource asks for it.
func (k Key) GoString() string { return k.String() }
