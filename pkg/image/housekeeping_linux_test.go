package image

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// TestVolumeThatCannotBeTidied: a sound volume is served, though what an interrupted call
// left of it can be neither removed nor finished, as on a full disk; the next start does it.
func TestVolumeThatCannotBeTidied(t *testing.T) {
	roottest.Require(t)
	for name, c := range map[string]struct {
		left  func(volume string) error
		stuck string // what cannot be changed
		size  int64
	}{
		"a new record": {func(v string) error {
			return os.WriteFile(filepath.Join(v, recordNew), nil, 0o600)
		}, "", size},
		"blocks past the end": {func(v string) error {
			f, err := os.OpenFile(filepath.Join(v, imageFile), os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, 2*size)
		}, imageFile, size},
		"a larger image": {func(v string) error {
			return os.Truncate(filepath.Join(v, imageFile), 2*size)
		}, "", 2 * size},
	} {
		t.Run(name, func(t *testing.T) {
			dir := scratch(t, "ext4", 64*MiB)
			s, p := openPool(t, dir)
			v := create(t, p, Spec{Name: "v", Size: size, Allocation: Thin})
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			volume := filepath.Join(dir, volumesDir, "v")
			if err := c.left(volume); err != nil {
				t.Fatal(err)
			}
			stuck := filepath.Join(volume, c.stuck)
			roottest.Run(t, "chattr", "+i", stuck)
			t.Cleanup(func() { roottest.Run(t, "chattr", "-i", stuck) })
			s, p = openPool(t, dir)
			got, err := s.Get(v.ID)
			if err != nil || got.Size != c.size {
				t.Errorf("%+v, %v", got, err)
			}
			f, err := p.OpenImage(ctx, v.ID, true)
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			roottest.Run(t, "chattr", "-i", stuck)
			_, p = openPool(t, dir)
			r, allocated, err := p.loadOne("v")
			if err != nil || r.Size != c.size || allocated > size {
				t.Errorf("%+v with %d bytes of blocks, %v", r, allocated, err)
			}
			if _, err := os.Lstat(filepath.Join(volume, recordNew)); !os.IsNotExist(err) {
				t.Errorf("the new record is left: %v", err)
			}
		})
	}
}
