package driver

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/image"
)

func TestGroupSnapshotLife(t *testing.T) {
	n := newFake(t)
	groups := csi.NewGroupControllerClient(n.conn)
	v := n.create("v", 16*mib, mountCap("ext4", oneWriter), nil).up("pod")
	w, flushes := n.create("w", mib, blockCap(oneWriter), nil), 0
	if !n.copies() { // in use it could not be copied
		w, flushes = w.up("pod-w"), 1
		defer w.down("pod-w")
	}
	req := &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{w.id, v.id}, Parameters: map[string]string{"copyInUse": "true"}}
	var g *csi.VolumeGroupSnapshot
	for range 2 {
		resp, err := groups.CreateVolumeGroupSnapshot(t.Context(), req)
		n.must(err)
		g = resp.GetGroupSnapshot()
	}
	if len(g.GetSnapshots()) != 2 || !g.GetReadyToUse() || n.fake.froze != 1 || n.fake.synced != flushes {
		t.Errorf("%v, %d freezes, %d flushes", g, n.fake.froze, n.fake.synced)
	}
	var members []string
	for _, s := range g.GetSnapshots() {
		members = append(members, s.GetSnapshotId())
		if s.GetGroupSnapshotId() != g.GetGroupSnapshotId() || !slices.Contains(req.GetSourceVolumeIds(), s.GetSourceVolumeId()) {
			t.Errorf("%v", s)
		}
		_, err := n.ctrl.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: s.GetSnapshotId()})
		code(t, err, codes.InvalidArgument)
	}
	create := func(name string, ids ...string) error {
		_, err := groups.CreateVolumeGroupSnapshot(t.Context(), &csi.CreateVolumeGroupSnapshotRequest{Name: name, SourceVolumeIds: ids, Parameters: req.GetParameters()})
		return err
	}
	code(t, create("g", v.id), codes.AlreadyExists)
	code(t, create("g", v.id, image.VolumeID(n.store.Pools()[0].ID(), "none")), codes.AlreadyExists)
	code(t, create("g", image.VolumeID("aaaaaaaaaaaaaaaaaaaa", "v")), codes.AlreadyExists)
	code(t, create("h"), codes.InvalidArgument)
	code(t, create("h", v.id, v.id), codes.InvalidArgument)
	code(t, create("h", v.id, image.VolumeID(n.store.Pools()[0].ID(), "none")), codes.NotFound)
	code(t, create("h", v.id, image.VolumeID("aaaaaaaaaaaaaaaaaaaa", "v")), codes.Unavailable)
	n.fake.failOnce("freeze", errors.New("stuck"))
	code(t, create("h", v.id, w.id), codes.Internal)
	if len(n.store.ListSnapshots()) != 2 {
		t.Errorf("a group that failed left snapshots: %v", n.store.ListSnapshots())
	}

	get := func(ids ...string) error {
		_, err := groups.GetVolumeGroupSnapshot(t.Context(), &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: g.GetGroupSnapshotId(), SnapshotIds: ids})
		return err
	}
	n.must(get(members...))
	n.must(get())
	code(t, get(members[0]), codes.InvalidArgument)
	remove := func(ids ...string) error {
		_, err := groups.DeleteVolumeGroupSnapshot(t.Context(), &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: g.GetGroupSnapshotId(), SnapshotIds: ids})
		return err
	}
	code(t, remove(members[0]), codes.InvalidArgument)
	n.must(remove(members...))
	n.must(remove(members...))
	code(t, get(), codes.NotFound)
	if left := n.store.ListSnapshots(); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	v.down("pod")
}

// Of a damaged group nothing can be used, but it can be deleted.
func TestDamagedGroupSnapshotIsDeleted(t *testing.T) {
	n := newFake(t)
	v := n.create("v", mib, blockCap(oneWriter), nil)
	made, err := csi.NewGroupControllerClient(n.conn).CreateVolumeGroupSnapshot(t.Context(), &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{v.id}})
	n.must(err)
	g := made.GetGroupSnapshot()
	n.must(os.WriteFile(filepath.Join(n.pool[0].Path, "groups", "g", "group.json"), []byte("{"), 0o600))
	n.restart()
	groups := csi.NewGroupControllerClient(n.conn)
	_, err = groups.GetVolumeGroupSnapshot(t.Context(), &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: g.GetGroupSnapshotId()})
	code(t, err, codes.DataLoss)
	for _, member := range g.GetSnapshots() { // a CO forgets what is said to be gone
		_, err = n.ctrl.GetSnapshot(t.Context(), &csi.GetSnapshotRequest{SnapshotId: member.GetSnapshotId()})
		code(t, err, codes.DataLoss)
		_, err = n.ctrl.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{SnapshotId: member.GetSnapshotId()})
		code(t, err, codes.DataLoss)
		_, err = n.ctrl.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: member.GetSnapshotId()})
		code(t, err, codes.DataLoss)
	}
	for range 2 {
		_, err = groups.DeleteVolumeGroupSnapshot(t.Context(), &csi.DeleteVolumeGroupSnapshotRequest{
			GroupSnapshotId: g.GetGroupSnapshotId(), SnapshotIds: []string{g.GetSnapshots()[0].GetSnapshotId()},
		})
		n.must(err)
	}
	_, err = groups.GetVolumeGroupSnapshot(t.Context(), &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: g.GetGroupSnapshotId()})
	code(t, err, codes.NotFound)
	if left, err := os.ReadDir(filepath.Join(n.pool[0].Path, "snapshots")); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	n.must(volume{n: n, id: v.id}.delete())
}

func TestSnapshotMetadata(t *testing.T) {
	n := newFake(t)
	metadata := csi.NewSnapshotMetadataClient(n.conn)
	v, w := n.create("v", 4*mib, blockCap(oneWriter), nil), n.create("w", mib, blockCap(oneWriter), nil)
	write := func(at int64) {
		f, err := n.store.Pools()[0].OpenImage(t.Context(), v.id, false)
		n.must(err)
		_, err = f.WriteAt([]byte("data"), at)
		n.must(errors.Join(err, f.Close()))
	}
	write(0)
	one, err := v.snapshot("one")
	n.must(err)
	write(mib)
	write(3 * mib)
	two, err := v.snapshot("two")
	n.must(err)
	other, err := w.snapshot("other")
	n.must(err)

	allocated := func(id string, from int64, limit int32) ([]int64, error) {
		stream, err := metadata.GetMetadataAllocated(t.Context(), &csi.GetMetadataAllocatedRequest{SnapshotId: id, StartingOffset: from, MaxResults: limit})
		n.must(err)
		return collect(t, limit, func() (int64, []*csi.BlockMetadata, error) {
			m, err := stream.Recv()
			return m.GetVolumeCapacityBytes(), m.GetBlockMetadata(), err
		})
	}
	delta := func(base, target string, from int64, limit int32) ([]int64, error) {
		stream, err := metadata.GetMetadataDelta(t.Context(), &csi.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: target, StartingOffset: from, MaxResults: limit})
		n.must(err)
		return collect(t, limit, func() (int64, []*csi.BlockMetadata, error) {
			m, err := stream.Recv()
			return m.GetVolumeCapacityBytes(), m.GetBlockMetadata(), err
		})
	}
	want := func(got []int64, err error, places ...int64) {
		t.Helper()
		n.must(err)
		if !slices.Equal(got, places) {
			t.Errorf("got %v, want %v", got, places)
		}
	}
	got, err := allocated(two.GetSnapshotId(), 0, 0)
	want(got, err, 0, mib, 3*mib)
	got, err = allocated(two.GetSnapshotId(), mib, 1)
	want(got, err, mib, 3*mib)
	got, err = allocated(two.GetSnapshotId(), 4*mib, 0)
	want(got, err)
	got, err = delta(one.GetSnapshotId(), two.GetSnapshotId(), 0, 1)
	want(got, err, mib, 3*mib)
	got, err = delta(one.GetSnapshotId(), two.GetSnapshotId(), 2*mib, 0)
	want(got, err, 3*mib)
	got, err = delta(two.GetSnapshotId(), two.GetSnapshotId(), 0, 0)
	want(got, err)

	for name, c := range map[string]struct {
		err  error
		want codes.Code
	}{
		"offset below 0":      {second(allocated(one.GetSnapshotId(), -1, 0)), codes.OutOfRange},
		"offset behind end":   {second(delta(one.GetSnapshotId(), two.GetSnapshotId(), 4*mib+1, 0)), codes.OutOfRange},
		"negative limit":      {second(allocated(one.GetSnapshotId(), 0, -1)), codes.InvalidArgument},
		"no snapshot":         {second(allocated("", 0, 0)), codes.InvalidArgument},
		"no base":             {second(delta("", two.GetSnapshotId(), 0, 0)), codes.InvalidArgument},
		"unknown snapshot":    {second(allocated("none", 0, 0)), codes.NotFound},
		"unknown base":        {second(delta("none", two.GetSnapshotId(), 0, 0)), codes.NotFound},
		"of another volume":   {second(delta(other.GetSnapshotId(), two.GetSnapshotId(), 0, 0)), codes.InvalidArgument},
		"of another pool":     {second(delta(image.VolumeID("aaaaaaaaaaaaaaaaaaaa", "s"), two.GetSnapshotId(), 0, 0)), codes.InvalidArgument},
		"a pool that is away": {second(allocated(image.VolumeID("aaaaaaaaaaaaaaaaaaaa", "s"), 0, 0)), codes.Unavailable},
	} {
		t.Run(name, func(t *testing.T) { code(t, c.err, c.want) })
	}
	n.must(v.delete())
	n.must(w.delete())
}

func second[T any](_ T, err error) error { return err }

// collect reads a stream and returns where its ranges begin.
func collect(t *testing.T, limit int32, next func() (int64, []*csi.BlockMetadata, error)) (starts []int64, _ error) {
	t.Helper()
	for {
		capacity, blocks, err := next()
		if errors.Is(err, io.EOF) {
			return starts, nil
		}
		if err != nil {
			return nil, err
		}
		if capacity != 4*mib || limit > 0 && len(blocks) > int(limit) {
			t.Errorf("a message of capacity %d with %d ranges", capacity, len(blocks))
		}
		for _, b := range blocks {
			starts = append(starts, b.GetByteOffset())
		}
	}
}
