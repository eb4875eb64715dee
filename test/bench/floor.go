//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// floor makes the same kernel calls as the driver, in the simplest way that can
// work: no locks, no checks before a call, no errors but fatal ones, no gRPC. What it
// leaves out on purpose is what a driver is for; what it does not leave out is what
// stays: the same files are written and synced, one after the other, a record of the
// volume on the node is kept, and what was bound is read back. It runs mkfs, or with
// copies writes what mkfs wrote once, with the same UUID each time.
type floor struct {
	copies  bool
	made    map[string]*blocks
	root    string
	state   string
	size    int64
	mkfs    map[string][]string
	number  int
	holder  *os.File
	control *os.File
}

func newFloor(ctx context.Context, root string, size int64) (*floor, error) {
	f := &floor{root: root, size: size, mkfs: make(map[string][]string), made: make(map[string]*blocks)}
	if err := f.prepare(); err != nil {
		return nil, err
	}
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		if size < image.MinimumSize(kind) {
			continue
		}
		argv, err := image.MkfsCommand(ctx, image.Spec{Name: "floor", Size: size, Filesystem: kind})
		if err != nil {
			return nil, err
		}
		f.mkfs[kind] = argv
		if f.made[kind], err = capture(filepath.Join(root, "capture"), argv, size); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// clone is a floor with directories of its own, which may run at the same time.
func (f *floor) clone(name string) (*floor, error) {
	c := &floor{copies: f.copies, made: f.made, root: filepath.Join(f.root, name), size: f.size, mkfs: f.mkfs}
	return c, c.prepare()
}

// prepare makes its directories.
func (f *floor) prepare() (err error) {
	if f.state, err = os.MkdirTemp("/dev/shm", "csi-loop-floor-"); err != nil {
		return err
	}
	for _, sub := range []string{"volumes", "staging", "pod"} {
		if err := os.MkdirAll(filepath.Join(f.root, sub), 0o700); err != nil {
			return err
		}
	}
	f.control, err = os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	return err
}

func (f *floor) close() error { return errors.Join(f.control.Close(), os.RemoveAll(f.state)) }

// cycle is one whole life of an image.
func (f *floor) cycle(ctx context.Context, kind string) (timing, error) {
	staging, target := filepath.Join(f.root, "staging"), filepath.Join(f.root, "pod", "mount")
	volume := filepath.Join(f.root, "volumes", "v")
	node := func() string { return fmt.Sprintf("/dev/loop%d", f.number) }
	block := kind == "block"
	return measure(map[string]func() error{
		"create": func() error { return f.create(ctx, kind, volume) },
		"stage": func() error {
			if err := errors.Join(f.note(), f.bind(filepath.Join(volume, "disk.img"), !block), f.note()); err != nil || block {
				return err
			}
			return errors.Join(unix.Mount(node(), staging, kind, 0, ""), f.holder.Close())
		},
		"publish": func() error {
			if !block {
				return errors.Join(os.Mkdir(target, 0o750), unix.Mount(staging, target, "", unix.MS_BIND, ""), f.note())
			}
			return errors.Join(os.WriteFile(target, nil, 0o600), unix.Mount(node(), target, "", unix.MS_BIND, ""), f.note())
		},
		"unpublish": func() error { return errors.Join(unix.Unmount(target, 0), os.Remove(target), f.note()) },
		"unstage": func() error {
			forget := func() error { return os.Remove(filepath.Join(f.state, "record")) }
			if !block {
				return errors.Join(unix.Unmount(staging, 0), forget())
			}
			return errors.Join(forget(), unix.IoctlSetInt(int(f.holder.Fd()), unix.LOOP_CLR_FD, 0), f.holder.Close())
		},
		"delete": func() error { return f.remove(volume) },
	})
}

// create makes an image and a record, synced and renamed into place.
func (f *floor) create(ctx context.Context, kind, volume string) error {
	work := filepath.Join(f.root, ".new-v")
	if err := os.Mkdir(work, 0o700); err != nil {
		return err
	}
	img, err := os.OpenFile(filepath.Join(work, "disk.img"), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer img.Close()
	if err := unix.Fallocate(int(img.Fd()), 0, 0, f.size); err != nil {
		return err
	}
	if f.copies {
		if made := f.made[kind]; made != nil {
			if err := made.write(img); err != nil {
				return err
			}
		}
	} else if argv := f.mkfs[kind]; argv != nil {
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.Dir = work
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
	}
	record, err := os.Create(filepath.Join(work, "volume.json"))
	if err != nil {
		return err
	}
	_, err = record.WriteString(`{"formatVersion":1}`)
	return errors.Join(err, img.Sync(), record.Sync(), record.Close(), os.Rename(work, volume), syncDir(filepath.Dir(volume)))
}

// bind attaches the image and keeps a descriptor of the device in f.holder.
func (f *floor) bind(path string, autoclear bool) error {
	img, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer img.Close()
	config := unix.LoopConfig{Fd: uint32(img.Fd()), Size: 4096}
	config.Info.Flags = unix.LO_FLAGS_DIRECT_IO
	if autoclear {
		config.Info.Flags |= unix.LO_FLAGS_AUTOCLEAR
	}
	dev, err := f.configure(&config)
	runtime.KeepAlive(img)
	if err != nil {
		return err
	}
	f.holder = dev
	return errors.Join(f.mask(), f.look())
}

// configure binds a free device. Others may take the number first.
func (f *floor) configure(config *unix.LoopConfig) (*os.File, error) {
	for {
		var err error
		if f.number, err = unix.IoctlRetInt(int(f.control.Fd()), unix.LOOP_CTL_GET_FREE); err != nil {
			return nil, err
		}
		dev, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", f.number), os.O_RDWR, 0)
		if err == nil {
			if err = unix.IoctlLoopConfigure(int(dev.Fd()), config); err == nil {
				return dev, nil
			}
			_ = dev.Close()
		}
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENXIO) {
			return nil, err
		}
	}
}

// note replaces a record on a tmpfs, as the driver does before and after it changes
// something on the node.
func (f *floor) note() error {
	path := filepath.Join(f.state, "record")
	return errors.Join(os.WriteFile(path+".new", make([]byte, 400), 0o600), os.Rename(path+".new", path))
}

// look reads back what was bound, since the kernel clamps and drops silently.
func (f *floor) look() error {
	fd := int(f.holder.Fd())
	_, err := unix.IoctlLoopGetStatus64(fd)
	_, sizeErr := unix.IoctlGetInt(fd, unix.BLKSSZGET)
	_, attrErr := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/queue/discard_max_bytes", f.number))
	return errors.Join(err, sizeErr, attrErr)
}

// mask switches discard off. The write freezes the queue for milliseconds, and
// the mask of an earlier binding stays on many kernels, so look first.
func (f *floor) mask() error {
	path := fmt.Sprintf("/sys/block/loop%d/queue/discard_max_bytes", f.number)
	if b, err := os.ReadFile(path); err != nil || string(b) == "0\n" {
		return err
	}
	return os.WriteFile(path, []byte("0"), 0)
}

// remove deletes an image the way the driver commits a removal.
func (f *floor) remove(volume string) error {
	gone := filepath.Join(f.root, ".gone-v")
	return errors.Join(os.Rename(volume, gone), syncDir(filepath.Dir(volume)), os.RemoveAll(gone))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// attachOnce binds and clears without a mount.
func (f *floor) attachOnce(path string) (time.Duration, error) {
	start := time.Now()
	if err := f.bind(path, false); err != nil {
		return 0, err
	}
	err := errors.Join(unix.IoctlSetInt(int(f.holder.Fd()), unix.LOOP_CLR_FD, 0), f.holder.Close())
	return time.Since(start), err
}
