package image

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

func TestEveryReasonIsInTheTable(t *testing.T) {
	for i, r := range Reasons() {
		if r.Word == "" || r.Action == "" {
			t.Errorf("reason %d: %+v", i, r)
		}
	}
}

// What a damaged volume's health says to do is what mends it, here and after the restart
// that it asks for.
func TestActionsMend(t *testing.T) {
	const whole = "saved"
	for name, c := range map[string]struct {
		damage, mend func(dir string) error
		restart      bool
		reason, says string
	}{
		"missing": {
			damage: func(d string) error { return os.Remove(filepath.Join(d, imageFile)) },
			mend:   func(d string) error { return os.Rename(filepath.Join(d, whole), filepath.Join(d, imageFile)) },
			reason: "ImageMissing", says: "hold the device open before the pods are deleted, and copy it from there; else restore it",
		},
		"truncated": {
			damage: func(d string) error { return os.Truncate(filepath.Join(d, imageFile), MiB) },
			mend:   func(d string) error { return os.Rename(filepath.Join(d, whole), filepath.Join(d, imageFile)) },
			reason: "ImageTruncated", says: "save what is left, and restore it",
		},
		"longer": {
			damage: func(d string) error { return os.Truncate(filepath.Join(d, imageFile), size+5) },
			mend:   func(d string) error { return os.Truncate(filepath.Join(d, imageFile), size) },
			reason: "ImageForeign", says: "put the volume's own file back in its place, of the size of its record",
		},
		"symlink": {
			damage: func(d string) error { return moveAndLink(d, imageFile, os.Symlink) },
			mend:   func(d string) error { return os.Rename(movedTo(d), filepath.Join(d, imageFile)) },
			reason: "ImageForeign", says: "put the volume's own file back in its place",
		},
		"hard link": {
			damage: func(d string) error { return moveAndLink(d, imageFile, os.Link) },
			mend:   func(d string) error { return os.Remove(movedTo(d)) },
			reason: "ImageForeign", says: "with no other link",
		},
		"record": {
			damage: func(d string) error { return os.WriteFile(filepath.Join(d, recordFile), []byte("{"), 0o600) },
			mend:   func(d string) error { return os.Rename(filepath.Join(d, whole+".json"), filepath.Join(d, recordFile)) },
			reason: "RecordUnreadable", says: "stop csi-loop on the node and restore the record", restart: true,
		},
		"newer": {
			damage: func(d string) error {
				return replaceIn(filepath.Join(d, recordFile), `"formatVersion": 1`, `"formatVersion": 99`)
			},
			mend: func(d string) error {
				return replaceIn(filepath.Join(d, recordFile), `"formatVersion": 99`, `"formatVersion": 1`)
			},
			reason: "RecordUnreadable", says: "run that version, or a later one", restart: true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			pool := poolDir(t)
			s, p := openPool(t, pool)
			v := create(t, p, Spec{Name: "v", Size: size})
			dir := filepath.Join(pool, volumesDir, "v")
			roottest.Run(t, "cp", "--sparse=never", filepath.Join(dir, imageFile), filepath.Join(dir, whole))
			roottest.Run(t, "cp", filepath.Join(dir, recordFile), filepath.Join(dir, whole+".json"))
			again := func() {
				s.Close()
				s, p = openPool(t, pool)
			}
			if c.restart {
				s.Close()
			}
			err := c.damage(dir)
			if c.restart {
				s, p = openPool(t, pool)
			}
			if err != nil {
				t.Fatal(err)
			}
			h := p.VolumeHealth(ctx, v.ID)
			if len(h) != 1 || h[0].Reason != c.reason || !strings.Contains(h[0].Action, c.says) || !strings.Contains(h[0].String(), c.says) {
				t.Fatalf("health: %v, want %s and %q", h, c.reason, c.says)
			}
			if err := c.mend(dir); err != nil {
				t.Fatal(err)
			}
			if c.restart {
				if h := p.VolumeHealth(ctx, v.ID); len(h) != 1 {
					t.Errorf("mended without the restart that is asked for: %v", h)
				}
				again()
			}
			if h := p.VolumeHealth(ctx, v.ID); len(h) > 0 {
				t.Errorf("health after what it says: %v", h)
			}
			if f, err := p.OpenImage(ctx, v.ID, false); err != nil {
				t.Error(err)
			} else {
				f.Close()
			}
		})
	}
}

// movedTo is where moveAndLink put an image.
func movedTo(dir string) string {
	return filepath.Join(filepath.Dir(filepath.Dir(dir)), "elsewhere-"+filepath.Base(dir)+imageFile)
}
