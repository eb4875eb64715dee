package image

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// TestCopyIsChargedOnce: while the data of a thick copy is copied, its blocks are there, and
// nothing is reserved for them beside.
func TestCopyIsChargedOnce(t *testing.T) {
	const size = 128 * MiB
	onEach(t, 1024*MiB, func(t *testing.T, fsType, dir string) {
		s, p := openPool(t, dir)
		during, looked := int64(0), 0
		look := func() {
			if n := p.Usage().Pending; n > 0 {
				t.Errorf("%d bytes are reserved for what has its blocks", n)
			}
			during = p.Capacity(Thick)
			looked++
		}
		// Less would be given away twice, more be charged twice.
		want := func(what string) {
			t.Helper()
			if after := p.Capacity(Thick); looked == 0 || max(during-after, after-during) > 16*MiB {
				t.Errorf("%s: %d bytes could be had while it was copied, %d after (looked %d times)", what, during, after, looked)
			}
		}

		path := filepath.Join(t.TempDir(), "a.img")
		roottest.Run(t, "dd", "if=/dev/urandom", "of="+path, "bs=1M", "count=128", "status=none")
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		c := FileContent{File: f, Path: path, Length: size, Method: Copy, Progress: func(int64, int64) {
			if looked == 0 {
				look()
			}
		}}
		v, err := p.Import(ctx, Spec{Name: "v", Size: size}, c)
		if err != nil {
			t.Fatal(err)
		}
		want("an import")

		if fsType == "xfs" { // which copies by reflink
			return
		}
		snap(t, p, "s", v.ID)
		looked = 0
		_, err = p.CreateFrom(ctx, Spec{Name: "r", Size: size, Source: &Source{Snapshot: VolumeID(p.ID(), "s")}},
			func(context.Context) (func() error, error) {
				return func() error { look(); return nil }, nil // when the data is there
			})
		if err != nil {
			t.Fatal(err)
		}
		want("a copy")
		wantAccount(t, s, p)
	})
}
