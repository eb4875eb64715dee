package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Quiesce makes all writers of the images that are about to be copied hold still,
// and what they wrote before be in the images. The copies are made between its
// return and that of resume. An error of resume means that the writers did not hold
// still all the time; the copies are then thrown away.
type Quiesce func(ctx context.Context) (resume func() error, err error)

// CanReflink tells whether copies in this pool share blocks, and so are instant. It
// was tried, not guessed.
func (p *Pool) CanReflink() bool {
	can := p.tryReflink()
	return can != nil && *can
}

// mayReflink is CanReflink, and true when that cannot be told now.
func (p *Pool) mayReflink() bool {
	can := p.tryReflink()
	return can == nil || *can
}

// tryReflink returns nil when it cannot be told now; then the next call tries again. What
// needs only the pool's records does not wait for a disk that hangs meanwhile.
func (p *Pool) tryReflink() *bool {
	if can := p.reflinks.Load(); can != nil {
		return can
	}
	p.probing.Lock()
	defer p.probing.Unlock()
	if can := p.reflinks.Load(); can != nil {
		return can
	}
	can := p.probeReflink()
	p.reflinks.Store(can)
	return can
}

// probeReflink returns nil when it cannot be told now.
func (p *Pool) probeReflink() *bool {
	work := newPrefix + "probe-" + rand.Text()[:8]
	if mkdirAt(p.root, work) != nil {
		return nil
	}
	defer p.discard(work)
	d, err := openDirAt(p.root, work)
	if err != nil {
		return nil
	}
	defer d.Close()
	from, err := createAt(d, "from")
	if err != nil {
		return nil
	}
	defer from.Close()
	to, err := createAt(d, "to")
	if err != nil || from.Truncate(MiB) != nil {
		return nil
	}
	defer to.Close()
	p.store.kill("reflink: made")
	return canReflink(reflink(to, from))
}

// canReflink is what the error of a reflink says of the filesystem; nil when that is
// nothing, as of a lack of space or a failed read.
func canReflink(err error) *bool {
	can := err == nil
	if can || errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOTTY) || errors.Is(err, syscall.EXDEV) {
		return &can
	}
	return nil
}

// Snapshot makes a snapshot of a volume, or finds it made. quiesce is nil for a
// volume that nobody writes to; it must not be written to before the call returns.
// An equal snapshot of that name is success, a different one ErrIncompatible. The
// other errors: *SpecError, ErrNotFound (the volume), ErrNoSpace, ErrDamaged,
// ErrPool, ctx's, and those of quiesce. After an error there is nothing of the
// snapshot.
//
// On a pool that can reflink the writers hold still for the moment that takes;
// on others for as long as copying the data does.
func (p *Pool) Snapshot(ctx context.Context, spec SnapshotSpec, quiesce Quiesce) (Snapshot, error) {
	made, err := p.store.cutAll(ctx, []SnapshotSpec{spec}, nil, quiesce)
	if err != nil {
		return Snapshot{}, fmt.Errorf("snapshot %q of %s: %w", spec.Name, spec.Source, err)
	}
	return made[0], nil
}

// RemoveSnapshot makes a snapshot not exist; an ID that is unknown here is success.
// Errors: ErrInGroup, ErrDamaged for one whose record cannot be read, ErrPool, ctx's.
func (p *Pool) RemoveSnapshot(ctx context.Context, id string) error {
	dir, ok := p.dirOf(id)
	if !ok {
		return nil
	}
	leave, err := p.enter(ctx, snapshotLock(dir))
	if err != nil {
		return err
	}
	defer leave()
	r, err := p.getSnapshot(dir)
	switch {
	case errors.Is(err, ErrNotFound):
		return nil
	case err != nil:
		return err
	case r.Group != "":
		return fmt.Errorf("%w: snapshot %s is part of group %s", ErrInGroup, id, r.Group)
	}
	return p.removeSnapshot(ctx, dir, r)
}

// Precondition: the snapshot's lock is held.
func (p *Pool) removeSnapshot(ctx context.Context, dir string, r snapshotRecord) error {
	p.log(ctx).Info("Removing a snapshot", "snapshot", VolumeID(p.ID(), dir), "source", r.Source, "group", r.Group)
	gone := gonePrefix + dir + "-" + rand.Text()[:8]
	err := renameNew(p.snapshots, dir, p.root, gone)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // removed by hand: then only forget it
		return opError("remove", dir, err)
	}
	p.store.kill("remove snapshot: renamed")
	if err := p.snapshots.Sync(); err != nil {
		_ = renameNew(p.root, gone, p.snapshots, dir) // as in Remove
		return opError("sync", snapshotsDir, err)
	}
	p.store.kill("remove snapshot: committed")
	p.forgetSnapshot(dir)
	await(ctx, p.eraseAll(gone))
	p.endClaims(ctx, p.near(Source{Snapshot: VolumeID(p.ID(), dir)}, r.Source))
	return nil
}

// OpenSnapshot opens a snapshot's image for reading. It is a regular file with one
// link, inside the pool, and exactly as large as recorded; otherwise ErrDamaged, or
// ErrNotFound. The content stays readable when the snapshot is removed.
func (p *Pool) OpenSnapshot(ctx context.Context, id string) (*os.File, error) {
	dir, ok := p.dirOf(id)
	if !ok {
		return nil, fmt.Errorf("%w: snapshot %q", ErrNotFound, id)
	}
	leave, err := p.enter(ctx, snapshotLock(dir))
	if err != nil {
		return nil, err
	}
	defer leave()
	r, err := p.getSnapshot(dir)
	if err != nil {
		return nil, err
	}
	d, f, err := p.openImage(p.snapshots, snapshotsDir, dir, r.Volume.Size, false)
	if err != nil {
		return nil, fmt.Errorf("open snapshot %s: %w", id, err)
	}
	defer d.Close()
	return f, nil
}

// snapshotLock is the key of a snapshot's lock; a volume may have the same name.
func snapshotLock(dir string) string { return snapshotsDir + "/" + dir }

// getSnapshot is get for snapshots.
func (p *Pool) getSnapshot(dir string) (snapshotRecord, error) {
	p.mu.Lock()
	r, found := p.cuts[dir]
	err, damaged := p.damagedCut[snapshotLock(dir)]
	left, unsettled := p.unsettled[dir]
	p.mu.Unlock()
	switch {
	case found:
		return r, nil
	case damaged:
		return snapshotRecord{}, err
	case unsettled:
		return snapshotRecord{}, p.store.whyUnsettled(VolumeID(p.ID(), dir), left.Group)
	}
	return snapshotRecord{}, fmt.Errorf("%w: snapshot %s", ErrNotFound, VolumeID(p.ID(), dir))
}

func (p *Pool) rememberSnapshot(dir string, r snapshotRecord) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cuts[dir] = r
}

func (p *Pool) forgetSnapshot(dir string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.cuts, dir)
	delete(p.unsettled, dir)
	delete(p.damagedCut, snapshotLock(dir)) // of a group that was removed
}

func (p *Pool) snapshotCount() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.cuts)
}

func (p *Pool) snapshotList() []Snapshot {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]Snapshot, 0, len(p.cuts))
	for dir, r := range p.cuts {
		all = append(all, p.snapshot(dir, r))
	}
	return all
}

// GetSnapshot returns a snapshot by its ID, with the errors of Get.
func (s *Store) GetSnapshot(id string) (Snapshot, error) {
	p, dir, ok := s.Lookup(id)
	if !ok {
		return Snapshot{}, fmt.Errorf("%w: snapshot %q", ErrNotFound, id)
	}
	r, err := p.getSnapshot(dir)
	if err != nil {
		return Snapshot{}, err
	}
	return p.snapshot(dir, r), nil
}

// FindSnapshot returns the snapshot with that name, in whichever open pool it is.
func (s *Store) FindSnapshot(name string) (Snapshot, bool) {
	dir := DirName(name)
	for _, p := range s.set.Load().pools {
		if r, err := p.getSnapshot(dir); err == nil && r.Name == name {
			return p.snapshot(dir, r), true
		}
	}
	return Snapshot{}, false
}

// ListSnapshots returns all snapshots of open pools, sorted by ID. The slice is the
// caller's.
func (s *Store) ListSnapshots() []Snapshot {
	var all []Snapshot
	for _, p := range s.set.Load().pools {
		all = append(all, p.snapshotList()...)
	}
	slices.SortFunc(all, func(a, b Snapshot) int { return strings.Compare(a.ID, b.ID) })
	return all
}

// loadSnapshots reads every record, and looks what the volumes share with
// whatever there is. It is load for snapshots.
func (p *Pool) loadSnapshots(ctx context.Context) error {
	content, err := names(p.snapshots)
	if err != nil {
		return poolError(p.config, "%w", err)
	}
	for _, dir := range content {
		if err := ctx.Err(); err != nil {
			return err
		}
		r, err := p.loadSnapshot(dir)
		if scarce(err) {
			return poolError(p.config, "%s/%s: %w", snapshotsDir, dir, err)
		}
		if err != nil {
			err = fmt.Errorf("%s/%s/%s: %w", p.Path(), snapshotsDir, dir, err)
			p.once("refuse snapshot "+dir).Error(err, "Refusing a snapshot", "snapshot", VolumeID(p.ID(), dir))
			p.damagedCut[snapshotLock(dir)] = err
			continue
		}
		if r.Group != "" {
			p.unsettled[dir] = r // settleGroups decides
			continue
		}
		p.cuts[dir] = r
	}
	if err := p.loadGroups(); err != nil {
		return err
	}
	return p.loadSharing(ctx)
}

func (p *Pool) loadSnapshot(dir string) (snapshotRecord, error) {
	if !validDir(dir) {
		return snapshotRecord{}, fmt.Errorf("%w: not a name that csi-loop gives", ErrDamaged)
	}
	d, err := openDirAt(p.snapshots, dir)
	if err != nil {
		return snapshotRecord{}, openError(dir, err)
	}
	defer d.Close()
	r, err := readRecord(d, snapshotFile, dir, parseSnapshot)
	if err == nil && r.Group != "" && !p.made(r.Source) {
		return snapshotRecord{}, fmt.Errorf("%w: %s: it is of volume %s and group %s, from before the pool got the ID %s", ErrDamaged, snapshotFile, r.Source, r.Group, p.ID())
	}
	return r, err
}

// made tells whether an ID is one of this pool's. After Reinit the pool's records name
// volumes, snapshots and groups of another pool: the one that it was a copy of.
func (p *Pool) made(id string) bool {
	_, ours := p.dirOf(id)
	return ours
}

// loadSharing counts what each volume shares. Where nothing was ever copied nothing
// is shared, and no extent is looked at. What cannot be counted is taken to be shared
// as a whole, until recount can.
func (p *Pool) loadSharing(ctx context.Context) error {
	if !p.copied() || !p.mayReflink() {
		return nil
	}
	for dir, size := range p.account.sizes() {
		if err := ctx.Err(); err != nil {
			return err
		}
		p.account.share(dir, size)
		p.recountOne(dir)
	}
	return nil
}

// copied tells whether the pool has snapshots, or volumes that began as copies, as those
// that are refused may have.
func (p *Pool) copied() bool {
	if p.leftovers || p.account.anyRefused() || len(p.cuts)+len(p.unsettled)+len(p.damagedCut) > 0 {
		return true
	}
	for _, r := range p.records {
		if r.Source != nil {
			return true
		}
	}
	return false
}

const (
	// recountPause is between two looks at one volume's extents, at least.
	recountPause = 30 * time.Second
	// recountShare bounds how much of the time goes into such looks: one part of it.
	recountShare = 50
)

// recount looks at the volumes that share blocks, how many they still share. It
// passes over those that a call works on, and those that were looked at just now, and tells whether it looked at any.
func (p *Pool) recount(ctx context.Context) (looked bool) {
	for _, dir := range p.account.sharedDirs() {
		if ctx.Err() != nil {
			return looked
		}
		if unlock, ok := p.locks.tryLock(dir); ok {
			if p.recountDue(dir) {
				p.recountOne(dir)
				looked = true
			}
			unlock()
		}
	}
	return looked
}

// showUsed makes statfs tell of all blocks that were given out before. Otherwise, on
// btrfs, what was written since the last commit would be free, and claimed no more.
func (p *Pool) showUsed() error {
	if p.fsType != "btrfs" {
		return nil
	}
	return opError("commit", p.fsType, commitBtrfs(p.root))
}

// settleUsed is showUsed before a reservation is given up, for blocks that are there
// whatever statfs tells. On Linux 6.18 the syncs before have committed already; on 6.12
// statfs knew nothing of a new image after them. An error is that of a filesystem which
// takes no more changes, so that nothing more will be given out.
func (p *Pool) settleUsed() { _ = p.showUsed() }

// allocated gives up what was reserved for an image that has all its blocks now. What is
// left to do may take hours, and would be charged for twice.
func (p *Pool) allocated(r *reservation) {
	p.settleUsed()
	r.release()
}

func (p *Pool) recountDue(dir string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.store.now().Before(p.recounts[dir])
}

// endClaims is recount after the removal of what shared blocks with the volumes near it. It
// looks at them however short ago that was done: what they claim for blocks that they do
// not share any more, nobody else gets.
func (p *Pool) endClaims(ctx context.Context, near []string) {
	for _, dir := range near {
		if ctx.Err() != nil || p.account.sharedOf(dir) == 0 {
			continue
		}
		if unlock, ok := p.locks.tryLock(dir); ok {
			p.recountOne(dir)
			unlock()
		}
	}
	p.recountSoon(near) // XFS ends the sharing a moment later
}

// recountSoon lets recount, of which there is one before each refusal, look at volumes again.
func (p *Pool) recountSoon(dirs []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, dir := range dirs {
		delete(p.recounts, dir)
	}
}

// near are the directories of the volumes that were made of src, and that of the volume
// with the ID of, if there is one, which src was made of.
func (p *Pool) near(src Source, of string) []string {
	var dirs []string
	if dir, ours := p.dirOf(of); ours {
		dirs = append(dirs, dir)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for dir, r := range p.records {
		if r.Source != nil && *r.Source == src {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// volumeOf is the ID of the volume that a copy was made of, directly or by a snapshot that
// is still there; else "".
func (p *Pool) volumeOf(src *Source) string {
	if src == nil {
		return ""
	}
	if dir, ours := p.dirOf(src.Snapshot); ours {
		r, _ := p.getSnapshot(dir)
		return r.Source
	}
	return src.Volume
}

// recountOne is recount for one volume.
// Precondition: its lock is held: what a snapshot adds meanwhile would be lost.
func (p *Pool) recountOne(dir string) {
	r, err := p.get(dir)
	if err != nil {
		r.Size = p.account.of(dir).size // of one that is refused, which its image had; else 0
	}
	if r.Size == 0 {
		return
	}
	// Also when it fails: recount, before a refusal, would look at it again and again.
	start := time.Now()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.recounts[dir] = p.store.now().Add(max(recountPause, recountShare*time.Since(start)))
	}()
	d, f, err := p.openVolume(dir, r, false)
	if err != nil {
		return // OpenImage and VolumeHealth report it; the account keeps the larger claim
	}
	defer d.Close()
	defer f.Close()
	s, err := sharingOf(f, r.Size, p.noCow)
	if err != nil || p.showUsed() != nil {
		return
	}
	p.account.share(dir, s.shared)
}
