package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
)

// The snapshots of a group exist if the group's record names them. Those of which it is
// not known yet, or that are to go, are "unsettled": nobody finds them, and only of the
// latter it is said that they do not exist.

// settleGroups decides which of the found snapshots of groups exist: those that
// their group's record names. Those of a group that has no record are removed, as
// a call was interrupted. Where the record's pool is not open nobody can tell yet.
// A record of which there is no snapshot is removed, too.
func (s *Store) settleGroups(ctx context.Context) {
	pools := s.set.Load().pools
	s.refuseMembers(pools)
	for _, p := range pools {
		for dir, r := range p.unsettledCuts() {
			q, group, ok := s.Lookup(r.Group)
			if !ok {
				continue
			}
			record, err := q.getGroup(group)
			switch {
			case err == nil && record.names(VolumeID(p.ID(), dir)):
				p.settleCut(ctx, dir, r, q, group)
			case err == nil, errors.Is(err, ErrNotFound):
				p.dropCut(ctx, dir, r)
			}
		}
	}
	for _, p := range pools {
		for dir, r := range p.groupList() {
			p.dropEmptyGroup(ctx, dir, r)
		}
	}
}

// whyUnsettled says why a snapshot is not found that is of a group: because the group is
// gone, or because nobody can tell yet, which must not be taken for gone.
func (s *Store) whyUnsettled(id, group string) error {
	q, dir, ok := s.Lookup(group)
	if !ok {
		return fmt.Errorf("%w: the record of its group %s, which says whether there is a snapshot %s, is in a pool that is not open", ErrPool, group, id)
	}
	r, err := q.getGroup(dir)
	switch {
	case err == nil && r.names(id):
		return fmt.Errorf("%w: it was opened a moment ago, and snapshot %s of group %s is looked at", ErrPool, id, group)
	case err == nil, errors.Is(err, ErrNotFound):
		return fmt.Errorf("%w: snapshot %s", ErrNotFound, id)
	}
	return fmt.Errorf("snapshot %s of group %s: %w", id, group, err)
}

// names says whether the group has that snapshot.
func (r groupRecord) names(id string) bool {
	return slices.ContainsFunc(r.Members, func(m groupMember) bool { return m.Snapshot == id })
}

// refuseMembers refuses the snapshots that a group's record names and that say that they
// are of another group, or of none. Such a record is not what was written: by it the
// snapshot would be taken for one that an interrupted call left, and removed.
func (s *Store) refuseMembers(pools []*Pool) {
	groups := map[string]string{}
	for _, p := range pools {
		for dir, r := range p.groupList() {
			r.claim(groups, VolumeID(p.ID(), dir))
		}
	}
	for _, p := range pools {
		p.refuseMembers(groups)
	}
}

// claim notes whose the group's snapshots are.
func (r groupRecord) claim(groups map[string]string, id string) {
	for _, m := range r.Members {
		groups[m.Snapshot] = id
	}
}

// wrongGroup is nil if a snapshot's record agrees with those of groups.
func wrongGroup(groups map[string]string, id string, r snapshotRecord) error {
	if group, ok := groups[id]; ok && group != r.Group {
		return fmt.Errorf("%w: %s: its group is %q, but group %s has it", ErrDamaged, snapshotFile, r.Group, group)
	}
	return nil
}

func (p *Pool) refuseMembers(groups map[string]string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, found := range []map[string]snapshotRecord{p.cuts, p.unsettled} {
		for dir, r := range found {
			err := wrongGroup(groups, VolumeID(p.ID(), dir), r)
			if err == nil {
				continue
			}
			err = fmt.Errorf("%s/%s/%s: %w", p.Path(), snapshotsDir, dir, err)
			p.logger.Error(err, "Refusing a snapshot", "snapshot", VolumeID(p.ID(), dir))
			delete(found, dir)
			p.damagedCut[snapshotLock(dir)] = err
		}
	}
}

// dropEmptyGroup removes a group's record if there is nothing of its snapshots: of a
// commit that could not be taken back whole, or when they were removed by hand. While
// a call works on the group its snapshots are not all known. r was read before the lock was
// there to be had: the group may have been removed since, and another one made.
func (p *Pool) dropEmptyGroup(ctx context.Context, dir string, r groupRecord) {
	unlock, ok := p.locks.tryLock(groupLock(dir))
	if !ok {
		return
	}
	defer unlock()
	if now, err := p.getGroup(dir); err != nil || !slices.Equal(now.Members, r.Members) {
		return
	}
	for _, m := range r.Members {
		q, member, open := p.store.Lookup(m.Snapshot)
		if !open {
			return
		}
		if _, err := q.getSnapshot(member); !errors.Is(err, ErrNotFound) {
			return
		}
		if _, err := statAt(q.snapshots, member); !errors.Is(err, fs.ErrNotExist) {
			return
		}
	}
	p.log(ctx).Info("Removing a group snapshot of which there is nothing", "group", VolumeID(p.ID(), dir), "snapshots", len(r.Members))
	if err := p.hideGroup(dir, func(string) {}); err != nil {
		p.leftBehind(groupsDir+"/"+dir, err)
	}
}

func (p *Pool) groupList() map[string]groupRecord {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.groupRecords)
}

func (p *Pool) unsettledCuts() map[string]snapshotRecord {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.unsettled)
}

// settleCut makes a snapshot known that the record of its group in q names. Under the
// snapshot's lock, which a removal of the group has while the record goes, it looks again:
// what is settled after that, the removal would not find.
func (p *Pool) settleCut(ctx context.Context, dir string, r snapshotRecord, q *Pool, group string) {
	unlock, err := p.locks.lock(ctx, snapshotLock(dir))
	if err != nil {
		return
	}
	defer unlock()
	if record, err := q.getGroup(group); err != nil || !record.names(VolumeID(p.ID(), dir)) {
		return // the removal goes on with it
	}
	p.mu.Lock()
	_, ok := p.unsettled[dir]
	if ok { // not removed meanwhile
		delete(p.unsettled, dir)
		p.cuts[dir] = r
	}
	p.mu.Unlock()
	if ok && p.settled && r.separates() { // else separateAll does it
		p.separate(dir)
	}
}

// unsettle is for a snapshot whose group is gone: it does not exist any more, and
// removeStrays and settleGroups remove it.
func (p *Pool) unsettle(dir string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r, ok := p.cuts[dir]; ok {
		delete(p.cuts, dir)
		p.unsettled[dir] = r
	}
}

// removeStrays removes the snapshots of a group that is gone, also those that an
// earlier call could not remove.
// Precondition: the group's lock is held.
func (s *Store) removeStrays(ctx context.Context, group string) error {
	var errs []error
	for _, p := range s.set.Load().pools {
		for dir, r := range p.unsettledCuts() {
			if r.Group == group {
				errs = append(errs, p.removeStray(ctx, dir, r))
			}
		}
	}
	return errors.Join(errs...)
}

func (p *Pool) removeStray(ctx context.Context, dir string, r snapshotRecord) error {
	leave, err := p.enter(ctx, snapshotLock(dir))
	if err != nil {
		return err
	}
	defer leave()
	return p.removeSnapshot(ctx, dir, r)
}

// dropCut removes a snapshot that never came to be, unless a call works on it, or has
// removed it: there may be another one by now.
func (p *Pool) dropCut(ctx context.Context, dir string, r snapshotRecord) {
	unlock, ok := p.locks.tryLock(snapshotLock(dir))
	if !ok {
		return
	}
	defer unlock()
	p.mu.Lock()
	_, left := p.unsettled[dir]
	p.mu.Unlock()
	if !left {
		return
	}
	p.log(ctx).Info("Removing a snapshot that an interrupted call left", "snapshot", VolumeID(p.ID(), dir), "group", r.Group)
	gone := gonePrefix + dir + "-" + rand.Text()[:8]
	if err := renameNew(p.snapshots, dir, p.root, gone); err != nil && !errors.Is(err, fs.ErrNotExist) {
		p.leftBehind(snapshotsDir+"/"+dir, err)
		return
	}
	// A repeated removal of the group is answered without another look.
	if err := p.snapshots.Sync(); err != nil {
		p.leftBehind(snapshotsDir+"/"+dir, err)
	}
	await(ctx, p.eraseAll(gone))
	p.endClaims(ctx, p.near(Source{Snapshot: VolumeID(p.ID(), dir)}, r.Source))
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.unsettled, dir)
}

// clearCut removes what is left of a snapshot whose group is gone, and which could not be
// removed before: it has the name of one that is about to be made.
// Precondition: the snapshot's lock is held, and there is no such snapshot.
func (p *Pool) clearCut(ctx context.Context, dir string) error {
	p.mu.Lock()
	r, left := p.unsettled[dir]
	p.mu.Unlock()
	if !left {
		return nil
	}
	return p.removeSnapshot(ctx, dir, r)
}

// loadGroups reads the records of group snapshots. One that cannot be read keeps
// its snapshots from being served, and from being removed but with the group.
func (p *Pool) loadGroups() error {
	content, err := names(p.groups)
	if err != nil {
		return poolError(p.config, "%w", err)
	}
	for _, dir := range content {
		r, err := p.loadGroup(dir)
		if scarce(err) {
			return poolError(p.config, "%s/%s: %w", groupsDir, dir, err)
		}
		if err != nil {
			err = fmt.Errorf("%s/%s/%s: %w", p.Path(), groupsDir, dir, err)
			p.once("refuse group "+dir).Error(err, "Refusing a group snapshot", "group", VolumeID(p.ID(), dir))
			p.damagedCut[groupLock(dir)] = err
			continue
		}
		p.groupRecords[dir] = r
	}
	return nil
}

func (p *Pool) loadGroup(dir string) (groupRecord, error) {
	if !validDir(dir) {
		return groupRecord{}, fmt.Errorf("%w: not a name that csi-loop gives", ErrDamaged)
	}
	d, err := openDirAt(p.groups, dir)
	if err != nil {
		return groupRecord{}, openError(dir, err)
	}
	defer d.Close()
	r, err := readRecord(d, groupFile, dir, parseGroup)
	if err == nil && !p.made(r.Members[0].Source) { // whose pool has the record
		return groupRecord{}, fmt.Errorf("%w: %s: it is of volume %s, from before the pool got the ID %s", ErrDamaged, groupFile, r.Members[0].Source, p.ID())
	}
	return r, err
}
