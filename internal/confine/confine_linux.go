package confine

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Run calls f, and confines the programs that f starts itself (not those that
// goroutines of f start). What this kernel cannot do, or somebody forbids, is left
// out: a program that runs with more rights is better than none.
//
// f runs on a thread of its own that ends with it, because limits are a thread's and
// cannot be taken back. Landlock and the filter bind f as well, on that thread: it can
// write to nothing else. It should do nothing but start programs and wait for them.
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
	dropBounding()
	if err := restrict(limits.Write); err != nil {
		return err
	}
	dropOwn() // the last: nothing above has to do without them
	return nil
}

func restrict(write []*os.File) error {
	if write == nil {
		return filterCalls(false)
	}
	if err := restrictWrites(write); err != nil {
		return err
	}
	directories, err := anyDirectory(write)
	if err != nil {
		return err
	}
	return filterCalls(!directories)
}

func anyDirectory(files []*os.File) (bool, error) {
	for _, f := range files {
		if st, err := f.Stat(); err != nil || st.IsDir() {
			return err == nil, err
		}
	}
	return false, nil
}

// dropBounding leaves a program that is executed no capability to gain, also where root
// executes it. Without CAP_SETPCAP, which is needed to drop one, nothing changes, and
// dropOwn alone stands in the way.
func dropBounding() {
	_ = unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
	for c := range uintptr(64) {
		if unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0) != nil {
			break // EINVAL behind the kernel's last one, or EPERM for all
		}
	}
}

// dropOwn takes all capabilities from the thread. With no_new_privs what it executes gets
// none that it does not have itself, whatever the bounding set is. To start a program, to
// wait for it and, from another thread, to kill it takes none.
func dropOwn() {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	_ = unix.Capset(&head, &none[0])
}
