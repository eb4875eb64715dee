package image

import (
	"errors"
	"io"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Flags of fiemap extents, and of the request.
const (
	fiemapSync       = 1 // write dirty data first (fact 72)
	extentLast       = 0x1
	extentUnknown    = 0x2
	extentDelayed    = 0x4
	extentEncoded    = 0x8
	extentEncrypted  = 0x80
	extentNotAligned = 0x100
	extentInline     = 0x200
	extentTail       = 0x400
	extentUnwritten  = 0x800
	extentShared     = 0x2000

	// No physical address, or not that of these bytes alone.
	extentVague = extentUnknown | extentDelayed | extentEncoded | extentEncrypted | extentNotAligned | extentInline | extentTail
)

// reflink makes dst a copy of src that shares its blocks (FICLONE).
func reflink(dst, src *os.File) error {
	err := ignoringEINTR(func() error { return unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) })
	runtime.KeepAlive(dst)
	runtime.KeepAlive(src)
	return err
}

// reflinkRange makes the beginning of dst share the blocks of a range of src, which
// goes to the end of src if length is 0 (FICLONERANGE).
func reflinkRange(dst, src *os.File, offset, length int64) error {
	r := unix.FileCloneRange{Src_fd: int64(src.Fd()), Src_offset: uint64(offset), Src_length: uint64(length)}
	err := ignoringEINTR(func() error { return unix.IoctlFileCloneRange(int(dst.Fd()), &r) })
	runtime.KeepAlive(dst)
	runtime.KeepAlive(src)
	return err
}

// linkInto gives an open file one more name.
func linkInto(f, dir *os.File, name string) error {
	err := unix.Linkat(unix.AT_FDCWD, procPath(f), int(dir.Fd()), name, unix.AT_SYMLINK_FOLLOW)
	runtime.KeepAlive(f)
	runtime.KeepAlive(dir)
	return err
}

// stateOf tells which file it is, and when its content and anything of it changed last.
func stateOf(f *os.File) (inode uint64, modified, changed time.Time, err error) {
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	runtime.KeepAlive(f)
	return st.Ino, time.Unix(st.Mtim.Unix()), time.Unix(st.Ctim.Unix()), err
}

// xfsFreeEOFBlocks is XFS_IOC_FREE_EOFBLOCKS.
var xfsFreeEOFBlocks = directionRead | 128<<16 | 'X'<<8 | 58

// freeSpeculative makes XFS give back what it set aside for writes to come: for each
// small write to a shared block it sets aside 128 KiB, and keeps that for minutes.
func freeSpeculative(f *os.File) error {
	const version, wait = 1, 1 // XFS_EOFBLOCKS_VERSION, XFS_EOF_FLAGS_SYNC
	request := [32]uint32{version, wait}
	return ioctl(f, xfsFreeEOFBlocks, unsafe.Pointer(&request))
}

// unshare gives the range blocks that are the file's alone, holes included.
func unshare(f *os.File, offset, length int64) error {
	err := ignoringEINTR(func() error {
		return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_UNSHARE_RANGE|unix.FALLOC_FL_KEEP_SIZE, offset, length)
	})
	runtime.KeepAlive(f)
	return err
}

// nextData returns the first range at or after from, and below size, that may hold
// anything but zeros; start is size if there is none.
func nextData(f *os.File, from, size int64) (start, end int64, err error) {
	start, err = unix.Seek(int(f.Fd()), from, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) || err == nil && start >= size {
		return size, size, nil
	}
	if err == nil {
		end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
	}
	runtime.KeepAlive(f)
	return start, min(end, size), err
}

// copyRange copies bytes to the same place of another file, in the kernel.
func copyRange(dst, src *os.File, offset, length int64) error {
	from, to := offset, offset
	for length > 0 {
		n, err := unix.CopyFileRange(int(src.Fd()), &from, int(dst.Fd()), &to, int(min(length, 1<<30)), 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0:
			return io.ErrUnexpectedEOF
		}
		length -= int64(n)
	}
	runtime.KeepAlive(dst)
	runtime.KeepAlive(src)
	return nil
}

// extents calls see with each extent that overlaps [from, to), in order and cut
// to it, until see returns false.
func extents(f *os.File, from, to int64, flags uint32, see func(extent) bool) error {
	var m fiemap
	for next := uint64(from); next < uint64(to); {
		m.start, m.length, m.flags, m.count = next, uint64(to)-next, flags, uint32(len(m.extents))
		if err := ioctl(f, fsIocFiemap, unsafe.Pointer(&m)); err != nil {
			return err
		}
		for _, e := range m.extents[:m.mapped] {
			end := min(e.logical+e.length, uint64(to))
			if e.logical < next {
				e.physical, e.logical = e.physical+next-e.logical, next
			}
			if e.logical < end && !see(newExtent(e, end)) {
				return nil
			}
			if next = max(next, end); e.flags&extentLast != 0 {
				return nil
			}
		}
		if m.mapped == 0 {
			return nil
		}
	}
	return nil
}

// countExtents is how many extents a file of that size has. Nothing is written out for
// it, so what is dirty counts as it is on disk.
func countExtents(f *os.File, size int64) (int64, error) {
	var m fiemap // with no room for extents the kernel counts them only
	m.length = uint64(size)
	err := ioctl(f, fsIocFiemap, unsafe.Pointer(&m))
	return int64(m.mapped), opError("count the extents of", f.Name(), err)
}

func newExtent(e fiemapExtent, end uint64) extent {
	return extent{
		start: int64(e.logical), end: int64(end), physical: int64(e.physical),
		vague: e.flags&extentVague != 0, unwritten: e.flags&extentUnwritten != 0, shared: e.flags&extentShared != 0,
	}
}
