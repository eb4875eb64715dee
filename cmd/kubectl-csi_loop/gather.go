package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"

	"github.com/csi-loop/csi-loop/internal/kubeapi"
	"github.com/csi-loop/csi-loop/pkg/report"
)

// cluster is where everything is asked.
type cluster struct {
	client           kubeapi.Interface
	dynamic          dynamic.Interface
	install, service string
	driver           string
	namespace        string // of claims and pods; "" for all
	node             string // of which is asked; "" for all
}

// report asks the controller what is on the nodes.
func (k *cluster) report(ctx context.Context) (r report.Cluster, err error) {
	text, err := k.client.GetFromService(ctx, k.install, k.service, "http", "report")
	if err != nil {
		return r, fmt.Errorf("the controller does not answer: %w (is csi-loop in the namespace %q, see --csi-loop-namespace, and may you get services/proxy there?)", err, k.install)
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return r, fmt.Errorf("the controller's report: %w", err)
	}
	return r, nil
}

// volume is a volume with whose it is.
type volume struct {
	report.Volume

	Node      string   `json:"node,omitempty"`
	NodeState string   `json:"nodeState,omitempty"`
	PV        string   `json:"persistentVolume,omitempty"`
	Namespace string   `json:"namespace,omitempty"`
	Claim     string   `json:"claim,omitempty"`
	Pods      []string `json:"pods,omitempty"`
	Class     string   `json:"storageClass,omitempty"`
	// Inline is the name that a pod gives its inline ephemeral volume; it has no claim.
	Inline string `json:"inline,omitempty"`
	// Unanswered says why nothing is known of a volume whose node should have told.
	Unanswered string `json:"unanswered,omitempty"`
	// Known is false of a volume that only Kubernetes knows: its node is away, or does
	// not have it.
	Known bool `json:"known"`
}

// everything is one look at the cluster.
type everything struct {
	report  report.Cluster
	volumes []volume
	notes   []string // what could not be looked at
	// reportErr is why there is no report.
	reportErr error
}

// look asks the controller and Kubernetes. What one of them does not say is noted; it is
// an error when nothing can be said.
func (k *cluster) look(ctx context.Context) (*everything, error) {
	e := &everything{}
	if e.report, e.reportErr = k.report(ctx); e.reportErr != nil {
		e.notes = append(e.notes, e.reportErr.Error())
	}
	e.notes = append(e.notes, k.silent(e.report.Nodes)...)
	pvs, err := k.client.PersistentVolumes().List(ctx, meta.ListOptions{})
	if err != nil {
		if e.reportErr != nil {
			return nil, e.reportErr
		}
		e.notes = append(e.notes, "whose the volumes are cannot be told: "+err.Error())
		pvs = &core.PersistentVolumeList{}
	}
	pods, err := k.client.Pods(k.namespace).List(ctx, meta.ListOptions{})
	if err != nil {
		e.notes = append(e.notes, "which pods use the volumes cannot be told: "+err.Error())
		pods = &core.PodList{}
	}
	e.join(pvs.Items, pods.Items, k.driver)
	return e, nil
}

// join puts volumes and their owners together.
func (e *everything) join(pvs []core.PersistentVolume, pods []core.Pod, driver string) {
	users, inline := usersOf(pods, driver)
	owners := map[string]*core.PersistentVolume{}
	for i := range pvs {
		if s := pvs[i].Spec.CSI; s != nil && s.Driver == driver {
			owners[s.VolumeHandle] = &pvs[i]
		}
	}
	own := func(v *volume, pv *core.PersistentVolume) {
		v.PV, v.Class = pv.Name, pv.Spec.StorageClassName
		if ref := pv.Spec.ClaimRef; ref != nil {
			v.Namespace, v.Claim = ref.Namespace, ref.Name
			v.Pods = users[ref.Namespace+"/"+ref.Name]
		}
	}
	nodes := map[string]report.Node{}
	for _, n := range e.report.Nodes {
		nodes[n.Name] = n
		for _, r := range n.Volumes {
			v := volume{Volume: r, Node: n.Name, NodeState: n.State, Known: true}
			if pv := owners[r.ID]; pv != nil {
				own(&v, pv)
				delete(owners, r.ID)
			} else if r.Ephemeral {
				v.ownInline(inline)
			}
			e.volumes = append(e.volumes, v)
		}
	}
	for i := range pvs { // in their order; the map has none
		pv := &pvs[i]
		s := pv.Spec.CSI
		if s == nil || owners[s.VolumeHandle] != pv {
			continue
		}
		size := pv.Spec.Capacity[core.ResourceStorage]
		v := volume{Volume: report.Volume{ID: s.VolumeHandle, Name: pv.Name, Size: size.Value(), Filesystem: s.FSType}, Node: nodeOf(pv)}
		n := nodes[v.Node]
		v.NodeState = n.State
		switch {
		case e.reportErr != nil:
			v.Unanswered = "the controller did not answer"
		case n.State == report.Linked && n.Error != "": // what it said may not be all
			v.Unanswered = "its node " + n.Name + " did not answer: " + n.Error
		case n.State == report.Linked:
			v.Problems = []report.Problem{{Kind: report.Inaccessible, Reason: "NotFound", Message: "its node does not have it: " + v.Node + "; mount its pool's disk there, or restore it from a backup"}}
		}
		own(&v, pv)
		e.volumes = append(e.volumes, v)
	}
}

// inlineVolume is what a pod says of an inline ephemeral volume.
type inlineVolume struct{ namespace, pod, name string }

// usersOf tells which pods use a claim, by namespace and name, and which has an inline
// volume of the driver, by its handle.
func usersOf(pods []core.Pod, driver string) (users map[string][]string, inline map[string]inlineVolume) {
	users, inline = map[string][]string{}, map[string]inlineVolume{}
	for i := range pods {
		p := &pods[i]
		for _, v := range p.Spec.Volumes {
			switch {
			case v.PersistentVolumeClaim != nil:
				key := p.Namespace + "/" + v.PersistentVolumeClaim.ClaimName
				users[key] = append(users[key], p.Name)
			case v.Ephemeral != nil:
				key := p.Namespace + "/" + p.Name + "-" + v.Name
				users[key] = append(users[key], p.Name)
			case v.CSI != nil && v.CSI.Driver == driver:
				inline[inlineHandle(string(p.UID), v.Name)] = inlineVolume{p.Namespace, p.Name, v.Name}
			}
		}
	}
	return users, inline
}

// inlineHandle is the volume ID that the kubelet makes for an inline ephemeral volume, of
// the pod's UID and the volume's name in the pod.
func inlineHandle(podUID, name string) string {
	return fmt.Sprintf("csi-%x", sha256.Sum256([]byte(podUID+name)))
}

// ownInline finds the pod of an inline ephemeral volume. In a pool the kubelet's ID is the
// volume's name; of one that is staged and whose pool is absent, it is the ID.
func (v *volume) ownInline(inline map[string]inlineVolume) {
	of, ok := inline[v.Name]
	if !ok {
		of, ok = inline[v.ID]
	}
	if ok {
		v.Namespace, v.Pods, v.Inline = of.namespace, []string{of.pod}, of.name
	}
}

// mostNotes bounds how many nodes that failed are told of one by one.
const mostNotes = 10

// failed says which linked nodes did not answer, or not wholly.
func (k *cluster) failed(nodes []report.Node) []string {
	var notes []string
	for _, n := range nodes {
		if (k.node == "" || n.Name == k.node) && n.State == report.Linked && n.Error != "" {
			notes = append(notes, fmt.Sprintf("node %s did not answer, so what it has is not, or not all, shown: %s", n.Name, n.Error))
		}
	}
	if more := len(notes) - mostNotes; more > 0 {
		notes = append(notes[:mostNotes], fmt.Sprintf("%d more nodes did not answer: see kubectl csi-loop nodes", more))
	}
	return notes
}

// silent says too which nodes have no link. What only these nodes know is not shown.
func (k *cluster) silent(nodes []report.Node) []string {
	notes := k.failed(nodes)
	var away []string
	for _, n := range nodes {
		if (k.node == "" || n.Name == k.node) && n.State != report.Linked {
			away = append(away, n.Name+" ("+n.State+")")
		}
	}
	if more := len(away) - mostNotes; more > 0 {
		away = append(away[:mostNotes], fmt.Sprintf("%d more", more))
	}
	if len(away) > 0 {
		notes = append(notes, "what is on nodes without a link is not shown: "+strings.Join(away, ", "))
	}
	return notes
}

// nodeOf is the node that a PersistentVolume says its data is on.
func nodeOf(pv *core.PersistentVolume) string {
	if a := pv.Spec.NodeAffinity; a != nil && a.Required != nil {
		for _, term := range a.Required.NodeSelectorTerms {
			for _, e := range term.MatchExpressions {
				if strings.HasSuffix(e.Key, "/node") && len(e.Values) == 1 {
					return e.Values[0]
				}
			}
		}
	}
	return ""
}

// snapshot is a snapshot with whose it is.
type snapshot struct {
	report.Snapshot

	Node      string `json:"node"`
	Namespace string `json:"namespace,omitempty"`
	Object    string `json:"volumeSnapshot,omitempty"`
	SourcePV  string `json:"sourceVolume,omitempty"`
}

// snapshots joins the nodes' snapshots with VolumeSnapshotContents.
func (k *cluster) snapshots(ctx context.Context) ([]snapshot, []string, error) {
	r, err := k.report(ctx)
	if err != nil {
		return nil, nil, err
	}
	notes := k.silent(r.Nodes)
	owners := map[string][2]string{}
	contents, err := k.dynamic.Resource(schema.GroupVersionResource{Group: "snapshot.storage.k8s.io", Version: "v1", Resource: "volumesnapshotcontents"}).List(ctx, meta.ListOptions{})
	if err != nil {
		notes, contents = append(notes, "whose the snapshots are cannot be told: "+err.Error()), &unstructured.UnstructuredList{}
	}
	for _, c := range contents.Items {
		handle, _, _ := unstructured.NestedString(c.Object, "status", "snapshotHandle")
		namespace, _, _ := unstructured.NestedString(c.Object, "spec", "volumeSnapshotRef", "namespace")
		name, _, _ := unstructured.NestedString(c.Object, "spec", "volumeSnapshotRef", "name")
		owners[handle] = [2]string{namespace, name}
	}
	all := []snapshot{}
	for _, n := range r.Nodes {
		names := map[string]string{}
		for _, v := range n.Volumes {
			names[v.ID] = v.Name
		}
		for _, s := range n.Snapshots {
			owner := owners[s.ID]
			all = append(all, snapshot{Snapshot: s, Node: n.Name, Namespace: owner[0], Object: owner[1], SourcePV: names[s.Source]})
		}
	}
	return all, notes, nil
}
