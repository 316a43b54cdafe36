package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// conformance is a row of docs/CONFORMANCE.md.
type conformance struct {
	rfc, section, asked, held string
}

func (c conformance) deviates() bool { return strings.Contains(c.held, "**Deviation**") }

// parseConformance reads the tables, each under the heading of its RFC.
func parseConformance(text string) (rows []conformance) {
	rfc := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if heading, ok := strings.CutPrefix(line, "## "); ok {
			rfc = heading
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		if !strings.HasPrefix(line, "|") || len(cells) != 3 || strings.HasPrefix(line, "|---") || strings.Contains(line, "| asked |") {
			continue
		}
		rows = append(rows, conformance{rfc, strings.TrimSpace(cells[0]), strings.TrimSpace(cells[1]), strings.TrimSpace(cells[2])})
	}
	return rows
}

var (
	testName  = regexp.MustCompile("`([a-z0-9/]+)\\.((?:Test|Fuzz)[A-Za-z0-9]+)`")
	testFunc  = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	deviation = regexp.MustCompile(`(?m)^//   - (RFC \d+)(?: section ([0-9.]+(?: \(\d+\))?))?, `)
)

// testsOf lists the tests in a folder.
func testsOf(t *testing.T, folder string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(folder, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]bool{}
	for _, file := range files {
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range testFunc.FindAllStringSubmatch(string(source), -1) {
			tests[f[1]] = true
		}
	}
	return tests
}

// unproven are the rows that no test of the tree holds.
func unproven(rows []conformance, tests func(folder string) map[string]bool) (found []string) {
	for _, row := range rows {
		names := testName.FindAllStringSubmatch(row.held, -1)
		if len(names) == 0 || row.rfc == "" {
			found = append(found, row.rfc+" "+row.section+", "+row.asked+": names no test")
		}
		for _, name := range names {
			if !tests(name[1])[name[2]] {
				found = append(found, row.rfc+" "+row.section+", "+row.asked+": no test "+name[1]+"."+name[2])
			}
		}
	}
	return found
}

func TestConformance(t *testing.T) {
	text, err := os.ReadFile("docs/CONFORMANCE.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := parseConformance(string(text))
	if len(rows) < 40 {
		t.Fatalf("%d rows: is the table read?", len(rows))
	}
	found := map[string]map[string]bool{}
	tests := func(folder string) map[string]bool {
		if found[folder] == nil {
			found[folder] = testsOf(t, folder)
		}
		return found[folder]
	}
	for _, row := range unproven(rows, tests) {
		t.Error(row)
	}
	// A name that is no name of a test proves nothing.
	for _, row := range []string{"`dhcp.TestNoSuch`", "`nowhere.TestConfirm`", "surely"} {
		if got := unproven([]conformance{{"RFC 2131", "2", "op", row}}, tests); len(got) != 1 {
			t.Errorf("row held by %s: found %q", row, got)
		}
	}
}

// Deviations are listed where the code is and where the rows are.
func TestDeviationsAreListed(t *testing.T) {
	text, err := os.ReadFile("docs/CONFORMANCE.md")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("dhcp/doc.go")
	if err != nil {
		t.Fatal(err)
	}
	inRows, inDoc := map[string]bool{}, map[string]bool{}
	for _, row := range parseConformance(string(text)) {
		if row.deviates() {
			inRows[row.rfc+" "+row.section] = true
		}
	}
	for _, d := range deviation.FindAllStringSubmatch(string(doc), -1) {
		inDoc[d[1]+" "+d[2]] = true
	}
	rows, listed := slices.Sorted(maps.Keys(inRows)), slices.Sorted(maps.Keys(inDoc))
	if len(rows) == 0 || !slices.Equal(rows, listed) {
		t.Errorf("docs/CONFORMANCE.md has deviations from\n%q, dhcp/doc.go from\n%q", rows, listed)
	}
}

// Every field of what commands print as JSON is in docs/JSON.md, under its
// command's heading.
func TestJSONReference(t *testing.T) {
	text, err := os.ReadFile("docs/JSON.md")
	if err != nil {
		t.Fatal(err)
	}
	section := func(command string) string {
		for _, s := range strings.Split(string(text), "\n## ")[1:] {
			heading, _, _ := strings.Cut(s, "\n")
			if slices.Contains(strings.Split(heading, ", "), command) {
				return s
			}
		}
		t.Fatalf("there is no section about %s", command)
		return ""
	}
	for command, file := range map[string]string{
		"leases": "leases.json", "pools": "pools.json", "inspect": "inspect.json", "inspect-all": "inspect-all.json", "events": "events.jsonl", "doctor": "doctor.json",
	} {
		golden, err := os.ReadFile(filepath.Join("testdata", file))
		if err != nil {
			t.Fatal(err)
		}
		described := section(command)
		if command == "inspect" || command == "inspect-all" {
			described += section("leases") + section("events")
		}
		names := jsonNames(t, golden)
		if len(names) < 4 {
			t.Errorf("%s: only %q: is the file read?", file, names)
		}
		for _, name := range names {
			if !strings.Contains(described, "`"+name+"`") && !strings.Contains(described, "."+name+"`") {
				t.Errorf("%s: field %q is not described", command, name)
			}
		}
	}
}

// jsonNames are the names of all fields in some JSON documents, but those of
// maps that have names of their own: options and counts by state.
func jsonNames(t *testing.T, text []byte) []string {
	t.Helper()
	found := map[string]bool{}
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case []any:
			for _, element := range v {
				walk(element)
			}
		case map[string]any:
			for name, value := range v {
				found[name] = true
				if _, isMap := value.(map[string]any); !isMap || name != "options" && name != "leases" {
					walk(value)
				}
			}
		}
	}
	for d := json.NewDecoder(bytes.NewReader(text)); ; {
		var v any
		if err := d.Decode(&v); errors.Is(err, io.EOF) {
			return slices.Sorted(maps.Keys(found))
		} else if err != nil {
			t.Fatal(err)
		}
		walk(v)
	}
}
