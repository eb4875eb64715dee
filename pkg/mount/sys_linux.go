package mount

import (
	"errors"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"
)

// errUnclean is what the kernel answers when a structure of a filesystem is damaged.
const errUnclean = unix.EUCLEAN

// openPath opens what is at path, without following a symbolic link there, and
// without the right or the need to read it: this works on a dead filesystem too.
func openPath(path string) (int, error) {
	return noEINTR(func() (int, error) {
		return unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
}

func closeFD(fd int) {
	if fd >= 0 {
		_ = unix.Close(fd)
	}
}

// lookFD is statx of an open descriptor, look is statx of a path.
func lookFD(fd int) (place, error) { return statx(fd, "", unix.AT_EMPTY_PATH) }

func look(path string) (place, error) { return statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW) }

// lookThrough follows a symbolic link, for sources only.
func lookThrough(path string) (place, error) { return statx(unix.AT_FDCWD, path, 0) }

// mountNumber returns mountinfo's number of the mount that path lies in.
func mountNumber(path string) (uint64, error) {
	var st unix.Statx_t
	const flags = unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT | unix.AT_STATX_DONT_SYNC
	err := unix.Statx(unix.AT_FDCWD, path, flags, unix.STATX_MNT_ID, &st)
	return st.Mnt_id, err
}

// mountNumberFD is mountNumber of what is open.
func mountNumberFD(fd int) (uint64, error) {
	var st unix.Statx_t
	const flags = unix.AT_EMPTY_PATH | unix.AT_NO_AUTOMOUNT | unix.AT_STATX_DONT_SYNC
	err := unix.Statx(fd, "", flags, unix.STATX_MNT_ID, &st)
	return st.Mnt_id, err
}

func statx(fd int, path string, flags int) (place, error) {
	var st unix.Statx_t
	const mask = unix.STATX_TYPE | unix.STATX_MODE | unix.STATX_INO | unix.STATX_MNT_ID | unix.STATX_MNT_ID_UNIQUE
	if err := unix.Statx(fd, path, flags|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, mask, &st); err != nil {
		return place{}, err
	}
	return place{
		mountID:   st.Mnt_id,
		uniqueID:  st.Mask&unix.STATX_MNT_ID_UNIQUE != 0,
		mountRoot: st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0,
		mode:      fileMode(uint32(st.Mode)),
		dev:       unix.Mkdev(st.Dev_major, st.Dev_minor),
		rdev:      unix.Mkdev(st.Rdev_major, st.Rdev_minor),
		ino:       st.Ino,
	}, nil
}

func fileMode(mode uint32) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		m |= fs.ModeDir
	case unix.S_IFLNK:
		m |= fs.ModeSymlink
	case unix.S_IFBLK:
		m |= fs.ModeDevice
	case unix.S_IFCHR:
		m |= fs.ModeDevice | fs.ModeCharDevice
	case unix.S_IFIFO:
		m |= fs.ModeNamedPipe
	case unix.S_IFSOCK:
		m |= fs.ModeSocket
	}
	return m
}

func devNumbers(dev uint64) (major, minor uint32) { return unix.Major(dev), unix.Minor(dev) }

// newMount opens the filesystem on source and returns a detached mount of it. It
// vanishes when the descriptor is closed without having been attached.
func newMount(source, fsType string, o Options) (int, error) {
	ctx, err := noEINTR(func() (int, error) { return unix.Fsopen(fsType, unix.FSOPEN_CLOEXEC) })
	if err != nil {
		return -1, &configError{op: opDriver, err: err}
	}
	defer closeFD(ctx)
	fail := func(op, param string, err error) error {
		return &configError{op: op, param: param, words: contextLog(ctx), err: err}
	}
	if err := unix.FsconfigSetString(ctx, "source", source); err != nil {
		return -1, fail("set source", "", err)
	}
	if o.ReadOnly {
		if err := unix.FsconfigSetFlag(ctx, "ro"); err != nil {
			return -1, fail("set read-only", "", err)
		}
	}
	for _, p := range o.Super {
		if p.HasValue {
			err = unix.FsconfigSetString(ctx, p.Key, p.Value)
		} else {
			err = unix.FsconfigSetFlag(ctx, p.Key)
		}
		if err != nil {
			return -1, fail("set option", p.String(), err)
		}
	}
	if err := unix.FsconfigCreate(ctx); err != nil {
		return -1, fail("open filesystem", "", err)
	}
	fd, err := noEINTR(func() (int, error) {
		return unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, int(mountAttrs(o.Flags, o.ReadOnly)))
	})
	if err != nil {
		return -1, fail("make mount", "", err)
	}
	return fd, nil
}

// contextLog returns what a filesystem driver said while it was configured. One
// read gives one message, after a letter for its level and a space.
func contextLog(fd int) string {
	var words []string
	buf := make([]byte, 4096)
	for range 16 {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 { // ENODATA: no more
			break
		}
		line := strings.TrimSpace(string(buf[:n]))
		if len(line) > 2 && line[1] == ' ' {
			line = line[2:]
		}
		words = append(words, line)
	}
	return strings.Join(words, "; ")
}

func mountAttrs(f Flags, readOnly bool) uint64 {
	var attrs uint64
	for _, a := range attrTable {
		if f&a.flag != 0 {
			attrs |= a.attr
		}
	}
	if readOnly {
		attrs |= unix.MOUNT_ATTR_RDONLY
	}
	return attrs
}

// attrTable is in the order in which mountinfo prints the options.
var attrTable = []struct {
	flag Flags
	attr uint64
	name string
}{
	{NoSuid, unix.MOUNT_ATTR_NOSUID, "nosuid"},
	{NoDev, unix.MOUNT_ATTR_NODEV, "nodev"},
	{NoExec, unix.MOUNT_ATTR_NOEXEC, "noexec"},
	{NoAtime, unix.MOUNT_ATTR_NOATIME, "noatime"},
	{NoDirAtime, unix.MOUNT_ATTR_NODIRATIME, "nodiratime"},
	{StrictAtime, unix.MOUNT_ATTR_STRICTATIME, ""}, // shown by the absence of relatime
	{NoSymFollow, unix.MOUNT_ATTR_NOSYMFOLLOW, "nosymfollow"},
}

// cloneMount returns a detached copy of the mount that shows what is open at fd,
// beginning there. What is mounted further down is not copied: a publish target
// must not carry what others put into the staging directory.
func cloneMount(fd int) (int, error) {
	return noEINTR(func() (int, error) {
		return unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	})
}

// setAttrs adds attributes to a detached mount. Access-time modes are one field
// in the kernel and have to be cleared to be set.
func setAttrs(fd int, f Flags, readOnly bool) error {
	attr := unix.MountAttr{Attr_set: mountAttrs(f, readOnly)}
	if attr.Attr_set == 0 {
		return nil
	}
	if f&(NoAtime|StrictAtime) != 0 {
		attr.Attr_clr = unix.MOUNT_ATTR__ATIME
	}
	return unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr)
}

// isReadOnly asks the mount behind fd itself.
func isReadOnly(fd int) (bool, error) {
	var st unix.Statfs_t
	if err := statfs(fd, &st); err != nil {
		return false, err
	}
	return st.Flags&unix.ST_RDONLY != 0, nil
}

func statfs(fd int, st *unix.Statfs_t) error {
	_, err := noEINTR(func() (int, error) { return 0, unix.Fstatfs(fd, st) })
	return err
}

// attachMount puts a detached mount on top of what is open at target.
func attachMount(mount, target int) error {
	return unix.MoveMount(mount, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
}

// unmountTop takes away the uppermost mount at exactly path.
func unmountTop(path string) error { return unix.Unmount(path, unix.UMOUNT_NOFOLLOW) }

// statsOf is statfs(2) of path.
func statsOf(path string) (Stats, error) {
	fd, err := openPath(path)
	if err != nil {
		return Stats{}, err
	}
	defer closeFD(fd)
	var st unix.Statfs_t
	if err := statfs(fd, &st); err != nil {
		return Stats{}, err
	}
	unit := st.Frsize
	if unit == 0 {
		unit = st.Bsize
	}
	return newStats(unit, st.Blocks, st.Bfree, st.Bavail, st.Files, st.Ffree), nil
}

func noEINTR(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
