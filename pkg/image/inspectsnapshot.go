package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
)

// SnapshotView is what a look at a snapshot found.
type SnapshotView struct {
	ID string
	// Err is why the snapshot is refused; then Snapshot is zero but for Pool.
	Err error
	Snapshot

	Allocated int64 // bytes of blocks that its image has, shared ones too
	// Unfinished: it is part of a group whose record does not name it. A call is
	// under way, or was interrupted; then the next Open removes the snapshot.
	Unfinished bool
	// ImageErr is what is wrong with its image.
	ImageErr error
}

// inspectSnapshots looks at the snapshots and groups of a pool.
func (p *Pool) inspectSnapshots(ctx context.Context) (all []SnapshotView, err error) {
	if p.groups, err = openDirAt(p.root, groupsDir); err == nil {
		err = p.inspectGroups()
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, poolError(p.config, "%s: %w", groupsDir, err)
	}
	p.snapshots, err = openDirAt(p.root, snapshotsDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var content []string
	if err == nil {
		content, err = names(p.snapshots)
	}
	if err != nil {
		return nil, poolError(p.config, "%s: %w", snapshotsDir, err)
	}
	slices.Sort(content)
	for _, dir := range content {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if v, ok := p.inspectSnapshot(dir); ok {
			all = append(all, v)
		}
	}
	return all, nil
}

func (p *Pool) inspectGroups() error {
	content, err := names(p.groups)
	if err != nil {
		return err
	}
	for _, dir := range content {
		r, err := p.loadGroup(dir)
		if err != nil {
			p.damagedCut[groupLock(dir)] = err
			continue
		}
		p.groupRecords[dir] = r
	}
	return nil
}

// inspectSnapshot looks at one entry of snapshots/; false when it is gone by now.
func (p *Pool) inspectSnapshot(dir string) (SnapshotView, bool) {
	v := SnapshotView{ID: VolumeID(p.ID(), dir), Snapshot: Snapshot{Pool: p.Name()}}
	r, err := p.loadSnapshot(dir)
	if err != nil {
		if _, gone := statAt(p.snapshots, dir); errors.Is(gone, fs.ErrNotExist) {
			return v, false
		}
		v.Err = fmt.Errorf("%s/%s/%s: %w", p.Path(), snapshotsDir, dir, err)
		return v, true
	}
	v.Snapshot = p.snapshot(dir, r)
	p.cuts[dir] = r
	d, f, err := p.openImage(p.snapshots, snapshotsDir, dir, r.Volume.Size, false)
	if err != nil {
		v.ImageErr = err
		return v, true
	}
	defer d.Close()
	defer f.Close()
	if st, err := statFile(f); err == nil {
		v.Allocated = st.Allocated
	}
	return v, true
}

// inspectSharing counts what the volumes share, as loadSharing does, but waits for
// nothing to be written.
func (p *Pool) inspectSharing() {
	if !p.copied() || !reflinks(p.root, p.fsType) {
		return
	}
	for dir, r := range p.records {
		d, f, err := p.openVolume(dir, r, false)
		if err != nil {
			continue // one of the volume's problems
		}
		var shared int64
		err = extents(f, 0, r.Size, 0, func(e extent) bool {
			if e.shared {
				shared += e.end - e.start
			}
			return true
		})
		if err == nil {
			p.account.share(dir, shared)
		}
		_, _ = f.Close(), d.Close()
	}
}

// settleViews decides which of the snapshots of groups exist, as settleGroups does.
func settleViews(pools []*Pool, views []PoolView) {
	for i := range views {
		for j := range views[i].Snapshots {
			v := &views[i].Snapshots[j]
			poolID, group, ok := ParseID(v.Group)
			k := slices.IndexFunc(views, func(v PoolView) bool { return v.ID == poolID && v.Err == nil })
			if !ok || k < 0 || pools[k].damagedCut[groupLock(group)] != nil {
				continue // none, or nobody can tell
			}
			named := func(m groupMember) bool { return m.Snapshot == v.ID }
			v.Unfinished = !slices.ContainsFunc(pools[k].groupRecords[group].Members, named)
		}
	}
}
