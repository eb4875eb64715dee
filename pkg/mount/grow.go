package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
)

// GrowSpec names a filesystem that shall fill its device.
type GrowSpec struct {
	FSType string // ext2, ext3, ext4, xfs or btrfs
	Device string // a node of the block device, which already has its new size
	Path   string // a mount of it; empty: not mounted, to grow offline (ext only)
}

// Grow makes a filesystem as large as its device. On success it is, except for a
// rest too small to be used (see FillsDevice). Already so is success, and costs a
// few reads. It never shrinks.
//
// Mounted, the kernel is asked directly (EXT4_IOC_RESIZE_FS,
// XFS_IOC_FSGROWFSDATA, BTRFS_IOC_RESIZE), so that a refusal has a number and not
// only a program's prose. Not mounted, ext2, ext3 and ext4 are checked and grown
// by e2fsck and resize2fs, which are not killed when ctx ends; xfs and btrfs are
// ErrUnsupported.
//
// ErrPermission: ext filesystems grow online only with CAP_SYS_RESOURCE in the
// initial user namespace, CAP_SYS_ADMIN is not enough (fact 40). ErrBusy: it is
// mounted although Path is empty, or frozen, or another resize or balance is running.
// When ctx ends first the kernel may still be growing it; another call waits for that.
// *ForeignError: the mount at Path is not of this device and type. ErrUnsupported
// too: a btrfs would still be under 256 MiB, to which the kernel does not resize.
func (m *Mounter) Grow(ctx context.Context, spec GrowSpec) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	full, err := m.filled(spec)
	if err != nil {
		return err
	}
	if full {
		// The kernel may still be busy with it for a call that did not wait.
		unlock, err := m.targets.lock(ctx, "device\x00"+spec.Device)
		if err == nil {
			unlock()
		}
		return err
	}
	if spec.Path == "" {
		return m.growOffline(ctx, spec)
	}
	if err := m.growMounted(ctx, spec); err != nil {
		return explainGrow(err, spec)
	}
	if full, err = m.filled(spec); err == nil && !full {
		err = &OpError{Op: "verify growth of", Path: spec.Path, Err: syscall.EAGAIN, Words: "the filesystem is still smaller than its device"}
	}
	return err
}

// errFrozen is ErrBusy.
var errFrozen = fmt.Errorf("%w: the filesystem is frozen; fsfreeze -u thaws it", ErrBusy)

var frozenNow = frozen // of tests

// growMounted has the kernel grow a filesystem. Of a frozen one that would wait until it is
// thawed, deaf to signals: neither would the volume's other calls have their turn, of which
// unstaging it thaws it, nor could this process end. So who is frozen is refused; and should
// that come a moment later, the kernel is left alone with it when ctx ends.
func (m *Mounter) growMounted(ctx context.Context, spec GrowSpec) error {
	unlock, err := m.targets.lock(ctx, "device\x00"+spec.Device)
	if err != nil {
		return err
	}
	at, _, err := m.At(spec.Path)
	if err == nil && frozenNow(at) {
		err = errFrozen
	}
	var fd int
	if err == nil {
		// Before the caller can be gone: what is mounted there later is another filesystem.
		fd, err = openMount(spec.Path)
	}
	if err != nil {
		unlock()
		return err
	}
	done := make(chan error, 1)
	go func() {
		err := growOnline(fd, spec)
		closeFD(fd) // before the answer: who has it may unmount
		unlock()
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// NeedsGrow reports whether Grow would have something to do.
func (m *Mounter) NeedsGrow(spec GrowSpec) (bool, error) {
	full, err := m.filled(spec)
	return err == nil && !full, err
}

// filled compares the kernel's (or, not mounted, the superblock's) idea of the
// filesystem's size with the device's.
func (m *Mounter) filled(spec GrowSpec) (bool, error) {
	if _, ok := filesystemOptions[spec.FSType]; !ok {
		return false, fmt.Errorf("grow %s: %w: %q", shorten(spec.Device), ErrUnknownFilesystem, spec.FSType)
	}
	size, err := deviceSize(spec.Device)
	if err != nil {
		return false, &OpError{Op: "measure", Path: spec.Device, Err: err}
	}
	if spec.Path != "" {
		if err := m.shownAt(spec); err != nil {
			return false, err
		}
	}
	sb, err := currentSize(spec)
	if err != nil {
		return false, err
	}
	return sb.FillsDevice(size), nil
}

// shownAt makes sure that Path is a mount of Device.
func (m *Mounter) shownAt(spec GrowSpec) error {
	found, ok, err := m.At(spec.Path)
	if err != nil {
		return err
	}
	if !ok {
		return &OpError{Op: "grow", Path: spec.Path, Err: syscall.EINVAL, Words: "nothing is mounted there"}
	}
	device, err := lookThrough(spec.Device)
	if err != nil {
		return &OpError{Op: "look at", Path: spec.Device, Err: err}
	}
	if found.Root != "/" {
		found.Root = "/" // a bind of a subdirectory is good enough to reach it
	}
	return compareMount(found, spec.Path, spec.FSType, device, found.ReadOnly)
}

// currentSize returns a Superblock with what FillsDevice needs. Of a mounted xfs
// or btrfs the one on the device may be old, so the driver is asked.
func currentSize(spec GrowSpec) (Superblock, error) {
	if spec.Path != "" && spec.FSType == "xfs" {
		sb, err := xfsSize(spec.Path)
		return sb, wrapOp("measure xfs at", spec.Path, err)
	}
	sb, err := superblockOn(spec)
	if err == nil && spec.Path != "" && spec.FSType == "btrfs" {
		sb, err = btrfsSize(spec.Path, sb.devID)
		err = wrapOp("measure btrfs at", spec.Path, err)
	}
	return sb, err
}

// superblockOn reads the one on the device. While it is mounted that is good for what
// does not change: the size of its blocks, and a btrfs's number for its device.
func superblockOn(spec GrowSpec) (Superblock, error) {
	f, err := os.Open(spec.Device)
	if err != nil {
		return Superblock{}, &OpError{Op: "open", Path: spec.Device, Err: errnoOf(err)}
	}
	defer func() { _ = f.Close() }()
	sb, err := ReadSuperblock(f)
	if err != nil {
		return Superblock{}, fmt.Errorf("%s: %w", shorten(spec.Device), err)
	}
	if sb.Type != spec.FSType && (!isExt(sb.Type) || !isExt(spec.FSType)) {
		return Superblock{}, fmt.Errorf("%s holds %s, not %s: %w", shorten(spec.Device), sb.Type, spec.FSType, ErrUnknownFilesystem)
	}
	return sb, nil
}

func isExt(fsType string) bool { return fsType == "ext2" || fsType == "ext3" || fsType == "ext4" }

func wrapOp(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &OpError{Op: op, Path: path, Err: err}
}

// growOnline grows the filesystem of which fd is a directory.
func growOnline(fd int, spec GrowSpec) error {
	if spec.FSType == "xfs" {
		return growXFS(spec.Device, fd)
	}
	sb, err := superblockOn(spec)
	if err != nil {
		return err
	}
	if spec.FSType == "btrfs" {
		return growBtrfs(fd, sb.devID)
	}
	return growExt(spec.Device, fd, sb.BlockSize)
}

// explainGrow says what a person can do about it.
func explainGrow(err error, spec GrowSpec) error {
	out := &OpError{Op: "grow " + spec.FSType + " at", Path: spec.Path, Err: err}
	switch {
	case errors.Is(err, syscall.EPERM) && isExt(spec.FSType):
		out.Words = "growing a mounted " + spec.FSType + " needs CAP_SYS_RESOURCE in the initial user namespace; " +
			"give it to this process, or grow the filesystem while it is not mounted"
	case errors.Is(err, syscall.EPERM):
		out.Words = "needs CAP_SYS_ADMIN"
	case errors.Is(err, syscall.EROFS):
		out.Words = "it is mounted read-only"
	case errors.Is(err, syscall.EINVAL) && spec.FSType == "btrfs":
		// btrfs_ioctl_resize refuses a new size under 256 MiB, even a greater one.
		out.Err = errors.Join(err, ErrUnsupported)
		out.Words = "btrfs resizes only to 256 MiB or more"
	case errors.Is(err, syscall.ENOTTY), errors.Is(err, syscall.EOPNOTSUPP):
		// ENOTTY: the old ext2 driver. EOPNOTSUPP: features that stand against it.
		out.Err = errors.Join(err, ErrUnsupported)
		out.Words = "this one cannot grow while it is mounted"
	case errors.Is(err, syscall.EAGAIN):
		// XFS: another growfs is running.
		out.Err = errors.Join(err, ErrBusy)
	}
	return out
}

// growOffline checks and grows an ext filesystem that is not mounted. resize2fs
// insists on a full check first.
func (m *Mounter) growOffline(ctx context.Context, spec GrowSpec) error {
	if !isExt(spec.FSType) {
		return &OpError{Op: "grow " + spec.FSType + " on", Path: spec.Device, Err: ErrUnsupported, Words: "it can only grow while it is mounted"}
	}
	unlock, err := m.targets.lock(ctx, "device\x00"+spec.Device)
	if err != nil {
		return err
	}
	defer unlock()
	if err := claimable(spec.Device); err != nil {
		return &OpError{Op: "grow", Path: spec.Device, Err: err}
	}
	if err := e2fsck(ctx, spec.Device, "-f", "-p"); err != nil {
		return err
	}
	out, code, err := runWhole(ctx, spec.Device, "resize2fs", "--", spec.Device)
	if err == nil && code != 0 {
		err = fmt.Errorf("exit status %d", code)
	}
	if err != nil {
		return &OpError{Op: "run resize2fs on", Path: spec.Device, Err: err, Words: out}
	}
	full, err := m.filled(spec)
	if err == nil && !full {
		err = &OpError{Op: "verify growth of", Path: spec.Device, Err: syscall.EAGAIN, Words: out}
	}
	return err
}
