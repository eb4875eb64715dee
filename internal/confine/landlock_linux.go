package confine

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// inDirectories are the rights of Landlock's first version that change something.
const inDirectories = unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_REMOVE_DIR | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE |
	unix.LANDLOCK_ACCESS_FS_MAKE_CHAR | unix.LANDLOCK_ACCESS_FS_MAKE_DIR | unix.LANDLOCK_ACCESS_FS_MAKE_REG |
	unix.LANDLOCK_ACCESS_FS_MAKE_SOCK | unix.LANDLOCK_ACCESS_FS_MAKE_FIFO | unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK |
	unix.LANDLOCK_ACCESS_FS_MAKE_SYM

// onFiles are rights that a single file can have.
const onFiles = unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV

// rights are what a ruleset takes away. A program gets back those on files and
// directories for what it may write, and no other.
type rights struct {
	files, net, scoped uint64
}

// versions are what Landlock can take away, version after version, the first first. A
// version that has nothing for us is not here.
var versions = []rights{
	{files: inDirectories}, // Linux 5.13
	{files: unix.LANDLOCK_ACCESS_FS_REFER},
	{files: unix.LANDLOCK_ACCESS_FS_TRUNCATE}, // 6.2
	{net: unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP},
	{files: unix.LANDLOCK_ACCESS_FS_IOCTL_DEV},
	{scoped: unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL}, // 6.12
	{files: unix.LANDLOCK_ACCESS_FS_RESOLVE_UNIX},
}

// restrictWrites is Landlock: the thread and its children open for writing only what
// is allowed, and reach no socket and no process outside, as far as the kernel's
// version of it goes. Where the kernel has no Landlock all stays open.
func restrictWrites(allowed []*os.File) error {
	fd, taken, err := newRuleset()
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM) { // not built in, not switched on, or seccomp
		return nil
	} else if err != nil {
		return fmt.Errorf("landlock: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	for _, f := range allowed {
		if err := allow(fd, taken, f); err != nil {
			return fmt.Errorf("landlock rule for %s: %w", f.Name(), err)
		}
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(fd), 0, 0); errno != 0 {
		return fmt.Errorf("landlock: %w", errno)
	}
	return nil
}

// newRuleset makes a ruleset that takes away the most that this kernel knows. Newest
// first, the kernel says itself which that is: what it does not know is EINVAL.
func newRuleset() (fd int, taken rights, err error) {
	for n := len(versions); n > 0; n-- {
		taken = rights{}
		for _, v := range versions[:n] {
			taken.files |= v.files
			taken.net |= v.net
			taken.scoped |= v.scoped
		}
		if !scopesSignalsOfProcesses() {
			taken.scoped &^= unix.LANDLOCK_SCOPE_SIGNAL
		}
		attr := unix.LandlockRulesetAttr{Handled_access_fs: taken.files, Handled_access_net: taken.net, Scoped: taken.scoped}
		// An older kernel takes a longer structure if what it does not know is zero.
		r, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
		if errno == 0 {
			return int(r), taken, nil
		}
		err = errno
		if errno != unix.EINVAL && errno != unix.E2BIG {
			break
		}
	}
	return -1, taken, err
}

// scopesSignalsOfProcesses tells whether the scope of signals leaves those between
// the threads of one process alone, which it did not at first: our thread, which is
// under the limits too, would be unable to make another of Go's yield. The filter
// forbids signals in any case.
func scopesSignalsOfProcesses() bool {
	const mended = 1 << 1 // the second of Landlock's errata
	errata, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_ERRATA)
	return errno == 0 && errata&mended != 0
}

// allow gives back what was taken for f, and if it is a directory for all below it.
// Only a file that is named itself has ioctls back: a directory's devices are nobody's
// business.
func allow(ruleset int, taken rights, f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	rule := unix.LandlockPathBeneathAttr{Allowed_access: taken.files & onFiles, Parent_fd: int32(f.Fd())}
	if st.IsDir() {
		const directory = inDirectories | unix.LANDLOCK_ACCESS_FS_REFER | unix.LANDLOCK_ACCESS_FS_TRUNCATE
		rule.Allowed_access = taken.files & directory
	}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(ruleset), unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&rule)), 0, 0, 0)
	runtime.KeepAlive(f)
	if errno != 0 {
		return errno
	}
	return nil
}
