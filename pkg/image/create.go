package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"syscall"

	"k8s.io/klog/v2"
)

// chunk bounds one fallocate, so that ctx is looked at now and then.
const chunk = 4 << 30

// Create makes a volume, or finds it made. An equal volume of that name is
// success; a different one is ErrIncompatible, whose message names the field. The
// other errors: *SpecError, ErrSize, ErrNoSpace, ErrUnsupported, ErrDamaged (the
// name's record cannot be read), ErrPool, and ctx's. After an error there is
// nothing of the volume.
//
// With a Source it is a copy: of a snapshot, or of a volume that nobody writes to
// before the call returns. The errors then include ErrNotFound and ErrDamaged of the
// source, and ErrSource.
func (p *Pool) Create(ctx context.Context, spec Spec) (Volume, error) {
	return p.CreateFrom(ctx, spec, nil)
}

// CreateFrom is Create for a copy of a volume that is in use: quiesce makes those who
// write to it hold still, as for Snapshot.
func (p *Pool) CreateFrom(ctx context.Context, spec Spec, quiesce Quiesce) (Volume, error) {
	return p.createFrom(ctx, spec, building{quiesce: quiesce})
}

// createFrom makes what spec and b say, or finds it made.
func (p *Pool) createFrom(ctx context.Context, spec Spec, b building) (Volume, error) {
	s, err := spec.normalise()
	if err != nil {
		return Volume{}, err
	}
	dir := DirName(s.Name)
	leave, err := p.enter(ctx, dir)
	if err != nil {
		return Volume{}, err
	}
	defer leave()
	r, err := p.get(dir)
	switch {
	case err == nil:
		if err := equal(r, s); err != nil {
			return Volume{}, fmt.Errorf("volume %s: %w", VolumeID(p.ID(), dir), err)
		}
		return p.volume(dir, r), nil
	case !errors.Is(err, ErrNotFound):
		return Volume{}, err
	}
	r, err = p.create(ctx, dir, s, b)
	if err != nil {
		return Volume{}, fmt.Errorf("create %s: %w", VolumeID(p.ID(), dir), err)
	}
	return p.volume(dir, r), nil
}

// create takes the space, and gives it back when the volume does not come to be.
// Precondition: the lock of dir is held and it has no volume.
func (p *Pool) create(ctx context.Context, dir string, s Spec, b building) (record, error) {
	if err := p.admit(ctx, s); err != nil {
		return record{}, err
	}
	if s.Source != nil && s.Source.File != "" {
		return record{}, fmt.Errorf("%w: a file is imported", ErrSource)
	}
	b.r = newRecord(s, p.store.now())
	if s.Source != nil && b.inflow == nil {
		o, err := p.store.origin(ctx, s.Source)
		if err != nil {
			return record{}, err
		}
		defer o.close()
		b.origin, b.of = o, o.spec
	}
	if s.Source != nil {
		if err := fits(s, b.of); err != nil {
			return record{}, err
		}
	}
	space, err := p.account.take(ctx, s.Allocation, s.Size)
	if err != nil {
		return record{}, err
	}
	defer space.release()
	b.space = space
	if b.origin != nil {
		b.origin.held = space
	}
	c, err := p.build(ctx, dir, b)
	if err != nil {
		return record{}, err
	}
	p.remember(dir, b.r)
	p.settleUsed()
	p.account.put(dir, c, space)
	return b.r, nil
}

// building is a volume in the making.
type building struct {
	r       record
	space   *reservation
	origin  *origin // nil for one that begins empty, or is a copy from elsewhere
	quiesce Quiesce
	inflow  Inflow       // nil unless it is a copy from elsewhere
	of      Spec         // what the source of a copy is
	content *FileContent // of an import
	before  fileStat     // of what is to be moved
}

// admit refuses what cannot work before anything is touched.
func (p *Pool) admit(ctx context.Context, s Spec) error {
	if least := MinimumSize(s.Filesystem); s.Content() < least {
		return fmt.Errorf("%w: %s needs at least %d bytes, asked for %d", ErrSize, s.Filesystem, least, s.Content())
	}
	if s.Allocation == Thick && !promisesSpace(p.fsType) {
		return fmt.Errorf("%w: no thick volumes on %s, which cannot promise space", ErrUnsupported, p.fsType)
	}
	if s.Filesystem != "" {
		if _, err := p.store.tools.find(ctx, s.Filesystem); err != nil {
			return err
		}
	}
	return p.present()
}

// build makes the volume in .new-*, and commits it by a rename. space is released
// once the image has its blocks.
func (p *Pool) build(ctx context.Context, dir string, b building) (c charge, err error) {
	ctx, end := p.store.step(ctx, "create image")
	defer func() { end(err) }()
	work := newPrefix + dir + "-" + rand.Text()[:8]
	if err := mkdirAt(p.root, work); err != nil {
		return c, opError("make", work, err)
	}
	// Not run when a crash test panics: a crash does not clean up.
	defer func() {
		if err != nil {
			err = errors.Join(err, b.restore())
			p.discard(work)
		}
	}()
	d, err := openDirAt(p.root, work)
	if err != nil {
		return c, opError("open", work, err)
	}
	defer d.Close()
	c, err = p.fill(ctx, d, b)
	if err != nil {
		return c, err
	}
	if err := ctx.Err(); err != nil {
		return c, err
	}
	if err := renameNew(p.root, work, p.volumes, dir); err != nil {
		return c, opError("commit", dir, err)
	}
	p.store.kill("create: renamed")
	if err := p.volumes.Sync(); err != nil {
		// Nobody was told of the volume, so it may go. If it does not, only the
		// next Open can tell whether it exists.
		if back := renameNew(p.volumes, dir, p.root, work); back != nil {
			err = errors.Join(err, back)
			b.content = nil // it may be the volume's image by now
			p.refuse(dir, fmt.Errorf("%w: its creation was not synced; restart csi-loop: %w", ErrDamaged, err))
		}
		return c, opError("sync", volumesDir, err)
	}
	p.store.kill("create: committed")
	return c, nil
}

// fill makes and syncs the image and the record, and returns what the volume takes of
// the pool. Neither is of use before the rename, so their order is free, and they are
// made and synced at the same time.
func (p *Pool) fill(ctx context.Context, d *os.File, b building) (c charge, err error) {
	if b.content != nil {
		return p.fillContent(ctx, d, b)
	}
	f, err := p.newImage(d, b)
	if err != nil {
		return c, err
	}
	defer f.Close()
	p.store.kill("create: made")
	shared := false
	if b.origin != nil {
		shared, err = p.copyTo(ctx, f, b.r, b.origin, b.quiesce)
	} else {
		err = p.size(ctx, f, b.r)
	}
	if err != nil {
		return c, err
	}
	p.store.kill("create: allocated")
	// btrfs does not show it before a commit, which only what takes long is worth.
	if b.r.Allocation == Thick && (p.fsType != "btrfs" || b.inflow != nil) {
		p.allocated(b.space)
	}
	if b.inflow != nil {
		if err := p.receive(ctx, f, b); err != nil {
			return c, err
		}
	}
	noted, err := note(d, b.r)
	if err != nil {
		return c, err
	}
	defer func() { _ = noted() }() // nothing may be written to d any more
	if err := p.furnish(ctx, d, f, b); err != nil {
		return c, err
	}
	if err := noted(); err != nil {
		return c, err
	}
	p.store.kill("create: image and record synced")
	st, err := statFile(f)
	c = b.r.charge(st.Allocated)
	if shared {
		c.shared = st.Allocated
	}
	return c, opError("look at", imageFile, err)
}

// newImage makes the file of a volume in d, empty. On btrfs it is one that can be thick,
// but for a copy that shares its source's blocks: that is as its source is.
func (p *Pool) newImage(d *os.File, b building) (*os.File, error) {
	r := b.r
	switch {
	case b.origin != nil && p.copiesByReflink(b.origin, r):
		if err := p.alikeIn(d, b.origin.f); err != nil {
			return nil, err
		}
	case p.noCow:
		if err := setNoCow(d); err != nil && r.Allocation == Thick {
			err = opError("chattr +C", d.Name(), err)
			if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EPERM) {
				err = fmt.Errorf("%w: thick volumes on btrfs must be NOCOW: %w", ErrUnsupported, err)
			}
			return nil, err
		}
	}
	f, err := createAt(d, imageFile)
	if err != nil {
		return nil, opError("make", imageFile, err)
	}
	if p.noCow && r.Allocation == Thick {
		if on, err := isNoCow(f); err != nil || !on {
			return nil, errors.Join(fmt.Errorf("%w: btrfs did not make the image NOCOW, so it cannot be thick", ErrUnsupported), err, f.Close())
		}
	}
	return f, nil
}

// note begins to write and sync the record. The function that it returns waits for
// that, and may be called again.
func note(d *os.File, r record) (wait func() error, err error) {
	content, err := r.encode()
	if err != nil {
		return nil, err
	}
	return writeAside(d, recordFile, content), nil
}

// furnish makes the filesystem, or makes that of a copy one of its own, and syncs the
// image.
func (p *Pool) furnish(ctx context.Context, d, f *os.File, b building) error {
	var err error
	made := func() {}
	switch {
	case b.r.Filesystem == "", b.r.spec().Encrypted(): // what is in it is made by who has the key
	case b.r.Source != nil:
		err = p.store.tools.renew(ctx, d, b.r.spec(), b.of.Size)
	default:
		made, err = p.format(ctx, d, f, b.r)
	}
	if err != nil {
		return blame(ctx, f, b.r.Size, err)
	}
	p.store.kill("create: formatted")
	if err := p.verify(f, b.r); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return opError("sync", imageFile, err)
	}
	p.store.kill("create: image synced")
	made()
	return nil
}

// blame adds to what a program failed with what the pool has to do with it. The
// program's words would not tell reliably, and statfs not of a quota; another MiB that
// cannot be had does. f is thrown away, so that nobody minds if it can.
func blame(ctx context.Context, f *os.File, size int64, err error) error {
	if ctx.Err() != nil || errors.Is(err, ErrNoSpace) || errors.Is(err, ErrPool) {
		return err
	}
	more := opError("allocate", imageFile, allocate(f, size, MiB, true))
	if errors.Is(more, ErrNoSpace) || errors.Is(more, ErrPool) {
		return fmt.Errorf("%w: %w", more, err)
	}
	return err
}

// size gives a new image its length and, if thick, its blocks.
func (p *Pool) size(ctx context.Context, f *os.File, r record) error {
	if r.Allocation == Thick {
		return allocateRange(ctx, f, 0, r.Size, false)
	}
	return opError("extend", imageFile, f.Truncate(r.Size))
}

// allocateRange gives [from, to) blocks. With keepSize the file's length stays,
// which then tells what is in use and what is only prepared.
func allocateRange(ctx context.Context, f *os.File, from, to int64, keepSize bool) error {
	for at := from; at < to; at += chunk {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := allocate(f, at, min(chunk, to-at), keepSize); err != nil {
			return opError("allocate", imageFile, err)
		}
	}
	return nil
}

// verify makes sure that mkfs left the image its size and, if thick, its blocks:
// it was told not to discard, but may zero by punching holes.
func (p *Pool) verify(f *os.File, r record) error {
	st, err := statFile(f)
	if err != nil {
		return opError("look at", imageFile, err)
	}
	if st.Size != r.Size {
		return fmt.Errorf("mkfs changed the image's size from %d to %d", r.Size, st.Size)
	}
	if r.Allocation != Thick {
		return nil
	}
	return p.refill(f, r.Size)
}

// refill gives an image that should have all its blocks those that it lacks.
// Only these: XFS first sets the whole range aside, so a repeated fallocate of a
// whole image fails on a full filesystem.
func (p *Pool) refill(f *os.File, size int64) error {
	for at := int64(0); at < size; {
		start, end, err := nextHole(f, at, size)
		if err != nil {
			return p.refillBlindly(f, size)
		}
		if start == size {
			return nil
		}
		if err := allocate(f, start, end-start, true); err != nil {
			return opError("allocate again", imageFile, err)
		}
		if still, _, err := nextHole(f, start, size); err != nil || still < end {
			return fmt.Errorf("%w: %s left a hole at byte %d of an allocated image", ErrUnsupported, p.fsType, start)
		}
		at = end
	}
	return nil
}

// refillBlindly is for filesystems that cannot list extents; their count of
// blocks must do.
func (p *Pool) refillBlindly(f *os.File, size int64) error {
	if err := allocate(f, 0, size, true); err != nil {
		return opError("allocate again", imageFile, err)
	}
	st, err := statFile(f)
	if err != nil {
		return opError("look at", imageFile, err)
	}
	if st.Allocated < size {
		return fmt.Errorf("%w: %s gave an allocated image only %d of %d bytes", ErrUnsupported, p.fsType, st.Allocated, size)
	}
	return nil
}

// present tells whether the pool's directory still is what was opened: not
// unmounted, not covered, not moved away.
func (p *Pool) present() error {
	at, err := os.Stat(p.Path())
	if err != nil {
		return poolError(p.config, "it is gone: %w", err)
	}
	opened, err := p.root.Stat()
	if err != nil {
		return poolError(p.config, "%w", err)
	}
	if !os.SameFile(at, opened) {
		return poolError(p.config, "another directory is in its place; restart csi-loop when the right disk is mounted")
	}
	return nil
}

// log is the caller's logger, with the pool.
func (p *Pool) log(ctx context.Context) klog.Logger {
	return klog.FromContext(ctx).WithValues("pool", p.Name())
}
