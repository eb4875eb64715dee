package chart

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/tsdb"
	core "k8s.io/api/core/v1"
)

// TestQueriesFindData evaluates every query of the dashboard and of the alerts over
// what a real csi-loop shows, with real volumes, in Prometheus' own engine. What a
// query selects must be there: a label or a metric that was renamed finds nothing.
func TestQueriesFindData(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CSI_LOOP_ROOT_TESTS") == "1" {
			t.Fatal("CSI_LOOP_ROOT_TESTS promises root")
		}
		t.Skip("csi-loop attaches loop devices: it needs root")
	}
	dir := t.TempDir()
	scrapes := exec.CommandContext(t.Context(), "go", "test", "-count=1", "-buildvcs=false", "-run=^TestScrapes$", "./cmd/csi-loop")
	scrapes.Dir, scrapes.Env = Root(), append(os.Environ(), "CSI_LOOP_TEST_SCRAPES="+dir, "CSI_LOOP_ROOT_TESTS=1")
	if out, err := scrapes.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	p := newPrometheus(t)
	p.add(t, dir, "node", "csi-loop/csi-loop-node", "n1")
	p.add(t, dir, "controller", "csi-loop/csi-loop-controller", "n1")
	// Two nodes and a controller, between which something is copied.
	p.add(t, dir, "sender", "csi-loop/csi-loop-node", "n2")
	p.add(t, dir, "receiver", "csi-loop/csi-loop-node", "n3")
	p.add(t, dir, "linked", "csi-loop/csi-loop-controller", "n2")

	all := render(t, "metrics: {grafanaDashboard: {enabled: true}, podMonitor: {enabled: true}, prometheusRule: {enabled: true}}")
	asked := 0
	for _, r := range find[*monitoring.PrometheusRule](t, all, "csi-loop").Spec.Groups[0].Rules {
		// Whether it fires depends on the state of things; that it can, on its selectors.
		p.selects(t, r.Alert, r.Expr.String())
		_ = p.eval(t, r.Alert, r.Expr.String())
		asked++
	}
	var dashboard struct {
		Panels []struct {
			Title   string `json:"title"`
			Targets []struct {
				Expr string `json:"expr"`
			} `json:"targets"`
		} `json:"panels"`
	}
	if err := json.Unmarshal([]byte(find[*core.ConfigMap](t, all, "csi-loop-dashboard").Data["csi-loop.json"]), &dashboard); err != nil {
		t.Fatal(err)
	}
	variables := strings.NewReplacer("$node", ".*", "$pool", ".*", "$__rate_interval", "5m")
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			expr := variables.Replace(target.Expr)
			p.selects(t, panel.Title, expr)
			if n := p.eval(t, panel.Title, expr); n == 0 {
				t.Errorf("%s shows nothing: %s", panel.Title, expr)
			}
			asked++
		}
	}
	if asked < 50 {
		t.Errorf("%d queries", asked)
	}
}

// prometheus has scraped.
type prometheus struct {
	engine *promql.Engine
	db     *tsdb.DB
	now    time.Time
	parser parser.Parser
}

func newPrometheus(t *testing.T) *prometheus {
	t.Helper()
	db, err := tsdb.Open(t.TempDir(), nil, nil, tsdb.DefaultOptions(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	p := &prometheus{db: db, now: time.Now(), parser: parser.NewParser(parser.Options{})}
	p.engine = promql.NewEngine(promql.EngineOpts{MaxSamples: 1e6, Timeout: time.Minute, LookbackDelta: 5 * time.Minute, Parser: p.parser})
	return p
}

// add takes two scrapes of a pod on a node, a minute apart, with the labels that a
// PodMonitor adds.
func (p *prometheus) add(t *testing.T, dir, name, job, node string) {
	t.Helper()
	a := p.db.Appender(t.Context())
	for n := range 2 {
		at := p.now.Add(time.Duration(n-1) * time.Minute).UnixMilli()
		f, err := os.Open(filepath.Join(dir, fmt.Sprintf("%s-%d.txt", name, n)))
		if err != nil {
			t.Fatal(err)
		}
		families, err := new(expfmt.NewTextParser(model.UTF8Validation)).TextToMetricFamilies(f)
		_ = f.Close()
		if err != nil {
			t.Fatal(err)
		}
		put := func(metric string, value float64, pairs []*dto.LabelPair, more ...string) {
			b := labels.NewBuilder(labels.FromStrings(more...))
			b.Set(model.MetricNameLabel, metric).Set("job", job).Set("node", node)
			for _, l := range pairs {
				b.Set(l.GetName(), l.GetValue())
			}
			if _, err := a.Append(0, b.Labels(), at, value); err != nil {
				t.Fatal(err)
			}
		}
		put("up", 1, nil)
		for metric, family := range families {
			for _, m := range family.GetMetric() {
				switch h := m.GetHistogram(); {
				case h != nil:
					put(metric+"_count", float64(h.GetSampleCount()), m.GetLabel())
					put(metric+"_sum", h.GetSampleSum(), m.GetLabel())
					for _, bucket := range h.GetBucket() {
						put(metric+"_bucket", float64(bucket.GetCumulativeCount()), m.GetLabel(), "le", fmt.Sprint(bucket.GetUpperBound()))
					}
				case m.GetSummary() == nil:
					put(metric, m.GetGauge().GetValue()+m.GetCounter().GetValue()+m.GetUntyped().GetValue(), m.GetLabel())
				}
			}
		}
	}
	if err := a.Commit(); err != nil {
		t.Fatal(err)
	}
}

// selects fails for a selector that finds nothing.
func (p *prometheus) selects(t *testing.T, where, expr string) {
	t.Helper()
	e, err := p.parser.ParseExpr(expr)
	if err != nil {
		t.Errorf("%s: %v", where, err)
		return
	}
	for _, matchers := range parser.ExtractSelectors(e) {
		// These codes are bugs; there are none to be had.
		if slices.ContainsFunc(matchers, func(m *labels.Matcher) bool { return m.Name == "code" && strings.Contains(m.Value, "DataLoss") }) {
			matchers = slices.DeleteFunc(matchers, func(m *labels.Matcher) bool { return m.Name == "code" })
		}
		if !p.finds(t, matchers) {
			t.Errorf("%s: nothing is found by %v", where, matchers)
		}
	}
}

func (p *prometheus) finds(t *testing.T, matchers []*labels.Matcher) bool {
	t.Helper()
	q, err := p.db.Querier(p.now.Add(-time.Hour).UnixMilli(), p.now.UnixMilli())
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	set := q.Select(t.Context(), false, nil, matchers...)
	found := set.Next()
	if err := set.Err(); err != nil {
		t.Fatal(err)
	}
	return found
}

// eval returns how many series a query has now.
func (p *prometheus) eval(t *testing.T, where, expr string) int {
	t.Helper()
	q, err := p.engine.NewInstantQuery(t.Context(), p.db, nil, expr, p.now)
	if err != nil {
		t.Errorf("%s: %v\n%s", where, err, expr)
		return -1
	}
	defer q.Close()
	result := q.Exec(t.Context())
	vector, err := result.Vector()
	if err != nil {
		t.Errorf("%s: %v\n%s", where, err, expr)
		return -1
	}
	return len(vector)
}
