package mount

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
)

// Superblock is what a filesystem says about itself.
type Superblock struct {
	Type      string // ext2, ext3, ext4, xfs or btrfs
	UUID      string // in the usual form, lower case
	Label     string // may be empty; whatever bytes somebody put there
	Size      int64  // bytes; at most that of the device, unless it was cut
	BlockSize int    // bytes
	// SectorSize is the largest logical block size, in bytes, of a device that it can
	// be mounted from.
	SectorSize int
	// NeedsCheck means that the filesystem recorded an error, or, without a
	// journal, that it was not unmounted: a check is due before the next mount.
	NeedsCheck bool
	// NeedsRecovery means that a log has to be replayed, which the next writable
	// mount does by itself. XFS does not say so in its superblock: always false.
	NeedsRecovery bool
	// Panics means that an ext filesystem wants the machine stopped when an error is
	// found in it, unless a mount option says otherwise.
	Panics bool

	ext extGeometry
	xfs xfsGeometry
	// devID is the number that a btrfs knows its device by, which need not be 1: the
	// first may have been removed.
	devID uint64
}

// Offsets from the start of the device, and how much is read there.
const (
	xfsOffset, xfsBytes     = 0, 264
	extOffset, extBytes     = 1024, 1024
	btrfsOffset, btrfsBytes = 64 << 10, 4096
	maxDeviceBytes          = uint64(1) << 62 // keeps all arithmetic far from overflow
)

// ReadSuperblock recognises the filesystem on r, which is a device or an image
// file. It reads a few KiB and believes nothing: whatever r holds, it answers, or
// fails with ErrUnknownFilesystem when it finds none or one that makes no sense,
// or with the error of the reader.
//
// The order is sound although tenants choose the contents of their volumes: no
// filesystem lets its users write to the place where one that is looked for
// earlier has its superblock. A raw block volume may say anything; do not ask.
//
// While the filesystem is mounted, an ext one is up to date here (it shares the
// device's page cache), an xfs or btrfs one may be behind.
func ReadSuperblock(r io.ReaderAt) (Superblock, error) {
	for _, probe := range []struct {
		offset int64
		size   int
		parse  func([]byte) (Superblock, error)
	}{
		{xfsOffset, xfsBytes, parseXFS},
		{extOffset, extBytes, parseExt},
		{btrfsOffset, btrfsBytes, parseBtrfs},
	} {
		buf := make([]byte, probe.size)
		n, err := r.ReadAt(buf, probe.offset)
		if n < len(buf) {
			if err == nil || errors.Is(err, io.EOF) {
				continue // too short for this one
			}
			return Superblock{}, fmt.Errorf("read superblock: %w", err)
		}
		sb, err := probe.parse(buf)
		if err == nil || !errors.Is(err, errNoMagic) {
			return sb, err
		}
	}
	return Superblock{}, fmt.Errorf("%w: no superblock of ext2, ext3, ext4, xfs or btrfs", ErrUnknownFilesystem)
}

// errNoMagic means that another kind of filesystem may still be found.
var errNoMagic = errors.New("no magic number")

// nonsense is a superblock that has the magic number and cannot be true.
func nonsense(fsType, format string, args ...any) error {
	return fmt.Errorf("%w: %s superblock with %s", ErrUnknownFilesystem, fsType, fmt.Sprintf(format, args...))
}

// FillsDevice reports whether the filesystem already has all of a device of the
// given size that it can use, so that there is nothing to grow. What it cannot
// use: a part of a block, and a last allocation or block group that is too small
// for its own tables.
func (s Superblock) FillsDevice(device int64) bool {
	if s.BlockSize <= 0 || device <= s.Size {
		return true
	}
	blocks := device / int64(s.BlockSize)
	switch s.Type {
	case "xfs":
		return s.xfs.usable(blocks) <= s.Size/int64(s.BlockSize)
	case "btrfs":
		return blocks <= s.Size/int64(s.BlockSize)
	default:
		return s.ext.usable(blocks) <= s.Size/int64(s.BlockSize)
	}
}

// xfsGeometry is what decides how much of a device an XFS can use.
type xfsGeometry struct{ agBlocks int64 }

// usable returns the blocks that growing would give. A last allocation group
// under 64 blocks is not made (XFS_MIN_AG_BLOCKS).
func (g xfsGeometry) usable(blocks int64) int64 {
	const minAG = 64
	if g.agBlocks > 0 && blocks%g.agBlocks < minAG {
		blocks -= blocks % g.agBlocks
	}
	return blocks
}

func parseXFS(b []byte) (Superblock, error) {
	be := binary.BigEndian
	if !bytes.Equal(b[0:4], []byte("XFSB")) {
		return Superblock{}, errNoMagic
	}
	block, blocks := be.Uint32(b[4:]), be.Uint64(b[8:])
	if block < 512 || block > 64<<10 || block&(block-1) != 0 {
		return Superblock{}, nonsense("xfs", "a block size of %d", block)
	}
	if blocks == 0 || blocks > maxDeviceBytes/uint64(block) {
		return Superblock{}, nonsense("xfs", "%d blocks", blocks)
	}
	agBlocks, agCount := be.Uint32(b[84:]), be.Uint32(b[88:])
	if agBlocks == 0 || agCount == 0 || (blocks-1)/uint64(agBlocks) != uint64(agCount)-1 {
		return Superblock{}, nonsense("xfs", "%d allocation groups of %d blocks", agCount, agBlocks)
	}
	if s := be.Uint16(b[102:]); s < 512 || s&(s-1) != 0 || uint32(s) > block {
		return Superblock{}, nonsense("xfs", "sectors of %d bytes", s)
	}
	const version5, needsRepair = 5, 1 << 4 // XFS_SB_FEAT_INCOMPAT_NEEDSREPAIR
	repair := be.Uint16(b[100:])&0xf == version5 && be.Uint32(b[216:])&needsRepair != 0
	return Superblock{
		Type: "xfs", UUID: formatUUID(b[32:48]), Label: text(b[108:120]),
		Size: int64(blocks) * int64(block), BlockSize: int(block), SectorSize: int(be.Uint16(b[102:])), NeedsCheck: repair,
		xfs: xfsGeometry{agBlocks: int64(agBlocks)},
	}, nil
}

func parseBtrfs(b []byte) (Superblock, error) {
	le := binary.LittleEndian
	if !bytes.Equal(b[64:72], []byte("_BHRfS_M")) {
		return Superblock{}, errNoMagic
	}
	// The size of this device, not the sum over all (they are equal with one).
	const devItem = 201
	devID, size, sector := le.Uint64(b[devItem:]), le.Uint64(b[devItem+8:]), le.Uint32(b[144:])
	if sector < 512 || sector > 64<<10 || sector&(sector-1) != 0 {
		return Superblock{}, nonsense("btrfs", "a sector size of %d", sector)
	}
	if size < btrfsOffset || size > maxDeviceBytes {
		return Superblock{}, nonsense("btrfs", "a size of %d", size)
	}
	// The others would be whatever devices of the machine say that they are its.
	if devices := le.Uint64(b[136:]); devices != 1 {
		return Superblock{}, nonsense("btrfs", "%d devices, and a volume has one", devices)
	}
	// The number of what a replacement that is under way writes to. The kernel does not
	// mount that as a filesystem's only device.
	if devID == 0 {
		return Superblock{}, nonsense("btrfs", "a device of number 0")
	}
	return Superblock{
		Type: "btrfs", UUID: formatUUID(b[32:48]), Label: text(b[299 : 299+256]),
		Size: int64(size), BlockSize: int(sector), SectorSize: int(sector), NeedsRecovery: le.Uint64(b[96:]) != 0,
		devID: devID,
	}, nil
}

func formatUUID(b []byte) string {
	s := hex.EncodeToString(b)
	return s[0:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:32]
}

func text(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
