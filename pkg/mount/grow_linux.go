package mount

import (
	"errors"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Ioctl numbers that x/sys does not have. The directions of _IOR and _IOW differ
// between architectures, so they are made with its own encoding.
const (
	xfsFSGeometryV1 = iocRead | 112<<iocSizeShift | 'X'<<8 | 100
	xfsGrowFSData   = iocWrite | 16<<iocSizeShift | 'X'<<8 | 110
	extResizeFS     = iocWrite | 8<<iocSizeShift | 'f'<<8 | 16
	btrfsResize     = iocWrite | 4096<<iocSizeShift | 0x94<<8 | 3
	btrfsDevInfo    = iocRead | iocWrite | 4096<<iocSizeShift | 0x94<<8 | 30
	iocSizeShift    = 16
	// BLKGETSIZE64 is _IOR with the size of size_t, FS_IOC_SETFLAGS _IOW with the
	// size of a long: their direction bits are this architecture's.
	iocDirMask = 0xe0000000
	iocRead    = unix.FS_IOC_GETFLAGS & iocDirMask
	iocWrite   = unix.FS_IOC_SETFLAGS & iocDirMask
)

// xfsGeom is struct xfs_fsop_geom_v1.
type xfsGeom struct {
	blockSize, rtExtSize, agBlocks, agCount      uint32
	logBlocks, sectSize, inodeSize, imaxPct      uint32
	dataBlocks, rtBlocks, rtExtents, logStart    uint64
	uuid                                         [16]byte
	sunit, swidth, version, flags, logSect, rtSe uint32
	dirBlock, _                                  uint32
}

type xfsGrow struct {
	newBlocks  uint64
	imaxPct, _ uint32
}

// btrfsDevInfoArgs is struct btrfs_ioctl_dev_info_args.
type btrfsDevInfoArgs struct {
	devID      uint64
	uuid       [16]byte
	bytesUsed  uint64
	totalBytes uint64
	fsid       [16]byte
	_          [377 * 8]byte
	path       [1024]byte
}

type btrfsVolArgs struct {
	fd   int64
	name [4088]byte
}

// The kernel copies as many bytes as the number says.
var (
	_ [112]byte  = [unsafe.Sizeof(xfsGeom{})]byte{}
	_ [16]byte   = [unsafe.Sizeof(xfsGrow{})]byte{}
	_ [4096]byte = [unsafe.Sizeof(btrfsDevInfoArgs{})]byte{}
	_ [4096]byte = [unsafe.Sizeof(btrfsVolArgs{})]byte{}
)

func ioctl(fd int, request uint, arg unsafe.Pointer) (int, error) {
	return noEINTR(func() (int, error) {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg))
		if errno != 0 {
			return 0, errno
		}
		return int(r), nil
	})
}

// openMount opens where a filesystem is mounted.
func openMount(path string) (fd int, err error) { return openFor(path, unix.O_NOFOLLOW) }

func openFor(path string, flags int) (fd int, err error) {
	return noEINTR(func() (int, error) {
		return unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|flags, 0)
	})
}

// withOpen opens path for reading and hands it to do.
func withOpen(path string, flags int, do func(fd int) error) error {
	fd, err := openFor(path, flags)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	return do(fd)
}

// deviceSize returns the size of a block device in bytes.
func deviceSize(path string) (int64, error) {
	var size int64
	err := withOpen(path, 0, func(fd int) error {
		var n uint64
		if _, err := ioctl(fd, unix.BLKGETSIZE64, unsafe.Pointer(&n)); err != nil {
			if errors.Is(err, unix.ENOTTY) {
				return unix.ENOTBLK
			}
			return err
		}
		size = int64(min(n, 1<<62))
		return nil
	})
	return size, err
}

// claimable fails with EBUSY while a device is mounted or otherwise claimed.
func claimable(path string) error {
	return withOpen(path, unix.O_EXCL, func(int) error { return nil })
}

func xfsGeometryOf(fd int) (xfsGeom, error) {
	var g xfsGeom
	_, err := ioctl(fd, xfsFSGeometryV1, unsafe.Pointer(&g))
	return g, err
}

// xfsSize asks a mounted XFS.
func xfsSize(path string) (Superblock, error) {
	var sb Superblock
	err := withOpen(path, unix.O_NOFOLLOW, func(fd int) error {
		g, err := xfsGeometryOf(fd)
		sb = Superblock{
			Type: "xfs", Size: int64(g.dataBlocks) * int64(g.blockSize), BlockSize: int(g.blockSize),
			xfs: xfsGeometry{agBlocks: int64(g.agBlocks)},
		}
		return err
	})
	return sb, err
}

// notKept are what XFS takes from a reconfiguration also if it is not said
// (xfs_fs_reconfigure).
var notKept = []string{"inode32", "max_atomic_write"}

// frozen says whether the filesystem that is mounted at path is frozen: the kernel answers
// EBUSY to a reconfiguration of such a one, also to one that changes nothing, before it
// looks at anything else (fact 104). All else that tells waits for the thaw.
// What would change by not being said is said, or the mount not asked: one that is
// read-only may become writable.
func frozen(m Mount) bool {
	if m.ReadOnly {
		return false
	}
	fd, err := unix.Fspick(unix.AT_FDCWD, m.Path, unix.FSPICK_CLOEXEC|unix.FSPICK_NO_AUTOMOUNT|unix.FSPICK_SYMLINK_NOFOLLOW)
	if err != nil {
		return false
	}
	defer closeFD(fd)
	for _, o := range m.SuperOptions {
		key, value, valued := strings.Cut(o, "=")
		switch {
		case !slices.Contains(notKept, key):
			continue
		case valued:
			err = unix.FsconfigSetString(fd, key, value)
		default:
			err = unix.FsconfigSetFlag(fd, key)
		}
		if err != nil {
			return false
		}
	}
	return errors.Is(unix.FsconfigReconfigure(fd), unix.EBUSY)
}

// growXFS keeps the share of inodes as it is.
func growXFS(device string, fd int) error {
	size, err := deviceSize(device)
	if err != nil {
		return err
	}
	g, err := xfsGeometryOf(fd)
	if err != nil || g.blockSize == 0 {
		return err
	}
	arg := xfsGrow{newBlocks: uint64(size) / uint64(g.blockSize), imaxPct: g.imaxPct}
	_, err = ioctl(fd, xfsGrowFSData, unsafe.Pointer(&arg))
	return err
}

// growExt asks the ext4 driver, which serves ext2 and ext3 too.
func growExt(device string, fd, blockSize int) error {
	size, err := deviceSize(device)
	if err != nil {
		return err
	}
	blocks := uint64(size) / uint64(blockSize)
	_, err = ioctl(fd, extResizeFS, unsafe.Pointer(&blocks))
	return err
}

// btrfsSectorSize is the smallest unit that btrfs sizes are rounded to.
const btrfsSectorSize = 4096

// btrfsSize asks a mounted btrfs for what it uses of its only device.
func btrfsSize(path string, devID uint64) (Superblock, error) {
	var sb Superblock
	err := withOpen(path, unix.O_NOFOLLOW, func(fd int) error {
		info := btrfsDevInfoArgs{devID: devID}
		_, err := ioctl(fd, btrfsDevInfo, unsafe.Pointer(&info))
		sb = Superblock{Type: "btrfs", Size: int64(min(info.totalBytes, 1<<62)), BlockSize: btrfsSectorSize, devID: devID}
		return err
	})
	return sb, err
}

// growBtrfs lets a device fill what it lies on. A positive answer says that a
// balance or the like has the filesystem for itself.
func growBtrfs(fd int, devID uint64) error {
	var arg btrfsVolArgs
	copy(arg.name[:], strconv.FormatUint(devID, 10)+":max")
	n, err := ioctl(fd, btrfsResize, unsafe.Pointer(&arg))
	if err == nil && n > 0 {
		return unix.EBUSY
	}
	return err
}
