package chart

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/promql/parser"
	core "k8s.io/api/core/v1"
)

// exported are the metrics that csi-loop has, as the reference lists them, which is
// written from where they are made.
func exported(t *testing.T) []string {
	t.Helper()
	page, err := os.ReadFile(filepath.Join(Root(), "docs", "reference", "metrics.md"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range regexp.MustCompile("(?m)^\\| `(csi_loop_[a-z_]+[a-z])` \\|").FindAllStringSubmatch(string(page), -1) {
		names = append(names, m[1])
	}
	if len(names) < 40 {
		t.Fatalf("only %q", names)
	}
	return names
}

// query parses an expression, and refuses metrics that csi-loop does not have.
func query(t *testing.T, names []string, where, text string) {
	t.Helper()
	e, err := parser.NewParser(parser.Options{}).ParseExpr(text)
	if err != nil {
		t.Errorf("%s: %v\n%s", where, err, text)
		return
	}
	for _, selector := range parser.ExtractSelectors(e) {
		for _, m := range selector {
			if m.Name != model.MetricNameLabel || m.Value == "up" {
				continue
			}
			name := strings.TrimSuffix(strings.TrimSuffix(m.Value, "_count"), "_bucket")
			if !slices.Contains(names, name) {
				t.Errorf("%s: csi-loop has no metric %s", where, m.Value)
			}
		}
	}
}

// Every alert can be evaluated, and leads to a section that says what to do.
func TestAlerts(t *testing.T) {
	names := exported(t)
	operations, err := os.ReadFile(filepath.Join(Root(), "docs", "operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	values := "metrics: {podMonitor: {enabled: true}, prometheusRule: {enabled: true, poolFullPercent: 77, runbookURL: 'https://example.com/page'}}"
	all := render(t, values)
	rules := find[*monitoring.PrometheusRule](t, all, "csi-loop").Spec.Groups[0].Rules
	if len(rules) < 10 {
		t.Errorf("%d alerts", len(rules))
	}
	for _, r := range rules {
		query(t, names, r.Alert, r.Expr.String())
		if strings.Contains(r.Expr.String(), "%") {
			t.Errorf("%s: a placeholder is left in %s", r.Alert, r.Expr.String())
		}
		if want := "https://example.com/page#" + strings.ToLower(r.Alert); r.Annotations["runbook_url"] != want {
			t.Errorf("%s: its runbook is %s, want %s", r.Alert, r.Annotations["runbook_url"], want)
		}
		if !strings.Contains(string(operations), "\n### "+r.Alert+"\n") {
			t.Errorf("docs/operations.md has no section for %s", r.Alert)
		}
		if r.Annotations["summary"] == "" || r.Annotations["description"] == "" || !slices.Contains([]string{"warning", "critical"}, r.Labels["severity"]) {
			t.Errorf("%s: %v, %v", r.Alert, r.Annotations, r.Labels)
		}
	}
	// The job in the expressions is what the operator calls that of the PodMonitors.
	if e := rules[0].Expr.String(); !strings.Contains(e, `job=~"csi-loop/csi-loop-(node|controller)"`) {
		t.Error(e)
	}
	find[*monitoring.PodMonitor](t, all, "csi-loop-node")
	find[*monitoring.PodMonitor](t, all, "csi-loop-controller")
}

func TestDashboard(t *testing.T) {
	names := exported(t)
	text := find[*core.ConfigMap](t, render(t, "metrics: {grafanaDashboard: {enabled: true}}"), "csi-loop-dashboard").Data["csi-loop.json"]
	var dashboard struct {
		Panels []struct {
			ID      int    `json:"id"`
			Type    string `json:"type"`
			Title   string `json:"title"`
			Targets []struct {
				Expr string `json:"expr"`
			} `json:"targets"`
		} `json:"panels"`
	}
	if err := json.Unmarshal([]byte(text), &dashboard); err != nil {
		t.Fatal(err)
	}
	shown := text
	alone := []string{"csi_loop_link_refused_total", "csi_loop_pool_reserved_bytes", "csi_loop_orphan_look_timestamp_seconds"}
	ids := map[int]bool{}
	for _, p := range dashboard.Panels {
		if ids[p.ID] || p.Title == "" || (len(p.Targets) == 0) != (p.Type == "row") {
			t.Errorf("panel %+v", p)
		}
		ids[p.ID] = true
		for _, target := range p.Targets {
			query(t, names, p.Title, strings.ReplaceAll(target.Expr, "$__rate_interval", "5m"))
		}
	}
	for _, name := range names {
		if !strings.Contains(shown, name) && !slices.Contains(alone, name) {
			t.Errorf("no panel shows %s", name)
		}
	}
}
