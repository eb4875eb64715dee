package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

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

// publication is one publication that is asked for.
type publication struct {
	path    string
	target  targetRecord
	flags   []string
	mounted bool // something is mounted at path already; undoing must not touch it
}

// publish shows a staged volume at one more target.
func (d *Driver) publish(ctx context.Context, req *csi.NodePublishVolumeRequest, path string, a access) error {
	r, err := d.stagedRecord(ctx, req, a)
	if err != nil {
		return err
	}
	switch {
	case r.Block != a.block:
		return invalidf("the volume is staged as %s", r.describe())
	case r.Mode != a.mode.String():
		return preconditionf("the volume is staged as %s, the request asks for %s", r.describe(), a.mode)
	}
	p := publication{path: path, flags: a.flags, target: targetRecord{
		ReadOnly: req.GetReadonly() || a.readOnly() || r.ReadOnly || readOnlyFlag(a.flags), Mode: a.mode.String(),
		PodUID: podUIDOf(req.GetVolumeContext(), path),
	}}
	done, err := d.admit(ctx, &r, &p, a)
	if err != nil || done {
		return err
	}
	if a.block {
		err = d.publishBlock(ctx, r, p)
	} else {
		err = d.publishFilesystem(ctx, r, p)
	}
	if codeOf(err) != codes.Aborted && errors.As(err, new(*mount.ForeignError)) {
		return existsf("%v", err) // published, but incompatible
	}
	if err == nil {
		d.applyTuning(ctx, r.VolumeID)
	}
	return err
}

// stagedRecord returns the record of a volume that is staged at the staging
// path of the request, in the kernel and not only on paper.
func (d *Driver) stagedRecord(ctx context.Context, req *csi.NodePublishVolumeRequest, a access) (stageRecord, error) {
	id := req.GetVolumeId()
	staging, err := cleanPath("staging_target_path", req.GetStagingTargetPath())
	if err != nil {
		return stageRecord{}, err
	}
	r, err := d.stagingRecord(ctx, id, staging)
	if err != nil {
		return r, err
	}
	if r.Device.none() || r.Ephemeral {
		if _, err := d.source(id, req.GetVolumeContext()); err != nil {
			return r, err
		}
		return r, preconditionf("the volume is not staged")
	}
	if r.StagingPath != staging {
		return r, preconditionf("the volume is staged at %q, not at %q", r.StagingPath, staging)
	}
	live, err := d.inForce(ctx, r)
	if err != nil {
		return r, err
	}
	if !live {
		return r, preconditionf("the volume is no longer staged at %q: its loop device or mount is gone", staging)
	}
	if r.Mode != "" {
		return r, nil
	}
	// Recovered: the request says what the staging was asked for.
	src, err := d.source(id, req.GetVolumeContext())
	if err != nil {
		return r, err
	}
	asked := newRecord(src, a)
	r.Mode, r.Flags, r.Mapped = asked.Mode, asked.Flags, asked.Mapped
	return r, nil
}

// admit applies CSI's table for repeated and second publications. Targets that
// the kernel no longer shows are taken out of r, the new one is put in. It says
// whether the publication is there already.
func (d *Driver) admit(ctx context.Context, r *stageRecord, p *publication, a access) (done bool, err error) {
	there, mounted, err := d.mtab.At(p.path)
	if err != nil {
		return false, err
	}
	p.mounted = mounted
	if have, ok := r.Targets[there.Path]; mounted && ok && there.Path != p.path {
		// Recovered, by the path that the kernel shows.
		delete(r.Targets, there.Path)
		r.Targets[p.path] = have
	}
	for _, other := range slices.Sorted(maps.Keys(r.Targets)) {
		shown, err := d.publishedAt(*r, other)
		if err != nil {
			return false, err
		}
		have := r.Targets[other]
		switch {
		case !shown:
			delete(r.Targets, other)
		case other == p.path && !have.sameAs(p.target):
			return false, existsf("the volume is published there already as %s, the request asks for %s", have, p.target)
		case other == p.path:
			if done, err = d.serves(ctx, *r, have.Device); err != nil {
				return false, err
			}
		case a.exclusive() || exclusiveMode(have.Mode):
			return false, preconditionf("the volume is published at %q and its access mode %s allows one target", other, a.mode)
		}
	}
	if r.Targets == nil {
		r.Targets = make(map[string]targetRecord)
	}
	return done, nil
}

// serves says whether a publication's device is one of the volume's, and in force.
func (d *Driver) serves(ctx context.Context, r stageRecord, b binding) (bool, error) {
	if b.ref() == r.Device.ref() {
		return true, nil // the staging is in force
	}
	if b.ref() != r.ReadDevice.ref() {
		return false, nil
	}
	return d.ensureHeld(ctx, b, r.Image)
}

// exclusiveMode is access.exclusive for a recorded mode.
func exclusiveMode(mode string) bool {
	return access{mode: csi.VolumeCapability_AccessMode_Mode(csi.VolumeCapability_AccessMode_Mode_value[mode])}.exclusive()
}

// publishFilesystem bind-mounts the staged filesystem.
func (d *Driver) publishFilesystem(ctx context.Context, r stageRecord, p publication) error {
	options, err := mount.ParseOptions(r.FSType, p.flags)
	if err != nil {
		return err
	}
	// The very mount that shows the volume: without it the path would lead to a directory
	// of the node.
	staged, mounted, err := d.mtab.At(r.StagingPath)
	switch {
	case err != nil:
		return err
	case !mounted || !r.Device.shownBy(staged):
		return preconditionf("the volume is no longer staged at %q: its mount is gone", r.StagingPath)
	}
	err = d.mounts.Bind(ctx, mount.BindSpec{Source: r.StagingPath, Target: p.path, ReadOnly: p.target.ReadOnly, Flags: options.Flags, Mount: staged.ID})
	if err != nil {
		return err
	}
	return d.recordPublication(ctx, r, p, r.Device)
}

// recordPublication completes a publication that the kernel shows, or takes it
// back.
func (d *Driver) recordPublication(ctx context.Context, r stageRecord, p publication, b binding) error {
	p.target.Device = b
	r.Targets[p.path] = p.target
	err := d.state.put(r)
	if err == nil || p.mounted {
		return err
	}
	undo, cancel := undoContext(ctx)
	defer cancel()
	return undone(err, d.mounts.Remove(undo, p.path))
}

// publishBlock bind-mounts the node of the volume's device, or of a second,
// read-only device over the same image.
func (d *Driver) publishBlock(ctx context.Context, r stageRecord, p publication) error {
	if !p.target.ReadOnly || r.ReadOnly {
		return d.publishNode(ctx, r, p, r.Device)
	}
	if r.Encrypted {
		return invalidf("an encrypted raw block volume that is staged for writing cannot be published read-only as well: a second device would need the passphrase again")
	}
	restore := d.state.keep(r.VolumeID)
	fresh, err := d.ensureReadDevice(ctx, &r)
	if err != nil {
		return errors.Join(err, restore())
	}
	if !fresh {
		// What an earlier reader left in this device's cache may be older than
		// what was written through the other one.
		if err := d.loops.DropCache(ctx, r.ReadDevice.ref()); err != nil {
			return err
		}
	}
	err = d.publishNode(ctx, r, p, r.ReadDevice)
	if err == nil || !fresh {
		return err
	}
	undo, cancel := undoContext(ctx)
	defer cancel()
	if undoErr := d.dropReadDevice(undo, &r); undoErr != nil {
		return undone(err, errors.Join(undoErr, d.state.put(r)))
	}
	return undone(err, restore())
}

// publishNode bind-mounts the node of a device.
func (d *Driver) publishNode(ctx context.Context, r stageRecord, p publication, b binding) error {
	info, bound, err := d.status(ctx, b, r.Image)
	if err != nil {
		return err
	}
	if !bound {
		return preconditionf("/dev/loop%d is no longer the device of the volume", b.Number)
	}
	if err := d.mounts.Bind(ctx, mount.BindSpec{Source: b.path(info), Target: p.path}); err != nil {
		return err
	}
	return d.recordPublication(ctx, r, p, b)
}

// ensureReadDevice binds and holds the read-only device of a raw block volume,
// recorded before anybody can see it. It says whether it made one.
func (d *Driver) ensureReadDevice(ctx context.Context, r *stageRecord) (fresh bool, err error) {
	held, err := d.ensureHeld(ctx, r.ReadDevice, r.Image)
	if err != nil || held {
		return false, err
	}
	if err := d.dropExchanged(r.ReadDevice); err != nil {
		return false, err
	}
	src, err := d.recordSource(*r)
	if err != nil {
		return false, err
	}
	src, f, err := src.openLocated(ctx, true)
	if err != nil {
		return false, err
	}
	defer f.Close()
	if id, err := loop.FileIDOf(f); err != nil {
		return false, err
	} else if id != r.Image {
		return false, preconditionf("the image was replaced since the volume was staged: unpublish and unstage it everywhere first")
	}
	if err := d.sameRange(ctx, src, *r); err != nil {
		return false, err
	}
	// Written before the bind, so that a start after a crash knows whose it is.
	r.ReadDevice, r.ReadPending = binding{}, true
	if err := d.state.put(*r); err != nil {
		return false, err
	}
	m := src.mapping
	m.ReadOnly = true
	dev, err := d.attach(ctx, f, m)
	if err != nil {
		return false, err
	}
	b, err := d.bindingOf(dev.Info())
	if err != nil {
		undo, cancel := undoContext(ctx)
		defer cancel()
		err = undone(err, dev.Close())
		if !dev.Reused() {
			err = undone(err, d.loops.Detach(undo, dev.Info().Ref))
		}
		return false, err
	}
	r.ReadDevice, r.ReadPending = b, false
	d.hold(dev)
	return !dev.Reused(), nil
}

// dropExchanged lets go of a device that is held and does not show the volume any more:
// a reader gave it another file (fact 108). It refuses while readers are left.
func (d *Driver) dropExchanged(b binding) error {
	if !d.holds(b.ref()) {
		return nil
	}
	shown, err := d.mountsOf(b)
	switch {
	case err != nil:
		return err
	case len(shown) > 0:
		return preconditionf("a pod with the volume's read-only device, /dev/loop%d, gave it another file: unpublish it everywhere first, it is at %q", b.Number, shown)
	}
	return d.letGo(b.ref())
}

// sameRange refuses a second device of a partition that lies elsewhere by now: both
// show one volume.
func (d *Driver) sameRange(ctx context.Context, src source, r stageRecord) error {
	if r.Device.none() || src.mapped == nil || src.mapped.Partition == 0 {
		return nil
	}
	info, bound, err := d.status(ctx, r.Device, r.Image)
	if err != nil || !bound {
		return err
	}
	if info.Offset != src.mapping.Offset || info.SizeLimit != src.mapping.SizeLimit {
		return preconditionf("partition %d was moved since the volume was staged: unpublish and unstage it everywhere first", src.mapped.Partition)
	}
	return nil
}

// dropReadDevice detaches the read-only device of a raw block volume.
func (d *Driver) dropReadDevice(ctx context.Context, r *stageRecord) error {
	if r.ReadDevice.none() {
		return nil
	}
	d.resetReadAhead(ctx, *r, r.ReadDevice)
	if err := d.letGo(r.ReadDevice.ref()); err != nil {
		return err
	}
	if r.ReadDevice.encrypted() { // recovered: a staging for reading, beside one for writing
		if err := d.closeMappings(ctx, r.ReadDevice, r.Image); err != nil {
			return err
		}
	}
	if err := d.detach(ctx, r.ReadDevice); err != nil {
		return err
	}
	delete(r.ReadAhead, r.ReadDevice.Number)
	r.ReadDevice = binding{}
	return nil
}

// recordSource is the source of a volume that is staged.
func (d *Driver) recordSource(r stageRecord) (source, error) {
	if r.Mapped != nil {
		return d.mappedSource(r.VolumeID, r.Mapped), nil
	}
	return d.source(r.VolumeID, nil)
}
