package driver

import (
	"context"
	"errors"
	"slices"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// recoverStaging completes the record of a staging that a crash cut short, or
// makes one anew (r is the zero record) when the state directory was lost: from
// what is mounted at the staging path, or from the devices that were bound for a
// raw block volume. A result without a device means that nothing is staged.
func (d *Driver) recoverStaging(ctx context.Context, r stageRecord, id, staging string) (stageRecord, error) {
	r.VolumeID, r.StagingPath = id, staging
	m, mounted, err := d.mtab.At(staging)
	switch {
	case err != nil:
		return r, err
	case mounted:
		info, err := d.deviceOf(ctx, r, m)
		if err != nil {
			return r, err
		}
		r.Image, r.Device = info.Image, info.Ref
		r.FSType, r.ReadOnly = m.FSType, m.ReadOnly
		return r, nil
	}
	bound, err := d.blockDevicesOf(ctx, id, r.Image)
	if err != nil || len(bound) == 0 {
		return r, err
	}
	// The writable one is the volume's, a read-only one beside it is for
	// read-only publications.
	slices.SortStableFunc(bound, func(a, b loop.Info) int { return compareBool(a.ReadOnly, b.ReadOnly) })
	r.Block, r.Image, r.Device, r.ReadOnly = true, bound[0].Image, bound[0].Ref, bound[0].ReadOnly
	if len(bound) > 1 {
		r.ReadDevice = bound[1].Ref
	}
	return r, nil
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	default:
		return 1
	}
}

// blockDevicesOf finds the devices that were bound for raw block volume id: over
// its image, if that is known or a pool knows it, without autoclear, and with the
// volume's tag. An unknown volume has none.
func (d *Driver) blockDevicesOf(ctx context.Context, id string, want loop.FileID) ([]loop.Info, error) {
	_, _, pooled := d.images.Lookup(id)
	if pooled && want == (loop.FileID{}) {
		var err error
		want, err = d.imageOf(ctx, id)
		if errors.Is(err, image.ErrNotFound) || errors.Is(err, image.ErrDamaged) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
	}
	all, err := d.table.FindAll(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(i loop.Info) bool {
		return i.Autoclear || i.Tag != tagOf(id, !pooled) || want != (loop.FileID{}) && i.Image != want
	}), nil
}

// deviceOf proves that a mount shows the volume of r, and returns its device. The
// image of the record counts; without one, that of the volume in its pool; for a
// mapped volume, which no pool knows, the tag that its devices get.
func (d *Driver) deviceOf(ctx context.Context, r stageRecord, m mount.Mount) (loop.Info, error) {
	number, ok := loopNumber(m)
	if !ok {
		return loop.Info{}, preconditionf("%s is mounted at %q, not the volume", m.Source, m.Path)
	}
	info, err := d.table.Inspect(ctx, number)
	if err != nil {
		return info, err
	}
	var same bool
	switch image, err := d.recordedImage(ctx, r); {
	case err == nil:
		same = info.Image == image
	case errors.Is(err, errUnknownVolume):
		same = info.Tag == tagOf(r.VolumeID, true)
	default:
		return info, err
	}
	if !same {
		return info, preconditionf("%s is mounted at %q and does not show the volume", m.Source, m.Path)
	}
	return info, nil
}

// errUnknownVolume is about an ID that no pool could have made.
var errUnknownVolume = errors.New("no pool knows the volume")

// recordedImage is the identity of the image of a record, or of the volume.
func (d *Driver) recordedImage(ctx context.Context, r stageRecord) (loop.FileID, error) {
	if r.Image != (loop.FileID{}) {
		return r.Image, nil
	}
	return d.imageOf(ctx, r.VolumeID)
}

// imageOf is the identity of the image of a volume that a pool knows, by its ID
// or, for an inline ephemeral volume, by its name; errUnknownVolume for an ID that
// is neither.
func (d *Driver) imageOf(ctx context.Context, id string) (loop.FileID, error) {
	v, ok := d.images.Find(id)
	if !ok || v.Ephemeral == nil {
		if _, _, pooled := d.images.Lookup(id); !pooled {
			return loop.FileID{}, errUnknownVolume
		}
		var err error
		if v, err = d.images.Get(id); err != nil {
			return loop.FileID{}, err
		}
	}
	f, err := d.poolSource(v).open(ctx, true)
	if err != nil {
		return loop.FileID{}, err
	}
	defer f.Close()
	return loop.FileIDOf(f)
}
