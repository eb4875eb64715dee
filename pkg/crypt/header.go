package crypt

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// What of a LUKS2 header's layout matters here; numbers are big-endian.
const (
	headerBytes   = 4096 // of the binary part, which the JSON text follows
	atVersion     = 6
	atHeaderSize  = 8
	atSequence    = 16
	atLabel       = 24
	labelBytes    = 48
	atChecksumAlg = 72
	atUUID        = 168
	uuidBytes     = 40
	atOffset      = 256 // of the header itself, from the start of the device
	atChecksum    = 448
	checksumBytes = 64

	// areaBytes is the size of each copy of the header, text included; Format pins it.
	areaBytes = 16 << 10
)

// The two copies begin differently, so that none is taken for the other.
var magics = [2]string{"LUKS\xba\xbe", "SKUL\xba\xbe"}

// Header is what is read of a LUKS2 header.
type Header struct {
	UUID  string
	Label string
}

// ReadHeader reads the header that Format made, from the newer of its two whole copies.
// ErrNoHeader when none is whole, ErrForeign when there is one of another layout; any
// other error is that of reading.
func ReadHeader(r io.ReaderAt) (Header, error) {
	copies, err := ReadCopies(r)
	if err != nil {
		return Header{}, err
	}
	return copies[0], nil
}

// ReadCopies is ReadHeader for all copies that are whole: one or two, the newer first.
// They differ where a change of the header was cut short, or reached one of them only.
func ReadCopies(r io.ReaderAt) ([]Header, error) {
	var copies []Header
	var first uint64 // the sequence number of copies[0]
	for copyNumber, magic := range magics {
		area := make([]byte, areaBytes)
		offset := int64(copyNumber) * areaBytes
		if n, err := r.ReadAt(area, offset); n < len(area) {
			if errors.Is(err, io.EOF) {
				continue
			}
			return nil, fmt.Errorf("read the LUKS2 header: %w", err)
		}
		if copyNumber == 0 && isForeign(area) {
			return nil, ErrForeign
		}
		h, sequence, ok := parseHeader(area, magic, uint64(offset))
		switch {
		case !ok:
		case len(copies) > 0 && sequence > first:
			copies = []Header{h, copies[0]}
		default:
			copies, first = append(copies, h), sequence
		}
	}
	if len(copies) == 0 {
		return nil, ErrNoHeader
	}
	return copies, nil
}

// isForeign says whether a device begins with a LUKS header of a layout that Format does
// not make: version 1, or 2 with copies of another size. What is in the first sector of one
// is there as a whole or not at all.
func isForeign(area []byte) bool {
	if string(area[:len(magics[0])]) != magics[0] {
		return false
	}
	number := binary.BigEndian
	size := number.Uint64(area[atHeaderSize:])
	switch number.Uint16(area[atVersion:]) {
	case 1:
		return true
	case 2:
		return size > areaBytes && size <= 4<<20 && size&(size-1) == 0
	}
	return false
}

// parseHeader reads one copy; false unless it is whole.
func parseHeader(area []byte, magic string, offset uint64) (h Header, sequence uint64, ok bool) {
	number := binary.BigEndian
	switch {
	case string(area[:len(magic)]) != magic,
		number.Uint16(area[atVersion:]) != 2,
		number.Uint64(area[atHeaderSize:]) != areaBytes,
		number.Uint64(area[atOffset:]) != offset,
		text(area[atChecksumAlg:atChecksumAlg+32]) != "sha256":
		return h, 0, false
	}
	said := bytes.Clone(area[atChecksum : atChecksum+sha256.Size])
	clear(area[atChecksum : atChecksum+checksumBytes])
	if sum := sha256.Sum256(area); !bytes.Equal(sum[:], said) {
		return h, 0, false
	}
	return Header{
		UUID:  text(area[atUUID : atUUID+uuidBytes]),
		Label: text(area[atLabel : atLabel+labelBytes]),
	}, number.Uint64(area[atSequence:]), true
}

// text is a string that ends with its first NUL.
func text(b []byte) string {
	before, _, _ := bytes.Cut(b, []byte{0})
	return string(before)
}
