package image

import (
	"encoding/binary"
)

// Features of the ext family whose structures are understood.
const (
	extJournal      = 0x4
	extCompatKnown  = 0x4 | 0x8 | 0x10 | 0x20 | 0x200 | 0x400 | 0x800 // journal, ext_attr, resize_inode, dir_index, sparse_super2, fast_commit, stable_inodes
	ext64bit        = 0x80
	extCsumSeed     = 0x2000
	extIncompatMask = 0x2 | 0x40 | ext64bit | 0x200 | 0x400 | extCsumSeed | 0x4000 | 0x8000 | 0x10000 // filetype, extents, flex_bg, ea_inode, large_dir, inline_data, encrypt
	extMetadataCsum = 0x400
	extRoKnown      = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x100 | extMetadataCsum | 0x2000 | 0x8000 // sparse, large_file, huge_file, dir_nlink, extra_isize, quota, project, verity

	extBlock     = 4096
	extMagic     = 0xef53
	extMaxGroups = 1 << 16

	inodeDir     = 0x4000
	inodeIndexed = 0x1000
	inodeExtents = 0x80000
	inodeInline  = 0x10000000
)

var (
	le16 = binary.LittleEndian.Uint16
	le32 = binary.LittleEndian.Uint32
	be16 = binary.BigEndian.Uint16
	be32 = binary.BigEndian.Uint32
	be64 = binary.BigEndian.Uint64
)

// extShape is what the superblock says of the places of things.
type extShape struct {
	groups, perGroup, inodes uint32 // groups, blocks and inodes of each
	inodeSize, descSize      int64
	sums, seedKept           bool // metadata_csum, metadata_csum_seed
	journal                  uint32
}

// ext surveys ext2, ext3 and ext4. The UUIDs are the filesystem's and the hash seed.
func (s *surveyor) ext() {
	sb := s.bytes(1024, 1024)
	if sb == nil {
		return
	}
	x := s.extShape(sb)
	if s.err != nil {
		return
	}
	s.uuids = []uuid{uuid(sb[0x68:0x78]), uuid(sb[0xec:0xfc])}
	var supers []int64
	for g := range x.groups {
		at := int64(g) * int64(x.perGroup) * extBlock
		super := at
		if g == 0 {
			super = 1024
		}
		i, ok := s.find(super, 1024)
		if !ok || le16(s.data[i+0x38:]) != extMagic || uuid(s.data[i+0x68:i+0x78]) != s.uuids[0] {
			continue // no copy of the superblock in this group
		}
		supers = append(supers, super)
		s.extDescriptors(x, at+extBlock)
		if g == 0 {
			s.extInodes(x)
		}
	}
	for _, at := range supers { // their sums last, though nothing depends on them
		s.extSuper(x, at)
	}
}

func (s *surveyor) extShape(sb []byte) extShape {
	compat, incompat, ro := le32(sb[0x5c:]), le32(sb[0x60:]), le32(sb[0x64:])
	x := extShape{
		perGroup: le32(sb[0x20:]), inodes: le32(sb[0x28:]), inodeSize: int64(le16(sb[0x58:])), descSize: 32,
		sums: ro&extMetadataCsum != 0, seedKept: incompat&extCsumSeed != 0,
	}
	total := uint64(le32(sb[4:]))
	if incompat&ext64bit != 0 {
		x.descSize = int64(le16(sb[0xfe:]))
		total |= uint64(le32(sb[0x150:])) << 32
	}
	if compat&extJournal != 0 {
		x.journal = le32(sb[0xe0:])
	}
	switch {
	case le16(sb[0x38:]) != extMagic || le32(sb[0x18:]) != 2 || le32(sb[0x14:]) != 0:
		s.refusef("no superblock for blocks of 4096 bytes")
	case compat&^extCompatKnown != 0 || incompat&^extIncompatMask != 0 || ro&^extRoKnown != 0:
		s.refusef("features %#x %#x %#x", compat, incompat, ro)
	case x.perGroup == 0 || x.perGroup > 8*extBlock || x.perGroup%8 != 0 || x.inodes == 0 || x.inodes > 8*extBlock || x.inodes%8 != 0:
		s.refusef("%d blocks and %d inodes in a group", x.perGroup, x.inodes)
	case x.inodeSize < 128 || x.inodeSize > extBlock || x.inodeSize&(x.inodeSize-1) != 0 || x.descSize != 32 && x.descSize != 64:
		s.refusef("inodes of %d bytes, group descriptors of %d", x.inodeSize, x.descSize)
	case x.seedKept && !x.sums || !allZero(sb[0x274:0x27c]):
		s.refusef("a seed without sums, or times after 2038")
	case total == 0 || total > uint64(x.perGroup)*extMaxGroups:
		s.refusef("%d blocks", total)
	}
	if s.err == nil {
		x.groups = uint32((total + uint64(x.perGroup) - 1) / uint64(x.perGroup))
	}
	return x
}

func (s *surveyor) extSuper(x extShape, at int64) {
	s.add(at+0x68, wholeUUID, 0)
	s.add(at+0xec, wholeUUID, 1)
	for _, offset := range []int64{0x2c, 0x30, 0x40, 0x108} { // mounted, written, checked, made
		s.time(at+offset, seconds32)
	}
	if x.seedKept {
		s.add(at+0x270, crcOfUUID, 0)
	}
	if x.sums {
		i := s.place(at, 1024)
		s.sums = append(s.sums, sum{from: i, n: 0x3fc, low: i + 0x3fc})
	}
}

// extBlockNumber reads a block number whose upper half is elsewhere.
func extBlockNumber(d []byte, low, high int) int64 {
	n := int64(le32(d[low:]))
	if len(d) > high {
		n |= int64(le32(d[high:])) << 32
	}
	return n
}

// extDescriptors takes the sums of one copy of the group descriptors, and of the
// bitmaps in it.
func (s *surveyor) extDescriptors(x extShape, at int64) {
	const inodesUninit, blocksUninit = 1, 2
	if !x.sums {
		return
	}
	for g := range x.groups {
		offset := at + int64(g)*x.descSize
		d := s.bytes(offset, int(x.descSize))
		if d == nil {
			return
		}
		i, flags := s.place(offset, int(x.descSize)), le16(d[0x12:])
		bitmap := func(low, high int, bits uint32, sumLow, sumHigh int32) {
			b := sum{seeded: true, from: -1, n: int32(bits / 8), low: i + sumLow, high: -1}
			if from, ok := s.find(extBlockNumber(d, low, high)*extBlock, int(b.n)); ok {
				b.from = int32(from)
			}
			if x.descSize == 64 {
				b.high = i + sumHigh
			}
			s.sums = append(s.sums, b)
		}
		if flags&blocksUninit == 0 {
			bitmap(0, 0x20, x.perGroup, 0x18, 0x38)
		}
		if flags&inodesUninit == 0 {
			bitmap(4, 0x24, x.inodes, 0x1a, 0x3a)
		}
		own := sum{seeded: true, prefixLen: 4, from: i, n: int32(x.descSize), low: i + 0x1e, high: -1}
		binary.LittleEndian.PutUint32(own.prefix[:], g)
		s.sums = append(s.sums, own)
	}
}

// extInodes takes all inodes that are not zero.
func (s *surveyor) extInodes(x extShape) {
	for g := range x.groups {
		d := s.bytes(extBlock+int64(g)*x.descSize, int(x.descSize))
		if d == nil {
			return
		}
		table := extBlockNumber(d, 8, 0x28) * extBlock
		first, last := s.within(table, table+int64(x.inodes)*x.inodeSize)
		for _, piece := range s.at[first:last] {
			for at := piece; at < piece+extBlock && s.err == nil; at += x.inodeSize {
				if i := s.place(at, int(x.inodeSize)); s.err == nil && !allZero(s.data[i:int64(i)+x.inodeSize]) {
					s.extInode(x, at, g*x.inodes+uint32((at-table)/x.inodeSize)+1)
				}
			}
		}
	}
}

func (s *surveyor) extInode(x extShape, at int64, number uint32) {
	i := s.place(at, int(x.inodeSize))
	inode := s.data[i : int64(i)+x.inodeSize]
	extra := 0
	if x.inodeSize > 128 {
		extra = int(le16(inode[0x80:]))
	}
	for _, offset := range []int64{0x8, 0xc, 0x10} { // read, changed, written
		s.time(at+offset, seconds32)
	}
	if extra >= 0x18 {
		s.time(at+0x90, seconds32) // made
		if !allZero(inode[0x84:0x90]) || !allZero(inode[0x94:0x98]) {
			s.refusef("inode %d has fractions of seconds", number)
		}
	}
	own := sum{seeded: true, prefixLen: 8, from: i, n: int32(x.inodeSize), low: i + 0x7c, high: -1}
	binary.LittleEndian.PutUint32(own.prefix[:], number)
	copy(own.prefix[4:], inode[0x64:0x68]) // its generation
	flags, isDir := le32(inode[0x20:]), le16(inode)&0xf000 == inodeDir
	first := int64(le32(inode[0x28:]))
	switch {
	case isDir && flags&inodeIndexed != 0, isDir && x.sums && flags&(inodeExtents|inodeInline) == 0:
		s.refusef("directory %d is not one list in extents", number)
	case flags&inodeExtents != 0:
		first = s.extExtents(x, inode[0x28:0x64], own, isDir, 1)
	}
	if number == x.journal {
		s.extJournal(first * extBlock)
	}
	if !x.sums {
		return
	}
	if extra >= 4 {
		own.high = i + 0x82
	}
	s.sums = append(s.sums, own)
}

// extExtents takes the sums of the blocks of an inode's tree of extents, and of a
// directory's own blocks, and returns the first of the file's blocks.
func (s *surveyor) extExtents(x extShape, node []byte, of sum, isDir bool, most uint16) (first int64) {
	entries, depth := int(le16(node[2:])), le16(node[6:])
	if le16(node) != 0xf30a || 12+12*entries > len(node) || depth > most {
		s.refusef("no tree of extents")
		return 0
	}
	for e := 12; e < 12+12*entries && s.err == nil; e += 12 {
		var start int64
		if depth > 0 {
			start = s.extNode(x, int64(le32(node[e+4:]))|int64(le16(node[e+8:]))<<32, of, isDir)
		} else {
			start = int64(le32(node[e+8:])) | int64(le16(node[e+6:]))<<32
			if isDir && x.sums {
				s.extDirectory(start, int64(le16(node[e+4:])), of)
			}
		}
		if e == 12 {
			first = start
		}
	}
	return first
}

// extNode is a block of an inode's tree of extents.
func (s *surveyor) extNode(x extShape, block int64, of sum, isDir bool) (first int64) {
	b := s.bytes(block*extBlock, extBlock)
	if b == nil {
		return 0
	}
	size := 12 + 12*int(le16(b[4:]))
	if size+4 > extBlock {
		s.refusef("a block of %d bytes of extents", size)
		return 0
	}
	first = s.extExtents(x, b[:size], of, isDir, 0)
	if x.sums {
		s.extPart(block, size, size, of)
	}
	return first
}

// extDirectory takes the sums of a directory's blocks.
func (s *surveyor) extDirectory(block, n int64, of sum) {
	const tail = 0xde00000c // a directory entry that is none: 12 bytes, type 0xde
	for end := block + n; block < end; block++ {
		b := s.bytes(block*extBlock, extBlock)
		if b == nil || le32(b[extBlock-8:]) != tail {
			s.refusef("block %d of a directory has no sum", block)
			return
		}
		s.extPart(block, extBlock-12, extBlock-4, of)
	}
}

// extPart is a block of an inode, whose sum begins as the inode's own does.
func (s *surveyor) extPart(block int64, n, low int, of sum) {
	i := s.place(block*extBlock, extBlock)
	of.from, of.n, of.low, of.high = i, int32(n), i+int32(low), 0
	s.sums = append(s.sums, of)
}

// extJournal takes the journal's superblock, which has the filesystem's UUID.
func (s *surveyor) extJournal(at int64) {
	const magic, sumV1, sumV2, sumV3 = 0xc03b3998, 0x1, 0x8, 0x10
	b := s.bytes(at, 1024)
	if b == nil {
		return
	}
	if be32(b) != magic || be32(b[0x24:])&sumV1 != 0 || be32(b[0x28:])&(sumV2|sumV3) != 0 {
		s.refusef("a journal of another kind")
		return
	}
	if uuid(b[0x30:0x40]) == s.uuids[0] {
		s.add(at+0x30, wholeUUID, 0)
	}
}
