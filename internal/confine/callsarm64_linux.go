//go:build arm64

package confine

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_AARCH64

// Old calls, which this machine never had.
var oldNever, oldByPath []int

// opens are the calls that open a file, and which argument has the flags.
var opens = map[int]uint32{unix.SYS_OPENAT: 3}
