package router

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/pkg/report"
)

// Report lets a node of a test say what it has, and more.
func (n *fakeNode) report(ctx context.Context) (report.Machine, error) {
	n.called("Report")
	if err := n.step(ctx, "report"); err != nil {
		return report.Machine{}, err
	}
	if m := n.says.Load(); m != nil {
		return *m, nil
	}
	m := report.Machine{Time: time.Now()}
	for _, p := range n.pools {
		m.Pools = append(m.Pools, report.Pool{Name: p.name, ID: p.id})
		for i := range report.PageSize + 1 {
			m.Volumes = append(m.Volumes, report.Volume{ID: fmt.Sprintf("%s.v%05d", p.id, i), Pool: p.name})
		}
	}
	m.Templates = []report.Template{{ID: n.pools[0].id + ".golden", Name: "golden", Volumes: 3}}
	m.Copies = []report.Copy{{Name: "pvc", Kind: report.Copying, Done: 1, Total: 2}}
	if n.lies != "" {
		m.Templates = append(m.Templates, report.Template{ID: n.lies + ".stolen"})
		m.Pools = append(m.Pools, report.Pool{Name: "stolen", ID: n.lies})
		m.Snapshots = append(m.Snapshots, report.Snapshot{ID: n.lies + ".s"})
	}
	return m, nil
}

// A report is whole, page by page; says who is away; and keeps nothing that a node says
// of another's pool.
func TestReport(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("n1", newDisk(t, "default", 1<<30)), c.node("n2", newDisk(t, "default", 1<<30))
	b.lies = a.pools[0].id
	c.linked(a.up(), b.up())
	c.roster.set("n3", true)
	got, err := c.router.Report(t.Context())
	must(t, err)
	var lines []string
	for _, n := range got.Nodes {
		lines = append(lines, fmt.Sprintf("%s %s %d pools %d volumes %d snapshots %d templates %d copies %s", n.Name, n.State, len(n.Pools), len(n.Volumes), len(n.Snapshots), len(n.Templates), len(n.Copies), n.Error))
	}
	want := "n1 linked 1 pools 1001 volumes 0 snapshots 1 templates 1 copies \nn2 linked 1 pools 1001 volumes 0 snapshots 1 templates 1 copies \n" +
		"n3 missing 0 pools 0 volumes 0 snapshots 0 templates 0 copies "
	if text := strings.Join(lines, "\n"); text != want {
		t.Errorf("%s\nwant\n%s", text, want)
	}
	asked := a.count("Report")
	if again, err := c.router.Report(t.Context()); err != nil || !again.Time.Equal(got.Time) || a.count("Report") != asked {
		t.Error("the nodes were asked again", err)
	}
	c.clock.advance(reportAge)
	if again, err := c.router.Report(t.Context()); err != nil || again.Time.Equal(got.Time) {
		t.Error("an old report", err)
	}
}
