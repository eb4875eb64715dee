package loop

import (
	"errors"
	"io"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// FileIDOf identifies an open file. The error is that of fstat.
func FileIDOf(f *os.File) (FileID, error) {
	st, err := fstat(f)
	return FileID{Dev: uint64(st.Dev), Ino: st.Ino}, err
}

// withFD runs fn with the file's descriptor, and keeps the file open meanwhile. It
// does not change the descriptor's mode as File.Fd does.
func withFD(f *os.File, fn func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := c.Control(func(fd uintptr) { inner = fn(int(fd)) }); err != nil {
		return err
	}
	return inner
}

func fstat(f *os.File) (st unix.Stat_t, err error) {
	err = withFD(f, func(fd int) error { return unix.Fstat(fd, &st) })
	return st, err
}

// hostFiles implements files. It is shared with the fake kernel of the tests: open
// files, leases and locks are the same without root.
type hostFiles struct{}

func (hostFiles) Stat(f *os.File) (out fileStat, err error) {
	err = withFD(f, func(fd int) error {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err != nil {
			return err
		}
		out = fileStat{
			ID:       FileID{Dev: uint64(st.Dev), Ino: st.Ino},
			Size:     st.Size,
			Regular:  st.Mode&unix.S_IFMT == unix.S_IFREG,
			Writable: flags&unix.O_ACCMODE == unix.O_RDWR,
		}
		return nil
	})
	return out, err
}

// marking makes Sole atomic for all managers of the process: two of them may be
// given the same open file. There are several, by inode: files of different volumes
// should not wait for each other.
var marking [64]sync.Mutex

// mark is the value of F_SETSIG that says "handed to a loop device". It is kept in
// the open file itself, so that it holds for all its descriptors and for as long as
// a loop device keeps it. Only a lease that is being broken uses it, and dropping a
// lease resets it (lease_modify).
const mark = int(unix.SIGURG)

// Sole takes a write lease and drops it. The kernel grants it only if the inode's
// read and write counts are those of this very open file (check_conflicting_open in
// fs/locks.c); EAGAIN otherwise, EACCES without ownership or CAP_LEASE, EINVAL from
// file systems without leases. Should somebody open the file in between, he waits
// until the lease is dropped and we get SIGIO, which the Go runtime ignores.
func (hostFiles) Sole(f *os.File, use leaseUse) (bool, error) {
	st, err := fstat(f)
	if err != nil {
		return false, err
	}
	mu := &marking[st.Ino%uint64(len(marking))]
	mu.Lock()
	defer mu.Unlock()
	sole := false
	err = withFD(f, func(fd int) error {
		signal, err := unix.FcntlInt(uintptr(fd), unix.F_GETSIG, 0)
		if err != nil || (use != afterBind && signal == mark) {
			return err
		}
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK)
		if err == nil {
			_, err = unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK)
		}
		sole = err == nil
		if use == looking {
			return err
		}
		_, merr := unix.FcntlInt(uintptr(fd), unix.F_SETSIG, mark)
		sole = sole && merr == nil
		return errors.Join(err, merr)
	})
	return sole, err
}

// Lock goes by a new open file: a loop device keeps the caller's, and an flock on
// that would outlive a crash for as long as the device is bound.
func (hostFiles) Lock(f *os.File) (lock io.Closer, err error) {
	err = withFD(f, func(fd int) error {
		l, err := os.Open("/proc/self/fd/" + strconv.Itoa(fd))
		if err != nil {
			return err
		}
		if err := withFD(l, func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) }); err != nil {
			_ = l.Close()
			return err
		}
		lock = l
		return nil
	})
	return lock, err
}
