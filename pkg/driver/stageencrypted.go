package driver

import (
	"context"
	"errors"
	"io"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// stageEncrypted is stageFilesystem and stageBlock for a volume whose image holds it
// encrypted. The mapping keeps the loop device bound. That of a filesystem ends with its
// last user, from the moment of the mount; that of a raw block volume is ended by the
// call that ends the staging.
func (d *Driver) stageEncrypted(ctx context.Context, src source, want stageRecord, secrets map[string]string) error {
	passphrase, err := passphraseOf(secrets)
	if err != nil {
		return err
	}
	defer clear(passphrase)
	if err := d.crypt.Available(); err != nil {
		return err
	}
	if !want.Block {
		if _, err := mount.ParseOptions(want.FSType, want.Flags); err != nil {
			return err
		}
	}
	m := src.mapping
	m.Autoclear, m.ReadOnly = !want.Block, want.Block && want.ReadOnly
	f, err := src.open(ctx, m.ReadOnly)
	if err != nil {
		return err
	}
	defer f.Close()
	dev, restore, err := d.attachRecorded(ctx, f, m, &want)
	if err != nil {
		return err
	}
	before, shown, err := d.leftOver(ctx, dev.Info())
	stays := dev.Reused() && (err != nil || len(shown) > 0)
	if err == nil {
		src.holds, err = contentOf(ctx, want.VolumeID, f)
	}
	if err == nil {
		var held io.Closer
		if want.Device, held, err = d.unlock(ctx, src, want, f, before, shown, dev.Info(), passphrase); err == nil {
			err = d.finishEncrypted(ctx, src, &want, dev, held)
		}
	}
	switch {
	case err == nil:
		return nil
	case stays, before.encrypted() && errors.Is(err, image.ErrDamaged):
		// It was there, and is in use, or has what is left of the key. What it is can be
		// found again.
		return errors.Join(err, restore(), dev.Close())
	}
	if undoErr := d.undoEncrypted(ctx, want, dev); undoErr != nil {
		return undone(err, undoErr) // the record without device stays and finds it
	}
	return undone(err, restore())
}

// leftOver describes a device with the mapping that is over it already, and where that is
// mounted, or its node. One that was never made whole is ended.
func (d *Driver) leftOver(ctx context.Context, info loop.Info) (b binding, shown []string, err error) {
	if err := d.endHollow(ctx, info.Ref); err != nil {
		return b, nil, err
	}
	b, err = d.fullBinding(info, true)
	if err == nil && b.encrypted() {
		shown, err = d.mountsOf(b)
	}
	return b, shown, err
}

// finishEncrypted makes the staging of an open mapping whole. dev is kept or closed then,
// and after an error it is the caller's as before; held, which keeps the mapping, is kept
// or closed in any case.
func (d *Driver) finishEncrypted(ctx context.Context, src source, want *stageRecord, dev attached, held io.Closer) error {
	if want.Block {
		if err := d.state.put(*want); err != nil {
			return errors.Join(err, held.Close())
		}
		d.hold(heldMapping{dev, held})
		return nil
	}
	// From the mount on that keeps the mapping.
	if err := errors.Join(d.mountMapping(ctx, src, want, dev.Info()), held.Close()); err != nil {
		return err
	}
	return dev.Close()
}

// mountMapping mounts the filesystem in a mapping that is held, and writes it down.
func (d *Driver) mountMapping(ctx context.Context, src source, want *stageRecord, shown loop.Info) error {
	shown.Path, shown.Size = want.Device.Mapping.Path, shown.Size-image.HeaderSize
	sb, err := superblockAt(shown.Path)
	if err != nil {
		return err
	}
	if !sameFilesystem(want.FSType, sb.Type) {
		return preconditionf("the volume holds %s, not %s", sb.Type, want.FSType)
	}
	mounts, err := d.mountsOf(want.Device)
	if err != nil {
		return err
	}
	if len(mounts) > 0 {
		sb.NeedsCheck = false // a crash came before the record was complete
	}
	if err := d.mountFilesystem(ctx, mountSpec(src, *want, shown), src, shown, sb); err != nil {
		return err
	}
	// Before the record, so that a record that is complete stands for a mapping that goes
	// by itself.
	if err := d.crypt.CloseLast(want.Device.Mapping); err != nil {
		return err
	}
	return d.state.put(*want)
}

// undoEncrypted takes back a staging that failed half-way: the mount, the mapping, the
// loop device. What somebody else has mounted as well stays.
func (d *Driver) undoEncrypted(ctx context.Context, r stageRecord, dev attached) error {
	ctx, cancel := undoContext(ctx)
	defer cancel()
	full, err := d.fullBinding(dev.Info(), true)
	if err != nil {
		return errors.Join(err, dev.Close())
	}
	if !r.Block {
		m, mounted, err := d.mtab.At(r.StagingPath)
		if err == nil && mounted && full.encrypted() && full.shownBy(m) {
			err = d.mounts.Unmount(ctx, r.StagingPath)
		}
		if err != nil {
			return errors.Join(err, dev.Close())
		}
	}
	// A start may hold what a crash left.
	if err := errors.Join(d.letGo(full.ref()), d.closeMappings(ctx, full, r.Image)); err != nil {
		return errors.Join(err, dev.Close())
	}
	switch err := dev.Close(); {
	case err != nil:
		return err
	case r.Block: // also one that a crash left: without its mapping it is shown to nobody
		return d.loops.Detach(ctx, full.ref())
	case dev.Reused():
		return nil
	}
	return d.loops.WaitUnbound(ctx, full.ref())
}
