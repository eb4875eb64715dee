package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
)

// Content is what a snapshot or a volume held at one moment, open for reading. It does
// not change, whatever becomes of its source, and keeps the store open until Close.
type Content struct {
	// Spec is what the source is: its size, filesystem and block size are those of
	// the content.
	Spec Spec
	// Bytes is how much of it may be anything but zeros, at most.
	Bytes int64

	o       *origin
	leave   func()
	at, end int64 // of the data that is being read
}

// OpenContent opens the content of a snapshot, or of a volume at this moment; quiesce
// is nil for a volume that nobody writes to before the call returns. The volume may be
// written to, and removed, from then on.
//
// Of a volume the pool keeps a reflink, which the volume pays for as for a snapshot,
// or, where the pool cannot reflink, a sparse copy, which takes space and, of a volume
// in use, is made while its writers hold still. Either has no name and is gone with the
// process.
//
// Errors: ErrNotFound, ErrDamaged, ErrNoSpace, ErrPool, ctx's, and those of quiesce.
func (s *Store) OpenContent(ctx context.Context, src Source, quiesce Quiesce) (_ *Content, err error) {
	if err := s.enter(); err != nil {
		return nil, err
	}
	o, err := s.origin(ctx, &src)
	if err != nil {
		s.leave()
		return nil, err
	}
	c := &Content{Spec: o.spec, o: o, leave: s.leave}
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	switch {
	case o.volume == "":
	case o.p.CanReflink():
		err = o.freeze(ctx, quiesce)
	default:
		err = o.duplicate(ctx, quiesce)
	}
	if err != nil {
		return nil, err
	}
	c.Bytes, err = dataBytes(o.f, o.spec.Size)
	return c, err
}

// Next reads the next piece of data into b, and returns where it is and how long. What
// lies between two pieces is zeros: holes, and zeros that were found by reading, as
// some filesystems call data what is allocated and was never written. io.EOF comes
// after the last. Not for two goroutines at a time; b has at least 64 KiB.
func (c *Content) Next(ctx context.Context, b []byte) (offset int64, n int, err error) {
	for {
		if err := ctx.Err(); err != nil {
			return 0, 0, err
		}
		if c.at == c.end {
			if c.at, c.end, err = nextData(c.o.f, c.end, c.o.spec.Size); err != nil {
				return 0, 0, opError("find data in", imageFile, err)
			}
			if c.at == c.end {
				return 0, 0, io.EOF
			}
		}
		piece := b[:min(int64(len(b)), c.end-c.at)]
		if _, err := c.o.f.ReadAt(piece, c.at); err != nil {
			return 0, 0, opError("read", imageFile, err)
		}
		from, to := withoutZeros(piece)
		offset = c.at + int64(from)
		c.at += int64(to)
		if from < to {
			return offset, copy(b, piece[from:to]), nil
		}
	}
}

const (
	zeroBlock = 4096
	// zeroRun is how many zeros make two pieces of one.
	zeroRun = 64 << 10
)

// withoutZeros finds the first part of a piece that is worth sending: it begins with no
// block of zeros, and ends before a run of them. from == to == len(b) if all are zeros.
func withoutZeros(b []byte) (from, to int) {
	var zeros [zeroBlock]byte
	isZero := func(at int) bool {
		end := min(at+zeroBlock, len(b))
		return bytes.Equal(b[at:end], zeros[:end-at])
	}
	for from < len(b) && isZero(from) {
		from = min(from+zeroBlock, len(b))
	}
	run := 0
	for to = from; to < len(b); to = min(to+zeroBlock, len(b)) {
		if !isZero(to) {
			run = 0
			continue
		}
		if run += zeroBlock; run >= zeroRun {
			return from, to + zeroBlock - run
		}
	}
	return from, len(b)
}

// Close lets go of the content. Again is harmless.
func (c *Content) Close() {
	if c.leave == nil {
		return
	}
	c.o.close()
	c.leave()
	c.leave = nil
}

// duplicate is freeze for pools that cannot reflink: a sparse copy takes the source's
// place.
func (o *origin) duplicate(ctx context.Context, quiesce Quiesce) error {
	n, err := dataBytes(o.f, o.spec.Size)
	if err != nil {
		return err
	}
	space, err := o.p.account.take(ctx, Thick, n)
	if err != nil {
		return err
	}
	defer space.release() // by then its blocks show
	f, err := o.p.nameless(o.f)
	if err != nil {
		return err
	}
	err = quietly(ctx, quiesce, func() error {
		if err := f.Truncate(o.spec.Size); err != nil {
			return opError("extend", imageFile, err)
		}
		return o.p.copyCounted(ctx, o.spec.Name, f, o.f, o.spec.Size, n)
	})
	if err == nil {
		err = opError("sync", imageFile, f.Sync())
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	_ = o.f.Close()
	o.f = f
	o.release()
	return nil
}

// Inflow is the content of a volume that comes from elsewhere.
type Inflow interface {
	// Next returns the next piece of data and where it is; it is read before the next
	// call. Pieces are in order and do not overlap, and what lies between two is zeros.
	// io.EOF comes after the last, and says that what came is whole.
	Next(ctx context.Context) (offset int64, data []byte, err error)
}

// CreateFromInflow is CreateFrom for a source that is not in a pool of this store: of
// is what the source is, in what is read from in. The volume has all that a copy made
// here has: its own blocks, if thick, from before the data comes; a filesystem of its
// own identity; and it exists when the call has succeeded, not earlier.
//
// The errors are those of Create, and those of in.
func (p *Pool) CreateFromInflow(ctx context.Context, spec, of Spec, in Inflow) (Volume, error) {
	if spec.Source == nil {
		return Volume{}, &SpecError{"Source", "it is missing"}
	}
	return p.createFrom(ctx, spec, building{inflow: in, of: of})
}

// receive fills f, a new image of the volume r, with what comes in. Whoever sends it is
// not trusted to stay within the image.
func (p *Pool) receive(ctx context.Context, f io.WriterAt, b building) error {
	progress := p.copyOf(ctx, b.r.Name, b.of.Size) // holes of the source are among it
	defer progress.end()
	for at := int64(0); ; {
		offset, data, err := b.inflow.Next(ctx)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case offset < at || offset > b.of.Size || int64(len(data)) > b.of.Size-offset:
			return fmt.Errorf("%w: %d bytes at %d, after %d, of a source with %d", ErrInflow, len(data), offset, at, b.of.Size)
		}
		if _, err := f.WriteAt(data, offset); err != nil {
			return opError("write", imageFile, err)
		}
		at = offset + int64(len(data))
		progress.add(int64(len(data)))
		p.store.kill("create: received")
	}
}
