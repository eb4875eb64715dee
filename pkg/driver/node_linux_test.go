package driver

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// realNode is a driver over real loop devices and mounts, called directly.
type realNode struct {
	*node
	loops  *loop.Manager
	mounts *mount.Mounter
}

func newRealNode(t *testing.T, pools ...image.Config) *realNode {
	t.Helper()
	roottest.Require(t)
	n := &realNode{node: &node{t: t, dir: t.TempDir()}, mounts: mount.New()}
	n.defaults(filepath.Join(n.dir, "pool"))
	n.pool = append(n.pool, pools...)
	n.up()
	t.Cleanup(func() { n.down() })
	return n
}

func (n *realNode) up() {
	n.t.Helper()
	ctx := context.Background()
	var err error
	n.store, err = image.Open(ctx, n.pool)
	n.must(err)
	dirs, err := image.OpenDirs(n.dirs, n.store.Pools()...)
	n.must(err)
	n.loops, err = loop.New(ctx, loop.WithWarm(0))
	n.must(err)
	n.d, err = New(n.cfg, n.store, dirs, n.loops, n.mounts)
	n.must(err)
	n.must(n.d.Reconcile(ctx))
}

func (n *realNode) down() {
	n.must(n.d.Close())
	n.must(n.loops.Close())
	n.must(n.store.Close())
}

func (n *realNode) made(name, pool string, c *csi.VolumeCapability, parameters map[string]string) volume {
	n.t.Helper()
	all := map[string]string{"pool": pool}
	maps.Copy(all, parameters)
	resp, err := (&controllerServer{d: n.d}).CreateVolume(n.t.Context(), &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: 32 * mib}, VolumeCapabilities: []*csi.VolumeCapability{c}, Parameters: all,
	})
	n.must(err)
	return volume{n: n.node, id: resp.GetVolume().GetVolumeId(), cap: c}
}

func (n *realNode) staged(v volume) error {
	_, err := (&nodeServer{d: n.d}).NodeStageVolume(n.t.Context(), &csi.NodeStageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging(), VolumeCapability: v.cap})
	return err
}

func (n *realNode) unstaged(v volume) error {
	_, err := (&nodeServer{d: n.d}).NodeUnstageVolume(n.t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging()})
	return err
}

func (n *realNode) published(v volume, target string, c *csi.VolumeCapability) error {
	_, err := (&nodeServer{d: n.d}).NodePublishVolume(n.t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.staging(), TargetPath: target, VolumeCapability: c,
	})
	return err
}

func (n *realNode) unpublished(v volume, target string) error {
	_, err := (&nodeServer{d: n.d}).NodeUnpublishVolume(n.t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: target})
	return err
}

// TestDeadPoolConcernsItsVolumesOnly: the filesystem of one of two pools dies under raw
// volumes and under a loop device of somebody else. The kernel does not tell of such
// devices what they show (fact 103); all other volumes are served, also by another start.
func TestDeadPoolConcernsItsVolumesOnly(t *testing.T) {
	dead := roottest.Pool(t, "xfs", 400*mib)
	if err := os.Chmod(dead, 0o700); err != nil {
		t.Fatal(err)
	}
	n := newRealNode(t, image.Config{Name: "dead", Path: dead, Overcommit: 1})
	good, bad, other := n.made("good", "default", blockCap(manyWriters), nil), n.made("bad", "dead", blockCap(manyWriters), nil), n.made("other", "dead", blockCap(manyWriters), nil)
	for _, v := range []volume{good, bad, other} {
		n.must(n.staged(v))
	}
	foreign := filepath.Join(dead, "foreign.img")
	n.must(os.WriteFile(foreign, make([]byte, mib), 0o600))
	device := roottest.Losetup(t, foreign)
	defer func() { roottest.Run(t, "losetup", "--detach", device) }()

	f, err := os.Open(dead)
	n.must(err)
	const goingDown, noLogFlush = 0x8004587d, 2 // linux/xfs_fs.h
	err = unix.IoctlSetPointerInt(int(f.Fd()), goingDown, noLogFlush)
	n.must(err)
	n.must(f.Close())

	works := func(when string) {
		t.Helper()
		if _, _, err := n.loops.Survey(t.Context()); err != nil {
			t.Errorf("%s: the list of devices: %v", when, err)
		}
		for range 2 { // also when it is not staged, for which all devices are looked at
			if err := n.unstaged(good); err != nil {
				t.Errorf("%s: unstage: %v", when, err)
			}
		}
		if err := n.staged(good); err != nil {
			t.Errorf("%s: stage: %v", when, err)
		}
	}
	works("the pool is dead")
	if err := n.unstaged(bad); err != nil {
		t.Errorf("unstage what is in the dead pool: %v", err)
	}
	n.down()
	n.up()
	works("started again")
	if err := n.unstaged(other); err != nil {
		t.Errorf("unstage what is in the dead pool, after a start: %v", err)
	}
	n.must(n.unstaged(good))
	if left := slices.DeleteFunc(roottest.Loops(dead), func(line string) bool { return line == filepath.Base(device)+" over "+foreign }); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// TestInlineVolumeAtATakenTarget: what somebody else has mounted at the target of an inline
// volume stays there.
func TestInlineVolumeAtATakenTarget(t *testing.T) {
	n := newRealNode(t)
	target := filepath.Join(n.dir, "target")
	n.must(os.Mkdir(target, 0o750))
	n.must(unix.Mount("somebody", target, "tmpfs", 0, "size=1m"))
	defer func() { n.must(unix.Unmount(target, 0)) }()
	file := filepath.Join(target, "precious")
	n.must(os.WriteFile(file, []byte("x"), 0o600))
	_, err := (&nodeServer{d: n.d}).NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: "csi-1", TargetPath: target, VolumeCapability: mountCap("ext4", manyWriters),
		VolumeContext: map[string]string{ephemeralKey: "true", "size": "16Mi"},
	})
	if err == nil {
		t.Error("the volume is published over it")
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
	if left := n.store.List(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestPublishedReadOnlyByAFlag: "ro" among the mount flags of a publication is for that
// publication, when the volume is staged for writing.
func TestPublishedReadOnlyByAFlag(t *testing.T) {
	n := newRealNode(t)
	v := n.made("v", "default", mountCap("ext4", manyWriters), nil)
	n.must(n.staged(v))
	n.must(n.published(v, v.target("a"), mountCap("ext4", manyWriters, "ro")))
	if err := os.WriteFile(filepath.Join(v.target("a"), "x"), nil, 0o600); err == nil {
		t.Error("it can be written to")
	}
	n.must(n.unpublished(v, v.target("a")))
	n.must(n.unstaged(v))
}

// thin makes a thin volume and stages it.
func (n *realNode) thin(c *csi.VolumeCapability) volume {
	n.t.Helper()
	resp, err := (&controllerServer{d: n.d}).CreateVolume(n.t.Context(), &csi.CreateVolumeRequest{
		Name: "v", CapacityRange: &csi.CapacityRange{RequiredBytes: 300 * mib}, VolumeCapabilities: []*csi.VolumeCapability{c},
		Parameters: map[string]string{"allocation": "thin"},
	})
	n.must(err)
	v := volume{n: n.node, id: resp.GetVolume().GetVolumeId(), cap: c}
	n.must(n.staged(v))
	return v
}

// TestUnstageWhatItsPodFroze: a pod froze its filesystem and went. Unmounted so, it would
// keep its device, and nobody could thaw it.
func TestUnstageWhatItsPodFroze(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			n := newRealNode(t)
			c := mountCap(fs, manyWriters)
			v := n.thin(c)
			n.must(n.published(v, v.target("a"), c))
			if out, err := exec.Command("fsfreeze", "--freeze", v.target("a")).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			// Growing it would wait for a thaw, with the volume's lock.
			_, err := (&nodeServer{d: n.d}).NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{
				VolumeId: v.id, VolumePath: v.target("a"), StagingTargetPath: v.staging(), CapacityRange: &csi.CapacityRange{RequiredBytes: 600 * mib},
			})
			if code := codeOf(err); code != codes.Aborted || !strings.Contains(err.Error(), "fsfreeze -u") {
				t.Errorf("expanding it: %v", err)
			}
			n.must(n.unpublished(v, v.target("a")))
			if err := n.unstaged(v); err != nil {
				t.Error(err)
			}
			if left := roottest.Loops(n.dir); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
		})
	}
}

// TestUnpublishWhatItsPodFroze is the same for an inline volume.
func TestUnpublishWhatItsPodFroze(t *testing.T) {
	n := newRealNode(t)
	target := filepath.Join(n.dir, "target")
	_, err := (&nodeServer{d: n.d}).NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: "csi-1", TargetPath: target, VolumeCapability: mountCap("ext4", manyWriters),
		VolumeContext: map[string]string{ephemeralKey: "true", "size": "16Mi"},
	})
	n.must(err)
	if out, err := exec.Command("fsfreeze", "--freeze", target).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	_, err = (&nodeServer{d: n.d}).NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "csi-1", TargetPath: target})
	n.must(err)
	if left := n.store.List(); len(left) > 0 || len(roottest.Loops(n.dir)) > 0 {
		t.Errorf("left: %v, %q", left, roottest.Loops(n.dir))
	}
}

// TestThawOfWhatWasReadOnly: a volume that was staged for readers was frozen, and unmounted
// so. The kernel mounts it as it was only, for reading.
func TestThawOfWhatWasReadOnly(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			n := newRealNode(t)
			c := mountCap(fs, reader)
			v := n.thin(c)
			found, err := n.store.Get(v.id)
			n.must(err)
			w, err := n.d.writersOf(t.Context(), found)
			n.must(err)
			r, err := n.d.state.putFreeze([]writers{w}, false)
			n.must(err)
			n.must(r.keep())
			roottest.Run(t, "fsfreeze", "--freeze", v.staging())
			roottest.Run(t, "umount", v.staging())
			if len(roottest.Loops(n.dir)) == 0 {
				t.Fatal("the device went with the mount: it was not frozen")
			}
			if err := n.d.thawLeft(t.Context()); err != nil {
				t.Error(err)
				roottest.Run(t, "mount", "-o", "ro", fmt.Sprintf("/dev/loop%d", w.device.Number), v.staging()) // so that nothing stays
				roottest.Run(t, "fsfreeze", "--unfreeze", v.staging())
			}
			n.must(n.unstaged(v))
			if left := roottest.Loops(n.dir); len(left) > 0 || len(n.freezeRecords()) > 0 {
				t.Errorf("left: %q, %v", left, n.freezeRecords())
			}
		})
	}
}

// TestPoolThatHangs: a pool whose filesystem does not answer keeps one thread, however
// often it is asked for, and does not keep another pool from being served.
func TestPoolThatHangs(t *testing.T) {
	hung := roottest.Pool(t, "ext4", 400*mib)
	if err := os.Chmod(hung, 0o700); err != nil {
		t.Fatal(err)
	}
	n := newRealNode(t, image.Config{Name: "hung", Path: hung, Overcommit: 1})
	slices.Reverse(n.pool) // the one that hangs comes first
	n.down()
	n.up()
	if out, err := exec.Command("fsfreeze", "--freeze", hung).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	thaw := func() {
		if out, err := exec.Command("fsfreeze", "--unfreeze", hung).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
	threads := func() int {
		all, err := os.ReadDir("/proc/self/task")
		n.must(err)
		return len(all)
	}
	p, ok := n.store.Pool("hung")
	if !ok {
		t.Fatal("no such pool")
	}
	if err := p.Check(t.Context()); codeOf(err) != codes.Unavailable { // which waits
		t.Errorf("the pool hangs: %v", err)
	}
	before := threads()
	for range 40 {
		if err := n.d.Ready(t.Context()); err != nil {
			t.Errorf("one pool of two hangs: %v", err)
		}
	}
	if now := threads(); now > before+10 {
		t.Errorf("%d threads, %d before", now, before)
	}
	thaw()
	deadline := time.Now().Add(30 * time.Second)
	for p.Check(t.Context()) != nil {
		if time.Now().After(deadline) {
			t.Fatal(p.Check(t.Context()))
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestCopyForReadersWithoutRecovery: a larger copy grows before it is mounted for readers,
// with options that the kernel takes for reading only.
func TestCopyForReadersWithoutRecovery(t *testing.T) {
	for fs, c := range map[string]struct {
		option string
		size   int64
	}{"xfs": {"norecovery", 320 * mib}, "btrfs": {"rescue=nologreplay", 128 * mib}} {
		t.Run(fs, func(t *testing.T) {
			n := newRealNode(t)
			capability := mountCap(fs, reader)
			capability.GetMount().MountFlags = []string{c.option}
			v := volume{n: n.node, cap: mountCap(fs, oneWriter)}
			made := func(v *volume, name string, size int64, src *csi.VolumeContentSource) {
				resp, err := (&controllerServer{d: n.d}).CreateVolume(t.Context(), &csi.CreateVolumeRequest{
					Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeContentSource: src,
					VolumeCapabilities: []*csi.VolumeCapability{v.cap},
				})
				n.must(err)
				v.id = resp.GetVolume().GetVolumeId()
			}
			made(&v, "v", c.size, nil)
			n.must(n.staged(v))
			n.must(n.unstaged(v))
			copied := volume{n: n.node, cap: capability}
			made(&copied, "copy", c.size+128*mib, v.asSource())
			n.must(n.staged(copied))
			var st unix.Statfs_t
			n.must(unix.Statfs(copied.staging(), &st))
			if size := int64(st.Blocks) * st.Bsize; size < c.size+64*mib || st.Flags&unix.ST_RDONLY == 0 {
				t.Errorf("%d bytes, flags %#x", size, st.Flags)
			}
			n.must(n.unstaged(copied))
		})
	}
}
