package image

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// What is written to an image after a snapshot, block by block and in no order, lies
// together on XFS all the same: its CoW extent size hint must stay in force.
func TestSmallWritesAfterASnapshotLieTogether(t *testing.T) {
	roottest.Require(t)
	const size, block = 16 << 20, 4096
	_, p := openPool(t, scratch(t, "xfs", 640*MiB))
	v := create(t, p, Spec{Name: "v", Size: size})
	fill(t, p, v.ID, 0, size)
	snap(t, p, "s", v.ID)
	path := filepath.Join(p.Path(), volumesDir, "v", imageFile)
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := unix.Mmap(-1, 0, block, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(b) }()
	for _, i := range rand.New(rand.NewPCG(1, 2)).Perm(size / block) {
		if _, err := f.WriteAt(b, int64(i)*block); err != nil {
			t.Fatal(err)
		}
	}
	n, err := countExtents(f, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d extents of %d blocks", n, size/block)
	if most := int64(size / (32 << 10)); n > most {
		t.Errorf("%d extents, want %d at most", n, most)
	}
}

// Hints that the operator gives the pool's directory are those of new images.
func TestHintsOfThePoolAreInherited(t *testing.T) {
	roottest.Require(t)
	dir := scratch(t, "xfs", 640*MiB)
	roottest.Run(t, "xfs_io", "-c", "extsize 64k", "-c", "cowextsize 256k", dir)
	_, p := openPool(t, dir)
	v := create(t, p, Spec{Name: "v", Size: 64 * MiB, Allocation: Thin})
	fill(t, p, v.ID, 0, 4096)
	snap(t, p, "s", v.ID)
	for _, image := range []string{filepath.Join(volumesDir, "v", imageFile), filepath.Join(snapshotsDir, "s", imageFile)} {
		got := roottest.Run(t, "xfs_io", "-r", "-c", "extsize", "-c", "cowextsize", filepath.Join(dir, image))
		if !strings.Contains(got, "[65536]") || !strings.Contains(got, "[262144]") {
			t.Errorf("%s: %s", image, got)
		}
	}
}
