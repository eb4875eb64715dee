package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// fill writes files until there is not a block left on a file system.
func fill(t testing.TB, dir string) (empty func()) {
	t.Helper()
	var names []string
	for size := int64(64) << 20; size >= 512; size /= 2 {
		for {
			name := filepath.Join(dir, fmt.Sprint("ballast-", len(names)))
			f, err := os.Create(name)
			if err != nil {
				break
			}
			names = append(names, name)
			_, err = f.Write(make([]byte, size))
			if err == nil {
				err = f.Sync()
			}
			_ = f.Close()
			if err != nil {
				break
			}
		}
	}
	return func() {
		for _, n := range names {
			_ = os.Remove(n)
		}
	}
}

// TestFullPool: somebody filled the pool's file system to the last block. What was promised is kept, nothing new is, and
// everything can be taken down.
func TestFullPool(t *testing.T) {
	t.Parallel()
	for _, pool := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(pool, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, siteConfig{poolFS: pool, poolSize: 512 << 20})
			kinds := []kind{{name: "ext4", fs: "ext4", size: 64 * mib}, {name: "block", size: 64 * mib}, {name: "btrfs", fs: "btrfs", size: 128 * mib}}
			volumes := make([]*volume, len(kinds))
			for i, k := range kinds {
				volumes[i] = s.rest(k, "full-"+k.name)
			}
			empty := fill(t, filepath.Dir(s.pool))
			defer empty()
			for _, v := range volumes {
				v.step("stage on a full pool", v.stage())
				v.step("publish", v.publish(0, false))
				v.step("read", v.read(0, 0))
				v.step("write", v.write(1))
				v.step("read", v.read(1, 0))
				wantCode(t, "expand on a full pool", v.expand(v.want+192*mib), codes.ResourceExhausted)
				v.want = v.size
				v.step("size after a refused expand", v.checkSize())
			}
			for _, k := range append(kinds, kind{name: "thin", fs: "ext4", size: 16 * mib, thin: true}) {
				v := s.volume(k, "new-"+k.name)
				wantCode(t, "create on a full pool", v.create(), codes.ResourceExhausted)
			}
			s.kill()
			s.start()
			for _, v := range volumes {
				if v.block() {
					v.step("fill", v.fillDevice())
				} else {
					v.step("fill", v.fillFilesystem())
				}
				v.down()
			}
			if left, _ := filepath.Glob(s.pool + "/.new-*"); len(left) > 0 {
				t.Errorf("left in the pool: %q", left)
			}
		})
	}
}

// TestFullStateDir: a stage record that cannot be written fails the call, which leaves nothing; what is staged is taken
// down all the same, also after a start.
func TestFullStateDir(t *testing.T) {
	s := newSite(t, siteConfig{noStart: true})
	must(t, os.Mkdir(s.state, 0o700))
	must(t, unix.Mount("tmpfs", s.state, "tmpfs", 0, "size=64k"))
	defer func() {
		if !t.Failed() {
			s.stop()
		}
		must(t, unix.Unmount(s.state, unix.MNT_DETACH))
	}()
	s.start()
	for _, k := range []kind{ext4, block, mapped, {name: "ephemeral", fs: "ext4", size: 16 * mib, ephemeral: true}} {
		v := s.volume(k, "state-"+k.name)
		v.step("create", v.create())
		empty := fill(t, s.state)
		do, undo := v.stage, v.unstage
		if k.ephemeral {
			do = func() error { return v.publish(0, false) }
			undo = func() error { return v.unpublish(0) }
		}
		if err := do(); err == nil {
			t.Errorf("stage of %s without room for its record succeeds", k.name)
		} else {
			t.Logf("%s: %s", k.name, explain(err))
		}
		if d := v.device(); d != "" {
			t.Errorf("%s: %s is bound after a failed stage", k.name, d)
		}
		if m := append(mountsBelow(v.dir+"/stage"), mountsBelow(v.dir+"/pods")...); len(m) > 0 {
			t.Errorf("%s: mounted after a failed stage: %q", k.name, m)
		}
		v.step("undo of a failed call", undo())
		empty()
		v.step("stage", v.stage())
		v.step("publish", v.publish(0, false))
		if !k.ephemeral {
			empty = fill(t, s.state)
			if err := v.publish(1, true); err == nil {
				t.Logf("%s: the record of a second publication found room", k.name)
			} else if m := mountsBelow(v.dir + "/pods"); len(m) != 1 {
				t.Errorf("%s: mounted after a failed second publish: %q", k.name, m)
			}
			empty()
			v.step("unpublish", v.unpublish(1))
		}
		empty = fill(t, s.state)
		s.kill()
		s.start()
		v.step("unpublish", asCO(v, func() error { return v.unpublish(0) }))
		v.step("unstage", asCO(v, v.unstage))
		empty()
		v.down()
	}
}

// TestPoolUnderAnotherPath: the driver's container is new and sees its pool elsewhere (fact 25). Images are recognised all the same.
func TestPoolUnderAnotherPath(t *testing.T) {
	s := newSite(t, siteConfig{})
	var volumes []*volume
	for _, k := range []kind{ext4, xfs, btrfs, block} {
		v := s.volume(k, "moved-"+k.name).up()
		v.step("write", v.write(0))
		volumes = append(volumes, v)
	}
	s.kill()
	other := filepath.Join(s.dir, "other-path")
	must(t, os.Mkdir(other, 0o700))
	must(t, unix.Mount(s.pool, other, "", unix.MS_BIND, ""))
	for i, a := range s.args {
		s.args[i] = strings.Replace(a, "--pool=default="+s.pool, "--pool=default="+other, 1)
	}
	s.start()
	for _, v := range volumes {
		wantCode(t, "delete while it is published", v.remove(), codes.FailedPrecondition)
		v.step("read", v.read(0, 0))
		v.step("stage again", v.stage())
		v.step("publish again", v.publish(0, false))
		v.step("unpublish", v.unpublish(0))
		v.step("unstage", v.unstage())
		v.step("stage under the other path", v.stage())
		v.step("publish", v.publish(0, false))
		v.step("read", v.read(0, 0))
		v.down()
	}
	s.stop()
	must(t, unix.Unmount(other, 0))
	must(t, os.Remove(other))
}

// TestDeviceLimit: the limit is kept, also for devices that were attached before a restart, and nothing is left by what it refuses.
func TestDeviceLimit(t *testing.T) {
	s := newSite(t, siteConfig{args: []string{"--loop-devices-max=3", "--loop-devices-warm=0"}})
	var volumes []*volume
	for i := range 4 {
		v := s.volume([]kind{ext4, block}[i%2], fmt.Sprint("limit-", i))
		v.step("create", v.create())
		volumes = append(volumes, v)
	}
	for _, v := range volumes[:3] {
		v.step("stage", v.stage())
	}
	last := volumes[3]
	wantCode(t, "stage above the limit", last.stage(), codes.ResourceExhausted)
	s.kill()
	s.start()
	wantCode(t, "stage above the limit after a restart", last.stage(), codes.ResourceExhausted)
	volumes[0].step("unstage", volumes[0].unstage())
	last.step("stage", last.stage())
	for _, v := range volumes {
		v.step("unstage", v.unstage())
		v.step("delete", v.remove())
	}
}

// TestExpandWhileNotStaged: the filesystem follows at the next stage.
func TestExpandWhileNotStaged(t *testing.T) {
	s := newSite(t, siteConfig{})
	for _, k := range []kind{ext4, {name: "ext3", fs: "ext3", size: 32 * mib}, xfs, {name: "btrfs", fs: "btrfs", size: 256 * mib}, block} {
		v := s.rest(k, "offline-"+k.name)
		v.step("expand", v.expandImage(2*v.size))
		v.step("stage", v.stage())
		v.step("publish", v.publish(0, false))
		v.step("read", v.read(0, 0))
		if k.block() || !strings.HasPrefix(k.fs, "ext") || canGrowExt4() {
			v.step("size", v.checkSize())
		}
		v.down()
	}
}

// TestMappedRanges: several volumes may show parts of one image; writable ones do not overlap, and paths do not leave
// the allowed directory.
func TestMappedRanges(t *testing.T) {
	s := newSite(t, siteConfig{})
	path := filepath.Join(s.images, "shared.img")
	must(t, os.WriteFile(path, make([]byte, 16*mib), 0o600))
	part := func(name string, offset, limit int64) *volume {
		v := s.volume(kind{name: "mapped", size: limit, mapped: true}, name)
		v.context = map[string]string{"image": path, "offset": strconv.FormatInt(offset, 10), "sizeLimit": strconv.FormatInt(limit, 10), "exposeImage": "true"}
		return v
	}
	a, b := part("a", 0, 4*mib), part("b", 4*mib, 4*mib)
	for i, v := range []*volume{a, b} {
		v.step("stage", v.stage())
		v.step("publish", v.publish(0, false))
		v.step("write", writeFile(v.target(0), []byte(strings.Repeat(string(rune('a'+i)), int(v.size))), 0, 0))
		v.step("end", v.toTheLastByteOf())
	}
	wantCode(t, "stage of an overlapping range", part("c", 2*mib, 4*mib).stage(), codes.FailedPrecondition)
	wantCode(t, "stage of the same range by another volume", part("d", 0, 4*mib).stage(), codes.FailedPrecondition)
	wantCode(t, "a range behind the end", part("e", 15*mib, 2*mib).stage(), codes.InvalidArgument)
	wantCode(t, "an odd offset", part("f", 100, mib).stage(), codes.InvalidArgument)
	reader := part("reader", 0, 8*mib)
	reader.context["readOnly"] = "true"
	reader.step("stage", reader.stage())
	reader.step("publish", reader.publish(0, false))
	reader.deviceIsReadOnly(0)
	s.kill()
	s.start()
	content, err := os.ReadFile(reader.target(0))
	must(t, err)
	if want := strings.Repeat("a", int(4*mib)-3) + "end" + strings.Repeat("b", int(4*mib)-3) + "end"; string(content) != want {
		t.Errorf("the reader does not see what the writers wrote")
	}
	for _, v := range []*volume{a, b, reader} {
		v.step("unpublish", v.unpublish(0))
		v.step("unstage", v.unstage())
	}
	rest, err := os.ReadFile(path)
	must(t, err)
	if strings.Trim(string(rest[8*mib:]), "\x00") != "" {
		t.Error("bytes outside the ranges were written")
	}

	secret := filepath.Join(s.dir, "secret.img")
	must(t, os.WriteFile(secret, make([]byte, mib), 0o600))
	must(t, os.Symlink(secret, filepath.Join(s.images, "link.img")))
	must(t, os.Link(secret, filepath.Join(s.images, "hard.img")))
	must(t, os.Symlink(s.dir, filepath.Join(s.images, "dir")))
	must(t, syscall.Mknod(filepath.Join(s.images, "node.img"), syscall.S_IFBLK|0o600, 7<<8))
	must(t, syscall.Mkfifo(filepath.Join(s.images, "fifo.img"), 0o600))
	for _, p := range []string{
		secret, s.images + "/link.img", s.images + "/hard.img", s.images + "/dir/secret.img", s.images + "/../secret.img",
		s.images + "/node.img", s.images + "/fifo.img", s.images, s.images + "/missing.img", s.pool + "/pool.json", "/dev/loop0",
	} {
		v := s.volume(kind{name: "mapped", size: mib, mapped: true}, "escape")
		v.context = map[string]string{"image": p}
		wantCode(t, "stage of "+p, v.stage(), codes.InvalidArgument)
		_ = os.Remove(v.staging())
	}
	for _, n := range []string{"c", "d", "e", "f"} {
		_ = os.Remove(filepath.Join(s.dir, "stage", n))
	}
}

// toTheLastByteOf is toTheLastByte for a range of a larger file.
func (v *volume) toTheLastByteOf() error {
	f, err := os.OpenFile(v.target(0), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("end"), v.want-3); err != nil {
		return err
	}
	if _, err := f.WriteAt([]byte("x"), v.want); !errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("a write behind the end: %w, want ENOSPC", err)
	}
	return f.Sync()
}

// TestDirtyFilesystemReadOnly: a filesystem that was not unmounted cannot be recovered on a read-only device; that is said, and
// through a writable device a reader gets it recovered.
func TestDirtyFilesystemReadOnly(t *testing.T) {
	s := newSite(t, siteConfig{})
	for _, k := range []kind{ext4, xfs} {
		v := s.volume(k, "live-"+k.name).up()
		v.step("write", v.write(0))
		syncFS(t, v.target(0))
		must(t, writeFile(filepath.Join(v.target(0), "more"), v.pattern(3), 0, os.O_CREATE))
		copied := filepath.Join(s.images, k.name+".img") // as after a power loss
		roottest.Run(t, "cp", "--sparse=always", v.image(), copied)
		v.down()
		m := s.volume(kind{name: "mapped", fs: k.fs, size: k.size, mapped: true}, "dirty-"+k.name)
		m.context = map[string]string{"image": copied, "readOnly": "true"}
		err := m.stage()
		if err == nil {
			t.Errorf("%s with a dirty log is staged on a read-only device", k.name)
		} else if c := status.Code(err); c == codes.Internal || c == codes.Unknown {
			t.Errorf("%s with a dirty log on a read-only device: %s", k.name, explain(err))
		}
		if d := m.device(); d != "" {
			t.Errorf("%s is left bound", d)
		}
		m.step("unstage", m.unstage())
		delete(m.context, "readOnly")
		m.seed = v.seed
		m.step("stage for writing", m.stage())
		m.step("publish read-only", m.publish(0, true))
		m.step("read", m.read(0, 0))
		m.step("unpublish", m.unpublish(0))
		m.step("unstage", m.unstage())
		must(t, os.Remove(copied))
	}
}

// TestSameUUID: a copy of an xfs that is mounted can be mounted beside it, because volumes are mounted with nouuid.
func TestSameUUID(t *testing.T) {
	s := newSite(t, siteConfig{})
	v := s.rest(xfs, "original")
	copied := filepath.Join(s.images, "copy.img")
	roottest.Run(t, "cp", "--sparse=always", v.image(), copied)
	v.step("stage", v.stage())
	m := s.volume(kind{name: "mapped", fs: "xfs", size: v.size, mapped: true}, "copy")
	m.context = map[string]string{"image": copied}
	m.step("stage of a copy of a mounted xfs", m.stage())
	m.step("unstage", m.unstage())
	v.step("unstage", v.unstage())
	m.step("stage when the original is not mounted", m.stage())
	m.step("unstage", m.unstage())
	v.step("delete", v.remove())
}

// TestEphemeralPodIsGone: the volume of a pod that vanished while the driver was down goes at the next start; that of a pod which
// is still there keeps its data over a reboot.
func TestEphemeralPodIsGone(t *testing.T) {
	s := newSite(t, siteConfig{})
	v := s.volume(kind{name: "ephemeral", fs: "ext4", size: 16 * mib, ephemeral: true}, "inline").up()
	v.step("write", v.write(0))
	s.kill()
	must(t, unix.Unmount(v.target(0), 0)) // a reboot
	must(t, os.RemoveAll(s.state))
	s.start()
	if _, err := os.Stat(filepath.Join(s.pool, "volumes", "inline", "disk.img")); err != nil {
		t.Errorf("the image of a pod that is there: %v", err)
	}
	v.step("publish after a reboot", v.publish(0, false))
	v.step("read", v.read(0, 0))
	s.kill()
	must(t, unix.Unmount(v.target(0), 0))
	must(t, os.RemoveAll(s.state))
	must(t, os.RemoveAll(filepath.Join(s.dir, "pods"))) // and the pod was deleted
	s.start()
	s.checkClean()
	must(t, os.Mkdir(filepath.Join(s.dir, "pods"), 0o750))
	v.step("unpublish of a volume that is gone", v.unpublish(0))
}
