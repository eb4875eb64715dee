package router

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// groupNode answers group and metadata calls.
type groupNode struct {
	csi.UnimplementedGroupControllerServer
	csi.UnimplementedSnapshotMetadataServer
	asked []string
}

func (g *groupNode) CreateVolumeGroupSnapshot(_ context.Context, req *csi.CreateVolumeGroupSnapshotRequest) (*csi.CreateVolumeGroupSnapshotResponse, error) {
	g.asked = append(g.asked, "create "+req.GetName())
	return &csi.CreateVolumeGroupSnapshotResponse{GroupSnapshot: &csi.VolumeGroupSnapshot{GroupSnapshotId: req.GetSourceVolumeIds()[0] + "-group"}}, nil
}

func (g *groupNode) DeleteVolumeGroupSnapshot(_ context.Context, req *csi.DeleteVolumeGroupSnapshotRequest) (*csi.DeleteVolumeGroupSnapshotResponse, error) {
	g.asked = append(g.asked, "delete "+req.GetGroupSnapshotId())
	return nil, status.Error(codes.FailedPrecondition, "in use")
}

func (g *groupNode) GetMetadataAllocated(req *csi.GetMetadataAllocatedRequest, stream csi.SnapshotMetadata_GetMetadataAllocatedServer) error {
	for i := range 3 {
		if err := stream.Send(&csi.GetMetadataAllocatedResponse{VolumeCapacityBytes: int64(i)}); err != nil {
			return err
		}
	}
	if strings.HasSuffix(req.GetSnapshotId(), ".bad") {
		return status.Error(codes.OutOfRange, "too far")
	}
	return nil
}

func TestGroupsAndMetadata(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("a", newDisk(t, "default", gib)), c.node("b", newDisk(t, "default", gib))
	g := &groupNode{}
	a.register = func(r grpc.ServiceRegistrar) {
		csi.RegisterControllerServer(r, a)
		csi.RegisterGroupControllerServer(r, g)
		csi.RegisterSnapshotMetadataServer(r, g)
	}
	a.up()
	b.up()
	c.linked(a, b)
	ctx := t.Context()
	one, two, far := a.pools[0].id+".one", a.pools[0].id+".two", b.pools[0].id+".far"
	for name, c2 := range map[string]struct {
		ids  []string
		want codes.Code
	}{
		"one node":       {[]string{one, two}, codes.OK},
		"two nodes":      {[]string{one, far}, codes.FailedPrecondition},
		"no such volume": {[]string{one, "none"}, codes.NotFound},
		"an away node":   {[]string{one, "aaaaaaaaaaaaaaaaaaaa.x"}, codes.Unavailable},
		"an older node":  {[]string{far}, codes.Unavailable},
		"no volume":      {nil, codes.InvalidArgument},
	} {
		_, err := c.groups.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: c2.ids})
		if status.Code(err) != c2.want {
			t.Errorf("%s: %v, want %v", name, err, c2.want)
		}
	}
	_, err := c.groups.DeleteVolumeGroupSnapshot(ctx, &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: one})
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("the node's code is lost: %v", err)
	}
	_, err = c.groups.DeleteVolumeGroupSnapshot(ctx, &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: "none"})
	must(t, err)
	_, err = c.groups.GetVolumeGroupSnapshot(ctx, &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: "none"})
	if status.Code(err) != codes.NotFound {
		t.Error(err)
	}
	for id, want := range map[string]codes.Code{
		one: codes.OK, a.pools[0].id + ".bad": codes.OutOfRange, "none": codes.NotFound, far: codes.Unavailable, "": codes.InvalidArgument,
	} {
		stream, err := c.metadata.GetMetadataAllocated(ctx, &csi.GetMetadataAllocatedRequest{SnapshotId: id})
		must(t, err)
		n := 0
		for err == nil {
			if _, err = stream.Recv(); err == nil {
				n++
			}
		}
		if errors.Is(err, io.EOF) {
			err = nil
		}
		if status.Code(err) != want || want == codes.OK && n != 3 {
			t.Errorf("%q: %d messages, %v, want %v", id, n, err, want)
		}
	}
}
