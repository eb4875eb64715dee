package driver

import (
	"context"
	"errors"

	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// binding is one binding of one loop device, with the numbers by which mounts of
// it are told: never by the name of a source or of a node, which anybody chooses.
type binding struct {
	Number  int    `json:"number"`
	DiskSeq uint64 `json:"diskSeq"`
	Major   uint32 `json:"major"`
	Minor   uint32 `json:"minor"`
}

func bindingOf(info loop.Info) binding {
	return binding{Number: info.Number, DiskSeq: info.DiskSeq, Major: info.Major, Minor: info.Minor}
}

// none says that there is no device.
func (b binding) none() bool { return b == binding{} }

func (b binding) ref() loop.Ref { return loop.Ref{Number: b.Number, DiskSeq: b.DiskSeq} }

// shownBy says whether a mount is of this device: its filesystem, or its node.
func (b binding) shownBy(m mount.Mount) bool { return !b.none() && m.IsOf(b.Major, b.Minor) }

// status describes a binding of a volume over image; ok is false when the binding
// is gone.
func (d *Driver) status(ctx context.Context, b binding, image loop.FileID) (info loop.Info, ok bool, err error) {
	if b.none() {
		return info, false, nil
	}
	info, err = d.table.Status(ctx, b.ref())
	if errors.Is(err, loop.ErrNotBound) || errors.Is(err, loop.ErrNotExist) {
		return info, false, nil
	}
	return info, err == nil && info.Image == image, err
}

// ensureHeld makes sure that a device that is bound is held by us. It says whether
// it is bound.
func (d *Driver) ensureHeld(ctx context.Context, b binding) (bool, error) {
	if b.none() {
		return false, nil
	}
	if d.holds(b.ref()) {
		_, err := d.table.Status(ctx, b.ref())
		if errors.Is(err, loop.ErrNotBound) || errors.Is(err, loop.ErrNotExist) {
			return false, nil
		}
		return err == nil, err
	}
	dev, err := d.loops.Hold(ctx, b.ref())
	if errors.Is(err, loop.ErrNotBound) || errors.Is(err, loop.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	d.hold(dev)
	return true, nil
}
