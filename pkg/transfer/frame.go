package transfer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/klauspost/compress/s2"
)

const (
	// MaxPiece bounds the payload of a frame, in bytes.
	MaxPiece = 512 << 10

	magic      = "csi-loop transfer 1\n"
	headerSize = 21
	summed     = 17 // bytes of the header that the checksum covers
)

// The kinds of frames.
const (
	kindHead = 'h'
	kindData = 'd'
	kindEnd  = 'e'
	kindFail = 'f'
	kindBeat = 'b'
)

// ErrCorrupt is a stream that is not what was sent.
var ErrCorrupt = errors.New("the copy's data was damaged on its way")

// header is the fixed part of a frame.
type header struct {
	kind           byte
	offset         int64
	length, stored uint32
	sum            uint32
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (h header) encode() (b [headerSize]byte) {
	b[0] = h.kind
	binary.BigEndian.PutUint64(b[1:], uint64(h.offset))
	binary.BigEndian.PutUint32(b[9:], h.length)
	binary.BigEndian.PutUint32(b[13:], h.stored)
	binary.BigEndian.PutUint32(b[17:], h.sum)
	return b
}

func decodeHeader(b [headerSize]byte) header {
	return header{
		kind: b[0], offset: int64(binary.BigEndian.Uint64(b[1:])),
		length: binary.BigEndian.Uint32(b[9:]), stored: binary.BigEndian.Uint32(b[13:]), sum: binary.BigEndian.Uint32(b[17:]),
	}
}

// check refuses what no writer sends, before anything is read for it.
func (h header) check() error {
	if h.length > MaxPiece || h.stored > h.length || h.stored == 0 && h.length > 0 || h.offset < 0 {
		return fmt.Errorf("%w: a frame of %d bytes, stored in %d, at %d", ErrCorrupt, h.length, h.stored, h.offset)
	}
	return nil
}

// sumOf is the checksum of a frame, whose header's own sum is not looked at.
func sumOf(h header, payload []byte) uint32 {
	b := h.encode()
	return crc32.Update(crc32.Checksum(b[:summed], castagnoli), castagnoli, payload)
}

// pack makes a frame in buf, which it grows.
func pack(buf []byte, kind byte, offset int64, payload []byte) []byte {
	buf = grow(buf, headerSize+s2.MaxEncodedLen(len(payload)))
	stored := s2.Encode(buf[headerSize:], payload)
	if len(stored) >= len(payload) {
		stored = payload
	}
	h := header{kind: kind, offset: offset, length: uint32(len(payload)), stored: uint32(len(stored))}
	h.sum = sumOf(h, payload)
	b := h.encode()
	copy(buf, b[:])
	return buf[:headerSize+copy(buf[headerSize:], stored)]
}

// unpack returns a frame's payload: stored itself, or in buf.
func unpack(buf []byte, h header, stored []byte) ([]byte, error) {
	payload := stored
	if h.stored < h.length {
		n, err := s2.DecodedLen(stored)
		if err != nil || n != int(h.length) {
			return nil, fmt.Errorf("%w: a frame says %d bytes, its payload %d (%v)", ErrCorrupt, h.length, n, err) //nolint:errorlint // what the library says of bad input
		}
		if payload, err = s2.Decode(buf, stored); err != nil {
			return nil, fmt.Errorf("%w: %v", ErrCorrupt, err) //nolint:errorlint // as above
		}
	}
	if sumOf(h, payload) != h.sum {
		return nil, fmt.Errorf("%w: checksum of the frame at %d", ErrCorrupt, h.offset)
	}
	return payload, nil
}

// grow returns b with at least n bytes.
func grow(b []byte, n int) []byte {
	if cap(b) < n {
		return make([]byte, n)
	}
	return b[:n]
}
