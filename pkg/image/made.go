package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
)

// mark is what a superblock has at a place of the image once its filesystem is whole.
type mark struct {
	at    int64
	bytes []byte
}

// extMark is the magic number of the ext family.
var extMark = []mark{{1024 + 56, []byte{0x53, 0xef}}}

// marks are those of each filesystem. While mkfs works, a btrfs has another magic
// number, and an XFS says in its superblock that it is in progress.
var marks = map[string][]mark{
	"ext2": extMark, "ext3": extMark, "ext4": extMark,
	"xfs":   {{0, []byte("XFSB")}, {126, []byte{0}}},
	"btrfs": {{btrfsSuper + 64, []byte(btrfsMagic)}},
}

// checkMade looks whether a file in dir, or at a path if dir is nil, has the filesystem that
// its mkfs says it made: mkfs.btrfs does not mind when it cannot write the superblock.
func checkMade(dir *os.File, file, filesystem string) (err error) {
	var f *os.File
	if dir == nil {
		f, err = os.Open(file)
	} else {
		f, err = openAt(dir, file, false)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return whole(f, filesystem)
}

// whole looks for the marks of a filesystem in an image.
func whole(f io.ReaderAt, filesystem string) error {
	for _, m := range marks[filesystem] {
		b := make([]byte, len(m.bytes))
		if _, err := f.ReadAt(b, m.at); err != nil {
			return fmt.Errorf("read the superblock of a new %s: %w", filesystem, err)
		}
		if !bytes.Equal(b, m.bytes) {
			return fmt.Errorf("there is no whole %s: %x at %d, want %x", filesystem, b, m.at, m.bytes)
		}
	}
	return nil
}
