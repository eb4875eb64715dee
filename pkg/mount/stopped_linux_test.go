package mount

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// A filesystem that takes no more writes after an error is read-only, in whatever words
// the kernel says so: "ro" on older ones, "rw" with "emergency_ro" since Linux 6.14. Those
// between, and older ones with that change (Debian's 6.1.0-56), do not say it at all.
func TestFilesystemThatStoppedIsReadOnly(t *testing.T) {
	roottest.Require(t)
	dir := roottest.Pool(t, "ext4", 64<<20)
	m := New()
	before, ok, err := m.At(dir)
	if err != nil || !ok || before.ReadOnly {
		t.Fatalf("%+v, %v, %v", before, ok, err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "errors=remount-ro"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/sys/fs/ext4/"+filepath.Base(before.Source)+"/trigger_fs_error", []byte("test"), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o600); err == nil {
		t.Fatal("it still takes writes")
	}
	after, _, err := m.At(dir)
	told := slices.Contains(after.SuperOptions, "ro") || slices.Contains(after.SuperOptions, "emergency_ro")
	if err != nil || after.ReadOnly != told {
		t.Errorf("At: %+v, %v", after, err)
	}
	if !told {
		t.Log("this kernel does not tell")
	}
	all, err := m.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range all {
		if one.Path == dir && one.ReadOnly != told {
			t.Errorf("List: %+v", one)
		}
	}
}
