package router

import (
	"context"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// identityServer is the CSI Identity service for the sidecars.
type identityServer struct {
	csi.UnimplementedIdentityServer
	r *Router
}

// GetPluginInfo names the driver and the controller's version.
func (s *identityServer) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: s.r.cfg.Driver, VendorVersion: s.r.cfg.Version}, nil
}

// GetPluginCapabilities answers what the router was told.
func (s *identityServer) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{Capabilities: s.r.cfg.Plugin}, nil
}

// Probe is ready when nodes can link; it does not wait for any.
func (s *identityServer) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(s.r.Ready() == nil)}, nil
}

// controllerServer is the CSI Controller service for the sidecars.
type controllerServer struct {
	csi.UnimplementedControllerServer
	r *Router
}

// ControllerGetCapabilities answers what the router was told.
func (s *controllerServer) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	var caps []*csi.ControllerServiceCapability
	for _, t := range s.r.cfg.Controller {
		caps = append(caps, &csi.ControllerServiceCapability{Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}}})
	}
	return &csi.ControllerGetCapabilitiesResponse{Capabilities: caps}, nil
}

// needs says which capability a method belongs to.
var needs = map[string]csi.ControllerServiceCapability_RPC_Type{
	"CreateVolume":               csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
	"DeleteVolume":               csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
	"ControllerPublishVolume":    csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME,
	"ControllerUnpublishVolume":  csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME,
	"ListVolumes":                csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
	"ControllerListVolumeHealth": csi.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH,
	"ControllerGetVolumeHealth":  csi.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
	"GetCapacity":                csi.ControllerServiceCapability_RPC_GET_CAPACITY,
	"CreateSnapshot":             csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
	"DeleteSnapshot":             csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
	"ListSnapshots":              csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
	"GetSnapshot":                csi.ControllerServiceCapability_RPC_GET_SNAPSHOT,
	"ControllerExpandVolume":     csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
	"ControllerGetVolume":        csi.ControllerServiceCapability_RPC_GET_VOLUME,
	"ControllerModifyVolume":     csi.ControllerServiceCapability_RPC_MODIFY_VOLUME,
}

// offered refuses a method whose capability is not reported.
func (r *Router) offered(method string) error {
	if need, ok := needs[method]; ok && !slices.Contains(r.cfg.Controller, need) {
		return status.Errorf(codes.Unimplemented, "%s is not supported", method)
	}
	return nil
}

// byID sends a call to the node that the ID in it leads to, and lets checks judge the
// answer. An ID that nothing can have gets the answer unknown.
func byID[Req, Resp any](
	ctx context.Context, r *Router, method, kind, id string, req Req, do caller[Req, Resp], unknown func() (Resp, error), checks ...func(*session, Resp) error,
) (Resp, error) {
	var none Resp
	if id == "" {
		return none, invalidf("%s_id is missing", kind)
	}
	s, ok, err := r.owner(kind, id)
	switch {
	case err != nil:
		return none, err
	case !ok:
		return unknown()
	}
	resp, err := call(ctx, s, method, req, do)
	for _, check := range checks {
		if err == nil {
			err = check(s, resp)
		}
	}
	if err != nil {
		return none, err
	}
	return resp, nil
}

// same checks that an answer is about what was asked.
func same[Resp any](kind, id string, of func(Resp) string) func(*session, Resp) error {
	return func(s *session, resp Resp) error {
		if of(resp) != id {
			return unavailablef("node %q answered for %s %.200q instead of %q", s.id.Node, kind, of(resp), id)
		}
		return nil
	}
}

// notFound is the answer for IDs that nothing can have, where one is needed.
func notFound[Resp any](kind, id string) func() (Resp, error) {
	return func() (Resp, error) {
		var none Resp
		return none, status.Errorf(codes.NotFound, "there is no %s %q: csi-loop does not make such IDs", kind, id)
	}
}

// gone is the answer for IDs that nothing can have, where that is what is wanted.
func gone[Resp any](resp Resp) func() (Resp, error) {
	return func() (Resp, error) { return resp, nil }
}

// DeleteVolume goes to the volume's node.
func (s *controllerServer) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	return byID(ctx, s.r, "DeleteVolume", "volume", req.GetVolumeId(), req, csi.ControllerClient.DeleteVolume, gone(&csi.DeleteVolumeResponse{}))
}

// ValidateVolumeCapabilities goes to the volume's node.
func (s *controllerServer) ValidateVolumeCapabilities(ctx context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, invalidf("volume_capabilities is missing")
	}
	id := req.GetVolumeId()
	return byID(ctx, s.r, "ValidateVolumeCapabilities", "volume", id, req, csi.ControllerClient.ValidateVolumeCapabilities, notFound[*csi.ValidateVolumeCapabilitiesResponse]("volume", id))
}

// ControllerExpandVolume goes to the volume's node.
func (s *controllerServer) ControllerExpandVolume(ctx context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	if req.GetVolumeId() != "" && req.GetCapacityRange() == nil {
		return nil, invalidf("capacity_range is missing")
	}
	id := req.GetVolumeId()
	return byID(ctx, s.r, "ControllerExpandVolume", "volume", id, req, csi.ControllerClient.ControllerExpandVolume, notFound[*csi.ControllerExpandVolumeResponse]("volume", id))
}

// ControllerGetVolume goes to the volume's node.
func (s *controllerServer) ControllerGetVolume(ctx context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	id := req.GetVolumeId()
	return byID(ctx, s.r, "ControllerGetVolume", "volume", id, req, csi.ControllerClient.ControllerGetVolume, notFound[*csi.ControllerGetVolumeResponse]("volume", id),
		same("volume", id, func(r *csi.ControllerGetVolumeResponse) string { return r.GetVolume().GetVolumeId() }))
}

// ControllerModifyVolume goes to the volume's node.
func (s *controllerServer) ControllerModifyVolume(ctx context.Context, req *csi.ControllerModifyVolumeRequest) (*csi.ControllerModifyVolumeResponse, error) {
	id := req.GetVolumeId()
	return byID(ctx, s.r, "ControllerModifyVolume", "volume", id, req, csi.ControllerClient.ControllerModifyVolume, notFound[*csi.ControllerModifyVolumeResponse]("volume", id))
}

// ControllerGetVolumeHealth goes to the volume's node.
func (s *controllerServer) ControllerGetVolumeHealth(ctx context.Context, req *csi.ControllerGetVolumeHealthRequest) (*csi.ControllerGetVolumeHealthResponse, error) {
	id := req.GetVolumeId()
	return byID(ctx, s.r, "ControllerGetVolumeHealth", "volume", id, req, csi.ControllerClient.ControllerGetVolumeHealth, notFound[*csi.ControllerGetVolumeHealthResponse]("volume", id))
}

// CreateSnapshot goes to the node of the volume.
func (s *controllerServer) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	if req.GetName() == "" {
		return nil, invalidf("name is missing")
	}
	id := req.GetSourceVolumeId()
	return byID(ctx, s.r, "CreateSnapshot", "source_volume", id, req, csi.ControllerClient.CreateSnapshot, notFound[*csi.CreateSnapshotResponse]("volume", id),
		same("volume", id, func(r *csi.CreateSnapshotResponse) string { return r.GetSnapshot().GetSourceVolumeId() }),
		func(n *session, r *csi.CreateSnapshotResponse) error {
			return s.r.owned(n, "snapshot", r.GetSnapshot().GetSnapshotId())
		})
}

// DeleteSnapshot goes to the snapshot's node.
func (s *controllerServer) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	return byID(ctx, s.r, "DeleteSnapshot", "snapshot", req.GetSnapshotId(), req, csi.ControllerClient.DeleteSnapshot, gone(&csi.DeleteSnapshotResponse{}))
}

// GetSnapshot goes to the snapshot's node.
func (s *controllerServer) GetSnapshot(ctx context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	id := req.GetSnapshotId()
	return byID(ctx, s.r, "GetSnapshot", "snapshot", id, req, csi.ControllerClient.GetSnapshot, notFound[*csi.GetSnapshotResponse]("snapshot", id),
		same("snapshot", id, func(r *csi.GetSnapshotResponse) string { return r.GetSnapshot().GetSnapshotId() }))
}
