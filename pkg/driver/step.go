package driver

import (
	"context"
	"os"

	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// Step is told of a part of a call as it begins, and its function as it ends, with its
// error. The context that it returns is that of the part.
type Step func(ctx context.Context, name string) (context.Context, func(err error))

// tell puts f between the driver and what does the work.
func (d *Driver) tell(f Step) {
	d.loops, d.mounts, d.freezer = toldLoops{d.loops, f}, toldMounts{d.mounts, f}, toldFreezer{d.freezer, f}
}

// toldLoops tells of what it has done with loop devices.
type toldLoops struct {
	loopDevices

	step Step
}

func (t toldLoops) Attach(ctx context.Context, backing *os.File, m loop.Mapping) (attached, error) {
	ctx, end := t.step(ctx, "attach")
	dev, err := t.loopDevices.Attach(ctx, backing, m)
	end(err)
	return dev, err
}

func (t toldLoops) Detach(ctx context.Context, ref loop.Ref) error {
	ctx, end := t.step(ctx, "detach")
	err := t.loopDevices.Detach(ctx, ref)
	end(err)
	return err
}

func (t toldLoops) WaitUnbound(ctx context.Context, ref loop.Ref) error {
	ctx, end := t.step(ctx, "wait for detach")
	err := t.loopDevices.WaitUnbound(ctx, ref)
	end(err)
	return err
}

// toldMounts tells of what it has done with mounts.
type toldMounts struct {
	mounter

	step Step
}

func (t toldMounts) Mount(ctx context.Context, s mount.Spec) error {
	ctx, end := t.step(ctx, "mount")
	err := t.mounter.Mount(ctx, s)
	end(err)
	return err
}

func (t toldMounts) Bind(ctx context.Context, s mount.BindSpec) error {
	ctx, end := t.step(ctx, "bind mount")
	err := t.mounter.Bind(ctx, s)
	end(err)
	return err
}

func (t toldMounts) Unmount(ctx context.Context, target string) error {
	ctx, end := t.step(ctx, "unmount")
	err := t.mounter.Unmount(ctx, target)
	end(err)
	return err
}

// Remove is an unmount to whoever reads of it, with the removal of the mount point.
func (t toldMounts) Remove(ctx context.Context, target string) error {
	ctx, end := t.step(ctx, "unmount")
	err := t.mounter.Remove(ctx, target)
	end(err)
	return err
}

func (t toldMounts) Grow(ctx context.Context, s mount.GrowSpec) error {
	ctx, end := t.step(ctx, "grow filesystem")
	err := t.mounter.Grow(ctx, s)
	end(err)
	return err
}

func (t toldMounts) Check(ctx context.Context, fsType, device string) error {
	ctx, end := t.step(ctx, "check filesystem")
	err := t.mounter.Check(ctx, fsType, device)
	end(err)
	return err
}

// toldFreezer tells of filesystems that are frozen, from the first to the thaw.
type toldFreezer struct {
	freezer

	step Step
}

func (t toldFreezer) Freeze(ctx context.Context, s mount.FreezeSpec) (frozen, error) {
	ctx, end := t.step(ctx, "freeze")
	f, err := t.freezer.Freeze(ctx, s)
	if err != nil {
		end(err)
		return nil, err
	}
	return toldFrozen{f, end}, nil
}

// toldFrozen ends the part with the thaw.
type toldFrozen struct {
	frozen

	end func(error)
}

func (t toldFrozen) Thaw() error {
	err := t.frozen.Thaw()
	t.end(err)
	return err
}
