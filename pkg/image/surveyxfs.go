package image

const (
	xfsMaxGroups    = 1 << 12
	xfsMetaUUID     = 1 << 2
	xfsInodeMagic   = 0x494e
	xfsInodeBigTime = 1 << 3
)

// xfsHeaders are the sectors at the start of each allocation group: their magic
// numbers, and where the UUID and the sum are.
var xfsHeaders = []struct {
	magic     string
	uuid, sum int
}{{"XFSB", 32, 224}, {"XAGF", 64, 216}, {"XAGI", 296, 312}, {"XAFL", 8, 32}}

// xfsTrees are the magic numbers of the B-trees of an allocation group.
var xfsTrees = map[string]bool{"AB3B": true, "AB3C": true, "IAB3": true, "FIB3": true, "RMB3": true, "R3FC": true}

// xfs surveys XFS of version 5. Its one UUID is in all that has a sum.
func (s *surveyor) xfs() {
	const block = 4096
	sb := s.bytes(0, 512)
	if sb == nil {
		return
	}
	sector, inode := int64(be16(sb[102:])), int64(be16(sb[104:]))
	groupBlocks, groups := int64(be32(sb[84:])), int64(be32(sb[88:]))
	switch {
	case string(sb[:4]) != "XFSB" || be32(sb[4:]) != block || be16(sb[100:])&0xf != 5:
		s.refusef("no superblock of version 5 for blocks of 4096 bytes")
	case be32(sb[216:])&xfsMetaUUID != 0 || be32(sb[212:]) >= 1<<4 || be32(sb[216:]) >= 1<<5:
		s.refusef("features %#x %#x", be32(sb[212:]), be32(sb[216:]))
	case sector < 512 || sector > block || sector&(sector-1) != 0 || inode < 256 || inode > 2048 || inode&(inode-1) != 0:
		s.refusef("sectors of %d bytes, inodes of %d", sector, inode)
	case groupBlocks <= 0 || groups <= 0 || groups > xfsMaxGroups || sb[124] > 31:
		s.refusef("%d groups of %d blocks", groups, groupBlocks)
	}
	if s.err != nil {
		return
	}
	s.uuids = []uuid{uuid(sb[32:48])}
	known := map[int64]bool{} // blocks
	for g := range groups {
		for i, h := range xfsHeaders {
			at := g*groupBlocks*block + int64(i)*sector
			b := s.bytes(at, int(sector))
			if b == nil || string(b[:4]) != h.magic {
				s.refusef("no %s at %d", h.magic, at)
				return
			}
			s.xfsObject(at, int(sector), h.uuid, h.sum)
			known[at/block] = true
		}
	}
	log := be64(sb[48:])
	at := (int64(log>>sb[124])*groupBlocks + int64(log&(1<<sb[124]-1))) * block
	s.xfsLog(at)
	known[at/block] = true
	for _, at := range s.at {
		if !known[at/block] {
			s.xfsBlock(at, int(inode))
		}
	}
}

// xfsObject is something with a UUID and a sum over all of it.
func (s *surveyor) xfsObject(at int64, n, id, crc int) {
	s.add(at+int64(id), wholeUUID, 0)
	i := s.place(at, n)
	s.sums = append(s.sums, sum{inverted: true, from: i, n: int32(n), low: i + int32(crc)})
}

// xfsBlock is one block of a B-tree or of inodes.
func (s *surveyor) xfsBlock(at int64, inodeSize int) {
	b := s.bytes(at, 4096)
	switch {
	case b == nil:
	case xfsTrees[string(b[:4])]:
		s.xfsObject(at, 4096, 32, 52)
	case be16(b) == xfsInodeMagic:
		for i := 0; i < 4096; i += inodeSize {
			if be16(b[i:]) != xfsInodeMagic {
				s.refusef("no inode at %d", at+int64(i))
				return
			}
			s.xfsInode(at+int64(i), b[i:i+inodeSize])
		}
	default:
		s.refusef("something unknown at %d", at)
	}
}

func (s *surveyor) xfsInode(at int64, b []byte) {
	s.xfsObject(at, len(b), 160, 100)
	if b[4] != 3 {
		s.refusef("an inode of version %d", b[4])
	}
	if be16(b[2:]) == 0 { // its mode: not in use
		return
	}
	kind := bigSeconds32
	if be64(b[120:])&xfsInodeBigTime != 0 {
		kind = bigTime
	}
	for _, offset := range []int64{32, 40, 48, 144} { // read, written, changed, made
		s.time(at+offset, kind)
	}
}

// xfsLog is the one record of an empty log. mkfs leaves its sum 0.
func (s *surveyor) xfsLog(at int64) {
	const magic = 0xfeedbabe
	b := s.bytes(at, 512)
	if b == nil {
		return
	}
	if be32(b) != magic || be32(b[32:]) != 0 || uuid(b[304:320]) != s.uuids[0] {
		s.refusef("a log of another kind")
		return
	}
	s.add(at+304, wholeUUID, 0)
}
