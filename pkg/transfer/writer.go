package transfer

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"
	"time"
)

// Writer writes a stream: Head, Data, then End; or Fail. Beats may come from another
// goroutine. The first error of the stream below is that of all later calls.
type Writer struct {
	mu   sync.Mutex
	w    io.Writer // guarded by mu
	buf  []byte    // guarded by mu
	sum  hash.Hash // guarded by mu
	err  error     // guarded by mu
	over bool      // guarded by mu; the last frame was written
	last time.Time // guarded by mu; when a frame was written
}

// NewWriter begins a stream.
func NewWriter(w io.Writer) *Writer {
	return &Writer{w: w, sum: sha256.New()}
}

// Head announces the source.
func (w *Writer) Head(d Description) error {
	b, err := json.Marshal(d)
	if err != nil {
		return err
	}
	return w.frame(kindHead, 0, b, false)
}

// Data sends a piece of at most MaxPiece bytes.
func (w *Writer) Data(offset int64, b []byte) error {
	if len(b) == 0 || len(b) > MaxPiece {
		return fmt.Errorf("BUG: a piece of %d bytes", len(b))
	}
	return w.frame(kindData, offset, b, false)
}

// End says that all was sent.
func (w *Writer) End() error {
	w.mu.Lock()
	sum := w.sum.Sum(nil)
	w.mu.Unlock()
	return w.frame(kindEnd, 0, sum, true)
}

// Fail says why the stream has no end.
func (w *Writer) Fail(f SenderError) error {
	const most = 4096
	if len(f.Message) > most {
		f.Message = f.Message[:most]
	}
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	return w.frame(kindFail, 0, b, true)
}

// Beating sends beats while there is nothing else to send, until stop, which waits for
// the last. A Writer that cannot write ends ctx.
func (w *Writer) Beating(ctx context.Context, every time.Duration) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if err := w.beat(every); err != nil {
				cancel(err)
				return
			}
		}
	})
	return ctx, func() {
		cancel(nil)
		wg.Wait()
	}
}

// beat writes a beat if there was no other frame.
func (w *Writer) beat(every time.Duration) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.over || time.Since(w.last) < every/2 {
		return nil
	}
	return w.write(kindBeat, 0, nil)
}

func (w *Writer) frame(kind byte, offset int64, payload []byte, last bool) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.over {
		return errors.New("BUG: a frame behind the last one")
	}
	w.over = last
	if kind == kindData {
		addTo(w.sum, offset, payload)
	}
	return w.write(kind, offset, payload)
}

// write writes one frame. Precondition: w.mu is held.
func (w *Writer) write(kind byte, offset int64, payload []byte) error {
	if w.err != nil {
		return w.err
	}
	w.buf = pack(w.buf, kind, offset, payload)
	b := w.buf
	if w.last.IsZero() {
		b = append([]byte(magic), b...)
	}
	w.last = time.Now()
	if _, err := w.w.Write(b); err != nil {
		w.err = err
	}
	return w.err
}

// addTo adds a piece to the checksum of all.
func addTo(sum hash.Hash, offset int64, payload []byte) {
	var b [12]byte
	binary.BigEndian.PutUint64(b[:], uint64(offset))
	binary.BigEndian.PutUint32(b[8:], uint32(len(payload)))
	_, _ = sum.Write(b[:])
	_, _ = sum.Write(payload)
}
