package driver

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
)

const (
	// sweepEvery is how often it is looked for inline ephemeral volumes whose pods are
	// gone, as long as there may be some.
	sweepEvery = 10 * time.Second
	// sweepRarely is how often at least, while one of them cannot be removed.
	sweepRarely = 10 * time.Minute
)

// sweeper removes inline ephemeral volumes that nobody will ask for any more: those of
// pods that went while csi-loop or the node was down, or while the pool was absent.
type sweeper struct {
	every time.Duration // sweepEvery but in tests
	stop  context.CancelFunc
	done  chan struct{}

	mu    sync.Mutex      // held during a sweep
	swept map[string]bool // by pool ID: each of its volumes has its pod; guarded by mu
}

// startSweeping begins to look, until end.
func (d *Driver) startSweeping(ctx context.Context) {
	ctx, d.sweeper.stop = context.WithCancel(context.WithoutCancel(ctx))
	d.sweeper.done = make(chan struct{})
	go func() {
		defer close(d.sweeper.done)
		wait := d.sweeper.every
		timer := time.NewTimer(wait)
		defer timer.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-timer.C:
			}
			err := d.sweepEphemeral(ctx)
			switch {
			case err == nil:
				wait = d.sweeper.every
			case ctx.Err() == nil:
				wait = min(2*wait, sweepRarely)
				klog.FromContext(ctx).Error(err, "Cannot remove all inline ephemeral volumes of pods that are gone; trying again", "in", wait.String())
			}
			timer.Reset(wait)
		}
	}()
}

// end stops the look, if it was started.
func (s *sweeper) end() {
	if s.stop != nil {
		s.stop()
		<-s.done
	}
}

// sweepEphemeral removes the inline ephemeral volumes whose pod is gone: nothing is
// mounted at the target, and the pod's directory above it does not exist. After a reboot
// the pod, and with it the directory, is still there, and its volume is published again
// with its data. A pool is looked at until each of its volumes is gone or published:
// from then on its pods unpublish what they have.
func (d *Driver) sweepEphemeral(ctx context.Context) error {
	d.sweeper.mu.Lock()
	defer d.sweeper.mu.Unlock()
	var errs []error
	for _, p := range d.images.Pools() {
		if d.sweeper.swept[p.ID()] {
			continue
		}
		settled := true
		for _, v := range d.images.List() {
			if v.Pool != p.Name() || v.Ephemeral == nil {
				continue
			}
			gone, err := d.sweepOne(ctx, v)
			if r, staged := d.state.get(v.Name); !gone && (!staged || r.Device.none()) {
				settled = false
			}
			errs = append(errs, err)
		}
		if settled {
			if d.sweeper.swept == nil {
				d.sweeper.swept = make(map[string]bool)
			}
			d.sweeper.swept[p.ID()] = true
		}
	}
	return errors.Join(errs...)
}

// sweepOne removes one volume if its pod is gone, and says whether it did. One that a
// call works on is left.
func (d *Driver) sweepOne(ctx context.Context, v image.Volume) (bool, error) {
	if !podGone(v.Ephemeral.Target) {
		return false, nil
	}
	unlock, err := d.lockVolume(v.Name, "sweep")
	if err != nil {
		return false, nil
	}
	defer unlock()
	klog.FromContext(ctx).Info("Inline ephemeral volume is left over: its pod is gone", "volume", v.ID, "target", v.Ephemeral.Target)
	err = d.removeEphemeral(ctx, v.Name, v.Ephemeral.Target, binding{})
	return err == nil, err
}

// podGone says whether the pod that a target belongs to is gone: its directory is,
// while the directory of all pods is there. If that is missing too nothing is
// known; it may be on a disk that is not mounted yet.
func podGone(target string) bool {
	pod := filepath.Dir(target)
	if before, rest, ok := strings.Cut(target, "/pods/"); ok { // kubelet's
		if uid, _, ok := strings.Cut(rest, "/"); ok {
			pod = filepath.Join(before, "pods", uid)
		}
	}
	if _, err := os.Stat(pod); !errors.Is(err, os.ErrNotExist) {
		return false
	}
	_, err := os.Stat(filepath.Dir(pod))
	return err == nil
}
