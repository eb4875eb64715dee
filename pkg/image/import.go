package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
)

// Method is how the content of a file comes into a pool.
type Method string

// Copy reads and writes. Reflink shares blocks with the file, at once. Move makes the
// file itself the image, and takes its name away. Auto is Reflink for what is thin and
// where it works, else Copy.
const (
	Auto    Method = "auto"
	Copy    Method = "copy"
	Reflink Method = "reflink"
	Move    Method = "move"
)

// FileContent is a range of a file outside the pools. Nobody may write to it before the
// call that takes it in returns; that its time of modification changed meanwhile is an
// error.
type FileContent struct {
	// File is open for reading, and for writing too to be moved. It is a regular file.
	File *os.File
	// Path is its absolute path, which is recorded, and removed by Move.
	Path string
	// Offset and Length are the range, in bytes; the whole file for Move.
	Offset, Length int64
	Method         Method
	// Progress is told of bytes that were copied and of all there are; it may be nil.
	Progress func(done, all int64)

	held *reservation // given up once a thick copy has its blocks; may be nil
}

// Import makes a volume of the content of a file, as it is: nothing is formatted. The
// volume is spec, whose size is at least the content's; what is behind it reads as
// zeros. It has spec.Source.File, the content's path. An equal volume of that name, made
// of the same bytes of a file that did not change since, is success.
//
// The errors are those of Create, without ErrSize for a size below what mkfs needs, and
// ErrContent. After an error the file is as it was, but that one to be moved may have
// more blocks and, after a crash, zeros at its end and no rights for others. At each moment the content has its
// old name, or the volume exists; after a crash in between both may be true, and the
// same call completes it.
func (p *Pool) Import(ctx context.Context, spec Spec, c FileContent) (Volume, error) {
	spec.Source = &Source{File: c.Path}
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
		if err := p.sameImport(dir, r, c); err != nil {
			return Volume{}, fmt.Errorf("volume %s: %w", VolumeID(p.ID(), dir), err)
		}
		return p.volume(dir, r), p.finishMove(dir, c)
	case !errors.Is(err, ErrNotFound):
		return Volume{}, err
	}
	if err := c.check(); err != nil {
		return Volume{}, err
	}
	if s.Size < c.Length {
		return Volume{}, fmt.Errorf("%w: %s has %d bytes, the volume %d", ErrSize, c.Path, c.Length, s.Size)
	}
	if s.Source.Taken, err = takenOf(c); err != nil {
		return Volume{}, err
	}
	if r, err = p.importNew(ctx, dir, s, c); err != nil {
		return Volume{}, fmt.Errorf("import %s as %s: %w", c.Path, VolumeID(p.ID(), dir), err)
	}
	return p.volume(dir, r), p.finishMove(dir, c)
}

// importNew is create for an import.
func (p *Pool) importNew(ctx context.Context, dir string, s Spec, c FileContent) (r record, err error) {
	if s.Allocation == Thick && !promisesSpace(p.fsType) {
		return record{}, fmt.Errorf("%w: no thick volumes on %s, which cannot promise space", ErrUnsupported, p.fsType)
	}
	if err := p.present(); err != nil {
		return record{}, err
	}
	b := building{r: newRecord(s, p.store.now()), content: &c}
	need := s.Size
	if c.Method == Move {
		if b.before, err = statFile(c.File); err != nil {
			return record{}, opError("look at", c.Path, err)
		}
		if need, err = p.needOfMove(s, c, b.before); err != nil {
			return record{}, err
		}
	}
	space, err := p.account.take(ctx, s.Allocation, need)
	if err != nil {
		return record{}, err
	}
	defer space.release()
	b.space, c.held = space, space
	charge, err := p.build(ctx, dir, b)
	if err != nil {
		return record{}, err
	}
	p.remember(dir, b.r)
	p.settleUsed()
	p.account.put(dir, charge, space)
	return b.r, nil
}

// needOfMove is what a file that is moved in takes of the pool yet: what it has no blocks
// for, and what it shares with other files.
func (p *Pool) needOfMove(s Spec, c FileContent, st fileStat) (int64, error) {
	if root, err := statFile(p.root); err != nil || root.Dev != st.Dev {
		return s.Size, opError("look at", p.Path(), err) // it cannot be moved
	}
	shared, err := p.sharesOf(c.File, st.Size)
	if err == nil && shared > 0 && p.noCow && s.Allocation == Thick {
		err = fmt.Errorf("%w: %s shares blocks with other files: copy it", ErrContent, c.Path)
	}
	return s.Size - max(0, min(s.Size, st.Allocated)-shared), err
}

// sharesOf is how many bytes a file shares with others, where files can.
func (p *Pool) sharesOf(f *os.File, size int64) (int64, error) {
	if !p.mayReflink() {
		return 0, nil
	}
	s, err := sharingOf(f, size, p.noCow)
	return s.shared, opError("look at the extents of", f.Name(), err)
}

// fillContent is fill for an import.
func (p *Pool) fillContent(ctx context.Context, d *os.File, b building) (c charge, err error) {
	in, err := p.takeIn(ctx, d, *b.content, b.r.Name, b.r.Size, b.r.Allocation)
	if err != nil {
		return c, err
	}
	defer in.f.Close()
	p.store.kill("import: content taken in")
	if b.r.Allocation == Thick && p.fsType != "btrfs" {
		b.space.release()
	}
	record, err := b.r.encode()
	if err != nil {
		return c, err
	}
	if err := writeSynced(d, recordFile, record); err != nil {
		return c, opError("write", recordFile, err)
	}
	p.store.kill("import: record synced")
	st, err := statFile(in.f)
	c = b.r.charge(st.Allocated)
	if in.shared {
		c.shared = st.Allocated
	}
	return c, opError("look at", imageFile, err)
}

// finishMove takes the old name away from a file that is the image of a volume by now.
// Precondition: the volume's lock is held.
func (p *Pool) finishMove(dir string, c FileContent) error {
	if c.Method != Move {
		return nil
	}
	st, err := p.imageStat(dir)
	if err != nil {
		return opError("look at", imageFile, err)
	}
	parent, err := openPath(filepath.Dir(c.Path))
	if err != nil {
		return opError("open", filepath.Dir(c.Path), err)
	}
	defer parent.Close()
	if st.Links == 1 { // it was moved before, but perhaps not durably
		return opError("sync", parent.Name(), parent.Sync())
	}
	name := filepath.Base(c.Path)
	if at, err := statAt(parent, name); err != nil || at.Dev != st.Dev || at.Ino != st.Ino {
		return fmt.Errorf("%w: %s was renamed meanwhile: remove its new name, as the file is the image of a volume", ErrContent, c.Path)
	}
	if err := unlinkAt(parent, name, false); err != nil {
		return opError("remove", c.Path, err)
	}
	p.store.kill("import: moved")
	return opError("sync", parent.Name(), parent.Sync())
}

// restore gives a file that was to be moved back what it had before.
func (b building) restore() error {
	if b.content == nil || b.content.Method != Move {
		return nil
	}
	f := b.content.File
	now, err := statFile(f)
	switch {
	case err != nil:
		return opError("look at", b.content.Path, err)
	case now.Links == b.before.Links:
		return nil // it never got its second name: what changed is not ours to undo
	}
	if now.Size != b.before.Size {
		err = f.Truncate(b.before.Size)
	}
	if now.UID != b.before.UID || now.GID != b.before.GID {
		err = errors.Join(err, f.Chown(int(b.before.UID), int(b.before.GID)))
	}
	if now.Mode != b.before.Mode {
		err = errors.Join(err, f.Chmod(b.before.Mode.Perm()))
	}
	return opError("restore", b.content.Path, err)
}

// takenIn is a new file with the content of another one.
type takenIn struct {
	f      *os.File
	shared bool // its blocks are those of the other file too
	moved  bool // it is the other file
}

// takeIn makes the file in d, with size bytes, synced and, if it is thick, with all its
// blocks and none that is shared.
func (p *Pool) takeIn(ctx context.Context, d *os.File, c FileContent, name string, size int64, alloc Allocation) (*takenIn, error) {
	before, err := c.File.Stat()
	if err != nil {
		return nil, opError("look at", c.Path, err)
	}
	if p.noCow && c.Method != Copy {
		// Volumes are NOCOW there, and files of the two kinds cannot share blocks (fact 70).
		on, err := isNoCow(c.File)
		switch {
		case err == nil && on:
		case c.Method == Auto:
			c.Method = Copy
		default:
			return nil, errors.Join(fmt.Errorf("%w: images on btrfs are NOCOW, which %s is not: copy it", ErrUnsupported, c.Path), err)
		}
	}
	t := &takenIn{}
	if c.Method == Move {
		err = p.linkIn(d, c, t)
	} else {
		err = p.copyIn(ctx, d, c, t, name, size, alloc)
	}
	if err != nil {
		return nil, err
	}
	p.store.kill("import: content is there")
	if err := p.completeIn(ctx, t, name, size, alloc); err != nil {
		return nil, errors.Join(err, t.f.Close())
	}
	after, err := c.File.Stat()
	if err == nil && !t.moved && (!after.ModTime().Equal(before.ModTime()) || after.Size() != before.Size()) {
		err = fmt.Errorf("%w: %s was written to meanwhile", ErrContent, c.Path)
	}
	if err != nil {
		return nil, errors.Join(err, t.f.Close())
	}
	return t, nil
}

// completeIn gives the file its size and its blocks.
func (p *Pool) completeIn(ctx context.Context, t *takenIn, name string, size int64, alloc Allocation) error {
	if err := t.f.Truncate(size); err != nil {
		return opError("extend", imageFile, err)
	}
	if alloc == Thick {
		if err := p.separateNew(ctx, t.f, record{Name: name, Size: size}, t.shared); err != nil {
			return err
		}
		t.shared = false
	}
	return opError("sync", imageFile, t.f.Sync())
}

// linkIn gives the file a second name in d. Its first one is left until the volume
// exists, so that a crash loses nothing.
func (p *Pool) linkIn(d *os.File, c FileContent, t *takenIn) error {
	if st, err := statFile(c.File); err != nil || st.Links != 1 {
		return errors.Join(fmt.Errorf("%w: %s has more than one name: copy it", ErrContent, c.Path), err)
	}
	err := linkInto(c.File, d, imageFile)
	if errors.Is(err, syscall.EXDEV) {
		return fmt.Errorf("%w: %s cannot be moved, since it is on another filesystem than the pool, or on another mount of it: move it to %s first, or use copy",
			ErrContent, c.Path, filepath.Join(p.Path(), Incoming))
	} else if err != nil {
		return opError("link", c.Path, err)
	}
	f, err := openAt(d, imageFile, true)
	if err != nil {
		return opError("open", imageFile, err)
	}
	if err := errors.Join(f.Chmod(0o600), f.Chown(os.Geteuid(), os.Getegid())); err != nil {
		return errors.Join(opError("make private", imageFile, err), f.Close())
	}
	shared, err := p.sharesOf(f, c.Length)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	t.f, t.moved, t.shared = f, true, shared > 0
	return nil
}

// copyIn makes a file of its own.
func (p *Pool) copyIn(ctx context.Context, d *os.File, c FileContent, t *takenIn, name string, size int64, alloc Allocation) (err error) {
	if c.Method == Auto {
		c.Method = Copy
		if alloc == Thin && p.reflinkIn(d, c, t) == nil {
			return nil
		}
	}
	if c.Method == Reflink {
		if p.noCow && alloc == Thick {
			return fmt.Errorf("%w: thick volumes on btrfs have their blocks first: use copy", ErrUnsupported)
		}
		return p.reflinkIn(d, c, t)
	}
	if p.noCow {
		if err := setNoCow(d); err != nil && alloc == Thick {
			return fmt.Errorf("%w: thick volumes on btrfs must be NOCOW: %w", ErrUnsupported, err)
		}
	}
	if t.f, err = createAt(d, imageFile); err != nil {
		return opError("make", imageFile, err)
	}
	defer func() {
		if err != nil {
			_ = t.f.Close()
		}
	}()
	p.store.kill("import: made")
	if alloc == Thick {
		if err := allocateRange(ctx, t.f, 0, size, false); err != nil {
			return err
		}
		p.allocated(c.held)
	} else if err := t.f.Truncate(size); err != nil {
		return opError("extend", imageFile, err)
	}
	return p.copyRangeIn(ctx, t.f, c, name)
}

// reflinkIn shares the content's blocks. After an error nothing is left in d.
func (p *Pool) reflinkIn(d *os.File, c FileContent, t *takenIn) error {
	if err := p.alikeIn(d, c.File); err != nil {
		return err
	}
	f, err := createAt(d, imageFile)
	if err != nil {
		return opError("make", imageFile, err)
	}
	length := c.Length
	if st, err := statFile(c.File); err == nil && c.Offset+c.Length == st.Size {
		length = 0 // to the end, which need not be that of a block
	}
	err = reflinkRange(f, c.File, c.Offset, length)
	if err == nil {
		t.f, t.shared = f, true
		return nil
	}
	_ = f.Close()
	if undo := unlinkAt(d, imageFile, false); undo != nil {
		return errors.Join(err, undo)
	}
	if errors.Is(err, syscall.EXDEV) {
		return fmt.Errorf("%w: %s cannot share its blocks with the pool, since it is on another filesystem, or on another mount of it, which needs Linux 5.18: move it to %s first, or use copy: %w",
			ErrContent, c.Path, filepath.Join(p.Path(), Incoming), err)
	}
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EOPNOTSUPP) {
		return fmt.Errorf("%w: %s cannot share its blocks with the pool (a filesystem without reflinks, or a range that ends within a block): use copy: %w",
			ErrContent, c.Path, err)
	}
	return opError("reflink", c.Path, err)
}

// copyRangeIn copies what is data.
func (p *Pool) copyRangeIn(ctx context.Context, dst *os.File, c FileContent, name string) error {
	end := c.Offset + c.Length
	all, err := dataIn(c.File, c.Offset, end)
	if err != nil {
		return err
	}
	counted := p.copyOf(ctx, name, all)
	defer counted.end()
	for at := c.Offset; at < end; {
		start, stop, err := nextData(c.File, at, end)
		if err != nil {
			return opError("find data in", c.Path, err)
		}
		for at = start; at < stop; {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(copyBuffer, stop-at)
			if _, err := io.CopyN(io.NewOffsetWriter(dst, at-c.Offset), io.NewSectionReader(c.File, at, n), n); err != nil {
				return opError("copy to", imageFile, err)
			}
			at += n
			counted.add(n)
			if c.Progress != nil {
				c.Progress(counted.done.Load(), all)
			}
		}
	}
	return nil
}

// dataIn is how much of a range is data.
func dataIn(f *os.File, from, end int64) (n int64, err error) {
	for at := from; at < end; {
		start, stop, err := nextData(f, at, end)
		if err != nil {
			return 0, opError("find data in", f.Name(), err)
		}
		n += stop - start
		at = stop
	}
	return n, nil
}
