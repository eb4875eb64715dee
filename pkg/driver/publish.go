package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// ephemeralKey is set by Kubernetes in the context of inline ephemeral volumes.
const ephemeralKey = kubernetesPrefix + "ephemeral"

// NodePublishVolume shows a staged volume at the target: its filesystem by a
// bind mount, a raw block volume by its device node. A read-only publication is
// read-only in the kernel: by the mount for a filesystem (fact 53), by a second,
// read-only loop device for a raw block volume.
func (s *nodeServer) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	d, id := s.d, req.GetVolumeId()
	if id == "" {
		return nil, invalidf("volume_id is missing")
	}
	target, err := cleanPath("target_path", req.GetTargetPath())
	if err != nil {
		return nil, err
	}
	a, err := parseAccess(req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	ephemeral := req.GetVolumeContext()[ephemeralKey] == "true"
	if !ephemeral && req.GetStagingTargetPath() == "" {
		return nil, preconditionf("staging_target_path is missing: stage volume %q first", id)
	}
	unlock, err := d.lockVolume(id, "NodePublishVolume")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if ephemeral {
		err = d.publishEphemeral(ctx, req, target, a)
	} else {
		err = d.publish(ctx, req, target, a)
	}
	if err != nil {
		return nil, fmt.Errorf("publish volume %q at %q: %w", id, target, err)
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// publish shows a staged volume at one more target.
func (d *Driver) publish(ctx context.Context, req *csi.NodePublishVolumeRequest, path string, a access) error {
	r, err := d.stagedRecord(ctx, req)
	if err != nil {
		return err
	}
	if r.Block != a.block {
		return invalidf("the volume is staged as %s", r.describe())
	}
	readOnly := req.GetReadonly() || a.readOnly()
	if r.ReadOnly {
		readOnly = true
	}
	target := targetRecord{ReadOnly: readOnly, Mode: a.mode.String()}
	if err := d.admit(&r, path, target, a); err != nil {
		return err
	}
	if a.block {
		return d.publishBlock(ctx, r, path, target)
	}
	return d.publishFilesystem(ctx, r, path, target, a.flags)
}

// stagedRecord returns the record of a volume that is staged at the staging
// path of the request, in the kernel and not only on paper.
func (d *Driver) stagedRecord(ctx context.Context, req *csi.NodePublishVolumeRequest) (stageRecord, error) {
	id := req.GetVolumeId()
	staging, err := cleanPath("staging_target_path", req.GetStagingTargetPath())
	if err != nil {
		return stageRecord{}, err
	}
	r, ok := d.state.get(id)
	if !ok {
		src, err := d.source(id, req.GetVolumeContext())
		if err != nil {
			return r, err
		}
		if r, err = d.recoverStaging(ctx, r, id, staging); err != nil {
			return r, err
		}
		r.Mapped, r.Mode, r.Flags = src.mapped, req.GetVolumeCapability().GetAccessMode().GetMode().String(), req.GetVolumeCapability().GetMount().GetMountFlags()
		ok = r.Device != (loop.Ref{})
		if ok && r.Block {
			for _, ref := range r.devices() {
				if err := d.holdRef(ctx, ref); err != nil {
					return r, err
				}
			}
		}
	}
	if !ok || r.Ephemeral {
		return r, preconditionf("the volume is not staged")
	}
	if r.StagingPath != staging {
		return r, preconditionf("the volume is staged at %q, not at %q", r.StagingPath, staging)
	}
	live, err := d.stagingAlive(ctx, r)
	if err != nil {
		return r, err
	}
	if !live {
		return r, preconditionf("the volume is no longer staged at %q: its loop device or mount is gone", staging)
	}
	return r, nil
}

// admit applies CSI's table for repeated and second publications. Targets that
// the kernel no longer shows are taken out of r.
func (d *Driver) admit(r *stageRecord, path string, want targetRecord, a access) error {
	for _, other := range slices.Sorted(maps.Keys(r.Targets)) {
		there, err := d.publishedAt(*r, other)
		if err != nil {
			return err
		}
		have := r.Targets[other]
		switch {
		case !there:
			delete(r.Targets, other)
		case other == path && !have.sameAs(want):
			return existsf("the volume is published there already as %s, the request asks for %s", have, want)
		case other != path && (a.exclusive() || exclusiveMode(have.Mode)):
			return preconditionf("the volume is published at %q and its access mode %s allows one target", other, a.mode)
		}
	}
	if r.Targets == nil {
		r.Targets = make(map[string]targetRecord)
	}
	r.Targets[path] = want
	return nil
}

// exclusiveMode is access.exclusive for a recorded mode.
func exclusiveMode(mode string) bool {
	return access{mode: csi.VolumeCapability_AccessMode_Mode(csi.VolumeCapability_AccessMode_Mode_value[mode])}.exclusive()
}

// publishedAt asks the kernel whether the volume is at a target: with one of its
// devices, or with the one that the target got, which may be gone since.
func (d *Driver) publishedAt(r stageRecord, path string) (bool, error) {
	m, mounted, err := d.mtab.At(path)
	if err != nil || !mounted {
		return false, err
	}
	number, ok := loopNumber(m)
	at := r.Targets[path].Device
	return shows(m, r) || ok && at != (loop.Ref{}) && at.Number == number, nil
}

// publishFilesystem bind-mounts the staged filesystem.
func (d *Driver) publishFilesystem(ctx context.Context, r stageRecord, path string, target targetRecord, flags []string) error {
	options, err := mount.ParseOptions(r.FSType, flags)
	if err != nil {
		return err
	}
	err = d.mounts.Bind(ctx, mount.BindSpec{Source: r.StagingPath, Target: path, ReadOnly: target.ReadOnly, Flags: options.Flags})
	if err != nil {
		return err
	}
	target.Device = r.Device
	r.Targets[path] = target
	if err := d.state.put(r); err != nil {
		return d.undoPublish(ctx, path, err)
	}
	return nil
}

// publishBlock bind-mounts the node of the volume's device, or of a second,
// read-only device over the same image.
func (d *Driver) publishBlock(ctx context.Context, r stageRecord, path string, target targetRecord) error {
	ref, fresh := r.Device, false
	if target.ReadOnly && !r.ReadOnly {
		var err error
		if fresh, err = d.ensureReadDevice(ctx, &r); err != nil {
			return err
		}
		ref = r.ReadDevice
		if !fresh {
			// What an earlier reader left in this device's cache may be older than
			// what was written through the other one.
			if err := d.loops.DropCache(ctx, ref); err != nil {
				return err
			}
		}
	}
	info, err := d.table.Inspect(ctx, ref.Number)
	if err == nil && info.Ref != ref {
		err = preconditionf("/dev/loop%d is no longer the device of the volume", ref.Number)
	}
	if err == nil {
		err = d.mounts.Bind(ctx, mount.BindSpec{Source: info.Path, Target: path})
	}
	if err == nil {
		target.Device = ref
		r.Targets[path] = target
		if err = d.state.put(r); err == nil {
			return nil
		}
		err = d.undoPublish(ctx, path, err)
	}
	if fresh {
		undo, cancel := undoContext(ctx)
		defer cancel()
		err = errors.Join(err, d.dropReadDevice(undo, &r), d.state.put(withoutTarget(r, path)))
	}
	return err
}

// ensureReadDevice binds and holds the read-only device of a raw block volume,
// recorded before anybody can see it. It says whether it made one.
func (d *Driver) ensureReadDevice(ctx context.Context, r *stageRecord) (fresh bool, err error) {
	if r.ReadDevice != (loop.Ref{}) && d.holds(r.ReadDevice) {
		return false, nil
	}
	src, err := d.recordSource(*r)
	if err != nil {
		return false, err
	}
	f, err := src.open(ctx, true)
	if err != nil {
		return false, err
	}
	defer f.Close()
	// Written before the bind, so that a start after a crash knows whose it is.
	r.ReadPending = true
	if err := d.state.put(withoutTarget(*r, "")); err != nil {
		return false, err
	}
	m := src.mapping
	m.ReadOnly = true
	dev, err := d.loops.Attach(ctx, f, m)
	if err != nil {
		return false, err
	}
	r.ReadDevice, r.ReadPending = dev.Info().Ref, false
	d.hold(dev)
	return true, nil
}

// dropReadDevice detaches the read-only device of a raw block volume.
func (d *Driver) dropReadDevice(ctx context.Context, r *stageRecord) error {
	if r.ReadDevice == (loop.Ref{}) {
		return nil
	}
	if err := errors.Join(d.letGo(r.ReadDevice), d.loops.Detach(ctx, r.ReadDevice)); err != nil {
		return err
	}
	r.ReadDevice = loop.Ref{}
	return nil
}

// recordSource is the source of a volume that is staged.
func (d *Driver) recordSource(r stageRecord) (source, error) {
	if r.Mapped != nil {
		return d.mappedSource(r.VolumeID, r.Mapped), nil
	}
	return d.source(r.VolumeID, nil)
}

// undoPublish removes the target after cause made the call fail.
func (d *Driver) undoPublish(ctx context.Context, path string, cause error) error {
	undo, cancel := undoContext(ctx)
	defer cancel()
	return errors.Join(cause, d.mounts.Remove(undo, path))
}

func (t targetRecord) String() string {
	if t.ReadOnly {
		return "read-only, " + t.Mode
	}
	return "writable, " + t.Mode
}

func withoutTarget(r stageRecord, path string) stageRecord {
	r = r.clone()
	delete(r.Targets, path)
	return r
}

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
	if err := d.unpublish(ctx, id, target); err != nil {
		return nil, fmt.Errorf("unpublish volume %q at %q: %w", id, target, err)
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

func (d *Driver) unpublish(ctx context.Context, id, target string) error {
	r, known := d.state.get(id)
	if !known {
		r = stageRecord{VolumeID: id}
	}
	device, err := d.mayUnpublish(ctx, r, target)
	if err != nil {
		return err
	}
	if err := d.mounts.Remove(ctx, target); err != nil {
		return err
	}
	if !known || r.Ephemeral {
		return d.removeEphemeral(ctx, id, target, device)
	}
	r = withoutTarget(r, target)
	if err := d.state.put(r); err != nil {
		return err
	}
	return d.releaseReadDevice(ctx, r)
}

// releaseReadDevice detaches the read-only device when no read-only target is left.
func (d *Driver) releaseReadDevice(ctx context.Context, r stageRecord) error {
	if r.ReadDevice == (loop.Ref{}) {
		return nil
	}
	left, err := d.mountsOf(r.ReadDevice.Number)
	if err != nil || len(left) > 0 {
		return err // a later unpublish or unstage detaches it
	}
	if err := d.dropReadDevice(ctx, &r); err != nil {
		return err
	}
	return d.state.put(r)
}

// mayUnpublish refuses to unmount what is not the volume, and returns the device
// behind what is; none when nothing is mounted.
func (d *Driver) mayUnpublish(ctx context.Context, r stageRecord, target string) (loop.Ref, error) {
	m, mounted, err := d.mtab.At(target)
	if err != nil || !mounted {
		return r.Device, err
	}
	// A bind of a node that the record lists is ours to unmount, whatever the
	// number is now bound to: that touches no device.
	if ours, err := d.publishedAt(r, target); err != nil || ours {
		return r.Device, err
	}
	info, err := d.deviceOf(ctx, r, m)
	return info.Ref, err
}

// mountsOf lists the mounts that show loop device number: its filesystem, or
// its node.
func (d *Driver) mountsOf(number int) ([]string, error) {
	all, err := d.mtab.List()
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, m := range all {
		if n, ok := loopNumber(m); ok && n == number {
			paths = append(paths, m.Path)
		}
	}
	return paths, nil
}

// publicationsLeft lists where a staged volume still is, besides its staging path.
// For a raw block volume every mount of its nodes counts, known or not: none of
// them keeps the device bound, so all must be gone before it is cleared (fact 36).
// For a filesystem only the publications of CSI count; other mounts of it keep
// the device bound by themselves. So too when the binding is gone already: then
// other mounts of the node are those of whoever got the number.
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
	if live, err := d.bindingAlive(ctx, r); err != nil {
		return nil, err
	} else if live && r.Block {
		for _, ref := range r.devices() {
			paths, err := d.mountsOf(ref.Number)
			if err != nil {
				return nil, err
			}
			left = append(left, paths...)
		}
	}
	slices.Sort(left)
	return slices.Compact(left), nil
}
