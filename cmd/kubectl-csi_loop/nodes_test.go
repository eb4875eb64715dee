package main

import (
	"encoding/json"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/csi-loop/csi-loop/pkg/report"
)

// change changes what the controller of an API says of its nodes.
func (a *api) change(f func(nodes []report.Node) []report.Node) {
	c, is := a.pages[proxied].(report.Cluster)
	if !is {
		panic("no report")
	}
	c.Nodes = f(c.Nodes)
	a.pages[proxied] = c
}

// newSilentAPI has a node that told a part before it failed.
func newSilentAPI() *api {
	a := newAPI()
	a.change(func(nodes []report.Node) []report.Node {
		nodes[0].Error = "deadline exceeded"
		nodes[0].Volumes = nodes[0].Volumes[:1]
		return nodes
	})
	return a
}

// What a node did not say is unknown, not gone.
func TestNodeThatDoesNotAnswer(t *testing.T) {
	out, notes, err := run(t, newSilentAPI(), "volumes", "-o", "wide")
	if err != nil || !strings.Contains(notes, "node n1 did not answer") || !strings.Contains(notes, "deadline exceeded") || !strings.Contains(notes, "n2 (away)") {
		t.Error(notes, err)
	}
	if got, want := fields(t, out, "data-db-2"), "shop data-db-2 - n1 - 0 - - unknown pvc-d - raw - - - p.d its node n1 did not answer: deadline exceeded"; got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
	if got, want := fields(t, out, "data-db-0"), "db-0 n1 /dev/loop7 1Gi 1Gi ########.. 88% ok"; !strings.Contains(got, want) {
		t.Errorf("what it said is not shown: %s", got)
	}
	if out, _, err = run(t, newSilentAPI(), "volumes", "--unhealthy"); err != nil || strings.Contains(out, "data-db-2") || !strings.Contains(out, "data-db-1") {
		t.Errorf("unhealthy: %v\n%s", err, out)
	}
	out, _, err = run(t, newSilentAPI(), "volumes", "data-db-2", "-o", "json")
	var volumes []volume
	if jsonErr := json.Unmarshal([]byte(out), &volumes); err != nil || jsonErr != nil || len(volumes) != 1 || volumes[0].Known || len(volumes[0].Problems) > 0 || !strings.Contains(volumes[0].Unanswered, "deadline exceeded") {
		t.Errorf("%v, %v\n%s", err, jsonErr, out)
	}
}

// Every list says whom it did not hear.
func TestListsNoteNodesThatAreMissing(t *testing.T) {
	const failed, away = "node n1 did not answer", "what is on nodes without a link is not shown: n2 (away)"
	for _, command := range []string{"volumes", "snapshots", "templates", "copies"} {
		_, notes, err := run(t, newSilentAPI(), command)
		if err != nil || !strings.Contains(notes, failed) || !strings.Contains(notes, away) {
			t.Errorf("%s: %v\n%s", command, err, notes)
		}
		if _, notes, err = run(t, newSilentAPI(), command, "--node=n2"); err != nil || strings.Contains(notes, failed) || !strings.Contains(notes, away) {
			t.Errorf("%s of one node: %v\n%s", command, err, notes)
		}
	}
	if _, notes, err := run(t, newSilentAPI(), "nodes"); err != nil || !strings.Contains(notes, failed) || strings.Contains(notes, away) {
		t.Errorf("nodes: %v\n%s", err, notes)
	}
	if _, notes, err := run(t, newAPI(), "nodes"); err != nil || notes != "" {
		t.Errorf("nodes that all answered: %v\n%s", err, notes)
	}
}

// Hundreds of nodes are counted, not listed.
func TestNotesAreFew(t *testing.T) {
	var nodes []report.Node
	for range 100 {
		nodes = append(nodes, report.Node{Name: "bad", State: report.Linked, Error: "no"}, report.Node{Name: "gone", State: report.Away})
	}
	notes := (&cluster{}).silent(nodes)
	if len(notes) != mostNotes+2 || !strings.HasPrefix(notes[mostNotes], "90 more nodes did not answer") || strings.Count(notes[mostNotes+1], "gone") != mostNotes || !strings.HasSuffix(notes[mostNotes+1], ", 90 more") {
		t.Errorf("%q", notes)
	}
}

// --pool chooses pools in every form of output.
func TestNodesOfAPool(t *testing.T) {
	a := newAPI()
	a.change(func(nodes []report.Node) []report.Node {
		nodes[0].Pools = append(nodes[0].Pools, report.Pool{Name: "fast", ID: "f"})
		return append(nodes,
			report.Node{Name: "n3", State: report.Linked, Machine: report.Machine{Pools: []report.Pool{{Name: "other", ID: "o"}}}},
			report.Node{Name: "n4", State: report.Linked, Error: "deadline exceeded"})
	})
	out, _, err := run(t, a, "nodes", "--pool=fast", "-o", "json")
	var nodes []report.Node
	if jsonErr := json.Unmarshal([]byte(out), &nodes); err != nil || jsonErr != nil {
		t.Fatal(err, jsonErr)
	}
	var got []string
	for _, n := range nodes {
		got = append(got, n.Name)
		for _, p := range n.Pools {
			got = append(got, p.Name)
		}
	}
	// Of n2 and n4 it is not known which pools they have.
	if text := strings.Join(got, " "); text != "n1 fast n2 n4" {
		t.Errorf("%s, want n1 fast n2 n4", text)
	}
	if out, _, err = run(t, a, "nodes", "--pool=fast", "-o", "yaml"); err != nil || strings.Contains(out, "name: other") || strings.Contains(out, "name: default") {
		t.Errorf("%v\n%s", err, out)
	}
	if out, _, err = run(t, a, "nodes", "--pool=fast"); err != nil || strings.Contains(out, "n3") || strings.Contains(out, "default") || !strings.Contains(out, "fast") {
		t.Errorf("%v\n%s", err, out)
	}
}

// An inline ephemeral volume is found by the ID that the kubelet makes of its pod's UID and
// of the volume's name there.
func TestInlineVolumesHaveTheirPod(t *testing.T) {
	// printf a-uidscratch | sha256sum, and of b-uidscratch.
	const here, absent = "csi-27895b02d96339475fbb95784c76ff0927cd68115659b1947ce9b934def3cfcc", "csi-dd22b0cb36af1de1e1f6b5474e6a257dcbfcf462988ad040147bc1fd861badc8"
	pod := func(uid types.UID, name, driver string) core.Pod {
		p := core.Pod{ObjectMeta: meta.ObjectMeta{Namespace: "shop", Name: name, UID: uid}}
		p.Spec.Volumes = []core.Volume{{Name: "scratch", VolumeSource: core.VolumeSource{CSI: &core.CSIVolumeSource{Driver: driver}}}}
		return p
	}
	a := newAPI()
	a.pages["/api/v1/pods"] = core.PodList{Items: []core.Pod{pod("a-uid", "build-1", "csi-loop.io"), pod("b-uid", "build-2", "csi-loop.io"), pod("c-uid", "other", "else")}}
	a.change(func(nodes []report.Node) []report.Node {
		nodes[0].Volumes = append(nodes[0].Volumes,
			report.Volume{ID: "p.inline", Name: here, Pool: "default", Ephemeral: true, Size: 1 << 20, State: report.Published},
			report.Volume{ID: absent, Ephemeral: true, Size: 1 << 20, State: report.Published}, // its pool is absent
			report.Volume{ID: "p.left", Name: "csi-0", Pool: "default", Ephemeral: true, Size: 1 << 20})
		return nodes
	})
	out, _, err := run(t, a, "volumes", "-o", "wide")
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]string{
		"p.inline": "shop inline:scratch build-1 n1", absent: "shop inline:scratch build-2 n1", "p.left": "- - - n1",
	} {
		if got := fields(t, out, id); !strings.HasPrefix(got, want+" ") {
			t.Errorf("%s\nwant\n%s", got, want)
		}
	}
	if out, _, err = run(t, a, "volumes", "p.inline", "-o", "json"); err != nil || !strings.Contains(out, `"inline": "scratch"`) || !strings.Contains(out, `"build-1"`) {
		t.Errorf("%v\n%s", err, out)
	}
}
