package mount

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// fiTrim is FITRIM.
const fiTrim = iocRead | iocWrite | 24<<iocSizeShift | 'X'<<8 | 121

// trimRange trims a part of the filesystem of the mount with that ID at path: should it
// have been unmounted a moment ago, the filesystem below stays as it is.
func trimRange(path, fsType string, mountID int, start, length uint64) (trimmed int64, err error) {
	err = withOpen(path, unix.O_DIRECTORY|unix.O_NOFOLLOW, func(fd int) error {
		var st unix.Statx_t
		if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
			return err
		}
		if st.Mnt_id != uint64(mountID) {
			return unix.ESTALE
		}
		if fsType == "btrfs" {
			from, size, last, err := btrfsPart(fd, start, length)
			switch {
			case err != nil:
				return err
			case size == 0 && last:
				return unix.EINVAL // as others say
			case size == 0:
				return nil
			}
			start, length = from, size
		}
		request := [3]uint64{start, length, 0} // struct fstrim_range: the last is the least extent
		_, err := ioctl(fd, fiTrim, unsafe.Pointer(&request))
		trimmed = int64(request[1])
		return err
	})
	return trimmed, err
}
