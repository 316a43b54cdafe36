package metrics

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const (
	dashboardFile = "../contrib/grafana-dashboard.json"
	alertsFile    = "../contrib/alerts.yml"
)

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// dashboard is the part of Grafana's format that counts here.
type dashboard struct {
	Title, UID string
	Templating struct {
		List []struct {
			Name, Type string
			Datasource source
		}
	}
	Panels []struct {
		ID         int
		Title      string
		Datasource source
		GridPos    struct{ X, Y, W, H int }
		Targets    []struct {
			RefID      string
			Datasource source
			Expr       string
		}
	}
}

type source struct{ Type, UID string }

func parseDashboard(t *testing.T) (d dashboard) {
	t.Helper()
	if err := json.Unmarshal([]byte(read(t, dashboardFile)), &d); err != nil {
		t.Fatalf("%s: %v", dashboardFile, err)
	}
	return d
}

// The dashboard can be imported anywhere: its data source is a variable, its
// panels are told apart and don't cover each other.
func TestDashboard(t *testing.T) {
	d := parseDashboard(t)
	if d.Title == "" || d.UID == "" || len(d.Panels) < 15 {
		t.Errorf("%q (%q) has %d panels", d.Title, d.UID, len(d.Panels))
	}
	variable := source{"prometheus", "${DS_PROMETHEUS}"}
	var names []string
	for _, v := range d.Templating.List {
		names = append(names, v.Name)
		if v.Type == "query" && v.Datasource != variable {
			t.Errorf("variable %s asks %+v", v.Name, v.Datasource)
		}
	}
	if want := []string{"DS_PROMETHEUS", "job", "instance"}; !slices.Equal(names, want) {
		t.Errorf("variables %q, want %q", names, want)
	}
	panels, cells := map[int]string{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if other, twice := panels[p.ID]; twice || p.ID == 0 || p.Title == "" {
			t.Errorf("panel %q has the ID %d of %q", p.Title, p.ID, other)
		}
		panels[p.ID] = p.Title
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other, taken := cells[[2]int{x, y}]; taken || x >= 24 {
					t.Fatalf("panel %q covers %q, or the edge", p.Title, other)
				}
				cells[[2]int{x, y}] = p.Title
			}
		}
		if len(p.Targets) == 0 || p.Datasource != variable {
			t.Errorf("panel %q shows %d queries of %+v", p.Title, len(p.Targets), p.Datasource)
		}
		refs := map[string]bool{}
		for _, target := range p.Targets {
			if refs[target.RefID] || target.Datasource != variable {
				t.Errorf("panel %q: query %q of %+v", p.Title, target.RefID, target.Datasource)
			}
			refs[target.RefID] = true
			if !strings.Contains(target.Expr, `job=~"$job", instance=~"$instance"`) {
				t.Errorf("panel %q shows all hosts: %s", p.Title, target.Expr)
			}
		}
	}
}

var (
	// selector is a metric and what is selected of it.
	selector = regexp.MustCompile(`\b((?:oam_docker_ipam|go|process)_\w+)(?:\{([^}]*)\})?`)
	matcher  = regexp.MustCompile(`(\w+)(=~|!~|!=|=)"([^"]*)"`)
	byLabels = regexp.MustCompile(`\bby \(([^)]*)\)`)
	// target are the labels that Prometheus adds.
	target = []string{"job", "instance"}
)

// unknown is what an expression asks of metrics that they don't have, given the
// samples of a scrape.
func unknown(expr string, samples map[string]string) (problems []string) {
	labels := map[string]bool{} // of all that the expression names
	for _, s := range selector.FindAllStringSubmatch(expr, -1) {
		metric, selection := s[1], s[2]
		values := map[string][]string{} // of the metric's labels
		found := false
		for sample := range samples {
			name, inBraces, _ := strings.Cut(sample, "{")
			if name != metric {
				continue
			}
			found = true
			for _, m := range matcher.FindAllStringSubmatch(inBraces, -1) {
				values[m[1]] = append(values[m[1]], m[3])
				labels[m[1]] = true
			}
		}
		if !found {
			problems = append(problems, "no metric "+metric)
			continue
		}
		for _, m := range matcher.FindAllStringSubmatch(selection, -1) {
			label, op, value := m[1], m[2], m[3]
			if slices.Contains(target, label) {
				continue
			}
			wanted := []string{value}
			if strings.HasSuffix(op, "~") {
				wanted = strings.Split(value, "|")
			}
			// Of these, a scrape has some only.
			if label == "reason" || label == "server" || label == "pool" {
				wanted = nil
			}
			for _, value := range wanted {
				if !slices.Contains(values[label], value) {
					problems = append(problems, fmt.Sprintf("%s has no %s=%q", metric, label, value))
				}
			}
			if len(values[label]) == 0 {
				problems = append(problems, fmt.Sprintf("%s has no label %s", metric, label))
			}
		}
	}
	for _, by := range byLabels.FindAllStringSubmatch(expr, -1) {
		for label := range strings.SplitSeq(by[1], ",") {
			if label = strings.TrimSpace(label); !labels[label] && !slices.Contains(target, label) {
				problems = append(problems, "nothing to sum by "+label)
			}
		}
	}
	return problems
}

// Prometheus understands every query of the dashboard.
func TestDashboardQueries(t *testing.T) {
	type rule struct {
		Record string `json:"record"`
		Expr   string `json:"expr"`
	}
	var rules []rule
	variables := strings.NewReplacer("$__rate_interval", "5m", "$__range", "6h", "$job", ".+", "$instance", ".+")
	for _, p := range parseDashboard(t).Panels {
		for _, target := range p.Targets {
			rules = append(rules, rule{fmt.Sprintf("panel:%d:%s", p.ID, target.RefID), variables.Replace(target.Expr)})
		}
	}
	file := filepath.Join(t.TempDir(), "queries.yml")
	text, err := json.Marshal(map[string]any{"groups": []any{map[string]any{"name": "dashboard", "rules": rules}}}) // is YAML too
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if out := promtool(t, "", "check", "rules", file); out != "" {
		t.Error(out)
	}
}

// Every metric, label and value that the dashboard, its variables and the alerts
// name is served.
func TestWhatIsShownIsServed(t *testing.T) {
	samples, _ := scraped(t, fed())
	exprs := map[string]string{} // to where they are
	for _, p := range parseDashboard(t).Panels {
		for _, target := range p.Targets {
			exprs[target.Expr] = "panel " + p.Title
		}
	}
	for _, variable := range regexp.MustCompile(`label_values\([^"]*`).FindAllString(read(t, dashboardFile), -1) {
		exprs[variable] = "a variable"
	}
	for _, a := range alerts(t) {
		exprs[a.expr] = a.name
	}
	named := 0
	for expr, where := range exprs {
		for _, problem := range unknown(expr, samples) {
			t.Errorf("%s: %s: %s", where, problem, expr)
		}
		named += len(selector.FindAllString(expr, -1))
	}
	if named < 40 {
		t.Errorf("%d metrics are named: are the files read?", named)
	}

	// What isn't there is found.
	for _, expr := range []string{
		`oam_docker_ipam_nothing_total`,
		`oam_docker_ipam_leases{state="sleeping"}`,
		`oam_docker_ipam_events_total{event!~"granted|gone"}`,
		`oam_docker_ipam_leases{colour="blue"}`,
		`sum by (colour) (oam_docker_ipam_leases)`,
		`oam_docker_ipam_address_request_duration_seconds`,
	} {
		if got := unknown(expr, samples); len(got) == 0 {
			t.Errorf("%s is taken", expr)
		}
	}

	// And nothing of ours is shown nowhere.
	all := read(t, dashboardFile) + read(t, alertsFile)
	for sample := range samples {
		name, _, _ := strings.Cut(sample, "{")
		if base := regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, ""); strings.HasPrefix(name, "oam_docker_ipam_") && !strings.Contains(all, base) {
			t.Errorf("%s is on no dashboard", name)
		}
	}
}

// alert is one of the rules.
type alert struct{ name, expr, text string }

// alerts splits the rules, whose syntax promtool checks.
func alerts(t *testing.T) (all []alert) {
	t.Helper()
	expression := regexp.MustCompile(`(?s)\n        expr: (.*?)\n        \w+:`)
	for _, text := range strings.Split(read(t, alertsFile), "\n      - alert: ")[1:] {
		name, _, _ := strings.Cut(text, "\n")
		expr := expression.FindStringSubmatch(text)
		if expr == nil {
			t.Fatalf("alert %s has no expression", name)
		}
		all = append(all, alert{name, expr[1], text})
	}
	if len(all) < 10 {
		t.Fatalf("%d alerts: is the file read?", len(all))
	}
	return all
}

// Whoever is woken finds what it means, how bad it is, and what to do.
func TestAlertsAreExplained(t *testing.T) {
	readme := read(t, "../README.md")
	var headings []string
	for _, a := range alerts(t) {
		anchor := "alert-" + strings.ToLower(a.name)
		headings = append(headings, a.name)
		for _, part := range []string{
			"\n          severity: ", "\n          summary: ", "\n          description: ", "oam-docker-ipam doctor", "{{ $labels.instance }}",
			"\n          runbook_url: https://github.com/talkingdata/oam-docker-ipam#" + anchor + "\n",
		} {
			if !strings.Contains(a.text+"\n", part) {
				t.Errorf("alert %s lacks %q", a.name, part)
			}
		}
	}
	// GitHub makes such anchors of these headings.
	var explained []string
	for _, heading := range regexp.MustCompile(`(?m)^### Alert: (\w+)\n\n\S`).FindAllStringSubmatch(readme, -1) {
		explained = append(explained, heading[1])
	}
	if !slices.Equal(explained, headings) {
		t.Errorf("README.md explains\n%q, the alerts are\n%q", explained, headings)
	}
}

// Each alert fires when it should, and only then: contrib/alerts_test.yml.
func TestAlerts(t *testing.T) {
	tests := read(t, "../contrib/alerts_test.yml")
	for _, a := range alerts(t) {
		if !strings.Contains(tests, `ALERTS{alertname="`+a.name+`", alertstate="firing"`) {
			t.Errorf("alert %s has no test", a.name)
		}
	}
	if out := promtool(t, "", "check", "rules", alertsFile); out != "" {
		t.Error(out)
	}
	if out := promtool(t, "", "test", "rules", "../contrib/alerts_test.yml"); out != "" {
		t.Error(out)
	}
}
