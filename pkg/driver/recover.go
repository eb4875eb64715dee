package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// stagingRecord returns the record of a volume. Where a crash cut a staging short,
// or the state directory was lost, it is made complete or anew from what the
// kernel shows, and written down. A result without a device means that nothing
// of the volume is attached.
func (d *Driver) stagingRecord(ctx context.Context, id, staging string) (stageRecord, error) {
	r, ok := d.state.get(id)
	if ok && (r.Ephemeral || !r.Device.none() || r.StagingPath != staging) {
		return r, nil
	}
	r.VolumeID, r.StagingPath = id, staging
	// The path is the caller's word. A filesystem that is not mounted there is
	// staged elsewhere, and is not written down with a path that is wrong.
	shown, err := d.recovered(ctx, &r)
	if err != nil || !shown {
		return r, err
	}
	if !ok || len(r.Targets) > 0 { // else it was cut short, see endUnfinished
		d.state.note(ctx, r)
	}
	return r, nil
}

// recovered completes r from what the kernel shows, and says whether that is a staging:
// a device of a raw block volume, or a filesystem that is mounted at the staging path.
func (d *Driver) recovered(ctx context.Context, r *stageRecord) (shown bool, err error) {
	found, err := d.recoverStaging(ctx, r)
	if err != nil || !found || r.Block {
		return found, err
	}
	m, mounted, err := d.mtab.At(r.StagingPath)
	return err == nil && mounted && r.Device.shownBy(m), err
}

// endUnfinished takes down what a staging left that was cut short, and says whether it
// did; then there is no record any more. A record without a device is that of a staging
// that nobody was told the success of, and what was to follow the last step may be missing:
// the mask of a thick volume's discards, the growth of a copy, or the end of a mount for
// writing that was made to grow what is to be read only. What is published is from before,
// with a record that was lost, and stays.
func (d *Driver) endUnfinished(ctx context.Context, r stageRecord) (done bool, err error) {
	shown, err := d.recovered(ctx, &r)
	if err != nil || !shown {
		return false, err
	}
	left, err := d.publicationsLeft(ctx, r)
	if err == nil && len(left) == 0 && r.Block && r.Encrypted {
		// Its mapping is no device of r while its header says that nobody was given it.
		left, err = d.mappingShown(ctx, r.Device)
	}
	if err != nil || len(left) > 0 {
		return false, err
	}
	klog.FromContext(ctx).Info("Taking down a staging that was cut short", "volume", r.VolumeID, "device", r.Device.Number, "path", r.StagingPath)
	if r.Block {
		err = d.detachBlock(ctx, r)
	} else {
		err = d.unmountStaging(ctx, r)
	}
	if err != nil {
		return false, err
	}
	return true, d.state.drop(r.VolumeID)
}

// mappingShown lists where the mapping over a device is mounted, or its node.
func (d *Driver) mappingShown(ctx context.Context, b binding) ([]string, error) {
	info, err := d.table.Status(ctx, b.ref())
	if err != nil {
		return nil, err
	}
	full, err := d.fullBinding(info, true)
	if err != nil || !full.encrypted() {
		return nil, err
	}
	return d.mountsOf(full)
}

// recoverStaging completes r from the devices that were bound for its volume. It
// says whether there are any.
func (d *Driver) recoverStaging(ctx context.Context, r *stageRecord) (found bool, err error) {
	bound, err := d.devicesOf(ctx, *r)
	if err != nil || len(bound) == 0 {
		return false, err
	}
	// A filesystem's device is bound with autoclear. So is one of a raw block volume
	// that was cleared while in use; then the volume tells which it is.
	raw := !bound[0].Autoclear
	if v, err := d.volumeNamed(r.VolumeID); err == nil {
		raw, r.Encrypted = v.Filesystem == "", v.Encrypted()
	} else if !r.Encrypted {
		// The pool cannot be asked; a mapping tells it as well.
		if _, r.Encrypted, err = d.mappingOver(bound[0].Ref); err != nil {
			return false, err
		}
	}
	// The writable one is the volume's; a read-only one beside it is for
	// read-only publications.
	slices.SortStableFunc(bound, func(a, b loop.Info) int { return compareBool(a.ReadOnly, b.ReadOnly) })
	r.Block, r.Image = raw, bound[0].Image
	if r.Device, err = d.recoveredBinding(ctx, bound[0], *r); err != nil || !raw {
		return err == nil, errors.Join(err, d.recoverMounts(r))
	}
	r.ReadOnly = bound[0].ReadOnly
	if len(bound) > 1 {
		r.ReadPending = false
		r.ReadDevice, err = d.fullBinding(bound[1], r.Encrypted)
	}
	return true, errors.Join(err, d.recoverNodes(r))
}

// recoverNodes completes r from where the nodes of the devices of its raw block volume are
// mounted: its publications.
func (d *Driver) recoverNodes(r *stageRecord) error {
	if r.Targets == nil {
		r.Targets = make(map[string]targetRecord)
	}
	for _, b := range r.devices() {
		mounts, err := d.mtab.OfDevice(b.Device)
		if err != nil {
			return err
		}
		for _, m := range mounts {
			// A filesystem that somebody has mounted from it is no publication.
			if _, known := r.Targets[m.Path]; known || m.Root == "/" || isKubeletsOwn(m.Path) {
				continue
			}
			r.Targets[m.Path] = targetRecord{ReadOnly: r.ReadOnly || b == r.ReadDevice, Device: b}
		}
	}
	return nil
}

// isKubeletsOwn says whether a path is where the kubelet binds what a pod was published
// (volumeDevices/NAME/dev/POD, from volumeDevices/publish/NAME/POD) once more, for itself.
func isKubeletsOwn(path string) bool {
	_, rest, ok := strings.Cut(path, "/volumeDevices/")
	parts := strings.Split(rest, "/")
	return ok && len(parts) == 3 && parts[0] != "publish" && parts[1] == "dev"
}

// recoverMounts completes r from where its filesystem is mounted: at the staging
// path, and as a whole at others, which count as publications until they are gone.
// Binds of a part of it (subPath) and copies of a mount in another view of the
// same directories are not publications, and keep the device bound by themselves.
func (d *Driver) recoverMounts(r *stageRecord) error {
	staged, mounted, err := d.mtab.At(r.StagingPath)
	if err != nil {
		return err
	}
	mounted = mounted && r.Device.shownBy(staged)
	mounts, err := d.mtab.OfDevice(r.Device.Device)
	if err != nil {
		return err
	}
	if r.Targets == nil {
		r.Targets = make(map[string]targetRecord)
	}
	for _, m := range mounts {
		r.FSType = m.FSType
		_, known := r.Targets[m.Path]
		// The kernel shows paths without links, so the path of a mount is compared
		// with what it shows for the staging path.
		if known || m.Root != "/" || mounted && strings.HasSuffix(m.Path, staged.Path) {
			continue
		}
		r.Targets[m.Path] = targetRecord{ReadOnly: meantReadOnly(m), Device: r.Device}
	}
	if mounted {
		r.ReadOnly = meantReadOnly(staged)
	}
	return nil
}

// meantReadOnly says whether a mount is read-only itself, not because its filesystem
// stopped after an error.
func meantReadOnly(m mount.Mount) bool {
	return m.ReadOnly && (len(m.Options) == 0 || m.Options[0] != "rw")
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

// devicesOf finds the devices that were bound for the volume of r: those with its
// tag and over its image. The tag alone counts only where no image is known: for
// mapped volumes, whose tags have a prefix that nobody else gives and the node, and for
// volumes whose image is gone, whose tags hold the pool's ID.
func (d *Driver) devicesOf(ctx context.Context, r stageRecord) ([]loop.Info, error) {
	tag := d.tagOf(r.VolumeID, !isPooled(r.VolumeID))
	v, err := d.volumeNamed(r.VolumeID)
	if err == nil {
		tag = poolTag(v.ID)
	}
	all, silent, findErr := d.table.Survey(ctx)
	if findErr != nil {
		return nil, findErr
	}
	name := imageName
	if err != nil && !isPooled(r.VolumeID) {
		name = "" // the file of a mapped volume has any
	}
	if err := d.mayBeShown(silent, r.VolumeID, name); err != nil {
		return nil, err
	}
	tagged := slices.DeleteFunc(all, func(i loop.Info) bool { return i.Tag != tag })
	want := r.Image
	if err == nil && len(tagged) > 0 && want == (loop.FileID{}) {
		if want, err = d.imageOf(ctx, v); err != nil {
			return nil, err
		}
	}
	return slices.DeleteFunc(tagged, func(i loop.Info) bool { return want != (loop.FileID{}) && i.Image != want }), nil
}

// imageName is the name of the files that are the volumes of pools.
const imageName = "disk.img"

// mayBeShown returns an error if one of the devices that do not say what they show may be
// over the file of the volume, of this name, or any if it is "". Those that are recorded for
// other volumes are not.
func (d *Driver) mayBeShown(silent []loop.Info, id, name string) error {
	if len(silent) == 0 {
		return nil
	}
	others := make(map[loop.Ref]bool)
	for _, r := range d.state.list() {
		for _, b := range r.devices() {
			others[b.ref()] = r.VolumeID != id
		}
	}
	for _, i := range silent {
		if (name == "" || i.MayBe(name)) && !others[i.Ref] {
			return fmt.Errorf("%s over %q may be the device of volume %q: %w", i.Path, i.BackingPath, id, loop.ErrSilent)
		}
	}
	return nil
}

// imageOf is the identity of a volume's image, none if it is gone or damaged.
func (d *Driver) imageOf(ctx context.Context, v image.Volume) (loop.FileID, error) {
	f, err := d.poolSource(v).open(ctx, true)
	if errors.Is(err, image.ErrDamaged) || errors.Is(err, image.ErrNotFound) {
		return loop.FileID{}, nil
	}
	if err != nil {
		return loop.FileID{}, err
	}
	defer f.Close()
	return loop.FileIDOf(f)
}

// isPooled says whether an ID is one that pools make.
func isPooled(id string) bool {
	_, _, ok := image.ParseID(id)
	return ok
}

// volumeNamed finds the volume of a pool that a CO means: by its ID, or, if it is
// an inline ephemeral one, by the name that the CO gave it.
func (d *Driver) volumeNamed(id string) (image.Volume, error) {
	if v, ok := d.images.Find(id); ok && v.Ephemeral != nil {
		return v, nil
	}
	return d.images.Get(id)
}

// deviceOf proves that a mount shows the volume of r, and returns the device.
func (d *Driver) deviceOf(ctx context.Context, r stageRecord, m mount.Mount) (binding, error) {
	bound, err := d.devicesOf(ctx, r)
	if err != nil {
		return binding{}, err
	}
	for _, info := range bound {
		if b, err := d.fullBinding(info, r.Encrypted || r.VolumeID != "" && d.isEncrypted(r.VolumeID)); err != nil || b.shownBy(m) {
			return b, err
		}
	}
	return binding{}, preconditionf("%s is mounted at %q, not the volume", m.Source, m.Path)
}
