package mount

import (
	"bytes"
	"encoding/binary"
	"strings"
)

// Feature bits of ext2, ext3 and ext4 superblocks, under their kernel names.
const (
	compatHasJournal  = 0x4
	incompatRecover   = 0x4
	incompatJournal   = 0x8 // a journal on a device of its own, not a filesystem
	incompatMetaBG    = 0x10
	incompat64Bit     = 0x80
	incompatExt3      = 0x2 | incompatRecover | incompatMetaBG
	roCompatSparse    = 0x1
	roCompatExt3      = roCompatSparse | 0x2 | 0x4
	compatSparse2     = 0x200
	stateValid        = 0x1
	stateError        = 0x2
	errorsPanic       = 3
	extMagic          = 0xEF53
	spareInLastGroup  = 50 // what mke2fs and resize2fs want in a last group beside its tables
	maxExtBlockShift  = 6  // 64 KiB
	minExtInodeBytes  = 128
	oldExtInodeBytes  = 128
	oldExtDescBytes   = 32
	extDynamicRev     = 1
	extSuperBackupOf1 = 1
)

// extGeometry is what decides how much of a device an ext filesystem can use.
type extGeometry struct {
	firstBlock     int64 // 1 with 1 KiB blocks, else 0
	blocksPerGroup int64
	tableBlocks    int64 // bitmaps and inode table of one group
	superBlocks    int64 // superblock and descriptors, where a group has them
	sparse         bool  // backups only in groups 1 and powers of 3, 5, 7
	sparse2        bool  // backups in at most two groups
}

// usable returns the blocks that growing to a device of so many blocks would
// give: a last group that could not hold its own tables is not made.
func (g extGeometry) usable(blocks int64) int64 {
	if g.blocksPerGroup <= 0 || blocks <= g.firstBlock {
		return blocks
	}
	group := (blocks - g.firstBlock) / g.blocksPerGroup
	rest := (blocks - g.firstBlock) % g.blocksPerGroup
	overhead := g.tableBlocks
	if g.hasSuper(group) {
		overhead += g.superBlocks
	}
	if group > 0 && rest > 0 && rest < overhead+spareInLastGroup {
		return blocks - rest
	}
	return blocks
}

// hasSuper reports whether a group holds a copy of the superblock. With sparse2
// the answer errs towards yes.
func (g extGeometry) hasSuper(group int64) bool {
	if !g.sparse || g.sparse2 || group <= extSuperBackupOf1 {
		return true
	}
	for _, base := range []int64{3, 5, 7} {
		n := base
		for n < group {
			n *= base
		}
		if n == group {
			return true
		}
	}
	return false
}

func parseExt(b []byte) (Superblock, error) {
	le := binary.LittleEndian
	u16 := func(at int) uint64 { return uint64(le.Uint16(b[at:])) }
	u32 := func(at int) uint64 { return uint64(le.Uint32(b[at:])) }
	if u16(0x38) != extMagic {
		return Superblock{}, errNoMagic
	}
	compat, incompat, roCompat := u32(0x5C), u32(0x60), u32(0x64)
	if incompat&incompatJournal != 0 {
		return Superblock{}, nonsense("ext", "nothing but a journal")
	}
	// The kernel would open that one by its number, whosever it is.
	if device := u32(0xE4); compat&compatHasJournal != 0 && device != 0 {
		return Superblock{}, nonsense("ext", "its journal on another device, 0x%x", device)
	}
	panics, err := carriedOptions(b[0x200:0x240])
	if err != nil {
		return Superblock{}, err
	}
	shift := u32(0x18)
	if shift > maxExtBlockShift {
		return Superblock{}, nonsense("ext", "a block size of 2^%d KiB", shift)
	}
	block := uint64(1024) << shift
	blocks := u32(0x4)
	if incompat&incompat64Bit != 0 {
		blocks |= u32(0x150) << 32
	}
	if blocks == 0 || blocks > maxDeviceBytes/block {
		return Superblock{}, nonsense("ext", "%d blocks", blocks)
	}
	perGroup := u32(0x20)
	if perGroup == 0 || u32(0x14) > 1 {
		return Superblock{}, nonsense("ext", "%d blocks in a group, the first being %d", perGroup, u32(0x14))
	}
	inode, desc := uint64(oldExtInodeBytes), uint64(oldExtDescBytes)
	if u32(0x4C) >= extDynamicRev {
		inode = u16(0x58)
	}
	if incompat&incompat64Bit != 0 {
		desc = u16(0xFE)
	}
	if inode < minExtInodeBytes || inode > block || desc < oldExtDescBytes || desc > block {
		return Superblock{}, nonsense("ext", "inodes of %d and descriptors of %d bytes", inode, desc)
	}
	groups := (blocks + perGroup - 1) / perGroup
	state := u16(0x3A)
	return Superblock{
		Type: extType(compat, incompat, roCompat), UUID: formatUUID(b[0x68:0x78]), Label: text(b[0x78:0x88]),
		Size: int64(blocks * block), BlockSize: int(block), SectorSize: int(block),
		NeedsCheck:    state&stateValid == 0 || state&stateError != 0,
		NeedsRecovery: incompat&incompatRecover != 0,
		Panics:        panics || u16(0x3C) == errorsPanic,
		ext: extGeometry{
			firstBlock: int64(u32(0x14)), blocksPerGroup: int64(perGroup),
			tableBlocks: int64(2 + (u32(0x28)*inode+block-1)/block),
			superBlocks: int64(1 + (groups*desc+block-1)/block + u16(0xCE)),
			sparse:      roCompat&roCompatSparse != 0, sparse2: compat&compatSparse2 != 0,
		},
	}, nil
}

// carriedOptions judges the mount options that a superblock carries (tune2fs -E mount_opts),
// which the kernel takes before those that it is given: a journal's device may be among
// them. What could not be given is refused, but for the panic, which a given option
// overrules. They are split as the kernel does it, which knows no quotes.
func carriedOptions(b []byte) (panics bool, err error) {
	b, _, _ = bytes.Cut(b, []byte{0})
	for option := range strings.SplitSeq(string(b), ",") {
		key, value, has := strings.Cut(option, "=")
		r, known := filesystemOptions["ext4"][key]
		switch {
		case option == "errors=panic":
			panics = true
		case option != "" && (!known || r.refused != "" || r.check(value, has) != ""):
			return false, nonsense("ext", "the mount option %q, which is not allowed; tune2fs -E mount_opts= takes it out", option)
		}
	}
	return panics, nil
}

// extType tells the three apart the way blkid and the kernel do: by what an ext3
// or ext2 driver would not understand, then by the journal.
func extType(compat, incompat, roCompat uint64) string {
	switch {
	case incompat&^incompatExt3 != 0 || roCompat&^roCompatExt3 != 0:
		return "ext4"
	case compat&compatHasJournal != 0:
		return "ext3"
	default:
		return "ext2"
	}
}
