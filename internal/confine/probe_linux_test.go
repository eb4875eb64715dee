//go:build amd64 || arm64

package confine

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// probeVariable makes this test's program one that does a single thing, that of the
// variable's value, and prints how it went: "ok", or the name of an error.
const probeVariable = "CONFINE_PROBE"

func probe(name string, args []string) {
	result := "ok"
	if err := probes[name](args); err != nil {
		if errno, ok := errors.AsType[unix.Errno](err); ok {
			result = unix.ErrnoName(errno)
		} else {
			result = err.Error()
		}
	}
	fmt.Print(result)
	os.Exit(0)
}

// probes are what a program that was taken over might do. Arguments are paths, or for
// those that are about processes a number.
var probes = map[string]func([]string) error{
	"truncate":   func(a []string) error { return unix.Truncate(a[0], 1) },
	"open cut":   func(a []string) error { return opened(a[0], unix.O_RDONLY|unix.O_TRUNC) },
	"open write": func(a []string) error { return opened(a[0], unix.O_WRONLY) },
	"openat2": func(a []string) error {
		fd, err := unix.Openat2(unix.AT_FDCWD, a[0], &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_TRUNC})
		_ = unix.Close(fd)
		return err
	},
	"chmod":    func(a []string) error { return unix.Chmod(a[0], 0o777) },
	"chmod2":   func(a []string) error { return raw(unix.SYS_FCHMODAT2, at, path(a[0]), 0o777, 0) },
	"fchmod":   func(a []string) error { return reading(a[0], func(fd int) error { return unix.Fchmod(fd, 0o777) }) },
	"chown":    func(a []string) error { return unix.Lchown(a[0], os.Getuid(), os.Getgid()) },
	"fchown":   func(a []string) error { return reading(a[0], func(fd int) error { return unix.Fchown(fd, -1, -1) }) },
	"setxattr": func(a []string) error { return unix.Setxattr(a[0], "user.probe", []byte("x"), 0) },
	"times":    func(a []string) error { return unix.UtimesNanoAt(unix.AT_FDCWD, a[0], nil, 0) },
	"flags": func(a []string) error {
		return reading(a[0], func(fd int) error { return unix.IoctlSetPointerInt(fd, 0x40086602, 0x40) }) // no dump
	},
	// Of a pipe, which knows none of those that filesystems have: ENOTTY.
	"ioctl": func(a []string) error {
		number, err := strconv.ParseUint(a[0], 0, 32)
		if err != nil {
			return err
		}
		var ends [2]int
		if err := unix.Pipe(ends[:]); err != nil {
			return err
		}
		return raw(unix.SYS_IOCTL, uintptr(ends[0]), uintptr(number), 0)
	},
	"unlink":  func(a []string) error { return unix.Unlink(a[0]) },
	"rename":  func(a []string) error { return unix.Rename(a[0], a[0]+".new") },
	"link":    func(a []string) error { return unix.Link(a[0], a[0]+".link") },
	"symlink": func(a []string) error { return unix.Symlink("x", a[0]+".symlink") },
	"mkfifo":  func(a []string) error { return unix.Mkfifo(a[0]+".fifo", 0o600) },
	"mkdir":   func(a []string) error { return unix.Mkdir(a[0]+".dir", 0o700) },

	"socket":   func(a []string) error { return connected(unix.AF_UNIX, &unix.SockaddrUnix{Name: a[0]}) },
	"abstract": func(a []string) error { return connected(unix.AF_UNIX, &unix.SockaddrUnix{Name: "@" + a[0]}) },
	"tcp": func(a []string) error {
		port, err := strconv.Atoi(a[0])
		if err != nil {
			return err
		}
		return connected(unix.AF_INET, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}})
	},
	"io_uring": func([]string) error { return raw(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&[128]byte{}))) },

	"kill": func(a []string) error { return of(a, func(pid int) error { return unix.Kill(pid, unix.SIGUSR1) }) },
	"thread kill": func(a []string) error {
		return of(a, func(pid int) error { return unix.Tgkill(pid, pid, unix.SIGUSR1) })
	},
	"pidfd kill": func(a []string) error {
		return of(a, func(pid int) error {
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				return err
			}
			return unix.PidfdSendSignal(fd, unix.SIGUSR1, nil, 0)
		})
	},
	"owner of signals": func(a []string) error {
		return of(a, func(pid int) error {
			_, err := unix.FcntlInt(0, unix.F_SETOWN, pid)
			return err
		})
	},
	"limit": func(a []string) error {
		return of(a, func(pid int) error {
			var l unix.Rlimit
			if err := unix.Prlimit(pid, unix.RLIMIT_CORE, nil, &l); err != nil {
				return err
			}
			return unix.Prlimit(pid, unix.RLIMIT_CORE, &l, nil)
		})
	},
	"priority": func(a []string) error {
		return of(a, func(pid int) error { return unix.Setpriority(unix.PRIO_PROCESS, pid, 0) })
	},
	"namespace": func([]string) error { return unix.Unshare(unix.CLONE_NEWUTS) },
	"clone into namespace": func([]string) error {
		return raw(unix.SYS_CLONE, uintptr(unix.CLONE_NEWUTS|unix.CLONE_NEWPID|unix.CLONE_THREAD), 0, 0, 0, 0)
	},
	"clone3":  func([]string) error { return raw(unix.SYS_CLONE3, 0, 0) },
	"unknown": func([]string) error { return raw(newest+1, 0, 0) },
	"key": func([]string) error {
		_, err := unix.AddKey("user", "probe", []byte("x"), unix.KEY_SPEC_PROCESS_KEYRING)
		return err
	},

	"detach": func(a []string) error {
		return reading(a[0], func(fd int) error { return raw(unix.SYS_IOCTL, uintptr(fd), unix.LOOP_CLR_FD, 0) })
	},
	"loop status": func(a []string) error {
		return reading(a[0], func(fd int) error {
			_, err := unix.IoctlLoopGetStatus64(fd)
			return err
		})
	},
	"size": func(a []string) error {
		return reading(a[0], func(fd int) error {
			var bytes uint64
			return raw(unix.SYS_IOCTL, uintptr(fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&bytes)))
		})
	},
}

const at = ^uintptr(99) // AT_FDCWD

func path(s string) uintptr {
	p, err := unix.BytePtrFromString(s)
	if err != nil {
		panic(err)
	}
	return uintptr(unsafe.Pointer(p))
}

func raw(call uintptr, args ...uintptr) error {
	var a [6]uintptr
	copy(a[:], args)
	if _, _, errno := unix.Syscall6(call, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
		return errno
	}
	return nil
}

func opened(name string, flags int) error {
	fd, err := unix.Open(name, flags, 0)
	if err == nil {
		_ = unix.Close(fd)
	}
	return err
}

func reading(name string, f func(fd int) error) error {
	fd, err := unix.Open(name, unix.O_RDONLY, 0)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	return f(fd)
}

func connected(family int, to unix.Sockaddr) error {
	fd, err := unix.Socket(family, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	return unix.Connect(fd, to)
}

func of(args []string, f func(pid int) error) error {
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	return f(pid)
}
