package driver

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// problems are health findings without repetition of (status, reason), which
// CSI forbids.
type problems []*csi.VolumeHealth_VolumeHealthEntry

func (p *problems) addf(status csi.VolumeHealthErrorType, r reason, format string, args ...any) {
	p.add(status, reasonTable[r].word, fmt.Sprintf(format, args...), reasonTable[r].action)
}

func (p *problems) add(status csi.VolumeHealthErrorType, word, message, action string) {
	for _, have := range *p {
		if have.GetStatus() == status && have.GetReason() == word {
			return
		}
	}
	*p = append(*p, &csi.VolumeHealth_VolumeHealthEntry{Status: status, Reason: word, Message: withAction(message, action)})
}

// withAction is what is wrong and what to do about it, as people are told of it. It has
// at most maxMessage bytes: what is cut is what is wrong, of which logs have the whole.
func withAction(message, action string) string {
	if most := maxMessage - len(action) - len("...; "); len(message) > most {
		message = strings.ToValidUTF8(message[:most], "") + "..."
	}
	return message + "; " + action
}

// imageProblems asks the pool about the image of a volume, also when its record is
// refused.
func (d *Driver) imageProblems(ctx context.Context, id string) problems {
	var p problems
	pool, _, ok := d.images.Lookup(id)
	if !ok {
		p.addf(csi.VolumeHealthErrorType_INACCESSIBLE, reasonPoolUnknown, "the pool of %q is not configured", id)
		return p
	}
	for _, found := range pool.VolumeHealth(ctx, id) {
		p.add(healthStatus(found.Kind), found.Reason, found.Message, found.Action)
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
	if _, err := s.d.volume(id); err != nil && !s.d.refused(id, err) {
		return nil, err
	}
	return &csi.ControllerGetVolumeHealthResponse{
		VolumeHealth: &csi.VolumeHealth{VolumeId: id, HealthStatuses: s.d.imageProblems(ctx, id)},
	}, nil
}

// refused says whether an error of volume is about one that is there, and whose record
// cannot be used: that is for its health to say.
func (d *Driver) refused(id string, err error) bool {
	_, _, known := d.images.Lookup(id)
	return known && !errors.Is(err, image.ErrNotFound)
}

// listed are the IDs of all volumes that a CO may ask for, those whose record is refused
// too, in order.
func (d *Driver) listed() []string {
	var ids []string
	for _, v := range persistent(d.images.List()) {
		ids = append(ids, v.ID)
	}
	for _, p := range d.images.Pools() {
		for dir := range p.Damaged() {
			id := image.VolumeID(p.ID(), dir)
			if _, _, ok := image.ParseID(id); ok { // else it never was a volume: the pool's health names it
				ids = append(ids, id)
			}
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// listPatience is how long a list of volumes waits for calls that work on them, for all
// together: there may be many, each with a copy that takes hours.
const listPatience = time.Second

// ControllerListVolumeHealth lists the volumes with which something is wrong.
func (s *controllerServer) ControllerListVolumeHealth(ctx context.Context, req *csi.ControllerListVolumeHealthRequest) (*csi.ControllerListVolumeHealthResponse, error) {
	limit := req.GetMaxEntries()
	if limit < 0 {
		return nil, invalidf("max_entries %d is negative", limit)
	}
	ids, _, err := page(s.d.listed(), func(id string) string { return id }, req.GetStartingToken(), math.MaxInt32)
	if err != nil {
		return nil, err
	}
	if limit == 0 {
		limit = pageLimit
	}
	resp := &csi.ControllerListVolumeHealthResponse{}
	wait, cancel := context.WithTimeout(ctx, listPatience)
	defer cancel()
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		found := s.d.imageProblems(wait, id)
		if len(found) == 0 {
			continue
		}
		if len(resp.GetEntries()) == int(limit) {
			resp.NextToken = makeToken(resp.GetEntries()[limit-1].GetVolumeId())
			break
		}
		resp.Entries = append(resp.Entries, &csi.VolumeHealth{VolumeId: id, HealthStatuses: found})
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
	refused := err != nil && d.refused(id, err)
	if err != nil && !staged && !refused {
		return nil, err
	}
	var p problems
	if err == nil || refused {
		p = d.imageProblems(ctx, id)
	} else if r.Mapped == nil && !r.Ephemeral {
		p.addf(csi.VolumeHealthErrorType_INACCESSIBLE, reasonUnknown, "%v", err)
	}
	if staged {
		d.stagingProblems(ctx, r, v, &p)
	}
	if text := d.tuning.problem(id); text != "" && staged {
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
		p.addf(csi.VolumeHealthErrorType_INACCESSIBLE, reasonDetached, "loop device %d no longer shows the volume", r.Device.Number)
		return
	}
	if v.ID != "" && info.Size < v.Size {
		p.addf(csi.VolumeHealthErrorType_DEGRADED, reasonDeviceSmaller, "%s has %d bytes, the volume %d: the expansion is not finished on this node", info.Path, info.Size, v.Size)
	}
	if r.Device.encrypted() {
		d.mappingProblem(r, v, p)
	}
	if r.Block && info.Autoclear {
		p.addf(csi.VolumeHealthErrorType_DEGRADED, reasonCleared, "somebody cleared %s (losetup -d): it goes with its last user", info.Path)
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
		p.addf(csi.VolumeHealthErrorType_INACCESSIBLE, reasonUnmounted, "the filesystem is no longer mounted at %q", r.StagingPath)
	case m.ReadOnly && !r.ReadOnly:
		p.addf(csi.VolumeHealthErrorType_INACCESSIBLE, reasonReadOnly, "the kernel made the filesystem read-only, usually after an I/O error on %s", info.Path)
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
		p.addf(csi.VolumeHealthErrorType_DEGRADED, reasonNotGrown, "the filesystem is smaller than its device of %d bytes", info.Size)
	}
}

// NodeGetStorageHealth reports what is wrong with the pools of this node.
func (s *nodeServer) NodeGetStorageHealth(ctx context.Context, _ *csi.NodeGetStorageHealthRequest) (*csi.NodeGetStorageHealthResponse, error) {
	resp := &csi.NodeGetStorageHealthResponse{}
	// One entry for each (status, reason), as CSI has it; its message names all of them.
	add := func(status csi.StorageHealthErrorType, reason, message string) {
		for _, have := range resp.GetBackendHealth() {
			if have.GetStatus() == status && have.GetReason() == reason {
				have.Message = addMessage(have.GetMessage(), message)
				return
			}
		}
		resp.BackendHealth = append(resp.BackendHealth, &csi.NodeGetStorageHealthResponse_StorageBackendHealth{Status: status, Reason: reason, Message: message})
	}
	for _, absent := range s.d.images.Absent() {
		add(csi.StorageHealthErrorType_STORAGE_UNREACHABLE, reasonTable[reasonPoolAbsent].word, fmt.Sprintf("pool %q: %s", absent.Name, absentMessage(absent)))
	}
	for _, found := range s.d.shortages() {
		add(csi.StorageHealthErrorType_STORAGE_DEGRADED, found.Reason, found.Message)
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
			add(status, found.Reason, fmt.Sprintf("pool %q: %s", pool.Name(), withAction(found.Message, found.Action)))
		}
	}
	return resp, nil
}

// messageLimit is how long a message with several findings may become, in bytes.
const messageLimit = 4096

// addMessage puts another finding behind those that are in a message, or says that
// there are more.
func addMessage(have, more string) string {
	const andMore = "; and more"
	switch {
	case strings.HasSuffix(have, andMore):
		return have
	case len(have)+len(more) > messageLimit:
		return have + andMore
	}
	return have + "; " + more
}
