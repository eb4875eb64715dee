package image

import (
	"context"
	"errors"
	"io"
	"os"
	"syscall"
)

// extent is a range of a file, in bytes, and where its blocks are.
type extent struct {
	start, end int64
	physical   int64
	vague      bool // physical does not tell all
	unwritten  bool // has blocks and reads as zeros
	shared     bool // another file has the same blocks
}

// sharing is what a file has in common with others, in bytes.
type sharing struct {
	shared int64 // of its blocks, those that others have too
	alone  int64 // those that a reflink would make shared
}

// sharingOf looks at a file's extents. What is not written yet is shared by a
// reflink on btrfs only.
func sharingOf(f *os.File, size int64, unwritten bool) (s sharing, err error) {
	err = extents(f, 0, size, fiemapSync, func(e extent) bool {
		switch n := e.end - e.start; {
		case e.shared:
			s.shared += n
		case !e.unwritten || unwritten:
			s.alone += n
		}
		return true
	})
	return s, err
}

// copyBuffer is how much is copied at a time, in bytes.
const copyBuffer = 1 << 20

// copySparse copies what is not zero for lack of data. The files stay as they
// are elsewhere. With apart nothing is shared, whatever the filesystem can.
func copySparse(ctx context.Context, dst, src *os.File, size int64, apart bool, progress func(int64)) error {
	for at := int64(0); at < size; {
		start, end, err := nextData(src, at, size)
		if err != nil {
			return opError("find data in", src.Name(), err)
		}
		for at = start; at < end; {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(copyBuffer, end-at)
			if err := copyBytes(dst, src, at, n, apart); err != nil {
				return opError("copy to", imageFile, err)
			}
			at += n
			progress(n)
		}
	}
	return nil
}

func copyBytes(dst, src *os.File, offset, length int64, apart bool) error {
	if !apart {
		// EXDEV between filesystems of two types, EINVAL and EOPNOTSUPP on some.
		err := copyRange(dst, src, offset, length)
		if !errors.Is(err, syscall.EXDEV) && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.EOPNOTSUPP) {
			return err
		}
	}
	_, err := io.CopyN(io.NewOffsetWriter(dst, offset), io.NewSectionReader(src, offset, length), length)
	return err
}

// dataBytes is how much copySparse would copy.
func dataBytes(f *os.File, size int64) (n int64, err error) {
	for at := int64(0); at < size; {
		start, end, err := nextData(f, at, size)
		if err != nil {
			return 0, opError("find data in", f.Name(), err)
		}
		n += end - start
		at = end
	}
	return n, nil
}
