package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patch applies a list of ranges of one snapshot onto a copy of another, and compares
// the result with the one.
func patch(t *testing.T, p *Pool, base, target Snapshot, from int64) (ranges []Range) {
	t.Helper()
	last := from - 1
	err := p.store.Delta(ctx, base.ID, target.ID, from, func(r Range) error {
		if r.Start <= last || r.End <= r.Start || r.End > target.Volume.Size {
			t.Errorf("range %v after %d", r, last)
		}
		last = r.End
		ranges = append(ranges, r)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	old, err := p.OpenSnapshot(ctx, base.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	got := make([]byte, target.Volume.Size)
	if _, err := old.ReadAt(got[:base.Volume.Size], 0); err != nil {
		t.Fatal(err)
	}
	want := snapshotContent(t, p, target.ID, 0, int(target.Volume.Size))
	for _, r := range ranges {
		copy(got[r.Start:r.End], want[r.Start:r.End])
	}
	if !bytes.Equal(got[from:], want[from:]) {
		t.Fatalf("the delta from %s to %s is not all: %v", base.Name, target.Name, ranges)
	}
	return ranges
}

// TestDeltaIsComplete writes at random, with holes and growth, and applies each delta.
func TestDeltaIsComplete(t *testing.T) {
	onEach(t, 768*MiB, func(t *testing.T, fsType, dir string) {
		seed := uint64(time.Now().UnixNano())
		t.Log("seed", seed)
		random := rand.New(rand.NewPCG(1, seed))
		s, p := openPool(t, dir)
		v := create(t, p, Spec{Name: "v", Size: 4 * MiB, Allocation: Thin})
		rounds := 40
		if os.Getenv("CSI_LOOP_LONG") == "1" {
			rounds = 1500
		}
		if fsType == "ext4" {
			rounds /= 4
		}
		var snapshots []Snapshot
		for i := range rounds {
			for range 1 + random.IntN(6) {
				scribble(t, p, v, random)
			}
			if random.IntN(20) == 0 && v.Size < 12*MiB {
				var err error
				if v, err = p.Grow(ctx, v.ID, v.Size+MiB); err != nil {
					t.Fatal(err)
				}
			}
			one, err := p.Snapshot(ctx, SnapshotSpec{Name: fmt.Sprint("s", i), Source: v.ID, Independent: random.IntN(10) == 0}, held)
			if err != nil {
				t.Fatal(err)
			}
			if snapshots = append(snapshots, one); len(snapshots) > 8 {
				if err := p.RemoveSnapshot(ctx, snapshots[0].ID); err != nil {
					t.Fatal(err)
				}
				snapshots = snapshots[1:]
			}
			base := snapshots[random.IntN(len(snapshots))]
			patch(t, p, base, one, 0)
			patch(t, p, base, one, random.Int64N(one.Volume.Size))
			allocatedIsAll(t, p, one)
		}
		wantAccount(t, s, p)
	})
}

// scribble changes an image as a tenant does: writes and discards of any place.
func scribble(t *testing.T, p *Pool, v Volume, random *rand.Rand) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(p.Path(), volumesDir, v.Name, imageFile), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := random.Int64N(v.Size/4096) * 4096
	n := min(1+random.Int64N(20)*4096, v.Size-at)
	switch random.IntN(4) {
	case 0:
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, n)
	case 1:
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, at, n)
		if errors.Is(err, unix.EOPNOTSUPP) {
			err = nil
		}
	default:
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		_, err = f.WriteAt(b, at)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func allocatedIsAll(t *testing.T, p *Pool, s Snapshot) {
	t.Helper()
	want := snapshotContent(t, p, s.ID, 0, int(s.Volume.Size))
	last := int64(-1)
	err := p.store.Allocated(ctx, s.ID, 0, func(r Range) error {
		if r.Start <= last || r.End <= r.Start {
			t.Errorf("range %v after %d", r, last)
		}
		clear(want[r.Start:r.End])
		last = r.End
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, make([]byte, len(want))) {
		t.Fatalf("data of %s is outside of what is allocated", s.Name)
	}
}

// What did not change is not reported, and nothing of it is read.
func TestDeltaIsExact(t *testing.T) {
	onEach(t, 640*MiB, func(t *testing.T, _, dir string) {
		_, p := openPool(t, dir)
		v := create(t, p, Spec{Name: "v", Size: 64 * MiB, Allocation: Thin})
		fill(t, p, v.ID, 0, 40<<20)
		one := snap(t, p, "one", v.ID)
		fill(t, p, v.ID, 8<<20, 4096)
		fill(t, p, v.ID, 50<<20, 100<<10)
		two := snap(t, p, "two", v.ID)
		if got := patch(t, p, one, one, 0); len(got) != 0 {
			t.Errorf("a snapshot differs from itself: %v", got)
		}
		var sum int64
		for _, r := range patch(t, p, one, two, 0) {
			sum += r.End - r.Start
		}
		if sum > 512<<10 {
			t.Errorf("%d bytes are reported for 104 KiB that changed", sum)
		}
		w := create(t, p, Spec{Name: "w", Size: MiB})
		other := snap(t, p, "other", w.ID)
		wantError(t, p.store.Delta(ctx, one.ID, other.ID, 0, nil), ErrSource)
		wantError(t, p.store.Delta(ctx, one.ID, VolumeID(p.ID(), "none"), 0, nil), ErrNotFound)
		wantError(t, p.store.Allocated(ctx, one.ID, 0, func(Range) error { return io.EOF }), io.EOF)
	})
}
