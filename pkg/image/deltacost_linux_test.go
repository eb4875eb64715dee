package image

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// readSoFar is how many bytes this process has read with system calls, in its whole
// life.
func readSoFar(t *testing.T) (n int64) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/io")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fscanf(strings.NewReader(string(b)), "rchar: %d", &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// splinter writes every second block of an image, n of them, so that it has as many
// extents.
func splinter(t *testing.T, p *Pool, v Volume, n int) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(p.Path(), volumesDir, v.Name, imageFile), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := []byte(strings.Repeat("x", 4096))
	for i := range int64(n) {
		if _, err := f.WriteAt(b, 2*i*4096); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// deltaCost is what one list of changed blocks costs, in bytes, and how long it is.
type deltaCost struct {
	ranges          int
	allocated, read int64
}

func costOfDelta(t *testing.T, p *Pool, base, target Snapshot) (c deltaCost) {
	t.Helper()
	var before, after runtime.MemStats
	read := readSoFar(t)
	runtime.ReadMemStats(&before)
	start := time.Now()
	if err := p.store.Delta(ctx, base.ID, target.ID, 0, func(Range) error { c.ranges++; return nil }); err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	runtime.ReadMemStats(&after)
	c.allocated = int64(after.TotalAlloc - before.TotalAlloc)
	c.read = readSoFar(t) - read
	t.Logf("%d ranges in %v: %d bytes allocated, %d read", c.ranges, took, c.allocated, c.read)
	return c
}

// A list of changed blocks is made without reading data, in memory that does not grow
// with the number of extents: all that is allocated is counted, not only the peak.
func TestDeltaCostsNoDataAndConstantMemory(t *testing.T) {
	roottest.Require(t)
	for _, fsType := range []string{"xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			_, p := openPool(t, scratch(t, fsType, 4<<30))
			var costs []deltaCost
			for _, pieces := range []int{10_000, 100_000} {
				name := fmt.Sprint("v", pieces)
				v := create(t, p, Spec{Name: name, Size: 1 << 30, Allocation: Thin})
				empty := snap(t, p, "empty-"+name, v.ID)
				splinter(t, p, v, pieces)
				full := snap(t, p, "full-"+name, v.ID)
				c := costOfDelta(t, p, empty, full)
				if c.ranges != pieces {
					t.Errorf("%d ranges of %d extents", c.ranges, pieces)
				}
				costs = append(costs, c)
				same := snap(t, p, "same-"+name, v.ID)
				c = costOfDelta(t, p, full, same) // both have all the extents
				if c.ranges != 0 {
					t.Errorf("%d ranges differ in snapshots of the same data", c.ranges)
				}
				costs = append(costs, c)
			}
			for i, c := range costs {
				// 10,000 blocks would be 40 MiB; what is read is /proc.
				if c.read > 64<<10 {
					t.Errorf("list %d: %d bytes were read", i, c.read)
				}
			}
			for i := range 2 {
				if few, many := costs[i].allocated, costs[i+2].allocated; many > few+few/2 {
					t.Errorf("10,000 extents allocate %d bytes, 100,000 %d", few, many)
				}
			}
		})
	}
}

// What the test above relies on: data that is compared is counted.
func TestDeltaOfCopiesIsSeenToRead(t *testing.T) {
	roottest.Require(t)
	_, p := openPool(t, scratch(t, "ext4", 640*MiB))
	v := create(t, p, Spec{Name: "v", Size: 64 * MiB})
	fill(t, p, v.ID, 0, 8<<20)
	c := costOfDelta(t, p, snap(t, p, "one", v.ID), snap(t, p, "two", v.ID))
	if c.read < 16<<20 || c.ranges != 0 {
		t.Errorf("%d bytes are said to be read of 16 MiB, %d ranges differ", c.read, c.ranges)
	}
}
