package image

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
)

// Range is a part of an image, in bytes: from Start up to and without End.
type Range struct{ Start, End int64 }

// Allocated calls see with the ranges of a snapshot, from an offset on, that may hold
// anything but zeros: in order, apart from each other. No data is read. It ends with
// the first error of see.
func (s *Store) Allocated(ctx context.Context, id string, from int64, see func(Range) error) error {
	snapshot, f, err := s.openSnapshot(ctx, id)
	if err != nil {
		return err
	}
	defer f.Close()
	m := merger{see: see}
	for at, size := from, snapshot.Volume.Size; at < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		start, end, err := nextData(f, at, size)
		if err != nil {
			return opError("find data in", f.Name(), err)
		}
		if err := m.add(Range{start, end}); err != nil {
			return err
		}
		at = end
	}
	return m.flush()
}

// Delta calls see with the ranges of the snapshot target, from an offset on, that may
// differ from base: in order, apart from each other. What base lacks, being smaller, is
// taken for zeros. Both must be of one volume (ErrSource).
//
// It compares where the blocks are: the same block in both is the same data, as nobody
// writes to snapshots. Data is read only of snapshots that share no blocks from the
// start: copies, and independent ones. Anything uncertain counts as different.
func (s *Store) Delta(ctx context.Context, base, target string, from int64, see func(Range) error) error {
	a, fa, err := s.openSnapshot(ctx, base)
	if err != nil {
		return err
	}
	defer fa.Close()
	b, fb, err := s.openSnapshot(ctx, target)
	if err != nil {
		return err
	}
	defer fb.Close()
	if a.Source != b.Source || a.Pool != b.Pool {
		return fmt.Errorf("%w: snapshot %s is of volume %s, snapshot %s of %s", ErrSource, base, a.Source, target, b.Source)
	}
	m := merger{see: see}
	d := differ{a: fa, b: fb, sizeA: a.Volume.Size, differs: m.add}
	if !a.shares() || !b.shares() {
		d.differs = func(r Range) error { return d.compareData(ctx, r, m.add) }
	}
	for at := from; at < b.Volume.Size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		if at, err = d.window(at, b.Volume.Size); err != nil {
			return err
		}
	}
	return m.flush()
}

// shares tells whether a snapshot has the very blocks of other snapshots.
func (s Snapshot) shares() bool { return s.Reflinked && !s.Independent }

func (s *Store) openSnapshot(ctx context.Context, id string) (Snapshot, *os.File, error) {
	snapshot, err := s.GetSnapshot(id)
	if err != nil {
		return snapshot, nil, err
	}
	p, _, ok := s.Lookup(id)
	if !ok {
		return snapshot, nil, fmt.Errorf("%w: snapshot %q", ErrNotFound, id)
	}
	f, err := p.OpenSnapshot(ctx, id)
	return snapshot, f, err
}

// merger puts ranges that touch together.
type merger struct {
	see  func(Range) error
	last Range
}

func (m *merger) add(r Range) error {
	switch {
	case r.Start >= r.End:
		return nil
	case m.last.End == r.Start && m.last.Start < m.last.End:
		m.last.End = r.End
		return nil
	}
	err := m.flush()
	m.last = r
	return err
}

func (m *merger) flush() error {
	if m.last.Start == m.last.End {
		return nil
	}
	return m.see(m.last)
}

// windowExtents is how many extents of each image are compared at a time: the memory
// that it takes does not grow with the images.
const windowExtents = 4096

// differ compares two images by where their blocks are.
type differ struct {
	a, b    *os.File
	sizeA   int64 // a may be smaller
	differs func(Range) error

	before, between, after []extent // kept between windows
}

// window compares a part that begins at from, and returns where it ends.
//
// Blocks may be moved (btrfs balance, a defragmenter) between the two looks, and the
// old place be given to other data. So the first image is looked at again: if it is
// where it was, it was there when the second was looked at.
func (d *differ) window(from, size int64) (end int64, err error) {
	if d.before, end, err = someExtents(d.a, from, size, d.before); err != nil {
		return 0, err
	}
	if d.between, end, err = someExtents(d.b, from, end, d.between); err != nil {
		return 0, err
	}
	d.before = cutExtents(d.before, end)
	var again int64
	if d.after, again, err = someExtents(d.a, from, end, d.after); err != nil {
		return 0, err
	}
	if again != end || !slices.Equal(d.before, d.after) {
		return end, d.differs(Range{from, end})
	}
	return end, d.compare(from, end)
}

// someExtents lists the extents from an offset on, at most so many, and where the list
// ends: what it does not name up to there has no blocks.
func someExtents(f *os.File, from, to int64, list []extent) ([]extent, int64, error) {
	list = list[:0]
	err := extents(f, from, to, fiemapSync, func(e extent) bool {
		list = append(list, e)
		return len(list) < windowExtents
	})
	if len(list) == windowExtents {
		to = list[len(list)-1].end
	}
	return list, to, opError("look at the extents of", f.Name(), err)
}

// cutExtents leaves out what is behind end.
func cutExtents(list []extent, end int64) []extent {
	for len(list) > 0 && list[len(list)-1].start >= end {
		list = list[:len(list)-1]
	}
	if n := len(list); n > 0 {
		list[n-1].end = min(list[n-1].end, end)
	}
	return list
}

// compare walks over both lists at once.
func (d *differ) compare(from, end int64) error {
	a, b := d.before, d.between
	for at := from; at < end; {
		x, nextX := pieceAt(&a, at, end)
		y, nextY := pieceAt(&b, at, end)
		next := min(nextX, nextY)
		if !x.same(y) {
			if err := d.differs(Range{at, next}); err != nil {
				return err
			}
		}
		at = next
	}
	return nil
}

// piece is what an image has at an offset.
type piece struct {
	zero     bool
	vague    bool
	physical int64
}

// same tells whether both certainly have the same content.
func (p piece) same(o piece) bool {
	return p.zero && o.zero || !p.zero && !o.zero && !p.vague && !o.vague && p.physical == o.physical
}

// pieceAt returns what is at an offset, and how far it goes. It drops extents of list
// that lie before.
func pieceAt(list *[]extent, at, end int64) (piece, int64) {
	for len(*list) > 0 && (*list)[0].end <= at {
		*list = (*list)[1:]
	}
	if len(*list) == 0 {
		return piece{zero: true}, end
	}
	e := (*list)[0]
	if e.start > at {
		return piece{zero: true}, min(e.start, end)
	}
	return piece{zero: e.unwritten, vague: e.vague, physical: e.physical + at - e.start}, min(e.end, end)
}

// compareUnit is how finely data is compared, in bytes.
const compareUnit = 64 << 10

// compareData reads a range of both images, and hands on the parts that differ.
func (d *differ) compareData(ctx context.Context, r Range, differs func(Range) error) error {
	x, y := make([]byte, compareUnit), make([]byte, compareUnit)
	for at := r.Start; at < r.End; {
		if err := ctx.Err(); err != nil {
			return err
		}
		next := min(r.End, (at/compareUnit+1)*compareUnit)
		n := next - at
		if err := readZeros(d.a, x[:n], at, d.sizeA); err != nil {
			return err
		}
		if _, err := d.b.ReadAt(y[:n], at); err != nil {
			return opError("read", d.b.Name(), err)
		}
		if !bytes.Equal(x[:n], y[:n]) {
			if err := differs(Range{at, next}); err != nil {
				return err
			}
		}
		at = next
	}
	return nil
}

// readZeros reads from a file that goes on with zeros behind its end.
func readZeros(f *os.File, b []byte, at, size int64) error {
	n := max(0, min(int64(len(b)), size-at))
	clear(b[n:])
	if n == 0 {
		return nil
	}
	_, err := f.ReadAt(b[:n], at)
	return opError("read", f.Name(), err)
}
