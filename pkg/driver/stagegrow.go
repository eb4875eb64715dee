package driver

import (
	"context"
	"errors"
	"slices"
	"strings"

	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// growMounted grows the filesystem of a volume that has just been mounted and is smaller
// than its device. That of a copy has to, or the volume would not be as large as was
// promised; see growAtStage for others. Copies of the ext family were made large enough
// before they were anybody's, and are volumes as any other since.
func (d *Driver) growMounted(ctx context.Context, src source, spec mount.Spec, fsType string) error {
	err := d.growAtStage(ctx, spec)
	if !src.copied || sameFilesystem("ext4", fsType) {
		return nil
	}
	return err
}

// growOnce grows the filesystem of a copy that is to be used read-only.
func (d *Driver) growOnce(ctx context.Context, spec mount.Spec, info loop.Info, sb mount.Superblock) error {
	err, unmountErr := d.growFirst(ctx, spec, info, sb)
	if sameFilesystem("ext4", sb.Type) { // as in growMounted
		return unmountErr
	}
	return errors.Join(err, unmountErr)
}

// growFirst mounts a filesystem, grows it, and unmounts it again. Mounted it grows by its
// journal, and an end of the machine in the middle harms nothing.
func (d *Driver) growFirst(ctx context.Context, spec mount.Spec, info loop.Info, sb mount.Superblock) (err, unmountErr error) {
	writable := writableSpec(spec)
	if err := d.mountOrRepair(ctx, writable, info, sb); err != nil {
		return nil, err
	}
	return d.growAtStage(ctx, writable), d.mounts.Unmount(ctx, spec.Target)
}

// growCopy makes the filesystem of the ext family of an encrypted copy, in a mapping that
// nobody was given yet, as large as the volume: when the copy was made nobody had the key.
func (d *Driver) growCopy(ctx context.Context, src source, want stageRecord, shown loop.Info) error {
	if !sameFilesystem("ext4", src.spec.Filesystem) {
		return nil
	}
	sb, err := superblockAt(shown.Path)
	if err != nil || sb.FillsDevice(shown.Size) {
		return err
	}
	spec, err := d.fitToMount(ctx, mountSpec(src, want, shown), shown, sb)
	if err != nil {
		return err
	}
	err, unmountErr := d.growFirst(ctx, spec, shown, sb)
	if refusesToGrow(err) && unmountErr == nil {
		return d.mounts.Grow(ctx, mount.GrowSpec{FSType: spec.FSType, Device: spec.Source})
	}
	return errors.Join(err, unmountErr)
}

// writableSpec is a spec of the same mount for writing. Of ro and rw the last holds, also
// where ro stands in a list with others. What the kernel allows for reading only is left out:
// a copy's log is replayed once, so that what readers see is whole.
func writableSpec(spec mount.Spec) mount.Spec {
	spec.ReadOnly = false
	options := spec.Options
	spec.Options = nil
	for _, list := range options {
		kept := slices.DeleteFunc(strings.Split(list, ","), func(o string) bool {
			name, _, _ := strings.Cut(o, "=")
			return slices.Contains([]string{"norecovery", "nologreplay", "noload", "rescue"}, name)
		})
		if len(kept) > 0 {
			spec.Options = append(spec.Options, strings.Join(kept, ","))
		}
	}
	spec.Options = append(spec.Options, "rw")
	return spec
}

// refusesToGrow says of an error of growing a mounted filesystem that it cannot be done
// so, here or with this filesystem.
func refusesToGrow(err error) bool {
	return errors.Is(err, mount.ErrPermission) || errors.Is(err, mount.ErrUnsupported)
}

// growAtStage grows a filesystem that is smaller than its device. A volume that was
// expanded is usable either way, so a failure is told and does not fail the staging;
// NodeExpandVolume reports it to whoever asked for the growth, and the volume's
// health shows it. A copy that is larger than its source was never as small.
func (d *Driver) growAtStage(ctx context.Context, spec mount.Spec) error {
	err := d.mounts.Grow(ctx, mount.GrowSpec{FSType: spec.FSType, Device: spec.Source, Path: spec.Target})
	if err != nil {
		klog.FromContext(ctx).Error(err, "Filesystem is smaller than its device and could not be grown", "device", spec.Source, "path", spec.Target)
		return err
	}
	klog.FromContext(ctx).Info("Grew filesystem to its device", "device", spec.Source, "path", spec.Target)
	return nil
}
