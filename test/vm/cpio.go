package main

import (
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
)

// cpioWriter writes the "newc" archive that Linux unpacks into its first root
// file system. The first error sticks and is returned by Close.
type cpioWriter struct {
	w    io.Writer
	err  error
	ino  int
	done map[string]bool
}

func newCPIO(w io.Writer) *cpioWriter {
	return &cpioWriter{w: w, done: map[string]bool{}}
}

// Kinds of files in the mode field, from stat(2).
const (
	modeDir  = 0o040000
	modeFile = 0o100000
	modeLink = 0o120000
)

// File adds a regular file and the directories above it.
func (c *cpioWriter) File(name string, perm fs.FileMode, data []byte) {
	c.parents(name)
	c.entry(name, modeFile|uint32(perm.Perm()), data)
}

// Link adds a symbolic link and the directories above it.
func (c *cpioWriter) Link(name, target string) {
	c.parents(name)
	c.entry(name, modeLink|0o777, []byte(target))
}

// Dir adds a directory and those above it; a second time is no error.
func (c *cpioWriter) Dir(name string) {
	name = clean(name)
	if name == "" || c.done[name] {
		return
	}
	c.parents(name)
	c.entry(name, modeDir|0o755, nil)
}

// Has reports whether something was added under that name.
func (c *cpioWriter) Has(name string) bool { return c.done[clean(name)] }

// Close writes the end of the archive and returns the first error of all.
func (c *cpioWriter) Close() error {
	c.entry("TRAILER!!!", 0, nil)
	return c.err
}

func (c *cpioWriter) parents(name string) {
	if dir := path.Dir(clean(name)); dir != "." {
		c.Dir(dir)
	}
}

func (c *cpioWriter) entry(name string, mode uint32, data []byte) {
	name = clean(name)
	if c.done[name] {
		c.fail(fmt.Errorf("cpio: %s twice", name))
		return
	}
	c.done[name] = true
	c.ino++
	links := 1
	if mode&modeDir != 0 && mode&modeFile != modeFile {
		links = 2
	}
	// Magic, inode, mode, uid, gid, links, mtime, size, four device numbers, name size, check sum.
	header := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		c.ino, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	c.padded([]byte(header + name + "\x00"))
	c.padded(data)
}

// padded writes b and fills up to a multiple of four; every field begins at one.
func (c *cpioWriter) padded(b []byte) {
	if c.err != nil {
		return
	}
	if _, err := c.w.Write(b); err != nil {
		c.fail(err)
		return
	}
	if n := -len(b) & 3; n > 0 {
		_, err := c.w.Write(make([]byte, n))
		c.fail(err)
	}
}

func (c *cpioWriter) fail(err error) {
	if c.err == nil {
		c.err = err
	}
}

func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }
