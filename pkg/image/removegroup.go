package image

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
)

// RemoveGroup makes a group snapshot and all of its snapshots not exist; an ID that
// is unknown here is success. Of a group that is damaged whatever there is goes: who
// asks for this wants none of it. Errors: ErrPool, ctx's, and what the filesystem
// says. After one, the group is there as a whole, or it is gone and the space of its
// snapshots is free after the next successful call, or the next start.
func (s *Store) RemoveGroup(ctx context.Context, id string) error {
	p, dir, ok := s.Lookup(id)
	if !ok {
		return nil
	}
	leave, err := p.enter(ctx, groupLock(dir))
	if err != nil {
		return err
	}
	defer leave()
	r, err := p.getGroup(dir)
	if err == nil || errors.Is(err, ErrDamaged) {
		err = s.removeGroup(ctx, p, dir, r)
	}
	if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	return errors.Join(s.removeStrays(ctx, id), s.removeDamaged(ctx, r))
}

// removeGroup removes the record of a group, so that its snapshots do not exist any
// more; their files are there still. Those of a record that is damaged were never
// found to exist.
// Precondition: the group's lock is held.
func (s *Store) removeGroup(ctx context.Context, p *Pool, dir string, r groupRecord) error {
	// All of them first, so that the group is not gone while one is read.
	for _, m := range r.Members {
		if member, dir, ok := s.Lookup(m.Snapshot); ok {
			leave, err := member.enter(ctx, snapshotLock(dir))
			if err != nil {
				return err
			}
			defer leave()
		}
	}
	p.log(ctx).Info("Removing a group snapshot, as asked", "group", VolumeID(p.ID(), dir), "snapshots", len(r.Members))
	if err := p.hideGroup(dir, p.store.kill); err != nil {
		return err
	}
	for _, m := range r.Members {
		if p, dir, ok := s.Lookup(m.Snapshot); ok { // else the opening of its pool removes it
			p.unsettle(dir)
		}
	}
	return nil
}

// hideGroup makes a group's record not exist, and erases it.
// Precondition: the group's lock is held.
func (p *Pool) hideGroup(dir string, kill func(string)) error {
	gone := gonePrefix + dir + "-" + rand.Text()[:8]
	err := renameNew(p.groups, dir, p.root, gone)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return opError("remove", dir, err)
	}
	kill("remove group: renamed")
	if err := p.groups.Sync(); err != nil {
		_ = renameNew(p.root, gone, p.groups, dir) // as in Remove
		return opError("sync", groupsDir, err)
	}
	kill("remove group: committed")
	p.mu.Lock()
	delete(p.groupRecords, dir)
	delete(p.damagedCut, groupLock(dir))
	p.mu.Unlock()
	p.discard(gone)
	return nil
}

// removeDamaged removes what is refused of the snapshots of a group that is gone: only
// its record says that they were of it.
// Precondition: the group's lock is held.
func (s *Store) removeDamaged(ctx context.Context, r groupRecord) error {
	var errs []error
	for _, m := range r.Members {
		p, dir, ok := s.Lookup(m.Snapshot)
		if !ok {
			continue
		}
		if _, err := p.getSnapshot(dir); !errors.Is(err, ErrDamaged) {
			continue
		}
		leave, err := p.enter(ctx, snapshotLock(dir))
		if err == nil {
			err = p.removeSnapshot(ctx, dir, snapshotRecord{Source: m.Source})
			leave()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// clearGroup removes the record that a commit could neither complete nor take back:
// it names the snapshots that are about to be made again.
// Precondition: the group's lock is held, and there is no such group.
func (p *Pool) clearGroup(dir string) error {
	if _, err := statAt(p.groups, dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return p.hideGroup(dir, func(string) {})
}
