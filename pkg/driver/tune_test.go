package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/cgroup"
	"github.com/csi-loop/csi-loop/pkg/image"
)

func TestParseMutable(t *testing.T) {
	good := map[string]string{
		"readIOPS": "1000", "writeIOPS": "max", "readBandwidth": "50Mi", "writeBandwidth": "65536", "readAhead": "256Ki", "trim": "false",
		"csi.storage.k8s.io/pvc/name": "data",
	}
	got, err := parseMutable(good)
	if err != nil {
		t.Fatal(err)
	}
	want := image.Tuning{
		ReadIOPS: new(int64(1000)), WriteIOPS: new(int64(0)), ReadBandwidth: new(int64(50 << 20)), WriteBandwidth: new(int64(65536)),
		ReadAhead: new(int64(256 << 10)), Trim: new(false),
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, c := range []struct{ key, value string }{
		{"readIOPS", ""},
		{"readIOPS", "0"},
		{"readIOPS", "9"},
		{"readIOPS", "-1"},
		{"readIOPS", "1k"},
		{"writeIOPS", "MAX"},
		{"readBandwidth", "fast"},
		{"readBandwidth", "1Ki"},
		{"writeBandwidth", "0"},
		{"writeBandwidth", "-5Mi"},
		{"writeBandwidth", "1.5"},
		{"readAhead", "max"},
		{"readAhead", "1000"},
		{"readAhead", "1Gi"},
		{"readAhead", "-4096"},
		{"readAhead", ""},
		{"trim", ""},
		{"trim", "on"},
		{"trim", "True"},
		{"readiops", "100"},
		{"pool", "default"},
		{"", ""},
	} {
		_, err := parseMutable(map[string]string{c.key: c.value})
		if codeOf(err) != codes.InvalidArgument || !strings.Contains(err.Error(), fmt.Sprintf("%q", c.key)) {
			t.Errorf("%s=%q: %v", c.key, c.value, err)
		}
	}
}

func TestPodUID(t *testing.T) {
	const uid = "11111111-2222-3333-4444-555555555555"
	for _, c := range []struct {
		context map[string]string
		target  string
		want    string
	}{
		{map[string]string{podUIDKey: "x"}, "/var/lib/kubelet/pods/" + uid + "/volumes/kubernetes.io~csi/pv/mount", "x"},
		{nil, "/var/lib/kubelet/pods/" + uid + "/volumes/kubernetes.io~csi/pv/mount", uid},
		{nil, "/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/pvc-1/" + uid, uid},
		{nil, "/mnt/data", ""},
	} {
		if got := podUIDOf(c.context, c.target); got != c.want {
			t.Errorf("%v, %s: %q", c.context, c.target, got)
		}
	}
}

func (v volume) modify(mutable map[string]string) error {
	_, err := v.n.ctrl.ControllerModifyVolume(v.n.t.Context(), &csi.ControllerModifyVolumeRequest{VolumeId: v.id, MutableParameters: mutable})
	return err
}

// device is that of the volume as the record has it.
func (v volume) device() cgroup.Device {
	v.n.t.Helper()
	r, ok := v.n.d.state.get(v.id)
	if !ok {
		v.n.t.Fatalf("%s is not staged", v.id)
	}
	return deviceNumbers(r.Device)
}

func (v volume) tuning() image.Tuning {
	v.n.t.Helper()
	got, err := v.n.store.Get(v.id)
	v.n.must(err)
	return got.Tuning
}

// limits asserts what holds for a pod.
func (v volume) limits(pod string, d cgroup.Device, want map[string]string) {
	v.n.t.Helper()
	if diff := cmp.Diff(want, v.n.pods.of(pod, d)); diff != "" {
		v.n.t.Errorf("limits of %s: %s", pod, diff)
	}
}

func (v volume) readsAhead(want int64) {
	v.n.t.Helper()
	v.n.fake.mu.Lock()
	defer v.n.fake.mu.Unlock()
	if got := v.n.fake.readsAhead(int(v.device().Minor)); got != want {
		v.n.t.Errorf("reads %d bytes ahead, want %d", got, want)
	}
}

func (v volume) reasons() (all []string) {
	v.n.t.Helper()
	resp, err := v.n.client.NodeGetVolumeHealth(v.n.t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: v.id})
	v.n.must(err)
	for _, s := range resp.GetVolumeHealth().GetHealthStatuses() {
		all = append(all, s.GetReason())
	}
	return all
}

func TestModifyVolumeInUse(t *testing.T) {
	n := newFake(t)
	v := n.create("a", 16*mib, mountCap("ext4", manyWriters), nil).up("one").up("two")
	dev := v.device()
	n.must(v.modify(map[string]string{"readIOPS": "500", "writeBandwidth": "10Mi", "readAhead": "1Mi"}))
	want := map[string]string{"riops": "500", "wbps": "10485760"}
	v.limits("one", dev, want)
	v.limits("two", dev, want)
	v.readsAhead(1 << 20)

	// What is not named stays; the same again is success.
	for range 2 {
		n.must(v.modify(map[string]string{"readIOPS": "max"}))
		v.limits("one", dev, map[string]string{"wbps": "10485760"})
	}
	n.must(v.modify(nil))

	// One wrong key or value, and nothing changes.
	before := v.tuning()
	for _, bad := range []map[string]string{{"writeIOPS": "100", "colour": "red"}, {"writeIOPS": "100", "readAhead": "1"}} {
		code(t, v.modify(bad), codes.InvalidArgument)
	}
	if diff := cmp.Diff(before, v.tuning()); diff != "" {
		t.Error(diff)
	}
	v.limits("one", dev, map[string]string{"wbps": "10485760"})

	// A pod that comes later is limited too; one that goes is let go.
	n.must(v.publish("three", false))
	v.limits("three", dev, map[string]string{"wbps": "10485760"})
	n.must(v.unpublish("three"))
	v.limits("three", dev, map[string]string{})

	// A restart finds the parameters in the volume's record, and sets them again.
	n.pods.limits = make(map[string]map[string]string)
	n.restart()
	v.n = n
	v.limits("one", dev, map[string]string{"wbps": "10485760"})
	if got := v.reasons(); len(got) > 0 {
		t.Errorf("health: %v", got)
	}
	v.readsAhead(1 << 20)
	n.must(v.unpublish("one"))
	n.must(v.unpublish("two"))
	n.must(v.unstage())
	if got := n.fake.readsAhead(int(dev.Minor)); got != fakeReadAhead {
		t.Errorf("the number's next user reads %d bytes ahead", got)
	}
	// Staged anew, as after a reboot.
	v.up("one")
	v.limits("one", v.device(), map[string]string{"wbps": "10485760"})
	v.readsAhead(1 << 20)
	v.down("one")
}

func TestModifyRawBlockVolume(t *testing.T) {
	n := newFake(t)
	v := n.create("a", 16*mib, blockCap(manyWriters), map[string]string{"readAhead": "64Ki"}).up("writer")
	v.readsAhead(64 << 10)
	n.must(v.publish("reader", true))
	r, _ := n.d.state.get(v.id)
	n.must(v.modify(map[string]string{"writeIOPS": "100", "readAhead": "0"}))
	v.limits("writer", deviceNumbers(r.Device), map[string]string{"wiops": "100"})
	v.limits("reader", deviceNumbers(r.ReadDevice), map[string]string{"wiops": "100"})
	for _, b := range r.devices() {
		if got := n.fake.readsAhead(b.Number); got != 0 {
			t.Errorf("loop%d reads %d ahead", b.Number, got)
		}
	}
	n.must(v.unpublish("reader"))
	if got := n.fake.readsAhead(r.ReadDevice.Number); got != fakeReadAhead {
		t.Errorf("the reader's number keeps %d", got)
	}
	v.down("writer")
}

// The limits of a pod that loses a volume are taken off when no record tells of its
// target any more: the work in the background would set them again from that.
func TestLimitsStayOff(t *testing.T) {
	n := newFake(t)
	v := n.create("a", 16*mib, mountCap("ext4", oneWriter), map[string]string{"readIOPS": "500"}).up("one")
	dev, off := v.device(), 0
	n.pods.mu.Lock()
	n.pods.see = func(l cgroup.Limits) {
		if l.ReadIOPS == nil || *l.ReadIOPS != 0 {
			return
		}
		off++
		if r, _ := n.d.state.get(v.id); len(r.Targets) > 0 {
			t.Errorf("taken off while the record has %v", r.Targets)
		}
	}
	n.pods.mu.Unlock()
	n.must(v.unpublish("one"))
	if off != 1 {
		t.Errorf("taken off %d times", off)
	}
	v.limits("one", dev, map[string]string{})
	v.down()
}

// A pod's cgroup that comes after the publication is found.
func TestLimitsOfAStartingPod(t *testing.T) {
	n := newFake(t)
	n.pods.set(nil, "late")
	v := n.create("a", 16*mib, mountCap("ext4", oneWriter), map[string]string{"readIOPS": "500"}).up("late")
	if diff := cmp.Diff([]string{reasonTable[reasonNotTuned].word}, v.reasons()); diff != "" {
		t.Error(diff)
	}
	n.pods.set(nil)
	want := map[string]string{"riops": "500"}
	deadline, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for !cmp.Equal(want, n.pods.of("late", v.device())) {
		select {
		case <-deadline.Done():
			t.Fatal("the pod was never limited")
		case <-time.After(10 * time.Millisecond):
		}
	}
	v.down("late")
}

// Where nothing can be limited the change is recorded, and the health says so.
func TestLimitsWhereThereAreNone(t *testing.T) {
	n := newFake(t)
	v := n.create("a", 16*mib, mountCap("ext4", oneWriter), nil).up("one")
	n.pods.set(fmt.Errorf("%w: version 1", cgroup.ErrUnsupported))
	n.must(v.modify(map[string]string{"readIOPS": "500"}))
	if diff := cmp.Diff(image.Tuning{ReadIOPS: new(int64(500))}, v.tuning()); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{reasonTable[reasonNotTuned].word}, v.reasons()); diff != "" {
		t.Error(diff)
	}
	n.pods.set(nil)
	n.fake.failOnce("readahead", errors.New("read-only sysfs"))
	n.must(v.modify(map[string]string{"readAhead": "0"}))
	if diff := cmp.Diff([]string{reasonTable[reasonNotTuned].word}, v.reasons()); diff != "" {
		t.Error(diff)
	}
	n.must(v.modify(map[string]string{"readAhead": "0"}))
	if got := v.reasons(); len(got) > 0 {
		t.Errorf("in force, and still told: %v", got)
	}
	v.down("one")
}

// A read-ahead that could not be set stays a problem when the limits are in force, does
// not keep them from being so, and is tried again.
func TestReadAheadIsTriedAgain(t *testing.T) {
	n := newFake(t)
	v := n.create("a", 16*mib, mountCap("ext4", oneWriter), nil).up("one")
	n.fake.failOnce("readahead", errors.New("read-only sysfs"))
	n.must(v.modify(map[string]string{"readAhead": "0", "readIOPS": "500"}))
	if diff := cmp.Diff(map[string]string{"riops": "500"}, n.pods.of("one", v.device())); diff != "" {
		t.Error(diff)
	}
	n.d.applyLimits(t.Context(), v.id)
	if diff := cmp.Diff([]string{reasonTable[reasonNotTuned].word}, v.reasons()); diff != "" {
		t.Error(diff)
	}
	n.d.limitAll(t.Context())
	if got := v.reasons(); len(got) > 0 {
		t.Errorf("in force, and still told: %v", got)
	}
	v.down("one")
}

func TestModifyOfWhatIsNotThere(t *testing.T) {
	n := newFake(t)
	code(t, volume{n: n}.modify(nil), codes.InvalidArgument)
	code(t, volume{n: n, id: "nonsense"}.modify(nil), codes.NotFound)
	code(t, volume{n: n, id: "aaaaaaaaaaaaaaaaaaaa.a"}.modify(nil), codes.Unavailable)
}

func TestMutableParametersAtCreation(t *testing.T) {
	n := newFake(t)
	req := &csi.CreateVolumeRequest{
		Name: "a", VolumeCapabilities: []*csi.VolumeCapability{mountCap("ext4", oneWriter)}, CapacityRange: &csi.CapacityRange{RequiredBytes: 16 * mib},
		Parameters: map[string]string{"readIOPS": "100", "writeIOPS": "100"}, MutableParameters: map[string]string{"readIOPS": "200"},
	}
	create := func() (volume, error) {
		resp, err := n.ctrl.CreateVolume(t.Context(), req)
		return volume{n: n, id: resp.GetVolume().GetVolumeId(), cap: req.GetVolumeCapabilities()[0]}, err
	}
	v, err := create()
	n.must(err)
	want := image.Tuning{ReadIOPS: new(int64(200)), WriteIOPS: new(int64(100))}
	if diff := cmp.Diff(want, v.tuning()); diff != "" {
		t.Error(diff)
	}
	n.must(v.modify(map[string]string{"writeIOPS": "max"}))
	// Repeated, the request sets its mutable parameters, and not those of the class.
	req.MutableParameters = map[string]string{"readIOPS": "300"}
	_, err = create()
	n.must(err)
	want = image.Tuning{ReadIOPS: new(int64(300)), WriteIOPS: new(int64(0))}
	if diff := cmp.Diff(want, v.tuning()); diff != "" {
		t.Error(diff)
	}
	req.Name, req.MutableParameters = "b", map[string]string{"colour": "red"}
	_, err = create()
	code(t, err, codes.InvalidArgument)

	// A copy has what its own request says.
	req.MutableParameters = map[string]string{"readBandwidth": "1Mi"}
	req.Parameters = map[string]string{"allocation": "thin"}
	req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: v.id}}}
	copied, err := create()
	n.must(err)
	if diff := cmp.Diff(image.Tuning{ReadBandwidth: new(int64(1 << 20))}, copied.tuning()); diff != "" {
		t.Error(diff)
	}
	req.MutableParameters = map[string]string{"readBandwidth": "2Mi"}
	_, err = create()
	n.must(err)
	if diff := cmp.Diff(image.Tuning{ReadBandwidth: new(int64(2 << 20))}, copied.tuning()); diff != "" {
		t.Error(diff)
	}
	n.must(copied.delete())
	n.must(v.delete())
}

// What is wrong with volumes that are not staged any more is not kept for ever.
func TestTuningOfUnstagedVolumesIsForgotten(t *testing.T) {
	n := newFake(t)
	n.pods.set(fmt.Errorf("%w: version 1", cgroup.ErrUnsupported))
	v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), map[string]string{"readIOPS": "1000"}).up("a")
	if n.d.tuning.problem(v.id) == "" {
		t.Fatal("nothing is wrong: the test shows nothing")
	}
	n.must(v.unpublish("a"))
	n.must(v.unstage())
	if text := n.d.tuning.problem(v.id); text != "" {
		t.Error(text)
	}
	n.must(v.delete())
}

// hang has the kernel hold up what is set for a pod, until the returned function is called.
// It tells of each that hangs.
func (p *fakePods) hang(uid string) (held <-chan struct{}, end func()) {
	told, over := make(chan struct{}, 100), make(chan struct{})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hold = func(asked string) {
		if asked == uid {
			told <- struct{}{}
			<-over
		}
	}
	return told, sync.OnceFunc(func() { close(over) })
}

// within fails the test when something takes longer than anything but a hang does.
func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatalf("%s hangs", what)
	}
}

// The kernel holds a change of io.max up until the device has answered all it was asked,
// never on a pool that hangs. The volumes of others go on, in calls and in the background,
// the volume itself can be unstaged, and the driver ends.
func TestLimitsThatHang(t *testing.T) {
	for _, background := range []bool{false, true} {
		n := newFake(t)
		limited := map[string]string{"readIOPS": "500"}
		a := n.create("a", 16*mib, mountCap("ext4", manyWriters), limited).up("one")
		b := n.create("b", 16*mib, mountCap("ext4", manyWriters), limited).up("two")
		held, end := n.pods.hang("one")
		defer end()
		modified := make(chan error, 1)
		if background {
			n.d.tuning.hurry()
			modified <- nil
		} else {
			go func() { modified <- a.modify(map[string]string{"readIOPS": "600"}) }()
		}
		within(t, "the first change", func() { <-held })
		within(t, "modifying another volume", func() { n.must(b.modify(map[string]string{"readIOPS": "700"})) })
		b.limits("two", b.device(), map[string]string{"riops": "700"})
		n.pods.mu.Lock()
		n.pods.limits = make(map[string]map[string]string) // made anew by the kubelet
		n.pods.mu.Unlock()
		within(t, "the work in the background", func() { n.d.limitAll(t.Context()) })
		b.limits("two", b.device(), map[string]string{"riops": "700"})
		within(t, "unstaging another volume", func() { b.down("two") })
		// It is gone, as its pod, and its record is; what hangs knows nothing of that.
		within(t, "forgetting the volume", func() { n.d.tuning.forget(a.id) })
		if background {
			within(t, "the end of the driver", n.halt)
			end()
			n.start()
			a.n = n
		}
		end()
		n.must(<-modified)
		a.down("one")
	}
}

// What a change that took long finds wrong with a volume that is unstaged by then is not kept.
func TestLimitsThatEndAfterTheUnstage(t *testing.T) {
	n := newFake(t)
	a := n.create("a", 16*mib, mountCap("ext4", manyWriters), map[string]string{"readIOPS": "500"}).up("one")
	held, end := n.pods.hang("one")
	defer end()
	done := make(chan struct{})
	go func() {
		defer close(done)
		n.d.applyLimits(t.Context(), a.id)
	}()
	<-held
	before, _ := n.d.state.get(a.id)
	n.must(n.d.state.drop(a.id))
	n.d.tuning.forget(a.id)
	n.pods.set(errors.New("the device is gone"))
	end()
	<-done
	if text := n.d.tuning.problem(a.id); text != "" {
		t.Error(text)
	}
	n.pods.set(nil)
	n.must(n.d.state.put(before))
	a.down("one")
}
