package driver

import (
	"context"
	"errors"
	"fmt"

	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
)

// Reconcile brings what an earlier process left into a state that requests can
// work on. It must return before the first request is served. It compares the
// stage records with the kernel, and
//
//   - holds the devices of staged raw block volumes again;
//   - finishes what a crash cut in the middle: a device bound for a staging that
//     was never recorded as done is recorded, a read-only device that nobody
//     published is detached;
//   - forgets records of stagings that the kernel does not know (a reboot);
//   - removes inline ephemeral volumes whose pods are gone.
//
// Devices and mounts that belong to no record are reported when they show an
// image of ours, and left alone.
func (d *Driver) Reconcile(ctx context.Context) error {
	all, err := d.table.FindAll(ctx)
	if err != nil {
		return fmt.Errorf("reconcile: %w", err)
	}
	byImage := make(map[loop.FileID][]loop.Info)
	for _, info := range all {
		byImage[info.Image] = append(byImage[info.Image], info)
	}
	var errs []error
	recorded := make(map[loop.FileID]bool)
	for _, r := range d.state.list() {
		recorded[r.Image] = true
		if err := d.reconcileRecord(ctx, r, byImage[r.Image]); err != nil {
			errs = append(errs, fmt.Errorf("reconcile volume %q: %w", r.VolumeID, err))
		}
	}
	if err := d.reportUnrecorded(ctx, byImage, recorded); err != nil {
		errs = append(errs, err)
	}
	if err := d.sweepEphemeral(ctx); err != nil {
		errs = append(errs, fmt.Errorf("reconcile inline ephemeral volumes: %w", err))
	}
	// One volume that cannot be reconciled must not keep the others from being
	// served: its own calls will meet the same error and report it.
	if err := errors.Join(errs...); err != nil {
		klog.FromContext(ctx).Error(err, "Some volumes could not be reconciled")
	}
	d.ready.Do(func() { close(d.up) })
	return nil
}

// reconcileRecord settles one record against the devices over its image.
func (d *Driver) reconcileRecord(ctx context.Context, r stageRecord, bound []loop.Info) error {
	if r.Block {
		return d.reconcileBlock(ctx, r, bound)
	}
	if r.Device == (loop.Ref{}) {
		if err := d.completeRecord(ctx, &r); err != nil {
			return err
		}
	}
	live, err := d.stagingAlive(ctx, r)
	if err != nil {
		return err
	}
	if live {
		klog.FromContext(ctx).Info("Adopted", "volume", r.VolumeID, "device", r.Device.Number, "path", r.StagingPath)
		return d.adopt(ctx, r.Device)
	}
	for _, info := range bound {
		if info.Ref == r.Device {
			// Unmounted, but something keeps the device open: unstage will wait for it.
			klog.FromContext(ctx).Info("Volume is no longer mounted but its device is still in use", "volume", r.VolumeID, "device", info.Path)
			return nil
		}
	}
	return d.forget(ctx, r)
}

// forget drops the record of a staging that is gone, unless something is still
// mounted at one of its targets: a raw block volume's node there does not keep the
// device bound, and the target can only be unpublished by who knows it.
func (d *Driver) forget(ctx context.Context, r stageRecord) error {
	left, err := d.publicationsLeft(ctx, r)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		klog.FromContext(ctx).Info("The device of a published volume is gone", "volume", r.VolumeID, "device", r.Device.Number, "targets", left)
		return nil
	}
	klog.FromContext(ctx).Info("Forgetting a staging that is gone", "volume", r.VolumeID, "path", r.StagingPath)
	return d.state.drop(r.VolumeID)
}

// completeRecord adds the device to the record of a filesystem that was mounted
// when a crash came before that was written down.
func (d *Driver) completeRecord(ctx context.Context, r *stageRecord) error {
	m, mounted, err := d.mtab.At(r.StagingPath)
	if err != nil || !mounted {
		return err
	}
	info, err := d.deviceOf(ctx, *r, m)
	if err != nil {
		return err
	}
	r.Device, r.FSType = info.Ref, m.FSType
	return d.state.put(*r)
}

// adopt lets the loop manager count a device that stays bound, and closes the
// descriptor: the mount keeps it bound.
func (d *Driver) adopt(ctx context.Context, ref loop.Ref) error {
	dev, err := d.loops.Hold(ctx, ref)
	if err != nil {
		return err
	}
	return dev.Close()
}

// reconcileBlock finds the devices of a raw block volume by image and kind, not
// by the recorded number, which a crash may have kept from being written.
func (d *Driver) reconcileBlock(ctx context.Context, r stageRecord, bound []loop.Info) error {
	wasPending := r.ReadPending
	main, found := pick(bound, r.Device, func(i loop.Info) bool {
		return r.Device == (loop.Ref{}) && i.ReadOnly == r.ReadOnly && i.Tag == tagOf(r.VolumeID, r.Mapped != nil)
	})
	if !found {
		return d.forget(ctx, r)
	}
	if err := d.holdRef(ctx, main.Ref); err != nil {
		return err
	}
	r.Device, r.ReadPending = main.Ref, false
	second, found := pick(bound, r.ReadDevice, func(i loop.Info) bool {
		return wasPending && r.ReadDevice == (loop.Ref{}) && i.Ref != main.Ref && i.ReadOnly && i.Tag == tagOf(r.VolumeID, r.Mapped != nil)
	})
	r.ReadDevice = second.Ref
	if found {
		if err := d.holdRef(ctx, second.Ref); err != nil {
			return err
		}
	}
	if err := d.state.put(r); err != nil {
		return err
	}
	klog.FromContext(ctx).Info("Adopted", "volume", r.VolumeID, "device", main.Path, "path", r.StagingPath)
	return d.releaseReadDevice(ctx, r)
}

// pick finds the device of ref, or the one that like accepts.
func pick(bound []loop.Info, ref loop.Ref, like func(loop.Info) bool) (loop.Info, bool) {
	for _, i := range bound {
		if ref != (loop.Ref{}) && i.Ref == ref || like(i) {
			return i, true
		}
	}
	return loop.Info{}, false
}

// holdRef opens a bound device and keeps it open.
func (d *Driver) holdRef(ctx context.Context, ref loop.Ref) error {
	dev, err := d.loops.Hold(ctx, ref)
	if err != nil {
		return err
	}
	d.hold(dev)
	return nil
}

// reportUnrecorded looks for devices over images of our pools that no record
// explains: attached by hand, or staged before the state directory was lost.
// They are in use or may be, so they are named and nothing is done to them.
func (d *Driver) reportUnrecorded(ctx context.Context, byImage map[loop.FileID][]loop.Info, recorded map[loop.FileID]bool) error {
	if len(byImage) == 0 {
		return nil
	}
	for _, v := range d.images.List() {
		key, err := d.imageOf(ctx, v.ID)
		if errors.Is(err, image.ErrDamaged) {
			continue // the volume's health tells
		}
		if err != nil {
			return err
		}
		if recorded[key] {
			continue
		}
		for _, info := range byImage[key] {
			klog.FromContext(ctx).Info("Image is attached but not staged by this driver; it is left alone", "volume", v.ID, "device", info.Path)
		}
	}
	return nil
}
