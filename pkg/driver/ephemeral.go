package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// Inline ephemeral volumes: NodePublishVolume makes the volume and mounts it at
// the target, NodeUnpublishVolume removes both. There is no staging. Their
// attributes come from whoever writes a pod, so the size is bounded by the
// operator, and mkfs options are not among them.

// parseEphemeral checks the attributes of an inline ephemeral volume.
func (d *Driver) parseEphemeral(context map[string]string, a access) (params, int64, error) {
	if d.cfg.EphemeralMaxSize == 0 {
		return params{}, 0, preconditionf("inline ephemeral volumes are switched off on this node: set --ephemeral-max-size to allow them")
	}
	if a.block {
		return params{}, 0, invalidf("an inline ephemeral volume cannot be a raw block device")
	}
	p := params{allocation: image.Thick, directIO: "auto", blockSize: 4096}
	size := min(int64(defaultSize), d.cfg.EphemeralMaxSize&^(sizeUnit-1))
	for _, key := range slices.Sorted(maps.Keys(context)) {
		if strings.HasPrefix(key, kubernetesPrefix) {
			continue
		}
		var err error
		switch key {
		case paramSize:
			size, err = parseBytes(key, context[key])
		default:
			if err = knownKey("attribute", key, EphemeralVolume); err == nil {
				err = p.set(key, context[key])
			}
		}
		if err != nil {
			return p, 0, err
		}
	}
	if size < 1 || size > maxSize || roundUp(size) > d.cfg.EphemeralMaxSize {
		return p, 0, outOfRangef("attribute %q: %d bytes, in whole MiB, are not between 1 and %d, which this node allows", paramSize, size, d.cfg.EphemeralMaxSize)
	}
	filesystem := or(a.fsType, defaultFilesystem)
	if size = max(roundUp(size), image.MinimumSize(filesystem)); size > d.cfg.EphemeralMaxSize {
		return p, 0, outOfRangef("attribute %q: %s needs at least %d bytes, and this node allows %d", paramSize, filesystem, size, d.cfg.EphemeralMaxSize)
	}
	allowed := d.cfg.EphemeralPools
	if len(allowed) == 0 {
		allowed = []string{d.cfg.DefaultPool}
	}
	if !slices.Contains(allowed, d.poolName(p.pool)) {
		return p, 0, invalidf("attribute %q: inline ephemeral volumes may be in %q, not in %q", paramPool, allowed, d.poolName(p.pool))
	}
	return p, size, nil
}

// publishEphemeral makes, attaches and mounts an inline ephemeral volume. One that
// is there already (after a reboot, the pod's data is still in it) is mounted as
// it is, and stays when that fails.
func (d *Driver) publishEphemeral(ctx context.Context, req *csi.NodePublishVolumeRequest, target string, a access) error {
	id := req.GetVolumeId()
	p, size, err := d.parseEphemeral(req.GetVolumeContext(), a)
	if err != nil {
		return err
	}
	if err := checkName(id); err != nil {
		return err
	}
	want := stageRecord{
		VolumeID: id, StagingPath: target, FSType: or(a.fsType, defaultFilesystem), Flags: a.flags,
		Mode: a.mode.String(), ReadOnly: req.GetReadonly() || a.readOnly() || readOnlyFlag(a.flags), Ephemeral: true,
	}
	if done, err := d.alreadyPublishedEphemeral(ctx, want); err != nil || done {
		return err
	}
	have, existed := d.images.Find(id)
	switch {
	case existed && have.Ephemeral == nil:
		return existsf("a volume with the name %q exists and is not an inline ephemeral one", id)
	case existed && have.Ephemeral.Target != target:
		return preconditionf("the inline ephemeral volume belongs to %q", have.Ephemeral.Target)
	case !existed:
		if have, err = d.createEphemeral(ctx, p, size, want); err != nil {
			return err
		}
	}
	err = d.stageFilesystem(ctx, d.poolSource(have), want)
	if err == nil || existed {
		return err
	}
	undo, cancel := undoContext(ctx)
	defer cancel()
	return undone(err, d.discardEphemeral(undo, have, target))
}

// inlineRoom keeps what many pods that start at once make together within the bound.
type inlineRoom struct {
	mu     sync.Mutex
	making map[string]bool // IDs of volumes that are being made; guarded by mu
}

// roomForEphemeral takes the place of one more inline volume, until the returned function
// is called: then it is there, or came to nothing.
func (d *Driver) roomForEphemeral(id string) (done func(), err error) {
	count, most := 0, d.cfg.EphemeralMaxVolumes
	if most == 0 {
		most = DefaultEphemeralMaxVolumes
	}
	room := &d.inline
	room.mu.Lock()
	defer room.mu.Unlock()
	for _, v := range d.images.List() {
		if v.Ephemeral != nil && !room.making[v.Name] {
			count++
		}
	}
	if count += len(room.making); count >= most {
		return nil, exhaustedf("this node has %d inline ephemeral volumes, and --ephemeral-max-volumes allows %d", count, most)
	}
	if room.making == nil {
		room.making = make(map[string]bool)
	}
	room.making[id] = true
	return func() {
		room.mu.Lock()
		defer room.mu.Unlock()
		delete(room.making, id)
	}, nil
}

// createEphemeral makes the volume, within what the operator allows.
func (d *Driver) createEphemeral(ctx context.Context, p params, size int64, want stageRecord) (image.Volume, error) {
	done, err := d.roomForEphemeral(want.VolumeID)
	if err != nil {
		return image.Volume{}, err
	}
	defer done()
	pool, err := d.pool(p.pool)
	if err != nil {
		return image.Volume{}, err
	}
	v, err := pool.Create(ctx, image.Spec{
		Name: want.VolumeID, Size: size, Allocation: p.allocation, Filesystem: want.FSType, BlockSize: p.blockSize,
		DirectIO: p.directIO, Ephemeral: &image.Ephemeral{Target: want.StagingPath},
	})
	if err != nil {
		return v, err
	}
	klog.FromContext(ctx).Info("Created inline ephemeral volume", "volume", v.ID, "target", want.StagingPath, "size", v.Size)
	return v, nil
}

// discardEphemeral removes a volume that was made for a publication that failed,
// unless it is attached all the same.
func (d *Driver) discardEphemeral(ctx context.Context, v image.Volume, target string) error {
	pool, ok := d.images.Pool(v.Pool)
	if !ok {
		return fmt.Errorf("pool %q: %w", v.Pool, image.ErrNotFound)
	}
	if err := d.unattached(ctx, pool, v.ID); err != nil {
		return err
	}
	// Nothing of the volume is mounted, or it would be attached: what is there is somebody else's.
	if _, mounted, err := d.mtab.At(target); err != nil || mounted {
		return errors.Join(err, pool.Remove(ctx, v.ID))
	}
	return errors.Join(d.mounts.Remove(ctx, target), pool.Remove(ctx, v.ID))
}

// alreadyPublishedEphemeral compares a repeated call with what is there.
func (d *Driver) alreadyPublishedEphemeral(ctx context.Context, want stageRecord) (bool, error) {
	have, ok := d.state.get(want.VolumeID)
	if !ok {
		return false, nil
	}
	if !have.Ephemeral {
		return false, existsf("the volume is staged and not an inline ephemeral one")
	}
	live, err := d.stagingAlive(ctx, have)
	if err != nil || !live {
		return false, err
	}
	switch {
	case have.StagingPath != want.StagingPath:
		return false, preconditionf("the inline ephemeral volume is published at %q already", have.StagingPath)
	case have.FSType != want.FSType, have.Mode != want.Mode, have.ReadOnly != want.ReadOnly, !slices.Equal(have.Flags, want.Flags):
		return false, existsf("the volume is published there as %s, the request asks for %s", have.describe(), want.describe())
	}
	return true, nil
}

// removeEphemeral ends an inline ephemeral volume after its target is gone:
// waits for the device, removes image and record. An ID that is not one's, and
// one that is gone already, are success.
func (d *Driver) removeEphemeral(ctx context.Context, id, target string, b binding) error {
	if r, ok := d.state.get(id); ok && r.Ephemeral && !b.none() {
		if err := d.loops.WaitUnbound(ctx, b.ref()); err != nil {
			return err
		}
	}
	v, ok := d.images.Find(id)
	if !ok || v.Ephemeral == nil || v.Ephemeral.Target != target {
		return d.dropEphemeral(id)
	}
	klog.FromContext(ctx).Info("Removing inline ephemeral volume", "volume", v.ID, "target", target)
	if err := d.discardEphemeral(ctx, v, target); err != nil {
		return err
	}
	return d.dropEphemeral(id)
}

// dropEphemeral forgets the record of an inline ephemeral volume.
func (d *Driver) dropEphemeral(id string) error {
	if r, ok := d.state.get(id); !ok || !r.Ephemeral {
		return nil
	}
	return d.state.drop(id)
}
