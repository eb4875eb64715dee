package driver

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

func (v volume) snapshot(name string, params ...string) (*csi.Snapshot, error) {
	req := &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: v.id, Parameters: map[string]string{}}
	for i := 0; i < len(params); i += 2 {
		req.Parameters[params[i]] = params[i+1]
	}
	resp, err := v.n.ctrl.CreateSnapshot(v.n.t.Context(), req)
	return resp.GetSnapshot(), err
}

func (n *node) deleteSnapshot(id string) {
	n.t.Helper()
	_, err := n.ctrl.DeleteSnapshot(n.t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: id})
	n.must(err)
}

// The pool of these tests is in the temporary directory, which as a rule cannot
// reflink; with reflinks there is nothing to refuse.
func (n *node) copies() bool { return !n.store.Pools()[0].CanReflink() }

func TestSnapshotLife(t *testing.T) {
	n := newFake(t)
	v := n.create("v", 16*mib, mountCap("ext4", oneWriter), nil)
	s, err := v.snapshot("one")
	n.must(err)
	if s.GetSizeBytes() != 16*mib || s.GetSourceVolumeId() != v.id || !s.GetReadyToUse() || s.GetGroupSnapshotId() != "" ||
		time.Since(s.GetCreationTime().AsTime()) > time.Minute {
		t.Errorf("%v", s)
	}
	again, err := v.snapshot("one")
	n.must(err)
	if again.GetSnapshotId() != s.GetSnapshotId() || !again.GetCreationTime().AsTime().Equal(s.GetCreationTime().AsTime()) {
		t.Errorf("%v, then %v", s, again)
	}
	w := n.create("w", 16*mib, blockCap(oneWriter), nil)
	_, err = w.snapshot("one")
	code(t, err, codes.AlreadyExists)
	_, err = volume{n: n, id: image.VolumeID(n.store.Pools()[0].ID(), "none")}.snapshot("two")
	code(t, err, codes.NotFound)
	n.must(v.delete()) // a snapshot outlives its volume
	got, err := n.ctrl.GetSnapshot(t.Context(), &csi.GetSnapshotRequest{SnapshotId: s.GetSnapshotId()})
	n.must(err)
	if got.GetSnapshot().GetSourceVolumeId() != v.id {
		t.Errorf("%v", got)
	}
	n.deleteSnapshot(s.GetSnapshotId())
	n.deleteSnapshot(s.GetSnapshotId())
	n.deleteSnapshot("nonsense")
	_, err = n.ctrl.GetSnapshot(t.Context(), &csi.GetSnapshotRequest{SnapshotId: s.GetSnapshotId()})
	code(t, err, codes.NotFound)
	// One of a pool that is not here may well exist.
	foreign := image.VolumeID("aaaaaaaaaaaaaaaaaaaa", "one")
	_, err = n.ctrl.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: foreign})
	code(t, err, codes.Unavailable)
	_, err = n.ctrl.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{SnapshotId: foreign})
	code(t, err, codes.Unavailable)
	n.must(w.delete())
}

func TestSnapshotParameters(t *testing.T) {
	n := newFake(t)
	v := n.create("v", 16*mib, blockCap(oneWriter), nil)
	for _, bad := range [][]string{
		{"freezetimeout", "1s"},
		{"freezeTimeout", "1"},
		{"freezeTimeout", "0s"},
		{"freezeTimeout", "2h"},
		{"copyInUse", "maybe"},
		{"independent", ""},
	} {
		_, err := v.snapshot("s", bad...)
		code(t, err, codes.InvalidArgument)
	}
	_, err := v.snapshot("s", "freezeTimeout", "1m", "copyInUse", "true", "independent", "true", "csi.storage.k8s.io/volumesnapshot/name", "x")
	n.must(err)
	_, err = v.snapshot("s")
	code(t, err, codes.AlreadyExists)
	n.must(v.delete())
}

func TestListSnapshots(t *testing.T) {
	n := newFake(t)
	v, w := n.create("v", mib, blockCap(oneWriter), nil), n.create("w", mib, blockCap(oneWriter), nil)
	for i := range 5 {
		_, err := v.snapshot(fmt.Sprint("v", i))
		n.must(err)
	}
	_, err := w.snapshot("w0")
	n.must(err)
	list := func(req *csi.ListSnapshotsRequest) (names []string) {
		t.Helper()
		for {
			resp, err := n.ctrl.ListSnapshots(t.Context(), req)
			n.must(err)
			for _, e := range resp.GetEntries() {
				_, dir, _ := image.ParseID(e.GetSnapshot().GetSnapshotId())
				names = append(names, dir)
			}
			if req.StartingToken = resp.GetNextToken(); req.GetStartingToken() == "" {
				return names
			}
		}
	}
	for _, c := range []struct {
		req  *csi.ListSnapshotsRequest
		want string
	}{
		{&csi.ListSnapshotsRequest{}, "[v0 v1 v2 v3 v4 w0]"},
		{&csi.ListSnapshotsRequest{MaxEntries: 2}, "[v0 v1 v2 v3 v4 w0]"},
		{&csi.ListSnapshotsRequest{MaxEntries: 3, SourceVolumeId: v.id}, "[v0 v1 v2 v3 v4]"},
		{&csi.ListSnapshotsRequest{SourceVolumeId: w.id}, "[w0]"},
		{&csi.ListSnapshotsRequest{SourceVolumeId: "none"}, "[]"},
		{&csi.ListSnapshotsRequest{SnapshotId: image.VolumeID(n.store.Pools()[0].ID(), "v3")}, "[v3]"},
		{&csi.ListSnapshotsRequest{SnapshotId: image.VolumeID(n.store.Pools()[0].ID(), "v3"), SourceVolumeId: w.id}, "[]"},
		{&csi.ListSnapshotsRequest{SnapshotId: "none"}, "[]"},
	} {
		if got := fmt.Sprint(list(c.req)); got != c.want {
			t.Errorf("%v: %s, want %s", c.req, got, c.want)
		}
	}
	_, err = n.ctrl.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{StartingToken: "x"})
	code(t, err, codes.Aborted)
	_, err = n.ctrl.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{MaxEntries: -1})
	code(t, err, codes.InvalidArgument)
	n.must(v.delete())
	n.must(w.delete())
}

// A volume in use is frozen, a raw one flushed, and both go on afterwards.
func TestSnapshotInUse(t *testing.T) {
	n := newFake(t)
	v, w := n.create("v", 16*mib, mountCap("ext4", oneWriter), nil).up("pod"), n.create("w", mib, blockCap(oneWriter), nil).up("pod-w")
	if n.copies() {
		_, err := v.snapshot("refused")
		code(t, err, codes.FailedPrecondition)
		_, err = w.snapshot("refused")
		code(t, err, codes.FailedPrecondition)
	}
	_, err := v.snapshot("v", "copyInUse", "true")
	n.must(err)
	_, err = w.snapshot("w", "copyInUse", "true")
	flushes, steps := 1, map[string]volume{"freeze": v, "sync": w}
	if n.copies() { // nothing stops the writers to a raw volume
		code(t, err, codes.FailedPrecondition)
		flushes = 0
		delete(steps, "sync")
	} else {
		n.must(err)
	}
	if n.fake.froze != 1 || n.fake.synced != flushes {
		t.Errorf("%d freezes, %d flushes", n.fake.froze, n.fake.synced)
	}
	for step, c := range map[string]struct {
		err  error
		want codes.Code
	}{
		"freeze": {&mount.OpError{Op: "freeze", Err: mount.ErrBusy}, codes.Aborted},
		"sync":   {errors.New("lost"), codes.Internal},
	} {
		of, ok := steps[step]
		if !ok {
			continue
		}
		n.fake.failOnce(step, c.err)
		_, err := of.snapshot("failed", "copyInUse", "true")
		code(t, err, c.want)
	}
	if _, ok := n.store.FindSnapshot("failed"); ok || len(n.freezeRecords()) != 0 {
		t.Errorf("a failed snapshot exists: %v; records %v", ok, n.freezeRecords())
	}
	v.down("pod")
	w.down("pod-w")
}

func (n *node) freezeRecords() []string {
	n.t.Helper()
	found, err := filepath.Glob(filepath.Join(n.cfg.StateDir, n.cfg.NodeID, "*"+freezeSuffix))
	n.must(err)
	return found
}

// What cannot be thawed is written down, and thawed by the next start; also when it
// is mounted nowhere any more.
func TestStartThaws(t *testing.T) {
	for name, unmounted := range map[string]bool{"mounted": false, "unmounted meanwhile": true} {
		t.Run(name, func(t *testing.T) {
			n := newFake(t)
			v := n.create("v", 16*mib, mountCap("ext4", oneWriter), nil).up("pod")
			n.fake.failOnce("thaw", mount.ErrNotThawed)
			_, err := v.snapshot("s", "copyInUse", "true")
			code(t, err, codes.Aborted)
			if len(n.freezeRecords()) != 1 || len(n.fake.frozen) != 1 {
				t.Fatalf("records %v, frozen %v", n.freezeRecords(), n.fake.frozen)
			}
			if unmounted {
				keep, err := n.d.loops.Hold(t.Context(), n.fake.devices[0].info.Ref) // as a frozen filesystem does
				n.must(err)
				n.must(v.unpublish("pod"))
				code(t, v.unstage(), codes.Aborted)
				n.fake.thawAnywhere = true
				defer func() { n.must(keep.Close()); n.must(v.unstage()); n.must(v.delete()) }()
			} else {
				defer v.down("pod")
			}
			n.restart()
			if len(n.freezeRecords()) != 0 || len(n.fake.frozen) != 0 {
				t.Errorf("records %v, frozen %v", n.freezeRecords(), n.fake.frozen)
			}
		})
	}
}

// Killed while it thawed what is mounted nowhere: the next start thaws it where the
// last one has mounted it, and takes that mount away.
func TestStartEndsAThawThatWasCutShort(t *testing.T) {
	n := newFake(t)
	v := n.create("v", 16*mib, mountCap("ext4", oneWriter), nil).up("pod")
	n.fake.failOnce("thaw", mount.ErrNotThawed)
	_, err := v.snapshot("s", "copyInUse", "true")
	code(t, err, codes.Aborted)
	keep, err := n.d.loops.Hold(t.Context(), n.fake.devices[0].info.Ref)
	n.must(err)
	n.must(v.unpublish("pod"))
	code(t, v.unstage(), codes.Aborted)
	n.halt()
	dir := filepath.Join(n.cfg.StateDir, n.cfg.NodeID, thawPrefix+"1")
	n.must(os.Mkdir(dir, 0o700))
	n.must(n.fake.Mount(t.Context(), mount.Spec{Source: n.fake.devices[0].info.Path, Target: dir, FSType: "ext4"}))
	n.must(keep.Close()) // the mount has the device from here on
	n.fake.thawAnywhere = true
	n.start()
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) || len(n.freezeRecords()) != 0 || len(n.fake.frozen) != 0 {
		t.Errorf("%v; records %v, frozen %v", err, n.freezeRecords(), n.fake.frozen)
	}
	n.must(v.unstage())
	n.must(v.delete())
}

// A helper that is gone while the kernel refuses to thaw leaves the record too.
func TestRecordOfWhatCannotBeThawedStays(t *testing.T) {
	n := newFake(t)
	v := n.create("v", 16*mib, mountCap("ext4", oneWriter), nil).up("pod")
	for step, err := range map[string]error{
		"freeze": mount.ErrNotThawed,
		"thaw":   fmt.Errorf("%w, %w", mount.ErrThawed, mount.ErrNotThawed),
	} {
		n.fake.failOnce(step, err)
		if _, err := v.snapshot("s", "copyInUse", "true"); err == nil {
			t.Errorf("%s: the snapshot was made", step)
		}
		if got := n.freezeRecords(); len(got) != 1 {
			t.Errorf("%s: records %v", step, got)
		}
		n.restart()
		if got := n.freezeRecords(); len(got) != 0 || len(n.fake.frozen) != 0 {
			t.Errorf("%s: records %v, frozen %v after a start", step, got, n.fake.frozen)
		}
	}
	v.down("pod")
}

// A start makes the kernel take its time again when a process that hurried it was
// killed in the middle, and leaves the hurry of others alone.
func TestStartEndsTheHurryOfAFreeze(t *testing.T) {
	for name, expedite := range map[string]bool{"ours": true, "somebody else's": false} {
		t.Run(name, func(t *testing.T) {
			n := newFake(t)
			n.halt()
			n.cfg.ExpediteFreezes = expedite
			n.start()
			v := n.create("v", 16*mib, mountCap("ext4", oneWriter), nil).up("pod")
			n.fake.failOnce("thaw", fmt.Errorf("%w, %w", mount.ErrThawed, mount.ErrNotThawed)) // so that the record stays
			if _, err := v.snapshot("s", "copyInUse", "true"); err == nil {
				t.Fatal("the snapshot was made")
			}
			n.fake.hurried = true
			n.restart()
			if n.fake.hurried == expedite {
				t.Errorf("hurried: %t", n.fake.hurried)
			}
			v.down("pod")
		})
	}
}

func TestForeignFreezeRecordIsDropped(t *testing.T) {
	n := newFake(t)
	n.halt()
	dir := filepath.Join(n.cfg.StateDir, n.cfg.NodeID)
	for name, text := range map[string]string{
		"a": "{", "b": `{"version": 1, "bootID": "another", "volumes": [{"volumeID": "v"}]}`, "c": `{"version": 99}`,
	} {
		n.must(os.WriteFile(filepath.Join(dir, name+freezeSuffix), []byte(text), 0o600))
	}
	n.start()
	if left := n.freezeRecords(); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}
