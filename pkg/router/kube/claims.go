package kube

import (
	"context"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/pager"

	"github.com/csi-loop/csi-loop/internal/kubeapi"
	"github.com/csi-loop/csi-loop/pkg/router"
)

// Claims reads which volumes of a driver Kubernetes has a use for.
type Claims struct {
	Client kubeapi.Interface
	Driver string
}

// References is router.Claims. It reads page by page, and keeps only what counts.
func (c *Claims) References(ctx context.Context) (router.References, error) {
	refs := router.References{PVs: map[string]string{}, Claims: map[string]string{}}
	err := pager.New(func(ctx context.Context, o meta.ListOptions) (runtime.Object, error) {
		return c.Client.PersistentVolumeClaims(meta.NamespaceAll).List(ctx, o)
	}).EachListItem(ctx, meta.ListOptions{}, func(o runtime.Object) error {
		if claim, ok := o.(*core.PersistentVolumeClaim); ok {
			refs.Claims[string(claim.UID)] = claim.Spec.VolumeName
		}
		return nil
	})
	if err != nil {
		return refs, err
	}
	err = pager.New(func(ctx context.Context, o meta.ListOptions) (runtime.Object, error) {
		return c.Client.PersistentVolumes().List(ctx, o)
	}).EachListItem(ctx, meta.ListOptions{}, func(o runtime.Object) error {
		pv, ok := o.(*core.PersistentVolume)
		if !ok {
			return nil
		}
		id := "" // another driver's; its name still says that a claim has it
		if source := pv.Spec.CSI; source != nil && source.Driver == c.Driver {
			id = source.VolumeHandle
		}
		refs.PVs[pv.Name] = id
		return nil
	})
	return refs, err
}
