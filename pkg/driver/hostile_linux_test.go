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
	carries := n.golden("carries.img", "mkfs.ext4", "-q", "-F", "-b", "1024")
	roottest.Run(t, "tune2fs", "-E", "mount_opts=errors=panic", carries)
	staging := filepath.Join(n.dir, "staging")
	n.must(os.Mkdir(staging, 0o750))
	for name, c := range map[string]struct {
		path  string
		flags []string
		want  string
	}{
		"no word of the operator's":                      {path, nil, "errors=remount-ro"},
		"the operator's word":                            {path, []string{"errors=continue"}, "errors=continue"},
		"in the options of the superblock":               {carries, nil, "errors=remount-ro"},
		"in those of the superblock, and the operator's": {carries, []string{"errors=continue"}, "errors=continue"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := (&nodeServer{d: d}).NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
				VolumeId: "brought", StagingTargetPath: staging, VolumeCapability: mountCap("ext4", oneWriter, c.flags...),
				VolumeContext: map[string]string{"image": c.path, "sizeLimit": "20Mi"},
			})
			n.must(err)
			m, mounted, err := mounts.At(staging)
			n.must(err)
			// The kernel does not show what is the superblock's own word, as continue is.
			if !mounted || slices.Contains(m.SuperOptions, "errors=panic") ||
				!slices.Contains(m.SuperOptions, c.want) && (c.path == path || c.want != "errors=continue") {
				t.Errorf("mounted %v: %q", mounted, m.SuperOptions)
			}
			_, err = (&nodeServer{d: d}).NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: "brought", StagingTargetPath: staging})
			n.must(err)
		})
	}
}

// TestSuperblockWithAJournalElsewhere: the kernel would open that device by its number.
func TestSuperblockWithAJournalElsewhere(t *testing.T) {
	for name, c := range map[string]struct {
		at   int64
		what []byte
	}{
		"its number":               {0xE4, binary.LittleEndian.AppendUint32(nil, 8<<8|1)},
		"an option that names it":  {0x200, []byte("journal_dev=0x801")},
		"an option that finds one": {0x200, []byte("acl,journal_path=/dev/sda1")},
	} {
		t.Run(name, func(t *testing.T) {
			n := newFake(t)
			v := n.create("pvc-1", 16*mib, mountCap("ext4", oneWriter), nil)
			f, err := os.OpenFile(n.imagePath(v.id), os.O_RDWR, 0)
			n.must(err)
			_, err = f.WriteAt(c.what, 1024+c.at)
			n.must(err)
			n.must(f.Close())
			code(t, v.stage(), codes.FailedPrecondition)
			n.fake.clean(t)
			n.must(v.delete())
		})
	}
}
