package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// freezer stops the writers to mounted filesystems; *mount.Mounter does, through
// freezeAdapter.
type freezer interface {
	Freeze(ctx context.Context, s mount.FreezeSpec) (frozen, error)
	Thaw(path string) error
	EndHelper() error
	CanExpedite() bool
	EndExpedite() error
}

// frozen is filesystems that are frozen until Thaw.
type frozen interface{ Thaw() error }

// freezeAdapter narrows what package mount returns to the interface.
type freezeAdapter struct{ *mount.Mounter }

func (a freezeAdapter) Freeze(ctx context.Context, s mount.FreezeSpec) (frozen, error) {
	f, err := a.Mounter.Freeze(ctx, s)
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (freezeAdapter) CanExpedite() bool  { return mount.CanExpedite() }
func (freezeAdapter) EndExpedite() error { return mount.EndExpedite() }

// writers is what may be writing to a volume's image.
type writers struct {
	volume image.Volume
	image  loop.FileID
	// device is the one with the volume's filesystem, mounted at path; none if it is
	// not mounted.
	device binding
	path   string
	mount  int // the kernel's number of that mount
	fsType string
	raw    []loop.Ref // devices without a filesystem of ours
	nodes  []string   // mappings over these, which hold back what was written to them
}

// any says whether there is somebody.
func (w writers) any() bool { return w.path != "" || len(w.raw) > 0 }

// writersOf finds who may write to a volume's image, from what the kernel says.
// Precondition: the volume's lock is held.
func (d *Driver) writersOf(ctx context.Context, v image.Volume) (writers, error) {
	w := writers{volume: v}
	f, err := d.poolSource(v).open(ctx, true)
	if err != nil {
		return w, err
	}
	defer f.Close()
	if w.image, err = loop.FileIDOf(f); err != nil {
		return w, err
	}
	bound, err := d.table.Find(ctx, f)
	if err != nil {
		return w, err
	}
	for _, info := range bound {
		if info.ReadOnly {
			continue
		}
		if v.Filesystem == "" {
			w.raw = append(w.raw, info.Ref)
			if v.Encrypted() {
				if err := d.addMapping(&w, info); err != nil {
					return w, err
				}
			}
			continue
		}
		if err := d.addMounted(&w, info); err != nil {
			return w, err
		}
	}
	return w, nil
}

// addMounted finds a directory of the filesystem on a device.
func (d *Driver) addMounted(w *writers, info loop.Info) error {
	b, err := d.fullBinding(info, w.volume.Encrypted())
	if err != nil {
		return err
	}
	m, ok, err := d.filesystemOn(b)
	if err != nil {
		return err
	}
	if !ok {
		return abortedf("volume %q is attached to %s and its filesystem is not mounted where this driver can stop it: it is about to be detached, or somebody else uses it", w.volume.ID, info.Path)
	}
	w.device, w.path, w.mount, w.fsType = b, m.Path, m.ID, m.FSType
	return nil
}

// filesystemOn finds a mount of the filesystem on a device whose top is a directory.
func (d *Driver) filesystemOn(b binding) (mount.Mount, bool, error) {
	mounts, err := d.mtab.OfDevice(b.Device)
	if err != nil {
		return mount.Mount{}, false, err
	}
	// A bind of the node is no filesystem, a bind of a part of it may be a file.
	mounts = slices.DeleteFunc(mounts, func(m mount.Mount) bool { return !slices.Contains(filesystems, m.FSType) })
	slices.SortStableFunc(mounts, func(a, b mount.Mount) int { return compareBool(a.Root != "/", b.Root != "/") })
	for _, m := range mounts {
		if st, err := os.Lstat(m.Path); err == nil && st.IsDir() {
			return m, true, nil
		}
	}
	return mount.Mount{}, false, nil
}

// quiesce stops all these writers, and says what they wrote before to the images:
// filesystems are frozen, other devices flushed. It is nil when there are none.
func (d *Driver) quiesce(all []writers, limit time.Duration) image.Quiesce {
	all = slices.DeleteFunc(slices.Clone(all), func(w writers) bool { return !w.any() })
	if len(all) == 0 {
		return nil
	}
	return func(ctx context.Context) (resume func() error, err error) {
		spec := mount.FreezeSpec{Limit: limit}
		for _, w := range all {
			for _, node := range w.nodes {
				if err := syncNode(node); err != nil {
					return nil, fmt.Errorf("flush volume %q: %w", w.volume.ID, err)
				}
			}
			for _, ref := range w.raw {
				if err := d.table.Sync(ctx, ref); err != nil {
					return nil, fmt.Errorf("flush volume %q: %w", w.volume.ID, err)
				}
			}
			if w.path != "" {
				spec.Paths, spec.Mounts = append(spec.Paths, w.path), append(spec.Mounts, w.mount)
			}
		}
		if len(spec.Paths) == 0 {
			return func() error { return nil }, nil
		}
		return d.freeze(ctx, all, spec)
	}
}

// freeze freezes filesystems, after it has written down which: what a crash leaves
// frozen is thawed by the next start. They are not trimmed meanwhile: a trim would wait in
// the kernel until they are thawed, and this process, if it were killed, with it, while
// the helper waits for its end.
func (d *Driver) freeze(ctx context.Context, all []writers, spec mount.FreezeSpec) (resume func() error, err error) {
	release, err := d.holdTrims(ctx, all)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	spec.Expedite = d.cfg.ExpediteFreezes && d.freezer.CanExpedite()
	record, err := d.state.putFreeze(all, spec.Expedite)
	if err != nil {
		return nil, err
	}
	spec.Keep = record.file
	start := time.Now()
	f, err := d.freezer.Freeze(ctx, spec)
	switch {
	case errors.Is(err, mount.ErrNotThawed):
		return nil, errors.Join(err, record.keep())
	case err != nil:
		return nil, errors.Join(err, record.drop())
	}
	began := time.Now()
	return func() error {
		defer release()
		err := f.Thaw()
		klog.FromContext(ctx).V(1).Info("Thawed", "paths", spec.Paths, "frozenFor", time.Since(began).String(), "freezing", began.Sub(start).String())
		if errors.Is(err, mount.ErrNotThawed) {
			return errors.Join(err, record.keep())
		}
		return errors.Join(err, record.drop())
	}, nil
}

// holdTrims keeps the filesystems of all writers from being trimmed until release.
func (d *Driver) holdTrims(ctx context.Context, all []writers) (release func(), err error) {
	var held []func()
	release = func() {
		for _, f := range held {
			f()
		}
	}
	for _, w := range all {
		if w.path == "" {
			continue
		}
		one, err := d.trims.hold(ctx, w.volume.ID)
		if err != nil {
			release()
			return nil, err
		}
		held = append(held, one)
	}
	return release, nil
}

// thawLeft thaws what an earlier process froze and did not thaw, and nothing else.
func (d *Driver) thawLeft(ctx context.Context) error {
	records, err := d.state.freezes()
	errs := []error{err} // of some; the others are thawed
	for _, r := range records {
		var failed error
		if r.Expedited {
			failed = d.freezer.EndExpedite()
		}
		for _, v := range r.Volumes {
			if err := d.thawVolume(ctx, v); err != nil {
				failed = errors.Join(failed, fmt.Errorf("thaw volume %q: %w", v.VolumeID, err))
			}
		}
		if failed == nil {
			failed = r.drop()
		}
		errs = append(errs, failed, r.keep())
	}
	return errors.Join(append(errs, d.dropThawMounts(ctx))...)
}

// thawPrefix begins the names of directories where thawVolume mounts.
const thawPrefix = ".thaw-"

// dropThawMounts takes away what a crash in the middle of thawVolume left mounted.
func (d *Driver) dropThawMounts(ctx context.Context) error {
	left, err := filepath.Glob(filepath.Join(d.state.dir, thawPrefix+"*"))
	errs := []error{err}
	for _, dir := range left {
		errs = append(errs, d.mounts.Remove(ctx, dir))
	}
	return errors.Join(errs...)
}

// thawVolume thaws one filesystem, wherever it is mounted. When it is mounted nowhere
// any more but still frozen, its device stays bound: then it is mounted once more, as
// only a mounted filesystem can be thawed (fact 67).
func (d *Driver) thawVolume(ctx context.Context, v frozenVolume) error {
	info, bound, err := d.status(ctx, v.Device, v.Image)
	if err != nil || !bound {
		return err
	}
	if !v.Device.encrypted() && (v.Device.Major != info.Major || v.Device.Minor != info.Minor) {
		return fmt.Errorf("%s has the numbers %d:%d, and its freeze record says %d:%d: nothing is thawed", info.Path, info.Major, info.Minor, v.Device.Major, v.Device.Minor)
	}
	klog.FromContext(ctx).Info("Thawing what a crash may have left frozen", "volume", v.VolumeID, "device", info.Path)
	m, mounted, err := d.filesystemOn(v.Device)
	if err != nil {
		return err
	}
	if mounted {
		return d.freezer.Thaw(m.Path)
	}
	dir, err := os.MkdirTemp(d.state.dir, thawPrefix)
	if err != nil {
		return err
	}
	spec := mount.Spec{Source: v.Device.path(info), Target: dir, FSType: v.FSType}
	err = d.mounts.Mount(ctx, spec)
	if errors.Is(err, mount.ErrBusy) {
		spec.ReadOnly = true // as it was when it was frozen (fact 67)
		err = d.mounts.Mount(ctx, spec)
	}
	if err != nil {
		return errors.Join(err, os.Remove(dir))
	}
	return errors.Join(d.freezer.Thaw(dir), d.mounts.Remove(ctx, dir))
}
