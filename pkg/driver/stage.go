package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// NodeStageVolume attaches the volume and, unless it is a raw block device,
// mounts its filesystem at the staging path.
func (s *nodeServer) NodeStageVolume(ctx context.Context, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	d, id := s.d, req.GetVolumeId()
	if id == "" {
		return nil, invalidf("volume_id is missing")
	}
	staging, err := cleanPath("staging_target_path", req.GetStagingTargetPath())
	if err != nil {
		return nil, err
	}
	a, err := parseAccess(req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	unlock, err := d.lockVolume(id, "NodeStageVolume")
	if err != nil {
		return nil, err
	}
	defer unlock()
	src, err := d.source(id, req.GetVolumeContext())
	if err != nil {
		return nil, err
	}
	if err := src.allows(a); err != nil {
		return nil, err
	}
	want := newRecord(src, a)
	want.StagingPath = staging
	done, err := d.alreadyStaged(ctx, &want)
	if err != nil || done {
		return &csi.NodeStageVolumeResponse{}, err
	}
	switch {
	case src.encrypted():
		err = d.stageEncrypted(ctx, src, want, req.GetSecrets())
	case a.block:
		err = d.stageBlock(ctx, src, want)
	default:
		err = d.stageFilesystem(ctx, src, want)
	}
	if err != nil {
		return nil, fmt.Errorf("stage volume %q: %w", id, err)
	}
	d.applyTuning(ctx, id)
	return &csi.NodeStageVolumeResponse{}, nil
}

// newRecord is the record of a staging of src that a asks for.
func newRecord(src source, a access) stageRecord {
	return stageRecord{
		VolumeID: src.id, Block: a.block, FSType: or(a.fsType, src.fsType), Flags: a.flags, Mode: a.mode.String(),
		ReadOnly: a.readOnly() || src.readOnly || readOnlyFlag(a.flags), Mapped: src.mapped,
		Encrypted: src.encrypted(),
	}
}

// readOnlyFlag says whether mount flags make the mount read-only, as mount.ParseOptions
// does: the last of ro and rw holds.
func readOnlyFlag(flags []string) (readOnly bool) {
	for option := range strings.SplitSeq(strings.Join(flags, ","), ",") {
		switch strings.Trim(option, " ") {
		case "ro":
			readOnly = true
		case "rw":
			readOnly = false
		}
	}
	return readOnly
}

// alreadyStaged says whether the volume is staged just as want asks, and
// ALREADY_EXISTS or FAILED_PRECONDITION when it is staged otherwise. Of a staging
// that is gone want inherits what still has to be unpublished and detached.
func (d *Driver) alreadyStaged(ctx context.Context, want *stageRecord) (bool, error) {
	have, ok := d.state.get(want.VolumeID)
	if !ok {
		return false, nil
	}
	if have.Ephemeral {
		return false, preconditionf("volume %q is an inline ephemeral volume and is not staged", want.VolumeID)
	}
	live, err := d.inForce(ctx, have)
	if err != nil {
		return false, err
	}
	if !live { // stage anew
		if have.Device.none() {
			if done, err := d.endUnfinished(ctx, have); err != nil || done {
				return false, err
			}
		}
		if err := d.releaseCleared(have); err != nil {
			return false, err
		}
		want.Targets, want.ReadDevice, want.ReadPending, want.ReadAhead = have.Targets, have.ReadDevice, have.ReadPending, have.ReadAhead
		return false, nil
	}
	switch {
	case have.StagingPath != want.StagingPath:
		return false, preconditionf("volume %q is staged at %q already", want.VolumeID, have.StagingPath)
	case !have.satisfies(*want):
		return false, existsf("volume %q is staged at %q with another capability: %s, the request asks for %s", want.VolumeID, have.StagingPath, have.describe(), want.describe())
	}
	return true, nil
}

// releaseCleared lets go of a raw block volume's device that somebody cleared behind
// our back, when nobody is shown it: held by us it would never go.
func (d *Driver) releaseCleared(r stageRecord) error {
	if !r.Block || !d.holds(r.Device.ref()) {
		return nil
	}
	shown, err := d.mountsOf(r.Device)
	if err != nil || len(shown) > 0 {
		return err
	}
	return d.letGo(r.Device.ref())
}

// satisfies says whether a staging is as want asks. What a recovered record does
// not know (its mode is empty) is not compared.
func (r stageRecord) satisfies(want stageRecord) bool {
	if r.Block != want.Block || r.ReadOnly != want.ReadOnly || want.FSType != "" && r.FSType != want.FSType {
		return false
	}
	return r.Mode == "" || r.Mode == want.Mode && slices.Equal(r.Flags, want.Flags) && sameMapped(r.Mapped, want.Mapped)
}

func sameMapped(a, b *mappedAttributes) bool {
	return a == b || a != nil && b != nil && *a == *b
}

// describe shows what a staging can be told apart by.
func (r stageRecord) describe() string {
	kind := "mount " + r.FSType
	if r.Block {
		kind = "block"
	}
	return fmt.Sprintf("%s, %s, flags %q", kind, r.Mode, r.Flags)
}

// stagingAlive asks the kernel whether what the record describes is in force:
// the device bound and not cleared, and its filesystem mounted. It changes nothing.
func (d *Driver) stagingAlive(ctx context.Context, r stageRecord) (bool, error) {
	info, bound, err := d.status(ctx, r.Device, r.Image)
	if err != nil || !bound || r.Encrypted && !r.Device.encrypted() {
		return false, err
	}
	if r.Block {
		return !info.Autoclear, nil
	}
	m, mounted, err := d.mtab.At(r.StagingPath)
	return mounted && r.Device.shownBy(m), err
}

// inherit puts into want, for which there is no record, what a lost record knew
// of: publications and a read-only device that are still there. An image that
// nobody has open, as a rule, costs no look at other devices.
func (d *Driver) inherit(ctx context.Context, f *os.File, want *stageRecord) error {
	if _, ok := d.state.get(want.VolumeID); ok {
		return nil
	}
	bound, err := d.table.Find(ctx, f)
	if err != nil || len(bound) == 0 {
		return err
	}
	lost := *want
	if found, err := d.recoverStaging(ctx, &lost); err != nil || !found || lost.Block != want.Block {
		return err
	}
	want.Targets, want.ReadDevice = lost.Targets, lost.ReadDevice
	if lost.Device.none() || lost.ReadOnly == want.ReadOnly {
		return nil
	}
	if lost.Block && lost.ReadOnly && want.ReadDevice.none() {
		want.ReadDevice = lost.Device // the writable one is gone
	}
	return nil
}

// stageFilesystem attaches and mounts. The device is bound with autoclear: from
// the moment of the mount it lives exactly as long as the mount, and a crash
// before it leaves nothing (fact 35). The record is written before, so that the
// next start knows whose a mount is that a crash left behind.
func (d *Driver) stageFilesystem(ctx context.Context, src source, want stageRecord) (err error) {
	src, f, err := src.openLocated(ctx, src.readOnly)
	if err != nil {
		return err
	}
	defer f.Close()
	m := src.mapping
	m.Autoclear = true
	// The device of a volume that is only read is writable all the same, unless
	// the volume itself is read-only: a journal may have to be replayed, and the
	// mount is read-only then (fact 66).
	m.ReadOnly = src.readOnly
	if want.Image, err = loop.FileIDOf(f); err != nil {
		return err
	}
	if err := d.inherit(ctx, f, &want); err != nil {
		return err
	}
	restore := d.state.keep(want.VolumeID)
	if err := d.state.put(want); err != nil {
		return err
	}
	dev, sb, err := d.attachChecked(ctx, src, f, m, want)
	if err != nil {
		return errors.Join(err, restore())
	}
	info := dev.Info()
	d.counts.begin(d.table, want.VolumeID, info.Ref)
	want.FSType = or(want.FSType, sb.Type)
	if want.Device, err = d.bindingOf(info); err != nil {
		return undone(err, errors.Join(dev.Close(), restore())) // it clears itself
	}
	if dev.Reused() {
		sb.NeedsCheck = false // it may be mounted: a crash came before the record was complete
	}
	if err = d.mountFilesystem(ctx, mountSpec(src, want, info), src, info, sb); err == nil {
		if err = d.state.put(want); err == nil {
			return dev.Close()
		}
	}
	if dev.Reused() { // not this call's to take back
		if len(want.Targets) > 0 { // pods have it, and others may have it too
			err = errors.Join(err, d.state.put(want))
		}
		return errors.Join(err, dev.Close())
	}
	if undoErr := d.undoStage(ctx, want, dev); undoErr != nil {
		return undone(err, undoErr) // the record without device stays and finds it
	}
	return undone(err, restore())
}

// attachChecked reads the superblock of the source, which must be of the type
// that is wanted unless that is empty, checks the mount flags, and attaches.
func (d *Driver) attachChecked(ctx context.Context, src source, f *os.File, m loop.Mapping, want stageRecord) (attached, mount.Superblock, error) {
	sb, err := src.superblock(f)
	if err != nil {
		return nil, sb, err
	}
	if want.FSType != "" && !sameFilesystem(want.FSType, sb.Type) {
		return nil, sb, preconditionf("the image holds %s, not %s", sb.Type, want.FSType)
	}
	if _, err := mount.ParseOptions(or(want.FSType, sb.Type), want.Flags); err != nil {
		return nil, sb, err
	}
	dev, err := d.attach(ctx, f, m)
	return dev, sb, err
}

// sameFilesystem compares a filesystem type with what a superblock shows. The
// ext family shares a superblock, and features of one can be added to another.
func sameFilesystem(a, b string) bool {
	ext := []string{"ext2", "ext3", "ext4"}
	return a == b || slices.Contains(ext, a) && slices.Contains(ext, b)
}

// mountSpec says how a staged filesystem is mounted.
func mountSpec(src source, want stageRecord, info loop.Info) mount.Spec {
	options := slices.Clone(want.Flags)
	if src.thick && want.FSType == "btrfs" {
		options = append(options, "nodiscard") // it would turn discard on by itself (fact 62)
	}
	if want.FSType == "xfs" && !src.fixed && !slices.Contains(options, "nouuid") {
		options = append(options, "nouuid") // a copy of it may be mounted here (fact 71)
	}
	return mount.Spec{
		Source: info.Path, Target: want.StagingPath, FSType: want.FSType,
		Options: options, ReadOnly: want.ReadOnly || info.ReadOnly,
	}
}

// fitToMount checks a filesystem that asks for it, and returns how it is mounted.
func (d *Driver) fitToMount(ctx context.Context, spec mount.Spec, info loop.Info, sb mount.Superblock) (mount.Spec, error) {
	if sb.NeedsCheck && !info.ReadOnly {
		if err := d.mounts.Check(ctx, sb.Type, spec.Source); err != nil {
			return spec, err
		}
	}
	if sb.Panics {
		// A damaged volume must not stop the node with all others, whatever its superblock
		// asks for. Of what contradicts, the last holds: the options that were given.
		spec.Options = append([]string{"errors=remount-ro"}, spec.Options...)
	}
	return spec, nil
}

// mountFilesystem checks the filesystem when it asks for that, mounts it, and
// grows it when its device has become larger while it was not mounted.
func (d *Driver) mountFilesystem(ctx context.Context, spec mount.Spec, src source, info loop.Info, sb mount.Superblock) error {
	spec, err := d.fitToMount(ctx, spec, info, sb)
	if err != nil {
		return err
	}
	small := !src.fixed && !sb.FillsDevice(info.Size)
	if small && src.copied && spec.ReadOnly && !info.ReadOnly {
		if err := d.growOnce(ctx, spec, info, sb); err != nil {
			return err
		}
		small = false
	}
	if err := d.mountOrRepair(ctx, spec, info, sb); err != nil {
		return err
	}
	if !small || spec.ReadOnly {
		return nil
	}
	return d.growMounted(ctx, src, spec, sb.Type)
}

// mountOrRepair mounts a filesystem, and repairs before what only the mount finds. The
// device is claimed by nobody, or the check refuses.
func (d *Driver) mountOrRepair(ctx context.Context, spec mount.Spec, info loop.Info, sb mount.Superblock) error {
	err := d.mounts.Mount(ctx, spec)
	if !errors.Is(err, mount.ErrDamaged) || !sameFilesystem("ext4", sb.Type) || info.ReadOnly || sb.NeedsCheck {
		return err
	}
	if err := d.mounts.Check(ctx, sb.Type, spec.Source); err != nil {
		return err
	}
	return d.mounts.Mount(ctx, spec)
}

// undoStage takes back a staging that failed half-way. The mount goes first,
// the device follows by itself when its last descriptor is closed.
func (d *Driver) undoStage(ctx context.Context, r stageRecord, dev attached) error {
	ctx, cancel := undoContext(ctx)
	defer cancel()
	m, mounted, err := d.mtab.At(r.StagingPath)
	if err == nil && mounted && r.Device.shownBy(m) {
		err = d.mounts.Unmount(ctx, r.StagingPath)
	}
	return errors.Join(err, dev.Close(), d.loops.WaitUnbound(ctx, r.Device.ref()))
}

// attachRecorded attaches an image after it has written down that it will: what a crash
// leaves is found by the record. restore puts the earlier record back, or none.
func (d *Driver) attachRecorded(ctx context.Context, f *os.File, m loop.Mapping, want *stageRecord) (dev attached, restore func() error, err error) {
	if want.Image, err = loop.FileIDOf(f); err != nil {
		return nil, nil, err
	}
	if err := d.inherit(ctx, f, want); err != nil {
		return nil, nil, err
	}
	restore = d.state.keep(want.VolumeID)
	if err := d.state.put(*want); err != nil {
		return nil, nil, err
	}
	if dev, err = d.attach(ctx, f, m); err != nil {
		return nil, nil, errors.Join(err, restore())
	}
	d.counts.begin(d.table, want.VolumeID, dev.Info().Ref)
	return dev, restore, nil
}

// stageBlock attaches a raw block volume and holds it. Nothing is put at the
// staging path. The record goes to disk before the device is bound: a device
// bound without autoclear outlives a crash, and the record is what tells the
// next start that it is ours.
func (d *Driver) stageBlock(ctx context.Context, src source, want stageRecord) (err error) {
	src, f, err := src.openLocated(ctx, want.ReadOnly)
	if err != nil {
		return err
	}
	defer f.Close()
	m := src.mapping
	m.ReadOnly = want.ReadOnly
	dev, restore, err := d.attachRecorded(ctx, f, m, &want)
	if err != nil {
		return err
	}
	if want.Device, err = d.bindingOf(dev.Info()); err == nil {
		if err = d.state.put(want); err == nil {
			d.hold(dev)
			return nil
		}
	}
	if dev.Reused() {
		return errors.Join(err, dev.Close())
	}
	undo, cancel := undoContext(ctx)
	defer cancel()
	if undoErr := errors.Join(dev.Close(), d.loops.Detach(undo, dev.Info().Ref)); undoErr != nil {
		return undone(err, undoErr) // the record without device stays and finds it
	}
	return undone(err, restore())
}
