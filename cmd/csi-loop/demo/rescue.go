package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"
)

// rescueTime bounds the clean-up by the driver after a failure.
const rescueTime = 60 * time.Second

// rescue takes everything back after cause made the story end, and returns cause
// with what could not be taken back.
func (d *demo) rescue(ctx context.Context, cause error) error {
	interrupted := ctx.Err() != nil
	ctx = context.WithoutCancel(ctx)
	if tail := d.logTail(15); len(tail) > 0 && !interrupted {
		d.out.line("\nThe last lines of the driver's log:")
		for _, l := range tail {
			d.out.line("  " + l)
		}
	}
	if d.driver != nil {
		d.out.line("\nCleaning up.")
	}
	err := d.byDriver(ctx)
	if left, lerr := leftovers(d.dir); lerr != nil || len(left) > 0 {
		// The driver could not. What it said is what a reader needs to know.
		err = errors.Join(err, lerr, d.byHand())
	} else {
		err = nil // whatever was said, nothing is left
	}
	if rerr := d.removeDir(ctx); rerr != nil {
		return fmt.Errorf("%w; cleaning up: %w", cause, errors.Join(err, rerr))
	}
	return cause
}

// byDriver cleans up the proper way, with a new driver when the old one is gone.
func (d *demo) byDriver(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, rescueTime)
	defer cancel()
	var err error
	for range 2 {
		if !slices.ContainsFunc(d.cast.all(), func(v *volume) bool { return v.made || v.staged }) {
			err = nil
			break
		}
		if err = d.ensureDriver(ctx); err == nil {
			err = d.tearDown(ctx)
		}
	}
	err = errors.Join(err, d.disconnect())
	if d.driver.alive() {
		err = errors.Join(err, d.driver.stop(ctx))
	}
	return err
}

// ensureDriver starts the driver unless it runs and is connected.
func (d *demo) ensureDriver(ctx context.Context) error {
	if d.driver.alive() && d.client != nil {
		return nil
	}
	if d.driver.alive() {
		if err := d.driver.kill(); err != nil {
			return err
		}
	}
	if err := d.disconnect(); err != nil {
		return err
	}
	return d.startDriver(ctx)
}

// byHand is the last resort: it unmounts and unbinds what is below the demo's
// directory, the last mount first.
func (d *demo) byHand() error {
	mounts, err := mountsBelow(d.dir)
	errs := []error{err}
	for _, m := range slices.Backward(mounts) {
		errs = append(errs, unmount(m.path))
	}
	loops, err := loopsBelow(d.dir)
	errs = append(errs, err)
	for _, l := range loops {
		errs = append(errs, clearLoop(l))
	}
	return errors.Join(errs...)
}

// removeDir proves that the kernel has nothing left of the demo's directory, and
// only then removes it: a mount that is left would be emptied.
func (d *demo) removeDir(ctx context.Context) error {
	deadline := time.Now().Add(settle)
	for {
		left, err := leftovers(d.dir)
		switch {
		case err != nil:
			return err
		case len(left) == 0:
			return os.RemoveAll(d.dir)
		case time.Now().After(deadline):
			return fmt.Errorf("left behind: %v; %s stays", left, d.dir)
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}
