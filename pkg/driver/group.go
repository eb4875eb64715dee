package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// groupServer is the CSI GroupController service over the pools of this node.
type groupServer struct {
	csi.UnimplementedGroupControllerServer
	d *Driver
}

// GroupCapabilities are those of the GroupController service.
func GroupCapabilities() []*csi.GroupControllerServiceCapability {
	return []*csi.GroupControllerServiceCapability{{Type: &csi.GroupControllerServiceCapability_Rpc{
		Rpc: &csi.GroupControllerServiceCapability_RPC{Type: csi.GroupControllerServiceCapability_RPC_CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT},
	}}}
}

// GroupControllerGetCapabilities answers GroupCapabilities.
func (s *groupServer) GroupControllerGetCapabilities(context.Context, *csi.GroupControllerGetCapabilitiesRequest) (*csi.GroupControllerGetCapabilitiesResponse, error) {
	return &csi.GroupControllerGetCapabilitiesResponse{Capabilities: GroupCapabilities()}, nil
}

// groupKey is the key of a group snapshot's lock.
func groupKey(dir string) string { return "group/" + dir }

// CreateVolumeGroupSnapshot copies several volumes as they are at one moment, all of
// them or none, or finds the group that an earlier call of the same name made.
func (s *groupServer) CreateVolumeGroupSnapshot(ctx context.Context, req *csi.CreateVolumeGroupSnapshotRequest) (*csi.CreateVolumeGroupSnapshotResponse, error) {
	d, name := s.d, req.GetName()
	if err := checkName(name); err != nil {
		return nil, err
	}
	if len(req.GetSourceVolumeIds()) == 0 || slices.Contains(req.GetSourceVolumeIds(), "") {
		return nil, invalidf("source_volume_ids: at least one is missing")
	}
	p, err := parseSnapshotParams(req.GetParameters())
	if err != nil {
		return nil, err
	}
	spec := image.GroupSpec{Name: name, Sources: slices.Sorted(slices.Values(req.GetSourceVolumeIds())), Independent: p.independent}
	key := groupKey(image.DirName(name))
	err = d.jobs.do(ctx, key, "CreateVolumeGroupSnapshot", fmt.Sprint(spec, p), func() (func(context.Context) error, error) {
		return d.prepareGroup(spec, p, key)
	})
	if err != nil {
		return nil, err
	}
	made, ok := d.images.FindGroup(name)
	if !ok {
		return nil, abortedf("group snapshot %q was removed meanwhile", name)
	}
	return &csi.CreateVolumeGroupSnapshotResponse{GroupSnapshot: d.csiGroup(made)}, nil
}

// prepareGroup takes the locks for a group snapshot and returns what makes it.
func (d *Driver) prepareGroup(spec image.GroupSpec, p snapshotParams, key string) (func(context.Context) error, error) {
	keys := []string{key}
	var volumes []image.Volume
	have, exists := d.images.FindGroup(spec.Name) // whose volumes may be gone
	if sources := sourcesOf(have); exists && !slices.Equal(sources, spec.Sources) {
		return nil, existsf("group snapshot %q exists as %q, of volumes %q, the request names %q", spec.Name, have.ID, sources, spec.Sources)
	}
	for _, id := range spec.Sources {
		if exists {
			break
		}
		v, err := d.snapshotable(id)
		if err != nil {
			return nil, err
		}
		_, dir, _ := image.ParseID(v.ID)
		keys, volumes = append(keys, dir), append(volumes, v)
	}
	unlock, err := d.lockAll("CreateVolumeGroupSnapshot", keys...)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		defer unlock()
		quiesce, err := d.quiesceAll(ctx, p, volumes...)
		if err != nil {
			return err
		}
		made, err := d.images.SnapshotGroup(ctx, spec, quiesce)
		if err != nil {
			return err
		}
		klog.FromContext(ctx).Info("Made group snapshot", "group", made.ID, "volumes", spec.Sources, "inUse", quiesce != nil)
		return nil
	}, nil
}

// sourcesOf lists the volumes of a group snapshot, sorted.
func sourcesOf(g image.Group) []string {
	var sources []string
	for _, s := range g.Snapshots {
		sources = append(sources, s.Source)
	}
	return slices.Sorted(slices.Values(sources))
}

// csiGroup is a group snapshot in CSI's words.
func (d *Driver) csiGroup(g image.Group) *csi.VolumeGroupSnapshot {
	out := &csi.VolumeGroupSnapshot{GroupSnapshotId: g.ID, CreationTime: timestamppb.New(g.Created), ReadyToUse: true}
	for _, s := range g.Snapshots {
		out.Snapshots = append(out.Snapshots, d.csiSnapshot(s))
	}
	return out
}

// oneGroup finds a group snapshot, which must have these snapshots if any are named.
func (d *Driver) oneGroup(id string, snapshots []string) (image.Group, error) {
	g, err := d.images.GetGroup(id)
	if err != nil {
		if _, _, known := d.images.Lookup(id); !known {
			if err := d.foreignPool(id); err != nil {
				return g, err
			}
		}
		return g, fmt.Errorf("group snapshot %q: %w", id, err)
	}
	var have []string
	for _, s := range g.Snapshots {
		have = append(have, s.ID)
	}
	if len(snapshots) > 0 && !slices.Equal(slices.Sorted(slices.Values(have)), slices.Sorted(slices.Values(snapshots))) {
		return g, invalidf("snapshot_ids %v are not those of group snapshot %q, which has %v", snapshots, id, have)
	}
	return g, nil
}

// DeleteVolumeGroupSnapshot removes a group snapshot with all its snapshots. One that is
// unknown is gone already; of a damaged one whatever there is goes.
func (s *groupServer) DeleteVolumeGroupSnapshot(ctx context.Context, req *csi.DeleteVolumeGroupSnapshotRequest) (*csi.DeleteVolumeGroupSnapshotResponse, error) {
	d, id := s.d, req.GetGroupSnapshotId()
	if id == "" {
		return nil, invalidf("group_snapshot_id is missing")
	}
	_, dir, ok := d.images.Lookup(id)
	if !ok {
		return &csi.DeleteVolumeGroupSnapshotResponse{}, d.foreignPool(id)
	}
	unlock, err := d.lockAll("DeleteVolumeGroupSnapshot", groupKey(dir))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := d.oneGroup(id, req.GetSnapshotIds()); ignoreNotFound(err) != nil && !errors.Is(err, image.ErrDamaged) {
		return nil, err
	}
	// Also if it is gone: an earlier call may not have removed all of its snapshots.
	if err := d.images.RemoveGroup(ctx, id); err != nil {
		return nil, fmt.Errorf("delete group snapshot %q: %w", id, err)
	}
	return &csi.DeleteVolumeGroupSnapshotResponse{}, nil
}

// GetVolumeGroupSnapshot describes one group snapshot.
func (s *groupServer) GetVolumeGroupSnapshot(_ context.Context, req *csi.GetVolumeGroupSnapshotRequest) (*csi.GetVolumeGroupSnapshotResponse, error) {
	if req.GetGroupSnapshotId() == "" {
		return nil, invalidf("group_snapshot_id is missing")
	}
	g, err := s.d.oneGroup(req.GetGroupSnapshotId(), req.GetSnapshotIds())
	if err != nil {
		return nil, err
	}
	return &csi.GetVolumeGroupSnapshotResponse{GroupSnapshot: s.d.csiGroup(g)}, nil
}

// ignoreNotFound is for what is to be gone.
func ignoreNotFound(err error) error {
	if errors.Is(err, image.ErrNotFound) {
		return nil
	}
	return err
}
