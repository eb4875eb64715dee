package driver

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/pkg/mount"
)

// fakeTrimmer has filesystems of 1 GiB that take as long as the test wants.
type fakeTrimmer struct {
	mu    sync.Mutex
	parts []mount.TrimSpec // guarded by mu
	// If not nil, a part tells that it begins and waits.
	begun, goOn chan struct{}
	fail        error
}

func (f *fakeTrimmer) Trim(_ context.Context, s mount.TrimSpec) (int64, error) {
	f.mu.Lock()
	f.parts = append(f.parts, s)
	f.mu.Unlock()
	if f.begun != nil {
		f.begun <- struct{}{}
		<-f.goOn
	}
	switch {
	case f.fail != nil:
		return 0, f.fail
	case s.Start >= 1<<30:
		return 0, mount.ErrRange
	}
	return 1000, nil
}

func (f *fakeTrimmer) starts() []uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []uint64
	for _, p := range f.parts {
		all = append(all, p.Start)
	}
	return all
}

// trimming is a node with a fake trimmer and one volume in use of each kind; only "thin"
// is to be trimmed.
func trimming(t *testing.T) (n *node, f *fakeTrimmer, v volume, end func()) {
	t.Helper()
	n, f = newFake(t), &fakeTrimmer{}
	n.d.trimmer, n.d.load = f, func(context.Context, int) string { return "" }
	n.d.cfg.TrimInterval, n.d.cfg.TrimJitter = time.Hour, time.Minute
	thin := map[string]string{"allocation": "thin"}
	v = n.create("thin", 1<<30, mountCap("ext4", oneWriter), thin)
	staged := []volume{
		v, n.create("thick", 8*mib, mountCap("ext4", oneWriter), nil), n.create("raw", 8*mib, blockCap(oneWriter), thin),
		n.create("reader", 8*mib, mountCap("ext4", reader), thin),
	}
	for _, v := range staged {
		n.must(v.stage())
	}
	n.create("unstaged", 8*mib, mountCap("ext4", oneWriter), thin)
	return n, f, v, func() {
		for _, v := range staged {
			n.must(v.unstage())
		}
	}
}

// later makes what was seen due.
func (n *node) later(now time.Time, by time.Duration) time.Time {
	n.d.trimDue(n.t.Context(), now)
	return now.Add(by)
}

func TestThinVolumesAreTrimmedEachInterval(t *testing.T) {
	n, f, v, end := trimming(t)
	defer end()
	now := time.Now()
	n.d.trimDue(t.Context(), now)
	if len(f.starts()) > 0 {
		t.Errorf("trimmed at the first sight: %d", f.starts())
	}
	now = now.Add(time.Hour)
	n.d.trimDue(t.Context(), now)
	starts := f.starts()
	if len(starts) < 3 || starts[0] != 0 || !slices.IsSorted(starts) || slices.ContainsFunc(f.parts, func(p mount.TrimSpec) bool { return p.Path != v.staging() }) {
		t.Errorf("parts: %+v", f.parts)
	}
	for i, p := range f.parts[:len(f.parts)-1] {
		if p.Start+p.Length < f.parts[i+1].Start {
			t.Errorf("a gap after %+v", p)
		}
	}
	if s := n.d.TrimStats(); s.Done != 1 || s.Failed != 0 || s.Bytes == 0 {
		t.Errorf("stats: %+v", s)
	}
	n.d.trimDue(t.Context(), now.Add(59*time.Minute))
	if s := n.d.TrimStats(); s.Done != 1 {
		t.Error("trimmed before the interval is over")
	}
	n.d.trimDue(t.Context(), now.Add(61*time.Minute))
	if s := n.d.TrimStats(); s.Done != 2 {
		t.Error("not trimmed after interval and jitter")
	}
}

func TestTrimWaitsUnderLoadAndGoesOn(t *testing.T) {
	n, f, _, end := trimming(t)
	defer end()
	now := n.later(time.Now(), time.Hour)
	parts := 0
	n.d.load = func(context.Context, int) string {
		if parts++; parts > 2 {
			return "others are at work"
		}
		return ""
	}
	n.d.trimDue(t.Context(), now)
	if got := f.starts(); len(got) != 2 || n.d.TrimStats().Deferred != 1 || n.d.TrimStats().Done != 0 {
		t.Fatalf("parts %d, stats %+v", got, n.d.TrimStats())
	}
	n.d.load = func(context.Context, int) string { return "" }
	n.d.trimDue(t.Context(), now.Add(time.Minute))
	if got := f.starts(); len(got) < 3 || got[2] <= got[1] || n.d.TrimStats().Done != 1 {
		t.Errorf("it began anew: parts %d, stats %+v", got, n.d.TrimStats())
	}
}

// TestUnstageWaitsForOnePartOfATrim, and for no more; and a trim does not begin while a
// volume is on its way out.
func TestUnstageWaitsForOnePartOfATrim(t *testing.T) {
	n, f, v, end := trimming(t)
	defer end()
	f.begun, f.goOn = make(chan struct{}), make(chan struct{})
	now := n.later(time.Now(), time.Hour)
	over := make(chan struct{})
	go func() {
		defer close(over)
		n.d.trimDue(t.Context(), now)
	}()
	<-f.begun
	unstaged := make(chan error, 1)
	go func() { unstaged <- v.unstage() }()
	for n.d.trims.isHeld(v.id) == 0 {
		time.Sleep(time.Millisecond)
	}
	select {
	case err := <-unstaged:
		t.Fatalf("it unmounts while a part is trimmed: %v", err)
	default:
	}
	close(f.goOn)
	<-over
	n.must(<-unstaged)
	if got := f.starts(); len(got) != 1 {
		t.Errorf("it went on: %d", got)
	}
	if s := n.d.TrimStats(); s != (TrimStats{}) {
		t.Errorf("stats: %+v", s)
	}
	f.begun = nil
	n.must(v.stage()) // and what was held is free again
	now = n.later(now, 2*time.Hour)
	n.d.trimDue(t.Context(), now)
	if s := n.d.TrimStats(); s.Done == 0 {
		t.Errorf("staged again it is not trimmed: %+v", s)
	}
}

// A trim of a frozen filesystem would wait in the kernel, where nothing ends it.
func TestNothingIsTrimmedWhileItIsFrozen(t *testing.T) {
	n, f, v, end := trimming(t)
	defer end()
	f.begun, f.goOn = make(chan struct{}), make(chan struct{})
	now := n.later(time.Now(), time.Hour)
	over := make(chan struct{})
	go func() {
		defer close(over)
		n.d.trimDue(t.Context(), now)
	}()
	<-f.begun
	cut := make(chan error, 1)
	go func() {
		_, err := v.snapshot("meanwhile", "copyInUse", "true")
		cut <- err
	}()
	for n.d.trims.isHeld(v.id) == 0 {
		select {
		case err := <-cut:
			t.Fatalf("the snapshot did not wait for the trim: %v", err)
		default:
			time.Sleep(time.Millisecond)
		}
	}
	close(f.goOn)
	<-over
	n.must(<-cut)
	if got := f.starts(); len(got) != 1 {
		t.Errorf("the trim went on: %d", got)
	}
	if held := n.d.trims.isHeld(v.id); held != 0 {
		t.Errorf("held %d times after the snapshot", held)
	}
}

func (t *trims) isHeld(id string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.held[id]
}

func TestTrimThatFailsIsCountedAndTriedNextTime(t *testing.T) {
	n, f, _, end := trimming(t)
	defer end()
	f.fail = errors.New("no discards here")
	now := n.later(time.Now(), time.Hour)
	n.d.trimDue(t.Context(), now)
	n.d.trimDue(t.Context(), now.Add(time.Minute))
	if s := n.d.TrimStats(); s.Failed != 1 || s.Done != 0 {
		t.Errorf("stats: %+v", s)
	}
}

// TestTrimIsAParameter: a volume that is not to be trimmed is not, from the part after
// the one at hand on; one that is again, is so within an interval.
func TestTrimIsAParameter(t *testing.T) {
	n, f, v, end := trimming(t)
	defer end()
	f.begun, f.goOn = make(chan struct{}), make(chan struct{})
	now := n.later(time.Now(), time.Hour)
	over := make(chan struct{})
	go func() {
		defer close(over)
		n.d.trimDue(t.Context(), now)
	}()
	<-f.begun
	n.must(v.modify(map[string]string{"trim": "false"}))
	close(f.goOn)
	<-over
	f.begun = nil
	if got := f.starts(); len(got) != 1 {
		t.Fatalf("it went on: %d", got)
	}
	now = n.later(now, 3*time.Hour)
	n.d.trimDue(t.Context(), now)
	if got := f.starts(); len(got) != 1 || n.d.TrimStats() != (TrimStats{}) {
		t.Fatalf("trimmed though it is off: %d, %+v", got, n.d.TrimStats())
	}
	n.must(v.modify(map[string]string{"readAhead": "1Mi"})) // what is not named stays
	n.d.trimDue(t.Context(), now.Add(2*time.Hour))
	if got := f.starts(); len(got) != 1 {
		t.Fatalf("trimmed after another change: %d", got)
	}
	n.must(v.modify(map[string]string{"trim": "true"}))
	now = n.later(now.Add(2*time.Hour), time.Hour)
	n.d.trimDue(t.Context(), now)
	if got := f.starts(); len(got) < 4 || got[1] != 0 || n.d.TrimStats().Done != 1 {
		t.Errorf("on again: parts %d, %+v", got, n.d.TrimStats())
	}
}

// TestTrimIsOfThinVolumes: true is refused where it would mean nothing.
func TestTrimIsOfThinVolumes(t *testing.T) {
	n := newFake(t)
	thick := n.create("thick", 8*mib, mountCap("ext4", oneWriter), nil)
	if err := thick.modify(map[string]string{"trim": "true", "readAhead": "1Mi"}); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), thick.id) {
		t.Errorf("modified: %v", err)
	}
	if got := thick.tuning(); !got.IsZero() {
		t.Errorf("a refused change left %v", got)
	}
	n.must(thick.modify(map[string]string{"trim": "false"}))
	_, err := n.ctrl.CreateVolume(t.Context(), &csi.CreateVolumeRequest{
		Name: "other", CapacityRange: &csi.CapacityRange{RequiredBytes: 8 * mib},
		VolumeCapabilities: []*csi.VolumeCapability{mountCap("ext4", oneWriter)}, Parameters: map[string]string{"trim": "true"},
	})
	if status.Code(err) != codes.InvalidArgument || len(n.store.List()) != 1 {
		t.Errorf("created: %v, %v", err, n.store.List())
	}
	thin := n.create("thin", 8*mib, mountCap("ext4", oneWriter), map[string]string{"allocation": "thin", "trim": "false"})
	if got := thin.tuning(); got.Trim == nil || *got.Trim {
		t.Errorf("made with %v", got)
	}
}

func TestTrimIsOffWithoutAnInterval(t *testing.T) {
	n, f, _, end := trimming(t)
	defer end()
	n.d.cfg.TrimInterval = 0
	n.d.KeepTrimmed(t.Context()) // returns
	if got := f.starts(); len(got) != 0 {
		t.Error(got)
	}
}

func TestLoadFigures(t *testing.T) {
	for text, want := range map[string]float64{
		"some avg10=12.34 avg60=0.00 avg300=0.00 total=1\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=1\n": 12.34,
		"full avg10=99.00 avg60=0.00\n": -1, "some total=1\n": -1, "": -1, "some avg10=x": -1,
	} {
		if got, ok := parsePressure(text); ok != (want >= 0) || ok && got != want {
			t.Errorf("parsePressure(%q) = %v, %v", text, got, ok)
		}
	}
	for text, want := range map[string]float64{"2.50 0.58 0.59 1/467 21713\n": 2.5, "": -1, "x": -1} {
		if got, ok := parseLoad(text); ok != (want >= 0) || ok && got != want {
			t.Errorf("parseLoad(%q) = %v, %v", text, got, ok)
		}
	}
}
