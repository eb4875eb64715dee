package image

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// TestVolumeThatWasCopiedIn: a thick volume that was unpacked into a btrfs pool by hand
// keeps its promise, and says so, when its image is not NOCOW; what is unpacked into a pool
// that csi-loop opened is.
func TestVolumeThatWasCopiedIn(t *testing.T) {
	dir := scratch(t, "btrfs", 768*MiB)
	volumes, aside := filepath.Join(dir, volumesDir), filepath.Join(dir, "aside")
	s, p, err := tryOpen(dir)
	if err != nil {
		t.Fatal(err)
	}
	v := create(t, p, Spec{Name: "v", Size: 128 * MiB})
	fill(t, p, v.ID, 0, 128<<20)
	unpack := func() {
		t.Helper()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		roottest.Run(t, "rm", "-rf", filepath.Join(volumes, "v"))
		roottest.Run(t, "sh", "-c", "tar -C "+aside+" -cf - v | tar -C "+volumes+" -xf -")
	}
	if err := os.Mkdir(aside, 0o700); err != nil {
		t.Fatal(err)
	}
	roottest.Run(t, "cp", "-r", "--reflink=never", filepath.Join(volumes, "v"), aside)
	unpack()
	if s, p, err = tryOpen(dir); err != nil {
		t.Fatal(err)
	}
	wantWhole(t, p, v.ID) // and NOCOW
	if all := p.VolumeHealth(ctx, v.ID); len(all) > 0 {
		t.Errorf("unpacked into volumes/ as it is now: %v", all)
	}

	roottest.Run(t, "chattr", "-C", volumes) // as an earlier version left it
	unpack()
	_, p = openPool(t, dir)
	if all := p.VolumeHealth(ctx, v.ID); len(all) != 1 || all[0].Reason != "CopyOnWrite" {
		t.Errorf("an image that is not NOCOW: %v", all)
	}
	wantSharing(t, p, v, v.Size, v.Size)
	clone := create(t, p, Spec{Name: "thin", Size: v.Size, Allocation: Thin, Source: &Source{Volume: v.ID}})
	if err := p.Remove(ctx, clone.ID); err != nil {
		t.Fatal(err)
	}
	p.recountOne("v") // it shares with nobody any more
	if err := os.RemoveAll(aside); err != nil {
		t.Fatal(err)
	}
	keepsItsPromise(t, p, v.ID, v.Size)
}
