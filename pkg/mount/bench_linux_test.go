package mount

import (
	"errors"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// BenchmarkMountUnmount compares this package with the floor, mount(2) and
// umount2(2) and nothing else, and with the programs mount and umount.
func BenchmarkMountUnmount(b *testing.B) {
	roottest.Require(b)
	for _, fsType := range []string{"ext4", "xfs"} {
		b.Run(fsType, func(b *testing.B) {
			if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
				b.Setenv("TMPDIR", "/dev/shm") // keep the disk out of it
			}
			device, _ := loopFS(b, fsType)
			target := newDir(b, b.TempDir(), "target")
			m := New()
			compare(b, map[string]func() error{
				"floor": func() error {
					return errors.Join(unix.Mount(device, target, fsType, 0, ""), unix.Unmount(target, unix.UMOUNT_NOFOLLOW))
				},
				"ours": func() error {
					return errors.Join(m.Mount(b.Context(), Spec{Source: device, Target: target, FSType: fsType}), m.Unmount(b.Context(), target))
				},
				"programs": func() error {
					return errors.Join(exec.Command("mount", "-t", fsType, device, target).Run(), exec.Command("umount", target).Run())
				},
			})
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
	compare(b, map[string]func() error{
		"floor": func() error {
			return errors.Join(unix.Mkdir(target, 0o750), unix.Mount(source, target, "", unix.MS_BIND, ""),
				unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""), unix.Unmount(target, unix.UMOUNT_NOFOLLOW), unix.Rmdir(target))
		},
		"ours": func() error {
			return errors.Join(m.Bind(b.Context(), BindSpec{Source: source, Target: target, ReadOnly: true}), m.Remove(b.Context(), target))
		},
	})
}

// compare runs the ways in turn, so that what else the machine does hits all of
// them alike, and reports the median of each in microseconds.
func compare(b *testing.B, ways map[string]func() error) {
	b.Helper()
	took := make(map[string][]time.Duration)
	for b.Loop() {
		for name, do := range ways {
			start := time.Now()
			if err := do(); err != nil {
				b.Fatal(name, err)
			}
			took[name] = append(took[name], time.Since(start))
		}
	}
	median := func(name string) float64 {
		slices.Sort(took[name])
		return float64(took[name][len(took[name])/2].Nanoseconds()) / 1e3
	}
	for name := range ways {
		b.ReportMetric(median(name), name+"-p50-us")
		b.ReportMetric(median(name)/median("floor"), name+"/floor")
	}
	b.ReportMetric(0, "ns/op") // of all of them together: means nothing
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
