//go:build amd64 || arm64

package confine

import "golang.org/x/sys/unix"

// These are lists of what is forbidden, and not of what is needed: which calls a
// program makes is its libraries' choice, which changes from version to version, and
// a repair that ends half way because a new libc asks for the time in another way is
// worse than what a list of needs would gain. What is here no program that
// repairs or renames a filesystem has a use for, in any version: it works on
// descriptors that it opens by name, and on nothing else. Where a library tries one of
// these calls it has to do without it on some machine anyway (a socket to a cache of
// users, a lock in System V's manner).

// newest is the last call that was looked at for these lists. What is newer is
// answered as by a kernel that does not have it.
const newest = unix.SYS_RSEQ_SLICE_YIELD

// never are calls that Landlock has no right for, or not on every kernel: other
// processes, sockets, who may do what with a file, and the machine as a whole. Many of
// them need a capability as well, which the program does not have.
var never = append([]int{
	// Sockets: ours, on which whoever is root may ask for everything, among them. Also by io_uring.
	unix.SYS_SOCKET, unix.SYS_SOCKETPAIR, unix.SYS_CONNECT, unix.SYS_BIND, unix.SYS_LISTEN, unix.SYS_ACCEPT, unix.SYS_ACCEPT4,
	unix.SYS_SENDTO, unix.SYS_SENDMSG, unix.SYS_SENDMMSG, unix.SYS_RECVFROM, unix.SYS_RECVMSG, unix.SYS_RECVMMSG,
	unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	// What a file is, which its owner decides.
	unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_FCHMODAT2, unix.SYS_FCHOWN, unix.SYS_FCHOWNAT, unix.SYS_UTIMENSAT,
	unix.SYS_SETXATTR, unix.SYS_LSETXATTR, unix.SYS_FSETXATTR, unix.SYS_SETXATTRAT, unix.SYS_FILE_SETATTR,
	unix.SYS_REMOVEXATTR, unix.SYS_LREMOVEXATTR, unix.SYS_FREMOVEXATTR, unix.SYS_REMOVEXATTRAT,
	// Other processes.
	unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PROCESS_MADVISE, unix.SYS_PROCESS_MRELEASE,
	unix.SYS_PIDFD_GETFD, unix.SYS_KCMP, unix.SYS_MOVE_PAGES, unix.SYS_MIGRATE_PAGES,
	unix.SYS_SETPRIORITY, unix.SYS_IOPRIO_SET, unix.SYS_SCHED_SETAFFINITY, unix.SYS_SCHED_SETSCHEDULER, unix.SYS_SCHED_SETPARAM, unix.SYS_SCHED_SETATTR,
	unix.SYS_SHMGET, unix.SYS_SHMAT, unix.SYS_SHMCTL, unix.SYS_SEMGET, unix.SYS_SEMOP, unix.SYS_SEMTIMEDOP, unix.SYS_SEMCTL,
	unix.SYS_MSGGET, unix.SYS_MSGSND, unix.SYS_MSGRCV, unix.SYS_MSGCTL, unix.SYS_MQ_OPEN, unix.SYS_MQ_UNLINK,
	// Keys: those of encrypted volumes may be in root's keyring.
	unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY,
	// Mounts and namespaces.
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_OPEN_TREE_ATTR,
	unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR, unix.SYS_SETNS, unix.SYS_UNSHARE,
	unix.SYS_QUOTACTL, unix.SYS_QUOTACTL_FD, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_FANOTIFY_INIT, unix.SYS_FANOTIFY_MARK,
	// The kernel, and how to find a way into it.
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE,
	unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_REBOOT, unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_SYSLOG,
	unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_CLOCK_ADJTIME, unix.SYS_ADJTIMEX, unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME,
	unix.SYS_VHANGUP,
}, oldNever...)

// byPath are calls that make, remove or cut what is found at a path. Landlock has
// rights for them, but to truncate only since Linux 6.2.
var byPath = append([]int{
	unix.SYS_TRUNCATE, unix.SYS_UNLINKAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_LINKAT, unix.SYS_SYMLINKAT, unix.SYS_MKNODAT, unix.SYS_MKDIRAT,
}, oldByPath...)

// signals are the calls that send one, and which argument it is. That a program ends
// itself by a signal is refused too: libraries then end it by a fault.
var signals = map[int]uint32{
	unix.SYS_KILL: 2, unix.SYS_TKILL: 2, unix.SYS_TGKILL: 3, unix.SYS_PIDFD_SEND_SIGNAL: 2, unix.SYS_RT_SIGQUEUEINFO: 2, unix.SYS_RT_TGSIGQUEUEINFO: 3,
}

// namespaces are the flags of clone that make one.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// fcntls are those by which the kernel sends any process a signal, or makes it wait.
var fcntls = []uint32{unix.F_SETOWN, unix.F_SETOWN_EX, unix.F_SETSIG, unix.F_SETLEASE, unix.F_NOTIFY}

// ioctls are those that need no more than a file that root may read; some, a capability
// as well.
var ioctls = []uint32{
	0x40086602, 0x40046602, // FS_IOC_SETFLAGS, of 64 and 32 bits
	0x40087602, 0x40047602, // FS_IOC_SETVERSION
	0x40086604, 0x40046604, // EXT4_IOC_SETVERSION
	0x6609,     // EXT4_IOC_MIGRATE, which changes how the file is laid out
	0x401c5820, // FS_IOC_FSSETXATTR
	0x40047211, // FAT_IOCTL_SET_ATTRIBUTES, "read-only" among them
	0x40806685, // FS_IOC_ENABLE_VERITY: nobody can write to the file any more
	0x800c6613, // FS_IOC_SET_ENCRYPTION_POLICY
	// FS_IOC_ADD_ENCRYPTION_KEY, FS_IOC_REMOVE_ENCRYPTION_KEY and that of all users: files
	// whose key goes cannot be read.
	0xc0506617, 0xc0406618, 0xc0406619,
	0xc0045877, 0xc0045878, // FIFREEZE, FITHAW
	0x8004587d,     // FS_IOC_SHUTDOWN: XFS_IOC_GOINGDOWN, EXT4_IOC_SHUTDOWN
	0x8901, 0x8902, // FIOSETOWN, SIOCSPGRP
	unix.TIOCSTI, 0x541c, // what is typed at a terminal: TIOCSTI, TIOCLINUX
}

// ioctlTypes are kinds of ioctls, their second byte, all of which are refused but for
// those in harmless: of loop devices (LOOP_CLR_FD detaches one that is open for
// reading), of btrfs and clones of files, and of /dev/userfaultfd, which is the call.
var ioctlTypes = []uint32{0x4c, 0x94, 0xaa}

// harmless are asked of a loop device by what looks whether its file is mounted.
var harmless = []uint32{unix.LOOP_GET_STATUS, unix.LOOP_GET_STATUS64}
