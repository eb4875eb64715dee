package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// targetMode is the mode of directories and files that are made to mount on.
// What is mounted hides it.
const targetMode = 0o750

// Spec says what Mount shall mount.
type Spec struct {
	Source   string   // a node of the block device
	Target   string   // an absolute path; its parent directory exists
	FSType   string   // ext2, ext3, ext4, xfs or btrfs; never guessed
	Options  []string // see ParseOptions
	ReadOnly bool     // the filesystem, not only this mount of it
}

// Mount mounts the filesystem on the block device Source at Target. On success
// it is there, and read-only as asked. Target is made (0750) when it is missing.
//
// The same device already mounted there with the same type and read-only or not
// is success; the other options are not compared. Anything else mounted there is
// a *ForeignError. A refused option is an *OptionError with the kernel's own
// words, whoever refused it. ErrBusy: the device is claimed by somebody, or is
// mounted elsewhere and differs in read-only. ErrUnsupported: the kernel does not
// have the filesystem. Any other failure is an *OpError; EINVAL, EUCLEAN and the
// like from "open filesystem" mean that the driver did not like what it found,
// and the details are in the kernel's log.
func (m *Mounter) Mount(ctx context.Context, spec Spec) error {
	target, err := cleanPath("mount at", spec.Target)
	if err != nil {
		return err
	}
	options, err := ParseOptions(spec.FSType, spec.Options)
	if err != nil {
		return err
	}
	options.ReadOnly = options.ReadOnly || spec.ReadOnly
	device, err := lookThrough(spec.Source)
	if err == nil && !device.isBlock() {
		err = syscall.ENOTBLK
	}
	if err == nil && len(spec.Source) > maxParamBytes {
		err = syscall.ENAMETOOLONG // fsconfig would answer EINVAL
	}
	if err != nil {
		return &OpError{Op: "mount from", Path: spec.Source, Err: err}
	}

	unlock, err := m.targets.lock(ctx, target)
	if err != nil {
		return err
	}
	defer unlock()
	found, ok, err := m.at(target)
	if err != nil {
		return err
	}
	if ok {
		return compareMount(found, target, spec.FSType, device, options.ReadOnly)
	}
	return m.onTarget(ctx, target, true, func(at int) error {
		fd, err := newMount(spec.Source, spec.FSType, options)
		if err != nil {
			return explain(err, spec, target)
		}
		defer closeFD(fd)
		return attachAt(fd, at, target, options.ReadOnly)
	})
}

// compareMount tells success from a foreign mount. A btrfs is known by its source
// only, for its numbers are anonymous.
func compareMount(found Mount, target, fsType string, device place, readOnly bool) error {
	foreign := func(format string, args ...any) error {
		return &ForeignError{Target: target, Found: found, Reason: fmt.Sprintf(format, args...)}
	}
	major, minor := devNumbers(device.rdev)
	same := found.Major == major && found.Minor == minor
	if found.FSType == "btrfs" {
		source, err := lookThrough(found.Source)
		same = err == nil && source.sameAs(device)
	}
	switch {
	case !same:
		return foreign("device %d:%d is asked for", major, minor)
	case found.FSType != fsType:
		return foreign("%s is asked for", fsType)
	case found.Root != "/":
		return foreign("only a part of the filesystem")
	case found.ReadOnly != readOnly:
		return foreign("read-only is %t, %t is asked for", found.ReadOnly, readOnly)
	}
	return nil
}

// explain makes one error of what the kernel answered.
func explain(err error, spec Spec, target string) error {
	var c *configError
	if !errors.As(err, &c) {
		return &OpError{Op: "mount", Path: target, Err: err}
	}
	if c.param != "" && errors.Is(c.err, syscall.EIO) { // a fault, and not the option's
		return &OpError{Op: c.op + " " + shorten(c.param) + " for", Path: target, Err: c.err, Words: c.words}
	}
	if c.param != "" {
		reason := c.words
		if reason == "" {
			reason = c.err.Error()
		}
		return &OptionError{FSType: spec.FSType, Option: c.param, Reason: "refused by the kernel: " + reason, Err: c.err}
	}
	words := c.words
	if advice := advise(c, spec); advice != "" && words != "" {
		words += "; " + advice
	} else if words == "" {
		words = advice
	}
	out := &OpError{Op: c.op + " " + spec.FSType + " of " + shorten(spec.Source) + " for", Path: target, Err: c.err, Words: words}
	switch {
	case errors.Is(c.err, syscall.ENODEV) && c.op == opDriver:
		out.Err = fmt.Errorf("%w: %w", c.err, ErrUnsupported)
	case errors.Is(c.err, errUnclean), errors.Is(c.err, syscall.EBADMSG), errors.Is(c.err, syscall.EIO):
		out.Err = fmt.Errorf("%w: %w", c.err, ErrDamaged)
	case errors.Is(c.err, syscall.EINVAL), errors.Is(c.err, syscall.EROFS), errors.Is(c.err, syscall.EACCES):
		out.Err = fmt.Errorf("%w: %w", c.err, ErrRefused)
	}
	return out
}

// advise says in words what an errno of a mount means, if it is known.
func advise(c *configError, spec Spec) string {
	switch {
	case errors.Is(c.err, syscall.ENODEV) && c.op == opDriver:
		// No such filesystem, and no module of that name either.
		return "this kernel has no " + spec.FSType + ", is its module installed?"
	case errors.Is(c.err, syscall.EACCES) && !spec.ReadOnly:
		return "the device is read-only, so the mount has to be too"
	case errors.Is(c.err, syscall.EROFS):
		return "its log has to be replayed first, and the device is read-only"
	case errors.Is(c.err, syscall.EBUSY):
		return "the device is claimed, or mounted elsewhere with another read-only setting"
	case errors.Is(c.err, syscall.EINVAL) && spec.FSType == "xfs":
		return "no intact xfs there, one with features that this kernel lacks, or one with the same UUID is mounted already " +
			"(a copy of it; the mount option nouuid allows that); its log has the details"
	case errors.Is(c.err, syscall.EINVAL) && len(spec.Options) > 0:
		return "no intact " + spec.FSType + " there, one with features that this kernel lacks, or options that do not fit it (" +
			shorten(strings.Join(spec.Options, ",")) + "); its log has the details"
	case errors.Is(c.err, errUnclean), errors.Is(c.err, syscall.EBADMSG):
		return "the kernel log has the details; it is for a person to repair, with " + repairTool(spec.FSType) + " on the image"
	case errors.Is(c.err, syscall.EINVAL), errors.Is(c.err, syscall.EIO):
		return "no intact " + spec.FSType + " there, or one with features that this kernel lacks; its log has the details"
	case errors.Is(c.err, syscall.EPERM):
		return "needs CAP_SYS_ADMIN"
	}
	return ""
}

// repairTool is what a person repairs a filesystem with.
func repairTool(fsType string) string {
	switch fsType {
	case "xfs":
		return "xfs_repair"
	case "btrfs":
		return "btrfs check"
	default:
		return "e2fsck"
	}
}

// onTarget makes the target if need be, opens it and hands it to do. When do
// fails, what was made is removed again.
func (m *Mounter) onTarget(ctx context.Context, target string, dir bool, do func(at int) error) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	made, err := ensureTarget(target, dir)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && made {
			// Only what is empty goes; somebody may have used it meanwhile.
			err = errors.Join(err, removeTarget(target))
		}
	}()
	at, err := openPath(target)
	if err != nil {
		return &OpError{Op: "open target", Path: target, Err: err}
	}
	defer closeFD(at)
	p, err := lookFD(at)
	if err != nil {
		return &OpError{Op: "look at target", Path: target, Err: err}
	}
	if err := checkTarget(target, p.mode, dir); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return do(at)
}

// ensureTarget makes an empty directory or file when there is nothing.
func ensureTarget(target string, dir bool) (made bool, err error) {
	if dir {
		err = os.Mkdir(target, targetMode)
	} else {
		var f *os.File
		// O_EXCL does not follow a link.
		if f, err = os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, targetMode&^0o111); err == nil {
			err = f.Close()
		}
	}
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, fs.ErrExist):
		return false, nil
	}
	// EROFS is answered before EEXIST by some filesystems: look before failing.
	if _, lookErr := look(target); lookErr == nil {
		return false, nil
	}
	out := &OpError{Op: "make target", Path: target, Err: errnoOf(err)}
	if errors.Is(err, fs.ErrNotExist) {
		out.Words = "its parent directory does not exist"
	}
	return false, out
}

func checkTarget(target string, mode fs.FileMode, dir bool) error {
	out := &OpError{Op: "mount at", Path: target}
	switch {
	case mode&fs.ModeSymlink != 0:
		out.Err, out.Words = syscall.ELOOP, "the target is a symbolic link, which is not followed"
	case dir && !mode.IsDir():
		out.Err, out.Words = syscall.ENOTDIR, "the target is "+typeName(mode)+" and has to be a directory"
	case !dir && mode.IsDir():
		out.Err, out.Words = syscall.EISDIR, "the target is a directory and has to be a file"
	case !dir && !mode.IsRegular():
		out.Err, out.Words = syscall.EINVAL, "the target is "+typeName(mode)+" and has to be a regular file"
	default:
		return nil
	}
	return out
}

// attachAt attaches the detached mount fd at the open target and proves it: that
// it is read-only before anybody can see it, that it is on top of the target
// after. It fails without a mount made, except when the target was moved or
// covered by somebody in that very moment.
func attachAt(fd, at int, target string, readOnly bool) error {
	if readOnly {
		is, err := isReadOnly(fd)
		if err == nil && !is {
			err = fmt.Errorf("the kernel made it writable: %w", ErrUnsupported)
		}
		if err != nil {
			return &OpError{Op: "verify read-only", Path: target, Err: err}
		}
	}
	if err := attachMount(fd, at); err != nil {
		out := &OpError{Op: "attach mount", Path: target, Err: err}
		if errors.Is(err, syscall.ENOENT) {
			out.Words = "the target, or the directory to show, was removed"
		}
		return out
	}
	want, err := lookFD(fd)
	if err != nil {
		return nil //nolint:nilerr // attached, but dead already: At and Unmount can handle that
	}
	got, err := look(target)
	if err == nil && got.mountID == want.mountID {
		return nil
	}
	// The target's directory was moved, or somebody mounted on top of it.
	if err == nil {
		err = ErrBusy
	}
	return &OpError{Op: "verify mount", Path: target, Err: err, Words: "something else is there now"}
}

func errnoOf(err error) error {
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		return p.Err
	}
	return err
}

// removeTarget removes an empty directory, or an empty regular file. Nothing
// there is success.
func removeTarget(target string) error {
	fail := func(err error, words string) error {
		return &OpError{Op: "remove target", Path: target, Err: err, Words: words}
	}
	info, err := os.Lstat(target)
	if err != nil {
		if isMissing(err) {
			return nil
		}
		return fail(errnoOf(err), "")
	}
	switch {
	case info.IsDir():
		err = syscall.Rmdir(target)
	case info.Mode().IsRegular() && info.Size() == 0:
		err = syscall.Unlink(target)
	case info.Mode().IsRegular():
		return fail(syscall.ENOTEMPTY, "the file has contents, so it is not a mount target's")
	default:
		return fail(syscall.EINVAL, "it is "+typeName(info.Mode())+", which is never made as a target")
	}
	switch {
	case err == nil, isMissing(err):
		return nil
	case errors.Is(err, syscall.ENOTEMPTY):
		return fail(err, "there are files in "+filepath.Base(target)+" itself, under the mount")
	}
	return fail(err, "")
}
