//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// scale measures what may grow: latency with the number of volumes, the start, memory,
// and throughput with clients and processors.
func scale(ctx context.Context, dir string, o options) error {
	p := &plot{title: fmt.Sprintf("csi-loop %s, %s, %d processors", o.commit, kernel(), runtime.NumCPU())}
	if err := flat(ctx, dir, o, p); err != nil {
		return fmt.Errorf("volumes: %w", err)
	}
	if err := parallel(ctx, dir, o, p); err != nil {
		return fmt.Errorf("clients: %w", err)
	}
	if err := contention(ctx, filepath.Join(dir, "mutex"), o); err != nil {
		return fmt.Errorf("mutexes: %w", err)
	}
	if o.svg == "" {
		return nil
	}
	return os.WriteFile(o.svg, p.svg(), 0o644)
}

// crowd is a driver with so many other volumes.
type crowd struct {
	*driver
	others int
	got    samples
}

// flat compares cycles among different numbers of other volumes, in turn, and then
// starts the most crowded driver again.
func flat(ctx context.Context, dir string, o options, p *plot) (err error) {
	var crowds []*crowd
	defer func() {
		for _, c := range crowds {
			err = errors.Join(err, c.stop())
		}
	}()
	for _, n := range append([]int{0}, o.counts...) {
		d, err := startDriver(ctx, o.driver, filepath.Join(dir, fmt.Sprint("among", n)), "--loop-devices-max="+strconv.Itoa(o.attached+50))
		if err != nil {
			return err
		}
		c := &crowd{driver: d, others: n, got: samples{}}
		crowds = append(crowds, c)
		before, start := d.memory(), time.Now()
		if err := c.populate(ctx); err != nil {
			return err
		}
		fmt.Printf("%d sparse volumes made in %s; resident memory of serve %d MiB before, %d MiB with them\n",
			n, time.Since(start).Round(time.Millisecond), before/mib, d.memory()/mib)
	}
	// A process that has just made thousands of volumes has more threads, a larger heap
	// and for a second more processors: not what the others cost that are only there.
	for _, c := range crowds {
		if err := c.stopProcess(); err != nil {
			return err
		}
		if err := c.start(ctx); err != nil {
			return err
		}
	}
	for i := range o.cycles + warmUp {
		for _, c := range crowds {
			t, err := c.cycle(ctx, "ext4", fmt.Sprint("cycle-", i), o.size)
			if err != nil {
				return err
			}
			if i >= warmUp {
				c.got.add(t)
			}
		}
	}
	reportFlat(crowds, p)
	last := crowds[len(crowds)-1]
	crowds = crowds[:len(crowds)-1]
	return restarts(ctx, last, o)
}

func reportFlat(crowds []*crowd, p *plot) {
	fmt.Printf("\n%-10s", "ext4")
	for _, c := range crowds {
		fmt.Printf(" %9d others %8s", c.others, "ratio")
	}
	fmt.Println()
	for _, step := range allSteps {
		fmt.Printf("%-10s", step)
		none := percentile(crowds[0].got[step], 50)
		line := series{name: step}
		for _, c := range crowds {
			p50 := percentile(c.got[step], 50)
			fmt.Printf(" %16s %8s", ms(p50), ratio(p50, none))
			line.add(float64(c.others), float64(p50)/float64(time.Millisecond))
		}
		fmt.Println()
		p.volumes = append(p.volumes, line)
	}
	fmt.Println()
	for _, c := range crowds {
		for _, step := range allSteps {
			c.got.print(fmt.Sprintf("Among%d/ext4", c.others), step)
		}
	}
	fmt.Println()
}

// populate makes the others, several at a time.
func (c *crowd) populate(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for i := range c.others {
		g.Go(func() error { return c.createThin(ctx, fmt.Sprint("other-", i)) })
	}
	return g.Wait()
}

// restarts kills the driver while volumes are attached, and measures until it answers
// again, beside what it takes to read as many records and look at as many images.
func restarts(ctx context.Context, c *crowd, o options) (err error) {
	defer func() { err = errors.Join(err, c.stop()) }()
	attached := min(o.attached, c.others)
	for i := range attached {
		if err := c.stageRaw(ctx, i); err != nil {
			return err
		}
	}
	memory := c.memory()
	starts, scans := samples{}, samples{}
	for range 5 {
		if err := c.kill(); err != nil {
			return err
		}
		begin := time.Now()
		if err := scan(filepath.Join(c.dir, "pool", "volumes")); err != nil {
			return err
		}
		scans.add(timing{"start": time.Since(begin)})
		begin = time.Now()
		if err := c.start(ctx); err != nil {
			return err
		}
		starts.add(timing{"start": time.Since(begin)})
	}
	s, b := percentile(starts["start"], 50), percentile(scans["start"], 50)
	fmt.Printf("start with %d volumes, %d attached, until it answers: p50 %s, max %s; records read and images looked at without a driver %s, ratio %s; "+
		"resident memory %d MiB before the kill, %d MiB after the last start\n\n",
		c.others, attached, ms(s), ms(percentile(starts["start"], 100)), ms(b), ratio(s, b), memory/mib, c.memory()/mib)
	starts.print(fmt.Sprintf("Start%d", c.others), "start")
	scans.print(fmt.Sprintf("Scan%d", c.others), "start")
	for i := range attached {
		if _, err := c.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{
			VolumeId: c.idOf(fmt.Sprint("other-", i)), StagingTargetPath: c.stagingOf(i),
		}); err != nil {
			return err
		}
	}
	return nil
}

func (c *crowd) stagingOf(i int) string {
	return filepath.Join(c.dir, "staging", fmt.Sprint("raw-", i))
}

// stageRaw attaches one of the others.
func (c *crowd) stageRaw(ctx context.Context, i int) error {
	if err := os.MkdirAll(c.stagingOf(i), 0o750); err != nil {
		return err
	}
	_, err := c.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: c.idOf(fmt.Sprint("other-", i)), StagingTargetPath: c.stagingOf(i), VolumeCapability: capability("block"),
	})
	return err
}

// scan reads every record of a pool and looks at every image.
func scan(volumes string) error {
	entries, err := os.ReadDir(volumes)
	if err != nil {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(volumes, e.Name())
		if _, err := os.ReadFile(filepath.Join(dir, "volume.json")); err != nil {
			return err
		}
		if _, err := os.Stat(filepath.Join(dir, "disk.img")); err != nil {
			return err
		}
	}
	return nil
}

// onProcessors runs f while this process, and what it starts, has so many processors.
func onProcessors(n int, f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, some unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return err
	}
	for cpu := 0; some.Count() < n && cpu < 1024; cpu++ {
		if all.IsSet(cpu) {
			some.Set(cpu)
		}
	}
	if err := unix.SchedSetaffinity(0, &some); err != nil {
		return err
	}
	return errors.Join(f(), unix.SchedSetaffinity(0, &all))
}
