package image

import (
	"fmt"
	"os"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// TestWritesFarFromEachOther: each write to a thick volume that touches no other one makes
// the filesystem's record of its extents longer, on a pool that is given away to the last byte.
// XFS keeps 8192 blocks for that itself, here small ones. They suffice for the short form, and
// for 2.5 GiB they do not: so much takes a minute.
func TestWritesFarFromEachOther(t *testing.T) {
	size := 320 * MiB
	if os.Getenv("CSI_LOOP_LONG") == "1" {
		size = 2560 * MiB
	}
	_, p := openPool(t, roottest.Pool(t, "xfs", size, "-b", "size=1024"))
	v := create(t, p, Spec{Name: "v", Size: p.Capacity(Thick)})
	for p.Capacity(Thick) > 0 {
		create(t, p, Spec{Name: fmt.Sprint("rest", p.Capacity(Thick)), Size: p.Capacity(Thick)})
	}
	f, err := os.OpenFile(p.Path()+"/"+volumesDir+"/"+v.Name+"/"+imageFile, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const piece = 4 << 10
	for at := int64(0); at < v.Size; at += 2 * piece {
		if _, err := f.WriteAt(make([]byte, piece), at); err != nil {
			t.Fatalf("write %d: %v", at/(2*piece), err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatalf("%d writes to a thick volume of %d MiB: %v", v.Size/(2*piece), v.Size/MiB, err)
	}
}
