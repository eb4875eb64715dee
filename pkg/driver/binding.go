package driver

import (
	"context"
	"errors"
	"fmt"

	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// binding is one binding of one loop device, with the numbers by which mounts of
// it are told: never by the name of a source or of a node, which anybody chooses.
//
// What an encrypted volume shows is not the loop device but the mapping over it, so the
// numbers are the mapping's.
type binding struct {
	Number  int    `json:"number"`
	DiskSeq uint64 `json:"diskSeq"`
	mount.Device
	Mapping crypt.Mapping `json:"mapping,omitzero"`
}

// bindingOf describes the device of info.
func (d *Driver) bindingOf(info loop.Info) (binding, error) {
	device, err := d.mtab.DeviceAt(info.Path)
	return binding{Number: info.Number, DiskSeq: info.DiskSeq, Device: device}, err
}

// encrypted says whether there is a mapping.
func (b binding) encrypted() bool { return b.Mapping.Name != "" }

// path is the node that shows the volume; info is of the loop device.
func (b binding) path(info loop.Info) string {
	if b.encrypted() {
		return b.Mapping.Path
	}
	return info.Path
}

// none says that there is no device.
func (b binding) none() bool { return b.DiskSeq == 0 }

func (b binding) ref() loop.Ref { return loop.Ref{Number: b.Number, DiskSeq: b.DiskSeq} }

// shownBy says whether a mount is of this device: its filesystem, or its node.
func (b binding) shownBy(m mount.Mount) bool { return !b.none() && m.IsOf(b.Device) }

// status describes a binding of a volume over image; ok is false when the binding
// is gone, or its mapping.
func (d *Driver) status(ctx context.Context, b binding, image loop.FileID) (info loop.Info, ok bool, err error) {
	info, ok, err = d.loopStatus(ctx, b, image)
	if err != nil || !ok || !b.encrypted() {
		return info, ok, err
	}
	m, ok, err := d.mappingOver(b.ref())
	return info, ok && m == b.Mapping, err
}

// loopStatus is status of the loop device alone.
func (d *Driver) loopStatus(ctx context.Context, b binding, image loop.FileID) (info loop.Info, ok bool, err error) {
	if b.none() {
		return info, false, nil
	}
	info, err = d.table.Status(ctx, b.ref())
	if errors.Is(err, loop.ErrNotBound) || errors.Is(err, loop.ErrNotExist) {
		return info, false, nil
	}
	return info, err == nil && (info.Image == image || info.Image == (loop.FileID{})), err
}

// ensureHeld makes sure that a device of a raw block volume that is bound is held
// by us, and says whether it is bound. One that was cleared and waits for its last
// user is ErrBusy: holding it would keep it from ever going.
// Precondition: the caller holds the volume's lock.
func (d *Driver) ensureHeld(ctx context.Context, b binding, image loop.FileID) (bool, error) {
	info, bound, err := d.status(ctx, b, image)
	switch {
	case err != nil || !bound:
		return false, err
	case info.Autoclear:
		return false, fmt.Errorf("/dev/loop%d was cleared and waits for its last user: %w", b.Number, loop.ErrBusy)
	case d.holds(b.ref()):
		return true, nil
	}
	dev, err := d.loops.Hold(ctx, b.ref())
	if errors.Is(err, loop.ErrNotBound) || errors.Is(err, loop.ErrNotExist) {
		return false, nil
	}
	if err == nil {
		dev, err = d.withMapping(dev, b)
	}
	if errors.Is(err, crypt.ErrGone) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	d.hold(dev)
	return true, nil
}

// undone joins the error of a call with that of taking back what it did. If that
// failed the answer is ABORTED, whatever the call's own error: something is left,
// and every final code would say that nothing is (fact 57).
func undone(err, undoErr error) error {
	if undoErr == nil {
		return err
	}
	return abortedf("%v; taking it back: %v", err, undoErr)
}
