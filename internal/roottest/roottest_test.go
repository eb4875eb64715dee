package roottest

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestMain(m *testing.M) { Main(m) }

func TestPoolIsMountedAndGoesAway(t *testing.T) {
	for fsType, size := range map[string]int64{"ext4": 64 << 20, "xfs": 320 << 20, "btrfs": 128 << 20} {
		t.Run(fsType, func(t *testing.T) {
			var dir string
			t.Run("inner", func(t *testing.T) {
				dir = Pool(t, fsType, size)
				if err := os.WriteFile(filepath.Join(dir, "x"), []byte("x"), 0o600); err != nil {
					t.Fatal(err)
				}
				if got := mounts(filepath.Dir(dir)); len(got) != 1 {
					t.Errorf("mounts = %v, want one", got)
				}
			})
			if dir == "" {
				t.Skip("not root")
			}
			if got := mounts(filepath.Dir(dir)); len(got) != 0 {
				t.Errorf("left: %v", got)
			}
		})
	}
}

func TestLeftoversAreSeen(t *testing.T) {
	before := descriptors()
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if descriptors()[f.Name()] != before[f.Name()]+1 {
		t.Errorf("an open file is not seen: %v", descriptors())
	}
}

func TestBoundDeviceIsSeen(t *testing.T) {
	Require(t)
	dir := t.TempDir()
	image := filepath.Join(dir, "f")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	node := Losetup(t, image)
	defer func() {
		Run(t, "losetup", "-d", node)
		WaitUnbound(t, dir)
	}()
	got := Loops(dir)
	if len(got) != 1 {
		t.Errorf("Loops = %v, want one", got)
	}
	f, err := os.Open(node)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	who := holders(got)
	ours := func(w string) bool { return strings.HasPrefix(w, strconv.Itoa(os.Getpid())+" ") }
	if len(who) < 2 || !strings.HasSuffix(who[0], "has no autoclear") || !slices.ContainsFunc(who, ours) {
		t.Errorf("holders = %q, want no autoclear and this process", who)
	}
}
