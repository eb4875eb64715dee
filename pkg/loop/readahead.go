package loop

import (
	"context"
	"fmt"
	"strconv"
)

// ReadAhead is how many bytes the kernel reads ahead of whoever reads the device
// through the page cache, a filesystem included. ErrNotBound if the binding does not
// exist any more.
func (m *Manager) ReadAhead(ctx context.Context, ref Ref) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	h, _, err := m.openRef(ref)
	if err != nil {
		return 0, err
	}
	defer h.Close()
	return m.readAhead(ref.Number)
}

// SetReadAhead sets it, to a multiple of the page size. That it is so already is
// success. Kernels keep the value for the number's next binding (fact 96), so who sets
// it sets it back before the device goes. ErrNotBound if the binding does not exist
// any more.
func (m *Manager) SetReadAhead(ctx context.Context, ref Ref, bytes int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	// While it is open its binding cannot be replaced.
	h, _, err := m.openRef(ref)
	if err != nil {
		return err
	}
	defer h.Close()
	have, err := m.readAhead(ref.Number)
	if err != nil || have == bytes {
		return err
	}
	if err := m.kernel.SetAttr(ref.Number, attrReadAhead, strconv.FormatInt(bytes>>10, 10)); err != nil {
		return opError("set read-ahead", ref.Number, err)
	}
	if have, err = m.readAhead(ref.Number); err == nil && have != bytes {
		err = opError("set read-ahead", ref.Number, fmt.Errorf("it is %d bytes, not %d", have, bytes))
	}
	return err
}

func (m *Manager) readAhead(number int) (int64, error) {
	text, err := m.kernel.Attr(number, attrReadAhead)
	if err != nil {
		return 0, opError("read "+attrReadAhead, number, err)
	}
	kib, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return 0, opError("read "+attrReadAhead, number, err)
	}
	return kib << 10, nil
}
