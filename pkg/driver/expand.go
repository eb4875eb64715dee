package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// ControllerExpandVolume makes the image larger. The filesystem follows in
// NodeExpandVolume, or when the volume is staged next.
func (s *controllerServer) ControllerExpandVolume(ctx context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	d, id := s.d, req.GetVolumeId()
	switch {
	case id == "":
		return nil, invalidf("volume_id is missing")
	case req.GetCapacityRange() == nil:
		return nil, invalidf("capacity_range is missing")
	}
	c, err := parseCapacity(req.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	unlock, err := d.lockVolume(id, "ControllerExpandVolume")
	if err != nil {
		return nil, err
	}
	defer unlock()
	v, err := d.volume(id)
	if err != nil {
		return nil, err
	}
	if req.GetVolumeCapability() != nil {
		a, err := parseAccess(req.GetVolumeCapability())
		if err != nil {
			return nil, err
		}
		if err := d.poolSource(v).allows(a); err != nil {
			return nil, invalidf("%v", err)
		}
	}
	if v, err = d.growImage(ctx, v, c); err != nil {
		return nil, err
	}
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: v.Content(), NodeExpansionRequired: true}, nil
}

// smallestGrown is the smallest size, in bytes, that the kernel resizes a mounted
// filesystem to, where that is more than what one can be made with. An image must
// not grow to where its filesystem cannot follow: it grows to there at least.
var smallestGrown = map[string]int64{"btrfs": 256 << 20}

// growImage makes the image satisfy the range, durably: also where an earlier call made
// it so and failed, or was killed, before that was on disk. A volume is never made smaller.
func (d *Driver) growImage(ctx context.Context, v image.Volume, c capacity) (image.Volume, error) {
	if c.limit > 0 && v.Content() > c.limit {
		return v, outOfRangef("volume %q has %d bytes, more than limit_bytes %d, and cannot shrink", v.ID, v.Content(), c.limit)
	}
	size := v.Size
	if c.required > v.Content() {
		var err error
		if size, err = c.imageSize(smallestGrown[v.Filesystem], v.Encryption); err != nil {
			return v, err
		}
	}
	pool, err := d.pool(v.Pool)
	if err != nil {
		return v, err
	}
	grown, err := pool.Grow(ctx, v.ID, size)
	if err != nil {
		return v, fmt.Errorf("expand volume %q to %d bytes: %w", v.ID, size, err)
	}
	if grown.Size > v.Size {
		klog.FromContext(ctx).Info("Grew image", "volume", v.ID, "from", v.Size, "size", grown.Size)
	}
	return grown, nil
}

// NodeExpandVolume shows the grown image to the loop device, and grows the
// filesystem on it while it is mounted. An image that is still smaller than
// asked for is grown first, so the call is complete by itself.
func (s *nodeServer) NodeExpandVolume(ctx context.Context, req *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	d, id, path := s.d, req.GetVolumeId(), req.GetVolumePath()
	switch {
	case id == "":
		return nil, invalidf("volume_id is missing")
	case path == "":
		return nil, invalidf("volume_path is missing")
	}
	c, err := parseCapacity(req.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	unlock, err := d.lockVolume(id, "NodeExpandVolume")
	if err != nil {
		return nil, err
	}
	defer unlock()
	size, err := d.nodeExpand(ctx, req, c)
	if err != nil {
		return nil, fmt.Errorf("expand volume %q at %q: %w", id, path, err)
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: size}, nil
}

func (d *Driver) nodeExpand(ctx context.Context, req *csi.NodeExpandVolumeRequest, c capacity) (int64, error) {
	r, err := d.expandable(ctx, req)
	if err != nil {
		return 0, err
	}
	v, err := d.volume(req.GetVolumeId())
	if err != nil {
		return 0, err
	}
	if v, err = d.growImage(ctx, v, c); err != nil {
		return 0, err
	}
	for _, b := range r.devices() {
		size, err := d.loops.Grow(ctx, b.ref())
		if err != nil {
			return 0, err
		}
		if size != v.Size {
			return 0, abortedf("/dev/loop%d has %d bytes, its image %d", b.Number, size, v.Size)
		}
	}
	if r.Encrypted {
		if err := d.growMapping(ctx, r.Device, v.Content()); err != nil {
			return 0, err
		}
		// Linux 6.1 gives a mapping whose size changes the read-ahead of a new one.
		d.applyTuning(ctx, v.ID)
	}
	if r.Block {
		return v.Content(), nil
	}
	info, err := d.table.Status(ctx, r.Device.ref())
	if err != nil {
		return 0, err
	}
	if err := d.mounts.Grow(ctx, mount.GrowSpec{FSType: r.FSType, Device: r.Device.path(info), Path: r.StagingPath}); err != nil {
		return 0, err
	}
	klog.FromContext(ctx).Info("Grew filesystem", "volume", v.ID, "device", info.Path, "filesystem", r.FSType, "size", v.Content())
	return v.Content(), nil
}

// expandable returns the record of a volume that can be expanded on this node,
// and refuses all others before anything grows.
func (d *Driver) expandable(ctx context.Context, req *csi.NodeExpandVolumeRequest) (stageRecord, error) {
	id, path := req.GetVolumeId(), req.GetVolumePath()
	r, ok := d.state.get(id)
	switch {
	case ok && r.Mapped != nil:
		return r, invalidf("a mapped volume has the size of its range and cannot be expanded")
	case ok && r.Ephemeral:
		return r, invalidf("an inline ephemeral volume cannot be expanded")
	}
	if _, err := d.volume(id); err != nil {
		return r, err
	}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return r, notFoundf("%q does not exist", path)
	}
	if !ok || r.Device.none() {
		// NOT_FOUND would tell a CO that the volume can never grow.
		staging, err := cleanPath("staging_target_path", req.GetStagingTargetPath())
		if err != nil {
			return r, preconditionf("the volume is not staged on this node")
		}
		if r, err = d.stagingRecord(ctx, id, staging); err != nil {
			return r, err
		}
		if r.Device.none() {
			return r, preconditionf("the volume is not staged on this node")
		}
	}
	if err := d.isAt(ctx, r, path); err != nil {
		if codeOf(err) == codes.NotFound {
			return r, preconditionf("%v", err)
		}
		return r, err
	}
	if r.ReadOnly && !r.Block {
		return r, preconditionf("the volume is mounted read-only; it grows when it is staged for writing")
	}
	return r, nil
}

// isAt checks that the volume is at path: its staging path or a target.
func (d *Driver) isAt(ctx context.Context, r stageRecord, path string) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return notFoundf("%q does not exist", path)
	}
	path, err := cleanPath("volume_path", path)
	if err != nil {
		return err
	}
	live, err := d.stagingAlive(ctx, r)
	if err != nil {
		return err
	}
	if live && r.Block && path == r.StagingPath {
		return nil // nothing is mounted at the staging path of a raw block volume
	}
	there, err := d.publishedAt(r, path)
	if err != nil {
		return err
	}
	if !live || !there {
		return notFoundf("the volume is not at %q", path)
	}
	return nil
}
