package driver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/report"
)

// fresh is a report that nobody had before.
func (n *node) fresh() report.Machine {
	n.t.Helper()
	n.d.reports.last.Time = time.Time{}
	m, err := n.d.Report(n.t.Context())
	n.must(err)
	return m
}

// reported is one volume of a report; it must be there.
func (n *node) reported(id string) report.Volume {
	n.t.Helper()
	for _, v := range n.fresh().Volumes {
		if v.ID == id {
			return v
		}
	}
	n.t.Fatalf("volume %q is not in the report", id)
	return report.Volume{}
}

func (k *fakeKernel) count(number int, c loop.Counters) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.counted == nil {
		k.counted = map[int]loop.Counters{}
	}
	k.counted[number] = c
}

func TestReportOfAVolumesLife(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", oneWriter), nil)
	want := report.Volume{ID: v.id, Name: "pvc-1", Pool: "default", Size: 16 * mib, Allocation: "thick", Filesystem: "ext4", State: report.Available}
	same := func(what string) {
		t.Helper()
		got := n.reported(v.id)
		if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(report.Volume{}, "Created", "Used", "Allocated")); diff != "" {
			t.Errorf("%s: %s", what, diff)
		}
		if got.Allocated < got.Size || got.Allocated > got.Size+mib { // the map of its extents counts
			t.Errorf("%s: %d bytes allocated", what, got.Allocated)
		}
	}
	same("made")
	// The number was another volume's before.
	n.fake.count(0, loop.Counters{Reads: 1000, ReadBytes: 1 << 40, Busy: time.Hour})
	n.must(v.stage())
	want.State, want.Device, want.IO = report.Staged, "/dev/loop0", &report.IO{}
	same("staged")
	n.must(v.publish("pod", false))
	n.fake.count(0, loop.Counters{Reads: 1003, ReadBytes: 1<<40 + 4096, Writes: 2, WriteBytes: 8192, WriteTime: time.Second, Busy: time.Hour + time.Second})
	want.State, want.IO = report.Published, &report.IO{Reads: 3, ReadBytes: 4096, Writes: 2, WriteBytes: 8192, WriteSeconds: 1, BusySeconds: 1}
	same("published")
	if n.reported(v.id).Used == nil {
		t.Error("how much is used is not told")
	}
	n.must(v.unpublish("pod"))
	n.must(v.unstage())
	want.State, want.Device, want.IO = report.Available, "", nil
	same("unstaged")
	// Another volume takes the number, and nothing of the first one's I/O.
	other := n.create("pvc-2", 16*mib, blockCap(oneWriter), nil)
	n.must(other.stage())
	if got := n.reported(other.id); got.IO == nil || *got.IO != (report.IO{}) || got.Used != nil || got.Filesystem != "" {
		t.Errorf("%+v", got)
	}
	n.must(other.unstage())
	n.must(other.delete())
	n.must(v.delete())
	if m := n.fresh(); len(m.Volumes) != 0 || len(m.Pools) != 1 || m.Pools[0].Name != "default" || m.Pools[0].Size == 0 {
		t.Errorf("%+v", m)
	}
}

// The image of an inline ephemeral volume is found by the name that the kubelet gave it.
func TestReportOfAnEphemeralVolume(t *testing.T) {
	n := newFake(t)
	v := volume{n: n, id: "csi-4711", cap: mountCap("ext4", oneWriter), context: map[string]string{"csi.storage.k8s.io/ephemeral": "true"}}
	n.must(v.publish("pod", false))
	m := n.fresh()
	if len(m.Volumes) != 1 || !m.Volumes[0].Ephemeral || m.Volumes[0].State != report.Published || m.Volumes[0].Device == "" || m.Volumes[0].Pool != "default" || len(m.Volumes[0].Problems) > 0 {
		t.Errorf("%+v", m.Volumes)
	}
	n.must(v.unpublish("pod"))
}

// What is wrong is told, and what a call works on is not judged.
func TestReportOfProblems(t *testing.T) {
	n := newFake(t)
	lost := n.create("pvc-lost", 16*mib, blockCap(oneWriter), nil)
	gone := n.create("pvc-gone", 16*mib, mountCap("ext4", oneWriter), nil)
	n.must(gone.stage())
	n.must(n.fake.Unmount(t.Context(), gone.staging())) // by hand
	n.must(os.Remove(filepath.Join(n.pool[0].Path, "volumes", "pvc-lost", "disk.img")))
	reasons := func(id string) (all []string) {
		for _, p := range n.reported(id).Problems {
			all = append(all, p.Kind+" "+p.Reason)
		}
		return all
	}
	if diff := cmp.Diff([]string{"DataLoss ImageMissing"}, reasons(lost.id)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"Inaccessible " + reasonTable[reasonDetached].word}, reasons(gone.id)); diff != "" {
		t.Error(diff)
	}
	unlock, err := n.d.lockVolume(gone.id, "Test")
	n.must(err)
	if got := reasons(gone.id); len(got) > 0 {
		t.Errorf("a call works on it, and the report says %q", got)
	}
	unlock()
	n.must(gone.unstage())
}

// A pool that is absent, and a record that is damaged, are in the report.
func TestReportOfWhatCannotBeUsed(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, blockCap(oneWriter), nil)
	n.halt()
	n.must(os.WriteFile(filepath.Join(n.pool[0].Path, "volumes", "pvc-1", "volume.json"), []byte("{"), 0o600))
	n.pool = append(n.pool, image.Config{Name: "away", Path: filepath.Join(n.dir, "nowhere"), Overcommit: 1})
	n.start()
	if got := n.reported(v.id); got.State != report.Refused || len(got.Problems) != 1 || got.Problems[0].Reason != "RecordUnreadable" {
		t.Errorf("%+v", got)
	}
	m := n.fresh()
	if len(m.Pools) != 2 || m.Pools[0].Name != "away" || m.Pools[0].ID != "" || len(m.Pools[0].Problems) != 1 || m.Pools[0].Problems[0].Reason != "PoolAbsent" {
		t.Errorf("%+v", m.Pools)
	}
}

// Who asks while another's look hangs is not held up beyond its own time, and a
// report that is young is not made anew.
func TestReportsAreShared(t *testing.T) {
	n := newFake(t)
	first, err := n.d.Report(t.Context())
	n.must(err)
	if second, err := n.d.Report(t.Context()); err != nil || !second.Time.Equal(first.Time) {
		t.Error("made anew", err)
	}
	n.d.reports.busy <- struct{}{}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := n.d.Report(ctx); err == nil {
		t.Error("two at a time")
	}
	<-n.d.reports.busy
}

// The health calls of CSI tell of every record that is damaged, by its volume and by its
// pool, and of every pool that is absent.
func TestHealthOfWhatCannotBeUsed(t *testing.T) {
	n := newFake(t)
	var ids []string
	for _, name := range []string{"pvc-1", "pvc-2", "pvc-3"} {
		ids = append(ids, n.create(name, 16*mib, blockCap(oneWriter), nil).id)
	}
	n.halt()
	for _, name := range []string{"pvc-1", "pvc-3"} {
		n.must(os.WriteFile(filepath.Join(n.pool[0].Path, "volumes", name, "volume.json"), []byte("{"), 0o600))
	}
	// What is no volume's directory is for the pool's health to name.
	n.must(os.MkdirAll(filepath.Join(n.pool[0].Path, "volumes", "pvc-1.bak"), 0o700))
	for _, name := range []string{"away", "gone"} {
		n.pool = append(n.pool, image.Config{Name: name, Path: filepath.Join(n.dir, name), Overcommit: 1})
	}
	n.start()

	list, err := n.ctrl.ControllerListVolumeHealth(t.Context(), &csi.ControllerListVolumeHealthRequest{})
	n.must(err)
	var listed []string
	for _, e := range list.GetEntries() {
		listed = append(listed, e.GetVolumeId()+" "+e.GetHealthStatuses()[0].GetReason())
	}
	if diff := cmp.Diff([]string{ids[0] + " RecordUnreadable", ids[2] + " RecordUnreadable"}, listed); diff != "" {
		t.Error(diff)
	}
	one, err := n.ctrl.ControllerListVolumeHealth(t.Context(), &csi.ControllerListVolumeHealthRequest{MaxEntries: 1})
	n.must(err)
	rest, err := n.ctrl.ControllerListVolumeHealth(t.Context(), &csi.ControllerListVolumeHealthRequest{StartingToken: one.GetNextToken()})
	if err != nil || len(rest.GetEntries()) != 1 || rest.GetEntries()[0].GetVolumeId() != ids[2] {
		t.Errorf("the second page has %v, %v", rest.GetEntries(), err)
	}

	got, err := n.ctrl.ControllerGetVolumeHealth(t.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: ids[0]})
	n.must(err)
	onNode, err := n.client.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: ids[0]})
	n.must(err)
	for _, h := range []*csi.VolumeHealth{got.GetVolumeHealth(), onNode.GetVolumeHealth()} {
		if s := h.GetHealthStatuses(); len(s) != 1 || s[0].GetReason() != "RecordUnreadable" {
			t.Errorf("%v", h)
		}
	}
	_, err = n.ctrl.ControllerGetVolumeHealth(t.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: ids[0] + "x"})
	if status.Code(err) != codes.NotFound {
		t.Errorf("a volume that is not there: %v", err)
	}

	storage, err := n.client.NodeGetStorageHealth(t.Context(), &csi.NodeGetStorageHealthRequest{})
	n.must(err)
	text := fmt.Sprint(storage.GetBackendHealth())
	for _, name := range []string{"pvc-1", "pvc-3", "away", "gone"} {
		if !strings.Contains(text, name) {
			t.Errorf("%q is not named in %s", name, text)
		}
	}
	seen := map[string]bool{}
	for _, b := range storage.GetBackendHealth() {
		key := b.GetStatus().String() + b.GetReason()
		if seen[key] {
			t.Errorf("two entries of %s", key)
		}
		seen[key] = true
	}
}

// A message does not grow without end.
func TestAddMessage(t *testing.T) {
	text := "first"
	for range 1000 {
		text = addMessage(text, "pool \"default\": the record of another volume is damaged")
	}
	if len(text) > messageLimit+20 || !strings.HasSuffix(text, "; and more") || strings.Count(text, "and more") != 1 {
		t.Errorf("%d bytes, end %q", len(text), text[len(text)-40:])
	}
}

// TestHealthBesideACopy: a snapshot that is copied for hours keeps neither the list of
// volumes nor the volume's own health waiting, and is no problem.
func TestHealthBesideACopy(t *testing.T) {
	n := newFake(t)
	busy, broken := n.create("pvc-1", 16*mib, blockCap(oneWriter), nil), n.create("pvc-2", 16*mib, blockCap(oneWriter), nil)
	n.must(os.Remove(filepath.Join(n.pool[0].Path, "volumes/pvc-2/disk.img")))
	began, end, ended := make(chan struct{}), make(chan struct{}), make(chan error)
	go func() {
		_, err := n.d.images.Pools()[0].Snapshot(context.Background(), image.SnapshotSpec{Name: "s", Source: busy.id}, func(context.Context) (func() error, error) {
			close(began)
			<-end
			return func() error { return nil }, nil
		})
		ended <- err
	}()
	<-began
	defer func() {
		close(end)
		n.must(<-ended)
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // so that it fails instead of hanging
	defer cancel()
	list, err := n.ctrl.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{})
	n.must(err)
	if e := list.GetEntries(); len(e) != 1 || e[0].GetVolumeId() != broken.id || e[0].GetHealthStatuses()[0].GetReason() != "ImageMissing" {
		t.Errorf("listed %v", e)
	}
	one, err := n.ctrl.ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: busy.id})
	n.must(err)
	onNode, err := n.client.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: busy.id})
	n.must(err)
	for _, h := range []*csi.VolumeHealth{one.GetVolumeHealth(), onNode.GetVolumeHealth()} {
		if s := h.GetHealthStatuses(); len(s) > 0 {
			t.Errorf("%v", s)
		}
	}
}
