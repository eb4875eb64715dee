package driver

import (
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// TestKilledWhileGrowingForReaders: a copy that is larger than its source is mounted for
// writing once, to grow, also when it is staged for readers. A kill in that moment leaves
// that mount and the record that was written before; the next stagings are for readers.
func TestKilledWhileGrowingForReaders(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil)
	n.must(v.stage()) // for writing
	v.cap = mountCap("ext4", csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY)
	a, err := parseAccess(v.cap)
	n.must(err)
	src, err := n.d.source(v.id, nil)
	n.must(err)
	have, _ := n.d.state.get(v.id)
	left := newRecord(src, a)
	left.StagingPath, left.Image = have.StagingPath, have.Image
	n.must(n.d.state.put(left))
	n.restart()
	n.must(v.stage())
	if r, _ := n.d.state.get(v.id); !r.ReadOnly {
		t.Errorf("it is staged for writing: %+v", r)
	}
	n.must(v.unstage())
	n.must(v.delete())
}

// TestReadAheadIsRememberedWhenStagedAnew: the staging path is unmounted by hand while a pod
// keeps the device, and staged again: the number still gets back what it read ahead.
func TestReadAheadIsRememberedWhenStagedAnew(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil).up("a")
	number := int(v.device().Minor)
	before := n.fake.readsAhead(number)
	n.must(v.modify(map[string]string{"readAhead": "1Mi"}))
	n.must(n.fake.Unmount(t.Context(), v.staging()))
	n.must(v.stage())
	n.must(v.unpublish("a"))
	n.must(v.unstage())
	if got := n.fake.readsAhead(number); got != before {
		t.Errorf("the number reads %d bytes ahead, %d before", got, before)
	}
	n.must(v.delete())
}
