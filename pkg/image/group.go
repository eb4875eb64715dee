package image

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
)

const (
	groupsDir    = "groups"
	groupFile    = "group.json"
	groupVersion = 1
)

// GroupSpec is what a new group snapshot shall be.
type GroupSpec struct {
	// Name is the caller's, 1 to 128 bytes of UTF-8; anything but NUL.
	Name string
	// Sources are the IDs of volumes of open pools, at least one, each once.
	Sources []string
	// Independent is that of each snapshot.
	Independent bool
}

// Group is snapshots of one moment. They exist together, or not at all.
type Group struct {
	Name      string
	ID        string     // <pool ID>.<directory>, of the pool that has its record
	Snapshots []Snapshot // sorted by source
	Created   time.Time
}

// groupRecord is group.json. A snapshot of a group exists if and only if the
// group's record names it.
type groupRecord struct {
	FormatVersion int           `json:"formatVersion"`
	Name          string        `json:"name"`
	Independent   bool          `json:"independent,omitempty"`
	Created       time.Time     `json:"created"`
	Members       []groupMember `json:"members"` // sorted by source
}

type groupMember struct {
	Source   string `json:"source"`
	Snapshot string `json:"snapshot"`
}

// encode refuses what would not be read again, with a *SpecError.
func (r groupRecord) encode() ([]byte, error) {
	b, err := json.MarshalIndent(r, "", "  ")
	if len(b) >= maxRecordSize {
		return nil, &SpecError{"Sources", fmt.Sprintf("has %d volumes, whose record would have %d bytes; it may have %d", len(r.Members), len(b)+1, maxRecordSize)}
	}
	return append(b, '\n'), err
}

// parseGroup reads the record of the group in directory dir. It accepts only what a
// group snapshot could have written there: what a record names by mistake would be
// taken for the group's, and removed with it.
func parseGroup(b []byte, dir string) (groupRecord, error) {
	var r groupRecord
	if err := decodeStrict(b, groupVersion, &r); err != nil {
		return r, err
	}
	if err := checkName(r.Name); err != nil {
		return r, err
	}
	if len(r.Members) == 0 {
		return r, errors.New("it has no members")
	}
	for i, m := range r.Members {
		pool, _, ok := ParseID(m.Source)
		if !ok {
			return r, fmt.Errorf("member %q is of %q, which is not the ID of a volume", m.Snapshot, m.Source)
		}
		if want := VolumeID(pool, memberName(r.Name, m.Source)); m.Snapshot != want {
			return r, fmt.Errorf("member %q of volume %s is not its snapshot %s", m.Snapshot, m.Source, want)
		}
		if i > 0 && r.Members[i-1].Source >= m.Source {
			return r, fmt.Errorf("member %q is out of order, or there twice", m.Snapshot)
		}
	}
	if want := DirName(r.Name); want != dir {
		return r, fmt.Errorf("it is the record of group %q, which belongs in directory %s", r.Name, want)
	}
	return r, nil
}

// normalise sorts the sources, and refuses what cannot be.
func (g GroupSpec) normalise() (GroupSpec, error) {
	if err := checkName(g.Name); err != nil {
		return g, err
	}
	g.Sources = slices.Sorted(slices.Values(g.Sources))
	if len(g.Sources) == 0 {
		return g, &SpecError{"Sources", "is empty"}
	}
	if n := len(g.Sources); len(slices.Compact(slices.Clone(g.Sources))) != n {
		return g, &SpecError{"Sources", "names a volume twice"}
	}
	return g, nil
}

// cutGroup is a group snapshot in the making.
type cutGroup struct {
	p      *Pool
	spec   GroupSpec
	dir    string
	record groupRecord
}

func (g *cutGroup) id() string {
	if g == nil {
		return ""
	}
	return VolumeID(g.p.ID(), g.dir)
}

// memberName is the name of a group's snapshot: the same for the same group and
// volume, and a DNS label, so that it is the directory too.
func memberName(group, source string) string {
	sum := sha256.Sum256([]byte(group + "\x00" + source))
	return "group-" + lowerBase32.EncodeToString(sum[:])[:hashLength]
}

// SnapshotGroup makes snapshots of several volumes, in any open pools, of one
// moment: all of them, or none; or finds them made. It is Snapshot otherwise.
func (s *Store) SnapshotGroup(ctx context.Context, spec GroupSpec, quiesce Quiesce) (Group, error) {
	spec, err := spec.normalise()
	if err != nil {
		return Group{}, err
	}
	group, err := s.snapshotGroup(ctx, spec, quiesce)
	if err != nil {
		return Group{}, fmt.Errorf("group snapshot %q: %w", spec.Name, err)
	}
	return group, nil
}

func (s *Store) snapshotGroup(ctx context.Context, spec GroupSpec, quiesce Quiesce) (Group, error) {
	p, _, ok := s.Lookup(spec.Sources[0])
	if !ok {
		return Group{}, fmt.Errorf("%w: volume %q", ErrNotFound, spec.Sources[0])
	}
	g := &cutGroup{p: p, spec: spec, dir: DirName(spec.Name)}
	leave, err := p.enter(ctx, groupLock(g.dir))
	if err != nil {
		return Group{}, err
	}
	defer leave()
	if have, ok := s.FindGroup(spec.Name); ok {
		return have, have.equal(spec)
	}
	switch r, err := p.getGroup(g.dir); {
	case err == nil && r.Name == spec.Name: // not all of it is there
		_, err := s.group(g.id(), r)
		return Group{}, err
	case !errors.Is(err, ErrNotFound):
		return Group{}, errors.Join(err, fmt.Errorf("%w: another group has its directory", ErrIncompatible))
	}
	if err := p.clearGroup(g.dir); err != nil {
		return Group{}, err
	}
	g.record = groupRecord{
		FormatVersion: groupVersion, Name: spec.Name, Independent: spec.Independent,
		Created: s.now().UTC().Truncate(time.Millisecond),
	}
	if err := g.fits(); err != nil {
		return Group{}, err
	}
	var members []SnapshotSpec
	for _, source := range spec.Sources {
		members = append(members, SnapshotSpec{Name: memberName(spec.Name, source), Source: source, Independent: spec.Independent})
	}
	made, err := s.cutAll(ctx, members, g, quiesce)
	if err != nil {
		return Group{}, err
	}
	return Group{Name: spec.Name, ID: g.id(), Snapshots: made, Created: g.record.Created}, nil
}

// fits tells, before anything is copied, whether the record of the whole group can be
// written.
func (g *cutGroup) fits() error {
	r := g.record
	for _, source := range g.spec.Sources {
		pool, _, _ := ParseID(source)
		r.Members = append(r.Members, groupMember{Source: source, Snapshot: VolumeID(pool, memberName(g.spec.Name, source))})
	}
	_, err := r.encode()
	return err
}

func groupLock(dir string) string { return groupsDir + "/" + dir }

// equal compares a group with what is asked of it.
func (g Group) equal(spec GroupSpec) error {
	var sources []string
	for _, s := range g.Snapshots {
		sources = append(sources, s.Source)
		if s.Independent != spec.Independent {
			return fmt.Errorf("%w: independent is %v, asked for %v", ErrIncompatible, s.Independent, spec.Independent)
		}
	}
	if !slices.Equal(sources, spec.Sources) {
		return fmt.Errorf("%w: it is of volumes %v, asked for %v", ErrIncompatible, sources, spec.Sources)
	}
	return nil
}

// commit makes the group exist, and with it its snapshots, which lie in place.
func (g *cutGroup) commit(cuts []*cutting) error {
	for _, c := range cuts {
		g.record.Members = append(g.record.Members, groupMember{Source: c.spec.Source, Snapshot: VolumeID(c.p.ID(), c.dir)})
	}
	b, err := g.record.encode()
	if err != nil {
		return err
	}
	p, work := g.p, newPrefix+g.dir+"-"+rand.Text()[:8]
	if err := mkdirAt(p.root, work); err != nil {
		return opError("make", work, err)
	}
	d, err := openDirAt(p.root, work)
	if err == nil {
		err = writeSynced(d, groupFile, b)
		_ = d.Close()
	}
	if err == nil {
		p.store.kill("group: record synced")
		err = renameNew(p.root, work, p.groups, g.dir)
	}
	if err != nil {
		p.discard(work)
		return opError("write", groupFile, err)
	}
	p.store.kill("group: renamed")
	if err := p.groups.Sync(); err != nil {
		// If it cannot be taken back it is a record of snapshots that are: clearGroup
		// and the next start remove it.
		if back := renameNew(p.groups, g.dir, p.root, work); back == nil {
			p.discard(work)
		}
		return opError("sync", groupsDir, err)
	}
	p.store.kill("group: committed")
	p.mu.Lock()
	defer p.mu.Unlock()
	p.groupRecords[g.dir] = g.record
	return nil
}

func (p *Pool) getGroup(dir string) (groupRecord, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r, ok := p.groupRecords[dir]; ok {
		return r, nil
	}
	if err, ok := p.damagedCut[groupLock(dir)]; ok {
		return groupRecord{}, err
	}
	return groupRecord{}, fmt.Errorf("%w: group snapshot %s", ErrNotFound, VolumeID(p.ID(), dir))
}

// GetGroup returns a group snapshot by its ID, with the errors of Get; ErrPool when
// one of its snapshots is in a pool that is not open.
func (s *Store) GetGroup(id string) (Group, error) {
	p, dir, ok := s.Lookup(id)
	if !ok {
		return Group{}, fmt.Errorf("%w: group snapshot %q", ErrNotFound, id)
	}
	r, err := p.getGroup(dir)
	if err != nil {
		return Group{}, err
	}
	return s.group(id, r)
}

func (s *Store) group(id string, r groupRecord) (Group, error) {
	g := Group{Name: r.Name, ID: id, Created: r.Created}
	for _, m := range r.Members {
		snapshot, err := s.GetSnapshot(m.Snapshot)
		if errors.Is(err, ErrNotFound) {
			if _, _, open := s.Lookup(m.Snapshot); !open {
				return g, fmt.Errorf("%w: snapshot %s of group %s is in a pool that is not open", ErrPool, m.Snapshot, id)
			}
			err = fmt.Errorf("%w: snapshot %s of group %s is gone", ErrDamaged, m.Snapshot, id)
		}
		if err != nil {
			return g, err
		}
		g.Snapshots = append(g.Snapshots, snapshot)
	}
	return g, nil
}

// FindGroup returns the group snapshot with that name, if all of it is there.
func (s *Store) FindGroup(name string) (Group, bool) {
	dir := DirName(name)
	for _, p := range s.set.Load().pools {
		if r, err := p.getGroup(dir); err == nil && r.Name == name {
			g, err := s.group(VolumeID(p.ID(), dir), r)
			return g, err == nil
		}
	}
	return Group{}, false
}
