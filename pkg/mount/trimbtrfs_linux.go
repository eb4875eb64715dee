package mount

import (
	"encoding/binary"
	"math"
	"unsafe"
)

// btrfsPart makes of a range one that FITRIM takes for what it is on btrfs. It goes by
// chunks, which have addresses of their own, also beyond the size of the device, and
// passes over one that begins before the range. So the part has each chunk that begins
// in the range, as a whole: of data, 1 GiB at most. last says that none begins after.
func btrfsPart(fd int, start, length uint64) (from, size uint64, last bool, err error) {
	last = true
	end := start + length
	if end < start {
		end = math.MaxUint64
	}
	err = btrfsChunks(fd, func(at, bytes uint64) {
		switch {
		case at >= end:
			last = false
		case at >= start && size == 0:
			from, size = at, bytes
		case at >= start:
			size = at + bytes - from
		}
	})
	return from, size, last, err
}

// btrfsChunks calls f with address and size of each chunk, in order.
func btrfsChunks(fd int, f func(at, bytes uint64)) error {
	const (
		treeSearch = iocRead | iocWrite | 4096<<iocSizeShift | 0x94<<8 | 17 // BTRFS_IOC_TREE_SEARCH
		chunkTree  = 3
		chunks     = 256 // the object that all chunks belong to
		chunkItem  = 228
		keySize    = 104 // struct btrfs_ioctl_search_key
		headerSize = 32  // struct btrfs_ioctl_search_header
	)
	for from := uint64(0); ; {
		var args [4096 / 8]uint64
		raw := unsafe.Slice((*byte)(unsafe.Pointer(&args)), 4096)
		put := func(at int, v uint64) { binary.NativeEndian.PutUint64(raw[at:], v) }
		put(0, chunkTree)
		put(8, chunks)
		put(16, chunks)
		put(24, from)
		put(32, math.MaxUint64)
		put(48, math.MaxUint64) // the last transaction
		for at, v := range map[int]uint32{56: chunkItem, 60: chunkItem, 64: math.MaxUint32} {
			binary.NativeEndian.PutUint32(raw[at:], v)
		}
		if _, err := ioctl(fd, treeSearch, unsafe.Pointer(&args)); err != nil {
			return err
		}
		found := binary.NativeEndian.Uint32(raw[64:])
		for at := keySize; found > 0; found-- {
			start := binary.NativeEndian.Uint64(raw[at+16:])
			f(start, binary.LittleEndian.Uint64(raw[at+headerSize:]))
			from = start + 1
			at += headerSize + int(binary.NativeEndian.Uint32(raw[at+28:]))
			if at+headerSize+8 > len(raw) {
				break
			}
		}
		if binary.NativeEndian.Uint32(raw[64:]) == 0 {
			return nil
		}
	}
}
