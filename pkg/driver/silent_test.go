package driver

import (
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc/codes"
)

// silence has a device not say what it shows, and sysfs that this is path; "" ends that.
func (k *fakeKernel) silence(number int, path string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.silent = nil
	if path != "" {
		k.silent = map[int]string{number: path}
	}
}

// A foreign loop device over a file that hangs does not keep the driver from starting, nor
// volumes from being used, also where all devices are looked at.
func TestForeignDeviceThatDoesNotAnswer(t *testing.T) {
	n := newFake(t)
	foreign := n.create("foreign", 16*mib, blockCap(manyWriters), nil).up("f")
	a := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil).up("a")
	b := n.create("pvc-2", 16*mib, blockCap(manyWriters), nil).up("b")
	r, _ := n.d.state.get(foreign.id)
	before, err := n.d.table.Status(t.Context(), r.Device.ref())
	n.must(err)
	n.fake.silence(r.Device.Number, "/mnt/nfs/foreign.img")
	n.loseState()
	a.down("a")
	b.down("b")
	n.fake.silence(0, "")
	if after, err := n.d.table.Status(t.Context(), r.Device.ref()); err != nil || after != before {
		t.Errorf("%+v, %v", after, err)
	}
	foreign.down("f")
}

// A device of a volume that does not answer is not taken for absent, recorded or not: the
// volume's calls are UNAVAILABLE, and those of others, whose files have the same name, are
// not, as long as it is known whose it is.
func TestDeviceOfAVolumeThatDoesNotAnswer(t *testing.T) {
	for _, lost := range []bool{false, true} {
		n := newFake(t)
		hung := n.create("pvc-1", 16*mib, blockCap(oneWriter), nil).up("a")
		other := n.create("pvc-2", 16*mib, mountCap("ext4", manyWriters), nil).up("o")
		r, _ := n.d.state.get(hung.id)
		n.fake.silence(r.Device.Number, "/pool/volumes/v/disk.img")
		if lost {
			n.loseState()
		} else {
			n.restart()
		}
		for range 2 {
			code(t, hung.unstage(), codes.Unavailable)
			code(t, hung.publish("b", false), codes.Unavailable)
		}
		if lost {
			code(t, other.unstage(), codes.Unavailable) // it may be its
		} else {
			n.must(other.unpublish("o"))
			n.must(other.unstage())
			n.must(other.unstage())
		}
		n.fake.silence(0, "")
		if all, err := n.fake.FindAll(t.Context()); err != nil || len(all) == 0 || all[0].Ref != r.Device.ref() {
			t.Errorf("%+v, %v", all, err)
		}
		if lost {
			n.must(other.unpublish("o"))
			n.must(other.unstage())
		}
		n.must(other.delete())
		n.must(hung.publish("a", false))
		hung.down("a")
	}
}

// The device of a staging that was cut short is not forgotten while it does not answer.
func TestCutShortStagingThatDoesNotAnswer(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, blockCap(oneWriter), nil)
	n.must(v.stage())
	r, _ := n.d.state.get(v.id)
	ref := r.Device.ref()
	n.halt()
	path := filepath.Join(n.cfg.StateDir, n.cfg.NodeID, filepath.Base(n.d.state.path(v.id)))
	r.Device = binding{}
	n.must(n.d.state.put(r))
	n.fake.silence(ref.Number, "/pool/volumes/v/disk.img")
	n.start()
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
	code(t, v.unstage(), codes.Unavailable)
	n.fake.silence(0, "")
	v.down()
}
