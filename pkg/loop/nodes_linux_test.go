package loop

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// Something else is under the name of the device, in /dev and where nodes of our own
// are: it is neither taken for the device nor changed, and one of our own is used.
func TestWrongNode(t *testing.T) {
	m := realMachine(t)
	content := bytes.Repeat([]byte("other"), 1<<18)
	backing := filepath.Join(m.dir, "other")
	check(t, os.WriteFile(backing, content, 0o600))
	other := roottest.Losetup(t, backing)
	defer func() { roottest.Run(t, "losetup", "-d", other) }()
	var st unix.Stat_t
	check(t, unix.Stat(other, &st))
	mknod := func(kind uint32, device uint64) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			t.Helper()
			check(t, unix.Mknod(path, kind|0o600, int(device)))
		}
	}
	for name, put := range map[string]func(t *testing.T, path string){
		"node of another device":    mknod(unix.S_IFBLK, st.Rdev),
		"node of no driver":         mknod(unix.S_IFBLK, unix.Mkdev(511, 0)),
		"character device (a null)": mknod(unix.S_IFCHR, unix.Mkdev(1, 3)),
		"pipe":                      mknod(unix.S_IFIFO, 0),
		"file": func(t *testing.T, path string) {
			t.Helper()
			check(t, os.WriteFile(path, []byte("x"), 0o600))
		},
		"file, bind mounted over the node": func(t *testing.T, path string) {
			t.Helper()
			check(t, os.WriteFile(path, nil, 0o600))
			check(t, unix.Mount(backing, path, "", unix.MS_BIND, ""))
			t.Cleanup(func() { check(t, unix.Unmount(path, 0)) })
		},
		"directory": func(t *testing.T, path string) { t.Helper(); check(t, os.Mkdir(path, 0o700)) },
		"link to another device": func(t *testing.T, path string) {
			t.Helper()
			check(t, os.Symlink(other, path))
		},
		"link to nothing": func(t *testing.T, path string) {
			t.Helper()
			check(t, os.Symlink("nothing", path))
		},
	} {
		// What is mounted or a directory is not replaced by a rename; only root can put it there.
		replaceable := name != "directory" && !strings.Contains(name, "mounted")
		t.Run(name, func(t *testing.T) {
			dev, nodes := t.TempDir(), t.TempDir()
			manager := must(New(t.Context(), WithDev(dev), WithNodeDir(nodes)))(t)
			t.Cleanup(func() { check(t, manager.Close()) })
			// Any number that is free may be the next one, and others take and free some.
			below := must(manager.kernel.GetFree())(t) + 32
			for n := range below {
				name := fmt.Sprintf("loop%d", n)
				put(t, filepath.Join(dev, name))
				if replaceable {
					_ = os.RemoveAll(filepath.Join(nodes, name)) // New made one
					put(t, filepath.Join(nodes, name))
				}
			}
			f := m.image(t, "a")
			d := m.attach(t, manager, "a", whole)
			if n := d.Info().Number; n >= below {
				t.Errorf("loop%d was taken, and the test covers %d: it shows nothing", n, below)
			}
			if filepath.Dir(d.Path()) != nodes {
				t.Errorf("path %s is not in %s", d.Path(), nodes)
			}
			node, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
			check(t, err)
			check(t, second(node.WriteAt([]byte("ours"), 4096)))
			check(t, errors.Join(node.Sync(), node.Close()))
			m.detach(t, manager, d)
			got := make([]byte, 4)
			check(t, second(f.ReadAt(got, 4096)))
			if string(got) != "ours" {
				t.Errorf("the image has %q", got)
			}
			if b, err := os.ReadFile(backing); err != nil || !bytes.Equal(b, content) {
				t.Errorf("the other device was written to (%v)", err)
			}
		})
	}
}
