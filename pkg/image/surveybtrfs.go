package image

import (
	"bytes"
	"encoding/binary"
)

const (
	btrfsSuper        = 64 << 10
	btrfsSuperSize    = 4096
	btrfsMagic        = "_BHRfS_M"
	btrfsMetadataUUID = 1 << 10
	btrfsHeader       = 101
	btrfsUUIDTree     = 9
	btrfsUUIDItem     = 251
)

// btrfs surveys btrfs with CRC-32C. Its UUIDs are the filesystem's, the device's, that
// of the chunk tree, and those of subvolumes. mkfs leaves blocks that it wrote and
// gave up again; they get the new identity as well.
func (s *surveyor) btrfs() {
	sb := s.bytes(btrfsSuper, btrfsSuperSize)
	if sb == nil {
		return
	}
	node := int(le32(sb[148:]))
	switch {
	case string(sb[64:72]) != btrfsMagic || le32(sb[144:]) != 4096 || node != s.grain:
		s.refusef("no superblock for sectors of 4096 bytes and nodes of %d", s.grain)
	case le16(sb[196:]) != 0 || binary.LittleEndian.Uint64(sb[188:])&btrfsMetadataUUID != 0:
		s.refusef("checksums of kind %d, or a UUID of the metadata", le16(sb[196:]))
	}
	if s.err != nil {
		return
	}
	fsid, device := uuid(sb[32:48]), uuid(sb[267:283])
	s.uuids = []uuid{fsid, device}
	for i, at := range s.at {
		b := s.data[i*s.grain : (i+1)*s.grain]
		super := int(btrfsSuper % int64(s.grain)) // 0 but for nodes that are larger
		switch {
		case string(b[super+64:super+72]) == btrfsMagic && (at == btrfsSuper || at == 64<<20 || at == 256<<30):
			if !allZero(b[btrfsSuperSize:]) {
				s.refusef("something behind the superblock at %d", at)
			}
			s.btrfsSum(at, btrfsSuperSize)
		case uuid(b[32:48]) == fsid:
			s.btrfsNode(at, b)
		default:
			s.refusef("something unknown at %d", at)
		}
	}
	for k, u := range s.uuids {
		for i := 0; ; {
			n := bytes.Index(s.data[i:], u[:])
			if n < 0 {
				break
			}
			i += n
			s.fields = append(s.fields, field{at: int32(i), kind: wholeUUID, which: uint8(k)})
			i += len(u)
		}
	}
}

func (s *surveyor) btrfsSum(at int64, n int) {
	i := s.place(at, n)
	s.sums = append(s.sums, sum{inverted: true, from: i + 32, n: int32(n) - 32, low: i})
}

// uuid returns the number of a UUID, which is a new one if it was not met before.
func (s *surveyor) uuid(u uuid) int {
	for i, known := range s.uuids {
		if u == known {
			return i
		}
	}
	s.uuids = append(s.uuids, u)
	return len(s.uuids) - 1
}

// btrfsNode is one block of a tree, in use or given up.
func (s *surveyor) btrfsNode(at int64, b []byte) {
	s.btrfsSum(at, len(b))
	s.uuid(uuid(b[64:80])) // of the chunk tree
	owner, items, level := binary.LittleEndian.Uint64(b[88:]), int(le32(b[96:])), b[100]
	if level != 0 || items > (len(b)-btrfsHeader)/25 {
		s.refusef("a tree of %d levels, or %d items", level, items)
		return
	}
	if owner == btrfsUUIDTree && items > 1 {
		s.refusef("%d subvolumes, whose order would change", items)
	}
	for i := range items {
		item := b[btrfsHeader+25*i:]
		offset, size := btrfsHeader+int(le32(item[17:])), int(le32(item[21:]))
		if offset < btrfsHeader || size < 0 || offset > len(b) || size > len(b)-offset {
			s.refusef("an item at %d of %d bytes", offset, size)
			return
		}
		s.btrfsItem(at, int64(btrfsHeader+25*i), item[:17], int64(offset), b[offset:offset+size])
	}
}

// btrfsItem is one item of a leaf: its key is at key, its content at offset.
func (s *surveyor) btrfsItem(at, key int64, k []byte, offset int64, content []byte) {
	const inode, root = 1, 132
	switch kind := k[8]; {
	case kind == btrfsUUIDItem:
		u := s.uuid(uuid(append(bytes.Clone(k[:8]), k[9:17]...)))
		s.add(at+key, firstHalf, u)
		s.add(at+key+9, secondHalf, u)
	case kind == inode && len(content) >= 160:
		for _, x := range []int64{112, 124, 136, 148} { // read, changed, written, made
			s.time(at+offset+x, seconds64)
		}
	case kind == root && len(content) >= 439:
		if u := uuid(content[247:263]); u != (uuid{}) {
			s.uuid(u)
		}
		for _, x := range []int64{112, 124, 136, 148, 327, 339, 351, 363} { // of its own inode, and its own
			s.time(at+offset+x, seconds64)
		}
	}
}
