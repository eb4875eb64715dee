package image

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

func TestMappedFiles(t *testing.T) {
	root := t.TempDir()
	allowed := filepath.Join(root, "allowed")
	path := func(name string) string { return filepath.Join(allowed, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(path("sub/dir"), 0o755))
	for _, f := range []string{path("ok.img"), path("sub/dir/deep.img"), path("linked"), filepath.Join(root, "secret"), filepath.Join(root, "outside")} {
		must(os.WriteFile(f, []byte("content"), 0o600))
	}
	must(os.Symlink(filepath.Join(root, "secret"), path("symlink")))
	must(os.Symlink("ok.img", path("inner-symlink")))
	must(os.Symlink(root, path("dirlink")))
	must(os.Link(filepath.Join(root, "outside"), path("hardlink")))
	must(syscall.Mkfifo(path("fifo"), 0o600))
	must(os.Symlink(allowed, filepath.Join(root, "allowed-too")))
	d, err := OpenDirs([]string{allowed + "/"})
	must(err)

	for _, name := range []string{"ok.img", "sub/dir/deep.img"} {
		for _, readOnly := range []bool{true, false} {
			f, err := d.Open(path(name), readOnly)
			must(err)
			if _, err := f.WriteString("x"); (err != nil) != readOnly {
				t.Errorf("write with read-only %v: %v", readOnly, err)
			}
			must(f.Close())
		}
	}
	for _, p := range []string{
		path("symlink"), path("inner-symlink"), path("dirlink/secret"), path("hardlink"), path("fifo"), path("sub"), path("absent"),
		allowed, allowed + "/", allowed + "/../secret", allowed + "/./ok.img", allowed + "//ok.img", filepath.Join(root, "secret"),
		filepath.Join(root, "allowed-too", "ok.img"), allowed + "x", "ok.img", "", "/", "/dev/null", path("ok.img\x00x"), allowed + "/ok.img/",
		path("sub/dir/deep.img/x"), "/proc/self/exe",
	} {
		f, err := d.Open(p, true)
		if err == nil {
			f.Close()
		}
		if !errors.Is(err, ErrNotAllowed) {
			t.Errorf("Open(%q): %v", p, err)
		}
	}
	if _, err := d.Open(path("absent"), true); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
	none, err := OpenDirs(nil)
	must(err)
	if _, err := none.Open(path("ok.img"), true); !errors.Is(err, ErrNotAllowed) {
		t.Errorf("with nothing allowed: %v", err)
	}
}

func TestDirectoriesThatCannotBeAllowed(t *testing.T) {
	dir := poolDir(t)
	_, p := openPool(t, dir)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(filepath.Join(dir, volumesDir), link); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"", "/", "relative", file, "/nonexistent", dir, filepath.Dir(dir), filepath.Join(dir, volumesDir), link} {
		if _, err := OpenDirs([]string{d}, p); !errors.Is(err, ErrNotAllowed) {
			t.Errorf("OpenDirs(%q): %v", d, err)
		}
	}
}
