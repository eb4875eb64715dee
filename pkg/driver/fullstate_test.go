package driver

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
)

// full keeps the state directory from taking the record of a volume as a new file, as
// one does that is full, until the returned function is called.
func (n *node) full(id string) (empty func()) {
	n.t.Helper()
	path := n.d.state.path(id)
	stuck := filepath.Join(filepath.Dir(path), ".new-"+filepath.Base(path), "x")
	n.must(os.MkdirAll(stuck, 0o700))
	return func() { n.must(os.RemoveAll(filepath.Dir(stuck))) }
}

// What is staged can be taken down in a state directory that takes no new file, and a start
// does not find what was taken down before.
func TestTakenDownInAFullStateDirectory(t *testing.T) {
	for kind, c := range map[string]*csi.VolumeCapability{"block": blockCap(manyWriters), "mount": mountCap("ext4", manyWriters)} {
		t.Run(kind, func(t *testing.T) {
			n := newFake(t)
			v := n.create("pvc-1", 16*mib, c, nil).up("a")
			n.must(v.publish("b", false))
			n.must(v.publish("r", true))
			empty := n.full(v.id)
			if v.publish("c", false) == nil {
				t.Fatal("the directory is not full: the test shows nothing")
			}
			n.must(v.unpublish("r"))
			n.must(v.unpublish("a"))
			empty()
			n.restart()
			if r := n.record(v.id); len(r.Targets) != 1 || r.Targets[v.target("b")].Device != r.Device || !r.ReadDevice.none() {
				t.Errorf("after the restart: %+v", r)
			}
			empty = n.full(v.id)
			code(t, v.unstage(), codes.FailedPrecondition)
			n.must(v.unpublish("b"))
			n.must(v.unstage())
			empty()
			n.must(v.delete())
		})
	}
}

// The same when the record was lost, and is found anew where it cannot be written.
func TestLostStateInAFullStateDirectory(t *testing.T) {
	for kind, c := range map[string]*csi.VolumeCapability{"block": blockCap(manyWriters), "mount": mountCap("ext4", manyWriters)} {
		t.Run(kind, func(t *testing.T) {
			n := newFake(t)
			v := n.create("pvc-1", 16*mib, c, nil).up("a")
			n.loseState()
			empty := n.full(v.id)
			code(t, v.unstage(), codes.FailedPrecondition)
			n.must(v.unpublish("a"))
			n.must(v.unstage())
			empty()
			n.must(v.delete())
		})
	}
}
