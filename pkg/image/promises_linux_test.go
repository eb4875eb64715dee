package image

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// Space that was promised to one volume is not given to another, whatever was begun and
// left.

// keepsItsPromise fills the pool with another thick volume, and fails when a block of the
// given volume cannot be written then.
func keepsItsPromise(t *testing.T, p *Pool, id string, bytes int64) {
	t.Helper()
	f, err := p.OpenImage(ctx, id, false)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fileKeepsItsPromise(t, p, f, bytes)
}

func fileKeepsItsPromise(t *testing.T, p *Pool, f *os.File, bytes int64) {
	t.Helper()
	if size := p.Capacity(Thick); size > 0 {
		create(t, p, Spec{Name: "other", Size: size})
	}
	b := make([]byte, MiB)
	for at := int64(0); at < bytes; at += MiB {
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatalf("%d of %d MiB could be written: %v", at/MiB, bytes/MiB, err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// openHolding opens a pool in which nothing that is erased in the background is unlinked,
// until the end of the test.
func openHolding(t *testing.T, dir string) *Pool {
	t.Helper()
	hold := make(chan struct{})
	_, p := openPool(t, dir, withKill(func(point string) {
		if point == "remove: unlinking" {
			<-hold
		}
	}))
	t.Cleanup(func() { close(hold) }) // before the pool is closed, which waits
	return p
}

// TestDiscardedSpaceIsStillPromised: what a thin volume discards is free at once, and
// promised to that volume still.
func TestDiscardedSpaceIsStillPromised(t *testing.T) {
	dir := scratch(t, "ext4", 512*MiB)
	_, p := openPool(t, dir)
	v := create(t, p, Spec{Name: "thin", Size: 128 * MiB, Allocation: Thin})
	fill(t, p, v.ID, 0, 100<<20)
	p.refreshOne("thin")
	before := p.Capacity(Thick)
	f, err := os.OpenFile(filepath.Join(dir, "volumes/thin/disk.img"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// As the loop device discards.
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 100<<20); err != nil {
		t.Fatal(err)
	}
	if after := p.Capacity(Thick); after > before {
		t.Errorf("%d MiB can be had before the discard, %d after", before/MiB, after/MiB)
	}
	keepsItsPromise(t, p, v.ID, 128*MiB)
}

// TestMovedFileThatSharesBlocks: a file that shares its blocks is moved in as a thick
// volume, which has blocks of its own then.
func TestMovedFileThatSharesBlocks(t *testing.T) {
	for _, fsType := range []string{"xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			_, p := openPool(t, scratch(t, fsType, 512*MiB))
			in := filepath.Join(p.Path(), "incoming")
			if err := os.Mkdir(in, 0o700); err != nil {
				t.Fatal(err)
			}
			if fsType == "btrfs" {
				roottest.Run(t, "chattr", "+C", in)
			}
			path, copied := filepath.Join(in, "a.img"), filepath.Join(in, "golden.img")
			roottest.Run(t, "dd", "if=/dev/urandom", "of="+path, "bs=1M", "count=200", "conv=fsync", "status=none")
			roottest.Run(t, "cp", "--reflink=always", path, copied)
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			v, err := p.Import(ctx, Spec{Name: "v", Size: 200 * MiB, Allocation: Thick}, FileContent{File: f, Path: path, Length: 200 * MiB, Method: Move})
			if fsType == "btrfs" { // cannot give a file blocks of its own
				wantError(t, err, ErrContent, "copy it")
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			keepsItsPromise(t, p, v.ID, v.Size)
		})
	}
}

// TestClaimWhileLeftoversAreErased: the pool is opened while what shares blocks with a
// volume, a snapshot whose removal was interrupted, is still being erased.
func TestClaimWhileLeftoversAreErased(t *testing.T) {
	dir := scratch(t, "xfs", 512*MiB)
	s, p, err := tryOpen(dir)
	if err != nil {
		t.Fatal(err)
	}
	v := create(t, p, Spec{Name: "v", Size: 200 * MiB})
	fill(t, p, v.ID, 0, 200<<20)
	snap(t, p, "one", v.ID)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "snapshots/one"), filepath.Join(dir, gonePrefix+"one-AAAAAAAA")); err != nil {
		t.Fatal(err)
	}
	p = openHolding(t, dir)
	keepsItsPromise(t, p, v.ID, v.Size)
}

// TestClaimAfterACancelledClone: a clone that was cut off shares the source's blocks until
// it is erased.
func TestClaimAfterACancelledClone(t *testing.T) {
	for name, end := range map[string]func(cancel func()) error{
		"cancelled":        func(cancel func()) error { cancel(); return nil },
		"not quiet enough": func(func()) error { return errors.New("thawed by somebody else") },
	} {
		for _, alloc := range []Allocation{Thick, Thin} {
			t.Run(name+", "+string(alloc), func(t *testing.T) {
				p := openHolding(t, scratch(t, "xfs", 768*MiB))
				v := create(t, p, Spec{Name: "v", Size: 200 * MiB})
				fill(t, p, v.ID, 0, 200<<20)
				call, cancel := context.WithCancel(ctx)
				defer cancel()
				linked := false
				spec := Spec{Name: "r", Size: 200 * MiB, Allocation: alloc, Source: &Source{Volume: v.ID}}
				_, err := p.CreateFrom(call, spec, func(context.Context) (func() error, error) {
					return func() error { linked = true; return end(cancel) }, nil
				})
				if err == nil || !linked {
					t.Fatalf("the reflink was made: %v, the clone: %v", linked, err)
				}
				keepsItsPromise(t, p, v.ID, v.Size)
			})
		}
	}
}

// TestPromiseToARefusedVolume: the pod of a volume whose record is refused goes on, and
// writes what the volume shares with a snapshot, too.
func TestPromiseToARefusedVolume(t *testing.T) {
	onEach(t, 640*MiB, func(t *testing.T, _, dir string) {
		s, p := openPool(t, dir)
		v := create(t, p, Spec{Name: "v", Size: 128 * MiB})
		fill(t, p, v.ID, 0, 64<<20)
		snap(t, p, "s", v.ID)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if err := replaceIn(filepath.Join(dir, volumesDir, "v", recordFile), `"formatVersion": 1`, `"formatVersion": 9`); err != nil {
			t.Fatal(err)
		}
		_, p = openPool(t, dir)
		p.recount(ctx)
		f, err := os.OpenFile(filepath.Join(dir, volumesDir, "v", imageFile), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		fileKeepsItsPromise(t, p, f, v.Size)
	})
}
