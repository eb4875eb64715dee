package image

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// TestCopiesAreMountedBesideTheirSource makes copies of each filesystem on each pool:
// of a snapshot and of the volume in use, thick and thin, larger than the source.
func TestCopiesAreMountedBesideTheirSource(t *testing.T) {
	onEach(t, 4096*MiB, func(t *testing.T, _, dir string) {
		for filesystem, size := range map[string]int64{"ext4": 64 * MiB, "ext2": 64 * MiB, "xfs": 300 * MiB, "btrfs": 256 * MiB} {
			t.Run("with "+filesystem, func(t *testing.T) {
				s, p := openPool(t, dir)
				v := create(t, p, Spec{Name: "v-" + filesystem, Size: size, Filesystem: filesystem})
				mounted(t, p, v, func(at string) {
					write := func(name string) {
						if err := os.WriteFile(filepath.Join(at, name), []byte(name), 0o600); err != nil {
							t.Fatal(err)
						}
					}
					write("before")
					one, err := p.Snapshot(ctx, SnapshotSpec{Name: "s-" + filesystem, Source: v.ID}, frozenAt(t, at))
					if err != nil {
						t.Fatal(err)
					}
					write("after")
					for _, c := range []struct {
						source *Source
						spec   Spec
						after  bool
					}{
						{&Source{Snapshot: one.ID}, Spec{Allocation: Thick, Size: size}, false},
						{&Source{Snapshot: one.ID}, Spec{Allocation: Thin, Size: size}, false},
						{&Source{Snapshot: one.ID}, Spec{Allocation: Thick, Size: size + 64*MiB}, false},
						{&Source{Volume: v.ID}, Spec{Allocation: Thick, Size: size}, true},
						{&Source{Volume: v.ID}, Spec{Allocation: Thin, Size: size + 64*MiB}, true},
					} {
						c.spec.Name, c.spec.Filesystem, c.spec.Source = "copy-"+filesystem, filesystem, c.source
						r, err := p.CreateFrom(ctx, c.spec, frozenAt(t, at))
						if err != nil {
							t.Fatalf("%v %+v: %v", c.source, c.spec, err)
						}
						if r.Allocation == Thick {
							wantWhole(t, p, r.ID)
							wantAlone(t, p, r)
						}
						mounted(t, p, r, func(at string) { wantCopy(t, at, c.after, r) })
						wantAccount(t, s, p)
						if err := p.Remove(ctx, r.ID); err != nil {
							t.Fatal(err)
						}
					}
				})
				if err := p.RemoveSnapshot(ctx, VolumeID(p.ID(), "s-"+filesystem)); err != nil {
					t.Fatal(err)
				}
				if err := p.Remove(ctx, v.ID); err != nil {
					t.Fatal(err)
				}
				wantClean(t, dir)
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
			})
		}
	})
}

// frozenAt is a Quiesce by the fsfreeze program.
func frozenAt(t *testing.T, at string) Quiesce {
	return func(context.Context) (func() error, error) {
		roottest.Run(t, "fsfreeze", "-f", at)
		return func() error { roottest.Run(t, "fsfreeze", "-u", at); return nil }, nil
	}
}

func wantCopy(t *testing.T, at string, after bool, r Volume) {
	t.Helper()
	if b, err := os.ReadFile(filepath.Join(at, "before")); err != nil || string(b) != "before" {
		t.Errorf("%v: %q, %v", r.Source, b, err)
	}
	if _, err := os.Stat(filepath.Join(at, "after")); (err == nil) != after {
		t.Errorf("%v: written later: %v", r.Source, err)
	}
	if err := os.WriteFile(filepath.Join(at, "own"), []byte("x"), 0o600); err != nil {
		t.Error(err)
	}
	if strings.HasPrefix(r.Filesystem, "ext") { // the others grow when they are mounted by the driver
		var st unix.Statfs_t
		if err := unix.Statfs(at, &st); err != nil || int64(st.Blocks)*st.Bsize < r.Size*85/100 {
			t.Errorf("the filesystem of a copy of %d bytes has %d (%v)", r.Size, int64(st.Blocks)*st.Bsize, err)
		}
	}
}

// wantAlone: a thick copy shares nothing.
func wantAlone(t *testing.T, p *Pool, v Volume) {
	t.Helper()
	if n := sharedBytes(t, p, DirName(v.Name), v.Size); n != 0 {
		t.Errorf("%s shares %d bytes", v.Name, n)
	}
}

// A clone of a volume in use needs no more than its own size.
func TestCloneNeedsItsSizeOnly(t *testing.T) {
	onEach(t, 512*MiB, func(t *testing.T, fsType, dir string) {
		s, p := openPool(t, dir)
		size := p.Capacity(Thick) / 2 / MiB * MiB
		if fsType == "btrfs" {
			size = size / 2 / MiB * MiB // the volume may write over the reflink in between
		}
		v := create(t, p, Spec{Name: "v", Size: size})
		data := fill(t, p, v.ID, 0, int(size))
		r, err := p.CreateFrom(ctx, Spec{Name: "r", Size: size, Source: &Source{Volume: v.ID}}, held)
		if err != nil {
			t.Fatal(err)
		}
		if got := volumeContent(t, p, r.ID, 0, len(data)); !bytes.Equal(got, data) {
			t.Error("the content differs")
		}
		wantAlone(t, p, r)
		if fsType != "btrfs" {
			_, err = p.CreateFrom(ctx, Spec{Name: "one too many", Size: size, Source: &Source{Volume: v.ID}}, held)
			wantError(t, err, ErrNoSpace)
		}
		overwriteRandomly(t, p, v)
		wantAccount(t, s, p)
	})
}

// mountOptions are those that the driver mounts a volume with.
func mountOptions(v Volume) []string {
	if v.Filesystem == "xfs" {
		return []string{"-o", "nouuid"}
	}
	return nil
}

// late is a context that ends when its function says so.
type late struct {
	context.Context
	err func() error
}

func (l late) Err() error { return l.err() }

// TestFailedCloneLeavesItsSourcesClaim: the source of a clone that fails was let go of, so
// it may have been grown and a snapshot made of it, which the failed call knows nothing of.
func TestFailedCloneLeavesItsSourcesClaim(t *testing.T) {
	roottest.Require(t)
	const size int64 = 64 * MiB
	_, p := openPool(t, scratch(t, "xfs", 1024*MiB))
	v := create(t, p, Spec{Name: "v", Size: size})
	fill(t, p, v.ID, 0, int(size))
	linked, over := false, false
	unlock := func() {}
	end := late{ctx, func() error {
		switch {
		case over:
			return context.Canceled
		case !linked:
			return nil
		}
		over = true
		if _, err := p.Grow(ctx, v.ID, 2*size); err != nil {
			t.Fatal(err)
		}
		fill(t, p, v.ID, size, int(size))
		snap(t, p, "s", v.ID)
		var free bool
		if unlock, free = p.locks.tryLock("v"); !free { // so that nobody counts
			t.Fatal("busy")
		}
		return context.Canceled
	}}
	quiesce := func(context.Context) (func() error, error) {
		return func() error { linked = true; return nil }, nil
	}
	_, err := p.CreateFrom(end, Spec{Name: "r", Size: size, Source: &Source{Volume: v.ID}}, quiesce)
	wantError(t, err, context.Canceled)
	defer unlock()
	if got := p.account.sharedOf("v"); got != 2*size {
		t.Errorf("its claim is %d, it shares %d", got, 2*size)
	}
}
