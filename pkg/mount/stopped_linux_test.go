package mount

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// A filesystem that takes no more writes after an error is read-only, in whatever words
// the kernel says so: "ro" before Linux 6.14, "rw" with "emergency_ro" since.
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
	if err != nil || !after.ReadOnly {
		t.Errorf("At: %+v, %v", after, err)
	}
	all, err := m.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range all {
		if one.Path == dir && !one.ReadOnly {
			t.Errorf("List: %+v", one)
		}
	}
}
