package image

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// sabotage is a store's kill points at which a directory of the pool becomes one that
// every call fails on, as a disk does that has gone.
type sabotage struct {
	t     *testing.T
	point string
	dir   **os.File // nil is nothing
	whole *os.File
}

func (s *sabotage) at(point string) {
	if s.dir == nil || point != s.point {
		return
	}
	f, err := os.Open(s.t.TempDir())
	if err != nil {
		s.t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		s.t.Fatal(err)
	}
	s.whole, *s.dir = *s.dir, f
}

func (s *sabotage) mend() { *s.dir, s.dir = s.whole, nil }

// pair is a pool with two volumes, and the group that is made of them.
func pair(t *testing.T, dir string, options ...Option) (*Store, *Pool, GroupSpec) {
	t.Helper()
	s, p := openPool(t, dir, options...)
	v, w := create(t, p, Spec{Name: "v", Size: MiB}), create(t, p, Spec{Name: "w", Size: MiB})
	return s, p, GroupSpec{Name: "g", Sources: []string{v.ID, w.ID}}
}

// wantNoGroup fails unless there is nothing of a group, nor of any snapshot.
func wantNoGroup(t *testing.T, s *Store, p *Pool, name string) {
	t.Helper()
	_, err := s.GetGroup(VolumeID(p.ID(), DirName(name)))
	wantError(t, err, ErrNotFound)
	groups, err := os.ReadDir(filepath.Join(p.Path(), groupsDir))
	if err != nil || len(groups) != 0 || len(s.ListSnapshots()) != 0 || p.snapshotEntries(t) != 0 {
		t.Errorf("groups %v, snapshots %v and %d entries are left: %v", groups, s.ListSnapshots(), p.snapshotEntries(t), err)
	}
	if h := p.Health(); len(h) != 0 {
		t.Errorf("problems %+v", h)
	}
}

// A commit that fails, and cannot be taken back either, leaves the group's record. It
// is not in the way of the next try, and the next start does not take it for a group.
func TestGroupThatCouldNotBeTakenBack(t *testing.T) {
	for _, restart := range []bool{false, true} {
		dir, broken := poolDir(t), &sabotage{t: t, point: "group: renamed"}
		s, p, spec := pair(t, dir, withKill(broken.at))
		broken.dir = &p.groups
		if _, err := s.SnapshotGroup(ctx, spec, nil); err == nil {
			t.Fatal("a group was made without a disk")
		}
		broken.mend()
		if left, err := os.ReadDir(filepath.Join(dir, groupsDir)); err != nil || len(left) != 1 {
			t.Fatalf("the record is not left: the test shows nothing: %v %v", left, err)
		}
		if restart {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s, p = openPool(t, dir)
			wantNoGroup(t, s, p, spec.Name)
		}
		g, err := s.SnapshotGroup(ctx, spec, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := s.GetGroup(g.ID); err != nil || len(got.Snapshots) != 2 || !got.Created.Equal(g.Created) {
			t.Errorf("%+v, %v", got, err)
		}
		if err := s.RemoveGroup(ctx, g.ID); err != nil {
			t.Fatal(err)
		}
		wantNoGroup(t, s, p, spec.Name)
		wantClean(t, dir)
		wantAccount(t, s, p)
	}
}

// goneButForItsSnapshots is a store with a group that was removed, whose two snapshots could
// not be.
func goneButForItsSnapshots(t *testing.T, dir string) (*Store, *Pool, GroupSpec, Group) {
	t.Helper()
	broken := &sabotage{t: t, point: "remove group: committed"}
	s, p, spec := pair(t, dir, withKill(broken.at))
	g, err := s.SnapshotGroup(ctx, spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	broken.dir = &p.snapshots
	if s.RemoveGroup(ctx, g.ID) == nil {
		t.Fatal("removed without a disk")
	}
	broken.mend()
	return s, p, spec, g
}

// A group that was made after settleGroups had looked is not taken for the one that it saw,
// of which there is nothing any more.
func TestGroupMadeAnewIsNotDropped(t *testing.T) {
	s, p, spec := pair(t, poolDir(t))
	g, err := s.SnapshotGroup(ctx, spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	before := p.groupList()["g"]
	if err := s.RemoveGroup(ctx, g.ID); err != nil {
		t.Fatal(err)
	}
	p.dropEmptyGroup(ctx, "g", before)
	other := create(t, p, Spec{Name: "x", Size: MiB})
	if g, err = s.SnapshotGroup(ctx, GroupSpec{Name: "g", Sources: []string{other.ID}}, nil); err != nil {
		t.Fatal(err)
	}
	p.dropEmptyGroup(ctx, "g", before)
	if got, err := s.GetGroup(g.ID); err != nil || len(got.Snapshots) != 1 {
		t.Errorf("%+v, %v", got, err)
	}
}

// A group that is gone has no snapshots, also if they could not be removed with it.
func TestNoSnapshotOfAGroupThatIsGone(t *testing.T) {
	dir := poolDir(t)
	s, p, spec, g := goneButForItsSnapshots(t, dir)
	if p.snapshotEntries(t) != 2 {
		t.Fatal("its snapshots were removed: the test shows nothing")
	}
	if left := s.ListSnapshots(); len(left) != 0 {
		t.Errorf("snapshots of a group that is gone: %+v", left)
	}
	for _, member := range g.Snapshots {
		_, err := s.GetSnapshot(member.ID)
		wantError(t, err, ErrNotFound)
	}
	if err := s.RemoveGroup(ctx, g.ID); err != nil { // as CSI wants it
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, p = openPool(t, dir)
	wantNoGroup(t, s, p, spec.Name)
	wantClean(t, dir)
	wantAccount(t, s, p)
}

// What was found to be a leftover may be a snapshot again when it is to be removed: the
// group was removed and made anew in between.
func TestLeftoverThatIsASnapshotAgain(t *testing.T) {
	dir := poolDir(t)
	s, p, spec := pair(t, dir)
	g, err := s.SnapshotGroup(ctx, spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, member, _ := ParseID(g.Snapshots[0].ID)
	r, err := p.getSnapshot(member)
	if err != nil {
		t.Fatal(err)
	}
	p.dropCut(ctx, member, r) // as settleGroups does, which looked before
	f, err := p.OpenSnapshot(ctx, g.Snapshots[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if err := s.RemoveGroup(ctx, g.ID); err != nil {
		t.Fatal(err)
	}
	wantNoGroup(t, s, p, spec.Name)
}

// A damaged group is refused, and can be removed with all that there is of it.
func TestDamagedGroupCanBeRemoved(t *testing.T) {
	for name, damage := range map[string]func(dir, member string) error{
		"record": func(dir, _ string) error {
			return os.WriteFile(filepath.Join(dir, groupsDir, "g", groupFile), []byte(`{"formatVersion": 1}`), 0o600)
		},
		"no record": func(dir, _ string) error { return os.Remove(filepath.Join(dir, groupsDir, "g", groupFile)) },
		"record of a snapshot": func(dir, member string) error {
			return os.WriteFile(filepath.Join(dir, snapshotsDir, member, snapshotFile), []byte(`{}`), 0o600)
		},
		"a snapshot is gone": func(dir, member string) error { return os.RemoveAll(filepath.Join(dir, snapshotsDir, member)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := poolDir(t)
			s, p, spec := pair(t, dir)
			other := snap(t, p, "other", spec.Sources[0])
			g, err := s.SnapshotGroup(ctx, spec, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			_, member, _ := ParseID(g.Snapshots[1].ID)
			if err := damage(dir, member); err != nil {
				t.Fatal(err)
			}
			s, p = openPool(t, dir)
			_, err = s.GetGroup(g.ID)
			wantError(t, err, ErrDamaged)
			_, err = s.SnapshotGroup(ctx, spec, nil)
			wantError(t, err, ErrDamaged)
			for range 2 {
				if err := s.RemoveGroup(ctx, g.ID); err != nil {
					t.Fatal(err)
				}
			}
			if left := s.ListSnapshots(); len(left) != 1 || left[0].ID != other.ID {
				t.Errorf("%+v", left)
			}
			if err := p.RemoveSnapshot(ctx, other.ID); err != nil {
				t.Error(err)
			}
			wantNoGroup(t, s, p, spec.Name)
			wantClean(t, dir)
			wantAccount(t, s, p)
		})
	}
}

// A record of which there is no snapshot is not a group; one of whose snapshots some
// may be in a pool that is not open may be one.
func TestGroupOfNothing(t *testing.T) {
	dirs := []string{poolDir(t), poolDir(t)}
	s := poolPair(t, dirs)
	pools := s.Pools()
	v, w := create(t, pools[0], Spec{Name: "v", Size: MiB}), create(t, pools[1], Spec{Name: "w", Size: MiB})
	g, err := s.SnapshotGroup(ctx, GroupSpec{Name: "g", Sources: []string{v.ID, w.ID}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, member := range g.Snapshots { // of one pool each
		poolID, dir, _ := ParseID(member.ID)
		at := dirs[0]
		if poolID == pools[1].ID() {
			at = dirs[1]
		}
		if err := os.RemoveAll(filepath.Join(at, snapshotsDir, dir)); err != nil {
			t.Fatal(err)
		}
	}
	poolID, _, _ := ParseID(g.ID)
	record := 0
	if poolID == pools[1].ID() {
		record = 1
	}
	alone, _ := openPool(t, dirs[record])
	if _, err = alone.GetGroup(g.ID); err == nil || errors.Is(err, ErrNotFound) {
		t.Errorf("without its other pool the group is certainly not there: %v", err)
	}
	if err := alone.Close(); err != nil {
		t.Fatal(err)
	}
	s = poolPair(t, dirs)
	wantNoGroup(t, s, s.Pools()[record], "g")
}

// Of a snapshot whose group's record cannot be asked nobody says that it is gone: not
// while the record is damaged, nor while its pool is not open.
func TestSnapshotOfAGroupThatCannotBeAsked(t *testing.T) {
	dirs := []string{poolDir(t), poolDir(t)}
	s := poolPair(t, dirs)
	pools := s.Pools()
	v, w := create(t, pools[0], Spec{Name: "v", Size: MiB}), create(t, pools[1], Spec{Name: "w", Size: MiB})
	g, err := s.SnapshotGroup(ctx, GroupSpec{Name: "g", Sources: []string{v.ID, w.ID}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	poolID, dir, _ := ParseID(g.ID)
	with, without := 0, 1
	if poolID == pools[1].ID() {
		with, without = 1, 0
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	refused := func(s *Store, p *Pool, want error) {
		t.Helper()
		for _, m := range g.Snapshots {
			if q, _, ok := s.Lookup(m.ID); !ok || q != p {
				continue
			}
			_, err := s.GetSnapshot(m.ID)
			wantError(t, err, want)
			wantError(t, p.RemoveSnapshot(ctx, m.ID), want)
			_, err = p.OpenSnapshot(ctx, m.ID)
			wantError(t, err, want)
		}
		if left := s.ListSnapshots(); len(left) != 0 {
			t.Errorf("listed: %+v", left)
		}
	}
	alone, p := openPool(t, dirs[without])
	refused(alone, p, ErrPool)
	if err := alone.Close(); err != nil {
		t.Fatal(err)
	}

	record := filepath.Join(dirs[with], groupsDir, dir, groupFile)
	sound, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(record, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = poolPair(t, dirs)
	for _, p := range s.Pools() {
		refused(s, p, ErrDamaged)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(record, sound, 0o600); err != nil {
		t.Fatal(err)
	}
	s = poolPair(t, dirs)
	if left := s.ListSnapshots(); len(left) != 2 {
		t.Errorf("with a sound record: %+v", left)
	}
	if err := s.RemoveGroup(ctx, g.ID); err != nil {
		t.Fatal(err)
	}
	wantNoGroup(t, s, s.Pools()[0], "g")
	wantAccount(t, s, s.Pools()[0])
}

// A group is removed while a pool comes in: after its record was found to name a snapshot,
// and before the snapshot is known. The removal has to find it.
func TestGroupRemovedWhileItIsSettled(t *testing.T) {
	s, p, spec := pair(t, poolDir(t))
	g, err := s.SnapshotGroup(ctx, spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, group, _ := ParseID(g.ID)
	for _, m := range g.Snapshots {
		p.unsettle(DirName(m.Name)) // as of a pool that was opened just now
	}
	found := p.unsettledCuts()
	if err := p.hideGroup(group, func(string) {}); err != nil {
		t.Fatal(err)
	}
	for dir, r := range found {
		p.settleCut(ctx, dir, r, p, group)
	}
	if err := s.removeStrays(ctx, g.ID); err != nil {
		t.Fatal(err)
	}
	wantNoGroup(t, s, p, spec.Name)
}

// TestGroupAgainAfterAFailedRemoval: what could not be removed of a group that is gone, or
// never was, is not in the way of a group of the same name.
func TestGroupAgainAfterAFailedRemoval(t *testing.T) {
	t.Run("of a killed call, by the start", func(t *testing.T) {
		dir, broken := poolDir(t), &sabotage{t: t, point: "remove: unlinking"}
		left := 2
		s, _, spec := pair(t, dir, withKill(func(point string) {
			if point == "snapshot: committed" {
				if left--; left == 0 {
					panic(errCrash)
				}
			}
		}))
		func() {
			defer func() {
				if r := recover(); r != errCrash { //nolint:errorlint // a recovered value
					t.Fatal(r)
				}
			}()
			_, _ = s.SnapshotGroup(ctx, spec, nil)
		}()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		var starting *Store
		s, p := openPool(t, dir, func(s *Store) { starting = s }, withKill(func(point string) {
			// The first is being removed. The second cannot be.
			if pools := starting.set.Load().pools; broken.whole == nil && point == broken.point && len(pools) == 1 {
				broken.dir = &pools[0].snapshots
				broken.at(point)
			}
		}))
		broken.mend()
		wantGroupAgain(t, s, p, spec, 1)
	})
	t.Run("as asked", func(t *testing.T) {
		s, p, spec, _ := goneButForItsSnapshots(t, poolDir(t))
		wantGroupAgain(t, s, p, spec, 2)
	})
}

// wantGroupAgain makes a group of which so many snapshots are left, and removes it.
func wantGroupAgain(t *testing.T, s *Store, p *Pool, spec GroupSpec, left int) {
	t.Helper()
	if n := p.snapshotEntries(t); n != left || len(s.ListSnapshots()) != 0 {
		t.Fatalf("%d are left, and %v there: the test shows nothing", n, s.ListSnapshots())
	}
	g, err := s.SnapshotGroup(ctx, spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := s.GetGroup(g.ID); err != nil || len(got.Snapshots) != len(spec.Sources) || len(s.ListSnapshots()) != len(spec.Sources) {
		t.Errorf("%+v, %v", got, err)
	}
	if err := s.RemoveGroup(ctx, g.ID); err != nil {
		t.Fatal(err)
	}
	if n := p.snapshotEntries(t); n != 0 || len(s.ListSnapshots()) != 0 {
		t.Errorf("%d are left", n)
	}
	wantClean(t, p.Path())
	wantAccount(t, s, p)
}
