package driver

import (
	"context"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// NodeUnpublishVolume unmounts and removes the target. What is not published is
// success; what is mounted there but is not this volume is left alone.
func (s *nodeServer) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	d, id := s.d, req.GetVolumeId()
	if id == "" {
		return nil, invalidf("volume_id is missing")
	}
	target, err := cleanPath("target_path", req.GetTargetPath())
	if err != nil {
		return nil, err
	}
	unlock, err := d.lockVolume(id, "NodeUnpublishVolume")
	if err != nil {
		return nil, err
	}
	defer unlock()
	release, err := d.trims.hold(ctx, id) // the target of an inline volume is its filesystem's only mount
	if err != nil {
		return nil, err
	}
	defer release()
	if err := d.unpublish(ctx, id, target); err != nil {
		return nil, fmt.Errorf("unpublish volume %q at %q: %w", id, target, err)
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

func (d *Driver) unpublish(ctx context.Context, id, target string) error {
	r, known := d.state.get(id)
	r.VolumeID = id
	device, shown, err := d.mayUnpublish(ctx, r, target)
	if err != nil {
		return err
	}
	if d.isInlineAt(r, target) {
		// With a mount there mayUnpublish has proven that it shows the volume.
		_, mounted, err := d.mtab.At(target)
		if err == nil && mounted {
			err = d.thawLast(ctx, target)
		}
		if err != nil {
			return err
		}
	}
	if err := d.mounts.Remove(ctx, target); err != nil {
		return err
	}
	switch {
	case r.Ephemeral && r.StagingPath != target:
		return nil // it is elsewhere, and stays
	case !known || r.Ephemeral:
		return d.removeEphemeral(ctx, id, target, device)
	}
	before := r.clone()
	delete(r.Targets, target)
	delete(r.Targets, shown) // as recovered
	if len(r.Targets) != len(before.Targets) {
		d.state.note(ctx, r)
	}
	d.unlimit(ctx, before, target) // now that nobody sets the limits again
	return d.releaseReadDevice(ctx, r)
}

// isInlineAt says whether the target is where an inline ephemeral volume is mounted: its
// filesystem's only mount. Where the record was lost, that of the volume says it.
func (d *Driver) isInlineAt(r stageRecord, target string) bool {
	if r.Ephemeral {
		return r.StagingPath == target
	}
	v, ok := d.images.Find(r.VolumeID)
	return ok && v.Ephemeral != nil && v.Ephemeral.Target == target
}

// mayUnpublish refuses to unmount what is not the volume. It returns the device
// behind what is there (the record's when nothing is) and its path as the kernel
// shows it.
func (d *Driver) mayUnpublish(ctx context.Context, r stageRecord, target string) (b binding, shown string, err error) {
	m, mounted, err := d.mtab.At(target)
	if err != nil || !mounted {
		return r.Device, target, err
	}
	// A mount of the device that the record lists for the target is ours to take
	// away, whatever the number is now bound to: that touches no device.
	if ours, err := d.publishedAt(r, target); err != nil || ours {
		return r.Device, m.Path, err
	}
	b, err = d.deviceOf(ctx, r, m)
	return b, m.Path, err
}

// releaseReadDevice detaches the read-only device of a raw block volume when
// nobody is shown it any more.
func (d *Driver) releaseReadDevice(ctx context.Context, r stageRecord) error {
	if r.ReadDevice.none() {
		return nil
	}
	// Of a binding that is gone, mounts of the node are those of whoever got the number,
	// which nobody can while we have it open.
	_, bound, err := d.status(ctx, r.ReadDevice, r.Image)
	if err != nil {
		return err
	}
	if bound || d.holds(r.ReadDevice.ref()) {
		left, err := d.mountsOf(r.ReadDevice)
		if err != nil || len(left) > 0 {
			return err // a later unpublish or unstage detaches it
		}
	}
	if err := d.dropReadDevice(ctx, &r); err != nil {
		return err
	}
	d.state.note(ctx, r)
	return nil
}
