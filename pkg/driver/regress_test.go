package driver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// reboot ends everything that a reboot ends; the pool stays.
func (n *node) reboot() {
	n.t.Helper()
	n.halt()
	n.fake.mounts, n.fake.devices = nil, make(map[int]*fakeDevice)
	n.must(os.RemoveAll(n.cfg.StateDir))
	n.start()
}

// loseState is a driver restart that finds its state directory gone.
func (n *node) loseState() {
	n.t.Helper()
	n.halt()
	n.must(os.RemoveAll(n.cfg.StateDir))
	n.start()
}

// vanish clears a device behind the driver's back, whoever has it open.
func (n *node) vanish(b binding) {
	n.t.Helper()
	n.fake.mu.Lock()
	defer n.fake.mu.Unlock()
	if _, ok := n.fake.devices[b.Number]; !ok {
		n.t.Fatalf("no device %+v", b)
	}
	delete(n.fake.devices, b.Number)
}

func (n *node) record(id string) stageRecord {
	n.t.Helper()
	r, ok := n.d.state.get(id)
	if !ok {
		n.t.Fatalf("no record of %q", id)
	}
	return r
}

func inlineVolume(n *node, id string, attributes ...string) volume {
	c := map[string]string{ephemeralKey: "true", "size": "16Mi"}
	for i := 0; i+1 < len(attributes); i += 2 {
		c[attributes[i]] = attributes[i+1]
	}
	return volume{n: n, id: id, cap: mountCap("ext4", manyWriters), context: c}
}

func TestEphemeralDataSurvivesAFailedPublication(t *testing.T) {
	exists := func(n *node) bool { _, ok := n.store.Find("csi-1"); return ok }
	t.Run("after a reboot", func(t *testing.T) {
		n := newFake(t)
		v := inlineVolume(n, "csi-1")
		n.must(v.publish("a", false))
		n.reboot()
		n.fake.failOnce("attach", fmt.Errorf("%w", loop.ErrLimit))
		code(t, v.publish("a", false), codes.ResourceExhausted)
		if !exists(n) {
			t.Fatal("the pod's data is gone")
		}
		n.must(v.publish("a", false))
		n.must(v.unpublish("a"))
	})
	t.Run("while it is mounted and its record lost", func(t *testing.T) {
		n := newFake(t)
		v := inlineVolume(n, "csi-1")
		n.must(v.publish("a", false))
		n.loseState()
		n.fake.failOnce("attach", context.DeadlineExceeded)
		code(t, v.publish("a", false), codes.DeadlineExceeded)
		if _, mounted, _ := n.fake.At(v.target("a")); !mounted || !exists(n) {
			t.Fatalf("mounted %v, image exists %v", mounted, exists(n))
		}
		n.must(v.publish("a", false))
		n.must(v.unpublish("a"))
	})
	t.Run("a new one goes", func(t *testing.T) {
		n := newFake(t)
		v := inlineVolume(n, "csi-1")
		n.fake.failOnce("mount", fmt.Errorf("%w", mount.ErrRefused))
		code(t, v.publish("a", false), codes.FailedPrecondition)
		if exists(n) {
			t.Fatal("left behind")
		}
	})
}

func TestEphemeralBounds(t *testing.T) {
	n := newFake(t)
	n.halt()
	n.cfg.EphemeralMaxVolumes = 2
	n.start()
	a, b, c := inlineVolume(n, "csi-1"), inlineVolume(n, "csi-2"), inlineVolume(n, "csi-3")
	n.must(a.publish("a", false))
	n.must(b.publish("b", false))
	code(t, c.publish("c", false), codes.ResourceExhausted)
	code(t, inlineVolume(n, "csi-4", "pool", "other").publish("d", false), codes.InvalidArgument)
	code(t, a.unpublish("elsewhere"), codes.OK) // not there
	code(t, a.publish("a", false), codes.OK)    // and still where it was
	n.must(a.unpublish("a"))
	n.must(b.unpublish("b"))
}

// TestEphemeralBoundHoldsForAll: many pods start at the same time.
func TestEphemeralBoundHoldsForAll(t *testing.T) {
	const most = 2
	n := newFake(t)
	n.halt()
	n.cfg.EphemeralMaxVolumes = most
	n.start()
	pods := []string{"a", "b", "c", "d", "e", "f", "g", "h"}
	errs := make([]error, len(pods))
	var wg sync.WaitGroup
	for i, pod := range pods {
		v := inlineVolume(n, "csi-"+pod)
		v.target(pod)
		wg.Go(func() { errs[i] = v.publish(pod, false) })
	}
	wg.Wait()
	made := 0
	for _, err := range errs {
		if err == nil {
			made++
			continue
		}
		code(t, err, codes.ResourceExhausted)
	}
	if made != most {
		t.Errorf("%d inline volumes, not %d", made, most)
	}
	for _, pod := range pods {
		n.must(inlineVolume(n, "csi-"+pod).unpublish(pod))
	}
	n.must(inlineVolume(n, "csi-z").publish("z", false)) // there is room again
	n.must(inlineVolume(n, "csi-z").unpublish("z"))
}

// TestNamesDoNotMakeLoopDevices: sources and nodes that are called loopN.
func TestNamesDoNotMakeLoopDevices(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, blockCap(oneWriter), nil).up("a")
	n.must(v.unpublish("a"))
	n.fake.mounts = append(n.fake.mounts,
		mount.Mount{FSType: "nfs4", Source: "evil:/x/loop0", Root: "/", Path: filepath.Join(n.dir, "nfs"), Major: 0, Minor: 77},
		mount.Mount{FSType: "ext4", Source: "/dev/sda1", Root: "/data/loop0", Path: "/dev/null", Major: 8, Minor: 1})
	n.must(v.unstage())
	n.fake.mounts = nil
	n.must(v.delete())
}

func TestLostDeviceOfAPublishedRawVolume(t *testing.T) {
	for name, while := range map[string]string{"driver down": "down", "driver up": "up"} {
		t.Run(name, func(t *testing.T) {
			n := newFake(t)
			v := n.create("pvc-1", 16*mib, blockCap(oneWriter), nil).up("a")
			b := n.record(v.id).Device
			if while == "down" {
				n.halt()
			}
			n.vanish(b)
			if while == "down" {
				n.start()
			}
			code(t, v.delete(), codes.FailedPrecondition) // published
			n.fake.failOnce("attach", fmt.Errorf("%w", loop.ErrLimit))
			code(t, v.stage(), codes.ResourceExhausted)
			n.must(v.stage())
			n.must(v.unpublish("a"))
			v.down()
		})
	}
}

func TestReadOnlyDeviceIsNotForgotten(t *testing.T) {
	t.Run("restaged", func(t *testing.T) {
		n := newFake(t)
		v := n.create("pvc-1", 16*mib, blockCap(manyWriters), nil).up("a")
		n.must(v.publish("b", true))
		n.halt()
		n.vanishStopped(v.id)
		n.start()
		n.must(v.unpublish("a"))
		n.must(v.stage())
		n.must(v.unpublish("b"))
		v.down()
	})
	t.Run("no publication left", func(t *testing.T) {
		n := newFake(t)
		v := n.create("pvc-1", 16*mib, blockCap(manyWriters), nil).up("a")
		n.must(v.publish("b", true))
		n.must(v.unpublish("a"))
		n.halt()
		n.vanishStopped(v.id)
		n.fake.mounts = nil
		n.start()
		n.must(v.delete())
	})
}

// vanishStopped clears the writable device of a volume while the driver is down.
func (n *node) vanishStopped(id string) {
	n.t.Helper()
	for number, d := range n.fake.devices {
		if d.info.Tag == poolTag(id) && !d.info.ReadOnly {
			delete(n.fake.devices, number)
		}
	}
}

func TestUnstageAfterAFailedRestage(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, blockCap(manyWriters), nil)
	n.must(v.stage())
	stranger, err := n.fake.Hold(t.Context(), n.record(v.id).Device.ref())
	n.must(err)
	code(t, v.unstage(), codes.Aborted)
	code(t, v.stage(), codes.Aborted)
	code(t, v.unstage(), codes.Aborted) // and not OK with the device bound
	n.restart()
	code(t, v.unstage(), codes.Aborted)
	n.must(stranger.Close())
	v.down()
}

func TestCoveredStagingPath(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil).up("a")
	cover := mount.Mount{Path: v.staging(), Source: "/dev/sda1", FSType: "ext4", Root: "/", Major: 8, Minor: 1}
	n.fake.mounts = append(n.fake.mounts, cover)
	code(t, v.stage(), codes.FailedPrecondition)
	n.fake.mounts = n.fake.mounts[:len(n.fake.mounts)-1]
	n.must(v.publish("b", false))
	v.down("a", "b")
}

func TestMappedImageReplacedWhileStaged(t *testing.T) {
	n := newFake(t)
	path := filepath.Join(n.dirs[0], "disk.img")
	n.must(os.WriteFile(path, make([]byte, 4*mib), 0o600))
	v := volume{n: n, id: "mapped", cap: blockCap(manyWriters), context: map[string]string{"image": path}}.up("a")
	n.must(v.publish("r", true))
	n.must(v.unpublish("r"))
	n.must(os.WriteFile(path+".new", make([]byte, 8*mib), 0o600))
	n.must(os.Rename(path+".new", path))
	code(t, v.publish("r", true), codes.FailedPrecondition)
	n.must(v.unpublish("a"))
	n.must(v.unstage())
}

func TestRepeatedPublicationTouchesNothing(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil).up("a")
	state := filepath.Join(n.cfg.StateDir, n.cfg.NodeID)
	n.must(os.Rename(state, state+".away")) // records cannot be written
	code(t, v.publish("a", false), codes.OK)
	code(t, v.publish("b", false), codes.Internal)
	if _, mounted, _ := n.fake.At(v.target("a")); !mounted {
		t.Error("the pod's mount is gone")
	}
	if _, mounted, _ := n.fake.At(v.target("b")); mounted {
		t.Error("a failed publication stays")
	}
	n.must(os.Rename(state+".away", state))
	v.down("a")
}

func TestLostStateUnstageWaitsForPublications(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil).up("a")
	n.loseState()
	for range 2 {
		code(t, v.unstage(), codes.FailedPrecondition)
	}
	n.must(v.unpublish("a"))
	v.down()

	b := n.create("pvc-2", 16*mib, blockCap(manyWriters), nil).up("a")
	n.must(b.publish("r", true))
	n.loseState()
	code(t, b.unstage(), codes.FailedPrecondition)
	n.must(b.publish("a", false))
	b.down("a", "r")
}

func TestLostStateOfMappedVolumes(t *testing.T) {
	for kind, c := range map[string]*csi.VolumeCapability{"block": blockCap(manyWriters), "mount": mountCap("ext4", manyWriters)} {
		t.Run(kind, func(t *testing.T) {
			n := newFake(t)
			path := filepath.Join(n.dirs[0], "disk.img")
			donor := n.create("donor", 16*mib, mountCap("ext4", manyWriters), nil)
			img, err := os.ReadFile(filepath.Join(n.pool[0].Path, "volumes", "donor", "disk.img"))
			n.must(err)
			n.must(os.WriteFile(path, img, 0o600))
			n.must(donor.delete())
			v := volume{n: n, id: strings.Repeat("long-handle-", 8), cap: c, context: map[string]string{"image": path}}.up("a")
			n.loseState()
			n.must(v.unpublish("a"))
			n.must(v.unstage())
		})
	}
}

func TestLostStateExpand(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil)
	expand := func(path string) error {
		_, err := n.client.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{
			VolumeId: v.id, VolumePath: path, StagingTargetPath: v.staging(), CapacityRange: &csi.CapacityRange{RequiredBytes: 32 * mib},
		})
		return err
	}
	code(t, expand(n.dir), codes.FailedPrecondition) // not staged: it may grow later
	v.up("a")
	n.loseState()
	n.must(expand(v.target("a")))
	if got, _ := n.store.Get(v.id); got.Size != 32*mib {
		t.Errorf("size %d", got.Size)
	}
	v.down("a")
}

func TestVolumesOfAPoolThatIsNotConfigured(t *testing.T) {
	n := newFake(t)
	id := "aaaaaaaaaaaaaaaaaaaa.pvc-1"
	_, err := n.ctrl.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: mib}})
	code(t, err, codes.Unavailable)
	_, err = n.ctrl.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: id})
	code(t, err, codes.Unavailable)
	_, err = n.client.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: n.dir})
	code(t, err, codes.Unavailable)
	_, err = n.client.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: id})
	code(t, err, codes.Unavailable)
}

func TestHealthDuringStage(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil)
	n.must(n.d.state.put(stageRecord{VolumeID: v.id, StagingPath: v.staging()}))
	resp, err := n.client.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: v.id})
	n.must(err)
	if got := resp.GetVolumeHealth().GetHealthStatuses(); len(got) > 0 {
		t.Errorf("a volume that is being staged has %v", got)
	}
	n.must(v.unstage())
}

func TestReadOnlyMountOptionIsMeant(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters, "noatime,ro"), nil).up("a")
	resp, err := n.client.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: v.id})
	n.must(err)
	if got := resp.GetVolumeHealth().GetHealthStatuses(); len(got) > 0 {
		t.Errorf("mounted read-only on request: %v", got)
	}
	_, err = n.client.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: v.target("a")})
	code(t, err, codes.FailedPrecondition)
	v.down("a")
}

func TestCreateAgainElsewhere(t *testing.T) {
	n := newFake(t)
	n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil)
	_, err := n.ctrl.CreateVolume(t.Context(), &csi.CreateVolumeRequest{
		Name: "pvc-1", VolumeCapabilities: []*csi.VolumeCapability{mountCap("ext4", manyWriters)}, CapacityRange: &csi.CapacityRange{RequiredBytes: 16 * mib},
		AccessibilityRequirements: &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{"topology.csi-loop.io/node": "node-b"}}}},
	})
	code(t, err, codes.AlreadyExists)
}

func TestPublishModeIsThatOfTheStaging(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", oneWriter), nil)
	n.must(v.stage())
	other := v
	other.cap = mountCap("ext4", manyWriters)
	code(t, other.publish("a", false), codes.FailedPrecondition)
	n.must(v.publish("a", false))
	v.down("a")
}

func TestStateDirectoryOfOthers(t *testing.T) {
	n := newFake(t)
	cfg := n.cfg
	cfg.StateDir = t.TempDir()
	dir := filepath.Join(cfg.StateDir, cfg.NodeID)
	n.must(os.Mkdir(dir, 0o700))
	n.must(os.Chmod(dir, 0o777))
	if _, err := newDriver(cfg, n.store, nil, n.fake, n.fake, fakeMounts{n.fake}, n.fake, n.fake); err == nil || !strings.Contains(err.Error(), "others may write") {
		t.Errorf("a directory that others may write to: %v", err)
	}
}

func TestLostStateStageFirst(t *testing.T) {
	t.Run("raw with a reader", func(t *testing.T) {
		n := newFake(t)
		v := n.create("pvc-1", 16*mib, blockCap(manyWriters), nil).up("a")
		n.must(v.publish("b", true))
		n.loseState()
		n.must(v.stage())
		code(t, v.unstage(), codes.FailedPrecondition) // published
		n.must(v.unpublish("a"))
		code(t, v.unstage(), codes.FailedPrecondition)
		n.must(v.unpublish("b"))
		v.down()
	})
	t.Run("failed reader", func(t *testing.T) {
		n := newFake(t)
		v := n.create("pvc-1", 16*mib, blockCap(manyWriters), nil).up("a")
		n.must(v.publish("b", true))
		n.loseState()
		n.must(v.stage())
		n.fake.failOnce("bind", fmt.Errorf("%w", mount.ErrRefused))
		code(t, v.publish("c", true), codes.FailedPrecondition)
		if all, _ := n.fake.FindAll(t.Context()); len(all) != 2 {
			t.Fatalf("the other reader's device is gone: %+v", all)
		}
		v.down("a", "b")
	})
	t.Run("one writer", func(t *testing.T) {
		n := newFake(t)
		v := n.create("pvc-1", 16*mib, mountCap("ext4", oneWriter), nil).up("a")
		n.loseState()
		n.must(v.stage())
		code(t, v.publish("b", false), codes.FailedPrecondition)
		n.must(v.publish("a", false))
		v.down("a")
	})
}

func TestLostStateCountsOnlyPublications(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", oneWriter), nil).up("a")
	sub, _, _ := n.fake.At(v.target("a"))
	sub.Path, sub.Root = filepath.Join(n.dir, "pods/a/volume-subpaths/v/c/0"), "/sub"
	view, _, _ := n.fake.At(v.staging())
	view.Path = "/host" + view.Path
	n.fake.mounts = append(n.fake.mounts, sub, view)
	n.loseState()
	n.must(v.publish("a", false))
	n.fake.mounts = n.fake.mounts[:len(n.fake.mounts)-2]
	v.down("a")
}

func TestLostStateWrongStagingPath(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil)
	n.must(v.stage())
	n.loseState()
	_, err := n.client.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: "/wrong"})
	code(t, err, codes.FailedPrecondition)
	v.down()
}

func TestRecordsOfAnotherVersionAreFoundAnew(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, blockCap(manyWriters), nil).up("a")
	n.must(v.publish("b", true))
	f := n.create("pvc-2", 16*mib, mountCap("ext4", manyWriters), nil).up("f")
	files, err := filepath.Glob(filepath.Join(n.cfg.StateDir, n.cfg.NodeID, "*.json"))
	n.must(err)
	n.halt()
	for _, file := range files {
		b, err := os.ReadFile(file)
		n.must(err)
		n.must(os.WriteFile(file, []byte(strings.Replace(string(b), `"version":1`, `"version":0`, 1)), 0o600))
	}
	n.start()
	if all, _ := n.fake.FindAll(t.Context()); len(all) != 3 {
		t.Fatalf("devices %+v", all)
	}
	code(t, v.unstage(), codes.FailedPrecondition)
	n.must(f.publish("g", false))
	v.down("a", "b")
	f.down("f", "g")
}

func TestReaderDeviceInRundown(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, blockCap(manyWriters), nil).up("a")
	n.must(v.publish("b", true))
	passer, err := n.fake.Hold(t.Context(), n.record(v.id).ReadDevice.ref())
	n.must(err)
	code(t, v.unpublish("b"), codes.Aborted)
	code(t, v.publish("c", true), codes.Aborted) // not on a device that is about to go
	n.restart()
	n.must(passer.Close())
	n.must(v.unpublish("b"))
	n.must(v.publish("c", true))
	v.down("a", "c")
}

func TestClearedByHandWhileHeld(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, blockCap(manyWriters), nil)
	n.must(v.stage())
	n.fake.mu.Lock()
	d := n.fake.devices[n.record(v.id).Device.Number]
	d.cleared, d.info.Autoclear = true, true // losetup -d
	n.fake.mu.Unlock()
	n.must(v.stage()) // on a new binding
	v.down()
}

func TestReaderDeviceVanished(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, blockCap(manyWriters), nil).up("a")
	n.must(v.publish("b", true))
	n.vanish(n.record(v.id).ReadDevice)
	code(t, v.publish("b", true), codes.FailedPrecondition) // not OK on a dead node
	n.must(v.unpublish("b"))
	v.down("a")
}

func TestSweepNeedsThePodsDirectory(t *testing.T) {
	n := newFake(t)
	v := inlineVolume(n, "csi-1")
	n.must(v.publish("a", false))
	n.halt()
	n.fake.mounts, n.fake.devices = nil, make(map[int]*fakeDevice)
	pods := filepath.Join(n.dir, "pods")
	n.must(os.Rename(pods, pods+".later")) // a disk that is not mounted yet
	n.start()
	if _, ok := n.store.Find("csi-1"); !ok {
		t.Fatal("the pod's data is gone")
	}
	n.must(os.Rename(pods+".later", pods))
	n.must(v.publish("a", false))
	n.must(v.unpublish("a"))
}

func TestUndoThatFailsIsAborted(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil)
	n.fake.failOnce("bind", nil)
	n.must(v.stage())
	n.fake.failOnce("unmount", mount.ErrBusy)
	n.must(os.Rename(filepath.Join(n.cfg.StateDir, n.cfg.NodeID), n.cfg.StateDir+".away"))
	code(t, v.publish("a", false), codes.Aborted)
	n.must(os.Rename(n.cfg.StateDir+".away", filepath.Join(n.cfg.StateDir, n.cfg.NodeID)))
	n.must(v.unpublish("a"))
	v.down()
}
