package gate

import "golang.org/x/sys/unix"

// oldCalls are calls that newer architectures do not have; mkfs uses them here.
var oldCalls = map[int]call{
	unix.SYS_OPEN:     {name: "open", path: 1, creates: 2},
	unix.SYS_CREAT:    {name: "creat", path: 1},
	unix.SYS_MKDIR:    {name: "mkdir", path: 1},
	unix.SYS_RMDIR:    {name: "rmdir", path: 1},
	unix.SYS_UNLINK:   {name: "unlink", path: 1},
	unix.SYS_RENAME:   {name: "rename", path: 1, to: 2},
	unix.SYS_LINK:     {name: "link", path: 1, to: 2},
	unix.SYS_SYMLINK:  {name: "symlink", path: 1},
	unix.SYS_MKNOD:    {name: "mknod", path: 1},
	unix.SYS_CHMOD:    {name: "chmod", path: 1},
	unix.SYS_RENAMEAT: {name: "renameat", dir: 1, path: 2, toDir: 3, to: 4},
}
