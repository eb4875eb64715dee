package loop

import (
	"fmt"
	"math"
	"strings"
)

// maxTag is LO_NAME_SIZE without the closing NUL.
const maxTag = 63

// FileID identifies a file while it exists: st_dev and st_ino of fstat, which are
// also lo_device and lo_inode of a loop device over it. A file that a device shows
// cannot be freed, so a match against a live device is exact (fact 26).
type FileID struct{ Dev, Ino uint64 }

// Ref is one binding of one loop device. DiskSeq is unique per bind on a running
// kernel; the number alone is meaningless after the next bind (fact 28).
type Ref struct {
	Number  int
	DiskSeq uint64
}

// String returns a form for logs.
func (r Ref) String() string { return fmt.Sprintf("loop%d#%d", r.Number, r.DiskSeq) }

// DirectIO says whether the loop driver bypasses the page cache of the file system
// below the image.
type DirectIO int

// What a Mapping may say about direct I/O.
const (
	// DirectIOOff: buffered.
	DirectIOOff DirectIO = iota
	// DirectIOAuto: direct if the kernel grants it, else buffered.
	DirectIOAuto
	// DirectIOOn: direct, or Attach fails with ErrDirectIO.
	DirectIOOn
)

// String returns "off", "auto" or "on".
func (d DirectIO) String() string {
	switch d {
	case DirectIOOff:
		return "off"
	case DirectIOAuto:
		return "auto"
	case DirectIOOn:
		return "on"
	}
	return fmt.Sprintf("DirectIO(%d)", int(d))
}

// Mapping is a byte range of a file as a block device. It is fixed when the device
// is bound and never changed (fact 39).
type Mapping struct {
	// Offset is the first byte shown, a multiple of BlockSize.
	Offset int64
	// SizeLimit is the length of the range in bytes, a multiple of BlockSize. 0
	// means to the end of the file; only then Grow has an effect (fact 40).
	SizeLimit int64
	// BlockSize is the logical block size: 512, 1024, 2048 or 4096. It has no
	// default, because the kernel's changes with the state of the file (fact 61).
	BlockSize int
	// ReadOnly makes the kernel refuse writes to the device.
	ReadOnly bool
	DirectIO DirectIO
	// Autoclear lets the kernel unbind the device at the last close, also after a
	// crash. Choose it for devices that get mounted, and not for those that are
	// handed out as a node, which holds nothing open (facts 35, 36).
	Autoclear bool
	// Discard lets discards and zeroing punch holes into the image. Without it the
	// image stays as allocated as it is (facts 62, 63).
	Discard bool
	// Tag, at most 63 bytes, is shown to people (losetup -l, column REF). A device
	// with another tag was bound by somebody else and is never reused.
	Tag string
}

// Validate checks the mapping against a file of fileSize bytes. It makes no system
// call. The error is a *MappingError naming the field.
func (m Mapping) Validate(fileSize int64) error {
	bad := func(field, format string, args ...any) error {
		return &MappingError{Field: field, Reason: fmt.Sprintf(format, args...)}
	}
	switch m.BlockSize {
	case 512, 1024, 2048, 4096:
	default: // facts 15, 61
		return bad("BlockSize", "%d is not 512, 1024, 2048 or 4096", m.BlockSize)
	}
	block := int64(m.BlockSize)
	switch {
	case m.Offset < 0:
		return bad("Offset", "%d is negative", m.Offset)
	case m.Offset%block != 0: // buffered mode would take it (fact 14)
		return bad("Offset", "%d is not a multiple of the block size %d", m.Offset, block)
	case m.SizeLimit < 0:
		return bad("SizeLimit", "%d is negative", m.SizeLimit)
	case m.SizeLimit%block != 0:
		return bad("SizeLimit", "%d is not a multiple of the block size %d", m.SizeLimit, block)
	case m.SizeLimit > math.MaxInt64-m.Offset:
		return bad("SizeLimit", "offset %d plus limit %d overflows", m.Offset, m.SizeLimit)
	case m.Offset >= fileSize:
		return bad("Offset", "%d is not inside the file of %d bytes", m.Offset, fileSize)
	case m.Offset+m.SizeLimit > fileSize: // the kernel would clamp (fact 13)
		return bad("SizeLimit", "offset %d plus limit %d is beyond the file of %d bytes", m.Offset, m.SizeLimit, fileSize)
	case m.SizeLimit == 0 && (fileSize-m.Offset)%block != 0: // fact 16
		return bad("SizeLimit", "the file's %d bytes from offset %d on are not a multiple of the block size %d; set a limit",
			fileSize-m.Offset, m.Offset, block)
	case m.DirectIO < DirectIOOff || m.DirectIO > DirectIOOn:
		return bad("DirectIO", "%v is unknown", m.DirectIO)
	case len(m.Tag) > maxTag:
		return bad("Tag", "is %d bytes long, at most %d fit", len(m.Tag), maxTag)
	case strings.ContainsFunc(m.Tag, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return bad("Tag", "%q has control characters", m.Tag)
	}
	return nil
}

// size returns the device's size over a file of fileSize bytes.
// Precondition: Validate(fileSize) succeeded.
func (m Mapping) size(fileSize int64) int64 {
	if m.SizeLimit != 0 {
		return m.SizeLimit
	}
	return fileSize - m.Offset
}

// overlaps tells whether two ranges of one file share a byte, now or after the file
// has grown.
func overlaps(offsetA, limitA, offsetB, limitB int64) bool {
	end := func(offset, limit int64) int64 {
		if limit == 0 || limit > math.MaxInt64-offset {
			return math.MaxInt64
		}
		return offset + limit
	}
	return offsetA < end(offsetB, limitB) && offsetB < end(offsetA, limitA)
}

// Info is what the kernel says about a device.
type Info struct {
	Ref
	State State
	// Path is a node of the device that this process can open.
	Path string
	// Major and Minor are the device's numbers. Read, not computed (fact 10).
	Major, Minor uint32
	Image        FileID
	// BackingPath is the kernel's idea of the image's path, for people only: it
	// depends on the mount namespace and follows renames (facts 24, 25).
	BackingPath string
	// Offset and SizeLimit are as asked for at the bind, in bytes; Size is what the
	// device has now.
	Offset, SizeLimit, Size int64
	BlockSize               int
	ReadOnly, DirectIO      bool
	// Autoclear is also set when the device was cleared while in use.
	Autoclear bool
	// Discard tells whether the device accepts discards.
	Discard bool
	Tag     string
}

// differs returns the first thing in which a device over the same file is not what
// the mapping asks for, "" if it can serve. Size is not compared: an image may have
// grown since the device was bound.
func (m Mapping) differs(in Info) (field, have, want string) {
	type pair struct {
		field      string
		have, want any
	}
	pairs := []pair{
		{"Offset", in.Offset, m.Offset},
		{"SizeLimit", in.SizeLimit, m.SizeLimit},
		{"ReadOnly", in.ReadOnly, m.ReadOnly},
		{"Tag", in.Tag, m.Tag},
		{"BlockSize", in.BlockSize, m.BlockSize},
		{"Autoclear", in.Autoclear, m.Autoclear},
	}
	if m.DirectIO != DirectIOAuto {
		pairs = append(pairs, pair{"DirectIO", in.DirectIO, m.DirectIO == DirectIOOn})
	}
	if !m.Discard { // a file system may be unable to discard, so the other way round is no difference
		pairs = append(pairs, pair{"Discard", in.Discard, false})
	}
	for _, p := range pairs {
		if p.have != p.want {
			return p.field, fmt.Sprint(p.have), fmt.Sprint(p.want)
		}
	}
	return "", "", ""
}
