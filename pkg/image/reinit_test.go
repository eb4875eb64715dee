package image

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func free([]ImageFile) error { return nil }

// A copied pool gets an identity of its own; its volumes keep their data, under new
// IDs, and the change can be taken back.
func TestReinit(t *testing.T) {
	t.Parallel()
	dir := poolDir(t)
	s, p := openPool(t, dir)
	v := create(t, p, Spec{Name: "pvc-a", Size: MiB})
	data := fill(t, p, v.ID, 4096, 512)
	old := p.ID()

	seen, err := Summarize(dir)
	if err != nil || !seen.Served || seen.ID != old || seen.Volumes != 1 || seen.Snapshots != 0 || seen.Filesystem == "" || seen.Created.IsZero() {
		t.Fatalf("%+v, %v", seen, err)
	}
	_, _, err = Reinit(t.Context(), dir, free)
	wantError(t, err, ErrPool, "serves it")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if seen, err = Summarize(dir); err != nil || seen.Served {
		t.Fatalf("%+v, %v", seen, err)
	}
	before, id, err := Reinit(t.Context(), dir, func(images []ImageFile) error {
		st, err := os.Stat(filepath.Join(dir, volumesDir, "pvc-a", imageFile))
		if err != nil || len(images) != 1 || images[0].Path != filepath.Join(dir, volumesDir, "pvc-a", imageFile) || st.Size() != MiB {
			t.Errorf("%+v, %v", images, err)
		}
		// While it asks nobody else can serve the pool.
		if _, _, err := tryOpen(dir); err == nil || !strings.Contains(err.Error(), "in use") {
			t.Errorf("opened meanwhile: %v", err)
		}
		return nil
	})
	if err != nil || before.ID != old || id == old {
		t.Fatalf("%+v, %s, %v", before, id, err)
	}
	kept := filepath.Join(dir, identityFile+".old-"+old)
	if st, err := os.Stat(kept); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("the old identity: %v, %v", st, err)
	}
	s, p, err = tryOpen(dir)
	if err != nil {
		t.Fatal(err)
	}
	if p.ID() != id || len(p.Damaged()) != 0 {
		t.Fatalf("%s, %v", p.ID(), p.Damaged())
	}
	if _, err := s.Get(v.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("the old ID still leads here: %v", err)
	}
	f, err := p.OpenImage(context.Background(), VolumeID(id, "pvc-a"), true)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(data))
	_, err = f.ReadAt(got, 4096)
	if f.Close(); err != nil || string(got) != string(data) {
		t.Error("the data is not there", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(kept, filepath.Join(dir, identityFile)); err != nil {
		t.Fatal(err)
	}
	s, _ = openPool(t, dir)
	if _, err := s.Get(v.ID); err != nil {
		t.Error("not taken back", err)
	}
}

// Refusals change nothing.
func TestReinitRefused(t *testing.T) {
	dir := poolDir(t)
	_, _, err := Reinit(t.Context(), dir, free)
	wantError(t, err, ErrPool, "not a pool")
	if left := leftovers(t, dir); len(left) > 0 {
		t.Error(left)
	}
	_, _, err = Reinit(t.Context(), dir+"/none", free)
	wantError(t, err, ErrPool, "no such directory")
	s, p, err := tryOpen(dir)
	if err != nil {
		t.Fatal(err)
	}
	create(t, p, Spec{Name: "a", Size: MiB})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	busy := errors.New("it is attached")
	_, _, err = Reinit(t.Context(), dir, func([]ImageFile) error { return busy })
	wantError(t, err, ErrPool, "attached")
	seen, err := Summarize(dir)
	if err != nil || seen.ID != p.ID() {
		t.Errorf("%+v, %v", seen, err)
	}
	wantClean(t, dir)
	if err := os.WriteFile(filepath.Join(dir, identityFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err = Reinit(t.Context(), dir, free)
	wantError(t, err, ErrPool, identityFile)
	_, err = Summarize(dir)
	wantError(t, err, ErrPool, identityFile)
}

// A crash at any point leaves the old identity or the new one, and the old one is
// never lost.
func TestReinitCrash(t *testing.T) {
	for stop := range 6 {
		dir := poolDir(t)
		s, p, err := tryOpen(dir)
		if err != nil {
			t.Fatal(err)
		}
		old := p.ID()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		crash := errors.New("crash")
		func() {
			defer func() {
				if r := recover(); r != crash { //nolint:errorlint // the very value
					t.Errorf("point %d: %v", stop, r)
				}
			}()
			points := 0
			_, _, _ = reinit(t.Context(), dir, free, func(string) {
				if points == stop {
					panic(crash)
				}
				points++
			})
		}()
		s, p, err = tryOpen(dir)
		if err != nil {
			t.Fatalf("point %d: %v", stop, err)
		}
		_, err = os.Stat(filepath.Join(dir, identityFile+".old-"+old))
		if p.ID() != old && err != nil {
			t.Errorf("point %d: the old identity is lost: %v", stop, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
