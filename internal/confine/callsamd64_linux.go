//go:build amd64

package confine

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_X86_64

// Calls that newer machines do not have.
var (
	oldNever = []int{
		unix.SYS_CHMOD, unix.SYS_CHOWN, unix.SYS_LCHOWN, unix.SYS_UTIME, unix.SYS_UTIMES, unix.SYS_FUTIMESAT, unix.SYS_IOPL, unix.SYS_IOPERM,
	}
	oldByPath = []int{
		unix.SYS_CREAT, unix.SYS_UNLINK, unix.SYS_RMDIR, unix.SYS_RENAME, unix.SYS_LINK, unix.SYS_SYMLINK, unix.SYS_MKNOD, unix.SYS_MKDIR,
	}
)

// opens are the calls that open a file, and which argument has the flags.
var opens = map[int]uint32{unix.SYS_OPEN: 2, unix.SYS_OPENAT: 3}
