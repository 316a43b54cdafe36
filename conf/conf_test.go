package conf

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// write makes a configuration file of this text.
func write(t testing.TB, text string) *File {
	t.Helper()
	name := filepath.Join(t.TempDir(), "test.conf")
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return &File{Name: name}
}

// texts are the values of a file's keys.
func texts(f *File) map[string]string {
	texts := map[string]string{}
	for key, value := range f.values {
		texts[key] = value.text
	}
	return texts
}

func TestValues(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       map[string]string
	}{
		{"nothing", "", nil},
		{"one key", "A=b\n", map[string]string{"A": "b"}},
		{"no newline at the end", "A=b", map[string]string{"A": "b"}},
		{"CRLF", "A=b\r\nC=d\r\n", map[string]string{"A": "b", "C": "d"}},
		{"byte order mark", "\ufeffA=b\n", map[string]string{"A": "b"}},
		{"comment lines", "# x\n  # y\n;z\nA=b\n#C=d\n", map[string]string{"A": "b"}},
		{"comment after a value", "DHCP_SERVER=192.0.2.1  # our server\n", map[string]string{"DHCP_SERVER": "192.0.2.1"}},
		{"comment after a tab", "DHCP_SERVER=192.0.2.1\t# our server\n", map[string]string{"DHCP_SERVER": "192.0.2.1"}},
		{"comment with quotes and =", "A=b # it's a=\"c\"\n", map[string]string{"A": "b"}},
		{"comment instead of a value", "A=# none\nB=  # none\nC=\t#none", map[string]string{"A": "", "B": "", "C": ""}},
		{"# within a value", "A=b#c\n", map[string]string{"A": "b#c"}},
		{"; after a value", "A=b ; c\n", map[string]string{"A": "b"}},
		{"; within a value", "A=b;c\n", map[string]string{"A": "b;c"}},
		{"both comment signs", "A=b ; c # d\nE=f # g ; h\n", map[string]string{"A": "b", "E": "f"}},
		{"sections", "[server]\nA=b\n[other] # x\nC=d\n", map[string]string{"A": "b", "C": "d"}},
		{"spaces", "  A = b c  \n\tD\t=\te\n", map[string]string{"A": "b c", "D": "e"}},
		{"empty values", "A=\nB=  \nC=\"\"\nD=''\n", map[string]string{"A": "", "B": "", "C": "", "D": ""}},
		{"double quotes", "A=\"b c\"\n", map[string]string{"A": "b c"}},
		{"single quotes", "A='b c'\n", map[string]string{"A": "b c"}},
		{"quotes keep spaces", "A=\"  b  \"\n", map[string]string{"A": "  b  "}},
		{"comment after quotes", "A=\"b\" # c\nD='e'  # 'f'\nG=\"h\"# i\n", map[string]string{"A": "b", "D": "e", "G": "h"}},
		{"# in quotes", "A=\"b # c\"\nD='e # f' # g\n", map[string]string{"A": "b # c", "D": "e # f"}},
		{"other quotes in quotes", "A=\"it's\"\nB='say \"x\"'\n", map[string]string{"A": "it's", "B": `say "x"`}},
		{"quotes within a value", "A=b\"c\"d\n", map[string]string{"A": `b"c"d`}},
		{"= in a value", "A=b=c\n", map[string]string{"A": "b=c"}},
		{"the last counts", "A=b\n[x]\nA=c\n", map[string]string{"A": "c"}},
		{"the last counts, empty", "A=b\nA=\n", map[string]string{"A": ""}},
		{"export, as shells have it", "export A=b\n", map[string]string{"A": "b"}},
		{"nothing is expanded", "A=$HOME\nB=%(A)s\nC=`id`\nD=${A}\n", map[string]string{"A": "$HOME", "B": "%(A)s", "C": "`id`", "D": "${A}"}},
		{"backslash", "A=b\\\nC=d\n", map[string]string{"A": `b\`, "C": "d"}},
		{"UTF-8", "A=größe\n", map[string]string{"A": "größe"}},
		{"the old daemon's file", oldFile, map[string]string{"DHCP_SERVER": "192.0.2.1", "LISTEN_ADDR": "0.0.0.0"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := write(t, c.text)
			if err := f.Err(); err != nil {
				t.Fatal(err)
			}
			if got := texts(f); !maps.Equal(got, c.want) && len(got)+len(c.want) > 0 {
				t.Errorf("%q gives %q, want %q", c.text, got, c.want)
			}
			for key, want := range c.want {
				got, set := f.Key(key).Lookup()
				if got != want || set != (want != "") {
					t.Errorf("key %s is %q, %t", key, got, set)
				}
			}
		})
	}
}

// oldFile is written as users of the old daemon have theirs.
const oldFile = `[oam-docker-ipam]
# dhcp server ip
DHCP_SERVER=192.0.2.1  # our server
LISTEN_ADDR=0.0.0.0    # any
`

// What isn't KEY=VALUE ends the start with one line that says where.
func TestMalformed(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"no =":            {"A=b\nDHCP_SERVER 192.0.2.1\n", `line 2: "DHCP_SERVER 192.0.2.1"`},
		"colon":           {"DHCP_SERVER: 192.0.2.1\n", "line 1"},
		"no key":          {"\n\n=b\n", "line 3"},
		"key with spaces": {"DHCP SERVER=192.0.2.1\n", "line 1"},
		"open quote":      {"A=\"b\nC=d\n", "line 1"},
		"open quote '":    {"A='b # c\n", "line 1"},
		"after the quote": {"A=\"b\"c\n", "line 1"},
		"triple quotes":   {"A=\"\"\"b\"\"\"\n", "line 1"},
		"open section":    {"[server\nA=b\n", "line 1"},
		"binary":          {"\x7fELF\x02\x01\x01\x00\x00=\x00\n\x00\xff", "line 1"},
		"NUL in a value":  {"A=b\x00c\n", "line 1"},
		"UTF-16":          {"\xff\xfeA\x00=\x00b\x00\n\x00", "line 1"},
		"very long line":  {strings.Repeat("x", 1<<20), "line 1"},
	} {
		t.Run(name, func(t *testing.T) {
			f := write(t, c.text)
			err := f.Err()
			if err == nil {
				t.Fatalf("no error, values %q", texts(f))
			}
			for _, part := range []string{f.Name, c.want} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("error %.400q lacks %q", err.Error(), part)
				}
			}
			if text := err.Error(); len(text) > 500 || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == '\ufffd' }) {
				t.Errorf("error of %d bytes is no clear line: %.400q", len(text), text)
			}
			if v, ok := f.Key("A").Lookup(); ok {
				t.Errorf("a broken file gives A=%q", v)
			}
		})
	}
}

func TestUnreadable(t *testing.T) {
	folder := t.TempDir()
	missing := &File{Name: filepath.Join(folder, "missing.conf")}
	if err := missing.Err(); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), missing.Name) {
		t.Errorf("a named file that is missing: %v", err)
	}
	asFolder := &File{Name: folder}
	if err := asFolder.Err(); err == nil || !strings.Contains(err.Error(), folder) {
		t.Errorf("a folder: %v", err)
	}
	through := &File{Name: filepath.Join(write(t, "").Name, "x.conf")}
	if err := through.Err(); err == nil {
		t.Error("a file as folder: no error")
	}
}

// A file that the daemon's user may not read says what to do.
func TestLockedFile(t *testing.T) {
	locked := write(t, "A=b\n")
	if err := os.Chmod(locked.Name, 0); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() {
		// Root reads everything: this thread isn't root any more, and ends with
		// its goroutine.
		runtime.LockOSThread()
		if os.Getuid() == 0 {
			_ = unix.Setfsuid(65534) // it says nothing of its success
		}
		ended <- locked.Err()
	}()
	err := <-ended
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "chmod 644 "+locked.Name) {
		t.Errorf("a locked file: %v", err)
	}
}

// Without a name, the usual file may be missing.
func TestUsualFile(t *testing.T) {
	if _, err := os.Stat(Path); err == nil {
		t.Skipf("%s exists here", Path)
	}
	var f File
	if err := f.Err(); err != nil {
		t.Error(err)
	}
	if v, ok := f.Key("DHCP_SERVER").Lookup(); ok {
		t.Errorf("DHCP_SERVER is %q", v)
	}
	if got := f.Unknown(nil); len(got) != 0 {
		t.Errorf("unknown keys %q", got)
	}
}

// The name may be set after the keys were made: it comes from a flag.
func TestNameComesLater(t *testing.T) {
	var f File
	key := f.Key("A")
	f.Name = write(t, "A=b\n").Name
	if v, ok := key.Lookup(); v != "b" || !ok {
		t.Errorf("A is %q, %t", v, ok)
	}
}

func TestUnknown(t *testing.T) {
	f := write(t, "B=1\nA=2\nC=3\n")
	var got []string
	for _, key := range f.Unknown([]string{"B"}) {
		got = append(got, key.Name()+" "+key.Where())
	}
	if want := []string{"A " + f.Name + ":2", "C " + f.Name + ":3"}; !slices.Equal(got, want) {
		t.Errorf("unknown keys %q, want %q", got, want)
	}
}

// A value says where it stands: of a repeated key, the one that counts.
func TestWhere(t *testing.T) {
	f := write(t, "# x\n\nDHCP_SERVER=a\n[y]\nDHCP_SERVER=b # z\n")
	key := f.Key("DHCP_SERVER")
	if want := f.Name + ":5"; key.Where() != want || key.String() != "DHCP_SERVER at "+want || key.GoString() != key.String() {
		t.Errorf("%q, %q, %q", key.Where(), key, key.GoString())
	}
	if got, want := new(File).Key("A").Where(), Path+":0"; got != want {
		t.Errorf("in the usual file: %q, want %q", got, want)
	}
}

// The file that ships is valid, and so it is with every example in it taken.
// That its keys and defaults are the flags' is main's test.
func TestShipped(t *testing.T) {
	onDisk, err := os.ReadFile("oam-docker-ipam.conf")
	if err != nil || string(onDisk) != Shipped {
		t.Errorf("embedded is another text, %v", err)
	}
	f := write(t, Shipped)
	if err := f.Err(); err != nil {
		t.Fatal(err)
	}
	if want := map[string]string{"LISTEN_ADDR": "0.0.0.0", "IPAM_DEBUG": "false"}; !maps.Equal(texts(f), want) {
		t.Errorf("it sets %q, want %q", texts(f), want)
	}
	lines := strings.Split(Shipped, "\n")
	for i, line := range lines {
		if example, ok := strings.CutPrefix(line, "#"); ok && !strings.HasPrefix(example, " ") {
			lines[i] = example
		}
	}
	if err := write(t, strings.Join(lines, "\n")).Err(); err != nil {
		t.Errorf("with its examples: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	for _, text := range []string{"", Shipped, oldFile, "A=\"b # c\" # d", "A='b", "[x]\nA=b\\\n", "\x00\xff=", "export A=b", "A=b#c", "="} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		values, err := parse([]byte(text))
		if err != nil {
			if values != nil || strings.Contains(err.Error(), "\n") {
				t.Errorf("values %v with error %q", values, err)
			}
			return
		}
		for key, value := range values {
			if key == "" || strings.ContainsAny(key, " \t=#\n\r") || strings.ContainsAny(value.text, "\n\r\x00") || value.line < 1 || value.line > strings.Count(text, "\n")+1 {
				t.Errorf("%q gives %q=%v", text, key, value)
			}
		}
	})
}
