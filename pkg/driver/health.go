package driver

import (
	"context"
	"fmt"
	"math"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// Reasons of health entries found by the node, beside those of package image.
const (
	reasonDetached      = "LoopDeviceDetached"
	reasonCleared       = "LoopDeviceCleared"
	reasonUnmounted     = "FilesystemUnmounted"
	reasonReadOnly      = "FilesystemReadOnly"
	reasonNotGrown      = "FilesystemSmallerThanVolume"
	reasonDeviceSmaller = "LoopDeviceSmallerThanVolume"
	reasonUnknown       = "HealthCheckFailed"
	reasonNotTuned      = "TuningNotInForce"
)

// problems are health findings without repetition of (status, reason), which
// CSI forbids.
type problems []*csi.VolumeHealth_VolumeHealthEntry

func (p *problems) addf(status csi.VolumeHealthErrorType, reason, format string, args ...any) {
	for _, have := range *p {
		if have.GetStatus() == status && have.GetReason() == reason {
			return
		}
	}
	*p = append(*p, &csi.VolumeHealth_VolumeHealthEntry{Status: status, Reason: reason, Message: fmt.Sprintf(format, args...)})
}

// imageProblems asks the pool about the image of a volume.
func (d *Driver) imageProblems(ctx context.Context, v image.Volume) problems {
	var p problems
	pool, ok := d.images.Pool(v.Pool)
	if !ok {
		p.addf(csi.VolumeHealthErrorType_INACCESSIBLE, "PoolMissing", "pool %q is not configured", v.Pool)
		return p
	}
	for _, found := range pool.VolumeHealth(ctx, v.ID) {
		p.addf(healthStatus(found.Kind), found.Reason, "%s", found.Message)
	}
	return p
}

// healthStatus turns a pool's word into CSI's.
func healthStatus(k image.ProblemKind) csi.VolumeHealthErrorType {
	switch k {
	case image.Degraded:
		return csi.VolumeHealthErrorType_DEGRADED
	case image.Inaccessible:
		return csi.VolumeHealthErrorType_INACCESSIBLE
	case image.DataLoss:
		return csi.VolumeHealthErrorType_DATA_LOSS
	default:
		return csi.VolumeHealthErrorType_UNKNOWN_VOLUME_HEALTH_TYPE
	}
}

// ControllerGetVolumeHealth reports what is wrong with the image of a volume.
func (s *controllerServer) ControllerGetVolumeHealth(ctx context.Context, req *csi.ControllerGetVolumeHealthRequest) (*csi.ControllerGetVolumeHealthResponse, error) {
	id := req.GetVolumeId()
	if id == "" {
		return nil, invalidf("volume_id is missing")
	}
	v, err := s.d.volume(id)
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeHealthResponse{
		VolumeHealth: &csi.VolumeHealth{VolumeId: id, HealthStatuses: s.d.imageProblems(ctx, v)},
	}, nil
}

// ControllerListVolumeHealth lists the volumes with which something is wrong.
func (s *controllerServer) ControllerListVolumeHealth(ctx context.Context, req *csi.ControllerListVolumeHealthRequest) (*csi.ControllerListVolumeHealthResponse, error) {
	limit := req.GetMaxEntries()
	if limit < 0 {
		return nil, invalidf("max_entries %d is negative", limit)
	}
	volumes, _, err := page(persistent(s.d.images.List()), volumeID, req.GetStartingToken(), math.MaxInt32)
	if err != nil {
		return nil, err
	}
	if limit == 0 {
		limit = pageLimit
	}
	resp := &csi.ControllerListVolumeHealthResponse{}
	for _, v := range volumes {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		found := s.d.imageProblems(ctx, v)
		if len(found) == 0 {
			continue
		}
		if len(resp.GetEntries()) == int(limit) {
			resp.NextToken = makeToken(resp.GetEntries()[limit-1].GetVolumeId())
			break
		}
		resp.Entries = append(resp.Entries, &csi.VolumeHealth{VolumeId: v.ID, HealthStatuses: found})
	}
	return resp, nil
}

// NodeGetVolumeHealth reports what is wrong with a volume on this node: its
// image, its loop device, its mount.
func (s *nodeServer) NodeGetVolumeHealth(ctx context.Context, req *csi.NodeGetVolumeHealthRequest) (*csi.NodeGetVolumeHealthResponse, error) {
	d, id := s.d, req.GetVolumeId()
	if id == "" {
		return nil, invalidf("volume_id is missing")
	}
	r, staged := d.state.get(id)
	v, err := d.volume(id)
	if err != nil && !staged {
		return nil, err
	}
	var p problems
	if err == nil {
		p = d.imageProblems(ctx, v)
	} else if r.Mapped == nil && !r.Ephemeral {
		p.addf(csi.VolumeHealthErrorType_INACCESSIBLE, reasonUnknown, "%v", err)
	}
	if staged {
		d.stagingProblems(ctx, r, v, &p)
	}
	if text := d.tuning.problem(id); text != "" {
		p.addf(csi.VolumeHealthErrorType_DEGRADED, reasonNotTuned, "mutable parameters are recorded, and not in force: %s", text)
	}
	return &csi.NodeGetVolumeHealthResponse{VolumeHealth: &csi.VolumeHealth{VolumeId: id, HealthStatuses: p}}, nil
}

// stagingProblems compares a staged volume's record with what the kernel shows.
func (d *Driver) stagingProblems(ctx context.Context, r stageRecord, v image.Volume, p *problems) {
	if r.Device.none() {
		return // it is being staged
	}
	info, bound, err := d.status(ctx, r.Device, r.Image)
	switch {
	case err != nil:
		p.addf(csi.VolumeHealthErrorType_DEGRADED, reasonUnknown, "loop device %d: %v", r.Device.Number, err)
		return
	case !bound:
		p.addf(csi.VolumeHealthErrorType_INACCESSIBLE, reasonDetached, "loop device %d no longer shows the volume: delete the pods that use it, so that it is staged anew", r.Device.Number)
		return
	}
	if v.ID != "" && info.Size < v.Size {
		p.addf(csi.VolumeHealthErrorType_DEGRADED, reasonDeviceSmaller, "%s has %d bytes, the volume %d: the expansion is not finished on this node", info.Path, info.Size, v.Size)
	}
	if r.Device.encrypted() {
		d.mappingProblem(r, v, p)
	}
	if r.Block && info.Autoclear {
		p.addf(csi.VolumeHealthErrorType_DEGRADED, reasonCleared, "somebody cleared %s (losetup -d): it goes with its last user: delete the pods that use the volume, so that it is staged anew", info.Path)
	}
	if r.Block {
		return
	}
	m, mounted, err := d.mtab.At(r.StagingPath)
	ours := mounted && r.Device.shownBy(m)
	switch {
	case err != nil:
		p.addf(csi.VolumeHealthErrorType_DEGRADED, reasonUnknown, "%q: %v", r.StagingPath, err)
	case !ours:
		p.addf(csi.VolumeHealthErrorType_INACCESSIBLE, reasonUnmounted, "the filesystem is no longer mounted at %q: delete the pods that use it, so that it is staged anew", r.StagingPath)
	case m.ReadOnly && !r.ReadOnly:
		p.addf(csi.VolumeHealthErrorType_INACCESSIBLE, reasonReadOnly, "the kernel made the filesystem read-only, usually after an I/O error: see the kernel log for %s, then delete the pods that use it; it is checked when it is staged anew", info.Path)
	}
	if ours {
		d.sizeProblem(r, info, p)
	}
}

// sizeProblem finds a filesystem that did not follow the growth of its device.
func (d *Driver) sizeProblem(r stageRecord, info loop.Info, p *problems) {
	if r.Mapped != nil || r.ReadOnly {
		return
	}
	small, err := d.mtab.NeedsGrow(mount.GrowSpec{FSType: r.FSType, Device: r.Device.path(info), Path: r.StagingPath})
	if err == nil && small {
		p.addf(csi.VolumeHealthErrorType_DEGRADED, reasonNotGrown, "the filesystem is smaller than its device of %d bytes: expand the volume again, or see the driver's log for why it could not grow", info.Size)
	}
}

// NodeGetStorageHealth reports what is wrong with the pools of this node.
func (s *nodeServer) NodeGetStorageHealth(ctx context.Context, _ *csi.NodeGetStorageHealthRequest) (*csi.NodeGetStorageHealthResponse, error) {
	resp := &csi.NodeGetStorageHealthResponse{}
	seen := make(map[string]bool)
	for _, absent := range s.d.images.Absent() {
		if !seen["absent"] {
			seen["absent"] = true
			resp.BackendHealth = append(resp.BackendHealth, &csi.NodeGetStorageHealthResponse_StorageBackendHealth{
				Status: csi.StorageHealthErrorType_STORAGE_UNREACHABLE, Reason: "PoolAbsent",
				Message: fmt.Sprintf("pool %q: %v", absent.Name, absent.Err),
			})
		}
	}
	for _, pool := range s.d.images.Pools() {
		// A pool that cannot be used is among what Health tells after the check.
		if err := pool.Check(ctx); err != nil && ctx.Err() != nil {
			return nil, err
		}
		for _, found := range pool.Health() {
			status := csi.StorageHealthErrorType_STORAGE_DEGRADED
			if found.Kind != image.Degraded {
				status = csi.StorageHealthErrorType_STORAGE_UNREACHABLE
			}
			key := status.String() + found.Reason
			if seen[key] {
				continue // one entry for each (status, reason); the message names the first pool
			}
			seen[key] = true
			resp.BackendHealth = append(resp.BackendHealth, &csi.NodeGetStorageHealthResponse_StorageBackendHealth{
				Status: status, Reason: found.Reason, Message: fmt.Sprintf("pool %q: %s", pool.Name(), found.Message),
			})
		}
	}
	return resp, nil
}
