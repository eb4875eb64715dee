package kube

import (
	"context"
	"slices"
	"time"

	storage "k8s.io/api/storage/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"

	"github.com/csi-loop/csi-loop/internal/kubeapi"
)

// Roster knows the nodes of the cluster, by their CSINode objects, which it watches.
type Roster struct {
	driver string
	nodes  cache.SharedIndexInformer
}

// NewRoster makes a roster of the nodes with the driver. Run starts it.
func NewRoster(client kubeapi.Interface, driver string) *Roster {
	nodes := client.CSINodes()
	return &Roster{driver: driver, nodes: cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o meta.ListOptions) (runtime.Object, error) {
			return nodes.List(ctx, o)
		},
		WatchFuncWithContext: nodes.Watch,
	}, client), &storage.CSINode{}, 0, cache.Indexers{})}
}

// Run watches until ctx ends.
func (r *Roster) Run(ctx context.Context) { r.nodes.RunWithContext(ctx) }

// Registered is router.Roster.
func (r *Roster) Registered() ([]string, bool) {
	if !r.nodes.HasSynced() {
		return nil, false
	}
	var names []string
	for _, o := range r.nodes.GetStore().List() {
		n, ok := o.(*storage.CSINode)
		if ok && slices.ContainsFunc(n.Spec.Drivers, func(d storage.CSINodeDriver) bool { return d.Name == r.driver }) {
			names = append(names, n.Name)
		}
	}
	return names, true
}

// Exists is router.Roster. While nodes are not known, every node may exist.
func (r *Roster) Exists(node string) bool {
	if !r.nodes.HasSynced() {
		return true
	}
	_, exists, err := r.nodes.GetStore().GetByKey(node)
	return exists && err == nil
}

// sleep waits for d, or for ctx.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
