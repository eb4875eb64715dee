package driver

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// TestSuperblockThatStopsTheMachine: an image that somebody brought asks for a panic at
// its first error, and is mounted without, by the kernel's own word.
func TestSuperblockThatStopsTheMachine(t *testing.T) {
	roottest.Require(t)
	n := &node{t: t, dir: t.TempDir()}
	n.defaults(filepath.Join(n.dir, "pool"))
	ctx := t.Context()
	store, err := image.Open(ctx, n.pool)
	n.must(err)
	defer func() { n.must(store.Close()) }()
	dirs, err := image.OpenDirs(n.dirs, store.Pools()...)
	n.must(err)
	loops, err := loop.New(ctx, loop.WithWarm(0))
	n.must(err)
	defer func() { n.must(loops.Close()) }()
	mounts := mount.New()
	d, err := New(n.cfg, store, dirs, loops, mounts)
	n.must(err)
	defer func() { n.must(d.Close()) }()
	n.must(d.Reconcile(ctx))
	path := n.golden("brought.img", "mkfs.ext4", "-q", "-F", "-b", "1024", "-e", "panic")
	staging := filepath.Join(n.dir, "staging")
	n.must(os.Mkdir(staging, 0o750))
	for name, c := range map[string]struct {
		flags []string
		want  string
	}{
		"no word of the operator's": {nil, "errors=remount-ro"},
		"the operator's word":       {[]string{"errors=continue"}, "errors=continue"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := (&nodeServer{d: d}).NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
				VolumeId: "brought", StagingTargetPath: staging, VolumeCapability: mountCap("ext4", oneWriter, c.flags...),
				VolumeContext: map[string]string{"image": path, "sizeLimit": "20Mi"},
			})
			n.must(err)
			m, mounted, err := mounts.At(staging)
			n.must(err)
			if !mounted || !slices.Contains(m.SuperOptions, c.want) {
				t.Errorf("mounted %v: %q", mounted, m.SuperOptions)
			}
			_, err = (&nodeServer{d: d}).NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: "brought", StagingTargetPath: staging})
			n.must(err)
		})
	}
}

// TestSuperblockWithAJournalElsewhere: the kernel would open that device by its number.
func TestSuperblockWithAJournalElsewhere(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", oneWriter), nil)
	f, err := os.OpenFile(n.imagePath(v.id), os.O_RDWR, 0)
	n.must(err)
	_, err = f.WriteAt(binary.LittleEndian.AppendUint32(nil, 8<<8|1), 1024+0xE4)
	n.must(err)
	n.must(f.Close())
	code(t, v.stage(), codes.FailedPrecondition)
	n.fake.clean(t)
	n.must(v.delete())
}
