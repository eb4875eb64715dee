//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/pkg/loop"
)

// attach compares the loop manager's attach and detach with the bare ioctls.
func attach(ctx context.Context, dir string, o options) (err error) {
	path := filepath.Join(dir, "attach.img")
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, 16*mib), f.Close()); err != nil {
		return err
	}
	m, err := loop.New(ctx, loop.WithWarm(0))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	fl, err := newFloor(ctx, filepath.Join(dir, "attach"), o.size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, fl.close()) }()
	bare, ours := samples{}, samples{}
	for i := range 5*o.cycles + 1 {
		b, err := fl.attachOnce(path)
		if err != nil {
			return err
		}
		a, err := managed(ctx, m, path)
		if err != nil {
			return err
		}
		if i > 0 {
			bare.add(timing{"attach": b})
			ours.add(timing{"attach": a})
		}
	}
	a, b := ours["attach"], bare["attach"]
	fmt.Printf("attach+detach p50: %s bare ioctls, %s loop manager (p90 %s), ratio %s\n\n",
		ms(percentile(b, 50)), ms(percentile(a, 50)), ms(percentile(a, 90)), ratio(percentile(a, 50), percentile(b, 50)))
	return nil
}

// managed is one attach and detach of the loop manager, from opening the image
// to the device seen unbound.
func managed(ctx context.Context, m *loop.Manager, path string) (time.Duration, error) {
	start := time.Now()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	dev, err := m.Attach(ctx, f, loop.Mapping{BlockSize: 4096, DirectIO: loop.DirectIOAuto, Tag: "bench"})
	if err != nil {
		return 0, errors.Join(err, f.Close())
	}
	err = errors.Join(f.Close(), dev.Close(), m.Detach(ctx, dev.Ref()))
	return time.Since(start), err
}

// kernel names the kernel this runs on.
func kernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown kernel"
	}
	return "Linux " + unix.ByteSliceToString(u.Release[:])
}
