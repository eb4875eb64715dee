package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/router"
	"github.com/csi-loop/csi-loop/test/docs"
)

// noRoster is a cluster whose one node has not linked.
type noRoster struct{}

func (noRoster) Registered() ([]string, bool) { return []string{"n1"}, true }
func (noRoster) Exists(string) bool           { return true }

// noClaims knows of nothing.
type noClaims struct{}

func (noClaims) References(context.Context) (router.References, error) {
	return router.References{}, nil
}

// controllerSocket runs a controller, and returns the path of its socket.
func controllerSocket(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "a") //nolint:usetesting // its path is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "csi.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	r := router.New(router.Config{Self: "a", Driver: "csi-loop.io", Roster: noRoster{}, Claims: noClaims{}})
	go func() { done <- r.ServeCSI(ctx, l, time.Second) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	return path
}

// run is a command line within this process.
func run(t *testing.T, in string, args ...string) (out, errOut string, err error) {
	t.Helper()
	var o, e bytes.Buffer
	c := newCommand(&o, &e)
	c.SetIn(strings.NewReader(in))
	c.SetArgs(args)
	err = c.ExecuteContext(t.Context())
	return o.String(), e.String(), err
}

func TestOperator(t *testing.T) {
	socket := controllerSocket(t)
	out, _, err := run(t, "", "nodes", "--endpoint="+socket)
	if err != nil || !strings.Contains(out, "n1") || !strings.Contains(out, router.NodeMissing) {
		t.Error(out, err)
	}
	t.Setenv("CSI_ENDPOINT", "unix://"+socket)
	out, _, err = run(t, "", "nodes", "-o", "json")
	var nodes []router.Node
	if e := json.Unmarshal([]byte(out), &nodes); err != nil || e != nil || !slices.ContainsFunc(nodes, func(n router.Node) bool { return n.Name == "n1" }) {
		t.Error(out, err, e)
	}
	out, errOut, err := run(t, "", "orphans")
	if err != nil || !strings.Contains(out, "No orphans on the nodes that were looked at") || !strings.Contains(errOut, "n1") {
		t.Error(out, errOut, err)
	}
	out, _, err = run(t, "", "orphans", "-o=json")
	var report router.OrphanReport
	if e := json.Unmarshal([]byte(out), &report); err != nil || e != nil || report.Orphans == nil {
		t.Error(out, err, e)
	}
	if _, _, err = run(t, "", "orphans", "remove", "x.y", "--yes"); err == nil || exitCode(err) != exitFailure || !strings.Contains(err.Error(), "not an orphan") {
		t.Error(err)
	}
	for _, args := range [][]string{{"orphans", "remove"}, {"orphans", "x"}, {"orphans", "-o=yaml"}, {"nodes", "x"}, {"pool", "show"}, {"pool", "reinit"}, {"pool", "x"}} {
		if _, _, err := run(t, "", args...); err == nil || exitCode(err) != exitUsage {
			t.Errorf("%q: %v", args, err)
		}
	}
	t.Setenv("CSI_ENDPOINT", "")
	if _, _, err = run(t, "", "orphans"); err == nil || exitCode(err) != exitUsage || !strings.Contains(err.Error(), "--endpoint") {
		t.Error(err)
	}
	if _, _, err = run(t, "", "orphans", "--endpoint="+socket+"x", "--timeout=5s"); err == nil || exitCode(err) != exitFailure {
		t.Error(err)
	}
}

func TestTables(t *testing.T) {
	var b bytes.Buffer
	orphanTable(&b, router.OrphanReport{Orphans: []router.Orphan{{ID: "p.v", Node: "n", Size: 1 << 30, Reason: router.OrphanElsewhere, PV: "pvc-1", Since: time.Now().Add(-time.Hour)}}})
	nodeTable(&b, []router.Node{{
		Name: "n", State: router.NodeLinked, Since: time.Now(), Version: "v1",
		Pools: []router.NodePool{{ID: "p", Name: "default", Volumes: 3, Free: 1 << 20}, {ID: "q", Name: "fast", ServedBy: "m"}},
	}})
	poolTable(&b, []image.Summary{{Path: "/p", ID: "x", Filesystem: "xfs", Served: true}})
	for _, want := range []string{"p.v", "1Gi", "60m", "elsewhere: its claim has pvc-1", "1Mi", "copy of the pool on m", "/p", "yes"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is not in\n%s", want, b.String())
		}
	}
	// A node's words do not move the cursor, nor make lines.
	b.Reset()
	orphanTable(&b, router.OrphanReport{Orphans: []router.Orphan{{ID: "p.v\x1b[2J\nn\tp.w", Node: "n", Reason: router.OrphanElsewhere}}})
	nodeTable(&b, []router.Node{{Name: "n", State: router.NodeLinked, Version: "v1\r\x9b"}})
	if strings.Count(b.String(), "\n") != 4 || strings.ContainsAny(b.String(), "\x1b\r\u009b") {
		t.Errorf("%q", b.String())
	}
}

func TestChoose(t *testing.T) {
	report := router.OrphanReport{Orphans: []router.Orphan{{ID: "p.a"}, {ID: "p.b"}}}
	if chosen, err := choose(report, []string{"p.b"}); err != nil || len(chosen) != 1 || chosen[0].ID != "p.b" {
		t.Error(chosen, err)
	}
	if chosen, err := choose(report, []string{"p.a", "p.c"}); err == nil || chosen != nil || !strings.Contains(err.Error(), "p.c") {
		t.Error(chosen, err)
	}
}

func TestConfirm(t *testing.T) {
	for answer, ok := range map[string]bool{"yes\n": true, " yes \n": true, "yes": true, "y\n": false, "\n": false, "": false, "yes please\n": false} {
		var out bytes.Buffer
		if err := confirm(strings.NewReader(answer), &out, "Sure?"); (err == nil) != ok || !strings.Contains(out.String(), "Sure?") {
			t.Errorf("%q: %v", answer, err)
		}
	}
	null, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if err := confirm(null, &bytes.Buffer{}, "Sure?"); err == nil || exitCode(err) != exitUsage || !strings.Contains(err.Error(), "--yes") {
		t.Error(err)
	}
}

func TestPoolCommands(t *testing.T) {
	dir := t.TempDir() + "/p"
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, _, err := run(t, "", "pool", "show", dir); err == nil || exitCode(err) != exitFailure || !strings.Contains(err.Error(), "not a pool") {
		t.Error(err)
	}
	store, err := image.Open(t.Context(), []image.Config{{Name: "default", Path: dir}}, image.WithRefresh(0))
	if err != nil {
		t.Fatal(err)
	}
	id := store.Pools()[0].ID()
	out, _, err := run(t, "", "pool", "show", dir, dir+"/none")
	if err == nil || !strings.Contains(out, id) || !strings.Contains(out, "yes") {
		t.Error(out, err)
	}
	if _, _, err = run(t, "", "pool", "reinit", dir, "--yes"); err == nil || !strings.Contains(err.Error(), "serves it") {
		t.Error(err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	if out, _, err = run(t, "no\n", "pool", "reinit", dir); err == nil || !strings.Contains(out, `"`+id+`."`) || !strings.Contains(err.Error(), "nothing was changed") {
		t.Error(out, err)
	}
	shown := strings.Fields(docs.Take(t, "../..")("csi-loop pool reinit DIR"))
	if out, _, err = run(t, "yes\n", append(shown[1:3], dir)...); err != nil || !strings.Contains(out, "pool.json.old-"+id) {
		t.Error(out, err)
	}
	out, _, err = run(t, "", "pool", "show", "-o=json", dir)
	var pools []image.Summary
	if e := json.Unmarshal([]byte(out), &pools); err != nil || e != nil || len(pools) != 1 || pools[0].ID == id || pools[0].Served {
		t.Error(out, err, e)
	}
}
