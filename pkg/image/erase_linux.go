package image

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// openedOnce tells whether this open file is the only one of its inode, a loop device's
// included: the kernel grants a write lease to nobody else. False also where the
// filesystem has no leases.
func openedOnce(f *os.File) bool {
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	}
	runtime.KeepAlive(f)
	return err == nil
}
