package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// nodeServer is the CSI Node service.
type nodeServer struct {
	csi.UnimplementedNodeServer
	d *Driver
}

// nodeRPCs are the optional calls this service answers.
var nodeRPCs = []csi.NodeServiceCapability_RPC_Type{
	csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
	csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
	csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
	csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	csi.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
	csi.NodeServiceCapability_RPC_GET_STORAGE_HEALTH,
}

// NodeGetCapabilities lists nodeRPCs.
func (s *nodeServer) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	caps := make([]*csi.NodeServiceCapability, len(nodeRPCs))
	for i, t := range nodeRPCs {
		caps[i] = &csi.NodeServiceCapability{Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}}}
	}
	return &csi.NodeGetCapabilitiesResponse{Capabilities: caps}, nil
}

// NodeGetInfo names the node, its topology and how many volumes it can attach.
func (s *nodeServer) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{
		NodeId:             s.d.cfg.NodeID,
		MaxVolumesPerNode:  int64(s.d.table.Limit()),
		AccessibleTopology: s.d.topology(),
	}, nil
}

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
	if src.readOnly && !a.block && !a.readOnly() {
		a.flags = append(slices.Clone(a.flags), "ro")
	}
	want := stageRecord{
		VolumeID: id, StagingPath: staging, Block: a.block, FSType: or(a.fsType, src.fsType), Flags: a.flags,
		Mode: a.mode.String(), ReadOnly: a.readOnly() || src.readOnly, Mapped: src.mapped,
	}
	done, err := d.alreadyStaged(ctx, &want)
	if err != nil || done {
		return &csi.NodeStageVolumeResponse{}, err
	}
	if a.block {
		err = d.stageBlock(ctx, src, want)
	} else {
		err = d.stageFilesystem(ctx, src, want)
	}
	if err != nil {
		return nil, fmt.Errorf("stage volume %q: %w", id, err)
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

// alreadyStaged says whether the volume is staged just as want asks, and
// ALREADY_EXISTS or FAILED_PRECONDITION when it is staged otherwise.
// Of a staging that is gone want inherits the targets that still have to be
// unpublished.
func (d *Driver) alreadyStaged(ctx context.Context, want *stageRecord) (bool, error) {
	have, ok := d.state.get(want.VolumeID)
	if !ok {
		return false, nil
	}
	if have.Ephemeral {
		return false, preconditionf("volume %q is an inline ephemeral volume and is not staged", want.VolumeID)
	}
	live, err := d.stagingAlive(ctx, have)
	if err != nil {
		return false, err
	}
	if !live { // a record without its device: stage anew
		want.Targets = have.Targets
		return false, nil
	}
	switch {
	case have.StagingPath != want.StagingPath:
		return false, preconditionf("volume %q is staged at %q already", want.VolumeID, have.StagingPath)
	case have.Block != want.Block, want.FSType != "" && have.FSType != want.FSType, have.Mode != want.Mode, have.ReadOnly != want.ReadOnly, !slices.Equal(have.Flags, want.Flags), !sameMapped(have.Mapped, want.Mapped):
		return false, existsf("volume %q is staged at %q with another capability: %s, the request asks for %s", want.VolumeID, have.StagingPath, have.describe(), want.describe())
	}
	return true, nil
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
// the device bound and held, or the filesystem mounted.
func (d *Driver) stagingAlive(ctx context.Context, r stageRecord) (bool, error) {
	live, err := d.bindingAlive(ctx, r)
	if err != nil || !live {
		return false, err
	}
	if r.Block {
		return d.holds(r.Device), nil
	}
	_, mounted, err := d.mountedAt(r.StagingPath, r)
	return mounted, err
}

// bindingAlive asks the kernel whether the volume's device still is the binding
// that the record names.
func (d *Driver) bindingAlive(ctx context.Context, r stageRecord) (bool, error) {
	if r.Device == (loop.Ref{}) {
		return false, nil
	}
	info, err := d.table.Inspect(ctx, r.Device.Number)
	if errors.Is(err, loop.ErrNotBound) || errors.Is(err, loop.ErrNotExist) {
		return false, nil
	}
	return err == nil && info.Ref == r.Device && info.Image == r.Image, err
}

// mountedAt says what is mounted at path and whether it is the volume of r, with
// one of the devices that r names.
func (d *Driver) mountedAt(path string, r stageRecord) (m mount.Mount, ours bool, err error) {
	m, mounted, err := d.mtab.At(path)
	return m, err == nil && mounted && shows(m, r), err
}

// shows says whether a mount is of one of the devices that r names.
func shows(m mount.Mount, r stageRecord) bool {
	n, ok := loopNumber(m)
	return ok && slices.ContainsFunc(r.devices(), func(ref loop.Ref) bool { return ref.Number == n })
}

// stageFilesystem attaches and mounts. The device is bound with autoclear: from
// the moment of the mount it lives exactly as long as the mount, and a crash
// before it leaves nothing (fact 35). The record is written before, so that the
// next start knows whose a mount is that a crash left behind.
func (d *Driver) stageFilesystem(ctx context.Context, src source, want stageRecord) (err error) {
	m := src.mapping
	m.Autoclear = true
	// The device of a volume that is only read is writable all the same, unless
	// the volume itself is read-only: a journal may have to be replayed, and the
	// mount is read-only then (fact 66).
	m.ReadOnly = src.readOnly
	f, err := src.open(ctx, m.ReadOnly)
	if err != nil {
		return err
	}
	defer f.Close()
	if want.Image, err = loop.FileIDOf(f); err != nil {
		return err
	}
	if err := d.state.put(want); err != nil {
		return err
	}
	dev, sb, err := d.attachChecked(ctx, src, f, m, want.FSType)
	if err != nil {
		return errors.Join(err, d.state.drop(want.VolumeID))
	}
	info := dev.Info()
	want.Device, want.FSType = info.Ref, or(want.FSType, sb.Type)
	spec := mountSpec(src, want, info)
	if dev.Reused() {
		sb.NeedsCheck = false // it may be mounted: a crash came before the record was complete
	}
	if err = d.mountFilesystem(ctx, spec, src, info, sb); err == nil {
		if err = d.state.put(want); err == nil {
			return dev.Close()
		}
	}
	if dev.Reused() {
		return errors.Join(err, dev.Close()) // not this call's to take back
	}
	return errors.Join(err, d.undoStage(ctx, want, dev))
}

// attachChecked reads the superblock of the source, which must be that of fsType
// unless that is empty, and attaches it.
func (d *Driver) attachChecked(ctx context.Context, src source, f *os.File, m loop.Mapping, fsType string) (attached, mount.Superblock, error) {
	sb, err := src.superblock(f)
	if err != nil {
		return nil, sb, err
	}
	if fsType != "" && !sameFilesystem(fsType, sb.Type) {
		return nil, sb, preconditionf("the image holds %s, not %s", sb.Type, fsType)
	}
	dev, err := d.loops.Attach(ctx, f, m)
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
	return mount.Spec{
		Source: info.Path, Target: want.StagingPath, FSType: want.FSType,
		Options: options, ReadOnly: want.ReadOnly || info.ReadOnly,
	}
}

// mountFilesystem checks the filesystem when it asks for that, mounts it, and
// grows it when its device has become larger while it was not mounted.
func (d *Driver) mountFilesystem(ctx context.Context, spec mount.Spec, src source, info loop.Info, sb mount.Superblock) error {
	if sb.NeedsCheck && !info.ReadOnly {
		if err := d.mounts.Check(ctx, sb.Type, spec.Source); err != nil {
			return err
		}
	}
	err := d.mounts.Mount(ctx, spec)
	if errors.Is(err, mount.ErrDamaged) && sameFilesystem("ext4", sb.Type) && !info.ReadOnly && !sb.NeedsCheck {
		// Damage that only the mount finds. The device is claimed by nobody, or the
		// check refuses.
		if err = d.mounts.Check(ctx, sb.Type, spec.Source); err == nil {
			err = d.mounts.Mount(ctx, spec)
		}
	}
	if err != nil {
		return err
	}
	if src.fixed || spec.ReadOnly || sb.FillsDevice(info.Size) {
		return nil
	}
	d.growAtStage(ctx, spec)
	return nil
}

// undoStage takes back a staging that failed half-way. The mount goes first,
// the device follows by itself when its last descriptor is closed; the record
// stays if something of it does.
func (d *Driver) undoStage(ctx context.Context, r stageRecord, dev attached) error {
	ctx, cancel := undoContext(ctx)
	defer cancel()
	_, ours, err := d.mountedAt(r.StagingPath, r)
	if err == nil && ours {
		err = d.mounts.Unmount(ctx, r.StagingPath)
	}
	err = errors.Join(err, dev.Close(), d.loops.WaitUnbound(ctx, r.Device))
	if err != nil {
		return err
	}
	return d.state.drop(r.VolumeID)
}

// stageBlock attaches a raw block volume and holds it. Nothing is put at the
// staging path. The record goes to disk before the device is bound: a device
// bound without autoclear outlives a crash, and the record is what tells the
// next start that it is ours.
func (d *Driver) stageBlock(ctx context.Context, src source, want stageRecord) (err error) {
	m := src.mapping
	m.ReadOnly = want.ReadOnly
	f, err := src.open(ctx, m.ReadOnly)
	if err != nil {
		return err
	}
	defer f.Close()
	if want.Image, err = loop.FileIDOf(f); err != nil {
		return err
	}
	if err := d.state.put(want); err != nil {
		return err
	}
	dev, err := d.loops.Attach(ctx, f, m)
	if err != nil {
		return errors.Join(err, d.state.drop(want.VolumeID))
	}
	want.Device = dev.Info().Ref
	if err := d.state.put(want); err != nil {
		undo, cancel := undoContext(ctx)
		defer cancel()
		return errors.Join(err, dev.Close(), d.loops.Detach(undo, want.Device), d.state.drop(want.VolumeID))
	}
	d.hold(dev)
	return nil
}

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
	r, ok := d.state.get(id)
	if ok && (r.Ephemeral || r.StagingPath != staging) {
		return &csi.NodeUnstageVolumeResponse{}, nil // not staged there
	}
	if !ok || r.Device == (loop.Ref{}) {
		if r, err = d.recoverStaging(ctx, r, id, staging); err != nil {
			return nil, fmt.Errorf("unstage volume %q: %w", id, err)
		}
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
	return d.state.drop(r.VolumeID)
}

// unmountStaging unmounts and waits until the device is free.
func (d *Driver) unmountStaging(ctx context.Context, r stageRecord) error {
	if r.Device == (loop.Ref{}) {
		return nil // never came to be
	}
	_, ours, err := d.mountedAt(r.StagingPath, r)
	if err != nil {
		return err
	}
	if ours {
		if err := d.mounts.Unmount(ctx, r.StagingPath); err != nil {
			return err
		}
	}
	return d.loops.WaitUnbound(ctx, r.Device)
}

// detachBlock lets go of the devices of a raw block volume and clears them.
func (d *Driver) detachBlock(ctx context.Context, r stageRecord) error {
	for _, ref := range r.devices() {
		if err := errors.Join(d.letGo(ref), d.loops.Detach(ctx, ref)); err != nil {
			return err
		}
	}
	return nil
}

// cleanPath checks a path that a CO gave and takes a trailing slash off it. What
// cannot be meant is refused: relative paths, and ones that climb.
func cleanPath(field, path string) (string, error) {
	clean := filepath.Clean(path)
	switch {
	case path == "":
		return "", invalidf("%s is missing", field)
	case !filepath.IsAbs(path):
		return "", invalidf("%s %q is not an absolute path", field, path)
	case clean != path && clean+"/" != path:
		return "", invalidf("%s %q has empty, . or .. elements", field, path)
	}
	return clean, nil
}
