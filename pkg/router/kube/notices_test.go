package kube

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/csi-loop/csi-loop/internal/kubeapi/kubeapitest"
	"github.com/csi-loop/csi-loop/pkg/router"
)

// Only what is bound and of the driver counts, with the node of its affinity.
func TestBound(t *testing.T) {
	pv := func(name string, change func(*core.PersistentVolume)) *core.PersistentVolume {
		p := &core.PersistentVolume{
			ObjectMeta: meta.ObjectMeta{Name: name},
			Spec: core.PersistentVolumeSpec{
				PersistentVolumeSource: core.PersistentVolumeSource{CSI: &core.CSIPersistentVolumeSource{Driver: "d.io", VolumeHandle: "pool." + name}},
				ClaimRef:               &core.ObjectReference{Namespace: "shop", Name: "claim-" + name, UID: "u"},
				NodeAffinity: &core.VolumeNodeAffinity{Required: &core.NodeSelector{NodeSelectorTerms: []core.NodeSelectorTerm{{
					MatchExpressions: []core.NodeSelectorRequirement{{Key: "topology.d.io/node", Operator: core.NodeSelectorOpIn, Values: []string{"n1"}}},
				}}}},
			},
			Status: core.PersistentVolumeStatus{Phase: core.VolumeBound},
		}
		if change != nil {
			change(p)
		}
		return p
	}
	client := fake.NewClientset(
		pv("a", nil),
		pv("b", func(p *core.PersistentVolume) { p.Spec.NodeAffinity = nil }),
		pv("c", func(p *core.PersistentVolume) { p.Status.Phase = core.VolumeReleased }),
		pv("d", func(p *core.PersistentVolume) { p.Spec.CSI.Driver = "other" }),
		pv("e", func(p *core.PersistentVolume) { p.Spec.CSI = nil }),
		pv("f", func(p *core.PersistentVolume) {
			e := &p.Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions[0]
			e.Values = []string{"n1", "n2"}
		}),
	)
	got, err := NewNotices(t.Context(), kubeapitest.Of(client), "d.io").Bound(t.Context())
	must(t, err)
	want := []router.Bound{
		{Volume: "pool.a", Node: "n1", Namespace: "shop", Name: "claim-a", UID: "u"},
		{Volume: "pool.b", Namespace: "shop", Name: "claim-b", UID: "u"},
		{Volume: "pool.f", Namespace: "shop", Name: "claim-f", UID: "u"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// What is told is an event on the claim; the same again is counted in the same event.
func TestTellMakesEvents(t *testing.T) {
	client := fake.NewClientset()
	ctx, cancel := context.WithCancel(t.Context())
	n := NewNotices(ctx, kubeapitest.Of(client), "d.io")
	over := make(chan struct{})
	go func() {
		defer close(over)
		n.Run(ctx)
	}()
	defer func() { cancel(); <-over }()
	b := router.Bound{Namespace: "shop", Name: "data", UID: "u"}
	eventually := func(want string) {
		t.Helper()
		var got string
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			list, err := client.CoreV1().Events("shop").List(ctx, meta.ListOptions{})
			must(t, err)
			var all strings.Builder
			for _, e := range list.Items {
				fmt.Fprintf(&all, "%s %s/%s %s %s %s %s x%d\n", e.Source.Component, e.InvolvedObject.Kind, e.InvolvedObject.Name, e.InvolvedObject.UID, e.Type, e.Reason, e.Message, e.Count)
			}
			if got = all.String(); got == want {
				return
			}
		}
		t.Errorf("%swant\n%s", got, want)
	}
	n.Tell(b, router.Notice{Reason: "ImageMissing", Message: "gone"})
	eventually("d.io PersistentVolumeClaim/data u Warning ImageMissing gone x1\n")
	n.Tell(b, router.Notice{Reason: "ImageMissing", Message: "gone"})
	eventually("d.io PersistentVolumeClaim/data u Warning ImageMissing gone x2\n")
}
