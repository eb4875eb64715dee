package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/csi-loop/csi-loop/pkg/report"
)

const proxied = "/api/v1/namespaces/csi-loop/services/http:csi-loop-controller:http/proxy/report"

// broken is a page that fails now, and may not later.
const broken = "broken"

// api is as much of an API server as the plugin asks.
type api struct {
	pages map[string]any // by path; what is not there is forbidden
	asked []string
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.asked = append(a.asked, r.Method+" "+r.URL.Path)
	page, ok := a.pages[r.URL.Path]
	if f, is := page.(func() any); is {
		page = f()
	}
	if text, is := page.(string); is && text == broken {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if !ok {
		w.WriteHeader(http.StatusForbidden)
		page = meta.Status{TypeMeta: meta.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Reason: "Forbidden", Code: http.StatusForbidden, Message: "you may not"}
	}
	if err := json.NewEncoder(w).Encode(page); err != nil {
		panic(err)
	}
}

func newAPI() *api {
	used := int64(900 << 20)
	pv := func(name, handle, node, claim string) core.PersistentVolume {
		v := core.PersistentVolume{ObjectMeta: meta.ObjectMeta{Name: name}}
		v.Spec.CSI = &core.CSIPersistentVolumeSource{Driver: "csi-loop.io", VolumeHandle: handle}
		v.Spec.ClaimRef = &core.ObjectReference{Namespace: "shop", Name: claim}
		v.Spec.NodeAffinity = &core.VolumeNodeAffinity{Required: &core.NodeSelector{NodeSelectorTerms: []core.NodeSelectorTerm{{
			MatchExpressions: []core.NodeSelectorRequirement{{Key: "topology.csi-loop.io/node", Operator: core.NodeSelectorOpIn, Values: []string{node}}},
		}}}}
		return v
	}
	other := pv("other", "p.a", "n1", "x")
	other.Spec.CSI.Driver = "else"
	pod := core.Pod{ObjectMeta: meta.ObjectMeta{Namespace: "shop", Name: "db-0"}}
	pod.Spec.Volumes = []core.Volume{{Name: "data", VolumeSource: core.VolumeSource{PersistentVolumeClaim: &core.PersistentVolumeClaimVolumeSource{ClaimName: "data-db-0"}}}}
	return &api{pages: map[string]any{
		proxied: report.Cluster{Nodes: []report.Node{
			{Name: "n1", State: report.Linked, Machine: report.Machine{
				Time:     time.Unix(1000, 0),
				Problems: []report.Problem{{Kind: report.Degraded, Reason: "LoopDeviceLimit", Message: "none left"}},
				Pools:    []report.Pool{{Name: "default", ID: "p", Size: 100 << 30, Used: 95 << 30, Available: 1 << 30, Volumes: 2, Snapshots: 1, Problems: []report.Problem{{Kind: report.Degraded, Reason: "ReserveUsed"}}}},
				Volumes: []report.Volume{
					{ID: "p.a", Name: "pvc-a", Pool: "default", Size: 1 << 30, Allocated: 1 << 30, Filesystem: "ext4", State: report.Published, Device: "/dev/loop7", Used: &used, IO: &report.IO{WriteBytes: 1 << 20, Writes: 10}},
					{ID: "p.b", Name: "pvc-b", Pool: "default", Size: 1 << 30, State: report.Available, Problems: []report.Problem{{Kind: report.DataLoss, Reason: "ImageMissing", Message: "gone\x1b[31m"}}},
				},
				Templates: []report.Template{{ID: "p.golden", Name: "golden", Pool: "default", Size: 2 << 30, Volumes: 3}},
				Copies: []report.Copy{
					{Name: "pvc-e", Pool: "default", Kind: report.Copying, Done: 1 << 30, Total: 4 << 30}, {Name: "p.a", Kind: report.Sending, Done: 1 << 20},
				},
				Snapshots: []report.Snapshot{{ID: "p.s", Name: "snapshot-1", Source: "p.a", Pool: "default", Size: 1 << 30}},
			}},
			{Name: "n2", State: report.Away},
		}},
		"/api/v1/persistentvolumes": core.PersistentVolumeList{Items: []core.PersistentVolume{
			pv("pvc-a", "p.a", "n1", "data-db-0"), pv("pvc-c", "q.c", "n2", "data-db-1"), pv("pvc-d", "p.d", "n1", "data-db-2"), other,
		}},
		"/api/v1/pods": core.PodList{Items: []core.Pod{pod}},
		"/apis/snapshot.storage.k8s.io/v1/volumesnapshotcontents": map[string]any{
			"kind": "VolumeSnapshotContentList", "apiVersion": "snapshot.storage.k8s.io/v1", "metadata": map[string]any{},
			"items": []any{map[string]any{
				"kind": "VolumeSnapshotContent", "apiVersion": "snapshot.storage.k8s.io/v1", "metadata": map[string]any{"name": "c"},
				"spec": map[string]any{"volumeSnapshotRef": map[string]any{"namespace": "shop", "name": "nightly"}}, "status": map[string]any{"snapshotHandle": "p.s"},
			}},
		},
	}}
}

// run calls the plugin.
func run(t *testing.T, a *api, args ...string) (out, errOut string, err error) {
	t.Helper()
	srv := httptest.NewServer(a)
	defer srv.Close()
	var o, e bytes.Buffer
	c := newCommand(&o, &e)
	c.SetArgs(append([]string{"--kubeconfig=" + configOf(t, srv.URL)}, args...))
	err = c.ExecuteContext(context.Background())
	return o.String(), e.String(), err
}

// fields are the columns of the row that has all the words.
func fields(t *testing.T, out string, words ...string) string {
	t.Helper()
	for line := range strings.Lines(out) {
		row := strings.Join(strings.Fields(line), " ")
		all := true
		for _, w := range words {
			all = all && strings.Contains(row, w)
		}
		if all {
			return row
		}
	}
	t.Errorf("no row with %q in\n%s", words, out)
	return ""
}

func TestTables(t *testing.T) {
	for name, c := range map[string]struct {
		args  []string
		words []string
		want  string
	}{
		"a pool, nearly full":              {[]string{"nodes"}, []string{"n1"}, "n1 linked default 100Gi #########. 95% 1Gi 2 1 LoopDeviceLimit,ReserveUsed"},
		"a node that is away":              {[]string{"nodes"}, []string{"n2"}, "n2 away - - - - - - -"},
		"a volume with its pod":            {[]string{"volumes"}, []string{"data-db-0"}, "shop data-db-0 db-0 n1 /dev/loop7 1Gi 1Gi ########.. 88% ok"},
		"a volume that nobody owns":        {[]string{"volumes"}, []string{"ImageMissing"}, "- - - n1 - 1Gi 0 - ImageMissing"},
		"a volume on a node that is away":  {[]string{"volumes"}, []string{"data-db-1"}, "shop data-db-1 - n2 - 0 - - node away"},
		"a volume that its node lacks":     {[]string{"volumes"}, []string{"data-db-2"}, "shop data-db-2 - n1 - 0 - - NotFound"},
		"a snapshot":                       {[]string{"snapshots"}, []string{"nightly"}, "shop nightly n1 default pvc-a 1Gi 0 -"},
		"a template":                       {[]string{"templates"}, []string{"golden"}, "n1 default golden 2Gi raw 3 -"},
		"a copy":                           {[]string{"copies"}, []string{"pvc-e"}, "n1 copy default pvc-e 1Gi 4Gi ##........ 25%"},
		"a copy of unknown size":           {[]string{"copies"}, []string{"send"}, "n1 send - p.a 1Mi - -"},
		"wide, without control characters": {[]string{"volumes", "-o", "wide"}, []string{"ImageMissing"}, "- - - n1 - 1Gi 0 - ImageMissing - default raw available - - p.b gone?[31m"},
	} {
		t.Run(name, func(t *testing.T) {
			out, _, err := run(t, newAPI(), c.args...)
			if err != nil {
				t.Fatal(err)
			}
			if got := fields(t, out, c.words...); got != c.want {
				t.Errorf("%s\nwant\n%s", got, c.want)
			}
			if strings.Contains(out, "\x1b") {
				t.Error("colours, and it is no terminal")
			}
		})
	}
}

func TestChoices(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		want int // volumes
	}{
		"all": {nil, 4}, "a node's": {[]string{"--node=n2"}, 1}, "a pool's": {[]string{"--pool=default"}, 2}, "unhealthy": {[]string{"--unhealthy"}, 3},
		"by claim": {[]string{"data-db-0"}, 1}, "by ID": {[]string{"p.b"}, 1}, "none": {[]string{"nothing"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			out, _, err := run(t, newAPI(), append([]string{"volumes", "-o", "json"}, c.args...)...)
			var volumes []volume
			if jsonErr := json.Unmarshal([]byte(out), &volumes); err != nil || jsonErr != nil || len(volumes) != c.want {
				t.Errorf("%d volumes, want %d: %v, %v\n%s", len(volumes), c.want, err, jsonErr, out)
			}
		})
	}
	out, _, err := run(t, newAPI(), "nodes", "-o", "yaml")
	if err != nil || !strings.Contains(out, "name: n1") {
		t.Error(out, err)
	}
	if _, _, err := run(t, newAPI(), "nodes", "-o", "xml"); err == nil {
		t.Error("any output is taken")
	}
}

// What the user may not read is left out with a word; nothing is an error.
func TestRightsThatAreMissing(t *testing.T) {
	a := newAPI()
	delete(a.pages, "/api/v1/pods")
	out, notes, err := run(t, a, "volumes")
	if err != nil || !strings.Contains(notes, "which pods use the volumes") || !strings.Contains(out, "data-db-0") {
		t.Error(out, notes, err)
	}
	delete(a.pages, proxied)
	if out, notes, err = run(t, a, "volumes"); err != nil || !strings.Contains(notes, "services/proxy") || fields(t, out, "data-db-1") != "shop data-db-1 - n2 - 0 - - unknown" {
		t.Error(out, notes, err)
	}
	delete(a.pages, "/api/v1/persistentvolumes")
	if _, _, err = run(t, a, "volumes"); err == nil {
		t.Error("nothing can be said, and that is no error")
	}
	for _, asked := range a.asked {
		if !strings.HasPrefix(asked, "GET ") {
			t.Error(asked)
		}
	}
}

// Colours are for terminals: the widths of columns do not change with them.
func TestColours(t *testing.T) {
	rows := func() [][]cell { return [][]cell{{text("A"), text("B")}, {{"bad", red}, text("x")}} }
	var with, without bytes.Buffer
	if err := table(&with, true, rows()); err != nil {
		t.Fatal(err)
	}
	if err := table(&without, false, rows()); err != nil {
		t.Fatal(err)
	}
	stripped := strings.NewReplacer(string(red), "", string(bold), "", reset, "").Replace(with.String())
	if stripped != without.String() || !strings.Contains(with.String(), string(red)+"bad"+reset) {
		t.Errorf("%q, %q", with.String(), without.String())
	}
}

// kubectl and shells complete commands, and nodes of the cluster.
func TestCompletion(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"commands": {[]string{"__complete", "vol"}, "volumes"},
		"nodes":    {[]string{"__complete", "volumes", "--node", "n"}, "n2"},
		"a script": {[]string{"completion", "bash"}, "complete -o default -F __start_kubectl-csi_loop kubectl-csi_loop"},
		"kubectl":  {[]string{"kubectl-completion"}, "exec kubectl-csi_loop __complete"},
	} {
		t.Run(name, func(t *testing.T) {
			args := c.args
			if args[0] == "__complete" { // cobra parses what follows it as the line to be completed
				srv := httptest.NewServer(newAPI())
				defer srv.Close()
				t.Setenv("KUBECONFIG", configOf(t, srv.URL))
			}
			out, _, err := complete(t, args...)
			if err != nil || !strings.Contains(out, c.want) {
				t.Error(out, err)
			}
		})
	}
}

// configOf writes a kubeconfig.
func configOf(t *testing.T, server string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "kubeconfig")
	config := fmt.Sprintf(`{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":""}}],"clusters":[{"name":"c","cluster":{"server":%q}}]}`, server)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func complete(t *testing.T, args ...string) (string, string, error) {
	t.Helper()
	var o, e bytes.Buffer
	c := newCommand(&o, &e)
	c.SetArgs(args)
	err := c.ExecuteContext(context.Background())
	return o.String(), e.String(), err
}
