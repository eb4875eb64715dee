package driver

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
)

// mappingName is the name of the mapping over a binding.
func mappingName(ref loop.Ref) string {
	return fmt.Sprintf("%sloop%d-%d", MappingPrefix, ref.Number, ref.DiskSeq)
}

// mappingRef is the binding that a mapping's name stands for.
func mappingRef(name string) (ref loop.Ref, ok bool) {
	_, err := fmt.Sscanf(name, MappingPrefix+"loop%d-%d", &ref.Number, &ref.DiskSeq)
	return ref, err == nil && mappingName(ref) == name
}

// mappingOver finds the mapping of a binding.
func (d *Driver) mappingOver(ref loop.Ref) (crypt.Mapping, bool, error) {
	all, err := d.crypt.Over(fmt.Sprintf("loop%d", ref.Number))
	for _, m := range all {
		if m.Name == mappingName(ref) {
			return m, true, nil
		}
	}
	return crypt.Mapping{}, false, err
}

// mapped is a binding with its mapping.
func (d *Driver) mapped(b binding, m crypt.Mapping) (binding, error) {
	device, err := d.mtab.DeviceAt(m.Path)
	b.Device, b.Mapping = device, m
	return b, err
}

// closeMappings ends what lies over the device of a binding that is still in force: its
// mapping, and what a killed cryptsetup left.
func (d *Driver) closeMappings(ctx context.Context, b binding, image loop.FileID) error {
	if _, bound, err := d.loopStatus(ctx, b, image); err != nil || !bound {
		return err
	}
	all, err := d.crypt.Over(fmt.Sprintf("loop%d", b.Number))
	errs := []error{err, d.endHollow(ctx, b.ref())}
	for _, m := range all {
		if m.Name == mappingName(b.ref()) || m.Temporary() {
			errs = append(errs, d.crypt.Close(ctx, m))
		}
	}
	return errors.Join(errs...)
}

// endHollow ends the mapping of a binding if it was never made whole: cryptsetup was
// ended, or failed, in the middle of it.
// Precondition: the caller holds the volume's lock, so that nobody is making it.
func (d *Driver) endHollow(ctx context.Context, ref loop.Ref) error {
	all, err := d.crypt.Hollow(mappingName(ref))
	errs := []error{err}
	for _, m := range all {
		if m.Name == mappingName(ref) {
			klog.FromContext(ctx).Info("Ending a mapping that was never made whole", "mapping", m.Name)
			errs = append(errs, d.crypt.Close(ctx, m))
		}
	}
	return errors.Join(errs...)
}

// sweepMappings ends what endHollow does for bindings that are gone: no call for a volume
// would find it. One whose device is bound is ended when its volume is staged or unstaged
// next; it may be another csi-loop's that is making it just now.
func (d *Driver) sweepMappings(ctx context.Context) error {
	all, err := d.crypt.Hollow(MappingPrefix)
	errs := []error{err}
	for _, m := range all {
		ref, ok := mappingRef(m.Name)
		if !ok {
			continue
		}
		_, err := d.table.Status(ctx, ref)
		switch {
		case errors.Is(err, loop.ErrNotBound), errors.Is(err, loop.ErrNotExist):
			errs = append(errs, d.endHollow(ctx, ref))
		case err != nil:
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// heldMapping is an attached device with the mapping over it, both of which stay until
// Close. What holds a raw block volume is one: without a user the mapping could be
// removed by hand, and its number go to another volume below the pod, as that of a loop
// device would (fact 36).
type heldMapping struct {
	attached
	mapping io.Closer
}

// Close lets go of both.
func (h heldMapping) Close() error { return errors.Join(h.mapping.Close(), h.attached.Close()) }

// Release does as well.
func (h heldMapping) Release() error { return errors.Join(h.mapping.Close(), h.attached.Release()) }

// withMapping holds the mapping of a binding together with its device, which is closed
// after an error.
func (d *Driver) withMapping(dev attached, b binding) (attached, error) {
	if !b.encrypted() {
		return dev, nil
	}
	held, err := d.crypt.Hold(b.Mapping)
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	return heldMapping{dev, held}, nil
}

// growMapping lets a mapping follow its loop device.
func (d *Driver) growMapping(ctx context.Context, b binding, want int64) error {
	if err := d.crypt.Resize(ctx, b.Mapping); err != nil {
		return err
	}
	size, err := d.crypt.Size(b.Mapping)
	if err != nil {
		return err
	}
	if size != want {
		return abortedf("%s has %d bytes, its volume %d", b.Mapping.Path, size, want)
	}
	return nil
}

// mappingProblem finds a mapping that did not follow the growth of its volume.
func (d *Driver) mappingProblem(r stageRecord, v image.Volume, p *problems) {
	size, err := d.crypt.Size(r.Device.Mapping)
	if err == nil && v.ID != "" && size < v.Content() {
		p.addf(csi.VolumeHealthErrorType_DEGRADED, reasonDeviceSmaller, "%s has %d bytes, the volume %d: the expansion is not finished on this node", r.Device.Mapping.Path, size, v.Content())
	}
}

// addMapping notes the mapping over a device of a raw block volume.
func (d *Driver) addMapping(w *writers, info loop.Info) error {
	m, ok, err := d.mappingOver(info.Ref)
	if ok {
		w.nodes = append(w.nodes, m.Path)
	}
	return err
}
