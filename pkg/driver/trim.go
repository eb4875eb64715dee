package driver

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// trimmer trims a part of a filesystem; *mount.Mounter does.
type trimmer interface {
	Trim(ctx context.Context, s mount.TrimSpec) (int64, error)
}

const (
	// trimLook is how often it is looked whether a volume is due, at most.
	trimLook = time.Minute
	// trimPart is the first part of a filesystem that is trimmed, and the smallest: ext4
	// rounds to groups of that size.
	trimPart = 128 << 20
	// mostTrimPart is the largest: what comes after a long stretch that takes no time may
	// take much.
	mostTrimPart = 4 << 30
	// trimTime is about what the trimming of one part may take, which is how long the end
	// of a staging waits for it.
	trimTime = 50 * time.Millisecond
)

// trims is the trimming of thin volumes in the background: their images give back what
// the filesystems in them do not use any more. One volume at a time, part by part.
type trims struct {
	mu sync.Mutex
	// All below is guarded by mu.
	volume string             // being trimmed, or ""
	cancel context.CancelFunc // ends that
	ended  chan struct{}      // closed when it has ended
	held   map[string]int     // volumes that may not be trimmed now
	due    map[string]trimDue
	stats  TrimStats
}

// trimDue is when a volume is trimmed next, and from where if it was interrupted.
type trimDue struct {
	at            time.Time
	next, trimmed int64
}

// TrimStats counts what became of trims since the start.
type TrimStats struct {
	Done     int64
	Deferred int64 // times that a trim was put off, or interrupted, because of load
	Failed   int64
	Bytes    int64 // what filesystems said they do not use
}

// TrimStats tells what the trimming in the background did so far.
func (d *Driver) TrimStats() TrimStats {
	d.trims.mu.Lock()
	defer d.trims.mu.Unlock()
	return d.trims.stats
}

func newTrims() *trims { return &trims{held: map[string]int{}, due: map[string]trimDue{}} }

// hold ends a trim of the volume and keeps it from being trimmed until release. It waits
// for the part at hand: until then the filesystem cannot be unmounted.
func (t *trims) hold(ctx context.Context, id string) (release func(), err error) {
	t.mu.Lock()
	t.held[id]++
	var ended chan struct{}
	if t.volume == id {
		t.cancel()
		ended = t.ended
	}
	t.mu.Unlock()
	release = func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.held[id]--; t.held[id] == 0 {
			delete(t.held, id)
		}
	}
	if ended == nil {
		return release, nil
	}
	select {
	case <-ended:
		return release, nil
	case <-ctx.Done():
		release()
		return nil, ctx.Err()
	}
}

// begin takes the turn to trim a volume, unless it is held. There is one turn.
func (t *trims) begin(ctx context.Context, id string) (_ context.Context, end func(), ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.volume != "" || t.held[id] > 0 {
		return nil, nil, false
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	t.volume, t.cancel, t.ended = id, cancel, ended
	return ctx, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.volume = ""
		cancel()
		close(ended)
	}, true
}

// KeepTrimmed trims the filesystems of thin volumes, each once per interval, until ctx
// ends. Nothing waits for it but the end of a staging, for a part of a trim.
func (d *Driver) KeepTrimmed(ctx context.Context) {
	if d.cfg.TrimInterval <= 0 {
		return
	}
	tick := time.NewTicker(min(trimLook, max(d.cfg.TrimInterval/4, 10*time.Millisecond)))
	defer tick.Stop()
	for {
		d.trimDue(ctx, time.Now())
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// trimDue trims the volumes that are due, those that are so for longest first.
func (d *Driver) trimDue(ctx context.Context, now time.Time) {
	records := d.dueRecords(now)
	for _, r := range records {
		if ctx.Err() != nil {
			return
		}
		d.trimVolume(klog.NewContext(ctx, klog.FromContext(ctx).WithValues("volume", r.VolumeID)), r, now)
	}
}

// dueRecords lists what is due. A volume that is seen for the first time is due within
// an interval, at random: neither are all of them after a start, nor never on a node
// where csi-loop is restarted often.
func (d *Driver) dueRecords(now time.Time) []stageRecord {
	var candidates []stageRecord
	for _, r := range d.state.list() {
		if !r.Block && !r.ReadOnly && r.Mapped == nil && !r.Device.none() && d.isTrimmed(r) {
			candidates = append(candidates, r)
		}
	}
	t := d.trims
	t.mu.Lock()
	defer t.mu.Unlock()
	maps.DeleteFunc(t.due, func(id string, _ trimDue) bool {
		return !slices.ContainsFunc(candidates, func(r stageRecord) bool { return r.VolumeID == id })
	})
	for _, r := range candidates {
		if _, ok := t.due[r.VolumeID]; !ok {
			t.due[r.VolumeID] = trimDue{at: now.Add(upTo(d.cfg.TrimInterval))}
		}
	}
	candidates = slices.DeleteFunc(candidates, func(r stageRecord) bool { return t.due[r.VolumeID].at.After(now) })
	slices.SortFunc(candidates, func(a, b stageRecord) int { return t.due[a.VolumeID].at.Compare(t.due[b.VolumeID].at) })
	return candidates
}

// upTo is a random time.
func upTo(most time.Duration) time.Duration {
	if most <= 0 {
		return 0
	}
	return rand.N(most) //nolint:gosec // nobody gains by guessing it
}

// isTrimmed tells whether the volume is one to trim: thin, and not excepted by its
// parameter.
func (d *Driver) isTrimmed(r stageRecord) bool {
	if r.Ephemeral {
		v, ok := d.images.Find(r.VolumeID)
		return ok && v.Allocation == image.Thin
	}
	v, err := d.images.Get(r.VolumeID)
	return err == nil && v.Allocation == image.Thin && (!v.Encrypted() || v.Encryption.Discard) && (v.Tuning.Trim == nil || *v.Tuning.Trim)
}

// trimVolume trims one volume, from where it was interrupted. Under load it is due again
// at the next look.
func (d *Driver) trimVolume(ctx context.Context, r stageRecord, now time.Time) {
	logger := klog.FromContext(ctx)
	began := time.Now()
	d.trims.mu.Lock()
	due := d.trims.due[r.VolumeID]
	d.trims.mu.Unlock()
	load, err := d.trimParts(ctx, r, &due)
	d.trims.mu.Lock()
	defer d.trims.mu.Unlock()
	d.trims.due[r.VolumeID] = due
	switch {
	case load != "":
		d.trims.stats.Deferred++
		logger.V(2).Info("A trim is put off", "reason", load, "done", due.next)
		return
	case errors.Is(err, context.Canceled), errors.Is(err, errTrimHeld), errors.Is(err, errTrimOff):
		return // it is being unstaged, is not to be trimmed any more, or this is a stop
	case err != nil:
		d.trims.stats.Failed++
		logger.Error(err, "A thin volume could not be trimmed")
	default:
		d.trims.stats.Done++
		d.trims.stats.Bytes += due.trimmed
		logger.Info("Trimmed a thin volume", "unused", due.trimmed, "took", time.Since(began).Round(time.Millisecond))
	}
	d.trims.due[r.VolumeID] = trimDue{at: now.Add(d.cfg.TrimInterval + upTo(d.cfg.TrimJitter))}
}

var (
	errTrimHeld = errors.New("the volume is being unstaged")
	errTrimOff  = errors.New("the volume is not to be trimmed any more")
)

// trimParts trims part by part and keeps in due how far it came. It ends when there is
// load, and says which.
func (d *Driver) trimParts(ctx context.Context, r stageRecord, due *trimDue) (load string, err error) {
	ctx, end, ok := d.trims.begin(ctx, r.VolumeID)
	if !ok {
		return "", errTrimHeld
	}
	defer end()
	if _, err := d.table.Status(ctx, r.Device.ref()); err != nil {
		return "", err
	}
	for length := int64(trimPart); due.next >= 0; {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		if !d.isTrimmed(r) {
			return "", errTrimOff
		}
		if load := d.load(ctx, r.Device.Number); load != "" {
			return load, nil
		}
		part := mount.TrimSpec{Path: r.StagingPath, Device: r.Device.Device, Start: uint64(due.next), Length: uint64(length)}
		began := time.Now()
		n, err := d.trimmer.Trim(ctx, part)
		switch {
		case errors.Is(err, mount.ErrRange):
			due.next = -1
			continue
		case err != nil:
			return "", err
		}
		due.trimmed += n
		due.next += length
		length = nextPart(length, time.Since(began))
	}
	return "", nil
}

// nextPart is how much to trim at once, when length bytes took so long.
func nextPart(length int64, took time.Duration) int64 {
	switch {
	case took < trimTime/4:
		return min(2*length, mostTrimPart)
	case took > trimTime:
		return max(trimPart, int64(float64(length)*float64(trimTime)/float64(took)))
	}
	return length
}
