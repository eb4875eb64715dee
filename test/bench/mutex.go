//go:build linux

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/klog/v2"

	csiloop "github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// contention runs the driver in this process under 64 clients, and prints who waited
// for which lock. A lock that is held across I/O shows as a wait of the length of I/O
// for each call.
func contention(ctx context.Context, dir string, o options) (err error) {
	// As many as serve uses while many calls run.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4 * runtime.NumCPU()))
	d, stop, err := inProcess(ctx, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	const clients = 64
	if _, err := d.throughput(ctx, clients); err != nil { // templates and caches
		return err
	}
	defer runtime.SetMutexProfileFraction(runtime.SetMutexProfileFraction(1))
	before := waits()
	start := time.Now()
	rate, err := d.throughput(ctx, clients)
	if err != nil {
		return err
	}
	took := time.Since(start)
	after := waits()
	var all time.Duration
	for where, w := range after {
		w.time -= before[where].time
		w.count -= before[where].count
		after[where] = w
		all += w.time
	}
	calls := rate * took.Seconds() * float64(len(steps))
	fmt.Printf("waits for locks, %d clients, %.0f calls in %s: %s in all, %s for each call, of the %s that a call takes\n",
		clients, calls, took.Round(time.Millisecond), all.Round(time.Microsecond), time.Duration(float64(all)/calls).Round(100*time.Nanosecond),
		time.Duration(float64(took)*clients/calls).Round(time.Microsecond))
	top := make([]string, 0, len(after))
	for where := range after {
		top = append(top, where)
	}
	slices.SortFunc(top, func(a, b string) int { return cmp.Compare(after[b].time, after[a].time) })
	for _, where := range top[:min(8, len(top))] {
		if w := after[where]; w.count > 0 {
			fmt.Printf("  %10s in %6d waits  %s\n", w.time.Round(time.Microsecond), w.count, where)
		}
	}
	fmt.Println()
	if o.mutex == "" {
		return nil
	}
	f, err := os.Create(o.mutex)
	if err != nil {
		return err
	}
	return errors.Join(pprof.Lookup("mutex").WriteTo(f, 0), f.Close())
}

type wait struct {
	time  time.Duration
	count int64
}

// waits sums the mutex profile by the innermost function that is not of the runtime or
// of package sync, and its caller of this project.
func waits() map[string]wait {
	records := make([]runtime.BlockProfileRecord, 4096)
	n, _ := runtime.MutexProfile(records)
	all, perSecond := map[string]wait{}, cyclesPerSecond()
	for _, r := range records[:min(n, len(records))] {
		var names []string
		frames := runtime.CallersFrames(r.Stack())
		for {
			f, more := frames.Next()
			short := f.Function[strings.LastIndex(f.Function, "/")+1:]
			if len(names) < 2 && !strings.HasPrefix(short, "runtime.") && !strings.HasPrefix(short, "sync.") && short != "" {
				names = append(names, short)
			}
			if !more {
				break
			}
		}
		where := strings.Join(names, " < ")
		w := all[where]
		w.time += time.Duration(float64(r.Cycles) / perSecond * float64(time.Second))
		w.count += r.Count
		all[where] = w
	}
	return all
}

// cyclesPerSecond is the unit of the profile, which only its text form tells.
func cyclesPerSecond() float64 {
	var text bytes.Buffer
	perSecond := 1e9
	if pprof.Lookup("mutex").WriteTo(&text, 1) == nil {
		_, after, _ := strings.Cut(text.String(), "cycles/second=")
		_, _ = fmt.Sscan(after, &perSecond)
	}
	return perSecond
}

// inProcess serves a new pool from this process.
func inProcess(ctx context.Context, dir string) (d *driver, stop func() error, err error) {
	pool, state := filepath.Join(dir, "pool"), filepath.Join(dir, "state")
	for _, sub := range []string{pool, state} {
		if err := os.MkdirAll(sub, 0o700); err != nil {
			return nil, nil, err
		}
	}
	klog.SetLogger(klog.Logger{}) // its words would be in the results
	loops, err := loop.New(ctx, loop.WithMax(200))
	if err != nil {
		return nil, nil, err
	}
	images, err := image.Open(ctx, []image.Config{{Name: "default", Path: pool, Overcommit: 1}})
	if err != nil {
		return nil, nil, errors.Join(err, loops.Close())
	}
	dirs, err := images.OpenDirs(nil)
	if err != nil {
		return nil, nil, errors.Join(err, images.Close(), loops.Close())
	}
	served, err := csiloop.New(csiloop.Config{NodeID: "bench", StateDir: state, DefaultPool: "default"}, images, dirs, loops, mount.New())
	if err != nil {
		return nil, nil, errors.Join(err, images.Close(), loops.Close())
	}
	socket := filepath.Join(dir, "csi.sock")
	l, err := csiloop.Listen(ctx, "unix://"+socket)
	if err != nil {
		return nil, nil, errors.Join(err, served.Close(), images.Close(), loops.Close())
	}
	serving, end := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- served.Serve(serving, l, 10*time.Second) }()
	d = &driver{dir: dir, mu: &sync.Mutex{}, ids: map[string]string{}}
	err = d.dial(ctx, socket)
	return d, func() error {
		_ = d.conn.Close()
		end()
		return errors.Join(<-ended, served.Close(), images.Close(), loops.Close())
	}, err
}
