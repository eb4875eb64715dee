package transfer

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
)

// ErrCut is a stream that ended before its end: a link that was lost, or a node or a
// controller that stopped.
var ErrCut = errors.New("the copy was cut off")

// Reader reads a stream: Head once, then Next until io.EOF. It believes nothing of what
// it reads; see the package's invariants. Errors are ErrCut, ErrCorrupt, a *SenderError of
// the sender, and those of the stream below, which wrap ErrCut.
type Reader struct {
	r           io.Reader
	stored, buf []byte
	sum         hash.Hash
	begun       bool
	size, at    int64 // of the source; behind the last piece
}

// NewReader begins to read a stream.
func NewReader(r io.Reader) *Reader { return &Reader{r: r, sum: sha256.New()} }

// Head waits for the announcement of the source.
func (r *Reader) Head() (d Description, err error) {
	h, payload, err := r.frame()
	if err != nil {
		return d, err
	}
	if h.kind != kindHead {
		return d, fmt.Errorf("%w: it begins with a frame %q", ErrCorrupt, h.kind)
	}
	if err := json.Unmarshal(payload, &d); err != nil || d.Size < 0 {
		return d, fmt.Errorf("%w: what it announces (%v)", ErrCorrupt, err) //nolint:errorlint // of bad input
	}
	r.size = d.Size
	return d, nil
}

// Next returns the next piece, which is good until the call after. io.EOF says that
// what came is whole.
func (r *Reader) Next() (offset int64, data []byte, err error) {
	h, payload, err := r.frame()
	if err != nil {
		return 0, nil, err
	}
	switch h.kind {
	case kindData:
		if len(payload) == 0 || h.offset < r.at || h.offset > r.size || int64(len(payload)) > r.size-h.offset {
			return 0, nil, fmt.Errorf("%w: %d bytes at %d, after %d, of %d", ErrCorrupt, len(payload), h.offset, r.at, r.size)
		}
		r.at = h.offset + int64(len(payload))
		addTo(r.sum, h.offset, payload)
		return h.offset, payload, nil
	case kindEnd:
		if !bytes.Equal(payload, r.sum.Sum(nil)) {
			return 0, nil, fmt.Errorf("%w: the checksum of all", ErrCorrupt)
		}
		return 0, nil, io.EOF
	}
	return 0, nil, fmt.Errorf("%w: a frame %q", ErrCorrupt, h.kind)
}

// frame reads the next frame that is no beat.
func (r *Reader) frame() (header, []byte, error) {
	if !r.begun {
		var b [len(magic)]byte
		if err := r.full(b[:]); err != nil {
			return header{}, nil, err
		}
		if string(b[:]) != magic {
			return header{}, nil, fmt.Errorf("%w: it begins with %q", ErrCorrupt, b)
		}
		r.begun = true
	}
	for {
		h, payload, err := r.one()
		switch {
		case err != nil:
			return header{}, nil, err
		case h.kind == kindBeat:
			continue
		case h.kind == kindFail:
			var f SenderError
			if err := json.Unmarshal(payload, &f); err != nil {
				return header{}, nil, fmt.Errorf("%w: %v", ErrCorrupt, err) //nolint:errorlint // of bad input
			}
			return header{}, nil, &f
		}
		return h, payload, nil
	}
}

func (r *Reader) one() (header, []byte, error) {
	var b [headerSize]byte
	if err := r.full(b[:]); err != nil {
		return header{}, nil, err
	}
	h := decodeHeader(b)
	if err := h.check(); err != nil {
		return header{}, nil, err
	}
	r.stored = grow(r.stored, int(h.stored))
	if err := r.full(r.stored); err != nil {
		return header{}, nil, err
	}
	r.buf = grow(r.buf, int(h.length))
	payload, err := unpack(r.buf, h, r.stored)
	return h, payload, err
}

func (r *Reader) full(b []byte) error {
	switch _, err := io.ReadFull(r.r, b); {
	case err == nil:
		return nil
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return ErrCut
	default:
		return fmt.Errorf("%w: %w", ErrCut, err)
	}
}
