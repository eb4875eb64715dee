//go:build amd64 || arm64

package confine

import (
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// filterCalls forbids the thread and its children system calls by their numbers: what
// Landlock has no right for, or not on this kernel. names: also those that change what
// is found at a path. Where the kernel has no filters, or somebody forbids them,
// nothing changes.
func filterCalls(names bool) error {
	program := filter(names)
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	_, _, errno := unix.Syscall(unix.SYS_PRCTL, unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(program)
	if errno == 0 || slices.Contains([]unix.Errno{unix.EINVAL, unix.ENOSYS, unix.EPERM, unix.EACCES}, errno) {
		return nil
	}
	return fmt.Errorf("seccomp: %w", errno)
}

const (
	load    = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	equal   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	above   = unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K
	anyBit  = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
	only    = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
	give    = unix.BPF_RET | unix.BPF_K
	atCall  = 0 // in struct seccomp_data
	atArch  = 4
	x32Call = 0x40000000
)

var (
	allowed  = unix.SockFilter{Code: give, K: unix.SECCOMP_RET_ALLOW}
	killed   = unix.SockFilter{Code: give, K: unix.SECCOMP_RET_KILL_PROCESS}
	refused  = unix.SockFilter{Code: give, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)}
	notKnown = unix.SockFilter{Code: give, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)}
)

// argument loads the low half of the nth argument, counted from 1; both machines are
// little-endian.
func argument(n uint32) unix.SockFilter { return unix.SockFilter{Code: load, K: 16 + 8*(n-1)} }

// filter is the program that the kernel runs for each system call. Calls by the
// numbers of another machine, which would mean others, end the process.
func filter(names bool) []unix.SockFilter {
	program := []unix.SockFilter{
		{Code: load, K: atArch},
		{Code: equal, Jt: 1, K: auditArch},
		killed,
		{Code: load, K: atCall},
		{Code: anyBit, Jf: 1, K: x32Call},
		killed,
		{Code: above, Jf: 1, K: newest},
		notKnown,
	}
	on := func(call int, body ...unix.SockFilter) {
		program = append(program, unix.SockFilter{Code: equal, Jf: uint8(len(body)), K: uint32(call)})
		program = append(program, body...)
	}
	for _, call := range never {
		on(call, refused)
	}
	// What they do is in memory, where a filter cannot look. Whoever calls them
	// knows kernels without them, and does it in another way.
	on(unix.SYS_CLONE3, notKnown)
	on(unix.SYS_CLONE, argument(1), unix.SockFilter{Code: anyBit, Jf: 1, K: namespaces}, refused, allowed)
	for call, signal := range signals {
		// Nothing, or one that is ignored unless somebody waits for it: Go's runtime
		// makes its threads yield by it.
		on(call, argument(signal), unix.SockFilter{Code: equal, Jt: 2, K: 0}, unix.SockFilter{Code: equal, Jt: 1, K: uint32(unix.SIGURG)}, refused, allowed)
	}
	on(unix.SYS_PRLIMIT64, argument(1), unix.SockFilter{Code: equal, Jt: 1, K: 0}, refused, allowed) // of itself only
	on(unix.SYS_FCNTL, requests(fcntls, nil)...)
	on(unix.SYS_IOCTL, requests(ioctls, ioctlTypes)...)
	if names {
		for _, call := range byPath {
			on(call, refused)
		}
		on(unix.SYS_OPENAT2, notKnown)
		for call, flags := range opens {
			on(call, argument(flags), unix.SockFilter{Code: anyBit, Jf: 1, K: unix.O_TRUNC}, refused, allowed)
		}
	}
	return append(program, allowed)
}

// requests refuses some values of a call's second argument, and some of its second byte
// but for harmless ones.
func requests(values, types []uint32) []unix.SockFilter {
	body := []unix.SockFilter{argument(2)}
	for _, v := range harmless {
		body = append(body, unix.SockFilter{Code: equal, Jf: 1, K: v}, allowed)
	}
	for _, v := range values {
		body = append(body, unix.SockFilter{Code: equal, Jf: 1, K: v}, refused)
	}
	if len(types) > 0 {
		body = append(body, unix.SockFilter{Code: only, K: 0xff00})
	}
	for _, t := range types {
		body = append(body, unix.SockFilter{Code: equal, Jf: 1, K: t << 8}, refused)
	}
	return append(body, allowed)
}
