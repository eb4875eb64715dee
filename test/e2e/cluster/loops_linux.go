package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const loopMajor = 7

// file is what identifies a loop device's backing file. Paths cannot: those that
// sysfs shows are of mount namespaces that are gone.
type file struct{ device, inode uint64 }

// clearLoops clears the loop devices over files below dir, and those over them:
// the kubelet puts one over every raw block volume, and a pool with a filesystem
// of its own is itself on one. The devices of mounted volumes clear themselves
// when the last mount goes; this waits for that first.
func clearLoops(ctx context.Context, dir string) error {
	files, err := filesBelow(dir)
	if err != nil {
		return err
	}
	var attempt int
	return waitFor(ctx, 20*time.Second, func() error {
		found, err := loopsOver(files)
		if err != nil || len(found) == 0 {
			return err
		}
		attempt++
		for _, number := range found {
			if attempt > 5 { // half a second: enough for those that go by themselves
				_ = clearLoop(number) // one in use goes when what is on it has gone
			}
		}
		return fmt.Errorf("loop devices %v are still bound to files below %s", found, dir)
	})
}

func filesBelow(dir string) (map[file]bool, error) {
	files := map[file]bool{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		files[file{st.Dev, st.Ino}] = true
		return nil
	})
	return files, err
}

// loopsOver lists the loop devices over the files, the uppermost first.
func loopsOver(files map[file]bool) ([]int, error) {
	bound, err := filepath.Glob("/sys/block/loop*/loop")
	if err != nil {
		return nil, err
	}
	status := map[int]*unix.LoopInfo64{}
	for _, path := range bound {
		number, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(filepath.Dir(path)), "loop"))
		if err != nil {
			return nil, err
		}
		if info := loopStatus(number); info != nil {
			status[number] = info
		}
	}
	ours := map[int]bool{}
	var order []int
	for more := true; more; {
		more = false
		for number, info := range status {
			if ours[number] {
				continue
			}
			if files[file{info.Device, info.Inode}] || ours[loopNumber(info.Device)] || ours[loopNumber(info.Rdevice)] {
				ours[number], more = true, true
				order = append([]int{number}, order...)
			}
		}
	}
	return order, nil
}

// loopNumber of a device number, or -1 if it is of no loop device.
func loopNumber(device uint64) int {
	if unix.Major(device) != loopMajor {
		return -1
	}
	return int(unix.Minor(device))
}

// loopStatus is nil for a device that is not bound any more.
func loopStatus(number int) *unix.LoopInfo64 {
	f, err := os.OpenFile("/dev/loop"+strconv.Itoa(number), os.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		return nil
	}
	return info
}

func clearLoop(number int) error {
	f, err := os.OpenFile("/dev/loop"+strconv.Itoa(number), os.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0)
}
