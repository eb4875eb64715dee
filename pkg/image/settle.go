package image

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"maps"
	"slices"
)

// The snapshots of a group exist if the group's record names them. Those of which it is
// not known yet, or that are to go, are "unsettled": nobody finds them.

// settleGroups decides which of the found snapshots of groups exist: those that
// their group's record names. Those of a group that has no record are removed, as
// a call was interrupted. Where the record's pool is not open nobody can tell yet.
func (s *Store) settleGroups(ctx context.Context) {
	for _, p := range s.set.Load().pools {
		for dir, r := range p.unsettledCuts() {
			q, group, ok := s.Lookup(r.Group)
			if !ok {
				continue
			}
			record, err := q.getGroup(group)
			switch {
			case err == nil && slices.ContainsFunc(record.Members, func(m groupMember) bool { return m.Snapshot == VolumeID(p.ID(), dir) }):
				p.settleCut(dir, r)
			case err == nil, errors.Is(err, ErrNotFound):
				p.dropCut(ctx, dir, r)
			}
		}
	}
}

func (p *Pool) unsettledCuts() map[string]snapshotRecord {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.unsettled)
}

func (p *Pool) settleCut(dir string, r snapshotRecord) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.unsettled[dir]; ok { // not removed meanwhile
		delete(p.unsettled, dir)
		p.cuts[dir] = r
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

// dropCut removes a snapshot that never came to be.
func (p *Pool) dropCut(ctx context.Context, dir string, r snapshotRecord) {
	p.log(ctx).Info("Removing a snapshot that an interrupted call left", "snapshot", VolumeID(p.ID(), dir), "group", r.Group)
	gone := gonePrefix + dir + "-" + rand.Text()[:8]
	if err := renameNew(p.snapshots, dir, p.root, gone); err != nil && !errors.Is(err, fs.ErrNotExist) {
		p.leftBehind(snapshotsDir+"/"+dir, err)
		return
	}
	await(ctx, p.eraseAll(gone))
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.unsettled, dir)
}
