package image

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// noCowFile is a name for files on btrfs that can be moved into a pool.
const noCowFile = "nocow.img"

// foreign makes a file beside the pool, on its filesystem: zeros, data from 1 MiB on, and
// an odd end. The data begins with mark.
func foreign(t *testing.T, dir, name, mark string) (path string, f *os.File) {
	t.Helper()
	path = filepath.Join(filepath.Dir(dir), name)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.Close()
		_ = os.Remove(path)
	})
	if name == noCowFile {
		roottest.Run(t, "chattr", "+C", path)
	}
	if _, err := f.WriteAt(append([]byte(mark), bytes.Repeat([]byte("foreign!"), 1<<17)...), MiB); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(5*MiB+512), f.Sync()); err != nil {
		t.Fatal(err)
	}
	return path, f
}

func contentOf(path string, f *os.File, method Method) FileContent {
	st, _ := f.Stat()
	return FileContent{File: f, Path: path, Length: st.Size(), Method: method}
}

// image reads a whole image.
func imageBytes(t *testing.T, p *Pool, id string) []byte {
	t.Helper()
	f, err := p.OpenImage(ctx, id, true)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 6*MiB)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestImport takes a file in by each method, on each filesystem, thick and thin.
func TestImport(t *testing.T) {
	onEach(t, 512*MiB, func(t *testing.T, fsType, dir string) {
		outer := t
		s, p := openPool(t, dir)
		for _, alloc := range []Allocation{Thick, Thin} {
			for _, method := range []Method{Auto, Copy, Reflink, Move} {
				t.Run(string(alloc)+" by "+string(method), func(t *testing.T) {
					path, f := foreign(t, dir, "old.img", "x")
					want, err := os.ReadFile(path)
					if err != nil {
						t.Fatal(err)
					}
					want = append(want, make([]byte, 6*MiB-int64(len(want)))...)
					v, err := p.Import(ctx, Spec{Name: "taken-in", Size: 6 * MiB, Allocation: alloc}, contentOf(path, f, method))
					cannot := fsType == "ext4" && method == Reflink || fsType == "btrfs" && (method == Reflink || method == Move)
					if cannot {
						if !errors.Is(err, ErrContent) && !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "copy") {
							t.Errorf("error is %v", err)
						}
						wantClean(t, dir)
						wantAccount(t, s, p)
						if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want[:len(got)]) || int64(len(got)) != 5*MiB+512 {
							t.Errorf("the file was changed: %v", err)
						}
						return
					}
					if err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(imageBytes(t, p, v.ID), want) {
						t.Error("the content is another")
					}
					if alloc == Thick {
						wantWhole(t, p, v.ID)
						wantAlone(t, p, v)
					}
					if _, err := os.Stat(path); (err == nil) == (method == Move) {
						t.Errorf("the file: %v", err)
					}
					wantAccount(t, s, p)
					again, err := p.Import(ctx, Spec{Name: "taken-in", Size: 6 * MiB, Allocation: alloc}, contentOf(path, f, method))
					if err != nil || again.ID != v.ID {
						t.Errorf("once more: %+v, %v", again, err)
					}
					// The next start knows the volume as well, and what it shares.
					if err := s.Close(); err != nil {
						t.Fatal(err)
					}
					s, p = openPool(outer, dir)
					wantAccount(t, s, p)
					if err := p.Remove(ctx, v.ID); err != nil {
						t.Fatal(err)
					}
					wantClean(t, dir)
				})
			}
		}
	})
}

func TestImportOfARange(t *testing.T) {
	onEach(t, 512*MiB, func(t *testing.T, _, dir string) {
		s, p := openPool(t, dir)
		path, f := foreign(t, dir, "disk.img", "")
		c := FileContent{File: f, Path: path, Offset: MiB, Length: 512 << 10, Method: Auto}
		v, err := p.Import(ctx, Spec{Name: "part", Size: 6 * MiB, Allocation: Thin}, c)
		if err != nil {
			t.Fatal(err)
		}
		if got := imageBytes(t, p, v.ID); !bytes.Equal(got[:512<<10], bytes.Repeat([]byte("foreign!"), 1<<16)) || len(bytes.Trim(got[512<<10:], "\x00")) > 0 {
			t.Error("the content is another")
		}
		for name, c := range map[string]FileContent{
			"beyond the end":     {File: f, Path: path, Offset: 5 * MiB, Length: MiB, Method: Copy},
			"nothing":            {File: f, Path: path, Offset: MiB, Method: Copy},
			"part, moved":        {File: f, Path: path, Length: MiB, Method: Move},
			"relative path":      {File: f, Path: "disk.img", Length: MiB, Method: Copy},
			"no method":          {File: f, Path: path, Length: MiB},
			"reflink of a shred": {File: f, Path: path, Offset: 512, Length: 512, Method: Reflink},
		} {
			if _, err := p.Import(ctx, Spec{Name: "bad", Size: 6 * MiB, Allocation: Thin}, c); err == nil || !errors.Is(err, ErrContent) && !errors.Is(err, ErrUnsupported) && !errors.As(err, new(*SpecError)) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if _, err := p.Import(ctx, Spec{Name: "part", Size: 7 * MiB, Allocation: Thin}, c); !errors.Is(err, ErrIncompatible) {
			t.Errorf("another size: %v", err)
		}
		if _, err := p.Import(ctx, Spec{Name: "small", Size: MiB}, contentOf(path, f, Copy)); !errors.Is(err, ErrSize) {
			t.Errorf("too small: %v", err)
		}
		if _, err := p.Import(ctx, Spec{Name: "large", Size: 1 << 40}, contentOf(path, f, Copy)); !errors.Is(err, ErrNoSpace) {
			t.Errorf("too large: %v", err)
		}
		over, cancel := context.WithCancel(ctx)
		c.Method, c.Progress = Copy, func(int64, int64) { cancel() }
		c.Offset, c.Length = 0, 5*MiB
		if _, err := p.Import(over, Spec{Name: "ended", Size: 6 * MiB}, c); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
		c.Progress = func(int64, int64) { _ = os.Chtimes(path, time.Now(), time.Now().Add(time.Hour)) }
		if _, err := p.Import(ctx, Spec{Name: "written", Size: 6 * MiB}, c); !errors.Is(err, ErrContent) {
			t.Errorf("written to meanwhile: %v", err)
		}
		wantClean(t, dir)
		wantAccount(t, s, p)
		if n := len(s.List()); n != 1 {
			t.Errorf("%d volumes", n)
		}
	})
}

// TestImportCrash stops after each step: the file has its name and content, or the volume
// has them, and the same call completes it.
func TestImportCrash(t *testing.T) {
	onEach(t, 512*MiB, func(t *testing.T, fsType, dir string) {
		for _, method := range []Method{Copy, Reflink, Move} {
			if method == Reflink && fsType == "ext4" {
				continue
			}
			crashes := 0
			for at := 1; ; at++ {
				name := "old.img"
				if fsType == "btrfs" {
					name = noCowFile
				}
				path, f := foreign(t, dir, name, "x")
				want, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				count, where, armed := 0, "", true
				s, p, err := tryOpen(dir, withKill(func(point string) {
					if strings.HasPrefix(point, "import") || strings.HasPrefix(point, "create") {
						if count++; armed && count == at {
							where = point
							panic(errCrash)
						}
					}
				}))
				if err != nil {
					t.Fatal(err)
				}
				crash(func() {
					_, err = p.Import(ctx, Spec{Name: "v", Size: 6 * MiB, Allocation: Thin}, contentOf(path, f, method))
				})
				if err != nil {
					t.Fatal(err)
				}
				armed = false
				runtime.GC() // a process that crashes keeps no descriptors
				runtime.GC()
				if where == "" {
					if err := errors.Join(p.Remove(ctx, VolumeID(p.ID(), "v")), s.Close()); err != nil {
						t.Fatal(err)
					}
					f.Close()
					_ = os.Remove(path)
					break
				}
				crashes++
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				if s, p, err = tryOpen(dir); err != nil {
					t.Fatal(err)
				}
				wantClean(t, dir)
				got, err := os.ReadFile(path)
				if err == nil && !bytes.HasPrefix(got, want) {
					t.Errorf("%s at %q: the file has another content", method, where)
				}
				if _, there := s.Find("v"); err != nil && !there {
					t.Errorf("%s at %q: neither the file nor the volume is there: %v", method, where, err)
				}
				v, err := p.Import(ctx, Spec{Name: "v", Size: 6 * MiB, Allocation: Thin}, contentOf(path, f, method))
				if err != nil {
					t.Fatalf("%s at %q: once more: %v", method, where, err)
				}
				if !bytes.HasPrefix(imageBytes(t, p, v.ID), want) {
					t.Errorf("%s at %q: the volume has another content", method, where)
				}
				wantAccount(t, s, p)
				if err := errors.Join(p.Remove(ctx, v.ID), s.Close()); err != nil {
					t.Fatal(err)
				}
				f.Close()
				_ = os.Remove(path)
			}
			if crashes < 4 {
				t.Errorf("%s: only %d crashes", method, crashes)
			}
		}
	})
}

// crash runs f until it panics on purpose.
func crash(f func()) {
	defer func() {
		if r := recover(); r != nil && r != errCrash { //nolint:errorlint // a recovered value
			panic(r)
		}
	}()
	f()
}

// TestTemplates makes volumes of a template on each filesystem.
func TestTemplates(t *testing.T) {
	onEach(t, 1024*MiB, func(t *testing.T, fsType, dir string) {
		s, p := openPool(t, dir)
		path := filepath.Join(filepath.Dir(dir), "golden.img")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer os.Remove(path)
		defer f.Close()
		if err := f.Truncate(64 * MiB); err != nil {
			t.Fatal(err)
		}
		content := t.TempDir()
		if err := os.WriteFile(filepath.Join(content, "data"), bytes.Repeat([]byte("golden.."), 1<<19), 0o600); err != nil {
			t.Fatal(err)
		}
		roottest.Run(t, "mkfs.ext4", "-q", "-F", "-b", "4096", "-d", content, path)
		spec := TemplateSpec{Name: "golden", Size: 64 * MiB, Filesystem: "ext4", BlockSize: 4096}
		for range 2 {
			if _, err := p.AddTemplate(ctx, spec, contentOf(path, f, Auto)); err != nil {
				t.Fatal(err)
			}
		}
		other := spec
		other.Size = 65 * MiB
		if _, err := p.AddTemplate(ctx, other, contentOf(path, f, Auto)); !errors.Is(err, ErrIncompatible) {
			t.Errorf("another one of the name: %v", err)
		}
		if _, err := p.AddTemplate(ctx, TemplateSpec{Name: "Not-A-Name", Size: MiB, BlockSize: 512}, contentOf(path, f, Auto)); !errors.As(err, new(*SpecError)) {
			t.Errorf("a bad name: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s, p = openPool(t, dir)
		if all := p.Templates(); len(all) != 1 || all[0].TemplateSpec != spec || all[0].Source != path {
			t.Fatalf("%+v", all)
		}
		source := &Source{Template: VolumeID(p.ID(), "golden")}
		var made []Volume
		for _, c := range []Spec{
			{Name: "thin", Size: 64 * MiB, Allocation: Thin},
			{Name: "thick", Size: 64 * MiB, Allocation: Thick},
			{Name: "larger", Size: 128 * MiB, Allocation: Thin},
		} {
			c.Filesystem, c.Source = "ext4", source
			v, err := p.Create(ctx, c)
			if err != nil {
				t.Fatal(err)
			}
			if v.Allocation == Thick {
				wantWhole(t, p, v.ID)
				wantAlone(t, p, v)
			} else if got := sharedBytes(t, p, DirName(v.Name), v.Size) > 0; got != (fsType != "ext4") {
				t.Errorf("%s shares blocks: %v", v.Name, got)
			}
			made = append(made, v)
		}
		wantAccount(t, s, p)
		if err := p.RemoveTemplate(ctx, "golden"); err != nil {
			t.Fatal(err)
		}
		if err := p.RemoveTemplate(ctx, "golden"); !errors.Is(err, ErrNotFound) {
			t.Errorf("removed again: %v", err)
		}
		if _, err := p.Create(ctx, Spec{Name: "late", Size: 64 * MiB, Filesystem: "ext4", Source: source}); !errors.Is(err, ErrNotFound) {
			t.Errorf("made of what is gone: %v", err)
		}
		for _, v := range made {
			mounted(t, p, v, func(at string) {
				if err := os.WriteFile(filepath.Join(at, "own"), []byte("x"), 0o600); err != nil {
					t.Error(err)
				}
			})
		}
		wantAccount(t, s, p)
		wantClean(t, dir)
	})
}
