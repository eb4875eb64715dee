package image

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"slices"
)

// cutting is one snapshot in the making.
type cutting struct {
	p      *Pool
	spec   SnapshotSpec
	dir    string // of the snapshot
	volume string // directory of its volume
	source record
	made   bool // an earlier call made it: nothing is left to do

	leave    []func()
	work     string // name of its directory in the pool, until it is committed
	d        *os.File
	from, to *os.File
	reflink  bool
	data     int64 // bytes that a copy, which is no reflink, has to copy
	space    *reservation
	record   snapshotRecord
	noted    func() error // waits until the record is synced; nil as long as nobody writes it
}

// cutAll makes snapshots of one moment: all of them, or none.
func (s *Store) cutAll(ctx context.Context, specs []SnapshotSpec, group *cutGroup, quiesce Quiesce) (made []Snapshot, err error) {
	specs = slices.SortedFunc(slices.Values(specs), func(a, b SnapshotSpec) int { return cmp.Compare(a.Source, b.Source) })
	cuts := make([]*cutting, 0, len(specs))
	defer func() {
		for _, c := range slices.Backward(cuts) {
			c.close()
		}
	}()
	for _, spec := range specs {
		c, err := s.newCutting(spec)
		if err != nil {
			return nil, err
		}
		var held []*reservation
		for _, other := range cuts {
			held = append(held, other.space)
		}
		cuts = append(cuts, c)
		if err := c.prepare(ctx, group.id(), held); err != nil {
			return nil, s.undoCuts(cuts, err)
		}
	}
	if err := s.makeCuts(ctx, cuts, group, quiesce); err != nil {
		return nil, s.undoCuts(cuts, err)
	}
	for _, c := range cuts {
		made = append(made, c.p.snapshot(c.dir, c.record))
	}
	return made, nil
}

func (s *Store) makeCuts(ctx context.Context, cuts []*cutting, group *cutGroup, quiesce Quiesce) error {
	cuts = slices.DeleteFunc(slices.Clone(cuts), func(c *cutting) bool { return c.made })
	if len(cuts) == 0 {
		return nil
	}
	if err := cutQuiet(ctx, cuts, quiesce); err != nil {
		return err
	}
	for _, c := range cuts {
		if err := c.finish(); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	for _, c := range cuts {
		if err := c.commit(); err != nil {
			return err
		}
	}
	if group != nil {
		if err := group.commit(cuts); err != nil {
			return err
		}
	}
	for _, c := range cuts {
		c.p.rememberSnapshot(c.dir, c.record)
		if c.record.separates() {
			c.p.separate(c.dir)
		}
	}
	return nil
}

// cutQuiet copies all images while nobody writes to any.
func cutQuiet(ctx context.Context, cuts []*cutting, quiesce Quiesce) error {
	return quietly(ctx, quiesce, func() error {
		for _, c := range cuts {
			if err := c.cut(ctx); err != nil {
				return err
			}
		}
		return nil
	})
}

// undoCuts takes back what was made. What cannot be taken back is removed by the
// next start: a snapshot whose group has no record does not exist.
func (s *Store) undoCuts(cuts []*cutting, err error) error {
	for _, c := range slices.Backward(cuts) {
		err = errors.Join(err, c.undo())
	}
	return err
}

func (s *Store) newCutting(spec SnapshotSpec) (*cutting, error) {
	if err := spec.check(); err != nil {
		return nil, err
	}
	p, volume, ok := s.Lookup(spec.Source)
	if !ok {
		return nil, fmt.Errorf("%w: volume %q", ErrNotFound, spec.Source)
	}
	return &cutting{p: p, spec: spec, dir: DirName(spec.Name), volume: volume}, nil
}

// prepare does all that can be done before the writers hold still. held is what the
// other snapshots of the group have reserved.
func (c *cutting) prepare(ctx context.Context, group string, held []*reservation) error {
	if err := c.hold(ctx, snapshotLock(c.dir)); err != nil {
		return err
	}
	r, err := c.p.getSnapshot(c.dir)
	switch {
	case err == nil:
		c.made, c.record = true, r
		return equalSnapshot(r, c.spec, group)
	case !errors.Is(err, ErrNotFound):
		return err
	}
	if err := c.p.clearCut(ctx, c.dir); err != nil {
		return err
	}
	if err := c.hold(ctx, c.volume); err != nil {
		return err
	}
	if c.source, err = c.p.get(c.volume); err != nil {
		return err
	}
	if err := c.p.present(); err != nil {
		return err
	}
	d, from, err := c.p.openVolume(c.volume, c.source, false)
	if err != nil {
		return err
	}
	defer d.Close()
	c.from, c.reflink = from, c.p.CanReflink()
	c.record = newSnapshotRecord(c.spec, c.source, group, c.reflink, c.p.store.now())
	if err := c.reserve(ctx, held); err != nil {
		return err
	}
	return c.make()
}

// hold takes a lock for as long as the snapshot is made.
func (c *cutting) hold(ctx context.Context, key string) error {
	leave, err := c.p.enter(ctx, key)
	if err == nil {
		c.leave = append(c.leave, leave)
	}
	return err
}

// reserve takes the space that the snapshot will need: of a copy the data, of a
// reflink what the volume needs to write anew all that it shares by then.
func (c *cutting) reserve(ctx context.Context, held []*reservation) (err error) {
	if !c.reflink {
		n, err := dataBytes(c.from, c.source.Size)
		if err != nil {
			return err
		}
		c.data = n
		c.space, err = c.p.account.take(ctx, Thick, n, held...)
		return err
	}
	// It shares some already, or has not written all; as long as there is space for the
	// whole that makes no difference, and its extents, of which there may be many, need
	// not be looked at.
	st, err := statFile(c.from)
	if err != nil {
		return opError("look at", imageFile, err)
	}
	if c.space = c.p.account.takeNow(c.source.Allocation, st.Allocated); c.space != nil {
		return nil
	}
	s, err := sharingOf(c.from, c.source.Size, c.p.noCow)
	if err != nil {
		return opError("look at the extents of", imageFile, err)
	}
	c.space, err = c.p.account.take(ctx, c.source.Allocation, s.alone, held...)
	return err
}

// alikeIn makes new files in d be of the kind that f is: on btrfs files with and
// without copy-on-write do not reflink with each other (fact 70).
func (p *Pool) alikeIn(d, f *os.File) error {
	if !p.noCow {
		return nil
	}
	if on, err := isNoCow(f); err != nil || !on {
		return opError("look at", f.Name(), err)
	}
	return opError("chattr +C", d.Name(), setNoCow(d))
}

// make makes the snapshot's directory and file.
func (c *cutting) make() (err error) {
	work := newPrefix + c.dir + "-" + rand.Text()[:8]
	if err := mkdirAt(c.p.root, work); err != nil {
		return opError("make", work, err)
	}
	c.work = work
	if c.d, err = openDirAt(c.p.root, work); err != nil {
		return opError("open", work, err)
	}
	if err := c.p.alikeIn(c.d, c.from); err != nil {
		return err
	}
	if c.to, err = createAt(c.d, imageFile); err != nil {
		return opError("make", imageFile, err)
	}
	c.p.store.kill("snapshot: made")
	return c.note()
}

// note begins to write and sync the record, which is of no use before the rename: the
// disk does that while the writers are brought to hold still.
func (c *cutting) note() error {
	b, err := c.record.encode()
	if err == nil {
		c.noted = writeAside(c.d, snapshotFile, b)
	}
	return err
}

// cut copies the image.
func (c *cutting) cut(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	defer c.p.store.kill("snapshot: cut")
	if c.reflink {
		return opError("reflink", imageFile, reflink(c.to, c.from))
	}
	if err := c.recount(); err != nil {
		return err
	}
	if err := c.to.Truncate(c.source.Size); err != nil {
		return opError("extend", imageFile, err)
	}
	return c.p.copyCounted(ctx, c.spec.Name, c.to, c.from, c.source.Size, c.data)
}

// recount takes the space for what was written since reserve looked, too. It is refused
// if there is not enough: writers wait, so nothing else is waited for.
func (c *cutting) recount() error {
	before := c.p.account.of(c.volume)
	st, err := statFile(c.from)
	if err != nil {
		return opError("look at", imageFile, err)
	}
	c.p.account.seen(c.volume, before, st.Allocated)
	if c.data, err = dataBytes(c.from, c.source.Size); err != nil {
		return err
	}
	return c.space.enlarge(c.data)
}

// finish makes the copy durable, and charges for it.
func (c *cutting) finish() error {
	st, err := statFile(c.to)
	if err != nil {
		return opError("look at", imageFile, err)
	}
	if err := checkImage(c.source.Size, st); err != nil {
		return err
	}
	if c.reflink {
		if err := c.p.chargeShared(c.volume, c.from, st.Allocated, c.space); err != nil {
			return err
		}
	}
	if err := c.to.Sync(); err != nil {
		return opError("sync", imageFile, err)
	}
	c.space.release()
	c.p.store.kill("snapshot: image synced")
	if err := c.noted(); err != nil {
		return err
	}
	c.p.store.kill("snapshot: record synced")
	return nil
}

// chargeShared makes the account of a volume, whose image is open, that of one which
// shares so many bytes.
// Precondition: the volume's lock is held.
func (p *Pool) chargeShared(dir string, f *os.File, shared int64, space *reservation) error {
	r, err := p.get(dir)
	if err != nil {
		return err
	}
	st, err := statFile(f)
	if err != nil {
		return opError("look at", imageFile, err)
	}
	if err := p.showUsed(); err != nil {
		return err
	}
	c := r.charge(st.Allocated)
	c.shared = shared
	return p.account.swap(dir, c, space)
}

func (c *cutting) commit() error {
	if err := renameNew(c.p.root, c.work, c.p.snapshots, c.dir); err != nil {
		return opError("commit", c.dir, err)
	}
	c.work = ""
	c.p.store.kill("snapshot: renamed")
	if err := c.p.snapshots.Sync(); err != nil {
		return opError("sync", snapshotsDir, err)
	}
	c.p.store.kill("snapshot: committed")
	return nil
}

// undo removes what is there of the snapshot. Nobody was told of it.
func (c *cutting) undo() error {
	if c.made || c.work == "" && c.to == nil {
		return nil
	}
	c.settle()
	if c.work == "" {
		c.work = newPrefix + c.dir + "-" + rand.Text()[:8]
		if err := renameNew(c.p.snapshots, c.dir, c.p.root, c.work); err != nil {
			// Only the next start can tell whether it exists.
			err = fmt.Errorf("%w: its creation was not completed; restart csi-loop: %w", ErrDamaged, err)
			c.p.mu.Lock()
			defer c.p.mu.Unlock()
			c.p.damagedCut[snapshotLock(c.dir)] = err
			return err
		}
	}
	c.p.discard(c.work)
	if c.reflink {
		c.p.recountOne(c.volume)
	}
	return nil
}

// settle waits until nothing is written to the snapshot's directory any more.
func (c *cutting) settle() {
	if c.noted != nil {
		_ = c.noted() // whoever needs the record has asked
	}
}

func (c *cutting) close() {
	c.settle()
	c.space.release()
	for _, f := range []*os.File{c.to, c.from, c.d} {
		if f != nil {
			_ = f.Close()
		}
	}
	for _, leave := range slices.Backward(c.leave) {
		leave()
	}
}
