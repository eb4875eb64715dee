//go:build linux

package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Of linux/fs.h.
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// bare makes a copy of an image in dir by nothing but the three calls. With durable it
// also does what any snapshot needs that shall outlive a crash: the copy and its
// directory are synced, after the thaw. mount "" is not frozen.
func bare(mount, image, dir string, durable bool) (time.Duration, error) {
	to := filepath.Join(dir, "bare.img")
	src, err := os.Open(image)
	if err != nil {
		return 0, err
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		return 0, err
	}
	defer dst.Close()
	start := time.Now()
	if err := frozen(mount, func() error { return unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) }); err != nil {
		return 0, err
	}
	if durable {
		if err := errors.Join(dst.Sync(), syncDir(dir)); err != nil {
			return 0, err
		}
	}
	return time.Since(start), os.Remove(to)
}

// frozen does work while the filesystem is frozen.
func frozen(mount string, work func() error) error {
	if mount == "" {
		return work()
	}
	top, err := os.Open(mount)
	if err != nil {
		return err
	}
	defer top.Close()
	if err := unix.IoctlSetInt(int(top.Fd()), fiFreeze, 0); err != nil {
		return err
	}
	return errors.Join(work(), unix.IoctlSetInt(int(top.Fd()), fiThaw, 0))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// extents counts those of a file.
func extents(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	// struct fiemap without room for extents: they are counted only.
	const fsIocFiemap = 0xc020660b
	m := struct {
		start, length                  uint64
		flags, mapped, count, reserved uint32
	}{length: 1<<63 - 1}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&m))); errno != 0 {
		return 0, errno
	}
	return int64(m.mapped), nil
}

// copyAll is the ceiling: the image's data is copied, holes are not, and synced.
func copyAll(image, dir string) (took time.Duration, copied int64, err error) {
	src, err := os.Open(image)
	if err != nil {
		return 0, 0, err
	}
	defer src.Close()
	to := filepath.Join(dir, "copy.img")
	dst, err := os.Create(to)
	if err != nil {
		return 0, 0, err
	}
	defer dst.Close()
	start := time.Now()
	st, err := src.Stat()
	if err != nil {
		return 0, 0, err
	}
	for at := int64(0); at < st.Size(); {
		from, err := unix.Seek(int(src.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return 0, 0, err
		}
		if at, err = unix.Seek(int(src.Fd()), from, unix.SEEK_HOLE); err != nil {
			return 0, 0, err
		}
		n, err := io.CopyN(io.NewOffsetWriter(dst, from), io.NewSectionReader(src, from, at-from), at-from)
		if copied += n; err != nil {
			return 0, 0, err
		}
	}
	if err := errors.Join(dst.Truncate(st.Size()), dst.Sync()); err != nil {
		return 0, 0, err
	}
	return time.Since(start), copied, os.Remove(to)
}
