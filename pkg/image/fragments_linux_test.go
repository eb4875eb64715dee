package image

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// Each image's extents are counted, of snapshots too, not again before it is due, and
// what is gone is forgotten.
func TestFragmentsAreCounted(t *testing.T) {
	onEach(t, 640*MiB, func(t *testing.T, _, dir string) {
		now := time.Now()
		_, p := openPool(t, dir, WithRefresh(0), func(s *Store) { s.now = func() time.Time { return now } })
		v := create(t, p, Spec{Name: "v", Size: 64 * MiB, Allocation: Thin})
		const pieces = 20
		write := func(from int64) {
			t.Helper()
			f, err := os.OpenFile(filepath.Join(dir, volumesDir, "v", imageFile), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			for i := range int64(pieces) { // with holes in between
				if _, err := f.WriteAt(make([]byte, 4096), from+i*512<<10); err != nil {
					t.Fatal(err)
				}
			}
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		}
		want := func(want ...Fragments) {
			t.Helper()
			p.countFragments(t.Context())
			if diff := cmp.Diff(want, p.Fragments()); diff != "" {
				t.Error(diff)
			}
		}
		write(0)
		s := snap(t, p, "s", v.ID)
		copied := Fragments{ID: s.ID, Snapshot: true, Extents: pieces}
		want(copied, Fragments{ID: v.ID, Extents: pieces})
		write(32 << 20)
		want(copied, Fragments{ID: v.ID, Extents: pieces})
		now = now.Add(fragmentsPause)
		want(Fragments{ID: v.ID, Extents: 2 * pieces}, copied)
		if err := p.RemoveSnapshot(t.Context(), s.ID); err != nil {
			t.Fatal(err)
		}
		want(Fragments{ID: v.ID, Extents: 2 * pieces})
	})
}

// What is copied because it cannot be shared is counted, and nothing is left running.
func TestCopiesAreCounted(t *testing.T) {
	onEach(t, 640*MiB, func(t *testing.T, fsType, dir string) {
		_, p := openPool(t, dir)
		v := create(t, p, Spec{Name: "v", Size: 64 * MiB})
		fill(t, p, v.ID, 0, 8<<20)
		s := snap(t, p, "s", v.ID)
		want := Copies{}
		if fsType == "ext4" {
			want.Copied = 8 * MiB
		}
		if got := p.Copies(); got != want {
			t.Errorf("after a snapshot: %+v, want %+v", got, want)
		}
		if _, err := p.CreateFrom(t.Context(), Spec{Name: "r", Size: 64 * MiB, Allocation: Thick, BlockSize: 4096, Source: &Source{Snapshot: s.ID}}, nil); err != nil {
			t.Fatal(err)
		}
		want.Copied += 8 * MiB
		if fsType != "ext4" {
			want.Copied += 56 * MiB // XFS unshares holes too, btrfs calls preallocated blocks data
		}
		if got := p.Copies(); got != want {
			t.Errorf("after a restore: %+v, want %+v", got, want)
		}
	})
}

func TestCopyThatGoesOnIsShown(t *testing.T) {
	p := &Pool{store: &Store{}}
	var said [2]int64
	c := p.copyOf(t.Context(), "v", 100)
	c.say = func(done, total int64) { said = [2]int64{done, total} }
	c.add(30)
	if got, want := p.CopiesNow(), (CopyProgress{Name: "v", Done: 30, Total: 100}); len(got) != 1 || got[0] != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got, want := p.Copies(), (Copies{Running: 1, Remaining: 70, Copied: 30}); got != want || said[1] != 0 {
		t.Errorf("%+v, want %+v; said %v", got, want, said)
	}
	c.said = c.said.Add(-sayEvery)
	c.add(10)
	if said != [2]int64{40, 100} {
		t.Errorf("said %v", said)
	}
	c.end()
	if got, want := p.Copies(), (Copies{Copied: 40}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}
