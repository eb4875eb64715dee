package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// TestMovedThroughLinks: a move that is repeated when the file is gone asks for the file
// that it asked for before, also by a path with symbolic links.
func TestMovedThroughLinks(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(t.TempDir(), "data/a.img")
	for _, err := range []error{
		os.Mkdir(filepath.Dir(file), 0o700),
		os.WriteFile(file, make([]byte, 512), 0o600),
		os.Symlink(filepath.Dir(file), filepath.Join(dir, "srv")),
		os.Symlink("srv/../data/a.img", filepath.Join(dir, "relative.img")),
		os.Symlink(file, filepath.Join(dir, "absolute.img")),
		os.Symlink("circle", filepath.Join(dir, "circle")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	flags := contentFlags{offset: "0", length: "0", size: "0", method: string(image.Move)}
	paths := []string{file, filepath.Join(dir, "srv/a.img"), filepath.Join(dir, "relative.img"), filepath.Join(dir, "absolute.img")}
	asked := make([]string, len(paths))
	for i, path := range paths {
		r, err := flags.request(path)
		if err != nil || r.Ino == 0 {
			t.Fatalf("%s: %+v, %v", path, r, err)
		}
		asked[i] = r.File
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	for i, path := range paths {
		r, err := flags.request(path)
		if err != nil || r.File != asked[i] || r.Ino != 0 {
			t.Errorf("%s: asked for %s, then for %s: %v", path, asked[i], r.File, err)
		}
	}
	if _, err := flags.request(filepath.Join(dir, "circle")); err == nil {
		t.Error("a circle of links is a file")
	}
	for _, lost := range []string{"none/a.img", "none.img"} {
		if r, err := flags.request(filepath.Join(dir, lost)); err != nil || filepath.Base(r.File) != filepath.Base(lost) {
			t.Errorf("%s: %s, %v", lost, r.File, err)
		}
	}
}
