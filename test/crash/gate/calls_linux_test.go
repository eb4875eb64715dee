package gate

import (
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A path is read as a whole wherever it lies: across two pages, and at the end of the
// last one that there is.
func TestTextInMemory(t *testing.T) {
	const page = 4096
	memory, err := unix.Mmap(-1, 0, 3*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(memory)
	if err := unix.Mprotect(memory[2*page:], unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		at   int
		text string
		want string
	}{
		{"in a page", 100, "/a/b\x00", "/a/b"},
		{"across two pages", page - 3, "/a/b\x00", "/a/b"},
		{"its end behind a page", page - 4, "/a/b\x00", "/a/b"},
		{"at the end of all", 2*page - 5, "/a/b\x00", "/a/b"},
		{"without an end", 2*page - 4, "/a/b", "?"},
		{"a long one", 10, "/" + strings.Repeat("x", 4090) + "\x00", "/" + strings.Repeat("x", 4090)},
		{"no end at all", 0, strings.Repeat("x", 2*page), "?"},
		{"where nothing is", 2 * page, "", "?"},
	} {
		t.Run(c.name, func(t *testing.T) {
			clear(memory[:2*page])
			copy(memory[c.at:2*page], c.text)
			if got := text(unix.Getpid(), uint64(uintptr(unsafe.Pointer(&memory[0])))+uint64(c.at)); got != c.want {
				t.Errorf("got %.20q, %d bytes", got, len(got))
			}
		})
	}
}
