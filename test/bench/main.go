//go:build linux

// Command bench measures the control plane of csi-loop: every RPC of a volume's
// life beside two floors, bare sequences of the same kernel calls with no driver
// around them. One runs the same mkfs, the other writes what mkfs wrote once.
//
// Floors and driver take turns, cycle by cycle, so that a machine whose speed
// drifts for both; what is printed to be quoted are the ratios. The lines
// beginning with "Benchmark" can be given to benchstat.
//
//	bench [-part calls] [-driver bin/csi-loop] [-dir DIR] [-n CYCLES] [-volumes N]
//	bench -part scale [-counts 1000,5000] [-attached 250] [-clients 1,4,16,64] [-svg FILE]
//	bench -part clients [-clients 1,4,16,64]
//	bench -part guard [-delay 3ms]
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
	"strconv"
	"strings"
	"time"
)

const mib = int64(1) << 20

type options struct {
	driver  string
	dir     string
	cycles  int
	volumes int
	size    int64

	part     string
	counts   []int
	attached int
	clients  []int
	svg      string
	mutex    string
	commit   string
	delay    time.Duration
}

func main() {
	var o options
	flag.StringVar(&o.driver, "driver", "bin/csi-loop", "the driver's binary")
	flag.StringVar(&o.dir, "dir", "", "where pools are made; default a temporary directory")
	flag.IntVar(&o.cycles, "n", 40, "cycles of each kind")
	flag.IntVar(&o.volumes, "volumes", 1000, "other volumes present in the second part; 0 leaves it out")
	size := flag.Int64("size", 1024, "size of the volumes, MiB")
	flag.StringVar(&o.part, "part", "calls", "calls, scale, clients or guard")
	flag.StringVar(&o.commit, "commit", "unknown", "what was built, for the output")
	flag.IntVar(&o.attached, "attached", 250, "scale: volumes attached at a restart")
	flag.StringVar(&o.svg, "svg", "", "scale: file for a picture")
	flag.StringVar(&o.mutex, "mutexprofile", "", "scale: file for the profile of waits for locks")
	flag.DurationVar(&o.delay, "delay", 0, "make each call of the driver take so much longer, to see the guard fail")
	counts := flag.String("counts", "1000,5000", "scale: numbers of other volumes")
	clients := flag.String("clients", "1,4,16,64", "scale: numbers of clients")
	flag.Parse()
	o.size = *size * mib
	o.counts, o.clients = numbers(*counts), numbers(*clients)
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
	fmt.Printf("csi-loop %s, %s, %d processors, %s\n", o.commit, kernel(), runtime.NumCPU(), time.Now().UTC().Format(time.DateOnly))
	switch o.part {
	case "scale":
		return scale(ctx, dir, o)
	case "clients":
		return errors.Join(parallel(ctx, dir, o, &plot{}), contention(ctx, filepath.Join(dir, "mutex"), o))
	case "guard":
		return guard(ctx, dir, o)
	case "calls":
		return calls(ctx, dir, o)
	}
	return fmt.Errorf("-part %s: must be calls, scale, clients or guard", o.part)
}

// numbers reads a list.
func numbers(list string) (all []int) {
	for item := range strings.SplitSeq(list, ",") {
		if n, err := strconv.Atoi(item); err == nil {
			all = append(all, n)
		}
	}
	return all
}

// calls compares each call with the floors.
func calls(ctx context.Context, dir string, o options) (err error) {
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
	fmt.Printf("%d MiB thick, %d cycles of each, floors and driver in turn\n\n", o.size/mib, o.cycles)
	for _, kind := range []string{"ext4", "xfs", "btrfs", "block"} {
		mkfs, copied, ours, err := compare(ctx, d, fl, kind, o)
		if err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
		report(kind, mkfs, copied, ours)
	}
	if err := attach(ctx, dir, o); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	if o.volumes == 0 {
		return nil
	}
	return crowded(ctx, d, filepath.Join(dir, "crowded"), o)
}

// warmUp is how many cycles are not counted: caches fill, and the driver has a
// template from the third volume on.
const warmUp = 3

// compare prints the floors against the driver for one kind of volume, and returns
// what was measured.
func compare(ctx context.Context, d *driver, fl *floor, kind string, o options) (mkfs, copied, ours samples, err error) {
	mkfs, copied, ours = samples{}, samples{}, samples{}
	for i := range o.cycles + warmUp {
		if err := ctx.Err(); err != nil {
			return nil, nil, nil, err
		}
		fl.copies = false
		m, err := fl.cycle(ctx, kind)
		if err != nil {
			return nil, nil, nil, fmt.Errorf("floor: %w", err)
		}
		fl.copies = true
		c, err := fl.cycle(ctx, kind)
		if err != nil {
			return nil, nil, nil, fmt.Errorf("floor without mkfs: %w", err)
		}
		s, err := d.cycle(ctx, kind, fmt.Sprintf("bench-%s-%d", kind, i), o.size)
		if err != nil {
			return nil, nil, nil, fmt.Errorf("driver: %w", err)
		}
		if i >= warmUp {
			mkfs.add(m)
			copied.add(c)
			ours.add(s)
		}
	}
	return mkfs, copied, ours, nil
}

// report prints what compare measured.
func report(kind string, mkfs, copied, ours samples) {
	const columns = "%-6s %-10s %11s %11s %11s %11s %11s %8s %8s\n"
	fmt.Printf(columns, kind, "", "mkfs floor", "copy floor", "driver p50", "driver p90", "driver max", "of mkfs", "of copy")
	for _, step := range allSteps {
		m, c, s := percentile(mkfs[step], 50), percentile(copied[step], 50), percentile(ours[step], 50)
		fmt.Printf(columns, "", step, ms(m), ms(c), ms(s), ms(percentile(ours[step], 90)), ms(percentile(ours[step], 100)), ratio(s, m), ratio(s, c))
	}
	fmt.Println()
	for _, step := range allSteps {
		mkfs.print("Floor/"+kind, step)
		copied.print("CopyFloor/"+kind, step)
		ours.print("Driver/"+kind, step)
	}
	fmt.Println()
}

// crowded compares a cycle in an empty pool with one in a pool of many volumes.
func crowded(ctx context.Context, empty *driver, dir string, o options) error {
	none, many, err := among(ctx, empty, dir, o)
	if err != nil {
		return err
	}
	a, b := percentile(none[cycleStep], 50), percentile(many[cycleStep], 50)
	fmt.Printf("ext4 cycle p50: %s alone, %s among %d volumes, ratio %s\n", ms(a), ms(b), o.volumes, ratio(b, a))
	none.print("Alone/ext4", cycleStep)
	many.print(fmt.Sprintf("Among%d/ext4", o.volumes), cycleStep)
	return nil
}

// among measures cycles in an empty pool and in one of many sparse volumes, in turn,
// and prints the second driver's memory.
func among(ctx context.Context, empty *driver, dir string, o options) (none, many samples, err error) {
	d, err := startDriver(ctx, empty.binary, dir)
	if err != nil {
		return nil, nil, err
	}
	full := &crowd{driver: d, others: o.volumes}
	defer func() { err = errors.Join(err, full.stop()) }()
	before, start := full.memory(), time.Now()
	if err := full.populate(ctx); err != nil {
		return nil, nil, err
	}
	fmt.Printf("%d sparse volumes made in %s; resident memory of serve %d MiB before, %d MiB with them\n",
		o.volumes, time.Since(start).Round(time.Millisecond), before/mib, full.memory()/mib)
	none, many = samples{}, samples{}
	for i := range o.cycles + warmUp {
		a, err := empty.cycle(ctx, "ext4", fmt.Sprintf("alone-%d", i), o.size)
		if err != nil {
			return nil, nil, err
		}
		b, err := full.cycle(ctx, "ext4", fmt.Sprintf("crowded-%d", i), o.size)
		if err != nil {
			return nil, nil, err
		}
		if i >= warmUp {
			none.add(a)
			many.add(b)
		}
	}
	return none, many, nil
}
