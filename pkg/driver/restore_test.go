package driver

import (
	"context"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/csi-loop/csi-loop/pkg/image"
)

func fromSnapshot(id string) *csi.VolumeContentSource { return csiSource(&image.Source{Snapshot: id}) }

func (v volume) asSource() *csi.VolumeContentSource { return csiSource(&image.Source{Volume: v.id}) }

func (n *node) copy(name string, src *csi.VolumeContentSource, size int64, c *csi.VolumeCapability, params map[string]string) (*csi.Volume, error) {
	resp, err := n.ctrl.CreateVolume(n.t.Context(), &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeContentSource: src,
		VolumeCapabilities: []*csi.VolumeCapability{c}, Parameters: params,
	})
	return resp.GetVolume(), err
}

func TestRestoreAndClone(t *testing.T) {
	n := newFake(t)
	v := n.create("v", 16*mib, mountCap("ext4", oneWriter), map[string]string{"mkfsOptions": "-N 1000"})
	s, err := v.snapshot("s")
	n.must(err)
	restore := fromSnapshot(s.GetSnapshotId())
	least := n.create("least", 1, mountCap("ext4", oneWriter), nil)
	tiny, err := least.snapshot("tiny")
	n.must(err)
	for name, c := range map[string]struct {
		src    *csi.VolumeContentSource
		cap    *csi.VolumeCapability
		size   int64
		params map[string]string
		want   int64
	}{
		"restored":     {restore, mountCap("ext4", oneWriter), 16 * mib, nil, 16 * mib},
		"size-unnamed": {restore, mountCap("ext4", oneWriter), 0, nil, 16 * mib},
		"thin":         {restore, mountCap("ext4", oneWriter), 16 * mib, map[string]string{"allocation": "thin"}, 16 * mib},
		"fs-unnamed":   {restore, mountCap("", oneWriter), 16 * mib, nil, 16 * mib},
		"larger":       {restore, mountCap("ext4", oneWriter), 33 * mib, nil, 33 * mib},
		"one byte":     {fromSnapshot(tiny.GetSnapshotId()), mountCap("ext4", oneWriter), 1, nil, 8 * mib},
		"cloned-byte":  {least.asSource(), mountCap("ext4", oneWriter), 1, nil, 8 * mib},
		"cloned":       {v.asSource(), mountCap("ext4", oneWriter), 16 * mib, nil, 16 * mib},
	} {
		t.Run(name, func(t *testing.T) {
			for range 2 {
				made, err := n.copy(name, c.src, c.size, c.cap, c.params)
				n.must(err)
				if made.GetCapacityBytes() != c.want || !proto.Equal(made.GetContentSource(), c.src) {
					t.Errorf("%v", made)
				}
			}
			_, err := n.ctrl.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: name, VolumeCapabilities: []*csi.VolumeCapability{c.cap}})
			code(t, err, codes.AlreadyExists)
		})
	}
	n.deleteSnapshot(s.GetSnapshotId())
	n.deleteSnapshot(tiny.GetSnapshotId())
	_, err = n.copy("restored", restore, 16*mib, mountCap("ext4", oneWriter), nil)
	n.must(err) // it exists: its source is of no interest
	_, err = n.copy("too-late", restore, 16*mib, mountCap("ext4", oneWriter), nil)
	code(t, err, codes.NotFound)
	for _, each := range n.store.List() {
		n.must(volume{n: n, id: each.ID}.delete())
	}
}

func TestRestoreRefusals(t *testing.T) {
	n := newFake(t)
	v := n.create("v", 16*mib, mountCap("ext4", oneWriter), nil)
	s, err := v.snapshot("s")
	n.must(err)
	restore := fromSnapshot(s.GetSnapshotId())
	for name, c := range map[string]struct {
		src    *csi.VolumeContentSource
		cap    *csi.VolumeCapability
		size   int64
		params map[string]string
		want   codes.Code
	}{
		"smaller":                {restore, mountCap("ext4", oneWriter), 15 * mib, nil, codes.OutOfRange},
		"another filesystem":     {restore, mountCap("ext3", oneWriter), 16 * mib, nil, codes.InvalidArgument},
		"a raw block volume":     {restore, blockCap(oneWriter), 16 * mib, nil, codes.InvalidArgument},
		"another block size":     {restore, mountCap("ext4", oneWriter), 16 * mib, map[string]string{"blockSize": "512"}, codes.InvalidArgument},
		"clone, smaller":         {v.asSource(), mountCap("ext4", oneWriter), 15 * mib, nil, codes.OutOfRange},
		"no such snapshot":       {fromSnapshot("none"), mountCap("ext4", oneWriter), 16 * mib, nil, codes.NotFound},
		"no such volume":         {csiSource(&image.Source{Volume: image.VolumeID(n.store.Pools()[0].ID(), "none")}), mountCap("ext4", oneWriter), 16 * mib, nil, codes.NotFound},
		"a pool that is away":    {fromSnapshot(image.VolumeID("aaaaaaaaaaaaaaaaaaaa", "s")), mountCap("ext4", oneWriter), 16 * mib, nil, codes.Unavailable},
		"no source":              {&csi.VolumeContentSource{}, mountCap("ext4", oneWriter), 16 * mib, nil, codes.InvalidArgument},
		"no ID":                  {fromSnapshot(""), mountCap("ext4", oneWriter), 16 * mib, nil, codes.InvalidArgument},
		"malformed mkfsOptions":  {restore, mountCap("ext4", oneWriter), 16 * mib, map[string]string{"mkfsOptions": "-X"}, codes.InvalidArgument},
		"parameter of snapshots": {restore, mountCap("ext4", oneWriter), 16 * mib, map[string]string{"independent": "true"}, codes.InvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := n.copy("r", c.src, c.size, c.cap, c.params)
			code(t, err, c.want)
		})
	}
	n.must(v.delete())
}

// A clone of a volume in use freezes it as a snapshot does, and gives the volume free.
func TestCloneInUse(t *testing.T) {
	n := newFake(t)
	v := n.create("v", 16*mib, mountCap("ext4", oneWriter), nil).up("pod")
	if n.copies() {
		_, err := n.copy("c", v.asSource(), 0, v.cap, nil)
		code(t, err, codes.FailedPrecondition)
	}
	made, err := n.copy("c", v.asSource(), 0, v.cap, map[string]string{"copyInUse": "true"})
	n.must(err)
	if n.fake.froze != 1 {
		t.Errorf("%d freezes", n.fake.froze)
	}
	c := volume{n: n, id: made.GetVolumeId(), cap: v.cap}.up("pod-c")
	c.down("pod-c")
	v.down("pod")
}

// A copy that goes on, or ended, for a call that asked for another place, or for another
// volume of the name, is no answer.
func TestCopyForAnotherCall(t *testing.T) {
	n := newFake(t)
	v := n.create("v", 16*mib, mountCap("ext4", oneWriter), nil)
	req := &csi.CreateVolumeRequest{
		Name: "x", VolumeContentSource: v.asSource(), VolumeCapabilities: []*csi.VolumeCapability{mountCap("ext4", oneWriter)},
	}
	held := make(chan struct{})
	finish := sync.OnceFunc(func() { close(held) })
	context.AfterFunc(t.Context(), finish) // a test that fails does not wait for itself
	gone, leave := context.WithCancel(t.Context())
	leave()
	err := n.d.copyJob(gone, req, func(string) (func(context.Context) error, error) {
		return func(context.Context) error { <-held; return nil }, nil
	})
	if err == nil {
		t.Fatal("it was waited for")
	}
	n.d.jobs.mu.Lock()
	job := n.d.jobs.all[image.DirName("x")]
	n.d.jobs.mu.Unlock()
	elsewhere, _ := proto.Clone(req).(*csi.CreateVolumeRequest)
	elsewhere.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{n.d.topologyKey(): "elsewhere"}}}}
	_, err = n.ctrl.CreateVolume(t.Context(), elsewhere)
	code(t, err, codes.ResourceExhausted)
	finish()
	<-job.done
	n.create("x", 16*mib, mountCap("ext4", oneWriter), nil)
	_, err = n.ctrl.CreateVolume(t.Context(), req)
	code(t, err, codes.AlreadyExists)
}
