package image

import (
	"crypto/rand"
	"encoding/binary"
	"hash/crc32"
	"math"
	"time"
)

type uuid = [16]byte

// newUUID makes a random one, as mkfs does (RFC 9562, version 4).
func newUUID() (u uuid) {
	_, _ = rand.Read(u[:])
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80
	return u
}

// fsIdentity is all that differs between two filesystems that one mkfs makes with the
// same arguments.
type fsIdentity struct {
	uuids []uuid // in an order that is the filesystem's own
	when  time.Time
}

// A field is a place of a filesystem that holds a part of its identity.
type field struct {
	at    int32 // in the data of blocks
	kind  fieldKind
	which uint8 // of the UUIDs
}

type fieldKind uint8

const (
	wholeUUID fieldKind = iota
	firstHalf           // of a UUID, in the key of a btrfs item
	secondHalf
	crcOfUUID    // of the first: ext4's checksum seed
	seconds32    // little endian
	seconds64    // the same, and nanoseconds in 4 bytes more
	bigSeconds32 // big endian, and nanoseconds in 4 bytes more
	bigTime      // XFS: nanoseconds since 1901
)

// width is how many bytes a field of that kind has.
func (k fieldKind) width() int {
	switch k {
	case wholeUUID:
		return 16
	case crcOfUUID, seconds32:
		return 4
	case seconds64:
		return 12
	case firstHalf, secondHalf, bigSeconds32, bigTime:
	}
	return 8
}

func (k fieldKind) isTime() bool { return k >= seconds32 }

// bigTimeEpoch is the beginning of XFS's bigtime, in Unix seconds.
const bigTimeEpoch = math.MinInt32

// put writes a field.
func (x field) put(b []byte, id fsIdentity) {
	b = b[x.at:]
	switch x.kind {
	case wholeUUID:
		copy(b, id.uuids[x.which][:])
	case firstHalf:
		copy(b, id.uuids[x.which][:8])
	case secondHalf:
		copy(b, id.uuids[x.which][8:])
	case crcOfUUID:
		binary.LittleEndian.PutUint32(b, crc32c(math.MaxUint32, id.uuids[0][:]))
	case seconds32, seconds64, bigSeconds32, bigTime:
		x.kind.putTime(b, id.when)
	}
}

func (k fieldKind) putTime(b []byte, t time.Time) {
	switch k {
	case seconds32:
		binary.LittleEndian.PutUint32(b, uint32(t.Unix()))
	case seconds64: // mkfs.btrfs leaves the nanoseconds 0
		binary.LittleEndian.PutUint64(b, uint64(t.Unix()))
	case bigSeconds32:
		binary.BigEndian.PutUint32(b, uint32(t.Unix()))
		binary.BigEndian.PutUint32(b[4:], uint32(t.Nanosecond()))
	case bigTime:
		binary.BigEndian.PutUint64(b, uint64((t.Unix()-bigTimeEpoch)*1e9+int64(t.Nanosecond())))
	case wholeUUID, firstHalf, secondHalf, crcOfUUID:
	}
}

func (k fieldKind) time(b []byte) time.Time {
	switch k {
	case seconds32:
		return time.Unix(int64(binary.LittleEndian.Uint32(b)), 0)
	case seconds64:
		return time.Unix(int64(binary.LittleEndian.Uint64(b)), int64(binary.LittleEndian.Uint32(b[8:])))
	case bigSeconds32:
		return time.Unix(int64(int32(binary.BigEndian.Uint32(b))), int64(binary.BigEndian.Uint32(b[4:])))
	case bigTime, wholeUUID, firstHalf, secondHalf, crcOfUUID: // only the first is a time
	}
	n := binary.BigEndian.Uint64(b)
	return time.Unix(int64(n/1e9)+bigTimeEpoch, int64(n%1e9))
}

// A sum is a CRC-32C over a part of a filesystem that has fields in it.
type sum struct {
	prefix    [8]byte // what comes before the part
	prefixLen uint8
	seeded    bool // begins with the CRC of the first UUID
	inverted  bool
	from      int32 // in the data of blocks; -1 for zeros
	n         int32
	low       int32 // where it is stored: all of it if high is 0,
	high      int32 // or its halves; -1 if the upper one is not stored
}

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	zeroPiece  [4096]byte
)

// crc32c goes on with a CRC, without the inversions of package crc32.
func crc32c(crc uint32, b []byte) uint32 { return ^crc32.Update(^crc, castagnoli, b) }

// put computes a sum and stores it. Where it is stored counts as zero.
func (s *sum) put(b []byte, seed uint32) {
	low, high := b[s.low:s.low+2], []byte(nil)
	switch {
	case s.high == 0:
		high = b[s.low+2 : s.low+4]
	case s.high > 0:
		high = b[s.high : s.high+2]
	}
	clear(low)
	clear(high)
	crc := uint32(math.MaxUint32)
	if s.seeded {
		crc = seed
	}
	crc = crc32c(crc, s.prefix[:s.prefixLen])
	if s.from < 0 {
		crc = crc32c(crc, zeroPiece[:s.n])
	} else {
		crc = crc32c(crc, b[s.from:s.from+s.n])
	}
	if s.inverted {
		crc = ^crc
	}
	binary.LittleEndian.PutUint16(low, uint16(crc))
	if high != nil {
		binary.LittleEndian.PutUint16(high, uint16(crc>>16))
	}
}

// plan is how to give a filesystem another identity.
type plan struct {
	fields []field
	sums   []sum // in the order in which they depend on each other
}

// stamp makes data, which the plan was made for, a filesystem with that identity.
// With a zero time those in it stay.
func (p *plan) stamp(data []byte, id fsIdentity) {
	for _, x := range p.fields {
		if !x.kind.isTime() || !id.when.IsZero() {
			x.put(data, id)
		}
	}
	seed := uint32(0)
	if len(id.uuids) > 0 {
		seed = crc32c(math.MaxUint32, id.uuids[0][:])
	}
	for i := range p.sums {
		p.sums[i].put(data, seed)
	}
}
