package confine

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Run calls f, and confines the programs that f starts itself (not those that
// goroutines of f start). What this kernel cannot do, or somebody forbids, is left
// out: a program that runs with more rights is better than none.
//
// f runs on a thread of its own that ends with it, because limits are a thread's and
// cannot be taken back. Landlock binds f as well: it can write to nothing else.
func Run(limits Limits, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		if unix.Gettid() == os.Getpid() {
			// The first thread outlives its goroutine, and would show its limits in
			// /proc as those of the process.
			done <- Run(limits, f)
			runtime.UnlockOSThread()
			return
		}
		if err := confine(limits); err != nil {
			done <- fmt.Errorf("confine: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

func confine(limits Limits) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	dropCapabilities()
	if limits.Write == nil {
		return nil
	}
	return restrictWrites(limits.Write)
}

// dropCapabilities leaves a program that is executed no capability, also where root
// executes it. The thread keeps its own. Without CAP_SETPCAP, which is needed to
// drop one, nothing changes.
func dropCapabilities() {
	_ = unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
	for c := range uintptr(64) {
		if unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0) != nil {
			break // EINVAL behind the kernel's last one, or EPERM for all
		}
	}
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&head, &data[0]) == nil {
		data[0].Inheritable, data[1].Inheritable = 0, 0
		_ = unix.Capset(&head, &data[0])
	}
}

// writing are the rights of Landlock's first version that change something, except
// to make device nodes. Programs need to make files where they may write.
const writing = unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_REMOVE_DIR | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE |
	unix.LANDLOCK_ACCESS_FS_MAKE_CHAR | unix.LANDLOCK_ACCESS_FS_MAKE_DIR | unix.LANDLOCK_ACCESS_FS_MAKE_REG |
	unix.LANDLOCK_ACCESS_FS_MAKE_SOCK | unix.LANDLOCK_ACCESS_FS_MAKE_FIFO | unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK |
	unix.LANDLOCK_ACCESS_FS_MAKE_SYM

// restrictWrites is Landlock (Linux 5.13): the thread and its children open for
// writing only what is allowed. Where the kernel has no Landlock all stays open.
func restrictWrites(allowed []*os.File) error {
	ruleset := unix.LandlockRulesetAttr{Handled_access_fs: writing}
	// The size of the first version: newer kernels take it, older ones take no more.
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&ruleset)), unsafe.Sizeof(ruleset.Handled_access_fs), 0)
	if errno == unix.ENOSYS || errno == unix.EOPNOTSUPP || errno == unix.EPERM { // not built in, not switched on, or seccomp
		return nil
	} else if errno != 0 {
		return errno
	}
	defer func() { _ = unix.Close(int(fd)) }()
	for _, f := range allowed {
		if err := allow(int(fd), f); err != nil {
			return fmt.Errorf("landlock rule for %s: %w", f.Name(), err)
		}
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0); errno != 0 {
		return fmt.Errorf("landlock: %w", errno)
	}
	return nil
}

func allow(ruleset int, f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	rule := unix.LandlockPathBeneathAttr{Allowed_access: writing, Parent_fd: int32(f.Fd())}
	if !st.IsDir() {
		rule.Allowed_access = unix.LANDLOCK_ACCESS_FS_WRITE_FILE
	}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(ruleset), unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&rule)), 0, 0, 0)
	runtime.KeepAlive(f)
	if errno != 0 {
		return errno
	}
	return nil
}
