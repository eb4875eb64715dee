package driver

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
)

// DeleteVolume removes a volume. One that is unknown is gone already; one that
// is staged or attached is refused.
func (s *controllerServer) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	d, id := s.d, req.GetVolumeId()
	if id == "" {
		return nil, invalidf("volume_id is missing")
	}
	pool, _, ok := d.images.Lookup(id)
	if !ok {
		return &csi.DeleteVolumeResponse{}, d.foreignPool(id)
	}
	unlock, err := d.lockVolume(id, "DeleteVolume")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := d.removable(ctx, pool, id); err != nil {
		return nil, err
	}
	klog.FromContext(ctx).Info("Removing volume", "volume", id, "pool", pool.Name())
	if err := pool.Remove(ctx, id); err != nil {
		return nil, fmt.Errorf("delete volume %q: %w", id, err)
	}
	if err := d.state.drop(id); err != nil { // a staging that came to nothing
		return nil, err
	}
	return &csi.DeleteVolumeResponse{}, nil
}

// removable refuses the removal of a volume that is in use.
func (d *Driver) removable(ctx context.Context, pool *image.Pool, id string) error {
	if v, err := d.images.Get(id); err == nil && v.Ephemeral != nil {
		return preconditionf("volume %q is the inline ephemeral volume of a pod and goes with it", id)
	}
	if r, ok := d.state.get(id); ok {
		live, err := d.stagingAlive(ctx, r)
		if err != nil {
			return err
		}
		if live {
			return preconditionf("volume %q is staged at %q", id, r.StagingPath)
		}
		left, err := d.publicationsLeft(ctx, r)
		if err != nil {
			return err
		}
		if len(left) > 0 {
			return preconditionf("volume %q is published at %q", id, left)
		}
	}
	return d.unattached(ctx, pool, id)
}

// unattached refuses a volume whose image a loop device shows.
func (d *Driver) unattached(ctx context.Context, pool *image.Pool, id string) error {
	f, err := pool.OpenImage(ctx, id, true)
	switch {
	case errors.Is(err, image.ErrNotFound):
		return nil
	case errors.Is(err, image.ErrDamaged):
		return d.unattachedDamaged(ctx, pool, id) // it must still be deletable
	case err != nil:
		return err
	}
	defer f.Close()
	bound, err := d.table.Find(ctx, f)
	if err != nil {
		return err
	}
	if len(bound) > 0 {
		return preconditionf("volume %q is attached to %s", id, bound[0].Path)
	}
	return nil
}

// unattachedDamaged is unattached for a volume whose image is not what it should
// be: a device may show what stands in its place.
func (d *Driver) unattachedDamaged(ctx context.Context, pool *image.Pool, id string) error {
	dev, ino, err := pool.ImageInode(ctx, id)
	if errors.Is(err, image.ErrNotFound) {
		return nil // no file that could be attached
	}
	if errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.ENOTDIR) {
		return nil // a link in the place of the directory: removal takes the link
	}
	if err != nil {
		return err
	}
	all, silent, err := d.table.Survey(ctx)
	if err != nil {
		return err
	}
	if err := d.mayBeShown(silent, id, imageName); err != nil {
		return err
	}
	for _, info := range all {
		if info.Image == (loop.FileID{Dev: dev, Ino: ino}) {
			return preconditionf("volume %q is attached to %s", id, info.Path)
		}
	}
	return nil
}
