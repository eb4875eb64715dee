package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/cgroup"
	"github.com/csi-loop/csi-loop/pkg/image"
)

const (
	// podUIDKey is set by Kubernetes in the context of a publication.
	podUIDKey = kubernetesPrefix + "pod.uid"
	// limitsEvery is how often the limits of pods are looked at: the kubelet and
	// systemd may make a cgroup anew.
	limitsEvery = 10 * time.Second
	// limitsSoon is when to look again for the cgroup of a pod that is starting.
	limitsSoon = 200 * time.Millisecond
	// limitsPatience is how long the worker waits for one volume. The kernel holds a change
	// up until the device has answered what it was asked before: not at all, on a pool that
	// hangs.
	limitsPatience = time.Second
)

// tuningState is what the driver knows of tuning that is not in force, and the
// worker that sees to it.
type tuningState struct {
	kick chan struct{} // a pod's cgroup is awaited
	stop context.CancelFunc
	done chan struct{}

	mu sync.Mutex
	// All below is guarded by mu.
	problems map[string]map[string]string // by volume ID and part
	turns    map[string]*tuningTurn       // by volume ID, while somebody has or awaits one
	looking  map[string]bool              // volumes that the worker looks at, or left behind
}

// tuningTurn is the turn to apply the limits of a volume.
type tuningTurn struct {
	taken chan struct{} // full while somebody has it
	users int           // guarded by tuningState.mu
}

func newTuningState() *tuningState {
	return &tuningState{
		kick: make(chan struct{}, 1), problems: make(map[string]map[string]string),
		turns: make(map[string]*tuningTurn), looking: make(map[string]bool),
	}
}

// turn is held from reading what a volume's limits are to the end of making them so, so that
// an older word never comes last. Each volume has its own: the kernel may hold one up for
// as long as its pool hangs. Lock order: the volume lock, then this one, then nodeState.mu.
func (s *tuningState) turn(ctx context.Context, id string) (end func(), err error) {
	s.mu.Lock()
	t := s.turns[id]
	if t == nil {
		t = &tuningTurn{taken: make(chan struct{}, 1)}
		s.turns[id] = t
	}
	t.users++
	s.mu.Unlock()
	leave := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if t.users--; t.users == 0 {
			delete(s.turns, id)
		}
	}
	select {
	case t.taken <- struct{}{}:
		return func() {
			<-t.taken
			leave()
		}, nil
	case <-ctx.Done():
		leave()
		return nil, fmt.Errorf("an earlier change of the limits has not ended: %w", ctx.Err())
	}
}

// ControllerModifyVolume changes mutable parameters of a volume, in use or not. The
// change is durable when the call succeeds, and in force where the kernel can: what
// is not is in the volume's health.
func (s *controllerServer) ControllerModifyVolume(ctx context.Context, req *csi.ControllerModifyVolumeRequest) (*csi.ControllerModifyVolumeResponse, error) {
	d, id := s.d, req.GetVolumeId()
	if id == "" {
		return nil, invalidf("volume_id is missing")
	}
	change, err := parseMutable(req.GetMutableParameters())
	if err != nil {
		return nil, err
	}
	unlock, err := d.lockVolume(id, "ControllerModifyVolume")
	if err != nil {
		return nil, err
	}
	defer unlock()
	v, err := d.volume(id)
	if err != nil {
		return nil, err
	}
	if v.Ephemeral != nil {
		return nil, preconditionf("volume %q is the inline ephemeral volume of a pod and cannot be modified", id)
	}
	if _, err := d.tune(ctx, v, change); err != nil {
		return nil, err
	}
	return &csi.ControllerModifyVolumeResponse{}, nil
}

// tune sets what is set in change, durably, and makes it so where the volume is used.
// Precondition: the caller holds the volume's lock.
func (d *Driver) tune(ctx context.Context, v image.Volume, change image.Tuning) (image.Volume, error) {
	if change.IsZero() {
		return v, nil
	}
	pool, err := d.pool(v.Pool)
	if err != nil {
		return v, err
	}
	before := v.Tuning
	tuned, err := pool.Tune(ctx, v.ID, change)
	if err != nil {
		return v, fmt.Errorf("modify volume %q: %w", v.ID, err)
	}
	v = tuned
	if !v.Tuning.Equal(before) {
		klog.FromContext(ctx).Info("Modified volume", "volume", v.ID, "tuning", v.Tuning.String())
	}
	d.applyTuning(ctx, v.ID)
	return v, nil
}

// applyTuning makes a volume's tuning so on its devices and for its pods. What cannot
// be done is noted, and fails no call: the volume is usable without.
// Precondition: the caller holds the volume's lock, or no call is served yet.
func (d *Driver) applyTuning(ctx context.Context, id string) {
	v, err := d.images.Get(id)
	if err != nil || v.Tuning.IsZero() {
		return
	}
	d.applyReadAhead(ctx, v)
	if d.applyLimits(ctx, id) {
		d.tuning.hurry()
	}
}

// applyReadAhead makes the read-ahead of a volume so.
// Precondition: the caller holds the volume's lock, or no call is served yet.
func (d *Driver) applyReadAhead(ctx context.Context, v image.Volume) {
	err := d.setReadAhead(ctx, v.ID, v.Tuning.ReadAhead)
	if err != nil {
		err = fmt.Errorf("read-ahead: %w", err)
	}
	d.tuning.note(ctx, v.ID, readAheadPart, err)
}

// retryReadAhead is applyReadAhead where it failed before, unless a call works on the
// volume.
func (d *Driver) retryReadAhead(ctx context.Context, id string) {
	if !d.tuning.failed(id, readAheadPart) {
		return
	}
	unlock, err := d.lockVolume(id, "read-ahead")
	if err != nil {
		return
	}
	defer unlock()
	if v, err := d.images.Get(id); err == nil {
		d.applyReadAhead(ctx, v)
	}
}

// applyLimits makes the limits of a volume hold for the pods that it is published to.
// It says whether the cgroup of one of them is still awaited.
func (d *Driver) applyLimits(ctx context.Context, id string) (awaited bool) {
	end, err := d.tuning.turn(ctx, id)
	if err != nil {
		d.tuning.note(ctx, id, limitsPart, fmt.Errorf("limits: %w", err))
		return false
	}
	defer end()
	v, err := d.images.Get(id)
	r, ok := d.state.get(id)
	if err != nil || !ok {
		d.tuning.note(ctx, id, limitsPart, nil)
		return false
	}
	err = d.limitPods(r, limitsOf(v.Tuning))
	d.tuning.note(ctx, id, limitsPart, err)
	if _, ok := d.state.get(id); !ok {
		d.tuning.forget(id) // unstaged meanwhile, which may have forgotten before the note
	}
	return errors.Is(err, cgroup.ErrNoPod)
}

// limitPods limits each pod at whose target the volume is.
func (d *Driver) limitPods(r stageRecord, l cgroup.Limits) error {
	if l.None() {
		return nil
	}
	var errs []error
	for _, path := range slices.Sorted(maps.Keys(r.Targets)) {
		t := r.Targets[path]
		uid := or(t.PodUID, podUIDOf(nil, path))
		if uid == "" {
			errs = append(errs, fmt.Errorf("limits: nothing says which pod has the volume at %q (context key %s)", path, podUIDKey))
			continue
		}
		if err := d.pods.Limit(uid, deviceNumbers(t.Device), l); err != nil {
			errs = append(errs, fmt.Errorf("limits: %w", err))
		}
	}
	return errors.Join(errs...)
}

// unlimit takes the limits off a pod that loses the volume, since the number of its
// device may show another volume while the pod ends. A pod that is gone needs none of it.
func (d *Driver) unlimit(ctx context.Context, r stageRecord, path string) {
	v, err := d.images.Get(r.VolumeID)
	t, ok := r.Targets[path]
	if err != nil || !ok || limitsOf(v.Tuning).None() {
		return
	}
	uid := or(t.PodUID, podUIDOf(nil, path))
	for other, o := range r.Targets {
		if other != path && or(o.PodUID, podUIDOf(nil, other)) == uid && o.Device == t.Device {
			return // it has the volume at another place as well
		}
	}
	end, err := d.tuning.turn(ctx, r.VolumeID)
	if err != nil {
		klog.FromContext(ctx).V(2).Info("Limits stay with a pod that lost the volume", "volume", r.VolumeID, "pod", uid, "err", err.Error())
		return
	}
	defer end()
	off := cgroup.Limits{ReadIOPS: new(int64(0)), WriteIOPS: new(int64(0)), ReadBandwidth: new(int64(0)), WriteBandwidth: new(int64(0))}
	if err := d.pods.Limit(uid, deviceNumbers(t.Device), off); err != nil && !errors.Is(err, cgroup.ErrNoPod) {
		klog.FromContext(ctx).V(2).Info("Limits stay with a pod that lost the volume", "volume", r.VolumeID, "pod", uid, "err", err.Error())
	}
}

func limitsOf(t image.Tuning) cgroup.Limits {
	return cgroup.Limits{ReadIOPS: t.ReadIOPS, WriteIOPS: t.WriteIOPS, ReadBandwidth: t.ReadBandwidth, WriteBandwidth: t.WriteBandwidth}
}

func deviceNumbers(b binding) cgroup.Device {
	return cgroup.Device{Major: b.Major, Minor: b.Minor}
}

// podUIDOf is the pod that a publication is for: as Kubernetes says, or as the
// kubelet's paths have it (a filesystem's target is below pods/UID, that of a raw
// block device ends in UID).
func podUIDOf(context map[string]string, target string) string {
	if uid := context[podUIDKey]; uid != "" {
		return uid
	}
	if _, rest, ok := strings.Cut(target, "/pods/"); ok {
		uid, _, _ := strings.Cut(rest, "/")
		return uid
	}
	if _, rest, ok := strings.Cut(target, "/volumeDevices/publish/"); ok {
		if _, uid, ok := strings.Cut(rest, "/"); ok {
			return uid
		}
	}
	return ""
}

// setReadAhead sets what the devices of a staged volume read ahead, and remembers
// what it was before. nil leaves it.
// Precondition: the caller holds the volume's lock.
func (d *Driver) setReadAhead(ctx context.Context, id string, want *int64) error {
	r, ok := d.state.get(id)
	if want == nil || !ok {
		return nil
	}
	for _, b := range r.devices() {
		if b.encrypted() { // reads are those of the mapping, and its value ends with it
			if err := d.crypt.SetReadAhead(b.Mapping, *want); err != nil {
				return err
			}
			continue
		}
		have, err := d.tuner.ReadAhead(ctx, b.ref())
		if err != nil {
			return err
		}
		if have == *want {
			continue
		}
		if _, known := r.ReadAhead[b.Number]; !known {
			if r.ReadAhead == nil {
				r.ReadAhead = make(map[int]int64)
			}
			r.ReadAhead[b.Number] = have
			if err := ctx.Err(); err != nil { // the kernel took its time, and the driver may be closed
				return err
			}
			if err := d.state.put(r); err != nil {
				return err
			}
		}
		if err := d.tuner.SetReadAhead(ctx, b.ref(), *want); err != nil {
			return err
		}
	}
	return nil
}

// resetReadAhead sets a device that is about to go back to what it read ahead before:
// the value stays with its number, on newer kernels if it is large (fact 96). That it
// fails costs the number's next user some speed, and nothing else.
func (d *Driver) resetReadAhead(ctx context.Context, r stageRecord, b binding) {
	before, ok := r.ReadAhead[b.Number]
	if !ok || b.none() {
		return
	}
	if err := d.tuner.SetReadAhead(ctx, b.ref(), before); err != nil {
		klog.FromContext(ctx).V(2).Info("Read-ahead stays with the number of a device", "device", b.Number, "err", err.Error())
	}
}

// startTuning begins the work that keeps limits in force. The kubelet mounts a
// volume while it makes the pod's cgroup, so that may come later than the
// publication, and may be made anew.
func (d *Driver) startTuning(ctx context.Context) {
	ctx, d.tuning.stop = context.WithCancel(context.WithoutCancel(ctx))
	d.tuning.done = make(chan struct{})
	go func() {
		defer close(d.tuning.done)
		d.keepTuned(ctx)
	}()
}

// end stops the worker, if it was started. What it left behind in the kernel is not waited for.
func (s *tuningState) end() {
	if s.stop != nil {
		s.stop()
		<-s.done
	}
}

// hurry makes the worker look soon.
func (s *tuningState) hurry() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

func (d *Driver) keepTuned(ctx context.Context) {
	wait := limitsEvery
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.tuning.kick:
			wait = limitsSoon
		case <-timer.C:
			if d.limitAll(ctx) {
				wait = min(2*wait, limitsEvery)
			} else {
				wait = limitsEvery
			}
		}
		timer.Reset(wait)
	}
}

// limitAll looks at all volumes that have limits, or whose read-ahead could not be set,
// and says whether a pod's cgroup is still awaited. A volume that the kernel holds up is
// left behind, so that the others have their turn.
func (d *Driver) limitAll(ctx context.Context) (awaited bool) {
	for _, r := range d.state.list() {
		if ctx.Err() != nil {
			return false
		}
		end, ok := d.tuning.look(r.VolumeID)
		if !ok {
			continue
		}
		answer := make(chan bool, 1)
		go func() {
			defer end()
			answer <- d.limitOne(ctx, r)
		}()
		select {
		case a := <-answer:
			awaited = awaited || a
		case <-time.After(limitsPatience):
			klog.FromContext(ctx).Info("The kernel does not answer when the tuning of a volume is set: its pool may hang", "volume", r.VolumeID)
		}
	}
	return awaited
}

// look begins a look of the worker at a volume, unless an earlier one has not ended.
func (s *tuningState) look(id string) (end func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.looking[id] {
		return nil, false
	}
	s.looking[id] = true
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.looking, id)
	}, true
}

// limitOne is limitAll for one volume.
func (d *Driver) limitOne(ctx context.Context, r stageRecord) (awaited bool) {
	d.retryReadAhead(ctx, r.VolumeID)
	v, err := d.images.Get(r.VolumeID)
	if err != nil || limitsOf(v.Tuning).None() || len(r.Targets) == 0 {
		return false
	}
	return d.applyLimits(ctx, r.VolumeID)
}

// The parts of a volume's tuning that can fail each by itself.
const (
	readAheadPart = "read-ahead"
	limitsPart    = "limits"
)

// note remembers what is wrong with a part of the tuning of a volume, and logs what is
// new. A pod without a cgroup is mostly one that is starting.
func (s *tuningState) note(ctx context.Context, id, part string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.problems[id][part]
	if err == nil {
		if delete(s.problems[id], part); len(s.problems[id]) == 0 {
			delete(s.problems, id)
		}
		return
	}
	if s.problems[id] == nil {
		s.problems[id] = make(map[string]string)
	}
	s.problems[id][part] = err.Error()
	if before != err.Error() && !errors.Is(err, cgroup.ErrNoPod) {
		klog.FromContext(ctx).Info("Mutable parameters of a volume are not in force", "volume", id, "err", err.Error())
	}
}

// forget drops what is known of a volume that is staged no more: its record is gone, and
// who notes after that finds so.
func (s *tuningState) forget(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.problems, id)
}

// problem is what is wrong with the tuning of a volume, or "".
func (s *tuningState) problem(id string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []string
	for _, part := range slices.Sorted(maps.Keys(s.problems[id])) {
		all = append(all, s.problems[id][part])
	}
	return strings.Join(all, "; ")
}

// failed says whether something is wrong with a part of the tuning of a volume.
func (s *tuningState) failed(id, part string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.problems[id][part] != ""
}
