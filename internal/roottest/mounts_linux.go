package roottest

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// madeMounts is an environment variable with the namespace that OwnMounts made.
const madeMounts = "CSI_LOOP_TEST_MOUNTS"

// OwnMounts gives the tests a mount namespace of their own, by starting the program
// anew in one. Somebody who makes a namespace from that of the machine (a container,
// another test) copies every mount in it, and a copy keeps a filesystem mounted and its
// loop device bound after the tests have unmounted theirs. Mounts of others that are
// copied here are let go for the same reason.
//
// It does nothing in a process that is not root, may not do that, or has a namespace of
// its own, that of a test that started it too. Main calls it; a TestMain that changes what the program would do when it is
// started anew calls it before.
func OwnMounts() error {
	if os.Geteuid() != 0 || slices.Contains(os.Args, "-test.fuzzworker") {
		return nil
	}
	ours := namespace("self")
	if ours == "" || ours != namespace(strconv.Itoa(os.Getppid())) || ours == os.Getenv(madeMounts) {
		return nil
	}
	runtime.LockOSThread() // a namespace is a thread's, and that of the program it executes
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		runtime.UnlockOSThread()
		if errors.Is(err, unix.EPERM) {
			return nil
		}
		return fmt.Errorf("unshare: %w", err)
	}
	// What others unmount on the machine is unmounted here, too, where it can be.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts slaves: %w", err)
	}
	table, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return err
	}
	for _, at := range slices.Backward(foreign(string(table), needed())) {
		_ = unix.Unmount(at, unix.MNT_DETACH) // gone, or below one that is
	}
	if err = os.Setenv(madeMounts, namespace("thread-self")); err == nil {
		err = syscall.Exec("/proc/self/exe", os.Args, os.Environ())
	}
	return fmt.Errorf("start in a mount namespace: %w", err)
}

// namespace names the mount namespace of a process, "" if it cannot be seen.
func namespace(process string) string {
	name, _ := os.Readlink("/proc/" + process + "/ns/mnt")
	return name
}

// needed are paths that must stay.
func needed() []string {
	paths := []string{os.TempDir()}
	for _, find := range []func() (string, error){os.Getwd, os.Executable} {
		if path, err := find(); err == nil {
			paths = append(paths, path)
		}
	}
	return paths
}

// foreign are the mount points of mountinfo that show a loop device with a filesystem
// of those that tests make, save those that a path leads through.
func foreign(mountinfo string, paths []string) (points []string) {
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range strings.Lines(mountinfo) {
		left, right, _ := strings.Cut(line, " - ")
		fields, source := strings.Fields(left), strings.Fields(right)
		if len(fields) < 5 || len(source) < 2 || mkfs[source[0]] == nil || !strings.HasPrefix(source[1], "/dev/loop") {
			continue
		}
		at := unescape.Replace(fields[4])
		if !slices.ContainsFunc(paths, func(p string) bool { return at == "/" || p == at || strings.HasPrefix(p, at+"/") }) {
			points = append(points, at)
		}
	}
	return points
}
