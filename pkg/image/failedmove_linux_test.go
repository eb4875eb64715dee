package image

import (
	"context"
	"os"
	"path/filepath"
	"testing"
)

// TestFailedMoveChangesNothing: a move that ends with an error leaves the file as it was,
// however far it came.
func TestFailedMoveChangesNothing(t *testing.T) {
	for _, at := range []string{"import: content is there", "import: content taken in", "import: record synced"} {
		t.Run(at, func(t *testing.T) {
			dir := poolDir(t)
			call, cancel := context.WithCancel(ctx)
			defer cancel()
			_, p := openPool(t, dir, withKill(func(point string) {
				if point == at {
					cancel()
				}
			}))
			path := filepath.Join(filepath.Dir(dir), "a.img")
			content := make([]byte, MiB)
			copy(content, "content")
			if err := os.WriteFile(path, content, 0o640); err != nil {
				t.Fatal(err)
			}
			if os.Geteuid() == 0 {
				if err := os.Chown(path, 1234, 1234); err != nil {
					t.Fatal(err)
				}
			}
			t.Cleanup(func() { _ = os.Remove(path) })
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			before, err := statFile(f)
			if err != nil {
				t.Fatal(err)
			}
			c := FileContent{File: f, Path: path, Length: MiB, Method: Move}
			_, err = p.Import(call, Spec{Name: "v", Size: 16 * MiB, Allocation: Thin}, c)
			wantError(t, err, context.Canceled)
			after, err := statFile(f)
			if err != nil {
				t.Fatal(err)
			}
			before.Allocated, after.Allocated = 0, 0
			if after != before {
				t.Errorf("the file is %+v, was %+v", after, before)
			}
			v, err := p.Import(ctx, Spec{Name: "v", Size: 16 * MiB, Allocation: Thin}, c)
			if err != nil || v.Size != 16*MiB {
				t.Errorf("repeated: %+v, %v", v, err)
			}
		})
	}
}

// TestRestoreLeavesWhatIsNotOurs: a move that did not come as far as to link the file undoes
// nothing, also when somebody wrote to the file meanwhile.
func TestRestoreLeavesWhatIsNotOurs(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	before, err := statFile(f)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("more"); err != nil {
		t.Fatal(err)
	}
	b := building{content: &FileContent{File: f, Path: f.Name(), Method: Move}, before: before}
	if err := b.restore(); err != nil {
		t.Fatal(err)
	}
	if after, err := statFile(f); err != nil || after.Size != 4 {
		t.Errorf("it has %d bytes, %v", after.Size, err)
	}
}

// TestMuchIsSaid: what a program says is kept to a bound, and it is not kept from saying it.
func TestMuchIsSaid(t *testing.T) {
	out, err := command(ctx, nil, "/bin/sh", []string{"-c", "echo first; head -c 50000000 /dev/zero && echo last >&2 && exit 3"})
	if err == nil || len(out) != mostKept || out[:6] != "first\n" {
		t.Errorf("%d bytes, %v", len(out), err)
	}
}
