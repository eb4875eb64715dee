package kube

import (
	"context"
	"slices"
	"time"

	storage "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	listers "k8s.io/client-go/listers/storage/v1"
)

// Roster knows the nodes of the cluster, by their CSINode objects, which it watches.
type Roster struct {
	driver string
	lister listers.CSINodeLister
	synced func() bool
	start  func(ctx context.Context)
}

// NewRoster makes a roster of the nodes with the driver. Run starts it.
func NewRoster(client kubernetes.Interface, driver string) *Roster {
	factory := informers.NewSharedInformerFactory(client, 0)
	nodes := factory.Storage().V1().CSINodes()
	r := &Roster{driver: driver, lister: nodes.Lister(), synced: nodes.Informer().HasSynced}
	r.start = func(ctx context.Context) {
		factory.Start(ctx.Done())
		<-ctx.Done()
		factory.Shutdown()
	}
	return r
}

// Run watches until ctx ends.
func (r *Roster) Run(ctx context.Context) { r.start(ctx) }

// Registered is router.Roster.
func (r *Roster) Registered() ([]string, bool) {
	if !r.synced() {
		return nil, false
	}
	all, err := r.lister.List(labels.Everything())
	if err != nil {
		return nil, false
	}
	var names []string
	for _, n := range all {
		if slices.ContainsFunc(n.Spec.Drivers, func(d storage.CSINodeDriver) bool { return d.Name == r.driver }) {
			names = append(names, n.Name)
		}
	}
	return names, true
}

// Exists is router.Roster. While nodes are not known, every node may exist.
func (r *Roster) Exists(node string) bool {
	if !r.synced() {
		return true
	}
	_, err := r.lister.Get(node)
	return err == nil
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
