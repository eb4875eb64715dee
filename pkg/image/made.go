package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
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
// a program says it made: mkfs.btrfs does not mind when it cannot write the superblock.
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

// extSum looks whether the superblock of an ext filesystem has the checksum that it says
// it has: tune2fs and resize2fs do not mind either when they cannot write it.
func extSum(f io.ReaderAt, filesystem string) error {
	const sums, at = 0x400, 0x3fc // metadata_csum, and where the superblock's own is
	sb := make([]byte, 1024)
	if _, err := f.ReadAt(sb, 1024); err != nil {
		return fmt.Errorf("read the superblock of a new %s: %w", filesystem, err)
	}
	if want := crc32c(math.MaxUint32, sb[:at]); le32(sb[0x64:])&sums != 0 && le32(sb[at:]) != want {
		return fmt.Errorf("there is no whole %s: its superblock has the checksum %08x, want %08x", filesystem, le32(sb[at:]), want)
	}
	return nil
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
	if strings.HasPrefix(filesystem, "ext") {
		return extSum(f, filesystem)
	}
	return nil
}
