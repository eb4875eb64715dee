package driver

import (
	"context"
	"fmt"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"
)

// NodeUnstageVolume unmounts the staging path and returns when the device is
// seen unbound. What is not staged is success.
func (s *nodeServer) NodeUnstageVolume(ctx context.Context, req *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	d, id := s.d, req.GetVolumeId()
	if id == "" {
		return nil, invalidf("volume_id is missing")
	}
	staging, err := cleanPath("staging_target_path", req.GetStagingTargetPath())
	if err != nil {
		return nil, err
	}
	unlock, err := d.lockVolume(id, "NodeUnstageVolume")
	if err != nil {
		return nil, err
	}
	defer unlock()
	release, err := d.trims.hold(ctx, id)
	if err != nil {
		return nil, err
	}
	defer release()
	r, err := d.stagingRecord(ctx, id, staging)
	if err != nil {
		return nil, fmt.Errorf("unstage volume %q: %w", id, err)
	}
	if r.Ephemeral || r.StagingPath != staging {
		return &csi.NodeUnstageVolumeResponse{}, nil // not staged there
	}
	if err := d.unstage(ctx, r); err != nil {
		return nil, fmt.Errorf("unstage volume %q: %w", id, err)
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

// unstage ends a staging: first it proves that no publication is left, since a
// detached device whose number is reused would show a pod another volume (fact 36).
func (d *Driver) unstage(ctx context.Context, r stageRecord) error {
	left, err := d.publicationsLeft(ctx, r)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return preconditionf("volume %q is still published at %q", r.VolumeID, left)
	}
	if r.Block {
		err = d.detachBlock(ctx, r)
	} else {
		err = d.unmountStaging(ctx, r)
	}
	if err != nil {
		return err
	}
	if err := d.state.drop(r.VolumeID); err != nil {
		return err
	}
	d.tuning.forget(r.VolumeID)
	return nil
}

// unmountStaging unmounts and waits until the device is free.
func (d *Driver) unmountStaging(ctx context.Context, r stageRecord) error {
	m, mounted, err := d.mtab.At(r.StagingPath)
	switch {
	case err != nil:
		return err
	case mounted && r.Device.shownBy(m):
		if err := d.thawLast(ctx, r.StagingPath); err != nil {
			return err
		}
		d.resetReadAhead(ctx, r, r.Device)
		if err := d.mounts.Unmount(ctx, r.StagingPath); err != nil {
			return err
		}
	case mounted:
		return preconditionf("%s is mounted at %q, not the volume", m.Source, r.StagingPath)
	}
	if r.Device.none() {
		return nil // never came to be
	}
	if r.Encrypted {
		if err := d.closeMappings(ctx, r.Device, r.Image); err != nil {
			return err
		}
	}
	return d.loops.WaitUnbound(ctx, r.Device.ref())
}

// thawLast thaws a volume's filesystem before its last mount goes. Frozen by its pod
// (fsfreeze), it would keep its device, and only a mount can thaw it (fact 67). No snapshot
// has it frozen: that holds the volume's lock. One that is dead cannot be opened, and need
// not be thawed; what cannot be asked for the moment, for want of descriptors, must stay
// mounted.
// Precondition: the volume is mounted there.
func (d *Driver) thawLast(ctx context.Context, path string) error {
	err := d.freezer.Thaw(path)
	if passes(err) {
		return fmt.Errorf("thaw what its pod may have frozen: %w", err)
	}
	if err != nil {
		klog.FromContext(ctx).V(2).Info("Cannot thaw", "path", path, "err", err.Error())
	}
	return nil
}

// detachBlock lets go of the devices of a raw block volume and clears them.
func (d *Driver) detachBlock(ctx context.Context, r stageRecord) error {
	for _, b := range r.devices() {
		d.resetReadAhead(ctx, r, b)
		if err := d.letGo(b.ref()); err != nil {
			return err
		}
		if r.Encrypted {
			if err := d.closeMappings(ctx, b, r.Image); err != nil {
				return d.sayHolders(err, fmt.Sprintf("dm-%d", b.Mapping.Number))
			}
		}
		if err := d.detach(ctx, b); err != nil {
			return err
		}
	}
	return nil
}

// publicationsLeft lists where a volume still is, besides its staging path.
// The publications that the record lists count as long as they are mounted. For a
// raw block volume every mount of a node of its devices counts, known or not: none
// of them keeps the device bound, so all must be gone before it is cleared
// (fact 36). Other mounts of a filesystem keep its device bound by themselves.
func (d *Driver) publicationsLeft(ctx context.Context, r stageRecord) ([]string, error) {
	var left []string
	for path := range r.Targets {
		there, err := d.publishedAt(r, path)
		if err != nil {
			return nil, err
		}
		if there {
			left = append(left, path)
		}
	}
	if r.Block {
		for _, b := range r.devices() {
			// Of a binding that is gone, mounts of the node are those of whoever
			// got the number, which nobody can while we have it open.
			_, bound, err := d.status(ctx, b, r.Image)
			if err != nil {
				return nil, err
			}
			if !bound && !d.holds(b.ref()) {
				continue
			}
			paths, err := d.mountsOf(b)
			if err != nil {
				return nil, err
			}
			left = append(left, paths...)
		}
	}
	slices.Sort(left)
	return slices.Compact(left), nil
}

// publishedAt asks the kernel whether the volume is at a target: with one of its
// devices, or with the one that the target got, which may be gone since.
func (d *Driver) publishedAt(r stageRecord, path string) (bool, error) {
	m, mounted, err := d.mtab.At(path)
	if err != nil || !mounted {
		return false, err
	}
	return r.Targets[path].Device.shownBy(m) || slices.ContainsFunc(r.devices(), func(b binding) bool { return b.shownBy(m) }), nil
}

// mountsOf lists where a device is mounted: its filesystem, or its node.
func (d *Driver) mountsOf(b binding) ([]string, error) {
	mounts, err := d.mtab.OfDevice(b.Device)
	if err != nil {
		return nil, err
	}
	paths := make([]string, len(mounts))
	for i, m := range mounts {
		paths[i] = m.Path
	}
	return paths, nil
}
