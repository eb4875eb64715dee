//go:build linux

// Command bench measures the control plane of csi-loop: every RPC of a volume's
// life beside a floor, a bare sequence of the same kernel calls and the same mkfs
// with no driver around it.
//
// Floor and driver take turns, cycle by cycle, so that a machine whose speed
// drifts for both; what is printed to be quoted are the ratios. The lines
// beginning with "Benchmark" can be given to benchstat.
//
//	bench -driver bin/csi-loop [-dir DIR] [-n CYCLES] [-volumes N]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"time"
)

const mib = int64(1) << 20

type options struct {
	driver  string
	dir     string
	cycles  int
	volumes int
	size    int64
}

func main() {
	var o options
	flag.StringVar(&o.driver, "driver", "bin/csi-loop", "the driver's binary")
	flag.StringVar(&o.dir, "dir", "", "where pools are made; default a temporary directory")
	flag.IntVar(&o.cycles, "n", 40, "cycles of each kind")
	flag.IntVar(&o.volumes, "volumes", 1000, "other volumes present in the second part; 0 leaves it out")
	size := flag.Int64("size", 320, "size of the volumes, MiB")
	flag.Parse()
	o.size = *size * mib
	// The floor is one thread, and so is the client: what its own goroutines would
	// wait for each other is not the driver's.
	runtime.GOMAXPROCS(1)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("loop devices and mounts need root")
	}
	dir, err := os.MkdirTemp(o.dir, "csi-loop-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	d, err := startDriver(ctx, o.driver, filepath.Join(dir, "driver"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	fl, err := newFloor(ctx, filepath.Join(dir, "floor"), o.size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, fl.close()) }()
	fmt.Printf("%s, %d MiB thick, %d cycles of each, floor and driver in turn\n\n", kernel(), o.size/mib, o.cycles)
	for _, kind := range []string{"ext4", "xfs", "btrfs", "block"} {
		if err := compare(ctx, d, fl, kind, o); err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
	}
	if err := attach(ctx, dir, o); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	if o.volumes == 0 {
		return nil
	}
	return crowded(ctx, d, filepath.Join(dir, "crowded"), o)
}

// compare prints floor against driver for one kind of volume.
func compare(ctx context.Context, d *driver, fl *floor, kind string, o options) error {
	bare, ours := samples{}, samples{}
	for i := range o.cycles + 1 {
		if err := ctx.Err(); err != nil {
			return err
		}
		b, err := fl.cycle(ctx, kind)
		if err != nil {
			return fmt.Errorf("floor: %w", err)
		}
		s, err := d.cycle(ctx, kind, fmt.Sprintf("bench-%s-%d", kind, i), o.size)
		if err != nil {
			return fmt.Errorf("driver: %w", err)
		}
		if i == 0 {
			continue // caches warm up
		}
		bare.add(b)
		ours.add(s)
	}
	fmt.Printf("%-6s %-10s %10s %10s %10s %10s %8s\n", kind, "", "floor p50", "driver p50", "driver p90", "driver max", "ratio")
	for _, step := range append(slices.Clone(steps), cycleStep) {
		b, s := bare[step], ours[step]
		fmt.Printf("%-6s %-10s %10s %10s %10s %10s %8s\n", "", step, ms(percentile(b, 50)), ms(percentile(s, 50)),
			ms(percentile(s, 90)), ms(percentile(s, 100)), ratio(percentile(s, 50), percentile(b, 50)))
	}
	fmt.Println()
	for _, step := range append(slices.Clone(steps), cycleStep) {
		bare.print("Floor/"+kind, step)
		ours.print("Driver/"+kind, step)
	}
	fmt.Println()
	return nil
}

// crowded compares a cycle in an empty pool with one in a pool of many volumes,
// in turn, and prints the driver's memory.
func crowded(ctx context.Context, empty *driver, dir string, o options) (err error) {
	full, err := startDriver(ctx, empty.binary, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, full.stop()) }()
	before := full.memory()
	start := time.Now()
	for i := range o.volumes {
		if err := full.createThin(ctx, fmt.Sprintf("other-%d", i)); err != nil {
			return err
		}
	}
	fmt.Printf("%d sparse volumes made in %s; resident memory of serve %d MiB before, %d MiB with them\n",
		o.volumes, time.Since(start).Round(time.Millisecond), before/mib, full.memory()/mib)
	none, many := samples{}, samples{}
	for i := range o.cycles + 1 {
		a, err := empty.cycle(ctx, "ext4", fmt.Sprintf("alone-%d", i), o.size)
		if err != nil {
			return err
		}
		b, err := full.cycle(ctx, "ext4", fmt.Sprintf("crowded-%d", i), o.size)
		if err != nil {
			return err
		}
		if i > 0 {
			none.add(a)
			many.add(b)
		}
	}
	a, b := percentile(none[cycleStep], 50), percentile(many[cycleStep], 50)
	fmt.Printf("ext4 cycle p50: %s alone, %s among %d volumes, ratio %s\n", ms(a), ms(b), o.volumes, ratio(b, a))
	none.print("Alone/ext4", cycleStep)
	many.print(fmt.Sprintf("Among%d/ext4", o.volumes), cycleStep)
	for i := range o.volumes {
		if err := full.delete(ctx, full.ids[fmt.Sprintf("other-%d", i)]); err != nil {
			return err
		}
	}
	return nil
}
