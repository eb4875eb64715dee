package main

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/report"
	"github.com/csi-loop/csi-loop/pkg/router"
)

// What is shown is named by Prometheus' rules, and is what docs/reference lists.
func TestMetrics(t *testing.T) {
	roottest.Require(t)
	dir := t.TempDir() + "/p"
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	store, err := image.Open(t.Context(), []image.Config{{Name: "default", Path: dir}, {Name: "gone", Path: dir + "x"}}, image.WithRefresh(time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	pool, _ := store.Pool("default")
	if _, err := pool.Create(t.Context(), image.Spec{Name: "v", Size: image.MiB, Allocation: image.Thick, BlockSize: 4096}); err != nil {
		t.Fatal(err)
	}
	golden, err := os.Create(filepath.Join(t.TempDir(), "golden.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer golden.Close()
	if err := golden.Truncate(2 * image.MiB); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.AddTemplate(t.Context(), image.TemplateSpec{Name: "golden", Size: 2 * image.MiB, BlockSize: 4096}, image.FileContent{
		File: golden, Path: golden.Name(), Length: 2 * image.MiB, Method: image.Copy,
	}); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); len(pool.Fragments()) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nobody counts extents")
		}
	}
	loops, err := loop.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer loops.Close()
	r := router.New(router.Config{Self: "a", Roster: noRoster{}, Claims: noClaims{}})
	if _, err := r.Orphans(t.Context()); err != nil {
		t.Fatal(err)
	}
	m := newMetrics(build{Version: "v1"})
	m.observe("CreateVolume", "OK", time.Second)
	m.node(store, loops)
	used := int64(1)
	m.problems(unwell{})
	m.volumes(machineOf{{
		ID: "a.b", Pool: "default", Name: "pvc-1", Allocated: 2, Device: "/dev/loop0", Used: &used, IO: &report.IO{Reads: 1},
		Problems: []report.Problem{{Kind: report.Degraded, Reason: "NotFullyAllocated"}},
	}, {ID: "a.small", Pool: "default", Allocated: 1}}, 1)
	m.trims(func() driver.TrimStats { return driver.TrimStats{} })
	m.links(func() (int, int) { return 1, 2 })
	m.flows(someCopies)
	m.router(r)

	problems, err := testutil.GatherAndLint(m.registry)
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	shown := map[string]string{}
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "csi_loop_") {
			continue
		}
		var labels []string
		for _, l := range f.GetMetric()[0].GetLabel() {
			labels = append(labels, l.GetName())
		}
		shown[f.GetName()] = kind(f) + " " + strings.Join(labels, " ")
	}
	text, err := os.ReadFile("../../docs/reference/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `(csi_loop_[a-z_]+)` \\| ([a-z]+) \\| ([^|]*)\\|").FindAllStringSubmatch(string(text), -1) {
		var labels []string
		for _, l := range regexp.MustCompile("`([a-z]+)`").FindAllStringSubmatch(row[3], -1) {
			labels = append(labels, l[1])
		}
		slices.Sort(labels)
		listed[row[1]] = row[2] + " " + strings.Join(labels, " ")
	}
	if !maps.Equal(shown, listed) {
		t.Errorf("shown: %q\nin docs/reference/metrics.md: %q", shown, listed)
	}
	if _, body := get(t, m.handler(), "/metrics"); !strings.Contains(body, `csi_loop_pool_templates{pool="default"} 1`) || !strings.Contains(body, `csi_loop_template_size_bytes{pool="default",template="golden"} 2.097152e+06`) {
		t.Error(body)
	}
	// The one with most blocks has metrics, and the other is counted.
	if _, body := get(t, m.handler(), "/metrics"); !strings.Contains(body, "csi_loop_volumes_not_shown 1\n") ||
		!strings.Contains(body, `csi_loop_volume_allocated_bytes{name="pvc-1",pool="default",volume="a.b"} 2`) || strings.Contains(body, "a.small") {
		t.Error(body)
	}
	if _, body := get(t, m.handler(), "/metrics"); !strings.Contains(body, `csi_loop_node_problem{kind="Degraded",reason="LoopDeviceLimit"} 1`) ||
		!strings.Contains(body, `csi_loop_pool_problem{kind="Degraded",pool="default",reason="VolumeRefused"} 1`) {
		t.Error(body)
	}
	if _, body := get(t, m.handler(), "/metrics"); !strings.Contains(body, `csi_loop_pool_absent{pool="gone"} 1`) || !strings.Contains(body, `csi_loop_pool_absent{pool="default"} 0`) {
		t.Error(body)
	}
}

// machineOf is a node with these volumes.
type machineOf []report.Volume

func (m machineOf) Report(context.Context) (report.Machine, error) {
	return report.Machine{Volumes: m}, nil
}

// unwell is a node with two problems of a pool that have one reason.
type unwell struct{}

func (unwell) Report(context.Context) (report.Machine, error) {
	refused := report.Problem{Kind: report.Degraded, Reason: "VolumeRefused"}
	return report.Machine{
		Problems: []report.Problem{{Kind: report.Degraded, Reason: "LoopDeviceLimit"}},
		Pools:    []report.Pool{{Name: "default", Problems: []report.Problem{refused, refused}}},
	}, nil
}

func kind(f *dto.MetricFamily) string { return strings.ToLower(f.GetType().String()) }

// someCopies are copies to and from other nodes, one of each under way.
func someCopies() (sent, received driver.FlowStats) {
	return driver.FlowStats{Bytes: 5, Done: 1, Running: []driver.FlowProgress{{Name: "a.b", Done: 3, Total: 4}}},
		driver.FlowStats{Bytes: 7, Failed: 2, Running: []driver.FlowProgress{{Name: "pvc-1", Done: 1, Total: 2}}}
}
