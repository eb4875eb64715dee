package driver

import (
	"context"
	"errors"
	"slices"

	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/mount"
)

// growMounted grows the filesystem of a volume that has just been mounted and is smaller
// than its device. That of a copy has to, or the volume would not be as large as was
// promised; see growAtStage for others. Copies of the ext family were made large enough,
// but for encrypted ones, whose first staging it is: before that nobody had the key. Later
// on such a copy is a volume as any other, which is never taken down to be grown.
func (d *Driver) growMounted(ctx context.Context, src source, spec mount.Spec, fsType string) error {
	err := d.growAtStage(ctx, spec)
	switch {
	case !src.copied:
		return nil
	case !sameFilesystem("ext4", fsType):
		return err
	case !src.renewed():
		return nil
	case refusesToGrow(err):
		if err := d.mounts.Unmount(ctx, spec.Target); err != nil {
			return err
		}
		if err := d.growUnmounted(ctx, spec); err != nil {
			return err
		}
		return d.mounts.Mount(ctx, spec)
	}
	return err
}

// growOnce grows the filesystem of a copy that is to be used read-only.
func (d *Driver) growOnce(ctx context.Context, src source, spec mount.Spec, fsType string) error {
	writable := writableSpec(spec)
	if err := d.mounts.Mount(ctx, writable); err != nil {
		return err
	}
	err, unmountErr := d.growAtStage(ctx, writable), d.mounts.Unmount(ctx, spec.Target)
	switch {
	case !sameFilesystem("ext4", fsType):
		return errors.Join(err, unmountErr)
	case !src.renewed(): // as in growMounted
		return unmountErr
	case refusesToGrow(err) && unmountErr == nil:
		return d.growUnmounted(ctx, spec)
	}
	return errors.Join(err, unmountErr)
}

// writableSpec is a spec of the same mount for writing. Of ro and rw the last holds, also
// where ro stands in a list with others.
func writableSpec(spec mount.Spec) mount.Spec {
	spec.ReadOnly = false
	spec.Options = append(slices.Clone(spec.Options), "rw")
	return spec
}

// refusesToGrow says of an error of growing a mounted filesystem that it cannot be done
// so, here or with this filesystem.
func refusesToGrow(err error) bool {
	return errors.Is(err, mount.ErrPermission) || errors.Is(err, mount.ErrUnsupported)
}

// growUnmounted grows a filesystem of the ext family that is not mounted: that of an
// encrypted copy, which could not be made large enough without its key.
func (d *Driver) growUnmounted(ctx context.Context, spec mount.Spec) error {
	return d.mounts.Grow(ctx, mount.GrowSpec{FSType: spec.FSType, Device: spec.Source})
}

// growAtStage grows a filesystem that is smaller than its device. A volume that was
// expanded is usable either way, so a failure is told and does not fail the staging;
// NodeExpandVolume reports it to whoever asked for the growth, and the volume's
// health shows it. A copy that is larger than its source was never as small. It is waited
// for also when ctx ends: what still grows could not be unmounted.
func (d *Driver) growAtStage(ctx context.Context, spec mount.Spec) error {
	err := d.mounts.Grow(context.WithoutCancel(ctx), mount.GrowSpec{FSType: spec.FSType, Device: spec.Source, Path: spec.Target})
	if err != nil {
		klog.FromContext(ctx).Error(err, "Filesystem is smaller than its device and could not be grown", "device", spec.Source, "path", spec.Target)
		return err
	}
	klog.FromContext(ctx).Info("Grew filesystem to its device", "device", spec.Source, "path", spec.Target)
	return nil
}
