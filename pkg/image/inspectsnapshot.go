package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
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
func (p *Pool) inspectSnapshots(ctx context.Context) (_ []SnapshotView, err error) {
	if p.groups, err = openDirAt(p.root, groupsDir); err == nil {
		err = p.inspectGroups()
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, poolError(p.config, "%s: %w", groupsDir, err)
	}
	return inspectEntries(ctx, p, snapshotsDir, &p.snapshots, p.inspectSnapshot)
}

// inspectEntries looks at what is in a directory of the pool, by name: nothing if there is
// no such directory, which is opened into dir. What is gone by now is left out.
func inspectEntries[V any](ctx context.Context, p *Pool, name string, dir **os.File, look func(entry string) (V, bool)) (all []V, err error) {
	*dir, err = openDirAt(p.root, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var content []string
	if err == nil {
		content, err = names(*dir)
	}
	if err != nil {
		return nil, poolError(p.config, "%s: %w", name, err)
	}
	slices.Sort(content)
	for _, entry := range content {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if v, ok := look(entry); ok {
			all = append(all, v)
		}
	}
	return all, nil
}

// isEntry says whether something is in a directory, as far as can be seen.
func isEntry(dir *os.File, name string) bool {
	_, err := statAt(dir, name)
	return !errors.Is(err, fs.ErrNotExist)
}

// inspectImage is how much space the image of a snapshot or template has, or what is
// wrong with it.
func (p *Pool) inspectImage(parent *os.File, parentName, dir string, size int64) (allocated int64, err error) {
	d, f, err := p.openImage(parent, parentName, dir, size, false)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	defer f.Close()
	if st, err := statFile(f); err == nil {
		allocated = st.Allocated
	}
	return allocated, nil
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
		v.Err = fmt.Errorf("%s/%s/%s: %w", p.Path(), snapshotsDir, dir, err)
		return v, isEntry(p.snapshots, dir)
	}
	v.Snapshot = p.snapshot(dir, r)
	p.cuts[dir] = r
	v.Allocated, v.ImageErr = p.inspectImage(p.snapshots, snapshotsDir, dir, r.Volume.Size)
	return v, true
}

// inspectSharing counts what the volumes share, as loadSharing does, but waits for
// nothing to be written.
func (p *Pool) inspectSharing() {
	if !p.copied() || !reflinks(p.root, p.fsType) {
		return
	}
	for dir, size := range p.account.sizes() {
		d, f, err := p.openVolume(dir, record{Size: size}, false)
		if err != nil {
			continue // one of the volume's problems
		}
		var shared int64
		err = extents(f, 0, size, 0, func(e extent) bool {
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
	groups := map[string]string{}
	for _, p := range pools {
		for dir, r := range p.groupRecords {
			r.claim(groups, VolumeID(p.ID(), dir))
		}
	}
	for i := range views {
		for j := range views[i].Snapshots {
			v := &views[i].Snapshots[j]
			if v.Err != nil {
				continue
			}
			if err := wrongGroup(groups, v.ID, snapshotRecord{Group: v.Group}); err != nil {
				_, dir, _ := ParseID(v.ID)
				delete(pools[i].cuts, dir)
				*v = SnapshotView{ID: v.ID, Err: fmt.Errorf("%s/%s/%s: %w", pools[i].Path(), snapshotsDir, dir, err), Snapshot: Snapshot{Pool: v.Pool}}
				continue
			}
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
