package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

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
	namespace        string // of claims; "" for all
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
	// Known is false of a volume that only Kubernetes knows: its node is away, or does
	// not have it.
	Known bool `json:"known"`
}

// everything is one look at the cluster.
type everything struct {
	report  report.Cluster
	volumes []volume
	notes   []string // what could not be looked at
	time    time.Time
}

// look asks the controller and Kubernetes. What one of them does not say is noted; it is
// an error when nothing can be said.
func (k *cluster) look(ctx context.Context) (*everything, error) {
	e := &everything{time: time.Now()}
	var reportErr error
	if e.report, reportErr = k.report(ctx); reportErr != nil {
		e.notes = append(e.notes, reportErr.Error())
	}
	pvs, err := k.client.PersistentVolumes().List(ctx, meta.ListOptions{})
	if err != nil {
		if reportErr != nil {
			return nil, reportErr
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
	users := map[string][]string{}
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
			}
		}
	}
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
	for _, n := range e.report.Nodes {
		for _, r := range n.Volumes {
			v := volume{Volume: r, Node: n.Name, NodeState: n.State, Known: true}
			if pv := owners[r.ID]; pv != nil {
				own(&v, pv)
				delete(owners, r.ID)
			}
			e.volumes = append(e.volumes, v)
		}
	}
	states := map[string]string{}
	for _, n := range e.report.Nodes {
		states[n.Name] = n.State
	}
	for i := range pvs { // in their order; the map has none
		pv := &pvs[i]
		s := pv.Spec.CSI
		if s == nil || owners[s.VolumeHandle] != pv {
			continue
		}
		size := pv.Spec.Capacity[core.ResourceStorage]
		v := volume{Volume: report.Volume{ID: s.VolumeHandle, Name: pv.Name, Size: size.Value(), Filesystem: s.FSType}, Node: nodeOf(pv)}
		if v.NodeState = states[v.Node]; v.NodeState == report.Linked {
			v.Problems = []report.Problem{{Kind: report.Inaccessible, Reason: "NotFound", Message: "its node does not have it, or did not say so: " + v.Node}}
		}
		own(&v, pv)
		e.volumes = append(e.volumes, v)
	}
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
	var notes []string
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
