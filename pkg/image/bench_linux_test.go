package image

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// BenchmarkCreate is Create beside its floor: the same system calls and the same
// mkfs with nothing around them. They alternate, so that noise meets both; medians
// in microseconds.
func BenchmarkCreate(b *testing.B) {
	for _, poolType := range poolTypes {
		dir := scratch(b, poolType, 2<<30)
		s, p, err := tryOpen(dir)
		if err != nil {
			b.Fatal(err)
		}
		for _, fsType := range []string{"", "ext4", "xfs"} {
			spec, err := Spec{Name: "v", Size: 320 * MiB, Filesystem: fsType}.normalise()
			if err != nil {
				b.Fatal(err)
			}
			b.Run(fmt.Sprintf("%s-on-%s", fsType, poolType), func(b *testing.B) { benchmarkCreate(b, p, spec) })
		}
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

func benchmarkCreate(b *testing.B, p *Pool, spec Spec) {
	var ours, floors []time.Duration
	for b.Loop() {
		start := time.Now()
		v := create(b, p, spec)
		ours = append(ours, time.Since(start))
		if err := p.Remove(ctx, v.ID); err != nil {
			b.Fatal(err)
		}
		start = time.Now()
		floor(b, p, spec)
		floors = append(floors, time.Since(start))
		if err := os.RemoveAll(filepath.Join(p.Path(), volumesDir, "v")); err != nil {
			b.Fatal(err)
		}
	}
	slices.Sort(ours)
	slices.Sort(floors)
	median, least := ours[len(ours)/2], floors[len(floors)/2]
	b.ReportMetric(float64(median.Microseconds()), "create-µs")
	b.ReportMetric(float64(least.Microseconds()), "floor-µs")
	b.ReportMetric(float64(median)/float64(least), "ratio")
}

// floor is what cannot be left out (fact 74).
func floor(b *testing.B, p *Pool, s Spec) {
	must := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	must(mkdirAt(p.root, "floor"))
	d, err := openDirAt(p.root, "floor")
	must(err)
	defer d.Close()
	if p.noCow {
		must(setNoCow(d))
	}
	f, err := createAt(d, imageFile)
	must(err)
	defer f.Close()
	must(allocate(f, 0, s.Size, false))
	if s.Filesystem != "" {
		out, err := command(ctx, d, "/usr/sbin/mkfs."+s.Filesystem, append(mkfsArguments(s, ""), imageFile))
		if err != nil {
			b.Fatal(out)
		}
	}
	must(f.Sync())
	must(writeSynced(d, recordFile, []byte("{}")))
	must(renameNew(p.root, "floor", p.volumes, "v"))
	must(p.volumes.Sync())
}

// BenchmarkThousand is the price of a pool with 1000 volumes.
func BenchmarkThousand(b *testing.B) {
	roottest.Require(b)
	dir := poolDir(b)
	makeThousand(b, dir)
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			s, _, err := tryOpen(dir)
			if err != nil {
				b.Fatal(err)
			}
			if err := s.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	s, p, err := tryOpen(dir)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.Run("memory", func(b *testing.B) {
		for b.Loop() {
			_ = p.Capacity(Thin)
		}
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/1000, "B/volume")
	})
	b.Run("capacity", func(b *testing.B) {
		for b.Loop() {
			_ = p.Capacity(Thick)
		}
	})
	b.Run("create", func(b *testing.B) {
		for b.Loop() {
			v := create(b, p, Spec{Name: "one-more", Size: MiB, Allocation: Thick})
			b.StopTimer()
			if err := p.Remove(ctx, v.ID); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	})
	b.Run("list", func(b *testing.B) {
		for b.Loop() {
			_ = s.List()
		}
	})
	b.Run("refresh", func(b *testing.B) {
		for b.Loop() {
			p.refresh(ctx)
		}
	})
}

func makeThousand(b *testing.B, dir string) {
	b.Helper()
	s, p, err := tryOpen(dir)
	if err != nil {
		b.Fatal(err)
	}
	for i := range 1000 {
		create(b, p, Spec{Name: fmt.Sprintf("pvc-00000000-0000-0000-0000-%012d", i), Size: 8 * MiB, Allocation: Thin})
	}
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
}
