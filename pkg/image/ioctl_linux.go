package image

import (
	"encoding/binary"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

func ioctl(f *os.File, request uint, arg unsafe.Pointer) error {
	err := ignoringEINTR(func() error {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(arg)); errno != 0 {
			return errno
		}
		return nil
	})
	runtime.KeepAlive(f)
	return err
}

// filesystemUUID asks the filesystem itself, in its text form; FS_IOC_GETFSUUID is
// from kernel 6.9.
func filesystemUUID(f *os.File, fsType string) (string, error) {
	var buf [17]byte // length, UUID
	if err := ioctl(f, fsIocGetFSUUID, unsafe.Pointer(&buf)); err == nil && buf[0] == 16 {
		return formatUUID(buf[1:]), nil
	}
	return ownUUID(f, fsType)
}

// ownUUID is for older kernels. XFS and btrfs always had a call of their own, ext4
// has one from 6.0.
func ownUUID(f *os.File, fsType string) (string, error) {
	var buf [1024]byte
	var request uint
	var at int
	switch fsType {
	case "xfs":
		request, at = xfsIocGeometryV1, 64
	case "btrfs":
		request, at = btrfsIocFSInfo, 16
	case "ext4":
		request, at = ext4IocGetFSUUID, 8
		binary.NativeEndian.PutUint32(buf[:], 16) // room for the UUID
	default:
		return "", unix.EOPNOTSUPP
	}
	if err := ioctl(f, request, unsafe.Pointer(&buf)); err != nil {
		return "", err
	}
	return formatUUID(buf[at : at+16]), nil
}

// setNoCow marks a directory, whose new files inherit the mark.
func setNoCow(dir *os.File) error {
	flags, err := inodeFlags(dir)
	if err != nil {
		return err
	}
	err = ignoringEINTR(func() error {
		return unix.IoctlSetPointerInt(int(dir.Fd()), unix.FS_IOC_SETFLAGS, int(flags|noCow))
	})
	runtime.KeepAlive(dir)
	return err
}

func isNoCow(f *os.File) (bool, error) {
	flags, err := inodeFlags(f)
	return flags&noCow != 0, err
}

func inodeFlags(f *os.File) (uint32, error) {
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	runtime.KeepAlive(f)
	return flags, err
}

type fiemapExtent struct {
	logical, physical, length uint64
	_                         [2]uint64
	flags                     uint32
	_                         [3]uint32
}

type fiemap struct {
	start, length        uint64
	flags, mapped, count uint32
	_                    uint32
	extents              [256]fiemapExtent
}

// nextHole returns the first range at or after from, and below size, that has no
// blocks; start is size if there is none. EOPNOTSUPP when the filesystem cannot
// tell (tmpfs). Not lseek(SEEK_HOLE): to that, allocated and unwritten is a hole.
func nextHole(f *os.File, from, size int64) (start, end int64, err error) {
	return holeIn(from, size, func(m *fiemap) error { return ioctl(f, fsIocFiemap, unsafe.Pointer(m)) })
}

// holeIn is nextHole over what ask says of the extents. It ends whatever that is.
func holeIn(from, size int64, ask func(*fiemap) error) (start, end int64, err error) {
	const last = 1 // FIEMAP_EXTENT_LAST
	next := uint64(from)
	var m fiemap
	for next < uint64(size) {
		asked := next
		m.start, m.length, m.mapped, m.count = next, uint64(size)-next, 0, uint32(len(m.extents))
		if err := ask(&m); err != nil {
			return 0, 0, err
		}
		for _, e := range m.extents[:min(m.mapped, m.count)] {
			if e.logical > next {
				return int64(next), int64(min(e.logical, uint64(size))), nil
			}
			next = max(next, e.logical+e.length)
			if e.flags&last != 0 || next >= uint64(size) {
				return int64(min(next, uint64(size))), size, nil
			}
		}
		if next == asked {
			break
		}
	}
	return int64(min(next, uint64(size))), size, nil
}

// commitBtrfs makes statfs show what was freed, without writing others' data.
func commitBtrfs(f *os.File) error {
	var transaction uint64
	if err := ioctl(f, btrfsIocStartSync, unsafe.Pointer(&transaction)); err != nil {
		return err
	}
	return ioctl(f, btrfsIocWaitSync, unsafe.Pointer(&transaction))
}
