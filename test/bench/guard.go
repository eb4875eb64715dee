//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"
)

// bounds are what the guard lets pass: the driver's median beside that of a floor of the
// same run. They are twice what is usual and more, since other machines have other disks
// and neighbours; what they catch is a call that does its work twice, waits for a timer,
// or looks at all volumes.
var bounds = map[string]struct{ mkfs, copied float64 }{
	"ext4":  {mkfs: 1.6, copied: 4},
	"xfs":   {mkfs: 1.6, copied: 4},
	"btrfs": {mkfs: 1.6, copied: 4},
	"block": {copied: 6},
}

// crowdBound is for a cycle among other volumes beside one without, and slack what is
// added to every floor: what scheduling may cost a call on a busy machine, six times.
const (
	crowdBound = 2
	slack      = 3 * time.Millisecond
)

// guard fails when the driver got slow, beside floors of the same run.
func guard(ctx context.Context, dir string, o options) (err error) {
	d, err := startDriver(ctx, o.driver, filepath.Join(dir, "driver"))
	if err != nil {
		return err
	}
	d.delay = o.delay
	defer func() { err = errors.Join(err, d.stop()) }()
	fl, err := newFloor(ctx, filepath.Join(dir, "floor"), o.size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, fl.close()) }()
	var slow []error
	check := func(what string, ours, floor time.Duration, bound float64) {
		slow = append(slow, judge(what, ours, floor, bound))
	}
	for _, kind := range []string{"ext4", "xfs", "btrfs", "block"} {
		mkfs, copied, ours, err := compare(ctx, d, fl, kind, o)
		if err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
		p50 := percentile(ours[cycleStep], 50)
		check(kind+" cycle, floor with mkfs", p50, percentile(mkfs[cycleStep], 50), bounds[kind].mkfs)
		check(kind+" cycle, floor without mkfs", p50, percentile(copied[cycleStep], 50), bounds[kind].copied)
	}
	if o.volumes > 0 {
		none, many, err := among(ctx, d, filepath.Join(dir, "crowded"), o)
		if err != nil {
			return err
		}
		check(fmt.Sprintf("ext4 cycle among %d volumes", o.volumes), percentile(many[cycleStep], 50), percentile(none[cycleStep], 50), crowdBound)
	}
	return errors.Join(slow...)
}

// judge prints what was measured, and returns an error if it is above the bound; none is 0.
func judge(what string, ours, floor time.Duration, bound float64) error {
	if bound == 0 {
		return nil
	}
	limit := time.Duration(bound * float64(floor+slack))
	fmt.Printf("%-34s %10s beside %10s: %6s of at most %.2fx\n", what, ms(ours), ms(floor), ratio(ours, floor), float64(limit)/float64(floor))
	if ours > limit {
		return fmt.Errorf("%s takes %s, %s of the floor", what, ms(ours), ratio(ours, floor))
	}
	return nil
}
