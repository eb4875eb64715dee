package loop

import (
	"errors"
	"io"
	"os"
)

// kernel is everything the package asks of the operating system. Its methods make
// system calls and decide nothing; errors are errnos, unwrapped. The fake in the
// tests gives the same answers, fact by fact.
type kernel interface {
	control
	devices
	files
	io.Closer
}

// control is /dev/loop-control.
type control interface {
	// GetFree is LOOP_CTL_GET_FREE: the lowest unbound number, made if need be. It
	// reserves nothing (fact 1).
	GetFree() (int, error)
	// Add is LOOP_CTL_ADD; number -1 means any. EEXIST if it is there (fact 9).
	Add(number int) (int, error)
	// Remove is LOOP_CTL_REMOVE: EBUSY if bound or open, ENODEV if absent (fact 9).
	Remove(number int) error
}

// devices are the nodes and the sysfs entries of the loop devices.
type devices interface {
	// Numbers lists the registered devices, in no order.
	Numbers() ([]int, error)
	// Attr reads a file below /sys/block/loopN, without the newline. ENOENT if the
	// device or the attribute does not exist.
	Attr(number int, name string) (string, error)
	// SetAttr writes one.
	SetAttr(number int, name, value string) error
	// Open opens the block device node at path. errNotNode if what is there is
	// something else than the device id ("major:minor").
	Open(path, id string, how access) (handle, error)
	// MakeNode makes a private node, replacing what is at path.
	MakeNode(path, id string) error
}

// files are regular files that become images.
type files interface {
	// Stat looks at an open file.
	Stat(f *os.File) (fileStat, error)
	// Sole tells whether no other open file of the inode exists. An error or false
	// means that it is not known.
	Sole(f *os.File, use leaseUse) (bool, error)
	// Lock takes an flock of the file by an open file of its own; closing it unlocks.
	// EAGAIN if somebody else has it.
	Lock(f *os.File) (io.Closer, error)
}

// handle is an open loop device.
type handle interface {
	inquiry
	// Configure is LOOP_CONFIGURE.
	Configure(c config) error
	// Clear is LOOP_CLR_FD (fact 31).
	Clear() error
	// SetCapacity is LOOP_SET_CAPACITY (fact 40).
	SetCapacity() error
	cache
	io.Closer
}

// cache is the device's page cache.
type cache interface {
	// DropCache is BLKFLSBUF: writes dirty pages of the device and forgets all.
	DropCache() error
	// Sync is fsync: writes dirty pages of the device, and flushes it.
	Sync() error
}

// inquiry is what changes nothing.
type inquiry interface {
	// Status is LOOP_GET_STATUS64: ENXIO if unbound or running down.
	Status() (status, error)
	// Geometry is BLKGETSIZE64 and BLKSSZGET, in bytes.
	Geometry() (size int64, blockSize int, err error)
	// DiskSeq is BLKGETDISKSEQ.
	DiskSeq() (uint64, error)
	// Discards tells whether a discard would reach the image, and discards nothing. The
	// handle and the device must be writable (fact 107).
	Discards() (bool, error)
}

// access is how a device node is opened. All of them add O_CLOEXEC and O_NONBLOCK.
type access int

const (
	forReading access = iota // O_RDONLY
	forWriting               // O_RDWR
	forClaim                 // O_RDONLY|O_EXCL: EBUSY if mounted or otherwise claimed
)

// leaseUse is what Sole is asked for. A loop device that keeps the very open file
// that is asked about is not seen by the kernel, so such files are marked.
type leaseUse int

const (
	looking    leaseUse = iota // false for a marked file
	beforeBind                 // likewise, and marks it
	afterBind                  // the mark is our own
)

// config is the argument of LOOP_CONFIGURE. File nil is the descriptor -1.
type config struct {
	File              *os.File
	Offset, SizeLimit uint64
	BlockSize         uint32
	Flags             uint32
	Tag               string
	// NoDiscard names a key that encrypts nothing: Linux before 5.16 takes no discards
	// then, and later ones do not look at it (fact 107).
	NoDiscard bool
}

// The flags of LOOP_CONFIGURE and LOOP_GET_STATUS64 that the package uses. Never
// LO_FLAGS_PARTSCAN: an image's partitions are its owner's business (fact 12).
const (
	flagReadOnly  = 1 << 0 // LO_FLAGS_READ_ONLY
	flagAutoclear = 1 << 2 // LO_FLAGS_AUTOCLEAR
	flagDirectIO  = 1 << 4 // LO_FLAGS_DIRECT_IO
)

// status is what LOOP_GET_STATUS64 says.
type status struct {
	Image             FileID
	Offset, SizeLimit uint64
	Number            int
	Flags             uint32
	Tag               string
}

// fileStat is what the package wants to know of an image.
type fileStat struct {
	ID                FileID
	Size              int64
	Regular, Writable bool
}

// errNotNode: the path exists and is not the block device it should be.
var errNotNode = errors.New("not the node of the device")

// Names of attributes below /sys/block/loopN.
const (
	attrDev          = "dev"                        // "major:minor"
	attrDiskSeq      = "diskseq"                    // decimal
	attrStat         = "stat"                       // counters, one line
	attrBackingFile  = "loop/backing_file"          // exists only while bound (fact 23)
	attrReadOnly     = "ro"                         // "1" or "0", and so are the next two
	attrAutoclear    = "loop/autoclear"             //
	attrDirectIO     = "loop/dio"                   //
	attrOffset       = "loop/offset"                // bytes
	attrSizeLimit    = "loop/sizelimit"             // bytes
	attrDiscard      = "queue/discard_max_bytes"    // writing 0 masks discard (fact 63)
	attrDiscardLimit = "queue/discard_max_hw_bytes" // what the file below can do
	attrReadAhead    = "queue/read_ahead_kb"        // KiB; may stick to the number (fact 96)
)
