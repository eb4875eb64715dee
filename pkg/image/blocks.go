package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sort"
)

const (
	// maxTemplate is how much of an image a template may have that is not zero, and
	// maxScan how much of it is read to find out.
	maxTemplate = 6 << 20
	maxScan     = 64 << 20
)

// blocks is what is not zero of an image. The rest reads as zeros in any new image.
type blocks struct {
	grain int     // bytes of each piece; a power of two, at least 4096
	at    []int64 // where each piece is in the image, ascending, multiples of grain
	data  []byte  // the pieces, one after the other
}

var (
	errTooMuch  = fmt.Errorf("more than %d MiB of it are not zero", maxTemplate>>20)
	errTooWhole = fmt.Errorf("more than %d MiB of it were written", maxScan>>20)
)

// readBlocks reads an image, which must be synced: the filesystem is trusted to know
// where data is.
func readBlocks(f *os.File, size int64, grain int) (*blocks, error) {
	ranges, err := dataRanges(f, size)
	if err != nil {
		return nil, err
	}
	c := &blocks{grain: grain}
	piece := make([]byte, grain)
	at := int64(0)
	for _, r := range ranges {
		for at = max(at, r.start-r.start%int64(grain)); at < r.end; at += int64(grain) {
			if _, err := f.ReadAt(piece, at); err != nil {
				return nil, opError("read", f.Name(), err)
			}
			if allZero(piece) {
				continue
			}
			if len(c.data)+grain > maxTemplate {
				return nil, errTooMuch
			}
			c.at = append(c.at, at)
			c.data = append(c.data, piece...)
		}
	}
	return c, nil
}

// fileRange is a part of a file, in bytes.
type fileRange struct{ start, end int64 }

// dataRanges finds where data is, before any is read: reading ahead into blocks that
// are allocated and not written makes them look like data.
func dataRanges(f *os.File, size int64) (ranges []fileRange, err error) {
	sum := int64(0)
	for at := int64(0); at < size; {
		start, end, err := nextData(f, at, size)
		if err != nil {
			return nil, opError("find data in", f.Name(), err)
		}
		if sum += end - start; sum > maxScan {
			return nil, errTooWhole
		}
		ranges = append(ranges, fileRange{start, end})
		at = end
	}
	return ranges, nil
}

// find returns where a range of the image is in data. Without ok some of it is zero,
// or is not there in one piece.
func (c *blocks) find(offset int64, n int) (at int, ok bool) {
	grain := int64(c.grain)
	if offset < 0 || n <= 0 {
		return 0, false
	}
	i, found := slices.BinarySearch(c.at, offset-offset%grain)
	if !found {
		return 0, false
	}
	last := i + int((offset%grain+int64(n)-1)/grain)
	if last >= len(c.at) || c.at[last]-c.at[i] != int64(last-i)*grain {
		return 0, false
	}
	return i*c.grain + int(offset%grain), true
}

// within returns the range of pieces that begin in [from, to).
func (c *blocks) within(from, to int64) (first, last int) {
	first = sort.Search(len(c.at), func(i int) bool { return c.at[i] >= from })
	return first, max(first, sort.Search(len(c.at), func(i int) bool { return c.at[i] >= to }))
}

// write writes data, which is like c.data, to where it belongs in a file.
func (c *blocks) write(f *os.File, data []byte) error {
	for i := 0; i < len(c.at); {
		n := 1
		for i+n < len(c.at) && c.at[i+n] == c.at[i]+int64(n*c.grain) {
			n++
		}
		if _, err := f.WriteAt(data[i*c.grain:(i+n)*c.grain], c.at[i]); err != nil {
			return err
		}
		i += n
	}
	return nil
}

// zeroGap is the shortest run of zeros that is worth leaving out.
const zeroGap = 32

var zeroBytes [zeroGap]byte

// pack makes data small, by leaving out zeros: most of what mkfs writes.
func pack(data []byte) []byte {
	var out []byte
	for len(data) > 0 {
		n := 0
		for n+zeroGap <= len(data) && bytes.Equal(data[n:n+zeroGap], zeroBytes[:]) {
			n += zeroGap
		}
		zeros := n
		for n < len(data) && !bytes.HasPrefix(data[n:], zeroBytes[:]) {
			n++
		}
		out = binary.AppendUvarint(out, uint64(zeros))
		out = binary.AppendUvarint(out, uint64(n-zeros))
		out = append(out, data[zeros:n]...)
		data = data[n:]
	}
	return slices.Clip(out)
}

var errPacked = errors.New("not what was packed")

// unpack is the reverse of pack, into a buffer of the size that data had.
func unpack(packed, into []byte) error {
	clear(into)
	for len(packed) > 0 {
		zeros, n := binary.Uvarint(packed)
		literal, m := binary.Uvarint(packed[max(n, 0):])
		if n <= 0 || m <= 0 {
			return errPacked
		}
		packed = packed[n+m:]
		if zeros > uint64(len(into)) || literal > uint64(len(into))-zeros || literal > uint64(len(packed)) {
			return errPacked
		}
		copy(into[zeros:], packed[:literal])
		packed, into = packed[literal:], into[zeros+literal:]
	}
	if len(into) > zeroGap {
		return errPacked
	}
	return nil
}

func allZero(b []byte) bool {
	for len(b) >= zeroGap {
		if !bytes.Equal(b[:zeroGap], zeroBytes[:]) {
			return false
		}
		b = b[zeroGap:]
	}
	return bytes.Equal(b, zeroBytes[:len(b)])
}
