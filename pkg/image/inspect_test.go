package image

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func inspect(t *testing.T, configs ...Config) []PoolView {
	t.Helper()
	views, err := Inspect(t.Context(), configs)
	if err != nil {
		t.Fatal(err)
	}
	return views
}

// tree lists every file below a directory, with what changes when it is written.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err == nil {
			all[path] = info.Mode().String() + info.ModTime().String()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestInspectSeesWhatOpenSees(t *testing.T) {
	dir := poolDir(t)
	_, p := openPool(t, dir)
	thick := create(t, p, Spec{Name: "thick", Size: 2 * MiB})
	thin := create(t, p, Spec{Name: "thin/with a name", Size: 4 * MiB, Allocation: Thin})
	// The pool is open, and locked, by this very process.
	v := inspect(t, Config{Name: "default", Path: dir})[0]
	if v.Err != nil || v.ID != p.ID() || v.Filesystem != p.Filesystem() || v.New {
		t.Fatalf("%+v", v)
	}
	want := []VolumeView{
		{ID: thick.ID, Volume: thick, Allocated: 2 * MiB},
		{ID: thin.ID, Volume: thin},
	}
	if diff := cmp.Diff(want, v.Volumes, cmpopts.IgnoreFields(VolumeView{}, "Dev", "Ino"), cmpopts.IgnoreUnexported(VolumeView{})); diff != "" {
		t.Error(diff)
	}
	dev, ino, err := p.ImageInode(t.Context(), thick.ID)
	if err != nil || v.Volumes[0].Dev != dev || v.Volumes[0].Ino != ino {
		t.Errorf("image %d:%d, %v; seen as %d:%d", dev, ino, err, v.Volumes[0].Dev, v.Volumes[0].Ino)
	}
	ignoreFree := cmpopts.IgnoreFields(Usage{}, "Free") // others write to this filesystem
	if diff := cmp.Diff(p.Usage(), v.Usage, ignoreFree); diff != "" {
		t.Error(diff)
	}
	if len(v.Problems)+len(v.Leftovers)+len(v.Exposed) > 0 {
		t.Errorf("of a sound pool: %v %v %v", v.Problems, v.Leftovers, v.Exposed)
	}
}

func TestInspectChangesNothing(t *testing.T) {
	dir := poolDir(t)
	s, p, err := tryOpen(dir)
	if err != nil {
		t.Fatal(err)
	}
	grown := create(t, p, Spec{Name: "grown", Size: MiB})
	broken := create(t, p, Spec{Name: "broken", Size: MiB})
	gone := create(t, p, Spec{Name: "gone", Size: MiB})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	volume := func(v Volume, name string) string { return filepath.Join(dir, volumesDir, DirName(v.Name), name) }
	for _, err := range []error{
		os.Truncate(volume(grown, imageFile), 2*MiB), // Open would complete this
		os.WriteFile(volume(broken, recordFile), []byte("{"), 0o600),
		os.Remove(volume(gone, imageFile)),
		os.WriteFile(volume(grown, recordNew), nil, 0o600), // and remove these
		os.Mkdir(filepath.Join(dir, ".new-x-1"), 0o700),
		os.Mkdir(filepath.Join(dir, ".gone-y-2"), 0o700),
		os.Chmod(filepath.Join(dir, identityFile), 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	before := tree(t, dir)
	v := inspect(t, Config{Name: "default", Path: dir})[0]
	if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
		t.Errorf("changed: %s", diff)
	}
	if diff := cmp.Diff([]string{".gone-y-2", ".new-x-1"}, v.Leftovers); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{identityFile}, v.Exposed); diff != "" {
		t.Error(diff)
	}
	if len(v.Volumes) != 3 {
		t.Fatalf("volumes %v", v.Volumes)
	}
	wantError(t, v.Volumes[0].Err, ErrDamaged, volumesDir+"/broken")
	for i, reason := range map[int]string{1: "ImageMissing", 2: "GrowthUnfinished"} {
		if p := v.Volumes[i].Problems; len(p) != 1 || p[0].Reason != reason {
			t.Errorf("%s: %v", v.Volumes[i].ID, p)
		}
	}
}

func TestInspectOfDirectoriesThatAreNoPools(t *testing.T) {
	empty, full, file := poolDir(t), poolDir(t), filepath.Join(t.TempDir(), "file")
	for _, path := range []string{filepath.Join(full, "something"), file} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	views := inspect(t,
		Config{Name: "empty", Path: empty}, Config{Name: "full", Path: full}, Config{Name: "file", Path: file},
		Config{Name: "missing", Path: filepath.Join(empty, "missing")},
		Config{Name: "expected", Path: poolDir(t), Expect: Expect{Existing: true}},
	)
	if v := views[0]; v.Err != nil || !v.New {
		t.Errorf("an empty directory: %+v", v)
	}
	for _, v := range views[1:] {
		wantError(t, v.Err, ErrPool)
	}
	if left := leftovers(t, empty); len(left) > 0 {
		t.Errorf("made in an empty directory: %v", left)
	}
}

func TestInspectOfSnapshots(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	v, w := create(t, p, Spec{Name: "v", Size: MiB}), create(t, p, Spec{Name: "w", Size: MiB})
	fill(t, p, v.ID, 0, 4096)
	one, broken, short := snap(t, p, "one", v.ID), snap(t, p, "refused", v.ID), snap(t, p, "short", v.ID)
	whole, err := s.SnapshotGroup(ctx, GroupSpec{Name: "whole", Sources: []string{v.ID, w.ID}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	half, err := s.SnapshotGroup(ctx, GroupSpec{Name: "half", Sources: []string{v.ID}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		os.WriteFile(filepath.Join(dir, snapshotsDir, "refused", snapshotFile), []byte("{}"), 0o600),
		os.Truncate(filepath.Join(dir, snapshotsDir, "short", imageFile), 4096),
		os.RemoveAll(filepath.Join(dir, groupsDir, "half")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	before := tree(t, dir)
	view := inspect(t, Config{Name: "default", Path: dir})[0]
	if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
		t.Errorf("changed: %s", diff)
	}
	got := map[string]string{}
	for _, v := range view.Snapshots {
		switch {
		case v.Err != nil:
			wantError(t, v.Err, ErrDamaged)
			got[v.ID] = "refused"
		case v.ImageErr != nil:
			wantError(t, v.ImageErr, ErrDamaged)
			got[v.ID] = "damaged"
		case v.Unfinished:
			got[v.ID] = "unfinished"
		default:
			got[v.ID] = "ready"
		}
		if v.ID == one.ID && (!cmp.Equal(v.Snapshot, one) || v.Allocated <= 0) {
			t.Errorf("%s %d", cmp.Diff(one, v.Snapshot), v.Allocated)
		}
	}
	want := map[string]string{
		one.ID: "ready", broken.ID: "refused", short.ID: "damaged",
		whole.Snapshots[0].ID: "ready", whole.Snapshots[1].ID: "ready", half.Snapshots[0].ID: "unfinished",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	ignore := cmpopts.IgnoreFields(Usage{}, "Free", "Snapshots")
	if diff := cmp.Diff(p.Usage(), view.Usage, ignore); diff != "" {
		t.Error(diff)
	}
}
