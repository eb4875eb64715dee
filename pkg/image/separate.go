package image

import (
	"context"
	"errors"
	"io"
	"os"
	"syscall"
)

// separateChunk is how much is separated at a time, in bytes.
const separateChunk = 16 << 20

// separate gives an independent snapshot blocks of its own, in the background. What
// it takes, the account holds for the snapshot's volume already; only what is under
// way could be taken by both. It ends early, and goes on at the next start, when the
// pool is closed or full.
func (p *Pool) separate(dir string) {
	if p.store.enter() != nil {
		return
	}
	p.store.work.Go(func() {
		defer p.store.leave()
		ctx := p.store.background
		var c *copying
		defer func() {
			if c != nil {
				c.end()
			}
		}()
		for at, size := int64(0), int64(0); ; {
			next, err := p.separateNext(ctx, dir, at, &size)
			if err != nil {
				p.logger.Error(err, "A snapshot is not independent yet; going on at the next start", "snapshot", VolumeID(p.ID(), dir))
				return
			}
			if c == nil {
				c = p.copyOf(ctx, VolumeID(p.ID(), dir), size)
			}
			c.add(next - at)
			if next == size {
				break
			}
			at = next
		}
		p.recount(ctx)
	})
}

// separateAll goes on where an earlier process was interrupted.
func (p *Pool) separateAll() {
	for _, s := range p.snapshotList() {
		if s.Independent && s.Reflinked {
			p.separate(DirName(s.Name))
		}
	}
}

// separateNext separates what is shared of the next chunk, and returns where to go
// on; size is where the snapshot ends, 0 when it is gone.
func (p *Pool) separateNext(ctx context.Context, dir string, from int64, size *int64) (next int64, err error) {
	unlock, err := p.locks.lock(ctx, snapshotLock(dir))
	if err != nil {
		return from, err
	}
	defer unlock()
	r, err := p.getSnapshot(dir)
	if errors.Is(err, ErrNotFound) {
		*size = from
		return from, nil
	}
	if err != nil {
		return from, err
	}
	*size = r.Volume.Size
	d, f, err := p.openImage(p.snapshots, snapshotsDir, dir, r.Volume.Size, true)
	if err != nil {
		return from, err
	}
	defer d.Close()
	defer f.Close()
	start, next := r.Volume.Size, r.Volume.Size
	err = extents(f, from, r.Volume.Size, fiemapSync, func(e extent) bool {
		if e.shared {
			start, next = e.start, min(e.end, e.start+separateChunk)
		}
		return !e.shared
	})
	if err != nil || start == next {
		return next, opError("look at the extents of", imageFile, err)
	}
	space, err := p.account.take(ctx, Thick, next-start)
	if err != nil {
		return from, err
	}
	defer space.release()
	defer p.settleUsed()
	return next, separateRange(f, start, next-start)
}

// separateRange gives a range of a file blocks of its own, durably.
func separateRange(f *os.File, offset, length int64) error {
	err := unshareRange(f, offset, length)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		// btrfs: what is written anew goes to other blocks as long as these are
		// shared (fact 68).
		_, err = io.CopyN(io.NewOffsetWriter(f, offset), io.NewSectionReader(f, offset, length), length)
	}
	if err == nil {
		err = f.Sync()
	}
	return opError("unshare", imageFile, err)
}

// unshareLeast is the smallest piece that is worth a call, in bytes.
const unshareLeast = 64 << 10

// unshareRange is unshare for filesystems that are nearly full: XFS wants about twice
// as much free space as it then takes, so the range is halved until that is there.
func unshareRange(f *os.File, offset, length int64) error {
	err := unshare(f, offset, length)
	if !errors.Is(err, syscall.ENOSPC) || length <= unshareLeast {
		return err
	}
	half := max(length/2/unshareLeast, 1) * unshareLeast
	if err := unshareRange(f, offset, half); err != nil {
		return err
	}
	return unshareRange(f, offset+half, length-half)
}
