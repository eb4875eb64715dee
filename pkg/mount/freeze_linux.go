package mount

import (
	"errors"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// ioctl numbers that x/sys does not have. The direction bits differ between
// architectures and are taken from numbers that it has.
const (
	bothWays = (unix.FS_IOC_GETFLAGS | unix.FS_IOC_SETFLAGS) &^ 0x1fffffff
	fiFreeze = bothWays | 4<<16 | 'X'<<8 | 119
	fiThaw   = bothWays | 4<<16 | 'X'<<8 | 120
)

// freezeFilesystem stops all writers to the filesystem of an open directory, and
// makes what is on its device complete. EBUSY: it is frozen.
func freezeFilesystem(dir *os.File) error {
	return ioctlNone(dir, fiFreeze)
}

// thawFilesystem lets them go on. EINVAL: it is not frozen.
func thawFilesystem(dir *os.File) error {
	return ioctlNone(dir, fiThaw)
}

func ioctlNone(f *os.File, request uint) error {
	_, err := noEINTR(func() (int, error) { return 0, unix.IoctlSetInt(int(f.Fd()), request, 0) })
	runtime.KeepAlive(f)
	return err
}

func syncFilesystem(dir *os.File) error {
	_, err := noEINTR(func() (int, error) { return 0, unix.Syncfs(int(dir.Fd())) })
	runtime.KeepAlive(dir)
	return err
}

// mountNumberOf is mountNumber for what is open.
func mountNumberOf(f *os.File) (uint64, error) {
	defer runtime.KeepAlive(f)
	return mountNumberFD(int(f.Fd()))
}

// socketPair makes two ends of a connection that keeps messages apart; the second is
// for another process.
func socketPair() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	one, theirs := os.NewFile(uintptr(fds[0]), "helper"), os.NewFile(uintptr(fds[1]), "caller")
	defer one.Close()
	conn, err := net.FileConn(one)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	ours, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, nil, errors.Join(errors.ErrUnsupported, conn.Close(), theirs.Close())
	}
	return ours, theirs, nil
}
