package driver

import (
	"context"
	"fmt"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// controllerServer is the CSI Controller service over the pools of this node.
type controllerServer struct {
	csi.UnimplementedControllerServer
	d *Driver
}

// controllerRPCs are the optional calls this service answers.
var controllerRPCs = []csi.ControllerServiceCapability_RPC_Type{
	csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
	csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
	csi.ControllerServiceCapability_RPC_GET_CAPACITY,
	csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
	csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
	csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
	csi.ControllerServiceCapability_RPC_GET_SNAPSHOT,
	csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
	csi.ControllerServiceCapability_RPC_GET_VOLUME,
	csi.ControllerServiceCapability_RPC_MODIFY_VOLUME,
	csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	csi.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
	csi.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH,
}

// ControllerCapabilities are the optional calls of the Controller service.
func ControllerCapabilities() []csi.ControllerServiceCapability_RPC_Type {
	return slices.Clone(controllerRPCs)
}

// ControllerGetCapabilities lists controllerRPCs.
func (s *controllerServer) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	caps := make([]*csi.ControllerServiceCapability, len(controllerRPCs))
	for i, t := range controllerRPCs {
		caps[i] = &csi.ControllerServiceCapability{Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}}}
	}
	return &csi.ControllerGetCapabilitiesResponse{Capabilities: caps}, nil
}

// pool finds the pool that a request means: INVALID_ARGUMENT when there is none of
// that name, UNAVAILABLE when it cannot be used now.
func (d *Driver) pool(named string) (*image.Pool, error) {
	name := d.poolName(named)
	if pool, ok := d.images.Pool(name); ok {
		return pool, nil
	}
	if d.images.Configured(name) {
		return nil, unavailablef("pool %q of node %q cannot be used now: see the node's storage health, or its log", name, d.cfg.NodeID)
	}
	return nil, invalidf("parameter %q: there is no pool %q on node %q", paramPool, name, d.cfg.NodeID)
}

// volume finds a volume of a pool: NOT_FOUND only when no pool can have it.
func (d *Driver) volume(id string) (image.Volume, error) {
	v, err := d.images.Get(id)
	if err == nil {
		return v, nil
	}
	if _, _, known := d.images.Lookup(id); known {
		v, err = d.images.Get(id) // its pool may have come in a moment ago
	} else if err := d.foreignPool(id); err != nil {
		return v, err
	}
	if err != nil {
		return v, fmt.Errorf("volume %q: %w", id, err)
	}
	return v, nil
}

// poolName is the pool that a request means.
func (d *Driver) poolName(named string) string { return or(named, d.cfg.DefaultPool) }

// csiVolume is a volume in CSI's words.
func (d *Driver) csiVolume(v image.Volume) *csi.Volume {
	return &csi.Volume{
		VolumeId: v.ID, CapacityBytes: v.Content(), ContentSource: csiSource(v.Source),
		AccessibleTopology: []*csi.Topology{d.topology()},
	}
}

// foreignPool tells an ID that no pool ever made, which is a volume that does
// not exist (nil), from one of a pool that is not configured here: that volume
// may well exist, and must not be reported as gone.
func (d *Driver) foreignPool(id string) error {
	if poolID, _, ok := image.ParseID(id); ok {
		return unavailablef("volume %q belongs to the pool with ID %q, which is not configured on node %q", id, poolID, d.cfg.NodeID)
	}
	return nil
}

// ValidateVolumeCapabilities confirms what a volume can do; what it cannot is an
// answer without confirmation, not an error.
func (s *controllerServer) ValidateVolumeCapabilities(_ context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	switch {
	case req.GetVolumeId() == "":
		return nil, invalidf("volume_id is missing")
	case len(req.GetVolumeCapabilities()) == 0:
		return nil, invalidf("volume_capabilities is missing")
	}
	src, err := s.d.source(req.GetVolumeId(), req.GetVolumeContext())
	if err != nil {
		return nil, err
	}
	if no := s.d.confirm(src, req); no != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: no.Error()}, nil //nolint:nilerr // not confirmed is an answer
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext:      req.GetVolumeContext(),
		VolumeCapabilities: req.GetVolumeCapabilities(),
		Parameters:         req.GetParameters(),
		MutableParameters:  req.GetMutableParameters(),
	}}, nil
}

// confirm returns why the volume cannot do what is asked, or nil.
func (d *Driver) confirm(src source, req *csi.ValidateVolumeCapabilitiesRequest) error {
	for _, c := range req.GetVolumeCapabilities() {
		a, err := parseAccess(c)
		if err != nil {
			return err
		}
		if err := src.allows(a); err != nil {
			return err
		}
	}
	if _, err := parseMutable(req.GetMutableParameters()); err != nil {
		return err
	}
	if len(req.GetMutableParameters()) > 0 && src.fixed {
		return invalidf("a mapped volume has no mutable parameters")
	}
	if len(req.GetParameters()) == 0 {
		return nil
	}
	p, err := parseParams(req.GetParameters())
	if err != nil {
		return err
	}
	v, err := d.images.Get(src.id)
	if err != nil {
		return err
	}
	want := wanted{Pool: p.pool, Spec: v.Spec}
	want.Allocation, want.BlockSize, want.DirectIO, want.Encryption = p.allocation, p.blockSize, p.directIO, p.encryption
	if p.fsType != "" && v.Filesystem != "" {
		want.Filesystem = p.fsType
	}
	if want.MkfsOptions, err = image.ParseMkfsOptions(v.Filesystem, p.mkfsOptions); err != nil {
		return err
	}
	if v.Source != nil { // a copy has both of its source, see parseCopy
		want.MkfsOptions = v.MkfsOptions
		if !p.hasBlockSize {
			want.BlockSize = v.BlockSize
		}
	}
	return compatible(v, want, capacity{}, d.poolName(p.pool))
}

// ControllerGetVolume describes one volume.
func (s *controllerServer) ControllerGetVolume(_ context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, invalidf("volume_id is missing")
	}
	v, err := s.d.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{Volume: s.d.csiVolume(v), Status: &csi.ControllerGetVolumeResponse_VolumeStatus{}}, nil
}
