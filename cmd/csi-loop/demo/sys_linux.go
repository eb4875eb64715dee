package demo

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// fileSystem names the type of filesystem at path and what is free there for us.
func fileSystem(path string) (fsType string, free int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return "", 0, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	names := map[int64]string{
		unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs",
		unix.TMPFS_MAGIC: "tmpfs", unix.OVERLAYFS_SUPER_MAGIC: "overlay",
	}
	fsType, ok := names[int64(st.Type)]
	if !ok {
		fsType = fmt.Sprintf("type %#x", st.Type)
	}
	return fsType, int64(st.Bavail) * st.Bsize, nil
}

// df is a line of df(1).
type df struct{ total, used, free int64 }

func statfs(path string) (df, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return df{}, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return df{
		total: int64(st.Blocks) * st.Bsize,
		used:  int64(st.Blocks-st.Bfree) * st.Bsize,
		free:  int64(st.Bavail) * st.Bsize,
	}, nil
}

// allocated is how many bytes of a file have blocks.
func allocated(st os.FileInfo) int64 {
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		return s.Blocks * 512 // st_blocks counts 512 bytes, whatever the filesystem
	}
	return -1
}

// dropCache makes the next read of f come from below the page cache.
func dropCache(f *os.File) error {
	if err := f.Sync(); err != nil {
		return err
	}
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

// apart keeps a Ctrl-C at the terminal from the driver, which the demo still
// needs to clean up, and ends it when the demo is killed.
func apart(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
}

// unmount is the last resort when no driver can be had.
func unmount(path string) error {
	if err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW); err != nil {
		return &os.PathError{Op: "unmount", Path: path, Err: err}
	}
	return nil
}

// clearLoop unbinds a loop device, after making sure that it shows the file that
// sysfs said. The last resort, as unmount.
func clearLoop(l loopDevice) error {
	f, err := os.OpenFile(l.node(), os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if errors.Is(err, unix.ENXIO) { // unbound meanwhile
		return nil
	}
	var st unix.Stat_t
	if err := errors.Join(err, unix.Stat(l.backing, &st)); err != nil {
		return fmt.Errorf("%s: %w", l.name, err)
	}
	if info.Device != uint64(st.Dev) || info.Inode != st.Ino {
		return fmt.Errorf("%s no longer shows %s", l.name, l.backing)
	}
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0); err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("%s: clear: %w", l.name, err)
	}
	return nil
}

// settle bounds the wait for what the kernel finishes in its own time.
const settle = 3 * time.Second
