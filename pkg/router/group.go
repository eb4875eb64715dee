package router

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/pkg/router/link"
)

const (
	groupService    = "/" + "csi.v1.GroupController" + "/"
	metadataService = "/" + "csi.v1.SnapshotMetadata" + "/"
)

// groupServer is the CSI GroupController service for the sidecars.
type groupServer struct {
	csi.UnimplementedGroupControllerServer
	r *Router
}

// GroupControllerGetCapabilities answers what the router was told.
func (s *groupServer) GroupControllerGetCapabilities(context.Context, *csi.GroupControllerGetCapabilitiesRequest) (*csi.GroupControllerGetCapabilitiesResponse, error) {
	return &csi.GroupControllerGetCapabilitiesResponse{Capabilities: s.r.cfg.Group}, nil
}

// groupCall is byID for the GroupController service.
func groupCall[Req, Resp any](
	ctx context.Context, r *Router, method, kind, id string, req Req,
	do func(csi.GroupControllerClient, context.Context, Req, ...grpc.CallOption) (Resp, error), unknown func() (Resp, error), checks ...func(*session, Resp) error,
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
	resp, err := callService(ctx, s, groupService, method, func(ctx context.Context, opts ...grpc.CallOption) (Resp, error) {
		return do(s.group, ctx, req, opts...)
	})
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

// ownGroup refuses a group snapshot that is not the node's to give, as credible does
// for volumes: who restores from it would get another node's data.
func (r *Router) ownGroup(s *session, g *csi.VolumeGroupSnapshot) error {
	if err := r.owned(s, "group snapshot", g.GetGroupSnapshotId()); err != nil {
		return err
	}
	for _, member := range g.GetSnapshots() {
		if err := r.owned(s, "snapshot", member.GetSnapshotId()); err != nil {
			return err
		}
		if member.GetGroupSnapshotId() != g.GetGroupSnapshotId() {
			return unavailablef("node %q answered that snapshot %q of group snapshot %q belongs to group snapshot %.200q",
				s.id.Node, member.GetSnapshotId(), g.GetGroupSnapshotId(), member.GetGroupSnapshotId())
		}
	}
	return nil
}

// sources checks that a group snapshot has one snapshot of each of these volumes.
func (r *Router) sources(s *session, g *csi.VolumeGroupSnapshot, volumes []string) error {
	var got []string
	for _, member := range g.GetSnapshots() {
		got = append(got, member.GetSourceVolumeId())
	}
	if !slices.Equal(slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(volumes))) {
		return unavailablef("node %q answered with a group snapshot of volumes %.200q instead of %q", s.id.Node, got, volumes)
	}
	return nil
}

// CreateVolumeGroupSnapshot goes to the node that has the volumes. One moment of
// volumes on several nodes cannot be had.
func (s *groupServer) CreateVolumeGroupSnapshot(ctx context.Context, req *csi.CreateVolumeGroupSnapshotRequest) (*csi.CreateVolumeGroupSnapshotResponse, error) {
	ids := req.GetSourceVolumeIds()
	switch {
	case req.GetName() == "":
		return nil, invalidf("name is missing")
	case len(ids) == 0:
		return nil, invalidf("source_volume_ids is missing")
	}
	var first *session
	for _, id := range ids {
		n, ok, err := s.r.owner("volume", id)
		switch {
		case err != nil:
			return nil, err
		case !ok:
			return nil, status.Errorf(codes.NotFound, "there is no volume %q: csi-loop does not make such IDs", id)
		case first == nil:
			first = n
		case first.id.Node == n.id.Node && first != n:
			return nil, unavailablef("the link to node %q was replaced just now", n.id.Node)
		case first != n:
			return nil, status.Errorf(codes.FailedPrecondition, "volume %q is on node %q and volume %q on node %q: a group snapshot is of volumes on one node", ids[0], first.id.Node, id, n.id.Node)
		}
	}
	return groupCall(ctx, s.r, "CreateVolumeGroupSnapshot", "volume", ids[0], req, csi.GroupControllerClient.CreateVolumeGroupSnapshot,
		notFound[*csi.CreateVolumeGroupSnapshotResponse]("volume", ids[0]),
		func(n *session, resp *csi.CreateVolumeGroupSnapshotResponse) error {
			return cmp.Or(s.r.ownGroup(n, resp.GetGroupSnapshot()), s.r.sources(n, resp.GetGroupSnapshot(), ids))
		})
}

// DeleteVolumeGroupSnapshot goes to the group's node.
func (s *groupServer) DeleteVolumeGroupSnapshot(ctx context.Context, req *csi.DeleteVolumeGroupSnapshotRequest) (*csi.DeleteVolumeGroupSnapshotResponse, error) {
	return groupCall(ctx, s.r, "DeleteVolumeGroupSnapshot", "group_snapshot", req.GetGroupSnapshotId(), req, csi.GroupControllerClient.DeleteVolumeGroupSnapshot, gone(&csi.DeleteVolumeGroupSnapshotResponse{}))
}

// GetVolumeGroupSnapshot goes to the group's node.
func (s *groupServer) GetVolumeGroupSnapshot(ctx context.Context, req *csi.GetVolumeGroupSnapshotRequest) (*csi.GetVolumeGroupSnapshotResponse, error) {
	id := req.GetGroupSnapshotId()
	return groupCall(ctx, s.r, "GetVolumeGroupSnapshot", "group_snapshot", id, req, csi.GroupControllerClient.GetVolumeGroupSnapshot, notFound[*csi.GetVolumeGroupSnapshotResponse]("group snapshot", id),
		same("group snapshot", id, func(r *csi.GetVolumeGroupSnapshotResponse) string { return r.GetGroupSnapshot().GetGroupSnapshotId() }),
		func(n *session, resp *csi.GetVolumeGroupSnapshotResponse) error {
			return s.r.ownGroup(n, resp.GetGroupSnapshot())
		})
}

// metadataServer is the CSI SnapshotMetadata service for the sidecar.
type metadataServer struct {
	csi.UnimplementedSnapshotMetadataServer
	r *Router
}

// GetMetadataAllocated streams what the snapshot's node says.
func (s *metadataServer) GetMetadataAllocated(req *csi.GetMetadataAllocatedRequest, stream csi.SnapshotMetadata_GetMetadataAllocatedServer) error {
	return relayed(stream.Context(), s.r, "GetMetadataAllocated", req.GetSnapshotId(), func(ctx context.Context, c csi.SnapshotMetadataClient) (clientStream[csi.GetMetadataAllocatedResponse], error) {
		return c.GetMetadataAllocated(ctx, req)
	}, stream.Send)
}

// GetMetadataDelta streams what the node of the target says; a base elsewhere is of
// another volume, and is refused there.
func (s *metadataServer) GetMetadataDelta(req *csi.GetMetadataDeltaRequest, stream csi.SnapshotMetadata_GetMetadataDeltaServer) error {
	return relayed(stream.Context(), s.r, "GetMetadataDelta", req.GetTargetSnapshotId(), func(ctx context.Context, c csi.SnapshotMetadataClient) (clientStream[csi.GetMetadataDeltaResponse], error) {
		return c.GetMetadataDelta(ctx, req)
	}, stream.Send)
}

// clientStream is a stream of answers.
type clientStream[Resp any] interface {
	Recv() (*Resp, error)
	grpc.ClientStream
}

// relayed hands on a stream of the node that has a snapshot.
func relayed[Resp any](
	ctx context.Context, r *Router, method, id string,
	open func(ctx context.Context, c csi.SnapshotMetadataClient) (clientStream[Resp], error), send func(*Resp) error,
) error {
	if id == "" {
		return invalidf("snapshot_id is missing")
	}
	s, ok, err := r.owner("snapshot", id)
	switch {
	case err != nil:
		return err
	case !ok:
		return status.Errorf(codes.NotFound, "there is no snapshot %q: csi-loop does not make such IDs", id)
	}
	if _, ok := s.methods[metadataService+method]; !ok {
		return s.tooOld(method)
	}
	leave, ok := s.enter()
	if !ok {
		return unavailablef("%s: node %q is stopping", method, s.id.Node)
	}
	defer leave()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := open(ctx, s.metadata)
	if err != nil {
		return s.translate(ctx, method, err, false)
	}
	for {
		resp, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return s.translate(ctx, method, err, len(stream.Trailer().Get(link.AnswerKey)) > 0)
		}
		if err := send(resp); err != nil {
			return err
		}
	}
}
