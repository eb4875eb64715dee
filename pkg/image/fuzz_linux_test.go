package image

import (
	"encoding/binary"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzExtents: whatever a filesystem says of a file's extents, the search for holes
// ends, and what it finds lies in the file.
func FuzzExtents(f *testing.F) {
	extent := func(logical, length uint64, flags uint32) []byte {
		b := binary.LittleEndian.AppendUint64(nil, logical)
		return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint64(b, length), flags)
	}
	f.Add(int64(0), MiB, append(extent(0, 4096, 0), extent(8192, uint64(MiB)-8192, 1)...))
	f.Add(int64(4096), MiB, extent(0, math.MaxUint64, 0))
	f.Add(int64(4096), MiB, extent(0, 4096, 0))
	f.Add(int64(0), int64(math.MaxInt64), extent(1, math.MaxUint64, 1))
	f.Fuzz(func(t *testing.T, from, size int64, script []byte) {
		if from < 0 || size < from {
			return // callers do not
		}
		start, end, err := holeIn(from, size, func(m *fiemap) error {
			if len(script) == 0 {
				return unix.EOPNOTSUPP
			}
			m.mapped = uint32(script[0]) * 2 // also more than there is room for
			script = script[1:]
			for i := range m.extents {
				if len(script) < 20 {
					break
				}
				e := &m.extents[i]
				e.logical, e.length = binary.LittleEndian.Uint64(script), binary.LittleEndian.Uint64(script[8:])
				e.flags = binary.LittleEndian.Uint32(script[16:])
				script = script[20:]
			}
			return nil
		})
		if err == nil && (start < from || start > end || end > size) {
			t.Errorf("hole from %d to %d in a search from %d to %d", start, end, from, size)
		}
	})
}

// FuzzMappedPath: no path leads out of the allowed directory, or to what is not a
// file of one name.
func FuzzMappedPath(f *testing.F) {
	for _, s := range []string{"/a.img", "/sub/b.img", "/../secret", "/link", "/sub/../../secret", "//a.img", "/loop/loop/a.img", "/hard", "/fifo", "/sub", "", "\x00"} {
		f.Add(s, true)
	}
	f.Fuzz(func(t *testing.T, rest string, absolute bool) {
		root := t.TempDir()
		allowed := filepath.Join(root, "allowed")
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		must(os.MkdirAll(filepath.Join(allowed, "sub"), 0o700))
		must(os.WriteFile(filepath.Join(allowed, "a.img"), []byte("mine"), 0o600))
		must(os.WriteFile(filepath.Join(allowed, "sub", "b.img"), []byte("mine"), 0o600))
		must(os.WriteFile(filepath.Join(root, "secret"), []byte("secret"), 0o600))
		must(os.Link(filepath.Join(root, "secret"), filepath.Join(allowed, "hard")))
		must(os.Symlink("../secret", filepath.Join(allowed, "link")))
		must(os.Symlink(".", filepath.Join(allowed, "loop")))
		must(unix.Mkfifo(filepath.Join(allowed, "fifo"), 0o600))
		dirs, err := OpenDirs([]string{allowed})
		must(err)
		path := rest
		if absolute {
			path = allowed + rest
		}
		file, err := dirs.Open(path, true)
		if err != nil {
			if !errors.Is(err, ErrNotAllowed) {
				t.Errorf("%q: %v", path, err)
			}
			return
		}
		defer file.Close()
		content, err := io.ReadAll(file)
		if err != nil || string(content) != "mine" || !strings.HasPrefix(path, allowed+"/") {
			t.Errorf("%q opened a file with %q, %v", path, content, err)
		}
	})
}
