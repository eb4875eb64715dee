package router

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"
)

// groupNode answers group and metadata calls.
type groupNode struct {
	csi.UnimplementedGroupControllerServer
	csi.UnimplementedSnapshotMetadataServer
	asked  []string
	answer *csi.VolumeGroupSnapshot // instead of a good one
}

func (g *groupNode) CreateVolumeGroupSnapshot(_ context.Context, req *csi.CreateVolumeGroupSnapshotRequest) (*csi.CreateVolumeGroupSnapshotResponse, error) {
	g.asked = append(g.asked, "create "+req.GetName())
	group := &csi.VolumeGroupSnapshot{GroupSnapshotId: req.GetSourceVolumeIds()[0] + "-group"}
	for _, id := range req.GetSourceVolumeIds() {
		group.Snapshots = append(group.Snapshots, &csi.Snapshot{SnapshotId: id + "-s", SourceVolumeId: id, GroupSnapshotId: group.GetGroupSnapshotId()})
	}
	if g.answer != nil {
		group = g.answer
	}
	return &csi.CreateVolumeGroupSnapshotResponse{GroupSnapshot: group}, nil
}

func (g *groupNode) GetVolumeGroupSnapshot(context.Context, *csi.GetVolumeGroupSnapshotRequest) (*csi.GetVolumeGroupSnapshotResponse, error) {
	return &csi.GetVolumeGroupSnapshotResponse{GroupSnapshot: g.answer}, nil
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

// A node cannot hand out another node's snapshots as members of a group of its own.
func TestForeignGroups(t *testing.T) {
	c := newCluster(t)
	evil, victim := c.node("evil", newDisk(t, "default", gib)), c.node("victim", newDisk(t, "default", gib))
	g := &groupNode{}
	evil.register = func(r grpc.ServiceRegistrar) {
		csi.RegisterControllerServer(r, evil)
		csi.RegisterGroupControllerServer(r, g)
	}
	evil.up()
	victim.up()
	c.linked(evil, victim)
	own, theirs := evil.pools[0].id+".", victim.pools[0].id+"."
	member := func(id string) *csi.Snapshot {
		return &csi.Snapshot{SnapshotId: id, SourceVolumeId: own + "v", GroupSnapshotId: own + "g"}
	}
	create := func() error {
		_, err := c.groups.CreateVolumeGroupSnapshot(t.Context(), &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{own + "v"}})
		return err
	}
	get := func() error {
		_, err := c.groups.GetVolumeGroupSnapshot(t.Context(), &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: own + "g"})
		return err
	}
	elsewhere, lost := member(own+"s"), member(own+"s")
	elsewhere.SourceVolumeId, lost.GroupSnapshotId = own+"w", ""
	good := &csi.VolumeGroupSnapshot{GroupSnapshotId: own + "g", Snapshots: []*csi.Snapshot{member(own + "s")}}
	for _, c2 := range []struct {
		name        string
		answer      *csi.VolumeGroupSnapshot
		create, get codes.Code
	}{
		{"its own", good, codes.OK, codes.OK},
		{"another node's snapshot", &csi.VolumeGroupSnapshot{GroupSnapshotId: own + "g", Snapshots: []*csi.Snapshot{member(theirs + "s")}}, codes.Unavailable, codes.Unavailable},
		{"another node's group", &csi.VolumeGroupSnapshot{GroupSnapshotId: theirs + "g"}, codes.Unavailable, codes.Unavailable},
		{"no group", &csi.VolumeGroupSnapshot{}, codes.Unavailable, codes.Unavailable},
		{"a snapshot of no group", &csi.VolumeGroupSnapshot{GroupSnapshotId: own + "g", Snapshots: []*csi.Snapshot{lost}}, codes.Unavailable, codes.Unavailable},
		{"a snapshot of another volume", &csi.VolumeGroupSnapshot{GroupSnapshotId: own + "g", Snapshots: []*csi.Snapshot{elsewhere}}, codes.Unavailable, codes.OK},
		{"a snapshot too many", &csi.VolumeGroupSnapshot{GroupSnapshotId: own + "g", Snapshots: []*csi.Snapshot{member(own + "s"), elsewhere}}, codes.Unavailable, codes.OK},
		{"none of the volume", &csi.VolumeGroupSnapshot{GroupSnapshotId: own + "g"}, codes.Unavailable, codes.OK},
	} {
		g.answer = c2.answer
		if err := create(); status.Code(err) != c2.create {
			t.Errorf("%s: create: %v, want %v", c2.name, err, c2.create)
		}
		if err := get(); status.Code(err) != c2.get {
			t.Errorf("%s: get: %v, want %v", c2.name, err, c2.get)
		}
	}
}

// silentStream is a stream with a context and nothing else.
type silentStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // that is what a stream has
}

func (s silentStream) Context() context.Context { return s.ctx }

// Streams are counted as other calls are, and a panic in one does not end the others.
func TestStreamsAreCounted(t *testing.T) {
	var seen []string
	r := New(Config{Observe: func(method, code string, _ time.Duration) { seen = append(seen, method+" "+code) }})
	around := r.interceptStream(klog.Background())
	for _, handle := range []func() error{
		func() error { return nil },
		func() error { return unavailablef("away") },
		func() error { panic("on purpose") },
		func() error { return context.Canceled },
	} {
		_ = around(nil, silentStream{ctx: t.Context()}, &grpc.StreamServerInfo{FullMethod: metadataService + "GetMetadataDelta"},
			func(any, grpc.ServerStream) error { return handle() })
	}
	want := []string{"GetMetadataDelta OK", "GetMetadataDelta Unavailable", "GetMetadataDelta Internal", "GetMetadataDelta Canceled"}
	if !slices.Equal(seen, want) {
		t.Errorf("%q, want %q", seen, want)
	}
}
