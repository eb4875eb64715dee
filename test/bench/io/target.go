//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/test/bench/lab"
)

// target is a file or a device that is read and written.
type target struct {
	path   string
	device string // the loop device of losetup; "" otherwise
	undo   []func() error
}

// close takes it away, latest step first.
func (t *target) close() error {
	var errs []error
	for _, undo := range slices.Backward(t.undo) {
		errs = append(errs, undo())
	}
	return errors.Join(errs...)
}

// contender is one way to get a target.
type contender struct {
	name string
	make func(ctx context.Context, name string) (*target, error)
}

// names of contenders.
const (
	onFile   = "file"
	byHand   = "losetup"
	ours     = "csi-loop"
	buffered = "buffered"
)

// contenders are the ways, the one that others are compared with first.
func (b *bench) contenders() []contender {
	return []contender{
		{onFile, func(_ context.Context, name string) (*target, error) { return b.file(name, b.o.size) }},
		{byHand, func(ctx context.Context, name string) (*target, error) {
			return b.losetup(ctx, name, "--direct-io=on", "--sector-size=4096")
		}},
		{ours, b.volume},
		{buffered, func(ctx context.Context, name string) (*target, error) {
			return b.losetup(ctx, name, "--direct-io=off", "--sector-size=4096")
		}},
	}
}

// volumeSize is the size of a volume in which a file of the size fits.
func (b *bench) volumeSize() int64 {
	if b.kind == "block" {
		return b.o.size
	}
	return b.o.size*5/4 + 256*lab.MiB
}

// file is a file on the pool that has its blocks.
func (b *bench) file(name string, size int64) (*target, error) {
	path := filepath.Join(b.pool.Dir, name)
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	t := &target{path: path, undo: []func() error{func() error { return os.Remove(path) }}}
	if err := errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, size), f.Close()); err != nil {
		return nil, errors.Join(err, t.close())
	}
	return t, nil
}

// losetup is a file on the pool as losetup shows it, without scheduler and write-back
// throttling: what somebody would set by hand.
func (b *bench) losetup(ctx context.Context, name string, args ...string) (_ *target, err error) {
	t, err := b.file(name, b.volumeSize())
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.close())
		}
	}()
	mkfs := map[string][]string{"ext4": {"mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=0"}, "xfs": {"mkfs.xfs", "-q", "-K", "-s", "size=4096"}}[b.kind]
	if mkfs != nil {
		if _, err := lab.Run(ctx, append(mkfs, t.path)...); err != nil {
			return nil, err
		}
	}
	if t.device, err = lab.Losetup(ctx, t.path, args...); err != nil {
		return nil, err
	}
	t.undo = append(t.undo, func() error { return lab.Detach(ctx, t.device) })
	for attr, value := range map[string]string{"scheduler": "none", "wbt_lat_usec": "0"} {
		if err := setQueue(t.device, attr, value); err != nil {
			return nil, err
		}
	}
	t.path = t.device
	if mkfs == nil {
		return t, nil
	}
	mount := filepath.Join(b.dir, "mount-"+name)
	if err := os.Mkdir(mount, 0o755); err != nil {
		return nil, err
	}
	if err := unix.Mount(t.device, mount, b.kind, 0, ""); err != nil {
		return nil, err
	}
	t.undo = append(t.undo, func() error { return unix.Unmount(mount, 0) })
	t.path = filepath.Join(mount, "data")
	return t, b.inside(t.path)
}

// inside makes the file in a volume that is read and written.
func (b *bench) inside(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, b.o.size), f.Close())
}

// volume is a volume of the driver with default parameters.
func (b *bench) volume(ctx context.Context, name string) (*target, error) {
	v, err := b.d.NewVolume(ctx, name, b.kind, b.volumeSize(), nil)
	if err != nil {
		return nil, err
	}
	t := &target{path: v.Target, undo: []func() error{func() error { return v.Remove(ctx) }}}
	if b.kind == "block" {
		return t, nil
	}
	t.path = filepath.Join(v.Target, "data")
	if err := b.inside(t.path); err != nil {
		return nil, errors.Join(err, t.close())
	}
	return t, nil
}

func queue(device, attr string) string {
	return fmt.Sprintf("/sys/block/%s/queue/%s", filepath.Base(device), attr)
}

func setQueue(device, attr, value string) error {
	return os.WriteFile(queue(device, attr), []byte(value), 0)
}
