package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"unicode/utf8"
)

// Source is what a new volume is a copy of: one of these, the others are "".
type Source struct {
	Snapshot string `json:"snapshot,omitempty"` // ID
	Volume   string `json:"volume,omitempty"`   // ID
	Template string `json:"template,omitempty"` // ID
	File     string `json:"file,omitempty"`     // path of what was imported
	Taken    Taken  `json:"taken,omitzero"`     // of File; for Import to say
}

func (s *Source) String() string {
	switch {
	case s == nil:
		return "none"
	case s.Snapshot != "":
		return "snapshot " + s.Snapshot
	case s.Template != "":
		return "template " + s.Template
	case s.File != "":
		return "file " + s.File
	}
	return "volume " + s.Volume
}

func (s *Source) check() error {
	if s == nil {
		return nil
	}
	id := s.Snapshot + s.Volume + s.Template + s.File
	if *s == (Source{File: id, Taken: s.Taken}) && filepath.IsAbs(id) && len(id) <= maxPath && utf8.ValidString(id) {
		return s.Taken.check()
	}
	if _, _, ok := ParseID(id); !ok || *s != (Source{Snapshot: id}) && *s != (Source{Volume: id}) && *s != (Source{Template: id}) {
		return &SpecError{"Source", fmt.Sprintf("%q is not the ID of one snapshot, volume or template, nor a path", id)}
	}
	return nil
}

func cloneSource(s *Source) *Source {
	if s == nil {
		return nil
	}
	c := *s
	return &c
}

// origin is an open source.
type origin struct {
	p      *Pool
	spec   Spec
	volume string // directory of a volume, "" for what does not change
	f      *os.File
	leave  func()       // nil when the volume's lock was given back, or none was taken
	used   bool         // its account was made that of a volume which shares
	held   *reservation // for the copy; nil if that takes nothing yet
}

// origin opens what a volume shall be a copy of. A snapshot does not change and stays
// readable when it is removed, so only a volume is locked.
func (s *Store) origin(ctx context.Context, src *Source) (_ *origin, err error) {
	o := &origin{}
	defer func() {
		if err != nil {
			o.close()
		}
	}()
	if src.Snapshot != "" {
		snapshot, err := s.GetSnapshot(src.Snapshot)
		if err != nil {
			return nil, err
		}
		o.p, _, _ = s.Lookup(src.Snapshot)
		o.spec = snapshot.Volume
		o.f, err = o.p.OpenSnapshot(ctx, src.Snapshot)
		return o, err
	}
	if src.Template != "" {
		p, name, ok := s.Lookup(src.Template)
		if !ok {
			return nil, fmt.Errorf("%w: template %q", ErrNotFound, src.Template)
		}
		r, f, err := p.openTemplate(ctx, name)
		o.p, o.spec, o.f = p, r.spec().volume(), f
		return o, err
	}
	// Found before it is locked: two volumes that are each to be a copy of the other
	// must not wait for each other.
	if _, err := s.Get(src.Volume); err != nil {
		return nil, err
	}
	o.p, o.volume, _ = s.Lookup(src.Volume)
	if o.leave, err = o.p.enter(ctx, o.volume); err != nil {
		return nil, err
	}
	r, err := o.p.get(o.volume)
	if err != nil {
		return nil, err
	}
	o.spec = r.spec()
	d, f, err := o.p.openVolume(o.volume, r, false)
	if err != nil {
		return nil, err
	}
	o.f = f
	return o, d.Close()
}

// fits refuses to make what is not a copy of the source, which is what of says.
func fits(s, of Spec) error {
	kind := func(filesystem string) string {
		if filesystem == "" {
			return "a raw block volume"
		}
		return filesystem
	}
	switch {
	case s.Filesystem != of.Filesystem:
		return fmt.Errorf("%w: the source is %s, asked for %s", ErrSource, kind(of.Filesystem), kind(s.Filesystem))
	case s.BlockSize != of.BlockSize:
		return fmt.Errorf("%w: the source has blocks of %d bytes, asked for %d", ErrSource, of.BlockSize, s.BlockSize)
	case s.Encrypted() != of.Encrypted():
		return fmt.Errorf("%w: the source is %s, asked for %s: a copy is of what is in the image", ErrSource, of.Encryption, s.Encryption)
	case s.Size < of.Size:
		return fmt.Errorf("%w: the source has %d bytes, asked for %d", ErrSize, of.Size, s.Size)
	}
	return nil
}

func (o *origin) close() {
	if o.f != nil {
		_ = o.f.Close()
		o.f = nil
	}
	switch {
	case !o.used:
	case o.leave != nil:
		o.p.recountOne(o.volume)
	default:
		// If a call has the volume now, the next recount does it.
		if unlock, ok := o.p.locks.tryLock(o.volume); ok {
			o.p.recountOne(o.volume)
			unlock()
		}
	}
	o.release()
}

// release lets other calls use the volume.
func (o *origin) release() {
	if o.leave != nil {
		o.leave()
		o.leave = nil
	}
}

// copyTo makes f, a new image of p, a copy of the source, with r's size and, if it is
// thick, all its blocks. It tells whether blocks are shared.
//
// A thin copy in the pool of its source shares its blocks, where the filesystem can.
// So does a thick one on XFS, until it is given blocks of its own. On btrfs, and
// between pools, the data is copied: of a volume in use from a reflink that is made
// for that, so that its writers wait for no more than the reflink.
func (p *Pool) copyTo(ctx context.Context, f *os.File, r record, o *origin, quiesce Quiesce) (shared bool, err error) {
	thick := r.Allocation == Thick
	reflinked := p.copiesByReflink(o, r)
	defer func() {
		if err != nil && thick && reflinked && o.volume != "" {
			o.claimAll()
		}
	}()
	switch {
	case reflinked && o.volume == "":
		err = opError("reflink", imageFile, reflink(f, o.f))
	case reflinked:
		err = p.reflinkVolume(ctx, f, o, thick, quiesce)
	case o.volume != "" && o.p.CanReflink():
		if err = o.freeze(ctx, quiesce); err == nil {
			err = p.copyData(ctx, f, r, o)
		}
	default:
		err = quietly(ctx, quiesce, func() error { return p.copyData(ctx, f, r, o) })
	}
	if err != nil {
		return false, err
	}
	o.release() // it is not looked at again, and what is left to do takes long
	if err := f.Truncate(r.Size); err != nil {
		return false, opError("extend", imageFile, err)
	}
	if thick {
		return false, p.separateNew(ctx, f, r, reflinked)
	}
	return reflinked, nil
}

// copiesByReflink tells whether a copy begins with the blocks of its source.
func (p *Pool) copiesByReflink(o *origin, r record) bool {
	return p == o.p && p.CanReflink() && (r.Allocation == Thin || !p.noCow)
}

// quietly does work while nobody writes.
func quietly(ctx context.Context, quiesce Quiesce, work func() error) (err error) {
	if quiesce == nil {
		return work()
	}
	resume, err := quiesce(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, resume()) }()
	return work()
}

// reflinkVolume reflinks a volume, which pays for what it shares from then on. If the
// copy is thick they soon share nothing, and whichever writes first takes what was
// reserved for the copy.
func (p *Pool) reflinkVolume(ctx context.Context, f *os.File, o *origin, thick bool, quiesce Quiesce) error {
	if thick {
		return o.link(ctx, f, quiesce)
	}
	return o.share(ctx, f, quiesce)
}

// link reflinks the source while nobody writes to it.
func (o *origin) link(ctx context.Context, to *os.File, quiesce Quiesce) error {
	return quietly(ctx, quiesce, func() error { return opError("reflink", imageFile, reflink(to, o.f)) })
}

// claimAll is for a call that fails: the source shares with what is left until that is
// erased, which may take long. close counts how much it is.
func (o *origin) claimAll() {
	o.p.account.shareMore(o.volume, o.spec.Size)
	o.used = true
}

// share makes to share the source's blocks, and charges the source for it.
func (o *origin) share(ctx context.Context, to *os.File, quiesce Quiesce) (err error) {
	s, err := sharingOf(o.f, o.spec.Size, o.p.noCow)
	if err != nil {
		return opError("look at the extents of", imageFile, err)
	}
	space, err := o.p.account.take(ctx, o.spec.Allocation, s.alone, o.held)
	if err != nil {
		return err
	}
	defer space.release()
	defer func() {
		if err != nil { // perhaps after the reflink, as when writers did not hold still
			o.claimAll()
		}
	}()
	if err := o.link(ctx, to, quiesce); err != nil {
		return err
	}
	o.used = true
	st, err := statFile(to)
	if err != nil {
		return opError("look at", imageFile, err)
	}
	return o.p.chargeShared(o.volume, o.f, st.Allocated, space)
}

// freeze puts a reflink of the source in its place, which has no name and is gone with
// its last descriptor, and lets the volume go.
func (o *origin) freeze(ctx context.Context, quiesce Quiesce) error {
	f, err := o.p.nameless(o.f)
	if err != nil {
		return err
	}
	if err := o.share(ctx, f, quiesce); err != nil {
		return errors.Join(err, f.Close())
	}
	_ = o.f.Close()
	o.f = f
	o.release() // close counts again what is shared, when the reflink is gone
	return nil
}

// nameless makes a file without a name, of the kind that like is.
func (p *Pool) nameless(like *os.File) (_ *os.File, err error) {
	work := newPrefix + "copy-" + rand.Text()[:8]
	if err := mkdirAt(p.root, work); err != nil {
		return nil, opError("make", work, err)
	}
	defer p.discard(work)
	d, err := openDirAt(p.root, work)
	if err != nil {
		return nil, opError("open", work, err)
	}
	defer d.Close()
	if err := p.alikeIn(d, like); err != nil {
		return nil, err
	}
	f, err := createAt(d, imageFile)
	return f, opError("make", imageFile, err)
}

// copyData copies the data. A thick image gets its blocks first, in one piece.
func (p *Pool) copyData(ctx context.Context, f *os.File, r record, o *origin) error {
	if r.Allocation == Thick {
		if err := allocateRange(ctx, f, 0, r.Size, false); err != nil {
			return err
		}
		p.allocated(o.held)
	} else if err := f.Truncate(r.Size); err != nil {
		return opError("extend", imageFile, err)
	}
	data, err := dataBytes(o.f, o.spec.Size)
	if err != nil {
		return err
	}
	return p.copyCounted(ctx, r.Name, f, o.f, o.spec.Size, data)
}

// separateNew gives a thick copy all its blocks, none of them shared.
func (p *Pool) separateNew(ctx context.Context, f *os.File, r record, reflinked bool) error {
	if !reflinked {
		return p.refill(f, r.Size)
	}
	c := p.copyOf(ctx, r.Name, r.Size)
	defer c.end()
	for at := int64(0); at < r.Size; at += separateChunk {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(separateChunk, r.Size-at)
		if err := unshareRange(f, at, n); err != nil {
			return opError("unshare", imageFile, err)
		}
		c.add(n)
	}
	return p.refill(f, r.Size)
}
