package image

import (
	"encoding/binary"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

const statxDIOAlign = 0x2000 // STATX_DIOALIGN, Linux 6.1

// directIOAlignment is PoolView.DirectIO for a regular file.
func directIOAlignment(f *os.File) int {
	var st unix.Statx_t
	err := ignoringEINTR(func() error { return unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, statxDIOAlign, &st) })
	if err != nil || st.Mask&statxDIOAlign == 0 {
		return -1
	}
	return int(st.Dio_offset_align)
}

// reflinks tells whether the filesystem of a directory can share blocks between
// files, as it says itself.
func reflinks(dir *os.File, fsType string) bool {
	const (
		flagsAt     = 92      // in struct xfs_fsop_geom_v1
		flagReflink = 1 << 20 // XFS_FSOP_GEOM_FLAGS_REFLINK
	)
	switch fsType {
	case "btrfs", "bcachefs":
		return true
	case "xfs":
		var buf [1024]byte
		err := ioctl(dir, xfsIocGeometryV1, unsafe.Pointer(&buf))
		return err == nil && binary.NativeEndian.Uint32(buf[flagsAt:])&flagReflink != 0
	}
	return false
}
