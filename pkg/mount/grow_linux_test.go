package mount

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// enlarge makes the image and its loop device longer.
func enlarge(tb testing.TB, device, image string, by int64) (size int64) {
	tb.Helper()
	info, err := os.Stat(image)
	if err != nil {
		tb.Fatal(err)
	}
	size = info.Size() + by
	if err := os.Truncate(image, size); err != nil {
		tb.Fatal(err)
	}
	roottest.Run(tb, "losetup", "-c", device)
	if got, err := deviceSize(device); err != nil || got != size {
		tb.Fatalf("device of %d bytes, want %d: %v", got, size, err)
	}
	return size
}

// noTools makes every program impossible to find, so that a call that succeeds
// has started none.
func noTools(t *testing.T) { t.Setenv("PATH", "/nonexistent") }

func TestGrowOnline(t *testing.T) {
	roottest.Require(t)
	for _, fsType := range []string{"xfs", "btrfs", "ext4", "ext3", "ext2"} {
		t.Run(fsType, func(t *testing.T) {
			m, ctx := New(), t.Context()
			device, image := loopFS(t, fsType)
			dir := t.TempDir()
			staging, publish := dir+"/staging", dir+"/publish"
			mustMount(t, m, Spec{Source: device, Target: staging, FSType: fsType})
			mustBind(t, m, BindSpec{Source: staging, Target: publish})
			data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
			write(t, staging+"/data", string(data))
			spec := GrowSpec{FSType: fsType, Device: device, Path: publish}
			fds := openFDs(t)
			t.Run("already full", func(t *testing.T) {
				noTools(t)
				if err := m.Grow(ctx, spec); err != nil {
					t.Fatal(err)
				}
			})
			before, err := m.Stats(staging)
			if err != nil {
				t.Fatal(err)
			}
			for round := range 2 {
				enlarge(t, device, image, 64*miB)
				if needs, err := m.NeedsGrow(spec); err != nil || !needs {
					t.Fatalf("needs to grow: %t, %v", needs, err)
				}
				err = m.Grow(ctx, spec)
				if isExt(fsType) && !mayResize(t) {
					expectPermission(t, err)
					return
				}
				if err != nil {
					t.Fatalf("round %d: %v", round, err)
				}
			}
			after, err := m.Stats(staging)
			if err != nil || after.Total < before.Total+120*miB {
				t.Errorf("%d bytes became %d: %v", before.Total, after.Total, err)
			}
			noTools(t)
			if err := m.Grow(ctx, spec); err != nil {
				t.Errorf("again: %v", err)
			}
			if read(t, publish+"/data") != string(data) {
				t.Error("the data changed")
			}
			if n := openFDs(t); n != fds {
				t.Errorf("%d descriptors, %d before", n, fds)
			}
		})
	}
}

func expectPermission(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, ErrPermission) || !errors.Is(err, syscall.EPERM) || !strings.Contains(err.Error(), "CAP_SYS_RESOURCE") {
		t.Errorf("got %v, want ErrPermission that names CAP_SYS_RESOURCE", err)
	}
	t.Log(err)
}

// A frozen filesystem is not asked to grow, which would wait for the thaw and listen to
// nothing; nor does looking change it.
func TestGrowOfFrozen(t *testing.T) {
	roottest.Require(t)
	for _, options := range []string{"xfs inode32 noatime", "xfs max_atomic_write=4k", "btrfs compress=zstd nodatasum", "ext4 commit=30 lazytime"} {
		t.Run(options, func(t *testing.T) {
			m, ctx := New(), t.Context()
			list := strings.Fields(options)
			fsType := list[0]
			device, image := loopFS(t, fsType)
			dir := t.TempDir()
			err := m.Mount(ctx, Spec{Source: device, Target: dir + "/m", FSType: fsType, Options: list[1:]})
			if err != nil && list[1] == "max_atomic_write=4k" {
				return // not before Linux 6.16, nor for each device
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { roottest.Run(t, "umount", dir+"/m") })
			spec := GrowSpec{FSType: fsType, Device: device, Path: dir + "/m"}
			enlarge(t, device, image, 64*miB)
			before, _, err := m.At(spec.Path)
			if err != nil || frozen(before) {
				t.Fatalf("frozen: %t, %v", frozen(before), err)
			}
			roottest.Run(t, "fsfreeze", "--freeze", spec.Path)
			thaw := sync.OnceFunc(func() { roottest.Run(t, "fsfreeze", "--unfreeze", spec.Path) })
			defer thaw()
			if err := m.Grow(ctx, spec); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "fsfreeze -u") {
				t.Errorf("frozen: %v", err)
			}
			thaw()
			err = m.Grow(ctx, spec)
			if isExt(fsType) && !mayResize(t) {
				expectPermission(t, err)
			} else if err != nil {
				t.Error(err)
			}
			after, _, err := m.At(spec.Path)
			if err != nil || !slices.Equal(before.Options, after.Options) || !slices.Equal(before.SuperOptions, after.SuperOptions) {
				t.Errorf("%+v became %+v: %v", before, after, err)
			}
			roottest.Run(t, "mount", "-o", "remount,ro", spec.Path)
			if after, _, err = m.At(spec.Path); err != nil || frozen(after) {
				t.Errorf("read-only: frozen %t, %v", frozen(after), err)
			}
			if after, _, err = m.At(spec.Path); err != nil || !after.ReadOnly {
				t.Errorf("not read-only any more: %+v, %v", after, err)
			}
		})
	}
}

// What the kernel does not end in time is left to it, and the next call waits for it.
func TestGrowEndsWithContext(t *testing.T) {
	roottest.Require(t)
	for _, fsType := range []string{"xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) { growEndsWithContext(t, fsType) })
	}
}

func growEndsWithContext(t *testing.T, fsType string) {
	t.Helper()
	m := New()
	device, image := loopFS(t, fsType)
	dir := t.TempDir()
	mustMount(t, m, Spec{Source: device, Target: dir + "/m", FSType: fsType})
	spec := GrowSpec{FSType: fsType, Device: device, Path: dir + "/m"}
	enlarge(t, device, image, 64*miB)
	roottest.Run(t, "fsfreeze", "--freeze", spec.Path)
	thaw := sync.OnceFunc(func() { roottest.Run(t, "fsfreeze", "--unfreeze", spec.Path) })
	defer thaw()
	looked := frozenNow
	asked := 0
	frozenNow = func(Mount) bool { asked++; return false } // it is frozen a moment later
	defer func() { frozenNow = looked }()
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if err := m.Grow(ctx, spec); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("frozen: %v", err)
		}
		cancel()
	}
	if asked != 1 { // the second call waits for the first
		t.Errorf("the kernel was asked %d times", asked)
	}
	thaw()
	if err := m.Grow(t.Context(), spec); err != nil {
		t.Error(err)
	}
	if needs, err := m.NeedsGrow(spec); err != nil || needs {
		t.Errorf("needs to grow: %t, %v", needs, err)
	}
}

// Whatever this machine allows, a process without the capability gets the
// explanation.
func TestGrowOnlineWithoutCapability(t *testing.T) {
	if !inNamespace(t, "setpriv", "--bounding-set", "-sys_resource") {
		return
	}
	if mayResize(t) {
		t.Fatal("the capability was not dropped")
	}
	m := New()
	device, image := loopFS(t, "ext4")
	target := t.TempDir() + "/target"
	mustMount(t, m, Spec{Source: device, Target: target, FSType: "ext4"})
	spec := GrowSpec{FSType: "ext4", Device: device, Path: target}
	if err := m.Grow(t.Context(), spec); err != nil {
		t.Errorf("already full: %v", err)
	}
	enlarge(t, device, image, 64*miB)
	expectPermission(t, m.Grow(t.Context(), spec))
}

func TestGrowOffline(t *testing.T) {
	roottest.Require(t)
	for _, fsType := range []string{"ext2", "ext3", "ext4"} {
		t.Run(fsType, func(t *testing.T) {
			m, ctx := New(), t.Context()
			device, image := loopFS(t, fsType)
			target := t.TempDir() + "/target"
			mount := Spec{Source: device, Target: target, FSType: fsType}
			mustMount(t, m, mount)
			write(t, target+"/data", strings.Repeat("content", 1<<16))
			spec := GrowSpec{FSType: fsType, Device: device}
			size := enlarge(t, device, image, 96*miB)
			isErrno(t, m.Grow(ctx, spec), syscall.EBUSY)
			if err := m.Unmount(ctx, target); err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(func() {
					if err := m.Grow(ctx, spec); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if sb := superblockOf(t, device); sb.Size != size || sb.NeedsCheck {
				t.Errorf("%+v, want %d bytes", sb, size)
			}
			if err := m.Mount(ctx, mount); err != nil {
				t.Fatal(err)
			}
			if read(t, target+"/data") != strings.Repeat("content", 1<<16) {
				t.Error("the data changed")
			}
			if err := m.Unmount(ctx, target); err != nil {
				t.Fatal(err)
			}
			noTools(t)
			if err := m.Grow(ctx, spec); err != nil {
				t.Errorf("again: %v", err)
			}
			if err := m.Check(ctx, fsType, device); !errors.Is(err, os.ErrNotExist) && err == nil {
				t.Error("a check without e2fsck succeeded")
			}
		})
	}
}

func superblockOf(tb testing.TB, device string) Superblock {
	tb.Helper()
	f, err := os.Open(device)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	sb, err := ReadSuperblock(f)
	if err != nil {
		tb.Fatal(err)
	}
	return sb
}

// Volumes are multiples of 1 MiB, filesystems are not: whatever is left over at
// the end must not make every later attach grow again. Grown and made sizes are
// checked against the tools' and the kernel's own rounding.
func TestGrowConverges(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	for _, fsType := range []string{"ext4", "xfs", "btrfs"} {
		device, image := loopFS(t, fsType)
		target := t.TempDir() + "/target"
		spec := GrowSpec{FSType: fsType, Device: device}
		if fsType != "ext4" {
			spec.Path = target
			mustMount(t, m, Spec{Source: device, Target: target, FSType: fsType})
		}
		for _, by := range []int64{1, 63, 1, 1, 2, 8, 53, 1, 1, 126, 2, 200} {
			size := enlarge(t, device, image, by*miB)
			if err := m.Grow(ctx, spec); err != nil {
				t.Fatalf("%s to %d MiB: %v", fsType, size/miB, err)
			}
			if needs, err := m.NeedsGrow(spec); err != nil || needs {
				t.Errorf("%s of %d MiB needs to grow: %t, %v", fsType, size/miB, needs, err)
			}
		}
	}
}

func TestGrowFailuresSayWhy(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	device, image := loopFS(t, "xfs")
	other, _ := loopFS(t, "ext4")
	dir := t.TempDir()
	target := dir + "/target"
	grown := GrowSpec{FSType: "xfs", Device: device, Path: target}
	if err := m.Grow(ctx, GrowSpec{FSType: "xfs", Device: device, Path: newDir(t, target)}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("not mounted: %v", err)
	}
	enlarge(t, device, image, 32*miB)
	if err := m.Grow(ctx, GrowSpec{FSType: "xfs", Device: device}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("xfs offline: %v", err)
	}
	mustMount(t, m, Spec{Source: device, Target: target, FSType: "xfs", ReadOnly: true})
	isErrno(t, m.Grow(ctx, grown), syscall.EROFS)
	foreign(t, m.Grow(ctx, GrowSpec{FSType: "xfs", Device: other, Path: target}))
	foreign(t, m.Grow(ctx, GrowSpec{FSType: "ext4", Device: device, Path: target}))
	if err := m.Grow(ctx, GrowSpec{FSType: "xfs", Device: other}); !errors.Is(err, ErrUnknownFilesystem) {
		t.Errorf("another filesystem: %v", err)
	}
	isErrno(t, m.Grow(ctx, GrowSpec{FSType: "ext4", Device: dir + "/none"}), syscall.ENOENT)
	file := filepath.Join(dir, "file")
	write(t, file, "")
	isErrno(t, m.Grow(ctx, GrowSpec{FSType: "ext4", Device: file}), syscall.ENOTBLK)
}

// The kernel resizes a btrfs to 256 MiB or more only.
func TestGrowOfSmallBtrfs(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	image := mkfsImage(t, "btrfs", 128*miB)
	device := loopOver(t, image)
	target := t.TempDir() + "/target"
	mustMount(t, m, Spec{Source: device, Target: target, FSType: "btrfs"})
	spec := GrowSpec{FSType: "btrfs", Device: device, Path: target}
	enlarge(t, device, image, 64*miB)
	if err := m.Grow(ctx, spec); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "256 MiB") {
		t.Errorf("to 192 MiB: %v", err)
	}
	enlarge(t, device, image, 64*miB)
	if err := m.Grow(ctx, spec); err != nil {
		t.Errorf("to 256 MiB: %v", err)
	}
}

// The only device of a btrfs need not be its first, if the first was removed.
func TestGrowOfBtrfsOnItsSecondDevice(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	first, _ := loopFS(t, "btrfs")
	image := filepath.Join(t.TempDir(), "second.img")
	write(t, image, "")
	if err := os.Truncate(image, 256*miB); err != nil {
		t.Fatal(err)
	}
	device := loopOver(t, image)
	target := t.TempDir() + "/target"
	mustMount(t, m, Spec{Source: first, Target: target, FSType: "btrfs"})
	roottest.Run(t, "btrfs", "device", "add", "-K", device, target)
	roottest.Run(t, "btrfs", "device", "remove", "1", target)
	write(t, target+"/data", "content")
	if err := m.Unmount(ctx, target); err != nil {
		t.Fatal(err)
	}
	mustMount(t, m, Spec{Source: device, Target: target, FSType: "btrfs"})
	spec := GrowSpec{FSType: "btrfs", Device: device, Path: target}
	if needs, err := m.NeedsGrow(spec); err != nil || needs {
		t.Errorf("already full: needs to grow: %t, %v", needs, err)
	}
	before, err := m.Stats(target)
	if err != nil {
		t.Fatal(err)
	}
	enlarge(t, device, image, 64*miB)
	if err := m.Grow(ctx, spec); err != nil {
		t.Fatal(err)
	}
	after, err := m.Stats(target)
	if err != nil || after.Total != before.Total+64*miB {
		t.Errorf("%d bytes became %d: %v", before.Total, after.Total, err)
	}
	if needs, err := m.NeedsGrow(spec); err != nil || needs {
		t.Errorf("needs to grow again: %t, %v", needs, err)
	}
	if read(t, target+"/data") != "content" {
		t.Error("the data changed")
	}
}

func TestCheck(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	// Without checksums, so that the superblock can be edited.
	image := mkfsImage(t, "ext4", 64*miB, "-O", "^metadata_csum")
	device := loopOver(t, image)
	if err := m.Check(ctx, "ext4", device); err != nil {
		t.Errorf("a sound filesystem: %v", err)
	}
	// An unmounted filesystem that recorded an error is repaired.
	patch(t, device, 1024+0x3A, []byte{stateValid | stateError, 0})
	if !superblockOf(t, device).NeedsCheck {
		t.Error("the error is not seen")
	}
	if err := m.Check(ctx, "ext4", device); err != nil {
		t.Errorf("a recorded error: %v", err)
	}
	if superblockOf(t, device).NeedsCheck {
		t.Error("the error is still there")
	}
	// What -p does not dare to repair needs a person: no group descriptors.
	patch(t, device, 4096, bytes.Repeat([]byte{0xff}, int(4*miB)))
	patch(t, device, 1024+0x3A, []byte{stateValid | stateError, 0})
	var c *CheckError
	if err := m.Check(ctx, "ext4", device); !errors.As(err, &c) {
		t.Errorf("a wreck: %v", err)
	} else if c.Code == 0 || c.Output == "" || c.Device != device {
		t.Errorf("%+v", c)
	}
}

func patch(t *testing.T, device string, at int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(b, at)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// A dirty journal is seen, is no reason for a check, and is replayed by a mount.
func TestRecoveryIsSeen(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), context.Background()
	device, _ := loopFS(t, "ext4")
	target := t.TempDir() + "/target"
	mount := Spec{Source: device, Target: target, FSType: "ext4"}
	mustMount(t, m, mount)
	write(t, target+"/file", "content")
	if sb := superblockOf(t, device); !sb.NeedsRecovery || sb.NeedsCheck {
		t.Errorf("while mounted: %+v", sb)
	}
	shutdown(t, target)
	if err := m.Unmount(ctx, target); err != nil {
		t.Fatal(err)
	}
	if sb := superblockOf(t, device); !sb.NeedsRecovery || sb.NeedsCheck {
		t.Errorf("after a crash: %+v", sb)
	}
	if err := m.Mount(ctx, mount); err != nil {
		t.Fatal(err)
	}
	if err := m.Unmount(ctx, target); err != nil {
		t.Fatal(err)
	}
	if sb := superblockOf(t, device); sb.NeedsRecovery || sb.NeedsCheck {
		t.Errorf("after recovery: %+v", sb)
	}
}
