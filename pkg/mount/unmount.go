package mount

import (
	"context"
	"errors"
	"syscall"
	"time"
)

// maxLayers bounds how many mounts one Unmount takes off one target, so that
// somebody who mounts in a loop cannot keep it busy for ever.
const maxLayers = 1024

// Unmount takes away every mount at exactly target, the uppermost first. On
// success nothing is mounted there; the target itself stays. Not mounted, or no
// such target, is success.
//
// It is never lazy and never forced. In use (an open file, a working directory,
// another mount below) is ErrBusy; layers above the busy one are gone then. A
// filesystem that is dead can be unmounted like any other.
func (m *Mounter) Unmount(ctx context.Context, target string) error {
	target, err := cleanPath("unmount", target)
	if err != nil {
		return err
	}
	unlock, err := m.targets.lock(ctx, target)
	if err != nil {
		return err
	}
	defer unlock()
	return m.unmount(ctx, target)
}

// Remove unmounts target and removes it: an empty directory, or an empty file.
// On success there is nothing at target. No such target is success. A directory
// that is not empty (ENOTEMPTY), a file with contents, a symbolic link or
// anything else that is never made as a target stays.
func (m *Mounter) Remove(ctx context.Context, target string) error {
	target, err := cleanPath("remove", target)
	if err != nil {
		return err
	}
	unlock, err := m.targets.lock(ctx, target)
	if err != nil {
		return err
	}
	defer unlock()
	if err := m.unmount(ctx, target); err != nil {
		return err
	}
	return removeTarget(target)
}

// unmount needs a clean target whose lock is held.
func (m *Mounter) unmount(ctx context.Context, target string) error {
	var insistUntil time.Time
	wait := time.Millisecond
	for layers := 0; layers < maxLayers; {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := unmountTop(target)
		switch {
		case err == nil:
			layers++
			insistUntil, wait = time.Time{}, time.Millisecond
		case isMissing(err):
			return nil
		case errors.Is(err, syscall.EINVAL):
			// Not a mount point, or one that another user namespace locked.
			return m.provenUnmounted(target)
		case errors.Is(err, syscall.EBUSY):
			now := time.Now()
			if insistUntil.IsZero() {
				insistUntil = now.Add(m.busyTime)
			}
			if !now.Add(wait).Before(insistUntil) {
				return &OpError{Op: "unmount", Path: target, Err: err, Words: "a file or directory in it is open, or something is mounted in it"}
			}
			if err := pause(ctx, wait); err != nil {
				return err
			}
			wait *= 2
		default:
			return &OpError{Op: "unmount", Path: target, Err: err}
		}
	}
	return &OpError{Op: "unmount", Path: target, Err: ErrBusy, Words: "somebody mounts there again and again"}
}

func (m *Mounter) provenUnmounted(target string) error {
	found, ok, err := m.at(target)
	if err != nil {
		return err
	}
	if ok {
		return &OpError{
			Op: "unmount", Path: target, Err: syscall.EINVAL,
			Words: "the kernel refuses to take away " + found.FSType + " of " + found.Source + ", is the mount locked?",
		}
	}
	return nil
}
