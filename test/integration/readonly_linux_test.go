package integration

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
)

// TestReadOnlyFilesystem publishes one volume for writing and for reading only.
func TestReadOnlyFilesystem(t *testing.T) {
	s := newSite(t, siteConfig{})
	for _, k := range []kind{ext4, xfs, btrfs, mapped} {
		v := s.volume(k, "ro-"+k.name).up()
		v.step("write", v.write(0))
		v.step("publish read-only", v.publish(1, true))
		v.step("read", v.read(0, 1))
		v.cannotWrite(1)
		v.step("write through the other target", v.write(1))
		v.step("unpublish read-only", v.unpublish(1))
		v.down()
	}
}

// cannotWrite tries every way to change a filesystem through target n.
func (v *volume) cannotWrite(n int) {
	v.t.Helper()
	target := v.target(n)
	readOnly := func(what string, err error) {
		v.t.Helper()
		if !errors.Is(err, syscall.EROFS) {
			v.t.Errorf("%s on read-only %s: %v, want EROFS", what, v.name(), err)
		}
	}
	data := filepath.Join(target, "data-0")
	readOnly("create", os.WriteFile(filepath.Join(target, "new"), nil, 0o600))
	readOnly("write", withDevice(data, os.O_WRONLY, func(uintptr) error { return nil }))
	readOnly("remove", os.Remove(data))
	readOnly("mkdir", os.Mkdir(filepath.Join(target, "dir"), 0o700))
	readOnly("chmod", os.Chmod(data, 0o644))
	readOnly("set times", os.Chtimes(data, t0, t0))
	readOnly("set xattr", unix.Setxattr(data, "user.a", []byte("b"), 0))
	// One bind remounted read-write must not be possible for whoever sees the path
	// in a mount namespace of his own, as a container without CAP_SYS_ADMIN does; root
	// in this namespace may do anything. What must hold is that the flag is the mount's
	// own, so that a remount of the staging path does not lift it.
	if err := unix.Mount("", v.staging(), "", unix.MS_REMOUNT|unix.MS_BIND, ""); err != nil {
		v.t.Errorf("remount of the staging path: %v", err)
	}
	readOnly("create after a remount of the staging path", os.WriteFile(filepath.Join(target, "new"), nil, 0o600))
	// A bind mount of a directory below keeps the flag.
	below := filepath.Join(v.dir, "below")
	must(v.t, os.MkdirAll(below, 0o700))
	must(v.t, unix.Mount(target, below, "", unix.MS_BIND, ""))
	readOnly("create through a bind of the target", os.WriteFile(filepath.Join(below, "new"), nil, 0o600))
	must(v.t, unix.Unmount(below, 0))
	var st unix.Statfs_t
	must(v.t, unix.Statfs(target, &st))
	if st.Flags&unix.ST_RDONLY == 0 {
		v.t.Errorf("statfs of the target does not say read-only")
	}
}

// TestReadOnlyAccessMode: the access mode alone makes a volume read-only.
func TestReadOnlyAccessMode(t *testing.T) {
	s := newSite(t, siteConfig{})
	for _, mode := range []csi.VolumeCapability_AccessMode_Mode{
		csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY, csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY,
	} {
		for _, k := range []kind{ext4, xfs, btrfs} {
			v := s.volume(k, "reader-"+k.name).up()
			v.step("write", v.write(0))
			v.step("unpublish", v.unpublish(0))
			v.step("unstage", v.unstage())
			v.mode = mode
			v.step("stage for reading", v.stage())
			v.step("publish for reading", v.publish(0, false))
			v.step("read", v.read(0, 0))
			err := os.WriteFile(filepath.Join(v.target(0), "new"), nil, 0o600)
			if !errors.Is(err, syscall.EROFS) {
				t.Errorf("%s: create with %s: %v, want EROFS", k.name, mode, err)
			}
			v.down()
		}
		v := s.volume(block, "reader-block")
		v.mode = mode
		v.up()
		v.deviceIsReadOnly(0)
		v.down()
	}
}

// TestReadOnlyBlock: a raw volume that is published read-only rejects writes in the kernel,
// while it can be written through another target.
func TestReadOnlyBlock(t *testing.T) {
	s := newSite(t, siteConfig{})
	v := s.volume(block, "block").up()
	v.step("write", v.write(0))
	v.step("publish read-only", v.publish(1, true))
	v.step("read", v.read(0, 1))
	v.deviceIsReadOnly(1)
	v.step("write through the other target", v.write(3))
	v.step("publish read-only once more", v.publish(2, true))
	v.deviceIsReadOnly(2)
	v.step("unpublish", v.unpublish(1))
	v.step("read after the other was unpublished", v.read(3, 2))
	v.step("unpublish", v.unpublish(2))
	v.down()
}

// TestReadOnlyMapped: the attribute readOnly of a mapped volume.
func TestReadOnlyMapped(t *testing.T) {
	s := newSite(t, siteConfig{})
	v := s.volume(mapped, "mapped")
	v.step("create", v.create())
	before, err := os.ReadFile(v.image())
	must(t, err)
	v.context["readOnly"] = "true"
	v.step("stage", v.stage())
	v.step("publish", v.publish(0, false))
	if err := os.WriteFile(filepath.Join(v.target(0), "new"), nil, 0o600); !errors.Is(err, syscall.EROFS) {
		t.Errorf("create: %v, want EROFS", err)
	}
	v.step("unpublish", v.unpublish(0))
	v.step("unstage", v.unstage())

	v.fs = "" // the same range as a device
	v.context["exposeImage"] = "true"
	v.step("stage as a block device", v.stage())
	v.step("publish as a block device", v.publish(0, false))
	v.deviceIsReadOnly(0)
	v.step("unpublish", v.unpublish(0))
	v.step("unstage", v.unstage())
	after, err := os.ReadFile(v.image())
	must(t, err)
	if string(before) != string(after) {
		t.Error("the image was changed by a read-only use")
	}
	v.step("remove", v.remove())
}

// deviceIsReadOnly tries to write to the device at target n.
func (v *volume) deviceIsReadOnly(n int) {
	v.t.Helper()
	ro, err := deviceReadOnly(v.target(n))
	if err != nil || !ro {
		v.t.Errorf("BLKROGET = %v, %v; want read-only", ro, err)
	}
	if err := writeFile(v.target(n), make([]byte, 4096), 0, 0); err == nil {
		v.t.Errorf("write to a read-only device succeeds")
	} else if !errors.Is(err, syscall.EPERM) && !errors.Is(err, syscall.EACCES) && !errors.Is(err, syscall.EROFS) {
		v.t.Errorf("write to a read-only device: %v", err)
	}
	for what, err := range map[string]error{"BLKDISCARD": discard(v.target(n), 0, mib), "BLKZEROOUT": zeroOut(v.target(n), 0, mib)} {
		if err == nil {
			v.t.Errorf("%s on a read-only device succeeds", what)
		}
	}
	var zero int32
	_ = withDevice(v.target(n), os.O_RDONLY, func(fd uintptr) error {
		return unix.IoctlSetPointerInt(int(fd), unix.BLKROSET, int(zero))
	})
	if err := writeFile(v.target(n), make([]byte, 4096), 0, 0); err == nil {
		v.t.Errorf("write succeeds after BLKROSET 0")
	}
}

// TestSameNameOtherSize (F6): a name is not reused for another size.
func TestSameNameOtherSize(t *testing.T) {
	s := newSite(t, siteConfig{})
	v := s.volume(block, "size").up()
	v.step("the same again", v.create())
	for _, r := range []*csi.CapacityRange{{RequiredBytes: 2 * v.size}, {RequiredBytes: v.size + 1}, {LimitBytes: v.size - mib}, {RequiredBytes: mib, LimitBytes: v.size - 1}} {
		_, err := s.controller().CreateVolume(context.Background(), &csi.CreateVolumeRequest{
			Name: v.key(), CapacityRange: r, VolumeCapabilities: []*csi.VolumeCapability{v.capability()},
		})
		wantCode(t, "CreateVolume with "+r.String(), err, codeAlreadyExists)
	}
	v.step("size", v.checkSize())
	v.down()
}
