package loop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"syscall"
	"time"
)

// Attach binds a device that shows the mapping's range of backing, or reuses one
// that does so already (Device.Reused). backing stays the caller's and may be
// closed afterwards; it must be open for reading and, unless the mapping is
// read-only, for writing. Open it anew for each Attach: one that was attached
// before takes the slow path.
//
// On success the device has exactly the size, access, block size and discard limit
// of the mapping, and counts against the limit. On an error nothing that Attach
// bound stays bound.
//
// Over another mapping of the same file: adjacent ranges are independent. A
// read-only mapping may overlap anything. A writable mapping that overlaps a
// writable one reuses that device if it is equal (image, range, access, block size,
// autoclear, direct I/O, discard and tag), is refused with *ConflictError if not,
// and with ErrBusy if that device is in Rundown.
//
// Errors: *MappingError, *ConflictError, ErrBusy, ErrLimit, ErrDirectIO, ErrDiscard, ErrIdentity
// (the file changed meanwhile), *OpError, the context's.
func (m *Manager) Attach(ctx context.Context, backing *os.File, want Mapping) (*Device, error) {
	st, err := m.kernel.Stat(backing)
	if err != nil {
		return nil, opError("stat image", -1, err)
	}
	switch err := want.Validate(st.Size); {
	case !st.Regular:
		return nil, &MappingError{Field: "backing", Reason: "not a regular file"}
	case err != nil:
		return nil, err
	case !want.ReadOnly && !st.Writable: // the kernel would make the device read-only (fact 6)
		return nil, &MappingError{Field: "ReadOnly", Reason: "a writable device needs a file that is open for reading and writing"}
	}
	unlock, err := m.images.lock(ctx, st.ID)
	if err != nil {
		return nil, err
	}
	defer unlock()

	if sole, err := m.kernel.Sole(backing, beforeBind); err != nil || !sole {
		return m.attachShared(ctx, backing, st.ID, want, nil)
	}
	dev, err := m.bind(ctx, backing, st.ID, want)
	if err != nil {
		return nil, err
	}
	// Still nobody else has the file open, so nobody else shows it; and whoever opens
	// it from now on finds our device.
	if sole, err := m.kernel.Sole(backing, afterBind); err == nil && sole {
		return dev, nil
	}
	return m.attachShared(ctx, backing, st.ID, want, dev)
}

// attachShared attaches an image that somebody else has open. It looks at every
// device before and after the bind: before, to reuse; after, because a program that
// does not honour the flock may have bound the image in between. If two do so at the
// same time each sees the other, and each undoes its own and tries again. dev, if
// not nil, is a device that was just bound.
func (m *Manager) attachShared(ctx context.Context, backing *os.File, image FileID, want Mapping, dev *Device) (_ *Device, err error) {
	defer func() {
		if err != nil && dev != nil {
			err = errors.Join(err, m.undo(ctx, dev))
		}
	}()
	lock, err := m.lockImage(ctx, backing)
	if err != nil {
		return nil, err
	}
	defer func() { _ = lock.Close() }()
	grace := time.Now().Add(m.retry.Settle / 10)
	for try := range m.retry.Attempts {
		if err := m.retry.pause(ctx, try-1); err != nil {
			return nil, err
		}
		if dev == nil {
			reused, err := m.reuse(ctx, backing, image, want)
			switch {
			case errors.Is(err, ErrNotBound):
				continue // unbound since the scan: autoclear, or somebody's losetup -d
			case errors.Is(err, ErrBusy) && time.Now().Before(grace):
				continue // what keeps it may be a passer-by: udev, another manager's scan
			case err != nil || reused != nil:
				return reused, err
			}
			if dev, err = m.bind(ctx, backing, image, want); err != nil {
				return nil, err
			}
		}
		alone, err := m.alone(ctx, backing, dev, want)
		if err != nil {
			return nil, err
		}
		if alone {
			return dev, nil
		}
		ours := dev
		dev = nil
		if err := m.undo(ctx, ours); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: image is being attached by others, %d tries", ErrBusy, m.retry.Attempts)
}

// reuse adopts a device that shows what is wanted; nil if a new one is to be bound.
func (m *Manager) reuse(ctx context.Context, backing *os.File, image FileID, want Mapping) (*Device, error) {
	found, err := m.scan(ctx, backing, image)
	if err != nil {
		return nil, err
	}
	same, err := want.judge(found)
	if err != nil || same == nil {
		return nil, err
	}
	return m.adopt(ctx, same.Ref, &want)
}

// alone tells whether a device that was just bound may stay beside all others over
// the same image.
func (m *Manager) alone(ctx context.Context, backing *os.File, dev *Device, want Mapping) (bool, error) {
	found, err := m.scan(ctx, backing, dev.info.Image)
	if err != nil {
		return false, err
	}
	found = slices.DeleteFunc(found, func(in Info) bool { return in.Ref == dev.Ref() })
	same, err := want.judge(found)
	return err == nil && (same == nil || want.ReadOnly), nil
}

// judge decides what to do beside the devices found over the same file: reuse one,
// bind a new one (nil), or refuse.
func (m Mapping) judge(found []Info) (same *Info, err error) {
	for i, in := range found {
		if in.ReadOnly != m.ReadOnly || !overlaps(m.Offset, m.SizeLimit, in.Offset, in.SizeLimit) {
			continue
		}
		field, have, want := m.differs(in)
		switch {
		case field == "" && in.State == Bound:
			if same == nil {
				same = &found[i]
			}
		case m.ReadOnly: // a device of its own
		case in.State == Rundown, field == "Autoclear" && in.Autoclear:
			// An autoclear flag that was not asked for may be that of LOOP_CLR_FD.
			return nil, fmt.Errorf("image is still attached as %s until its last user leaves: %w", in.Path, ErrBusy)
		default:
			return nil, &ConflictError{Ref: in.Ref, Path: in.Path, Field: field, Have: have, Want: want}
		}
	}
	return same, nil
}

// lockImage takes the image's flock. Other programs that lock images are expected
// to be done soon.
func (m *Manager) lockImage(ctx context.Context, backing *os.File) (io.Closer, error) {
	deadline := time.Now().Add(m.retry.Settle)
	for try := 0; ; try++ {
		lock, err := m.kernel.Lock(backing)
		switch {
		case err == nil:
			return lock, nil
		case !errors.Is(err, syscall.EAGAIN):
			return nil, opError("lock image", -1, err)
		case time.Now().After(deadline):
			return nil, fmt.Errorf("image is locked (flock) by another program: %w", ErrBusy)
		}
		if err := m.retry.pause(ctx, min(try, 4)); err != nil {
			return nil, err
		}
	}
}
