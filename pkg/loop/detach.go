package loop

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"syscall"
	"time"
)

// Hold adopts a device that is bound already, after a restart for example: it opens
// it and counts it against the limit, which does not refuse it. ErrNotBound if the
// binding does not exist any more.
func (m *Manager) Hold(ctx context.Context, ref Ref) (*Device, error) {
	return m.adopt(ctx, ref, nil)
}

// adopt opens a bound device. With a mapping, it must still be equal to it.
func (m *Manager) adopt(ctx context.Context, ref Ref, want *Mapping) (*Device, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	h, path, err := m.openRef(ref)
	if err != nil {
		return nil, err
	}
	info, err := m.describe(ref.Number, path, h)
	if err == nil && want != nil {
		if field, _, _ := want.differs(info); field != "" { // cleared since the scan
			err = opError("reuse", ref.Number, ErrNotBound)
		}
	}
	if err != nil {
		_ = h.Close()
		return nil, err
	}
	m.mu.Lock()
	m.attached[ref.Number] = ref.DiskSeq
	m.seen[ref.Number] = true
	m.mu.Unlock()
	return m.newDevice(h, info, true), nil
}

// openRef opens a device and checks on the open handle that it is that binding.
// While the handle is open the binding cannot be replaced. ErrNotBound if it is
// gone, or is on its way out and cannot be opened any more (ENXIO, too).
func (m *Manager) openRef(ref Ref) (handle, string, error) {
	h, path, err := m.open(ref.Number, forReading)
	switch {
	case errors.Is(err, syscall.ENXIO): // running down
		return nil, "", opError("open", ref.Number, fmt.Errorf("%w: %w", ErrNotBound, syscall.ENXIO))
	case errors.Is(err, ErrNotExist), errors.Is(err, syscall.ENODEV):
		return nil, "", opError("open", ref.Number, ErrNotBound)
	case err != nil:
		return nil, "", err
	}
	bound, err := isBinding(h, ref)
	if err == nil && !bound {
		err = opError("open", ref.Number, ErrNotBound)
	}
	if err != nil {
		_ = h.Close()
		return nil, "", err
	}
	return h, path, nil
}

// isBinding tells whether an open device is bound, and that binding.
func isBinding(h handle, ref Ref) (bool, error) {
	seq, err := h.DiskSeq()
	if err != nil {
		return false, opError("get diskseq", ref.Number, err)
	}
	// LOOP_GET_STATUS64 asks the image's file system for the inode, and answers its error
	// where that is dead (EIO of an XFS that shut down). Only ENXIO says "unbound".
	_, err = h.Status()
	return !errors.Is(err, syscall.ENXIO) && seq == ref.DiskSeq, nil
}

// Status describes a binding, or returns ErrNotBound if it does not exist any more.
// It claims nothing, so State is Bound also for an autoclear device in Rundown.
func (m *Manager) Status(ctx context.Context, ref Ref) (Info, error) {
	if err := ctx.Err(); err != nil {
		return Info{}, err
	}
	h, path, err := m.openRef(ref)
	if err != nil {
		return Info{}, err
	}
	defer h.Close()
	return m.describe(ref.Number, path, h)
}

// Detach clears a binding and returns nil when it was seen gone; that it was gone
// already is success. All Devices of the binding must be closed first.
//
// While somebody else has the device open it stays bound (state Rundown) and usable
// for him, and is unbound when he leaves. Detach waits for that a few seconds
// (Retry.Settle) at most, then returns ErrBusy.
func (m *Manager) Detach(ctx context.Context, ref Ref) error {
	if n := m.heldCount(ref); n > 0 {
		return opError("clear", ref.Number, fmt.Errorf("held by %d open Device(s) of this manager: %w", n, ErrBusy))
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	h, _, err := m.openRef(ref)
	switch {
	case errors.Is(err, syscall.ENXIO): // cleared already, not finished
		return m.WaitUnbound(ctx, ref)
	case errors.Is(err, ErrNotBound):
		m.forget(ref)
		return nil
	case err != nil:
		return err
	}
	// Bound or Rundown, and both may be cleared. On ENXIO the device is unbound.
	err = h.Clear()
	_ = h.Close() // an opener, too: from 6.11 on only the last close unbinds (fact 31)
	if err != nil && !errors.Is(err, syscall.ENXIO) {
		return opError("clear", ref.Number, err)
	}
	return m.WaitUnbound(ctx, ref)
}

// WaitUnbound returns nil when the binding was seen gone. It is for autoclear
// devices whose mount or Device was just closed: the kernel unbinds them at the
// last close, which may be that of a passer-by (udev). It waits as Detach does and
// returns ErrBusy.
func (m *Manager) WaitUnbound(ctx context.Context, ref Ref) error {
	deadline := time.Now().Add(m.retry.Settle)
	for try := 0; ; try++ {
		gone, err := m.gone(ref)
		if err != nil {
			return err
		}
		if gone {
			m.forget(ref)
			return nil
		}
		if time.Now().After(deadline) {
			return opError("wait for unbind", ref.Number, ErrBusy)
		}
		if err := m.retry.pause(ctx, try); err != nil {
			return opError("wait for unbind", ref.Number, fmt.Errorf("%w: %w", ErrBusy, err))
		}
	}
}

// mayBeBound asks sysfs, which makes us no opener. False is certain.
func (m *Manager) mayBeBound(ref Ref) bool {
	seq, err := m.kernel.Attr(ref.Number, attrDiskSeq)
	if err != nil {
		return !absent(err)
	}
	return seq == strconv.FormatUint(ref.DiskSeq, 10)
}

// gone tells whether the binding is seen to be gone: the number is not registered,
// or the device can be opened and is unbound or bound to something else.
func (m *Manager) gone(ref Ref) (bool, error) {
	if m.mayBeBound(ref) {
		if _, err := m.kernel.Attr(ref.Number, attrBackingFile); !absent(err) {
			return false, nil
		}
	}
	// Diskseq changes and backing_file goes before the kernel is finished: until it
	// is, open says ENXIO (fact 32).
	h, _, err := m.open(ref.Number, forReading)
	switch {
	case errors.Is(err, syscall.ENXIO):
		return false, nil
	case errors.Is(err, ErrNotExist), errors.Is(err, syscall.ENODEV):
		return true, nil
	case err != nil:
		return false, err
	}
	defer h.Close()
	bound, err := isBinding(h, ref)
	return err == nil && !bound, err
}

// undo detaches a device that Attach must not return.
func (m *Manager) undo(ctx context.Context, dev *Device) error {
	dev.mu.Lock()
	h := dev.handle
	dev.handle = nil
	dev.mu.Unlock()
	m.mu.Lock()
	delete(m.held, dev.Ref())
	m.mu.Unlock()
	return m.unbind(ctx, dev.Ref(), h)
}

// clearTries is how often a device that nobody else knows of is cleared. What is left
// bound then, no later call would find: another attempt takes another device.
const clearTries = 8

// unbind clears a device that we bound, by a handle that has been open since, closes
// the handle, and waits for the end also when ctx has ended. DiskSeq 0 means that it
// is not known.
func (m *Manager) unbind(ctx context.Context, ref Ref, h handle) error {
	ctx = context.WithoutCancel(ctx)
	if ref.DiskSeq == 0 {
		ref.DiskSeq, _ = h.DiskSeq()
	}
	var err error
	for try := range clearTries {
		if err = h.Clear(); err == nil {
			break
		}
		gone := errors.Is(err, syscall.ENXIO)
		if ref.DiskSeq != 0 {
			bound, serr := isBinding(h, ref)
			gone = serr == nil && !bound
		}
		if gone {
			err = nil
			break
		}
		_ = m.retry.pause(ctx, try)
	}
	_ = h.Close()
	if err != nil {
		return opError("clear", ref.Number, err)
	}
	return m.WaitUnbound(ctx, ref)
}

// Grow makes a device follow its image, which has grown, and returns its size in
// bytes. It may be mounted. A mapping with a size limit stays as it is (fact 40).
// ErrNotBound if the binding does not exist any more.
func (m *Manager) Grow(ctx context.Context, ref Ref) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	h, _, err := m.openRef(ref)
	if err != nil {
		return 0, err
	}
	defer h.Close()
	// O_RDONLY is enough with CAP_SYS_ADMIN (fact 7).
	if err := h.SetCapacity(); err != nil {
		return 0, opError("set capacity", ref.Number, err)
	}
	size, _, err := h.Geometry()
	return size, opError("get size", ref.Number, err)
}

// DropCache makes the device's page cache forget what was read through it, so that
// the next read comes from the image. Needed where an image has two devices: each
// has a cache of its own, which lives until the device's last close, so that a
// reader on one would go on seeing what the other has overwritten since.
// ErrNotBound if the binding does not exist any more.
func (m *Manager) DropCache(ctx context.Context, ref Ref) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	h, _, err := m.openRef(ref)
	if err != nil {
		return err
	}
	defer h.Close()
	return opError("drop cache", ref.Number, h.DropCache())
}

// Sync makes what was written to the device's node, and lies in its page cache, be in
// the image (fact 64). What a mounted filesystem has in memory is not concerned.
// ErrNotBound if the binding does not exist any more.
func (m *Manager) Sync(ctx context.Context, ref Ref) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	h, _, err := m.openRef(ref)
	if err != nil {
		return err
	}
	defer h.Close()
	return opError("sync", ref.Number, h.Sync())
}
