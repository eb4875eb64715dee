package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// Keys of VolumeSnapshotClass and VolumeGroupSnapshotClass parameters; the first two
// also of StorageClasses, for clones.
const (
	// paramFreezeTimeout is how long a filesystem may be frozen; a Go duration.
	paramFreezeTimeout = "freezeTimeout"
	// paramCopyInUse allows to freeze for as long as a copy takes; true or false.
	paramCopyInUse = "copyInUse"
	// paramIndependent asks for snapshots that soon share no blocks; true or false.
	paramIndependent = "independent"

	defaultFreezeTimeout = 10 * time.Second
	maxFreezeTimeout     = time.Hour
)

// snapshotParams are parameters of a snapshot class after validation.
type snapshotParams struct {
	freezeTimeout time.Duration
	copyInUse     bool
	independent   bool
}

func defaultSnapshotParams() snapshotParams {
	return snapshotParams{freezeTimeout: defaultFreezeTimeout}
}

// parseSnapshotParams checks the parameters of a snapshot class, as strictly as
// parseParams does.
func parseSnapshotParams(m map[string]string) (snapshotParams, error) {
	p := defaultSnapshotParams()
	for _, key := range slices.Sorted(maps.Keys(m)) {
		if strings.HasPrefix(key, kubernetesPrefix) {
			continue
		}
		if err := p.set(key, m[key]); err != nil {
			return p, err
		}
	}
	return p, nil
}

// set takes one parameter.
func (p *snapshotParams) set(key, value string) (err error) {
	if err := knownKey("parameter", key, SnapshotClass); err != nil {
		return err
	}
	switch key {
	case paramFreezeTimeout:
		p.freezeTimeout, err = time.ParseDuration(value)
		if err == nil && (p.freezeTimeout <= 0 || p.freezeTimeout > maxFreezeTimeout) {
			err = fmt.Errorf("not above 0 and at most %v", maxFreezeTimeout)
		}
	case paramCopyInUse:
		p.copyInUse, err = strconv.ParseBool(value)
	case paramIndependent:
		p.independent, err = strconv.ParseBool(value)
	default:
		return unreadable(key)
	}
	if err != nil {
		return invalidf("parameter %q: %q: %v", key, value, err)
	}
	return nil
}

// snapshotKey is the key of a snapshot's lock. No volume's key has a slash.
func snapshotKey(dir string) string { return "snapshot/" + dir }

// lockAll takes several locks, each once, or none.
func (d *Driver) lockAll(method string, keys ...string) (unlock func(), err error) {
	var held []func()
	unlock = func() {
		for _, u := range held {
			u()
		}
	}
	for _, key := range slices.Compact(slices.Sorted(slices.Values(keys))) { // volumes of two pools may share a key
		u, err := d.locks.lock(key, method)
		if err != nil {
			unlock()
			return nil, err
		}
		held = append(held, u)
	}
	return unlock, nil
}

// CreateSnapshot copies a volume as it is at one moment, or finds the snapshot that
// an earlier call of the same name made.
func (s *controllerServer) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	d, name, source := s.d, req.GetName(), req.GetSourceVolumeId()
	if err := checkName(name); err != nil {
		return nil, err
	}
	if source == "" {
		return nil, invalidf("source_volume_id is missing")
	}
	p, err := parseSnapshotParams(req.GetParameters())
	if err != nil {
		return nil, err
	}
	key := snapshotKey(image.DirName(name))
	err = d.jobs.do(ctx, key, "CreateSnapshot", fmt.Sprint(source, p), func() (func(context.Context) error, error) {
		return d.prepareSnapshot(req, p, key)
	})
	if err != nil {
		return nil, err
	}
	made, ok := d.images.FindSnapshot(name)
	if !ok {
		return nil, abortedf("snapshot %q was removed meanwhile", name)
	}
	return &csi.CreateSnapshotResponse{Snapshot: d.csiSnapshot(made)}, nil
}

// prepareSnapshot takes the locks for a snapshot and returns what makes it.
func (d *Driver) prepareSnapshot(req *csi.CreateSnapshotRequest, p snapshotParams, key string) (func(context.Context) error, error) {
	spec := image.SnapshotSpec{Name: req.GetName(), Source: req.GetSourceVolumeId(), Independent: p.independent}
	if have, ok := d.images.FindSnapshot(spec.Name); ok {
		if have.SnapshotSpec != spec || have.Group != "" {
			return nil, existsf("snapshot %q exists as %q, of volume %q, independent %v, group %q", spec.Name, have.ID, have.Source, have.Independent, have.Group)
		}
		return func(context.Context) error { return nil }, nil
	}
	v, err := d.snapshotable(spec.Source)
	if err != nil {
		return nil, err
	}
	_, dir, _ := image.ParseID(v.ID)
	unlock, err := d.lockAll("CreateSnapshot", key, dir)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		defer unlock()
		quiesce, err := d.quiesceAll(ctx, p, v)
		if err != nil {
			return err
		}
		pool, err := d.pool(v.Pool)
		if err != nil {
			return err
		}
		made, err := pool.Snapshot(ctx, spec, quiesce)
		if err != nil {
			return err
		}
		klog.FromContext(ctx).Info("Made snapshot", "snapshot", made.ID, "volume", v.ID, "inUse", quiesce != nil, "reflink", made.Reflinked)
		return nil
	}, nil
}

// snapshotable finds a volume that can be copied.
func (d *Driver) snapshotable(id string) (image.Volume, error) {
	v, err := d.volume(id)
	if err == nil && v.Ephemeral != nil {
		err = preconditionf("volume %q is the inline ephemeral volume of a pod, which cannot be copied", id)
	}
	return v, err
}

// quiesceAll finds out who writes to volumes, and returns what makes them hold still;
// nil when nobody writes. A volume in a pool that cannot reflink would be frozen for as
// long as all its data is copied: that is refused unless it was allowed.
// Precondition: the volumes' locks are held.
func (d *Driver) quiesceAll(ctx context.Context, p snapshotParams, volumes ...image.Volume) (image.Quiesce, error) {
	all := make([]writers, 0, len(volumes))
	for _, v := range volumes {
		w, err := d.writersOf(ctx, v)
		if err != nil {
			return nil, err
		}
		pool, err := d.pool(v.Pool)
		if err != nil {
			return nil, err
		}
		if len(w.raw) > 0 && !pool.CanReflink() {
			return nil, preconditionf("volume %q is a raw block volume in use, and pool %q is on %s, which cannot make instant copies: "+
				"nothing stops its writers, so the copy would be of no one moment. Stop its pods first, or use a pool on XFS or btrfs", v.ID, v.Pool, pool.Filesystem())
		}
		if w.any() && !p.copyInUse && !pool.CanReflink() {
			return nil, preconditionf("volume %q is in use, and pool %q is on %s, which cannot make instant copies: "+
				"the volume would be frozen while all its data is copied. Stop its pods first, use a pool on XFS or btrfs, "+
				"or allow it with the parameters %q: \"true\" and %q", v.ID, v.Pool, pool.Filesystem(), paramCopyInUse, paramFreezeTimeout)
		}
		all = append(all, w)
	}
	return d.quiesce(all, p.freezeTimeout), nil
}

// csiSnapshot is a snapshot in CSI's words.
func (d *Driver) csiSnapshot(s image.Snapshot) *csi.Snapshot {
	return &csi.Snapshot{
		SnapshotId: s.ID, SourceVolumeId: s.Source, SizeBytes: s.Volume.Content(),
		CreationTime: timestamppb.New(s.Created), ReadyToUse: true, GroupSnapshotId: s.Group,
	}
}

// DeleteSnapshot removes a snapshot. One that is unknown is gone already; one of a
// group goes with the group only.
func (s *controllerServer) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	d, id := s.d, req.GetSnapshotId()
	if id == "" {
		return nil, invalidf("snapshot_id is missing")
	}
	pool, dir, ok := d.images.Lookup(id)
	if !ok {
		return &csi.DeleteSnapshotResponse{}, d.foreignPool(id)
	}
	unlock, err := d.locks.lock(snapshotKey(dir), "DeleteSnapshot")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := pool.RemoveSnapshot(ctx, id); err != nil {
		return nil, fmt.Errorf("delete snapshot %q: %w", id, err)
	}
	return &csi.DeleteSnapshotResponse{}, nil
}

// oneSnapshot finds a snapshot of a pool: NOT_FOUND only when no pool can have it.
func (d *Driver) oneSnapshot(id string) (image.Snapshot, error) {
	v, err := d.images.GetSnapshot(id)
	if err == nil {
		return v, nil
	}
	if _, _, known := d.images.Lookup(id); !known {
		if err := d.foreignPool(id); err != nil {
			return v, err
		}
	}
	return v, fmt.Errorf("snapshot %q: %w", id, err)
}

// GetSnapshot describes one snapshot.
func (s *controllerServer) GetSnapshot(_ context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	if req.GetSnapshotId() == "" {
		return nil, invalidf("snapshot_id is missing")
	}
	v, err := s.d.oneSnapshot(req.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	return &csi.GetSnapshotResponse{Snapshot: s.d.csiSnapshot(v)}, nil
}

// ListSnapshots lists the snapshots of all pools of this node, ordered by ID; of one
// volume, or the one with an ID, if the request says so.
func (s *controllerServer) ListSnapshots(_ context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	all, err := s.d.filteredSnapshots(req.GetSnapshotId(), req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	all, next, err := page(all, func(v image.Snapshot) string { return v.ID }, req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	resp := &csi.ListSnapshotsResponse{NextToken: next}
	for _, v := range all {
		resp.Entries = append(resp.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: s.d.csiSnapshot(v)})
	}
	return resp, nil
}

// filteredSnapshots returns those with the ID and of the volume, each unless it is "".
// None is an answer, but for one that may well be in a pool that is not here.
func (d *Driver) filteredSnapshots(id, source string) ([]image.Snapshot, error) {
	if id == "" {
		return slices.DeleteFunc(d.images.ListSnapshots(), func(v image.Snapshot) bool { return source != "" && v.Source != source }), nil
	}
	if _, _, known := d.images.Lookup(id); !known {
		return nil, d.foreignPool(id)
	}
	v, err := d.images.GetSnapshot(id)
	switch {
	case errors.Is(err, image.ErrNotFound), err == nil && source != "" && v.Source != source:
		return nil, nil
	case err != nil:
		return nil, err
	}
	return []image.Snapshot{v}, nil
}
