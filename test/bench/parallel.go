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
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// parallelSize is small: what is measured is the number of cycles.
const parallelSize = 16 * mib

// parallel measures cycles a second with different numbers of clients, each with
// volumes of its own, with one processor and with all, beside the copying floor with as
// many threads.
func parallel(ctx context.Context, dir string, o options, p *plot) error {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(runtime.NumCPU()))
	processors := []int{1}
	if n := runtime.NumCPU(); n > 1 {
		processors = append(processors, n)
	}
	fmt.Printf("%-12s %8s %16s %16s %8s\n", "cycles/s", "clients", "floor", "driver", "ratio")
	for _, n := range processors {
		var d *driver
		sub := filepath.Join(dir, fmt.Sprint("clients-", n))
		// The driver keeps the processors that it is started on.
		if err := onProcessors(n, func() (err error) {
			d, err = startDriver(ctx, o.driver, sub, "--loop-devices-max=200")
			return err
		}); err != nil {
			return err
		}
		err := clientsOf(ctx, d, sub, n, o, p)
		if err := errors.Join(err, d.stop()); err != nil {
			return err
		}
	}
	fmt.Println()
	return nil
}

func clientsOf(ctx context.Context, d *driver, dir string, processors int, o options, p *plot) (err error) {
	fl, err := newFloor(ctx, filepath.Join(dir, "floor"), parallelSize)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, fl.close()) }()
	fl.copies = true
	driverLine := series{name: fmt.Sprintf("driver, %d processors", processors)}
	floorLine := series{name: fmt.Sprintf("floor, %d processors", processors)}
	for round, clients := range append([]int{1}, o.clients...) {
		bare, err := fl.throughput(ctx, clients, processors)
		if err != nil {
			return fmt.Errorf("floor: %w", err)
		}
		ours, err := d.throughput(ctx, clients)
		if err != nil {
			return err
		}
		if round == 0 {
			continue // templates and caches
		}
		fmt.Printf("%d processors %8d %16.1f %16.1f %7.2fx\n", processors, clients, bare, ours, ours/bare)
		for name, rate := range map[string]float64{"Driver": ours, "CopyFloor": bare} {
			fmt.Printf("Benchmark%sClients%d/procs=%d 1 %.0f ns/op\n", name, clients, processors, 1e9/rate)
		}
		driverLine.add(float64(clients), ours)
		floorLine.add(float64(clients), bare)
	}
	p.clients = append(p.clients, floorLine, driverLine)
	return nil
}

// each runs cycles in so many goroutines for some seconds, and returns how many ended
// in a second.
func each(ctx context.Context, clients int, cycle func(ctx context.Context, client, i int) error) (float64, error) {
	const long = 3 * time.Second
	var done atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	start := time.Now()
	for c := range clients {
		g.Go(func() error {
			for i := 0; time.Since(start) < long && ctx.Err() == nil; i++ {
				if err := cycle(ctx, c, i); err != nil {
					return err
				}
				done.Add(1)
			}
			return nil
		})
	}
	err := g.Wait()
	return float64(done.Load()) / time.Since(start).Seconds(), err
}

func (d *driver) throughput(ctx context.Context, clients int) (float64, error) {
	return each(ctx, clients, func(ctx context.Context, client, i int) error {
		one := *d
		one.slot = strconv.Itoa(client)
		for _, sub := range []string{"staging", "pod"} {
			if err := os.MkdirAll(filepath.Join(d.dir, sub, one.slot), 0o750); err != nil {
				return err
			}
		}
		_, err := one.cycle(ctx, "ext4", fmt.Sprintf("client-%d-%d-%d", clients, client, i), parallelSize)
		return err
	})
}

// throughput has one floor for each client, as if each had a driver of its own.
func (f *floor) throughput(ctx context.Context, clients, processors int) (rate float64, err error) {
	floors := make([]*floor, clients)
	for i := range floors {
		if floors[i], err = f.clone(fmt.Sprint("client-", i)); err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, floors[i].close()) }()
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(processors))
	return each(ctx, clients, func(ctx context.Context, client, _ int) error {
		_, err := floors[client].cycle(ctx, "ext4")
		return err
	})
}
