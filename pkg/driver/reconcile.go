package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/loop"
)

// Reconcile brings what an earlier process left into a state that requests can
// work on. It must return before the first request is served. It compares the
// stage records with the kernel, and
//
//   - thaws the filesystems that a crash left frozen;
//   - holds the devices of staged raw block volumes again;
//   - ends what a crash cut in the middle: what is bound or mounted for a staging that
//     was never recorded as done is taken down, unless a pod has it; a read-only
//     device that nobody published is detached;
//   - forgets records of stagings that the kernel does not know (a reboot);
//   - ends mappings of encrypted volumes that were never made whole;
//   - removes inline ephemeral volumes whose pods are gone.
//
// Devices and mounts that belong to no record are reported when they show an
// image of ours, and left alone.
func (d *Driver) Reconcile(ctx context.Context) error {
	all, silent, err := d.table.Survey(ctx)
	if err != nil {
		return fmt.Errorf("reconcile: %w", err)
	}
	for _, i := range silent {
		klog.FromContext(ctx).Info("A loop device does not say what it shows: the filesystem of its file hangs", "device", i.Path, "file", i.BackingPath)
	}
	errs := []error{d.thawLeft(ctx)}
	explained := make(map[loop.Ref]bool)
	for _, r := range d.state.list() {
		if err := d.reconcileRecord(ctx, r, all, silent, explained); err != nil {
			errs = append(errs, fmt.Errorf("reconcile volume %q: %w", r.VolumeID, err))
		}
	}
	d.reportUnexplained(ctx, all, explained)
	if err := d.sweepMappings(ctx); err != nil {
		errs = append(errs, fmt.Errorf("reconcile mappings: %w", err))
	}
	if err := d.sweepEphemeral(ctx); err != nil {
		errs = append(errs, fmt.Errorf("reconcile inline ephemeral volumes: %w", err))
	}
	// One volume that cannot be reconciled must not keep the others from being
	// served: its own calls will meet the same error and report it.
	if err := errors.Join(errs...); err != nil {
		klog.FromContext(ctx).Error(err, "Some volumes could not be reconciled")
	}
	d.ready.Do(func() {
		d.startTuning(ctx)
		d.startSweeping(ctx)
		close(d.up)
	})
	return nil
}

// reconcileRecord settles one record against all bound devices, and adds those
// that it explains.
func (d *Driver) reconcileRecord(ctx context.Context, r stageRecord, all, silent []loop.Info, explained map[loop.Ref]bool) error {
	if r.Device.none() && !r.Ephemeral {
		if done, err := d.endUnfinished(ctx, r); err != nil || done {
			return err
		}
	}
	var err error
	switch {
	case r.Block:
		err = d.reconcileBlock(ctx, &r, all, silent)
	case r.Device.none():
		r, err = d.stagingRecord(ctx, r.VolumeID, r.StagingPath)
	}
	if err != nil {
		return err
	}
	for _, b := range r.devices() {
		explained[b.ref()] = true
	}
	live, err := d.stagingAlive(ctx, r)
	if err != nil {
		return err
	}
	if live {
		klog.FromContext(ctx).Info("Adopted", "volume", r.VolumeID, "device", r.Device.Number, "path", r.StagingPath)
		err := d.adopt(ctx, r)
		d.applyTuning(ctx, r.VolumeID)
		return err
	}
	return d.forget(ctx, r)
}

// adopt lets the loop manager count the devices of a staging. Those of raw block
// volumes are held by now; the mount keeps that of a filesystem.
func (d *Driver) adopt(ctx context.Context, r stageRecord) error {
	if r.Block {
		return d.releaseReadDevice(ctx, r)
	}
	if r.Device.encrypted() { // a crash may have come between the mount and this
		if err := d.crypt.CloseLast(r.Device.Mapping); err != nil {
			return err
		}
	}
	dev, err := d.loops.Hold(ctx, r.Device.ref())
	if err != nil {
		return err
	}
	return dev.Close()
}

// reconcileBlock finds the devices of a raw block volume that a crash kept from
// being written down, and holds those that are bound.
func (d *Driver) reconcileBlock(ctx context.Context, r *stageRecord, all, silent []loop.Info) error {
	if r.Device.none() || r.ReadPending {
		name := imageName
		if r.Mapped != nil {
			name = ""
		}
		silent = slices.DeleteFunc(slices.Clone(silent), func(i loop.Info) bool { return i.Ref == r.Device.ref() })
		if err := d.mayBeShown(silent, r.VolumeID, name); err != nil {
			return err
		}
	}
	before := *r
	for _, i := range all {
		switch {
		case i.Autoclear || i.Image != r.Image || i.Tag != d.tagOf(r.VolumeID, r.Mapped != nil),
			i.Ref == r.Device.ref(), i.Ref == r.ReadDevice.ref():
			continue
		}
		b, err := d.recoveredBinding(ctx, i, *r)
		switch {
		case err != nil:
			return err
		case r.Device.none() && i.ReadOnly == r.ReadOnly:
			r.Device = b
		case r.ReadPending && i.ReadOnly && !r.ReadOnly:
			r.ReadDevice, r.ReadPending = b, false
		}
	}
	if before.Device != r.Device || before.ReadDevice != r.ReadDevice || before.ReadPending != r.ReadPending {
		d.state.note(ctx, *r)
	}
	for _, b := range r.devices() {
		// One that was cleared goes by itself, and must not be held.
		if _, err := d.ensureHeld(ctx, b, r.Image); err != nil && !errors.Is(err, loop.ErrBusy) {
			return err
		}
	}
	return nil
}

// forget drops the record of a staging that is gone, unless something of it is
// left: a mount at one of its targets (the node of a raw block volume there does
// not keep the device bound, and the target can only be unpublished by who knows
// it), or a device that waits for its last user.
func (d *Driver) forget(ctx context.Context, r stageRecord) error {
	left, err := d.publicationsLeft(ctx, r)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		klog.FromContext(ctx).Info("The device of a published volume is gone", "volume", r.VolumeID, "device", r.Device.Number, "targets", left)
		return nil
	}
	if err := d.dropReadDevice(ctx, &r); err != nil {
		return err
	}
	if r.Encrypted && !r.Device.none() {
		if err := d.takeDown(ctx, r); err != nil {
			return err
		}
	}
	_, bound, err := d.loopStatus(ctx, r.Device, r.Image)
	if err != nil {
		return err
	}
	if bound {
		klog.FromContext(ctx).Info("The device of a volume that is not mounted any more is still in use", "volume", r.VolumeID, "device", r.Device.Number)
		d.state.note(ctx, r)
		return nil
	}
	klog.FromContext(ctx).Info("Forgetting a staging that is gone", "volume", r.VolumeID, "path", r.StagingPath)
	return d.state.drop(r.VolumeID)
}

// takeDown ends the mapping and the device of an encrypted volume that is staged no more.
// Nobody uses them, or they stay, as the kernel shows then.
func (d *Driver) takeDown(ctx context.Context, r stageRecord) error {
	err := errors.Join(d.letGo(r.Device.ref()), d.closeMappings(ctx, r.Device, r.Image))
	switch {
	case errors.Is(err, crypt.ErrBusy):
		return nil
	case err != nil:
		return err
	case !r.Block:
		_ = d.loops.WaitUnbound(ctx, r.Device.ref())
		return nil
	}
	if err := d.loops.Detach(ctx, r.Device.ref()); !errors.Is(err, loop.ErrBusy) {
		return err
	}
	return nil
}

// reportUnexplained names the devices over images of our pools that no record
// explains: attached by hand, or staged before the state directory was lost. They
// may be in use, so nothing is done to them; a call for their volume that finds
// our tag on them makes the record anew.
func (d *Driver) reportUnexplained(ctx context.Context, all []loop.Info, explained map[loop.Ref]bool) {
	byImage := make(map[loop.FileID]loop.Info)
	for _, i := range all {
		if !explained[i.Ref] {
			byImage[i.Image] = i
		}
	}
	if len(byImage) == 0 {
		return
	}
	for _, v := range d.images.List() {
		pool, ok := d.images.Pool(v.Pool)
		if !ok {
			continue
		}
		dev, ino, err := pool.ImageInode(ctx, v.ID)
		if err != nil {
			continue // the volume's health tells
		}
		if i, ok := byImage[loop.FileID{Dev: dev, Ino: ino}]; ok {
			klog.FromContext(ctx).Info("Image is attached and no record says why; it is left alone", "volume", v.ID, "device", i.Path, "tag", i.Tag)
		}
	}
}
