package driver

import (
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/mount"
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
	n.fake.failOnce("unmount", mount.ErrBusy)
	n.restart() // somebody uses it, at first
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

// TestBusyWhileGrowingForReaders: what was mounted for writing, in order to grow, cannot be
// unmounted at once. The call that follows does not take it for a staging.
func TestBusyWhileGrowingForReaders(t *testing.T) {
	n := newFake(t)
	v := n.create("v", 320*mib, mountCap("xfs", oneWriter), nil)
	resp, err := n.copy("copy", v.asSource(), 400*mib, mountCap("xfs", reader), nil)
	n.must(err)
	c := volume{n: n, id: resp.GetVolumeId(), cap: mountCap("xfs", reader)}
	n.fake.stuck = true
	code(t, c.stage(), codes.Aborted)
	if r := n.record(c.id); !r.Device.none() {
		t.Errorf("staged: %+v", r)
	}
	code(t, c.stage(), codes.Aborted)
	code(t, c.unstage(), codes.Aborted) // its pod was deleted, and made again
	code(t, c.stage(), codes.Aborted)
	n.fake.stuck = false
	n.must(c.stage())
	if m, ok, err := n.fake.At(c.staging()); err != nil || !ok || !m.ReadOnly {
		t.Errorf("staged as %+v, %t, %v", m, ok, err)
	}
	c.down()
	v.down()
}
