package driver

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// An inline volume whose pod went while its pool was absent, or while the node was down,
// goes when that is found; those of pods that are there stay, with and without a device.
func TestLeftoverInlineVolumesAreSwept(t *testing.T) {
	n := newFake(t)
	ctx := t.Context()
	left := func(name, pod string) {
		t.Helper()
		_, err := n.store.Pools()[0].Create(ctx, image.Spec{
			Name: name, Size: 16 * mib, Allocation: image.Thin, Filesystem: "ext4", BlockSize: 4096, DirectIO: "auto",
			Ephemeral: &image.Ephemeral{Target: filepath.Join(n.dir, "pods", pod, "mount")},
		})
		n.must(err)
	}
	wantThere := func(want map[string]bool) {
		t.Helper()
		n.must(n.d.sweepEphemeral(ctx))
		for name, there := range want {
			if _, ok := n.store.Find(name); ok != there {
				t.Errorf("%s is there: %v", name, ok)
			}
		}
	}
	again := func() { // as for a pool that has just come in
		n.d.sweeper.mu.Lock()
		defer n.d.sweeper.mu.Unlock()
		n.d.sweeper.swept = nil
	}
	v := inlineVolume(n, "csi-used")
	n.must(v.publish("used", false))
	again()
	left("csi-gone", "gone")
	left("csi-waits", "waits")
	waits := filepath.Join(n.dir, "pods", "waits")
	n.must(os.Mkdir(waits, 0o750))
	wantThere(map[string]bool{"csi-used": true, "csi-gone": false, "csi-waits": true})
	n.must(os.Remove(waits))
	wantThere(map[string]bool{"csi-used": true, "csi-waits": false})
	left("csi-late", "late") // not looked for any more: its pod unpublishes it
	wantThere(map[string]bool{"csi-late": true})

	// What is attached stays, whatever became of the directory.
	again()
	pods := filepath.Join(n.dir, "pods")
	n.must(os.Rename(filepath.Join(pods, "used"), filepath.Join(n.dir, "used")))
	if n.d.sweepEphemeral(ctx) == nil {
		t.Error("a volume in use was removed without a word")
	}
	if _, ok := n.store.Find("csi-used"); !ok {
		t.Fatal("a volume in use was removed")
	}
	n.must(os.Rename(filepath.Join(n.dir, "used"), filepath.Join(pods, "used")))
	n.must(v.unpublish("used"))
}

// A pod that does not come back after a reboot is given up by the kubelet some time after
// the start: its volume goes then.
func TestPodThatGoesAfterTheStart(t *testing.T) {
	n := newFake(t)
	n.sweep = time.Millisecond
	v := inlineVolume(n, "csi-1")
	n.must(v.publish("a", false))
	n.reboot()
	if _, ok := n.store.Find("csi-1"); !ok {
		t.Fatal("the pod's data is gone")
	}
	n.must(os.RemoveAll(filepath.Join(n.dir, "pods", "a")))
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, ok := n.store.Find("csi-1"); !ok {
			return
		}
		if time.Now().After(end) {
			t.Fatal("its volume is left")
		}
	}
}
