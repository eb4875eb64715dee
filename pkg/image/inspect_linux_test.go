package image

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// What volumes share is space that they may still take. A look has the account that
// a start would have, also where there are clones and no snapshot.
func TestInspectCountsWhatIsShared(t *testing.T) {
	roottest.Require(t)
	for _, fsType := range []string{"xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			dir := scratch(t, fsType, 400*MiB)
			s, p := openPool(t, dir)
			v := create(t, p, Spec{Name: "v", Size: 8 * MiB})
			fill(t, p, v.ID, 0, 4*int(MiB))
			for _, allocation := range []Allocation{Thick, Thin} {
				create(t, p, Spec{Name: "clone-" + string(allocation), Size: v.Size, Allocation: allocation, Source: &Source{Volume: v.ID}})
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			view := inspect(t, Config{Name: "default", Path: dir})[0]
			if view.Err != nil {
				t.Fatal(view.Err)
			}
			_, p = openPool(t, dir)
			if diff := cmp.Diff(p.Usage(), view.Usage, cmpopts.IgnoreFields(Usage{}, "Free")); diff != "" {
				t.Errorf("the pool has, the look has: %s", diff)
			}
			if view.Usage.Shared < 4*MiB {
				t.Errorf("%d bytes are shared, want those of the clones", view.Usage.Shared)
			}
		})
	}
}

func TestInspectOfTemplates(t *testing.T) {
	roottest.Require(t)
	dir := poolDir(t)
	_, p := openPool(t, dir)
	path, f := foreign(t, dir, "source", "mark")
	for _, name := range []string{"sound", "refused", "short"} {
		if _, err := p.AddTemplate(ctx, TemplateSpec{Name: name, Size: 6 * MiB, BlockSize: 512}, contentOf(path, f, Copy)); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{
		os.WriteFile(filepath.Join(dir, templatesDir, "refused", templateFile), []byte("{}"), 0o600),
		os.Truncate(filepath.Join(dir, templatesDir, "short", imageFile), 4096),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	before := tree(t, dir)
	got := map[string]error{}
	for _, v := range inspect(t, Config{Name: "default", Path: dir})[0].Templates {
		got[v.ID] = v.Err
		if v.Err == nil {
			got[v.ID] = v.ImageErr
		}
	}
	if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
		t.Errorf("changed: %s", diff)
	}
	if err := got[VolumeID(p.ID(), "sound")]; err != nil || len(got) != 3 {
		t.Errorf("%v", got)
	}
	wantError(t, got[VolumeID(p.ID(), "refused")], ErrDamaged)
	wantError(t, got[VolumeID(p.ID(), "short")], ErrDamaged)
}
