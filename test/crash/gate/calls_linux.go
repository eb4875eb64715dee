package gate

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// call says how to read one kind of system call. Arguments are counted from 1; 0
// is "it has none".
type call struct {
	name string
	dir  int // the argument that is a directory's descriptor
	path int // the argument that points to a path
	fd   int // the argument that is a file's descriptor
	// toDir and to are dir and path of the name that the call makes of path.
	toDir, to int
	// creates is the argument with the flags of an open; without O_CREAT or O_TRUNC
	// it changes nothing.
	creates int
	// how is the argument that points to the flags of openat2.
	how int
	// request is the argument that tells what an ioctl or fcntl does.
	request int
	wanted  map[uint32]string
	// length is the argument with a file's length to be.
	length int
	// files: only calls on files count, not those on sockets, pipes and the like.
	files bool
}

// calls are those that change something that outlives the process.
var calls = merged(oldCalls, map[int]call{
	unix.SYS_OPENAT:          {name: "openat", dir: 1, path: 2, creates: 3},
	unix.SYS_OPENAT2:         {name: "openat2", dir: 1, path: 2, how: 3},
	unix.SYS_MKDIRAT:         {name: "mkdirat", dir: 1, path: 2},
	unix.SYS_MKNODAT:         {name: "mknodat", dir: 1, path: 2},
	unix.SYS_UNLINKAT:        {name: "unlinkat", dir: 1, path: 2},
	unix.SYS_RENAMEAT2:       {name: "renameat2", dir: 1, path: 2, toDir: 3, to: 4},
	unix.SYS_LINKAT:          {name: "linkat", dir: 1, path: 2, toDir: 3, to: 4},
	unix.SYS_SYMLINKAT:       {name: "symlinkat", dir: 2, path: 3},
	unix.SYS_FCHMODAT:        {name: "fchmodat", dir: 1, path: 2},
	unix.SYS_FCHMOD:          {name: "fchmod", fd: 1},
	unix.SYS_TRUNCATE:        {name: "truncate", path: 1, length: 2},
	unix.SYS_FTRUNCATE:       {name: "ftruncate", fd: 1, length: 2},
	unix.SYS_FALLOCATE:       {name: "fallocate", fd: 1},
	unix.SYS_FSYNC:           {name: "fsync", fd: 1},
	unix.SYS_FDATASYNC:       {name: "fdatasync", fd: 1},
	unix.SYS_SYNCFS:          {name: "syncfs", fd: 1},
	unix.SYS_SYNC_FILE_RANGE: {name: "sync_file_range", fd: 1},
	unix.SYS_WRITE:           {name: "write", fd: 1, files: true},
	unix.SYS_PWRITE64:        {name: "pwrite", fd: 1, files: true},
	unix.SYS_WRITEV:          {name: "writev", fd: 1, files: true},
	unix.SYS_PWRITEV:         {name: "pwritev", fd: 1, files: true},
	unix.SYS_PWRITEV2:        {name: "pwritev2", fd: 1, files: true},
	unix.SYS_SENDFILE:        {name: "sendfile", fd: 1, files: true},
	unix.SYS_FSETXATTR:       {name: "fsetxattr", fd: 1},
	unix.SYS_SETXATTR:        {name: "setxattr", path: 1},
	unix.SYS_FLOCK:           {name: "flock", fd: 1},
	unix.SYS_MOUNT:           {name: "mount", path: 2},
	unix.SYS_UMOUNT2:         {name: "umount2", path: 1},
	unix.SYS_FSOPEN:          {name: "fsopen"},
	unix.SYS_FSCONFIG:        {name: "fsconfig"},
	unix.SYS_FSMOUNT:         {name: "fsmount"},
	unix.SYS_OPEN_TREE:       {name: "open_tree", dir: 1, path: 2},
	unix.SYS_MOVE_MOUNT:      {name: "move_mount", dir: 3, path: 4},
	unix.SYS_MOUNT_SETATTR:   {name: "mount_setattr", dir: 1, path: 2},
	unix.SYS_COPY_FILE_RANGE: {name: "copy_file_range", fd: 3},
	unix.SYS_IOCTL:           {name: "ioctl", fd: 1, request: 2, wanted: ioctls},
	unix.SYS_FCNTL:           {name: "fcntl", fd: 1, request: 2, wanted: map[uint32]string{unix.F_SETLEASE: "F_SETLEASE"}},
})

// ioctls are those that change something.
var ioctls = map[uint32]string{
	unix.LOOP_CTL_ADD: "LOOP_CTL_ADD", unix.LOOP_CTL_REMOVE: "LOOP_CTL_REMOVE", unix.LOOP_CTL_GET_FREE: "LOOP_CTL_GET_FREE",
	unix.LOOP_CONFIGURE: "LOOP_CONFIGURE", unix.LOOP_SET_FD: "LOOP_SET_FD", unix.LOOP_CLR_FD: "LOOP_CLR_FD",
	unix.LOOP_SET_STATUS: "LOOP_SET_STATUS", unix.LOOP_SET_STATUS64: "LOOP_SET_STATUS64", 0x4c06: "LOOP_CHANGE_FD",
	unix.LOOP_SET_CAPACITY: "LOOP_SET_CAPACITY", unix.LOOP_SET_DIRECT_IO: "LOOP_SET_DIRECT_IO", unix.LOOP_SET_BLOCK_SIZE: "LOOP_SET_BLOCK_SIZE",
	unix.FICLONE: "FICLONE", unix.FICLONERANGE: "FICLONERANGE", unix.FIDEDUPERANGE: "FIDEDUPERANGE",
	unix.BLKDISCARD: "BLKDISCARD", unix.BLKSECDISCARD: "BLKSECDISCARD", unix.BLKZEROOUT: "BLKZEROOUT", unix.BLKFLSBUF: "BLKFLSBUF", unix.BLKRRPART: "BLKRRPART",
	uint32(unix.FS_IOC_SETFLAGS & 0xffffffff): "FS_IOC_SETFLAGS",
	0x401c5820: "FS_IOC_FSSETXATTR",
	0xc0045877: "FIFREEZE", 0xc0045878: "FITHAW", 0xc0185879: "FITRIM",
	0x40086610: "EXT4_IOC_RESIZE_FS", 0x4010586e: "XFS_IOC_FSGROWFSDATA", 0x50009403: "BTRFS_IOC_RESIZE",
	0x80089418: "BTRFS_IOC_START_SYNC", 0x40089416: "BTRFS_IOC_WAIT_SYNC",
	0xc138fd03: "DM_DEV_CREATE", 0xc138fd04: "DM_DEV_REMOVE", 0xc138fd06: "DM_DEV_SUSPEND", 0xc138fd09: "DM_TABLE_LOAD",
}

func merged(all ...map[int]call) map[int]call {
	sum := map[int]call{}
	for _, m := range all {
		maps.Copy(sum, m)
	}
	return sum
}

// filter is the program that the kernel runs for each system call: those of calls
// go to the supervisor, unless a number among their arguments shows that they
// change nothing.
func filter() []unix.SockFilter {
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		set   = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		ret   = unix.BPF_RET | unix.BPF_K
	)
	argument := func(n int) uint32 { return uint32(16 + 8*(n-1)) } // low half of a little-endian word
	allow, ask := unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW}, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_USER_NOTIF}
	var program []unix.SockFilter
	for number, c := range calls {
		body := []unix.SockFilter{ask}
		switch {
		case c.creates > 0:
			body = []unix.SockFilter{
				{Code: load, K: argument(c.creates)},
				{Code: set, Jf: 1, K: unix.O_CREAT | unix.O_TRUNC},
				ask, allow,
			}
		case c.request > 0:
			body = []unix.SockFilter{{Code: load, K: argument(c.request)}}
			for r := range c.wanted {
				body = append(body, unix.SockFilter{Code: equal, Jf: 1, K: r}, ask)
			}
			body = append(body, allow)
		}
		program = append(program, unix.SockFilter{Code: load}, unix.SockFilter{Code: equal, Jf: uint8(len(body)), K: uint32(number)})
		program = append(program, body...)
	}
	return append(program, allow)
}

// read makes a Call of what the kernel tells about one. ok is false if it changes
// nothing.
func (c call) read(tid int, args [6]uint64) (Call, bool) {
	arg := func(n int) uint64 { return args[n-1] }
	found := Call{TID: tid, Name: c.name}
	if c.request > 0 {
		found.Name += " " + c.wanted[uint32(arg(c.request))]
	}
	if c.length > 0 {
		found.Length = int64(arg(c.length))
	}
	if c.how > 0 {
		var how [8]byte
		if peek(tid, arg(c.how), how[:]) < len(how) || *(*uint64)(unsafe.Pointer(&how))&(unix.O_CREAT|unix.O_TRUNC) == 0 {
			return found, false
		}
	}
	if c.fd > 0 {
		fd := int(int32(arg(c.fd)))
		found.Path = descriptor(tid, fd)
		if c.files && (fd <= 2 || !strings.HasPrefix(found.Path, "/") || strings.HasPrefix(found.Path, "/dev/null")) {
			return found, false
		}
	}
	if c.path > 0 {
		found.Path = name(tid, args, c.dir, c.path)
	}
	if c.to > 0 {
		found.To = name(tid, args, c.toDir, c.to)
	}
	return found, true
}

// name is the path that the argument of that number points to; dir is the number of the
// one that is a directory's descriptor, or 0.
func name(tid int, args [6]uint64, dir, path int) string {
	at := text(tid, args[path-1])
	if filepath.IsAbs(at) {
		return at
	}
	fd := unix.AT_FDCWD
	if dir > 0 {
		fd = int(int32(args[dir-1]))
	}
	return filepath.Join(descriptor(tid, fd), at)
}

// descriptor is what a descriptor of a thread shows: a path, or "kind:[number]".
func descriptor(tid, fd int) string {
	link := "/fd/" + strconv.Itoa(fd)
	if fd == unix.AT_FDCWD {
		link = "/cwd"
	}
	to, err := os.Readlink("/proc/" + strconv.Itoa(tid) + link)
	if err != nil {
		return fmt.Sprintf("descriptor %d", fd)
	}
	return to
}

// text reads a string that ends with a zero from another process: "?" if it has none.
func text(tid int, address uint64) string {
	const page, most = 4096, 4096 // as long as a path may be
	var all []byte
	for len(all) < most {
		// No further than the page, behind which there may be nothing.
		buf := make([]byte, page-address%page)
		n := peek(tid, address, buf)
		if n <= 0 {
			break
		}
		if s, _, ok := strings.Cut(string(buf[:n]), "\x00"); ok {
			return string(all) + s
		}
		all, address = append(all, buf[:n]...), address+uint64(n)
	}
	return "?"
}

// peek reads memory of another process and returns how much; -1 for nothing.
func peek(tid int, address uint64, buf []byte) int {
	local := []unix.Iovec{{Base: &buf[0], Len: uint64(len(buf))}}
	remote := []unix.RemoteIovec{{Base: uintptr(address), Len: len(buf)}}
	n, err := unix.ProcessVMReadv(tid, local, remote, 0)
	if err != nil {
		return -1
	}
	return n
}
