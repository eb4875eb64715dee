package image

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// beneath is how files of a pool are opened: no "..", no link of any kind on
	// the way, no other filesystem (fact 73 tells what this does not stop).
	beneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV
	// beneathMounts is the same for directories of the operator's, which may hold
	// mount points.
	beneathMounts = beneath &^ unix.RESOLVE_NO_XDEV

	noCow = 0x00800000 // FS_NOCOW_FL
)

// ioctl numbers that x/sys does not have. The direction bits differ between
// architectures and are taken from numbers that it has.
var (
	directionRead  = uint(unix.FS_IOC_GETFLAGS) &^ 0x1fffffff
	directionWrite = uint(unix.FS_IOC_SETFLAGS) &^ 0x1fffffff

	fsIocGetFSUUID    = directionRead | 17<<16 | 0x15<<8
	ext4IocGetFSUUID  = directionRead | 8<<16 | 'f'<<8 | 44
	xfsIocGeometryV1  = directionRead | 112<<16 | 'X'<<8 | 100
	btrfsIocFSInfo    = directionRead | 1024<<16 | 0x94<<8 | 31
	btrfsIocStartSync = directionRead | 8<<16 | 0x94<<8 | 24
	btrfsIocWaitSync  = directionWrite | 8<<16 | 0x94<<8 | 22
	fsIocFiemap       = directionRead | directionWrite | 32<<16 | 'f'<<8 | 11
)

func ignoringEINTR(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func openat2(dir *os.File, name string, flags uint64, mode uint32, resolve uint64) (*os.File, error) {
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Mode: uint64(mode), Resolve: resolve}
	for range 64 {
		fd, err := unix.Openat2(int(dir.Fd()), name, &how)
		runtime.KeepAlive(dir)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), dir.Name()+"/"+name), nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			// EAGAIN: something was renamed on the way and the kernel cannot
			// tell whether the path still is beneath.
			continue
		}
		return nil, err
	}
	return nil, unix.EAGAIN
}

func openPath(path string) (*os.File, error) {
	return os.OpenFile(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

func openDirAt(dir *os.File, name string) (*os.File, error) {
	return openat2(dir, name, unix.O_RDONLY|unix.O_DIRECTORY, 0, beneath)
}

func createAt(dir *os.File, name string) (*os.File, error) {
	return openat2(dir, name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600, beneath)
}

// openAt opens an existing file of a pool; the caller has to look at what it got.
// O_NONBLOCK: a FIFO in its place must not make us wait.
func openAt(dir *os.File, name string, write bool) (*os.File, error) {
	return openExisting(dir, name, write, beneath)
}

// openMapped is openAt for the operator's directories.
func openMapped(dir *os.File, name string, write bool) (*os.File, error) {
	return openExisting(dir, name, write, beneathMounts)
}

// openExisting looks before it opens, because opening a device node can do things.
// The file it looked at is the file it opens.
func openExisting(dir *os.File, name string, write bool, resolve uint64) (*os.File, error) {
	path, err := openat2(dir, name, unix.O_PATH, 0, resolve)
	if err != nil {
		return nil, err
	}
	defer path.Close()
	st, err := statFile(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode.IsRegular() {
		return nil, errNotRegular
	}
	flags := unix.O_RDONLY
	if write {
		flags = unix.O_RDWR
	}
	var fd int
	err = ignoringEINTR(func() (err error) {
		fd, err = unix.Open(procPath(path), flags|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
		return err
	})
	runtime.KeepAlive(path)
	if errors.Is(err, unix.ENOENT) {
		return nil, errNoProc // the file exists: it is open
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path.Name()), nil
}

// procPath names an open file for a system call that wants a path. A link of our
// own process in /proc cannot be redirected by anybody.
func procPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

func mkdirAt(dir *os.File, name string) error {
	err := unix.Mkdirat(int(dir.Fd()), name, 0o700)
	runtime.KeepAlive(dir)
	return err
}

// renameNew fails with EEXIST rather than replace.
func renameNew(from *os.File, name string, to *os.File, newName string) error {
	err := unix.Renameat2(int(from.Fd()), name, int(to.Fd()), newName, unix.RENAME_NOREPLACE)
	runtime.KeepAlive(from)
	runtime.KeepAlive(to)
	return err
}

func renameOver(dir *os.File, name, newName string) error {
	err := unix.Renameat(int(dir.Fd()), name, int(dir.Fd()), newName)
	runtime.KeepAlive(dir)
	return err
}

func unlinkAt(dir *os.File, name string, isDir bool) error {
	flags := 0
	if isDir {
		flags = unix.AT_REMOVEDIR
	}
	err := unix.Unlinkat(int(dir.Fd()), name, flags)
	runtime.KeepAlive(dir)
	return err
}

func fileStatOf(st *unix.Stat_t) fileStat {
	mode := fs.FileMode(st.Mode & 0o777)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFDIR:
		mode |= fs.ModeDir
	default:
		mode |= fs.ModeIrregular
	}
	return fileStat{
		Dev: uint64(st.Dev), Ino: st.Ino, Mode: mode, UID: st.Uid, GID: st.Gid, Links: uint64(st.Nlink),
		Size: st.Size, Allocated: st.Blocks * 512,
	}
}

func statFile(f *os.File) (fileStat, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	runtime.KeepAlive(f)
	return fileStatOf(&st), err
}

// statAt does not follow a link that is the last component.
func statAt(dir *os.File, name string) (fileStat, error) {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	runtime.KeepAlive(dir)
	return fileStatOf(&st), err
}

// versionOf follows links: what matters is the program that runs.
func versionOf(path string) (fileVersion, error) {
	var st unix.Stat_t
	err := ignoringEINTR(func() error { return unix.Stat(path, &st) })
	return fileVersion{path: path, dev: uint64(st.Dev), ino: st.Ino, size: st.Size, changed: unix.TimespecToNsec(st.Ctim)}, err
}

// isMountPoint tells whether something is mounted exactly at path (kernel 5.8).
func isMountPoint(path string) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, 0, &st); err != nil {
		return false, err
	}
	if st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return false, unix.EOPNOTSUPP
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

// allocate gives the range blocks. Those it already has stay as they are.
func allocate(f *os.File, offset, length int64, keepSize bool) error {
	var mode uint32
	if keepSize {
		mode = unix.FALLOC_FL_KEEP_SIZE
	}
	err := ignoringEINTR(func() error { return unix.Fallocate(int(f.Fd()), mode, offset, length) })
	runtime.KeepAlive(f)
	return err
}

// lockDir takes the exclusive lock on a directory, which ends with the last
// descriptor of this open file; EWOULDBLOCK if another open file has it.
func lockDir(f *os.File) error {
	err := ignoringEINTR(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	runtime.KeepAlive(f)
	return err
}

func spaceOf(f *os.File) (space, error) {
	var st unix.Statfs_t
	err := ignoringEINTR(func() error { return unix.Fstatfs(int(f.Fd()), &st) })
	runtime.KeepAlive(f)
	if err != nil {
		return space{}, err
	}
	unit := int64(st.Frsize)
	if unit == 0 {
		unit = int64(st.Bsize)
	}
	return space{
		Size: int64(st.Blocks) * unit, Free: int64(st.Bavail) * unit,
		Type: filesystemName(int64(st.Type) & 0xffffffff), ReadOnly: int64(st.Flags)&unix.ST_RDONLY != 0,
	}, nil
}

func filesystemName(magic int64) string {
	switch magic {
	case unix.EXT4_SUPER_MAGIC:
		return "ext4" // ext2 and ext3 have the same number
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	case unix.TMPFS_MAGIC:
		return "tmpfs"
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "overlay"
	case unix.F2FS_SUPER_MAGIC:
		return "f2fs"
	case unix.BCACHEFS_SUPER_MAGIC:
		return "bcachefs"
	case 0x2fc12fc1:
		return "zfs"
	case unix.NFS_SUPER_MAGIC:
		return "nfs"
	case unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC:
		return "cifs"
	case unix.CEPH_SUPER_MAGIC:
		return "ceph"
	case unix.FUSE_SUPER_MAGIC:
		return "fuse"
	case unix.ECRYPTFS_SUPER_MAGIC:
		return "ecryptfs"
	case unix.NILFS_SUPER_MAGIC:
		return "nilfs2"
	}
	return "0x" + strconv.FormatInt(magic, 16)
}

// probeWrite changes an access time, and makes a file without a name, to learn whether a
// filesystem takes changes: one that shut itself after an error does not always say so in
// statfs, and an ext4 whose journal was aborted takes the first all the same on Linux 6.1.
// ENOSPC is not an answer to that. EDQUOT is returned: a quota is used up. block asks for
// a block too, which a quota of a user, group or project on ext4 and XFS refuses first.
func probeWrite(dir *os.File, block bool) error {
	times := []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_OMIT}}
	err := ignoringEINTR(func() error { return unix.UtimesNanoAt(unix.AT_FDCWD, procPath(dir), times, 0) })
	if err == nil {
		err = ignoringEINTR(func() error {
			fd, err := unix.Openat(int(dir.Fd()), ".", unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
			if err != nil {
				return err
			}
			if block {
				err = unix.Fallocate(fd, 0, 0, 1)
			}
			return errors.Join(err, unix.Close(fd))
		})
	}
	runtime.KeepAlive(dir)
	switch {
	case errors.Is(err, unix.ENOSPC):
		return nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EISDIR): // a filesystem without such files
		return nil
	}
	return err
}

// inDirectory makes cmd run in an open directory: the child enters it through
// its own /proc/self, before its descriptors are closed.
func inDirectory(cmd *exec.Cmd, dir *os.File) { cmd.Dir = procPath(dir) }

// openToName opens a file in dir, or a path if dir is nil, only to tell it from others.
func openToName(dir *os.File, name string) (*os.File, error) {
	at := unix.AT_FDCWD
	if dir != nil {
		at = int(dir.Fd())
	}
	fd, err := unix.Openat(at, name, unix.O_PATH|unix.O_CLOEXEC, 0)
	runtime.KeepAlive(dir)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

func effectiveUID() uint32 { return uint32(syscall.Geteuid()) }
