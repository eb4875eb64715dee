package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// another makes the file at path another one of the same size, as who builds an image
// again does, and opens it.
func another(t *testing.T, path, mark string) *os.File {
	t.Helper()
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteAt([]byte(mark), MiB); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(5*MiB+512), f.Sync()); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestTakenInAgain repeats what was done: nothing but the same bytes of the same file is
// success, before and after a restart.
func TestTakenInAgain(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	path, f := foreign(t, dir, "golden.img", "old")
	spec := TemplateSpec{Name: "golden", Size: 6 * MiB, BlockSize: 512}
	add := func(c FileContent) error { _, err := p.AddTemplate(ctx, spec, c); return err }
	take := func(c FileContent) error {
		_, err := p.Import(ctx, Spec{Name: "v", Size: 6 * MiB, Allocation: Thin}, c)
		return err
	}
	part := func(f *os.File, offset, length int64) FileContent {
		c := contentOf(path, f, Copy)
		c.Offset, c.Length = offset, length
		return c
	}
	both := func(c FileContent, check func(what string, err error)) {
		t.Helper()
		check("template", add(c))
		check("volume", take(c))
	}
	same := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("the same %s again: %v", what, err)
		}
	}
	differs := func(says string) func(string, error) {
		return func(what string, err error) {
			t.Helper()
			wantError(t, err, ErrIncompatible, says, path, "another name", "remove the "+what)
		}
	}
	both(part(f, MiB, MiB), same)
	both(part(f, MiB, MiB), same)
	both(part(f, 2*MiB, MiB), differs("1048576 bytes from byte 1048576 on, asked for 1048576 from byte 2097152 on"))
	both(part(f, MiB, 2*MiB), differs("asked for 2097152 from byte 1048576 on"))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, p = openPool(t, dir)
	both(part(f, MiB, MiB), same)

	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("new"), MiB); err != nil {
		t.Fatal(err)
	}
	both(part(f, MiB, MiB), differs("written to since (modified "))
	if err := os.Chtimes(path, time.Now(), st.ModTime()); err != nil { // as builds that can be reproduced do
		t.Fatal(err)
	}
	both(part(f, MiB, MiB), differs("since (changed "))
	if err := os.Rename(path, path+".old"); err != nil { // its inode is not given away
		t.Fatal(err)
	}
	defer os.Remove(path + ".old")
	rebuilt := another(t, path, "rebuilt")
	both(part(rebuilt, MiB, MiB), differs("another one than then (inode "))

	if err := p.RemoveTemplate(ctx, "golden"); err != nil {
		t.Fatal(err)
	}
	same("template", add(part(rebuilt, MiB, MiB)))
	got, err := os.ReadFile(filepath.Join(dir, templatesDir, "golden", imageFile))
	if err != nil || !bytes.HasPrefix(got, []byte("rebuilt")) {
		t.Errorf("the template begins with %q, %v", got[:min(8, len(got))], err)
	}
	wantClean(t, dir)
	wantAccount(t, s, p)
}

// TestMovedAgain: a file that was moved is gone, or is the image that it became. What
// lies at its path later is another one.
func TestMovedAgain(t *testing.T) {
	dir := poolDir(t)
	_, p := openPool(t, dir)
	path, f := foreign(t, dir, "old.img", "old")
	move := func(f *os.File) error {
		_, err := p.Import(ctx, Spec{Name: "v", Size: 6 * MiB, Allocation: Thin}, contentOf(path, f, Move))
		return err
	}
	if err := move(f); err != nil {
		t.Fatal(err)
	}
	// Its name is back, as after a crash before it was removed; the file is longer.
	if err := os.Link(filepath.Join(dir, volumesDir, "v", imageFile), path); err != nil {
		t.Fatal(err)
	}
	if err := move(f); err != nil {
		t.Errorf("completed: %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the old name: %v", err)
	}
	wantError(t, move(another(t, path, "another")), ErrIncompatible, "another one", "remove the volume")
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the other file: %v", err)
	}
	wantClean(t, dir)
}

// TestTakenInBefore: records of an older csi-loop do not say what was taken in, and are
// compared by path and size as they were.
func TestTakenInBefore(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	path, f := foreign(t, dir, "golden.img", "old")
	spec := TemplateSpec{Name: "golden", Size: 6 * MiB, BlockSize: 512}
	volume := Spec{Name: "v", Size: 6 * MiB, Allocation: Thin}
	if _, err := p.AddTemplate(ctx, spec, contentOf(path, f, Copy)); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Import(ctx, volume, contentOf(path, f, Copy)); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"templates/golden/template.json", "volumes/v/volume.json"} {
		file = filepath.Join(dir, file)
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var r map[string]any
		if err := json.Unmarshal(b, &r); err != nil {
			t.Fatal(err)
		}
		from := r
		if source, ok := r["source"].(map[string]any); ok {
			from = source
		}
		if _, ok := from["taken"]; !ok {
			t.Fatalf("%s does not say what was taken in: %s", file, b)
		}
		delete(from, "taken")
		b, err = json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, p = openPool(t, dir)
	rebuilt := another(t, path, "rebuilt")
	if _, err := p.AddTemplate(ctx, spec, contentOf(path, rebuilt, Copy)); err != nil {
		t.Errorf("template: %v", err)
	}
	if _, err := p.Import(ctx, volume, contentOf(path, rebuilt, Copy)); err != nil {
		t.Errorf("volume: %v", err)
	}
}

// TestMoveFromAnotherMount: it cannot be, and the error says what can.
func TestMoveFromAnotherMount(t *testing.T) {
	onEach(t, 512*MiB, func(t *testing.T, fsType, dir string) {
		_, p := openPool(t, dir)
		at := t.TempDir() // the pool's filesystem, mounted once more
		if err := unix.Mount(filepath.Dir(dir), at, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := unix.Unmount(at, 0); err != nil {
				t.Error(err)
			}
		}()
		name := "old.img"
		if fsType == "btrfs" {
			name = noCowFile
		}
		_, first := foreign(t, dir, name, "x")
		first.Close()
		path := filepath.Join(at, name)
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = p.Import(ctx, Spec{Name: "v", Size: 6 * MiB, Allocation: Thin}, contentOf(path, f, Move))
		wantError(t, err, ErrContent, "another mount", "use copy", filepath.Join(dir, Incoming))
		f.Close()
		wantClean(t, dir)
		// Where the error says it works, it does.
		incoming := filepath.Join(dir, Incoming)
		if err := errors.Join(os.Mkdir(incoming, 0o700), os.Rename(filepath.Join(filepath.Dir(dir), name), filepath.Join(incoming, name))); err != nil {
			t.Fatal(err)
		}
		path = filepath.Join(incoming, name)
		if f, err = os.OpenFile(path, os.O_RDWR, 0); err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := p.Import(ctx, Spec{Name: "v", Size: 6 * MiB, Allocation: Thin}, contentOf(path, f, Move)); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the file: %v", err)
		}
	})
}

func TestTakenRecord(t *testing.T) {
	good := Taken{Length: MiB, Inode: 1, Modified: "2026-01-02T03:04:05.000000006Z", Changed: "2026-01-02T03:04:05Z"}
	for name, c := range map[string]struct {
		s  Source
		ok bool
	}{
		"older csi-loop":  {Source{File: "/a"}, true},
		"all of it":       {Source{File: "/a", Taken: good}, true},
		"of no file":      {Source{Snapshot: "aaaaaaaaaaaaaaaaaaaa.a", Taken: good}, false},
		"alone":           {Source{Taken: good}, false},
		"no length":       {Source{File: "/a", Taken: Taken{Inode: 1, Modified: good.Modified, Changed: good.Changed}}, false},
		"no times":        {Source{File: "/a", Taken: Taken{Length: 1, Inode: 1}}, false},
		"negative offset": {Source{File: "/a", Taken: Taken{Offset: -1, Length: 1, Modified: "x", Changed: "x"}}, false},
		"a long time":     {Source{File: "/a", Taken: Taken{Length: 1, Modified: strings.Repeat("x", 41), Changed: "x"}}, false},
	} {
		if err := c.s.check(); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}
