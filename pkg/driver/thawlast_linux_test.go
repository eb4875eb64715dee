package driver

import (
	"fmt"
	"os"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
)

// freezeAt has somebody freeze the filesystem at path.
func (k *fakeKernel) freezeAt(path string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.frozen[path] = true
}

// isFrozen says whether anything is.
func (k *fakeKernel) isFrozen() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.frozen) > 0
}

// A filesystem that its pod froze, and that cannot be thawed for the moment, stays mounted:
// unmounted it would keep its device, and nothing could thaw it. One that is dead goes.
func TestThawThatFailsForTheMoment(t *testing.T) {
	open := func(errno syscall.Errno) error { return &os.PathError{Op: "open", Path: "/staging", Err: errno} }
	for _, c := range []struct {
		err  error
		want codes.Code
	}{
		{open(syscall.EMFILE), codes.Unavailable},
		{open(syscall.ENFILE), codes.Unavailable},
		{open(syscall.ENOMEM), codes.Unavailable},
		{open(syscall.EINTR), codes.Aborted},
		{open(syscall.EIO), codes.OK},
		{open(syscall.EUCLEAN), codes.OK},
		{fmt.Errorf("thaw: %w", syscall.EIO), codes.OK},
	} {
		for _, inline := range []bool{false, true} {
			n := newFake(t)
			v := n.create("a", 16*mib, mountCap("ext4", manyWriters), nil)
			path, end := v.staging(), v.unstage
			if inline {
				n.must(v.delete())
				v = volume{n: n, id: "csi-1", cap: v.cap, context: map[string]string{ephemeralKey: "true", "size": "16Mi"}}
				n.must(v.publish("p", false))
				path, end = v.target("p"), func() error { return v.unpublish("p") }
			} else {
				n.must(v.stage())
			}
			if c.want != codes.OK {
				n.fake.freezeAt(path)
			}
			n.fake.failOnce("thaw", c.err)
			code(t, end(), c.want)
			if c.want != codes.OK {
				if _, mounted, err := n.fake.At(path); err != nil || !mounted {
					t.Errorf("%v: mounted %v, %v", c.err, mounted, err)
				}
				n.must(end())
			}
			if n.fake.isFrozen() {
				t.Errorf("%v: unmounted while it was frozen", c.err)
			}
			if !inline {
				n.must(v.delete())
			}
		}
	}
}

// An inline volume whose record was lost is thawed too before it goes.
func TestLostStateOfAFrozenInlineVolume(t *testing.T) {
	n := newFake(t)
	v := volume{n: n, id: "csi-1", cap: mountCap("ext4", manyWriters), context: map[string]string{ephemeralKey: "true", "size": "16Mi"}}
	n.must(v.publish("p", false))
	n.loseState()
	n.fake.freezeAt(v.target("p"))
	n.must(v.unpublish("p"))
	if n.fake.isFrozen() {
		t.Error("unmounted while it was frozen")
	}
	// A mere bind mount is not its filesystem's last mount: who froze it may go on.
	other := n.create("a", 16*mib, mountCap("ext4", manyWriters), nil).up("p")
	n.loseState()
	n.fake.freezeAt(other.target("p"))
	n.must(other.unpublish("p"))
	if !n.fake.isFrozen() {
		t.Error("thawed while it is staged")
	}
	n.must(n.fake.Thaw(other.target("p")))
	other.down()
}
