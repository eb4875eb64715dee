package kube

import (
	"context"
	"slices"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/pager"
	"k8s.io/client-go/tools/record"

	"github.com/csi-loop/csi-loop/internal/kubeapi"
	"github.com/csi-loop/csi-loop/pkg/router"
)

// Notices tells of problems by events on claims. Those that come again are counted, and
// many on one claim are held back, by the recorder of client-go.
type Notices struct {
	client      kubeapi.Interface
	driver      string
	broadcaster record.EventBroadcaster
	recorder    record.EventRecorder
}

// NewNotices makes one for the volumes of a driver. Run ends it.
func NewNotices(ctx context.Context, client kubeapi.Interface, driver string) *Notices {
	b := record.NewBroadcaster(record.WithContext(ctx))
	b.StartRecordingToSink(eventSink{ctx, client})
	return &Notices{client: client, driver: driver, broadcaster: b, recorder: b.NewRecorder(kubeapi.Scheme, core.EventSource{Component: driver})}
}

// Run waits until ctx ends, and stops sending. What cannot be sent is dropped after some
// attempts.
func (n *Notices) Run(ctx context.Context) {
	<-ctx.Done()
	n.broadcaster.Shutdown()
}

// Bound is router.Notices.
func (n *Notices) Bound(ctx context.Context) ([]router.Bound, error) {
	var all []router.Bound
	err := pager.New(func(ctx context.Context, o meta.ListOptions) (runtime.Object, error) {
		return n.client.PersistentVolumes().List(ctx, o)
	}).EachListItem(ctx, meta.ListOptions{}, func(o runtime.Object) error {
		pv, ok := o.(*core.PersistentVolume)
		if !ok || pv.Spec.CSI == nil || pv.Spec.CSI.Driver != n.driver || pv.Spec.ClaimRef == nil || pv.Status.Phase != core.VolumeBound {
			return nil
		}
		c := pv.Spec.ClaimRef
		all = append(all, router.Bound{
			Volume: pv.Spec.CSI.VolumeHandle, Node: nodeOf(pv, "topology."+n.driver+"/node"),
			Namespace: c.Namespace, Name: c.Name, UID: string(c.UID),
		})
		return nil
	})
	return all, err
}

// nodeOf is the one node that a PersistentVolume may be used on, or "".
func nodeOf(pv *core.PersistentVolume, key string) string {
	if pv.Spec.NodeAffinity == nil || pv.Spec.NodeAffinity.Required == nil {
		return ""
	}
	var nodes []string
	for _, term := range pv.Spec.NodeAffinity.Required.NodeSelectorTerms {
		for _, e := range term.MatchExpressions {
			if e.Key == key && e.Operator == core.NodeSelectorOpIn {
				nodes = append(nodes, e.Values...)
			}
		}
	}
	if nodes = slices.Compact(nodes); len(nodes) != 1 {
		return ""
	}
	return nodes[0]
}

// Tell is router.Notices.
func (n *Notices) Tell(b router.Bound, notice router.Notice) {
	kind := core.EventTypeWarning
	if notice.Solved {
		kind = core.EventTypeNormal
	}
	n.recorder.Event(&core.ObjectReference{
		APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: b.Namespace, Name: b.Name, UID: types.UID(b.UID),
	}, kind, notice.Reason, notice.Message)
}

// eventSink writes events into their namespaces.
type eventSink struct {
	ctx    context.Context //nolint:containedctx // record.EventSink has none in its calls
	client kubeapi.Interface
}

func (s eventSink) Create(e *core.Event) (*core.Event, error) {
	return s.client.Events(e.Namespace).Create(s.ctx, e, meta.CreateOptions{})
}

func (s eventSink) Update(e *core.Event) (*core.Event, error) {
	return s.client.Events(e.Namespace).Update(s.ctx, e, meta.UpdateOptions{})
}

func (s eventSink) Patch(e *core.Event, data []byte) (*core.Event, error) {
	return s.client.Events(e.Namespace).Patch(s.ctx, e.Name, types.StrategicMergePatchType, data, meta.PatchOptions{})
}
