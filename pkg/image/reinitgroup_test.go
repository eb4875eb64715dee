package image

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestReinitKeepsGroupsOfBoth: a copy of a pool with an ID of its own is on the node of
// its original. Its records of group snapshots name those of the original, which must not
// suffer from it, whichever pool is the first; nor is anything removed from the copy.
func TestReinitKeepsGroupsOfBoth(t *testing.T) {
	for _, order := range []string{"original first", "copy first"} {
		t.Run(order, func(t *testing.T) {
			dir := poolDir(t)
			s, p, err := tryOpen(dir)
			if err != nil {
				t.Fatal(err)
			}
			v := create(t, p, Spec{Name: "a", Size: MiB})
			fill(t, p, v.ID, 0, 4096)
			g, err := s.SnapshotGroup(ctx, GroupSpec{Name: "g", Sources: []string{v.ID}}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			copied := dir + "-copy"
			t.Cleanup(func() { _ = os.RemoveAll(copied) })
			if out, err := exec.Command("cp", "-a", dir, copied).CombinedOutput(); err != nil {
				t.Fatal(err, string(out))
			}
			if _, _, err := Reinit(ctx, copied, free); err != nil {
				t.Fatal(err)
			}
			configs := []Config{{Name: "original", Path: dir}, {Name: "copy", Path: copied}}
			if order == "copy first" {
				configs[0], configs[1] = configs[1], configs[0]
			}
			s, err = Open(ctx, configs, WithRefresh(0))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = s.Close() })
			whole := func(when string) {
				t.Helper()
				if _, err := s.GetSnapshot(g.Snapshots[0].ID); err != nil {
					t.Errorf("%s: the original's snapshot: %v", when, err)
				}
				if again, err := s.GetGroup(g.ID); err != nil || len(again.Snapshots) != 1 {
					t.Errorf("%s: the original's group: %+v, %v", when, again, err)
				}
			}
			whole("started")
			if left, _ := filepath.Glob(copied + "/snapshots/*/disk.img"); len(left) != 1 {
				t.Errorf("of the copy's snapshot there is %q", left)
			}
			q, _ := s.Pool("copy")
			id := VolumeID(q.ID(), "g")
			_, err = s.GetGroup(id)
			wantError(t, err, ErrDamaged, "before the pool got the ID "+q.ID())
			t.Log(s.RemoveGroup(ctx, id))
			whole("the copy's group removed")
		})
	}
}
