package image

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// withFiles makes files with these contents, which may be programs, and opens dir.
func withFiles(t *testing.T, dir string, contents map[string]string) *os.File {
	t.Helper()
	for path, content := range contents {
		if err := os.WriteFile(path, []byte(content), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	d, err := openPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// TestProgramsOfCopiesAreConfined: in the place of tune2fs is a program that shows what
// it may.
func TestProgramsOfCopiesAreConfined(t *testing.T) {
	roottest.Require(t)
	bin, copies := t.TempDir(), t.TempDir()
	other := filepath.Join(copies, "other")
	dir := withFiles(t, copies, map[string]string{
		filepath.Join(bin, "tune2fs"): "#!/bin/sh\ngrep -E 'CapEff|CapBnd|NoNewPrivs|Seccomp:' /proc/self/status\n" +
			"echo written 1<> $1\nchmod 777 " + other + "\nexit 4\n",
		filepath.Join(copies, imageFile): "", other: "",
	})
	err := newTools([]string{bin}).run(t.Context(), dir, "tune2fs", imageFile)
	if err == nil {
		t.Fatal("its exit status was lost")
	}
	for _, want := range []string{"CapEff: 0000000000000000", "CapBnd: 0000000000000000", "NoNewPrivs: 1", "Seccomp: 2"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %v", want, err)
		}
	}
	if b, err := os.ReadFile(filepath.Join(copies, imageFile)); err != nil || string(b) != "written\n" {
		t.Errorf("the image has %q, %v", b, err)
	}
	if st, err := os.Stat(other); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("the mode of another file: %v, %v", st.Mode(), err)
	}
}

// TestDeviceThatGoesWhileBtrfstuneLooks: like mkfs.btrfs it gives up when a loop device of
// somebody else goes while it looks at all of them, here with an earlier call's error.
func TestDeviceThatGoesWhileBtrfstuneLooks(t *testing.T) {
	bin, copies := t.TempDir(), t.TempDir()
	image := filepath.Join(copies, imageFile)
	dir := withFiles(t, copies, map[string]string{
		filepath.Join(bin, "btrfstune"): "#!/bin/sh\necho x >> $3; [ $(wc -l < $3) -ge 3 ] ||\n" +
			"{ echo ERROR: could not check mount status of $3: Permission denied >&2; exit 1; }\n",
		image: "",
	})
	if err := newTools([]string{bin}).run(t.Context(), dir, "btrfstune", "-f", "-m", imageFile); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(image); err != nil || string(b) != strings.Repeat("x\n", 3) {
		t.Errorf("the runs left %q, %v", b, err)
	}
}
