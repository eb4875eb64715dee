package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// serve puts the driver together, brings it up, and answers calls until ctx
// ends. What was opened is closed in reverse order. It is the only place that
// knows all packages.
func serve(ctx context.Context, p plan, unknown []string) error {
	logger := klog.FromContext(ctx)
	for _, name := range unknown {
		logger.Info("Environment variable means nothing to csi-loop", "variable", name)
	}
	m := newMetrics(thisBuild())
	stopHTTP, err := m.serve(ctx, p.http)
	if err != nil {
		return err
	}
	defer stopHTTP()
	traces, err := startTracing(ctx, p)
	if err != nil {
		return err
	}
	defer traces.stop(ctx)
	traces.into(&p)
	if p.mode == modeController {
		return serveController(ctx, p, m)
	}
	p.driver.Observe = m.observe
	return serveMachine(ctx, p, m)
}

// serveMachine is serve in the modes that attach and mount.
func serveMachine(ctx context.Context, p plan, m *metrics) (err error) {
	logger := klog.FromContext(ctx)
	if os.Geteuid() != 0 {
		return errors.New("serve needs root, to attach loop devices and to mount: run it with sudo, or in a privileged container")
	}
	defer func() {
		// A stop before serving is no failure.
		if err != nil && ctx.Err() != nil && errors.Is(err, ctx.Err()) {
			logger.Info("Stopped while starting", "err", err.Error())
			err = nil
		}
	}()
	scheduler := newProcessors()
	defer scheduler.stop()
	p.driver.Running = scheduler.note
	loops, err := loop.New(ctx, loop.WithWarm(p.warm), loop.WithMax(p.max))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, loops.Close()) }()
	stopWarm := background(ctx, func(ctx context.Context) { keepWarm(ctx, loops) })
	defer stopWarm()
	var options []image.Option
	if p.driver.HasRecords() {
		options = append(options, image.WithoutPools())
	}
	if p.mkfsAlways {
		options = append(options, image.WithoutTemplates())
	}
	if p.driver.Step != nil {
		options = append(options, image.WithSteps(image.Step(p.driver.Step)))
	}
	images, err := image.Open(ctx, p.pools, options...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, images.Close()) }()
	dirs, err := images.OpenDirs(p.imageDirs)
	if err != nil {
		return fmt.Errorf("--image-dir: %w: make it, or name another", err)
	}
	d, err := driver.New(p.driver, images, dirs, loops, mount.New())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := d.Reconcile(ctx); err != nil {
		return err
	}
	stopTrims := background(ctx, d.KeepTrimmed)
	defer stopTrims()
	m.node(images, loops)
	m.problems(d)
	m.volumes(d, p.volumeMetrics)
	m.trims(d.TrimStats)
	m.ready(func() error { return d.Ready(ctx) })
	return listenAndServe(ctx, d, images, p, m)
}

func listenAndServe(ctx context.Context, d *driver.Driver, images *image.Store, p plan, m *metrics) error {
	l, err := driver.Listen(ctx, p.endpoint)
	if err != nil {
		return err
	}
	pools, absent := []string{}, []string{}
	for _, pool := range images.Pools() {
		pools = append(pools, pool.Name()+"="+pool.Path())
	}
	for _, pool := range images.Absent() {
		absent = append(absent, pool.Name+"="+pool.Path)
	}
	klog.FromContext(ctx).Info("Serving", "mode", p.mode, "version", p.driver.Version, "endpoint", p.endpoint, "node", p.driver.NodeID, "pools", pools, "absentPools", absent)
	if p.mode == modeNode {
		return serveNode(ctx, d, images, p, l, m)
	}
	return d.Serve(ctx, l, p.stopTimeout)
}

// background runs work until the returned function is called, which waits for it.
func background(ctx context.Context, work func(context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { work(ctx) })
	return func() {
		cancel()
		wg.Wait()
	}
}

// trimEvery is how often idle loop devices are brought back to the warm number:
// a burst of volumes leaves many behind.
const trimEvery = time.Minute

// keepWarm holds idle loop devices ready until ctx ends. That this fails makes
// attaching slower and nothing else, so it is only told.
func keepWarm(ctx context.Context, loops *loop.Manager) {
	tick := time.NewTicker(trimEvery)
	defer tick.Stop()
	for {
		if err := errors.Join(loops.Trim(ctx), loops.Warm(ctx)); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "Idle loop devices could not be kept ready")
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
