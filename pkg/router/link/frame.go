package link

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
)

// MaxHello bounds a frame, in bytes.
const MaxHello = 64 << 10

// maxHelloItems bounds the items of the lists and objects of a frame, and of an order:
// many more than those of MaxPools pools, of all methods and of all replicas.
const maxHelloItems = 2048

// decode reads JSON that a peer sent, of at most so many items. An empty object is two
// bytes on the wire and can be hundreds in memory, so that bytes alone bound nothing.
// Text with commas counts for more than it is.
func decode(b []byte, v any, items int) error {
	if n := bytes.Count(b, []byte{','}); n >= items {
		return fmt.Errorf("about %d items, at most %d are allowed", n, items)
	}
	return json.Unmarshal(b, v)
}

// WriteFrame sends v as one frame.
func WriteFrame(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > MaxHello {
		return fmt.Errorf("hello of %d bytes is larger than %d", len(b), MaxHello)
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
	return err
}

// ReadFrame receives one frame into v, and not a byte more.
func ReadFrame(r io.Reader, v any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n == 0 || n > MaxHello {
		return fmt.Errorf("not a hello: %d bytes, at most %d are allowed", n, MaxHello)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	if err := decode(b, v, maxHelloItems); err != nil {
		return fmt.Errorf("not a hello: %w", err)
	}
	return nil
}
