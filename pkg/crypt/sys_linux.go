package crypt

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The version of the device mapper's interface that is spoken: the first that knows
// removal after the last user is 4.27, and that of one target is 4.41 (kernel 5.5).
var interfaceVersion = [3]uint32{4, 41, 0}

// runTogether runs a program that does not outlive this process: one that was left over
// would write its header while the next process makes another, or has made one and
// handed the volume out.
func runTogether(cmd *exec.Cmd) error {
	// The signal comes at the end of the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd.Run()
}

// control asks the device mapper one thing. The answer comes in head, and may follow it in
// data.
func control(path string, request uintptr, head *unix.DmIoctl, data []byte) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	head.Version = interfaceVersion
	head.Data_start = unix.SizeofDmIoctl
	head.Data_size = uint32(unix.SizeofDmIoctl + len(data))
	buffer := make([]byte, head.Data_size)
	copy(buffer, unsafe.Slice((*byte)(unsafe.Pointer(head)), unix.SizeofDmIoctl))
	copy(buffer[unix.SizeofDmIoctl:], data)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(&buffer[0])))
	if errno != 0 {
		return errno
	}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(head)), unix.SizeofDmIoctl), buffer)
	copy(data, buffer[unix.SizeofDmIoctl:])
	return nil
}

// listNames are the names of all mappings of the machine.
func listNames(path string) ([]string, error) {
	for size := 64 << 10; ; size *= 4 {
		var head unix.DmIoctl
		answer := make([]byte, size)
		switch err := control(path, unix.DM_LIST_DEVICES, &head, answer); {
		case errors.Is(err, unix.ENOENT): // no node: nothing was ever mapped from here
			return nil, nil
		case err != nil:
			return nil, fmt.Errorf("list mappings: %w", err)
		case head.Flags&unix.DM_BUFFER_FULL_FLAG == 0:
			return parseNames(answer), nil
		case size > 64<<20:
			return nil, fmt.Errorf("list mappings: %w", unix.E2BIG)
		}
	}
}

// status describes the mapping of a name: whether a table is in force. ENXIO when there
// is no such mapping.
func status(path, name string) (uuid string, active bool, err error) {
	var head unix.DmIoctl
	copy(head.Name[:len(head.Name)-1], name)
	if err := control(path, unix.DM_DEV_STATUS, &head, nil); err != nil {
		return "", false, err
	}
	return unix.ByteSliceToString(head.Uuid[:]), head.Flags&unix.DM_ACTIVE_PRESENT_FLAG != 0, nil
}

// blockNumbers are major and minor of an open block device, as sysfs writes them.
func blockNumbers(f *os.File) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return "", fmt.Errorf("%w: no block device", ErrGone)
	}
	return fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)), nil
}

// targetVersion is the version of the kernel's target "crypt", which is loaded if it is a
// module. Errors: errors.ErrUnsupported without a device mapper, os.ErrNotExist without
// the target.
func targetVersion(path string) (version [3]uint32, err error) {
	if err := ensureControl(path); err != nil {
		return version, err
	}
	var head unix.DmIoctl
	copy(head.Name[:], "crypt")
	// struct dm_target_versions: next, version, name.
	answer := make([]byte, 256)
	err = control(path, unix.DM_GET_TARGET_VERSION, &head, answer)
	switch {
	case errors.Is(err, unix.EINVAL):
		return version, os.ErrNotExist
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENOENT):
		return version, errors.ErrUnsupported
	case err != nil:
		return version, err
	}
	for i := range version {
		version[i] = *(*uint32)(unsafe.Pointer(&answer[4+4*i]))
	}
	return version, nil
}

// ensureControl makes the node of the device mapper where /dev lacks it.
func ensureControl(path string) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if _, err := os.Stat("/sys/class/misc/device-mapper/dev"); err != nil {
		// As a module that is not loaded it has no node in sysfs; then opening its
		// well-known number loads it, where devtmpfs has that.
		return errors.ErrUnsupported
	}
	const number = 10<<8 | 236 // misc, device-mapper; the same on every machine
	//nolint:gosec // as /dev/mapper is everywhere
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := unix.Mknod(path, unix.S_IFCHR|0o600, number); err != nil && !errors.Is(err, unix.EEXIST) {
		return &os.PathError{Op: "mknod", Path: path, Err: err}
	}
	return nil
}

// remove removes a mapping by its UUID, now or after its last user. The kernel's answers
// are ENXIO when there is none, EBUSY when it has users.
func remove(path, name, uuid string, last bool) error {
	var head unix.DmIoctl
	// By one or the other, not both.
	if uuid != "" {
		copy(head.Uuid[:], uuid)
	} else {
		copy(head.Name[:], name)
	}
	if last {
		head.Flags = unix.DM_DEFERRED_REMOVE
	}
	return control(path, unix.DM_DEV_REMOVE, &head, nil)
}
