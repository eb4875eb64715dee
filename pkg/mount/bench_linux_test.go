package mount

import (
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// BenchmarkMountUnmount compares this package with the floor, mount(2) and
// umount2(2) and nothing else, and with the programs mount and umount.
func BenchmarkMountUnmount(b *testing.B) {
	roottest.Require(b)
	for _, fsType := range []string{"ext4", "xfs"} {
		device, _ := loopFS(b, fsType)
		target := newDir(b, b.TempDir(), "target")
		m := New()
		run := func(name string, do func() error) {
			b.Run(fsType+"/"+name, func(b *testing.B) {
				for b.Loop() {
					if err := do(); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		run("floor", func() error {
			if err := unix.Mount(device, target, fsType, 0, ""); err != nil {
				return err
			}
			return unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		})
		run("ours", func() error {
			if err := m.Mount(b.Context(), Spec{Source: device, Target: target, FSType: fsType}); err != nil {
				return err
			}
			return m.Unmount(b.Context(), target)
		})
		run("programs", func() error {
			if err := exec.Command("mount", "-t", fsType, device, target).Run(); err != nil {
				return err
			}
			return exec.Command("umount", target).Run()
		})
	}
}

// BenchmarkBindRemove is what a publish and its end cost: the floor needs two
// calls for a read-only bind, and mkdir and rmdir.
func BenchmarkBindRemove(b *testing.B) {
	roottest.Require(b)
	dir := b.TempDir()
	source, target := newDir(b, dir, "source"), dir+"/target"
	m := New()
	b.Run("floor", func(b *testing.B) {
		for b.Loop() {
			for _, err := range []error{
				unix.Mkdir(target, 0o750), unix.Mount(source, target, "", unix.MS_BIND, ""),
				unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""), unix.Unmount(target, unix.UMOUNT_NOFOLLOW), unix.Rmdir(target),
			} {
				if err != nil {
					b.Fatal(err)
				}
			}
		}
	})
	b.Run("ours", func(b *testing.B) {
		for b.Loop() {
			if err := m.Bind(b.Context(), BindSpec{Source: source, Target: target, ReadOnly: true}); err != nil {
				b.Fatal(err)
			}
			if err := m.Remove(b.Context(), target); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkAt shows what statmount saves: with 1000 other mounts and without.
func BenchmarkAt(b *testing.B) {
	roottest.Require(b)
	dir := b.TempDir()
	source, target := newDir(b, dir, "source"), dir+"/target"
	m, slow := New(), New(withoutStatmount())
	mustBind(b, m, BindSpec{Source: source, Target: target})
	measure := func(name string, m *Mounter, path string) {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if _, _, err := m.At(path); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	measure("statmount/alone", m, target)
	measure("mountinfo/alone", slow, target)
	for i := range 1000 {
		mustBind(b, m, BindSpec{Source: source, Target: dir + "/" + name(i)})
	}
	measure("statmount/1000 mounts", m, target)
	measure("mountinfo/1000 mounts", slow, target)
	measure("nothing there/1000 mounts", m, source)
}
