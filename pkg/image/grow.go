package image

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// Grow makes the volume at least size bytes large, a multiple of MiB. It never
// shrinks: a volume that is large enough is success. The filesystem in it is left
// as it is. Errors: ErrNotFound, *SpecError, ErrNoSpace, ErrSize, ErrDamaged,
// ErrPool, ctx's; after them the volume has its old size, but after ErrPool perhaps
// its new one.
func (p *Pool) Grow(ctx context.Context, id string, size int64) (Volume, error) {
	dir, ok := p.dirOf(id)
	if !ok {
		return Volume{}, fmt.Errorf("%w: %q", ErrNotFound, id)
	}
	if size <= 0 || size%MiB != 0 {
		return Volume{}, &SpecError{"Size", fmt.Sprintf("%d is not a positive multiple of 1 MiB", size)}
	}
	leave, err := p.enter(ctx, dir)
	if err != nil {
		return Volume{}, err
	}
	defer leave()
	r, err := p.get(dir)
	if err != nil {
		return Volume{}, err
	}
	if r.Size >= size {
		// Whoever made it so may have failed, or been killed, before it was on disk.
		if err := p.syncVolume(dir); err != nil {
			return Volume{}, fmt.Errorf("grow %s: %w", id, err)
		}
		return p.volume(dir, r), nil
	}
	if err := p.grow(ctx, dir, r, size); err != nil {
		return Volume{}, fmt.Errorf("grow %s: %w", id, err)
	}
	if r, err = p.get(dir); err != nil {
		return Volume{}, err
	}
	return p.volume(dir, r), nil
}

// Precondition: the lock of dir is held, and size is more than r.Size.
func (p *Pool) grow(ctx context.Context, dir string, r record, size int64) (err error) {
	if err := p.present(); err != nil {
		return err
	}
	d, f, err := p.openVolume(dir, r, true)
	if err != nil {
		return err
	}
	defer d.Close()
	defer f.Close()
	space, err := p.account.take(ctx, r.Allocation, size-r.Size)
	if err != nil {
		return err
	}
	defer space.release()
	grown := r
	grown.Size = size
	if err := p.extend(ctx, f, r, size); err != nil {
		return errors.Join(err, p.shrinkBack(f, r.Size))
	}
	renamed, err := p.replaceRecord(d, grown)
	if err != nil && !renamed {
		return errors.Join(opError("write", recordFile, err), p.shrinkBack(f, r.Size))
	}
	// From here on the record that a reader finds is the new one.
	p.remember(dir, grown)
	st, statErr := statFile(f)
	c := grown.charge(st.Allocated)
	c.shared = p.account.sharedOf(dir)
	p.settleUsed()
	p.account.put(dir, c, space)
	if err := errors.Join(err, statErr); err != nil {
		// Not undone: which of the records a crash would leave is not known.
		return poolError(p.config, "sync %s, which has its new size: %w", dir, err)
	}
	return nil
}

// extend makes the image larger and syncs it.
func (p *Pool) extend(ctx context.Context, f *os.File, r record, size int64) error {
	if r.Allocation == Thick {
		// Blocks first, length last: a full pool is met before anything shows.
		if err := allocateRange(ctx, f, r.Size, size, true); err != nil {
			return err
		}
		p.store.kill("grow: allocated")
	}
	if err := f.Truncate(size); err != nil {
		return opError("extend", imageFile, err)
	}
	p.store.kill("grow: extended")
	if r.Allocation == Thick {
		if err := p.refill(f, size); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return opError("sync", imageFile, err)
	}
	p.store.kill("grow: image synced")
	return nil
}

// shrinkBack undoes extend. Nobody was told of the new size, so nothing of a
// tenant's can be there; truncating to the old size also frees blocks past it.
func (p *Pool) shrinkBack(f *os.File, size int64) error {
	if err := errors.Join(f.Truncate(size), f.Sync()); err != nil {
		return fmt.Errorf("undo: %w", err)
	}
	return nil
}
