package driver

import (
	"encoding/binary"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// TestPublishTable walks CSI's table for a second NodePublishVolume.
func TestPublishTable(t *testing.T) {
	for name, c := range map[string]struct {
		mode   csi.VolumeCapability_AccessMode_Mode
		second codes.Code // at another target
	}{
		"single writer":    {oneWriter, codes.FailedPrecondition},
		"legacy writer":    {legacy, codes.FailedPrecondition},
		"multiple writers": {manyWriters, codes.OK},
		"single reader":    {reader, codes.OK},
		"readers anywhere": {csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY, codes.OK},
	} {
		for kind, capability := range map[string]*csi.VolumeCapability{"mount": mountCap("ext4", c.mode), "block": blockCap(c.mode)} {
			t.Run(name+" "+kind, func(t *testing.T) {
				n := newFake(t)
				v := n.create("pvc-1", 16*mib, capability, nil).up("a")
				code(t, v.publish("a", false), codes.OK)
				if c.mode == manyWriters || c.mode == oneWriter || c.mode == legacy {
					code(t, v.publish("a", true), codes.AlreadyExists)
				}
				code(t, v.publish("b", false), c.second)
				code(t, v.unstage(), codes.FailedPrecondition) // still published
				n.must(v.unpublish("b"))
				v.down("a")
			})
		}
	}
}

func TestNodeRefuses(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", legacy), nil)
	b := n.create("pvc-2", 16*mib, blockCap(legacy), nil)
	with := func(v volume, c *csi.VolumeCapability) volume { v.cap = c; return v }
	for name, c := range map[string]struct {
		err  error
		code codes.Code
	}{
		"stage without capability":        {with(v, nil).stage(), codes.InvalidArgument},
		"stage unknown volume":            {volume{n: n, id: "nope", cap: v.cap}.stage(), codes.NotFound},
		"stage with another filesystem":   {with(v, mountCap("xfs", legacy)).stage(), codes.FailedPrecondition},
		"stage a filesystem as block":     {with(v, blockCap(legacy)).stage(), codes.FailedPrecondition},
		"stage a raw volume as mount":     {with(b, mountCap("ext4", legacy)).stage(), codes.FailedPrecondition},
		"stage with a dangerous option":   {with(v, mountCap("ext4", legacy, "loop")).stage(), codes.InvalidArgument},
		"publish before stage":            {v.publish("a", false), codes.FailedPrecondition},
		"publish unknown volume":          {volume{n: n, id: "nope", cap: v.cap}.publish("a", false), codes.NotFound},
		"unstage what is not staged":      {v.unstage(), codes.OK},
		"unstage unknown volume":          {volume{n: n, id: "nope"}.unstage(), codes.OK},
		"unpublish what is not published": {v.unpublish("a"), codes.OK},
		"unpublish unknown volume":        {volume{n: n, id: "nope"}.unpublish("a"), codes.OK},
	} {
		t.Run(name, func(t *testing.T) { code(t, c.err, c.code) })
	}
	_, err := n.client.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{VolumeId: v.id, StagingTargetPath: "relative/path", VolumeCapability: v.cap})
	code(t, err, codes.InvalidArgument)
	_, err = n.client.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{VolumeId: v.id, TargetPath: "/a/../b", StagingTargetPath: "/x", VolumeCapability: v.cap})
	code(t, err, codes.InvalidArgument)
	_, err = n.client.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{VolumeId: v.id, TargetPath: "/a", VolumeCapability: v.cap})
	code(t, err, codes.FailedPrecondition)
}

func TestStageAgain(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters, "noatime"), nil)
	n.must(v.stage())
	n.must(v.stage())
	other := v
	other.cap = mountCap("ext4", manyWriters)
	code(t, other.stage(), codes.AlreadyExists)
	other.cap = mountCap("ext4", reader, "noatime")
	code(t, other.stage(), codes.AlreadyExists)
	_, err := n.client.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{VolumeId: v.id, StagingTargetPath: filepath.Join(n.dir, "elsewhere"), VolumeCapability: v.cap})
	code(t, err, codes.FailedPrecondition)
	n.restart() // the record is read again
	n.must(v.stage())
	code(t, other.stage(), codes.AlreadyExists)
	v.down()
}

// TestUndo makes each step fail once: after a final code nothing is left, and
// the repeated call succeeds (fact 57).
func TestUndo(t *testing.T) {
	boom := errors.New("boom")
	for _, kind := range []*csi.VolumeCapability{mountCap("ext4", manyWriters), blockCap(manyWriters)} {
		for _, step := range []string{"attach", "mount", "bind"} {
			n := newFake(t)
			v := n.create("pvc-1", 16*mib, kind, nil)
			n.fake.failOnce(step, boom)
			err := v.stage()
			switch {
			case step == "bind":
				n.must(err)
				code(t, v.publish("a", false), codes.Internal)
				code(t, v.publish("a", true), codes.OK)
				n.must(v.unpublish("a"))
				n.must(v.unstage())
			case err != nil:
				code(t, err, codes.Internal)
				n.fake.clean(t)
				if files, _ := os.ReadDir(filepath.Join(n.cfg.StateDir, n.cfg.NodeID)); len(files) > 0 {
					t.Errorf("%s: left records %v", step, files)
				}
				n.must(v.stage())
				n.must(v.unstage())
			default:
				n.must(v.unstage()) // a raw block volume is not mounted
			}
			n.fake.failOnce("", nil)
			n.must(v.delete())
			n.halt()
		}
	}
}

func TestBusyDetachIsAbortedAndRetried(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, blockCap(manyWriters), nil)
	n.must(v.stage())
	r, _ := n.d.state.get(v.id)
	stranger, err := n.fake.Hold(t.Context(), r.Device.ref())
	n.must(err)
	code(t, v.unstage(), codes.Aborted)
	code(t, v.stage(), codes.Aborted) // a device in rundown accepts no new work
	n.must(stranger.Close())
	n.must(v.unstage())
	n.must(v.delete())
}

func TestReadOnlyBlockHasItsOwnDevice(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, blockCap(manyWriters), nil).up("a")
	n.must(v.publish("b", true))
	n.must(v.publish("c", true))
	all, err := n.fake.FindAll(t.Context())
	n.must(err)
	if len(all) != 2 || all[0].ReadOnly || !all[1].ReadOnly {
		t.Fatalf("devices %+v", all)
	}
	n.restart()
	n.must(v.publish("b", true))
	n.must(v.unpublish("b"))
	n.must(v.unpublish("c"))
	if all, _ = n.fake.FindAll(t.Context()); len(all) != 1 {
		t.Errorf("the read-only device stays: %+v", all)
	}
	v.down("a")
}

func TestUnpublishLeavesStrangersAlone(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil).up("a")
	target := v.target("b")
	n.must(os.MkdirAll(target, 0o750))
	n.fake.mounts = append(n.fake.mounts, mount.Mount{Path: target, Source: "/dev/sda1", FSType: "ext4", Root: "/", Major: 8, Minor: 1})
	code(t, v.unpublish("b"), codes.FailedPrecondition)
	n.must(n.fake.Unmount(t.Context(), target))
	v.down("a")
}

func TestRestartAdopts(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil).up("a")
	b := n.create("pvc-2", 16*mib, blockCap(manyWriters), nil).up("a2")
	n.restart()
	r, ok := n.d.state.get(b.id)
	if !ok || !n.d.holds(r.Device.ref()) {
		t.Fatalf("the raw block volume's device is not held: %+v", r)
	}
	code(t, v.publish("a", false), codes.OK)
	code(t, b.publish("a2", false), codes.OK)
	code(t, v.delete(), codes.FailedPrecondition)
	v.down("a")
	b.down("a2")
}

// TestRebootForgets: the kernel knows nothing of what the records say.
func TestRebootForgets(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil).up("a")
	b := n.create("pvc-2", 16*mib, blockCap(manyWriters), nil).up("a2")
	n.halt()
	n.fake.mounts, n.fake.devices = nil, make(map[int]*fakeDevice)
	n.start()
	if left := n.d.state.list(); len(left) > 0 {
		t.Errorf("records left: %+v", left)
	}
	code(t, v.publish("a", false), codes.FailedPrecondition)
	v.up("a").down("a")
	n.must(os.Remove(b.target("a2")))
	b.up("a2").down("a2")
}

// TestCrashBetweenBindAndRecord: a raw block device was bound, the record says
// only that it was about to be. What was to follow may be missing: here the mask of
// a thick volume's discards.
func TestCrashBetweenBindAndRecord(t *testing.T) {
	for name, again := range map[string]func(n *node){
		"found by the next start":    func(n *node) { n.restart() },
		"found by the repeated call": func(*node) {},
	} {
		t.Run(name, func(t *testing.T) {
			n := newFake(t)
			v := n.create("pvc-1", 16*mib, blockCap(manyWriters), nil)
			n.must(v.stage())
			r := n.record(v.id)
			first := r.Device
			n.must(n.d.letGo(first.ref()))
			n.fake.mu.Lock()
			n.fake.devices[first.Number].info.Discard = true
			n.fake.mu.Unlock()
			r.Device = binding{}
			n.must(n.d.state.put(r))
			again(n)
			n.must(v.stage())
			r = n.record(v.id)
			if r.Device.ref() == first.ref() || !n.d.holds(r.Device.ref()) {
				t.Errorf("adopted: %+v", r)
			}
			if info, err := n.fake.Status(t.Context(), r.Device.ref()); err != nil || info.Discard {
				t.Errorf("%+v, %v", info, err)
			}
			v.down()
		})
	}
}

// TestCrashWhilePublished: the record of a raw block volume that pods have was lost, and
// a crash came between the binding and the record of the staging that follows. Pods keep
// their device.
func TestCrashWhilePublished(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, blockCap(manyWriters), nil).up("a")
	r := n.record(v.id)
	first := r.Device
	r.Device, r.Targets = binding{}, nil
	n.must(n.d.state.put(r))
	n.restart()
	if r = n.record(v.id); r.Device.ref() != first.ref() || !n.d.holds(first.ref()) {
		t.Fatalf("not adopted: %+v", r)
	}
	n.must(v.stage())
	v.down("a")
}

// TestReadDeviceOfAnotherByThen: the read-only device of a raw block volume was in use when
// its last reader was unpublished, and went by itself; its number is another volume's now.
func TestReadDeviceOfAnotherByThen(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, blockCap(manyWriters), nil).up("a")
	n.must(v.publish("b", true))
	old := n.record(v.id).ReadDevice
	n.fake.failOnce("detach", loop.ErrBusy)
	code(t, v.unpublish("b"), codes.Aborted)
	if n.record(v.id).ReadDevice.none() {
		t.Fatal("the device was not busy")
	}
	n.must(n.fake.Detach(t.Context(), old.ref()))
	w := n.create("pvc-2", 16*mib, blockCap(manyWriters), nil).up("c")
	if got := n.record(w.id).Device.Number; got != old.Number {
		t.Fatalf("the other volume has number %d, not %d", got, old.Number)
	}
	n.must(v.unpublish("b"))
	if r := n.record(v.id); !r.ReadDevice.none() {
		t.Errorf("%+v", r.ReadDevice)
	}
	v.down("a")
	w.down("c")
}

// TestReadDeviceGivenAnotherFile: a pod exchanged what the read-only device of a raw block
// volume shows. It stays bound, and so its number, for as long as a pod is shown it.
func TestReadDeviceGivenAnotherFile(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, blockCap(manyWriters), nil).up("a")
	n.must(v.publish("b", true))
	n.must(v.publish("c", true))
	number := n.record(v.id).ReadDevice.Number
	bound := func() bool {
		n.fake.mu.Lock()
		defer n.fake.mu.Unlock()
		d, ok := n.fake.devices[number]
		return ok && !d.cleared
	}
	n.fake.exchange(number)
	n.must(v.unpublish("b"))
	if !bound() {
		t.Fatal("a pod has it still")
	}
	code(t, v.publish("d", true), codes.FailedPrecondition)
	code(t, v.unstage(), codes.FailedPrecondition)
	n.must(v.unpublish("c"))
	if bound() {
		t.Error("it stays for ever")
	}
	n.must(v.publish("d", true))
	n.must(v.unpublish("d"))

	n.must(v.publish("e", true))
	number = n.record(v.id).ReadDevice.Number
	n.fake.exchange(number)
	n.restart()
	if !bound() {
		t.Error("a stop cleared what a pod has")
	}
	n.must(v.unpublish("e"))
	n.fake.mu.Lock()
	delete(n.fake.devices, number) // nothing else would: after a stop nobody knows of it
	n.fake.mu.Unlock()
	v.down("a")
}

// TestLostStateDirectory: mounts are there, the records are not.
func TestLostStateDirectory(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil).up("a")
	n.halt()
	n.must(os.RemoveAll(n.cfg.StateDir))
	n.start()
	code(t, v.delete(), codes.FailedPrecondition)
	n.must(v.stage())
	n.must(v.publish("a", false))
	v.down("a")

	v = n.create("pvc-2", 16*mib, mountCap("ext4", manyWriters), nil).up("a")
	n.halt()
	n.must(os.RemoveAll(n.cfg.StateDir))
	n.start()
	n.must(v.unpublish("a"))
	n.must(v.unstage())
	n.must(v.delete())
}

// TestUnreadableRecord: one record that cannot be read is found anew, as if it were lost,
// and keeps nothing else from being served.
func TestUnreadableRecord(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root can read all")
	}
	for kind, c := range map[string]*csi.VolumeCapability{"block": blockCap(manyWriters), "mount": mountCap("ext4", manyWriters)} {
		t.Run(kind, func(t *testing.T) {
			n := newFake(t)
			v, w := n.create("pvc-1", 16*mib, c, nil).up("a"), n.create("pvc-2", 16*mib, c, nil).up("b")
			path := n.d.state.path(v.id)
			n.halt()
			n.must(os.Chmod(path, 0))
			n.start()
			w.down("b")
			code(t, v.delete(), codes.FailedPrecondition)
			n.must(v.stage())
			n.must(v.publish("a", false))
			n.restart() // the record is a new one
			if r := n.record(v.id); len(r.Targets) != 1 {
				t.Errorf("after the restart: %+v", r)
			}
			v.down("a")

			// It may be read again when its volume is long gone.
			v = n.create("pvc-3", 16*mib, c, nil).up("a")
			path = n.d.state.path(v.id)
			old, err := os.ReadFile(path)
			n.must(err)
			v.down("a")
			n.halt()
			n.must(os.WriteFile(path, old, 0o600))
			n.start()
			if r, ok := n.d.state.get(v.id); ok {
				t.Errorf("a record of a volume that is gone: %+v", r)
			}
		})
	}
}

func TestStats(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil).up("a")
	b := n.create("pvc-2", 16*mib, blockCap(manyWriters), nil).up("a2")
	ask := func(id, path string) (*csi.NodeGetVolumeStatsResponse, error) {
		return n.client.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: path})
	}
	resp, err := ask(v.id, v.target("a"))
	n.must(err)
	if len(resp.GetUsage()) != 2 {
		t.Errorf("usage %v", resp.GetUsage())
	}
	resp, err = ask(b.id, b.target("a2"))
	n.must(err)
	if u := resp.GetUsage(); len(u) != 1 || u[0].GetTotal() != 16*mib {
		t.Errorf("usage %v", u)
	}
	for name, path := range map[string]string{"missing": "some/path", "not the volume": n.dir, "another volume": b.target("a2")} {
		t.Run(name, func(t *testing.T) {
			_, err := ask(v.id, path)
			code(t, err, codes.NotFound)
		})
	}
	v.down("a")
	b.down("a2")
}

func TestMapped(t *testing.T) {
	n := newFake(t)
	path := filepath.Join(n.dirs[0], "disk.raw")
	n.must(os.WriteFile(path, make([]byte, 4*mib), 0o600))
	outside := filepath.Join(n.dir, "secret")
	n.must(os.WriteFile(outside, make([]byte, mib), 0o600))
	n.must(os.Symlink(outside, filepath.Join(n.dirs[0], "link")))
	n.must(os.Link(outside, filepath.Join(n.dirs[0], "hard")))
	mapped := func(context map[string]string) volume {
		context["exposeImage"] = "true"
		return volume{n: n, id: "vm-disk", cap: blockCap(manyWriters), context: context}
	}
	for _, part := range []map[string]string{{"offset": "1Mi"}, {"sizeLimit": "1Mi"}, {"partition": "1"}, {"offset": "1Mi", "readOnly": "true"}, {"offset": "1Mi", "exposeImage": "false"}} {
		v := mapped(map[string]string{})
		v.context = maps.Clone(part)
		v.context["image"] = path
		code(t, v.stage(), codes.FailedPrecondition) // whoever has the device could move it
		n.fake.clean(t)
	}
	for name, c := range map[string]struct {
		context map[string]string
		code    codes.Code
	}{
		"outside":        {map[string]string{"image": outside}, codes.InvalidArgument},
		"dots":           {map[string]string{"image": n.dirs[0] + "/../secret"}, codes.InvalidArgument},
		"relative":       {map[string]string{"image": "disk.raw"}, codes.InvalidArgument},
		"symbolic link":  {map[string]string{"image": n.dirs[0] + "/link"}, codes.InvalidArgument},
		"hard link":      {map[string]string{"image": n.dirs[0] + "/hard"}, codes.InvalidArgument},
		"odd offset":     {map[string]string{"image": path, "offset": "100"}, codes.InvalidArgument},
		"beyond the end": {map[string]string{"image": path, "offset": "4Mi"}, codes.InvalidArgument},
		"limit too long": {map[string]string{"image": path, "offset": "2Mi", "sizeLimit": "3Mi"}, codes.InvalidArgument},
		"unknown":        {map[string]string{"image": path, "ofset": "0"}, codes.InvalidArgument},
		"zero limit":     {map[string]string{"image": path, "sizeLimit": "0"}, codes.InvalidArgument},
		"negative":       {map[string]string{"image": path, "offset": "-512"}, codes.InvalidArgument},

		"partition and offset":     {map[string]string{"image": path, "partition": "1", "offset": "0"}, codes.InvalidArgument},
		"partition and size limit": {map[string]string{"image": path, "partition": "1", "sizeLimit": "1Mi"}, codes.InvalidArgument},
		"partition 0":              {map[string]string{"image": path, "partition": "0"}, codes.InvalidArgument},
		"partition of no number":   {map[string]string{"image": path, "partition": "root"}, codes.InvalidArgument},
		"no partition table":       {map[string]string{"image": path, "partition": "1"}, codes.FailedPrecondition},
	} {
		t.Run(name, func(t *testing.T) {
			code(t, mapped(c.context).stage(), c.code)
			n.fake.clean(t)
		})
	}
	for length, want := range map[int]codes.Code{maxMappedID: codes.OK, maxMappedID + 1: codes.InvalidArgument} {
		v := mapped(map[string]string{"image": path})
		v.id = strings.Repeat("x", length)
		code(t, v.stage(), want)
		if want == codes.OK {
			n.must(v.unstage())
		}
		if _, staged := n.d.state.get(v.id); staged {
			t.Errorf("a record of an ID of %d bytes is left", length)
		}
		n.fake.clean(t)
	}
	v := mapped(map[string]string{"image": path, "offset": "1Mi", "sizeLimit": "2Mi", "readOnly": "true", "storage.kubernetes.io/csiProvisionerIdentity": "x"})
	n.must(v.stage())
	all, err := n.fake.FindAll(t.Context())
	n.must(err)
	if len(all) != 1 || all[0].Offset != mib || all[0].Size != 2*mib || !all[0].ReadOnly {
		t.Fatalf("devices %+v", all)
	}
	n.must(v.publish("a", false))
	_, err = n.client.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: v.target("a")})
	code(t, err, codes.InvalidArgument)
	n.restart()
	n.must(v.unpublish("a"))
	n.must(v.unstage())
	n.must(v.delete()) // never deletes the image
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}

// Nodes that are containers share a kernel: each sees the loop devices of the other.
func TestMappedVolumesOfOneNameOnTwoNodesOfAKernel(t *testing.T) {
	a := newFake(t)
	b := &node{t: t, dir: t.TempDir(), fake: a.fake, pods: newFakePods()}
	b.defaults(filepath.Join(b.dir, "pool"))
	b.cfg.NodeID = "node-b"
	b.start()
	volumeOn := func(n *node) volume {
		path := filepath.Join(n.dirs[0], "disk.raw")
		n.must(os.WriteFile(path, make([]byte, 4*mib), 0o600))
		return volume{n: n, id: "vm-disk", cap: blockCap(manyWriters), context: map[string]string{"image": path}}
	}
	va, vb := volumeOn(a), volumeOn(b)
	b.must(vb.stage())
	b.must(vb.publish("b", false))
	a.must(va.unstage()) // it is not staged there, and b's device is none of its own
	a.must(va.stage())
	a.must(va.unstage())
	a.must(va.unstage())
	b.must(vb.unpublish("b"))
	b.must(vb.unstage())
}

// tableOf is an MBR with one partition, in sectors.
func tableOf(start, sectors uint32) []byte {
	b := make([]byte, 512)
	b[446+4] = 0x83
	binary.LittleEndian.PutUint32(b[446+8:], start)
	binary.LittleEndian.PutUint32(b[446+12:], sectors)
	copy(b[510:], []byte{0x55, 0xaa})
	return b
}

func TestMappedPartition(t *testing.T) {
	n := newFake(t)
	path := filepath.Join(n.dirs[0], "disk.raw")
	write := func(table []byte) {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		n.must(err)
		_, err = f.WriteAt(table, 0)
		n.must(errors.Join(err, f.Truncate(4*mib), f.Close()))
	}
	v := volume{n: n, id: "vm-disk", cap: blockCap(manyWriters), context: map[string]string{"image": path, "partition": "1", "exposeImage": "true"}}
	write(tableOf(2048, 1<<20))
	code(t, v.stage(), codes.FailedPrecondition) // beyond the end
	n.fake.clean(t)
	write(tableOf(2048, 4096))
	other := v
	other.context = map[string]string{"image": path, "partition": "2", "exposeImage": "true"}
	code(t, other.stage(), codes.FailedPrecondition)
	n.fake.clean(t)

	n.must(v.stage())
	n.must(v.publish("a", false))
	n.restart()
	n.must(v.stage())
	code(t, other.stage(), codes.AlreadyExists)
	write(tableOf(4096, 2048))
	code(t, v.publish("b", true), codes.FailedPrecondition) // it would be shown other bytes
	write(tableOf(2048, 4096))
	n.must(v.publish("b", true))
	all, err := n.fake.FindAll(t.Context())
	n.must(err)
	if len(all) != 2 || all[0].Offset != mib || all[0].Size != 2*mib || all[1].Offset != mib || all[1].Size != 2*mib {
		t.Errorf("devices %+v", all)
	}
	n.must(v.unpublish("b"))
	n.must(v.unpublish("a"))
	n.must(v.unstage())
}

func TestEphemeral(t *testing.T) {
	n := newFake(t)
	inline := func(context map[string]string) volume {
		c := map[string]string{"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.name": "p"}
		maps.Copy(c, context)
		return volume{n: n, id: "csi-0123456789", cap: mountCap("ext4", manyWriters), context: c}
	}
	code(t, inline(map[string]string{"size": "2Gi"}).publish("a", false), codes.OutOfRange)
	code(t, inline(map[string]string{"mkfsOptions": "-m 1"}).publish("a", false), codes.InvalidArgument)
	v := inline(map[string]string{"size": "1"}) // made as large as ext4 has to be
	n.must(v.publish("a", false))
	if have, ok := n.store.Find(v.id); !ok || have.Size != 8*mib {
		t.Errorf("%+v", have)
	}
	n.must(v.unpublish("a"))
	v = inline(map[string]string{"size": "16Mi"})
	n.must(v.publish("a", false))
	n.must(v.publish("a", false))
	code(t, v.publish("a", true), codes.AlreadyExists)
	resp, err := n.ctrl.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	n.must(err)
	if len(resp.GetEntries()) != 0 {
		t.Error("an inline ephemeral volume is listed")
	}
	all := n.store.List()
	if len(all) != 1 {
		t.Fatalf("volumes %v", all)
	}
	code(t, volume{n: n, id: all[0].ID}.delete(), codes.FailedPrecondition)
	n.restart()
	n.must(v.publish("a", false))
	n.must(v.unpublish("a"))
	n.must(v.unpublish("a"))
	if all := n.store.List(); len(all) != 0 {
		t.Errorf("left %v", all)
	}
	// The pod goes while the driver is away.
	n.must(v.publish("b", false))
	n.halt()
	n.must(n.fake.Remove(t.Context(), v.target("b")))
	n.must(os.RemoveAll(filepath.Dir(v.target("b"))))
	n.start()
	if all := n.store.List(); len(all) != 0 {
		t.Errorf("left %v", all)
	}
	n.halt()
	n.cfg.EphemeralMaxSize = 0
	n.start()
	code(t, v.publish("a", false), codes.FailedPrecondition)
	if all := n.store.List(); len(all) != 0 {
		t.Errorf("left %v", all)
	}
}

func TestHealth(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil).up("a")
	reasons := func() []string {
		resp, err := n.client.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: v.id})
		n.must(err)
		var r []string
		for _, e := range resp.GetVolumeHealth().GetHealthStatuses() {
			if e.GetMessage() == "" || e.GetStatus() == csi.VolumeHealthErrorType_UNKNOWN_VOLUME_HEALTH_TYPE {
				t.Errorf("entry %v", e)
			}
			r = append(r, e.GetReason())
		}
		return r
	}
	if r := reasons(); len(r) > 0 {
		t.Errorf("healthy volume has %v", r)
	}
	n.fake.mounts[0].ReadOnly = true
	if r := reasons(); !slices.Contains(r, reasonTable[reasonReadOnly].word) {
		t.Errorf("read-only mount: %v", r)
	}
	n.fake.mounts[0].ReadOnly = false
	n.fake.small = true
	if r := reasons(); !slices.Equal(r, []string{reasonTable[reasonNotGrown].word}) {
		t.Errorf("filesystem that did not grow: %v", r)
	}
	n.fake.small = false
	saved := n.fake.devices[0].info.Ref
	n.fake.devices[0].info.DiskSeq++
	if r := reasons(); !slices.Contains(r, reasonTable[reasonDetached].word) {
		t.Errorf("detached behind our back: %v", r)
	}
	n.fake.devices[0].info.Ref = saved
	_, err := n.client.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: "nope"})
	code(t, err, codes.NotFound)
	v.down("a")
}
