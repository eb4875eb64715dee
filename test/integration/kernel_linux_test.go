package integration

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// canGrowExt4 says whether this process, and so the driver, may grow a mounted
// ext4: CAP_SYS_RESOURCE, fact 40.
func canGrowExt4() bool {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			return err == nil && caps>>unix.CAP_SYS_RESOURCE&1 == 1
		}
	}
	return false
}

// withDevice opens a file or node, for an ioctl, and closes it.
func withDevice(path string, flags int, f func(fd uintptr) error) error {
	file, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	return f(file.Fd())
}

func ioctl(fd, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, fd, request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

// deviceSize is BLKGETSIZE64.
func deviceSize(path string) (size int64, err error) {
	err = withDevice(path, os.O_RDONLY, func(fd uintptr) error {
		return ioctl(fd, unix.BLKGETSIZE64, unsafe.Pointer(&size))
	})
	return size, err
}

// deviceReadOnly is BLKROGET.
func deviceReadOnly(path string) (bool, error) {
	var ro int32
	err := withDevice(path, os.O_RDONLY, func(fd uintptr) error { return ioctl(fd, unix.BLKROGET, unsafe.Pointer(&ro)) })
	return ro == 1, err
}

// From linux/fs.h; not in x/sys/unix.
const (
	fitrim     = 0xc0185879
	blkDiscard = 0x1277
)

// trim is the FITRIM of fstrim, over the whole filesystem.
func trim(path string) (bytes uint64, err error) {
	r := [3]uint64{0, ^uint64(0), 0} // struct fstrim_range: start, len, minlen
	err = withDevice(path, os.O_RDONLY, func(fd uintptr) error { return ioctl(fd, fitrim, unsafe.Pointer(&r)) })
	return r[1], err
}

// discard is blkdiscard, zeroOut blkdiscard -z, over [at, at+length).
func discard(path string, at, length int64) error { return blockRange(path, blkDiscard, at, length) }

func zeroOut(path string, at, length int64) error {
	return blockRange(path, unix.BLKZEROOUT, at, length)
}

func blockRange(path string, request uintptr, at, length int64) error {
	r := [2]uint64{uint64(at), uint64(length)}
	return withDevice(path, os.O_RDWR, func(fd uintptr) error { return ioctl(fd, request, unsafe.Pointer(&r)) })
}

// allocated is how many bytes of blocks a file has.
func allocated(path string) (int64, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return 0, err
	}
	return st.Blocks * 512, nil
}

// free is what a file system has left, for root too, in bytes.
func free(path string) (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(path, &st); err != nil {
		return 0, err
	}
	return int64(st.Bfree) * st.Bsize, nil
}

// fsMagic names the type of the filesystem at path.
func fsMagic(path string) (string, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(path, &st); err != nil {
		return "", err
	}
	switch uint32(st.Type) {
	case unix.EXT4_SUPER_MAGIC:
		return "ext4", nil
	case unix.XFS_SUPER_MAGIC:
		return "xfs", nil
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs", nil
	}
	return fmt.Sprintf("%#x", st.Type), nil
}

// Modes of fallocate that a block device knows.
const (
	punchHole = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	zeroRange = unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE
)

func fallocateDevice(path string, mode uint32, at, length int64) error {
	return withDevice(path, os.O_RDWR, func(fd uintptr) error { return unix.Fallocate(int(fd), mode, at, length) })
}

// deviceTag is the lo_file_name of a loop device.
func deviceTag(path string) (tag string, err error) {
	err = withDevice(path, os.O_RDONLY, func(fd uintptr) error {
		info, err := unix.IoctlLoopGetStatus64(int(fd))
		if err == nil {
			tag = unix.ByteSliceToString(info.File_name[:])
		}
		return err
	})
	return tag, err
}
